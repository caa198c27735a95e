//! A device in this process: one installation for the whole program, started anew for each rule.

#![expect(unsafe_code, reason = "a companion process has to end with this one")]

use std::collections::HashMap;
use std::fs;
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use lacre::seal::guarded::Options;
use lacre::seal::{
    Arena, Context, Device, DeviceConfig, DeviceState, Kek, KekId, KeyRef, KeySpec, SealError,
};
use serde_json::Value;
use tokio::sync::{OwnedMutexGuard, RwLock, RwLockWriteGuard};

/// A kind of device that the rules are run on.
pub struct Backend {
    /// In the table and in messages.
    pub title: &'static str,
    /// Makes a fresh installation in the empty directory and gives `[seal]` for it, as JSON. Called once
    /// in a process. What it starts must end with the process ([`companion`]).
    pub install: fn(&Path) -> Value,
    /// Promises that this device breaks, in the words of [`crate::keys::deviations`], each with the
    /// reason why Lacre bears it. A deviation that no longer occurs fails the tests as one that is new.
    pub deviations: &'static [(&'static str, &'static str)],
    /// Whether each rule has a process of its own, for a module that closes files of others.
    pub own_process: bool,
}

/// Runs the rule in a process of its own if the device wants that; whether it did.
pub fn in_own_process(backend: &Backend, rule: &str) -> bool {
    const MARK: &str = "LACRE_BACKEND_RULE";
    if !backend.own_process || std::env::var_os(MARK).is_some() {
        return false;
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args([rule, "--exact", "--nocapture"]).env(MARK, rule).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success() && said.contains("1 passed"), "{rule}: {}\n{said}", output.status);
    true
}

/// An installation, for one rule at a time.
pub struct Stage {
    /// What is installed.
    pub backend: &'static Backend,
    /// A directory of this installation.
    pub dir: PathBuf,
    config: Value,
    capabilities: OnceLock<Value>,
}

type Stages = Mutex<HashMap<&'static str, Arc<tokio::sync::Mutex<Option<Stage>>>>>;

/// The installation of `backend`, made at the first call, for one rule at a time.
pub async fn of(backend: &'static Backend) -> Turn {
    static STAGES: LazyLock<Stages> = LazyLock::new(Stages::default);
    let place = {
        let mut stages = STAGES.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(stages.entry(backend.title).or_default())
    };
    let mut turn = place.lock_owned().await;
    if turn.is_none() {
        *turn = Some(Stage::new(backend));
    }
    Turn(turn)
}

/// A turn on a stage.
pub struct Turn(OwnedMutexGuard<Option<Stage>>);

impl Deref for Turn {
    type Target = Stage;

    fn deref(&self) -> &Stage {
        self.0.as_ref().unwrap()
    }
}

static PROCESS: LazyLock<RwLock<()>> = LazyLock::new(RwLock::default);

/// Held by a rule. None runs beside another: openCryptoki closes a file twice, and in between its number
/// may have become that of somebody else's.
pub async fn beside_others() -> RwLockWriteGuard<'static, ()> {
    PROCESS.write().await
}

/// Held by a rule that looks at the whole process.
pub async fn alone() -> RwLockWriteGuard<'static, ()> {
    PROCESS.write().await
}

impl Stage {
    fn new(backend: &'static Backend) -> Self {
        let name: String = backend.title.chars().filter(char::is_ascii_alphanumeric).collect();
        let dir = process_dir().join(name);
        fs::create_dir_all(&dir).unwrap();
        let mut config = (backend.install)(&dir);
        config["latch_dir"] = dir.join("latch").to_str().unwrap().into();
        Self { backend, dir, config, capabilities: OnceLock::new() }
    }

    /// The device, ready.
    pub async fn start(&self) -> Running {
        self.start_with(|_| {}).await
    }

    /// The device with `[seal]` changed, ready.
    pub async fn start_with(&self, change: impl FnOnce(&mut Value)) -> Running {
        let mut config = self.config.clone();
        change(&mut config);
        let config: DeviceConfig = serde_json::from_value(config).unwrap();
        let arena = Arena::new(&Options { slots: 160, allow_unlocked: true, ..Options::default() }).unwrap();
        let device = lacre::seal::start(&config, &arena).unwrap();
        let running = Running { device, title: self.backend.title };
        running.ready_again().await;
        running
    }

    /// What the device says that it can do; asked once.
    pub async fn capabilities(&self, device: &Running) -> &Value {
        if self.capabilities.get().is_none() {
            let found = device.capabilities().await.unwrap();
            println!("{}: {found:#}", self.backend.title);
            let _ = self.capabilities.set(found);
        }
        self.capabilities.get().unwrap()
    }

    /// The kinds of keys that the device has (`true`) or lacks.
    pub async fn specs(&self, device: &Running, have: bool) -> Vec<KeySpec> {
        let capabilities = self.capabilities(device).await;
        let has = |spec: &KeySpec| capabilities["keys"][spec.name()].as_bool().unwrap() == have;
        SPECS.into_iter().filter(has).collect()
    }
}

const SPECS: [KeySpec; 8] = [
    KeySpec::Kek,
    KeySpec::EcP256,
    KeySpec::EcP384,
    KeySpec::Rsa2048,
    KeySpec::Rsa3072,
    KeySpec::Rsa4096,
    KeySpec::HmacSha256,
    KeySpec::Ed25519,
];

/// A started device; closed when dropped.
pub struct Running {
    device: Device,
    title: &'static str,
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
    /// A fresh key.
    pub async fn key(&self, spec: KeySpec) -> KeyRef {
        let made = self.admin.generate(&KeyRef::plan(spec).unwrap()).await;
        made.unwrap_or_else(|error| panic!("{}: no {}: {}", self.title, spec.name(), chain(&error)))
    }

    /// A fresh KEK.
    pub async fn kek(&self) -> Kek {
        kek_of(self.key(KeySpec::Kek).await)
    }

    /// Destroys what a rule has made: devices are small.
    pub async fn destroy(&self, keys: &[&KeyRef]) {
        for key in keys {
            self.admin.destroy(key).await.unwrap();
        }
    }

    /// Waits until the device is ready.
    pub async fn ready_again(&self) {
        let began = Instant::now();
        while self.status().state != DeviceState::Ready {
            assert!(began.elapsed() < Duration::from_secs(15), "{}: {:?}", self.title, self.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// The device is what it was at the start.
    pub fn assert_ready(&self) {
        assert_eq!(self.status().state, DeviceState::Ready, "{}", self.title);
    }
}

/// Version 1 of a KEK with that device key.
pub fn kek_of(key: KeyRef) -> Kek {
    Kek { id: KekId::generate().unwrap(), version: 1, key }
}

/// An error with its causes.
pub fn chain(error: &SealError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

/// Whether the value was found to be another's.
pub fn is_rejected<T>(answer: &Result<T, SealError>) -> bool {
    matches!(answer, Err(SealError::Rejected))
}

/// A place for a value.
pub const HERE: Context<'_> = Context { tenant: "t", kind: "secret", record: "r1", version: 1 };

/// Another place.
pub const THERE: Context<'_> = Context { tenant: "t", kind: "secret", record: "r2", version: 1 };

/// How often something that takes `each` fits into `budget`; at least 3 times, at most `most`. Slow
/// devices show that they are by themselves.
pub fn rounds(each: Duration, budget: Duration, most: usize) -> usize {
    let fits = budget.as_nanos() / each.as_nanos().max(1);
    usize::try_from(fits).unwrap_or(usize::MAX).clamp(3, most)
}

/// Starts a program that ends when this process does, however it does.
pub fn companion(mut command: Command) {
    let (sender, started) = std::sync::mpsc::channel();
    // The signal comes when the thread that started the program ends: so that one waits for ever.
    std::thread::spawn(move || {
        // SAFETY: between fork and exec only a system call is made.
        unsafe {
            command.pre_exec(|| {
                rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
                Ok(())
            });
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let _ = sender.send(child.as_ref().map(std::process::Child::id).map_err(ToString::to_string));
        loop {
            std::thread::park();
        }
    });
    started.recv().unwrap().unwrap();
}

/// Runs a program that must succeed; its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Writes a file that only its owner can read.
pub fn write_private(path: &Path, text: &str) {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

/// A PIN of 8 digits: some tokens take no more.
pub fn random_pin() -> String {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).unwrap();
    bytes.iter().map(|byte| char::from(b'0' + byte % 10)).collect()
}

/// The first of these files that is there.
pub fn first_of(candidates: &[&str], package: &str) -> PathBuf {
    let found = candidates.iter().map(PathBuf::from).find(|path| path.exists());
    found.unwrap_or_else(|| panic!("{package} is installed (`make deps`): none of {candidates:?}"))
}

/// A directory of this process, and none of processes that are gone: statics are never dropped.
fn process_dir() -> PathBuf {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR"));
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("backend-"));
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    root.join(format!("backend-{}", std::process::id()))
}
