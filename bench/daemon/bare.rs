//! What the device does without Lacre: one thread, one session, cached handles, keys of the session.

#![allow(dead_code, reason = "each bench uses a part of it")]

use std::time::{Duration, Instant};

use cryptoki_sys::{
    CK_FALSE, CK_OBJECT_HANDLE, CK_TRUE, CKA_CLASS, CKA_DECRYPT, CKA_ENCRYPT, CKA_KEY_TYPE, CKA_SIGN,
    CKA_TOKEN, CKA_VALUE_LEN, CKK_GENERIC_SECRET, CKM_AES_KEY_GEN, CKM_ECDSA, CKM_GENERIC_SECRET_KEY_GEN,
    CKM_SHA256_HMAC, CKO_SECRET_KEY,
};

use crate::raw::{Module, Session, attribute};
use crate::softhsm::SoftHsm;

/// The object identifier of P-256, DER.
const P256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const IV: [u8; 12] = [9; 12];
/// About as long as a wrap's.
const AAD: [u8; 120] = [b'a'; 120];

/// A token of the bench's own, logged in.
pub struct Bare {
    session: Session,
    ec: CK_OBJECT_HANDLE,
    hmac: CK_OBJECT_HANDLE,
    kek: CK_OBJECT_HANDLE,
    wrapped: Vec<u8>,
}

impl Bare {
    /// Makes token and keys. Changes the environment of this process: call it before any thread is started.
    pub fn new() -> Self {
        let token = SoftHsm::in_process("bare");
        let module = Module::load(&token.module);
        let session = module.session(module.slot("bare").unwrap()).unwrap();
        session.login(&token.pin).unwrap();
        let len = 32_u64.to_ne_bytes();
        let (yes, no) = ([CK_TRUE], [CK_FALSE]);
        let (class, generic) = (CKO_SECRET_KEY.to_ne_bytes(), CKK_GENERIC_SECRET.to_ne_bytes());
        let secret =
            [attribute(CKA_CLASS, &class), attribute(CKA_TOKEN, &no), attribute(CKA_VALUE_LEN, &len)];
        let aes = [&secret[..], &[attribute(CKA_ENCRYPT, &yes), attribute(CKA_DECRYPT, &yes)]].concat();
        let hmac = [&secret[..], &[attribute(CKA_KEY_TYPE, &generic), attribute(CKA_SIGN, &yes)]].concat();
        let kek = session.generate(CKM_AES_KEY_GEN, &aes).unwrap();
        let hmac = session.generate(CKM_GENERIC_SECRET_KEY_GEN, &hmac).unwrap();
        let wrapped = session.gcm_seal(kek, &mut IV.clone(), &AAD, &[7; 32]).unwrap();
        let ec = session.generate_ec(&P256).unwrap();
        Self { session, ec, hmac, kek, wrapped }
    }

    /// What a token costs the device: one HMAC of the client secret and one ES256 signature.
    pub fn token_rate(&self, time: Duration) -> f64 {
        let mut out = [0; 64];
        rate(time, || {
            self.session.sign(CKM_SHA256_HMAC, self.hmac, &[b's'; 43], &mut out).unwrap();
            self.session.sign(CKM_ECDSA, self.ec, &[7; 32], &mut out).unwrap();
        })
    }

    /// What a read costs the device: one DEK.
    pub fn open_rate(&self, time: Duration) -> f64 {
        let mut out = [0; 64];
        rate(time, || {
            self.session.gcm_open(self.kek, &IV, &AAD, &self.wrapped, &mut out).unwrap();
        })
    }
}

fn rate(time: Duration, mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    let mut done = 0_u32;
    while start.elapsed() < time {
        for _ in 0..16 {
            work();
        }
        done += 16;
    }
    f64::from(done) / start.elapsed().as_secs_f64()
}
