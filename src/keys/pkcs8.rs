//! Private keys as people bring them: one PKCS#8 structure (RFC 5958) in PEM (RFC 7468). Nothing of a key is in
//! any error.

use aws_lc_rs::signature::RsaKeyPair;
use p256::pkcs8::der::asn1::ObjectIdentifier;
use p256::pkcs8::{PrivateKeyInfoRef, SecretDocument};
use zeroize::Zeroizing;

use super::model::Choice;
use crate::seal::{Alg, KeySpec};

const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");

/// The DER in a PEM; `None` if it is anything but one `PRIVATE KEY`.
pub(super) fn from_pem(pem: &str) -> Option<Zeroizing<Vec<u8>>> {
    let (label, document) = SecretDocument::from_pem(pem.trim()).ok()?;
    (label == "PRIVATE KEY").then(|| Zeroizing::new(document.as_bytes().to_vec()))
}

/// What kind of key it is, and what it is called: as Logto calls it, because that is where keys come from.
pub(super) fn kind(der: &[u8]) -> Option<(Choice, KeySpec, Alg)> {
    let info = PrivateKeyInfoRef::try_from(der).ok()?;
    match info.algorithm.oid {
        EC => match info.algorithm.parameters_oid().ok()? {
            P256 => Some((Choice::Ec, KeySpec::EcP256, Alg::Es256)),
            P384 => Some((Choice::Ec, KeySpec::EcP384, Alg::Es384)),
            _ => None,
        },
        RSA => {
            let bits = RsaKeyPair::from_pkcs8(der).ok()?.public_modulus_len() * 8;
            let spec = match bits {
                2048 => KeySpec::Rsa2048,
                3072 => KeySpec::Rsa3072,
                4096 => KeySpec::Rsa4096,
                _ => return None,
            };
            Some((Choice::Rsa, spec, Alg::Rs256))
        }
        ED25519 => Some((Choice::EdDsa, KeySpec::Ed25519, Alg::EdDsa)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rsa::KeySize;
    use p256::pkcs8::{EncodePrivateKey, LineEnding};

    use super::*;

    #[test]
    fn keys_are_told_apart_and_everything_else_is_refused() {
        let p256 = p256::ecdsa::SigningKey::from_slice(&[7; 32]).unwrap().to_pkcs8_pem(LineEnding::LF).unwrap();
        let der = from_pem(&format!("\n{}\n", &*p256)).unwrap();
        assert_eq!(kind(&der), Some((Choice::Ec, KeySpec::EcP256, Alg::Es256)));
        let p384 = p384::ecdsa::SigningKey::from_slice(&[7; 48]).unwrap().to_pkcs8_pem(LineEnding::LF).unwrap();
        assert_eq!(kind(&from_pem(&p384).unwrap()), Some((Choice::Ec, KeySpec::EcP384, Alg::Es384)));
        let rsa = aws_lc_rs::rsa::KeyPair::generate(KeySize::Rsa2048).unwrap();
        let rsa = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&rsa).unwrap();
        assert_eq!(kind(rsa.as_ref()), Some((Choice::Rsa, KeySpec::Rsa2048, Alg::Rs256)));

        for bad in ["", "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----", &p256.replace("PRIVATE", "PUBLIC")] {
            assert!(from_pem(bad).is_none_or(|der| kind(&der).is_none()), "{bad}");
        }
        assert!(kind(&der[1..]).is_none());
    }
}
