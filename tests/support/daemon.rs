//! A real `lacre` process for tests: started, asked over HTTP, killed, started again.
//!
//! Black box: only the program, its files and its API. Everything secret that a test sends carries
//! the daemon's canary text; [`TestDaemon::finish`] looks for it in logs, database files and the rest of
//! the data directory (reliability.md, AU-9), and verifies the audit chain with code of its own.

#![allow(dead_code, reason = "each test program uses a part of it")]

#[path = "port.rs"]
mod port;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use aho_corasick::AhoCorasick;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use reqwest::{Client, Method, RequestBuilder, Response, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

pub use port::free_port;

/// How long a start may take on a busy machine.
const START: Duration = Duration::from_secs(60);

/// A daemon and its data directory.
pub struct TestDaemon {
    dir: tempfile::TempDir,
    options: Options,
    child: Option<Child>,
    port: u16,
    /// `http://127.0.0.1:PORT`, known once it is ready.
    pub url: String,
    /// 24 random bytes in hex: part of every secret that the test sends.
    pub canary: String,
    client: Client,
    /// Access tokens that were issued to the test.
    tokens: Mutex<Vec<String>>,
}

/// How the daemon is started.
#[derive(Clone, Default)]
pub struct Options {
    /// Further environment, for example the shim's.
    pub env: Vec<(String, String)>,
    /// A program and arguments in front of the daemon, for example `strace ...`.
    pub wrapper: Vec<String>,
    /// A configuration for `lacre serve`; without one it is `lacre dev`. `{dir}` stands for the data
    /// directory, `{module}`, `{pin}` for the SoftHSM token's files, `{port}` for a port that was free.
    /// With a `postgres:` URL in it, that database is migrated and initialised too.
    pub config: Option<String>,
}

impl TestDaemon {
    /// `lacre dev` on a fresh directory, ready.
    pub async fn dev() -> Self {
        Self::start(Options::default()).await
    }

    /// A daemon on a fresh directory, ready. With a configuration, `lacre dev` runs once before, so that
    /// token, keys and applications exist; the configuration should use `{dir}` and the same database.
    pub async fn start(options: Options) -> Self {
        let mut daemon = Self::prepare(Options { config: None, ..options.clone() });
        daemon.run().await;
        if options.config.is_some() {
            daemon.stop().await;
            daemon.options = options;
            if daemon.options.config.as_ref().is_some_and(|text| text.contains("postgres:")) {
                daemon.initialise();
            }
            daemon.run().await;
        }
        daemon
    }

    /// Makes the directory and starts nothing.
    pub fn prepare(options: Options) -> Self {
        // The client is rustls without a built-in provider; the process needs one.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let dir = tempfile::Builder::new().prefix("lacre-test-").tempdir().unwrap();
        let mut random = [0; 24];
        getrandom::fill(&mut random).unwrap();
        Self {
            dir,
            options,
            child: None,
            port: free_port(),
            url: String::new(),
            canary: hex::encode(random),
            client: Client::builder().timeout(Duration::from_secs(30)).build().unwrap(),
            tokens: Mutex::default(),
        }
    }

    /// Makes schema, keys and an application in the configured database, and puts the application's
    /// credentials where `lacre dev` had put those of its own database.
    pub fn initialise(&self) {
        let secret = self.dir().join("init.secret");
        let run = |args: &[&str]| {
            let mut command = self.command_of(args);
            let output = command.output().unwrap();
            assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
            output.stdout
        };
        run(&["db", "migrate"]);
        let made = run(&["init", "-o", "json", "--secret-out", secret.to_str().unwrap()]);
        let made: Value = serde_json::from_slice(&made).unwrap();
        let mut dev = self.dev_json();
        dev["management"]["client_id"] = made["client_id"].clone();
        dev["management"]["client_secret"] = json!(fs::read_to_string(&secret).unwrap());
        fs::remove_file(secret).unwrap();
        fs::write(self.dir().join("dev.json"), dev.to_string()).unwrap();
    }

    /// Another command of the program with the configuration.
    pub fn command_of(&self, args: &[&str]) -> Command {
        let dir = self.dir().canonicalize().unwrap();
        let path = dir.join("test.toml");
        fs::write(&path, self.fill(self.options.config.as_ref().expect("a configuration"))).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
        command.args(args).arg("--config").arg(path).env("SOFTHSM2_CONF", dir.join("softhsm2.conf"));
        command.envs(self.options.env.iter().cloned());
        command
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The SQLite file.
    pub fn database(&self) -> PathBuf {
        self.dir().join("lacre.db")
    }

    /// Everything the daemon has printed on stderr, over all its starts.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir().join("test-stderr.log")).unwrap_or_default()
    }

    /// Changes how the next start happens.
    pub fn set_options(&mut self, options: Options) {
        self.options = options;
    }

    /// The command that [`TestDaemon::run`] spawns, for tests that watch it fail.
    pub fn command(&self) -> Command {
        let program = env!("CARGO_BIN_EXE_lacre");
        let mut words = self.options.wrapper.clone();
        words.push(program.to_owned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        let dir = self.dir().canonicalize().unwrap();
        match &self.options.config {
            None => {
                command
                    .args(["dev", "--listen", "127.0.0.1:0", "--allow-unlocked-memory", "--data-dir"])
                    .arg(&dir);
            }
            Some(text) => {
                let path = dir.join("test.toml");
                fs::write(&path, self.fill(text)).unwrap();
                command.arg("--config").arg(path).args(["serve", "--allow-unlocked-memory"]);
                command.env("SOFTHSM2_CONF", dir.join("softhsm2.conf"));
            }
        }
        command.envs(self.options.env.iter().cloned());
        command
    }

    /// `lacre serve` with another configuration, beside the daemon or instead of it.
    pub fn command_with(&self, text: &str) -> Command {
        let dir = self.dir().canonicalize().unwrap();
        let path = dir.join("other.toml");
        fs::write(&path, self.fill(text)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
        command.args(["serve", "--allow-unlocked-memory", "--config"]).arg(path);
        command.env("SOFTHSM2_CONF", dir.join("softhsm2.conf")).stdin(Stdio::null());
        command
    }

    fn fill(&self, text: &str) -> String {
        let dir = self.dir().canonicalize().unwrap();
        let made = fs::read_to_string(dir.join("dev.json")).unwrap_or_else(|_| "{}".to_owned());
        let made: Value = serde_json::from_str(&made).unwrap();
        let text = text.replace("{dir}", dir.to_str().unwrap());
        let text = text.replace("{port}", &self.port.to_string());
        let text = text.replace("{module}", made["hsm"]["module"].as_str().unwrap_or_default());
        text.replace("{pin}", made["hsm"]["pin_file"].as_str().unwrap_or_default())
    }

    /// Starts the process and waits until it is ready.
    pub async fn run(&mut self) {
        assert!(self.try_run().await, "the daemon did not become ready:\n{}", self.log());
    }

    /// Starts the process; says whether it became ready.
    pub async fn try_run(&mut self) -> bool {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.dir().join("test-stderr.log"))
            .unwrap();
        let mut command = self.command();
        // A group of its own, so that a wrapper and what it started end together.
        command.stdout(Stdio::piped()).stderr(log).stdin(Stdio::null()).process_group(0);
        let mut child = command.spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        self.child = Some(child);
        let (tell, told) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let mut tell = Some(tell);
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let (Some(rest), Some(tell)) = (line.strip_prefix("lacre ready url="), tell.take()) {
                    let _ = tell.send(rest.split(' ').next().unwrap_or_default().to_owned());
                }
            }
        });
        match tokio::time::timeout(START, told).await {
            Ok(Ok(url)) => {
                self.url = url;
                true
            }
            _ => false,
        }
    }

    /// The process id of the daemon itself (below a wrapper, the wrapper's).
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    /// kill -9 and wait.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let group = child.id();
            signal(group, "KILL");
            child.wait().unwrap();
            // Behind a wrapper the daemon is a process of its own, which may still hold its port.
            let until = Instant::now() + START;
            while is_running(group) {
                assert!(Instant::now() < until, "killed and still running");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// SIGTERM and wait; the exit code.
    pub async fn stop(&mut self) -> Option<i32> {
        let mut child = self.child.take()?;
        signal(child.id(), "TERM");
        let until = Instant::now() + START;
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "the daemon does not end:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the process has ended by itself; its exit code.
    pub async fn ended(&mut self, patience: Duration) -> Option<i32> {
        let until = Instant::now() + patience;
        while Instant::now() < until {
            if let Some(status) = self.child.as_mut().expect("started").try_wait().unwrap() {
                self.child = None;
                return status.code();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        None
    }

    /// Ends in order and starts again.
    pub async fn restart(&mut self) {
        self.stop().await;
        self.run().await;
    }

    /// `dev.json`.
    pub fn dev_json(&self) -> Value {
        serde_json::from_slice(&fs::read(self.dir().join("dev.json")).unwrap()).unwrap()
    }

    /// An access token of the management application with the given scopes (`all` for all).
    pub async fn token(&self, scope: &str) -> String {
        let dev = self.dev_json();
        let app = &dev["management"];
        self.token_of(app["client_id"].as_str().unwrap(), app["client_secret"].as_str().unwrap(), scope).await
    }

    /// An access token of any application.
    pub async fn token_of(&self, client_id: &str, secret: &str, scope: &str) -> String {
        self.token_at(&self.url, client_id, secret, scope).await
    }

    /// An access token from another daemon's endpoint.
    pub async fn token_at(&self, url: &str, client_id: &str, secret: &str, scope: &str) -> String {
        let form = [("grant_type", "client_credentials"), ("scope", scope)];
        let request = self.client.post(format!("{url}/oidc/token")).basic_auth(client_id, Some(secret));
        let answer = request.form(&form).send().await.unwrap();
        let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
        assert_eq!(status, StatusCode::OK, "{body}");
        let token = body["access_token"].as_str().unwrap().to_owned();
        self.tokens.lock().unwrap().push(token.clone());
        token
    }

    /// A secret that was issued to the test: from now on it must not be anywhere either.
    pub fn hide(&self, secret: &str) {
        self.tokens.lock().unwrap().push(secret.to_owned());
    }

    /// A request without credentials.
    pub fn anonymous(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url))
    }

    /// A session with all rights.
    pub async fn api(&self) -> Api {
        Api { token: self.token("all").await, url: self.url.clone(), client: self.client.clone() }
    }

    /// A session with a token from elsewhere.
    pub fn api_of(&self, token: &str) -> Api {
        Api { token: token.to_owned(), url: self.url.clone(), client: self.client.clone() }
    }

    /// A session with some rights.
    pub async fn api_with(&self, scope: &str) -> Api {
        Api { token: self.token(scope).await, url: self.url.clone(), client: self.client.clone() }
    }

    /// The readiness checks that fail, by name.
    pub async fn failing(&self) -> Vec<String> {
        let answer = self.anonymous(Method::GET, "/readyz").send().await.unwrap();
        let body: Value = answer.json().await.unwrap();
        let checks = body["checks"].as_array().unwrap().iter().filter(|check| check["ok"] == false);
        checks.map(|check| check["name"].as_str().unwrap().to_owned()).collect()
    }

    /// A value nobody else uses, with the canary in it.
    pub fn secret(&self, name: &str) -> String {
        format!("{}-{name}", self.canary)
    }

    /// Closing assertions: the audit chain is whole, the daemon ends in order, and no secret is
    /// anywhere in its directory.
    pub async fn finish(mut self) {
        if self.child.is_none() {
            self.run().await;
        }
        let lines = self.api().await.audit_lines().await;
        verify_chain(&lines);
        assert_eq!(self.stop().await, Some(0), "exit code of an orderly end:\n{}", self.log());
        self.scan(&lines);
    }

    /// What must not be anywhere: any twelve bytes of the canary, of client secrets and of access tokens, and
    /// the PIN, in any encoding.
    pub fn needles(&self) -> Vec<Vec<u8>> {
        let dev = self.dev_json();
        let mut secrets = vec![self.canary.clone()];
        let pin = fs::read_to_string(self.dir().join("pin")).unwrap_or_default();
        secrets.extend(
            ["management", "application"]
                .iter()
                .filter_map(|app| dev[app]["client_secret"].as_str().map(ToOwned::to_owned)),
        );
        secrets.push(pin.trim().to_owned());
        let parts = secrets.iter().filter(|text| text.len() >= 6).flat_map(|text| windows(text));
        let mut needles: Vec<_> = parts.flat_map(encodings).collect();
        // Their signatures, as they are: nothing takes a token apart and encodes it in another way.
        let tokens = self.tokens.lock().unwrap();
        let signatures = tokens.iter().map(|token| token.rsplit('.').next().unwrap());
        needles.extend(signatures.flat_map(windows).map(|part| part.as_bytes().to_vec()));
        needles
    }

    /// Finds any of the [`TestDaemon::needles`].
    pub fn finder(&self) -> AhoCorasick {
        AhoCorasick::new(self.needles()).unwrap()
    }

    /// Fails if one of the [`TestDaemon::needles`] is in any file of the data directory.
    pub fn scan(&self, lines: &[String]) {
        let finder = self.finder();
        for path in files(self.dir()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            // Where secrets are meant to be.
            if ["dev.json", "pin", "so-pin"].contains(&name.as_str()) {
                continue;
            }
            let bytes = fs::read(&path).unwrap_or_default();
            let found = finder.find(&bytes).map(|found| String::from_utf8_lossy(&bytes[found.range()]));
            assert_eq!(found, None, "a secret is in {name}");
        }
        for line in lines {
            assert!(!finder.is_match(line), "a secret is in the audit log");
        }
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<_> = log.lines().rev().take(40).collect();
            eprintln!("--- the daemon's last lines, newest first\n{}", tail.join("\n"));
        }
    }
}

/// Another daemon beside a [`TestDaemon`], with its token and directory; ready. Killed when dropped.
pub struct Peer {
    child: Child,
    /// Where it listens.
    pub url: String,
}

impl Peer {
    /// With the configuration `text`, on a port of its own.
    pub fn start(daemon: &TestDaemon, text: &str) -> Self {
        let listen = format!("127.0.0.1:{}", free_port());
        let mut command = daemon.command_with(&text.replacen("127.0.0.1:{port}", &listen, 1));
        command.envs(daemon.options.env.iter().cloned()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.starts_with("lacre ready ")), "the second daemon is not ready");
        Self { child, url: format!("http://{listen}") }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// A client with an access token.
pub struct Api {
    /// The bearer token.
    pub token: String,
    url: String,
    client: Client,
}

impl Api {
    /// The same rights at another daemon.
    pub fn at(&self, url: &str) -> Self {
        Self { url: url.to_owned(), token: self.token.clone(), client: self.client.clone() }
    }

    /// A request with the token.
    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.url)).bearer_auth(&self.token)
    }

    /// GET.
    pub async fn get(&self, path: &str) -> Response {
        self.request(Method::GET, path).send().await.unwrap()
    }

    /// POST with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Response {
        self.request(Method::POST, path).json(body).send().await.unwrap()
    }

    /// DELETE.
    pub async fn delete(&self, path: &str) -> Response {
        self.request(Method::DELETE, path).send().await.unwrap()
    }

    /// Creates a secret; its metadata.
    pub async fn create(&self, name: &str, value: &str) -> Value {
        let answer = self.post("/v1/secrets", &json!({ "name": name, "value": value })).await;
        let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
        assert_eq!(status, StatusCode::CREATED, "{body}");
        body
    }

    /// Reads a value; panics unless it is released.
    pub async fn value(&self, id: &str) -> String {
        let answer = self.get(&format!("/v1/secrets/{id}/value")).await;
        let (status, body) = (answer.status(), answer.json::<Value>().await.unwrap());
        assert_eq!(status, StatusCode::OK, "{body}");
        body["value"].as_str().unwrap().to_owned()
    }

    /// Stores a new version under If-Match `*`.
    pub async fn replace(&self, id: &str, value: &str) -> Response {
        let request = self.request(Method::PUT, &format!("/v1/secrets/{id}/value"));
        request.header("If-Match", "*").json(&json!({ "value": value })).send().await.unwrap()
    }

    /// Waits until a job has ended; the job.
    pub async fn job(&self, id: &str) -> Value {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            let job: Value = self.get(&format!("/v1/jobs/{id}")).await.json().await.unwrap();
            if ["succeeded", "failed", "cancelled"].contains(&job["state"].as_str().unwrap()) {
                return job;
            }
            assert!(Instant::now() < until, "job does not end: {job}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Every audit record, as its exact line.
    pub async fn audit_lines(&self) -> Vec<String> {
        let mut lines = Vec::<String>::new();
        loop {
            // The numbers of one tenant among several have gaps.
            let last = lines.last().map(|line| serde_json::from_str::<Value>(line).unwrap()["seq"].clone());
            let path = format!("/v1/audit/events?after={}&limit=1000", last.unwrap_or(json!(0)));
            let request = self.request(Method::GET, &path).header("Accept", "application/x-ndjson");
            let answer = request.send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            let text = answer.text().await.unwrap();
            let before = lines.len();
            lines.extend(text.lines().map(ToOwned::to_owned));
            if lines.len() == before {
                return lines;
            }
        }
    }
}

/// The chain of docs/formats/audit-v1.md, checked without the program's own code.
pub fn verify_chain(lines: &[String]) {
    let mut prev = "0".repeat(64);
    for (index, line) in lines.iter().enumerate() {
        let record: Value = serde_json::from_str(line).unwrap();
        assert_eq!(record["seq"], json!(index + 1), "record number");
        assert_eq!(record["prev"], json!(prev), "record {} does not follow the one before", index + 1);
        prev = hex::encode(Sha256::digest(line.as_bytes()));
    }
}

/// Sends a signal to the process group that `pid` leads.
pub fn signal(pid: u32, name: &str) {
    let _ = Command::new("kill").arg(format!("-{name}")).arg("--").arg(format!("-{pid}")).status();
}

/// Whether any process of the group has its files open still.
fn is_running(group: u32) -> bool {
    let group = group.to_string();
    let is_of_group = |process: &Path| {
        let Ok(stat) = fs::read_to_string(process.join("stat")) else { return false };
        // pid (name) state parent group ...: proc_pid_stat(5).
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let ended = matches!(fields.next(), Some("Z" | "X") | None);
        // Its first thread may have ended before the others have.
        let threads = || fs::read_dir(process.join("task")).map_or(0, Iterator::count);
        fields.nth(1) == Some(&group) && (!ended || threads() > 1)
    };
    fs::read_dir("/proc").unwrap().flatten().any(|entry| is_of_group(&entry.path()))
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Every twelve bytes in a row, or the whole of a shorter text.
fn windows(text: &str) -> impl Iterator<Item = &str> {
    let len = text.len().min(12);
    (0..=text.len() - len).map(move |from| &text[from..from + len])
}

/// The text raw, in both base64 alphabets at every offset, in hex, reversed, and as UTF-16.
pub fn encodings(text: &str) -> Vec<Vec<u8>> {
    let bytes = text.as_bytes();
    let mut all =
        vec![bytes.to_vec(), hex::encode(bytes).into_bytes(), hex::encode_upper(bytes).into_bytes()];
    all.push(bytes.iter().rev().copied().collect());
    all.push(text.encode_utf16().flat_map(u16::to_le_bytes).collect());
    all.push(STANDARD.encode(bytes).into_bytes());
    for shift in 0..3 {
        // Whatever stands before the text, its middle is encoded in one of three ways.
        let inner = &bytes[shift..bytes.len() - (bytes.len() - shift) % 3];
        all.push(STANDARD_NO_PAD.encode(inner).into_bytes());
        all.push(URL_SAFE_NO_PAD.encode(inner).into_bytes());
    }
    all
}

/// Whether `needle` occurs in `bytes`.
pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    let Some((&first, _)) = needle.split_first() else { return false };
    let mut rest = bytes;
    while let Some(at) = rest.iter().position(|&byte| byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}
