//! The public side of a key: algorithms by their JOSE names, public halves, signatures.
//!
//! Pure values, the same for every device. Nothing in this file is secret.

use sha2::{Digest, Sha256, Sha384};

use crate::seal::key::KeySpec;

/// A signature algorithm by its JOSE name (RFC 7518, section 3.1; RFC 8037, section 3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alg {
    /// ECDSA P-256 with SHA-256.
    Es256,
    /// ECDSA P-384 with SHA-384.
    Es384,
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    Rs256,
    /// RSASSA-PSS with SHA-256.
    Ps256,
    /// Ed25519 without a prehash and without a context (RFC 8032, section 5.1).
    EdDsa,
}

impl Alg {
    /// Every algorithm.
    pub const ALL: [Self; 5] = [Self::Es256, Self::Es384, Self::Rs256, Self::Ps256, Self::EdDsa];

    /// The longest message that EdDSA signs here: it goes to the device as a whole.
    pub const LARGEST_MESSAGE: usize = 64 << 10;

    /// The algorithm of that JOSE name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|alg| alg.name() == name)
    }

    /// What a key of that kind signs with unless somebody chooses: RS256 of the two that an RSA key has. `None` for
    /// keys that do not sign.
    pub const fn for_spec(spec: KeySpec) -> Option<Self> {
        match spec {
            KeySpec::EcP256 => Some(Self::Es256),
            KeySpec::EcP384 => Some(Self::Es384),
            KeySpec::Rsa2048 | KeySpec::Rsa3072 | KeySpec::Rsa4096 => Some(Self::Rs256),
            KeySpec::Ed25519 => Some(Self::EdDsa),
            KeySpec::Kek | KeySpec::HmacSha256 => None,
        }
    }

    /// The JOSE name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Es256 => "ES256",
            Self::Es384 => "ES384",
            Self::Rs256 => "RS256",
            Self::Ps256 => "PS256",
            Self::EdDsa => "EdDSA",
        }
    }

    /// What the device is given to sign: the algorithm's hash of the message, for EdDSA the message itself.
    pub(crate) fn digest(self, message: &[u8]) -> Vec<u8> {
        match self {
            Self::Es384 => Sha384::digest(message).to_vec(),
            Self::Es256 | Self::Rs256 | Self::Ps256 => Sha256::digest(message).to_vec(),
            Self::EdDsa => message.to_vec(),
        }
    }

    /// Whether a key of that kind can make such a signature.
    pub const fn fits(self, spec: KeySpec) -> bool {
        match self {
            Self::Es256 => matches!(spec, KeySpec::EcP256),
            Self::Es384 => matches!(spec, KeySpec::EcP384),
            Self::Rs256 | Self::Ps256 => spec.modulus_bits().is_some(),
            Self::EdDsa => matches!(spec, KeySpec::Ed25519),
        }
    }
}

/// SHA-256 over what makes a key recognisable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fingerprint(pub [u8; 32]);

/// A public key by its numbers, big endian, EC coordinates at full width, RSA without leading zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicKey {
    /// A point on P-256 or P-384.
    Ec {
        /// [`KeySpec::EcP256`] or [`KeySpec::EcP384`].
        spec: KeySpec,
        /// The x coordinate.
        x: Vec<u8>,
        /// The y coordinate.
        y: Vec<u8>,
    },
    /// An RSA key.
    Rsa {
        /// The modulus.
        n: Vec<u8>,
        /// The public exponent.
        e: Vec<u8>,
    },
    /// A point on Ed25519.
    Ed {
        /// The 32 octets of RFC 8032, section 5.1.5: the `x` of a JWK (RFC 8037, section 2).
        x: Vec<u8>,
    },
}

impl PublicKey {
    /// The kind of key; `None` for an RSA key of another size than keys have here.
    pub fn spec(&self) -> Option<KeySpec> {
        match self {
            Self::Ec { spec, .. } => Some(*spec),
            Self::Ed { .. } => Some(KeySpec::Ed25519),
            Self::Rsa { n, .. } => [KeySpec::Rsa2048, KeySpec::Rsa3072, KeySpec::Rsa4096]
                .into_iter()
                .find(|spec| spec.modulus_bits().is_some_and(|bits| usize::from(bits) == n.len() * 8)),
        }
    }

    /// SHA-256 over the length-prefixed numbers: what a signing key is pinned by.
    pub fn fingerprint(&self) -> Fingerprint {
        let (label, parts): (&[u8], &[&[u8]]) = match self {
            Self::Ec { x, y, .. } => (b"lacre/pin/v1/ec", &[x, y]),
            Self::Rsa { n, e } => (b"lacre/pin/v1/rsa", &[n, e]),
            Self::Ed { x } => (b"lacre/pin/v1/ed25519", &[x]),
        };
        let mut sum = Sha256::new();
        sum.update(label);
        for part in parts {
            sum.update(u64::try_from(part.len()).unwrap_or(u64::MAX).to_be_bytes());
            sum.update(part);
        }
        Fingerprint(sum.finalize().into())
    }
}

/// A signature in JOSE form.
#[derive(Clone, PartialEq, Eq)]
pub struct Signature(pub(crate) Vec<u8>);

impl Signature {
    /// The signature's octets.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::{Alg, PublicKey};
    use crate::seal::key::KeySpec;

    #[test]
    fn an_algorithm_is_known_by_its_jose_name_and_no_other() {
        for alg in Alg::ALL {
            assert_eq!(Alg::parse(alg.name()), Some(alg));
        }
        for other in ["es256", "HS256", "none", "ES256K", ""] {
            assert_eq!(Alg::parse(other), None);
        }
        for spec in [KeySpec::EcP256, KeySpec::EcP384, KeySpec::Rsa3072, KeySpec::Ed25519] {
            assert!(Alg::for_spec(spec).is_some_and(|alg| alg.fits(spec)), "{spec:?}");
        }
        assert!(Alg::for_spec(KeySpec::Kek).is_none() && Alg::for_spec(KeySpec::HmacSha256).is_none());
    }

    #[test]
    fn a_hash_is_signed_and_by_eddsa_the_message() {
        for (alg, len) in [(Alg::Es256, 32), (Alg::Es384, 48), (Alg::Rs256, 32), (Alg::Ps256, 32)] {
            assert_eq!(alg.digest(b"message").len(), len);
        }
        assert_eq!(Alg::EdDsa.digest(b"message"), b"message");
    }

    #[test]
    fn keys_of_two_kinds_with_the_same_numbers_have_two_fingerprints() {
        let (x, y) = (vec![7; 32], Vec::new());
        let ed = PublicKey::Ed { x: x.clone() };
        let ec = PublicKey::Ec { spec: KeySpec::EcP256, x: x.clone(), y: y.clone() };
        assert_ne!(ed.fingerprint(), ec.fingerprint());
        assert_ne!(ed.fingerprint(), PublicKey::Ed { x: vec![8; 32] }.fingerprint());
        assert_ne!(ec.fingerprint(), PublicKey::Rsa { n: x, e: y }.fingerprint());
        assert_eq!((ed.spec(), ec.spec()), (Some(KeySpec::Ed25519), Some(KeySpec::EcP256)));
        let rsa = |len| PublicKey::Rsa { n: vec![0xFF; len], e: vec![1, 0, 1] }.spec();
        assert_eq!((rsa(256), rsa(512), rsa(255)), (Some(KeySpec::Rsa2048), Some(KeySpec::Rsa4096), None));
    }
}
