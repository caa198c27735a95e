//! The identity provider of `tests/idp`, and the foreign libraries that verify tokens.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

/// A running provider; ends with the value.
pub struct IdentityProvider {
    child: Child,
    issuer: String,
    client_id: String,
    client_secret: String,
}

impl IdentityProvider {
    /// Starts it on a free port of loopback and waits until it listens.
    pub fn start() -> Self {
        let mut command = node("provider.mjs");
        // It ends when its input does, however this process ends.
        command.env("IDP_DIE_WITH_STDIN", "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let fact = |name: &str| {
            let mut words = line.split_whitespace().filter_map(|word| word.split_once('='));
            let found = words.find(|(key, _)| *key == name);
            found.unwrap_or_else(|| panic!("the provider did not start: {line:?}")).1.to_owned()
        };
        let (issuer, client_id, client_secret) = (fact("issuer"), fact("client_id"), fact("client_secret"));
        Self { child, issuer, client_id, client_secret }
    }

    /// A token set by the authorization code flow, as the provider sent it.
    pub fn obtain(&self) -> String {
        text(self.client(&[]).output().unwrap())
    }

    /// A new token set for a refresh token.
    pub fn refresh(&self, token: &str) -> String {
        text(self.try_refresh(token))
    }

    /// The same, whatever comes of it.
    pub fn try_refresh(&self, token: &str) -> Output {
        self.client(&[("IDP_REFRESH", token)]).output().unwrap()
    }

    // Credentials by the environment: arguments are visible to everybody on the machine.
    fn client(&self, more: &[(&str, &str)]) -> Command {
        let mut command = node("obtain.mjs");
        command.env("IDP_ISSUER", &self.issuer).env("IDP_CLIENT_ID", &self.client_id);
        command.env("IDP_CLIENT_SECRET", &self.client_secret).envs(more.iter().copied());
        command
    }
}

impl Drop for IdentityProvider {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// jose with its arguments; the token comes by standard input.
pub fn jose(arguments: &[&str]) -> Command {
    let mut command = node("jose.mjs");
    command.args(arguments);
    command
}

/// `PyJWT` with its arguments; the token comes by standard input.
pub fn py_jwt(arguments: &[&str]) -> Command {
    let mut command = python("jwt.py");
    command.args(arguments);
    command
}

/// A script of `tests/verify`.
pub fn python(script: &str) -> Command {
    let python = root().join(".deps/venv/bin/python");
    assert!(python.exists(), "PyJWT is not installed: run `make deps`");
    let mut command = Command::new(python);
    command.arg(root().join("tests/verify").join(script));
    command
}

/// Runs a command with an input.
pub fn run(command: &mut Command, input: &str) -> Output {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// The script ran and said no: not a crash, and not a tool that is missing.
pub fn is_refused(output: Output) -> bool {
    let said = String::from_utf8_lossy(&output.stderr);
    let own_words = ["obtain: ", "jose: ", "jwt: "].iter().any(|name| said.starts_with(name));
    output.status.code() == Some(1) && own_words
}

/// A script of `tests/idp`.
pub fn node(script: &str) -> Command {
    let folder = root().join("tests/idp");
    assert!(folder.join("node_modules").is_dir(), "the identity provider is not installed: run `make deps`");
    // `make deps` puts a Node there where the machine's own is too old.
    let own = root().join(".deps/bin/node");
    let program = if own.exists() { own } else { PathBuf::from("node") };
    let version = Command::new(&program).arg("--version").output();
    assert!(version.is_ok_and(|output| output.status.success()), "Node is not installed: run `make deps`");
    let mut command = Command::new(program);
    command.arg(folder.join(script));
    command
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(output: Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
