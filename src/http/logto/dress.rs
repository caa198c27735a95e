//! What every answer of the Logto family has (contract, sections 5.1 and 5.3): its request id, the security
//! headers and those for other origins, an `ETag` and 304 on GET, and the family's words where the framework answers by itself.

use actix_web::body::{BoxBody, EitherBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{Method, StatusCode};
use actix_web::middleware::Next;
use actix_web::{Error, HttpResponse};
use serde_json::json;

use super::cors::Origin;
use super::error::ApiError;
use crate::http::{auth, cached};
use crate::ids::RequestId;

pub(super) const TEXT: &str = "text/plain; charset=utf-8";

const REQUEST_ID: HeaderName = HeaderName::from_static("logto-core-request-id");

/// Answers are for programs: no page may show them, be opened by them or learn from where they were asked.
const SECURITY: [(&str, &str); 10] = [
    ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
    ("origin-agent-cluster", "?1"),
    ("referrer-policy", "no-referrer"),
    ("strict-transport-security", "max-age=31536000"),
    ("x-dns-prefetch-control", "off"),
    ("x-frame-options", "DENY"),
    ("x-permitted-cross-domain-policies", "none"),
    ("x-xss-protection", "0"),
];

/// Middleware around the family.
pub(super) async fn dress(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let id = auth::request_id(request.request());
    let origin = Origin::of(&request);
    let mut response = match origin.as_ref().and_then(|origin| origin.preflight(&request)) {
        Some(answer) => request.into_response(answer),
        None => tagged(in_our_words(next.call(request).await?.map_into_boxed_body())),
    };
    put_headers(response.headers_mut(), &id);
    if let Some(origin) = origin {
        origin.put_headers(response.headers_mut());
    }
    Ok(response)
}

/// The answer to a request whose handler is gone.
pub(in crate::http) fn after_a_panic(id: &RequestId) -> HttpResponse {
    let mut response =
        HttpResponse::InternalServerError().json(json!({ "message": "Internal server error." }));
    put_headers(response.headers_mut(), id);
    response
}

/// Errors that are not of this family, and what the framework answers by itself.
fn in_our_words(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let status = response.status();
    match response.response().error() {
        Some(error) if error.as_error::<ApiError>().is_none() => {
            let error = ApiError::of_status(status);
            let (request, _) = response.into_parts();
            ServiceResponse::from_err(error, request)
        }
        None if status == StatusCode::METHOD_NOT_ALLOWED => {
            let mut response = response.map_body(|_, _| BoxBody::new("Method Not Allowed"));
            response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(TEXT));
            response
        }
        _ => response,
    }
}

/// Gives what a GET brought a tag, or leaves it out for who has it. What must not be kept has neither.
fn tagged(response: ServiceResponse<BoxBody>) -> ServiceResponse<BoxBody> {
    let is_read = *response.request().method() == Method::GET && response.status() == StatusCode::OK;
    if !is_read || response.headers().contains_key(header::CACHE_CONTROL) {
        return response;
    }
    let (request, response) = response.into_parts();
    let (mut head, body) = response.into_parts();
    let body = match body.try_into_bytes() {
        Ok(bytes) => bytes,
        Err(body) => return ServiceResponse::new(request, head.set_body(body)),
    };
    let tag = cached::tag_of(&body);
    let is_known = cached::is_known(request.headers(), &tag);
    if let Ok(tag) = HeaderValue::try_from(tag) {
        head.headers_mut().insert(header::ETAG, tag);
    }
    if is_known {
        head.headers_mut().remove(header::CONTENT_TYPE);
        *head.status_mut() = StatusCode::NOT_MODIFIED;
    }
    let body = if is_known { EitherBody::left(()) } else { EitherBody::right(body) };
    ServiceResponse::new(request, head.set_body(body).map_into_boxed_body())
}

fn put_headers(headers: &mut HeaderMap, id: &RequestId) {
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        headers.insert(REQUEST_ID, value);
    }
    for (name, value) in SECURITY {
        headers.insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
}
