//! The bytes of a record: `docs/formats/audit-v1.md`, in code.
//!
//! A record is written in two steps. The requester writes a [`Draft`] with everything it knows; the
//! appender puts the number in front and the hash of the line before at the end ([`seal`]). Member
//! order is fixed, and nothing is ever serialised again: what is hashed is what is kept and served.

use std::fmt::Write;

use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::audit::model::{Action, Event, Outcome};
use crate::clock::Timestamp;
use crate::identity::Caller;
use crate::ids::TenantId;

/// A value longer than this is cut; the log is about names and numbers.
const VALUE_MAX: usize = 256;

/// The hash that the first record names as its predecessor.
pub(super) const GENESIS: [u8; 32] = [0; 32];

/// What kind of record it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Intent,
    Outcome,
    Event,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Intent => "intent",
            Self::Outcome => "outcome",
            Self::Event => "event",
        }
    }
}

/// A record without its place in the chain.
#[derive(Clone)]
pub(super) struct Draft {
    pub(super) id: Uuid,
    pub(super) kind: Kind,
    pub(super) at: Timestamp,
    pub(super) tenant: TenantId,
    pub(super) action: &'static str,
    /// From `,"time":` to the end of `details`.
    middle: String,
}

/// What intent and outcome have in common, written once for both.
#[derive(Clone)]
pub(super) struct Subject {
    id: Uuid,
    tenant: TenantId,
    action: &'static str,
    /// From `,"id":` to the end of `object`.
    head: String,
    request: String,
}

impl Subject {
    pub(super) fn new(caller: &Caller, event: &Event) -> Self {
        let id = Uuid::now_v7();
        let mut head = String::with_capacity(256);
        // Writing to a String cannot fail.
        let _ = write!(head, r#","id":"{id}","tenant":"#);
        push_text(&mut head, caller.tenant.as_str());
        head.push_str(r#","actor":"#);
        push_text(&mut head, &caller.principal.to_string());
        let _ = write!(head, r#","action":"{}","object":{{"kind":"#, event.action.name());
        push_text(&mut head, event.object_kind);
        head.push_str(r#","id":"#);
        push_text(&mut head, &event.object_id);
        head.push('}');
        Self {
            id,
            tenant: caller.tenant.clone(),
            action: event.action.name(),
            head,
            request: caller.request.to_string(),
        }
    }

    pub(super) fn intent(&self, at: Timestamp, details: &[(&'static str, String)]) -> Draft {
        self.draft(Kind::Intent, at, None, details)
    }

    pub(super) fn outcome(
        &self,
        at: Timestamp,
        outcome: Outcome,
        details: &[(&'static str, String)],
    ) -> Draft {
        self.draft(Kind::Outcome, at, Some(outcome), details)
    }

    pub(super) fn event(&self, at: Timestamp, outcome: Outcome, details: &[(&'static str, String)]) -> Draft {
        self.draft(Kind::Event, at, Some(outcome), details)
    }

    fn draft(
        &self,
        kind: Kind,
        at: Timestamp,
        outcome: Option<Outcome>,
        details: &[(&'static str, String)],
    ) -> Draft {
        let mut middle = String::with_capacity(self.head.len() + 256);
        let _ = write!(middle, r#","time":"{at}","type":"{}""#, kind.name());
        middle.push_str(&self.head);
        if let Some(outcome) = outcome {
            push_outcome(&mut middle, outcome);
        }
        middle.push_str(r#","request_id":"#);
        push_text(&mut middle, &self.request);
        middle.push_str(r#","details":{"#);
        for (index, (key, value)) in details.iter().enumerate() {
            if index > 0 {
                middle.push(',');
            }
            push_text(&mut middle, key);
            middle.push(':');
            push_text(&mut middle, value);
        }
        middle.push('}');
        Draft { id: self.id, kind, at, tenant: self.tenant.clone(), action: self.action, middle }
    }
}

/// Who closes an intent whose own request could not, and as what.
#[derive(Clone, Copy)]
pub(super) enum ClosedBy {
    /// A start after a crash: nobody knows how far the work came.
    Restart,
    /// The intent became durable after its request had given up: the work never started.
    Deadline,
}

impl Draft {
    /// The outcome of this intent, if it is one.
    pub(super) fn closed(&self, by: ClosedBy, at: Timestamp) -> Option<Self> {
        let middle = close(&self.middle, by, at)?;
        (self.kind == Kind::Intent).then(|| Self { kind: Kind::Outcome, at, middle, ..self.clone() })
    }
}

/// The outcome of an intent that was read back from the log. `None` if it is not an intent of this program.
pub(super) fn closed_line(intent: &str, id: Uuid, by: ClosedBy, at: Timestamp) -> Option<Draft> {
    #[derive(serde::Deserialize)]
    struct Names {
        tenant: TenantId,
        action: String,
    }
    let Names { tenant, action } = serde_json::from_str(intent).ok()?;
    let action = Action::ALL.into_iter().find(|known| known.name() == action)?.name();
    let middle = close(intent, by, at)?;
    Some(Draft { id, kind: Kind::Outcome, at, tenant, action, middle })
}

/// An intent's text as its outcome: what stands between `id` and `details` is taken over byte for byte.
fn close(intent: &str, by: ClosedBy, at: Timestamp) -> Option<String> {
    // A quote inside a value is escaped, so these patterns match members only.
    let id = intent.find(r#","id":""#)?;
    let request = intent.find(r#","request_id":""#)?;
    let details = intent.find(r#","details":{"#)?;
    let (outcome, by) = match by {
        ClosedBy::Restart => (Outcome::Unknown, "restart"),
        ClosedBy::Deadline => (Outcome::Failure("not-started"), "deadline"),
    };
    let mut middle = String::with_capacity(intent.len() + 64);
    let _ = write!(middle, r#","time":"{at}","type":"outcome""#);
    middle.push_str(intent.get(id..request)?);
    push_outcome(&mut middle, outcome);
    middle.push_str(intent.get(request..details)?);
    let _ = write!(middle, r#","details":{{"closed_by":"{by}"}}"#);
    Some(middle)
}

/// The finished line, and its hash.
pub(super) fn seal(draft: &Draft, seq: u64, prev: &[u8; 32]) -> (String, [u8; 32]) {
    let mut body = String::with_capacity(draft.middle.len() + 120);
    let _ = write!(body, r#"{{"v":1,"seq":{seq}"#);
    body.push_str(&draft.middle);
    body.push_str(r#","prev":""#);
    push_hex(&mut body, prev);
    body.push_str("\"}");
    let hash = hash_of(&body);
    (body, hash)
}

/// SHA-256 of a record's exact bytes.
pub(super) fn hash_of(body: &str) -> [u8; 32] {
    Sha256::digest(body.as_bytes()).into()
}

/// Number and predecessor's hash of a line, by its fixed places; `None` if the line is not a record.
pub(super) fn links_of(line: &str) -> Option<(u64, [u8; 32])> {
    let rest = line.strip_prefix(r#"{"v":1,"seq":"#)?;
    let (digits, _) = rest.split_once(',')?;
    let canonical = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    let seq = if canonical { digits.parse().ok()? } else { return None };
    let (_, prev) = line.strip_suffix("\"}")?.rsplit_once(r#","prev":""#)?;
    if prev.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut hash = [0; 32];
    hex::decode_to_slice(prev, &mut hash).ok()?;
    Some((seq, hash))
}

/// Whether this line is an intent or an outcome, and of which id.
pub(super) fn step_of(line: &str) -> Option<(Kind, Uuid)> {
    // `time` and `type` stand before every text that a client can choose, so the first match is the member.
    let (_, rest) = line.split_once(r#","type":""#)?;
    let (kind, rest) = rest.split_once(r#"","id":""#)?;
    let kind = [Kind::Intent, Kind::Outcome, Kind::Event].into_iter().find(|known| known.name() == kind)?;
    Some((kind, Uuid::try_parse(rest.get(..36)?).ok()?))
}

fn push_outcome(out: &mut String, outcome: Outcome) {
    let (result, code) = match outcome {
        Outcome::Success => ("success", None),
        Outcome::Denied(code) => ("denied", Some(code)),
        Outcome::Failure(code) => ("failure", Some(code)),
        Outcome::Unknown => ("unknown", None),
    };
    let _ = write!(out, r#","outcome":{{"result":"{result}""#);
    if let Some(code) = code {
        out.push_str(r#","code":"#);
        push_text(out, code);
    }
    out.push('}');
}

fn push_hex(out: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        out.push(char::from(DIGITS[usize::from(byte >> 4)]));
        out.push(char::from(DIGITS[usize::from(byte & 15)]));
    }
}

/// A JSON string that is safe to show on a terminal and inside HTML; long texts are cut.
fn push_text(out: &mut String, text: &str) {
    out.push('"');
    if text.len() <= VALUE_MAX {
        push_escaped(out, text);
    } else {
        let end = (0..=VALUE_MAX).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        push_escaped(out, &text[..end]);
        let _ = write!(out, "...(cut, {} bytes)", text.len());
    }
    out.push('"');
}

fn push_escaped(out: &mut String, text: &str) {
    // Nearly every text is an id or a name: one pass over the bytes, one copy.
    if text.bytes().all(|b| matches!(b, b' '..=b'~') && !matches!(b, b'"' | b'\\' | b'<')) {
        out.push_str(text);
        return;
    }
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            c if is_unsafe(c) => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
}

/// Characters that move the cursor, change the reading direction, hide, or end a line or an HTML script.
fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '<'
            | '\u{ad}' | '\u{61c}' | '\u{180e}'
            | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{any, proptest};

    use super::{ClosedBy, GENESIS, Kind, Subject, closed_line, links_of, push_text, seal, step_of};
    use crate::audit::{Action, Checkpoint, Event, Outcome, verify};
    use crate::clock::Timestamp;
    use crate::identity::{Caller, Principal, ScopeSet};
    use crate::ids::{ClientId, RequestId, TenantId};

    fn subject(object: &str) -> Subject {
        let caller = Caller::system("test", TenantId::parse("default").unwrap());
        Subject::new(&caller, &Event::new(Action::SecretReveal, "secret", object))
    }

    #[test]
    fn a_hostile_name_stays_one_harmless_line() {
        let hostile = "a\r\nb\u{1b}[31m\0</script>\u{202e}\u{9b}\u{2028}\u{e0041}\"\\";
        let (body, _) = seal(&subject(hostile).intent(Timestamp::from_micros(0), &[]), 1, &GENESIS);

        assert!(body.chars().all(|c| !c.is_control() && c != '<' && c != '\u{202e}' && c != '\u{2028}'));
        let json: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(json["object"]["id"], hostile);
    }

    #[test]
    fn a_huge_value_is_cut_at_a_character_and_says_so() {
        let mut out = String::new();
        push_text(&mut out, &"\u{e9}".repeat(1 << 19));

        assert!(out.len() < 300, "{}", out.len());
        assert!(out.ends_with("...(cut, 1048576 bytes)\""));
    }

    #[test]
    fn members_stand_in_the_documented_order() {
        let details = [("scope", "a b".to_owned()), ("n", "1".to_owned())];
        let draft = subject("x").outcome(Timestamp::from_micros(1), Outcome::Denied("forbidden"), &details);
        let (body, _) = seal(&draft, 7, &GENESIS);

        let json: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&body).unwrap();
        let members: Vec<_> = json.keys().map(String::as_str).collect();
        let wanted = "v seq time type id tenant actor action object outcome request_id details prev";
        assert_eq!(members.join(" "), wanted);
        assert_eq!(json["outcome"]["code"], "forbidden");
        assert_eq!(json["time"], "1970-01-01T00:00:00.000001Z");
    }

    #[test]
    fn an_intent_closed_later_keeps_its_subject() {
        let subject = subject("x\",\"request_id\":\"forged");
        let (intent, _) = seal(&subject.intent(Timestamp::from_micros(1), &[]), 7, &GENESIS);

        let draft = closed_line(&intent, subject.id, ClosedBy::Restart, Timestamp::from_micros(2)).unwrap();
        let (body, _) = seal(&draft, 8, &GENESIS);

        let [intent, body] =
            [intent, body].map(|line| serde_json::from_str::<serde_json::Value>(&line).unwrap());
        for member in ["id", "tenant", "actor", "action", "object", "request_id"] {
            assert_eq!(body[member], intent[member], "{member}");
        }
        assert_eq!(body["outcome"]["result"], "unknown");
    }

    /// The document promises bytes; these are the bytes.
    const DOCUMENT: &str = include_str!("../../docs/formats/audit-v1.md");

    fn example_lines() -> impl Iterator<Item = &'static str> {
        DOCUMENT.lines().filter(|line| line.starts_with(r#"{"v":1,"#))
    }

    #[test]
    fn the_documented_example_is_what_this_code_writes_and_verifies() {
        let caller = Caller {
            principal: Principal::Application(ClientId::parse("app-0d9f8c2b7a61").unwrap()),
            tenant: TenantId::parse("default").unwrap(),
            scopes: ScopeSet::NONE,
            request: RequestId::accept_or_generate(Some("req-7f3a")),
        };
        let event = Event::new(Action::SecretReveal, "secret", "01934b5e-8f00-7c3d-9a51-6f2e7b1c0d44");
        let mut subject = Subject::new(&caller, &event);
        let id = "01934b5e-9a10-7b22-8c07-3e5d1f6a9b80";
        subject.head = subject.head.replace(&subject.id.to_string(), id);
        let start = Timestamp::from_micros(1_795_510_800_000_000);
        let end = Timestamp::from_micros(1_795_510_800_001_250);

        let (first, hash) = seal(&subject.intent(start, &[("version", "current".to_owned())]), 1, &GENESIS);
        let details = [("version", "3".to_owned())];
        let (second, _) = seal(&subject.outcome(end, Outcome::Success, &details), 2, &hash);

        assert_eq!(example_lines().collect::<Vec<_>>(), [first.as_str(), second.as_str()]);
        let end = verify(example_lines(), Checkpoint::START).unwrap();
        assert_eq!(end.seq, 2);
        assert!(DOCUMENT.contains(&hex::encode(end.hash)));
    }

    #[test]
    fn every_action_is_documented() {
        for action in Action::ALL {
            assert!(DOCUMENT.contains(&format!("| `{}` |", action.name())), "{}", action.name());
        }
    }

    proptest! {
        #[test]
        fn any_text_survives_its_escaping(text in "\\PC{0,60}|.{0,60}") {
            let mut out = String::new();
            push_text(&mut out, &text);
            if text.len() <= 256 {
                assert_eq!(serde_json::from_str::<String>(&out).unwrap(), text);
            }
        }

        #[test]
        fn a_line_tells_its_links_and_its_step(object in ".{0,80}", seq in 1..u64::MAX, prev in any::<[u8; 32]>()) {
            let subject = subject(&object);
            let (body, _) = seal(&subject.intent(Timestamp::from_micros(1), &[]), seq, &prev);
            assert_eq!(links_of(&body), Some((seq, prev)));
            assert_eq!(step_of(&body), Some((Kind::Intent, subject.id)));
        }
    }
}
