//! Federated token sets as their users see them: kept, refreshed once, never lost and never found twice.
//!
//! `stage` has a daemon, a fake identity provider (`tests/support/idp.rs`, looked at by `fake`) and what a user does
//! with them. `flow` and `checks` are the contract's wire behaviour (contracts/logto.md, section 7), `sso` the same of
//! enterprises, `refresh` and `answers` section 8 with ID-2 to ID-8 and ID-10, `background` what is refreshed without being
//! read, `tls` ID-9, `attacks` ID-11 to ID-13, `id_tokens` the rest of ID-12, `together` MD-1 and MD-2, `crash` ID-1,
//! `spool` answers that the database does not take, `delete` what ends a set and ID-15, `binding` CB-1, CB-5 and AP-2,
//! `upkeep` the log, the breaker and other KEKs, `exchange` how applications come to a token without its user.
//! `provider` is the whole with a real OpenID provider, `logto_client` the published client of the Management API.
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
#[allow(dead_code, unused_imports, unused_macros, reason = "another test program uses the rest")]
#[path = "../api/stage.rs"]
mod ground;
#[path = "../support/idp.rs"]
mod idp;
#[path = "../support/postgres.rs"]
mod postgres;
#[allow(dead_code, reason = "another test program uses the rest")]
#[path = "../main_job/idp.rs"]
mod scripts;

mod answers;
mod attacks;
mod background;
mod binding;
mod checks;
mod crash;
mod delete;
mod exchange;
mod fake;
mod flow;
mod id_tokens;
mod logto_client;
mod provider;
mod refresh;
mod spool;
mod sso;
mod stage;
mod tls;
mod together;
mod upkeep;
