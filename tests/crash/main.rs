//! The daemon is killed and its disk fails, at the points that matter; nothing that was acknowledged is
//! lost, and nothing half done is seen.
//!
//! `model` says what a client knows and checks it afterwards (C1 to C5 of reliability.md, section 5);
//! `kill` has DB-1, `disk` DB-2 and DB-4, `locked` AU-4 and DB-5, `jobs` the rewrap, `provision` the
//! first start, `repeat` requests whose answer was lost, `rotation` RO-5, `server` a PostgreSQL that goes away. Check ids are those of reliability.md.

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
#[path = "../support/postgres.rs"]
mod postgres;
#[path = "../support/shim.rs"]
mod shim;
#[path = "../support/softhsm.rs"]
mod softhsm;

mod disk;
mod jobs;
mod kill;
mod locked;
mod model;
mod provision;
mod repeat;
mod rotation;
mod server;
