//! Public keys as JWK (RFC 7517, RFC 7518, RFC 8037) and their thumbprint (RFC 7638).

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::model::Choice;
use crate::seal::{Alg, KeySpec, PublicKey};

/// The members of a public key that identify it, in lexical order: the thumbprint's (RFC 7638, section 3.2).
fn numbers(key: &PublicKey) -> (&'static str, Vec<(&'static str, String)>) {
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    match key {
        PublicKey::Ec { spec, x, y } => {
            let crv = if *spec == KeySpec::EcP384 { "P-384" } else { "P-256" };
            ("EC", vec![("crv", crv.to_owned()), ("x", text(x)), ("y", text(y))])
        }
        PublicKey::Rsa { n, e } => ("RSA", vec![("e", text(e)), ("n", text(n))]),
        PublicKey::Ed { x } => ("OKP", vec![("crv", "Ed25519".to_owned()), ("x", text(x))]),
    }
}

/// RFC 7638, section 3: the required members in lexical order, no white space, SHA-256, base64url.
/// All values are base64url or curve names, so nothing needs escaping.
pub(super) fn thumbprint(key: &PublicKey) -> String {
    let (kty, mut members) = numbers(key);
    members.push(("kty", kty.to_owned()));
    members.sort_unstable();
    let members: Vec<_> = members.iter().map(|(name, value)| format!(r#""{name}":"{value}""#)).collect();
    URL_SAFE_NO_PAD.encode(Sha256::digest(format!("{{{}}}", members.join(",")).as_bytes()))
}

/// The public key as it stands in a JWKS, members in the order of the contract (section 9.6); `kid` is its
/// thumbprint. A key that was asked for as `RSA` names no algorithm: PS256 is as good.
pub(super) fn jwk(key: &PublicKey, alg: Alg, choice: Option<Choice>) -> Value {
    let (kty, members) = numbers(key);
    let mut jwk = Map::new();
    jwk.insert("kty".to_owned(), json!(kty));
    jwk.insert("use".to_owned(), json!("sig"));
    jwk.insert("kid".to_owned(), json!(thumbprint(key)));
    if choice != Some(Choice::Rsa) {
        jwk.insert("alg".to_owned(), json!(alg.name()));
    }
    jwk.extend(members.into_iter().map(|(name, value)| (name.to_owned(), json!(value))));
    Value::Object(jwk)
}

/// Reads a stored key back; `None` if it is of another kind. Only the numbers count.
pub(super) fn public_key(jwk: &Value, spec: KeySpec) -> Option<PublicKey> {
    let number = |member| URL_SAFE_NO_PAD.decode(jwk.get(member)?.as_str()?).ok();
    Some(match spec {
        KeySpec::EcP256 | KeySpec::EcP384 => PublicKey::Ec { spec, x: number("x")?, y: number("y")? },
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => {
            PublicKey::Rsa { n: number("n")?, e: number("e")? }
        }
        KeySpec::Ed25519 => PublicKey::Ed { x: number("x")? },
        KeySpec::Kek | KeySpec::HmacSha256 => return None,
    })
}

/// The modulus of an RSA key.
pub(super) fn modulus(jwk: &Value) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD.decode(jwk.get("n")?.as_str()?).ok()
}

#[cfg(test)]
mod tests {
    use base64::Engine;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jsonwebtoken::jwk::{Jwk, ThumbprintHash};
    use p256::ecdsa::SigningKey;

    use super::{jwk, public_key, thumbprint};
    use crate::keys::Choice;
    use crate::seal::{Alg, KeySpec, PublicKey};

    fn bytes(text: &str) -> Vec<u8> {
        URL_SAFE_NO_PAD.decode(text.replace([' ', '\n'], "")).unwrap()
    }

    /// The key of RFC 7638, section 3.1.
    const RFC_N: &str = "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECP\
                         ebWKRXjBZCiFV4n3oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY\
                         368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0f\
                         M4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw";

    #[test]
    fn the_thumbprints_that_others_have_published_come_out() {
        let rsa = PublicKey::Rsa { n: bytes(RFC_N), e: vec![1, 0, 1] };
        assert_eq!(thumbprint(&rsa), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs");

        // The contract's vector (section 9.6).
        let x = bytes("iCrRaf7UT88pr86EWaKK9RCBNo-xbokOoplTWfrGVClzGFfEe-5GmHlK-rHU9_X_");
        let y = bytes("u-pUb1V-xam-bKtCuxxygH0ie4KaSJPGnUu6nf7a3dJKUjFjFUNu5IRPw7YwEqBr");
        let ec = PublicKey::Ec { spec: KeySpec::EcP384, x, y };
        assert_eq!(thumbprint(&ec), "nuM2vW6jgbrMRXokkInnIKqwm6Pf1vBJDkg1zU6y0CQ");

        // RFC 8037, appendix A.3.
        let ed = PublicKey::Ed { x: bytes("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo") };
        assert_eq!(thumbprint(&ed), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    }

    #[test]
    fn an_independent_library_computes_the_same_thumbprint() {
        for seed in 1..20 {
            let secret = SigningKey::from_slice(&[seed; 32]).unwrap();
            let point = secret.verifying_key().to_sec1_point(false);
            let (x, y) = (point.x().unwrap().to_vec(), point.y().unwrap().to_vec());
            let key = PublicKey::Ec { spec: KeySpec::EcP256, x, y };

            let made = jwk(&key, Alg::Es256, None);
            let theirs: Jwk = serde_json::from_value(made.clone()).unwrap();

            assert_eq!(made["kid"], theirs.thumbprint(ThumbprintHash::SHA256).unwrap());
        }
    }

    #[test]
    fn members_stand_as_in_the_contract_and_come_back_as_the_same_key() {
        let members =
            |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let ec = PublicKey::Ec { spec: KeySpec::EcP384, x: vec![1; 48], y: vec![2; 48] };
        let ec_jwk = jwk(&ec, Alg::Es384, Some(Choice::Ec));
        assert_eq!(members(&ec_jwk), ["kty", "use", "kid", "alg", "crv", "x", "y"]);
        let rsa = PublicKey::Rsa { n: vec![200; 512], e: vec![1, 0, 1] };
        let rsa_jwk = jwk(&rsa, Alg::Rs256, Some(Choice::Rsa));
        assert_eq!(members(&rsa_jwk), ["kty", "use", "kid", "e", "n"]);
        assert_eq!(jwk(&rsa, Alg::Ps256, Some(Choice::Ps256))["alg"], "PS256");
        let ed = PublicKey::Ed { x: vec![3; 32] };
        let ed_jwk = jwk(&ed, Alg::EdDsa, Some(Choice::EdDsa));
        assert_eq!(members(&ed_jwk), ["kty", "use", "kid", "alg", "crv", "x"]);

        for (key, jwk, spec) in
            [(ec, ec_jwk, KeySpec::EcP384), (rsa, rsa_jwk, KeySpec::Rsa4096), (ed, ed_jwk, KeySpec::Ed25519)]
        {
            assert_eq!(public_key(&jwk, spec), Some(key));
        }
    }
}
