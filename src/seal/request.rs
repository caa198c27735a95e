//! What a lane can be asked for, and what it answers.

use zeroize::Zeroizing;

use crate::seal::KeyReport;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::driver::{Count, Driver};
use crate::seal::envelope::DEK_LEN;
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{Alg, KeyRef, PublicKey, Signature, WrappedDek};

/// What a lane can be asked for. Self-contained: no handle, pointer or borrowed buffer crosses.
pub(crate) enum Request {
    /// Fill the slot with a fresh DEK and wrap it.
    Wrap {
        kek: KeyRef,
        dek: SecretBuf,
        aad: Vec<u8>,
        fresh: bool,
    },
    Unwrap {
        kek: KeyRef,
        wrapped: WrappedDek,
        aad: Vec<u8>,
        out: SecretBuf,
    },
    Sign {
        key: KeyRef,
        alg: Alg,
        digest: Vec<u8>,
    },
    Mac {
        key: KeyRef,
        message: Zeroizing<Vec<u8>>,
    },
    PublicKey {
        key: KeyRef,
    },
    Generate {
        planned: KeyRef,
    },
    Destroy {
        key: KeyRef,
    },
    Inspect {
        key: KeyRef,
    },
    Capabilities,
    Count(Count),
}

pub(crate) enum Answer {
    Wrapped(WrappedDek, SecretBuf),
    Dek(SecretBuf),
    Signature(Signature),
    Mac([u8; 32]),
    PublicKey(PublicKey),
    Generated(KeyRef),
    Destroyed,
    Report(KeyReport),
    Capabilities(serde_json::Value),
    Counted(Option<u64>),
}

impl Request {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Wrap { .. } => "wrap",
            Self::Unwrap { .. } => "unwrap",
            Self::Sign { .. } => "sign",
            Self::Mac { .. } => "mac",
            Self::PublicKey { .. } => "public_key",
            Self::Generate { .. } => "generate",
            Self::Destroy { .. } => "destroy",
            Self::Inspect { .. } => "inspect",
            Self::Capabilities => "capabilities",
            Self::Count(_) => "count",
        }
    }

    pub(crate) const fn key(&self) -> Option<&KeyRef> {
        match self {
            Self::Wrap { kek: key, .. }
            | Self::Unwrap { kek: key, .. }
            | Self::Sign { key, .. }
            | Self::Mac { key, .. }
            | Self::PublicKey { key }
            | Self::Generate { planned: key }
            | Self::Destroy { key }
            | Self::Inspect { key } => Some(key),
            Self::Capabilities | Self::Count(_) => None,
        }
    }

    /// One call. Buffers stay in the request, so that the call can be repeated.
    pub(crate) fn call(
        &mut self,
        session: &mut dyn Backend,
        driver: &dyn Driver,
    ) -> Result<Output, BackendError> {
        Ok(match self {
            Self::Wrap { kek, dek, aad, fresh } => {
                if *fresh {
                    dek.with_mut(|dek| getrandom::fill(&mut dek[..DEK_LEN]))
                        .map_err(|_| BackendError::Refused { function: "getrandom", code: 0 })?;
                }
                Output::Wrapped(session.wrap(kek, dek, aad)?)
            }
            Self::Unwrap { kek, wrapped, aad, out } => {
                session.unwrap(kek, wrapped, aad, out)?;
                Output::Unwrapped
            }
            Self::Sign { key, alg, digest } => {
                Output::Answer(Answer::Signature(session.sign(key, *alg, digest)?))
            }
            Self::Mac { key, message } => Output::Answer(Answer::Mac(session.mac(key, message)?)),
            Self::PublicKey { key } => Output::Answer(Answer::PublicKey(session.public_key(key)?)),
            Self::Generate { planned } => Output::Answer(Answer::Generated(session.generate(planned)?)),
            Self::Destroy { key } => {
                session.destroy(key)?;
                Output::Answer(Answer::Destroyed)
            }
            Self::Inspect { key } => Output::Answer(Answer::Report(session.inspect(key)?)),
            Self::Capabilities => Output::Answer(Answer::Capabilities(driver.capabilities()?)),
            Self::Count(count) => Output::Answer(Answer::Counted(driver.count(*count)?)),
        })
    }

    /// Gives the request's buffer to the answer it belongs to.
    pub(crate) fn finish(self, output: Output) -> Answer {
        match (self, output) {
            (Self::Wrap { dek, .. }, Output::Wrapped(wrapped)) => Answer::Wrapped(wrapped, dek),
            (Self::Unwrap { out, .. }, Output::Unwrapped) => Answer::Dek(out),
            (_, Output::Answer(answer)) => answer,
            // `call` makes the output that fits its request; anything else carries nothing.
            (_, Output::Wrapped(_) | Output::Unwrapped) => Answer::Destroyed,
        }
    }
}

/// What a call gave, before the request's buffer joins it.
pub(crate) enum Output {
    Wrapped(WrappedDek),
    Unwrapped,
    Answer(Answer),
}
