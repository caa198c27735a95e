//! Who may use the Management API (contract, section 4.1): the callers of `auth.rs`, refused in Logto's words.

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::{Error, HttpMessage, HttpRequest};
use serde_json::json;

use super::error::ApiError;
use crate::http::auth;
use crate::http::problem::{Code, Problem};

/// Middleware: lets a request through with its caller, before its body is read, or answers for the routes below.
pub(super) async fn authenticate(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match auth::admit(&request).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            Ok(next.call(request).await?.map_into_boxed_body())
        }
        Err(problem) => {
            let error = refusal(problem, request.request(), |error| {
                error.data(json!({ "code": "ERR_JWS_INVALID", "name": "JWSInvalid" }))
            });
            Ok(request.error_response(error))
        }
    }
}

/// `of_token` adds what is told of a token that is not good.
pub(super) fn refusal(
    problem: Problem,
    request: &HttpRequest,
    of_token: fn(ApiError) -> ApiError,
) -> ApiError {
    match (problem.code(), auth::bearer(request)) {
        (Code::Unauthenticated, _) => ApiError::unauthorized(
            "auth.authorization_header_missing",
            "The Authorization header is missing.",
        ),
        (Code::InvalidToken, Some(Err(()))) => {
            let code = "auth.authorization_token_type_not_supported";
            ApiError::unauthorized(code, "The type of the authorization is not supported.")
                .data(json!({ "supportedTypes": ["Bearer"] }))
        }
        // Why is nobody's business who has no good token: one text for every reason.
        (Code::InvalidToken, _) => {
            of_token(ApiError::unauthorized("auth.unauthorized", "Unauthorized. The token is not accepted."))
        }
        _ => problem.into(),
    }
}
