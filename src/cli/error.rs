//! How a command fails: what is printed and which exit code it gives.
//!
//! A variant is a decision of whoever called the program; the table of codes stands in
//! [`EXIT_CODES`] and in `docs/cli.md`. Messages have no period, a hint is a line of its own.

use std::error::Error;
use std::fmt::Write as _;
use std::process::ExitCode;

use crate::db::OpenError;

/// The end of `lacre --help`.
pub(crate) const EXIT_CODES: &str = "EXIT CODES
  0    done
  1    local problem or wrong usage
  2    the server or the HSM refused, or the daemon is not usable
  3    not found
  4    precondition failed or conflict
  5    partial success
  130  interrupted";

/// What a server said about a failure (RFC 9457, or the OAuth form of RFC 6749, section 5.2).
#[derive(Debug, Default)]
pub(crate) struct Problem {
    /// HTTP status.
    pub(crate) status: u16,
    /// The stable short name, if there is one.
    pub(crate) code: Option<String>,
    /// What went wrong, in words.
    pub(crate) message: String,
    /// The id to look for in log and audit trail.
    pub(crate) request_id: Option<String>,
    /// Seconds after which a retry makes sense.
    pub(crate) retry_after: Option<u64>,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    /// The command line or the environment asks for something that cannot be.
    #[error("{what}")]
    Usage {
        /// What is wrong.
        what: String,
        /// What to do instead.
        hint: &'static str,
    },
    /// A file, the terminal or another thing of this machine failed.
    #[error("{what}: {source}")]
    Local {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: Box<dyn Error + Send + Sync>,
    },
    /// No server answered.
    #[error("no answer from {addr}: {reason}")]
    Unreachable {
        /// Where it was looked for.
        addr: String,
        /// What the connection said.
        reason: String,
    },
    /// The answer is not one of a Lacre daemon.
    #[error("{addr} does not answer like lacre: {reason}")]
    Strange {
        /// Who answered.
        addr: String,
        /// What was missing.
        reason: String,
    },
    /// The server refused.
    #[error("{}", .0.message)]
    Refused(Problem),
    /// The daemon answers and cannot work.
    #[error("the daemon at {addr} is not usable")]
    NotUsable {
        /// Which one.
        addr: String,
    },
    /// Nothing of that name.
    #[error("no {what} {name}")]
    NotFound {
        /// Which kind of thing.
        what: &'static str,
        /// What was asked for.
        name: String,
    },
    /// Somebody stored a newer version.
    #[error("the newest version is {newest}, not {expected}; nothing was stored")]
    Changed {
        /// The version that was expected.
        expected: u64,
        /// The version that is there.
        newest: u64,
    },
    /// The database is there and not in a state to work with.
    #[error(transparent)]
    Schema(#[from] OpenError),
    /// The audit log was altered.
    #[error("record {seq} is bad: {reason}")]
    BadRecord {
        /// The first record that does not fit.
        seq: u64,
        /// Why.
        reason: String,
    },
    /// Records without what they go on from.
    #[error("record 1 is bad: the log begins at record {seq}, and no checkpoint says what was before")]
    NoBeginning {
        /// The first record.
        seq: u64,
    },
    /// Some of the work was done.
    #[error("{failed} of {total} records failed")]
    Partial {
        /// How many failed.
        failed: u64,
        /// Of how many.
        total: u64,
        /// The last failure.
        last_error: Option<String>,
    },
    /// An import has left things behind.
    #[error("{count} things were not imported")]
    LeftBehind {
        /// How many.
        count: u64,
    },
    /// Checks of `lacre doctor` failed.
    #[error("{failed} check(s) failed")]
    Unfit {
        /// How many.
        failed: usize,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted {
        /// How to go on, if something goes on without us.
        hint: Option<String>,
    },
    /// Nobody reads our standard output any more.
    #[error("standard output was closed")]
    Closed,
}

impl CliError {
    /// A failure of this machine.
    pub(crate) fn local(what: impl Into<String>, source: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Local { what: what.into(), source: source.into() }
    }

    /// Wrong usage and what to do instead.
    pub(crate) fn usage(what: impl Into<String>, hint: &'static str) -> Self {
        Self::Usage { what: what.into(), hint }
    }

    /// The program's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. }
            | Self::Local { .. }
            | Self::Unreachable { .. }
            | Self::Strange { .. }
            | Self::Unfit { .. }
            | Self::Closed => 1,
            Self::Refused(Problem { status: 404 | 410, .. }) | Self::NotFound { .. } => 3,
            Self::Changed { .. }
            | Self::Refused(Problem { status: 409 | 412 | 428, .. })
            | Self::Schema(OpenError::MigrationsPending { .. } | OpenError::InUse { .. }) => 4,
            Self::Refused(_)
            | Self::NotUsable { .. }
            | Self::BadRecord { .. }
            | Self::NoBeginning { .. }
            | Self::Schema(_) => 2,
            Self::Partial { .. } | Self::LeftBehind { .. } => 5,
            Self::Interrupted { .. } => 130,
        }
    }

    /// What to do about it, where that is known.
    fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Usage { hint, .. } => (*hint).to_owned(),
            Self::Unreachable { .. } => {
                "is the daemon running? `lacre dev` starts one; --addr or LACRE_ADDR chooses another".into()
            }
            Self::Strange { .. } => "check --addr; the address is the daemon's base URL".into(),
            Self::Refused(problem) => return problem.hint(),
            Self::NotUsable { .. } => {
                "the checks above say why; on the daemon's host run `lacre doctor`".into()
            }
            Self::BadRecord { .. } => {
                "records before this one are intact; keep a copy of the log and of the checkpoint. \
                 If this is the log of another installation, name another file with --checkpoint"
                    .into()
            }
            Self::NoBeginning { .. } => {
                "name the checkpoint that it goes on from with --checkpoint, or take the log from its \
                 beginning: `lacre audit tail --after 0 -o ndjson`"
                    .into()
            }
            Self::LeftBehind { .. } => {
                "the reasons are above; mend what can be mended and run it again: what is there is left alone"
                    .into()
            }
            Self::Unfit { .. } => "each failed check says what to do".into(),
            Self::Partial { last_error, .. } => match last_error.as_deref() {
                Some("integrity") => {
                    "somebody altered them: the audit log names each (`incident.integrity`); \
                                      restore them from a backup or delete them"
                        .into()
                }
                Some("key-missing" | "key-unfit") => {
                    "their KEK is not usable on the HSM: `lacre kek list`, `lacre doctor`".into()
                }
                other => {
                    format!("run `lacre kek rewrap` again; last error: {}", other.unwrap_or("not recorded"))
                }
            },
            Self::Interrupted { hint } => return hint.clone(),
            Self::Changed { .. } => "somebody else changed it in between; read it again, then decide".into(),
            Self::Schema(OpenError::InUse { .. }) => "stop the daemon first".into(),
            Self::Schema(OpenError::NewerSchema { .. }) => {
                "install the newer lacre; there is no way back".into()
            }
            Self::Schema(OpenError::Unreachable { .. }) => "check the URL and that the server runs".into(),
            Self::Schema(_) | Self::Local { .. } | Self::NotFound { .. } | Self::Closed => return None,
        };
        Some(text)
    }

    /// The whole message for standard error.
    pub(crate) fn render(&self) -> String {
        let mut text = format!("error: {self}");
        if let Self::Local { source, .. } = self {
            let mut cause = source.source();
            while let Some(next) = cause {
                let _ = write!(text, ": {next}");
                cause = next.source();
            }
        }
        if let Self::Refused(Problem { request_id: Some(id), .. }) = self {
            let _ = write!(text, "\nrequest id: {id}");
        }
        if let Some(hint) = self.hint() {
            let _ = write!(text, "\nhint: {hint}");
        }
        text
    }

    /// Prints the message and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        if !matches!(self, Self::Closed) {
            eprintln!("{}", super::output::printable(&self.render()));
        }
        ExitCode::from(self.exit_code())
    }
}

impl Problem {
    fn hint(&self) -> Option<String> {
        let text = match self.status {
            401 => {
                "set LACRE_TOKEN, or give --client-id with --client-secret-file, or --dev-json DIR/dev.json"
                    .into()
            }
            403 => "the token lacks a scope for this; `lacre app create --scope` grants them".into(),
            412 => "somebody else changed it in between; read it again, then decide".into(),
            503 | 429 => match self.retry_after {
                Some(seconds) => format!("try again in {seconds} s; `lacre status` says what is wrong"),
                None => "try again later; `lacre status` says what is wrong".into(),
            },
            _ if self.code.as_deref() == Some("invalid_client") => {
                "check the client id and the file with its secret".into()
            }
            500..=599 => "look for the request id in the daemon's log".into(),
            _ => return None,
        };
        Some(text)
    }
}
