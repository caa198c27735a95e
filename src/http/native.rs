//! The native API under `/v1`. One file per resource; this one holds the route table and what the
//! resources share: ids, paging, preconditions, idempotency keys.

mod apps;
mod audit;
mod batch;
mod crypto;
mod keks;
mod secrets;
mod signing;
mod signing_keys;
mod status;
mod token_sets;
mod values;

use actix_web::HttpRequest;
use actix_web::HttpResponse;
use actix_web::http::header;
use actix_web::middleware::from_fn;
use actix_web::web::{self, PayloadConfig, ServiceConfig};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use serde_json::json;
use zeroize::Zeroizing;

use crate::http::auth;
use crate::http::nothing_here;
use crate::http::problem::{Code, Problem};
use crate::ids::{JobId, SecretId};
use crate::vault::IdempotencyKey;

/// Bodies without a value in them.
const SMALL_BODY: usize = 32 << 10;
/// A batch of values.
const BATCH_BODY: usize = 8 << 20;
/// A batch of ciphertexts: whatever a batch of values became. Base64 and envelopes add less than a half.
const SEALED_BODY: usize = 12 << 20;

pub(super) fn routes(max_value_bytes: usize, cfg: &mut ServiceConfig) {
    // JSON may need six bytes for one (`\u0001`), base64 needs four for three.
    let value_body = (max_value_bytes * 6 + SMALL_BODY).min(BATCH_BODY);
    let value = || PayloadConfig::new(value_body);
    let batch = || PayloadConfig::new(BATCH_BODY);
    let v1 = web::scope("/v1")
        .app_data(PayloadConfig::new(SMALL_BODY))
        .wrap(from_fn(auth::authenticate))
        .service(web::resource("/secrets").app_data(value()).get(secrets::list).post(secrets::create))
        .service(web::resource("/secrets/{id}").get(secrets::show).delete(secrets::delete))
        .service(
            web::resource("/secrets/{id}/value").app_data(value()).get(values::reveal).put(values::replace),
        )
        .service(web::resource("/secrets/{id}/versions").get(secrets::versions))
        .service(web::resource("/keks").get(keks::list))
        .service(web::resource("/keks/rotate").post(keks::rotate))
        .service(web::resource("/keks/rewrap").post(keks::rewrap))
        .service(web::resource("/jobs/{id}").get(keks::job))
        .service(web::resource("/jobs/{id}/cancel").post(keks::cancel))
        .service(web::resource("/restore/release").post(keks::release))
        .service(web::resource("/datakeys").post(crypto::data_key))
        .service(web::resource("/seal").app_data(batch()).post(crypto::seal))
        .service(web::resource("/open").app_data(PayloadConfig::new(SEALED_BODY)).post(crypto::open))
        .service(web::resource("/audit/events").get(audit::events))
        .service(web::resource("/apps").get(apps::list).post(apps::create))
        .service(web::resource("/apps/{id}").delete(apps::delete))
        .service(web::resource("/apps/{id}/signing").get(apps::signing_policy).put(apps::set_signing_policy))
        .service(web::resource("/token-sets/access-token").post(token_sets::access_token))
        // Before what has a name of its own below `/signing-keys`.
        .configure(signing::routes)
        .configure(signing_keys::routes)
        .service(web::resource("/status").get(status::status))
        .default_service(web::to(nothing_here));
    cfg.service(v1);
}

// A malformed id names nothing, like an unknown one.
fn secret_id(text: &str) -> Result<SecretId, Problem> {
    SecretId::parse(text).map_err(|_| Problem::new(Code::NotFound))
}

fn job_id(text: &str) -> Result<JobId, Problem> {
    JobId::parse(text).map_err(|_| Problem::new(Code::NotFound))
}

/// `?limit=`: 50 if absent, 1 to 200.
fn page_limit(limit: Option<u32>) -> Result<u32, Problem> {
    match limit.unwrap_or(50) {
        limit @ 1..=200 => Ok(limit),
        _ => Err(Problem::invalid("limit", "must be 1 to 200")),
    }
}

/// A cursor is the last item's key; clients must not build on that, hence the coat.
fn cursor_of(last: &str) -> String {
    URL_SAFE_NO_PAD.encode(last)
}

fn read_cursor(cursor: &str) -> Result<String, Problem> {
    let bytes = URL_SAFE_NO_PAD.decode(cursor).ok();
    let text = bytes.and_then(|bytes| String::from_utf8(bytes).ok());
    text.ok_or_else(|| Problem::invalid("cursor", "is not one that a list gave"))
}

/// A page of a list, with `next_cursor` and a Link header (RFC 8288) if more follow. `next_query`
/// is the query string of the same list without its cursor.
fn page(request: &HttpRequest, items: &impl Serialize, next: Option<(String, String)>) -> HttpResponse {
    let mut response = HttpResponse::Ok();
    let cursor = next.as_ref().map(|(cursor, _)| cursor);
    let body = json!({ "items": items, "next_cursor": cursor });
    if let Some((cursor, query)) = &next {
        let join = if query.is_empty() { "" } else { "&" };
        let link = format!("<{}?{query}{join}cursor={cursor}>; rel=\"next\"", request.path());
        response.insert_header((header::LINK, link));
    }
    response.json(body)
}

/// What If-Match says (RFC 9110, section 13.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Precondition {
    Absent,
    Any,
    Version(i64),
}

fn if_match(request: &HttpRequest) -> Result<Precondition, Problem> {
    let Some(value) = request.headers().get(header::IF_MATCH) else { return Ok(Precondition::Absent) };
    let text = value.to_str().map_or("", str::trim);
    if text == "*" {
        return Ok(Precondition::Any);
    }
    // A tag of another form, a weak one too, is one that no secret has.
    let tag = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
    match tag.and_then(|tag| tag.parse().ok().filter(|version: &i64| version.to_string() == tag)) {
        Some(version) => Ok(Precondition::Version(version)),
        None => Err(Problem::new(Code::VersionConflict).detail("If-Match names no version of this secret")),
    }
}

fn etag(row_version: i64) -> (header::HeaderName, String) {
    (header::ETAG, format!("\"{row_version}\""))
}

/// The Idempotency-Key header together with what it stands for.
fn idempotency(request: &HttpRequest, body: Zeroizing<Vec<u8>>) -> Result<Option<IdempotencyKey>, Problem> {
    let Some(value) = request.headers().get("idempotency-key") else { return Ok(None) };
    let key = value.to_str().ok().filter(|key| (1..=128).contains(&key.len()));
    match key.filter(|key| key.bytes().all(|byte| byte.is_ascii_graphic())) {
        Some(key) => Ok(Some(IdempotencyKey { key: key.to_owned(), body })),
        None => Err(Problem::invalid("Idempotency-Key", "must be 1 to 128 visible ASCII characters")),
    }
}

/// A query string without parameters: an unknown one is a mistake worth telling.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoQuery {}

#[cfg(test)]
mod tests {
    use actix_web::test::TestRequest;

    use super::*;

    #[test]
    fn if_match_takes_a_version_or_anything_and_nothing_weak() {
        let read = |text: &str| {
            if_match(&TestRequest::default().insert_header(("If-Match", text)).to_http_request())
        };

        assert_eq!(if_match(&TestRequest::default().to_http_request()).unwrap(), Precondition::Absent);
        assert_eq!(read("*").unwrap(), Precondition::Any);
        assert_eq!(read("\"7\"").unwrap(), Precondition::Version(7));
        for text in ["W/\"7\"", "7", "\"07\"", "\"x\"", "\"1\", \"2\""] {
            assert_eq!(read(text).unwrap_err().code(), Code::VersionConflict, "{text}");
        }
    }

    #[test]
    fn a_cursor_comes_back_as_what_it_was_made_of() {
        assert_eq!(read_cursor(&cursor_of("0190-a")).unwrap(), "0190-a");
        assert!(read_cursor("***").is_err());
    }

    #[test]
    fn an_idempotency_key_is_visible_ascii() {
        let read = |text: &str| {
            let request = TestRequest::default().insert_header(("Idempotency-Key", text)).to_http_request();
            idempotency(&request, Zeroizing::default()).map(|key| key.unwrap().key)
        };
        assert_eq!(read("a-1").unwrap(), "a-1");
        assert!(read("a b").is_err() && read(&"a".repeat(129)).is_err() && read("").is_err());
    }
}
