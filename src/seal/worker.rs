//! stub
use super::key::WrappedDek;
use super::*;
pub enum Priority {
    Foreground,
    Background,
}
pub struct Lanes;
impl Lanes {
    pub async fn wrap(
        &self,
        _k: &Kek,
        _d: SecretBuf,
        _a: Vec<u8>,
        _p: Priority,
        _f: u64,
    ) -> Result<(WrappedDek, SecretBuf), SealError> {
        todo!()
    }
    pub async fn unwrap(
        &self,
        _k: &Kek,
        _w: WrappedDek,
        _a: Vec<u8>,
        _s: SecretBuf,
        _p: Priority,
        _f: u64,
    ) -> Result<SecretBuf, SealError> {
        todo!()
    }
    pub async fn sign(&self, _k: &KeyRef, _a: Alg, _m: &[u8]) -> Result<Signature, SealError> {
        todo!()
    }
    pub async fn mac(&self, _k: &KeyRef, _m: &[u8]) -> Result<[u8; 32], SealError> {
        todo!()
    }
    pub async fn public_key(&self, _k: &KeyRef) -> Result<PublicKey, SealError> {
        todo!()
    }
    pub async fn generate(&self, _k: &KeyRef) -> Result<KeyRef, SealError> {
        todo!()
    }
    pub async fn destroy(&self, _k: &KeyRef) -> Result<(), SealError> {
        todo!()
    }
    pub async fn inspect(&self, _k: &KeyRef) -> Result<KeyReport, SealError> {
        todo!()
    }
}
