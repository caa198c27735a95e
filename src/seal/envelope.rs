//! Sealed values: their bytes and the payload's encryption.
//!
//! The layout is `docs/formats/sealed-v1.md`; it is frozen, a change is a new version. Two halves:
//! the wrapped DEK with its header (which KEK, which mechanism), and the payload (AES-256-GCM under
//! the DEK). A rewrap replaces the first half and does not touch the second.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroize;

use crate::seal::SealError;
use crate::seal::context::Context;
use crate::seal::guarded::{Dek, Expired, SecretBuf};
use crate::seal::key::{Kek, KekId, WrapMechanism, WrappedDek};

/// Length of a data-encryption key.
pub(crate) const DEK_LEN: usize = 32;
/// Room that modules want for unwrapping: the longest wrapped form (384 bytes, RSA-3072) and some.
pub(crate) const DEK_SLOT_LEN: usize = 512;

const MAGIC: &[u8; 4] = b"LCRS";
const FORMAT: u8 = 1;
const PAYLOAD_ALG: &[u8] = b"A256GCM";
const IV_LEN: usize = 12;
const TAG_LEN: usize = 16;

/// The bytes are not a sealed value of a known format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a sealed value of a known format")]
pub struct BadSealed;

/// The first half: the DEK as the KEK wrapped it, and which KEK that was.
#[derive(Clone, PartialEq, Eq)]
pub struct WrappedKey {
    kek: KekId,
    version: u32,
    dek: WrappedDek,
}

/// The second half: what the DEK encrypts.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Payload {
    pub(crate) iv: [u8; IV_LEN],
    pub(crate) ciphertext: Vec<u8>,
    pub(crate) tag: [u8; TAG_LEN],
}

/// A sealed value. Opens only under the context it was sealed with.
#[derive(Clone, PartialEq, Eq)]
pub struct Sealed {
    pub(crate) key: WrappedKey,
    pub(crate) payload: Payload,
}

/// Reads length-prefixed parts; every method fails rather than reads past the end.
pub(crate) struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    pub(crate) const fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], BadSealed> {
        let (part, rest) = self.0.split_at_checked(len).ok_or(BadSealed)?;
        self.0 = rest;
        Ok(part)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], BadSealed> {
        self.take(N)?.try_into().map_err(|_| BadSealed)
    }

    fn short(&mut self) -> Result<&'a [u8], BadSealed> {
        let [len] = self.array()?;
        self.take(usize::from(len))
    }

    fn medium(&mut self) -> Result<&'a [u8], BadSealed> {
        let len = u16::from_be_bytes(self.array()?);
        self.take(usize::from(len))
    }

    pub(crate) fn long(&mut self) -> Result<&'a [u8], BadSealed> {
        let len = u32::from_be_bytes(self.array()?);
        self.take(usize::try_from(len).map_err(|_| BadSealed)?)
    }

    pub(crate) fn is_at_end(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn end(&self) -> Result<(), BadSealed> {
        if self.is_at_end() { Ok(()) } else { Err(BadSealed) }
    }
}

impl WrappedKey {
    pub(crate) fn new(kek: &Kek, dek: WrappedDek) -> Self {
        Self { kek: kek.id, version: kek.version, dek }
    }

    /// The KEK that wrapped it.
    pub fn kek_id(&self) -> KekId {
        self.kek
    }

    /// The KEK's version.
    pub fn kek_version(&self) -> u32 {
        self.version
    }

    /// The wrapped DEK, if `kek` is the one that the header names and wraps in the way it says.
    pub(crate) fn wrapped_by(&self, kek: &Kek) -> Option<&WrappedDek> {
        let named = self.kek == kek.id && self.version == kek.version;
        (named && kek.mechanism() == Some(self.dek.mechanism)).then_some(&self.dek)
    }

    /// The header and the wrapped DEK, from magic to wrapped bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(128);
        out.extend_from_slice(MAGIC);
        out.push(FORMAT);
        out.extend_from_slice(self.kek.as_bytes());
        out.extend_from_slice(&self.version.to_be_bytes());
        for part in [self.dek.mechanism.name().as_bytes(), &self.dek.iv] {
            // Names and IVs are a dozen bytes; `WrappedDek` is only made by backends.
            out.push(u8::try_from(part.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(part);
        }
        self.dek.mechanism.framed(&self.dek.bytes, &mut out);
        out
    }

    /// Reads [`WrappedKey::to_bytes`] and nothing else.
    ///
    /// # Errors
    /// [`BadSealed`] for an unknown format or mechanism, wrong lengths, or trailing bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadSealed> {
        let mut reader = Reader(bytes);
        let key = Self::read(&mut reader)?;
        reader.end()?;
        Ok(key)
    }

    fn read(reader: &mut Reader<'_>) -> Result<Self, BadSealed> {
        if reader.take(MAGIC.len())? != MAGIC || reader.array()? != [FORMAT] {
            return Err(BadSealed);
        }
        let kek = KekId::from_bytes(reader.take(16)?).ok_or(BadSealed)?;
        let version = u32::from_be_bytes(reader.array()?);
        let mechanism = WrapMechanism::parse(reader.short()?).ok_or(BadSealed)?;
        let iv = reader.short()?;
        let bytes = if mechanism.has_long_frame() { reader.medium()? } else { reader.short()? };
        if !mechanism.accepts(iv.len(), bytes.len()) {
            return Err(BadSealed);
        }
        Ok(Self { kek, version, dek: WrappedDek { mechanism, iv: iv.to_vec(), bytes: bytes.to_vec() } })
    }
}

impl Payload {
    pub(crate) fn ciphertext_len(&self) -> usize {
        self.ciphertext.len()
    }
}

impl Sealed {
    /// The wrapped DEK, which names its KEK.
    pub fn key(&self) -> &WrappedKey {
        &self.key
    }

    /// The whole value as bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = self.key.to_bytes();
        out.reserve(PAYLOAD_ALG.len() + self.payload.ciphertext.len() + 40);
        for part in [PAYLOAD_ALG, &self.payload.iv] {
            out.push(u8::try_from(part.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(part);
        }
        let len = u32::try_from(self.payload.ciphertext.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&len.to_be_bytes());
        out.extend_from_slice(&self.payload.ciphertext);
        out.extend_from_slice(&self.payload.tag);
        out
    }

    /// Reads [`Sealed::to_bytes`] and nothing else.
    ///
    /// # Errors
    /// [`BadSealed`] for an unknown format or algorithm, wrong lengths, or trailing bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, BadSealed> {
        let mut reader = Reader(bytes);
        let key = WrappedKey::read(&mut reader)?;
        if reader.short()? != PAYLOAD_ALG {
            return Err(BadSealed);
        }
        let iv = reader.short()?.try_into().map_err(|_| BadSealed)?;
        let ciphertext = reader.long()?.to_vec();
        let tag = reader.array()?;
        reader.end()?;
        Ok(Self { key, payload: Payload { iv, ciphertext, tag } })
    }

    /// The four columns of a database row: wrapped DEK with its header, payload IV, ciphertext, tag.
    pub fn into_columns(self) -> [Vec<u8>; 4] {
        let Payload { iv, ciphertext, tag } = self.payload;
        [self.key.to_bytes(), iv.to_vec(), ciphertext, tag.to_vec()]
    }

    /// Reads [`Sealed::into_columns`].
    ///
    /// # Errors
    /// [`BadSealed`] for anything else; a shortened tag or IV in particular.
    pub fn from_columns(
        wrapped_dek: &[u8],
        iv: &[u8],
        ciphertext: Vec<u8>,
        tag: &[u8],
    ) -> Result<Self, BadSealed> {
        let key = WrappedKey::from_bytes(wrapped_dek)?;
        let iv = iv.try_into().map_err(|_| BadSealed)?;
        let tag = tag.try_into().map_err(|_| BadSealed)?;
        Ok(Self { key, payload: Payload { iv, ciphertext, tag } })
    }
}

/// The DEK as a cipher. The object holds the expanded key, so it lives for one call only and is
/// never kept in a struct (hsm.md 2.9: aws-lc-rs leaves no copy behind).
fn cipher(dek: &[u8]) -> Result<LessSafeKey, SealError> {
    let key = UnboundKey::new(&AES_256_GCM, dek).map_err(|_| SealError::Rejected)?;
    Ok(LessSafeKey::new(key))
}

/// Why a payload was not processed.
pub(crate) enum Failure {
    /// The DEK's time was over before it was used: get another.
    Expired,
    /// What the caller learns.
    Seal(SealError),
}

impl From<Expired> for Failure {
    fn from(_: Expired) -> Self {
        Self::Expired
    }
}

impl From<SealError> for Failure {
    fn from(error: SealError) -> Self {
        Self::Seal(error)
    }
}

/// Encrypts the plaintext in `body` in place, then copies the ciphertext out. A DEK that has expired
/// leaves the plaintext as it is.
pub(crate) fn encrypt(
    dek: &mut Dek,
    context: &Context<'_>,
    body: &mut SecretBuf,
) -> Result<Payload, Failure> {
    let mut iv = [0; IV_LEN];
    getrandom::fill(&mut iv).map_err(|_| SealError::no_randomness())?;
    let len = body.len();
    let tag = dek.with(|dek| {
        body.with_mut(|bytes| {
            cipher(dek)?
                .seal_in_place_separate_tag(
                    Nonce::assume_unique_for_key(iv),
                    Aad::from(context.payload_aad()),
                    bytes,
                )
                .map_err(|_| SealError::TooLarge { len })
        })
    })??;
    let tag = tag.as_ref().try_into().map_err(|_| SealError::Rejected)?;
    Ok(Payload { iv, ciphertext: body.with(<[u8]>::to_vec), tag })
}

/// Copies the ciphertext into `out` (guarded, as long as the ciphertext) and decrypts it there.
pub(crate) fn decrypt(
    dek: &mut Dek,
    context: &Context<'_>,
    payload: &Payload,
    out: &mut SecretBuf,
) -> Result<(), Failure> {
    let iv = Nonce::assume_unique_for_key(payload.iv);
    let opened = dek.with(|dek| {
        out.with_mut(|bytes| {
            bytes.copy_from_slice(&payload.ciphertext);
            cipher(dek)?
                .open_in_place_separate_tag(iv, Aad::from(context.payload_aad()), &payload.tag, bytes)
                .map(|_| ())
                .map_err(|_| SealError::Rejected)
        })
    })?;
    if opened.is_err() {
        // What the cipher wrote before it saw the tag is nobody's business.
        out.with_mut(Zeroize::zeroize);
    }
    Ok(opened?)
}
