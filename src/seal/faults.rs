//! What repeated looks at keys have found.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::seal::KeyId;

/// Remembers the fault of each key, so that one that lasts is told once.
#[derive(Default)]
pub struct Faults(Mutex<HashMap<KeyId, &'static str>>);

impl Faults {
    /// Takes note of a look at a key that has this fault, or none. Whether that is a fault that the look
    /// before did not find.
    pub fn is_new(&self, key: KeyId, fault: Option<&'static str>) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match fault {
            None => {
                known.remove(&key);
                false
            }
            Some(fault) => known.insert(key, fault) != Some(fault),
        }
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
        let looks = [
            (one, Some("missing"), true),
            (one, Some("missing"), false),
            (other, Some("missing"), true),
            (one, Some("unfit"), true),
            (one, None, false),
            (one, Some("unfit"), true),
        ];
        for (key, fault, is_new) in looks {
            assert_eq!(faults.is_new(key, fault), is_new, "{fault:?}");
        }
    }
}
