//! openCryptoki's soft token, the poor one: neither EC nor GCM nor key wrap.
//!
//! Its daemon `pkcsslotd`, its token and its lock files belong to the machine, so only one process at a
//! time tests with it: others wait at a lock file. The daemon is started if none runs, ends with the
//! process, and holds the lock until it has ended. Needs root, as the daemon does.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stage::{Backend, companion, first_of, random_pin, write_private};

/// openCryptoki from the distribution.
pub const BACKEND: Backend =
    Backend { title: "openCryptoki 3.8.1", install, deviations: DEVIATIONS, own_process: true };

const DEVIATIONS: &[(&str, &str)] = &[(
    "CKA_COPYABLE cannot be read",
    "it is of the time before this attribute; a copy would be as sensitive and as little extractable",
)];

const LOCK: &str = "/tmp/lacre-test-opencryptoki.lock";
const TOKEN_DATA: &str = "/var/lib/opencryptoki/swtok/NVTOK.DAT";
/// The soft token in the distribution's configuration.
const SLOT: &str = "3";
/// Every token begins with this one.
const FIRST_SO_PIN: &str = "87654321";

/// Held until this process ends, and by the daemon until that does.
static LOCKED: OnceLock<File> = OnceLock::new();

fn install(dir: &Path) -> Value {
    assert!(rustix::process::geteuid().is_root(), "openCryptoki's daemon wants root: run the tests as root");
    let lock = LOCKED.get_or_init(|| {
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(LOCK).unwrap();
        let began = Instant::now();
        while rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            assert!(
                began.elapsed() < Duration::from_secs(600),
                "another process keeps {LOCK} for ten minutes"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        lock
    });
    // A process that was killed while it wrote the token's data leaves an empty file, and then there is no
    // slot at all until it is gone.
    if fs::metadata(TOKEN_DATA).is_ok_and(|data| data.len() == 0) {
        fs::remove_file(TOKEN_DATA).unwrap();
    }
    start_daemon(lock);

    let label = format!("lacre-{}", std::process::id());
    let (pin, first_pin) = (random_pin(), random_pin());
    let pin_file = dir.join("pin");
    write_private(&pin_file, &pin);
    // The tests leave the SO PIN as it is. A token with another one is somebody's: it is not touched.
    let made = pkcsconf(&["-I", "-c", SLOT], &format!("{FIRST_SO_PIN}\n{label}\n"));
    assert!(made, "openCryptoki's soft token (slot {SLOT}) has an SO PIN of somebody's own");
    assert!(pkcsconf(&["-u", "-c", SLOT, "-S", FIRST_SO_PIN, "-n", &first_pin], ""), "pkcsconf -u");
    // The PIN that the security officer gave has to be changed once.
    assert!(pkcsconf(&["-p", "-c", SLOT, "-U", &first_pin, "-n", &pin], ""), "pkcsconf -p");
    let module = first_of(
        &[
            "/usr/lib/x86_64-linux-gnu/libopencryptoki.so.0",
            "/usr/lib/aarch64-linux-gnu/libopencryptoki.so.0",
            "/usr/lib64/opencryptoki/libopencryptoki.so.0",
        ],
        "opencryptoki",
    );
    json!({ "pkcs11": {
        "module": module,
        "token": label,
        "pin_source": format!("file:{}", pin_file.display()),
        "without_evidence": ["CKA_COPYABLE"],
    }})
}

fn start_daemon(lock: &File) {
    // Asked through its own program: it dies of a connection that is closed unread (SIGPIPE).
    let answers = || pkcsconf(&["-i"], "");
    if answers() {
        return;
    }
    let mut daemon = Command::new("pkcsslotd");
    daemon.arg("-f");
    // Inherited, so that the lock outlives this process until the daemon has cleaned up.
    rustix::io::fcntl_setfd(lock, rustix::io::FdFlags::empty()).unwrap();
    companion(daemon);
    let began = Instant::now();
    while !answers() {
        assert!(began.elapsed() < Duration::from_secs(10), "pkcsslotd does not answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    rustix::io::fcntl_setfd(lock, rustix::io::FdFlags::CLOEXEC).unwrap();
}

/// Whether `pkcsconf` did it; what it asks for comes from `typed`.
fn pkcsconf(args: &[&str], typed: &str) -> bool {
    let mut command = Command::new("pkcsconf");
    command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("opencryptoki is installed (`make deps`)");
    child.stdin.take().unwrap().write_all(typed.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    output.status.success()
}
