//! `lacre secrets`: store, show, release and delete secrets.
//!
//! Values come from stdin, a file or a prompt. A value leaves only with `--reveal` or `--out`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use reqwest::Method;
use reqwest::header::IF_MATCH;
use serde_json::{Value, json};

use super::client::{Client, Request, encode};
use super::error::CliError;
use super::global::{Context, Format};
use super::{input, output};
use crate::ids::SecretId;

/// Store, show, release and delete secrets
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Store a new secret
    #[command(after_help = "EXAMPLES
  printf %s \"$PASSWORD\" | lacre secrets create db/main --kind password
  lacre secrets create tls-key --from-file key.pem --label env=prod")]
    Create(Create),
    /// List secrets (no values)
    #[command(after_help = "EXAMPLES
  lacre secrets list
  lacre secrets list --kind api-key -o name")]
    List(List),
    /// Show a secret's metadata (no value)
    #[command(after_help = "EXAMPLES
  lacre secrets show db/main
  lacre secrets show db/main -o json")]
    Show(Which),
    /// Release a secret's value
    #[command(after_help = "EXAMPLES
  lacre secrets get db/main --reveal
  lacre secrets get tls-key --version 2 --out key.pem")]
    Get(Get),
    /// Store a new version of a secret
    #[command(after_help = "EXAMPLES
  lacre secrets put db/main --from-file new-password.txt
  lacre secrets put db/main --if-version 3 --from-file new-password.txt")]
    Put(Put),
    /// Delete a secret with all its versions
    #[command(after_help = "EXAMPLES
  lacre secrets delete db/main
  lacre secrets delete db/main --yes")]
    Delete(Delete),
    /// List a secret's versions (no values)
    #[command(after_help = "EXAMPLES
  lacre secrets versions db/main
  lacre secrets versions db/main -o json")]
    Versions(Which),
}

/// Which secret.
#[derive(Args)]
pub(crate) struct Which {
    /// The secret's name or id
    #[arg(value_name = "NAME|ID")]
    secret: String,
}

/// Arguments of `create`.
#[derive(Args)]
pub(crate) struct Create {
    /// 1 to 128 characters of A-Z a-z 0-9 . _ - /
    name: String,
    /// What it is
    #[arg(long, default_value = "opaque", value_parser = ["opaque", "json", "password", "api-key"])]
    kind: String,
    /// A label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// When the value stops being released (RFC 3339)
    #[arg(long, value_name = "TIME")]
    expires_at: Option<String>,
    /// Read the value from this file; - is standard input
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
}

/// Arguments of `list`.
#[derive(Args)]
pub(crate) struct List {
    /// Only secrets of this kind
    #[arg(long, value_parser = ["opaque", "json", "password", "api-key"])]
    kind: Option<String>,
    /// At most so many; default: all
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// Arguments of `get`.
#[derive(Args)]
pub(crate) struct Get {
    #[command(flatten)]
    which: Which,
    /// This version instead of the newest
    #[arg(long, value_name = "N")]
    version: Option<u64>,
    /// Print the value on standard output
    #[arg(long)]
    reveal: bool,
    /// Write the value to a new file of mode 0600
    #[arg(long, value_name = "FILE", conflicts_with = "reveal")]
    out: Option<PathBuf>,
}

/// Arguments of `put`.
#[derive(Args)]
pub(crate) struct Put {
    #[command(flatten)]
    which: Which,
    /// Only if this is the newest version; default: whatever it is when the command starts
    #[arg(long, value_name = "N")]
    if_version: Option<u64>,
    /// Read the value from this file; - is standard input
    #[arg(long, value_name = "FILE")]
    from_file: Option<PathBuf>,
}

/// Arguments of `delete`.
#[derive(Args)]
pub(crate) struct Delete {
    #[command(flatten)]
    which: Which,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("a label is KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Create(args) => create(args, context).await,
        Command::List(args) => list(args, context).await,
        Command::Show(args) => show(&args, context).await,
        Command::Get(args) => get(args, context).await,
        Command::Put(args) => put(args, context).await,
        Command::Delete(args) => delete(args, context).await,
        Command::Versions(args) => versions(&args, context).await,
    }
}

async fn create(args: Create, context: &Context) -> Result<(), CliError> {
    // Before the first request: a prompt must still end at Ctrl-C by itself.
    let value = input::value(context, args.from_file.as_deref())?;
    let client = Client::connect(context).await?;
    let (encoding, text) = input::encode(&value);
    let mut body = json!({
        "name": args.name,
        "kind": args.kind,
        "value": text.as_str(),
        "encoding": encoding,
        "labels": args.labels.into_iter().map(|(k, v)| (k, Value::String(v))).collect::<serde_json::Map<_, _>>(),
    });
    if let Some(at) = args.expires_at {
        body["expires_at"] = Value::String(at);
    }
    let made = client.json(Request::new(Method::POST, "/v1/secrets").json(body)).await?;
    output::object(context.global.output, &made, "id")
}

async fn list(args: List, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let page = args.limit.unwrap_or(200).clamp(1, 200);
    let kind = args.kind.map(|kind| format!("&kind={}", encode(&kind))).unwrap_or_default();
    let items = client.items(&format!("/v1/secrets?limit={page}{kind}"), args.limit).await?;
    let columns = [
        ("NAME", "name"),
        ("KIND", "kind"),
        ("VERSION", "version"),
        ("UPDATED", "updated_at"),
        ("EXPIRES", "expires_at"),
        ("LABELS", "labels"),
        ("ID", "id"),
    ];
    output::list(context.global.output, &items, &columns, "name")
}

async fn show(args: &Which, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let path = args.path(&client).await?;
    let info = client.json(Request::new(Method::GET, &path)).await?;
    output::object(context.global.output, &info, "name")
}

async fn get(args: Get, context: &Context) -> Result<(), CliError> {
    if !args.reveal && args.out.is_none() {
        return Err(CliError::usage(
            "a value is shown only when that is asked for",
            "add --reveal to print it, or --out FILE to store it with mode 0600",
        ));
    }
    let Some(path) = &args.out else {
        let answer = fetch(&args, context).await?;
        return reveal(&answer, context);
    };
    let file = input::create_private(path)?;
    let filled = match fetch(&args, context).await {
        Ok(answer) => {
            let value = input::decode(&answer).ok_or_else(bad_value);
            value.and_then(|value| input::fill_private(&file, path, &value))
        }
        Err(error) => Err(error),
    };
    if filled.is_err() {
        // The file is ours and incomplete; that it cannot be removed changes nothing about the error.
        let _ = std::fs::remove_file(path);
    }
    filled?;
    context.note(&format!("value written to {}", path.display()));
    Ok(())
}

async fn fetch(args: &Get, context: &Context) -> Result<Value, CliError> {
    let client = Client::connect(context).await?;
    let path = args.which.path(&client).await?;
    let version = args.version.map(|version| format!("?version={version}")).unwrap_or_default();
    client.json(Request::new(Method::GET, &format!("{path}/value{version}"))).await
}

fn reveal(answer: &Value, context: &Context) -> Result<(), CliError> {
    match context.global.output {
        Format::Json => output::json(answer),
        Format::Ndjson => output::raw(format!("{answer}\n").as_bytes()),
        Format::Table | Format::Name => {
            let value = input::decode(answer).ok_or_else(bad_value)?;
            output::raw(&value)?;
            // On a terminal the prompt should start on its own line; a pipe gets the exact bytes.
            let terminal = std::io::IsTerminal::is_terminal(&std::io::stdout());
            if terminal && !value.ends_with(b"\n") { output::raw(b"\n") } else { Ok(()) }
        }
    }
}

fn bad_value() -> CliError {
    CliError::local("cannot read the value", "the answer has no value of a known encoding")
}

async fn put(args: Put, context: &Context) -> Result<(), CliError> {
    let value = input::value(context, args.from_file.as_deref())?;
    let client = Client::connect(context).await?;
    let path = args.which.path(&client).await?;
    // The tag changes with every change of the row, so a version that is right now is bound by it.
    let seen = client.send(Request::new(Method::GET, &path)).await?;
    let info: Value = serde_json::from_slice(&seen.body).unwrap_or_default();
    let newest = info["version"].as_u64().ok_or_else(|| client.strange("a secret without version"))?;
    if let Some(expected) = args.if_version.filter(|expected| *expected != newest) {
        return Err(CliError::Changed { expected, newest });
    }
    let etag = seen.etag.ok_or_else(|| client.strange("a secret without ETag"))?;
    let (encoding, text) = input::encode(&value);
    let path = format!("{path}/value");
    let body = json!({ "value": text.as_str(), "encoding": encoding });
    let info = client.json(Request::new(Method::PUT, &path).json(body).header(IF_MATCH, etag)).await?;
    output::object(context.global.output, &info, "version")
}

async fn delete(args: Delete, context: &Context) -> Result<(), CliError> {
    input::confirm(&format!("Delete {} with all its versions?", args.which.secret), args.yes)?;
    let client = Client::connect(context).await?;
    let path = args.which.path(&client).await?;
    client.send(Request::new(Method::DELETE, &path)).await?;
    context.note(&format!("{} deleted", args.which.secret));
    Ok(())
}

async fn versions(args: &Which, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let path = format!("{}/versions", args.path(&client).await?);
    let items = client.items(&path, None).await?;
    let columns = [
        ("VERSION", "version"),
        ("BYTES", "length"),
        ("ENCODING", "encoding"),
        ("KEK", "kek_version"),
        ("CREATED", "created_at"),
    ];
    output::list(context.global.output, &items, &columns, "version")
}

impl Which {
    /// The secret's path: an id is used as it is, a name is looked up.
    async fn path(&self, client: &Client) -> Result<String, CliError> {
        if let Ok(id) = SecretId::parse(&self.secret) {
            return Ok(format!("/v1/secrets/{id}"));
        }
        let items = client.items(&format!("/v1/secrets?name={}", encode(&self.secret)), Some(1)).await?;
        let found = items.iter().find(|item| item["name"].as_str() == Some(&self.secret));
        match found.and_then(|item| item["id"].as_str()) {
            Some(id) => Ok(format!("/v1/secrets/{}", encode(id))),
            None => Err(CliError::NotFound { what: "secret", name: self.secret.clone() }),
        }
    }
}
