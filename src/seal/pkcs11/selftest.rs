//! The self-test of a key (KL-10): does the device still do with it what it must?
//!
//! Finding a KEK has opened its canary, a known answer. Here it wraps and opens again, and the device's
//! IVs are looked at; a signing key signs and software verifies; a MAC is made twice. The test belongs to
//! the first use of a key after the library was initialised, and to each inspection of a signing or MAC key:
//! never to an operation. A failure says that the device is ill, not that the key is unfit, so
//! nothing is concluded about the key, the device counts as away, and recovery tries with this key.

use crate::seal::backend::BackendError;
use crate::seal::envelope::{DEK_LEN, DEK_SLOT_LEN};
use crate::seal::key::{Alg, KeyRef, KeySpec, Pin, WrappedDek};
use crate::seal::pkcs11::objects::{self, Handles};
use crate::seal::pkcs11::session::{Session, canary_value};
use crate::seal::pkcs11::wrap::NO_DEVICE_IV;
use crate::seal::verify;

const MESSAGE: &[u8] = b"lacre/self-test/v1";

impl Session {
    /// Tests a key that has proved to be the pinned one.
    pub(super) fn self_test(&self, key: &KeyRef, keys: Handles) -> Result<(), BackendError> {
        match (key.spec, &*key.pin) {
            (KeySpec::Kek, Pin::Canary(canary)) => self.test_wrap(key, keys, canary),
            (KeySpec::Kek, _) => Ok(()),
            (KeySpec::HmacSha256, _) => self.test_mac(keys),
            _ => self.test_pair(key, keys),
        }
    }

    /// Two wraps of a known value: they open, and their IVs are neither the canary's nor each other's.
    fn test_wrap(&self, key: &KeyRef, keys: Handles, canary: &WrappedDek) -> Result<(), BackendError> {
        generator_is_well()?;
        let mut value = self.token().buffer(DEK_LEN)?;
        value.with_mut(|value| value.copy_from_slice(&canary_value(key.id)));
        let wrapper = self.wrapper(keys);
        let mut ivs = vec![canary.iv.clone()];
        for _ in 0..2 {
            let wrapped = match wrapper.wrap(canary.mechanism, &value, MESSAGE) {
                Err(BackendError::Refused { function: NO_DEVICE_IV, .. }) => {
                    return Err(BackendError::SelfTest("it makes no IVs"));
                }
                other => other?,
            };
            let mut out = self.token().buffer(DEK_SLOT_LEN)?;
            match wrapper.unwrap(&wrapped, MESSAGE, &mut out) {
                Ok(()) if out.with(|out| value.with(|value| out == value)) => {}
                Ok(()) | Err(BackendError::Rejected { .. }) => {
                    return Err(BackendError::SelfTest("what it wraps with a KEK does not open"));
                }
                Err(other) => return Err(other),
            }
            if !wrapped.iv.is_empty() && !is_fresh(&wrapped.iv, &ivs) {
                return Err(BackendError::SelfTest("the IVs that are used with a KEK repeat or are zero"));
            }
            ivs.push(wrapped.iv);
        }
        Ok(())
    }

    fn test_mac(&self, keys: Handles) -> Result<(), BackendError> {
        if self.mac_with(keys, MESSAGE)? == self.mac_with(keys, MESSAGE)? {
            Ok(())
        } else {
            Err(BackendError::SelfTest("a MAC made twice is another one"))
        }
    }

    /// FIPS 140-3's pairwise consistency: what the private half signs, the public half verifies.
    fn test_pair(&self, key: &KeyRef, keys: Handles) -> Result<(), BackendError> {
        let public = objects::public_key(self.raw_session(), key.spec, key.id)?;
        let Some(alg) = Alg::for_spec(key.spec) else { return Ok(()) };
        let digest = alg.digest(MESSAGE);
        let signature = match self.sign_with(key, keys, alg, &digest) {
            Err(BackendError::Refused { code: 0, .. }) => {
                return Err(BackendError::SelfTest("a signature has a wrong length"));
            }
            other => other?,
        };
        if verify::verifies(&public, alg, &digest, signature.as_bytes()) {
            Ok(())
        } else {
            Err(BackendError::SelfTest("a signature does not verify with its public key"))
        }
    }
}

/// Looks at what the operating system's generator gives: where the host makes IVs and DEKs, all rests on it.
fn generator_is_well() -> Result<(), BackendError> {
    let mut drawn = [[0; 32]; 2];
    for place in &mut drawn {
        getrandom::fill(place)
            .map_err(|_| BackendError::SelfTest("the operating system gives no randomness"))?;
    }
    if is_fresh(&drawn[0], &drawn[..0]) && is_fresh(&drawn[1], &drawn[..1]) {
        Ok(())
    } else {
        Err(BackendError::SelfTest("the operating system's randomness repeats or is zero"))
    }
}

/// Neither all zero nor one of those before.
fn is_fresh<T: AsRef<[u8]>>(drawn: &[u8], before: &[T]) -> bool {
    drawn.iter().any(|byte| *byte != 0) && before.iter().all(|other| other.as_ref() != drawn)
}

#[cfg(test)]
mod tests {
    use super::is_fresh;

    #[test]
    fn zeros_and_repetitions_are_not_fresh() {
        assert!(is_fresh(&[0, 1], &[[1, 0]]) && is_fresh::<[u8; 2]>(&[0, 1], &[]));
        assert!(!is_fresh::<[u8; 2]>(&[0, 0], &[]));
        assert!(!is_fresh(&[1, 2], &[[0, 1], [1, 2]]));
    }
}
