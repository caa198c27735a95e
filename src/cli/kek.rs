//! `lacre kek`: key-encryption keys, their rotation, and the rewrap of what they protect.

use clap::{Args, Subcommand, ValueEnum};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Request, encode};
use super::error::CliError;
use super::global::Context;
use super::hsm::device_name;
use super::{output, progress};
use crate::seal::DeviceName;

/// Key-encryption keys: list, rotate, rewrap
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the versions of the key-encryption key
    #[command(after_help = "EXAMPLES
  lacre kek list
  lacre kek list -o json")]
    List,
    /// Make a new version in the HSM; new values are sealed under it at once
    #[command(after_help = "EXAMPLES
  lacre kek rotate
  lacre kek rotate --device new-hsm")]
    Rotate(Rotate),
    /// Move all records to the newest version
    #[command(after_help = "EXAMPLES
  lacre kek rewrap
  lacre kek rewrap --detach -o name

Ctrl-C leaves the job running in the daemon (exit code 130).")]
    Rewrap(Rewrap),
    /// Wait for a rewrap job and show its progress
    #[command(after_help = "EXAMPLES
  lacre kek wait 01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10
  lacre kek wait 01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10 --progress json")]
    Wait(Wait),
    /// Stop a rewrap job; what is moved stays moved
    #[command(after_help = "EXAMPLES
  lacre kek cancel 01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10
  lacre kek cancel 01939d7e-0f2a-7c51-9d6e-3f0c8f1f7a10 -o json")]
    Cancel(Job),
}

/// How progress is shown on standard error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Style {
    /// A bar on a terminal, else one JSON object per line.
    Auto,
    /// One JSON object per line.
    Json,
    /// Nothing.
    None,
}

/// Arguments of `rotate`.
#[derive(Args)]
pub(crate) struct Rotate {
    /// Make the version on this device instead of the one that the configuration places KEKs on
    #[arg(long, value_name = "NAME", value_parser = device_name)]
    device: Option<DeviceName>,
}

/// Arguments of `rewrap`.
#[derive(Args)]
pub(crate) struct Rewrap {
    /// Start the job and return; `lacre kek wait` shows it later
    #[arg(long, conflicts_with = "wait")]
    detach: bool,
    /// Wait until the job has ended (the default)
    #[arg(long)]
    wait: bool,
    /// How progress is shown on standard error
    #[arg(long, value_enum, default_value = "auto", value_name = "STYLE")]
    progress: Style,
}

/// A job.
#[derive(Args)]
pub(crate) struct Job {
    /// The job's id
    job: String,
}

/// Arguments of `wait`.
#[derive(Args)]
pub(crate) struct Wait {
    #[command(flatten)]
    job: Job,
    /// How progress is shown on standard error
    #[arg(long, value_enum, default_value = "auto", value_name = "STYLE")]
    progress: Style,
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let format = context.global.output;
    match command {
        Command::List => list(&client, context).await,
        Command::Rotate(args) => {
            let mut request = Request::new(Method::POST, "/v1/keks/rotate");
            if let Some(device) = args.device {
                request = request.json(json!({ "device": device }));
            }
            let kek = client.json(request).await?;
            context.note("older versions still open what they sealed; `lacre kek rewrap` moves it");
            output::object(format, &kek, "version")
        }
        Command::Rewrap(args) => {
            let job = client.json(Request::new(Method::POST, "/v1/keks/rewrap")).await?;
            if args.detach {
                return output::object(format, &job, "id");
            }
            finish(&client, job, args.progress, context).await
        }
        Command::Wait(args) => {
            let path = format!("/v1/jobs/{}", encode(&args.job.job));
            let job = client.json(Request::new(Method::GET, &path)).await?;
            finish(&client, job, args.progress, context).await
        }
        Command::Cancel(args) => {
            let path = format!("/v1/jobs/{}/cancel", encode(&args.job));
            let reply = client.send(Request::new(Method::POST, &path)).await?;
            // An answer without a body says no more than "accepted".
            if let Ok(job) = serde_json::from_slice::<Value>(&reply.body) {
                return output::object(format, &job, "id");
            }
            context.note("the job was asked to stop");
            Ok(())
        }
    }
}

async fn list(client: &Client, context: &Context) -> Result<(), CliError> {
    let items = client.items("/v1/keks", None).await?;
    let columns = [
        ("VERSION", "version"),
        ("STATE", "state"),
        ("DEVICE", "device"),
        ("ROLE", "role"),
        ("MECHANISM", "mechanism"),
        ("RECORDS", "records"),
        ("WRAPS", "wraps"),
        ("BUDGET", "wrap_budget"),
        ("ACTIVATED", "activated_at"),
        ("KEY", "key_id"),
    ];
    output::list(context.global.output, &items, &columns, "version")
}

/// Follows the job to its end; records that failed are a partial success.
async fn finish(client: &Client, job: Value, style: Style, context: &Context) -> Result<(), CliError> {
    let style = if context.global.quiet { Style::None } else { style };
    let job = progress::follow(client, job, style).await?;
    output::object(context.global.output, &job, "id")?;
    let failed = job["failed"].as_u64().unwrap_or(0);
    match job["state"].as_str() {
        Some("succeeded") if failed == 0 => Ok(()),
        Some("cancelled") if failed == 0 => {
            context.note("the job was cancelled; what is moved stays moved");
            Ok(())
        }
        _ => Err(CliError::Partial {
            failed,
            total: job["total"].as_u64().unwrap_or(0),
            last_error: job["last_error"].as_str().map(str::to_owned),
        }),
    }
}
