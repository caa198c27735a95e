//! `lacre audit verify`: from the daemon, or offline from a file.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{PAGE, Range, checkpoint, fetch};
use crate::audit::Checkpoint;
use crate::cli::chain::{Walk, seq_of};
use crate::cli::client::Client;
use crate::cli::error::CliError;
use crate::cli::global::{Context, Format};
use crate::cli::output;

/// Arguments of `verify`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Check this file (one record per line) instead of asking the daemon
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
    /// Where the last verified record is remembered; default: per daemon, in the user's state directory
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Check all records again, not only those after the checkpoint
    #[arg(long)]
    full: bool,
    #[command(flatten)]
    range: Range,
}

/// Runs the command.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    let path = args.checkpoint.as_deref();
    if let Some(file) = &args.from_file {
        let trusted = path.map(checkpoint::load).transpose()?.flatten();
        let walk = from_file(file, Walk::new(trusted))?;
        return finish(walk, trusted, path, context);
    }
    let client = Client::connect(context).await?;
    let connection = &context.global.connection;
    let dev_json = connection.dev_json.as_deref().filter(|_| connection.addr.is_none());
    let default = || checkpoint::default_path(&context.env, dev_json, client.addr());
    let path = path.map(Path::to_owned).or_else(default);
    let trusted = path.as_deref().map(checkpoint::load).transpose()?.flatten();
    // From one before the trusted record, so that a log that was cut or rewritten there is noticed.
    let after = trusted.filter(|_| !args.full).map_or(0, |trusted| trusted.seq.saturating_sub(1));
    let walk = from_daemon(&client, Walk::new(trusted), after, &args.range).await?;
    finish(walk, trusted, path.as_deref(), context)
}

async fn from_daemon(
    client: &Client,
    mut walk: Walk,
    mut after: u64,
    range: &Range,
) -> Result<Walk, CliError> {
    loop {
        let page = fetch(client, after, range).await?;
        let count = page.len();
        let last = page.last().and_then(|line| seq_of(line));
        walk.feed(page)?;
        match last {
            // A page that does not lead on would be asked for again for ever.
            Some(last) if count >= PAGE && last > after => after = last,
            _ => return Ok(walk),
        }
    }
}

fn from_file(file: &Path, mut walk: Walk) -> Result<Walk, CliError> {
    let failed = |e: std::io::Error| CliError::local(format!("cannot read {}", file.display()), e);
    let mut lines = BufReader::new(File::open(file).map_err(failed)?).split(b'\n');
    loop {
        let page = lines.by_ref().take(PAGE).collect::<Result<Vec<_>, _>>().map_err(failed)?;
        if page.is_empty() {
            return Ok(walk);
        }
        // Bytes that are no text become a line that is no record, which the check names.
        walk.feed(page.iter().map(|line| String::from_utf8_lossy(line).into_owned()).collect())?;
    }
}

fn finish(
    walk: Walk,
    trusted: Option<Checkpoint>,
    path: Option<&Path>,
    context: &Context,
) -> Result<(), CliError> {
    let (count, head) = walk.end()?;
    if trusted.is_none() {
        context
            .note("note: nothing was verified here before, so a cut at the log's end would not be noticed");
    }
    // A shorter copy of a log that is known further does not take back what is known.
    if let Some(path) = path.filter(|_| trusted.is_none_or(|trusted| head.seq > trusted.seq)) {
        checkpoint::save(path, head)?;
    }
    report(count, head, context.global.output)
}

fn report(count: u64, head: Checkpoint, format: Format) -> Result<(), CliError> {
    let (seq, hash) = (head.seq, hex::encode(head.hash));
    match format {
        Format::Table => output::line(&format!("{count} records, head {seq} {hash}")),
        Format::Name => output::line(&hash),
        Format::Json | Format::Ndjson => {
            output::object(format, &json!({ "records": count, "seq": seq, "hash": hash }), "hash")
        }
    }
}
