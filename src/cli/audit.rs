//! `lacre audit`: read the audit log and check that nobody changed it.
//!
//! `verify` keeps a checkpoint on this machine: what it has seen once cannot be taken back or
//! rewritten without being noticed here, even by somebody who owns the server and its database.

mod checkpoint;
mod verify;

use std::collections::VecDeque;
use std::time::Duration;

use clap::{Args, Subcommand};
use reqwest::Method;
use reqwest::header::ACCEPT;
use serde_json::Value;

use super::client::{Client, Request};
use super::error::CliError;
use super::global::{Context, Format};
use super::{chain, output};

/// Records per request.
const PAGE: usize = 1000;
const POLL: Duration = Duration::from_secs(1);

/// Read and check the audit log
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Print records, the newest last
    #[command(after_help = "EXAMPLES
  lacre audit tail -f
  lacre audit tail --after 1200 -o ndjson > records.ndjson

With -o json or ndjson the exact bytes of each record are printed, one per line.")]
    Tail(Tail),
    /// Check the log's chain, from what this machine has verified before
    #[command(after_help = "EXAMPLES
  lacre audit verify
  lacre audit verify --from-file records.ndjson --checkpoint trusted.json

A bad record gives exit code 2. Without a checkpoint, a log that was cut at its end looks whole.")]
    Verify(verify::Args),
}

/// Arguments of `tail`.
#[derive(Args)]
pub(crate) struct Tail {
    /// Go on printing new records
    #[arg(short, long)]
    follow: bool,
    /// All records after this number; default: the last ones
    #[arg(long, value_name = "SEQ")]
    after: Option<u64>,
    /// How many of the last records, without --after
    #[arg(short = 'n', long, default_value_t = 20, value_name = "N")]
    lines: usize,
    #[command(flatten)]
    range: Range,
}

/// Whose records.
#[derive(Args)]
pub(crate) struct Range {
    /// The records of all tenants: the whole chain. Only over the daemon's Unix socket
    #[arg(long)]
    all_tenants: bool,
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Tail(args) => tail(&args, context).await,
        Command::Verify(args) => verify::run(&args, context).await,
    }
}

async fn tail(args: &Tail, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let format = context.global.output;
    let mut after = match args.after {
        Some(after) => after,
        None => last(&client, args, format).await?,
    };
    loop {
        let page = fetch(&client, after, &args.range).await?;
        for line in &page {
            print(line, format)?;
            after = number(&client, line)?;
        }
        if page.len() < PAGE && !args.follow {
            return Ok(());
        }
        if page.len() < PAGE {
            client.interruptible(tokio::time::sleep(POLL)).await?;
        }
    }
}

/// Prints the last records and returns the number of the last one.
async fn last(client: &Client, args: &Tail, format: Format) -> Result<u64, CliError> {
    let mut after = 0;
    let mut newest = VecDeque::new();
    loop {
        let page = fetch(client, after, &args.range).await?;
        let full = page.len() >= PAGE;
        for line in page {
            after = number(client, &line)?;
            newest.push_back(line);
            if newest.len() > args.lines {
                newest.pop_front();
            }
        }
        if !full {
            newest.iter().try_for_each(|line| print(line, format))?;
            return Ok(after);
        }
    }
}

/// One page of records after `after`, as the server keeps them.
async fn fetch(client: &Client, after: u64, range: &Range) -> Result<Vec<String>, CliError> {
    let tenants = if range.all_tenants { "&tenants=all" } else { "" };
    let path = format!("/v1/audit/events?after={after}&limit={PAGE}{tenants}");
    let request = Request::new(Method::GET, &path).header(ACCEPT, "application/x-ndjson");
    let body = client.send(request).await?.body;
    let text = std::str::from_utf8(&body).map_err(|_| client.strange("audit records that are not text"))?;
    Ok(text.split('\n').filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

fn number(client: &Client, line: &str) -> Result<u64, CliError> {
    chain::seq_of(line).ok_or_else(|| client.strange("a line that is not an audit record"))
}

fn print(line: &str, format: Format) -> Result<(), CliError> {
    match format {
        Format::Json | Format::Ndjson => output::raw(format!("{line}\n").as_bytes()),
        Format::Name => output::line(&chain::seq_of(line).unwrap_or(0).to_string()),
        Format::Table => output::line(&summary(line)),
    }
}

/// A record in one line for people: number and time first, then whatever else it says, except the
/// chain's hash.
fn summary(line: &str) -> String {
    let record: Value = serde_json::from_str(line).unwrap_or_default();
    let mut rows = Vec::new();
    output::flatten("", &record, &mut rows);
    let rest = rows.iter().filter(|(name, _)| !matches!(name.as_str(), "seq" | "time" | "prev" | "v"));
    let rest: Vec<_> = rest.map(|(name, value)| format!("{name}={value}")).collect();
    format!("{:>7} {} {}", output::text(&record["seq"]), output::text(&record["time"]), rest.join(" "))
}
