//! Results on standard output: tables for people, JSON for programs.
//!
//! Everything that came from a server passes [`printable`] before a terminal sees it as text, so
//! that a name cannot move the cursor. No colours at all, which also honours `NO_COLOR`.

use std::io::{self, ErrorKind, Write};

use comfy_table::{Table, presets};
use serde_json::Value;

use super::error::CliError;
use super::global::Format;

/// A column of a table: its title and the JSON member it shows.
pub(crate) type Column = (&'static str, &'static str);

/// Replaces control characters except the line end.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// Writes bytes to standard output as they are.
pub(crate) fn raw(bytes: &[u8]) -> Result<(), CliError> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| match error.kind() {
        ErrorKind::BrokenPipe => CliError::Closed,
        _ => CliError::local("cannot write to standard output", error),
    })
}

/// Writes one line of text.
pub(crate) fn line(text: &str) -> Result<(), CliError> {
    raw(format!("{}\n", printable(text)).as_bytes())
}

/// Writes one JSON document, indented.
pub(crate) fn json(value: &Value) -> Result<(), CliError> {
    let text = serde_json::to_string_pretty(value).map_err(|e| CliError::local("cannot print JSON", e))?;
    raw(format!("{text}\n").as_bytes())
}

/// Prints one object: as rows of name and value, or as JSON; `name` is the member of `-o name`.
pub(crate) fn object(format: Format, value: &Value, name: &str) -> Result<(), CliError> {
    match format {
        Format::Table => line(&render_pairs(value)),
        Format::Json => json(value),
        Format::Ndjson => line(&value.to_string()),
        Format::Name => line(&text(&value[name])),
    }
}

/// Prints a list: as a table with `columns`, or as a JSON object with the member `items`.
pub(crate) fn list(format: Format, items: &[Value], columns: &[Column], name: &str) -> Result<(), CliError> {
    match format {
        Format::Table => line(&render_table(items, columns)),
        Format::Json => json(&serde_json::json!({ "items": items })),
        Format::Ndjson => items.iter().try_for_each(|item| line(&item.to_string())),
        Format::Name => items.iter().try_for_each(|item| line(&text(&item[name]))),
    }
}

fn render_table(items: &[Value], columns: &[Column]) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(columns.iter().map(|(title, _)| *title).collect::<Vec<_>>());
    for item in items {
        table.add_row(columns.iter().map(|(_, member)| printable(&text(&item[*member]))).collect::<Vec<_>>());
    }
    trimmed(&table)
}

fn render_pairs(value: &Value) -> String {
    let mut rows = Vec::new();
    flatten("", value, &mut rows);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    for (name, value) in rows {
        table.add_row(vec![printable(&name), printable(&value)]);
    }
    trimmed(&table)
}

fn trimmed(table: &Table) -> String {
    let lines: Vec<_> = table.lines().map(|line| line.trim_end().to_owned()).collect();
    lines.join("\n")
}

/// Names nested members by their path, so that any status document reads as a list.
pub(crate) fn flatten(path: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(members) => members.iter().for_each(|(name, inner)| flatten(&below(name), inner, rows)),
        Value::Array(items) if items.iter().any(|item| item.is_object() || item.is_array()) => {
            items.iter().enumerate().for_each(|(at, inner)| flatten(&below(&at.to_string()), inner, rows));
        }
        other => rows.push((path.to_owned(), text(other))),
    }
}

/// A JSON value as a cell.
pub(crate) fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text).collect::<Vec<_>>().join(" "),
        Value::Object(members) if members.is_empty() => "-".to_owned(),
        Value::Object(members) => {
            members.iter().map(|(k, v)| format!("{k}={}", text(v))).collect::<Vec<_>>().join(",")
        }
        other => other.to_string(),
    }
}
