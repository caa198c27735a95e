//! The configurations in hsm-config load as they are, and with every commented default switched on.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

use lacre::config::Config;

fn files() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("hsm-config");
    let paths = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|ending| ending == "toml")).collect()
}

/// Whether a commented line is a setting or a section and not prose.
fn is_setting(line: &str) -> bool {
    let rest = line.strip_prefix("# ").unwrap_or_default();
    let name = rest.split([' ', '=']).next().unwrap_or_default();
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    (is_name && rest[name.len()..].starts_with(" = ")) || rest.starts_with('[')
}

#[test]
fn every_configuration_in_the_repository_loads() {
    assert!(files().len() >= 3);
    for path in files() {
        Config::load(Some(&path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

#[test]
fn every_commented_default_is_a_setting_that_exists() {
    let dir = tempfile::tempdir().unwrap();
    let mut switched_on = 0;
    for path in files() {
        let text = fs::read_to_string(&path).unwrap();
        let lines = text.lines().map(|line| {
            // Two ways to name one token exclude each other.
            let instead = ["# uri = ", "# token = "].iter().any(|start| line.starts_with(start));
            if is_setting(line) && !instead {
                switched_on += 1;
                line[2..].to_owned()
            } else {
                line.to_owned()
            }
        });
        let text = lines.collect::<Vec<_>>().join("\n");
        let all = dir.path().join(path.file_name().unwrap());
        fs::write(&all, text).unwrap();
        Config::load(Some(&all)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
    assert!(switched_on > 15, "only {switched_on} commented settings found");
}
