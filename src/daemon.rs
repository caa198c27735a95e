//! Daemon (stub).
