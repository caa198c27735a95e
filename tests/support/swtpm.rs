//! A software TPM of one's own.
//!
//! Include it with `#[path = "support/swtpm.rs"] mod swtpm;`. Nothing outside its directory is touched.

#![expect(unsafe_code, reason = "children must not inherit what the TPM's library has open")]
#![allow(dead_code, reason = "every test program uses another part of it")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// A running swtpm, its state, and a file with a secret for keys made in it.
pub struct Swtpm {
    /// The server's port; the control channel is the next one.
    pub port: u16,
    /// A file of mode 0600 with the secret for `auth_source`.
    pub auth_file: PathBuf,
    process: Option<Child>,
    /// Whether it ends with the thread that started it.
    is_companion: bool,
    dir: tempfile::TempDir,
}

impl Swtpm {
    /// A new TPM.
    pub fn new() -> Self {
        Self::make(false)
    }

    /// A new TPM for as long as this process lives, however it ends: its TCTI and the file with the secret.
    pub fn companion() -> (String, PathBuf) {
        let (sender, made) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let tpm = Self::make(true);
            sender.send((tpm.tcti(), tpm.auth_file.clone())).unwrap();
            // The signal comes when this thread ends.
            loop {
                std::thread::park();
            }
        });
        made.recv().unwrap()
    }

    fn make(is_companion: bool) -> Self {
        let dir = tempfile::Builder::new().prefix("lacre-swtpm-").tempdir().unwrap();
        let auth_file = dir.path().join("auth");
        let mut secret = [0; 32];
        getrandom::fill(&mut secret).unwrap();
        write_private(&auth_file, &hex::encode(secret));
        let mut this = Self { port: 0, auth_file, process: None, is_companion, dir };
        this.start();
        this
    }

    /// Its directory, for whatever a test wants to put beside the state.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// What the configuration's `tcti` is.
    pub fn tcti(&self) -> String {
        format!("swtpm:host=127.0.0.1,port={}", self.port)
    }

    /// Switches it on, on the port that it had before if there was one.
    pub fn start(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if self.port == 0 {
                self.port = two_free_ports();
            }
            self.process = Some(self.spawn());
            while Instant::now() < deadline {
                if std::net::TcpStream::connect(("127.0.0.1", self.port + 1)).is_ok() {
                    return;
                }
                if self.process.as_mut().unwrap().try_wait().unwrap().is_some() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(Instant::now() < deadline, "swtpm does not start");
            // Another process was quicker; a TPM that was there before must have its port again.
            std::thread::sleep(Duration::from_millis(100));
            if !self.dir.path().join("tpm2-00.permall").exists() {
                self.port = 0;
            }
        }
    }

    fn spawn(&self) -> Child {
        let state = format!("dir={}", self.dir.path().display());
        let mut command = program("swtpm");
        if self.is_companion {
            use std::os::unix::process::CommandExt;
            // SAFETY: one system call between fork and exec, on no memory of ours.
            unsafe {
                command.pre_exec(|| {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM);
                    Ok(())
                })
            };
        }
        command
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear", "--tpmstate", &state])
            .args(["--server", &format!("type=tcp,port={},bindaddr=127.0.0.1", self.port)])
            .args(["--ctrl", &format!("type=tcp,port={},bindaddr=127.0.0.1", self.port + 1)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("swtpm is installed (apt-get install swtpm)")
    }

    /// The power goes.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// SIGSTOP and SIGCONT.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = self.process.as_ref().unwrap().id();
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Runs a program of tpm2-tools on it; its standard output.
    pub fn tool(&self, args: &[&str]) -> String {
        let output = self.try_tool(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The same, which may fail.
    pub fn try_tool(&self, args: &[&str]) -> Output {
        program(args[0])
            .args(&args[1..])
            .env("TPM2TOOLS_TCTI", self.tcti())
            .current_dir(self.dir.path())
            .output()
            .expect("tpm2-tools are installed (apt-get install tpm2-tools)")
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A program that does not inherit the connections of other tests: tpm2-tss opens them without CLOEXEC, and a
/// TPM waits for the end of one before it takes the next.
pub fn program(name: &str) -> Command {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(name);
    // SAFETY: one system call between fork and exec, on no memory of ours.
    unsafe {
        command.pre_exec(|| {
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(())
        })
    };
    command
}

/// Two ports in a row that nobody listens on.
fn two_free_ports() -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = first.local_addr().unwrap().port();
        if port < u16::MAX && TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            return port;
        }
    }
}

fn write_private(path: &Path, text: &str) {
    use std::io::Write;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}
