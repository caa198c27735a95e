//! Who may use the Account and Verification APIs: a person, by an opaque token (contract, section 4.2).

use std::future::{Ready, ready};

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{Payload, ServiceRequest, ServiceResponse};
use actix_web::middleware::Next;
use actix_web::web::Data;
use actix_web::{Error, FromRequest, HttpMessage, HttpRequest};

use super::error::ApiError;
use super::management;
use crate::http::auth::Gate;
use crate::http::problem::{Code, Problem};
use crate::identity::UserCaller;
use crate::tokens::Tokens;

/// Middleware: lets a request through with its person, if the account center is open, or answers for the routes
/// below. Nothing of the body is read before.
pub(super) async fn authenticate(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    match admit(&request).await {
        Ok(person) => {
            request.extensions_mut().insert(person);
            Ok(next.call(request).await?.map_into_boxed_body())
        }
        Err(error) => Ok(request.error_response(error)),
    }
}

/// Without a gate nobody is let in.
async fn admit(request: &ServiceRequest) -> Result<UserCaller, ApiError> {
    let gate = request.app_data::<Data<Gate>>().cloned();
    let tokens = request.app_data::<Data<Tokens>>().cloned();
    let (Some(gate), Some(tokens)) = (gate, tokens) else {
        return Err(Problem::new(Code::Internal).into());
    };
    let admitted = gate.admit_user(request.request()).await;
    let person = admitted.map_err(|problem| refusal(problem, request.request()))?;
    tokens.account_is_open(&person).await?;
    Ok(person)
}

/// What an opaque token lacks is no signature.
fn refusal(problem: Problem, request: &HttpRequest) -> ApiError {
    management::refusal(problem, request, |error| error)
}

impl FromRequest for UserCaller {
    type Error = Error;
    type Future = Ready<Result<Self, Error>>;

    fn from_request(request: &HttpRequest, _: &mut Payload) -> Self::Future {
        let person = request.extensions().get::<Self>().cloned();
        ready(person.ok_or_else(|| ApiError::from(Problem::new(Code::Unauthenticated)).into()))
    }
}

#[cfg(test)]
mod tests {
    use actix_web::ResponseError;
    use actix_web::body::to_bytes;
    use actix_web::test::TestRequest;
    use serde_json::{Value, json};

    use super::*;

    async fn refused(code: Code, authorization: Option<&str>) -> (u16, Value) {
        let request = TestRequest::default();
        let request = match authorization {
            Some(value) => request.insert_header(("authorization", value)),
            None => request,
        };
        let response = refusal(Problem::new(code), &request.to_http_request()).error_response();
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body()).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap())
    }

    #[actix_web::test]
    async fn a_person_is_refused_in_logtos_words() {
        let (status, body) = refused(Code::Unauthenticated, None).await;
        assert_eq!((status, &body["code"]), (401, &json!("auth.authorization_header_missing")));

        let (status, body) = refused(Code::InvalidToken, Some("Basic abc")).await;
        assert_eq!((status, &body["code"]), (401, &json!("auth.authorization_token_type_not_supported")));
        assert_eq!(body["data"], json!({ "supportedTypes": ["Bearer"] }));

        let (status, body) = refused(Code::InvalidToken, Some("Bearer abc")).await;
        assert_eq!((status, &body["code"], body.get("data")), (401, &json!("auth.unauthorized"), None));

        let (status, body) = refused(Code::RateLimited, Some("Bearer abc")).await;
        assert_eq!((status, body), (429, json!({ "message": "Too Many Requests." })));
    }
}
