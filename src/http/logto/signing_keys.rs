//! `/api/configs/oidc`: signing and cookie keys, and the session's lifetime (contract, sections 9.3 and 9.7).
//!
//! `createdAt` is in seconds, every other time in milliseconds. Logto's members come first and in its order;
//! Lacre's own follow. An array is Next, Current, Previous (newest first).

use std::future::{Ready, ready};
use std::time::Duration;

use actix_web::dev::Payload;
use actix_web::http::StatusCode;
use actix_web::http::header::{HeaderName, HeaderValue};
use actix_web::web::{self, Data, Path, ServiceConfig};
use actix_web::{FromRequest, HttpRequest, HttpResponse};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::input::{Body, DryRun};
use super::millis;
use crate::http::{DefaultGrace, key_id};
use crate::identity::Caller;
use crate::keys::{Choice, ImportAs, KeyView, Keys, KeysError, Origin, PolicyPatch, Rotation, Status, Use};

/// How many live tokens a revocation ends.
const DEAD_TOKENS: &str = "lacre-dead-tokens";

const CHOICES: &str = "EC, RSA, ES256, ES384, RS256, PS256 or EdDSA";

pub(super) fn routes(cfg: &mut ServiceConfig) {
    // Literal names before `{keyType}`, which would take them for one.
    cfg.service(web::resource("/oidc/session").get(session).patch(set_session))
        .service(web::resource("/oidc/private-keys/import").post(import))
        .service(web::resource("/oidc/{keyType}").get(list))
        .service(web::resource("/oidc/{keyType}/rotate").post(rotate))
        .service(web::resource("/oidc/{keyType}/revert").post(revert))
        .service(web::resource("/oidc/{keyType}/policy").get(policy).patch(set_policy))
        .service(web::resource("/oidc/{keyType}/next").delete(cancel))
        .service(web::resource("/oidc/{keyType}/{keyId}").delete(delete))
        .service(web::resource("/oidc/{keyType}/{keyId}/revoke").post(revoke));
}

/// `{keyType}`.
struct KeyType(Use);

impl FromRequest for KeyType {
    type Error = ApiError;
    type Future = Ready<Result<Self, ApiError>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        ready(match request.match_info().get("keyType") {
            Some("private-keys") => Ok(Self(Use::Jwt)),
            Some("cookie-keys") => Ok(Self(Use::Cookie)),
            _ => Err(ApiError::invalid_member("params", "keyType", "Expected private-keys or cookie-keys")),
        })
    }
}

/// An item of the array. What is absent is omitted.
fn item(key: &KeyView) -> Value {
    let mut item = Map::new();
    let mut put = |name: &str, value: Value| item.insert(name.to_owned(), value);
    put("id", json!(key.id));
    put("createdAt", json!(key.created_at.as_secs()));
    let Some(choice) = key.choice else { return Value::Object(item) };
    put("signingKeyAlgorithm", json!(choice));
    put("status", json!(key.status.name()));
    if key.status == Status::Next {
        put("effectiveAt", json!(millis(key.effective_at.as_micros())));
    }
    // Lacre's own.
    if let Some(kid) = &key.kid {
        put("kid", json!(kid));
    }
    put("alg", json!(key.alg));
    if key.origin == Origin::Imported {
        put("origin", json!(key.origin.name()));
    }
    if let Some(reason) = &key.waits_for {
        put("signsFrom", json!(millis(key.signs_from.as_micros())));
        put("waitsFor", json!(reason));
    }
    for (name, time) in [("signsUntil", key.signs_until), ("publishedUntil", key.published_until)] {
        if let Some(time) = time {
            put(name, json!(millis(time.as_micros())));
        }
    }
    Value::Object(item)
}

fn listed(keys: &[KeyView]) -> HttpResponse {
    HttpResponse::Ok().json(keys.iter().map(item).collect::<Vec<_>>())
}

async fn list(caller: Caller, keys: Data<Keys>, of: KeyType) -> Result<HttpResponse, ApiError> {
    Ok(listed(&keys.list(&caller, of.0).await?))
}

async fn rotate(
    caller: Caller,
    (keys, default): (Data<Keys>, Data<DefaultGrace>),
    of: KeyType,
    dry_run: DryRun,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    // The Console sends an algorithm for cookie keys too, of which there is one kind.
    let choice = input.one_of("signingKeyAlgorithm", Choice::parse, CHOICES).filter(|_| of.0 == Use::Jwt);
    let grace = default.or(of.0, input.whole("rotationGracePeriod").map(Duration::from_secs));
    input.end()?;
    let order = Rotation { choice, grace, dry_run: dry_run.0 };
    let change = keys.rotate(&caller, of.0, order).await.map_err(|error| of_rotation(error, of.0))?;
    Ok(listed(&change.keys))
}

/// Of a cookie key's rotation nothing but the grace, which there is none of, can be invalid.
fn of_rotation(error: KeysError, used: Use) -> ApiError {
    match (error, used) {
        (KeysError::Invalid { .. }, Use::Cookie) => {
            ApiError::unprocessable("oidc.invalid_request", "Cookie keys have no grace period.")
        }
        (KeysError::Invalid { field: "grace", reason }, Use::Jwt) => {
            ApiError::invalid_member("body", "rotationGracePeriod", reason)
        }
        (KeysError::Invalid { field: "algorithm" | "choice", reason }, Use::Jwt) => {
            ApiError::invalid_member("body", "signingKeyAlgorithm", reason)
        }
        (error, _) => error.into(),
    }
}

async fn cancel(
    caller: Caller,
    keys: Data<Keys>,
    of: KeyType,
    dry_run: DryRun,
) -> Result<HttpResponse, ApiError> {
    Ok(listed(&keys.cancel(&caller, of.0, dry_run.0).await?.keys))
}

async fn revert(
    caller: Caller,
    keys: Data<Keys>,
    of: KeyType,
    dry_run: DryRun,
) -> Result<HttpResponse, ApiError> {
    Ok(listed(&keys.revert(&caller, of.0, dry_run.0).await?.keys))
}

async fn delete(
    caller: Caller,
    keys: Data<Keys>,
    of: KeyType,
    path: Path<(String, String)>,
    dry_run: DryRun,
) -> Result<HttpResponse, ApiError> {
    let change = keys.delete(&caller, of.0, &key_id(&path.1), dry_run.0).await?;
    Ok(if change.dry_run { listed(&change.keys) } else { HttpResponse::NoContent().finish() })
}

async fn revoke(
    caller: Caller,
    keys: Data<Keys>,
    of: KeyType,
    path: Path<(String, String)>,
    dry_run: DryRun,
) -> Result<HttpResponse, ApiError> {
    let change = keys.revoke(&caller, of.0, &key_id(&path.1), dry_run.0).await?;
    let mut response = listed(&change.keys);
    // Absent if they could not be counted: that is not none.
    if let Some(dead) = change.dead_tokens {
        response.headers_mut().insert(HeaderName::from_static(DEAD_TOKENS), HeaderValue::from(dead));
    }
    Ok(response)
}

async fn import(
    caller: Caller,
    keys: Data<Keys>,
    dry_run: DryRun,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let pem = input.secret("pem");
    let (pem, status) = (input.needed("pem", pem), input.one_of("as", imported_as, "Current or Previous"));
    let lifetime = input.whole("lifetime").map(Duration::from_secs);
    let into = match input.needed("as", status) {
        Some(Status::Previous) => {
            input.needed("lifetime", lifetime).map(|lifetime| ImportAs::Previous { lifetime })
        }
        status => status.map(|_| ImportAs::Current { lifetime: lifetime.unwrap_or(ImportAs::LIFETIME) }),
    };
    input.end()?;
    let (Some(pem), Some(into)) = (pem, into) else {
        return Err(ApiError::of_status(StatusCode::BAD_REQUEST));
    };
    Ok(listed(&keys.import(&caller, pem, into, dry_run.0).await?.keys))
}

fn imported_as(name: &str) -> Option<Status> {
    [Status::Current, Status::Previous].into_iter().find(|status| status.name() == name)
}

async fn policy(caller: Caller, keys: Data<Keys>, of: KeyType) -> Result<HttpResponse, ApiError> {
    Ok(HttpResponse::Ok().json(keys.policy(&caller, of.0).await?))
}

async fn set_policy(
    caller: Caller,
    keys: Data<Keys>,
    of: KeyType,
    body: Body,
) -> Result<HttpResponse, ApiError> {
    Ok(HttpResponse::Ok().json(keys.set_policy(&caller, of.0, body.parse::<PolicyPatch>()?).await?))
}

// A session lives in cookies, so their keys' policy has its lifetime.
async fn session(caller: Caller, keys: Data<Keys>) -> Result<HttpResponse, ApiError> {
    let policy = keys.policy(&caller, Use::Cookie).await?;
    Ok(HttpResponse::Ok().json(json!({ "ttl": policy.session_ttl.as_secs() })))
}

async fn set_session(caller: Caller, keys: Data<Keys>, body: Body) -> Result<HttpResponse, ApiError> {
    let mut input = body.members()?;
    let session_ttl = input.whole("ttl");
    input.end()?;
    let patch = PolicyPatch { session_ttl, ..PolicyPatch::default() };
    let policy = keys.set_policy(&caller, Use::Cookie, patch).await.map_err(|error| match error {
        KeysError::Invalid { reason, .. } => ApiError::invalid_member("body", "ttl", reason),
        error => error.into(),
    })?;
    Ok(HttpResponse::Ok().json(json!({ "ttl": policy.session_ttl.as_secs() })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SigningKeyId;

    fn at<T: serde::de::DeserializeOwned>(seconds: i64) -> T {
        serde_json::from_value(json!(seconds * 1_000_000 + 990_123)).unwrap()
    }

    fn key(used: Use, status: Status) -> KeyView {
        KeyView {
            id: SigningKeyId::parse("p3dz8c2wy85x49jjm4qv6").unwrap(),
            used,
            status,
            choice: (used == Use::Jwt).then_some(Choice::Ec),
            kid: (used == Use::Jwt).then(|| "thumb".to_owned()),
            alg: "ES256",
            origin: Origin::Generated,
            device: "default".to_owned(),
            created_at: at(1_795_347_573),
            effective_at: at(1_795_347_577),
            is_signing: status == Status::Current,
            signs_from: at(1_795_347_577),
            signs_until: None,
            published_until: None,
            waits_for: None,
        }
    }

    #[test]
    fn a_cookie_key_is_an_id_and_a_time_in_seconds() {
        let shown = item(&key(Use::Cookie, Status::Current)).to_string();
        assert_eq!(shown, r#"{"id":"p3dz8c2wy85x49jjm4qv6","createdAt":1795347573}"#);
    }

    #[test]
    fn the_documented_members_come_first_and_effective_at_is_in_milliseconds_and_of_next_only() {
        let shown = item(&key(Use::Jwt, Status::Next)).to_string();
        let documented = r#"{"id":"p3dz8c2wy85x49jjm4qv6","createdAt":1795347573,"signingKeyAlgorithm":"EC","status":"Next","effectiveAt":1795347577990,"#;
        assert!(shown.starts_with(documented), "{shown}");

        let shown = item(&key(Use::Jwt, Status::Current));
        let names: Vec<_> = shown.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(names, ["id", "createdAt", "signingKeyAlgorithm", "status", "kid", "alg"]);
    }

    #[test]
    fn a_current_key_that_waits_says_from_when_it_signs_and_why() {
        let waits = KeyView {
            waits_for: Some("verifiers".to_owned()),
            origin: Origin::Imported,
            signs_until: Some(at(1_795_347_600)),
            published_until: Some(at(1_795_351_200)),
            ..key(Use::Jwt, Status::Current)
        };
        let shown = item(&waits);
        assert_eq!(shown["signsFrom"], 1_795_347_577_990_i64);
        assert_eq!(shown["waitsFor"], "verifiers");
        assert_eq!(shown["origin"], "imported");
        assert_eq!(
            (&shown["signsUntil"], &shown["publishedUntil"]),
            (&json!(1_795_347_600_990_i64), &json!(1_795_351_200_990_i64))
        );
    }
}
