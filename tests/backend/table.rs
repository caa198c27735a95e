//! The table of devices in README.md: what `Device::capabilities` said in this run.
//!
//! `target/capabilities.md` has what was found. README.md has the same between two comments;
//! `make capabilities` (this test with `LACRE_UPDATE_README=1`) puts it there. The table has nothing that
//! varies from machine to machine: no speeds, no serial numbers.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::stage::{self, Backend};

const BEGIN: &str = "<!-- capabilities: begin -->\n";
const END: &str = "<!-- capabilities: end -->\n";

const HEAD: &str = "\
| device | data keys are wrapped by | ES256 | ES384 | RS256 | PS256 | RSA up to | HS256 | keys live in | refuses to export them | evidence done without |
|---|---|---|---|---|---|---|---|---|---|---|
";

pub async fn the_readme_says_what_was_measured(backends: &[&'static Backend]) {
    let mut rows = String::from(HEAD);
    for backend in backends {
        let stage = stage::of(backend).await;
        let device = stage.start().await;
        rows.push_str(&row(backend.title, stage.capabilities(&device).await));
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    fs::write(root.join("target/capabilities.md"), &rows).unwrap();

    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let (before, rest) = readme.split_once(BEGIN).expect("README.md has the begin of the table");
    let (table, after) = rest.split_once(END).expect("README.md has the end of the table");
    if std::env::var_os("LACRE_UPDATE_README").is_some() {
        fs::write(root.join("README.md"), format!("{before}{BEGIN}{rows}{END}{after}")).unwrap();
        return;
    }
    assert!(
        table == rows,
        "README.md has another table than was found; `make capabilities` replaces it:\n{rows}"
    );
}

/// One place for all keys, or one for each kind.
fn lives_in(places: &Value) -> String {
    match places {
        Value::String(place) => place.clone(),
        Value::Object(places) => {
            let each =
                places.iter().map(|(kind, place)| format!("{kind}: {}", place.as_str().unwrap_or("-")));
            each.collect::<Vec<_>>().join(", ")
        }
        _ => "-".to_owned(),
    }
}

fn row(title: &str, capabilities: &Value) -> String {
    let mark = |value: &Value| match value {
        Value::Bool(true) => "yes",
        Value::Bool(false) => "no",
        _ => "-",
    };
    let algorithm = |name: &str| mark(&capabilities["algorithms"][name]);
    let sizes = [("rsa-4096", "4096"), ("rsa-3072", "3072"), ("rsa-2048", "2048")];
    let largest = sizes.into_iter().find(|(spec, _)| capabilities["keys"][*spec] == true);
    let without = capabilities["without_evidence"].as_array().map(Vec::as_slice).unwrap_or_default();
    let without: Vec<_> = without.iter().filter_map(Value::as_str).map(|name| format!("`{name}`")).collect();
    let cells = [
        title.to_owned(),
        capabilities["wrap"].as_str().map_or_else(|| "-".to_owned(), |name| format!("`{name}`")),
        algorithm("ES256").to_owned(),
        algorithm("ES384").to_owned(),
        algorithm("RS256").to_owned(),
        algorithm("PS256").to_owned(),
        largest.map_or("-", |(_, bits)| bits).to_owned(),
        algorithm("HS256").to_owned(),
        lives_in(&capabilities["keys_live_in"]),
        mark(&capabilities["refuses_to_export"]).to_owned(),
        if without.is_empty() { "none".to_owned() } else { without.join(" ") },
    ];
    format!("| {} |\n", cells.join(" | "))
}
