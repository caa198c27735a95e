//! Migrations (stub).

use super::{OpenError, Url};

/// Stub.
///
/// # Errors
/// Never.
pub fn status(_url: &Url) -> Result<Vec<(String, bool)>, OpenError> {
    Ok(Vec::new())
}

/// Stub.
///
/// # Errors
/// Never.
pub fn migrate(_url: &Url) -> Result<Vec<(String, bool)>, OpenError> {
    Ok(Vec::new())
}
