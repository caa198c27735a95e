//! Checks an access token. Pure: token, keys, expectations and time in, a verdict out.
//!
//! Only what this issuer makes is accepted: three parts, a header of exactly `alg`, `typ` and `kid`
//! (so no `crit`, `jku`, `jwk`, `x5u` or `b64`), one of the tenant's published keys with the one algorithm that
//! it signs with, and claims of the right JSON type. The key is found before the signature is checked, the
//! claims are read after.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::signing::json;
use crate::clock::Timestamp;
use crate::identity::{Scope, ScopeSet};
use crate::ids::ClientId;
use crate::keys::SigningKey;

/// Far above any token of this issuer; the signature of a 4096 bit RSA key is 683 characters of it.
pub(super) const TOKEN_MAX: usize = 4096;

/// RFC 9068, section 2.1.
pub(super) const TYP: &str = "at+jwt";

/// What a token must be for.
pub(super) struct Expected<'a> {
    pub(super) issuer: &'a str,
    pub(super) audience: &'a str,
    pub(super) now: Timestamp,
}

/// What a good token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Verified {
    pub(super) client: ClientId,
    pub(super) scopes: ScopeSet,
    /// Seconds since the epoch.
    pub(super) expires: i64,
    /// The key that signed it: once that is published no more, the token is worth nothing.
    pub(super) kid: String,
}

impl Verified {
    pub(super) const fn is_expired(&self, now: Timestamp) -> bool {
        self.expires <= now.as_secs()
    }
}

/// Serde refuses every member it does not know.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UnverifiedHeader {
    alg: String,
    typ: String,
    kid: String,
}

/// Types are checked (a text is no `exp`); more claims may come in later versions.
#[derive(Deserialize)]
#[expect(dead_code, reason = "claims that only have to be there, once and of the right type")]
struct Claims {
    iss: String,
    sub: String,
    aud: String,
    client_id: ClientId,
    scope: String,
    iat: i64,
    exp: i64,
    #[serde(default, deserialize_with = "present")]
    nbf: Option<i64>,
    jti: String,
}

/// A member that may be absent, and is no `null` if it is there.
fn present<'de, D: Deserializer<'de>>(input: D) -> Result<Option<i64>, D::Error> {
    i64::deserialize(input).map(Some)
}

/// Says what the token grants, or why it is not accepted.
pub(super) fn verify(
    token: &str,
    keys: &[SigningKey],
    expected: &Expected<'_>,
) -> Result<Verified, &'static str> {
    let (key, algorithm, kid) = find_key(token, keys)?;
    let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation(algorithm, expected));
    let claims = claims.map_err(|error| reason(error.kind()))?.claims;
    if claims.sub != claims.client_id.as_str() {
        return Err("subject is not the client");
    }
    if claims.nbf.is_some_and(|nbf| nbf > expected.now.as_secs()) {
        return Err("not valid yet");
    }
    let scopes = claims.scope.split_ascii_whitespace().filter_map(Scope::parse).collect();
    let verified = Verified { client: claims.client_id, scopes, expires: claims.exp, kid: kid.to_owned() };
    if verified.is_expired(expected.now) { Err("expired") } else { Ok(verified) }
}

/// Reads the header strictly and finds the key it names among the tenant's own. The algorithm is the key's; that
/// the header names it too decides nothing.
fn find_key<'a>(
    token: &str,
    keys: &'a [SigningKey],
) -> Result<(DecodingKey, Algorithm, &'a str), &'static str> {
    let mut parts = token.split('.');
    let (Some(header), Some(_), Some(_), None) = (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err("not a compact JWS");
    };
    let header = URL_SAFE_NO_PAD.decode(header).map_err(|_| "header is not base64url")?;
    let header = json::object(&header).map_err(|_| "header refused")?;
    let header: UnverifiedHeader =
        serde_json::from_value(Value::Object(header)).map_err(|_| "header refused")?;
    if header.typ != TYP {
        return Err("not an access token");
    }
    let key = keys.iter().find(|key| key.kid == header.kid).ok_or("unknown key")?;
    if header.alg != key.alg {
        return Err("algorithm refused");
    }
    let (decoding, algorithm) = decoding_key(key)?;
    Ok((decoding, algorithm, &key.kid))
}

/// The key in the form that its own algorithm needs; one that is no public key, or of another kind, is refused.
fn decoding_key(key: &SigningKey) -> Result<(DecodingKey, Algorithm), &'static str> {
    let member = |name| key.jwk.get(name).and_then(Value::as_str).unwrap_or_default();
    let (algorithm, kty, crv) = match key.alg {
        "ES256" => (Algorithm::ES256, "EC", "P-256"),
        "ES384" => (Algorithm::ES384, "EC", "P-384"),
        "RS256" => (Algorithm::RS256, "RSA", ""),
        "PS256" => (Algorithm::PS256, "RSA", ""),
        "EdDSA" => (Algorithm::EdDSA, "OKP", "Ed25519"),
        _ => return Err("algorithm refused"),
    };
    if (member("kty"), member("crv")) != (kty, crv) {
        return Err("unusable key");
    }
    let decoding = match kty {
        "EC" => DecodingKey::from_ec_components(member("x"), member("y")),
        "RSA" => DecodingKey::from_rsa_components(member("n"), member("e")),
        _ => DecodingKey::from_ed_components(member("x")),
    };
    Ok((decoding.map_err(|_| "unusable key")?, algorithm))
}

fn validation(algorithm: Algorithm, expected: &Expected<'_>) -> Validation {
    let mut validation = Validation::new(algorithm);
    validation.set_audience(&[expected.audience]);
    validation.set_issuer(&[expected.issuer]);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    // The library has a clock of its own; `exp` and `nbf` are compared with ours, after their type was checked.
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.leeway = 0;
    validation
}

fn reason(kind: &jsonwebtoken::errors::ErrorKind) -> &'static str {
    use jsonwebtoken::errors::ErrorKind;
    match kind {
        ErrorKind::InvalidSignature => "wrong signature",
        ErrorKind::InvalidIssuer => "another issuer",
        ErrorKind::InvalidAudience => "another audience",
        ErrorKind::MissingRequiredClaim(_) => "a claim is missing",
        ErrorKind::InvalidAlgorithm => "algorithm refused",
        _ => "malformed",
    }
}

#[cfg(test)]
mod tests;
