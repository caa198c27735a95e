//! What every request gets: an id, a span, one line in the log, metrics, headers, and a problem body
//! where it failed, also by a panic. Query strings and bodies never reach the log.

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::error::InternalError;
use actix_web::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use actix_web::http::{ConnectionType, StatusCode};
use actix_web::middleware::Next;
use actix_web::web::Data;
use actix_web::{Error, HttpMessage, HttpRequest, HttpResponse, ResponseError};
use futures_util::FutureExt;
use tracing::Instrument;

use crate::http::logto;
use crate::http::ops::Operations;
use crate::http::problem::{Code, Problem};
use crate::identity::{Caller, UserCaller};
use crate::ids::RequestId;

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Middleware around everything.
pub(super) async fn observe(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let started = Instant::now();
    let offered = request.headers().get(X_REQUEST_ID).and_then(|value| value.to_str().ok());
    let id = RequestId::accept_or_generate(offered);
    request.extensions_mut().insert(id.clone());
    let draining = request.app_data::<Data<dyn Operations>>().is_some_and(|daemon| daemon.is_draining());

    let span = tracing::info_span!("request", request_id = %id);
    let path = request.path().to_owned();
    let served = async move { next.call(request).await };
    // What a handler holds is wiped as it unwinds. Nothing of it is used again, so nothing half done is seen.
    let Ok(served) = AssertUnwindSafe(served.instrument(span.clone())).catch_unwind().await else {
        span.in_scope(|| tracing::error!(path, "a handler panicked"));
        return Err(after_a_panic(&id, &path));
    };
    let response = served?.map_into_boxed_body();
    let mut response = if logto::owns(response.request().path()) {
        // Its errors bring their bodies.
        response.response().error().and_then(|error| error.as_error()).inspect(|error| log_logto(error, &id));
        response
    } else {
        with_problem_body(response, &id)
    };
    put_headers(&mut response, &id);
    if draining {
        // Idle connections would hold up the end of the daemon.
        response.response_mut().head_mut().set_connection_type(ConnectionType::Close);
    }
    span.in_scope(|| log(&response, started));
    Ok(response)
}

/// The answer to a request whose handler is gone, and the request with it.
fn after_a_panic(id: &RequestId, path: &str) -> Error {
    if logto::owns(path) {
        let mut response = logto::after_a_panic(id);
        put_own_headers(response.headers_mut(), id);
        return InternalError::from_response("a handler panicked", response).into();
    }
    let body = Problem::new(Code::Internal).body(id, path);
    let mut response = HttpResponse::InternalServerError();
    response.content_type("application/problem+json").insert_header((X_REQUEST_ID, id.as_str()));
    response.insert_header((header::X_CONTENT_TYPE_OPTIONS, "nosniff"));
    response.insert_header((header::CACHE_CONTROL, "no-store"));
    InternalError::from_response("a handler panicked", response.body(body.to_string())).into()
}

/// Writes the body of an error; says what a 5xx hides from the client in the log, once.
fn with_problem_body(response: ServiceResponse<BoxBody>, id: &RequestId) -> ServiceResponse<BoxBody> {
    let status = response.status();
    let path = response.request().path().to_owned();
    let body = match response.response().error() {
        Some(error) => match error.as_error::<Problem>() {
            Some(problem) => {
                log_cause(problem, id);
                Some(problem.body(id, &path))
            }
            None => {
                if status.is_server_error() {
                    tracing::error!(request_id = %id, %error, "request failed");
                }
                Some(Problem::of_status(status).body(id, &path))
            }
        },
        // What actix answers by itself has no body; what a handler answers on purpose has one.
        None if status == StatusCode::METHOD_NOT_ALLOWED => Some(Problem::of_status(status).body(id, &path)),
        None => None,
    };
    let Some(body) = body else { return response };
    response.map_body(|head, _| {
        head.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        BoxBody::new(body.to_string())
    })
}

fn log_cause(problem: &Problem, id: &RequestId) {
    let code = problem.code();
    let Some(cause) = problem.cause_chain() else { return };
    log_failure(code.status(), code.name(), &cause, id);
}

fn log_logto(error: &logto::ApiError, id: &RequestId) {
    if let Some(cause) = error.cause() {
        log_failure(error.status_code(), "logto", cause, id);
    }
}

fn log_failure(status: StatusCode, code: &str, cause: &str, id: &RequestId) {
    if status == StatusCode::SERVICE_UNAVAILABLE {
        tracing::warn!(request_id = %id, code, cause, "request refused");
    } else {
        tracing::error!(request_id = %id, code, cause, "request failed");
    }
}

fn put_headers(response: &mut ServiceResponse<BoxBody>, id: &RequestId) {
    let is_native = response.request().path().starts_with("/v1/");
    let headers: &mut HeaderMap = response.headers_mut();
    put_own_headers(headers, id);
    if is_native && !headers.contains_key(header::CACHE_CONTROL) {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
}

fn put_own_headers(headers: &mut HeaderMap, id: &RequestId) {
    if let Ok(value) = HeaderValue::from_str(id.as_str()) {
        headers.insert(X_REQUEST_ID, value);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

fn log(response: &ServiceResponse<BoxBody>, started: Instant) {
    let request = response.request();
    let took = started.elapsed();
    let status = response.status();
    let route = request.match_pattern().unwrap_or_else(|| "unmatched".to_owned());
    let method = method_label(request.method().as_str());
    metrics::counter!(
        "lacre_http_requests_total",
        "route" => route.clone(), "method" => method, "status" => status.as_u16().to_string()
    )
    .increment(1);
    metrics::histogram!("lacre_http_request_duration_seconds", "route" => route).record(took.as_secs_f64());
    let caller = who(request);
    tracing::info!(
        target: "lacre::access",
        method,
        path = request.path(),
        status = status.as_u16(),
        micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX),
        caller = caller.as_deref().unwrap_or("-"),
    );
}

/// The caller that authentication found: a machine, or a person.
fn who(request: &HttpRequest) -> Option<String> {
    let extensions = request.extensions();
    let person = || extensions.get::<UserCaller>().map(|person| &person.caller);
    extensions.get::<Caller>().or_else(person).map(|caller| caller.principal.to_string())
}

/// A label must not be a client's invention: any token is a method (RFC 9110, section 9.1).
fn method_label(method: &str) -> &'static str {
    ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"]
        .into_iter()
        .find(|known| *known == method)
        .unwrap_or("other")
}
