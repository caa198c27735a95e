//! Signatures of a TPM, in JOSE form and verified.

use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::HashingAlgorithm;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Digest, HashScheme, HashcheckTicket, Signature as TpmSignature, SignatureScheme,
};

use super::error::Fail;
use super::keys::{auth_or, blob_of, leaf, read_blob, refused};
use super::link::Link;
use super::template;
use crate::seal::backend::BackendError;
use crate::seal::key::{Alg, KeyRef, KeySpec, Signature};
use crate::seal::verify;

fn scheme(alg: Alg) -> SignatureScheme {
    let sha256 = HashScheme::new(HashingAlgorithm::Sha256);
    match alg {
        Alg::Es256 => SignatureScheme::EcDsa { hash_scheme: sha256 },
        Alg::Es384 => SignatureScheme::EcDsa { hash_scheme: HashScheme::new(HashingAlgorithm::Sha384) },
        Alg::Rs256 => SignatureScheme::RsaSsa { hash_scheme: sha256 },
        Alg::Ps256 => SignatureScheme::RsaPss { hash_scheme: sha256 },
        // No TPM here has such keys (`template`).
        Alg::EdDsa => SignatureScheme::Null,
    }
}

pub(super) fn jose(spec: KeySpec, signature: &TpmSignature) -> Option<Vec<u8>> {
    match (signature, spec.field_len(), spec.modulus_bits()) {
        (TpmSignature::EcDsa(ecc), Some(field), _) => {
            let r = template::padded(ecc.signature_r().value(), field)?;
            let s = template::padded(ecc.signature_s().value(), field)?;
            Some([r, s].concat())
        }
        (TpmSignature::RsaSsa(rsa) | TpmSignature::RsaPss(rsa), _, Some(bits)) => {
            let bytes = rsa.signature().value();
            (bytes.len() * 8 == usize::from(bits)).then(|| bytes.to_vec())
        }
        _ => None,
    }
}

/// Signs with a loaded key.
pub(super) fn sign_with(
    link: &mut Link,
    function: &'static str,
    handle: KeyHandle,
    alg: Alg,
    digest: &[u8],
    sessions: (Option<AuthSession>, Option<AuthSession>),
) -> Result<TpmSignature, Fail> {
    let fail = |error| Fail::new(function, error);
    let digest = Digest::try_from(digest).map_err(fail)?;
    let ticket = HashcheckTicket::try_from(no_ticket()).map_err(fail)?;
    link.command(function, sessions, |context| context.sign(handle, digest, scheme(alg), ticket))
}

/// Every signature is verified in software before it leaves: that costs little beside a TPM's.
pub(super) fn sign(
    link: &mut Link,
    key: &KeyRef,
    alg: Alg,
    digest: &[u8],
) -> Result<Signature, BackendError> {
    let (at, _) = leaf(link, key)?;
    let made = link.again(|link| {
        let handle = link.load_again(at)?;
        let sessions = link.secretly();
        sign_with(link, "TPM2_Sign", handle, alg, digest, sessions)
    });
    let made = made.map_err(|fail| auth_or(link, fail))?;
    link.prove();
    let signature = jose(key.spec, &made).ok_or_else(|| refused("TPM2_Sign"))?;
    let (_, public) = read_blob(blob_of(key)?)?;
    let is_right = template::public_key(key.spec, &public)
        .is_some_and(|public| verify::verifies(&public, alg, digest, &signature));
    match alg {
        _ if is_right => Ok(Signature(signature)),
        Alg::Ps256 => Err(refused("the salt of this TPM's PSS")),
        _ => Err(BackendError::SelfTest("a signature does not verify with its public key")),
    }
}

/// What the private half signs, the public half verifies (KL-10).
pub(super) fn test_pair(link: &mut Link, key: &KeyRef) -> Result<(), BackendError> {
    let (alg, digest) = match key.spec {
        KeySpec::HmacSha256 | KeySpec::Kek => return Ok(()),
        KeySpec::EcP256 => (Alg::Es256, &[7; 32][..]),
        KeySpec::EcP384 => (Alg::Es384, &[7; 48][..]),
        _ => (Alg::Rs256, &[7; 32][..]),
    };
    sign(link, key, alg, digest).map(drop)
}

/// The digest was not made by the TPM, and the keys are not restricted: no ticket is needed.
fn no_ticket() -> tss_esapi::tss2_esys::TPMT_TK_HASHCHECK {
    use tss_esapi::constants::tss::{TPM2_RH_NULL, TPM2_ST_HASHCHECK};
    tss_esapi::tss2_esys::TPMT_TK_HASHCHECK {
        tag: TPM2_ST_HASHCHECK,
        hierarchy: TPM2_RH_NULL,
        digest: tss_esapi::tss2_esys::TPM2B_DIGEST::default(),
    }
}
