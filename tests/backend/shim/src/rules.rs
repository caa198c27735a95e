//! The control file's language: `FUNCTION WHEN ACTION`, one rule a line, `#` for comments.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cryptoki_sys::CK_RV;

use crate::forward::NAMES;

/// Which calls a rule means, counted from the moment it was read.
#[derive(Clone, Copy)]
enum When {
    Nth(u64),
    Always,
    After(u64),
}

/// What happens to a call that a rule means.
#[derive(Clone)]
pub enum Action {
    /// Nothing; the match is counted in `rules_fired`.
    Count,
    /// Answers with a code and does not call the real module.
    Return(CK_RV),
    /// Calls the real module and answers with a code all the same.
    ReturnAfter(CK_RV),
    /// Where the real module answers with the first code, answers with the second.
    Translate(CK_RV, CK_RV),
    /// A boolean attribute is reported as what it is not.
    Turn(u64),
    /// Waits first.
    Sleep(Duration),
    /// Tries a system call and says what came of it.
    Attempt(String),
    /// Waits until the rule is gone from the control file.
    Hang,
    /// abort(3).
    Abort,
    /// Calls the real module, then abort(3): done, and nobody was told.
    AbortAfter,
    /// A memory fault.
    Segv,
    /// Closes every session of this program first.
    CloseAllSessions,
    /// The reported output length is one less than it was.
    Short,
    /// The reported output length is one more than it was.
    Long,
    /// One bit of the output is turned over.
    Corrupt,
    /// The output is all zero bytes.
    Zero,
    /// The IV in the caller's parameters is replaced before the call, as by a device that makes its own.
    WriteIv,
    /// The same, but the caller sees it only after `C_Encrypt`.
    WriteIvLate,
    /// The same, and always with the same IV, as by a device whose generator is stuck.
    SameIv,
    /// All slot numbers are greater by so many.
    Slots(u64),
    /// Adds token flags.
    Flags(u64),
    /// Another serial number.
    Serial(String),
    /// Another label.
    Label(String),
}

/// One line of the control file.
pub struct Rule {
    /// Place of the function in the function list.
    pub function: usize,
    /// What to do.
    pub action: Action,
    /// The line as it was written; tells whether a hanging rule is still there.
    pub line: String,
    when: When,
    calls: AtomicU64,
}

/// Why a line is no rule.
pub enum BadRule {
    Shape,
    Function,
    When,
    Action,
    /// The action does nothing with this function.
    Pointless,
}

impl fmt::Display for BadRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shape => "a rule is FUNCTION WHEN ACTION",
            Self::Function => "not a function of the 2.40 list",
            Self::When => "WHEN is a number from 1, '*' or 'after:NUMBER'",
            Self::Action => "unknown action",
            Self::Pointless => "this action means nothing for this function",
        })
    }
}

impl Rule {
    /// Reads one line.
    pub fn parse(line: &str) -> Result<Self, BadRule> {
        let mut words = line.splitn(3, char::is_whitespace);
        let (Some(name), Some(when), Some(action)) = (words.next(), words.next(), words.next()) else {
            return Err(BadRule::Shape);
        };
        let function = NAMES.iter().position(|known| *known == name).ok_or(BadRule::Function)?;
        let when = When::parse(when).ok_or(BadRule::When)?;
        let action = Action::parse(action.trim()).ok_or(BadRule::Action)?;
        if !action.fits(name) {
            return Err(BadRule::Pointless);
        }
        Ok(Self { function, action, line: line.to_owned(), when, calls: AtomicU64::new(0) })
    }

    /// Counts a call of the rule's function, and says whether the rule means this one.
    pub fn matches(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        match self.when {
            When::Nth(n) => call == n,
            When::Always => true,
            When::After(n) => call > n,
        }
    }
}

impl When {
    fn parse(text: &str) -> Option<Self> {
        match text.strip_prefix("after:") {
            Some(n) => Some(Self::After(n.parse().ok()?)),
            None if text == "*" => Some(Self::Always),
            None => Some(Self::Nth(text.parse().ok().filter(|n| *n > 0)?)),
        }
    }
}

impl Action {
    fn parse(text: &str) -> Option<Self> {
        Some(match text.split_once(':') {
            Some(("return", code)) => Self::Return(number(code)?),
            Some(("return-after", code)) => Self::ReturnAfter(number(code)?),
            Some(("translate", codes)) => {
                let (from, to) = codes.split_once('=')?;
                Self::Translate(number(from)?, number(to)?)
            }
            Some(("turn", attribute)) => Self::Turn(number(attribute)?),
            Some(("sleep", ms)) => Self::Sleep(Duration::from_millis(number(ms)?)),
            Some(("attempt", name)) if crate::attempt::NAMES.contains(&name) => {
                Self::Attempt(name.to_owned())
            }
            Some(("flags", flags)) => Self::Flags(number(flags)?),
            Some(("slots", offset)) => Self::Slots(number(offset)?),
            Some(("serial", serial)) => Self::Serial(serial.to_owned()),
            Some(("label", label)) => Self::Label(label.to_owned()),
            _ => Self::parse_plain(text)?,
        })
    }

    fn parse_plain(text: &str) -> Option<Self> {
        Some(match text {
            "count" => Self::Count,
            "hang" => Self::Hang,
            "abort" => Self::Abort,
            "abort-after" => Self::AbortAfter,
            "segv" => Self::Segv,
            "close-all-sessions" => Self::CloseAllSessions,
            "short" => Self::Short,
            "long" => Self::Long,
            "corrupt" => Self::Corrupt,
            "zero" => Self::Zero,
            "same-iv" => Self::SameIv,
            "write-iv" => Self::WriteIv,
            "write-iv-late" => Self::WriteIvLate,
            _ => return None,
        })
    }

    fn fits(&self, function: &str) -> bool {
        match self {
            Self::Flags(_) | Self::Serial(_) | Self::Label(_) => function == "C_GetTokenInfo",
            Self::WriteIv | Self::WriteIvLate | Self::SameIv => function == "C_EncryptInit",
            Self::Turn(_) => function == "C_GetAttributeValue",
            Self::Slots(_) => function == "C_GetSlotList",
            Self::Short | Self::Long => crate::forward::has_output(function),
            Self::Corrupt | Self::Zero => {
                crate::forward::has_output(function) || function == "C_GenerateRandom"
            }
            _ => true,
        }
    }
}

/// Decimal, or hexadecimal after `0x`.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
