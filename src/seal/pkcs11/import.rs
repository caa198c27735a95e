//! Keys from outside: as objects that the token makes of given values.
//!
//! The attributes are those of a generated key, stated one by one. Private numbers go from the guarded buffer that they
//! came in straight to the module. Afterwards the key has to be the one that was given, and to do what it must, before it
//! is called imported; what fails that is destroyed.

use cryptoki_sys::{
    CK_ULONG, CKA_ALLOWED_MECHANISMS, CKA_CLASS, CKA_COEFFICIENT, CKA_COPYABLE, CKA_DECRYPT, CKA_DERIVE,
    CKA_EC_PARAMS, CKA_EC_POINT, CKA_ENCRYPT, CKA_EXPONENT_1, CKA_EXPONENT_2, CKA_EXTRACTABLE, CKA_ID,
    CKA_KEY_TYPE, CKA_LABEL, CKA_MODIFIABLE, CKA_MODULUS, CKA_PRIME_1, CKA_PRIME_2, CKA_PRIVATE,
    CKA_PRIVATE_EXPONENT, CKA_PUBLIC_EXPONENT, CKA_SENSITIVE, CKA_SIGN, CKA_TOKEN, CKA_UNWRAP, CKA_VALUE,
    CKA_VERIFY, CKA_WRAP,
};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::seal::backend::BackendError;
use crate::seal::import::{self, MAC_SECRET, Private};
use crate::seal::key::{Fingerprint, KeyRef, KeySpec, Pin, PublicKey};
use crate::seal::pkcs11::objects::{self, Present};
use crate::seal::pkcs11::parts::{Make, Part};
use crate::seal::pkcs11::session::{MAC_PIN_TEXT, Session, full};
use crate::seal::pkcs11::token::Entered;
use crate::seal::pkcs11::wrap::ulong;

const YES: &[u8] = &[1];
const NO: &[u8] = &[0];

/// Attributes of one object; secret values are borrowed from where they lie.
type Template<'a> = Vec<(CK_ULONG, &'a [u8])>;

fn bad(what: &'static str) -> BackendError {
    BackendError::Refused { function: what, code: 0 }
}

impl Session {
    /// Finds the given key under the planned id, or makes it there.
    pub(super) fn import(
        &self,
        entered: &Entered<'_>,
        planned: &KeyRef,
        private: &[u8],
    ) -> Result<KeyRef, BackendError> {
        let make = Make { spec: planned.spec, wrap: None };
        let given = match planned.spec {
            KeySpec::Kek => return Err(bad("import of a KEK")),
            KeySpec::HmacSha256 if MAC_SECRET.contains(&private.len()) => None,
            KeySpec::HmacSha256 => return Err(bad("import of a MAC key of such a length")),
            spec => {
                let given =
                    import::read(private).map_err(|_| bad("import of what is no such private key"))?;
                if given.spec != spec {
                    return Err(bad("import of a private key of another kind than planned"));
                }
                Some(given)
            }
        };
        let expected = match &given {
            Some(given) => given.public.fingerprint(),
            None => mac_fingerprint(private)?,
        };
        let mut is_made_now = false;
        match objects::present(self.raw_session(), &[make], planned.id)? {
            Present::Whole(_) => {}
            present => {
                if present == Present::Remnant {
                    objects::destroy(self.raw_session(), planned.spec, planned.id)?;
                }
                is_made_now = true;
                let made = match &given {
                    Some(given) => {
                        let half = private_half(&given.private, &given.public);
                        self.create(make, Part::Main, planned, half).and_then(|()| {
                            let point = point(&given.public);
                            self.create(make, Part::Public, planned, public_half(&given.public, &point))
                        })
                    }
                    None => self.create(make, Part::Main, planned, vec![(CKA_VALUE, private)]),
                };
                if let Err(error) = made {
                    return Err(self.removed(planned, error));
                }
            }
        }
        let pinned = planned.pinned(Pin::Imported(expected));
        match self.prove(entered, make, &pinned) {
            Ok(()) => Ok(pinned),
            // Nobody has used it, and left there it would be found unfit at every further try.
            Err(error @ (BackendError::Unfit(_) | BackendError::Refused { .. })) if is_made_now => {
                Err(self.removed(planned, error))
            }
            Err(error) => Err(error),
        }
    }

    /// Takes away what was made of a key that cannot be taken over; what went wrong first is told.
    fn removed(&self, planned: &KeyRef, error: BackendError) -> BackendError {
        if let Err(failed) = objects::destroy(self.raw_session(), planned.spec, planned.id) {
            // Tried again by the next import of the same plan.
            tracing::debug!(%failed, "Half of an imported key is left on the token");
        }
        error
    }

    /// What is there is the pinned key, keeps the rules, and signs.
    fn prove(&self, entered: &Entered<'_>, make: Make, key: &KeyRef) -> Result<(), BackendError> {
        let objects = objects::find_key(self.raw_session(), make, key.id)?;
        let objects = objects.ok_or_else(|| self.absent(entered))?;
        let found = self.check(make, objects, true)?;
        if !found.broken.is_empty() {
            return Err(BackendError::Unfit(found.broken.join(", ")));
        }
        let handles = objects.handles();
        self.check_pin(key, handles)?;
        self.tested(key, handles)
    }

    /// Makes one object. Tokens that refuse the two newer attributes get the template without them, as when they
    /// generate a key.
    fn create(
        &self,
        make: Make,
        part: Part,
        planned: &KeyRef,
        values: Template<'_>,
    ) -> Result<(), BackendError> {
        let (class, kind) = make.kind(part);
        let class = ulong(*class);
        let (kind, label) = (ulong(*kind), objects::label(make, part, planned.id));
        let allowed: Vec<u8> = make.allowed(part).iter().flat_map(|mechanism| ulong(**mechanism)).collect();
        let mut template: Template<'_> = vec![
            (CKA_CLASS, &class),
            (CKA_KEY_TYPE, &kind),
            (CKA_TOKEN, YES),
            (CKA_MODIFIABLE, NO),
            (CKA_ID, planned.id.as_bytes()),
            (CKA_LABEL, &label),
        ];
        template.extend_from_slice(roles(part, planned.spec));
        template.extend_from_slice(&values);
        let plain = template.len();
        if part == Part::Main {
            template.extend([(CKA_COPYABLE, NO), (CKA_ALLOWED_MECHANISMS, allowed.as_slice())]);
        }
        // Twice in full, as in `objects`.
        let mut failed = None;
        for len in [template.len(), template.len(), plain] {
            match self.token().raw.create(self.raw_session().handle(), &template[..len]) {
                Ok(_) => return Ok(()),
                Err(error) => {
                    let error = full(error.into());
                    if matches!(error, BackendError::SessionLost { .. }) {
                        return Err(error);
                    }
                    // Made, and only the answer says otherwise.
                    if objects::find_part(self.raw_session(), make, part, planned.id)?.is_some() {
                        return Ok(());
                    }
                    let first = failed.get_or_insert(error.clone());
                    if !objects::blames_template(&error) {
                        return Err(first.clone());
                    }
                }
            }
        }
        Err(failed.unwrap_or(BackendError::Missing))
    }
}

/// What a MAC key is recognised by, computed here: the device has to come to the same.
fn mac_fingerprint(secret: &[u8]) -> Result<Fingerprint, BackendError> {
    let mut mac =
        Hmac::<Sha256>::new_from_slice(secret).map_err(|_| bad("import of a MAC key of such a length"))?;
    mac.update(MAC_PIN_TEXT);
    Ok(Fingerprint(Sha256::digest(mac.finalize().into_bytes()).into()))
}

/// Every role is stated; one is on.
fn roles(part: Part, spec: KeySpec) -> &'static [(CK_ULONG, &'static [u8])] {
    match (part, spec) {
        (Part::Public, _) => &[(CKA_PRIVATE, NO), (CKA_VERIFY, YES), (CKA_ENCRYPT, NO), (CKA_WRAP, NO)],
        (_, KeySpec::HmacSha256) => &[
            (CKA_PRIVATE, YES),
            (CKA_SENSITIVE, YES),
            (CKA_EXTRACTABLE, NO),
            (CKA_ENCRYPT, NO),
            (CKA_DECRYPT, NO),
            (CKA_WRAP, NO),
            (CKA_UNWRAP, NO),
            (CKA_SIGN, YES),
            (CKA_VERIFY, NO),
            (CKA_DERIVE, NO),
        ],
        _ => &[
            (CKA_PRIVATE, YES),
            (CKA_SENSITIVE, YES),
            (CKA_EXTRACTABLE, NO),
            (CKA_SIGN, YES),
            (CKA_DECRYPT, NO),
            (CKA_UNWRAP, NO),
            (CKA_DERIVE, NO),
        ],
    }
}

fn private_half<'a>(private: &Private<'a>, public: &'a PublicKey) -> Template<'a> {
    match (private, public) {
        (Private::Rsa([d, p, q, dp, dq, qinv]), PublicKey::Rsa { n, e }) => vec![
            (CKA_MODULUS, n),
            (CKA_PUBLIC_EXPONENT, e),
            (CKA_PRIVATE_EXPONENT, d),
            (CKA_PRIME_1, p),
            (CKA_PRIME_2, q),
            (CKA_EXPONENT_1, dp),
            (CKA_EXPONENT_2, dq),
            (CKA_COEFFICIENT, qinv),
        ],
        (Private::Scalar(scalar), PublicKey::Ec { spec, .. }) => {
            vec![(CKA_EC_PARAMS, objects::curve(*spec)), (CKA_VALUE, scalar)]
        }
        (Private::Scalar(seed), _) => {
            vec![(CKA_EC_PARAMS, objects::curve(KeySpec::Ed25519)), (CKA_VALUE, seed)]
        }
        // `import::read` puts together what belongs together.
        (Private::Rsa(_), _) => Vec::new(),
    }
}

/// The point of an EC key as a DER OCTET STRING.
fn point(public: &PublicKey) -> Vec<u8> {
    let bare = match public {
        PublicKey::Ec { x, y, .. } => [&[4][..], x, y].concat(),
        PublicKey::Ed { x } => x.clone(),
        PublicKey::Rsa { .. } => Vec::new(),
    };
    // 97 octets at the most.
    [&[4, u8::try_from(bare.len()).unwrap_or(u8::MAX)][..], &bare].concat()
}

fn public_half<'a>(public: &'a PublicKey, point: &'a [u8]) -> Template<'a> {
    match public {
        PublicKey::Rsa { n, e } => vec![(CKA_MODULUS, n), (CKA_PUBLIC_EXPONENT, e)],
        PublicKey::Ec { spec, .. } => vec![(CKA_EC_PARAMS, objects::curve(*spec)), (CKA_EC_POINT, point)],
        PublicKey::Ed { .. } => {
            vec![(CKA_EC_PARAMS, objects::curve(KeySpec::Ed25519)), (CKA_EC_POINT, point)]
        }
    }
}
