//! What repeated looks at keys have found.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::seal::KeyId;

/// Remembers the fault of each key, so that one that lasts is told once.
#[derive(Default)]
pub struct Faults(Mutex<HashMap<KeyId, &'static str>>);

impl Faults {
    /// Takes note of what a look at a key found wrong; whether the look before found something else.
    pub fn note(&self, key: KeyId, fault: &'static str) -> bool {
        self.known().insert(key, fault) != Some(fault)
    }

    /// Takes note that a look at a key found nothing wrong.
    pub fn clear(&self, key: KeyId) {
        self.known().remove(&key);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<KeyId, &'static str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Faults;
    use crate::seal::{KeyRef, KeySpec};

    #[test]
    fn a_fault_that_lasts_is_new_once_and_again_after_it_was_healed() {
        let [one, other] = [(); 2].map(|()| KeyRef::plan(KeySpec::Kek).unwrap().id());
        let faults = Faults::default();

        assert!(faults.note(one, "missing") && !faults.note(one, "missing"));
        assert!(faults.note(other, "missing"), "another key's fault");
        assert!(faults.note(one, "unfit"), "another fault");
        faults.clear(one);
        assert!(faults.note(one, "unfit") && !faults.note(other, "missing"));
    }
}
