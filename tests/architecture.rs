//! The architecture as a test: who may name whom, and how large a piece may grow.
//!
//! Works on the text of the sources, so that a breach is named by file even where the code does not
//! compile. The reasons are in `ARCHITECTURE.md`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

/// For each top-level module: the other top-level modules it may name. No row: none at all.
///
/// `identity` names `ids` because a caller has a tenant.
const ARROWS: &str = "
    identity -> ids
    upstream -> clock
    audit  -> clock db identity ids seal
    keys   -> clock db identity ids seal audit
    vault  -> clock db identity ids seal audit
    tokens -> clock db identity ids audit vault upstream
    issuer -> clock db identity ids audit keys tokens
    http   -> identity ids audit issuer keys vault tokens
";

/// These put the parts together and may name everything.
const ASSEMBLERS: [&str; 5] = ["main", "lib", "cli", "daemon", "config"];

/// For each third-party crate: the places that may name it. `x` is `x.rs` and everything in `x/`.
const EDGES: &str = "
    cryptoki         -> seal/pkcs11
    cryptoki_sys     -> seal/pkcs11
    pk11_uri_parser  -> seal/pkcs11
    tss_esapi        -> seal/tpm
    diesel           -> db audit/store issuer/store keys/store tokens/store vault/store
    diesel_migrations -> db
    libsqlite3_sys   -> db
    actix_web        -> http daemon
    actix_tls        -> http daemon
    rustls           -> daemon http cli upstream
    reqwest          -> cli upstream
    hyper            -> upstream
    config           -> config
    clap             -> cli main
    indicatif        -> cli
    comfy_table      -> cli
    seccompiler      -> seal/child
    rpassword        -> cli seal/pin seal/pkcs11
    jsonwebtoken     -> issuer keys upstream
    sd_notify        -> daemon
";

struct Source {
    /// Below `src`, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// Without comment lines: prose may name anything.
    fn code(&self) -> String {
        let lines = self.text.lines().filter(|line| !line.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    }

    fn module(&self) -> &str {
        self.path.split(['/', '.']).next().unwrap()
    }

    /// Whether this is `place.rs`, `place_more.rs`, or lies below `place/`.
    fn is_in(&self, place: &str) -> bool {
        let rest = self.path.strip_prefix(place);
        rest.is_some_and(|rest| rest.starts_with('/') || rest.starts_with(".rs") || rest.starts_with('_'))
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let below = path.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
                found.push(Source { path: below, text: fs::read_to_string(&path).unwrap() });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(found.len() > 10, "the sources were not found");
    found
}

fn table(text: &'static str) -> impl Iterator<Item = (&'static str, Vec<&'static str>)> {
    let rows = text.lines().filter_map(|row| row.split_once("->"));
    rows.map(|(name, names)| (name.trim(), names.split_whitespace().collect()))
}

/// Whether a character ends a Rust name.
fn not_in_a_name(c: char) -> bool {
    !c.is_alphanumeric() && c != '_'
}

/// Whether `code` uses the crate `name` in a path: `name::`, not as the end of another name or path.
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let begins = code[..at].chars().next_back().is_none_or(|c| not_in_a_name(c) && c != ':');
        begins && code[at + name.len()..].starts_with("::")
    })
}

fn expect_none(rule: &str, breaches: &[String]) {
    assert!(breaches.is_empty(), "{rule}:\n{}", breaches.join("\n"));
}

#[test]
fn modules_name_only_what_is_below_them() {
    let mut breaches = Vec::new();
    for source in sources() {
        let module = source.module();
        if ASSEMBLERS.contains(&module) {
            continue;
        }
        let allowed =
            table(ARROWS).find(|(name, _)| *name == module).map(|(_, names)| names).unwrap_or_default();
        for path in source.code().split("crate::").skip(1) {
            // Each module has its own section's type, and a duration is written alike in all of them.
            if path.starts_with("config::seconds") {
                continue;
            }
            // Empty for `crate::{a, b}`: one `use` per module, so that arrows can be searched.
            let used = match path.split(not_in_a_name).next().unwrap() {
                // A macro of `db` lives at the crate's root, as macros do.
                "with_conn" => "db",
                name => name,
            };
            // The test of what a panic leaves behind has its handlers hold guarded memory.
            let is_that_test = source.path == "http/tests.rs" && used == "seal";
            if used != module && !allowed.contains(&used) && !is_that_test {
                breaches.push(format!("src/{} names crate::{used}", source.path));
            }
        }
    }
    expect_none("forbidden arrows", &breaches);
}

#[test]
fn a_third_party_crate_is_named_where_it_belongs() {
    let mut breaches = Vec::new();
    for source in sources() {
        let code = source.code();
        for (name, places) in table(EDGES) {
            // `crate::config` is ours; the crate of that name is met as `config::` at a path's begin.
            let ours = name == "config" && ASSEMBLERS.contains(&source.module());
            let belongs = ours || places.iter().any(|place| source.is_in(place));
            if !belongs && names_crate(&code, name) {
                breaches.push(format!("src/{} names {name}", source.path));
            }
        }
    }
    expect_none("third-party crates outside of their place", &breaches);
}

#[test]
fn pure_models_do_no_input_or_output() {
    let mut breaches = Vec::new();
    for source in sources().iter().filter(|source| source.path.ends_with("/model.rs")) {
        let code = source.code();
        for word in ["async fn", ".await", "crate::db", "Sealer", "tokio", "getrandom", "std::fs", "std::net"]
        {
            if code.contains(word) {
                breaches.push(format!("src/{} contains {word}", source.path));
            }
        }
    }
    expect_none("models that do more than think", &breaches);
}

#[test]
fn random_values_are_made_in_few_places() {
    // Keys and nonces, ids, client secrets, and the PIN of a development token.
    let makers = ["seal", "ids", "issuer/apps", "daemon/dev"];
    let sources = sources();
    let others = sources.iter().filter(|source| !makers.iter().any(|maker| source.is_in(maker)));
    let found = others.filter(|source| source.code().contains("getrandom::fill"));
    let breaches: Vec<_> = found.map(|source| format!("src/{}", source.path)).collect();
    expect_none("random values made elsewhere", &breaches);
}

#[test]
fn nothing_is_global_and_nothing_is_left_open() {
    let mut breaches = Vec::new();
    for source in sources() {
        let code = source.code();
        for (number, line) in code.lines().enumerate() {
            let line = line.trim_start();
            let is_static =
                ["static ", "pub static ", "pub(crate) static ", "pub(super) static ", "thread_local!"]
                    .iter()
                    .any(|word| line.starts_with(word));
            // The one static a program must have to choose its allocator.
            if is_static && source.path != "main.rs" && source.path != "lib.rs" {
                breaches.push(format!("src/{}: {line} (code line {})", source.path, number + 1));
            }
        }
        for word in ["todo!(", "unimplemented!(", "#[allow(", "#![allow(", "dbg!("] {
            if code.contains(word) {
                breaches.push(format!("src/{} contains {word}", source.path));
            }
        }
    }
    expect_none("not allowed in src", &breaches);
}

#[test]
fn every_file_begins_with_its_contract_and_stays_readable() {
    let mut breaches = Vec::new();
    for Source { path, text } in sources() {
        let lines = text.lines().count();
        // Generated by diesel.
        let limit = if path == "db/schema.rs" { usize::MAX } else { 600 };
        if lines > limit {
            breaches.push(format!("src/{path} has {lines} lines, more than {limit}"));
        }
        if path == "daemon.rs" && lines > 150 {
            breaches.push(format!("src/{path} has {lines} lines, more than 150: a part starts itself"));
        }
        if !text.starts_with("//!") {
            breaches.push(format!("src/{path} does not begin with //!"));
        }
        if path.ends_with("/mod.rs") {
            breaches.push(format!("src/{path}: name the file after its module"));
        }
        if path.split('/').count() > 4 {
            breaches.push(format!("src/{path} is more than three folders deep"));
        }
    }
    expect_none("files", &breaches);
}

#[test]
fn the_boundary_to_a_device_stays_narrow() {
    let sources = sources();
    let source =
        sources.iter().find(|source| source.path == "seal/backend.rs").expect("seal/backend.rs is there");
    let code = source.code();
    let after = code.split("pub trait Backend").nth(1).expect("seal/backend.rs has the trait Backend");
    // rustfmt puts the closing brace of an item that stands by itself at the line's begin.
    let body = after.split("\n}").next().unwrap();
    let methods = body.matches("fn ").count();
    assert!((1..=8).contains(&methods), "Backend has {methods} methods; a ninth is a sign of a second trait");
}

#[test]
fn a_log_line_or_an_error_cannot_show_a_secret_buffer() {
    let mut breaches = Vec::new();
    for source in sources().iter().filter(|source| source.is_in("seal")) {
        let code = source.code();
        for holder in ["SecretBuf", "Opened"] {
            for bad in ["Debug", "Display", "Clone", "Serialize"] {
                if code.contains(&format!("{bad} for {holder}")) {
                    breaches.push(format!("src/{} implements {bad} for {holder}", source.path));
                }
            }
        }
    }
    expect_none("secrets that could be copied or shown", &breaches);
}
