//! What the native API says of users, connectors and token sets. Nothing of what a provider said.

use super::{Code, Problem, outage_of};
use crate::audit::AuditCode;
use crate::tokens::{ProviderFault, TokensError};

impl From<TokensError> for Problem {
    fn from(error: TokensError) -> Self {
        let code = match &error {
            TokensError::MissingUserScope(_) => Code::InsufficientScope,
            TokensError::NotFound(_)
            | TokensError::NoIdentity(_)
            | TokensError::NothingStored
            | TokensError::UnknownConnector => Code::NotFound,
            TokensError::NeedsReauthorization => Code::NeedsReauthorization,
            TokensError::Provider(provider) => match provider.kind {
                ProviderFault::GrantDead => Code::NeedsReauthorization,
                ProviderFault::Transient => Code::ProviderUnavailable,
                ProviderFault::Config | ProviderFault::Protocol | ProviderFault::Policy => {
                    Code::ProviderFailed
                }
            },
            TokensError::Busy => Code::Busy,
            TokensError::Quarantined => Code::Quarantined,
            TokensError::Forbidden(_)
            | TokensError::Vault(_)
            | TokensError::Audit(_)
            | TokensError::Db(_) => {
                return lower(error);
            }
            // What only the account's own API can run into.
            _ => Code::Invalid,
        };
        let (text, wait) = (error.to_string(), retry_after(&error));
        let problem = match code.status().is_server_error() {
            true => Self::new(code).caused_by(error),
            false => Self::new(code).detail(text),
        };
        match wait {
            Some(wait) => problem.retry_after(wait),
            None => problem,
        }
    }
}

fn retry_after(error: &TokensError) -> Option<std::time::Duration> {
    match error {
        TokensError::Provider(provider) if provider.kind == ProviderFault::Transient => provider.retry_after,
        _ => None,
    }
}

/// What lower layers have their own words for.
fn lower(error: TokensError) -> Problem {
    match error {
        TokensError::Forbidden(missing) => missing.into(),
        TokensError::Vault(error) => error.into(),
        TokensError::Audit(error) => error.into(),
        error => Problem::new(outage_of(error.audit_code())).caused_by(error),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::audit::AuditError;
    use crate::identity::{MissingScope, Scope};
    use crate::tokens::{Family, ProviderError};

    #[test]
    fn each_refusal_has_its_code_and_waits_are_the_providers() {
        let provider = |kind| {
            let retry_after = Some(Duration::from_secs(30));
            TokensError::Provider(ProviderError { kind, retry_after })
        };
        for (error, name, wait) in [
            (MissingScope(Scope::TokenSetsRead).into(), "insufficient-scope", None),
            (TokensError::NotFound("user"), "not-found", None),
            (TokensError::NoIdentity(Family::Social), "not-found", None),
            (TokensError::NothingStored, "not-found", None),
            (TokensError::NeedsReauthorization, "needs-reauthorization", None),
            (provider(ProviderFault::GrantDead), "needs-reauthorization", None),
            (provider(ProviderFault::Transient), "provider-unavailable", Some(30)),
            (provider(ProviderFault::Config), "provider-failed", None),
            (provider(ProviderFault::Protocol), "provider-failed", None),
            (provider(ProviderFault::Policy), "provider-failed", None),
            (TokensError::Busy, "busy", Some(1)),
            (TokensError::Quarantined, "quarantined", None),
            (AuditError::Unavailable.into(), "audit-unavailable", Some(1)),
            (TokensError::Taken("username"), "invalid", None),
        ] {
            let problem = Problem::from(error);
            let found = (problem.code().name(), problem.wait().map(|wait| wait.as_secs()));
            assert_eq!(found, (name, wait));
        }
    }
}
