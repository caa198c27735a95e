//! `lacre status`: whether the daemon can work, and with what.

use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Request};
use super::error::CliError;
use super::global::{Context, Format};
use super::output;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre status
  lacre status -o json --addr unix:///run/lacre/lacre.sock

EXIT CODES
  0  ready
  1  no answer, or another error
  2  reachable but not usable (HSM away, signing key missing, key unfit, schema newer)";

/// Arguments of `status`.
#[derive(clap::Args)]
pub(crate) struct Args {}

/// Runs the command.
pub(crate) async fn run(context: &Context) -> Result<(), CliError> {
    // A daemon whose HSM is away cannot issue tokens, and that is an answer too.
    let (client, refused) = match Client::connect(context).await {
        Ok(client) => (client, None),
        Err(error @ CliError::Refused(_)) => (Client::anonymous(context)?, Some(error)),
        Err(error) => return Err(error),
    };
    let (ready, checks) = client.ready().await?;
    let status = match refused {
        None => client.json(Request::new(Method::GET, "/v1/status")).await,
        Some(error) => Err(error),
    };
    let details = match status {
        Ok(details) => details,
        Err(error @ CliError::Refused(_)) => {
            context.note(&format!("note: no details without a token: {error}"));
            Value::Null
        }
        Err(error) => return Err(error),
    };
    if let Some(since) = details["quarantined_at"].as_str() {
        context.note(&format!(
            "QUARANTINE since {since}: restored, nothing scheduled runs; `lacre restore release` ends it"
        ));
    }
    print(context.global.output, ready, &checks, &details)?;
    if ready { Ok(()) } else { Err(CliError::NotUsable { addr: client.addr().to_owned() }) }
}

fn print(format: Format, ready: bool, checks: &Value, details: &Value) -> Result<(), CliError> {
    let word = if ready { "ready" } else { "not usable" };
    match format {
        Format::Name => output::line(word),
        Format::Json | Format::Ndjson => output::object(
            format,
            &json!({ "ready": ready, "readiness": checks, "status": details }),
            "ready",
        ),
        Format::Table => {
            let mut shown = json!({ "state": word, "check": by_name(checks) });
            if let (Some(all), Some(more)) = (shown.as_object_mut(), details.as_object()) {
                // What the checks say already.
                let more = more.iter().filter(|(name, _)| !["ready", "failing"].contains(&name.as_str()));
                all.extend(more.map(|(name, value)| (name.clone(), value.clone())));
            }
            output::object(format, &shown, "state")
        }
    }
}

/// One line per check: `ok`, or what is wrong.
fn by_name(readiness: &Value) -> Value {
    let checks = readiness["checks"].as_array().map_or(&[][..], Vec::as_slice);
    let line = |check: &Value| {
        let name = check["name"].as_str()?.to_owned();
        let is_ok = check["ok"].as_bool().unwrap_or_default();
        let said = if is_ok { "ok" } else { check["reason"].as_str().unwrap_or("failing") };
        Some((name, json!(said)))
    };
    checks.iter().filter_map(line).collect::<serde_json::Map<_, _>>().into()
}
