//! A Lacre of one's own: token, configuration, database, and the daemon on them.

#![allow(dead_code, reason = "each bench uses a part of it")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use diesel::connection::SimpleConnection;
use diesel::{Connection, SqliteConnection};

use crate::load::{self, End, Load};
use crate::softhsm::SoftHsm;

const LACRE: &str = env!("CARGO_BIN_EXE_lacre");
const RESOURCE: &str = "https%3A%2F%2Fdefault.lacre.local%2Fapi";

/// Files that stay when the daemon stops.
pub struct Installation {
    token: SoftHsm,
    address: SocketAddr,
    config: PathBuf,
    basic: String,
    env: Vec<(&'static str, PathBuf)>,
}

/// What stands between the daemon and the token, and how the daemon drives it.
#[derive(Default)]
pub struct Between {
    /// The module, if it is not the token's own.
    pub module: Option<PathBuf>,
    /// The module's environment.
    pub env: Vec<(&'static str, PathBuf)>,
    /// Lines of `[seal]`, and sections after it.
    pub seal: &'static str,
}

impl Installation {
    /// Makes everything up to the first application. `database`: a PostgreSQL URL, else SQLite.
    pub fn new(database: Option<&str>) -> Self {
        Self::over(database, Between::default())
    }

    /// The same with something between the daemon and its token.
    pub fn over(database: Option<&str>, between: Between) -> Self {
        let token = SoftHsm::new("lacre");
        let dir = &token.dir;
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let sqlite = format!("sqlite:{}", dir.join("lacre.db").display());
        let config = dir.join("lacre.toml");
        let text = format!(
            "data_dir = \"{dir}\"\n[database]\nurl = \"{url}\"\n[server]\nlisten = \"{address}\"\n\
             [server.rate_limit]\nper_second = 0\nburst = 1\n[keys]\npropagation = \"2s\"\nskew = \"0s\"\n[log]\nlevel = \"warn\"\n\
             [seal]\n{seal}\n[seal.pkcs11]\nmodule = \"{module}\"\ntoken = \"lacre\"\npin_source = \"file:{pin}\"\n",
            dir = dir.display(),
            url = database.unwrap_or(&sqlite),
            seal = between.seal,
            module = between.module.as_ref().unwrap_or(&token.module).display(),
            pin = token.pin_file.display(),
        );
        fs::write(&config, text).unwrap();
        let mut this = Self { token, address, config, basic: String::new(), env: between.env };
        this.lacre(&["db", "migrate"]);
        let secret_file = this.token.dir.join("client-secret");
        let made = this.lacre(&["init", "-o", "json", "--secret-out", secret_file.to_str().unwrap()]);
        let made: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
        let client = made["client_id"].as_str().unwrap();
        let secret = fs::read_to_string(&secret_file).unwrap();
        let pair = format!("{client}:{}", secret.trim());
        this.basic = format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair));
        this
    }

    fn command(&self) -> Command {
        let mut command = Command::new(LACRE);
        let (name, conf) = self.token.env();
        command.env(name, conf).env("LACRE_CONFIG", &self.config);
        command.envs(self.env.iter().map(|(name, path)| (*name, path)));
        command
    }

    fn lacre(&self, args: &[&str]) -> Output {
        let output = self.command().args(args).output().unwrap();
        assert!(output.status.success(), "lacre {}: {}", args[0], String::from_utf8_lossy(&output.stderr));
        output
    }

    /// Starts the daemon and waits until it is ready.
    pub fn start(&self) -> Daemon {
        let log = File::create(self.token.dir.join("daemon.log")).unwrap();
        let begun = Instant::now();
        let mut process = self
            .command()
            .args(["serve", "--allow-unlocked-memory"])
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let ready = lines.any(|line| line.unwrap().starts_with("lacre ready"));
        let started_in = begun.elapsed();
        let log = || fs::read_to_string(self.token.dir.join("daemon.log")).unwrap_or_default();
        assert!(ready, "the daemon did not start:\n{}", log());
        Daemon { address: self.address, started_in, basic: self.basic.clone(), process }
    }

    /// Puts `rows` more secrets straight into the SQLite file, each a copy of one sealed row under an
    /// id of its own. They do not open, which nobody tries: what counts is that they are there.
    pub fn fill(&self, rows: u64) -> u64 {
        if rows == 0 {
            return 0;
        }
        let id = "printf('%08x-0000-7000-8000-%012x', n, n)";
        let numbers = format!(
            "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows})"
        );
        let statements = format!(
            "PRAGMA foreign_keys = OFF; BEGIN;
             {numbers} INSERT INTO secrets (id, tenant_id, name, kind, labels, current_version, expires_at, created_at,
                 updated_at, row_version)
             SELECT {id}, tenant_id, printf('fill/%d', n), kind, labels, current_version, expires_at, created_at,
                 updated_at, row_version FROM (SELECT * FROM secrets LIMIT 1), numbers;
             {numbers} INSERT INTO secret_versions (secret_id, version, tenant_id, encoding, value_len, kek_version,
                 wrapped_dek, iv, ciphertext, tag, created_at)
             SELECT {id}, version, tenant_id, encoding, value_len, kek_version, wrapped_dek, iv, ciphertext, tag,
                 created_at FROM (SELECT * FROM secret_versions LIMIT 1), numbers;
             COMMIT; PRAGMA wal_checkpoint(TRUNCATE);"
        );
        self.sqlite().batch_execute(&statements).unwrap();
        rows
    }

    /// The SQLite file, for while the daemon does not run.
    pub fn sqlite(&self) -> SqliteConnection {
        SqliteConnection::establish(self.sqlite_file().to_str().unwrap()).unwrap()
    }

    /// Where it is.
    pub fn sqlite_file(&self) -> PathBuf {
        self.token.dir.join("lacre.db")
    }
}

/// A running daemon.
pub struct Daemon {
    /// Where it listens.
    pub address: SocketAddr,
    /// From the start of the process to its ready line.
    pub started_in: Duration,
    basic: String,
    process: Child,
}

impl Daemon {
    /// The request for a token of the first application.
    pub fn token_request(&self) -> Vec<u8> {
        let body = format!("grant_type=client_credentials&scope=all&resource={RESOURCE}");
        load::request("POST", "/oidc/token", &self.basic, Some(("application/x-www-form-urlencoded", &body)))
    }

    /// A fresh bearer token, as the value of `Authorization`.
    pub async fn bearer(&self) -> String {
        let reply = load::ask(self.address, &self.token_request()).await.unwrap();
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        let token: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        format!("Bearer {}", token["access_token"].as_str().unwrap())
    }

    /// The same for another application.
    pub async fn bearer_of(&self, client: &str, secret: &str) -> String {
        let body = format!("grant_type=client_credentials&client_id={client}&client_secret={secret}");
        let form = Some(("application/x-www-form-urlencoded", body.as_str()));
        let head = load::request("POST", "/oidc/token", "-", form);
        // Credentials in the body want no Authorization header.
        let head = String::from_utf8(head).unwrap().replace("Authorization: -\r\n", "");
        let reply = load::ask(self.address, head.as_bytes()).await.unwrap();
        assert_eq!(reply.status, 200, "{}", String::from_utf8_lossy(&reply.body));
        let token: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        format!("Bearer {}", token["access_token"].as_str().unwrap())
    }

    /// Keeps `connections` busy with requests for tokens.
    pub async fn issue_tokens(&self, connections: usize, time: Duration) -> Load {
        let request = self.token_request();
        load::run(self.address, connections, End::After(time), move |_| request.clone()).await
    }

    /// Keeps `connections` busy with reads of these secrets' values.
    pub async fn read_secrets(&self, ids: &[String], connections: usize, time: Duration) -> Load {
        let bearer = self.bearer().await;
        let request = |id: &String| load::request("GET", &format!("/v1/secrets/{id}/value"), &bearer, None);
        let requests: Vec<_> = ids.iter().map(request).collect();
        // A stride that shares no factor with the number of secrets: neighbours are not read together.
        let pick = move |n: u64| requests[usize::try_from(n * 7919 % requests.len() as u64).unwrap()].clone();
        load::run(self.address, connections, End::After(time), pick).await
    }

    /// Creates the secrets number `from` to `to` over 64 connections.
    pub async fn create_secrets(&self, from: u64, to: u64) -> Load {
        let bearer = self.bearer().await;
        let make = move |n: u64| {
            let body = serde_json::json!({
                "name": format!("bench/{:07}", from + n), "kind": "password",
                "value": format!("value {:07} of a length that passwords and tokens have", from + n),
            });
            load::request("POST", "/v1/secrets", &bearer, Some(("application/json", &body.to_string())))
        };
        let load = load::run(self.address, 64, End::Count(to.saturating_sub(from)), make).await;
        assert_eq!(load.refusals(), "0", "secrets were not created");
        load
    }

    /// Its resident memory, without that of its sealer process.
    pub fn memory_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        resident_kib(&status).unwrap()
    }

    /// The resident memory of its sealer process; 0 if it has none.
    pub fn sealer_memory_kib(&self) -> u64 {
        let parent = format!("PPid:\t{}", self.process.id());
        let processes = fs::read_dir("/proc").unwrap().flatten();
        // Others may end while they are looked at.
        let statuses = processes.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
        let children = statuses.filter(|status| status.lines().any(|line| line == parent));
        children.filter_map(|status| resident_kib(&status)).sum()
    }

    /// Ends it as systemd does.
    pub fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let status = self.process.wait().unwrap();
        assert!(status.success(), "the daemon ended with {status}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // After a failed assertion; after stop() there is nothing left to kill.
        let _ = self.process.kill();
    }
}

/// The resident memory in a `/proc/PID/status`.
fn resident_kib(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}
