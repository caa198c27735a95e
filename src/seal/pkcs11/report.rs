//! What the token can do, measured on session objects: the report of `lacre doctor`.

use std::time::Instant;

use cryptoki::mechanism::Mechanism as KeyGen;
use cryptoki::object::{Attribute, KeyType, ObjectHandle};
use cryptoki::types::Ulong;
use cryptoki_sys::{CKM_AES_GCM, CKM_ECDSA, CKM_RSA_PKCS, CKM_SHA256_HMAC};
use serde_json::{Map, Value, json};

use crate::seal::backend::BackendError;
use crate::seal::key::WrapMechanism;
use crate::seal::pkcs11::error::fail;
use crate::seal::pkcs11::raw::{Fail, Mechanism};
use crate::seal::pkcs11::session::Session;
use crate::seal::pkcs11::wrap;

/// Operations per measurement: enough for a stable mean on a soft token, seconds on a slow chip.
const ROUNDS: u32 = 50;

/// Mechanisms that matter here, by their standard names.
const NAMES: [(u64, &str); 12] = [
    (0x0000, "CKM_RSA_PKCS_KEY_PAIR_GEN"),
    (CKM_RSA_PKCS, "CKM_RSA_PKCS"),
    (0x000D, "CKM_RSA_PKCS_PSS"),
    (0x0009, "CKM_RSA_PKCS_OAEP"),
    (0x1040, "CKM_EC_KEY_PAIR_GEN"),
    (CKM_ECDSA, "CKM_ECDSA"),
    (0x1057, "CKM_EDDSA"),
    (0x1080, "CKM_AES_KEY_GEN"),
    (CKM_AES_GCM, "CKM_AES_GCM"),
    (0x2109, "CKM_AES_KEY_WRAP"),
    (0x210B, "CKM_AES_KEY_WRAP_KWP"),
    (CKM_SHA256_HMAC, "CKM_SHA256_HMAC"),
];

/// Asks the token for its limits and mechanisms and times one operation of each kind.
pub(crate) fn capabilities(session: &mut Session) -> Result<Value, BackendError> {
    let token = session.token();
    let entered = token.enter()?;
    let loaded = entered.loaded();
    let listed = token.raw.mechanisms(loaded.slot.id())?;
    let mechanisms: Map<_, _> =
        NAMES.into_iter().map(|(number, name)| (name.to_owned(), json!(listed.contains(&number)))).collect();
    let handle = session.raw_session().handle();
    let mut wraps = Map::new();
    for candidate in [WrapMechanism::AesGcm, WrapMechanism::AesKw, WrapMechanism::AesKwObject] {
        let works = wrap::works(token, &entered, handle, candidate)?;
        wraps.insert(candidate.name().to_owned(), json!(works));
    }
    let limit = |count: u64| match count {
        0 => json!("no limit"),
        u64::MAX => json!("unknown"),
        known => json!(known),
    };
    Ok(json!({
        "label": loaded.info.label,
        "serial": loaded.info.serial,
        "manufacturer": loaded.info.manufacturer,
        "model": loaded.info.model,
        "firmware": loaded.info.firmware,
        "max_sessions": limit(loaded.info.max_sessions),
        "max_rw_sessions": limit(loaded.info.max_rw_sessions),
        "mechanisms_listed": listed.len(),
        "mechanism_offered": mechanisms,
        "wrap_gives_known_answer": wraps,
        "gcm_iv": gcm_iv(session)?,
        "microseconds_per_operation": timings(session),
    }))
}

fn cryptoki_fail(error: &cryptoki::error::Error) -> BackendError {
    fail("C_GenerateKey", error).into()
}

fn aes_key(session: &Session) -> Result<ObjectHandle, BackendError> {
    let template = [
        Attribute::Token(false),
        Attribute::Private(true),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(Ulong::new(32)),
        Attribute::Encrypt(true),
        Attribute::Decrypt(true),
    ];
    session.raw_session().generate_key(&KeyGen::AesKeyGen, &template).map_err(|error| cryptoki_fail(&error))
}

/// Whether the device keeps the IV it is given or writes its own.
fn gcm_iv(session: &Session) -> Result<&'static str, BackendError> {
    let (raw, handle) = (&session.token().raw, session.raw_session().handle());
    let Ok(key) = aes_key(session) else { return Ok("unknown") };
    let (mut iv, mut out) = ([0x5a; 12], [0; 48]);
    let gcm = Mechanism::Gcm { iv: &mut iv, aad: b"lacre/report/v1" };
    let sealed = raw.encrypt(handle, gcm, key.handle(), &[0; 32], &mut out);
    raw.destroy(handle, key.handle())?;
    Ok(match sealed {
        Err(_) => "refuses a given IV, or has no GCM",
        Ok(_) if iv == [0x5a; 12] => "takes the given IV",
        Ok(_) => "makes its own IV",
    })
}

/// Mean time per operation; an operation that the token cannot do is null.
fn timings(session: &Session) -> Value {
    json!({
        "aes_gcm_wrap": time_gcm(session),
        "ecdsa_p256_sign": time_pair(session, &KeyGen::EccKeyPairGen, p256_public(), CKM_ECDSA, &[7; 32], ROUNDS),
        "rsa_2048_sign": time_pair(session, &KeyGen::RsaPkcsKeyPairGen, rsa_public(), CKM_RSA_PKCS, &[7; 51], ROUNDS / 5),
        "hmac_sha256": time_hmac(session),
    })
}

fn mean(rounds: u32, mut operation: impl FnMut() -> Result<usize, Fail>) -> Option<f64> {
    let start = Instant::now();
    for _ in 0..rounds {
        operation().ok()?;
    }
    let micros = start.elapsed().as_secs_f64() * 1e6 / f64::from(rounds);
    Some((micros * 10.0).round() / 10.0)
}

fn time_gcm(session: &Session) -> Option<f64> {
    let (raw, handle) = (&session.token().raw, session.raw_session().handle());
    let key = aes_key(session).ok()?;
    let mut out = [0; 48];
    let result = mean(ROUNDS, || {
        let mut iv = [0; 12];
        getrandom::fill(&mut iv).map_err(|_| Fail { function: "getrandom", code: 0 })?;
        raw.encrypt(
            handle,
            Mechanism::Gcm { iv: &mut iv, aad: b"lacre/report/v1" },
            key.handle(),
            &[0; 32],
            &mut out,
        )
    });
    raw.destroy(handle, key.handle()).ok()?;
    result
}

fn time_hmac(session: &Session) -> Option<f64> {
    let (raw, handle) = (&session.token().raw, session.raw_session().handle());
    let template = [
        Attribute::Token(false),
        Attribute::KeyType(KeyType::GENERIC_SECRET),
        Attribute::ValueLen(Ulong::new(32)),
        Attribute::Sign(true),
    ];
    let key = session.raw_session().generate_key(&KeyGen::GenericSecretKeyGen, &template).ok()?;
    let mut out = [0; 32];
    let result = mean(ROUNDS, || {
        raw.sign(handle, Mechanism::Plain(CKM_SHA256_HMAC), key.handle(), &[0; 64], &mut out)
    });
    raw.destroy(handle, key.handle()).ok()?;
    result
}

fn p256_public() -> Vec<Attribute> {
    let oid = vec![0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
    vec![Attribute::Token(false), Attribute::EcParams(oid), Attribute::Verify(true)]
}

fn rsa_public() -> Vec<Attribute> {
    vec![
        Attribute::Token(false),
        Attribute::ModulusBits(Ulong::new(2048)),
        Attribute::PublicExponent(vec![1, 0, 1]),
        Attribute::Verify(true),
    ]
}

fn time_pair(
    session: &Session,
    generator: &KeyGen<'_>,
    public: Vec<Attribute>,
    mechanism: u64,
    input: &[u8],
    rounds: u32,
) -> Option<f64> {
    let (raw, handle) = (&session.token().raw, session.raw_session().handle());
    let private = [Attribute::Token(false), Attribute::Private(true), Attribute::Sign(true)];
    let (public, private) = session.raw_session().generate_key_pair(generator, &public, &private).ok()?;
    let mut out = [0; 256];
    let result =
        mean(rounds, || raw.sign(handle, Mechanism::Plain(mechanism), private.handle(), input, &mut out));
    raw.destroy(handle, public.handle()).ok()?;
    raw.destroy(handle, private.handle()).ok()?;
    result
}
