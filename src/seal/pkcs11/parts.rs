//! What a key consists of on the token, and what each object of it may do.
//!
//! Most keys are one object, or a pair. A KEK whose mechanism authenticates nothing (RSA-OAEP, AES-CBC)
//! has an HMAC key of its own beside it, under the same id. Pure tables; `objects` makes and finds by
//! them, `custody` checks by them.

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{AttributeType, KeyType, ObjectClass};

use crate::seal::key::{KeySpec, WrapMechanism};

/// One object of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The object that unwraps, signs or MACs.
    Main,
    /// The public half of a pair.
    Public,
    /// The HMAC key beside a KEK.
    Mac,
}

/// A kind of key together with the way a KEK of it wraps (`None` for other keys, and for a KEK that was
/// only planned).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Make {
    pub(super) spec: KeySpec,
    pub(super) wrap: Option<WrapMechanism>,
}

impl Make {
    fn is_rsa_kek(self) -> bool {
        self.wrap.is_some_and(WrapMechanism::is_rsa)
    }

    /// The objects, in the order in which they are made: the HMAC key first, so that what a crash leaves
    /// behind is never taken for a whole KEK of another mechanism.
    pub(super) fn parts(self) -> &'static [Part] {
        match (self.spec, self.wrap) {
            (KeySpec::Kek, Some(wrap)) if wrap.is_rsa() => &[Part::Mac, Part::Main, Part::Public],
            (KeySpec::Kek, Some(wrap)) if wrap.has_tag() => &[Part::Mac, Part::Main],
            (KeySpec::Kek | KeySpec::HmacSha256, _) => &[Part::Main],
            _ => &[Part::Main, Part::Public],
        }
    }

    /// The class and type of one of the objects.
    pub(super) fn kind(self, part: Part) -> (ObjectClass, KeyType) {
        let pair = match self.spec {
            KeySpec::EcP256 | KeySpec::EcP384 => KeyType::EC,
            KeySpec::Ed25519 => KeyType::EC_EDWARDS,
            _ => KeyType::RSA,
        };
        match (part, self.spec) {
            (Part::Public, _) => (ObjectClass::PUBLIC_KEY, pair),
            (Part::Mac, _) | (Part::Main, KeySpec::HmacSha256) => {
                (ObjectClass::SECRET_KEY, KeyType::GENERIC_SECRET)
            }
            (Part::Main, KeySpec::Kek) if !self.is_rsa_kek() => (ObjectClass::SECRET_KEY, KeyType::AES),
            (Part::Main, _) => (ObjectClass::PRIVATE_KEY, pair),
        }
    }

    /// How many of the objects are of that class.
    pub(super) fn count_of(self, class: ObjectClass) -> usize {
        self.parts().iter().filter(|part| self.kind(**part).0 == class).count()
    }

    /// The roles that are switched on; all others are off.
    pub(super) fn roles(self, part: Part) -> &'static [AttributeType] {
        const CRYPT: &[AttributeType] = &[AttributeType::Encrypt, AttributeType::Decrypt];
        match (part, self.spec) {
            (Part::Public, KeySpec::Kek) => &[AttributeType::Encrypt],
            (Part::Public, _) => &[AttributeType::Verify],
            (Part::Main, KeySpec::Kek) => match self.wrap {
                None => &[],
                Some(WrapMechanism::AesKwObject) => &[AttributeType::Wrap, AttributeType::Unwrap],
                Some(wrap) if wrap.is_rsa() => &[AttributeType::Decrypt],
                Some(_) => CRYPT,
            },
            (Part::Mac | Part::Main, _) => &[AttributeType::Sign],
        }
    }

    /// Mechanisms that the object may be used with.
    pub(super) fn allowed(self, part: Part) -> Vec<MechanismType> {
        match (part, self.spec) {
            (Part::Mac, _) | (_, KeySpec::HmacSha256) => vec![MechanismType::SHA256_HMAC],
            (_, KeySpec::Kek) => self.wrap.and_then(wrap_type).into_iter().collect(),
            (_, KeySpec::EcP256 | KeySpec::EcP384) => vec![MechanismType::ECDSA],
            (_, KeySpec::Ed25519) => vec![MechanismType::EDDSA],
            (_, KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096) => {
                vec![MechanismType::RSA_PKCS, MechanismType::RSA_PKCS_PSS]
            }
        }
    }

    /// The modulus length of the pair, if it is one of RSA.
    pub(super) fn modulus_bits(self) -> Option<u16> {
        if self.is_rsa_kek() { Some(WrapMechanism::RSA_BITS) } else { self.spec.modulus_bits() }
    }

    /// The kind by name, for people who list the token.
    pub(super) fn label(self, part: Part) -> &'static str {
        match (part, self.spec) {
            (Part::Mac, _) => "kek-hmac",
            (_, KeySpec::Kek) if self.is_rsa_kek() => "kek-rsa",
            _ => self.spec.name(),
        }
    }
}

/// The mechanism's number as `cryptoki` knows it; it does not know KWP, so such a key is not limited.
/// (A TPM's is of no token.)
fn wrap_type(wrap: WrapMechanism) -> Option<MechanismType> {
    Some(match wrap {
        WrapMechanism::AesGcm => MechanismType::AES_GCM,
        WrapMechanism::AesKw | WrapMechanism::AesKwObject => MechanismType::AES_KEY_WRAP,
        WrapMechanism::AesKwp | WrapMechanism::TpmSeal => return None,
        WrapMechanism::RsaOaep256 | WrapMechanism::RsaOaep1 => MechanismType::RSA_PKCS_OAEP,
        WrapMechanism::AesCbc => MechanismType::AES_CBC_PAD,
    })
}

#[cfg(test)]
mod tests {
    use cryptoki::object::ObjectClass;

    use super::{KeySpec, Make, Part, WrapMechanism};

    #[test]
    fn no_kek_has_roles_that_undo_each_other() {
        use cryptoki::object::AttributeType::{Decrypt, Encrypt, Unwrap, Wrap};
        for wrap in WrapMechanism::PREFERENCE {
            let roles = Make { spec: KeySpec::Kek, wrap: Some(wrap) }.roles(Part::Main);
            let only = |pair: [_; 2]| roles.iter().all(|role| pair.contains(role));
            assert!(!roles.is_empty() && (only([Encrypt, Decrypt]) || only([Wrap, Unwrap])), "{wrap:?}");
        }
    }

    #[test]
    fn what_is_made_first_of_a_kek_with_a_tag_is_no_kek_by_itself() {
        for wrap in WrapMechanism::PREFERENCE.into_iter().filter(|wrap| wrap.has_tag()) {
            let kek = Make { spec: KeySpec::Kek, wrap: Some(wrap) };
            assert_eq!(kek.parts()[0], Part::Mac);
            assert!(kek.count_of(ObjectClass::SECRET_KEY) + kek.count_of(ObjectClass::PRIVATE_KEY) == 2);
        }
    }
}
