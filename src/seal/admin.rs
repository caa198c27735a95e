//! Keys come and go: the handle that makes, destroys and inspects them, and reads a device's counter.

use crate::seal::devices::{DeviceName, Routes};
use crate::seal::driver::Count;
use crate::seal::key::KeyRef;
use crate::seal::{SealError, Way, worker};

/// Makes, destroys and inspects keys, each on the device that its [`KeyRef`] names. Given by `daemon` to
/// `vault`, `keys` and the command line only.
#[derive(Clone)]
pub struct KeyAdmin {
    routes: Routes,
}

impl KeyAdmin {
    pub(crate) const fn new(routes: Routes) -> Self {
        Self { routes }
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
            Way::Lanes(lanes) => lanes.generate(planned, Box::new(held)).await,
            Way::Child(client) => client.generate(planned, Box::new(held)).await,
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
