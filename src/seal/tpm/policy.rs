//! Binding an installation to the state of its host: the secret of `auth_source` sealed under PCR values.
//!
//! The secret that every authorisation value is made of is sealed once, so that the binding costs nothing per
//! operation. Its policy has two branches (TPM 2.0 library, part 1, section 19.7): the PCRs as they were when it
//! was sealed; or PCRs whose values the holder of an offline key has approved. The second one is the way
//! out after an update of firmware or boot loader, and needs no access to what is sealed.
//!
//! An approval is an ECDSA signature (DER) over the policy digest of the PCRs' present values, made with
//! `openssl dgst -sha256 -sign`, in a file beside the sealed one: `FILE.approval`, `FILE.approval.2`, ...

use std::fs;
use std::path::{Path, PathBuf};

use p256::elliptic_curve::sec1::ToSec1Point;
use p256::pkcs8::DecodePublicKey;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::{AuthSession, PolicySession};
use tss_esapi::structures::{
    Digest, DigestList, EccParameter, EccPoint, EccScheme, EccSignature, HashScheme, KeyedHashScheme, Nonce,
    PcrSelectionList, PcrSlot, Private, Public, PublicBuffer, PublicBuilder, PublicEccParametersBuilder,
    PublicKeyedHashParameters, SensitiveData, Signature,
};
use tss_esapi::traits::Marshall;

use super::link::Link;
use super::scrub::{scrub, wipe_blocks};
use super::{BackendError, Tpm};
use crate::seal::guarded::{Arena, SecretBuf};

/// Command codes that a policy digest is made of (part 2, section 6.5.2).
const CC_POLICY_AUTHORIZE: u32 = 0x0000_016A;
const CC_POLICY_OR: u32 = 0x0000_0171;

/// What the file holds: nothing in it is secret without this TPM in an approved state.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    version: u8,
    pcrs: Vec<u8>,
    pcr_policy: String,
    authority: String,
    private: String,
    public: String,
}

/// A sealed secret and where its approvals are.
pub(super) struct SealedSecret {
    path: PathBuf,
}

fn stopped(reason: impl Into<String>) -> BackendError {
    BackendError::Stopped(reason.into())
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut sum = Sha256::new();
    for part in parts {
        sum.update(part);
    }
    sum.finalize().into()
}

/// The digest after `PolicyAuthorize` with an empty reference (part 3, section 23.16).
fn authorize_digest(name: &[u8]) -> [u8; 32] {
    sha256(&[&sha256(&[&[0; 32], &CC_POLICY_AUTHORIZE.to_be_bytes(), name])])
}

/// The digest after `PolicyOR` (part 3, section 23.6).
fn or_digest(branches: [&[u8]; 2]) -> [u8; 32] {
    sha256(&[&[0; 32], &CC_POLICY_OR.to_be_bytes(), branches[0], branches[1]])
}

/// The authority's key as a TPM knows it, and its name.
fn authority(pem: &str) -> Result<(Public, Vec<u8>), BackendError> {
    let unusable = || stopped("the policy authority is not a public key on P-256 in PEM");
    let key = p256::PublicKey::from_public_key_pem(pem).map_err(|_| unusable())?;
    let point = key.to_sec1_point(false);
    let (Some(x), Some(y)) = (point.x(), point.y()) else { return Err(unusable()) };
    let public = verifying_key(x, y).map_err(|_| unusable())?;
    let area = public.marshall().map_err(|_| unusable())?;
    // TPM_ALG_SHA256 and the hash of the public area (part 1, section 16).
    let name = [&[0x00, 0x0B][..], &sha256(&[&area])].concat();
    Ok((public, name))
}

fn verifying_key(x: &[u8], y: &[u8]) -> tss_esapi::Result<Public> {
    let ecdsa = EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256));
    let parameters = PublicEccParametersBuilder::new_unrestricted_signing_key(ecdsa, EccCurve::NistP256);
    let attributes = ObjectAttributesBuilder::new().with_sign_encrypt(true).with_user_with_auth(true);
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.build()?)
        .with_ecc_parameters(parameters.build()?)
        .with_ecc_unique_identifier(EccPoint::new(EccParameter::try_from(x)?, EccParameter::try_from(y)?))
        .build()
}

fn selection(pcrs: &[u8]) -> Result<PcrSelectionList, BackendError> {
    let unusable = |_| stopped("PCRs are numbered 0 to 23");
    let slots = pcrs.iter().map(|pcr| 1_u32.checked_shl(u32::from(*pcr)).unwrap_or(0));
    let slots: Result<Vec<_>, _> = slots.map(PcrSlot::try_from).collect();
    PcrSelectionList::builder()
        .with_selection(HashingAlgorithm::Sha256, &slots.map_err(unusable)?)
        .build()
        .map_err(unusable)
}

/// A session that has come as far as the PCRs, and the digest it has then. The caller ends it.
fn pcr_session(link: &mut Link, pcrs: &[u8]) -> Result<(PolicySession, Digest), BackendError> {
    let function = "TPM2_PolicyPCR";
    let selected = selection(pcrs)?;
    let session = link.start_policy()?;
    let stepped = link
        .command(function, (None, None), |context| context.policy_pcr(session, Digest::default(), selected))
        .and_then(|()| link.command(function, (None, None), |context| context.policy_get_digest(session)));
    match stepped {
        Ok(digest) => Ok((session, digest)),
        Err(fail) => {
            link.end_policy();
            Err(fail.into())
        }
    }
}

/// The digest that an approval of the PCRs' present values has to sign.
pub(super) fn present(link: &mut Link, pcrs: &[u8]) -> Result<Vec<u8>, BackendError> {
    let (_, digest) = pcr_session(link, pcrs)?;
    link.end_policy();
    Ok(digest.value().to_vec())
}

/// Seals `secret` under the PCRs' present values, or other ones that the authority approves; the file's text.
pub(super) fn seal(
    link: &mut Link,
    secret: &SecretBuf,
    pcrs: &[u8],
    pem: &str,
) -> Result<String, BackendError> {
    let (_, name) = authority(pem)?;
    let pcr_policy = present(link, pcrs)?;
    let policy = or_digest([&pcr_policy, &authorize_digest(&name)]);
    let unable = |_| BackendError::Refused { function: "TPM template", code: 0 };
    let attributes =
        ObjectAttributesBuilder::new().with_fixed_tpm(true).with_fixed_parent(true).with_no_da(true).build();
    let public = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.map_err(unable)?)
        .with_auth_policy(Digest::try_from(&policy[..]).map_err(unable)?)
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
        .with_keyed_hash_unique_identifier(Digest::default())
        .build()
        .map_err(unable)?;
    let data = secret.with(|secret| SensitiveData::try_from(secret));
    let data = data.map_err(|_| stopped("the secret is longer than a TPM seals (128 bytes)"))?;
    let sessions = link.under_parent();
    let made = link.again(|link| {
        let root = link.root()?;
        let (public, data) = (public.clone(), data.clone());
        link.command("TPM2_Create", sessions, |context| {
            context.create(root, public, None, Some(data), None, None)
        })
    });
    scrub(link);
    let made = made?;
    let stored = Stored {
        version: 1,
        pcrs: pcrs.to_vec(),
        pcr_policy: hex::encode(pcr_policy),
        authority: pem.to_owned(),
        private: hex::encode(made.out_private.value()),
        public: hex::encode(made.out_public.marshall().map_err(unable)?),
    };
    // Numbers and texts always serialise.
    Ok(serde_json::to_string_pretty(&stored).unwrap_or_default())
}

impl SealedSecret {
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    fn read(&self) -> Result<Stored, BackendError> {
        let shown = self.path.display();
        let text = fs::read(&self.path).map_err(|error| stopped(format!("{shown}: {error}")))?;
        let stored: Stored =
            serde_json::from_slice(&text).map_err(|_| stopped(format!("{shown} is not a sealed secret")))?;
        if stored.version == 1 { Ok(stored) } else { Err(stopped(format!("{shown} has another version"))) }
    }

    /// What `FILE.approval*` hold.
    fn approvals(&self) -> Vec<Vec<u8>> {
        let (Some(dir), Some(name)) = (self.path.parent(), self.path.file_name()) else { return Vec::new() };
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let prefix = format!("{}.approval", name.to_string_lossy());
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        let wanted = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
        wanted.filter_map(|entry| fs::read(entry.path()).ok()).collect()
    }

    /// Opens it, if the PCRs are as they were or as somebody has approved.
    pub(super) fn open(&self, link: &mut Link, arena: &Arena) -> Result<SecretBuf, BackendError> {
        let stored = self.read()?;
        let unreadable = || stopped(format!("{} is damaged", self.path.display()));
        let bytes = |text: &str| hex::decode(text).map_err(|_| unreadable());
        let pcr_policy = bytes(&stored.pcr_policy)?;
        let private = Private::try_from(bytes(&stored.private)?).map_err(|_| unreadable())?;
        let public = PublicBuffer::try_from(bytes(&stored.public)?).and_then(Public::try_from);
        let public = public.map_err(|_| unreadable())?;
        let (key, name) = authority(&stored.authority)?;
        let approved = authorize_digest(&name);

        let (session, present) = pcr_session(link, &stored.pcrs)?;
        let opened = (|| {
            if present.value() != pcr_policy && !self.is_approved(link, session, &present, &key)? {
                return Err(stopped(format!(
                    "policy: PCRs {:?} are not those that the secret was sealed under, and no approval of the \
                     present ones is there. If you know why they changed, sign the digest {} with the policy \
                     authority's key (docs/operations/tpm.md)",
                    stored.pcrs,
                    hex::encode(present.value())
                )));
            }
            let mut branches = DigestList::new();
            for branch in [&pcr_policy[..], &approved] {
                let digest = Digest::try_from(branch).and_then(|digest| branches.add(digest));
                digest.map_err(|_| unreadable())?;
            }
            link.command("TPM2_PolicyOR", (None, None), |context| context.policy_or(session, branches))?;
            unseal(link, session, &private, &public, arena)
        })();
        link.end_policy();
        opened
    }

    /// Whether one of the approvals is of these values; then the session has come as far as the approval.
    fn is_approved(
        &self,
        link: &mut Link,
        session: PolicySession,
        present: &Digest,
        key: &Public,
    ) -> Result<bool, BackendError> {
        for approval in self.approvals() {
            let Ok(signature) = p256::ecdsa::Signature::from_der(&approval) else { continue };
            let (r, s) = signature.split_bytes();
            let halves = (EccParameter::try_from(&r[..]), EccParameter::try_from(&s[..]));
            let (Ok(r), Ok(s)) = halves else { continue };
            let Ok(signature) = EccSignature::create(HashingAlgorithm::Sha256, r, s) else { continue };
            let signed = Digest::try_from(&sha256(&[present.value()])[..]);
            let Ok(signed) = signed else { continue };
            let handle: KeyHandle = link.again(|link| {
                link.command("TPM2_LoadExternal", (None, None), |context| {
                    context.load_external_public(key.clone(), Hierarchy::Owner)
                })
            })?;
            let name = link.context.tr_get_name(handle.into());
            let ticket = link.command("TPM2_VerifySignature", (None, None), |context| {
                context.verify_signature(handle, signed, Signature::EcDsa(signature))
            });
            link.flush(handle.into())?;
            // Another state's approval, or nobody's.
            let (Ok(ticket), Ok(name)) = (ticket, name) else { continue };
            link.command("TPM2_PolicyAuthorize", (None, None), |context| {
                context.policy_authorize(session, present.clone(), Nonce::default(), &name, ticket)
            })?;
            tracing::warn!(
                "PCRs have other values than those the secret was sealed under; they are approved"
            );
            return Ok(true);
        }
        Ok(false)
    }
}

fn unseal(
    link: &mut Link,
    session: PolicySession,
    private: &Private,
    public: &Public,
    arena: &Arena,
) -> Result<SecretBuf, BackendError> {
    let parent = (Some(AuthSession::Password), None);
    let object = link.again(|link| {
        let root = link.root()?;
        let (private, public) = (private.clone(), public.clone());
        link.command("TPM2_Load", parent, |context| context.load(root, private, public))
    })?;
    let sessions = (Some(AuthSession::from(session)), None);
    let data = link.command("TPM2_Unseal", sessions, |context| context.unseal(object.into()));
    wipe_blocks();
    link.flush(object.into())?;
    let data = data.map_err(|fail| match fail {
        fail if fail.is_policy() => {
            stopped("policy: the TPM refuses the sealed secret in this state of the host")
        }
        fail => fail.into(),
    })?;
    let full = |_| BackendError::Refused { function: "guarded memory", code: 0 };
    let mut secret = arena.try_take(data.value().len()).map_err(full)?;
    secret.with_mut(|secret| secret.copy_from_slice(data.value()));
    drop(data);
    scrub(link);
    Ok(secret)
}

/// The secret in the two forms in which it may be kept.
pub(super) enum Secret {
    /// As it is.
    Plain(crate::seal::pin::PinSource),
    /// Sealed by this TPM.
    Sealed(SealedSecret),
}

impl Secret {
    pub(super) fn read(&self, tpm: &Tpm, link: &mut Link) -> Result<SecretBuf, BackendError> {
        match self {
            Self::Plain(source) => tpm.secret(source),
            Self::Sealed(sealed) => sealed.open(link, &tpm.arena),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{authorize_digest, or_digest};

    #[test]
    fn digests_are_those_of_the_specification() {
        // python3, hashlib: sha256(0*32 || 00000171 || 00*32 || 01*32), and
        // sha256(sha256(0*32 || 0000016a || 000b || 07*32)).
        let or = or_digest([&[0; 32], &[1; 32]]);
        assert_eq!(hex::encode(or), "ebf1e9e5bd0a81cfc4032d61013fd18ad7df2ab56de85af46e9adca65e3cceae");
        let name = [&[0x00, 0x0B][..], &[7; 32]].concat();
        assert_eq!(
            hex::encode(authorize_digest(&name)),
            "5f90f82ab686c101c8e13dad9cbc53c18c8ca47de35a92a4d805d64ead10c125"
        );
    }
}
