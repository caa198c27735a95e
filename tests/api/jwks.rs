//! The public documents: what verifiers are told, in which order, and for how long they may keep it.

use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::daemon::TestDaemon;
use crate::stage::{Engine, Stage, on_both};

const JWKS: &str = "/oidc/jwks";
const ABOUT: &str = "/oidc/.well-known/openid-configuration";
const FRESH: &str = "no-cache, max-age=0, must-revalidate";

async fn get(daemon: &TestDaemon, path: &str) -> Response {
    daemon.anonymous(Method::GET, path).send().await.unwrap()
}

async fn json_of(daemon: &TestDaemon, path: &str) -> Value {
    get(daemon, path).await.json().await.unwrap()
}

async fn documents(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let daemon = &stage.daemon;
    let kinds =
        [(JWKS, "application/jwk-set+json; charset=utf-8"), (ABOUT, "application/json; charset=utf-8")];
    for (path, kind) in kinds {
        let answer = get(daemon, path).await;
        let headers = answer.headers().clone();
        assert_eq!(headers["Content-Type"], kind);
        assert_eq!(headers["Cache-Control"], FRESH);
        assert_eq!(headers["Access-Control-Allow-Origin"], "*");
        let (tag, text) = (headers["ETag"].clone(), answer.text().await.unwrap());

        let known = daemon.anonymous(Method::GET, path).header("If-None-Match", &tag).send().await.unwrap();
        assert_eq!((known.status(), &known.headers()["ETag"]), (StatusCode::NOT_MODIFIED, &tag));
        assert_eq!(known.headers()["Cache-Control"], FRESH);
        let head = daemon.anonymous(Method::HEAD, path).send().await.unwrap();
        assert_eq!((head.status(), &head.headers()["ETag"]), (StatusCode::OK, &tag));
        assert_eq!(head.headers()["Content-Length"], text.len().to_string());
        assert_eq!(head.text().await.unwrap(), "");
        let asked = daemon.anonymous(Method::OPTIONS, path).header("Origin", "https://a.test").send().await;
        assert_eq!(asked.unwrap().headers()["Access-Control-Allow-Origin"], "*");
        assert_eq!(daemon.anonymous(Method::POST, path).send().await.unwrap().status(), 405);
    }
    let about = json_of(daemon, ABOUT).await;
    let issuer = about["issuer"].as_str().unwrap();
    assert_eq!(about["jwks_uri"], format!("{issuer}/jwks"));
    assert_eq!(about["token_endpoint"], format!("{issuer}/token"));
    assert_eq!(about["id_token_signing_alg_values_supported"], json!(["ES256"]));
    assert!(about["scopes_supported"].as_array().unwrap().contains(&json!("all")));
    for absent in ["authorization_endpoint", "userinfo_endpoint", "registration_endpoint"] {
        assert_eq!(about.get(absent), None, "is not served");
    }
    stage.daemon.finish().await;
}
on_both!(the_documents_have_the_contracts_headers, documents);

async fn entries(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let rotate = "/api/configs/oidc/private-keys/rotate";
    for asked in [
        json!({ "signingKeyAlgorithm": "RSA" }),
        json!({ "signingKeyAlgorithm": "ES384", "rotationGracePeriod": 3600 }),
    ] {
        assert_eq!(api.post(rotate, &asked).await.status(), StatusCode::OK);
    }
    let document = get(daemon, JWKS).await.text().await.unwrap();
    let document: Value = serde_json::from_str(&document).unwrap();
    let keys = document["keys"].as_array().unwrap();
    let members = |key: &Value| key.as_object().unwrap().keys().map(ToString::to_string).collect::<Vec<_>>();
    // Current, Next, Previous.
    assert_eq!(members(&keys[0]), ["kty", "use", "kid", "e", "n"], "an RSA key names no algorithm");
    assert_eq!((&keys[0]["kty"], &keys[0]["e"]), (&json!("RSA"), &json!("AQAB")));
    for (key, alg, crv) in [(&keys[1], "ES384", "P-384"), (&keys[2], "ES256", "P-256")] {
        assert_eq!(members(key), ["kty", "use", "kid", "alg", "crv", "x", "y"]);
        assert_eq!(
            (&key["kty"], &key["use"], &key["alg"], &key["crv"]),
            (&json!("EC"), &json!("sig"), &json!(alg), &json!(crv))
        );
    }
    assert_eq!(keys.len(), 3);
    let about = json_of(daemon, ABOUT).await;
    assert_eq!(about["id_token_signing_alg_values_supported"], json!(["PS256", "RS256", "ES256", "ES384"]));
    stage.daemon.finish().await;
}
on_both!(entries_stand_in_the_contracts_order_and_form, entries);

async fn freshness(engine: Engine) {
    let stage = Stage::on(engine, "").await;
    let (daemon, api) = (&stage.daemon, stage.daemon.api().await);
    let asked =
        api.request(Method::PATCH, "/v1/signing-keys/jwt/policy").json(&json!({ "jwks_max_age": 300 }));
    assert_eq!(asked.send().await.unwrap().status(), StatusCode::OK);
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    for path in [JWKS, ABOUT] {
        let answer = get(daemon, path).await;
        assert_eq!(answer.headers()["Cache-Control"], "public, max-age=300, must-revalidate");
    }
    stage.daemon.finish().await;
}
on_both!(verifiers_may_keep_the_keys_as_long_as_the_policy_says, freshness);
