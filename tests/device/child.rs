//! The device in a process of its own (HS-10, second stage): that process dies, hangs, is killed; the
//! daemon lives.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::daemon::{Api, Options, TestDaemon, contains, encodings};
use crate::served::{config, over, refused_for_now, served, stored, value_path};
use crate::shim::{ShimControl, shim_path};
use crate::slow::the_rest_is_quick;
use crate::softhsm;

/// How long a restart may take, on a machine that does other things too.
const READY_AGAIN: Duration = Duration::from_secs(2);

/// Sends a signal to one process.
pub fn signal(pid: u64, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().unwrap();
    assert!(sent.success(), "{pid} is not there");
}

fn is_there(pid: u64) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit_once(')').unwrap().1.trim_start().starts_with(['Z', 'X']))
}

async fn device(api: &Api) -> Value {
    api.get("/v1/status").await.json::<Value>().await.unwrap()["device"].take()
}

/// The process id of the sealer process.
async fn sealer(api: &Api) -> u64 {
    device(api).await["sealer"]["pid"].as_u64().expect("the daemon has a sealer process")
}

/// Waits until a value is released again; how long that took.
async fn served_again(api: &Api, id: &str, patience: Duration) -> Duration {
    let began = Instant::now();
    while api.get(&value_path(id)).await.status() != StatusCode::OK {
        assert!(began.elapsed() < patience, "not served after {:?}", began.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    began.elapsed()
}

/// `lacre serve` over the shim with further lines of configuration.
async fn served_with(more: &str) -> (TestDaemon, ShimControl) {
    let control = ShimControl::new(&softhsm::module());
    let mut options = over(&control, "");
    options.config = options.config.map(|text| format!("{text}{more}\n"));
    let daemon = TestDaemon::start(options).await;
    (daemon, control)
}

#[tokio::test]
async fn a_killed_sealer_process_costs_the_requests_under_way_and_one_login() {
    let (daemon, control) = served("").await;
    let api = daemon.api().await;
    let value = daemon.secret("outlives");
    let id = stored(&api, "outlives", &value).await;
    for round in 0..3 {
        let (logins, pid) = (control.count("C_Login"), sealer(&api).await);
        let mut reads = JoinSet::new();
        for number in 0..200_u64 {
            let request = api.request(Method::GET, &value_path(&id));
            reads.spawn(async move {
                tokio::time::sleep(Duration::from_millis(number * 2)).await;
                request.send().await.unwrap()
            });
        }
        tokio::time::sleep(Duration::from_millis(100)).await;

        signal(pid, "KILL");
        let took = served_again(&api, &id, Duration::from_secs(10)).await;

        let (mut served, mut refused) = (0, 0);
        while let Some(answer) = reads.join_next().await {
            let answer = answer.unwrap();
            if answer.status() == StatusCode::OK {
                assert_eq!(answer.json::<Value>().await.unwrap()["value"], value.as_str());
                served += 1;
            } else {
                refused_for_now(answer, "device-unavailable").await;
                refused += 1;
            }
        }
        println!("round {round}: {served} served, {refused} refused, back after {took:?}");
        assert!(served > 0, "nothing was served before the process was killed");
        assert!(took < READY_AGAIN, "back after {took:?}");
        assert_ne!(sealer(&api).await, pid);
        assert_eq!(control.count("C_Login"), logins + 1, "logins of one start");
    }
    assert_eq!(device(&api).await["sealer"]["restarts"], 3);
    let metrics = api.get("/metrics").await.text().await.unwrap();
    assert!(metrics.contains("lacre_sealer_restarts_total 3"), "{metrics}");
    daemon.token("all").await;
    assert_eq!(api.value(&id).await, value);
    daemon.finish().await;
}

#[tokio::test]
async fn a_key_whose_maker_was_killed_is_made_once_all_the_same() {
    let (daemon, control) = served("").await;
    let api = daemon.api().await;
    let id = stored(&api, "before", &daemon.secret("before")).await;
    let (pid, before) = (sealer(&api).await, control.count("C_GenerateKey"));
    control.set_rules("C_GenerateKey * sleep:1500");
    let rotate = api.request(Method::POST, "/v1/keks/rotate").json(&json!({}));
    let rotating = tokio::spawn(async move { rotate.send().await.unwrap().status() });
    let began = Instant::now();
    while control.count("C_GenerateKey") == before {
        assert!(began.elapsed() < Duration::from_secs(10), "no key is made");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    signal(pid, "KILL");
    let status = rotating.await.unwrap();
    control.set_rules("");

    assert!(status.is_server_error(), "{status}");
    served_again(&api, &id, Duration::from_secs(10)).await;
    let rotated = api.post("/v1/keks/rotate", &json!({})).await;
    assert_eq!(rotated.status(), StatusCode::CREATED);
    assert_eq!(rotated.json::<Value>().await.unwrap()["version"], 2);
    let calls = control.count("C_GenerateKey") - before;
    assert_eq!(calls, 2, "the call that was killed and its repetition");
    daemon.finish().await;
}

#[tokio::test]
async fn a_stopped_sealer_process_is_not_waited_for_and_goes_on_where_it_was() {
    let (daemon, control) = served("deadline = \"1s\"").await;
    let api = daemon.api().await;
    let id = stored(&api, "stopped", &daemon.secret("stopped")).await;
    let (logins, pid) = (control.count("C_Login"), sealer(&api).await);

    signal(pid, "STOP");
    refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
    the_rest_is_quick(&api, &id).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let began = Instant::now();
    refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
    assert!(began.elapsed() < Duration::from_millis(500), "refused after {:?}", began.elapsed());
    assert_eq!(device(&api).await["state"], "away");
    signal(pid, "CONT");

    served_again(&api, &id, Duration::from_secs(3)).await;
    assert_eq!((sealer(&api).await, control.count("C_Login")), (pid, logins));
    daemon.finish().await;
}

#[tokio::test]
async fn a_sealer_process_that_stays_stopped_is_replaced() {
    let (daemon, control) = served("deadline = \"1s\"").await;
    let api = daemon.api().await;
    let id = stored(&api, "stays", &daemon.secret("stays")).await;
    let (logins, pid) = (control.count("C_Login"), sealer(&api).await);

    signal(pid, "STOP");
    let took = served_again(&api, &id, Duration::from_secs(20)).await;

    assert!(took > Duration::from_secs(8), "it was given no time: {took:?}");
    assert!(!is_there(pid));
    assert_eq!(control.count("C_Login"), logins + 1);
    daemon.finish().await;
}

#[tokio::test]
async fn a_module_that_dies_in_a_call_ends_its_own_process_only() {
    let (daemon, control) = served("").await;
    let api = daemon.api().await;
    let id = stored(&api, "dies", &daemon.secret("dies")).await;
    for how in ["abort", "segv"] {
        let (logins, pid) = (control.count("C_Login"), sealer(&api).await);
        control.set_rules(&format!("C_Decrypt 1 {how}"));

        refused_for_now(api.get(&value_path(&id)).await, "device-unavailable").await;
        control.set_rules("");

        let took = served_again(&api, &id, Duration::from_secs(10)).await;
        println!("{how}: back after {took:?}");
        assert!(took < READY_AGAIN, "{how}: back after {took:?}");
        assert_ne!(sealer(&api).await, pid, "{how} did not happen");
        assert_eq!(control.count("C_Login"), logins + 1, "{how}");
    }
    daemon.finish().await;
}

#[tokio::test]
async fn a_module_that_dies_in_threads_of_the_daemon_ends_it() {
    let (mut daemon, control) = served_with("[sealer]\nmode = \"thread\"").await;
    let api = daemon.api().await;
    let id = stored(&api, "dies", &daemon.secret("dies")).await;
    assert!(device(&api).await.get("sealer").is_none());
    control.set_rules("C_Decrypt 1 abort");

    let answer = api.request(Method::GET, &value_path(&id)).send().await;

    assert!(answer.is_err(), "it was answered: {answer:?}");
    assert!(daemon.ended(Duration::from_secs(10)).await.is_none(), "it ended by itself and not by a signal");
    control.set_rules("");
    daemon.run().await;
    daemon.finish().await;
}

#[tokio::test]
async fn a_crash_loop_slows_down_and_the_daemon_serves_what_it_can() {
    let (daemon, control) = served("").await;
    let api = daemon.api().await;
    let id = stored(&api, "loop", &daemon.secret("loop")).await;
    let logins = control.count("C_Login");

    control.set_rules("C_Decrypt * segv\nC_Sign * abort");
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(8) {
        let answer = api.get(&value_path(&id)).await;
        refused_for_now(answer, "device-unavailable").await;
        assert_eq!(api.get("/livez").await.status(), StatusCode::OK);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let starts = control.count("C_Login") - logins;
    println!("{starts} starts in {:?}", began.elapsed());
    // At once, then after 0.25, 0.5, 1, 2 and 4 s.
    assert!((2..=6).contains(&starts), "{starts} starts");
    the_rest_is_quick(&api, &id).await;

    control.set_rules("");
    served_again(&api, &id, Duration::from_secs(15)).await;
    daemon.finish().await;
}

#[tokio::test]
async fn the_sealer_process_ends_with_a_killed_daemon_and_the_next_one_starts_at_once() {
    let (mut daemon, control) = served("").await;
    let api = daemon.api().await;
    let id = stored(&api, "next", &daemon.secret("next")).await;
    let (logins, pid) = (control.count("C_Login"), sealer(&api).await);
    // It cannot even hear that its daemon has gone.
    signal(pid, "STOP");

    signal(u64::from(daemon.pid()), "KILL");
    let began = Instant::now();
    while is_there(pid) {
        assert!(began.elapsed() < Duration::from_secs(2), "the sealer process outlives its daemon");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    daemon.kill();
    daemon.run().await;

    assert_eq!(control.count("C_Login"), logins + 1);
    assert_eq!(daemon.api().await.value(&id).await, daemon.secret("next"));
    daemon.finish().await;
}

/// What the module got for its attempts, by name, from the daemon's log.
async fn attempts(daemon: &TestDaemon, control: &ShimControl) -> Vec<(String, String)> {
    const NAMES: [&str; 8] = [
        "execve",
        "fork",
        "socket-inet",
        "socket-unix",
        "socket-packet",
        "ptrace",
        "kill-parent",
        "read-parent",
    ];
    let before = daemon.log().len();
    control.set_rules(&NAMES.map(|name| format!("C_SignInit 1 attempt:{name}")).join("\n"));
    daemon.token("all").await;
    control.set_rules("");
    let log = daemon.log();
    let said = |name: &str| {
        let begin = format!("lacre-shim: {name}: ");
        let line = log[before..].lines().find_map(|line| line.strip_prefix(&begin));
        line.unwrap_or_else(|| panic!("{name} was not tried")).to_owned()
    };
    NAMES.iter().map(|name| ((*name).to_owned(), said(name))).collect()
}

#[tokio::test]
async fn a_module_in_the_sealer_process_can_do_little_else() {
    let forbidden = |outcome: &str| outcome.contains("Operation not permitted");
    for (more, open) in
        [("", &["socket-unix"][..]), ("[sealer]\nnetwork = true", &["socket-unix", "socket-inet"])]
    {
        let (daemon, control) = served_with(more).await;
        for (name, outcome) in attempts(&daemon, &control).await {
            assert_eq!(!forbidden(&outcome), open.contains(&name.as_str()), "{more} {name}: {outcome}");
            assert!(!open.contains(&name.as_str()) || outcome == "done", "{name}: {outcome}");
        }
        daemon.finish().await;
    }
    // The same attempts in the daemon's own threads get past the filter that is not there.
    let (daemon, control) = served_with("[sealer]\nmode = \"thread\"").await;
    for (name, outcome) in attempts(&daemon, &control).await {
        assert!(!forbidden(&outcome) || name == "socket-packet", "{name}: {outcome}");
    }
    daemon.finish().await;
}

#[tokio::test]
async fn the_daemon_loads_no_module_and_the_sealer_process_inherits_nothing() {
    let control = ShimControl::new(&softhsm::module());
    let kept = tempfile::tempdir().unwrap();
    // The daemon is started with a descriptor of somebody else, and has it.
    let open = format!("exec 9>{}; exec \"$@\"", kept.path().join("left-open").display());
    let wrapper = ["sh", "-c", &open, "sh"].map(str::to_owned).to_vec();
    let daemon = TestDaemon::start(Options { wrapper, ..over(&control, "") }).await;
    let own = fs::read_link(format!("/proc/{}/fd/9", daemon.pid())).unwrap();
    assert!(own.ends_with("left-open"), "{}", own.display());
    let api = daemon.api().await;
    let pid = sealer(&api).await;
    let maps = |pid: u64| fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    for module in [shim_path(), softhsm::module()] {
        let module = module.canonicalize().unwrap();
        assert!(maps(pid).contains(module.to_str().unwrap()), "{} is not loaded", module.display());
        assert!(!maps(u64::from(daemon.pid())).contains(module.to_str().unwrap()), "{}", module.display());
    }

    let tcp = ["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/net/{name}")).unwrap()).concat();
    let open: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .map(|target| target.display().to_string())
        .collect();
    assert!(open.iter().any(|target| target == "/dev/null"), "{open:?}");
    assert!(!open.iter().any(|target| target.ends_with("left-open")), "{open:?}");
    for target in &open {
        assert!(!target.contains("lacre.db"), "{open:?}");
        let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
        assert!(inode.is_none_or(|inode| !tcp.contains(&format!(" {inode} "))), "{open:?}");
    }
    for file in ["environ", "cmdline"] {
        let text = fs::read(format!("/proc/{pid}/{file}")).unwrap();
        assert!(!daemon.finder().is_match(&text), "a secret is in its {file}");
    }
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in ["NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line}: {status}");
    }
    daemon.finish().await;
}

/// Readable pages of a process that hold one of `needles`; needs ptrace rights, as root has.
fn pages_with(pid: u64, needles: &[Vec<u8>]) -> Vec<String> {
    use std::os::unix::fs::FileExt;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let memory = fs::File::open(format!("/proc/{pid}/mem")).expect("tests run as root");
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains(" r") && !line.ends_with("[vvar]")) {
        let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let (from, to) = (u64::from_str_radix(from, 16).unwrap(), u64::from_str_radix(to, 16).unwrap());
        let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
        // Guard pages and memfd_secret cannot be read, which is the point of them.
        if memory.read_exact_at(&mut bytes, from).is_ok() && needles.iter().any(|n| contains(&bytes, n)) {
            found.push(line.to_owned());
        }
    }
    found
}

#[tokio::test]
async fn released_values_leave_nothing_in_either_process() {
    let (daemon, _control) = served("").await;
    let value = daemon.secret("passes-through");
    {
        let api = daemon.api().await;
        let id = stored(&api, "passing", &value).await;
        for _ in 0..100 {
            assert_eq!(api.value(&id).await, value);
        }
    }
    let pid = sealer(&daemon.api().await).await;
    tokio::time::sleep(Duration::from_secs(1)).await;

    assert!(!pages_with(pid, &[b"lacre-dev".to_vec()]).is_empty(), "the search finds nothing");
    let found = pages_with(pid, &encodings(&daemon.canary));
    assert!(found.is_empty(), "the value is in {found:?}");
    daemon.finish().await;
}

#[tokio::test]
async fn a_hangup_changes_what_the_sealer_process_logs_and_that_of_the_next_one() {
    // Said by the process itself, unless its new filter leaves it out.
    const CHANGED: &str = "log level of the sealer process changed";
    let (daemon, _control) = served_with("[log]\nlevel = \"info\"").await;
    let api = daemon.api().await;
    let id = stored(&api, "logged", &daemon.secret("logged")).await;
    let pid = sealer(&api).await;
    let set = |from: &str, to: &str| {
        let file = daemon.dir().join("test.toml");
        let text = fs::read_to_string(&file).unwrap();
        let changed = text.replace(&format!("level = \"{from}\""), &format!("level = \"{to}\""));
        assert_ne!(text, changed);
        fs::write(&file, changed).unwrap();
        signal(u64::from(daemon.pid()), "HUP");
    };

    set("info", "info,hyper=warn");
    said(&daemon, CHANGED, 1).await;
    set("info,hyper=warn", "error");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(daemon.log().matches(CHANGED).count(), 1, "it logs what it is not to log");
    // What is no filter changes nothing.
    set("error", "lacre=loud");
    said(&daemon, "the old log level stays", 1).await;
    assert_eq!(sealer(&api).await, pid, "another process");

    signal(pid, "KILL");
    served_again(&api, &id, Duration::from_secs(10)).await;
    set("lacre=loud", "info");
    said(&daemon, CHANGED, 2).await;
    assert_eq!(api.value(&id).await, daemon.secret("logged"));
    daemon.finish().await;
}

/// Waits until the log has that text so many times.
async fn said(daemon: &TestDaemon, text: &str, times: usize) {
    let began = Instant::now();
    while daemon.log().matches(text).count() < times {
        assert!(began.elapsed() < Duration::from_secs(5), "not said: {text}\n{}", daemon.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A user of this host that is a member of a group beside its own: their names. Nothing is changed on the host.
fn member() -> Option<(String, String)> {
    let groups = fs::read_to_string("/etc/group").unwrap();
    groups.lines().find_map(|line| {
        let (group, members) = (line.split(':').next()?, line.split(':').nth(3)?);
        let user = members.split(',').find(|user| !user.is_empty() && *user != "root")?;
        Some((user.to_owned(), group.to_owned()))
    })
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test]
async fn the_process_of_another_user_reaches_what_belongs_to_a_group_of_that_user() {
    let is_root = run("id", &["-u"]).trim() == "0";
    let Some((user, group)) = member().filter(|_| is_root) else {
        println!("skipped: needs root and a user that is a member of a group");
        return;
    };
    let mut daemon = TestDaemon::dev().await;
    daemon.stop().await;
    // The directory of all can be entered and the token used by members of the group only.
    let dir = daemon.dir().canonicalize().unwrap();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    run("chgrp", &[&group, dir.to_str().unwrap()]);
    run("chmod", &["0750", dir.to_str().unwrap()]);
    run("chgrp", &["-R", &group, &path("tokens"), &path("softhsm2.conf")]);
    run("chmod", &["-R", "u=rwX,g=rwX,o=", &path("tokens"), &path("softhsm2.conf")]);
    run("chown", &["-R", &user, &path("pin"), &path("latch")]);
    let text = format!("{}[sealer]\nuser = \"{user}\"\n", config(&softhsm::module(), ""));
    daemon.set_options(Options { config: Some(text), ..Options::default() });
    daemon.run().await;

    let api = daemon.api().await;
    let value = daemon.secret("of-a-group");
    let id = stored(&api, "of-a-group", &value).await;
    assert_eq!(api.value(&id).await, value);
    let status = fs::read_to_string(format!("/proc/{}/status", sealer(&api).await)).unwrap();
    let numbers = |name: &str| -> Vec<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let mut numbers: Vec<_> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
    };
    let asked = |what: &str| -> Vec<u32> {
        let mut ids: Vec<_> =
            run("id", &[what, &user]).split_whitespace().map(|id| id.parse().unwrap()).collect();
        ids.sort_unstable();
        ids
    };
    assert_eq!((numbers("Uid:"), numbers("Gid:")), (asked("-u"), asked("-g")));
    assert_eq!(numbers("Groups:"), asked("-G"));
    assert!(numbers("Groups:").len() > 1);
    daemon.finish().await;
}

#[tokio::test]
async fn operations_are_counted_by_device_wherever_it_is_driven() {
    for mode in ["process", "thread"] {
        let (daemon, _control) = served_with(&format!("[sealer]\nmode = \"{mode}\"")).await;
        let api = daemon.api().await;
        let id = stored(&api, "counted", &daemon.secret("counted")).await;
        api.value(&id).await;
        let metrics = api.get("/metrics").await.text().await.unwrap();
        let operations = metrics.lines().filter(|line| line.starts_with("lacre_hsm_operation"));
        let (mut ops, mut sums) = (Vec::new(), 0);
        for line in operations {
            assert!(line.contains("{device=\"default\",op=\""), "{mode}: {line}");
            ops.extend(line.strip_prefix("lacre_hsm_operations_total{device=\"default\",op=\""));
            sums += usize::from(line.starts_with("lacre_hsm_operation_duration_seconds_sum"));
        }
        for op in ["wrap", "unwrap"] {
            let is_it = |found: &&str| found.starts_with(&format!("{op}\",result=\"ok\"}} "));
            assert!(ops.iter().any(is_it), "{mode} {op}: {ops:?}");
        }
        assert!(sums > 0, "{mode}: no durations");
        daemon.finish().await;
    }
}

#[tokio::test]
async fn large_values_cross_whole() {
    let (daemon, _control) = served_with("[vault]\nmax_value_bytes = 1048576").await;
    let api = daemon.api().await;
    let mut ids = Vec::new();
    for len in [1, 4096, 65_000, 700_000] {
        let value = format!("{}{}", daemon.secret("large"), "x".repeat(len));
        ids.push((stored(&api, &format!("large-{len}"), &value).await, value));
    }
    let mut reads = JoinSet::new();
    for round in 0..4 {
        for (id, value) in &ids {
            let (request, value) = (api.request(Method::GET, &value_path(id)), value.clone());
            reads.spawn(async move {
                let answer = request.send().await.unwrap();
                assert_eq!(answer.status(), StatusCode::OK, "round {round}");
                assert!(answer.json::<Value>().await.unwrap()["value"] == value.as_str(), "another value");
            });
        }
    }
    while let Some(read) = reads.join_next().await {
        read.unwrap();
    }
    daemon.finish().await;
}

#[test]
fn the_command_is_for_the_daemon_only() {
    let output = Command::new(env!("CARGO_BIN_EXE_lacre"))
        .arg("sealer")
        .stdin(fs::File::open(Path::new("/dev/null")).unwrap())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("for the daemon"), "{output:?}");
}
