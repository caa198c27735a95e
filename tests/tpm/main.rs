//! The TPM: what is its own beside the conformance rules. Check ids are those of reliability.md, 5.5.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "../support/swtpm.rs"]
mod swtpm;

mod anchor;
mod daemon;
mod faults;
mod foreign;
mod keys;
mod memory;
mod owner;
mod policy;
mod proxy;
mod selftest;
mod slots;
mod stage;
mod wire;
