//! Private keys as people bring them: one PKCS#8 structure (RFC 5958) in PEM (RFC 7468). Nothing of a key is in
//! any error.

use p256::pkcs8::SecretDocument;
use zeroize::Zeroizing;

use super::jwk;
use super::model::Choice;
use crate::seal::{Alg, KeySpec, public_half};

/// The DER in a PEM; `None` if it is anything but one `PRIVATE KEY`.
pub(super) fn from_pem(pem: &str) -> Option<Zeroizing<Vec<u8>>> {
    let (label, document) = SecretDocument::from_pem(pem.trim()).ok()?;
    (label == "PRIVATE KEY").then(|| Zeroizing::new(document.as_bytes().to_vec()))
}

/// What kind of key it is, and what it is called: as Logto calls it, because that is where keys come from.
pub(super) fn kind(der: &[u8]) -> Option<(Choice, KeySpec, Alg)> {
    let spec = public_half(der).ok()?.spec()?;
    match spec {
        KeySpec::EcP256 => Some((Choice::Ec, spec, Alg::Es256)),
        KeySpec::EcP384 => Some((Choice::Ec, spec, Alg::Es384)),
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => Some((Choice::Rsa, spec, Alg::Rs256)),
        KeySpec::Ed25519 => Some((Choice::EdDsa, spec, Alg::EdDsa)),
        KeySpec::Kek | KeySpec::HmacSha256 => None,
    }
}

/// The thumbprint of its public half.
pub(super) fn kid(der: &[u8]) -> Option<String> {
    Some(jwk::thumbprint(&public_half(der).ok()?))
}

#[cfg(test)]
mod tests {
    use p256::pkcs8::{EncodePrivateKey, LineEnding};

    use super::*;

    #[test]
    fn keys_are_told_apart_and_everything_else_is_refused() {
        let p256 = p256::ecdsa::SigningKey::from_slice(&[7; 32]).unwrap();
        let p256 = p256.to_pkcs8_pem(LineEnding::LF).unwrap();
        let der = from_pem(&format!("\n{}\n", &*p256)).unwrap();
        assert_eq!(kind(&der), Some((Choice::Ec, KeySpec::EcP256, Alg::Es256)));
        let p384 = p384::ecdsa::SigningKey::from_slice(&[7; 48]).unwrap();
        let p384 = p384.to_pkcs8_pem(LineEnding::LF).unwrap();
        assert_eq!(kind(&from_pem(&p384).unwrap()), Some((Choice::Ec, KeySpec::EcP384, Alg::Es384)));

        let empty = "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----";
        for bad in ["", empty, &p256.replace("PRIVATE", "PUBLIC")] {
            assert!(from_pem(bad).is_none_or(|der| kind(&der).is_none()), "{bad}");
        }
        assert!(kind(&der[1..]).is_none());
    }
}
