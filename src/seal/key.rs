//! Names of keys and what is known about them without asking the device.
//!
//! A [`KeyRef`] is opaque above `seal`: it is kept as bytes and handed back. Inside it are the
//! device's object id, the kind of key and the pin that tells this key from any other.

use std::fmt;
use std::sync::Arc;

use crate::seal::devices::DeviceName;

pub use crate::seal::public::{Alg, Fingerprint, PublicKey, Signature};

/// A device object's id: 16 random bytes, chosen and recorded before the key is made (`CKA_ID`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId([u8; 16]);

impl KeyId {
    /// The id's bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// From an object's `CKA_ID`; `None` if it is not 16 bytes.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// Reads what `Display` writes.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut id = [0; 16];
        hex::decode_to_slice(text, &mut id).ok().map(|()| Self(id))
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// A tenant's KEK over all its versions: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KekId([u8; 16]);

impl KekId {
    /// A fresh id.
    ///
    /// # Errors
    /// If the operating system has no randomness to give.
    pub fn generate() -> Result<Self, getrandom::Error> {
        Ok(Self(random_bytes()?))
    }

    /// From stored bytes; `None` if they are not 16.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The id's bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KekId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KekId({self})")
    }
}

fn random_bytes() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

/// What a key is for. One key, one purpose (SP 800-57 part 1, section 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeySpec {
    /// Wraps and unwraps DEKs, nothing else: AES-256, or what `WrapMechanism` says.
    Kek,
    /// ECDSA on P-256.
    EcP256,
    /// ECDSA on P-384.
    EcP384,
    /// RSA with 2048 bits.
    Rsa2048,
    /// RSA with 3072 bits.
    Rsa3072,
    /// RSA with 4096 bits.
    Rsa4096,
    /// HMAC-SHA256 with a 256-bit key; an imported one may have 128 to 512 bits.
    HmacSha256,
    /// EdDSA on Ed25519, where the token has it.
    Ed25519,
}

impl KeySpec {
    const ALL: [(Self, u8, &'static str); 8] = [
        (Self::Kek, 1, "kek-aes256"),
        (Self::EcP256, 2, "ec-p256"),
        (Self::EcP384, 3, "ec-p384"),
        (Self::Rsa2048, 4, "rsa-2048"),
        (Self::Rsa3072, 5, "rsa-3072"),
        (Self::Rsa4096, 6, "rsa-4096"),
        (Self::HmacSha256, 7, "hmac-sha256"),
        (Self::Ed25519, 8, "ed25519"),
    ];

    fn code(self) -> u8 {
        Self::ALL.into_iter().find(|(spec, ..)| *spec == self).map_or(0, |(_, code, _)| code)
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known, _)| *known == code).map(|(spec, ..)| spec)
    }

    /// Reads [`KeySpec::name`].
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(.., known)| *known == name).map(|(spec, ..)| spec)
    }

    /// The name in reports and labels.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(spec, ..)| *spec == self).map_or("?", |(.., name)| name)
    }

    /// What an error calls the attempt to make such a key on a device that cannot.
    pub(crate) const fn making(self) -> &'static str {
        match self {
            Self::Kek => "making of a KEK",
            Self::EcP256 => "making of an ec-p256 key",
            Self::EcP384 => "making of an ec-p384 key",
            Self::Rsa2048 => "making of an rsa-2048 key",
            Self::Rsa3072 => "making of an rsa-3072 key",
            Self::Rsa4096 => "making of an rsa-4096 key",
            Self::HmacSha256 => "making of an hmac-sha256 key",
            Self::Ed25519 => "making of an ed25519 key",
        }
    }

    /// Whether an operation with this key takes milliseconds: RSA goes through the slow lane.
    pub(crate) const fn is_slow(self) -> bool {
        matches!(self, Self::Rsa2048 | Self::Rsa3072 | Self::Rsa4096)
    }

    /// The length in bytes of one coordinate, for EC keys.
    pub(crate) const fn field_len(self) -> Option<usize> {
        match self {
            Self::EcP256 => Some(32),
            Self::EcP384 => Some(48),
            _ => None,
        }
    }

    /// The modulus length in bits, for RSA keys.
    pub(crate) const fn modulus_bits(self) -> Option<u16> {
        match self {
            Self::Rsa2048 => Some(2048),
            Self::Rsa3072 => Some(3072),
            Self::Rsa4096 => Some(4096),
            _ => None,
        }
    }
}

/// How a KEK wraps DEKs, chosen once per KEK by a known-answer probe and written into every value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WrapMechanism {
    /// AES-256-GCM with the wrap's AAD (SP 800-38D), `C_Encrypt`/`C_Decrypt`.
    AesGcm,
    /// AES key wrap (RFC 3394) of `DEK || SHA-256(AAD)`, `C_Encrypt`/`C_Decrypt`.
    AesKw,
    /// The same bytes as [`WrapMechanism::AesKw`], by `C_WrapKey`/`C_UnwrapKey`.
    AesKwObject,
    /// AES key wrap with padding (RFC 5649) of `DEK || SHA-256(AAD)`, `C_Encrypt`/`C_Decrypt`.
    AesKwp,
    /// RSA-OAEP with SHA-256 (RFC 8017) of `DEK || SHA-256(AAD)`, and an HMAC: whoever has the public key
    /// can encrypt.
    RsaOaep256,
    /// The same with SHA-1, for devices that have no other.
    RsaOaep1,
    /// AES-CBC with PKCS#7 padding of `DEK || SHA-256(AAD)`, and an HMAC.
    AesCbc,
    /// `DEK || SHA-256(AAD)` as a sealed child of the KEK in a TPM (`TPM2_Create`, `TPM2_Unseal`).
    TpmSeal,
}

impl WrapMechanism {
    const ALL: [(Self, u8, &'static str); 8] = [
        (Self::AesGcm, 1, "A256GCM"),
        (Self::AesKw, 2, "A256KW"),
        (Self::AesKwObject, 3, "A256KW-OBJ"),
        (Self::AesKwp, 8, "A256KWP"),
        (Self::RsaOaep256, 9, "RSA-OAEP-256+HS256"),
        (Self::RsaOaep1, 10, "RSA-OAEP+HS256"),
        (Self::AesCbc, 11, "A256CBC+HS256"),
        (Self::TpmSeal, 16, "TPM2-SEAL"),
    ];

    /// What a PKCS#11 token is asked for, best first (hsm.md, section 1).
    pub(crate) const PREFERENCE: [Self; 7] = [
        Self::AesGcm,
        Self::AesKw,
        Self::AesKwp,
        Self::AesKwObject,
        Self::RsaOaep256,
        Self::RsaOaep1,
        Self::AesCbc,
    ];

    /// Modulus length of an RSA KEK.
    pub(crate) const RSA_BITS: u16 = 3072;
    /// Length of the HMAC behind what a mechanism without authentication gives.
    pub(crate) const TAG_LEN: usize = 32;

    fn code(self) -> u8 {
        Self::ALL.into_iter().find(|(mechanism, ..)| *mechanism == self).map_or(0, |(_, code, _)| code)
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, known, _)| *known == code).map(|(mechanism, ..)| mechanism)
    }

    /// Lengths of IV and wrapped bytes: 32 + 16 for GCM; 64 + 8 for key wrap of DEK and hash, 64 + 16 for
    /// CBC; the modulus for RSA; and the HMAC where there is one. What a TPM makes is its own affair
    /// (about 220), and at most what the header's length byte can say.
    pub(crate) const fn lengths(self) -> (usize, usize) {
        match self {
            Self::AesGcm => (12, 48),
            Self::AesKw | Self::AesKwObject | Self::AesKwp => (0, 72),
            Self::RsaOaep256 | Self::RsaOaep1 => (0, Self::RSA_BITS as usize / 8 + Self::TAG_LEN),
            Self::AesCbc => (16, 80 + Self::TAG_LEN),
            Self::TpmSeal => (0, 255),
        }
    }

    /// Whether an IV and wrapped bytes of these lengths can be of this mechanism.
    pub(crate) const fn accepts(self, iv: usize, bytes: usize) -> bool {
        let (iv_len, len) = self.lengths();
        match self {
            Self::TpmSeal => iv == iv_len && bytes > 32 && bytes <= len,
            _ => iv == iv_len && bytes == len,
        }
    }

    /// The KEK is an RSA pair.
    pub(crate) const fn is_rsa(self) -> bool {
        matches!(self, Self::RsaOaep256 | Self::RsaOaep1)
    }

    /// An HMAC key beside the KEK authenticates what it wraps.
    pub(crate) const fn has_tag(self) -> bool {
        matches!(self, Self::RsaOaep256 | Self::RsaOaep1 | Self::AesCbc)
    }

    /// The wrapped bytes with their length in front: 16 bits where 8 do not hold it, which the
    /// mechanism's name before them tells.
    pub(crate) fn framed(self, bytes: &[u8], out: &mut Vec<u8>) {
        // `WrappedDek` is only made by backends, with the mechanism's own length.
        let len = u16::try_from(bytes.len()).unwrap_or(u16::MAX).to_be_bytes();
        out.extend_from_slice(if self.has_long_frame() { &len } else { &len[1..] });
        out.extend_from_slice(bytes);
    }

    /// Whether [`WrapMechanism::framed`] takes 16 bits for the length.
    pub(crate) const fn has_long_frame(self) -> bool {
        self.lengths().1 > 255
    }

    /// The name in the sealed header.
    pub fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(mechanism, ..)| *mechanism == self).map_or("?", |(.., name)| name)
    }

    /// The mechanism of that name.
    pub fn parse(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|(.., known)| known.as_bytes() == name).map(|(mechanism, ..)| mechanism)
    }
}

/// A DEK as the device wrapped it.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappedDek {
    /// The mechanism that wrapped it.
    pub mechanism: WrapMechanism,
    /// The IV, as read back from the device; empty for key wrap and RSA.
    pub iv: Vec<u8>,
    /// Ciphertext and, for GCM, tag; for mechanisms with an HMAC, that.
    pub bytes: Vec<u8>,
}

/// What identifies a key beyond its id. Checked whenever the key is looked up on the device.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Pin {
    /// Not generated yet.
    Planned,
    /// SHA-256 of the public key (see [`PublicKey::fingerprint`]), or of a MAC over a fixed text.
    Fingerprint(Fingerprint),
    /// A known value wrapped by this KEK: it opens, so this is the KEK; it opens, so the device is well.
    Canary(WrappedDek),
    /// The same of a key that was brought from outside: the device cannot say that it made it, nor that it was
    /// never readable.
    Imported(Fingerprint),
    /// A fingerprint, and the key itself as the device gave it out: encrypted, and only this device can load it.
    Blob { fingerprint: Fingerprint, blob: Vec<u8> },
}

/// A key on the device. Opaque: keep its bytes, hand them back.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyRef {
    pub(crate) id: KeyId,
    pub(crate) spec: KeySpec,
    /// Shared, because every request clones the key it uses.
    pub(crate) pin: Arc<Pin>,
    /// Where it is. Kept beside the bytes, not in them: a column that can be searched.
    device: DeviceName,
}

impl KeyRef {
    /// Names a key that is to be made, on the default device. Record it before calling `KeyAdmin::generate`.
    ///
    /// # Errors
    /// If the operating system has no randomness to give.
    pub fn plan(spec: KeySpec) -> Result<Self, getrandom::Error> {
        let device = DeviceName::default();
        Ok(Self { id: KeyId(random_bytes()?), spec, pin: Arc::new(Pin::Planned), device })
    }

    /// The key of an object that was found on the default device: its name only, as if it was planned.
    pub(crate) fn found(id: KeyId, spec: KeySpec) -> Self {
        Self { id, spec, pin: Arc::new(Pin::Planned), device: DeviceName::default() }
    }

    /// The same key on that device.
    #[must_use]
    pub fn on(self, device: DeviceName) -> Self {
        Self { device, ..self }
    }

    /// The device that it is on.
    pub const fn device(&self) -> &DeviceName {
        &self.device
    }

    /// The device object's id.
    pub const fn id(&self) -> KeyId {
        self.id
    }

    /// What the key is for.
    pub const fn spec(&self) -> KeySpec {
        self.spec
    }

    /// Whether the key was generated (and so has a fingerprint).
    pub fn is_pinned(&self) -> bool {
        *self.pin != Pin::Planned
    }

    /// Whether the key is pinned by this public key, so that the device signs with this one and no other.
    pub fn is_pinned_by(&self, key: &PublicKey) -> bool {
        match &*self.pin {
            Pin::Fingerprint(pinned) | Pin::Imported(pinned) | Pin::Blob { fingerprint: pinned, .. } => {
                *pinned == key.fingerprint()
            }
            Pin::Planned | Pin::Canary(_) => false,
        }
    }

    /// Whether the key was brought from outside by `KeyAdmin::import`: somebody may have a copy of it, and the device
    /// cannot prove otherwise.
    pub fn is_imported(&self) -> bool {
        matches!(*self.pin, Pin::Imported(_))
    }

    /// Which line of a queue its users stand in: keys belong to tenants, so tenants take turns.
    pub(crate) fn flow(&self) -> u64 {
        let [first, ..] = self.id.0.as_chunks::<8>().0 else { return 0 };
        u64::from_ne_bytes(*first)
    }

    /// Whether an operation with this key takes milliseconds and belongs into the slow lane.
    pub(crate) fn is_slow(&self) -> bool {
        match &*self.pin {
            Pin::Canary(canary) => canary.mechanism.is_rsa(),
            _ => self.spec.is_slow(),
        }
    }

    pub(crate) fn pinned(&self, pin: Pin) -> Self {
        Self { id: self.id, spec: self.spec, pin: Arc::new(pin), device: self.device.clone() }
    }

    /// The form in which the layers above keep it: version, spec, id, pin. The device is kept beside it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = vec![1, self.spec.code()];
        out.extend_from_slice(&self.id.0);
        match &*self.pin {
            Pin::Planned => out.push(0),
            Pin::Fingerprint(Fingerprint(sum)) => {
                out.push(1);
                out.extend_from_slice(sum);
            }
            Pin::Canary(wrapped) => {
                // An IV is a dozen bytes: its length fits one.
                let iv_len = u8::try_from(wrapped.iv.len()).unwrap_or(0);
                out.extend_from_slice(&[2, wrapped.mechanism.code(), iv_len]);
                out.extend_from_slice(&wrapped.iv);
                wrapped.mechanism.framed(&wrapped.bytes, &mut out);
            }
            Pin::Imported(Fingerprint(sum)) => {
                out.push(4);
                out.extend_from_slice(sum);
            }
            Pin::Blob { fingerprint: Fingerprint(sum), blob } => {
                out.push(3);
                out.extend_from_slice(sum);
                out.extend_from_slice(blob);
            }
        }
        out
    }

    /// Reads [`KeyRef::to_bytes`], for the default device; `None` if the bytes are anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let [1, spec, rest @ ..] = bytes else { return None };
        let (id, rest) = rest.split_at_checked(16)?;
        let id = KeyId(id.try_into().ok()?);
        let pin = match rest {
            [0] => Pin::Planned,
            [1, sum @ ..] => Pin::Fingerprint(Fingerprint(sum.try_into().ok()?)),
            [4, sum @ ..] => Pin::Imported(Fingerprint(sum.try_into().ok()?)),
            [2, mechanism, iv_len, rest @ ..] => {
                let (iv, rest) = rest.split_at_checked(usize::from(*iv_len))?;
                let mechanism = WrapMechanism::from_code(*mechanism)?;
                let (len, wrapped) = match rest {
                    [high, low, wrapped @ ..] if mechanism.has_long_frame() => {
                        (u16::from_be_bytes([*high, *low]), wrapped)
                    }
                    [len, wrapped @ ..] if !mechanism.has_long_frame() => (u16::from(*len), wrapped),
                    _ => return None,
                };
                if wrapped.len() != usize::from(len) {
                    return None;
                }
                Pin::Canary(WrappedDek { mechanism, iv: iv.to_vec(), bytes: wrapped.to_vec() })
            }
            [3, rest @ ..] => {
                let (sum, blob) = rest.split_first_chunk::<32>()?;
                let len = usize::from(u16::from_be_bytes(*blob.first_chunk::<2>()?));
                // The device's own length and at least something after it: a cut blob is no key.
                if blob.len() <= 2 + len {
                    return None;
                }
                Pin::Blob { fingerprint: Fingerprint(*sum), blob: blob.to_vec() }
            }
            _ => return None,
        };
        let (spec, device) = (KeySpec::from_code(*spec)?, DeviceName::default());
        Some(Self { id, spec, pin: Arc::new(pin), device })
    }
}

impl fmt::Debug for KeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyRef({} {})", self.spec.name(), self.id)
    }
}

/// One version of a tenant's KEK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kek {
    /// The KEK over all its versions.
    pub id: KekId,
    /// 1, 2, ...
    pub version: u32,
    /// The device object of this version.
    pub key: KeyRef,
}

impl Kek {
    /// The mechanism that the probe chose for this KEK; `None` before it was generated.
    pub fn mechanism(&self) -> Option<WrapMechanism> {
        match &*self.key.pin {
            Pin::Canary(wrapped) => Some(wrapped.mechanism),
            _ => None,
        }
    }

    /// The mechanism's name, empty before generation.
    pub fn mechanism_name(&self) -> &'static str {
        self.mechanism().map_or("", WrapMechanism::name)
    }
}

#[cfg(test)]
mod tests {
    use super::{Fingerprint, KeyRef, KeySpec, Pin, WrapMechanism, WrappedDek};

    #[test]
    fn a_key_ref_survives_its_bytes_with_every_pin() {
        let planned = KeyRef::plan(KeySpec::Kek).unwrap();
        let canaries = WrapMechanism::PREFERENCE.map(|mechanism| {
            let (iv, len) = mechanism.lengths();
            Pin::Canary(WrappedDek { mechanism, iv: vec![7; iv], bytes: vec![9; len] })
        });
        let sum = Fingerprint([3; 32]);
        for pin in [Pin::Planned, Pin::Fingerprint(sum), Pin::Imported(sum)].into_iter().chain(canaries) {
            let key = planned.pinned(pin);
            let bytes = key.to_bytes();
            assert!(KeyRef::from_bytes(&bytes) == Some(key));
            assert!(KeyRef::from_bytes(&bytes[..bytes.len() - 1]).is_none());
        }
    }

    #[test]
    fn bytes_from_before_imported_keys_mean_what_they_meant() {
        let old = [&[1, 2][..], &[5; 16], &[1], &[3; 32]].concat();
        let key = KeyRef::from_bytes(&old).unwrap();
        assert!(key.spec() == KeySpec::EcP256 && !key.is_imported() && key.is_pinned());
        assert_eq!(key.to_bytes(), old);
        let imported = key.pinned(Pin::Imported(Fingerprint([3; 32])));
        assert!(imported.is_imported() && imported != key && imported.id() == key.id());
    }
}
