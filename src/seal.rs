//! The only door to key material.
//!
//! Everything above asks a [`Sealer`] to seal, open, sign, mac and to tell a public key. Keys are
//! named, never handed out; no call returns one. Making and destroying keys is [`KeyAdmin`], a
//! separate handle. Promises: a [`Sealed`] opens only under the [`Context`] it was made with, and
//! after an error nothing has changed on the device, except [`SealError::Unknown`], which says so.
//!
//! All of it may run in a child process, `child.rs`; nothing above can tell.
//!
//! Not here: who may ask (`identity`), where sealed bytes are kept (`vault`), when keys change
//! (`keys`). Start reading at [`backend::Backend`], then `envelope.rs`, then `worker.rs`.

mod admin;
pub mod backend;
mod calls;
mod child;
mod context;
mod device;
mod devices;
mod driver;
mod envelope;
mod faults;
mod gate;
pub mod guarded;
mod import;
mod key;
mod latch;
mod nonces;
mod pin;
pub mod pkcs11;
mod public;
mod queue;
mod recovery;
mod request;
mod rsa_check;
#[cfg(feature = "tpm")]
pub mod tpm;
#[cfg(not(feature = "tpm"))]
#[path = "seal/no_tpm.rs"]
pub mod tpm;
mod verify;
mod worker;

use std::sync::Arc;
use std::time::Duration;

pub use admin::{KeyAdmin, KeyReport};
pub use child::{Mode as SealerMode, SealerConfig, ServeError, Surroundings, launch, serve};
pub use context::Context;
pub use device::{
    Config as DeviceConfig, Device, DeviceState, DeviceStatus, SealerStatus, StartError, UnlatchError, start,
    unlatch,
};
pub use devices::{DeviceName, Devices};
pub use driver::Count;
pub use envelope::{BadSealed, Sealed, WrappedKey};
pub use faults::Faults;
pub use guarded::{Arena, ArenaError, SecretBuf};
pub use import::{BadPrivateKey, LARGEST_PRIVATE, MAC_SECRET, public_half};
pub use key::{Alg, Fingerprint, Kek, KekId, KeyId, KeyRef, KeySpec, PublicKey, Signature};
pub use rsa_check::{WeakRsa, check_rsa, shares_a_prime};

use backend::BackendError;
use child::Client;
use devices::{Route, Routes};
use guarded::Dek;
use key::WrappedDek;
use worker::{Lanes, Priority};

/// A plain DEK waits no longer than this for what it is wanted for; the buffer itself enforces it
/// (reliability.md, ME-8). A call to a device that has begun is not waiting and may take longer.
const DEK_LIFETIME: Duration = Duration::from_millis(50);
/// A host so busy that the event loop came late gets another DEK, this many times; so does a rewrap to a device
/// that has other things to do first.
const DEK_TRIES: usize = 3;

/// Why a sealing call failed, sorted by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The bytes were not made under this context, or were altered; the device itself is well (its
    /// canary opened). Retrying is pointless, and somebody should look at the row.
    #[error("sealed value rejected")]
    Rejected,
    /// The device does not hold this key. Nothing is generated in its place.
    #[error("the device does not hold key {key}")]
    KeyMissing {
        /// The key that was asked for.
        key: KeyId,
    },
    /// No device of the name that the key's row says is configured here.
    #[error("key {key} is on the device `{device}`, which is not configured")]
    NoDevice {
        /// The key that was asked for.
        key: KeyId,
        /// Where it is.
        device: DeviceName,
    },
    /// The key is there and must not be used: two objects answer to its id, its fingerprint is
    /// another one, or its attributes were weakened.
    #[error("key {key} is unfit for use: {reason}")]
    KeyUnfit {
        /// The key that was asked for.
        key: KeyId,
        /// Which rule it breaks.
        reason: String,
    },
    /// The device did not answer; nothing was changed. Retry after the given time.
    #[error("device unavailable: {reason}")]
    Unavailable {
        /// When a retry makes sense.
        retry_after: Duration,
        /// What is wrong, for the log and `lacre status`.
        reason: String,
    },
    /// More work is queued than the device or the guarded memory can take. Retry after the given time.
    #[error("too much work queued for {what}")]
    Busy {
        /// Which resource ran out.
        what: &'static str,
        /// When a retry makes sense.
        retry_after: Duration,
    },
    /// The device may or may not have done it. Look before repeating.
    #[error("outcome of {operation} unknown")]
    Unknown {
        /// What was asked for.
        operation: &'static str,
        /// What the device said.
        #[source]
        source: BackendError,
    },
    /// The value does not fit the limits: 1 MiB of guarded memory, or what a device signs or imports at once.
    #[error("a value of {len} bytes is too large")]
    TooLarge {
        /// Its length.
        len: usize,
    },
    /// The device refused a request that it should have taken: a bug here or a strange device.
    #[error("device refused {operation}")]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// What the device said.
        #[source]
        source: BackendError,
    },
}

impl SealError {
    /// The operating system's generator failed: nothing can be sealed.
    pub(crate) fn no_randomness() -> Self {
        Self::Unavailable {
            retry_after: Duration::from_secs(5),
            reason: "the operating system gives no randomness".to_owned(),
        }
    }

    /// For how long a client should wait before it asks again; `None` where waiting does not help.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } | Self::Busy { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }
}

/// Plaintext that was just opened: guarded memory, readable through a closure, wiped on drop.
///
/// Neither `Clone` nor `Debug` nor `Serialize`, on purpose.
pub struct Opened(pub(crate) SecretBuf);

impl Opened {
    /// Lets `read` see the plaintext. What it copies out is its own responsibility.
    pub fn with<T>(&self, read: impl FnOnce(&[u8]) -> T) -> T {
        self.0.with(read)
    }

    /// Length of the plaintext in bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether the plaintext is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Where the device is driven. Nothing above `seal` can tell.
#[derive(Clone)]
pub(crate) enum Way {
    /// In threads of this process.
    Lanes(Arc<Lanes>),
    /// In the sealer process.
    Child(Arc<Client>),
}

impl Way {
    pub(crate) fn deadline(&self) -> Duration {
        match self {
            Self::Lanes(lanes) => lanes.deadline,
            Self::Child(client) => client.deadline,
        }
    }

    /// Whether the device takes requests now, as far as is known without asking it.
    fn admit(&self) -> Result<(), SealError> {
        match self {
            Self::Lanes(lanes) => lanes.breaker.admit(),
            Self::Child(client) => client.admit(),
        }
    }
}

/// Uses keys, each on the device that it is on. Cheap to clone.
#[derive(Clone)]
pub struct Sealer {
    routes: Routes,
    arena: Arena,
}

impl Sealer {
    pub(crate) const fn new(routes: Routes, arena: Arena) -> Self {
        Self { routes, arena }
    }

    /// Seals `plaintext` for `context`: a fresh DEK encrypts it, `kek` wraps the DEK in the device.
    ///
    /// # Errors
    /// See [`SealError`]; nothing is kept of a failed call.
    pub async fn seal(
        &self,
        kek: &Kek,
        context: &Context<'_>,
        plaintext: &[u8],
    ) -> Result<Sealed, SealError> {
        let route = self.routes.to(&kek.key)?;
        let _room = route.enter().await?;
        let mut body = self.arena.take(plaintext.len()).await?;
        body.with_mut(|bytes| bytes.copy_from_slice(plaintext));
        seal_body(route, kek, context, body).await
    }

    /// As [`Sealer::seal`], for plaintext that is in guarded memory already.
    ///
    /// # Errors
    /// As [`Sealer::seal`].
    pub(crate) async fn seal_in_place(
        &self,
        kek: &Kek,
        context: &Context<'_>,
        body: SecretBuf,
    ) -> Result<Sealed, SealError> {
        let route = self.routes.to(&kek.key)?;
        let _room = route.enter().await?;
        seal_body(route, kek, context, body).await
    }

    /// Opens what [`Sealer::seal`] made. `context` is what the caller asked for, never what the
    /// row says; `kek` is the KEK version that `sealed` names, looked up among the tenant's own.
    ///
    /// # Errors
    /// [`SealError::Rejected`] if anything about the value, its place or its KEK is not what it was.
    pub async fn open(&self, kek: &Kek, context: &Context<'_>, sealed: &Sealed) -> Result<Opened, SealError> {
        let route = self.routes.to(&kek.key)?;
        let _room = route.enter().await?;
        let len = sealed.payload.ciphertext_len();
        if len > guarded::LARGEST {
            // Nothing that long was ever sealed.
            return Err(SealError::Rejected);
        }
        if sealed.key.wrapped_by(kek).is_none() {
            return Err(SealError::Rejected);
        }
        let plain = self.arena.take(len).await?;
        match &route.way {
            Way::Lanes(lanes) => open_here(lanes, kek, context, sealed, plain).await,
            Way::Child(client) => client.open(kek, context, sealed, plain).await,
        }
        .map(Opened)
    }

    /// Wraps the DEK of a sealed value under another KEK version, on the same device or on another one;
    /// the payload stays as it is. Between the two calls the DEK is in guarded memory, or encrypted for the sealer
    /// process that wraps it: on one device they follow each other at once, between two a DEK in clear waits 50 ms
    /// at the most. Runs behind all foreground work.
    ///
    /// # Errors
    /// As [`Sealer::open`] for the old wrap and [`Sealer::seal`] for the new one. [`SealError::Busy`] also if the
    /// other device has other things to do: try again later.
    pub async fn rewrap(
        &self,
        from: &Kek,
        to: &Kek,
        context: &Context<'_>,
        key: &WrappedKey,
    ) -> Result<WrappedKey, SealError> {
        let (source, target) = (self.routes.to(&from.key)?, self.routes.to(&to.key)?);
        let _room = source.enter().await?;
        if key.wrapped_by(from).is_none() {
            return Err(SealError::Rejected);
        }
        let (source, target) = match (&source.way, &target.way) {
            (Way::Lanes(source), Way::Lanes(target)) => (source, target),
            (Way::Child(client), Way::Child(other)) if Arc::ptr_eq(client, other) => {
                return client.rewrap(from, to, context, key).await;
            }
            (Way::Child(source), Way::Child(target)) => {
                // A device that is away must cost the other one no call.
                target.admit()?;
                let address = target.address().await?;
                let parcel = source.export(from, context, key, (to, address)).await?;
                return target.import(to, context, parcel).await;
            }
            // All of a daemon's devices are driven in the same way (`Devices::start`).
            _ => return Err(worker::mismatch("rewrap")),
        };
        let wrapped = if Arc::ptr_eq(source, target) {
            rewrap_here(source, from, to, context, key).await?
        } else {
            rewrap_across((source, from), (target, to), context, key).await?
        };
        Ok(WrappedKey::new(to, wrapped))
    }

    /// Unwraps a DEK for another sealer process, which will wrap it under what `aad` says.
    pub(crate) async fn export(
        &self,
        from: &Kek,
        context: &Context<'_>,
        key: &WrappedKey,
        (address, aad): (&child::Address, &[u8]),
    ) -> Result<child::Parcel, SealError> {
        let route = self.routes.to(&from.key)?;
        let _room = route.enter().await?;
        let Way::Lanes(source) = &route.way else { return Err(worker::mismatch("rewrap")) };
        let mut dek = unwrap(source, from, context, key, Priority::Background).await?;
        child::pack(&mut dek, address, aad).map_err(|_| SealError::no_randomness())
    }

    /// Wraps a DEK that another sealer process has unwrapped for this one.
    pub(crate) async fn import(
        &self,
        to: &Kek,
        context: &Context<'_>,
        parcel: &child::Parcel,
        mailbox: &child::Mailbox,
    ) -> Result<WrappedKey, SealError> {
        let route = self.routes.to(&to.key)?;
        let _room = route.enter().await?;
        let Way::Lanes(target) = &route.way else { return Err(worker::mismatch("rewrap")) };
        let _place = target.arrival(&to.key).await?;
        for _ in 0..DEK_TRIES {
            let mut dek = self.arena.take(envelope::DEK_LEN).await?;
            let aad = context.wrap_aad(to);
            // No word against the record: the process that it was for may have been replaced.
            mailbox.open(parcel, &aad, &mut dek).map_err(|_| SealError::Unavailable {
                retry_after: Duration::from_secs(1),
                reason: "a data key came for another sealer process".to_owned(),
            })?;
            if let Some(wrapped) = target.wrap_within(DEK_LIFETIME, to, dek, aad, context.flow()).await? {
                return Ok(WrappedKey::new(to, wrapped));
            }
        }
        Err(worker::full())
    }

    /// Signs `message` (hashed here, but for EdDSA) and returns the JOSE form: `r || s` of fixed width for ECDSA
    /// (RFC 7518, section 3.4), the signature octets for RSA and EdDSA.
    ///
    /// # Errors
    /// See [`SealError`]; [`SealError::TooLarge`] for EdDSA of more than [`Alg::LARGEST_MESSAGE`].
    pub async fn sign(&self, key: &KeyRef, alg: Alg, message: &[u8]) -> Result<Signature, SealError> {
        if !alg.fits(key.spec) {
            return Err(worker::mismatch("sign"));
        }
        if alg == Alg::EdDsa && message.len() > Alg::LARGEST_MESSAGE {
            return Err(SealError::TooLarge { len: message.len() });
        }
        self.sign_digest(key, alg, alg.digest(message)).await
    }

    /// As [`Sealer::sign`], for what [`Alg::digest`] gave.
    ///
    /// # Errors
    /// See [`SealError`].
    pub(crate) async fn sign_digest(
        &self,
        key: &KeyRef,
        alg: Alg,
        digest: Vec<u8>,
    ) -> Result<Signature, SealError> {
        match &self.routes.to(key)?.way {
            Way::Lanes(lanes) => lanes.sign(key, alg, digest).await,
            Way::Child(client) => client.sign(key, alg, &digest).await,
        }
    }

    /// HMAC-SHA256 of `message` under a key in the device.
    ///
    /// # Errors
    /// See [`SealError`].
    pub async fn mac(&self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], SealError> {
        match &self.routes.to(key)?.way {
            Way::Lanes(lanes) => lanes.mac(key, message).await,
            Way::Child(client) => client.mac(key, message).await,
        }
    }

    /// The public half of a signing key, read from the device.
    ///
    /// # Errors
    /// See [`SealError`].
    pub async fn public_key(&self, key: &KeyRef) -> Result<PublicKey, SealError> {
        match &self.routes.to(key)?.way {
            Way::Lanes(lanes) => lanes.public_key(key).await,
            Way::Child(client) => client.public_key(key).await,
        }
    }

    /// Fresh random bytes in guarded memory (the operating system's generator).
    ///
    /// # Errors
    /// [`SealError::Busy`] if guarded memory is used up.
    pub async fn random(&self, len: usize) -> Result<Opened, SealError> {
        Ok(Opened(self.arena.random(len).await?))
    }

    /// Whether the key's device takes requests now, as far as is known without asking it.
    ///
    /// # Errors
    /// What a request would get.
    pub fn admits(&self, key: &KeyRef) -> Result<(), SealError> {
        self.routes.to(key)?.way.admit()
    }
}

async fn seal_body(
    route: &Route,
    kek: &Kek,
    context: &Context<'_>,
    body: SecretBuf,
) -> Result<Sealed, SealError> {
    match &route.way {
        Way::Lanes(lanes) => seal_here(lanes, kek, context, body).await,
        Way::Child(client) => client.seal(kek, context, body).await,
    }
}

/// Encrypts `body`, which is the plaintext, under a fresh DEK that the device wraps.
async fn seal_here(
    lanes: &Lanes,
    kek: &Kek,
    context: &Context<'_>,
    mut body: SecretBuf,
) -> Result<Sealed, SealError> {
    for _ in 0..DEK_TRIES {
        let dek = lanes.arena.take(envelope::DEK_LEN).await?;
        let (wrapped, dek) = lanes.wrap(kek, dek, context.wrap_aad(kek), context.flow()).await?;
        match envelope::encrypt(&mut Dek::new(dek, DEK_LIFETIME), context, &mut body) {
            Err(envelope::Failure::Expired) => {}
            Err(envelope::Failure::Seal(error)) => return Err(error),
            Ok(payload) => return Ok(Sealed { key: WrappedKey::new(kek, wrapped), payload }),
        }
    }
    Err(overloaded())
}

/// Decrypts into `plain` under the DEK that the device unwraps.
async fn open_here(
    lanes: &Lanes,
    kek: &Kek,
    context: &Context<'_>,
    sealed: &Sealed,
    mut plain: SecretBuf,
) -> Result<SecretBuf, SealError> {
    for _ in 0..DEK_TRIES {
        let dek = unwrap(lanes, kek, context, &sealed.key, Priority::Foreground).await?;
        match envelope::decrypt(&mut Dek::new(dek, DEK_LIFETIME), context, &sealed.payload, &mut plain) {
            Err(envelope::Failure::Expired) => {}
            Err(envelope::Failure::Seal(error)) => return Err(error),
            Ok(()) => return Ok(plain),
        }
    }
    Err(overloaded())
}

/// Old and new KEK are on one device.
async fn rewrap_here(
    lanes: &Lanes,
    from: &Kek,
    to: &Kek,
    context: &Context<'_>,
    key: &WrappedKey,
) -> Result<WrappedDek, SealError> {
    let wrapped = key.wrapped_by(from).ok_or(SealError::Rejected)?.clone();
    let room = lanes.arena.take(envelope::DEK_SLOT_LEN).await?;
    let old = (from, wrapped, context.wrap_aad(from));
    lanes.rewrap(old, (to, context.wrap_aad(to)), room, context.flow()).await
}

/// One device unwraps and another one wraps.
async fn rewrap_across(
    (source, from): (&Lanes, &Kek),
    (target, to): (&Lanes, &Kek),
    context: &Context<'_>,
    key: &WrappedKey,
) -> Result<WrappedDek, SealError> {
    let _place = target.arrival(&to.key).await?;
    for _ in 0..DEK_TRIES {
        let dek = unwrap(source, from, context, key, Priority::Background).await?;
        let aad = context.wrap_aad(to);
        if let Some(wrapped) = target.wrap_within(DEK_LIFETIME, to, dek, aad, context.flow()).await? {
            return Ok(wrapped);
        }
    }
    Err(worker::full())
}

async fn unwrap(
    lanes: &Lanes,
    kek: &Kek,
    context: &Context<'_>,
    key: &WrappedKey,
    priority: Priority,
) -> Result<SecretBuf, SealError> {
    let wrapped = key.wrapped_by(kek).ok_or(SealError::Rejected)?.clone();
    let slot = lanes.arena.take(envelope::DEK_SLOT_LEN).await?;
    lanes.unwrap(kek, wrapped, context.wrap_aad(kek), slot, (priority, context.flow())).await
}

fn overloaded() -> SealError {
    SealError::Busy { what: "guarded memory", retry_after: Duration::from_secs(1) }
}
