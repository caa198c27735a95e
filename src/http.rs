//! HTTP (stub).
