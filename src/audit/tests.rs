//! The log on real databases.
