//! Public keys as JWK (RFC 7517, RFC 7518) and their thumbprint (RFC 7638).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::seal::{Alg, KeySpec, PublicKey};

/// The members of a public key that identify it.
enum Numbers {
    Ec { crv: &'static str, x: String, y: String },
    Rsa { n: String, e: String },
    Okp { x: String },
}

impl Numbers {
    fn of(key: &PublicKey) -> Self {
        let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        match key {
            PublicKey::Ec { spec, x, y } => {
                let crv = if *spec == KeySpec::EcP384 { "P-384" } else { "P-256" };
                Self::Ec { crv, x: text(x), y: text(y) }
            }
            PublicKey::Rsa { n, e } => Self::Rsa { n: text(n), e: text(e) },
            PublicKey::Ed { x } => Self::Okp { x: text(x) },
        }
    }
}

/// RFC 7638, section 3: the required members in lexical order, no white space, SHA-256, base64url.
/// All values are base64url or curve names, so nothing needs escaping.
pub(super) fn thumbprint(key: &PublicKey) -> String {
    let canonical = match Numbers::of(key) {
        Numbers::Ec { crv, x, y } => format!(r#"{{"crv":"{crv}","kty":"EC","x":"{x}","y":"{y}"}}"#),
        Numbers::Rsa { n, e } => format!(r#"{{"e":"{e}","kty":"RSA","n":"{n}"}}"#),
        // RFC 8037, section 2.
        Numbers::Okp { x } => format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#),
    };
    URL_SAFE_NO_PAD.encode(Sha256::digest(canonical.as_bytes()))
}

/// The public key as it stands in a JWKS; `kid` is its thumbprint.
pub(super) fn jwk(key: &PublicKey, alg: Alg) -> Value {
    let kid = thumbprint(key);
    match Numbers::of(key) {
        Numbers::Ec { crv, x, y } => {
            json!({ "kty": "EC", "crv": crv, "x": x, "y": y, "kid": kid, "alg": alg.name(), "use": "sig" })
        }
        Numbers::Rsa { n, e } => {
            json!({ "kty": "RSA", "n": n, "e": e, "kid": kid, "alg": alg.name(), "use": "sig" })
        }
        Numbers::Okp { x } => {
            json!({ "kty": "OKP", "crv": "Ed25519", "x": x, "kid": kid, "alg": alg.name(), "use": "sig" })
        }
    }
}

/// Reads a stored EC key back; `None` if it is anything else. Only the numbers count.
pub(super) fn ec_public_key(jwk: &Value, spec: KeySpec) -> Option<PublicKey> {
    let number = |member| URL_SAFE_NO_PAD.decode(jwk.get(member)?.as_str()?).ok();
    Some(PublicKey::Ec { spec, x: number("x")?, y: number("y")? })
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jsonwebtoken::jwk::{Jwk, ThumbprintHash};
    use p256::ecdsa::SigningKey;

    use super::{jwk, thumbprint};
    use crate::seal::{Alg, KeySpec, PublicKey};

    /// The key of RFC 7638, section 3.1.
    const RFC_N: &str = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECP\
                         ebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY\
                         368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0f\
                         M4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw";

    #[test]
    fn the_thumbprint_of_the_rfc_comes_out() {
        let n = URL_SAFE_NO_PAD.decode(RFC_N).unwrap();
        let key = PublicKey::Rsa { n, e: vec![1, 0, 1] };

        assert_eq!(thumbprint(&key), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");
    }

    #[test]
    fn an_independent_library_computes_the_same_thumbprint() {
        for seed in 1..20 {
            let secret = SigningKey::from_slice(&[seed; 32]).unwrap();
            let point = secret.verifying_key().to_sec1_point(false);
            let (x, y) = (point.x().unwrap().to_vec(), point.y().unwrap().to_vec());
            let key = PublicKey::Ec { spec: KeySpec::EcP256, x, y };

            let made = jwk(&key, Alg::Es256);
            let theirs: Jwk = serde_json::from_value(made.clone()).unwrap();

            assert_eq!(made["kid"], theirs.thumbprint(ThumbprintHash::SHA256).unwrap());
            let members: Vec<_> = made.as_object().unwrap().keys().map(String::as_str).collect();
            assert_eq!(members, ["kty", "crv", "x", "y", "kid", "alg", "use"]);
        }
    }
}
