//! ID tokens (OpenID Connect Core, section 3.1.3.7) and the key sets they are verified with.
//!
//! The key decides the algorithm and the header only names it; a set with a symmetric key is refused whole, since
//! everybody who reads the set could sign with it.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, DecodingKey};
use serde_json::{Map, Value};

use crate::clock::Timestamp;

use super::strict::Members;

/// What an ID token must say.
#[derive(Clone, Copy, Debug)]
pub struct ExpectedIdToken<'a> {
    /// The issuer; `None` where a connector was configured without one.
    pub issuer: Option<&'a str>,
    /// The client's id.
    pub audience: &'a str,
    /// The nonce of the authorisation request, if one was sent.
    pub nonce: Option<&'a str>,
    /// The present moment.
    pub now: Timestamp,
    /// How far the provider's clock may be from ours.
    pub skew: Duration,
}

/// A provider's public keys, and when they were fetched.
pub(super) struct KeySet {
    keys: Vec<Map<String, Value>>,
    pub(super) fetched: Instant,
}

/// Why an ID token is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// No key of the set fits: the set may have a new one by now.
    UnknownKey,
    /// For good; a word for the log.
    Refused(&'static str),
}

use Fault::Refused;

impl KeySet {
    /// Reads a JWKS (RFC 7517). `None` if it is none, or holds a symmetric key.
    pub(super) fn read(members: &Members, fetched: Instant) -> Option<Self> {
        let keys: Vec<Map<String, Value>> = members.read("keys").ok()??;
        let is_symmetric = |key: &Map<String, Value>| key.get("kty").is_none_or(|kty| kty == "oct");
        (!keys.iter().any(is_symmetric)).then_some(Self { keys, fetched })
    }

    /// The one key that has this id and is for this algorithm. Without an id it must be the only one for it.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm, name: &str) -> Result<DecodingKey, Fault> {
        let fits = |key: &&Map<String, Value>| {
            let member = |name| key.get(name).and_then(Value::as_str);
            kid.is_none_or(|kid| member("kid") == Some(kid))
                && member("use").is_none_or(|purpose| purpose == "sig")
                && member("alg").is_none_or(|alg| alg == name)
                && (member("kty"), member("crv")) == kind(algorithm)
        };
        let mut found = self.keys.iter().filter(fits);
        let key = found.next().ok_or(Fault::UnknownKey)?;
        if found.next().is_some() {
            return Err(Refused("several keys"));
        }
        let member = |name| key.get(name).and_then(Value::as_str).unwrap_or_default();
        let decoding = match member("kty") {
            "RSA" => DecodingKey::from_rsa_components(member("n"), member("e")),
            "EC" => DecodingKey::from_ec_components(member("x"), member("y")),
            _ => DecodingKey::from_ed_components(member("x")),
        };
        decoding.map_err(|_| Refused("unusable key"))
    }

    /// The claims of a token that is genuine and says what is expected.
    pub(super) fn verify(
        &self,
        token: &str,
        expected: &ExpectedIdToken<'_>,
    ) -> Result<Map<String, Value>, Fault> {
        let mut parts = token.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Refused("not a compact JWS"));
        };
        let key = self.key_for(&decode(header)?)?;
        let message = &token[..header.len() + 1 + payload.len()];
        if !jsonwebtoken::crypto::verify(signature, message.as_bytes(), &key.1, key.0).unwrap_or(false) {
            return Err(Refused("wrong signature"));
        }
        let claims = decode(payload)?.into_map().map_err(|_| Refused("malformed"))?;
        check_claims(&claims, expected)?;
        Ok(claims)
    }

    fn key_for(&self, unverified_header: &Members) -> Result<(Algorithm, DecodingKey), Fault> {
        // RFC 7515, section 4.1.11: whoever does not understand an extension must refuse it.
        if unverified_header.has("crit") {
            return Err(Refused("critical extension"));
        }
        let text = |name| unverified_header.read::<String>(name).map_err(|_| Refused("malformed"));
        let name = text("alg")?.unwrap_or_default();
        let algorithm = algorithm(&name).ok_or(Refused("algorithm"))?;
        Ok((algorithm, self.find(text("kid")?.as_deref(), algorithm, &name)?))
    }
}

fn decode(part: &str) -> Result<Members, Fault> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| Refused("malformed"))?;
    Members::from_json(&bytes).map_err(|_| Refused("malformed"))
}

fn algorithm(name: &str) -> Option<Algorithm> {
    Some(match name {
        "RS256" => Algorithm::RS256,
        "RS384" => Algorithm::RS384,
        "RS512" => Algorithm::RS512,
        "PS256" => Algorithm::PS256,
        "PS384" => Algorithm::PS384,
        "PS512" => Algorithm::PS512,
        "ES256" => Algorithm::ES256,
        "ES384" => Algorithm::ES384,
        "EdDSA" => Algorithm::EdDSA,
        _ => return None,
    })
}

/// `kty` and `crv` of the keys that an algorithm takes.
fn kind(algorithm: Algorithm) -> (Option<&'static str>, Option<&'static str>) {
    match algorithm {
        Algorithm::ES256 => (Some("EC"), Some("P-256")),
        Algorithm::ES384 => (Some("EC"), Some("P-384")),
        Algorithm::EdDSA => (Some("OKP"), Some("Ed25519")),
        _ => (Some("RSA"), None),
    }
}

fn check_claims(claims: &Map<String, Value>, expected: &ExpectedIdToken<'_>) -> Result<(), Fault> {
    let text = |name| claims.get(name).and_then(Value::as_str);
    // RFC 7519, section 2: seconds, and fractions are allowed.
    let moment = |name| {
        let seconds = claims.get(name).and_then(Value::as_f64).ok_or(Refused(name))?;
        #[expect(clippy::cast_possible_truncation, reason = "saturates, and no such moment is near")]
        Ok(Timestamp::from_micros((seconds * 1e6) as i64))
    };
    if expected.issuer.is_some_and(|issuer| text("iss") != Some(issuer)) {
        return Err(Refused("iss"));
    }
    let audiences = match claims.get("aud") {
        Some(Value::Array(several)) => several.iter().map(Value::as_str).collect(),
        other => vec![other.and_then(Value::as_str)],
    };
    if !audiences.contains(&Some(expected.audience)) {
        return Err(Refused("aud"));
    }
    if audiences.len() > 1 && text("azp") != Some(expected.audience) {
        return Err(Refused("azp"));
    }
    if text("sub").is_none_or(str::is_empty) {
        return Err(Refused("sub"));
    }
    if moment("exp")?.plus(expected.skew) <= expected.now {
        return Err(Refused("exp"));
    }
    let latest = expected.now.plus(expected.skew);
    if moment("iat")? > latest || (claims.contains_key("nbf") && moment("nbf")? > latest) {
        return Err(Refused("not yet valid"));
    }
    if expected.nonce.is_some_and(|nonce| text("nonce") != Some(nonce)) {
        return Err(Refused("nonce"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
