//! How applications come to a token without its user: by impersonation (contract, section 4.4), by exchanging the
//! user's own token for the provider's (RFC 8693), and by a machine's right to read. All three are on the record.

use reqwest::Response;
use serde_json::{Value, json};

use crate::daemon::Api;
use crate::idp::{Fault, Mode};
use crate::stage::{ACME, App, Stage, body, refused, text};

const EXCHANGE: &str = "urn:ietf:params:oauth:grant-type:token-exchange";
const ACCESS_TOKEN: &str = "urn:ietf:params:oauth:token-type:access_token";
const THIRD_PARTY: &str = "urn:lacre:params:oauth:token-type:third-party-access-token";
const READ: &str = "/v1/token-sets/access-token";
const REASON: &str = "sync of the calendar";

/// An application with those scopes.
async fn app(stage: &Stage, scopes: &[&str], exchanges: bool) -> App {
    // Who reads by itself is a machine; who exchanges acts for a user.
    let kind = if exchanges { "traditional" } else { "machine" };
    let asked = json!({ "name": "agent", "kind": kind, "scopes": scopes, "allow_token_exchange": exchanges });
    let made = body(stage.admin.post("/v1/apps", &asked).await, 201).await;
    App { id: text(&made["client_id"]), secret: text(&made["client_secret"]) }
}

async fn machine(stage: &Stage, scopes: &[&str]) -> Api {
    let app = app(stage, scopes, false).await;
    stage.daemon().api_of(&stage.daemon().token_of(&app.id, &app.secret, "all").await)
}

/// Asks for a provider's token with the user's own.
async fn third_party(stage: &Stage, app: &App, token: &str, more: &[(&str, &str)]) -> Response {
    let form = [
        ("grant_type", EXCHANGE),
        ("subject_token", token),
        ("subject_token_type", ACCESS_TOKEN),
        ("requested_token_type", THIRD_PARTY),
        ("reason", REASON),
    ];
    stage.ask(app, &[&form[..], more].concat()).await
}

/// An error of the token endpoint; its name.
async fn oauth_error(answer: Response) -> String {
    assert_eq!(answer.headers()["Cache-Control"], "no-store");
    let (status, body) = (answer.status().as_u16(), answer.json::<Value>().await.unwrap());
    assert!([400, 401, 403, 404].contains(&status), "{status}: {body}");
    assert_eq!(body.get("access_token"), None, "{body}");
    text(&body["error"])
}

/// The records that have the reason.
async fn reasons(stage: &Stage) -> Vec<Value> {
    stage.records().await.into_iter().filter(|record| record.to_string().contains(REASON)).collect()
}

#[tokio::test]
async fn a_subject_token_stands_for_its_user_once() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let made = stage.admin.post("/api/subject-tokens", &json!({ "userId": ana.id })).await;
    let made = body(made, 201).await;
    assert_eq!(made["expiresIn"], 600);
    let subject = text(&made["subjectToken"]);
    stage.daemon().hide(&subject);
    assert!(subject.starts_with("sub_"));

    let first = body(stage.exchange(&stage.app, &subject, "openid identities").await, 200).await;
    assert_eq!(
        (first["token_type"].as_str(), first["scope"].as_str()),
        (Some("Bearer"), Some("openid identities"))
    );
    assert!(first["expires_in"].as_u64().unwrap() > 0);
    stage.daemon().hide(&text(&first["access_token"]));
    assert_eq!(first.get("refresh_token"), None);
    let user = stage.daemon().api_of(&text(&first["access_token"]));
    assert_eq!(user.get(&crate::stage::path(ACME)).await.status(), 200);
    assert_eq!(oauth_error(stage.exchange(&stage.app, &subject, "openid").await).await, "invalid_grant");

    let nobody = stage.admin.post("/api/subject-tokens", &json!({ "userId": "000000000000" })).await;
    refused(nobody, 404, "entity.not_found").await;
    for bad in [json!({}), json!({ "userId": 7 })] {
        refused(stage.admin.post("/api/subject-tokens", &bad).await, 400, "guard.invalid_input").await;
    }
    stage.finish().await;
}

#[tokio::test]
async fn two_exchanges_of_one_subject_token_at_once_have_one_winner() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.user("ana").await;
    for _ in 0..5 {
        let subject = stage.subject_token(&ana.id).await;
        let all = (0..8).map(|_| stage.exchange(&stage.app, &subject, "openid"));
        let answers = futures_util::future::join_all(all).await;
        assert_eq!(answers.iter().filter(|answer| answer.status() == 200).count(), 1);
        for answer in answers.into_iter().filter(|answer| answer.status() == 200) {
            stage.daemon().hide(&text(&body(answer, 200).await["access_token"]));
        }
    }
    stage.finish().await;
}

#[tokio::test]
async fn a_subject_token_is_worth_nothing_to_another_kind_of_application_or_altered() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.user("ana").await;
    let subject = stage.subject_token(&ana.id).await;
    let plain = app(&stage, &[], false).await;
    let error = oauth_error(stage.exchange(&plain, &subject, "openid").await).await;
    assert!(["unauthorized_client", "invalid_client"].contains(&error.as_str()), "{error}");
    let unknown = App { id: stage.app.id.clone(), secret: "another".to_owned() };
    assert_eq!(oauth_error(stage.exchange(&unknown, &subject, "openid").await).await, "invalid_client");
    let altered = format!("{}x", &subject[..subject.len() - 1]);
    for wrong in [altered.as_str(), "sub_", "", ana.api.token.as_str()] {
        let error = oauth_error(stage.exchange(&stage.app, wrong, "openid").await).await;
        assert!(["invalid_grant", "invalid_request"].contains(&error.as_str()), "{wrong}: {error}");
    }
    // It was not spent by those who might not use it.
    let good = body(stage.exchange(&stage.app, &subject, "openid").await, 200).await;
    stage.daemon().hide(&text(&good["access_token"]));

    // Whoever writes to the database neither ends it earlier without being noticed nor gives it a longer life.
    for end in ["1", "expires_at + 86400000000"] {
        let written = stage.subject_token(&ana.id).await;
        stage.ground.run(&format!("UPDATE user_tokens SET expires_at = {end} WHERE kind = 'subject'"));
        assert_ne!(stage.exchange(&stage.app, &written, "openid").await.status(), 200, "{end}");
    }
    // A user who is gone is not stood for.
    let last = stage.subject_token(&ana.id).await;
    assert_eq!(stage.admin.delete(&format!("/api/users/{}", ana.id)).await.status(), 204);
    assert_eq!(oauth_error(stage.exchange(&stage.app, &last, "openid").await).await, "invalid_grant");
    stage.finish().await;
}

#[tokio::test]
async fn a_users_token_is_exchanged_for_the_providers_on_the_record() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.linked("ana").await, stage.user("ben").await);
    let agent = app(&stage, &["token-sets:exchange"], true).await;
    let stored = stage.token(&ana).await;
    for name in ["audience", "connection"] {
        let answer = third_party(&stage, &agent, &ana.api.token, &[(name, ACME)]).await;
        assert_eq!(answer.headers()["Cache-Control"], "no-store");
        let given = body(answer, 200).await;
        assert_eq!(given["access_token"], stored.as_str(), "{name}");
        assert_eq!(given["issued_token_type"], THIRD_PARTY);
        assert!(text(&given["token_type"]).eq_ignore_ascii_case("bearer"), "{given}");
        assert!((3500..=3600).contains(&given["expires_in"].as_i64().unwrap()), "{given}");
        assert_eq!(given["scope"], crate::stage::SCOPE);
        assert_eq!((given.get("refresh_token"), given.get("id_token")), (None, None));
    }
    let recorded = reasons(&stage).await;
    assert!(recorded.len() >= 2, "{recorded:?}");
    assert!(recorded.iter().all(|record| record.to_string().contains(&agent.id)), "by whom: {recorded:?}");

    // The same refresh as for everybody else.
    stage.expire();
    let given = body(third_party(&stage, &agent, &ana.api.token, &[("audience", ACME)]).await, 200).await;
    assert_eq!(given["access_token"], stage.token(&ana).await.as_str());
    assert_eq!(stage.idp.refreshes(), 1);

    let known = oauth_error(third_party(&stage, &agent, &ben.api.token, &[("audience", ACME)]).await).await;
    let unknown =
        oauth_error(third_party(&stage, &agent, &ben.api.token, &[("audience", "nothing")]).await).await;
    assert_eq!(known, unknown, "which connectors there are can be learnt");
    oauth_error(third_party(&stage, &agent, &ana.api.token, &[]).await).await;
    for wrong in ["nonsense", stage.admin.token.as_str()] {
        oauth_error(third_party(&stage, &agent, wrong, &[("audience", ACME)]).await).await;
    }
    let bare = stage.session(&ana.id, "openid").await;
    oauth_error(third_party(&stage, &agent, &bare.token, &[("audience", ACME)]).await).await;
    stage.finish().await;
}

#[tokio::test]
async fn a_machine_reads_a_users_token_for_a_reason_on_the_record() {
    let stage = Stage::dev(Mode::Strict).await;
    let (ana, ben) = (stage.linked("ana").await, stage.user("ben").await);
    let machine = machine(&stage, &["token-sets:read"]).await;
    let asked =
        |user: &str, connection: &str| json!({ "user_id": user, "connection": connection, "reason": REASON });
    let answer = machine.post(READ, &asked(&ana.id, ACME)).await;
    assert_eq!(answer.headers()["Cache-Control"], "no-store");
    let given = body(answer, 200).await;
    assert_eq!(given["access_token"], stage.token(&ana).await.as_str());
    assert_eq!((given.get("refresh_token"), given.get("id_token")), (None, None));
    let recorded = reasons(&stage).await;
    assert!(recorded.iter().any(|record| record.to_string().contains(&ana.id)), "whose: {recorded:?}");

    for member in ["user_id", "connection", "reason"] {
        let mut without = asked(&ana.id, ACME);
        without.as_object_mut().unwrap().remove(member);
        assert_eq!(machine.post(READ, &without).await.status(), 422, "without {member}");
        without[member] = json!("");
        // No user and no connection is called that.
        let status = if member == "reason" { 422 } else { 404 };
        assert_eq!(machine.post(READ, &without).await.status(), status, "with an empty {member}");
    }
    // A user who has nothing, one who is not there, a connection that is not there.
    let mut answers = Vec::new();
    for (user, connection) in [(ben.id.as_str(), ACME), ("000000000000", ACME), (ana.id.as_str(), "nothing")]
    {
        let request = machine.request(reqwest::Method::POST, READ).header("X-Request-Id", "the-same");
        answers.push(body(request.json(&asked(user, connection)).send().await.unwrap(), 404).await);
    }
    assert!(answers.iter().all(|answer| answer == &answers[0]), "who is there can be learnt: {answers:?}");

    stage.idp.script([Fault::error(400, "invalid_grant")]);
    stage.expire();
    let gone = machine.post(READ, &asked(&ana.id, ACME)).await;
    assert!(gone.status().is_client_error(), "{}", gone.text().await.unwrap());
    assert_eq!(stage.idp.refreshes(), 1);
    stage.finish().await;
}

#[tokio::test]
async fn no_other_right_opens_a_set() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.linked("ana").await;
    let asked = json!({ "user_id": ana.id, "connection": ACME, "reason": REASON });
    let others =
        ["secrets:metadata", "secrets:read", "audit:read", "apps:admin", "keys:admin", "token-sets:exchange"];
    for scope in others {
        let machine = machine(&stage, &[scope]).await;
        assert_eq!(machine.post(READ, &asked).await.status(), 403, "{scope}");
        let app = app(&stage, &[scope], true).await;
        if scope != "token-sets:exchange" {
            let error =
                oauth_error(third_party(&stage, &app, &ana.api.token, &[("audience", ACME)]).await).await;
            assert!(
                ["unauthorized_client", "invalid_scope", "access_denied"].contains(&error.as_str()),
                "{error}"
            );
        }
    }
    // The right without the switch, and the switch with the right to read.
    for (scope, exchanges) in [("token-sets:exchange", false), ("token-sets:read", true)] {
        let app = app(&stage, &[scope], exchanges).await;
        oauth_error(third_party(&stage, &app, &ana.api.token, &[("audience", ACME)]).await).await;
    }
    // A user's own token is no machine's.
    assert_eq!(ana.api.post(READ, &asked).await.status(), 401);
    let nobody = stage.daemon().anonymous(reqwest::Method::POST, READ).json(&asked).send().await.unwrap();
    assert_eq!(nobody.status(), 401);

    // Neither is a set read as a secret of the vault, whatever it is kept in.
    let list = body(stage.admin.get("/v1/secrets?limit=200").await, 200).await;
    assert_eq!(list["items"], json!([]), "sets are among the secrets");
    let id = text(&stage.metadata(&ana, ACME).await["id"]);
    for id in stage.ground.texts("SELECT id AS t FROM secrets").into_iter().chain([id]) {
        let value = stage.admin.get(&format!("/v1/secrets/{id}/value")).await;
        assert_eq!(value.status(), 404, "{}", value.text().await.unwrap());
        assert_eq!(stage.admin.delete(&format!("/v1/secrets/{id}")).await.status(), 404);
    }
    assert_eq!(stage.idp.refreshes(), 0);
    stage.finish().await;
}
