//! Several devices at once: their names, which one a key is on, and the way of a call to it.
//!
//! A [`KeyRef`] carries the name of its device beside what it is known by, so everything above `seal` goes on
//! naming keys only. Devices share nothing but guarded memory, of which each may take its part: one
//! that is slow or away holds up nobody else's calls. Two tokens of one PKCS#11 module share the module
//! (`pkcs11/library.rs`).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::seal::device::{self, Config, Device, DeviceState, DeviceStatus, StartError};
use crate::seal::guarded::Arena;
use crate::seal::key::KeyRef;
use crate::seal::pkcs11::Modules;
use crate::seal::{KeyAdmin, SealError, Sealer, SealerConfig, SealerMode, Surroundings, Way, child};

/// A device's name in the configuration and in the rows of its keys: 1 to 32 characters of `a-z 0-9 -`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(Arc<str>);

impl DeviceName {
    const DEFAULT: &str = "default";

    /// Reads a name; `None` if it breaks the rule.
    pub fn parse(text: &str) -> Option<Self> {
        let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        ((1..=32).contains(&text.len()) && text.bytes().all(fits)).then(|| Self(text.into()))
    }

    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the device of `[seal]`.
    pub fn is_default(&self) -> bool {
        self.as_str() == Self::DEFAULT
    }

    /// For labels of metrics, without a copy.
    pub(crate) fn shared(&self) -> Arc<str> {
        Arc::clone(&self.0)
    }

    /// Counts one operation of the device. Here, so that it has the same labels wherever it is driven.
    pub(crate) fn count(&self, operation: &'static str, is_ok: bool, took: Duration) {
        let result = if is_ok { "ok" } else { "error" };
        let name = || metrics::SharedString::from_shared(self.shared());
        metrics::counter!("lacre_hsm_operations_total", "device" => name(), "op" => operation, "result" => result)
            .increment(1);
        metrics::histogram!("lacre_hsm_operation_duration_seconds", "device" => name(), "op" => operation)
            .record(took.as_secs_f64());
    }
}

impl Default for DeviceName {
    /// The device of `[seal]`, and of keys that were made when there was only one.
    fn default() -> Self {
        Self(Self::DEFAULT.into())
    }
}

impl TryFrom<String> for DeviceName {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("a device's name has 1 to 32 characters of a-z, 0-9 and -")
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceName({self})")
    }
}

/// Where calls go: the way to each device, by name.
#[derive(Clone)]
pub(crate) struct Routes(Arc<[Route]>);

/// The way to one device and its part of guarded memory.
pub(crate) struct Route {
    name: DeviceName,
    pub(crate) way: Way,
    /// Calls that may hold guarded buffers at the same time. Each needs two slots, so with half as many
    /// calls as slots none waits for another that waits for it.
    room: Semaphore,
}

impl Routes {
    pub(crate) fn new(ways: Vec<(DeviceName, Way)>, arena: &Arena) -> Self {
        let room = (arena.status().slots / 2 / ways.len().max(1)).max(1);
        let route = |(name, way)| Route { name, way, room: Semaphore::new(room) };
        Self(ways.into_iter().map(route).collect())
    }

    /// The route to the key's device.
    pub(crate) fn to(&self, key: &KeyRef) -> Result<&Route, SealError> {
        self.of(key.device())
            .ok_or_else(|| SealError::NoDevice { key: key.id(), device: key.device().clone() })
    }

    /// The route to a device; `None` if there is none of that name.
    pub(crate) fn of(&self, name: &DeviceName) -> Option<&Route> {
        self.0.iter().find(|route| route.name == *name)
    }
}

impl Route {
    /// Takes a place in guarded memory; given up after the device's deadline.
    pub(crate) async fn enter(&self) -> Result<SemaphorePermit<'_>, SealError> {
        let entered = tokio::time::timeout(self.way.deadline(), self.room.acquire()).await;
        entered.ok().and_then(Result::ok).ok_or_else(super::overloaded)
    }
}

/// All devices of a daemon, started.
pub struct Devices {
    /// Uses keys on all of them.
    pub sealer: Sealer,
    /// Makes and destroys keys on all of them.
    pub admin: KeyAdmin,
    all: Vec<Device>,
}

impl Devices {
    /// Starts every device. Returns with those up that could be; recovery of the others goes on.
    ///
    /// Each is driven where `sealer` says, in a process of its own or in threads of this one.
    ///
    /// # Errors
    /// [`StartError`] for what no waiting heals, whichever device it is.
    pub fn start(
        configs: &BTreeMap<DeviceName, Config>,
        sealer: &SealerConfig,
        surroundings: &Surroundings,
        arena: &Arena,
    ) -> Result<Self, StartError> {
        let (modules, mut all) = (Modules::default(), Vec::<Device>::new());
        for (name, config) in configs {
            let started = match sealer.mode {
                SealerMode::Process => child::start(name.clone(), sealer, config, surroundings, arena),
                SealerMode::Thread => device::start_named(name.clone(), config, arena, &modules),
            };
            match started {
                Ok(device) => all.push(device),
                Err(error) => {
                    all.iter().for_each(Device::close);
                    return Err(error);
                }
            }
        }
        let ways = all.iter().map(|device| (device.name().clone(), device.way())).collect();
        let routes = Routes::new(ways, arena);
        Ok(Self {
            sealer: Sealer::new(routes.clone(), arena.clone()),
            admin: KeyAdmin::new(routes, arena.clone()),
            all,
        })
    }

    /// Every device, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Device> {
        self.all.iter()
    }

    /// The present status of each; never waits for a device.
    pub fn status(&self) -> Vec<DeviceStatus> {
        self.iter().map(Device::status).collect()
    }

    /// How a device is; `None` if there is none of that name.
    pub fn state(&self, name: &DeviceName) -> Option<DeviceState> {
        self.iter().find(|device| device.name() == name).map(|device| device.status().state)
    }

    /// Calls since the start, on all devices, that met a key which is missing or unfit for use.
    pub fn key_failures(&self) -> u64 {
        self.iter().map(|device| device.status().key_failures).sum()
    }

    /// Closes each; the last token of a module finalises it.
    pub fn close(&self) {
        self.iter().for_each(Device::close);
    }
}

#[cfg(test)]
mod tests {
    use super::DeviceName;

    #[test]
    fn a_name_is_short_and_plain() {
        for good in ["default", "b", "hsm-2"] {
            assert_eq!(DeviceName::parse(good).unwrap().as_str(), good);
        }
        for bad in ["", "A", "a_b", "a b", "ä", &"x".repeat(33)] {
            assert!(DeviceName::parse(bad).is_none(), "{bad}");
        }
        assert!(DeviceName::default().is_default() && !DeviceName::parse("b").unwrap().is_default());
    }
}
