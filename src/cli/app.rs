//! `lacre app`: applications that may ask for tokens.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, Request, encode};
use super::error::CliError;
use super::global::{Context, Format};
use super::{input, output};

/// Applications that may ask for tokens
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Make an application; its secret is shown now and never again
    #[command(after_help = "EXAMPLES
  lacre app create backup --scope secrets:metadata --scope secrets:read --secret-out backup.secret
  lacre app create auditor --scope audit:read --reveal")]
    Create(Create),
    /// List applications
    #[command(after_help = "EXAMPLES
  lacre app list
  lacre app list -o name")]
    List,
    /// Delete an application; its secret and its tokens stop working
    #[command(after_help = "EXAMPLES
  lacre app delete app-7c519d6e3f0c8f1f7a10
  lacre app delete app-7c519d6e3f0c8f1f7a10 --yes")]
    Delete(Delete),
}

/// Arguments of `create`.
#[derive(Args)]
pub(crate) struct Create {
    /// 1 to 128 characters
    name: String,
    /// What it is
    #[arg(long, default_value = "machine", value_parser = ["machine", "traditional"])]
    kind: String,
    /// A right that it may be granted; may be repeated
    #[arg(long = "scope", value_name = "SCOPE", required = true)]
    scopes: Vec<String>,
    /// Write the client secret to a new file of mode 0600
    #[arg(long, value_name = "FILE", required_unless_present = "reveal")]
    secret_out: Option<PathBuf>,
    /// Print the client secret on standard output
    #[arg(long, conflicts_with = "secret_out")]
    reveal: bool,
}

/// Arguments of `delete`.
#[derive(Args)]
pub(crate) struct Delete {
    /// The application's client id
    client_id: String,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Create(args) => create(args, context).await,
        Command::List => list(context).await,
        Command::Delete(args) => delete(args, context).await,
    }
}

async fn create(args: Create, context: &Context) -> Result<(), CliError> {
    let body = json!({ "name": args.name, "kind": args.kind, "scopes": args.scopes });
    let ask = async {
        let client = Client::connect(context).await?;
        client.json(Request::new(Method::POST, "/v1/apps").json(body)).await
    };
    let Some(path) = args.secret_out.as_deref() else {
        return output::object(context.global.output, &ask.await?, "client_id");
    };
    // The file first: a secret that is shown once must have somewhere to go.
    let file = input::create_private(path)?;
    let made = match ask.await {
        Ok(made) => keep_secret(&file, path, made),
        Err(error) => Err(error),
    };
    if made.is_err() {
        // Empty or incomplete, and ours; that it cannot be removed changes nothing about the error.
        let _ = std::fs::remove_file(path);
    }
    let made = made?;
    context.note(&format!("client secret written to {}", path.display()));
    output::object(context.global.output, &made, "client_id")
}

/// Moves the secret from the answer to the file.
fn keep_secret(file: &std::fs::File, path: &Path, mut made: Value) -> Result<Value, CliError> {
    let secret = made.as_object_mut().and_then(|members| members.shift_remove("client_secret"));
    let secret = secret.as_ref().and_then(Value::as_str);
    let secret = secret.ok_or_else(|| CliError::local("cannot keep the secret", "the answer has none"))?;
    input::fill_private(file, path, secret.as_bytes())?;
    Ok(made)
}

async fn list(context: &Context) -> Result<(), CliError> {
    let items = Client::connect(context).await?.items("/v1/apps", None).await?;
    let columns = [
        ("CLIENT ID", "client_id"),
        ("NAME", "name"),
        ("KIND", "kind"),
        ("SCOPES", "scopes"),
        ("CREATED", "created_at"),
    ];
    output::list(context.global.output, &items, &columns, "client_id")
}

async fn delete(args: Delete, context: &Context) -> Result<(), CliError> {
    input::confirm(&format!("Delete application {}?", args.client_id), args.yes)?;
    let client = Client::connect(context).await?;
    let path = format!("/v1/apps/{}", encode(&args.client_id));
    client.send(Request::new(Method::DELETE, &path)).await?;
    if context.global.output == Format::Table {
        context.note(&format!("{} deleted", args.client_id));
    }
    Ok(())
}
