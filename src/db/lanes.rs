//! Threads that own connections (stub).
use super::*;
/// The database's status.
#[derive(Clone, Debug, serde::Serialize)]
pub struct DbStatus {
    /// Which engine.
    pub engine: Engine,
    /// Whether it answers; the reason if it does not.
    pub problem: Option<String>,
}
pub(super) struct Lanes;
impl Lanes {
    pub(super) fn open(_u: &Url, _o: &OpenOptions) -> Result<Self, OpenError> {
        todo!()
    }
    pub(super) async fn read<T, E, F>(&self, _q: F) -> Result<T, E>
    where
        F: FnOnce(&mut Conn) -> Result<T, E>,
    {
        todo!()
    }
    pub(super) async fn write<T, E, F>(&self, _q: F) -> Result<T, E>
    where
        F: FnOnce(&mut Conn) -> Result<T, E>,
    {
        todo!()
    }
    pub(super) fn status(&self) -> DbStatus {
        todo!()
    }
    pub(super) fn engine(&self) -> Engine {
        todo!()
    }
    pub(super) fn close(&self) {}
}
