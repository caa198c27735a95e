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
  lacre app create idp --scope tokens:sign --signing-policy policy.json --secret-out idp.secret")]
    Create(Create),
    /// List applications
    #[command(after_help = "EXAMPLES
  lacre app list
  lacre app list -o name")]
    List,
    /// Show or change what an application may have signed
    #[command(after_help = "EXAMPLES
  lacre app policy app-7c519d6e3f0c8f1f7a10
  lacre app policy app-7c519d6e3f0c8f1f7a10 --set policy.json

A policy is JSON; what it does not name is not signed:
  {\"jwt\": {\"types\": [\"JWT\"], \"max_lifetime\": 3600, \"audiences\": [\"https://api.example\"], \"subjects\": \"any\"},
   \"jws\": {\"issuers\": [\"https://idp.example\"], \"types\": [\"JWT\", \"at+jwt\", \"\"], \"max_lifetime\": 86400},
   \"cookies\": {\"names\": [\"_session\", \"_interaction*\"], \"max_age\": 1209600}}")]
    Policy(Policy),
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
    /// What it may have signed, as JSON (see `lacre app policy --help`)
    #[arg(long, value_name = "FILE")]
    signing_policy: Option<PathBuf>,
    /// Write the client secret to a new file of mode 0600
    #[arg(long, value_name = "FILE", required_unless_present = "reveal")]
    secret_out: Option<PathBuf>,
    /// Print the client secret on standard output
    #[arg(long, conflicts_with = "secret_out")]
    reveal: bool,
}

/// Arguments of `policy`.
#[derive(Args)]
pub(crate) struct Policy {
    /// The application's client id
    client_id: String,
    /// The new policy, as JSON; `-` is standard input, `{}` allows nothing
    #[arg(long, value_name = "FILE")]
    set: Option<PathBuf>,
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
        Command::Policy(args) => policy(args, context).await,
        Command::Delete(args) => delete(args, context).await,
    }
}

async fn create(args: Create, context: &Context) -> Result<(), CliError> {
    let mut body = json!({ "name": args.name, "kind": args.kind, "scopes": args.scopes });
    if let Some(path) = args.signing_policy.as_deref() {
        body["signing"] = input::json(path)?;
    }
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

async fn policy(args: Policy, context: &Context) -> Result<(), CliError> {
    let path = format!("/v1/apps/{}/signing", encode(&args.client_id));
    let request = match args.set.as_deref() {
        Some(file) => Request::new(Method::PUT, &path).json(input::json(file)?),
        None => Request::new(Method::GET, &path),
    };
    let policy = Client::connect(context).await?.json(request).await?;
    match context.global.output {
        // What is shown can be changed and set again.
        Format::Table => output::json(&policy),
        other => output::object(other, &policy, "jwt"),
    }
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
