//! What the token can do, measured on session objects: the report of `lacre doctor`.

use std::time::Instant;

use cryptoki::mechanism::Mechanism as KeyGen;
use cryptoki::object::{Attribute, KeyType, ObjectHandle};
use cryptoki::types::Ulong;
use cryptoki_sys::{
    CKM_AES_ECB, CKM_AES_GCM, CKM_AES_KEY_WRAP, CKM_ECDSA, CKM_EDDSA, CKM_RSA_PKCS, CKM_SHA256_HMAC,
    CKR_MECHANISM_INVALID,
};
use serde_json::{Map, Value, json};

use crate::seal::backend::BackendError;
use crate::seal::key::{Alg, KeySpec, WrapMechanism};
use crate::seal::pkcs11::error::fail;
use crate::seal::pkcs11::objects::{ED25519_OID, P256_OID, P384_OID};
use crate::seal::pkcs11::probe;
use crate::seal::pkcs11::raw::{Fail, Mechanism};
use crate::seal::pkcs11::session::Session;

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
    (CKM_EDDSA, "CKM_EDDSA"),
    (0x1080, "CKM_AES_KEY_GEN"),
    (CKM_AES_GCM, "CKM_AES_GCM"),
    (0x2109, "CKM_AES_KEY_WRAP"),
    (0x210B, "CKM_AES_KEY_WRAP_KWP"),
    (CKM_SHA256_HMAC, "CKM_SHA256_HMAC"),
];

/// Asks the token for its limits and mechanisms and tries one operation of each kind. `keys`,
/// `algorithms`, `wrap`, `keys_live_in`, `refuses_to_export` and `without_evidence` are what other devices
/// report under the same names; the rest is about PKCS#11.
pub(crate) fn capabilities(session: &mut Session) -> Result<Value, BackendError> {
    let token = session.token();
    let entered = token.enter()?;
    let loaded = entered.loaded();
    let slot = loaded.slot.id();
    let listed = token.raw.mechanisms(slot)?;
    let mechanisms: Map<_, _> =
        NAMES.into_iter().map(|(number, name)| (name.to_owned(), json!(listed.contains(&number)))).collect();
    let mut wraps = Map::new();
    for candidate in WrapMechanism::PREFERENCE {
        let works = probe::works(token, &entered, session.raw_session(), candidate)?;
        wraps.insert(candidate.name().to_owned(), json!(works));
    }
    let wrap = match probe::choose(token, &entered, session.raw_session()) {
        Ok(chosen) => json!(chosen.name()),
        Err(BackendError::Unfit(_)) => Value::Null,
        Err(other) => return Err(other),
    };
    let largest = token.raw.mechanism_info(slot, 0).map_or(0, |(_, largest, _)| largest);
    let tried = trials(session);
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
        "keys_live_in": "device",
        "keys": keys(&tried, &wrap, largest),
        "algorithms": algorithms(&tried),
        "wrap": wrap,
        "refuses_to_export": refuses_to_export(session)?,
        "without_evidence": token.selection.without_evidence,
        "max_sessions": limit(loaded.info.max_sessions),
        "max_rw_sessions": limit(loaded.info.max_rw_sessions),
        "mechanisms_listed": listed.len(),
        "mechanism_offered": mechanisms,
        "wrap_gives_known_answer": wraps,
        "gcm_iv": gcm_iv(session)?,
        "microseconds_per_operation": timings(session, &tried),
    }))
}

/// Mean time of a signature or MAC with a session key of each kind; `None` where the token cannot.
struct Trials {
    es256: Option<f64>,
    es384: Option<f64>,
    rs256: Option<f64>,
    ps256: Option<f64>,
    eddsa: Option<f64>,
    hs256: Option<f64>,
}

fn trials(session: &Session) -> Trials {
    let ec = |curve: &[u8], digest: &[u8]| {
        let public =
            vec![Attribute::Token(false), Attribute::EcParams(curve.to_vec()), Attribute::Verify(true)];
        time_pair(session, &KeyGen::EccKeyPairGen, public, || Mechanism::Plain(CKM_ECDSA), digest, ROUNDS)
    };
    let rsa = |mechanism: fn() -> Mechanism<'static>, input: &[u8]| {
        time_pair(session, &KeyGen::RsaPkcsKeyPairGen, rsa_public(), mechanism, input, ROUNDS / 5)
    };
    let edwards =
        vec![Attribute::Token(false), Attribute::EcParams(ED25519_OID.to_vec()), Attribute::Verify(true)];
    let eddsa = || Mechanism::Plain(CKM_EDDSA);
    Trials {
        es256: ec(P256_OID, &[7; 32]),
        es384: ec(P384_OID, &[7; 48]),
        rs256: rsa(|| Mechanism::Plain(CKM_RSA_PKCS), &[7; 51]),
        ps256: rsa(|| Mechanism::PssSha256, &[7; 32]),
        eddsa: time_pair(session, &KeyGen::EccEdwardsKeyPairGen, edwards, eddsa, &[7; 32], ROUNDS),
        hs256: time_hmac(session),
    }
}

/// What kinds of keys can be made; RSA beyond 2048 bits by the token's own word, since making one
/// takes seconds.
fn keys(tried: &Trials, wrap: &Value, largest: u64) -> Value {
    let rsa = tried.rs256.is_some();
    // Bits, or bytes on some tokens.
    let up_to = |bits: u64| rsa && (largest >= bits || (1..1024).contains(&largest) && largest * 8 >= bits);
    let mut keys = Map::new();
    for (spec, can) in [
        (KeySpec::Kek, !wrap.is_null()),
        (KeySpec::EcP256, tried.es256.is_some()),
        (KeySpec::EcP384, tried.es384.is_some()),
        (KeySpec::Rsa2048, rsa),
        (KeySpec::Rsa3072, up_to(3072)),
        (KeySpec::Rsa4096, up_to(4096)),
        (KeySpec::HmacSha256, tried.hs256.is_some()),
        (KeySpec::Ed25519, tried.eddsa.is_some()),
    ] {
        keys.insert(spec.name().to_owned(), json!(can));
    }
    Value::Object(keys)
}

fn algorithms(tried: &Trials) -> Value {
    let mut algorithms = Map::new();
    for (alg, tried) in [
        (Alg::Es256, tried.es256),
        (Alg::Es384, tried.es384),
        (Alg::Rs256, tried.rs256),
        (Alg::Ps256, tried.ps256),
        (Alg::EdDsa, tried.eddsa),
    ] {
        algorithms.insert(alg.name().to_owned(), json!(tried.is_some()));
    }
    algorithms.insert("HS256".to_owned(), json!(tried.hs256.is_some()));
    Value::Object(algorithms)
}

/// Whether a key that is not extractable stays where it is when another key is told to wrap it. `null`
/// where the token has no key wrap to try it with.
fn refuses_to_export(session: &Session) -> Result<Value, BackendError> {
    let (raw, handle) = (&session.token().raw, session.raw_session().handle());
    let key = |roles: &[Attribute]| {
        let mut template = vec![
            Attribute::Token(false),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::KeyType(KeyType::AES),
            Attribute::ValueLen(Ulong::new(32)),
        ];
        template.extend_from_slice(roles);
        session.raw_session().generate_key(&KeyGen::AesKeyGen, &template).ok()
    };
    let (wrapping, kept) = (key(&[Attribute::Wrap(true)]), key(&[Attribute::Encrypt(true)]));
    let mut answer = Value::Null;
    if let (Some(wrapping), Some(kept)) = (wrapping, kept) {
        for mechanism in [CKM_AES_KEY_WRAP, CKM_AES_ECB] {
            let mut out = [0; 64];
            match raw.wrap_key(handle, mechanism, wrapping.handle(), kept.handle(), &mut out) {
                Ok(_) => answer = json!(false),
                Err(Fail { code: CKR_MECHANISM_INVALID, .. }) => continue,
                Err(_) => answer = json!(true),
            }
            break;
        }
    }
    for object in [wrapping, kept].into_iter().flatten() {
        raw.destroy(handle, object.handle())?;
    }
    Ok(answer)
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
fn timings(session: &Session, tried: &Trials) -> Value {
    json!({
        "aes_gcm_wrap": time_gcm(session),
        "ecdsa_p256_sign": tried.es256,
        "rsa_2048_sign": tried.rs256,
        "hmac_sha256": tried.hs256,
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
    mechanism: impl Fn() -> Mechanism<'static>,
    input: &[u8],
    rounds: u32,
) -> Option<f64> {
    let (raw, handle) = (&session.token().raw, session.raw_session().handle());
    let private = [Attribute::Token(false), Attribute::Private(true), Attribute::Sign(true)];
    let (public, private) = session.raw_session().generate_key_pair(generator, &public, &private).ok()?;
    let mut out = [0; 256];
    let result = mean(rounds, || raw.sign(handle, mechanism(), private.handle(), input, &mut out));
    raw.destroy(handle, public.handle()).ok()?;
    raw.destroy(handle, private.handle()).ok()?;
    result
}
