//! What the chip can do, measured: the report of `lacre doctor`.

use std::sync::Arc;
use std::time::Instant;

use serde_json::{Map, Value, json};
use tss_esapi::constants::PropertyTag;

use super::keys::Session;
use super::link::Link;
use super::{Tpm, lock};
use crate::seal::backend::{Backend, BackendError};
use crate::seal::envelope::DEK_LEN;
use crate::seal::key::{Alg, KeyRef, KeySpec};

/// Operations per measurement: chips do a few a second.
const ROUNDS: u32 = 5;

/// Limits and state from the chip, then one operation of each kind on keys that are made for it and destroyed.
pub(super) fn capabilities(tpm: &Arc<Tpm>) -> Result<Value, BackendError> {
    let (limits, lockout) = tpm.with_link(|link| Ok((limits(link)?, link.lockout()?)))?;
    let mut session = Session::new(Arc::clone(tpm));
    let mut keys = Map::new();
    let mut algorithms = Map::new();
    let mut timings = Map::new();
    let kinds = [
        (KeySpec::EcP256, &[Alg::Es256][..]),
        (KeySpec::EcP384, &[Alg::Es384]),
        (KeySpec::Rsa2048, &[Alg::Rs256, Alg::Ps256]),
        (KeySpec::Ed25519, &[Alg::EdDsa]),
        (KeySpec::Rsa3072, &[]),
        (KeySpec::Rsa4096, &[]),
    ];
    for (spec, algs) in kinds {
        let key = generate(&mut session, spec)?;
        keys.insert(spec.name().to_owned(), json!(key.is_some()));
        for alg in algs {
            let digest = if *alg == Alg::Es384 { &[7; 48][..] } else { &[7; 32] };
            let time = key.as_ref().and_then(|key| mean(|| session.sign(key, *alg, digest).map(drop)));
            algorithms.insert(alg.name().to_owned(), json!(time.is_some()));
            timings.insert(alg.name().to_owned(), json!(time));
        }
        if let Some(key) = key {
            session.destroy(&key)?;
        }
    }
    let key = generate(&mut session, KeySpec::HmacSha256)?;
    keys.insert(KeySpec::HmacSha256.name().to_owned(), json!(key.is_some()));
    algorithms.insert("HS256".to_owned(), json!(key.is_some()));
    if let Some(key) = key {
        timings.insert("HS256".to_owned(), json!(mean(|| session.mac(&key, &[0; 64]).map(drop))));
        session.destroy(&key)?;
    }
    let kek = generate(&mut session, KeySpec::Kek)?;
    keys.insert(KeySpec::Kek.name().to_owned(), json!(kek.is_some()));
    if let Some(kek) = kek {
        let dek = tpm.buffer(DEK_LEN)?;
        let time = mean(|| session.wrap(&kek, &dek, b"lacre/report/v1").map(drop));
        timings.insert("TPM2-SEAL".to_owned(), json!(time));
        session.destroy(&kek)?;
    }
    let known = lock(&tpm.known).clone();
    Ok(json!({
        "device": "tpm",
        "address": known.label,
        "root": known.serial,
        "firmware": known.library,
        "limits": limits,
        "lockout": {
            "locked": lockout.is_locked,
            "failed_tries": lockout.failed_tries,
            "max_tries": lockout.max_tries,
            "seconds_per_try": lockout.interval,
        },
        "wrap": "TPM2-SEAL",
        "keys": keys,
        "algorithms": algorithms,
        "keys_live_in": { "kek": "chip", "signing": "blob" },
        "microseconds_per_operation": timings,
    }))
}

/// A key of that kind; `None` if the chip does not make such keys.
fn generate(session: &mut Session, spec: KeySpec) -> Result<Option<KeyRef>, BackendError> {
    let planned = KeyRef::plan(spec).map_err(|_| BackendError::Refused { function: "getrandom", code: 0 })?;
    let error = match session.generate(&planned, None) {
        Ok(key) => return Ok(Some(key)),
        Err(error) => error,
    };
    // A KEK's NV index may be there already, and no row remembers this id.
    let cleaned = session.destroy(&planned);
    match error {
        BackendError::Refused { .. } | BackendError::Unfit(_) => cleaned.map(|()| None),
        other => Err(other),
    }
}

fn mean(mut operation: impl FnMut() -> Result<(), BackendError>) -> Option<f64> {
    let start = Instant::now();
    for _ in 0..ROUNDS {
        operation().ok()?;
    }
    let micros = start.elapsed().as_secs_f64() * 1e6 / f64::from(ROUNDS);
    Some((micros * 10.0).round() / 10.0)
}

fn limits(link: &mut Link) -> Result<Value, BackendError> {
    let found = link.properties(PropertyTag::FamilyIndicator, 64)?;
    let value = |tag| json!(found.get(&tag));
    Ok(json!({
        "transient_objects": value(PropertyTag::HrTransientMin),
        "persistent_objects": value(PropertyTag::HrPersistentMin),
        "sessions": value(PropertyTag::ActiveSessionsMax),
    }))
}
