//! A device in this process: `seal` over the shim over SoftHSM, with one token for the whole program.
//!
//! A PKCS#11 module is initialised once for a process, so these tests take turns.

#![expect(unsafe_code, reason = "the environment of the test process is set once")]

use std::ops::Deref;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Arena, Context, Device, DeviceState, Kek, KekId, KeyId, KeyRef, KeySpec, SealerConfig, SealerMode,
    StartError, Surroundings,
};
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard};

use crate::raw::{Module, Session};
use crate::shim::{ShimControl, shim_path};
use crate::softhsm::SoftHsm;

const LABEL: &str = "device";

/// What a test of this process works with.
pub struct Stage {
    /// The shim's rules and counts.
    pub control: ShimControl,
    /// The token.
    pub token: &'static SoftHsm,
}

/// The stage, without rules, for one test at a time.
pub async fn stage() -> MutexGuard<'static, Stage> {
    static STAGE: OnceLock<Mutex<Stage>> = OnceLock::new();
    let stage = STAGE.get_or_init(|| Mutex::new(Stage::new())).lock().await;
    stage.control.set_rules("");
    stage
}

impl Stage {
    fn new() -> Self {
        let token = SoftHsm::in_process(LABEL);
        let control = ShimControl::new(&token.module);
        for (name, value) in control.env() {
            // SAFETY: as in SoftHsm::in_process; every test that loads the module starts in stage().
            unsafe { std::env::set_var(name, value) };
        }
        Self { control, token }
    }

    /// Starts the device, `[seal]` changed by `changes`, `[seal.pkcs11]` by `pkcs11`.
    pub fn try_start(&self, changes: Value, pkcs11: Value, slots: usize) -> Result<Running, StartError> {
        let mut config = json!({ "latch_dir": self.token.dir.join("latch"), "deadline": 2, "pkcs11": {
            "module": shim_path(),
            "token": LABEL,
            "pin_source": format!("file:{}", self.token.pin_file.display()),
        }});
        merge(&mut config["pkcs11"], pkcs11);
        merge(&mut config, changes);
        let options = Options { slots, allow_unlocked: true, ..Options::default() };
        let arena = Arena::new(&options).unwrap();
        let device = lacre::seal::start(&serde_json::from_value(config).unwrap(), &arena)?;
        Ok(Running { device, arena })
    }

    /// A device with default settings, ready.
    pub fn start(&self) -> Running {
        let running = self.try_start(json!({}), json!({}), 64).unwrap();
        assert_eq!(running.status().state, DeviceState::Ready);
        running
    }

    /// A session of somebody else in this process, by code that Lacre does not use. Logged in as long
    /// as the device is.
    pub fn other_session(&self) -> Session {
        let module = Module::load(&shim_path());
        let session = module.session(module.slot(LABEL).unwrap()).unwrap();
        session.login(&self.token.pin).unwrap();
        session
    }

    /// Runs pkcs11-tool on the token, logged in; its standard output.
    pub fn pkcs11_tool(&self, args: &[&str]) -> String {
        pkcs11_tool(&self.token.module, &self.token.conf, LABEL, &self.token.pin, args)
    }

    /// What pkcs11-tool lists of the objects with that id, sorted.
    pub fn objects(&self, id: &str) -> Vec<String> {
        objects_in(&self.pkcs11_tool(&["--list-objects"]), id)
    }

    /// A file for `pkcs11-tool` and `openssl`.
    pub fn file(&self, name: &str) -> PathBuf {
        self.token.dir.join(name)
    }
}

/// Runs pkcs11-tool, logged in; its standard output.
pub fn pkcs11_tool(
    module: &std::path::Path,
    conf: &std::path::Path,
    label: &str,
    pin: &str,
    args: &[&str],
) -> String {
    let mut command = Command::new("pkcs11-tool");
    command.env("SOFTHSM2_CONF", conf).arg("--module").arg(module);
    command.args(["--token-label", label, "--login", "--pin", pin]).args(args);
    let output = command.output().expect("pkcs11-tool is installed (apt-get install opensc)");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "pkcs11-tool {args:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The objects with that id in a listing of pkcs11-tool, which begins each with `Some Kind Object; ...`.
pub fn objects_in(listing: &str, id: &str) -> Vec<String> {
    let mut objects: Vec<String> = Vec::new();
    for line in listing.lines() {
        match objects.last_mut() {
            _ if line.contains(" Object; ") => objects.push(format!("{line}\n")),
            Some(object) => {
                object.push_str(line);
                object.push('\n');
            }
            None => {}
        }
    }
    let wanted = format!("ID:         {id}\n");
    objects.retain(|object| object.contains(&wanted));
    objects.sort();
    objects
}

fn merge(into: &mut Value, from: Value) {
    let Value::Object(from) = from else { return };
    for (key, value) in from {
        into[key] = value;
    }
}

/// A started device; closed when dropped, which also finalises the module.
pub struct Running {
    device: Device,
    /// Its guarded memory.
    pub arena: Arena,
}

impl Deref for Running {
    type Target = Device;

    fn deref(&self) -> &Device {
        &self.device
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.device.close();
    }
}

impl Running {
    /// A fresh KEK.
    pub async fn kek(&self) -> Kek {
        kek_of(self.key(KeySpec::Kek).await)
    }

    /// A fresh key.
    pub async fn key(&self, spec: KeySpec) -> KeyRef {
        self.admin.generate(&KeyRef::plan(spec).unwrap()).await.unwrap()
    }

    /// Waits until the device is ready; how long it took.
    pub async fn ready(&self, patience: Duration) -> Duration {
        let began = Instant::now();
        while self.status().state != DeviceState::Ready {
            assert!(began.elapsed() < patience, "not ready: {:?}", self.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        began.elapsed()
    }

    /// Waits until the device is not ready.
    pub async fn away(&self) {
        let until = Instant::now() + Duration::from_secs(15);
        while self.status().state == DeviceState::Ready {
            assert!(Instant::now() < until, "still ready");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// The device in a process of its own, over the same token.
pub fn in_process(stage: &Stage) -> (Device, Arena) {
    let config = json!({ "latch_dir": stage.token.dir.join("latch"), "deadline": 2, "pkcs11": {
        "module": shim_path(),
        "token": "device",
        "pin_source": format!("file:{}", stage.token.pin_file.display()),
    }});
    let options = Options { slots: 64, allow_unlocked: true, ..Options::default() };
    let arena = Arena::new(&options).unwrap();
    let mut surroundings = Surroundings::new(&options, "info", false);
    surroundings.program = env!("CARGO_BIN_EXE_lacre").into();
    let sealer = SealerConfig { mode: SealerMode::Process, ..SealerConfig::default() };
    let device =
        lacre::seal::launch(&sealer, &serde_json::from_value(config).unwrap(), &surroundings, &arena)
            .unwrap();
    assert_eq!(device.status().state, DeviceState::Ready);
    (device, arena)
}

/// Version 1 of a KEK with that device key.
pub fn kek_of(key: KeyRef) -> Kek {
    Kek { id: KekId::generate().unwrap(), version: 1, key }
}

/// A place for a value.
pub const HERE: Context<'_> = Context { tenant: "t", kind: "secret", record: "r1", version: 1 };

/// Another place.
pub const THERE: Context<'_> = Context { tenant: "t", kind: "secret", record: "r2", version: 1 };

/// A key id as pkcs11-tool wants it.
pub fn hex_id(id: KeyId) -> String {
    id.to_string()
}
