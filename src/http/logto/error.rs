//! Errors of the Logto family: `{code?, message, data?, details?}` (contract, section 5). The one place that
//! turns what a service refuses into Logto's codes, those of `tokens` in a file of their own. A 5xx never explains itself; its cause goes to the log.

pub(super) mod tokens;

use std::fmt;
use std::time::{Duration, SystemTime};

use actix_web::http::StatusCode;
use actix_web::http::header::{self, HeaderValue, HttpDate};
use actix_web::{HttpResponse, ResponseError};
use serde_json::{Value, json};

use crate::http::problem::Problem;
use crate::identity::MissingScope;
use crate::issuer::IssuerError;
use crate::keys::{KeysError, Refusal};

/// When to try again.
#[derive(Debug)]
enum Retry {
    After(Duration),
    At(SystemTime),
}

/// An error on its way to a client of the family.
#[derive(Debug)]
pub(in crate::http) struct ApiError {
    status: StatusCode,
    code: Option<&'static str>,
    /// Apart, so that a `Result` stays small.
    told: Box<Told>,
}

#[derive(Debug, Default)]
struct Told {
    message: String,
    data: Option<Value>,
    details: Option<String>,
    retry: Option<Retry>,
    /// What is told to the log only.
    cause: Option<String>,
}

impl ApiError {
    /// A refusal with a code of the contract.
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some(code), ..Self::uncoded(status, message) }
    }

    fn uncoded(status: StatusCode, message: impl Into<String>) -> Self {
        let told = Told { message: message.into(), ..Told::default() };
        Self { status, code: None, told: Box::new(told) }
    }

    pub(super) fn unauthorized(code: &'static str, message: &str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, code, message)
    }

    /// 422 with one of the `oidc.*` codes.
    pub(super) fn unprocessable(code: &'static str, message: &str) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, code, message)
    }

    /// `guard.invalid_input`: `part` is `params`, `query` or `body`; issues are in the form of section 5.1.
    pub(super) fn invalid_input(part: &str, issues: &[Issue]) -> Self {
        let lines: Vec<_> = issues.iter().map(Issue::line).collect();
        let issues: Vec<_> = issues.iter().map(Issue::json).collect();
        let message = format!("The {part} is not valid.");
        let mut error = Self::new(StatusCode::BAD_REQUEST, "guard.invalid_input", message)
            .data(json!({ "issues": issues, "name": "ZodError" }));
        error.told.details = Some(lines.join("\n"));
        error
    }

    /// One member of the request's `part` breaks a rule.
    pub(super) fn invalid_member(part: &str, member: &str, rule: impl Into<String>) -> Self {
        Self::invalid_input(part, &[Issue { member: member.to_owned(), code: "custom", rule: rule.into() }])
    }

    /// A body that is not JSON.
    pub(super) fn not_json(error: &serde_json::Error) -> Self {
        // The parser's words on syntax: places and characters that it expects, nothing of the body.
        Self::uncoded(StatusCode::BAD_REQUEST, error.to_string())
    }

    /// What the framework answered with a bare status.
    pub(in crate::http) fn of_status(status: StatusCode) -> Self {
        match status {
            StatusCode::INTERNAL_SERVER_ERROR => Self::uncoded(status, "Internal server error."),
            _ => Self::uncoded(status, format!("{}.", status.canonical_reason().unwrap_or("Failed"))),
        }
    }

    pub(super) fn data(mut self, data: Value) -> Self {
        self.told.data = Some(data);
        self
    }

    /// What the log is told of a failure.
    pub(in crate::http) fn cause(&self) -> Option<&str> {
        self.told.cause.as_deref()
    }

    fn conflict(code: &'static str, message: &str, retry: Option<Retry>) -> Self {
        let mut error = Self::new(StatusCode::CONFLICT, code, message);
        error.told.retry = retry;
        error
    }
}

/// One thing that is wrong with the input.
pub(super) struct Issue {
    /// Its path; empty for the whole.
    pub(super) member: String,
    /// The validator's word for the kind of mistake.
    pub(super) code: &'static str,
    /// What it should be; never what it was.
    pub(super) rule: String,
}

impl Issue {
    fn json(&self) -> Value {
        let path: Vec<_> = self.member.split('.').filter(|part| !part.is_empty()).collect();
        json!({ "code": self.code, "path": path, "message": self.rule })
    }

    fn line(&self) -> String {
        format!("Error in key path \"{}\": ({}) {}", self.member, self.code, self.rule)
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.code.unwrap_or(&self.told.message))
    }
}

impl ResponseError for ApiError {
    fn status_code(&self) -> StatusCode {
        self.status
    }

    fn error_response(&self) -> HttpResponse {
        let mut response = HttpResponse::build(self.status);
        match &self.told.retry {
            Some(Retry::After(wait)) => {
                let whole = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
                response.insert_header((header::RETRY_AFTER, HeaderValue::from(whole.max(1))));
            }
            Some(Retry::At(time)) => {
                response.insert_header((header::RETRY_AFTER, HttpDate::from(*time)));
            }
            None => {}
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.insert_header((header::WWW_AUTHENTICATE, "Bearer realm=\"lacre\""));
        }
        let mut body = json!({});
        if let Some(code) = self.code {
            body["code"] = json!(code);
        }
        let Told { message, data, details, .. } = &*self.told;
        body["message"] = json!(message);
        if let Some(data) = data {
            body["data"] = data.clone();
        }
        if let Some(details) = details {
            body["details"] = json!(details);
        }
        response.json(body)
    }
}

impl From<Problem> for ApiError {
    fn from(problem: Problem) -> Self {
        let mut error = Self::of_status(problem.code().status());
        error.told.retry = problem.wait().map(Retry::After);
        error.told.cause = problem.cause_chain();
        error
    }
}

impl From<MissingScope> for ApiError {
    fn from(missing: MissingScope) -> Self {
        Self::new(StatusCode::FORBIDDEN, "auth.forbidden", format!("Forbidden: {missing}."))
    }
}

impl From<IssuerError> for ApiError {
    fn from(error: IssuerError) -> Self {
        match error {
            IssuerError::Forbidden(missing) => missing.into(),
            IssuerError::NotFound | IssuerError::NoSuchUser => {
                Self::new(StatusCode::NOT_FOUND, "entity.not_found", "The resource does not exist.")
            }
            error => Problem::from(error).into(),
        }
    }
}

impl From<KeysError> for ApiError {
    fn from(error: KeysError) -> Self {
        match error {
            KeysError::Forbidden(missing) => missing.into(),
            KeysError::Refused(refusal) => refusal.into(),
            KeysError::Invalid { field, reason } => Self::invalid_member("body", field, reason),
            KeysError::Quarantined => {
                Self::conflict("oidc.quarantined", "Restored and not released yet: no key changes.", None)
            }
            error => Problem::from(error).into(),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::NextPending => {
                Self::unprocessable("oidc.invalid_request", "A next key is pending; it comes first.")
            }
            Refusal::KeyRequired => {
                Self::unprocessable("oidc.key_required", "The only key cannot be deleted.")
            }
            Refusal::OnlyPrevious => Self::unprocessable(
                "oidc.only_previous_key_can_be_deleted",
                "Only a previous key can be deleted.",
            ),
            Refusal::NotFound | Refusal::NoNext | Refusal::NoPrevious => {
                Self::new(StatusCode::NOT_FOUND, "oidc.key_not_found", "There is no such key.")
            }
            Refusal::Busy => Self::conflict(
                "oidc.key_rotation_in_progress",
                "A key is being made already.",
                Some(Retry::After(Duration::from_secs(1))),
            ),
            Refusal::NotYet { retry_at } => Self::conflict(
                "oidc.key_rotation_in_progress",
                "Verifiers do not know the previous key yet.",
                Some(at(retry_at.as_micros())),
            ),
            Refusal::TooMany { retry_at } => Self::conflict(
                "oidc.too_many_keys",
                "No more keys can be published now.",
                Some(at(retry_at.as_micros())),
            ),
        }
    }
}

fn at(micros: i64) -> Retry {
    let since_epoch = u64::try_from(micros).map_or(Duration::ZERO, Duration::from_micros);
    Retry::At(SystemTime::UNIX_EPOCH + since_epoch)
}

#[cfg(test)]
mod tests {
    use actix_web::body::to_bytes;

    use super::*;
    use crate::identity::Scope;

    async fn shown(error: ApiError) -> (u16, Value, Option<String>) {
        let response = error.error_response();
        let retry = response.headers().get(header::RETRY_AFTER);
        let retry = retry.map(|value| value.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        let body = to_bytes(response.into_body()).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap(), retry)
    }

    #[actix_web::test]
    async fn refusals_have_the_contracts_codes() {
        for (refusal, status, code) in [
            (Refusal::NextPending, 422, "oidc.invalid_request"),
            (Refusal::KeyRequired, 422, "oidc.key_required"),
            (Refusal::OnlyPrevious, 422, "oidc.only_previous_key_can_be_deleted"),
            (Refusal::NotFound, 404, "oidc.key_not_found"),
            (Refusal::NoNext, 404, "oidc.key_not_found"),
            (Refusal::NoPrevious, 404, "oidc.key_not_found"),
            (Refusal::Busy, 409, "oidc.key_rotation_in_progress"),
            (
                Refusal::TooMany { retry_at: serde_json::from_str("1000000").unwrap() },
                409,
                "oidc.too_many_keys",
            ),
        ] {
            let (found, body, retry) = shown(KeysError::Refused(refusal).into()).await;
            assert_eq!((found, body["code"].as_str()), (status, Some(code)));
            assert_eq!(retry.is_some(), status == 409, "{code}");
        }
        let (status, body, _) = shown(MissingScope(Scope::SigningKeysAdmin).into()).await;
        assert_eq!((status, body["code"].as_str()), (403, Some("auth.forbidden")));
    }

    #[actix_web::test]
    async fn what_fails_inside_is_not_explained() {
        let (status, body, retry) = shown(KeysError::NoSigner.into()).await;
        assert_eq!((status, body), (503, json!({ "message": "Service Unavailable." })));
        assert!(retry.is_some());
        assert_eq!(ApiError::from(KeysError::NoSigner).cause(), Some("no key signs now"));
    }

    #[actix_web::test]
    async fn invalid_input_names_the_member_and_the_part() {
        let (status, body, _) = shown(ApiError::invalid_member("body", "a.b", "must be so")).await;

        assert_eq!(status, 400);
        assert_eq!(body["code"], "guard.invalid_input");
        assert_eq!(body["data"]["issues"][0]["path"], json!(["a", "b"]));
        assert_eq!(body["data"]["name"], "ZodError");
        assert_eq!(body["details"], "Error in key path \"a.b\": (custom) must be so");
        assert!(body["message"].as_str().unwrap().contains("body"));
    }
}
