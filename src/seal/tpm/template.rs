//! What keys look like in a TPM, and the rules that they must keep.
//!
//! Templates are part of the format: a primary is computed from the TPM's seed and its template, so
//! another template is another key. A change here loses every key that was made before it.

use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::key_bits::RsaKeyBits;
use tss_esapi::structures::{
    Digest, EccParameter, EccPoint, EccScheme, HashScheme, KeyedHashScheme, Public, PublicBuilder,
    PublicEccParametersBuilder, PublicKeyRsa, PublicKeyedHashParameters, PublicRsaParametersBuilder,
    RsaExponent, RsaScheme, SymmetricDefinitionObject,
};

use crate::seal::backend::BackendError;
use crate::seal::key::{KeyId, KeySpec, PublicKey};

/// The template of the root, under which signing and MAC keys lie and to which sessions are salted.
const ROOT: &[u8; 32] = b"lacre tpm root storage key, v1\0\0";

fn built<T>(result: tss_esapi::Result<T>) -> Result<T, BackendError> {
    result.map_err(|_| BackendError::Refused { function: "TPM template", code: 0 })
}

/// What everything in the chain has in common: it never leaves this TPM and its parent, and a failed try does
/// not count towards a lockout.
fn custody() -> ObjectAttributesBuilder {
    ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_no_da(true)
        .with_user_with_auth(true)
}

fn storage() -> ObjectAttributesBuilder {
    custody().with_sensitive_data_origin(true).with_restricted(true).with_decrypt(true)
}

fn signing() -> ObjectAttributesBuilder {
    custody().with_sensitive_data_origin(true).with_sign_encrypt(true)
}

/// A storage primary on P-256 with AES-128-CFB, told apart by `unique`.
fn primary(unique: &[u8]) -> Result<Public, BackendError> {
    let parameters = PublicEccParametersBuilder::new_restricted_decryption_key(
        SymmetricDefinitionObject::AES_128_CFB,
        EccCurve::NistP256,
    );
    let x = built(EccParameter::try_from(unique))?;
    built(
        PublicBuilder::new()
            .with_public_algorithm(PublicAlgorithm::Ecc)
            .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
            .with_object_attributes(built(storage().build())?)
            .with_ecc_parameters(built(parameters.build())?)
            .with_ecc_unique_identifier(EccPoint::new(x, EccParameter::default()))
            .build(),
    )
}

/// The root.
pub(super) fn root() -> Result<Public, BackendError> {
    primary(ROOT)
}

/// The KEK of that id.
pub(super) fn kek(unique: &[u8; 32]) -> Result<Public, BackendError> {
    primary(unique)
}

fn keyed_hash(
    attributes: ObjectAttributesBuilder,
    scheme: KeyedHashScheme,
    unique: &[u8],
) -> Result<Public, BackendError> {
    built(
        PublicBuilder::new()
            .with_public_algorithm(PublicAlgorithm::KeyedHash)
            .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
            .with_object_attributes(built(attributes.build())?)
            .with_keyed_hash_parameters(PublicKeyedHashParameters::new(scheme))
            .with_keyed_hash_unique_identifier(built(Digest::try_from(unique))?)
            .build(),
    )
}

/// A sealed DEK. `unique` is what the TPM made of it, and empty before.
pub(super) fn sealed(unique: &[u8]) -> Result<Public, BackendError> {
    keyed_hash(custody(), KeyedHashScheme::Null, unique)
}

/// A signing or MAC key; `None` for a kind that this device does not make.
pub(super) fn leaf(spec: KeySpec) -> Result<Option<Public>, BackendError> {
    let public = PublicBuilder::new()
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(built(signing().build())?);
    Ok(Some(match spec {
        // A TPM of the standard of today has no Ed25519.
        KeySpec::Kek | KeySpec::Ed25519 => return Ok(None),
        KeySpec::HmacSha256 => keyed_hash(signing(), KeyedHashScheme::HMAC_SHA_256, &[])?,
        KeySpec::EcP256 | KeySpec::EcP384 => {
            let (curve, hash) = match spec {
                KeySpec::EcP256 => (EccCurve::NistP256, HashingAlgorithm::Sha256),
                _ => (EccCurve::NistP384, HashingAlgorithm::Sha384),
            };
            let ecdsa = EccScheme::EcDsa(HashScheme::new(hash));
            let parameters = PublicEccParametersBuilder::new_unrestricted_signing_key(ecdsa, curve);
            built(
                public
                    .with_public_algorithm(PublicAlgorithm::Ecc)
                    .with_ecc_parameters(built(parameters.build())?)
                    .with_ecc_unique_identifier(EccPoint::default())
                    .build(),
            )?
        }
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => {
            let bits = match spec {
                KeySpec::Rsa2048 => RsaKeyBits::Rsa2048,
                KeySpec::Rsa3072 => RsaKeyBits::Rsa3072,
                _ => RsaKeyBits::Rsa4096,
            };
            let parameters = PublicRsaParametersBuilder::new_unrestricted_signing_key(
                RsaScheme::Null,
                bits,
                RsaExponent::default(),
            );
            built(
                public
                    .with_public_algorithm(PublicAlgorithm::Rsa)
                    .with_rsa_parameters(built(parameters.build())?)
                    .with_rsa_unique_identifier(PublicKeyRsa::default())
                    .build(),
            )?
        }
    }))
}

/// The public half in numbers, EC coordinates at full width (some TPMs drop leading zeros).
pub(super) fn public_key(spec: KeySpec, public: &Public) -> Option<PublicKey> {
    match (public, spec.field_len(), spec.modulus_bits()) {
        (Public::Ecc { unique, .. }, Some(field), _) => {
            let [x, y] = [unique.x(), unique.y()].map(|number| padded(number.value(), field));
            Some(PublicKey::Ec { spec, x: x?, y: y? })
        }
        (Public::Rsa { unique, .. }, _, Some(bits)) if unique.value().len() * 8 == usize::from(bits) => {
            // An exponent of zero in a template stands for 65537 (part 2, section 12.2.3.5).
            Some(PublicKey::Rsa { n: unique.value().to_vec(), e: vec![1, 0, 1] })
        }
        _ => None,
    }
}

/// `bytes` with zeros before it, `field` long in all.
pub(super) fn padded(bytes: &[u8], field: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; field.checked_sub(bytes.len())?];
    out.extend_from_slice(bytes);
    Some(out)
}

/// The attributes by their names, and every rule they break. `wanted` is the template that the object was
/// to be made with.
pub(super) fn check(found: &Public, wanted: &Public) -> (Vec<(&'static str, String)>, Vec<String>) {
    let (is, must) = (found.object_attributes(), wanted.object_attributes());
    let rows = [
        ("fixedTPM", is.fixed_tpm(), must.fixed_tpm()),
        ("fixedParent", is.fixed_parent(), must.fixed_parent()),
        ("stClear", is.st_clear(), must.st_clear()),
        ("sensitiveDataOrigin", is.sensitive_data_origin(), must.sensitive_data_origin()),
        ("userWithAuth", is.user_with_auth(), must.user_with_auth()),
        ("adminWithPolicy", is.admin_with_policy(), must.admin_with_policy()),
        ("noDA", is.no_da(), must.no_da()),
        ("encryptedDuplication", is.encrypted_duplication(), must.encrypted_duplication()),
        ("restricted", is.restricted(), must.restricted()),
        ("decrypt", is.decrypt(), must.decrypt()),
        ("sign", is.sign_encrypt(), must.sign_encrypt()),
    ];
    let attributes = rows.iter().map(|(name, is, _)| (*name, is.to_string())).collect();
    let mut broken: Vec<_> = rows
        .iter()
        .filter(|(_, is, must)| is != must)
        .map(|(name, is, _)| format!("{name} is {is}"))
        .collect();
    if !same_kind(found, wanted) {
        broken.push("it is a key of another kind".to_owned());
    }
    if found.auth_policy() != wanted.auth_policy() {
        broken.push("it has a policy of its own".to_owned());
    }
    (attributes, broken)
}

fn same_kind(found: &Public, wanted: &Public) -> bool {
    match (found, wanted) {
        (Public::Ecc { parameters: found, .. }, Public::Ecc { parameters: wanted, .. }) => found == wanted,
        (Public::Rsa { parameters: found, .. }, Public::Rsa { parameters: wanted, .. }) => {
            found.key_bits() == wanted.key_bits() && found.rsa_scheme() == wanted.rsa_scheme()
        }
        (Public::KeyedHash { parameters: found, .. }, Public::KeyedHash { parameters: wanted, .. }) => {
            found == wanted
        }
        _ => false,
    }
}

/// What makes the primary of this KEK another than that of any other.
pub(super) fn unique_of(id: KeyId, salt: &[u8]) -> [u8; 32] {
    use sha2::{Digest as _, Sha256};
    let mut sum = Sha256::new();
    sum.update(b"lacre/tpm-kek/v1");
    sum.update(id.as_bytes());
    sum.update(salt);
    sum.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::{check, kek, leaf, padded, root, sealed, unique_of};
    use crate::seal::key::{KeyRef, KeySpec};

    #[test]
    fn every_template_is_bound_to_its_tpm_and_counts_for_no_lockout() {
        let keyed = [KeySpec::EcP256, KeySpec::EcP384, KeySpec::Rsa2048, KeySpec::HmacSha256];
        let leaves = keyed.map(|spec| leaf(spec).unwrap().unwrap());
        let others = [root().unwrap(), kek(&[7; 32]).unwrap(), sealed(&[]).unwrap()];
        for public in leaves.iter().chain(&others) {
            let attributes = public.object_attributes();
            assert!(attributes.fixed_tpm() && attributes.fixed_parent() && attributes.no_da());
            assert!(check(public, public).1.is_empty());
        }
        assert!(leaf(KeySpec::Kek).unwrap().is_none());
    }

    #[test]
    fn a_weakened_attribute_and_another_kind_are_named() {
        let wanted = leaf(KeySpec::EcP256).unwrap().unwrap();
        let (_, broken) = check(&root().unwrap(), &wanted);
        assert!(broken.contains(&"restricted is true".to_owned()), "{broken:?}");
        assert!(broken.contains(&"it is a key of another kind".to_owned()));
    }

    #[test]
    fn each_kek_has_a_template_of_its_own() {
        let ids = [(); 2].map(|()| KeyRef::plan(KeySpec::Kek).unwrap().id());
        assert_ne!(unique_of(ids[0], b""), unique_of(ids[1], b""));
        assert_ne!(unique_of(ids[0], b"a"), unique_of(ids[0], b"b"));
        assert_eq!(padded(&[1], 3).unwrap(), [0, 0, 1]);
        assert!(padded(&[1; 4], 3).is_none());
    }
}
