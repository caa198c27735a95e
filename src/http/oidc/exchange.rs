//! Token exchange at the token endpoint (RFC 8693): its parameters, its answer, its refusals.

use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

use super::{OauthError, outage, with_token};
use crate::audit::AuditCode;
use crate::http::secret_body::SecretJson;
use crate::issuer::{ExchangeRequest, Exchanged, IssuedToken};
use crate::tokens::{ProviderError, ProviderFault, TokensError};

/// Takes a parameter that only an exchange has; whether it was there already. Others are ignored (RFC 6749,
/// section 3.2), Auth0's `login_hint` among them.
pub(super) fn put(request: &mut ExchangeRequest, name: &str, value: String) -> bool {
    let place = match name {
        "subject_token" => return request.subject_token.replace(SecretString::from(value)).is_some(),
        "actor_token" => return std::mem::replace(&mut request.has_actor, true),
        "subject_token_type" => &mut request.subject_token_type,
        "requested_token_type" => &mut request.requested_token_type,
        "audience" => &mut request.audience,
        "connection" => &mut request.connection,
        "reason" => &mut request.reason,
        _ => return false,
    };
    place.replace(value).is_some()
}

/// RFC 8693, section 2.2.1.
pub(super) fn body(token: &Exchanged) -> SecretJson {
    match token {
        Exchanged::User(token) => {
            let meta = json!({
                "issued_token_type": IssuedToken::EXCHANGED_TYPE,
                "token_type": "Bearer",
                "expires_in": token.expires_in,
                "scope": token.scope,
            });
            with_token(&meta, token.access_token.expose_secret())
        }
        Exchanged::ThirdParty { released, kind } => {
            let token_type = released.token_type().unwrap_or("Bearer");
            let mut meta = json!({ "issued_token_type": kind, "token_type": token_type });
            if let Some(seconds) = released.expires_in() {
                meta["expires_in"] = json!(seconds);
            }
            if let Some(scope) = released.scope() {
                meta["scope"] = json!(scope);
            }
            released.with_access_token(|token| with_token(&meta, token))
        }
    }
}

/// What a client is told of a provider's token that it does not get. Nothing of what the provider said.
pub(super) fn refusal(error: &TokensError) -> OauthError {
    let again = || OauthError::new("invalid_grant").explain("the person has to authorise again");
    match error {
        TokensError::Forbidden(missing) => {
            OauthError::new("unauthorized_client").explain(&missing.to_string())
        }
        TokensError::NeedsReauthorization => again(),
        TokensError::Provider(ProviderError { kind, retry_after }) => match kind {
            ProviderFault::Transient => later(retry_after.map_or(1, |wait| wait.as_secs().max(1))),
            ProviderFault::GrantDead => again(),
            ProviderFault::Config | ProviderFault::Protocol | ProviderFault::Policy => {
                OauthError::new("invalid_grant").explain("the provider gives no token for this connection")
            }
        },
        TokensError::Busy => later(1),
        // Until an operator has released the restored installation.
        TokensError::Quarantined => later(60),
        TokensError::Vault(_) | TokensError::Audit(_) | TokensError::Db(_) => {
            OauthError::new(outage(error.audit_code()))
        }
        TokensError::MissingUserScope(_) => OauthError::new("invalid_grant").explain(&error.to_string()),
        TokensError::NotFound(_)
        | TokensError::NoIdentity(_)
        | TokensError::NothingStored
        | TokensError::NoTokenStorage
        | TokensError::UnknownConnector
        | TokensError::WrongConnector
        | TokensError::Invalid { .. } => {
            OauthError::new("invalid_target").explain("nothing is stored for this connection")
        }
        // Refusals of changes, which an exchange makes none of.
        _ => OauthError::new("invalid_request"),
    }
}

fn later(seconds: u64) -> OauthError {
    OauthError { retry_after: Some(seconds), ..OauthError::new("temporarily_unavailable") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use actix_web::body::to_bytes;
    use serde_json::Value;

    use super::*;
    use crate::identity::{MissingScope, Scope};
    use crate::tokens::Family;

    #[test]
    fn refusals_are_sorted_by_what_the_client_can_do() {
        let provider = |kind, wait: Option<u64>| {
            TokensError::Provider(ProviderError { kind, retry_after: wait.map(Duration::from_secs) })
        };
        for (error, status, name, retry) in [
            (MissingScope(Scope::TokenSetsExchange).into(), 400, "unauthorized_client", None),
            (TokensError::NothingStored, 400, "invalid_target", None),
            (TokensError::NoIdentity(Family::Social), 400, "invalid_target", None),
            (TokensError::UnknownConnector, 400, "invalid_target", None),
            (TokensError::NeedsReauthorization, 400, "invalid_grant", None),
            (provider(ProviderFault::GrantDead, None), 400, "invalid_grant", None),
            (provider(ProviderFault::Config, None), 400, "invalid_grant", None),
            (provider(ProviderFault::Protocol, None), 400, "invalid_grant", None),
            (provider(ProviderFault::Policy, None), 400, "invalid_grant", None),
            (provider(ProviderFault::Transient, None), 503, "temporarily_unavailable", Some(1)),
            (provider(ProviderFault::Transient, Some(30)), 503, "temporarily_unavailable", Some(30)),
            (TokensError::Busy, 503, "temporarily_unavailable", Some(1)),
            (TokensError::Quarantined, 503, "temporarily_unavailable", Some(60)),
            (crate::audit::AuditError::Unavailable.into(), 503, "temporarily_unavailable", Some(1)),
        ] {
            let told = refusal(&error);
            assert_eq!(
                (told.status.as_u16(), told.error, told.retry_after),
                (status, name, retry),
                "{error}"
            );
        }
        let again = refusal(&TokensError::NeedsReauthorization).description;
        assert_eq!(again.as_deref(), Some("the person has to authorise again"));
    }

    #[actix_web::test]
    async fn a_users_token_says_of_which_type_it_is() {
        let token = IssuedToken {
            access_token: SecretString::from("lut_x"),
            expires_in: 3600,
            scope: "openid identities".to_owned(),
        };
        let bytes = to_bytes(body(&Exchanged::User(token)).finish()).await.unwrap();
        let told: Value = serde_json::from_slice(&bytes).unwrap();

        let wanted = json!({
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token", "token_type": "Bearer",
            "expires_in": 3600, "scope": "openid identities", "access_token": "lut_x"
        });
        assert_eq!(told, wanted);
    }
}
