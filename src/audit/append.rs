//! stub
#[derive(Clone)]
pub(super) struct Appender;
