//! The command line as its users see it: the built program, its help, its exit codes, its files.
//!
//! Where a daemon is needed a stub answers one request after the other from a list.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "support/daemon.rs"]
mod daemon;
#[path = "cli/import.rs"]
mod import;
#[path = "cli/keys.rs"]
mod keys;
#[path = "support/postgres.rs"]
mod postgres;
#[allow(dead_code, reason = "a part of it is used")]
#[path = "api/stage.rs"]
mod stage;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use sha2::{Digest, Sha256};

fn lacre() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lacre"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("LACRE_") {
            command.env_remove(name);
        }
    }
    command.stdin(Stdio::null());
    command
}

fn run(args: &[&str]) -> Output {
    lacre().args(args).output().expect("the program runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("the program ends by itself")
}

/// Every command without subcommands, as words after `lacre`.
fn leaves(command: &clap::Command, path: &[String], found: &mut Vec<Vec<String>>) {
    let subcommands: Vec<_> = command.get_subcommands().filter(|sub| sub.get_name() != "help").collect();
    if subcommands.is_empty() {
        found.push(path.to_vec());
    }
    for sub in subcommands {
        leaves(sub, &[path, &[sub.get_name().to_owned()]].concat(), found);
    }
}

fn all_leaves() -> Vec<Vec<String>> {
    let mut found = Vec::new();
    leaves(&lacre::cli::command(), &[], &mut found);
    found
}

/// A daemon that gives the listed answers in turn and reports each request's text.
fn stub(answers: Vec<String>) -> (String, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = format!("http://{}", listener.local_addr().expect("an address"));
    let (sender, requests) = channel();
    std::thread::spawn(move || {
        for answer in answers {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let request = read_request(&mut stream);
            let _ = stream.write_all(answer.as_bytes());
            let _ = sender.send(request);
        }
    });
    (addr, requests)
}

fn read_request(stream: &mut TcpStream) -> String {
    let mut reader = BufReader::new(stream);
    let (mut text, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header line");
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        text.push_str(&line);
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    text + &String::from_utf8_lossy(&body)
}

fn answer(status: &str, headers: &str, body: &str) -> String {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n{headers}\r\n{body}")
}

fn ok(body: &str) -> String {
    answer("200 OK", "content-type: application/json\r\n", body)
}

/// A chain of records as `docs/formats/audit-v1.md` describes it.
fn log(count: u64) -> Vec<String> {
    let mut prev = "0".repeat(64);
    let mut lines = Vec::new();
    for seq in 1..=count {
        let line = format!(r#"{{"v":1,"seq":{seq},"time":"2026-11-24T08:00:00.000000Z","prev":"{prev}"}}"#);
        prev = hex::encode(Sha256::digest(&line));
        lines.push(line);
    }
    lines
}

fn verify(dir: &Path, lines: &[String], more: &[&str]) -> Output {
    let file = dir.join("records.ndjson");
    fs::write(&file, lines.join("\n") + "\n").expect("a file");
    lacre().args(["audit", "verify", "--from-file"]).arg(file).args(more).output().expect("the program runs")
}

const SECRET: &str =
    r#"{"id":"01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10","name":"db","kind":"password","labels":{},"version":3}"#;

fn page_with_secret() -> String {
    ok(&format!(r#"{{"items":[{SECRET}],"next_cursor":null}}"#))
}

fn value_answer() -> String {
    ok(r#"{"id":"01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10","version":3,"encoding":"base64","value":"AP/+aGk="}"#)
}

#[test]
fn every_command_ends_its_help_with_two_examples_that_parse() {
    for leaf in all_leaves() {
        let mut args: Vec<&str> = leaf.iter().map(String::as_str).collect();
        args.push("--help");
        let output = run(&args);
        let help = stdout(&output);

        assert_eq!(code(&output), 0, "{leaf:?}");
        let examples = help.split("EXAMPLES\n").nth(1).unwrap_or_else(|| panic!("{leaf:?} has no EXAMPLES"));
        let calls: Vec<_> = examples.lines().take_while(|line| line.starts_with("  ")).collect();
        assert_eq!(calls.len(), 2, "{leaf:?}: {calls:?}");
        for call in calls {
            let start = call.find("lacre ").expect("an example calls lacre");
            let words = call[start..].split_whitespace().take_while(|word| *word != ">");
            let parsed = lacre::cli::command().try_get_matches_from(words);
            assert!(parsed.is_ok(), "{call}: {:?}", parsed.err());
            assert!(
                call[start..].starts_with(&format!("lacre {}", leaf.join(" "))),
                "{call} is not of {leaf:?}"
            );
        }
    }
}

#[test]
fn the_help_documents_the_exit_codes() {
    let help = stdout(&run(&["--help"]));

    for code in ["0", "1", "2", "3", "4", "5", "130"] {
        let codes = help.split("EXIT CODES").nth(1).expect("a section");
        assert!(codes.lines().any(|line| line.split_whitespace().next() == Some(code)), "{code} in {codes}");
    }
}

#[test]
fn wrong_usage_gives_exit_code_1() {
    assert_eq!(code(&run(&["--no-such-option"])), 1);
    assert_eq!(code(&run(&["secrets", "create"])), 1);
    assert_eq!(code(&run(&["no-such-command"])), 1);
    assert_eq!(code(&run(&[])), 1);
    assert_eq!(code(&run(&["status", "--addr", "http://192.0.2.1:1"])), 1, "plain HTTP to another host");
}

#[test]
fn no_value_and_no_token_can_be_an_argument() {
    for leaf in all_leaves() {
        let mut args: Vec<&str> = leaf.iter().map(String::as_str).collect();
        args.push("--help");
        let help = stdout(&run(&args));

        for option in ["--value", "--token ", "--token=", "--password", "--pin ", "--client-secret "] {
            assert!(!help.contains(option), "{leaf:?} has {option}");
        }
    }
    assert_eq!(code(&run(&["secrets", "create", "name", "value"])), 1);
    assert_eq!(code(&run(&["secrets", "put", "name", "value"])), 1);
    assert_eq!(code(&run(&["status", "--token", "t"])), 1);
}

#[test]
fn completions_and_manual_pages_are_made() {
    for shell in ["bash", "zsh", "fish"] {
        let script = stdout(&run(&["completion", shell]));
        assert!(script.contains("secrets") && script.contains("rewrap"), "{shell}");
    }
    let dir = tempfile::tempdir().expect("a directory");

    let output = lacre().args(["man", "--out"]).arg(dir.path()).output().expect("the program runs");

    assert_eq!(code(&output), 0);
    for leaf in all_leaves() {
        let page = dir.path().join(format!("lacre-{}.1", leaf.join("-")));
        assert!(page.is_file(), "{}", page.display());
    }
}

#[test]
fn a_closed_port_is_told_with_a_hint() {
    let output = run(&["secrets", "list", "--addr", "http://127.0.0.1:9"]);

    assert_eq!(code(&output), 1);
    assert!(stderr(&output).starts_with("error: no answer from http://127.0.0.1:9"), "{}", stderr(&output));
    assert!(stderr(&output).contains("\nhint: "), "{}", stderr(&output));
    assert!(stdout(&output).is_empty());
}

#[test]
fn a_refusal_shows_reason_request_id_and_exit_code() {
    for (status, expected) in
        [("404 Not Found", 3), ("412 Precondition Failed", 4), ("503 Busy", 2), ("401 No", 2)]
    {
        let body = r#"{"title":"refused","detail":"because\u001b[31m","code":"x","request_id":"r-1"}"#;
        let (addr, _requests) = stub(vec![answer(status, "retry-after: 7\r\n", body)]);

        let output = run(&["kek", "list", "--addr", &addr]);

        let text = stderr(&output);
        assert_eq!(code(&output), expected, "{status}: {text}");
        assert!(text.starts_with("error: because"), "{text}");
        assert!(text.contains("request id: r-1"), "{text}");
        assert!(!text.contains('\u{1b}'), "a server must not move the cursor");
        assert!(status.starts_with("503") == text.contains("try again in 7 s"), "{text}");
    }
}

#[test]
fn credentials_of_dev_json_are_exchanged_for_a_token() {
    let token = ok(r#"{"access_token":"t-1","token_type":"Bearer","expires_in":3600}"#);
    let (addr, requests) = stub(vec![token, ok(r#"{"items":[]}"#)]);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("dev.json");
    let management =
        r#"{"client_id":"c","client_secret":"s","resource":"https://default.lacre.local/api","scope":"all"}"#;
    fs::write(&file, format!(r#"{{"url":"{addr}","management":{management}}}"#)).expect("a file");

    let output = lacre().args(["app", "list"]).env("LACRE_DEV", &file).output().expect("the program runs");

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let first = requests.recv().expect("a request");
    assert!(first.starts_with("POST /oidc/token"), "{first}");
    assert!(first.to_ascii_lowercase().contains("authorization: basic yzpz"), "{first}");
    assert!(first.contains("grant_type=client_credentials&resource=https%3A%2F%2Fdefault"), "{first}");
    let second = requests.recv().expect("a request").to_ascii_lowercase();
    assert!(second.contains("authorization: bearer t-1"), "{second}");
}

#[test]
fn a_value_travels_from_stdin_byte_for_byte() {
    let (addr, requests) = stub(vec![answer("201 Created", "", SECRET)]);
    let mut child = lacre()
        .args([
            "secrets", "create", "db", "--kind", "password", "--label", "env=prod", "--addr", &addr, "-o",
            "name",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program runs");
    child.stdin.take().expect("a pipe").write_all(b"p\xc3\xa4ss\n").expect("it reads");

    let output = child.wait_with_output().expect("it ends");

    assert_eq!(stdout(&output), "01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10\n");
    let request = requests.recv().expect("a request");
    let body = request.split("\r\n\r\n").nth(1).expect("a body");
    let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(body["value"], "p\u{e4}ss\n");
    assert_eq!(body["encoding"], "utf8");
    assert_eq!(body["labels"]["env"], "prod");
}

#[test]
fn a_value_is_not_shown_unless_that_is_asked_for() {
    let output = run(&["secrets", "get", "db", "--addr", "http://127.0.0.1:9"]);
    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("--reveal"));

    let (addr, _requests) = stub(vec![page_with_secret(), value_answer()]);
    let output = run(&["secrets", "get", "db", "--reveal", "--addr", &addr]);

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(output.stdout, b"\x00\xff\xfehi");
}

#[test]
fn a_value_in_a_file_is_private_and_overwrites_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("value");
    let path = file.to_str().expect("text");
    let (addr, _requests) = stub(vec![page_with_secret(), value_answer()]);

    let output = run(&["secrets", "get", "db", "--out", path, "--addr", &addr]);

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(output.stdout.is_empty());
    assert_eq!(fs::read(&file).expect("a file"), b"\x00\xff\xfehi");
    assert_eq!(fs::metadata(&file).expect("a file").permissions().mode() & 0o777, 0o600);

    let output = run(&["secrets", "get", "db", "--out", path, "--addr", &addr]);
    assert_eq!(code(&output), 1);
    assert_eq!(fs::read(&file).expect("a file"), b"\x00\xff\xfehi");

    let other = dir.path().join("other");
    let output = run(&[
        "secrets",
        "get",
        "db",
        "--out",
        other.to_str().expect("text"),
        "--addr",
        "http://127.0.0.1:9",
    ]);
    assert_eq!(code(&output), 1);
    assert!(!other.exists(), "a failed release leaves no file");
}

#[test]
fn a_new_version_is_bound_to_the_one_that_was_seen() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("value");
    fs::write(&file, "new").expect("a file");
    let id = "01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10";
    let (addr, requests) = stub(vec![answer("200 OK", "etag: \"77\"\r\n", SECRET), ok(SECRET)]);

    let args = ["secrets", "put", id, "--from-file", file.to_str().expect("text"), "--addr", &addr];
    let output = run(&args);

    assert_eq!(code(&output), 0, "{}", stderr(&output));
    requests.recv().expect("the first request");
    let put = requests.recv().expect("the second request").to_ascii_lowercase();
    assert!(put.starts_with(&format!("put /v1/secrets/{id}/value")), "{put}");
    assert!(put.contains("if-match: \"77\""), "{put}");

    let (addr, _requests) = stub(vec![answer("200 OK", "etag: \"77\"\r\n", SECRET)]);
    let stale = [
        "secrets",
        "put",
        id,
        "--if-version",
        "2",
        "--from-file",
        file.to_str().expect("text"),
        "--addr",
        &addr,
    ];
    assert_eq!(code(&run(&stale)), 4);
}

#[test]
fn an_unknown_name_is_not_found() {
    let (addr, _requests) = stub(vec![ok(r#"{"items":[]}"#)]);

    let output = run(&["secrets", "show", "nothing", "--addr", &addr]);

    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("no secret nothing"));
}

#[test]
fn nothing_is_deleted_without_a_yes() {
    let output = run(&["secrets", "delete", "db", "--addr", "http://127.0.0.1:9"]);

    assert_eq!(code(&output), 1);
    assert!(stderr(&output).contains("--yes"));
}

#[test]
fn lists_follow_the_cursor() {
    let (addr, requests) = stub(vec![
        ok(r#"{"items":[{"name":"a"}],"next_cursor":"c+1"}"#),
        ok(r#"{"items":[{"name":"b"}],"next_cursor":null}"#),
    ]);

    let output = run(&["secrets", "list", "-o", "name", "--addr", &addr]);

    assert_eq!(stdout(&output), "a\nb\n");
    requests.recv().expect("the first request");
    assert!(requests.recv().expect("the second request").contains("cursor=c%2B1"));
}

#[test]
fn a_rewrap_with_failures_is_a_partial_success() {
    let running = r#"{"id":"j1","state":"running","total":4,"done":1,"failed":0}"#;
    let ended = r#"{"id":"j1","state":"failed","total":4,"done":3,"failed":1,"last_error":"rejected"}"#;
    let (addr, _requests) = stub(vec![answer("202 Accepted", "", running), ok(ended)]);

    let output = run(&["kek", "rewrap", "--addr", &addr, "-o", "json"]);

    assert_eq!(code(&output), 5, "{}", stderr(&output));
    let lines: Vec<serde_json::Value> =
        stderr(&output).lines().map_while(|line| serde_json::from_str(line).ok()).collect();
    assert_eq!(lines.len(), 2, "{}", stderr(&output));
    assert_eq!((&lines[1]["done"], &lines[1]["failed"]), (&3.into(), &1.into()));
    let job: serde_json::Value = serde_json::from_str(&stdout(&output)).expect("JSON alone on stdout");
    assert_eq!(job["state"], "failed");
}

#[test]
fn ctrl_c_detaches_from_a_rewrap() {
    let running = r#"{"id":"j1","state":"running","total":4,"done":1,"failed":0}"#;
    let (addr, requests) =
        stub(vec![answer("202 Accepted", "", running), ok(running), ok(running), ok(running)]);
    let mut child = lacre()
        .args(["kek", "rewrap", "--addr", &addr])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program runs");
    requests.recv_timeout(Duration::from_secs(20)).expect("the job is started");
    requests.recv_timeout(Duration::from_secs(20)).expect("the job is followed");

    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it can be interrupted");

    let mut text = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(130), "{text}");
    assert!(text.contains("lacre kek wait j1") && text.contains("lacre kek cancel j1"), "{text}");
}

#[test]
fn status_tells_ready_from_not_usable_from_gone() {
    let details = r#"{"device":{"state":"ready","token_label":"lacre"}}"#;
    let (addr, _requests) = stub(vec![ok(r#"{"status":"ready"}"#), ok(details)]);
    let output = run(&["status", "--addr", &addr]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stdout(&output).contains("device.token_label"), "{}", stdout(&output));

    let checks = r#"{"ready":false,"checks":[{"name":"database","ok":true},{"name":"device","ok":false,"reason":"away"}]}"#;
    let (addr, _requests) = stub(vec![answer("503 No", "", checks), answer("401 No", "", "{}")]);
    let output = run(&["status", "--addr", &addr]);
    assert_eq!(code(&output), 2, "{}", stderr(&output));
    let shown: Vec<_> = stdout(&output).split_whitespace().map(str::to_owned).collect();
    assert_eq!(shown, ["state", "not", "usable", "check.database", "ok", "check.device", "away"]);

    assert_eq!(code(&run(&["status", "--addr", "http://127.0.0.1:9"])), 1);
}

#[test]
fn a_whole_log_is_verified_and_every_damage_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let lines = log(6);
    let head = hex::encode(Sha256::digest(&lines[5]));

    let output = verify(dir.path(), &lines, &[]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert_eq!(stdout(&output), format!("6 records, head 6 {head}\n"));
    assert!(stderr(&output).contains("would not be noticed"), "{}", stderr(&output));

    for at in 0..5 {
        let (mut edited, mut deleted, mut doubled, mut swapped) =
            (lines.clone(), lines.clone(), lines.clone(), lines.clone());
        edited[at] = edited[at].replace("2026", "2027");
        deleted.remove(at);
        doubled.insert(at, lines[at].clone());
        swapped.swap(at, at + 1);
        let first_bad = at + 1;
        for damaged in [edited, deleted, doubled, swapped] {
            let output = verify(dir.path(), &damaged, &[]);
            assert_eq!(code(&output), 2, "{at}: {}", stderr(&output));
            assert!(
                stderr(&output).contains(&format!("record {first_bad} is bad")),
                "{at}: {}",
                stderr(&output)
            );
        }
    }
}

#[test]
fn a_log_that_was_cut_or_rewritten_is_noticed_from_the_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let trusted = dir.path().join("trusted.json");
    let with = ["--checkpoint", trusted.to_str().expect("text")];
    let lines = log(6);
    assert_eq!(code(&verify(dir.path(), &lines[..4], &with)), 0);

    assert_eq!(code(&verify(dir.path(), &lines[..3], &with)), 2, "cut before what was verified");
    let mut rewritten = log(6);
    for line in &mut rewritten {
        *line = line.replace("2026", "2027");
    }
    let mut prev = "0".repeat(64);
    for line in &mut rewritten {
        let start = line.find("\"prev\":\"").expect("a link") + 8;
        line.replace_range(start..start + 64, &prev);
        prev = hex::encode(Sha256::digest(&*line));
    }
    assert_eq!(code(&verify(dir.path(), &rewritten, &[])), 0, "a rewritten chain is whole in itself");
    let output = verify(dir.path(), &rewritten, &with);
    assert!(stderr(&output).contains("record 4 is bad"), "{}", stderr(&output));

    assert_eq!(code(&verify(dir.path(), &lines[3..5], &with)), 0, "begins at the trusted record");
    assert_eq!(code(&verify(dir.path(), &lines[5..], &with)), 0, "begins after the trusted record");
    fs::write(&trusted, "{}").expect("a file");
    assert_eq!(code(&verify(dir.path(), &lines, &with)), 1, "a damaged checkpoint is not no checkpoint");
}

#[test]
fn a_log_is_verified_from_the_daemon_and_remembered() {
    let dir = tempfile::tempdir().expect("a directory");
    let trusted = dir.path().join("trusted.json");
    let lines = log(3);
    let page = |lines: &[String]| ok(&(lines.join("\n") + "\n"));
    let (addr, requests) = stub(vec![page(&lines[..2]), page(&lines[1..])]);
    let args = ["audit", "verify", "--addr", &addr, "--checkpoint", trusted.to_str().expect("text")];

    assert!(stdout(&run(&args)).starts_with("2 records, head 2 "));
    assert!(stdout(&run(&args)).starts_with("1 records, head 3 "));

    assert!(requests.recv().expect("a request").contains("after=0&"));
    assert!(requests.recv().expect("a request").contains("after=1&"));
}
