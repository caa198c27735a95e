//! `lacre doctor`: what is wrong on this host and what to do, then what the token can do.
//!
//! Reads and measures; changes nothing except that it logs in once, under the same latch as the
//! daemon: a PIN that was refused before is not tried again, and none is tried after a check that
//! says the module must not be loaded.

mod device;
mod files;
mod host;

use serde_json::{Value, json};

use super::error::CliError;
use super::global::{Context, Format};
use super::local::Local;
use super::{local, output};
use crate::db::{OpenError, migrate};
use crate::seal::DeviceName;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre doctor --config /etc/lacre/lacre.toml
  lacre doctor --no-login -o json

Logs in to the token once; a wrong PIN costs one try and stops all further ones (see `lacre hsm unlatch`).";

/// Arguments of `doctor`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Do not load the module and spend no PIN try; the capability report is left out
    #[arg(long)]
    no_login: bool,
}

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Works, and could be better.
    Warn,
    /// Will not work, or must not.
    Fail,
}

/// The result of one check.
#[derive(Debug, serde::Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    pub(crate) check: &'static str,
    /// How it is.
    pub(crate) level: Level,
    /// What was found.
    pub(crate) found: String,
    /// What to do; empty if nothing.
    pub(crate) todo: String,
}

impl Finding {
    /// All is well.
    pub(crate) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, level: Level::Ok, found: found.into(), todo: String::new() }
    }

    /// It works, and could be better.
    pub(crate) fn warn(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check, level: Level::Warn, found: found.into(), todo: todo.into() }
    }

    /// It does not work, or must not.
    pub(crate) fn fail(check: &'static str, found: impl Into<String>, todo: impl Into<String>) -> Self {
        Self { check, level: Level::Fail, found: found.into(), todo: todo.into() }
    }
}

/// Runs the command.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let mut findings = Vec::new();
    let mut capabilities = Value::Null;
    match local::config(context).and_then(|config| Local::of(&config)) {
        Ok(local) => {
            findings.push(Finding::ok("configuration", "read"));
            capabilities = examine(&local, args, context, &mut findings).await;
        }
        Err(error) => {
            findings.push(Finding::fail(
                "configuration",
                error.to_string(),
                "correct the file, or name it with --config",
            ));
        }
    }
    print(context.global.output, &findings, &capabilities)?;
    match findings.iter().filter(|finding| finding.level == Level::Fail).count() {
        0 => Ok(()),
        failed => Err(CliError::Unfit { failed }),
    }
}

/// Looks at everything, cheap things first, and returns the capabilities by device.
async fn examine(local: &Local, args: &Args, context: &Context, findings: &mut Vec<Finding>) -> Value {
    for (name, device) in &local.devices {
        let from = findings.len();
        if let Some(pkcs11) = &device.pkcs11 {
            findings.extend(files::module(pkcs11));
            findings.push(files::pin(pkcs11, context));
        }
        if let Some(tpm) = &device.tpm {
            findings.extend(files::tpm(tpm, context));
        }
        findings.push(files::latch(device, &local.data_dir));
        name_device(name, &mut findings[from..]);
    }
    if local.devices.is_empty() {
        let todo = "add [seal.pkcs11] or [seal.tpm]; hsm-config has examples";
        findings.push(Finding::fail("device", "none is configured", todo));
    }
    findings.push(files::data_dir(&local.data_dir));
    findings.push(host::memlock(&local.memory));
    findings.push(host::guarded_memory(&local.memory));
    findings.push(host::clock(&local.data_dir));
    findings.push(database(local));
    let unsafe_module = findings.iter().any(|f| f.level == Level::Fail && f.check.starts_with("module"));
    if args.no_login || unsafe_module {
        let why = if unsafe_module { "the module must not be loaded as it is" } else { "--no-login" };
        findings.push(Finding::warn("token", format!("not asked: {why}"), "run again without that"));
        return Value::Null;
    }
    let mut capabilities = serde_json::Map::new();
    for (name, config) in &local.devices {
        let from = findings.len();
        let report = device::ask(config, &local.memory, findings).await;
        name_device(name, &mut findings[from..]);
        if !report.is_null() {
            capabilities.insert(name.to_string(), report);
        }
    }
    capabilities.into()
}

/// Says of which device the findings are; the default one needs no name.
fn name_device(name: &DeviceName, findings: &mut [Finding]) {
    if !name.is_default() {
        for finding in findings {
            finding.found = format!("{name}: {}", finding.found);
        }
    }
}

fn database(local: &Local) -> Finding {
    const CHECK: &str = "database";
    match migrate::status(&local.database) {
        Ok(all) => match all.iter().filter(|migration| !migration.applied).count() {
            0 => Finding::ok(CHECK, format!("reachable, {} migrations applied", all.len())),
            count => Finding::warn(
                CHECK,
                format!("reachable, {count} migration(s) pending"),
                "run `lacre db migrate` (SQLite is migrated when the daemon starts)",
            ),
        },
        Err(OpenError::InUse { .. }) => {
            Finding::ok(CHECK, "in use: a daemon is running, so it was not opened")
        }
        Err(error @ OpenError::NewerSchema { .. }) => {
            Finding::fail(CHECK, error.to_string(), "install the newer lacre; there is no way back")
        }
        Err(error) => {
            Finding::fail(CHECK, error.to_string(), "check the URL, the server and the file's rights")
        }
    }
}

fn print(format: Format, findings: &[Finding], capabilities: &Value) -> Result<(), CliError> {
    match format {
        // `capabilities` is from when there was one device.
        Format::Json => output::json(&json!({
            "checks": findings,
            "capabilities": capabilities["default"],
            "capabilities_by_device": capabilities,
        })),
        Format::Ndjson => findings.iter().try_for_each(|finding| output::line(&json!(finding).to_string())),
        Format::Name => {
            let failed = findings.iter().filter(|finding| finding.level == Level::Fail);
            failed.map(|finding| finding.check).try_for_each(output::line)
        }
        Format::Table => {
            findings.iter().try_for_each(|finding| output::line(&row(finding)))?;
            for (name, report) in capabilities.as_object().into_iter().flatten() {
                let of = if name == "default" { String::new() } else { format!(" of device {name}") };
                output::line(&format!("\nThe token{of} can:"))?;
                output::object(Format::Table, report, "")?;
            }
            Ok(())
        }
    }
}

fn row(finding: &Finding) -> String {
    let level = match finding.level {
        Level::Ok => "ok  ",
        Level::Warn => "warn",
        Level::Fail => "fail",
    };
    let todo = if finding.todo.is_empty() { String::new() } else { format!("\n      {}", finding.todo) };
    format!("{level}  {}: {}{todo}", finding.check, finding.found)
}
