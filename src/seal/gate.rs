//! No signature leaves before software has found it right, and its nonce new.
//!
//! A lane hands over what the device has made; here it is verified with the public key by which the signing key is
//! pinned, on the side of whoever waits for it: the lane's thread is at the next call meanwhile. Public keys are read from the
//! device once for each key and kept parsed. What an HMAC key makes nobody can verify without the key.
//!
//! A key that signs two hashes with one nonce is told to everybody who sees both signatures. It is suspended: unfit from
//! then on, here and in every report, until this process ends. The second signature stays here.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use crate::seal::SealError;
use crate::seal::backend::BackendError;
use crate::seal::key::{Alg, KeyId, KeyRef, Pin, Signature};
use crate::seal::nonces::{Nonces, Noted};
use crate::seal::verify::Verifier;
use crate::seal::worker::{Lanes, mismatch};

/// Keys whose public halves are kept. Beyond it all are read again.
const MOST: usize = 4096;
/// Nonces that are kept over all keys: some 40 MiB. Beyond it the older ones of each are forgotten.
const MOST_NONCES: usize = 1 << 20;
/// How often they are counted: after so many signatures.
const COUNT_EVERY: usize = 1 << 16;

/// Why a suspended key is unfit.
pub(crate) const REPEATED: &str = "it has signed two messages with one nonce: whoever has both has the key";

/// A signing key as the gate knows it.
pub(crate) struct Known {
    /// The same id with another pin is another key.
    pin: Arc<Pin>,
    verifier: Verifier,
    nonces: Nonces,
    suspended: AtomicBool,
}

/// The public halves of the keys that have signed.
#[derive(Default)]
pub(crate) struct Gate {
    keys: RwLock<HashMap<KeyId, Arc<Known>>>,
    signatures: AtomicUsize,
}

impl Gate {
    /// What is known of a key that has signed before.
    pub(crate) fn known(&self, key: &KeyRef) -> Option<Arc<Known>> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        let known = keys.get(&key.id)?;
        (Arc::ptr_eq(&known.pin, &key.pin) || known.pin == key.pin).then(|| Arc::clone(known))
    }

    fn learn(&self, key: &KeyRef, verifier: Verifier) -> Arc<Known> {
        let known = Arc::new(Known {
            pin: Arc::clone(&key.pin),
            verifier,
            nonces: Nonces::default(),
            suspended: AtomicBool::new(false),
        });
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= MOST {
            keys.retain(|_, known| known.is_suspended());
        }
        // Two tasks may have read the same key: what the first one noted is kept.
        match keys.get(&key.id) {
            Some(first) if first.pin == known.pin => Arc::clone(first),
            _ => {
                keys.insert(key.id, Arc::clone(&known));
                known
            }
        }
    }

    /// The key is gone.
    pub(crate) fn forget(&self, key: KeyId) {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }

    /// Whether the key may sign.
    pub(crate) fn admit(&self, key: &KeyRef) -> Result<(), BackendError> {
        match self.known(key) {
            Some(known) if known.is_suspended() => Err(BackendError::Unfit(REPEATED.to_owned())),
            _ => Ok(()),
        }
    }

    /// Keeps the nonces of all keys together within their bound.
    fn count(&self) {
        if !(self.signatures.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(COUNT_EVERY) {
            return;
        }
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        if keys.values().map(|known| known.nonces.len()).sum::<usize>() > MOST_NONCES {
            keys.values().for_each(|known| known.nonces.age());
        }
    }
}

impl Known {
    pub(crate) fn is_suspended(&self) -> bool {
        self.suspended.load(Ordering::Acquire)
    }

    /// Whether the nonce of a right signature is new. One that is not suspends the key.
    fn watch(&self, alg: Alg, digest: &[u8], signature: &Signature) -> Result<(), BackendError> {
        if !matches!(alg, Alg::Es256 | Alg::Es384)
            || self.nonces.note(signature.as_bytes(), digest) == Noted::Fresh
        {
            return Ok(());
        }
        self.suspended.store(true, Ordering::Release);
        Err(BackendError::Unfit(REPEATED.to_owned()))
    }

    /// Whether what the device has made for [`Alg::digest`] is a signature of this key.
    pub(crate) fn judge(&self, alg: Alg, digest: &[u8], signature: &Signature) -> Result<(), BackendError> {
        if self.verifier.verifies(alg, digest, signature.as_bytes()) {
            Ok(())
        } else {
            Err(BackendError::SelfTest("a signature does not verify with its public key"))
        }
    }
}

impl Lanes {
    /// Lets a signature through, or keeps it: then the device counts as away until it signs rightly with this key.
    pub(crate) async fn release(
        &self,
        key: &KeyRef,
        (alg, digest): (Alg, &[u8]),
        signature: Signature,
    ) -> Result<Signature, SealError> {
        let known = match self.gate.known(key) {
            Some(known) => known,
            None => self.learn(key).await?,
        };
        if let Err(error) = known.judge(alg, digest, &signature) {
            // The probes sign with it, and judge as this did.
            self.breaker.suspect(key);
            return Err(self.breaker.open(error.to_string()));
        }
        self.gate.count();
        if known.watch(alg, digest, &signature).is_err() {
            tracing::error!(key = %key.id(), "A key has signed two messages with one nonce and is suspended");
            return Err(self.suspended(key));
        }
        Ok(signature)
    }

    /// The key may not sign any more; counted like every key that is found unfit, so that the daemon looks at its keys.
    pub(crate) fn suspended(&self, key: &KeyRef) -> SealError {
        self.counters.key_failures.fetch_add(1, Ordering::Relaxed);
        SealError::KeyUnfit { key: key.id(), reason: REPEATED.to_owned() }
    }

    /// Reads the public half, which has to be the one that the key is pinned by.
    async fn learn(&self, key: &KeyRef) -> Result<Arc<Known>, SealError> {
        let mut public = self.public_key(key).await?;
        if !key.is_pinned_by(&public) {
            // One answer is no evidence against a key: it may have been garbled on its way.
            public = self.public_key(key).await?;
        }
        if !key.is_pinned_by(&public) {
            return Err(SealError::KeyUnfit {
                key: key.id(),
                reason: "its public half is another one".to_owned(),
            });
        }
        let verifier = Verifier::new(&public).ok_or_else(|| mismatch("sign"))?;
        Ok(self.gate.learn(key, verifier))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use p256::elliptic_curve::PrimeField;
    use p256::elliptic_curve::point::AffineCoordinates;
    use p256::{ProjectivePoint, Scalar};

    use super::{REPEATED, SealError};
    use crate::seal::KeyReport;
    use crate::seal::backend::{Backend, BackendError};
    use crate::seal::driver::{Driver, Known, Problem};
    use crate::seal::guarded::{Arena, Options, SecretBuf};
    use crate::seal::key::{Alg, KeyRef, KeySpec, Pin, PublicKey, Signature, WrappedDek};
    use crate::seal::worker::{Lanes, Sizes};

    const NOT_ASKED: BackendError = BackendError::Missing;

    /// A device with one P-256 key whose generator may be stuck; then every signature has the same nonce.
    #[derive(Clone)]
    struct Stuck(Arc<AtomicBool>);

    fn private() -> Scalar {
        Scalar::from(0x1234_5678_9abc_u64)
    }

    fn public() -> PublicKey {
        let point = (ProjectivePoint::GENERATOR * private()).to_affine();
        let y = p256::PublicKey::from_affine(point).unwrap();
        let y = p256::elliptic_curve::sec1::ToSec1Point::to_sec1_point(&y, false);
        PublicKey::Ec { spec: KeySpec::EcP256, x: point.x().to_vec(), y: y.y().unwrap().to_vec() }
    }

    fn scalar(bytes: &[u8]) -> Scalar {
        // Once in 2^32 a hash is no scalar: the test's are.
        Option::from(Scalar::from_repr(bytes.try_into().unwrap())).unwrap()
    }

    impl Backend for Stuck {
        fn wrap(&mut self, _: &KeyRef, _: &SecretBuf, _: &[u8]) -> Result<WrappedDek, BackendError> {
            Err(NOT_ASKED)
        }

        fn unwrap(
            &mut self,
            _: &KeyRef,
            _: &WrappedDek,
            _: &[u8],
            _: &mut SecretBuf,
        ) -> Result<(), BackendError> {
            Err(NOT_ASKED)
        }

        fn sign(&mut self, _: &KeyRef, _: Alg, digest: &[u8]) -> Result<Signature, BackendError> {
            let mut nonce = [7; 32];
            if !self.0.load(Ordering::Relaxed) {
                getrandom::fill(&mut nonce[8..]).unwrap();
            }
            let nonce = scalar(&nonce);
            let r = (ProjectivePoint::GENERATOR * nonce).to_affine().x();
            let s =
                Option::<Scalar>::from(nonce.invert()).unwrap() * (scalar(digest) + scalar(&r) * private());
            Ok(Signature([r.as_slice(), s.to_repr().as_slice()].concat()))
        }

        fn mac(&mut self, _: &KeyRef, _: &[u8]) -> Result<[u8; 32], BackendError> {
            Err(NOT_ASKED)
        }

        fn public_key(&mut self, _: &KeyRef) -> Result<PublicKey, BackendError> {
            Ok(public())
        }

        fn generate(&mut self, _: &KeyRef, _: Option<&SecretBuf>) -> Result<KeyRef, BackendError> {
            Err(NOT_ASKED)
        }

        fn destroy(&mut self, _: &KeyRef) -> Result<(), BackendError> {
            Ok(())
        }

        fn inspect(&mut self, _: &KeyRef) -> Result<KeyReport, BackendError> {
            Ok(KeyReport::default())
        }
    }

    impl Driver for Stuck {
        fn open(&self, _: bool) -> Result<Box<dyn Backend>, BackendError> {
            Ok(Box::new(self.clone()))
        }

        fn bring_up(&self) -> Result<(), Problem> {
            Ok(())
        }

        fn reinitialise(&self) -> Result<(), Problem> {
            Ok(())
        }

        fn take_down(&self) -> Result<(), Problem> {
            Ok(())
        }

        fn epoch(&self) -> u64 {
            1
        }

        fn bump_epoch(&self) {}

        fn known(&self) -> Known {
            Known::default()
        }

        fn address(&self) -> String {
            String::new()
        }

        fn unlatch(&self, _: bool) -> Result<bool, String> {
            Ok(true)
        }

        fn capabilities(&self) -> Result<serde_json::Value, BackendError> {
            Err(NOT_ASKED)
        }
    }

    #[tokio::test]
    async fn a_key_that_signs_twice_with_one_nonce_is_suspended() {
        let options = Options { slots: 4, allow_unlocked: true, ..Options::default() };
        let sizes = Sizes { fast: 1, slow: 1, queue: 64, deadline: Duration::from_secs(5) };
        let stuck = Arc::new(AtomicBool::new(false));
        let name = crate::seal::DeviceName::default();
        let driver = Box::new(Stuck(Arc::clone(&stuck)));
        let lanes = Lanes::start(name, driver, Arena::new(&options).unwrap(), &sizes).unwrap();
        let pin = Pin::Fingerprint(public().fingerprint());
        let key = KeyRef::plan(KeySpec::EcP256).unwrap().pinned(pin.clone());
        let sign = async |key: &KeyRef, message: &[u8]| {
            lanes.sign(key, Alg::Es256, Alg::Es256.digest(message)).await
        };

        for round in 0..200_u32 {
            sign(&key, &round.to_be_bytes()).await.unwrap();
        }
        stuck.store(true, Ordering::Relaxed);
        sign(&key, b"first").await.unwrap();
        // As by a signer that computes its nonces from the hash.
        sign(&key, b"first").await.unwrap();
        assert!(lanes.inspect(&key).await.unwrap().deviations.is_empty());
        assert_eq!(lanes.counters.key_failures.load(Ordering::Relaxed), 0);

        let is_unfit = |answer: Result<Signature, SealError>| matches!(answer, Err(SealError::KeyUnfit { key: of, reason }) if of == key.id() && reason == REPEATED);
        assert!(is_unfit(sign(&key, b"second").await));
        assert_eq!(lanes.counters.key_failures.load(Ordering::Relaxed), 1);
        // Also when the generator is well again: the key is known to others.
        stuck.store(false, Ordering::Relaxed);
        assert!(is_unfit(sign(&key, b"third").await));
        assert_eq!(lanes.inspect(&key).await.unwrap().deviations, [REPEATED]);
        assert!(lanes.breaker.admit().is_ok(), "the device is not away");
        // Another key is another matter.
        let other = KeyRef::plan(KeySpec::EcP256).unwrap().pinned(pin);
        sign(&other, b"third").await.unwrap();
        lanes.close();
    }
}
