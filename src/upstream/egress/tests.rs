//! The rules as tables (ID-6).

use std::sync::Mutex;

use super::*;

fn rules(allow: &[&str]) -> Rules {
    let allow = allow.iter().map(|entry| (*entry).to_owned()).collect();
    Rules::new(&Config { allow, ..Config::default() }, None).unwrap()
}

fn dev() -> Rules {
    Rules::new(&Config { loopback_http: true, ..Config::default() }, None).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn an_address_is_where_a_packet_ends() {
    use Reach::*;
    for (address, expected) in [
        ("93.184.216.34", Public),
        ("0.0.0.0", Special),
        ("0.1.2.3", Special),
        ("10.0.0.0", Private),
        ("10.255.255.255", Private),
        ("100.63.255.255", Public),
        ("100.64.0.1", Private),
        ("100.127.255.255", Private),
        ("100.128.0.0", Public),
        ("127.0.0.1", Special),
        ("127.255.255.254", Special),
        ("169.254.169.254", Special),
        ("172.15.255.255", Public),
        ("172.16.0.1", Private),
        ("172.31.255.255", Private),
        ("172.32.0.0", Public),
        ("192.0.0.8", Special),
        ("192.0.2.1", Special),
        ("192.88.99.1", Special),
        ("192.168.1.1", Private),
        ("198.18.0.1", Special),
        ("198.19.255.255", Special),
        ("198.51.100.1", Special),
        ("203.0.113.1", Special),
        ("224.0.0.1", Special),
        ("239.255.255.255", Special),
        ("240.0.0.1", Special),
        ("255.255.255.255", Special),
        ("2606:2800:220:1::1", Public),
        ("::", Special),
        ("::1", Special),
        ("::7f00:1", Special),
        ("::ffff:127.0.0.1", Special),
        ("::ffff:10.0.0.1", Private),
        ("::ffff:93.184.216.34", Public),
        ("64:ff9b::7f00:1", Special),
        ("64:ff9b::a9fe:a9fe", Special),
        ("64:ff9b::a00:1", Private),
        ("64:ff9b::5db8:d822", Public),
        ("64:ff9b:1::5db8:d822", Special),
        ("100::1", Special),
        ("2001::5db8:d822", Special),
        ("2001:2::1", Special),
        ("2001:db8::1", Special),
        ("2001:4860:4860::8888", Public),
        ("2002:a00:1::", Special),
        ("2002:5db8:d822::", Special),
        ("3fff::1", Special),
        ("fc00::1", Private),
        ("fdff::1", Private),
        ("fe80::1", Special),
        ("fec0::1", Special),
        ("ff02::1", Special),
    ] {
        assert_eq!(reach(effective(ip(address))), expected, "{address}");
    }
}

#[test]
fn a_url_says_whether_it_may_be_asked() {
    use BadUrl::*;
    let rules = rules(&["idp.corp:9443", "10.1.0.0/16", "fd00:1::/32"]);
    for (url, expected) in [
        ("https://idp.example.com/token", None),
        ("https://idp.example.com:8443/token?a=b", None),
        ("https://93.184.216.34/", None),
        ("https://[2606:2800:220:1::1]/", None),
        ("https://idp.example.com:22/", Some(Port)),
        ("https://idp.example.com:9443/", Some(Port)),
        ("https://idp.corp:9443/", None),
        ("https://IDP.corp.:9443/", None),
        ("https://10.1.2.3/", None),
        ("https://[::ffff:10.1.2.3]/", None),
        ("https://[fd00:1::1]/", None),
        ("https://10.2.0.1/", Some(Address)),
        ("https://[fd00:2::1]/", Some(Address)),
        ("http://idp.example.com/", Some(Scheme)),
        ("http://127.0.0.1/", Some(Scheme)),
        ("http://localhost/", Some(Scheme)),
        ("file:///etc/passwd", Some(Syntax)),
        ("file://idp.example.com/etc/passwd", Some(Scheme)),
        ("ftp://idp.example.com/", Some(Scheme)),
        ("unix:/run/x", Some(Syntax)),
        ("https://", Some(Syntax)),
        ("idp.example.com", Some(Syntax)),
        ("/token", Some(Syntax)),
        ("https://user@idp.example.com/", Some(UserInfo)),
        ("https://:pass@idp.example.com/", Some(UserInfo)),
        ("https://idp.example.com\\@10.0.0.1/", None),
        ("https://idp.example.com/#a", Some(Fragment)),
        ("https://127.0.0.1/", Some(Address)),
        ("https://127.1/", Some(Address)),
        ("https://2130706433/", Some(Address)),
        ("https://0177.0.0.1/", Some(Address)),
        ("https://0x7f.0.0.1/", Some(Address)),
        ("https://127.0.0.1./", Some(Address)),
        ("https://127\u{3002}0\u{3002}0\u{3002}1/", Some(Address)),
        ("https://\u{ff11}\u{ff12}\u{ff17}.0.0.1/", Some(Address)),
        ("https://0.0.0.0/", Some(Address)),
        ("https://0/", Some(Address)),
        ("https://169.254.169.254/latest/meta-data", Some(Address)),
        ("https://10.0.0.1/", Some(Address)),
        ("https://[::1]/", Some(Address)),
        ("https://[::]/", Some(Address)),
        ("https://[::ffff:127.0.0.1]/", Some(Address)),
        ("https://[::ffff:a9fe:a9fe]/", Some(Address)),
        ("https://[fc00::1]/", Some(Address)),
        ("https://[fe80::1]/", Some(Address)),
        ("https://localhost/", Some(Address)),
        ("https://LOCALHOST./", Some(Address)),
        ("https://local\u{ad}host/", Some(Address)),
        // Names: the resolver decides.
        ("https://printer.local/", None),
        ("https://metadata.google.internal/", None),
        ("https://a.localhost/", None),
    ] {
        assert_eq!(rules.parse(url).err(), expected, "{url}");
    }
}

#[test]
fn this_host_may_be_asked_in_development_only() {
    for (url, expected) in [
        ("http://127.0.0.1:8280/", None),
        ("https://127.8.9.1:1/", None),
        ("http://[::1]:8280/", None),
        ("http://localhost:8280/token", None),
        ("http://user@localhost:8280/", Some(BadUrl::UserInfo)),
        ("http://idp.example.com/", Some(BadUrl::Scheme)),
        ("https://[::ffff:127.0.0.1]/", Some(BadUrl::Address)),
        ("https://10.0.0.1/", Some(BadUrl::Address)),
        // The parser takes the host out of it.
        ("file://localhost/etc/passwd", Some(BadUrl::Syntax)),
    ] {
        assert_eq!(dev().parse(url).err(), expected, "{url}");
    }
    let here = [ip("127.0.0.1"), ip("::1")];
    assert!(here.iter().all(|address| dev().address(*address, "localhost")));
    assert!(here.iter().all(|address| !dev().address(*address, "rebound.example.com")));
    assert!(here.iter().all(|address| !rules(&[]).address(*address, "localhost")));
}

#[test]
fn a_name_in_the_list_reaches_private_addresses_and_a_network_reaches_what_is_in_it() {
    let rules = rules(&["idp.corp", "keycloak.corp.:9443", "169.254.7.0/24", "127.0.0.9"]);
    for (name, address, expected) in [
        ("idp.corp", "10.0.0.1", true),
        ("idp.corp.", "fc00::1", true),
        ("keycloak.corp", "192.168.0.1", true),
        ("evil.idp.corp", "10.0.0.1", false),
        ("other.example.com", "10.0.0.1", false),
        ("idp.corp", "127.0.0.1", false),
        ("idp.corp", "169.254.169.254", false),
        ("idp.corp", "::", false),
        ("idp.corp", "ff02::1", false),
        ("other.example.com", "169.254.7.1", true),
        ("other.example.com", "127.0.0.9", true),
        ("other.example.com", "::ffff:127.0.0.9", true),
    ] {
        let found = [SocketAddr::new(ip(address), 0)];
        assert_eq!(rules.addresses(name, &found).is_ok(), expected, "{name} {address}");
    }
}

#[test]
fn what_is_in_the_list_is_understood_or_refused() {
    for entry in ["10.0.0.0/33", "https://idp.corp", "idp.corp:port", "idp corp", "", ":443", "[::1]:8443"] {
        let config = Config { allow: vec![entry.to_owned()], ..Config::default() };
        assert!(matches!(Rules::new(&config, None), Err(StartError::Allow(_))), "{entry}");
    }
}

/// Answers with one list after the other.
fn resolver(answers: &[&[&str]]) -> Resolver {
    let answers = answers.iter().map(|list| list.iter().map(|text| SocketAddr::new(ip(text), 0)).collect());
    let answers = Mutex::new(answers.collect::<Vec<Vec<_>>>().into_iter());
    let lookup: Lookup = Arc::new(move |_| {
        let next = answers.lock().unwrap().next();
        Box::pin(async move { next.ok_or_else(|| io::Error::other("no such name")) })
    });
    Resolver { rules: Arc::new(rules(&[])), lookup }
}

async fn resolve(resolver: &Resolver) -> Result<Vec<String>, String> {
    let found = resolver.resolve("rebound.example.com".parse().unwrap()).await;
    found.map(|found| found.map(|at| at.ip().to_string()).collect()).map_err(|error| error.to_string())
}

#[tokio::test]
async fn one_forbidden_address_spoils_the_whole_answer() {
    let resolver =
        resolver(&[&["93.184.216.34", "93.184.216.35"], &["93.184.216.34", "10.0.0.1"], &["127.0.0.1"], &[]]);

    assert_eq!(resolve(&resolver).await.unwrap(), ["93.184.216.34", "93.184.216.35"]);
    assert_eq!(resolve(&resolver).await, Err(Forbidden.to_string()));
    assert_eq!(resolve(&resolver).await, Err(Forbidden.to_string()));
    assert_eq!(resolve(&resolver).await, Err(NoAddress.to_string()));
    assert_eq!(resolve(&resolver).await, Err(NoAddress.to_string()));
}
