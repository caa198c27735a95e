//! Keys as objects on the token: how they are made, found and destroyed.
//!
//! Every attribute is stated at generation, because vendors' defaults differ, and read back before
//! use (`custody`), because some tokens let the PIN's holder weaken a key later (F8). A key is found by
//! class and id; two answers are an error, never a choice.

use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;
use cryptoki::types::Ulong;
use cryptoki_sys::{CK_OBJECT_HANDLE, CKR_FUNCTION_FAILED, CKR_GENERAL_ERROR, CKR_MECHANISM_INVALID};

use crate::seal::backend::BackendError;
use crate::seal::key::{KeyId, KeyRef, KeySpec, PublicKey};
use crate::seal::pkcs11::error::fail;
use crate::seal::pkcs11::parts::{Make, Part};
use crate::seal::rsa_check::check_rsa;

/// DER of the curves' object identifiers (SEC 2, RFC 5480).
pub(super) const P256_OID: &[u8] = &[0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
pub(super) const P384_OID: &[u8] = &[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];

/// Of Ed25519 (RFC 8410, section 3).
pub(super) const ED25519_OID: &[u8] = &[0x06, 0x03, 0x2b, 0x65, 0x70];
/// The curve by its name, as PKCS#11 3.0 has it and some modules alone take (section 2.3.10).
const ED25519_NAME: &[u8] = b"\x13\x0cedwards25519";

/// Begin of the label of every object that is made here.
const LABEL: &str = "lacre ";

/// The objects that are used of one key. All the same but for KEKs whose mechanism needs more.
#[derive(Clone, Copy)]
pub(super) struct Handles {
    pub(super) main: CK_OBJECT_HANDLE,
    /// Encrypts: the public half of an RSA KEK, else `main`.
    pub(super) public: CK_OBJECT_HANDLE,
    /// Makes tags; `main` where none are made.
    pub(super) mac: CK_OBJECT_HANDLE,
}

/// The objects themselves, as they were found.
#[derive(Clone, Copy)]
pub(super) struct Objects {
    pub(super) main: ObjectHandle,
    /// Of an RSA KEK; a signing key's public half is read when it is asked for.
    pub(super) public: Option<ObjectHandle>,
    pub(super) mac: Option<ObjectHandle>,
}

impl Objects {
    pub(super) fn handles(self) -> Handles {
        let main = self.main.handle();
        let or_main = |part: Option<ObjectHandle>| part.map_or(main, |object| object.handle());
        Handles { main, public: or_main(self.public), mac: or_main(self.mac) }
    }
}

/// All token objects of that class and id.
fn find(session: &Session, class: ObjectClass, id: KeyId) -> Result<Vec<ObjectHandle>, BackendError> {
    let template = [Attribute::Class(class), Attribute::Token(true), Attribute::Id(id.as_bytes().to_vec())];
    session.find_objects(&template).map_err(|error| fail("C_FindObjects", &error).into())
}

fn key_type(session: &Session, object: ObjectHandle) -> Result<Option<KeyType>, BackendError> {
    let found = session
        .get_attributes(object, &[AttributeType::KeyType])
        .map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))?;
    Ok(found.into_iter().find_map(|attribute| match attribute {
        Attribute::KeyType(kind) => Some(kind),
        _ => None,
    }))
}

/// The object that is one part of the key; `None` if there is none. More objects of its class and id
/// than the key has parts are an error.
pub(super) fn find_part(
    session: &Session,
    make: Make,
    part: Part,
    id: KeyId,
) -> Result<Option<ObjectHandle>, BackendError> {
    let (class, kind) = make.kind(part);
    let (found, expected) = (find(session, class, id)?, make.count_of(class));
    if found.len() > expected {
        return Err(ambiguous(found.len()));
    }
    if expected == 1 {
        return Ok(found.first().copied());
    }
    // Two secret keys under one id, told apart by their type.
    let mut matching = Vec::new();
    for object in found {
        if key_type(session, object)? == Some(kind) {
            matching.push(object);
        }
    }
    match matching.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(*one)),
        many => Err(ambiguous(many.len())),
    }
}

fn ambiguous(count: usize) -> BackendError {
    BackendError::Unfit(format!("{count} objects answer to its id"))
}

/// The objects that a key is used by; `None` if its main object is not there.
pub(super) fn find_key(session: &Session, make: Make, id: KeyId) -> Result<Option<Objects>, BackendError> {
    let Some(main) = find_part(session, make, Part::Main, id)? else { return Ok(None) };
    let mut objects = Objects { main, public: None, mac: None };
    if make.spec == KeySpec::Kek {
        for part in make.parts().iter().filter(|part| **part != Part::Main) {
            let (place, name) = match part {
                Part::Public => (&mut objects.public, "public half"),
                _ => (&mut objects.mac, "HMAC key"),
            };
            *place = find_part(session, make, *part, id)?;
            if place.is_none() {
                return Err(BackendError::Unfit(format!("its {name} is missing")));
            }
        }
    }
    Ok(Some(objects))
}

/// What is on the token under the id of a planned key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Present {
    /// Nothing.
    Nothing,
    /// Some objects of such a key and no whole one: a crash in the middle. They were never used.
    Remnant,
    /// A whole key, and which of the candidates it is.
    Whole(Make),
}

/// Looks for the key in every shape that it may have been made in; twice, as a key's custody is, if what is
/// there makes no sense.
pub(super) fn present(session: &Session, candidates: &[Make], id: KeyId) -> Result<Present, BackendError> {
    match compare(&list(session, id)?, candidates) {
        Err(BackendError::Unfit(_)) => compare(&list(session, id)?, candidates),
        other => other,
    }
}

/// What every key object of that id is.
fn list(session: &Session, id: KeyId) -> Result<Vec<(ObjectClass, Option<KeyType>)>, BackendError> {
    let mut listed = Vec::new();
    for class in [ObjectClass::SECRET_KEY, ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY] {
        for object in find(session, class, id)? {
            listed.push((class, key_type(session, object)?));
        }
    }
    Ok(listed)
}

fn compare(listed: &[(ObjectClass, Option<KeyType>)], candidates: &[Make]) -> Result<Present, BackendError> {
    if listed.is_empty() {
        return Ok(Present::Nothing);
    }
    let has_all = |make: &&Make| {
        make.parts().iter().all(|part| {
            let (class, kind) = make.kind(*part);
            listed.contains(&(class, Some(kind)))
        })
    };
    let fits = |make: &&Make| make.parts().len() == listed.len();
    if let Some(make) = candidates.iter().find(|make| has_all(make) && fits(make)) {
        return Ok(Present::Whole(*make));
    }
    let is_twice = |entry| listed.iter().filter(|other| *other == entry).count() > 1;
    let is_foreign = |&(class, kind): &(ObjectClass, Option<KeyType>)| {
        let mut parts = candidates.iter().flat_map(|make| make.parts().iter().map(|part| make.kind(*part)));
        !parts.any(|(a_class, a_kind)| class == a_class && kind == Some(a_kind))
    };
    // More than a whole key, one object twice, or one that no such key has: somebody else's doing, and not to
    // be destroyed unseen.
    if candidates.iter().any(|make| has_all(&make)) || listed.iter().any(|it| is_twice(it) || is_foreign(it))
    {
        return Err(ambiguous(listed.len()));
    }
    Ok(Present::Remnant)
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

/// What every key object that holds a secret has in common.
fn custody(make: Make, part: Part, id: KeyId) -> Vec<Attribute> {
    vec![
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Modifiable(false),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::Label(label(make, part, id)),
    ]
}

/// For people who list the token, and for [`all`]; a key is never found by it.
pub(super) fn label(make: Make, part: Part, id: KeyId) -> Vec<u8> {
    format!("{LABEL}{} {}", make.label(part), &id.to_string()[..8]).into_bytes()
}

/// Generates the key, object by object. Tokens that refuse the two newer attributes get the template
/// without them.
pub(super) fn generate(session: &Session, make: Make, id: KeyId) -> Result<(), BackendError> {
    // A pair is made by one call.
    for part in make.parts().iter().filter(|part| **part != Part::Public) {
        generate_part(session, make, *part, id).map_err(|error| unsupported(make.spec, error))?;
    }
    Ok(())
}

fn generate_part(session: &Session, make: Make, part: Part, id: KeyId) -> Result<(), BackendError> {
    let allowed = make.allowed(part);
    let mut newer = vec![Attribute::Copyable(false)];
    if !allowed.is_empty() {
        newer.push(Attribute::AllowedMechanisms(allowed));
    }
    // Twice in full: a passing fault must not cost the key its two attributes, without which a token that
    // knows them has made a key that is unfit.
    let mut failed = None;
    for template in [&newer[..], &newer, &[]] {
        match generate_with(session, make, part, id, template) {
            Ok(()) => return Ok(()),
            Err(error @ BackendError::SessionLost { .. }) => return Err(error),
            Err(error) => {
                // Made, and only the answer says otherwise: a second object of its id would make it unusable
                // for good.
                if find_part(session, make, part, id)?.is_some() {
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
pub(super) fn blames_template(error: &BackendError) -> bool {
    matches!(
        error,
        BackendError::Refused { .. }
            | BackendError::Away { code: CKR_GENERAL_ERROR | CKR_FUNCTION_FAILED, .. }
    )
}

/// A device without the mechanism is well, and says no more than that: name the kind of key.
fn unsupported(spec: KeySpec, error: BackendError) -> BackendError {
    match error {
        BackendError::Refused { code: CKR_MECHANISM_INVALID, .. } => {
            BackendError::Refused { function: spec.making(), code: CKR_MECHANISM_INVALID }
        }
        other => other,
    }
}

fn generate_with(
    session: &Session,
    make: Make,
    part: Part,
    id: KeyId,
    newer: &[Attribute],
) -> Result<(), BackendError> {
    let mut secret = custody(make, part, id);
    secret.extend_from_slice(newer);
    let (class, key_type) = make.kind(part);
    if class == ObjectClass::PRIVATE_KEY {
        return generate_pair(session, make, id, secret);
    }
    secret.extend(roles(make.roles(part)));
    secret.extend([Attribute::KeyType(key_type), Attribute::ValueLen(Ulong::new(32))]);
    let mechanism =
        if key_type == KeyType::AES { Mechanism::AesKeyGen } else { Mechanism::GenericSecretKeyGen };
    let made = session.generate_key(&mechanism, &secret);
    made.map(|_| ()).map_err(|error| fail("C_GenerateKey", &error).into())
}

fn generate_pair(
    session: &Session,
    make: Make,
    id: KeyId,
    mut private: Vec<Attribute>,
) -> Result<(), BackendError> {
    let (own, other) = (make.roles(Part::Main), make.roles(Part::Public));
    private.extend([
        Attribute::Sign(own.contains(&AttributeType::Sign)),
        Attribute::Decrypt(own.contains(&AttributeType::Decrypt)),
        Attribute::Unwrap(false),
        Attribute::Derive(false),
    ]);
    let mut public = vec![
        Attribute::Token(true),
        Attribute::Private(false),
        Attribute::Modifiable(false),
        Attribute::Id(id.as_bytes().to_vec()),
        Attribute::Label(label(make, Part::Public, id)),
        Attribute::Verify(other.contains(&AttributeType::Verify)),
        Attribute::Encrypt(other.contains(&AttributeType::Encrypt)),
        Attribute::Wrap(false),
    ];
    let mechanism = if let Some(bits) = make.modulus_bits() {
        public.extend([
            Attribute::ModulusBits(Ulong::new(u64::from(bits))),
            Attribute::PublicExponent(vec![1, 0, 1]),
        ]);
        Mechanism::RsaPkcsKeyPairGen
    } else {
        public.push(Attribute::EcParams(curve(make.spec).to_vec()));
        if make.spec == KeySpec::Ed25519 { Mechanism::EccEdwardsKeyPairGen } else { Mechanism::EccKeyPairGen }
    };
    let mut made = session.generate_key_pair(&mechanism, &public, &private);
    if made.is_err() && make.spec == KeySpec::Ed25519 && find_part(session, make, Part::Main, id)?.is_none() {
        public.pop();
        public.push(Attribute::EcParams(ED25519_NAME.to_vec()));
        made = session.generate_key_pair(&mechanism, &public, &private);
    }
    made.map(|_| ()).map_err(|error| fail("C_GenerateKeyPair", &error).into())
}

/// `CKA_EC_PARAMS` of a curve.
pub(super) const fn curve(spec: KeySpec) -> &'static [u8] {
    match spec {
        KeySpec::EcP384 => P384_OID,
        KeySpec::Ed25519 => ED25519_OID,
        _ => P256_OID,
    }
}

/// Every key whose objects bear the label that objects get here, with what the label says of its kind.
pub(super) fn all(session: &Session) -> Result<Vec<KeyRef>, BackendError> {
    let mut found: Vec<KeyRef> = Vec::new();
    for class in [ObjectClass::PRIVATE_KEY, ObjectClass::SECRET_KEY, ObjectClass::PUBLIC_KEY] {
        let objects = session.find_objects(&[Attribute::Class(class), Attribute::Token(true)]);
        for object in objects.map_err(|error| BackendError::from(fail("C_FindObjects", &error)))? {
            let told = session.get_attributes(object, &[AttributeType::Id, AttributeType::Label]);
            let told = told.map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))?;
            if let Some(key) = labelled(&told)
                && !found.iter().any(|other| other.id() == key.id())
            {
                found.push(key);
            }
        }
    }
    Ok(found)
}

/// The key of an object with that id and label; `None` for what was not made here.
fn labelled(told: &[Attribute]) -> Option<KeyRef> {
    let id = told.iter().find_map(|attribute| match attribute {
        Attribute::Id(id) => KeyId::from_bytes(id),
        _ => None,
    })?;
    let label = told.iter().find_map(|attribute| match attribute {
        Attribute::Label(label) => std::str::from_utf8(label).ok(),
        _ => None,
    })?;
    let (kind, mark) = label.strip_prefix(LABEL)?.split_once(' ')?;
    if mark != &id.to_string()[..8] {
        return None;
    }
    let spec = if kind.starts_with("kek-") { KeySpec::Kek } else { KeySpec::from_name(kind)? };
    Some(KeyRef::found(id, spec))
}

/// Destroys every object of the key; of a KEK in whichever way it may have been made.
pub(super) fn destroy(session: &Session, spec: KeySpec, id: KeyId) -> Result<(), BackendError> {
    let classes: &[ObjectClass] = match spec {
        KeySpec::Kek => &[ObjectClass::PRIVATE_KEY, ObjectClass::SECRET_KEY, ObjectClass::PUBLIC_KEY],
        KeySpec::HmacSha256 => &[ObjectClass::SECRET_KEY],
        _ => &[ObjectClass::PRIVATE_KEY, ObjectClass::PUBLIC_KEY],
    };
    for class in classes {
        for object in find(session, *class, id)? {
            session.destroy_object(object).map_err(|error| fail("C_DestroyObject", &error))?;
        }
    }
    Ok(())
}

/// Reads the public half of a pair from its public object; twice, as a key's custody is, if it makes no
/// sense.
pub(super) fn public_key(session: &Session, spec: KeySpec, id: KeyId) -> Result<PublicKey, BackendError> {
    match read_public_key(session, spec, id) {
        Err(BackendError::Unfit(_)) => read_public_key(session, spec, id),
        other => other,
    }
}

fn read_public_key(session: &Session, spec: KeySpec, id: KeyId) -> Result<PublicKey, BackendError> {
    let make = Make { spec, wrap: None };
    let object = find_part(session, make, Part::Public, id)?.ok_or(BackendError::Missing)?;
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
        None if spec == KeySpec::Ed25519 => bytes(AttributeType::EcPoint).and_then(ed_point),
        None => rsa_numbers(spec, bytes(AttributeType::Modulus), bytes(AttributeType::PublicExponent)),
    };
    parsed.ok_or_else(|| BackendError::Unfit("its public key cannot be read".to_owned()))
}

/// Looks at the modulus of an RSA key that was made just now, or found under the id of a planned one (KL-9).
pub(super) fn check_modulus(session: &Session, make: Make, id: KeyId) -> Result<(), BackendError> {
    if make.modulus_bits().is_none() {
        return Ok(());
    }
    let object = find_part(session, make, Part::Public, id)?.ok_or(BackendError::Missing)?;
    let found = session
        .get_attributes(object, &[AttributeType::Modulus, AttributeType::PublicExponent])
        .map_err(|error| BackendError::from(fail("C_GetAttributeValue", &error)))?;
    let (mut n, mut e) = (Vec::new(), Vec::new());
    for attribute in found {
        match attribute {
            Attribute::Modulus(bytes) => n = trimmed(&bytes),
            Attribute::PublicExponent(bytes) => e = trimmed(&bytes),
            _ => {}
        }
    }
    check_rsa(&n, &e).map_err(|weak| BackendError::Unfit(weak.to_string()))
}

fn trimmed(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().copied().skip_while(|byte| *byte == 0).collect()
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

/// The 32 octets of RFC 8032, bare as PKCS#11 3.0 has them, or inside a DER OCTET STRING or BIT STRING.
fn ed_point(bytes: &[u8]) -> Option<PublicKey> {
    let x = match bytes.len() {
        32 => bytes,
        34 => bytes.strip_prefix(&[0x04, 32])?,
        35 => bytes.strip_prefix(&[0x03, 33, 0])?,
        _ => return None,
    };
    Some(PublicKey::Ed { x: x.to_vec() })
}

fn rsa_numbers(spec: KeySpec, modulus: Option<&[u8]>, exponent: Option<&[u8]>) -> Option<PublicKey> {
    let (n, e) = (trimmed(modulus?), trimmed(exponent?));
    let right_size = n.len() * 8 == usize::from(spec.modulus_bits()?) && n.first()? & 0x80 != 0;
    right_size.then_some(PublicKey::Rsa { n, e })
}

#[cfg(test)]
mod tests {
    use cryptoki::object::Attribute;

    use super::{
        BackendError, KeySpec, KeyType, Make, ObjectClass, Part, Present, compare, ec_point, ed_point, label,
        labelled,
    };
    use crate::seal::key::{KeyRef, WrapMechanism};

    fn objects(make: Make, parts: &[Part]) -> Vec<(ObjectClass, Option<KeyType>)> {
        let kind = |part: &Part| make.kind(*part);
        parts.iter().map(kind).map(|(class, kind)| (class, Some(kind))).collect()
    }

    #[test]
    fn a_key_is_whole_a_remnant_or_ambiguous_by_its_objects() {
        let keks: Vec<_> = WrapMechanism::PREFERENCE
            .into_iter()
            .map(|wrap| Make { spec: KeySpec::Kek, wrap: Some(wrap) })
            .collect();
        for make in keks.iter().copied() {
            let whole = objects(make, make.parts());
            let Ok(Present::Whole(found)) = compare(&whole, &keks) else { panic!("{make:?}") };
            assert_eq!(found.parts(), make.parts());
            // Cut short anywhere while it was made, it is nothing that could be used.
            for made in 1..make.parts().len() {
                assert_eq!(compare(&whole[..made], &keks), Ok(Present::Remnant), "{make:?}");
            }
            let twice = [whole.as_slice(), &whole[..1]].concat();
            assert!(matches!(compare(&twice, &keks), Err(BackendError::Unfit(_))), "{make:?}");
        }
        let pair = [Make { spec: KeySpec::EcP256, wrap: None }];
        assert_eq!(compare(&objects(pair[0], &[Part::Public]), &pair), Ok(Present::Remnant));
        assert_eq!(compare(&[], &pair), Ok(Present::Nothing));
        // A key of another kind under the id of a planned one is nobody's remnant.
        let rsa = [Make { spec: KeySpec::Rsa2048, wrap: None }];
        for part in [Part::Public, Part::Main] {
            let found = compare(&objects(rsa[0], &[part]), &pair);
            assert!(matches!(found, Err(BackendError::Unfit(_))), "{part:?}");
        }
        assert!(matches!(compare(&[(ObjectClass::PUBLIC_KEY, None)], &pair), Err(BackendError::Unfit(_))));
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

        let ed = [7; 32];
        for wrapped in [[&[4, 32][..], &ed].concat(), [&[3, 33, 0][..], &ed].concat()] {
            assert_eq!(ed_point(&wrapped), ed_point(&ed));
            assert!(ed_point(&wrapped[..33]).is_none());
        }
        assert!(ed_point(&ed).is_some() && ed_point(&ed[1..]).is_none());
    }

    #[test]
    fn an_object_is_ours_by_its_label_and_id_together() {
        let specs = [KeySpec::EcP256, KeySpec::Rsa3072, KeySpec::HmacSha256, KeySpec::Ed25519];
        let keks = WrapMechanism::PREFERENCE.map(|wrap| Make { spec: KeySpec::Kek, wrap: Some(wrap) });
        for make in specs.map(|spec| Make { spec, wrap: None }).into_iter().chain(keks) {
            let [id, other] = [(); 2].map(|()| KeyRef::plan(make.spec).unwrap().id());
            for part in make.parts() {
                let told = |id: &[u8], label: Vec<u8>| [Attribute::Id(id.to_vec()), Attribute::Label(label)];
                let found = labelled(&told(id.as_bytes(), label(make, *part, id))).unwrap();
                assert!(found.id() == id && found.spec() == make.spec && !found.is_pinned());
                assert!(labelled(&told(other.as_bytes(), label(make, *part, id))).is_none());
                assert!(labelled(&told(&id.as_bytes()[1..], label(make, *part, id))).is_none());
            }
        }
        assert!(labelled(&[Attribute::Label(b"lacre ec-p256 00".to_vec())]).is_none());
    }
}
