//! No signature leaves before software has found it right.
//!
//! A lane hands over what the device has made; here it is verified with the public key by which the signing key is
//! pinned, on the side of whoever waits for it: the lane's thread is at the next call meanwhile. Public keys are read from the
//! device once for each key and kept parsed. What an HMAC key makes nobody can verify without the key.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::seal::SealError;
use crate::seal::backend::BackendError;
use crate::seal::key::{Alg, KeyId, KeyRef, Pin, Signature};
use crate::seal::verify::Verifier;
use crate::seal::worker::{Lanes, mismatch};

/// Keys whose public halves are kept. Beyond it all are read again.
const MOST: usize = 4096;

/// A signing key as the gate knows it.
pub(crate) struct Known {
    /// The same id with another pin is another key.
    pin: Arc<Pin>,
    verifier: Verifier,
}

/// The public halves of the keys that have signed.
#[derive(Default)]
pub(crate) struct Gate(RwLock<HashMap<KeyId, Arc<Known>>>);

impl Gate {
    /// What is known of a key that has signed before.
    pub(crate) fn known(&self, key: &KeyRef) -> Option<Arc<Known>> {
        let keys = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let known = keys.get(&key.id)?;
        (Arc::ptr_eq(&known.pin, &key.pin) || known.pin == key.pin).then(|| Arc::clone(known))
    }

    fn learn(&self, key: &KeyRef, verifier: Verifier) -> Arc<Known> {
        let known = Arc::new(Known { pin: Arc::clone(&key.pin), verifier });
        let mut keys = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if keys.len() >= MOST {
            keys.clear();
        }
        keys.insert(key.id, Arc::clone(&known));
        known
    }

    /// The key is gone.
    pub(crate) fn forget(&self, key: KeyId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&key);
    }
}

impl Known {
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
        match known.judge(alg, digest, &signature) {
            Ok(()) => Ok(signature),
            Err(error) => {
                // The probes sign with it, and judge as this did.
                self.breaker.suspect(key);
                Err(self.breaker.open(error.to_string()))
            }
        }
    }

    /// Reads the public half, which has to be the one that the key is pinned by.
    async fn learn(&self, key: &KeyRef) -> Result<Arc<Known>, SealError> {
        let public = self.public_key(key).await?;
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
