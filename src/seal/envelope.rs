//! stub
use super::*;
pub const DEK_LEN: usize = 32;
pub const DEK_SLOT_LEN: usize = 96;
/// stub
pub struct Sealed {
    /// k
    pub key: WrappedKey,
    /// p
    pub payload: Payload,
}
/// stub
pub struct Payload;
impl Payload {
    pub fn ciphertext_len(&self) -> usize {
        todo!()
    }
}
/// stub
pub struct WrappedKey;
/// The bytes are not a sealed value.
#[derive(Debug, thiserror::Error)]
#[error("not a sealed value")]
pub struct BadSealed;
impl WrappedKey {
    pub fn new(_k: &Kek, _w: key::WrappedDek) -> Self {
        todo!()
    }
    /// `None` if another KEK or version wrapped it.
    pub fn wrapped_by(&self, _k: &Kek) -> Option<key::WrappedDek> {
        todo!()
    }
    /// The KEK that wrapped it.
    pub fn kek_id(&self) -> KekId {
        todo!()
    }
    /// The KEK's version.
    pub fn kek_version(&self) -> u32 {
        todo!()
    }
    /// For the `wrapped_dek` column.
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }
}
impl Sealed {
    /// The whole value as bytes (docs/formats/sealed-v1.md).
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }
    /// Reads [`Sealed::to_bytes`].
    pub fn from_bytes(_b: &[u8]) -> Result<Self, BadSealed> {
        todo!()
    }
    /// The four columns: wrapped DEK (with header), payload IV, ciphertext, tag.
    pub fn into_columns(self) -> [Vec<u8>; 4] {
        todo!()
    }
    /// Reads [`Sealed::into_columns`].
    pub fn from_columns(
        _wrapped_dek: &[u8],
        _iv: &[u8],
        _ciphertext: Vec<u8>,
        _tag: &[u8],
    ) -> Result<Self, BadSealed> {
        todo!()
    }
    /// The wrapped DEK, which names its KEK.
    pub fn key(&self) -> &WrappedKey {
        &self.key
    }
}
impl WrappedKey {
    /// Reads [`WrappedKey::to_bytes`].
    pub fn from_bytes(_b: &[u8]) -> Result<Self, BadSealed> {
        todo!()
    }
}
pub fn encrypt(_d: &SecretBuf, _c: &Context<'_>, _p: &[u8]) -> Result<Payload, SealError> {
    todo!()
}
pub fn decrypt(_d: &SecretBuf, _c: &Context<'_>, _p: &Payload, _o: &mut SecretBuf) -> Result<(), SealError> {
    todo!()
}
