//! Another program at the same TPM, by the library and not by Lacre.

use std::str::FromStr;

use tss_esapi::Context;
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::constants::SessionType;
use tss_esapi::handles::SessionHandle;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::ecc::EccCurve;
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    EccParameter, EccPoint, EccScheme, HashScheme, Public, PublicBuilder, PublicEccParametersBuilder,
    SymmetricDefinition, SymmetricDefinitionObject,
};
use tss_esapi::tcti_ldr::TctiNameConf;
use tss_esapi::traits::Marshall;

fn context(tcti: &str) -> Context {
    let mut context = Context::new(TctiNameConf::from_str(tcti).unwrap()).unwrap();
    context.set_sessions((Some(AuthSession::Password), None, None));
    context
}

fn storage(unique: &[u8]) -> Public {
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_no_da(true)
        .with_user_with_auth(true)
        .with_sensitive_data_origin(true)
        .with_restricted(true)
        .with_decrypt(true);
    let aes = SymmetricDefinitionObject::AES_128_CFB;
    let parameters = PublicEccParametersBuilder::new_restricted_decryption_key(aes, EccCurve::NistP256);
    PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.build().unwrap())
        .with_ecc_parameters(parameters.build().unwrap())
        .with_ecc_unique_identifier(EccPoint::new(
            EccParameter::try_from(unique).unwrap(),
            EccParameter::default(),
        ))
        .build()
        .unwrap()
}

/// As a program that crashed would.
pub fn leave_an_object_behind(tcti: &str) {
    let mut context = context(tcti);
    context.create_primary(Hierarchy::Owner, storage(&[7; 32]), None, None, None, None).unwrap();
    std::mem::forget(context);
}

/// The same until there is no room; how many there are.
pub fn leave_objects_behind(tcti: &str) -> usize {
    let mut context = context(tcti);
    let make = |_| context.create_primary(Hierarchy::Owner, storage(&[7; 32]), None, None, None, None);
    let left = (0..16).map(make).take_while(Result::is_ok).count();
    std::mem::forget(context);
    left
}

/// Sessions of both kinds that nobody ends, as many as asked for or as there is room for; how many there are.
pub fn leave_sessions_behind(tcti: &str, most: usize) -> usize {
    let mut context = context(tcti);
    context.clear_sessions();
    let kinds = [SessionType::Policy, SessionType::Hmac];
    let left =
        kinds.iter().cycle().take(most).take_while(|kind| start(&mut context, **kind).is_some()).count();
    std::mem::forget(context);
    left
}

/// Sessions that were saved and never loaded again: as many as the TPM has numbers for.
pub fn save_sessions(tcti: &str) -> usize {
    let mut context = context(tcti);
    context.clear_sessions();
    let mut saved = 0;
    while let Some(session) = start(&mut context, SessionType::Hmac) {
        context.context_save(SessionHandle::from(session).into()).unwrap();
        saved += 1;
    }
    std::mem::forget(context);
    saved
}

fn start(context: &mut Context, kind: SessionType) -> Option<AuthSession> {
    let (aes, sha) = (SymmetricDefinition::AES_128_CFB, HashingAlgorithm::Sha256);
    context.start_auth_session(None, None, None, kind, aes, sha).ok().flatten()
}

/// Makes a primary with the owner's authorisation as a password, which is sent as it is.
pub fn make_as_owner(tcti: &str, auth: &str) {
    let mut context = context(tcti);
    let auth = tss_esapi::structures::Auth::try_from(auth.as_bytes()).unwrap();
    context.tr_set_auth(Hierarchy::Owner.into(), auth).unwrap();
    context.create_primary(Hierarchy::Owner, storage(&[7; 32]), None, None, None, None).unwrap();
}

/// A signing key under Lacre's root (its template is public) that is not exempt from the dictionary attack
/// protection: private part and public area.
pub fn key_without_no_da(tcti: &str) -> (Vec<u8>, Vec<u8>) {
    let mut context = context(tcti);
    let root = storage(b"lacre tpm root storage key, v1\0\0");
    let root = context.create_primary(Hierarchy::Owner, root, None, None, None, None).unwrap().key_handle;
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_user_with_auth(true)
        .with_sensitive_data_origin(true)
        .with_sign_encrypt(true);
    let ecdsa = EccScheme::EcDsa(HashScheme::new(HashingAlgorithm::Sha256));
    let parameters = PublicEccParametersBuilder::new_unrestricted_signing_key(ecdsa, EccCurve::NistP256);
    let public = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::Ecc)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.build().unwrap())
        .with_ecc_parameters(parameters.build().unwrap())
        .with_ecc_unique_identifier(EccPoint::default())
        .build()
        .unwrap();
    let made = context.create(root, public, None, None, None, None).unwrap();
    (made.out_private.value().to_vec(), made.out_public.marshall().unwrap())
}

/// Opens a sealed data key of a KEK with nothing but the formats: the index in the chip, the template, and the
/// authorisation value.
pub fn unseal(tcti: &str, id: &[u8; 16], auth: &[u8], bytes: &[u8]) -> Vec<u8> {
    use tss_esapi::handles::{NvIndexTpmHandle, TpmHandle};
    use tss_esapi::interface_types::resource_handles::NvAuth;
    use tss_esapi::structures::{Auth, Digest, KeyedHashScheme, Private, PublicKeyedHashParameters};
    let mut context = context(tcti);
    let number = 0x0180_0000 | (u32::from_be_bytes([0, id[0], id[1], id[2]]) & 0x003F_FFFF);
    let index = TpmHandle::NvIndex(NvIndexTpmHandle::new(number).unwrap());
    let index = context.execute_without_session(|context| context.tr_from_tpm_public(index)).unwrap();
    let kept = context.nv_read(NvAuth::Owner, index.into(), 48, 0).unwrap();
    assert_eq!(&kept.value()[..16], id);
    let unique = sha2_of(&[b"lacre/tpm-kek/v1", id, &kept.value()[16..]]);
    let kek = context
        .create_primary(Hierarchy::Owner, storage(&unique), None, None, None, None)
        .unwrap()
        .key_handle;
    let (private, unique) = bytes.split_at(bytes.len() - 32);
    let attributes = ObjectAttributesBuilder::new()
        .with_fixed_tpm(true)
        .with_fixed_parent(true)
        .with_no_da(true)
        .with_user_with_auth(true);
    let public = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes.build().unwrap())
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::Null))
        .with_keyed_hash_unique_identifier(Digest::try_from(unique).unwrap())
        .build()
        .unwrap();
    let leaf = context.load(kek, Private::try_from(private).unwrap(), public).unwrap();
    context.tr_set_auth(leaf.into(), Auth::try_from(auth).unwrap()).unwrap();
    context.unseal(leaf.into()).unwrap().value().to_vec()
}

fn sha2_of(parts: &[&[u8]]) -> [u8; 32] {
    use sha2::Digest;
    let mut sum = sha2::Sha256::new();
    for part in parts {
        sum.update(part);
    }
    sum.finalize().into()
}
