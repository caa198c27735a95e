//! What this test binary does when a test starts it again to be another process.
//!
//! A test names a role in the environment and runs the ignored test `role` of its own executable. A
//! role says what it found in lines that begin with a mark, because the test harness writes to the
//! same stream.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use lacre::seal::Arena;
use lacre::seal::guarded::Options;
use rustix::process::DumpableBehavior;

use crate::probe;

const VARIABLE: &str = "LACRE_MEMORY_ROLE";
const MARK: &str = "@@ ";

/// Plays the role that the environment names; returns if there is none.
pub fn play() {
    let Ok(role) = std::env::var(VARIABLE) else { return };
    let words: Vec<&str> = role.split(' ').collect();
    match *words.as_slice() {
        ["start-with-limit", bytes, allow_unlocked] => {
            start_with_limit(bytes.parse().unwrap(), allow_unlocked == "true");
        }
        ["start-without-secretmem"] => start_without_secretmem(),
        ["fork", secretmem] => fork(secretmem == "true"),
        ["crash", how, hardened] => crash(how, hardened == "true"),
        ["victim"] => victim(),
        ["reader", uid, pid, address] => {
            reader(uid.parse().unwrap(), pid.parse().unwrap(), address.parse().unwrap());
        }
        _ => panic!("unknown role {role}"),
    }
}

/// Starts this executable in a role.
pub fn command(role: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "role", "--ignored", "--nocapture", "--test-threads=1"]).env(VARIABLE, role);
    command
}

/// Runs a role to its end.
pub fn run(role: &str) -> Output {
    command(role).output().unwrap()
}

/// What a role said, one line each.
pub fn said(output: &Output) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().filter_map(|line| Some(line.split_once(MARK)?.1.to_owned())).collect()
}

fn say(words: &str) {
    println!("{MARK}{words}");
}

/// A role process that waits to be told to go on.
pub struct Running {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Running {
    pub fn start(role: &str) -> Self {
        let mut child = command(role).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Self { child, input, output }
    }

    pub fn hear(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.output.read_line(&mut line).unwrap(), 0, "the role ended");
            if let Some((_, words)) = line.split_once(MARK) {
                return words.trim_end().to_owned();
            }
        }
    }

    pub fn go_on(&mut self) {
        self.input.write_all(b"\n").unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn wait_for_parent() {
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

fn log_to_stderr() {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
}

fn report_start(options: &Options) {
    match Arena::new(options) {
        Ok(arena) => say(&serde_json::to_string(&arena.status()).unwrap()),
        Err(error) => say(&error.to_string()),
    }
}

fn start_with_limit(bytes: u64, allow_unlocked: bool) {
    log_to_stderr();
    probe::become_user(probe::NOBODY);
    probe::limit_locked_memory(bytes);
    report_start(&Options { allow_unlocked, ..Options::default() });
}

fn start_without_secretmem() {
    log_to_stderr();
    probe::forbid_secretmem();
    report_start(&Options { require_secretmem: true, ..Options::default() });
    let arena = Arena::new(&Options::default()).unwrap();
    say(&serde_json::to_string(&arena.status()).unwrap());
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    say(status.lines().find(|line| line.starts_with("VmLck:")).unwrap());
    let buf = arena.try_take(32).unwrap();
    say(&buf.with(|bytes| probe::page_flags(bytes.as_ptr() as usize)));
}

fn fork(secretmem: bool) {
    if !secretmem {
        probe::forbid_secretmem();
    }
    let arena = Arena::new(&Options::default()).unwrap();
    let mut buf = arena.try_take(32).unwrap();
    buf.with_mut(|bytes| bytes.fill(0xA5));
    say(&format!("{:?} {:?}", arena.status().mode, buf.with(probe::read_in_child)));
}

fn crash(how: &str, hardened: bool) {
    say(if probe::allow_cores() { "cores allowed" } else { "cores forbidden" });
    if hardened {
        assert!(lacre::process::harden().is_complete());
    }
    let arena = Arena::new(&Options::default()).unwrap();
    let buf = arena.try_take(4096).unwrap();
    match how {
        "abort" => std::process::abort(),
        _ => say(&format!("survived: {}", buf.with(probe::read_past_the_page))),
    }
}

/// Has a secret on its ordinary heap, once open to its own user and once hardened.
fn victim() {
    probe::become_user(probe::NOBODY);
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
    let secret = vec![0xA5_u8; 32];
    say(&(secret.as_ptr() as usize).to_string());
    wait_for_parent();
    say(&serde_json::to_string(&lacre::process::harden()).unwrap());
    wait_for_parent();
    // The parent ends this process; the secret has to live until then.
    std::thread::sleep(Duration::from_secs(60));
    drop(secret);
}

#[expect(clippy::naive_bytecount, reason = "32 bytes")]
fn reader(uid: u32, pid: u32, address: usize) {
    probe::become_user(uid);
    let outcome = |read: std::io::Result<Vec<u8>>| match read {
        Ok(bytes) => format!("{} bytes", bytes.iter().filter(|byte| **byte == 0xA5).count()),
        Err(error) => format!("{:?}", error.kind()),
    };
    say(&outcome(probe::read_proc_mem(pid, address, 32)));
    say(&outcome(probe::read_vm(pid, address, 32)));
}
