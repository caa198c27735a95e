//! What a token says of a key's objects, against the rules (KL-1).
//!
//! An attribute that a rule is about and that the token does not tell counts as wrong. Three are evidence
//! and not protection: where the key was made, and whether it was ever readable. A fourth, that it cannot be
//! copied, is younger than some tokens. A token that cannot give one of these is refused too, unless the
//! configuration names the attribute; then what is missing stands in every report.

use cryptoki::mechanism::MechanismType;
use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;

use crate::seal::backend::BackendError;
use crate::seal::pkcs11::error::fail;
use crate::seal::pkcs11::parts::{Make, Part};

/// What an operator may go without, by `without_evidence`. Of `CKA_COPYABLE` only that it is not told: a copy is
/// as sensitive and as little extractable as its original, but a token that says true has not obeyed.
pub(super) const EVIDENCE: [&str; 4] =
    ["CKA_LOCAL", "CKA_ALWAYS_SENSITIVE", "CKA_NEVER_EXTRACTABLE", "CKA_COPYABLE"];

/// What no key from outside has: it was not made here, and whoever brought it has read it.
pub(super) const NEVER_IMPORTED: [&str; 3] = ["CKA_LOCAL", "CKA_ALWAYS_SENSITIVE", "CKA_NEVER_EXTRACTABLE"];

const ATTRIBUTES: [AttributeType; 17] = [
    AttributeType::KeyType,
    AttributeType::Token,
    AttributeType::Private,
    AttributeType::Sensitive,
    AttributeType::Extractable,
    AttributeType::AlwaysSensitive,
    AttributeType::NeverExtractable,
    AttributeType::Local,
    AttributeType::Modifiable,
    AttributeType::Copyable,
    AttributeType::Encrypt,
    AttributeType::Decrypt,
    AttributeType::Wrap,
    AttributeType::Unwrap,
    AttributeType::Sign,
    AttributeType::Derive,
    AttributeType::AllowedMechanisms,
];

/// What was found at one object.
pub(super) struct Found {
    /// Its attributes as text.
    pub(super) attributes: Vec<(&'static str, String)>,
    /// Every rule it breaks.
    pub(super) broken: Vec<String>,
    /// Rules that it breaks and that the configuration does without.
    pub(super) accepted: Vec<String>,
}

/// Reads the attributes of an object that holds a secret, and checks them.
pub(super) fn check(
    session: &Session,
    object: ObjectHandle,
    (make, part): (Make, Part),
    without: &[String],
) -> Result<Found, BackendError> {
    let read = || {
        let found = session.get_attributes(object, &ATTRIBUTES);
        found.map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))
    };
    let mut found = read()?;
    let mut deviating = deviations(&found, make, part);
    if !deviating.is_empty() {
        // `cryptoki` takes what was in its buffers for an answer where the call failed with one of three
        // codes, so what speaks against a key is read twice.
        found = read()?;
        deviating = deviations(&found, make, part);
    }
    let attributes = found.iter().filter_map(describe).collect();
    let is_accepted = |rule: &String| {
        without.iter().any(|name| {
            // Known to be missing, or not told: both are what the configuration does without.
            *rule == format!("{name} is false") || *rule == unread(name)
        })
    };
    let (accepted, broken) = deviating.into_iter().partition(is_accepted);
    Ok(Found { attributes, broken, accepted })
}

/// What each boolean attribute has to be; `None` for those that have no rule.
fn wanted(kind: AttributeType, on: &[AttributeType]) -> Option<bool> {
    match kind {
        AttributeType::Token
        | AttributeType::Private
        | AttributeType::Sensitive
        | AttributeType::AlwaysSensitive
        | AttributeType::NeverExtractable
        | AttributeType::Local => Some(true),
        AttributeType::Extractable | AttributeType::Modifiable | AttributeType::Copyable => Some(false),
        AttributeType::Encrypt
        | AttributeType::Decrypt
        | AttributeType::Wrap
        | AttributeType::Unwrap
        | AttributeType::Sign
        | AttributeType::Derive => Some(on.contains(&kind)),
        _ => None,
    }
}

/// Whether objects of that class have the attribute: a private key has no role that only its public half can
/// have (PKCS#11 2.40, section 4.9).
fn is_defined(kind: AttributeType, class: ObjectClass) -> bool {
    class != ObjectClass::PRIVATE_KEY || !matches!(kind, AttributeType::Encrypt | AttributeType::Wrap)
}

/// The rules, as a pure function of what the token says.
fn deviations(found: &[Attribute], make: Make, part: Part) -> Vec<String> {
    let (on, allowed, class) = (make.roles(part), make.allowed(part), make.kind(part).0);
    let mut broken = Vec::new();
    for attribute in found {
        if let (Some((name, value)), Some(wanted)) =
            (boolean(attribute), wanted(attribute.attribute_type(), on))
            && value != wanted
        {
            broken.push(format!("{name} is {value}"));
        }
        if let Attribute::AllowedMechanisms(list) = attribute
            && !list.is_empty()
            && !same(list, &allowed)
        {
            broken.push("CKA_ALLOWED_MECHANISMS has other mechanisms".to_owned());
        }
    }
    // A token that hides one of these leaves the key's custody unproven, as if it were wrong.
    for kind in ATTRIBUTES {
        let is_told = found.iter().any(|attribute| attribute.attribute_type() == kind);
        if wanted(kind, on).is_some() && !is_told && is_defined(kind, class) {
            broken.push(unread(&kind.to_string()));
        }
    }
    broken
}

fn unread(name: &str) -> String {
    format!("{name} cannot be read")
}

fn same(left: &[MechanismType], right: &[MechanismType]) -> bool {
    left.len() == right.len() && left.iter().all(|mechanism| right.contains(mechanism))
}

fn boolean(attribute: &Attribute) -> Option<(&'static str, bool)> {
    Some(match attribute {
        Attribute::Token(value) => ("CKA_TOKEN", *value),
        Attribute::Private(value) => ("CKA_PRIVATE", *value),
        Attribute::Sensitive(value) => ("CKA_SENSITIVE", *value),
        Attribute::Extractable(value) => ("CKA_EXTRACTABLE", *value),
        Attribute::AlwaysSensitive(value) => ("CKA_ALWAYS_SENSITIVE", *value),
        Attribute::NeverExtractable(value) => ("CKA_NEVER_EXTRACTABLE", *value),
        Attribute::Local(value) => ("CKA_LOCAL", *value),
        Attribute::Modifiable(value) => ("CKA_MODIFIABLE", *value),
        Attribute::Copyable(value) => ("CKA_COPYABLE", *value),
        Attribute::Encrypt(value) => ("CKA_ENCRYPT", *value),
        Attribute::Decrypt(value) => ("CKA_DECRYPT", *value),
        Attribute::Wrap(value) => ("CKA_WRAP", *value),
        Attribute::Unwrap(value) => ("CKA_UNWRAP", *value),
        Attribute::Sign(value) => ("CKA_SIGN", *value),
        Attribute::Derive(value) => ("CKA_DERIVE", *value),
        _ => return None,
    })
}

fn describe(attribute: &Attribute) -> Option<(&'static str, String)> {
    match attribute {
        Attribute::KeyType(kind) => Some(("CKA_KEY_TYPE", kind.to_string())),
        Attribute::AllowedMechanisms(list) => {
            let names: Vec<_> = list.iter().map(ToString::to_string).collect();
            Some(("CKA_ALLOWED_MECHANISMS", names.join(" ")))
        }
        other => boolean(other).map(|(name, value)| (name, value.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use cryptoki::object::Attribute;

    use super::{EVIDENCE, Make, Part, deviations, unread};
    use crate::seal::key::{KeySpec, WrapMechanism};

    const GCM: Make = Make { spec: KeySpec::Kek, wrap: Some(WrapMechanism::AesGcm) };

    /// All that a token may tell of a secret key, as it should be for a key with no role at all.
    fn told() -> Vec<Attribute> {
        vec![
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::AlwaysSensitive(true),
            Attribute::NeverExtractable(true),
            Attribute::Local(true),
            Attribute::Extractable(false),
            Attribute::Modifiable(false),
            Attribute::Copyable(false),
            Attribute::Encrypt(false),
            Attribute::Decrypt(false),
            Attribute::Wrap(false),
            Attribute::Unwrap(false),
            Attribute::Sign(false),
            Attribute::Derive(false),
        ]
    }

    /// What is told with these in the place of their like.
    fn with(changed: &[Attribute]) -> Vec<Attribute> {
        let mut all = told();
        for new in changed {
            let is_like = |old: &&mut Attribute| old.attribute_type() == new.attribute_type();
            match all.iter_mut().find(is_like) {
                Some(old) => *old = new.clone(),
                None => all.push(new.clone()),
            }
        }
        all
    }

    fn kek(extractable: bool, decrypt: bool, wrap: bool) -> Vec<Attribute> {
        with(&[
            Attribute::Extractable(extractable),
            Attribute::Encrypt(true),
            Attribute::Decrypt(decrypt),
            Attribute::Wrap(wrap),
        ])
    }

    #[test]
    fn a_kek_with_a_second_role_or_extractable_is_unfit() {
        let of = |found: &[Attribute]| deviations(found, GCM, Part::Main);
        assert!(of(&kek(false, true, false)).is_empty());
        assert_eq!(of(&kek(false, true, true)), ["CKA_WRAP is true"]);
        assert_eq!(of(&kek(true, true, false)), ["CKA_EXTRACTABLE is true"]);
        assert_eq!(of(&kek(false, false, false)), ["CKA_DECRYPT is false"]);
    }

    #[test]
    fn an_rsa_kek_that_may_also_sign_or_encrypt_is_unfit() {
        let rsa = Make { wrap: Some(WrapMechanism::RsaOaep256), ..GCM };
        let mut found = kek(false, true, false);
        assert_eq!(deviations(&found, rsa, Part::Main), ["CKA_ENCRYPT is true"]);
        found.retain(|attribute| !matches!(attribute, Attribute::Sign(_)));
        found.push(Attribute::Sign(true));
        assert_eq!(deviations(&found, rsa, Part::Main).len(), 2);
    }

    #[test]
    fn a_key_of_which_anything_is_not_told_is_unfit() {
        let mac = Make { spec: KeySpec::HmacSha256, wrap: None };
        assert_eq!(deviations(&[], mac, Part::Main).len(), told().len());
        for left_out in told() {
            let kind = left_out.attribute_type();
            let mut found = kek(false, true, false);
            found.retain(|attribute| attribute.attribute_type() != kind);
            assert_eq!(deviations(&found, GCM, Part::Main), [unread(&kind.to_string())]);
        }
        // Names as the configuration has them.
        assert!(EVIDENCE.iter().all(|name| deviations(&[], mac, Part::Main).contains(&unread(name))));
    }

    #[test]
    fn a_private_key_need_not_speak_of_roles_that_only_its_public_half_has() {
        let ec = Make { spec: KeySpec::EcP256, wrap: None };
        let mut found = with(&[Attribute::Sign(true)]);
        found.retain(|attribute| !matches!(attribute, Attribute::Encrypt(_) | Attribute::Wrap(_)));
        assert!(deviations(&found, ec, Part::Main).is_empty());
        found.push(Attribute::Wrap(true));
        assert_eq!(deviations(&found, ec, Part::Main), ["CKA_WRAP is true"]);
    }
}
