//! The fake identity provider itself: what the other tests rest on.

use std::time::Duration;

use reqwest::{Client, Response};
use serde_json::{Value, json};

use crate::idp::{CLIENT, FakeIdp, Fault, Mode, Point};

const SCOPE: &str = "read write";

fn provider(mode: Mode) -> FakeIdp {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    FakeIdp::start(mode, "canary")
}

async fn ask(idp: &FakeIdp, form: &[(&str, &str)]) -> reqwest::Result<Response> {
    let client = Client::builder().timeout(Duration::from_secs(5)).build().unwrap();
    let request = client.post(format!("{}/token", idp.url)).basic_auth(CLIENT, Some(&idp.client_secret));
    request.form(form).send().await
}

async fn redeem(idp: &FakeIdp) -> Value {
    let code = idp.code("ana", SCOPE);
    ask(idp, &[("grant_type", "authorization_code"), ("code", &code)]).await.unwrap().json().await.unwrap()
}

async fn refresh(idp: &FakeIdp, token: &Value) -> Result<Value, String> {
    let form = [("grant_type", "refresh_token"), ("refresh_token", token.as_str().unwrap())];
    let body: Value = ask(idp, &form).await.unwrap().json().await.unwrap();
    body["error"].as_str().map_or(Ok(body.clone()), |error| Err(error.to_owned()))
}

#[tokio::test]
async fn a_strict_provider_ends_the_family_of_a_token_that_is_used_twice() {
    let idp = provider(Mode::Strict);
    let first = redeem(&idp).await;
    let other = redeem(&idp).await;

    let second = refresh(&idp, &first["refresh_token"]).await.unwrap();
    assert_ne!(second["refresh_token"], first["refresh_token"]);
    assert!(idp.is_live(second["access_token"].as_str().unwrap()));
    assert_eq!(refresh(&idp, &first["refresh_token"]).await, Err("invalid_grant".to_owned()));

    assert_eq!(refresh(&idp, &second["refresh_token"]).await, Err("invalid_grant".to_owned()));
    assert!(!idp.is_live(second["access_token"].as_str().unwrap()));
    assert!(refresh(&idp, &other["refresh_token"]).await.is_ok(), "another family");
    assert_eq!((idp.families_revoked(), idp.refreshes(), idp.most_uses()), (1, 4, 2));
    assert_eq!(idp.requests("authorization_code"), 2);
}

#[tokio::test]
async fn a_provider_with_grace_gives_the_same_answer_for_a_while() {
    let idp = provider(Mode::Grace(Duration::from_millis(300)));
    let first = redeem(&idp).await;

    let second = refresh(&idp, &first["refresh_token"]).await.unwrap();
    assert_eq!(refresh(&idp, &first["refresh_token"]).await.unwrap(), second);
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(refresh(&idp, &first["refresh_token"]).await, Err("invalid_grant".to_owned()));
    assert_eq!(idp.families_revoked(), 1);
}

#[tokio::test]
async fn a_provider_without_rotation_takes_one_token_for_ever() {
    let idp = provider(Mode::NonRotating);
    let first = redeem(&idp).await;
    for _ in 0..3 {
        let next = refresh(&idp, &first["refresh_token"]).await.unwrap();
        assert_eq!(next.get("refresh_token"), None);
    }
    assert_eq!((idp.families_revoked(), idp.most_uses()), (0, 3));
}

#[tokio::test]
async fn codes_and_clients_are_checked() {
    let idp = provider(Mode::Strict);
    let uri = format!(
        "{}/auth?response_type=code&client_id={CLIENT}&redirect_uri=http%3A%2F%2Fhere%2Fcb&state=s1&scope=a+b\
         &code_challenge_method=S256&code_challenge=E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM",
        idp.url
    );
    let grant = ("grant_type", "authorization_code");
    let place = ("redirect_uri", "http://here/cb");
    let verifier = ("code_verifier", "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
    for wrong in [vec![grant, place], vec![grant, verifier]] {
        let (code, _) = idp.authorize(&uri, "ana");
        let form = [wrong, vec![("code", code.as_str())]].concat();
        assert_eq!(ask(&idp, &form).await.unwrap().status(), 400);
    }
    let (code, state) = idp.authorize(&uri, "ana");
    let form = [grant, place, verifier, ("code", code.as_str())];
    let body: Value = ask(&idp, &form).await.unwrap().json().await.unwrap();
    assert_eq!((state.as_str(), &body["scope"]), ("s1", &json!("a b")));
    assert_eq!(idp.subject_of(body["access_token"].as_str().unwrap()).as_deref(), Some("ana"));
    assert_eq!(ask(&idp, &form).await.unwrap().status(), 400, "a code works once");

    let client = Client::new().post(format!("{}/token", idp.url)).basic_auth(CLIENT, Some("another"));
    assert_eq!(client.form(&[grant]).send().await.unwrap().status(), 401);
}

#[tokio::test]
async fn faults_come_in_their_order_and_pauses_hold() {
    let idp = provider(Mode::NonRotating);
    let token = redeem(&idp).await["refresh_token"].clone();
    let form = [("grant_type", "refresh_token"), ("refresh_token", token.as_str().unwrap())];
    idp.script([
        Fault::error(503, "temporarily_unavailable"),
        Fault::CloseBeforeAnswer,
        Fault::CloseAfter(20),
        Fault::without("scope"),
        Fault::with_raw("expires_in", "1e400"),
        Fault::QueryString,
    ]);
    assert_eq!(ask(&idp, &form).await.unwrap().status(), 503);
    assert!(ask(&idp, &form).await.is_err());
    assert!(ask(&idp, &form).await.is_err());
    assert_eq!(refresh(&idp, &token).await.unwrap().get("scope"), None);
    assert!(ask(&idp, &form).await.unwrap().text().await.unwrap().ends_with("\"expires_in\":1e400}"));
    assert!(ask(&idp, &form).await.unwrap().text().await.unwrap().starts_with("access_token=canary-at-"));
    assert_eq!(idp.forget_faults(), 0);

    for point in [Point::Received, Point::Decided, Point::HalfSent, Point::Sent] {
        idp.pause(point);
        let (answered, ()) = tokio::join!(ask(&idp, &form), async {
            idp.wait_for_request().await;
            idp.release();
        });
        answered.unwrap().json::<Value>().await.unwrap();
    }
    idp.pause(Point::HalfSent);
    let (answered, ()) = tokio::join!(async { ask(&idp, &form).await?.bytes().await }, async {
        idp.wait_for_request().await;
        idp.abandon();
    });
    assert!(answered.is_err());
}

#[tokio::test]
async fn connections_wait_while_it_does_not_accept() {
    let idp = provider(Mode::NonRotating);
    let token = redeem(&idp).await["refresh_token"].clone();
    let before = idp.connections();
    idp.stop_accepting().await;
    let waiting = async { refresh(&idp, &token).await };
    let early = tokio::time::timeout(Duration::from_millis(500), waiting).await;
    assert!(early.is_err() && idp.connections() == before, "a connection was made");
    idp.accept_again();
    assert!(refresh(&idp, &token).await.is_ok());
}
