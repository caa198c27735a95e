//! `lacre audit verify`: from the daemon, or offline from a file.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::{PAGE, checkpoint, fetch, lines};
use crate::cli::chain::{self, Checkpoint};
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
}

/// Runs the command.
pub(crate) async fn run(args: &Args, context: &Context) -> Result<(), CliError> {
    match &args.from_file {
        Some(file) => from_file(file, args.checkpoint.as_deref(), context),
        None => from_daemon(args.checkpoint.as_deref(), context).await,
    }
}

async fn from_daemon(file: Option<&Path>, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let path = file.map(Path::to_owned).or_else(|| checkpoint::default_path(&context.env, client.addr()));
    let trusted = path.as_deref().map(checkpoint::load).transpose()?.flatten();
    let mut walk = Walk::new(trusted);
    // From one before the trusted record, so that a log that was cut or rewritten there is noticed.
    let mut after = trusted.map_or(0, |trusted| trusted.seq.saturating_sub(1));
    loop {
        let page = fetch(&client, after).await?;
        let mut count = 0;
        for line in lines(&page) {
            walk.step(line)?;
            count += 1;
        }
        if count < PAGE {
            break;
        }
        after = walk.head.seq;
    }
    finish(&walk, path.as_deref(), context)
}

fn from_file(file: &Path, trusted_file: Option<&Path>, context: &Context) -> Result<(), CliError> {
    let shown = file.display();
    let opened = File::open(file).map_err(|e| CliError::local(format!("cannot open {shown}"), e))?;
    let trusted = trusted_file.map(checkpoint::load).transpose()?.flatten();
    let mut walk = Walk::new(trusted);
    for line in BufReader::new(opened).split(b'\n') {
        let line = line.map_err(|e| CliError::local(format!("cannot read {shown}"), e))?;
        if !line.is_empty() {
            walk.step(&line)?;
        }
    }
    finish(&walk, trusted_file, context)
}

/// The way along the log: every record fits the one before, and the trusted one is met unchanged.
struct Walk {
    trusted: Option<Checkpoint>,
    head: Checkpoint,
    /// Records checked.
    count: u64,
    started: bool,
    met: bool,
}

impl Walk {
    fn new(trusted: Option<Checkpoint>) -> Self {
        let met = trusted.is_none_or(|trusted| trusted.seq == 0);
        Self { trusted, head: Checkpoint::GENESIS, count: 0, started: false, met }
    }

    fn step(&mut self, line: &[u8]) -> Result<(), CliError> {
        if !self.started {
            self.start(line)?;
            if self.met && self.head.seq == chain::seq_of(line).unwrap_or(0) {
                return Ok(());
            }
        }
        self.head = chain::verify([line], self.head)?;
        self.count += 1;
        match self.trusted {
            Some(trusted) if trusted.seq == self.head.seq => self.meet(trusted),
            _ => Ok(()),
        }
    }

    /// Finds out where the lines begin: at the log's beginning, at the trusted record, or right after it.
    fn start(&mut self, line: &[u8]) -> Result<(), CliError> {
        self.started = true;
        let first = chain::seq_of(line);
        match (self.trusted, first) {
            (Some(trusted), Some(seq)) if seq == trusted.seq && seq > 1 => {
                self.head = Checkpoint { seq, hash: chain::hash_of(line) };
                self.meet(trusted)
            }
            (Some(trusted), Some(seq)) if seq == trusted.seq + 1 => {
                self.head = trusted;
                self.met = true;
                Ok(())
            }
            (None, Some(seq)) if seq > 1 => Err(CliError::BadRecord {
                seq: 1,
                reason: format!("the log begins at record {seq}, and no --checkpoint says what was before"),
            }),
            _ => Ok(()),
        }
    }

    fn meet(&mut self, trusted: Checkpoint) -> Result<(), CliError> {
        self.met = true;
        match self.head == trusted {
            true => Ok(()),
            false => Err(CliError::BadRecord {
                seq: trusted.seq,
                reason: "it is not the record that was verified here before".to_owned(),
            }),
        }
    }
}

fn finish(walk: &Walk, path: Option<&Path>, context: &Context) -> Result<(), CliError> {
    if let (Some(trusted), false) = (walk.trusted, walk.met) {
        return Err(CliError::BadRecord {
            seq: walk.head.seq + 1,
            reason: format!("the log ends before record {}, which was verified here before", trusted.seq),
        });
    }
    if walk.trusted.is_none() {
        context
            .note("note: nothing was verified here before, so a cut at the log's end would not be noticed");
    }
    if let Some(path) = path.filter(|_| Some(walk.head) != walk.trusted) {
        checkpoint::save(path, walk.head)?;
    }
    report(walk, context.global.output)
}

fn report(walk: &Walk, format: Format) -> Result<(), CliError> {
    let hash = hex::encode(walk.head.hash);
    match format {
        Format::Table => output::line(&format!("{} records, head {} {hash}", walk.count, walk.head.seq)),
        Format::Name => output::line(&hash),
        Format::Json | Format::Ndjson => {
            output::json(&json!({ "records": walk.count, "seq": walk.head.seq, "hash": hash }))
        }
    }
}
