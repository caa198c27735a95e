//! Keys as objects on the token: how they are made, found, recognised and checked.
//!
//! Every attribute is stated at generation, because vendors' defaults differ, and read back before
//! use, because some tokens let the PIN's holder weaken a key later (F8). A key is found by class and
//! id; two answers are an error, never a choice.

use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use cryptoki::types::Ulong;
use cryptoki_sys::{CKR_FUNCTION_FAILED, CKR_GENERAL_ERROR};

use crate::seal::backend::BackendError;
use crate::seal::key::{KeyId, KeySpec, PublicKey, WrapMechanism};
use crate::seal::pkcs11::error::fail;

/// DER of the curves' object identifiers (SEC 2, RFC 5480).
const P256_OID: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const P384_OID: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];

/// The class in which a key of that kind is used.
pub(super) fn class_of(spec: KeySpec) -> ObjectClass {
    match spec {
        KeySpec::Kek | KeySpec::HmacSha256 => ObjectClass::SECRET_KEY,
        _ => ObjectClass::PRIVATE_KEY,
    }
}

/// All token objects of that class and id.
pub(super) fn find(
    session: &Session,
    class: ObjectClass,
    id: KeyId,
) -> Result<Vec<ObjectHandle>, BackendError> {
    let template = [Attribute::Class(class), Attribute::Token(true), Attribute::Id(id.as_bytes().to_vec())];
    session.find_objects(&template).map_err(|error| fail("C_FindObjects", &error).into())
}

/// The one object of that class and id; `None` if there is none.
pub(super) fn find_one(
    session: &Session,
    class: ObjectClass,
    id: KeyId,
) -> Result<Option<ObjectHandle>, BackendError> {
    match find(session, class, id)?.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(*one)),
        many => Err(BackendError::Unfit(format!("{} objects answer to its id", many.len()))),
    }
}

fn roles(on: &[AttributeType]) -> Vec<Attribute> {
    let is = |role| on.contains(&role);
    vec![
        Attribute::Encrypt(is(AttributeType::Encrypt)),
        Attribute::Decrypt(is(AttributeType::Decrypt)),
        Attribute::Wrap(is(AttributeType::Wrap)),
        Attribute::Unwrap(is(AttributeType::Unwrap)),
        Attribute::Sign(is(AttributeType::Sign)),
        Attribute::Verify(false),
        Attribute::Derive(false),
    ]
}

/// The one role pair of a KEK and the mechanism it is for.
fn kek_roles(mechanism: WrapMechanism) -> ([AttributeType; 2], MechanismType) {
    let crypt = [AttributeType::Encrypt, AttributeType::Decrypt];
    match mechanism {
        WrapMechanism::AesGcm => (crypt, MechanismType::AES_GCM),
        WrapMechanism::AesKw => (crypt, MechanismType::AES_KEY_WRAP),
        WrapMechanism::AesKwObject => {
            ([AttributeType::Wrap, AttributeType::Unwrap], MechanismType::AES_KEY_WRAP)
        }
        // `Session` refuses such a KEK before; with no role of its own it would be of no use.
        WrapMechanism::TpmSeal => (crypt, MechanismType::AES_GCM),
    }
}

/// Mechanisms that a key of that kind may be used with.
fn allowed(spec: KeySpec, wrap: Option<WrapMechanism>) -> Vec<MechanismType> {
    match spec {
        KeySpec::Kek => wrap.map(|mechanism| vec![kek_roles(mechanism).1]).unwrap_or_default(),
        KeySpec::EcP256 | KeySpec::EcP384 => vec![MechanismType::ECDSA],
        KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => {
            vec![MechanismType::RSA_PKCS, MechanismType::RSA_PKCS_PSS]
        }
        KeySpec::HmacSha256 => vec![MechanismType::SHA256_HMAC],
    }
}

/// What every key object that holds a secret has in common.
fn custody(spec: KeySpec, id: KeyId) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::Label(label(spec, id)),
    ]
}

/// For people who list the token; never used to find a key.
fn label(spec: KeySpec, id: KeyId) -> Vec<u8> {
    format!("lacre {} {}", spec.name(), &id.to_string()[..8]).into_bytes()
}

/// Generates the key. Tokens that refuse the two newer attributes get the template without them.
pub(super) fn generate(
    session: &Session,
    spec: KeySpec,
    id: KeyId,
    wrap: Option<WrapMechanism>,
) -> Result<(), BackendError> {
    let newer = [Attribute::Copyable(false), Attribute::AllowedMechanisms(allowed(spec, wrap))];
    // Twice in full: a passing fault must not cost the key its two attributes, without which a token that
    // knows them has made a key that is unfit.
    let mut failed = None;
    for template in [&newer[..], &newer, &[]] {
        match generate_with(session, spec, id, wrap, template) {
            Ok(()) => return Ok(()),
            Err(error @ BackendError::SessionLost { .. }) => return Err(error),
            Err(error) => {
                // Made, and only the answer says otherwise: a second object of its id would make it unusable
                // for good.
                if find_one(session, class_of(spec), id)?.is_some() {
                    return Ok(());
                }
                let may_be_the_template = blames_template(&error);
                let first = failed.get_or_insert(error);
                if !may_be_the_template {
                    return Err(first.clone());
                }
            }
        }
    }
    Err(failed.unwrap_or(BackendError::Missing))
}

/// Whether the refusal may be about an attribute: some modules answer one that they do not know with one of
/// the two codes that they use for everything (hsm.md 3.4).
fn blames_template(error: &BackendError) -> bool {
    matches!(
        error,
        BackendError::Refused { .. }
            | BackendError::Away { code: CKR_GENERAL_ERROR | CKR_FUNCTION_FAILED, .. }
    )
}

fn generate_with(
    session: &Session,
    spec: KeySpec,
    id: KeyId,
    wrap: Option<WrapMechanism>,
    newer: &[Attribute],
) -> Result<(), BackendError> {
    let mut secret = custody(spec, id);
    secret.extend_from_slice(newer);
    let secret_key = |session: &Session, mechanism: &Mechanism<'_>, key_type, template: Vec<Attribute>| {
        let mut template = template;
        template.extend([Attribute::KeyType(key_type), Attribute::ValueLen(Ulong::new(32))]);
        session.generate_key(mechanism, &template).map(|_| ()).map_err(|error| fail("C_GenerateKey", &error))
    };
    match spec {
        KeySpec::Kek => {
            let on = wrap.map(|mechanism| kek_roles(mechanism).0.to_vec()).unwrap_or_default();
            secret.extend(roles(&on));
            secret_key(session, &Mechanism::AesKeyGen, KeyType::AES, secret)?;
        }
        KeySpec::HmacSha256 => {
            secret.extend(roles(&[AttributeType::Sign]));
            secret_key(session, &Mechanism::GenericSecretKeyGen, KeyType::GENERIC_SECRET, secret)?;
        }
        _ => generate_pair(session, spec, id, secret)?,
    }
    Ok(())
}

fn generate_pair(
    session: &Session,
    spec: KeySpec,
    id: KeyId,
    mut private: Vec<Attribute>,
) -> Result<(), BackendError> {
    private.extend([
        Attribute::Sign(true),
        Attribute::Decrypt(false),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
    ]);
    let mut public = vec![
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Modifiable(false),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::Label(label(spec, id)),
        Attribute::Verify(true),
        Attribute::Encrypt(false),
        Attribute::Wrap(false),
    ];
    let mechanism = if let Some(bits) = spec.modulus_bits() {
        public.extend([
            Attribute::ModulusBits(Ulong::new(u64::from(bits))),
            Attribute::PublicExponent(vec![1, 0, 1]),
        ]);
        Mechanism::RsaPkcsKeyPairGen
    } else {
        let curve = if spec == KeySpec::EcP256 { P256_OID } else { P384_OID };
        public.push(Attribute::EcParams(curve.to_vec()));
        Mechanism::EccKeyPairGen
    };
    let made = session.generate_key_pair(&mechanism, &public, &private);
    made.map(|_| ()).map_err(|error| fail("C_GenerateKeyPair", &error).into())
}

/// Destroys every object of the key.
pub(super) fn destroy(session: &Session, spec: KeySpec, id: KeyId) -> Result<(), BackendError> {
    let mut classes = vec![class_of(spec)];
    if class_of(spec) == ObjectClass::PRIVATE_KEY {
        classes.push(ObjectClass::PUBLIC_KEY);
    }
    for class in classes {
        for object in find(session, class, id)? {
            session.destroy_object(object).map_err(|error| fail("C_DestroyObject", &error))?;
        }
    }
    Ok(())
}

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

/// The attributes as text, and every rule they break (KL-1).
#[expect(clippy::type_complexity, reason = "the two lists of a `KeyReport`, for its one maker")]
pub(super) fn check(
    session: &Session,
    object: ObjectHandle,
    spec: KeySpec,
    wrap: Option<WrapMechanism>,
) -> Result<(Vec<(&'static str, String)>, Vec<String>), BackendError> {
    let read = || {
        let found = session.get_attributes(object, &ATTRIBUTES);
        found.map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))
    };
    let mut found = read()?;
    let mut broken = deviations(&found, spec, wrap);
    if !broken.is_empty() {
        // `cryptoki` takes what was in its buffers for an answer where the call failed with one of three
        // codes, so what speaks against a key is read twice.
        found = read()?;
        broken = deviations(&found, spec, wrap);
    }
    Ok((found.iter().filter_map(describe).collect(), broken))
}

/// The rules, as a pure function of what the token says.
fn deviations(found: &[Attribute], spec: KeySpec, wrap: Option<WrapMechanism>) -> Vec<String> {
    let on: Vec<AttributeType> = match spec {
        KeySpec::Kek => wrap.map(|mechanism| kek_roles(mechanism).0.to_vec()).unwrap_or_default(),
        _ => vec![AttributeType::Sign],
    };
    let must = |kind| match kind {
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
    };
    let mut broken = Vec::new();
    for attribute in found {
        if let (Some((name, value)), Some(wanted)) = (boolean(attribute), must(attribute.attribute_type()))
            && value != wanted
        {
            broken.push(format!("{name} is {value}"));
        }
        if let Attribute::AllowedMechanisms(list) = attribute
            && !list.is_empty()
            && !same(list, &allowed(spec, wrap))
        {
            broken.push("CKA_ALLOWED_MECHANISMS has other mechanisms".to_owned());
        }
    }
    // A token that hides these two leaves the key's custody unproven.
    for (kind, name) in
        [(AttributeType::Sensitive, "CKA_SENSITIVE"), (AttributeType::Extractable, "CKA_EXTRACTABLE")]
    {
        if !found.iter().any(|attribute| attribute.attribute_type() == kind) {
            broken.push(format!("{name} cannot be read"));
        }
    }
    broken
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

/// Reads the public half of a pair from its public object; twice, as in [`check`], if it makes no sense.
pub(super) fn public_key(session: &Session, spec: KeySpec, id: KeyId) -> Result<PublicKey, BackendError> {
    match read_public_key(session, spec, id) {
        Err(BackendError::Unfit(_)) => read_public_key(session, spec, id),
        other => other,
    }
}

fn read_public_key(session: &Session, spec: KeySpec, id: KeyId) -> Result<PublicKey, BackendError> {
    let object = find_one(session, ObjectClass::PUBLIC_KEY, id)?.ok_or(BackendError::Missing)?;
    let wanted = [AttributeType::EcPoint, AttributeType::Modulus, AttributeType::PublicExponent];
    let found = session
        .get_attributes(object, &wanted)
        .map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))?;
    let bytes = |kind| {
        found.iter().find_map(|attribute| match attribute {
            Attribute::EcPoint(bytes) | Attribute::Modulus(bytes) | Attribute::PublicExponent(bytes)
                if attribute.attribute_type() == kind =>
            {
                Some(bytes.as_slice())
            }
            _ => None,
        })
    };
    let parsed = match spec.field_len() {
        Some(len) => bytes(AttributeType::EcPoint).and_then(|point| ec_point(spec, len, point)),
        None => rsa_numbers(spec, bytes(AttributeType::Modulus), bytes(AttributeType::PublicExponent)),
    };
    parsed.ok_or_else(|| BackendError::Unfit("its public key cannot be read".to_owned()))
}

/// An uncompressed point, inside a DER OCTET STRING as the standard says, or bare as some modules do.
fn ec_point(spec: KeySpec, len: usize, bytes: &[u8]) -> Option<PublicKey> {
    let bare = 1 + 2 * len;
    let point = match bytes {
        [0x04, inner, point @ ..] if point.len() == bare && usize::from(*inner) == bare => point,
        point if point.len() == bare => point,
        _ => return None,
    };
    let [0x04, xy @ ..] = point else { return None };
    let (x, y) = xy.split_at(len);
    Some(PublicKey::Ec { spec, x: x.to_vec(), y: y.to_vec() })
}

fn rsa_numbers(spec: KeySpec, modulus: Option<&[u8]>, exponent: Option<&[u8]>) -> Option<PublicKey> {
    let trim = |bytes: &[u8]| bytes.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
    let (n, e) = (trim(modulus?), trim(exponent?));
    let right_size = n.len() * 8 == usize::from(spec.modulus_bits()?) && n.first()? & 0x80 != 0;
    right_size.then_some(PublicKey::Rsa { n, e })
}

#[cfg(test)]
mod tests {
    use cryptoki::object::Attribute;

    use super::{KeySpec, WrapMechanism, deviations, ec_point};

    fn kek(extractable: bool, decrypt: bool, wrap: bool) -> Vec<Attribute> {
        vec![
            Attribute::Sensitive(true),
            Attribute::Extractable(extractable),
            Attribute::Encrypt(true),
            Attribute::Decrypt(decrypt),
            Attribute::Wrap(wrap),
            Attribute::Unwrap(false),
        ]
    }

    #[test]
    fn a_kek_with_a_second_role_or_extractable_is_unfit() {
        let gcm = Some(WrapMechanism::AesGcm);
        assert!(deviations(&kek(false, true, false), KeySpec::Kek, gcm).is_empty());
        assert_eq!(deviations(&kek(false, true, true), KeySpec::Kek, gcm), ["CKA_WRAP is true"]);
        assert_eq!(deviations(&kek(true, true, false), KeySpec::Kek, gcm), ["CKA_EXTRACTABLE is true"]);
        assert_eq!(deviations(&kek(false, false, false), KeySpec::Kek, gcm), ["CKA_DECRYPT is false"]);
    }

    #[test]
    fn a_key_whose_custody_cannot_be_read_is_unfit() {
        assert_eq!(deviations(&[], KeySpec::HmacSha256, None).len(), 2);
    }

    #[test]
    fn points_are_read_with_and_without_the_der_wrapper() {
        let mut bare = vec![4];
        bare.extend([7; 64]);
        let mut wrapped = vec![4, 65];
        wrapped.extend(&bare);
        assert!(ec_point(KeySpec::EcP256, 32, &bare).is_some());
        assert_eq!(ec_point(KeySpec::EcP256, 32, &wrapped), ec_point(KeySpec::EcP256, 32, &bare));
        assert!(ec_point(KeySpec::EcP256, 32, &bare[..64]).is_none());
    }
}
