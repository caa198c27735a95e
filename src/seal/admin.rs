//! Keys come and go: the handle that makes, destroys and inspects them, and reads a device's counter.

use crate::seal::devices::{DeviceName, Routes};
use crate::seal::driver::Count;
use crate::seal::guarded::{Arena, SecretBuf};
use crate::seal::import::LARGEST_PRIVATE;
use crate::seal::key::KeyRef;
use crate::seal::{SealError, Way, worker};

/// Makes, destroys and inspects keys, each on the device that its [`KeyRef`] names. Given by `daemon` to
/// `vault`, `keys` and the command line only.
#[derive(Clone)]
pub struct KeyAdmin {
    routes: Routes,
    arena: Arena,
}

impl KeyAdmin {
    pub(crate) const fn new(routes: Routes, arena: Arena) -> Self {
        Self { routes, arena }
    }

    /// Makes the planned key on the device and returns it pinned: with the fingerprint (public key,
    /// MAC or canary) that every later use checks. Making what is there already is a success, so a
    /// step repeated after a crash converges; a second object of one id is never made.
    ///
    /// # Errors
    /// See [`SealError`]; after [`SealError::Unknown`] call it again with the same planned key.
    pub async fn generate(&self, planned: &KeyRef) -> Result<KeyRef, SealError> {
        self.generate_holding(planned, ()).await
    }

    /// As [`KeyAdmin::generate`], and drops `held` when the device has ended the call: later than this
    /// returns if it hangs, or if the caller goes away. Until then a second call for the same planned
    /// key could make a second object, so whatever keeps others from calling belongs into `held`.
    ///
    /// # Errors
    /// As [`KeyAdmin::generate`].
    pub async fn generate_holding(
        &self,
        planned: &KeyRef,
        held: impl Send + 'static,
    ) -> Result<KeyRef, SealError> {
        match &self.routes.to(planned)?.way {
            Way::Lanes(lanes) => lanes.generate(planned, None, Box::new(held)).await,
            Way::Child(client) => client.generate(planned, None, Box::new(held)).await,
        }
    }

    /// Puts a key that exists already on the device, under the planned id, and returns it pinned: its reference says
    /// that it was imported. `private` is an unencrypted PKCS#8 `PrivateKeyInfo` in DER, which has to be of the
    /// planned kind (`public_half` tells), or the 16 to 64 octets of a MAC key. It is copied into guarded memory at
    /// once; wiping the original is the caller's. Importing what is there already is a success, so that a step
    /// repeated after a crash converges.
    ///
    /// The device is told that the key is sensitive and does not leave, as of any other. That it was made there and
    /// was never readable is not true of it and not asked of it; every report says so.
    ///
    /// # Errors
    /// [`SealError::KeyUnfit`] if another key is under that id. [`SealError::Refused`] by a device that imports
    /// nothing, as a TPM here, and for what is no such key, or of another kind, or too weak (`public_half` says which);
    /// [`SealError::TooLarge`] beyond `LARGEST_PRIVATE`. Else see [`SealError`]; after [`SealError::Unknown`] call it
    /// again with the same planned key.
    pub async fn import(&self, planned: &KeyRef, private: &[u8]) -> Result<KeyRef, SealError> {
        self.import_holding(planned, private, ()).await
    }

    /// As [`KeyAdmin::import`], and drops `held` when the device has ended the call, as
    /// [`KeyAdmin::generate_holding`] does.
    ///
    /// # Errors
    /// As [`KeyAdmin::import`].
    pub async fn import_holding(
        &self,
        planned: &KeyRef,
        private: &[u8],
        held: impl Send + 'static,
    ) -> Result<KeyRef, SealError> {
        if private.is_empty() {
            return Err(worker::mismatch("import"));
        }
        if private.len() > LARGEST_PRIVATE {
            return Err(SealError::TooLarge { len: private.len() });
        }
        let _room = self.routes.to(planned)?.enter().await?;
        let mut copy = self.arena.take(private.len()).await?;
        copy.with_mut(|copy| copy.copy_from_slice(private));
        self.import_guarded(planned, copy, held).await
    }

    /// As [`KeyAdmin::import_holding`], for a key that is in guarded memory already.
    pub(crate) async fn import_guarded(
        &self,
        planned: &KeyRef,
        private: SecretBuf,
        held: impl Send + 'static,
    ) -> Result<KeyRef, SealError> {
        match &self.routes.to(planned)?.way {
            Way::Lanes(lanes) => lanes.generate(planned, Some(private), Box::new(held)).await,
            Way::Child(client) => client.generate(planned, Some(private), Box::new(held)).await,
        }
    }

    /// Every key on the device that bears Lacre's label: signing keys, MAC keys and KEKs, also half-made ones and
    /// those of other installations that share the token. Each is named as if it was planned, so that it can be
    /// destroyed, or generated (which takes up what is there); nothing is proven of it. In no order.
    ///
    /// Empty for a TPM: signing and MAC keys are blobs in their rows there, so none can be on it without a row.
    ///
    /// # Errors
    /// See [`SealError`].
    pub async fn list(&self, device: &DeviceName) -> Result<Vec<KeyRef>, SealError> {
        match self.routes.of(device).map(|route| &route.way) {
            Some(Way::Lanes(lanes)) => lanes.list().await,
            Some(Way::Child(client)) => client.list().await,
            None => Err(worker::mismatch("list")),
        }
    }

    /// Destroys the key on the device. Destroying what is not there is a success.
    ///
    /// # Errors
    /// See [`SealError`].
    pub async fn destroy(&self, key: &KeyRef) -> Result<(), SealError> {
        match &self.routes.to(key)?.way {
            Way::Lanes(lanes) => lanes.destroy(key).await,
            Way::Child(client) => client.destroy(key).await,
        }
    }

    /// Reads the key's attributes back, checks that its id is unambiguous and its fingerprint the
    /// pinned one, and reports every rule it breaks.
    ///
    /// # Errors
    /// [`SealError::KeyMissing`] if it is not there; a key that breaks rules is not an error here.
    pub async fn inspect(&self, key: &KeyRef) -> Result<KeyReport, SealError> {
        match &self.routes.to(key)?.way {
            Way::Lanes(lanes) => lanes.inspect(key).await,
            Way::Child(client) => client.inspect(key).await,
        }
    }

    /// The value of a device's counter after `count`, `None` if it was never made. It only grows, so it
    /// tells an old copy of the database from the present one.
    ///
    /// # Errors
    /// [`SealError::Refused`] by a device that has none; see [`SealError`]. After [`SealError::Unknown`]
    /// the same call may be made again.
    pub async fn count(&self, device: &DeviceName, count: Count) -> Result<Option<u64>, SealError> {
        self.count_holding(device, count, ()).await
    }

    /// As [`KeyAdmin::count`], and drops `held` when the device has ended the call, as
    /// [`KeyAdmin::generate_holding`] does: two daemons that advance one counter at a time would advance it twice.
    ///
    /// # Errors
    /// As [`KeyAdmin::count`].
    pub async fn count_holding(
        &self,
        device: &DeviceName,
        count: Count,
        held: impl Send + 'static,
    ) -> Result<Option<u64>, SealError> {
        match self.routes.of(device).map(|route| &route.way) {
            Some(Way::Lanes(lanes)) => lanes.count(count, Box::new(held)).await,
            Some(Way::Child(client)) => client.count(count, Box::new(held)).await,
            None => Err(worker::mismatch("count")),
        }
    }
}

/// What [`KeyAdmin::inspect`] found.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct KeyReport {
    /// The device's attributes by their PKCS#11 name, as text.
    pub attributes: Vec<(&'static str, String)>,
    /// Rules that the key breaks; empty for a fit key.
    pub deviations: Vec<String>,
    /// Rules that it breaks and that the configuration accepts: evidence that the device cannot give.
    pub accepted: Vec<String>,
}
