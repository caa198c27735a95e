//! What the benches share: flags, medians, plain tables.

#![allow(dead_code, reason = "each bench uses a part of it")]

use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};

/// Flags of the form `--name value`, and `--name` alone. Cargo's own `--bench` is ignored.
pub struct Flags(Vec<String>);

impl Flags {
    /// Of this process.
    pub fn of_process() -> Self {
        Self(std::env::args().skip(1).collect())
    }

    /// Whether a flag was given.
    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|given| given == name)
    }

    /// A flag's number, or `default`.
    pub fn number(&self, name: &str, default: u64) -> u64 {
        let value = self.0.iter().position(|given| given == name).and_then(|at| self.0.get(at + 1));
        value.map_or(default, |text| {
            text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not {text:?}"))
        })
    }
}

/// The middle one.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// A rate with three or more digits, for people.
pub fn rate(per_second: f64) -> String {
    format!("{per_second:.0}")
}

/// A part of a whole.
pub fn percent(part: f64, whole: f64) -> String {
    format!("{:.0} %", 100.0 * part / whole)
}

/// Milliseconds with two places.
pub fn millis(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

/// Prints a table under a title; the first column is text, the others are numbers.
pub fn print_table(title: &str, head: &[&str], rows: &[Vec<String>]) {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(head.to_vec());
    table.add_rows(rows.to_vec());
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("\n{title}\n{table}");
}
