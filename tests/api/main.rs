//! The daemon as its clients see it, on SQLite and on PostgreSQL.
//!
//! `stage` starts a daemon on either engine and reaches behind it; `tampering` and `tenants` have CB-1 and
//! CB-7, `canary` AU-9, `rights` who may call what, `requests` what is asked and refused, `keks` rotation, rewrap and the wrap budget,
//! `erased` ME-2, `wire` what is not HTTP as it should be, `listeners` TLS, sockets and limits, `residue`
//! the daemon's memory, `signing_keys`, `logto` and `jwks` the rings of signing keys, `signing` tokens and cookies for
//! other systems. Check ids are those of reliability.md.

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

mod canary;
mod erased;
mod jwks;
mod keks;
mod listeners;
mod logto;
mod requests;
mod residue;
mod rights;
mod signing;
mod signing_keys;
mod stage;
mod tampering;
mod tenants;
mod wire;

use daemon::TestDaemon;

#[tokio::test]
async fn a_secret_survives_a_restart_byte_for_byte() {
    let mut daemon = TestDaemon::dev().await;
    let value = daemon.secret("first");
    let id = daemon.api().await.create("first", &value).await["id"].as_str().unwrap().to_owned();

    daemon.restart().await;

    assert_eq!(daemon.api().await.value(&id).await, value);
    daemon.finish().await;
}
