//! What a device must be able to do: the contract that every backend keeps.
//!
//! Blocking, one session per value, no locks needed. Retry, recovery, deadlines and the breaker are
//! not here but in `worker.rs`: a backend calls the device once and names the failure. Each sentence
//! of the contract is one rule of the conformance tests.

use crate::seal::KeyReport;
use crate::seal::guarded::SecretBuf;
use crate::seal::key::{Alg, KeyRef, PublicKey, Signature, WrappedDek};

/// Why a device call failed, sorted by what the worker does about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The device did not accept the wrapped bytes. Altered bytes look so, and on some modules a
    /// vanished token as well: the canary decides which it was.
    #[error("{function} refused the wrapped bytes ({code:#x})")]
    Rejected {
        /// The call.
        function: &'static str,
        /// Its return value.
        code: u64,
    },
    /// The session, the login or a handle is void. Open again, log in again, look keys up again, retry once.
    #[error("{function} says the session or a handle is void ({code:#x})")]
    SessionLost {
        /// The call.
        function: &'static str,
        /// Its return value.
        code: u64,
    },
    /// The device is not there or not working. Open the breaker and probe.
    #[error("{function} says the device is away ({code:#x})")]
    Away {
        /// The call.
        function: &'static str,
        /// Its return value.
        code: u64,
    },
    /// The device is there and computes wrongly (KL-10): not to be used until the same key passes. The text
    /// says what it did.
    #[error("the device failed its self-test: {0}")]
    SelfTest(&'static str),
    /// A person is needed: wrong or locked PIN, another token in the slot. Never retried.
    #[error("stopped: {0}")]
    Stopped(String),
    /// The device is well and does not hold the key.
    #[error("key not on the device")]
    Missing,
    /// The key is there and breaks a rule. The text says which one, for the operator.
    #[error("key unfit: {0}")]
    Unfit(String),
    /// The request was wrong for this device; the device is well.
    #[error("{function} refused the request ({code:#x})")]
    Refused {
        /// The call.
        function: &'static str,
        /// Its return value; 0 where the answer itself was unusable.
        code: u64,
    },
    /// The link broke after a request that changes the device: done or not, nobody knows.
    #[error("outcome of {function} unknown ({code:#x})")]
    Unknown {
        /// The call.
        function: &'static str,
        /// Its return value.
        code: u64,
    },
}

/// A device, as far as this program needs one. One value owns one device session, so the methods
/// take `&mut self`, may block, and no implementation needs a lock.
///
/// After `Err`, nothing has changed on the device. An implementation that cannot know that must
/// return [`BackendError::Unknown`]. A key that is ambiguous, has another fingerprint than its pin,
/// or weakened attributes is never used: [`BackendError::Unfit`].
pub trait Backend: Send {
    /// Wraps the 32-byte DEK. The IV in the answer is the one the device really used.
    ///
    /// # Errors
    /// See [`BackendError`].
    fn wrap(&mut self, kek: &KeyRef, dek: &SecretBuf, aad: &[u8]) -> Result<WrappedDek, BackendError>;

    /// Unwraps into `out`, which is at least `DEK_SLOT_LEN` long and afterwards exactly 32 bytes, or
    /// wiped after an error.
    ///
    /// # Errors
    /// [`BackendError::Rejected`] if bytes, AAD or KEK are not those of the wrap.
    fn unwrap(
        &mut self,
        kek: &KeyRef,
        wrapped: &WrappedDek,
        aad: &[u8],
        out: &mut SecretBuf,
    ) -> Result<(), BackendError>;

    /// Signs what `Alg::digest` gave: a digest, for EdDSA the message. ECDSA comes back as `r || s` of fixed width.
    ///
    /// # Errors
    /// See [`BackendError`].
    fn sign(&mut self, key: &KeyRef, alg: Alg, digest: &[u8]) -> Result<Signature, BackendError>;

    /// HMAC-SHA256.
    ///
    /// # Errors
    /// See [`BackendError`].
    fn mac(&mut self, key: &KeyRef, message: &[u8]) -> Result<[u8; 32], BackendError>;

    /// The public half, from the device.
    ///
    /// # Errors
    /// See [`BackendError`].
    fn public_key(&mut self, key: &KeyRef) -> Result<PublicKey, BackendError>;

    /// Makes the planned key and returns it pinned. Making what is there already is a success:
    /// callers repeat this step after a crash. Never makes a second object of that id.
    ///
    /// With `given` (PKCS#8, or the secret of a MAC key) it is that key, which the device takes from outside, and
    /// the pin says so. Another key under the id is [`BackendError::Unfit`].
    ///
    /// # Errors
    /// See [`BackendError`]; [`BackendError::Refused`] by a device that imports nothing, and for a key that is none
    /// or not of the planned kind.
    fn generate(&mut self, planned: &KeyRef, given: Option<&SecretBuf>) -> Result<KeyRef, BackendError>;

    /// Destroys the key. Destroying what is not there is a success, for the same reason.
    ///
    /// # Errors
    /// See [`BackendError`].
    fn destroy(&mut self, key: &KeyRef) -> Result<(), BackendError>;

    /// Reads the key's attributes and checks every rule. Broken rules are in the report, not an error. A
    /// signing or MAC key is tested too: what it makes is right.
    ///
    /// # Errors
    /// [`BackendError::Missing`] if there is no such key; [`BackendError::SelfTest`] if the device computes
    /// wrongly with it.
    fn inspect(&mut self, key: &KeyRef) -> Result<KeyReport, BackendError>;
}
