//! Migrations (stub).
