//! What the issuer says of itself in public: the JWKS (RFC 7517, section 5) and the discovery document (`OpenID`
//! Connect Discovery 1.0, section 3; RFC 8414, section 2). Pure. Only what is really served is named.

use std::time::Duration;

use serde_json::{Value, json};

use crate::identity::Scope;
use crate::issuer::exchange::TOKEN_EXCHANGE;
use crate::issuer::verify::ALL_SCOPES;
use crate::keys::SigningKey;

/// What verifiers are told.
pub struct Published {
    /// `iss`, below which the documents and endpoints are.
    pub issuer: String,
    /// The keys in the order of the JWKS.
    pub keys: Vec<SigningKey>,
    /// How long a verifier may go without looking again.
    pub max_age: Duration,
}

impl Published {
    /// The JWKS document.
    pub fn jwks(&self) -> Value {
        let keys: Vec<_> = self.keys.iter().map(|key| &key.jwk).collect();
        json!({ "keys": keys })
    }

    /// The discovery document. No user signs in here, so there is no authorization endpoint and no response
    /// type; the list is there, because both standards require it.
    pub fn configuration(&self) -> Value {
        let issuer = &self.issuer;
        let scopes: Vec<_> = [ALL_SCOPES].into_iter().chain(Scope::ALL.map(Scope::name)).collect();
        json!({
            "issuer": issuer,
            "jwks_uri": format!("{issuer}/jwks"),
            "token_endpoint": format!("{issuer}/token"),
            "grant_types_supported": ["client_credentials", TOKEN_EXCHANGE],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
            "scopes_supported": scopes,
            "response_types_supported": [],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": self.algorithms(),
        })
    }

    /// What the keys may be used with, in the contract's order (section 9.6). An RSA key whose entry names no
    /// algorithm signs RS256, and says that verifiers may take PS256 too.
    fn algorithms(&self) -> Vec<&'static str> {
        let has = |alg: &str| {
            self.keys.iter().any(|key| {
                let is_open = key.jwk["kty"] == "RSA" && key.jwk.get("alg").is_none();
                key.alg == alg || (alg == "PS256" && is_open)
            })
        };
        ["PS256", "RS256", "ES256", "ES384", "EdDSA"].into_iter().filter(|alg| has(alg)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(alg: &'static str, jwk: Value) -> SigningKey {
        SigningKey { kid: "k".to_owned(), alg, jwk }
    }

    fn algorithms(keys: Vec<SigningKey>) -> Value {
        let published = Published { issuer: "i".to_owned(), keys, max_age: Duration::ZERO };
        published.configuration()["id_token_signing_alg_values_supported"].clone()
    }

    #[test]
    fn the_algorithms_are_those_of_the_published_keys_in_one_order() {
        let ec = || key("ES384", json!({ "kty": "EC", "alg": "ES384" }));
        let open = || key("RS256", json!({ "kty": "RSA" }));

        assert_eq!(algorithms(vec![ec()]), json!(["ES384"]));
        assert_eq!(algorithms(vec![ec(), open()]), json!(["PS256", "RS256", "ES384"]));
        assert_eq!(algorithms(vec![key("RS256", json!({ "kty": "RSA", "alg": "RS256" }))]), json!(["RS256"]));
        assert_eq!(algorithms(vec![key("ES256", json!({ "kty": "EC" })), ec()]), json!(["ES256", "ES384"]));
    }

    #[test]
    fn the_documents_are_below_the_issuer() {
        let published =
            Published { issuer: "https://k.test/oidc".to_owned(), keys: Vec::new(), max_age: Duration::ZERO };
        let document = published.configuration();

        assert_eq!(document["jwks_uri"], "https://k.test/oidc/jwks");
        assert_eq!(document["token_endpoint"], "https://k.test/oidc/token");
        assert_eq!(published.jwks(), json!({ "keys": [] }));
    }
}
