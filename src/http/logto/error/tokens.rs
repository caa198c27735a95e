//! What the service of users, connectors and token sets refuses, in Logto's codes (contract, sections 5.2 and 8.3).
//!
//! Some answers depend on the route: [`told`] reads a failure at an enterprise's provider, the `of_*` functions
//! are for single routes. Nothing that a provider answered is told.

use std::time::Duration;

use actix_web::http::StatusCode;
use serde_json::{Value, json};

use super::{ApiError, Issue, Retry};
use crate::audit::AuditCode;
use crate::http::problem::{Problem, chain, outage_of};
use crate::tokens::{Family, ProviderError, ProviderFault, TokensError};
use crate::vault::VaultError;

const BAD_REQUEST: StatusCode = StatusCode::BAD_REQUEST;
const UNPROCESSABLE: StatusCode = StatusCode::UNPROCESSABLE_ENTITY;
const NOT_FOUND: StatusCode = StatusCode::NOT_FOUND;

impl ApiError {
    fn entity_not_found() -> Self {
        Self::new(NOT_FOUND, "entity.not_found", "The entity does not exist.")
    }

    fn unavailable(cause: &TokensError, wait: Duration) -> Self {
        let mut error = Self::of_status(StatusCode::SERVICE_UNAVAILABLE);
        error.told.retry = Some(Retry::After(wait));
        error.told.cause = Some(chain(cause));
        error
    }
}

impl From<TokensError> for ApiError {
    fn from(error: TokensError) -> Self {
        match error {
            TokensError::Forbidden(missing) => missing.into(),
            TokensError::Invalid { field, reason } => Self::invalid_member("body", &field, reason),
            TokensError::Taken(what) => taken(what),
            TokensError::Provider(error) => at_social(&error),
            TokensError::WrongTarget { expected, actual } => {
                let message = format!("The verification is of {actual}, not of {expected}.");
                let code = "verification_record.social_verification.invalid_target";
                Self::unprocessable(code, &message)
            }
            TokensError::Busy => Self::unavailable(&error, Duration::from_secs(1)),
            // It ends by an operator's hand.
            TokensError::Quarantined => Self::unavailable(&error, Duration::from_secs(60)),
            TokensError::Vault(error) => of_vault(error),
            TokensError::Audit(error) => Problem::from(error).into(),
            TokensError::Db(_) => Problem::new(outage_of(error.audit_code())).caused_by(error).into(),
            error => plain(&error),
        }
    }
}

/// Those that are a code and nothing more.
#[expect(clippy::too_many_lines, reason = "a table")]
fn plain(error: &TokensError) -> ApiError {
    let (status, code, message) = match error {
        TokensError::MissingUserScope(scope) => {
            let message = format!("Forbidden: the scope `{scope}` is needed.");
            return ApiError::new(StatusCode::FORBIDDEN, "auth.forbidden", message);
        }
        TokensError::NotFound(_) => return ApiError::entity_not_found(),
        TokensError::NoIdentity(Family::Social) => {
            (NOT_FOUND, "user.identity_not_exist", "The user has no such social identity.")
        }
        TokensError::NoIdentity(Family::Sso) => {
            let message = "The user has no such enterprise identity.";
            (NOT_FOUND, "user.enterprise_sso_identity_not_exists", message)
        }
        TokensError::NothingStored => {
            (NOT_FOUND, "secrets.third_party_token_set.token_not_found", "No token set is stored.")
        }
        TokensError::NeedsReauthorization => {
            let message = "The access token has expired; the user has to authorize again.";
            (StatusCode::UNAUTHORIZED, "secrets.third_party_token_set.access_token_expired", message)
        }
        TokensError::ProofNeeded => {
            let message = "A verification record of the same user is needed.";
            (StatusCode::UNAUTHORIZED, "verification_record.permission_denied", message)
        }
        TokensError::NotEnabled => {
            (BAD_REQUEST, "account_center.not_enabled", "The account center is not enabled.")
        }
        TokensError::NotEditable => {
            (BAD_REQUEST, "account_center.field_not_editable", "The field cannot be edited.")
        }
        TokensError::NoVerification => {
            (BAD_REQUEST, "verification_record.not_found", "There is no such verification record.")
        }
        TokensError::LastSignIn => {
            let message = "The last way to sign in cannot be removed.";
            (BAD_REQUEST, "user.last_sign_in_method_required", message)
        }
        TokensError::WrongConnector => {
            (BAD_REQUEST, "connector.unexpected_type", "The connector is of another type.")
        }
        TokensError::InsufficientInfo => {
            (BAD_REQUEST, "session.insufficient_info", "state and redirectUri are needed.")
        }
        TokensError::IdentityInUse { by_caller } => {
            let status = if *by_caller { BAD_REQUEST } else { UNPROCESSABLE };
            (status, "user.identity_already_in_use", "The identity is in use.")
        }
        TokensError::NoTokens => {
            let code = "verification_record.social_verification.token_response_not_found";
            (UNPROCESSABLE, code, "The verification has no token set.")
        }
        TokensError::NotLinked => {
            let code = "user.identity_not_exists_in_current_user";
            (UNPROCESSABLE, code, "The identity is not linked to this user.")
        }
        TokensError::NoTokenStorage => {
            (UNPROCESSABLE, "connector.token_storage_not_supported", "The connector does not store tokens.")
        }
        TokensError::UnknownConnector => {
            (UNPROCESSABLE, "session.invalid_connector_id", "There is no such connector.")
        }
        TokensError::Callback(part) => {
            let message = format!("The answer's {part} is not the one that was asked for.");
            return ApiError::new(BAD_REQUEST, "connector.invalid_request_parameters", message);
        }
        TokensError::TooManyTries => {
            let code = "session.verification_blocked_too_many_attempts";
            (StatusCode::TOO_MANY_REQUESTS, code, "Too many wrong passwords.")
        }
        TokensError::WrongPassword => {
            (UNPROCESSABLE, "session.invalid_credentials", "The password is not right.")
        }
        // All others are met by who calls this.
        other => return failed(chain(other)),
    };
    ApiError::new(status, code, message)
}

/// 500, explained to the log only.
fn failed(cause: String) -> ApiError {
    let mut error = ApiError::of_status(StatusCode::INTERNAL_SERVER_ERROR);
    error.told.cause = Some(cause);
    error
}

fn taken(what: &'static str) -> ApiError {
    let (status, code) = match what {
        "username" => (UNPROCESSABLE, "user.username_already_in_use"),
        "primaryEmail" | "primary_email" | "email" => (UNPROCESSABLE, "user.email_already_in_use"),
        "primaryPhone" | "primary_phone" | "phone" => (UNPROCESSABLE, "user.phone_already_in_use"),
        "target" => (UNPROCESSABLE, "connector.multiple_target_with_same_platform"),
        "connectorName" | "connector_name" => {
            (StatusCode::CONFLICT, "single_sign_on.duplicate_connector_name")
        }
        _ => (UNPROCESSABLE, "entity.unique_integrity_violation"),
    };
    ApiError::new(status, code, format!("The {what} is in use."))
}

/// The vault is asked by the service, never for the client: what it does not find is missing in here.
fn of_vault(error: VaultError) -> ApiError {
    match error {
        VaultError::TooLarge { .. } => {
            ApiError::unprocessable("entity.value_too_long", "A value is too long.")
        }
        VaultError::Quarantined => ApiError::unavailable(&TokensError::Quarantined, Duration::from_secs(60)),
        VaultError::Forbidden(_)
        | VaultError::NotFound(_)
        | VaultError::NameTaken
        | VaultError::VersionConflict { .. }
        | VaultError::Invalid { .. }
        | VaultError::Expired
        | VaultError::IdempotencyMismatch
        | VaultError::IdempotencyInFlight
        | VaultError::DoesNotOpen
        | VaultError::JobEnded => failed(chain(&error)),
        error => Problem::from(error).into(),
    }
}

fn at_social(error: &ProviderError) -> ApiError {
    match error.kind {
        ProviderFault::Protocol => bad_answer(),
        _ => waiting(ApiError::new(BAD_REQUEST, "connector.general", words(error.kind)), error),
    }
}

fn at_sso(error: &ProviderError) -> ApiError {
    let message = words(error.kind);
    match error.kind {
        ProviderFault::Protocol => bad_answer(),
        _ => waiting(
            ApiError::unauthorized("connector.authorization_failed", message)
                .data(json!({ "ssoErrorCode": "authorization_failed", "message": message })),
            error,
        ),
    }
}

fn waiting(mut told: ApiError, error: &ProviderError) -> ApiError {
    told.told.retry = error.retry_after.map(Retry::After);
    told
}

fn bad_answer() -> ApiError {
    let issue =
        Issue { member: String::new(), code: "custom", rule: words(ProviderFault::Protocol).to_owned() };
    let issues: [Value; 1] = [issue.json()];
    let message = "The connector's provider gave an invalid answer.";
    ApiError::new(BAD_REQUEST, "connector.invalid_response", message)
        .data(json!({ "issues": issues, "name": "ZodError" }))
}

const fn words(fault: ProviderFault) -> &'static str {
    match fault {
        ProviderFault::Config => "The provider does not accept the connector's configuration.",
        ProviderFault::GrantDead => "The provider refused the grant.",
        ProviderFault::Transient => "The provider does not answer now.",
        ProviderFault::Protocol => "The provider's answer is not a token response.",
        ProviderFault::Policy => "The provider does not allow it.",
    }
}

/// Reads a failure at a route of that family.
pub(in crate::http::logto) fn told(family: Family) -> fn(TokensError) -> ApiError {
    match family {
        Family::Social => ApiError::from,
        Family::Sso => |error| match error {
            TokensError::Provider(error) => at_sso(&error),
            error => error.into(),
        },
    }
}

/// Where an access token is asked for: an SSO connector that is gone is no connector (contract, section 8.3).
pub(in crate::http::logto) fn of_token(family: Family) -> fn(TokensError) -> ApiError {
    match family {
        Family::Social => ApiError::from,
        Family::Sso => |error| match error {
            TokensError::UnknownConnector => ApiError::entity_not_found(),
            error => told(Family::Sso)(error),
        },
    }
}

/// Where a code is exchanged: who is refused is the person, not the connector.
pub(in crate::http::logto) fn of_exchange(family: Family) -> fn(TokensError) -> ApiError {
    match family {
        Family::Social => |error| match error {
            TokensError::Provider(ProviderError { kind: ProviderFault::GrantDead, .. }) => {
                let message = "The provider refused the code.";
                ApiError::unauthorized("connector.social_auth_code_invalid", message)
            }
            error => error.into(),
        },
        Family::Sso => told(Family::Sso),
    }
}

/// Where a person links an identity (contract, section 7.9).
pub(in crate::http::logto) fn of_link(error: TokensError) -> ApiError {
    match error {
        TokensError::MissingUserScope(_) => {
            ApiError::unauthorized("auth.unauthorized", "Unauthorized. A scope is missing.")
        }
        error => error.into(),
    }
}

/// Where a person removes one. That it is a 400 is Logto's, and pinned by its tests.
pub(in crate::http::logto) fn of_unlink(error: TokensError) -> ApiError {
    match error {
        TokensError::MissingUserScope(_) => {
            ApiError::new(BAD_REQUEST, "auth.unauthorized", "Unauthorized. A scope is missing.")
        }
        error => error.into(),
    }
}

/// Where a connector is made: what it is made from is an entity too. Enterprises' ones refuse storage with 400.
pub(in crate::http::logto) fn of_connector(family: Family) -> fn(TokensError) -> ApiError {
    match family {
        Family::Social => |error| match error {
            TokensError::UnknownConnector => ApiError::entity_not_found(),
            error => error.into(),
        },
        Family::Sso => |error| match error {
            TokensError::UnknownConnector => ApiError::entity_not_found(),
            TokensError::NoTokenStorage => {
                let message = "The connector does not store tokens.";
                ApiError::new(BAD_REQUEST, "connector.token_storage_not_supported", message)
            }
            error => told(Family::Sso)(error),
        },
    }
}

/// Where an administrator links by a connector: one of another type is none.
pub(in crate::http::logto) fn of_admin_link(error: TokensError) -> ApiError {
    match error {
        TokensError::WrongConnector => TokensError::UnknownConnector.into(),
        error => of_exchange(Family::Social)(error),
    }
}

#[cfg(test)]
mod tests {
    use actix_web::ResponseError;
    use actix_web::body::to_bytes;
    use actix_web::http::header;

    use super::*;
    use crate::identity::{MissingScope, Scope};

    async fn shown(error: ApiError) -> (u16, Value, Option<String>) {
        let response = error.error_response();
        let retry = response.headers().get(header::RETRY_AFTER);
        let retry = retry.map(|value| value.to_str().unwrap().to_owned());
        let challenges = response.headers().contains_key(header::WWW_AUTHENTICATE);
        let status = response.status().as_u16();
        assert_eq!(challenges, status == 401);
        let body = to_bytes(response.into_body()).await.unwrap();
        (status, serde_json::from_slice(&body).unwrap(), retry)
    }

    async fn code(error: ApiError) -> (u16, String) {
        let (status, body, _) = shown(error).await;
        (status, body["code"].as_str().unwrap_or("-").to_owned())
    }

    fn fault(kind: ProviderFault) -> TokensError {
        TokensError::Provider(ProviderError { kind, retry_after: Some(Duration::from_secs(7)) })
    }

    fn wrong_target() -> TokensError {
        TokensError::WrongTarget { expected: "github".to_owned(), actual: "google".to_owned() }
    }

    #[actix_web::test]
    async fn refusals_have_the_contracts_codes() {
        use TokensError as E;
        let invalid = E::Invalid { field: "username".to_owned(), reason: "too long".to_owned() };
        for (error, status, wanted) in [
            (E::Forbidden(MissingScope(Scope::UsersAdmin)), 403, "auth.forbidden"),
            (E::MissingUserScope("identities"), 403, "auth.forbidden"),
            (E::NotFound("user"), 404, "entity.not_found"),
            (E::NoIdentity(Family::Social), 404, "user.identity_not_exist"),
            (E::NoIdentity(Family::Sso), 404, "user.enterprise_sso_identity_not_exists"),
            (E::NothingStored, 404, "secrets.third_party_token_set.token_not_found"),
            (E::NeedsReauthorization, 401, "secrets.third_party_token_set.access_token_expired"),
            (E::NotEnabled, 400, "account_center.not_enabled"),
            (E::NotEditable, 400, "account_center.field_not_editable"),
            (E::NoVerification, 400, "verification_record.not_found"),
            (E::ProofNeeded, 401, "verification_record.permission_denied"),
            (wrong_target(), 422, "verification_record.social_verification.invalid_target"),
            (E::NoTokens, 422, "verification_record.social_verification.token_response_not_found"),
            (E::NotLinked, 422, "user.identity_not_exists_in_current_user"),
            (E::IdentityInUse { by_caller: false }, 422, "user.identity_already_in_use"),
            (E::IdentityInUse { by_caller: true }, 400, "user.identity_already_in_use"),
            (E::LastSignIn, 400, "user.last_sign_in_method_required"),
            (E::NoTokenStorage, 422, "connector.token_storage_not_supported"),
            (E::UnknownConnector, 422, "session.invalid_connector_id"),
            (E::WrongConnector, 400, "connector.unexpected_type"),
            (E::InsufficientInfo, 400, "session.insufficient_info"),
            (fault(ProviderFault::Config), 400, "connector.general"),
            (fault(ProviderFault::GrantDead), 400, "connector.general"),
            (fault(ProviderFault::Transient), 400, "connector.general"),
            (fault(ProviderFault::Policy), 400, "connector.general"),
            (fault(ProviderFault::Protocol), 400, "connector.invalid_response"),
            (E::Taken("username"), 422, "user.username_already_in_use"),
            (E::Taken("id"), 422, "entity.unique_integrity_violation"),
            (invalid, 400, "guard.invalid_input"),
            (E::Vault(VaultError::Integrity), 500, "-"),
            (E::Vault(VaultError::NotFound("record")), 500, "-"),
            (E::Busy, 503, "-"),
            (E::Quarantined, 503, "-"),
        ] {
            let name = format!("{error:?}");
            assert_eq!(code(error.into()).await, (status, wanted.to_owned()), "{name}");
        }
    }

    #[actix_web::test]
    async fn some_answers_are_the_routes() {
        let wanted = |status: u16, code: &str| (status, code.to_owned());
        let scope = || TokensError::MissingUserScope("identities");
        assert_eq!(code(of_link(scope())).await, wanted(401, "auth.unauthorized"));
        assert_eq!(code(of_unlink(scope())).await, wanted(400, "auth.unauthorized"));
        assert_eq!(code(of_token(Family::Sso)(scope())).await, wanted(403, "auth.forbidden"));

        let dead = || fault(ProviderFault::GrantDead);
        let refused = wanted(401, "connector.social_auth_code_invalid");
        assert_eq!(code(of_exchange(Family::Social)(dead())).await, refused);
        assert_eq!(code(of_admin_link(dead())).await, refused);
        let failed = wanted(401, "connector.authorization_failed");
        assert_eq!(code(of_exchange(Family::Sso)(dead())).await, failed);

        let storage = "connector.token_storage_not_supported";
        for (family, status) in [(Family::Social, 422), (Family::Sso, 400)] {
            assert_eq!(
                code(of_connector(family)(TokensError::NoTokenStorage)).await,
                wanted(status, storage)
            );
            assert_eq!(code(of_token(family)(TokensError::NoTokenStorage)).await, wanted(422, storage));
        }
        let gone = || TokensError::UnknownConnector;
        assert_eq!(code(of_token(Family::Sso)(gone())).await, wanted(404, "entity.not_found"));
        assert_eq!(code(of_token(Family::Social)(gone())).await, wanted(422, "session.invalid_connector_id"));
        assert_eq!(code(of_connector(Family::Social)(gone())).await, wanted(404, "entity.not_found"));
        let other = of_admin_link(TokensError::WrongConnector);
        assert_eq!(code(other).await, wanted(422, "session.invalid_connector_id"));
    }

    #[actix_web::test]
    async fn a_providers_failure_is_told_in_our_words_and_when_to_come_back() {
        let (_, body, retry) = shown(fault(ProviderFault::Transient).into()).await;
        assert_eq!((retry.as_deref(), body.get("data")), (Some("7"), None));

        let (status, body, retry) = shown(told(Family::Sso)(fault(ProviderFault::Transient))).await;
        assert_eq!((status, retry.as_deref()), (401, Some("7")));
        let message = "The provider does not answer now.";
        assert_eq!(body["data"], json!({ "ssoErrorCode": "authorization_failed", "message": message }));

        for family in [Family::Social, Family::Sso] {
            let (status, body, _) = shown(told(family)(fault(ProviderFault::Protocol))).await;
            assert_eq!((status, &body["data"]["name"]), (400, &json!("ZodError")));
            assert_eq!(body["data"]["issues"][0]["path"], json!([]));
        }
    }

    #[actix_web::test]
    async fn what_fails_inside_is_told_to_the_log_only() {
        let error = ApiError::from(TokensError::Vault(VaultError::Integrity));
        assert!(error.cause().is_some());
        let (_, body, _) = shown(error).await;
        assert_eq!(body, json!({ "message": "Internal server error." }));

        let (_, body, retry) = shown(TokensError::Busy.into()).await;
        assert_eq!(body, json!({ "message": "Service Unavailable." }));
        assert_eq!(retry.as_deref(), Some("1"));
        assert!(shown(TokensError::Quarantined.into()).await.2.is_some());
    }
}
