//! What a provider may answer, as tables: ID-4 to ID-8 and ID-10. Each row has a connector of its own, so that what
//! one answer does to a connector is not seen in the next row.

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::idp::{FakeIdp, Fault, Mode};
use crate::stage::{EXPIRED, Stage, User, body, now, path, refused, text, token_in, until};

const GENERAL: (u16, &str) = (400, "connector.general");
const INVALID: (u16, &str) = (400, "connector.invalid_response");
const REJECTED: (u16, &str) = (401, "connector.authorization_failed");
const LIMITED: (u16, &str) = (429, "connector.rate_limit_exceeded");
/// A fault, as often as it is needed.
type Make = Box<dyn Fn() -> Fault>;
/// What a failure may be answered with.
type Codes = &'static [(u16, &'static str)];
/// What a number of seconds, or its absence, has to be.
type Rule = fn(&Value) -> bool;

/// All that a refresh may take until it is given up.
const DEADLINE: Duration = Duration::from_secs(20);

/// A user with a set at a connector of the row's own.
async fn row(stage: &Stage, name: &str) -> User {
    let connector = stage.connect(name).await;
    stage.linked_at(&connector, name).await
}

/// The access tokens of one user's sets end then.
fn ends_in(stage: &Stage, user: &User, seconds: i64) {
    stage.ends_where(&format!("user_id = '{}'", user.id), seconds);
}

/// Status and code of an answer, which tells nothing of what the provider said.
async fn outcome(stage: &Stage, user: &User, name: &str) -> (u16, String) {
    let answer = user.api.get(&path(name)).await;
    let (status, text) = (answer.status().as_u16(), answer.text().await.unwrap());
    for word in ["<html", "the provider's own words", &stage.daemon().canary] {
        assert!(status == 200 || !text.contains(word), "{name}: the provider's answer is passed on: {text}");
    }
    let body: Value = serde_json::from_str(&text).unwrap();
    (status, body["code"].as_str().unwrap_or_default().to_owned())
}

/// The provider is well again, and so is the set.
async fn recovers(stage: &Stage, user: &User, name: &str) {
    let works = async || user.api.get(&path(name)).await.status() == StatusCode::OK;
    until(&format!("{name}: an end of the outage"), Duration::from_secs(150), works).await;
    assert!(stage.idp.is_live(&token_in(user.api.get(&path(name)).await).await), "{name}");
}

fn is_one_of(found: &(u16, String), wanted: &[(u16, &str)]) -> bool {
    wanted.iter().any(|&(status, code)| found.0 == status && found.1 == code)
}

#[tokio::test]
async fn a_passing_failure_costs_no_token_that_is_alive_and_no_set() {
    let stage = Stage::dev(Mode::Strict).await;
    let words = "{\"error\":\"server_error\",\"error_description\":\"the provider's own words\"}";
    let with_words = |status| move || Fault::Status(status, vec![], words.to_owned());
    let rows: [(&str, Make, Codes); 14] = [
        ("s500", Box::new(with_words(500)), &[GENERAL]),
        ("s502", Box::new(with_words(502)), &[GENERAL]),
        ("s503", Box::new(|| Fault::status(503)), &[GENERAL]),
        ("s504", Box::new(|| Fault::status(504)), &[GENERAL]),
        ("s429", Box::new(|| Fault::status(429)), &[GENERAL, LIMITED]),
        ("s401", Box::new(|| Fault::status(401)), &[GENERAL, REJECTED]),
        ("s403", Box::new(with_words(403)), &[GENERAL, REJECTED]),
        ("s404", Box::new(|| Fault::Status(404, vec![], "<html>".to_owned())), &[GENERAL]),
        ("s408", Box::new(|| Fault::status(408)), &[GENERAL]),
        ("request", Box::new(|| Fault::error(400, "invalid_request")), &[GENERAL]),
        ("twohundred", Box::new(|| Fault::error(200, "temporarily_unavailable")), &[INVALID]),
        ("empty", Box::new(|| Fault::status(200)), &[INVALID]),
        ("nothing", Box::new(|| Fault::status(204)), &[GENERAL, INVALID]),
        ("closed", Box::new(|| Fault::CloseBeforeAnswer), &[GENERAL]),
    ];
    let mut users = Vec::new();
    for (name, fault, wanted) in rows {
        let user = row(&stage, name).await;
        let token = token_in(user.api.get(&path(name)).await).await;
        stage.idp.script((0..100).map(|_| fault()));
        let before = stage.idp.refreshes();
        ends_in(&stage, &user, 30);
        assert_eq!(token_in(user.api.get(&path(name)).await).await, token, "{name}: alive and not served");
        assert_eq!(stage.idp.refreshes(), before + 1, "{name}");

        ends_in(&stage, &user, -10);
        for _ in 0..20 {
            let found = outcome(&stage, &user, name).await;
            assert!(is_one_of(&found, wanted), "{name}: {found:?}, not {wanted:?}");
        }
        let tries = stage.idp.refreshes() - before;
        assert!(tries <= 5, "{name}: {tries} requests for 21 reads: no back-off");
        assert_ne!(stage.metadata(&user, name).await, Value::Null, "{name}: the set is gone");

        stage.idp.forget_faults();
        users.push((name, user));
    }
    for (name, user) in &users {
        recovers(&stage, user, name).await;
    }
    assert_eq!(stage.idp.families_revoked(), 0);
    stage.finish().await;
}

#[tokio::test]
async fn a_dead_grant_is_asked_about_once_whatever_it_is_wrapped_in() {
    let stage = Stage::dev(Mode::Strict).await;
    // GitHub says it with 200: section 14, row 6.
    for (name, status) in [("plain", 400), ("unauthorized", 401), ("twohundred", 200)] {
        let user = row(&stage, name).await;
        stage.idp.script([Fault::error(status, "invalid_grant")]);
        let before = stage.idp.refreshes();
        ends_in(&stage, &user, -10);
        for _ in 0..3 {
            refused(user.api.get(&path(name)).await, 401, EXPIRED).await;
        }
        assert_eq!(stage.idp.refreshes(), before + 1, "{name}");
        assert_ne!(stage.metadata(&user, name).await, Value::Null, "{name}");
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_lifetime_is_a_whole_number_of_seconds_or_unknown() {
    let stage = Stage::dev(Mode::NonRotating).await;
    // What is no number does not make a token that never ends.
    let bounded = |left: &Value| (1..=86_400).contains(&left.as_i64().unwrap_or(-1));
    // Short of eternity in any case, and never less than nothing.
    let sane = |left: &Value| left.is_null() || (1..=316_224_000).contains(&left.as_i64().unwrap_or(-1));
    let hour = |left: &Value| (3550..=3600).contains(&left.as_i64().unwrap_or(-1));
    let rows: [(&str, &str, Rule); 16] = [
        ("number", "3600", hour),
        ("texts", "\"3600\"", hour),
        ("missing", "null", sane),
        ("truth", "true", bounded),
        ("list", "[]", bounded),
        ("object", "{}", bounded),
        ("word", "\"soon\"", bounded),
        ("no_text", "\"\"", bounded),
        ("unit", "\"3600s\"", sane),
        ("space", "\" 3600\"", sane),
        ("half", "1.5", sane),
        ("float", "1e3", sane),
        ("large", "2147483648", sane),
        ("larger", "9223372036854775808", sane),
        ("negative", "-1", sane),
        ("zero", "0", sane),
    ];
    let connector = stage.connect("expiry").await;
    for (name, raw, rule) in rows {
        let user = stage.user(name).await;
        let (record, uri) = stage.begin(&user, &connector, None).await;
        let (code, _) = stage.idp.authorize(&uri, name);
        stage.idp.script([Fault::with_raw("expires_in", raw)]);
        body(stage.verify(&user, &record, &code).await, 200).await;
        assert_eq!(stage.link(&user, &record).await.status(), 204, "{raw}");
        let read = body(user.api.get(&path("expiry")).await, 200).await;
        assert!(rule(&read["expires_in"]), "{raw}: {read}");
        let metadata = stage.metadata(&user, "expiry").await["metadata"].clone();
        let left = metadata["expiresAt"].as_i64().map_or(Value::Null, |at| json!(at - now()));
        assert!(["zero", "negative"].contains(&name) || rule(&left), "{raw}: {metadata}");
    }
    // What is no JSON is no answer; what is too large for a number may be either.
    for (name, raw) in [("nan", "NaN"), ("infinite", "1e400")] {
        let user = stage.user(name).await;
        let (record, uri) = stage.begin(&user, &connector, None).await;
        let (code, _) = stage.idp.authorize(&uri, name);
        stage.idp.script([Fault::with_raw("expires_in", raw)]);
        let answer = stage.verify(&user, &record, &code).await;
        if name == "infinite" && answer.status() == StatusCode::OK {
            assert_eq!(stage.link(&user, &record).await.status(), 204);
            let read = body(user.api.get(&path("expiry")).await, 200).await;
            assert!(sane(&read["expires_in"]), "{raw}: {read}");
        } else {
            refused(answer, 400, "connector.invalid_response").await;
        }
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_lifetime_begins_before_the_request_that_asks_for_it() {
    let stage = Stage::dev(Mode::NonRotating).await;
    let ana = stage.linked("ana").await;
    stage.expire();
    stage.idp.script([Fault::Delay(Duration::from_secs(3))]);
    let asked = now();
    let read = body(stage.read(&ana).await, 200).await;
    let ends = now() + read["expires_in"].as_i64().unwrap();
    assert!(ends <= asked + 3601, "it would be used after its end: {}", ends - asked);
    stage.finish().await;
}

#[tokio::test]
async fn refresh_tokens_are_kept_or_replaced_as_the_answer_says() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let refresh = async |fault: Option<Fault>| {
        stage.idp.script(fault);
        stage.expire();
        let read = body(stage.read(&ana).await, 200).await;
        (stage.idp.tokens_used(), read["scope"].clone())
    };
    let scope = json!(crate::stage::SCOPE);
    assert_eq!(refresh(Some(Fault::Keep { told: false })).await, (1, scope.clone()), "omitted: kept");
    assert_eq!(refresh(Some(Fault::Keep { told: true })).await, (1, scope.clone()), "the same one: kept");
    assert_eq!(refresh(None).await, (1, scope.clone()), "a new one comes");
    assert_eq!(refresh(Some(Fault::with("scope", json!("read")))).await, (2, json!("read")), "and is used");
    assert_eq!(refresh(Some(Fault::without("scope"))).await, (3, json!("read")), "the shorter scope is kept");
    assert_eq!(stage.idp.families_revoked(), 0);
    stage.finish().await;
}

#[tokio::test]
async fn an_answer_that_is_no_token_replaces_nothing() {
    let stage = Stage::dev(Mode::NonRotating).await;
    let rows: [(&str, Fault); 12] = [
        ("mac", Fault::with("token_type", json!("mac"))),
        ("no_access", Fault::without("access_token")),
        ("null_access", Fault::with("access_token", Value::Null)),
        ("empty_access", Fault::with("access_token", json!(""))),
        ("number", Fault::with("access_token", json!(7))),
        ("html", Fault::Text(Box::new(|_| b"<html>sign in</html>".to_vec()))),
        ("bom", Fault::Text(Box::new(|made| [b"\xef\xbb\xbf".to_vec(), made.to_string().into()].concat()))),
        (
            "utf16",
            Fault::Text(Box::new(|made| {
                made.to_string().encode_utf16().flat_map(u16::to_le_bytes).collect()
            })),
        ),
        (
            "bytes",
            Fault::Text(Box::new(|_| b"{\"access_token\":\"\xff\xfe\",\"token_type\":\"bearer\"}".to_vec())),
        ),
        ("twice", Fault::with_raw("access_token", "\"one\",\"access_token\":\"two\"")),
        ("deep", Fault::with_raw("more", &("[".repeat(10_000) + &"]".repeat(10_000)))),
        ("cut", Fault::CloseAfter(160)),
    ];
    let mut users = Vec::new();
    for (name, fault) in rows {
        let user = row(&stage, name).await;
        stage.idp.script([fault]);
        ends_in(&stage, &user, -10);
        let found = outcome(&stage, &user, name).await;
        let wanted = if name == "cut" { &[GENERAL, INVALID][..] } else { &[INVALID][..] };
        assert!(is_one_of(&found, wanted), "{name}: {found:?}");
        users.push((name, user));
    }
    for (name, user) in &users {
        recovers(&stage, user, name).await;
    }
    stage.finish().await;
}

#[tokio::test]
async fn answers_without_end_or_measure_are_cut() {
    let stage = Stage::dev(Mode::NonRotating).await;
    let large = |made: &Value| {
        let mut large = made.clone();
        large["padding"] = json!("x".repeat(8 << 20));
        large.to_string().into_bytes()
    };
    let head =
        |more: &str| format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{more}\r\n").into_bytes();
    let many = "X-Many: y\r\n".repeat(10_000);
    let bomb = "Content-Encoding: gzip\r\nContent-Length: 20\r\n";
    let gzip = [head(bomb), b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0".to_vec()].concat();
    let rows: [(&str, Fault); 11] = [
        ("large", Fault::Text(Box::new(large))),
        ("endless", Fault::Endless),
        ("drip", Fault::Drip(Duration::from_millis(700))),
        ("hang", Fault::Hang),
        ("hang_after", Fault::HangAfterHeaders),
        ("headers", Fault::Raw(head(&many))),
        ("header", Fault::Raw(head(&format!("X: {}\r\n", "y".repeat(1 << 20))))),
        ("length", Fault::Raw([head("Content-Length: 1000\r\n"), b"{}".to_vec()].concat())),
        (
            "two_lengths",
            Fault::Raw([head("Content-Length: 2\r\nContent-Length: 3\r\n"), b"{} ".to_vec()].concat()),
        ),
        ("gzip", Fault::Raw(gzip)),
        ("no_http", Fault::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec())),
    ];
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", stage.daemon().pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    for (name, fault) in rows {
        let user = row(&stage, name).await;
        let before = memory();
        stage.idp.script([fault]);
        ends_in(&stage, &user, -10);
        let begun = Instant::now();
        let found = outcome(&stage, &user, name).await;
        assert!(is_one_of(&found, &[GENERAL, INVALID]), "{name}: {found:?}");
        assert!(begun.elapsed() < DEADLINE, "{name}: {:?}", begun.elapsed());
        assert!(memory() < before + (16 << 10), "{name}: {} KiB more", memory() - before);
        assert_ne!(stage.metadata(&user, name).await, Value::Null, "{name}: the set is gone");
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_query_string_is_read_where_it_is_the_default() {
    let stage = Stage::dev(Mode::Strict).await;
    let mut config = stage.config();
    // Logto's defaults: at a refresh too.
    for member in ["tokenEndpointResponseType", "tokenEndpointAuthMethod"] {
        config.as_object_mut().unwrap().remove(member);
    }
    let connector = stage.connect_with("oauth2", "plain", config).await;
    let user = stage.user("ana").await;
    stage.idp.script([Fault::QueryString]);
    let record = stage.verified_at(&user, &connector, "ana", None).await;
    assert_eq!(stage.link(&user, &record).await.status(), 204);
    let first = token_in(user.api.get(&path("plain")).await).await;
    stage.expire();
    stage.idp.script([Fault::QueryString]);
    let second = token_in(user.api.get(&path("plain")).await).await;
    assert!(second != first && stage.idp.is_live(&second));
    stage.finish().await;
}

#[tokio::test]
async fn no_redirect_is_followed() {
    let stage = Stage::dev(Mode::Strict).await;
    let elsewhere = FakeIdp::start(Mode::Strict, &stage.daemon().canary);
    for (number, status) in [301, 302, 303, 307, 308].into_iter().enumerate() {
        let name = format!("r{status}");
        let user = row(&stage, &name).await;
        let to = if number % 2 == 0 { &elsewhere.url } else { &stage.idp.url };
        let location = vec![("Location", format!("{to}/token"))];
        stage.idp.script([Fault::Status(status, location, String::new())]);
        let before = (stage.idp.refreshes(), stage.idp.connections());
        ends_in(&stage, &user, -10);
        let found = outcome(&stage, &user, &name).await;
        assert!(is_one_of(&found, &[GENERAL, INVALID]), "{status}: {found:?}");
        assert_eq!((stage.idp.refreshes(), elsewhere.connections()), (before.0 + 1, 0), "{status}");
        assert!(stage.idp.connections() <= before.1 + 1, "{status}: followed at the same host");
    }
    stage.finish().await;
}

/// Without `loopback_http` no address of this machine or its networks is spoken to.
#[tokio::test]
async fn nothing_is_sent_to_where_no_provider_may_be() {
    let stage = Stage::closed().await;
    let ana = stage.user("ana").await;
    let ears = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = ears.local_addr().unwrap().port();
    // Allowed, and no resolver is asked: a label has 63 characters at most.
    let nowhere = format!("{}.example", "a".repeat(64));
    let places = [
        format!("https://127.0.0.1:{port}"),
        format!("http://127.0.0.1:{port}"),
        format!("https://0.0.0.0:{port}"),
        format!("https://[::1]:{port}"),
        format!("https://[::ffff:127.0.0.1]:{port}"),
        format!("https://2130706433:{port}"),
        format!("https://0177.0.0.1:{port}"),
        format!("https://0x7f.1:{port}"),
        format!("https://localhost:{port}"),
        format!("https://localhost.:{port}"),
        format!("https://user@127.0.0.1:{port}"),
        "https://169.254.169.254".to_owned(),
        "https://10.0.0.1".to_owned(),
        "https://192.168.0.1".to_owned(),
        "https://[fc00::1]".to_owned(),
        "https://[64:ff9b::7f00:1]".to_owned(),
        "file:///etc/passwd".to_owned(),
        format!("https://{nowhere}"),
    ];
    let (mut told, mut refused_at_once) = (Vec::new(), 0);
    for (number, place) in places.iter().enumerate() {
        let config = json!({
            "authorizationEndpoint": "https://idp.example/auth", "userInfoEndpoint": "https://idp.example/me",
            "tokenEndpoint": format!("{place}/token"), "clientId": "c", "clientSecret": stage.idp.client_secret,
            "tokenEndpointAuthMethod": "client_secret_basic", "tokenEndpointResponseType": "json",
        });
        let made = stage.try_connect("oauth2", &format!("t{number}"), config).await;
        if made.status() == StatusCode::BAD_REQUEST {
            refused_at_once += 1;
            continue;
        }
        let connector = text(&body(made, 200).await["id"]);
        let (record, _) = stage.begin(&ana, &connector, None).await;
        let answer = stage.verify(&ana, &record, "a-code").await;
        told.push((place, refused(answer, 400, "connector.general").await));
    }
    assert!(told.iter().any(|(place, _)| place.ends_with(".example")), "the one that is allowed was refused");
    assert!(
        told.iter().all(|(_, said)| said == &told[0].1),
        "which places there are can be learnt: {told:?}"
    );
    println!("{refused_at_once} of {} are no addresses for a connector", places.len());
    let heard = tokio::time::timeout(Duration::from_millis(200), ears.accept()).await;
    assert!(heard.is_err(), "a connection was made");
    stage.finish().await;
}
