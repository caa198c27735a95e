//! What a lane can be asked for, and what it answers.

use zeroize::Zeroizing;

use crate::seal::KeyReport;
use crate::seal::backend::{Backend, BackendError};
use crate::seal::driver::{Count, Driver};
use crate::seal::envelope::{DEK_LEN, DEK_SLOT_LEN};
use crate::seal::guarded::{Expired, Lent, SecretBuf};
use crate::seal::key::{Alg, KeyRef, PublicKey, Signature, WrappedDek};

/// What a lane can be asked for. Self-contained: no handle, pointer or borrowed buffer crosses.
pub(crate) enum Request {
    /// Fill the slot with a fresh DEK and wrap it.
    Wrap {
        kek: KeyRef,
        dek: SecretBuf,
        aad: Vec<u8>,
    },
    /// Wrap a DEK that another device has unwrapped, unless it has expired before its turn came.
    WrapLent {
        kek: KeyRef,
        dek: Lent,
        aad: Vec<u8>,
    },
    Unwrap {
        kek: KeyRef,
        wrapped: WrappedDek,
        aad: Vec<u8>,
        out: SecretBuf,
    },
    /// Unwrap under one KEK and wrap under another of the same device: in one job, because between two
    /// the DEK would wait in a queue.
    Rewrap {
        from: KeyRef,
        to: KeyRef,
        wrapped: WrappedDek,
        /// For the old wrap and for the new one.
        aads: (Vec<u8>, Vec<u8>),
        /// `DEK_SLOT_LEN` bytes for the DEK.
        room: SecretBuf,
        /// The old wrap was opened: what fails now is the new one's.
        is_open: bool,
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
        /// The key itself, where it comes from outside.
        given: Option<SecretBuf>,
    },
    Destroy {
        key: KeyRef,
    },
    Inspect {
        key: KeyRef,
    },
    Capabilities,
    List,
    Count(Count),
}

pub(crate) enum Answer {
    Wrapped(WrappedDek, SecretBuf),
    Rewrapped(WrappedDek),
    /// The DEK was too old when its turn came, and is wiped. Nothing is wrong with the device.
    Expired,
    Dek(SecretBuf),
    Signature(Signature),
    Mac([u8; 32]),
    PublicKey(PublicKey),
    Generated(KeyRef),
    Destroyed,
    Report(KeyReport),
    Capabilities(serde_json::Value),
    Listed(Vec<KeyRef>),
    Counted(Option<u64>),
}

impl Request {
    pub(crate) const fn name(&self) -> &'static str {
        match self {
            Self::Wrap { .. } | Self::WrapLent { .. } => "wrap",
            Self::Unwrap { .. } => "unwrap",
            Self::Rewrap { .. } => "rewrap",
            Self::Sign { .. } => "sign",
            Self::Mac { .. } => "mac",
            Self::PublicKey { .. } => "public_key",
            Self::Generate { given: None, .. } => "generate",
            Self::Generate { given: Some(_), .. } => "import",
            Self::List => "list",
            Self::Destroy { .. } => "destroy",
            Self::Inspect { .. } => "inspect",
            Self::Capabilities => "capabilities",
            Self::Count(_) => "count",
        }
    }

    /// Whether it changes what is on the device.
    pub(crate) const fn alters(&self) -> bool {
        matches!(
            self,
            Self::Generate { .. } | Self::Destroy { .. } | Self::Count(Count::Make | Count::Advance { .. })
        )
    }

    /// The key that is used; of two, the one that was used last.
    pub(crate) const fn key(&self) -> Option<&KeyRef> {
        match self {
            Self::Rewrap { from, is_open: false, .. } => Some(from),
            Self::Rewrap { to, is_open: true, .. } => Some(to),
            Self::Wrap { kek: key, .. }
            | Self::WrapLent { kek: key, .. }
            | Self::Unwrap { kek: key, .. }
            | Self::Sign { key, .. }
            | Self::Mac { key, .. }
            | Self::PublicKey { key }
            | Self::Generate { planned: key, .. }
            | Self::Destroy { key }
            | Self::Inspect { key } => Some(key),
            Self::Capabilities | Self::List | Self::Count(_) => None,
        }
    }

    /// One call, or the two of a rewrap. Buffers stay in the request, so that it can be repeated.
    pub(crate) fn call(
        &mut self,
        session: &mut dyn Backend,
        driver: &dyn Driver,
    ) -> Result<Output, BackendError> {
        Ok(match self {
            Self::Wrap { kek, dek, aad } => {
                dek.with_mut(|dek| getrandom::fill(&mut dek[..DEK_LEN]))
                    .map_err(|_| BackendError::Refused { function: "getrandom", code: 0 })?;
                Output::Wrapped(session.wrap(kek, dek, aad)?)
            }
            Self::Unwrap { kek, wrapped, aad, out } => {
                session.unwrap(kek, wrapped, aad, out)?;
                Output::Unwrapped
            }
            Self::WrapLent { kek, dek, aad } => match dek.spend(|dek| session.wrap(kek, dek, aad)) {
                Ok(wrapped) => Output::Wrapped(wrapped?),
                Err(Expired) => Output::Answer(Answer::Expired),
            },
            Self::Rewrap { from, to, wrapped, aads, room, is_open } => {
                // Both calls are repeated after a lost session: until another one is open the DEK would wait.
                *is_open = false;
                session.unwrap(from, wrapped, &aads.0, room)?;
                *is_open = true;
                let rewrapped = session.wrap(to, room, &aads.1);
                room.renew(DEK_SLOT_LEN);
                Output::Wrapped(rewrapped?)
            }
            Self::Sign { key, alg, digest } => {
                Output::Answer(Answer::Signature(session.sign(key, *alg, digest)?))
            }
            Self::Mac { key, message } => Output::Answer(Answer::Mac(session.mac(key, message)?)),
            Self::PublicKey { key } => Output::Answer(Answer::PublicKey(session.public_key(key)?)),
            Self::Generate { planned, given } => {
                Output::Answer(Answer::Generated(session.generate(planned, given.as_ref())?))
            }
            Self::List => Output::Answer(Answer::Listed(driver.list()?)),
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
            (Self::WrapLent { .. } | Self::Rewrap { .. }, Output::Wrapped(wrapped)) => {
                Answer::Rewrapped(wrapped)
            }
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
