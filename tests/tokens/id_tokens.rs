//! ID tokens that are not what they should be, and keys that none may be checked with (ID-12): each is refused, nothing is
//! kept of what came with it, and the next good one is taken.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::idp::{CLIENT, FakeIdp, Fault, Mode, id_token};
use crate::sso::{begin, connect_to, link, token_of, verified, verify};
use crate::stage::{Stage, USED, User, now, refused, text, token_in};

const INVALID: &str = "connector.invalid_response";

/// Header and claims of a good ID token, to be spoilt.
struct Token {
    header: Value,
    claims: Value,
}

/// How one is spoilt: what is sent in its place, if anything.
type Spoil = Box<dyn Fn(Token) -> Option<String> + Send>;

fn claim(name: &'static str, value: Value) -> Spoil {
    Box::new(move |mut token| {
        token.claims[name] = value.clone();
        Some(id_token(&token.header, &token.claims, true))
    })
}

fn without(name: &'static str) -> Spoil {
    Box::new(move |mut token| {
        token.claims.as_object_mut().unwrap().remove(name);
        Some(id_token(&token.header, &token.claims, true))
    })
}

fn header(name: &'static str, value: Value) -> Spoil {
    Box::new(move |mut token| {
        token.header[name] = value.clone();
        Some(id_token(&token.header, &token.claims, true))
    })
}

fn encoded(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn unsigned(alg: &'static str) -> Spoil {
    Box::new(move |mut token| {
        token.header["alg"] = json!(alg);
        Some(format!("{}.{}.", encoded(&token.header), encoded(&token.claims)))
    })
}

/// HMAC with what others know too as its key.
fn by_hmac(secret: Vec<u8>) -> Spoil {
    Box::new(move |mut token| {
        token.header["alg"] = json!("HS256");
        let input = format!("{}.{}", encoded(&token.header), encoded(&token.claims));
        let key = jsonwebtoken::EncodingKey::from_secret(&secret);
        let mac = jsonwebtoken::crypto::sign(input.as_bytes(), &key, jsonwebtoken::Algorithm::HS256);
        Some(format!("{input}.{}", mac.unwrap()))
    })
}

fn spoilt(idp: &FakeIdp) -> Vec<(&'static str, Spoil)> {
    let key = idp.key();
    let point = URL_SAFE_NO_PAD.decode(text(&key["x"])).unwrap();
    let brought = key.clone();
    vec![
        ("absent", Box::new(|_| None)),
        ("another's nonce", claim("nonce", json!("n-2"))),
        ("no nonce", without("nonce")),
        ("for another client", claim("aud", json!("another-client"))),
        ("for several, by nobody", claim("aud", json!([CLIENT, "another-client"]))),
        ("for nobody", without("aud")),
        ("of another issuer", claim("iss", json!("https://login.example.com"))),
        ("of nearly the issuer", claim("iss", json!(format!("{}/", idp.url)))),
        ("of no issuer", without("iss")),
        ("expired", claim("exp", json!(now() - 3600))),
        ("without end", without("exp")),
        ("with an end in words", claim("exp", json!((now() + 600).to_string()))),
        ("of tomorrow", claim("iat", json!(now() + 86_400))),
        ("not yet valid", claim("nbf", json!(now() + 86_400))),
        ("of an empty subject", claim("sub", json!(""))),
        ("of another subject than userinfo", claim("sub", json!("somebody-else"))),
        ("of a number", claim("sub", json!(7))),
        ("unsigned", unsigned("none")),
        ("unsigned, loudly", unsigned("NONE")),
        ("by HMAC with the public key", by_hmac(key.to_string().into_bytes())),
        ("by HMAC with its point", by_hmac(point)),
        ("by HMAC with the client's secret", by_hmac(idp.client_secret.clone().into_bytes())),
        ("by another key", Box::new(|token| Some(id_token(&token.header, &token.claims, false)))),
        (
            "by a key that it brings along",
            Box::new(move |mut token| {
                token.header["jwk"] = brought.clone();
                Some(id_token(&token.header, &token.claims, false))
            }),
        ),
        ("by a key that is not there", header("kid", json!("fake-2"))),
        ("with a condition", header("crit", json!(["exp"]))),
        ("by the name of another algorithm", header("alg", json!("RS256"))),
        ("no JWS", Box::new(|_| Some("one.two".to_owned()))),
    ]
}

/// Changes the ID token of an answer so.
fn with(spoil: Spoil) -> Fault {
    Fault::Edit(Box::new(move |answer| {
        let made = text(&answer["id_token"]);
        let part = |at: usize| -> Value {
            let part = made.split('.').nth(at).unwrap();
            serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).unwrap()).unwrap()
        };
        match spoil(Token { header: part(0), claims: part(1) }) {
            Some(token) => answer["id_token"] = json!(token),
            None => drop(answer.as_object_mut().unwrap().remove("id_token")),
        }
    }))
}

/// Comes back from the provider and is refused; nothing is left of it.
async fn comes_to_nothing(stage: &Stage, idp: &FakeIdp, (user, connector): (&User, &str), what: &str) {
    let (record, uri) = begin(user, connector).await;
    let (code, _) = idp.authorize(&uri, "ana");
    let answer = verify(user, &record, &code, &json!({})).await;
    assert_eq!(answer.status(), 400, "{what}");
    let said = refused(answer, 400, INVALID).await;
    assert!(!said.to_string().contains(&stage.daemon().canary), "{what}: {said}");
    refused(link(user, &record).await, 400, USED).await;
    let kept = "SELECT state AS t FROM verification_records WHERE state = 'verified'";
    assert_eq!((stage.sets(), stage.ground.texts(kept).len()), (0, 0), "{what}");
}

#[tokio::test]
async fn an_id_token_that_is_not_what_was_asked_for_links_nothing() {
    let stage = Stage::dev(Mode::Strict).await;
    let connector = connect_to(&stage, &stage.idp).await;
    let ana = stage.user("ana").await;
    for (what, spoil) in spoilt(&stage.idp) {
        stage.idp.script([with(spoil)]);
        comes_to_nothing(&stage, &stage.idp, (&ana, &connector), what).await;
        assert_eq!(stage.idp.forget_faults(), 0, "{what}");
    }
    // Spoilt by nothing, it is good: what was refused was refused for what was done to it.
    let kept: [Spoil; 3] = [
        Box::new(|token| Some(id_token(&token.header, &token.claims, true))),
        claim("aud", json!([CLIENT])),
        claim("exp", json!(now() - 10)),
    ];
    for spoil in kept {
        stage.idp.script([with(spoil)]);
        verified(&stage.idp, &ana, &connector, "ana").await;
    }
    let record = verified(&stage.idp, &ana, &connector, "ana").await;
    assert_eq!(link(&ana, &record).await.status(), 204);
    assert!(stage.idp.is_live(&token_in(ana.api.get(&token_of(&connector)).await).await));
    // Keys are not fetched for each forgery, though some name a key that is not known.
    assert!(stage.idp.fetched("/jwks") <= 4, "{} fetches", stage.idp.fetched("/jwks"));
    stage.finish().await;
}

#[tokio::test]
async fn keys_that_others_know_too_are_no_keys() {
    let stage = Stage::dev(Mode::Strict).await;
    let ana = stage.user("ana").await;
    let good = stage.idp.key();
    let shared = URL_SAFE_NO_PAD.encode("a secret for everybody");
    let symmetric = json!({ "kty": "oct", "k": shared, "alg": "HS256", "kid": "fake-1" });
    let unnamed = json!({ "k": shared, "kid": "fake-3" });
    let (mut other_use, mut other_curve) = (good.clone(), good.clone());
    other_use["use"] = json!("enc");
    other_curve["crv"] = json!("P-384");
    let rows = [
        ("a symmetric one beside it", json!([good, symmetric])),
        ("only a symmetric one", json!([symmetric])),
        ("one of no kind", json!([good, unnamed])),
        ("none", json!([])),
        ("no list", json!({})),
        ("for another use", json!([other_use])),
        ("on another curve", json!([other_curve])),
        ("twice the same name", json!([good, good])),
    ];
    for (what, keys) in rows {
        // Keys are believed for a while, so each row has a provider of its own.
        let idp = FakeIdp::start(Mode::Strict, &stage.daemon().canary);
        let connector = connect_to(&stage, &idp).await;
        idp.set_keys(Some(keys));
        // By HMAC with the shared key, and by the true key: in such company neither is believed.
        idp.script([with(by_hmac(b"a secret for everybody".to_vec()))]);
        comes_to_nothing(&stage, &idp, (&ana, &connector), what).await;
        comes_to_nothing(&stage, &idp, (&ana, &connector), what).await;
        assert!(idp.fetched("/jwks") > 0, "{what}");
    }
    stage.finish().await;
}
