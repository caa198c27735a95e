//! A PostgreSQL server for tests: a cluster of its own in a temporary directory, gone afterwards.
//!
//! Works as root (the server then runs as the user `postgres`) and as anybody else. The server is a
//! child of a shell that waits on a pipe from this process, so it ends however this process ends.
//! A machine without PostgreSQL fails the tests that need it; nothing is skipped.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test helper, also of unit tests"
)]
#![allow(dead_code, reason = "each test program uses a part of it")]

#[allow(clippy::duplicate_mod, reason = "some programs have the daemon's support too, and some do not")]
#[path = "port.rs"]
mod port;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::{Connection, PgConnection};

const SERVE: &str = r#"
serve() {
    "$1/postgres" -D "$2/data" -k "$2" -p "$3" -c listen_addresses=127.0.0.1 -c fsync=on -c max_connections=200 \
        >>"$2/log" 2>&1 &
    server=$!
}
serve "$@"
while read -r what; do
    case $what in
        # An immediate shutdown: no checkpoint, connections cut, recovery at the next start.
        crash) kill -QUIT "$server"; wait "$server" ;;
        start) serve "$@" ;;
        *) break ;;
    esac
done
kill -INT "$server"
wait "$server"
cd / && rm -rf "$2"
"#;

/// A running server.
pub struct Postgres {
    supervisor: Child,
    directory: tempfile::TempDir,
    port: u16,
    databases: AtomicU32,
}

impl Postgres {
    /// The one server of this test process.
    pub fn shared() -> &'static Self {
        static SERVER: OnceLock<Postgres> = OnceLock::new();
        SERVER.get_or_init(Self::start)
    }

    /// A server of one's own, to be stopped in the middle of a test.
    pub fn start() -> Self {
        let binaries = binaries();
        let user = User::of_server();
        let directory = tempfile::Builder::new().prefix("lacre-pg-").tempdir().expect("temporary directory");
        user.own(directory.path());
        let initdb = user
            .command(&binaries.join("initdb"))
            .args(["-U", "lacre", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync", "-D"])
            .arg(directory.path().join("data"))
            .current_dir(directory.path())
            .output()
            .expect("initdb runs");
        assert!(initdb.status.success(), "initdb: {}", String::from_utf8_lossy(&initdb.stderr));

        let port = port::free_port();
        let supervisor = user
            .command(Path::new("/bin/sh"))
            .args(["-c", SERVE, "sh"])
            .arg(&binaries)
            .arg(directory.path())
            .arg(port.to_string())
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .spawn()
            .expect("sh runs");
        let server = Self { supervisor, directory, port, databases: AtomicU32::new(0) };
        server.wait_until_ready();
        server
    }

    /// Where the cluster's files are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The URL of a new and empty database, over the Unix socket.
    pub fn database(&self) -> String {
        let name = format!("t{}", self.databases.fetch_add(1, Ordering::Relaxed));
        let mut admin = PgConnection::establish(&self.url("postgres")).expect("the server answers");
        admin.batch_execute(&format!("CREATE DATABASE {name}")).expect("CREATE DATABASE");
        self.url(&name)
    }

    /// The URL of that database over the Unix socket.
    pub fn url(&self, database: &str) -> String {
        format!("postgres://lacre@/{database}?host={}&port={}", self.directory.path().display(), self.port)
    }

    /// The URL of that database over loopback TCP.
    pub fn tcp_url(&self, database: &str) -> String {
        format!("postgres://lacre@127.0.0.1:{}/{database}", self.port)
    }

    /// Ends the server as a crash does; returns when nobody listens any more.
    pub fn crash(&mut self) {
        self.tell("crash");
        let started = Instant::now();
        while PgConnection::establish(&self.url("postgres")).is_ok() {
            assert!(started.elapsed() < Duration::from_secs(30), "PostgreSQL does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the server again after [`Postgres::crash`].
    pub fn restart(&mut self) {
        self.tell("start");
        self.wait_until_ready();
    }

    /// Stops all processes of the server (`STOP`), which then neither answer nor hang up, or lets them go
    /// on (`CONT`).
    pub fn signal(&self, name: &str) {
        let data = self.directory.path().join("data");
        let pid = std::fs::read_to_string(data.join("postmaster.pid")).expect("it runs");
        let postmaster = pid.lines().next().expect("a pid").to_owned();
        let children = Command::new("ps").args(["-o", "pid=", "--ppid", &postmaster]).output().expect("ps");
        let children = String::from_utf8(children.stdout).expect("numbers");
        let all = children.split_whitespace().map(str::to_owned).chain([postmaster]);
        let done = Command::new("kill").arg(format!("-{name}")).args(all).status().expect("kill");
        assert!(done.success());
    }

    fn tell(&mut self, what: &str) {
        let stdin = self.supervisor.stdin.as_mut().expect("piped");
        stdin.write_all(format!("{what}\n").as_bytes()).expect("the shell listens");
    }

    /// Ends every connection but its own, as a restart or a failover does.
    pub fn drop_connections(&self) {
        let mut admin = PgConnection::establish(&self.url("postgres")).expect("the server answers");
        admin
            .batch_execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'",
            )
            .expect("pg_terminate_backend");
    }

    fn wait_until_ready(&self) {
        let started = Instant::now();
        while PgConnection::establish(&self.url("postgres")).is_err() {
            let log = std::fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            assert!(started.elapsed() < Duration::from_secs(30), "PostgreSQL did not start: {log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A line, or the end of the pipe: either way the shell stops the server.
        if let Some(mut stdin) = self.supervisor.stdin.take() {
            let _ = stdin.write_all(b"\n");
        }
        let _ = self.supervisor.wait();
    }
}

/// The user that runs the server: PostgreSQL refuses to run as root.
enum User {
    Myself,
    Other { uid: u32, gid: u32 },
}

impl User {
    fn of_server() -> Self {
        match id(&["-u"]) {
            0 => Self::Other { uid: id(&["-u", "postgres"]), gid: id(&["-g", "postgres"]) },
            _ => Self::Myself,
        }
    }

    fn own(&self, path: &Path) {
        if let Self::Other { uid, gid } = self {
            std::os::unix::fs::chown(path, Some(*uid), Some(*gid)).expect("chown");
        }
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        if let Self::Other { uid, gid } = self {
            command.uid(*uid).gid(*gid);
        }
        command
    }
}

fn id(arguments: &[&str]) -> u32 {
    let output = Command::new("id").args(arguments).output().expect("id runs");
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().unwrap_or_else(|_| panic!("id {arguments:?} says {text:?}"))
}

/// Where `initdb` and `postgres` are: in PATH, or where Debian keeps the newest version.
fn binaries() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
    if let Ok(versions) = std::fs::read_dir("/usr/lib/postgresql") {
        let mut versions: Vec<_> = versions.flatten().map(|entry| entry.path().join("bin")).collect();
        versions.sort();
        places.extend(versions.into_iter().rev());
    }
    let found =
        places.into_iter().find(|place| place.join("initdb").exists() && place.join("postgres").exists());
    found.expect("PostgreSQL is needed for the tests: install it, or put initdb and postgres into PATH")
}
