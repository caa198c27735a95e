//! The self-test of a TPM (KL-10): does the chip compute what it must?
//!
//! Whenever the device is brought up, before it is called ready: the chip's own test; its random numbers; an HMAC
//! under a known key against the known answer; a signature with a fresh key pair against software; a known value
//! that is sealed, opened, and refused when it was altered. No key of the installation is touched: those prove
//! themselves when they are used, a KEK by its canary, and every signature is verified before it leaves (`keys`).
//! A failure says that the chip is ill: it counts as away, and the next probe tests again.
//!
//! One object at a time beside the root. Nothing here is secret, so it crosses the bus in clear, save the sealed value.

use sha2::{Digest as _, Sha256};
use tss_esapi::Context;
use tss_esapi::attributes::ObjectAttributesBuilder;
use tss_esapi::handles::KeyHandle;
use tss_esapi::interface_types::algorithm::{HashingAlgorithm, PublicAlgorithm};
use tss_esapi::interface_types::resource_handles::Hierarchy;
use tss_esapi::interface_types::session_handles::AuthSession;
use tss_esapi::structures::{
    Auth, Digest, KeyedHashScheme, MaxBuffer, Private, Public, PublicBuilder, PublicKeyedHashParameters,
    Sensitive, SensitiveData,
};

use super::error::Fail;
use super::link::Link;
use super::{sign, template};
use crate::seal::backend::BackendError;
use crate::seal::key::{Alg, KeySpec};
use crate::seal::verify;

/// Commands by themselves, which prove nothing and encrypt nothing.
const PLAIN: (Option<AuthSession>, Option<AuthSession>) = (Some(AuthSession::Password), None);

/// RFC 4231, section 4.2.
const MAC_KEY: [u8; 20] = [0x0B; 20];
const MAC_MESSAGE: &[u8] = b"Hi There";
const MAC: [u8; 32] = [
    0xB0, 0x34, 0x4C, 0x61, 0xD8, 0xDB, 0x38, 0x53, 0x5C, 0xA8, 0xAF, 0xCE, 0xAF, 0x0B, 0xF1, 0x2B, 0x88,
    0x1D, 0xC2, 0x00, 0xC9, 0x83, 0x3D, 0xA7, 0x26, 0xE9, 0x37, 0x6C, 0x2E, 0x32, 0xCF, 0xF7,
];

/// What is signed, and what is sealed.
const MESSAGE: &[u8; 18] = b"lacre/self-test/v1";

const GET_RANDOM: &str = "self-test: TPM2_GetRandom";
const LOAD_EXTERNAL: &str = "self-test: TPM2_LoadExternal";
const HMAC: &str = "self-test: TPM2_HMAC";
const CREATE_PRIMARY: &str = "self-test: TPM2_CreatePrimary";
const SIGN: &str = "self-test: TPM2_Sign";
const CREATE: &str = "self-test: TPM2_Create";
const LOAD: &str = "self-test: TPM2_Load";
const UNSEAL: &str = "self-test: TPM2_Unseal";

/// All of it.
pub(super) fn run(link: &mut Link) -> Result<(), BackendError> {
    own_test(link)?;
    randomness(link)?;
    known_mac(link)?;
    key_pair(link)?;
    sealing(link)?;
    own_result(link)
}

/// Has the chip test what it has not tested since it was switched on.
fn own_test(link: &mut Link) -> Result<(), BackendError> {
    let tested = link.command("self-test: TPM2_SelfTest", (None, None), |context| context.self_test(false));
    match tested {
        // It goes on beside the commands that follow.
        Err(fail) if fail.is_testing() => Ok(()),
        Err(fail) if fail.is_failure() => Err(BackendError::SelfTest("the chip's own test failed")),
        other => Ok(other?),
    }
}

/// What the chip says of its tests, those of the commands before among them.
fn own_result(link: &mut Link) -> Result<(), BackendError> {
    let function = "self-test: TPM2_GetTestResult";
    let (_, result) = link.command(function, (None, None), Context::get_test_result)?;
    match result.map_err(|error| Fail::new(function, error)) {
        Err(fail) if !fail.is_testing() => Err(BackendError::SelfTest("the chip's own test failed")),
        _ => Ok(()),
    }
}

fn randomness(link: &mut Link) -> Result<(), BackendError> {
    let mut draw = || link.command(GET_RANDOM, (None, None), |context| context.get_random(32));
    let [first, second] = [draw()?, draw()?];
    let is_drawn = |drawn: &Digest| drawn.value().len() == 32 && drawn.value().iter().any(|byte| *byte != 0);
    if is_drawn(&first) && is_drawn(&second) && first != second {
        Ok(())
    } else {
        Err(BackendError::SelfTest("the chip's random numbers repeat or are zero"))
    }
}

/// A key that everybody knows, and the MAC that it makes.
fn known_mac(link: &mut Link) -> Result<(), BackendError> {
    let (sensitive, public) =
        known_key().map_err(|_| BackendError::Refused { function: "TPM template", code: 0 })?;
    let made = link.again(|link| {
        let (sensitive, public) = (sensitive.clone(), public.clone());
        let message = MaxBuffer::try_from(MAC_MESSAGE).map_err(|error| Fail::new(HMAC, error))?;
        let load = |context: &mut Context| context.load_external(sensitive, public, Hierarchy::Null);
        let key = link.command(LOAD_EXTERNAL, (None, None), load)?;
        using(link, key, |link| {
            link.command(HMAC, PLAIN, |context| context.hmac(key.into(), message, HashingAlgorithm::Sha256))
        })
    });
    match made {
        Ok(made) if made.value() == MAC => Ok(()),
        Ok(_) => Err(BackendError::SelfTest("an HMAC under a known key is not the known one")),
        Err(fail) => match fail.into() {
            // Nothing else here needs a chip to take keys from outside.
            BackendError::Refused { function: LOAD_EXTERNAL, code } => {
                tracing::info!(code, "the TPM imports no HMAC key: that part of its self-test is left out");
                Ok(())
            }
            other => Err(other),
        },
    }
}

fn known_key() -> tss_esapi::Result<(Sensitive, Public)> {
    let seed = [0; 32];
    let attributes = ObjectAttributesBuilder::new()
        .with_user_with_auth(true)
        .with_no_da(true)
        .with_sign_encrypt(true)
        .build()?;
    // What names a key of this kind is a hash of its seed and itself (part 1, section 27.5.3.2).
    let unique = Sha256::digest([&seed[..], &MAC_KEY].concat());
    let public = PublicBuilder::new()
        .with_public_algorithm(PublicAlgorithm::KeyedHash)
        .with_name_hashing_algorithm(HashingAlgorithm::Sha256)
        .with_object_attributes(attributes)
        .with_keyed_hash_parameters(PublicKeyedHashParameters::new(KeyedHashScheme::HMAC_SHA_256))
        .with_keyed_hash_unique_identifier(Digest::try_from(&unique[..])?)
        .build()?;
    let sensitive = Sensitive::Bits {
        auth_value: Auth::default(),
        seed_value: Digest::try_from(&seed[..])?,
        sensitive: SensitiveData::try_from(&MAC_KEY[..])?,
    };
    Ok((sensitive, public))
}

/// FIPS 140-3's pairwise consistency, on a pair that is made for it.
fn key_pair(link: &mut Link) -> Result<(), BackendError> {
    let spec = KeySpec::EcP256;
    let unable = BackendError::Refused { function: "TPM template", code: 0 };
    let template = template::leaf(spec)?.ok_or(unable)?;
    let hash = Sha256::digest(MESSAGE);
    let (public, signature) = link.again(|link| {
        let template = template.clone();
        let create =
            |context: &mut Context| context.create_primary(Hierarchy::Null, template, None, None, None, None);
        let made = link.command(CREATE_PRIMARY, PLAIN, create)?;
        let signed = using(link, made.key_handle, |link| {
            sign::sign_with(link, SIGN, made.key_handle, Alg::Es256, &hash, PLAIN)
        })?;
        Ok((made.out_public, signed))
    })?;
    let is_right = template::public_key(spec, &public)
        .zip(sign::jose(spec, &signature))
        .is_some_and(|(public, signature)| verify::verifies(&public, Alg::Es256, &hash, &signature));
    if is_right {
        Ok(())
    } else {
        Err(BackendError::SelfTest("a signature does not verify with its public key"))
    }
}

/// A known value under the root, in the session that data keys take.
fn sealing(link: &mut Link) -> Result<(), BackendError> {
    let template = template::sealed(&[])?;
    let (opened, altered) = link.again(|link| {
        let template = template.clone();
        let data = SensitiveData::try_from(&MESSAGE[..]).map_err(|error| Fail::new(CREATE, error))?;
        let root = link.root()?;
        let sessions = link.under_parent();
        let create = |context: &mut Context| context.create(root, template, None, Some(data), None, None);
        let made = link.command(CREATE, sessions, create)?;
        let (private, public) = (made.out_private.clone(), made.out_public.clone());
        let object = link.command(LOAD, PLAIN, |context| context.load(root, private, public))?;
        let opened = using(link, object, |link| {
            let sessions = link.secretly();
            link.command(UNSEAL, sessions, |context| context.unseal(object.into()))
        })?;
        let mut flipped = made.out_private.value().to_vec();
        if let Some(last) = flipped.last_mut() {
            *last ^= 1;
        }
        let flipped = Private::try_from(flipped).map_err(|error| Fail::new(LOAD, error))?;
        let public = made.out_public.clone();
        let altered = match link.command(LOAD, PLAIN, |context| context.load(root, flipped, public)) {
            Ok(object) => {
                link.flush(object.into())?;
                true
            }
            Err(fail) if fail.is_bad_blob() => false,
            Err(fail) => return Err(fail),
        };
        Ok((opened, altered))
    })?;
    if opened.value() != MESSAGE {
        return Err(BackendError::SelfTest("what the chip seals does not open"));
    }
    if altered { Err(BackendError::SelfTest("the chip opens altered bytes")) } else { Ok(()) }
}

/// Flushes the object on every path; the first thing that went wrong is told.
fn using<T>(
    link: &mut Link,
    object: KeyHandle,
    call: impl FnOnce(&mut Link) -> Result<T, Fail>,
) -> Result<T, Fail> {
    let result = call(link);
    let flushed = link.flush(object.into());
    result.and_then(|value| flushed.map(|()| value))
}

#[cfg(test)]
mod tests {
    use super::{MAC, MAC_KEY, MAC_MESSAGE};

    #[test]
    fn the_known_answer_is_that_of_software() {
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &MAC_KEY);
        assert_eq!(aws_lc_rs::hmac::sign(&key, MAC_MESSAGE).as_ref(), MAC);
    }
}
