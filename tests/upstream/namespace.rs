//! A forbidden destination is refused before any packet (ID-6).
//!
//! In a network namespace of its own, where the forbidden addresses exist and listen: a SYN would arrive there, and
//! the kernel counts every connection that is opened. `/etc/hosts` is replaced in a mount namespace, so that names
//! go the host's usual way.

use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lacre::upstream::{Config, Failure, Request, Upstream};
use tokio::net::TcpListener;
use url::Url;

const PUBLIC: &str = "93.184.216.34";
const FORBIDDEN: [&str; 8] = [
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.64.0.1",
    "169.254.169.254",
    "198.18.0.1",
    "fc00::1",
    "2001:db8::1",
];
const PORTS: [u16; 4] = [22, 80, 443, 8443];

const HOSTS: &str = "
127.0.0.1 localhost a.localhost
::1 localhost
93.184.216.34 public.example
10.0.0.1 private.example private.example. alias.example
93.184.216.34 mixed.example
169.254.169.254 mixed.example metadata.google.internal
127.0.0.1 rebound.example
fc00::1 six.example
10.0.0.1 idp.corp
";

const BLOCKED: [&str; 34] = [
    "https://127.0.0.1/",
    "https://0.0.0.0/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:10.0.0.1]/",
    "https://[64:ff9b::a00:1]/",
    "https://169.254.169.254/latest/meta-data",
    "https://10.0.0.1/",
    "https://10.0.0.1:8443/",
    "https://10.0.0.1:22/",
    "https://172.16.0.1/",
    "https://192.168.0.1/",
    "https://100.64.0.1/",
    "https://198.18.0.1/",
    "https://[fc00::1]/",
    "https://[2001:db8::1]/",
    "https://2130706433/",
    "https://0177.0.0.1/",
    "https://127\u{3002}0\u{3002}0\u{3002}1/",
    "https://localhost/",
    "https://localhost./",
    "https://a.localhost/",
    "https://private.example/",
    "https://private.example./",
    "https://alias.example/",
    "https://mixed.example/",
    "https://metadata.google.internal/",
    "https://rebound.example/",
    "https://six.example/",
    "https://idp.corp:22/",
    "http://public.example/",
    "https://public.example:22/",
    "https://user:pass@public.example/",
];

#[test]
fn a_forbidden_destination_gets_no_packet() {
    // Proxies in the environment must not matter either.
    let proxies = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"];
    let output = Command::new("unshare")
        .args(["--map-root-user", "--net", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "namespace::inside", "--ignored", "--nocapture"])
        .env("LACRE_TEST_NAMESPACE", "1")
        .envs(proxies.map(|name| (name, "http://10.0.0.1:443")))
        .output()
        .expect("unshare (util-linux) can be run");
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

#[tokio::test]
#[ignore = "a_forbidden_destination_gets_no_packet runs it in a namespace"]
async fn inside() {
    if std::env::var_os("LACRE_TEST_NAMESPACE").is_none() {
        return; // Somebody runs all ignored tests: the addresses below are not for their host.
    }
    furnish();
    let accepted = listen().await;
    let upstream = Upstream::new(&Config::default()).unwrap();
    let ask =
        async |url: &str| upstream.send(Request::post(url.parse::<Url>().unwrap())).await.err().unwrap();
    let before = opened();

    for url in BLOCKED {
        assert_eq!(ask(url).await, Failure::Blocked, "{url}");
        assert_eq!(opened(), before, "{url}: a connection was opened");
    }
    assert_eq!(accepted.load(Ordering::SeqCst), 0);

    // The counters count: one connection, directly and not through the environment's proxy.
    assert_eq!(ask("https://public.example/").await, Failure::NotSent("connect"));
    assert_eq!((opened(), accepted.load(Ordering::SeqCst)), (before + 1, 1));
    // Whoever asked cannot tell the two apart.
    let nobody = ask("https://nobody.example/").await;
    assert_eq!(nobody, Failure::NotSent("dns"));
    assert_eq!(nobody.to_string(), Failure::Blocked.to_string());

    let config = Config { allow: vec!["idp.corp:22".to_owned()], ..Config::default() };
    let upstream = Upstream::new(&config).unwrap();
    for (url, expected) in [
        ("https://idp.corp:22/", Failure::NotSent("connect")),
        ("https://idp.corp/", Failure::NotSent("connect")),
        ("https://private.example/", Failure::Blocked),
        ("https://10.0.0.1/", Failure::Blocked),
    ] {
        let found = upstream.send(Request::get(url.parse::<Url>().unwrap())).await.err();
        assert_eq!(found, Some(expected), "{url}");
    }
    assert_eq!((opened(), accepted.load(Ordering::SeqCst)), (before + 3, 3));
}

/// Gives the namespace its addresses and names.
fn furnish() {
    run("ip", &["link", "set", "lo", "up"]);
    for address in FORBIDDEN.iter().chain([&PUBLIC]) {
        match address.contains(':') {
            true => run("ip", &["-6", "addr", "add", &format!("{address}/128"), "dev", "lo", "nodad"]),
            false => run("ip", &["addr", "add", &format!("{address}/32"), "dev", "lo"]),
        }
    }
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in [("hosts", HOSTS), ("nsswitch.conf", "hosts: files\n")] {
        let path = folder.path().join(file);
        fs::write(&path, text).unwrap();
        run("mount", &["--bind", path.to_str().unwrap(), &format!("/etc/{file}")]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program} cannot be run: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Listens everywhere, takes what comes and hangs up; counts.
async fn listen() -> Arc<AtomicUsize> {
    let accepted = Arc::new(AtomicUsize::new(0));
    for address in FORBIDDEN.into_iter().chain([PUBLIC, "127.0.0.1", "::1"]) {
        for port in PORTS {
            let listener = TcpListener::bind((address, port)).await.unwrap();
            let accepted = accepted.clone();
            tokio::spawn(async move {
                while listener.accept().await.is_ok() {
                    accepted.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
    }
    accepted
}

/// How many connections this namespace has opened: `ActiveOpens`, counted when a SYN is sent.
fn opened() -> u64 {
    let text = fs::read_to_string("/proc/self/net/snmp").unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let (_, value) =
        names.split(' ').zip(values.split(' ')).find(|(name, _)| *name == "ActiveOpens").unwrap();
    value.parse().unwrap()
}
