//! The device: what every backend must be able to do, and what happens when the device does not.
//!
//! `conformance`, `composite` and `strain` drive `seal` in this process, over the shim and with a token of their
//! own, `sealed` the bytes of values; `attributes` looks at the keys with other programs; `start`, `pin`, `outage`, `slow` and
//! `lost_key` drive real daemons; `rewrap` moves values between KEKs; `shared` and `two` have two devices, `restore` loses one.
//! Check ids are those of reliability.md.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::disallowed_types,
    unreachable_pub,
    reason = "a test fails by panicking"
)]

#[path = "../support/daemon.rs"]
mod daemon;
#[path = "../backend/openssl.rs"]
mod openssl;
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/raw.rs"]
mod raw;
#[path = "../support/shim.rs"]
mod shim;
#[path = "../support/softhsm.rs"]
mod softhsm;
#[path = "../support/swtpm.rs"]
mod swtpm;

mod attributes;
mod child;
mod composite;
mod conformance;
mod every_fault;
mod heals;
mod import;
mod lost_key;
mod outage;
mod pin;
mod restore;
mod rewrap;
mod scenario;
mod sealed;
mod selftest;
mod served;
mod shared;
mod signatures;
mod slow;
mod stage;
mod start;
mod strain;
mod together;
mod two;
