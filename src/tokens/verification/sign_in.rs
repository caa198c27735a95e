//! The two halves of a sign-in at a provider: what is asked for, and the answer that has to fit it.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::clock::Timestamp;
use crate::db::DbError;
use crate::ids::{ConnectorId, generate_token};
use crate::tokens::connectors::{Definition, Endpoints};
use crate::tokens::model::StartVerification;
use crate::tokens::providers::{self, AuthorizationRequest};
use crate::tokens::{ProviderError, ProviderFault, TokensError, invalid};

/// Longest text of a callback.
const TEXT_MAX: usize = 8192;

/// What is sealed while a sign-in goes on.
#[derive(Serialize, Deserialize)]
pub(super) struct Asked {
    pub(super) connector: ConnectorId,
    pub(super) expires_at: Timestamp,
    pub(super) state: String,
    pub(super) redirect_uri: String,
    pub(super) scope: Option<String>,
    pub(super) nonce: Option<String>,
    pub(super) code_verifier: Option<String>,
}

/// The answer of a sign-in as the client passes it on.
pub(super) struct Callback {
    pub(super) code: String,
    pub(super) state: String,
    pub(super) redirect_uri: String,
    pub(super) iss: Option<String>,
}

impl Callback {
    pub(super) fn read(data: &Map<String, Value>) -> Result<Self, TokensError> {
        let text = |name: &str| {
            let text = data.get(name).and_then(Value::as_str).unwrap_or_default();
            if text.len() <= TEXT_MAX { text.to_owned() } else { String::new() }
        };
        if data.get("error").is_some_and(|error| !error.is_null()) {
            // What the provider says beside it is not for our ears.
            let kind = ProviderFault::Policy;
            return Err(TokensError::Provider(ProviderError { kind, retry_after: None }));
        }
        let callback = Self {
            code: text("code"),
            state: text("state"),
            redirect_uri: text("redirectUri"),
            iss: Some(text("iss")).filter(|iss| !iss.is_empty()),
        };
        for (member, value) in
            [("code", &callback.code), ("state", &callback.state), ("redirectUri", &callback.redirect_uri)]
        {
            if value.is_empty() {
                return Err(invalid(format!("connectorData.{member}"), "Required"));
            }
        }
        Ok(callback)
    }
}

/// What is asked for and where the person goes for it.
pub(super) fn asked(
    definition: &Definition,
    endpoints: &Endpoints,
    start: &StartVerification,
    expires_at: Timestamp,
) -> Result<(Asked, String), TokensError> {
    let Definition { settings, factory, .. } = definition;
    let random = || match generate_token("") {
        Ok(token) => Ok(token.expose_secret().to_owned()),
        // Without randomness nothing can be begun now, as without storage.
        Err(_) => Err(DbError::Unavailable(None)),
    };
    let shown = providers::Endpoints {
        authorization: &endpoints.authorization,
        supports_pkce: endpoints.supports_pkce,
        promises_iss: endpoints.promises_iss,
    };
    let nonce = settings.needs_nonce(factory).then(random).transpose()?;
    let code_verifier = settings.wants_pkce(factory, &shown).then(random).transpose()?;
    let challenge = code_verifier.as_ref().map(|verifier| URL_SAFE_NO_PAD.encode(Sha256::digest(verifier)));
    let request = AuthorizationRequest {
        authorization_endpoint: &endpoints.authorization,
        state: &start.state,
        redirect_uri: &start.redirect_uri,
        scope: start.scope.as_deref(),
        nonce: nonce.as_deref(),
        code_challenge: challenge.as_deref(),
    };
    let uri = settings.authorization_uri(factory, &request);
    let uri = uri.map_err(|bad| invalid(bad.member, bad.rule))?;
    let asked = Asked {
        connector: definition.connector.id.clone(),
        expires_at,
        state: start.state.clone(),
        redirect_uri: start.redirect_uri.clone(),
        scope: start.scope.clone().filter(|scope| !scope.trim().is_empty()),
        nonce,
        code_verifier,
    };
    Ok((asked, uri))
}

/// Whether an answer is the one to what was asked (RFC 9700, section 4; RFC 9207).
pub(super) fn fits(callback: &Callback, asked: &Asked, endpoints: &Endpoints) -> Result<(), TokensError> {
    if callback.state != asked.state {
        return Err(TokensError::Callback("state"));
    }
    if callback.redirect_uri != asked.redirect_uri {
        return Err(TokensError::Callback("redirectUri"));
    }
    let shown = providers::Endpoints {
        authorization: &endpoints.authorization,
        supports_pkce: endpoints.supports_pkce,
        promises_iss: endpoints.promises_iss,
    };
    match shown.accepts_iss(endpoints.issuer.as_deref(), callback.iss.as_deref()) {
        true => Ok(()),
        false => Err(TokensError::Callback("iss")),
    }
}
