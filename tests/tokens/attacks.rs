//! Who stands between the person and the provider, or is the provider, gets nothing: answers of sign-ins (ID-11), metadata
//! and keys (ID-12), ID tokens, and another account in place of the linked one (ID-13).

use std::time::Duration;

use futures_util::future::join_all;
use reqwest::{Method, Response};
use serde_json::{Value, json};

use crate::idp::{FakeIdp, Mode};
use crate::sso::{begin, connect_to, link, linked, token_of, try_to_begin, verified, verify};
use crate::stage::{
    ACME, CALLBACK, Engine, Stage, USED, User, body, now, patch, path, put_token, refused, text, token_in,
    until,
};

const REFUSED: &str = "connector.authorization_failed";
const INVALID: &str = "connector.invalid_response";
const NOT_AS_ASKED: &str = "connector.invalid_request_parameters";
const NOT_THEIRS: &str = "user.identity_not_exists_in_current_user";

/// The codes of all refusals of that action, in their order.
async fn codes(stage: &Stage, action: &str) -> Vec<String> {
    let records = stage.records().await.into_iter();
    let refusals = records.filter(|record| record["action"] == action && record["type"] != "intent");
    refusals.filter_map(|record| record["outcome"]["code"].as_str().map(str::to_owned)).collect()
}

/// The newest of them; a refusal is written soon, and nobody waits for it.
async fn last_code(stage: &Stage, action: &str, number: usize) -> String {
    let are_there = async || codes(stage, action).await.len() >= number;
    until(&format!("record {number} of {action}"), Duration::from_secs(5), are_there).await;
    let codes = codes(stage, action).await;
    assert_eq!(codes.len(), number, "{codes:?}");
    codes[number - 1].clone()
}

/// Nothing of what was tried is kept.
fn nothing_is_stored(stage: &Stage, what: &str) {
    let verified = "SELECT id AS t FROM verification_records WHERE state = 'verified'";
    assert_eq!((stage.sets(), stage.ground.texts(verified)), (0, vec![]), "{what}");
}

/// Answers a sign-in with other members than those that came.
async fn answer(user: &User, family: &str, record: &str, data: Value) -> Response {
    let asked = json!({ "verificationRecordId": record, "connectorData": data });
    user.api.post(&format!("/api/verifications/{family}/verify"), &asked).await
}

#[tokio::test]
async fn an_answer_to_another_question_is_refused_and_the_log_says_why() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.user("ana").await, stage.user("ben").await);
    let good = |code: &str| json!({ "code": code, "state": "s-1", "redirectUri": CALLBACK });
    let with = |code: &str, member: &str, value: &str| {
        let mut data = good(code);
        data[member] = json!(value);
        data
    };
    let places = [
        format!("{CALLBACK}/"),
        format!("{CALLBACK}?a=b"),
        format!("{CALLBACK}#x"),
        CALLBACK.replace("http://", "https://"),
        CALLBACK.replace("127.0.0.1", "127.0.0.1."),
        CALLBACK.replace("127.0.0.1", "user@127.0.0.1"),
        CALLBACK.replace("callback", "Callback"),
        CALLBACK.replace("callback", "%63allback"),
        format!("{CALLBACK} "),
    ];
    let states = ["s-2", "S-1", "s-1 ", "s-1\0", "s"];
    let rows = states.into_iter().map(|state| ("state", state.to_owned(), "wrong-state"));
    let rows = rows.chain(places.into_iter().map(|place| ("redirectUri", place, "wrong-redirect-uri")));
    let mut number = 0;
    for (member, value, code) in rows {
        let (record, uri) = stage.begin(&ana, &stage.connector, None).await;
        let (brought, _) = stage.idp.authorize(&uri, "ana");
        let said = answer(&ana, "social", &record, with(&brought, member, &value)).await;
        refused(said, 400, NOT_AS_ASKED).await;
        number += 1;
        assert_eq!(last_code(&stage, "verification.verify", number).await, code, "{value}");
        // The sign-in has had its one answer: the right one comes too late.
        refused(stage.verify(&ana, &record, &brought).await, 400, USED).await;
        number += 1;
        assert_eq!(last_code(&stage, "verification.verify", number).await, "no-verification");
    }

    // Without them, by another person, of no sign-in, and when the provider said no.
    let (record, uri) = stage.begin(&ana, &stage.connector, None).await;
    let (brought, _) = stage.idp.authorize(&uri, "ana");
    for member in ["code", "state", "redirectUri"] {
        let said = answer(&ana, "social", &record, with(&brought, member, "")).await;
        refused(said, 400, "guard.invalid_input").await;
        number += 1;
        assert_eq!(last_code(&stage, "verification.verify", number).await, "invalid", "{member}");
    }
    for (user, id) in [(&ben, record.as_str()), (&ana, "000000000000000000000"), (&ana, "no id / \u{1f}")] {
        refused(answer(user, "social", id, good(&brought)).await, 400, USED).await;
        number += 1;
        assert_eq!(last_code(&stage, "verification.verify", number).await, "no-verification", "{id:?}");
    }
    let no = json!({ "error": "access_denied", "error_description": "<script>", "state": "s-1" });
    let said = refused(answer(&ana, "social", &record, no).await, 400, "connector.general").await;
    assert!(!said.to_string().contains("script"), "{said}");
    assert_eq!(last_code(&stage, "verification.verify", number + 1).await, "provider-policy");
    assert_eq!(stage.idp.requests("authorization_code"), 0, "a token request was sent");
    nothing_is_stored(&stage, "an answer to another question");

    // Of all that, the sign-in itself has noticed nothing; and its answer is good once.
    body(stage.verify(&ana, &record, &brought).await, 200).await;
    refused(stage.verify(&ana, &record, &brought).await, 400, USED).await;
    assert_eq!(stage.idp.requests("authorization_code"), 1, "replayed");
    stage.finish().await;
}

#[tokio::test]
async fn of_answers_that_come_at_once_one_is_taken() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.user("ana").await;
    for round in 1..=5 {
        let (record, uri) = stage.begin(&ana, &stage.connector, None).await;
        let (code, _) = stage.idp.authorize(&uri, "ana");
        let answers = join_all((0..8).map(|_| stage.verify(&ana, &record, &code))).await;
        let mut statuses: Vec<_> = answers.iter().map(|answer| answer.status().as_u16()).collect();
        statuses.sort_unstable();
        assert_eq!(statuses, [200, 400, 400, 400, 400, 400, 400, 400]);
        assert_eq!(stage.idp.requests("authorization_code"), round, "a code was redeemed twice");
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_code_of_another_session_is_worth_nothing() {
    let stage = Stage::dev(Mode::Strict).await;
    let enterprise = connect_to(&stage, &stage.idp).await;
    let (ana, eve) = (stage.user("ana").await, stage.user("eve").await);
    // Eve's code in Ana's sign-in: Ana would be linked to Eve's account. The other way round Eve would be Ana.
    for (whose, into) in [(&eve, &ana), (&ana, &eve)] {
        let (_, theirs) = stage.begin(whose, &stage.connector, None).await;
        let (record, _) = stage.begin(into, &stage.connector, None).await;
        let (code, _) = stage.idp.authorize(&theirs, "whose");
        let said = stage.verify(into, &record, &code).await;
        refused(said, 401, "connector.social_auth_code_invalid").await;

        let (_, theirs) = begin(whose, &enterprise).await;
        let (record, _) = begin(into, &enterprise).await;
        let (code, _) = stage.idp.authorize(&theirs, "whose");
        refused(verify(into, &record, &code, &json!({})).await, 401, REFUSED).await;
        nothing_is_stored(&stage, "a code of another session");
    }
    // PKCE taken out of the way there: the verifier comes nevertheless, and the provider did not expect one.
    let (record, uri) = begin(&ana, &enterprise).await;
    let bare: Vec<_> = uri.split('&').filter(|part| !part.starts_with("code_challenge")).collect();
    assert_ne!(bare.join("&"), uri, "no PKCE: {uri}");
    let (code, _) = stage.idp.authorize(&bare.join("&"), "ana");
    refused(verify(&ana, &record, &code, &json!({})).await, 401, REFUSED).await;
    // A code of one connector in the sign-in of the other, at the same provider.
    let (_, social) = stage.begin(&ana, &stage.connector, None).await;
    let (record, _) = begin(&ana, &enterprise).await;
    let (code, _) = stage.idp.authorize(&social, "ana");
    refused(verify(&ana, &record, &code, &json!({})).await, 401, REFUSED).await;
    nothing_is_stored(&stage, "a code of another connector");
    last_code(&stage, "verification.verify", 6).await;
    assert_eq!(codes(&stage, "verification.verify").await, vec!["provider-grant"; 6]);
    stage.finish().await;
}

#[tokio::test]
async fn an_answer_says_of_whom_it_is_where_that_was_promised() {
    let stage = Stage::dev(Mode::Strict).await;
    let (silent, frank) = (FakeIdp::start(Mode::Strict, &stage.daemon().canary), &stage.idp);
    frank.say("authorization_response_iss_parameter_supported", json!(true));
    let ana = stage.user("ana").await;
    let mut number = 0;
    for (idp, is_promised) in [(frank, true), (&silent, false)] {
        let connector = connect_to(&stage, idp).await;
        let other = json!({ "iss": format!("{}/", idp.url) });
        let mixed_up = json!({ "iss": if is_promised { &silent.url } else { &frank.url } });
        for more in [json!({}), json!({ "iss": "" }), json!({ "iss": 7 }), other, mixed_up] {
            let is_silent = more.get("iss").and_then(Value::as_str).unwrap_or_default().is_empty();
            if is_silent && !is_promised {
                continue;
            }
            let before = idp.requests("authorization_code");
            let (record, uri) = begin(&ana, &connector).await;
            let (code, _) = idp.authorize(&uri, "ana");
            refused(verify(&ana, &record, &code, &more).await, 400, NOT_AS_ASKED).await;
            number += 1;
            assert_eq!(last_code(&stage, "verification.verify", number).await, "wrong-issuer", "{more}");
            assert_eq!(idp.requests("authorization_code"), before, "{more}: a token request was sent");
        }
        let (record, uri) = begin(&ana, &connector).await;
        let (code, _) = idp.authorize(&uri, "ana");
        let right = if is_promised { json!({ "iss": idp.url }) } else { json!({}) };
        body(verify(&ana, &record, &code, &right).await, 200).await;
    }
    // A social connector that knows its issuer compares it too.
    let mut config = stage.config();
    config["idTokenVerificationConfig"] =
        json!({ "jwksUri": format!("{}/jwks", frank.url), "issuer": frank.url });
    let connector = stage.connect_with("oidc", "open", config).await;
    let (record, uri) = stage.begin(&ana, &connector, None).await;
    let (code, _) = frank.authorize(&uri, "ana");
    let data = json!({ "code": code, "state": "s-1", "redirectUri": CALLBACK, "iss": silent.url });
    refused(answer(&ana, "social", &record, data).await, 400, NOT_AS_ASKED).await;
    stage.finish().await;
}

#[tokio::test]
async fn a_sign_in_that_took_too_long_is_over_and_purged() {
    let more = "[tokens]\nverification_lifetime = \"10s\"\n";
    let stage = Stage::serve(Engine::Sqlite, Mode::Strict, more).await;
    let password = stage.daemon().secret("Pass-word-1");
    let asked = json!({ "username": "ana", "password": password });
    let id = text(&body(stage.admin.post("/api/users", &asked).await, 200).await["id"]);
    let ana = User { api: stage.session(&id, "openid identities").await, id };
    let proof =
        body(ana.api.post("/api/verifications/password", &json!({ "password": password })).await, 201);
    let proof = text(&proof.await["verificationRecordId"]);
    let (pending, uri) = stage.begin(&ana, &stage.connector, None).await;
    let (code, _) = stage.idp.authorize(&uri, "ana");
    let parked = stage.verified(&ana, "ana", None).await;
    let rows = || stage.ground.texts("SELECT id AS t FROM verification_records").len();
    let sealed =
        || stage.ground.texts("SELECT kind AS t FROM secret_versions WHERE kind = 'verification'").len();
    assert_eq!((rows(), sealed()), (3, 3));

    // Over at its end, whether it was purged or not.
    let late = now() * 1_000_000 - 1;
    stage.ground.run(&format!("UPDATE verification_records SET expires_at = {late} WHERE id = '{pending}'"));
    refused(stage.verify(&ana, &pending, &code).await, 400, USED).await;
    assert_eq!(last_code(&stage, "verification.verify", 1).await, "no-verification");
    until("the purge", Duration::from_secs(30), async || (rows(), sealed()) == (0, 0)).await;
    let link = ana.api.request(Method::POST, "/api/my-account/identities");
    let link = link.json(&json!({ "newIdentifierVerificationRecordId": parked }));
    let said = link.header("logto-verification-id", &proof).send().await.unwrap();
    refused(said, 401, "verification_record.permission_denied").await;
    refused(stage.verify(&ana, &parked, &code).await, 400, USED).await;
    refused(put_token(&ana, ACME, &parked).send().await.unwrap(), 400, USED).await;
    assert_eq!((stage.idp.requests("authorization_code"), stage.sets()), (1, 0));
    stage.finish().await;
}

#[tokio::test]
async fn metadata_of_another_issuer_or_that_lead_elsewhere_are_not_followed() {
    let stage = Stage::dev(Mode::Strict).await;
    // Another host, for all that anybody but the kernel knows.
    let elsewhere = std::net::TcpListener::bind("127.0.0.2:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let there = format!("http://{}", elsewhere.local_addr().unwrap());
    let ana = stage.user("ana").await;
    let rows: [(&str, Value); 12] = [
        ("issuer", json!("https://login.example.com")),
        ("issuer", json!(format!("{there}/"))),
        ("issuer", Value::Null),
        ("issuer", json!([stage.idp.url])),
        ("token_endpoint", json!(format!("{there}/token"))),
        ("jwks_uri", json!(format!("{there}/jwks"))),
        ("authorization_endpoint", json!(format!("{there}/auth"))),
        ("userinfo_endpoint", json!(format!("{there}/userinfo"))),
        ("revocation_endpoint", json!(format!("{there}/revoke"))),
        ("token_endpoint", json!("http://169.254.169.254/token")),
        ("jwks_uri", json!("file:///etc/passwd")),
        ("token_endpoint", Value::Null),
    ];
    for (member, value) in rows {
        // Metadata are believed for a while, so each row has a provider of its own.
        let idp = FakeIdp::start(Mode::Strict, &stage.daemon().canary);
        let connector = connect_to(&stage, &idp).await;
        idp.say(member, value.clone());
        let answer = try_to_begin(&ana, &connector).await;
        // What is no metadata at all is an answer that nobody can read.
        let (status, code) = match (member, &value) {
            ("token_endpoint", Value::Null) | (_, Value::Array(_)) => (400, INVALID),
            _ => (401, REFUSED),
        };
        refused(answer, status, code).await;
        assert_eq!((idp.fetched("/jwks"), idp.requests("authorization_code")), (0, 0), "{member} {value}");
    }
    assert_eq!(elsewhere.accept().err().map(|error| error.kind()), Some(std::io::ErrorKind::WouldBlock));
    nothing_is_stored(&stage, "metadata");
    stage.finish().await;
}

#[tokio::test]
async fn a_refresh_token_does_not_follow_metadata_that_lead_elsewhere_now() {
    let mut stage = Stage::serve(Engine::Sqlite, Mode::Strict, "").await;
    let elsewhere = FakeIdp::start(Mode::Strict, &stage.daemon().canary);
    let there = elsewhere.url.replace("127.0.0.1", "localhost");
    let connector = connect_to(&stage, &stage.idp).await;
    let ana = linked(&stage, &stage.idp, &connector, "ana").await;
    let token = token_in(ana.api.get(&token_of(&connector)).await).await;
    for (member, value) in [("token_endpoint", format!("{there}/token")), ("issuer", there.clone())] {
        stage.idp.say_the_truth();
        stage.idp.say(member, json!(value));
        // What it knew of the provider it has forgotten.
        stage.ground.daemon.restart().await;
        stage.ground.run("UPDATE token_sets SET retry_at = 0");
        stage.ends_in(30);
        assert_eq!(token_in(ana.api.get(&token_of(&connector)).await).await, token, "{member}");
        stage.expire();
        refused(ana.api.get(&token_of(&connector)).await, 401, REFUSED).await;
        assert_eq!((elsewhere.connections(), stage.idp.refreshes()), (0, 0), "{member}");
    }
    stage.idp.say_the_truth();
    stage.ground.run("UPDATE token_sets SET retry_at = 0");
    assert!(stage.idp.is_live(&token_in(ana.api.get(&token_of(&connector)).await).await));
    stage.finish().await;
}

#[tokio::test]
async fn a_connector_that_is_moved_to_another_provider_takes_no_tokens_there() {
    let stage = Stage::dev(Mode::Strict).await;
    let other = FakeIdp::start(Mode::Strict, &stage.daemon().canary);
    let connector = connect_to(&stage, &stage.idp).await;
    let ana = linked(&stage, &stage.idp, &connector, "ana").await;
    let at = format!("/api/sso-connectors/{connector}");
    let shown = body(stage.admin.get(&at).await, 200).await;
    // With the client's secret masked it does not move at all.
    let mut config = shown["config"].clone();
    config["issuer"] = json!(other.url);
    let moved = stage.admin.request(Method::PATCH, &at).json(&json!({ "config": config }));
    refused(moved.send().await.unwrap(), 400, "guard.invalid_input").await;
    config["clientSecret"] = json!(other.client_secret);
    patch(&stage.admin, &at, &json!({ "config": config })).await;

    stage.expire();
    refused(ana.api.get(&token_of(&connector)).await, 401, REFUSED).await;
    // Who has the same name there is another account.
    let record = verified(&other, &ana, &connector, "ana").await;
    let asked = json!({ "verificationRecordId": record });
    let answer = ana.api.request(Method::PUT, &token_of(&connector)).json(&asked).send().await.unwrap();
    refused(answer, 422, NOT_THEIRS).await;
    assert_eq!((other.refreshes(), other.revocations().len()), (0, 0), "a token was sent elsewhere");
    // Neither does a deletion tell it one.
    assert_eq!(ana.api.delete(&format!("/api/my-account/sso-identities/{connector}")).await.status(), 204);
    // Its own tokens are another set, of another account.
    let record = verified(&other, &ana, &connector, "ana").await;
    assert_eq!(link(&ana, &record).await.status(), 204);
    assert!(other.is_live(&token_in(ana.api.get(&token_of(&connector)).await).await));
    assert_eq!((other.refreshes(), other.revocations().len()), (0, 0), "a token was sent elsewhere");
    stage.finish().await;
}

#[tokio::test]
async fn another_account_does_not_take_the_linked_ones_place() {
    let stage = Stage::dev(Mode::Strict).await;
    let enterprise = connect_to(&stage, &stage.idp).await;
    let ana = linked(&stage, &stage.idp, &enterprise, "ana").await;
    let record = stage.verified(&ana, "ana", None).await;
    assert_eq!(stage.link(&ana, &record).await.status(), 204);
    let social = path(ACME);
    let kept = [stage.token(&ana).await, token_in(ana.api.get(&token_of(&enterprise)).await).await];
    let sets = "SELECT id || identity_id || CAST(version AS TEXT) AS t FROM token_sets ORDER BY id";
    let before = stage.ground.texts(sets);

    // Nearly the same is another account too.
    for other in ["somebody-else", "Ana", "ana.", "an"] {
        for method in [Method::PUT, Method::PATCH] {
            let records = [
                (social.clone(), stage.verified(&ana, other, None).await),
                (token_of(&enterprise), verified(&stage.idp, &ana, &enterprise, other).await),
            ];
            for (at, record) in records {
                let asked = json!({ "verificationRecordId": record });
                let answer = ana.api.request(method.clone(), &at).json(&asked).send().await.unwrap();
                refused(answer, 422, NOT_THEIRS).await;
            }
        }
        let record = verified(&stage.idp, &ana, &enterprise, other).await;
        refused(link(&ana, &record).await, 400, "user.identity_already_in_use").await;
        let record = stage.verified(&ana, other, None).await;
        refused(stage.link(&ana, &record).await, 400, "user.identity_already_in_use").await;
    }
    assert_eq!(stage.ground.texts(sets), before, "a set was written over");
    assert_eq!(stage.token(&ana).await, kept[0]);
    assert_eq!(token_in(ana.api.get(&token_of(&enterprise)).await).await, kept[1]);
    last_code(&stage, "token-set.store", 16).await;
    assert_eq!(codes(&stage, "token-set.store").await, vec!["wrong-identity"; 16]);
    // Nor does somebody else get the account, by another connector to the same provider neither.
    let eve = stage.user("eve").await;
    let second = connect_to(&stage, &stage.idp).await;
    for connector in [&second, &enterprise] {
        let record = verified(&stage.idp, &eve, connector, "ana").await;
        refused(link(&eve, &record).await, 422, "user.identity_already_in_use").await;
    }
    let record = verified(&stage.idp, &eve, &enterprise, "ana").await;
    let renewed = json!({ "verificationRecordId": record });
    let answer = eve.api.request(Method::PUT, &token_of(&enterprise)).json(&renewed).send().await.unwrap();
    refused(answer, 422, NOT_THEIRS).await;
    // The refresh of the old set works as ever, and its own account is taken.
    stage.expire();
    assert!(stage.idp.is_live(&stage.token(&ana).await));
    let record = verified(&stage.idp, &ana, &enterprise, "ana").await;
    let renewed = json!({ "verificationRecordId": record });
    let answer = ana.api.request(Method::PUT, &token_of(&enterprise)).json(&renewed).send().await.unwrap();
    assert!(stage.idp.is_live(&token_in(answer).await));
    stage.finish().await;
}
