//! Lacre: a hardware-backed key service.
//!
//! The program is one daemon; this library exists so that tests, benches and the binary share it.
//! Start with `ARCHITECTURE.md`, then [`seal`], then [`vault`].

pub mod audit;
pub mod cli;
pub mod clock;
pub mod config;
pub mod daemon;
pub mod db;
pub mod http;
pub mod identity;
pub mod ids;
pub mod issuer;
pub mod keys;
pub mod process;
pub mod seal;
pub mod tokens;
pub mod upstream;
pub mod vault;
