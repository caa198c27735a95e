//! What must not compile, as documentation tests.
//!
//! Each example that fails stands next to its twin that compiles and differs in one line, so that it
//! fails for the reason given.
//!
//! The right way:
//! ```
//! fn right(buf: lacre::seal::SecretBuf) -> usize {
//!     buf.with(|bytes| bytes.len())
//! }
//! ```
//! A buffer cannot be cloned:
//! ```compile_fail,E0599
//! fn wrong(buf: lacre::seal::SecretBuf) -> lacre::seal::SecretBuf {
//!     buf.clone()
//! }
//! ```
//! ```
//! fn right(buf: lacre::seal::SecretBuf) -> lacre::seal::SecretBuf {
//!     buf
//! }
//! ```
//! It cannot be used, or dropped, after it was given away:
//! ```compile_fail,E0382
//! fn wrong(buf: lacre::seal::SecretBuf) -> usize {
//!     drop(buf);
//!     buf.len()
//! }
//! ```
//! ```compile_fail,E0382
//! fn wrong(buf: lacre::seal::SecretBuf) {
//!     drop(buf);
//!     drop(buf);
//! }
//! ```
//! ```
//! fn right(buf: lacre::seal::SecretBuf) -> usize {
//!     let len = buf.len();
//!     drop(buf);
//!     len
//! }
//! ```
//! It cannot be printed:
//! ```compile_fail,E0277
//! fn wrong(buf: lacre::seal::SecretBuf) -> String {
//!     format!("{:?}", buf)
//! }
//! ```
//! ```compile_fail,E0277
//! fn wrong(buf: lacre::seal::SecretBuf) -> String {
//!     format!("{}", buf)
//! }
//! ```
//! ```
//! fn right(buf: lacre::seal::SecretBuf) -> String {
//!     format!("{:?}", buf.len())
//! }
//! ```
//! It cannot be serialised:
//! ```compile_fail,E0277
//! fn wrong(buf: lacre::seal::SecretBuf) -> Option<String> {
//!     serde_json::to_string(&buf).ok()
//! }
//! ```
//! ```
//! fn right(buf: lacre::seal::SecretBuf) -> Option<String> {
//!     serde_json::to_string(&buf.len()).ok()
//! }
//! ```
//! It is no slice, and its bytes do not leave the closure:
//! ```compile_fail,E0614
//! fn wrong(buf: lacre::seal::SecretBuf) -> usize {
//!     (*buf).len()
//! }
//! ```
//! ```compile_fail
//! fn wrong(buf: &lacre::seal::SecretBuf) -> &[u8] {
//!     buf.with(|bytes| bytes)
//! }
//! ```
//! ```compile_fail,E0521
//! fn wrong(buf: &lacre::seal::SecretBuf) -> usize {
//!     let mut kept: &[u8] = &[];
//!     buf.with(|bytes| kept = bytes);
//!     kept.len()
//! }
//! ```
//! ```
//! fn right(buf: &lacre::seal::SecretBuf) -> usize {
//!     let mut kept: usize = 0;
//!     buf.with(|bytes| kept = bytes.len());
//!     kept
//! }
//! ```
//! It goes from thread to thread by being moved, and is read by several only while nobody writes:
//! ```compile_fail,E0502
//! fn wrong(mut buf: lacre::seal::SecretBuf) {
//!     std::thread::scope(|threads| {
//!         threads.spawn(|| buf.with(|bytes| bytes.len()));
//!         buf.with_mut(|bytes| bytes.fill(0));
//!     });
//! }
//! ```
//! ```
//! fn right(mut buf: lacre::seal::SecretBuf) {
//!     std::thread::scope(|threads| {
//!         threads.spawn(|| buf.with(|bytes| bytes.len()));
//!         buf.with(|bytes| bytes.len());
//!     });
//! }
//! ```
//! A key with a deadline is no better:
//! ```compile_fail,E0599
//! fn wrong(dek: lacre::seal::guarded::Dek) -> lacre::seal::guarded::Dek {
//!     dek.clone()
//! }
//! ```
//! ```compile_fail,E0277
//! fn wrong(dek: lacre::seal::guarded::Dek) -> String {
//!     format!("{:?}", dek)
//! }
//! ```
//! ```
//! fn right(mut dek: lacre::seal::guarded::Dek) -> Option<usize> {
//!     dek.with(|bytes| bytes.len()).ok()
//! }
//! ```
