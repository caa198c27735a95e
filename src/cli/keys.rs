//! `lacre keys`: the keys that sign tokens and cookies, their rotation and what it means for verifiers.
//!
//! Every change can be asked for with `--dry-run`: the daemon then says what the ring would be. `import` is in
//! a file of its own, since what comes in there is secret.

mod import;

use std::io::{self, IsTerminal};

use clap::{Args, Subcommand, ValueEnum};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::client::{Client, Request, encode};
use super::error::CliError;
use super::global::{Context, Format};
use super::{input, output};

/// Signing and cookie keys: list, rotate, revoke, import
#[derive(Subcommand)]
pub(crate) enum Command {
    /// List the keys with what they do and until when
    #[command(after_help = "EXAMPLES
  lacre keys list
  lacre keys list --use cookie -o json")]
    List(Ring),
    /// Make a new key in the HSM and publish it; it signs when every verifier can know it
    #[command(after_help = "EXAMPLES
  lacre keys rotate --dry-run
  lacre keys rotate --alg ES384 --grace 14400")]
    Rotate(Rotate),
    /// Take back a key that is Next
    #[command(after_help = "EXAMPLES
  lacre keys cancel --dry-run
  lacre keys cancel")]
    Cancel(Change),
    /// Take the previous key back into use
    #[command(after_help = "EXAMPLES
  lacre keys revert --dry-run
  lacre keys revert --use cookie")]
    Revert(Change),
    /// Revoke a key at once, with every token that it signed
    #[command(after_help = "EXAMPLES
  lacre keys revoke p3dz8c2wy85x49jjm4qv6 --dry-run
  lacre keys revoke p3dz8c2wy85x49jjm4qv6 --yes")]
    Revoke(One),
    /// Delete a previous key; what it signed is not valid any more
    #[command(after_help = "EXAMPLES
  lacre keys delete p3dz8c2wy85x49jjm4qv6 --dry-run
  lacre keys delete p3dz8c2wy85x49jjm4qv6 --yes")]
    Delete(One),
    /// Print the public keys as verifiers see them
    #[command(after_help = "EXAMPLES
  lacre keys jwks
  lacre keys jwks -o name")]
    Jwks,
    /// Bring private keys (PKCS#8 PEM) into the HSM; their kids stay
    #[command(after_help = import::HELP)]
    Import(import::Import),
    /// Show the rules of the keys, or change them
    #[command(after_help = "EXAMPLES
  lacre keys policy
  lacre keys policy --set rotate_every=90d --set algorithm=ES256

Members: algorithm, ec_curve (P-256, P-384), rsa_bits, and in seconds or as 90d, 4h: rotate_every (0: by hand
only), grace, jwks_max_age, propagation, skew, session_ttl.")]
    Policy(Policy),
    /// List keys on the devices that no row of the database knows, or destroy one
    #[command(after_help = "EXAMPLES
  lacre keys gc
  lacre keys gc --destroy 3f0c8f1f7a1001939d7e0f2a7c519d6e

An older copy of the database, or another installation on the same token, makes such keys. Destroy only what is
nobody's.")]
    Gc(Gc),
    /// Say that the host's clock is right, although it has jumped by more than a day: signing goes on
    #[command(after_help = "EXAMPLES
  lacre keys accept-clock
  lacre keys accept-clock -q")]
    AcceptClock,
}

/// Arguments of `gc`.
#[derive(Args)]
pub(crate) struct Gc {
    /// Destroy the key of that id
    #[arg(long, value_name = "ID")]
    destroy: Option<String>,
}

/// What the keys sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Use {
    /// Tokens.
    Jwt,
    /// Cookies.
    Cookie,
}

/// Which keys.
#[derive(Args)]
pub(crate) struct Ring {
    /// What the keys sign
    #[arg(long = "use", value_enum, default_value = "jwt", value_name = "USE")]
    used: Use,
}

/// A change of a ring.
#[derive(Args)]
pub(crate) struct Change {
    #[command(flatten)]
    ring: Ring,
    /// Only show what the keys would be
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `rotate`.
#[derive(Args)]
pub(crate) struct Rotate {
    #[command(flatten)]
    change: Change,
    /// What to make; default: as the policy says
    #[arg(long, value_name = "ALG", value_parser = ["EC", "RSA", "ES256", "ES384", "RS256", "PS256", "EdDSA"])]
    alg: Option<String>,
    /// How long the key is Next; default: as the daemon is configured
    #[arg(long, value_name = "SECONDS")]
    grace: Option<u64>,
}

/// Arguments of `revoke` and `delete`.
#[derive(Args)]
pub(crate) struct One {
    /// The key's id, as `lacre keys list` shows it
    key: String,
    #[command(flatten)]
    change: Change,
    /// Do not ask
    #[arg(long)]
    yes: bool,
}

/// Arguments of `policy`.
#[derive(Args)]
pub(crate) struct Policy {
    #[command(flatten)]
    ring: Ring,
    /// Change a member; may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = member)]
    set: Vec<(String, Value)>,
}

impl Ring {
    fn path(&self, rest: &str) -> String {
        let name = match self.used {
            Use::Jwt => "jwt",
            Use::Cookie => "cookie",
        };
        format!("/v1/signing-keys/{name}{rest}")
    }
}

impl Change {
    fn path(&self, rest: &str) -> String {
        with_dry_run(self.ring.path(rest), self.dry_run)
    }
}

fn with_dry_run(path: String, dry_run: bool) -> String {
    if dry_run { path + "?dry_run=true" } else { path }
}

/// `name=value`: a number, a time as seconds, or a text.
fn member(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or("a member is NAME=VALUE")?;
    let value = match (value.parse::<u64>(), humantime::parse_duration(value)) {
        (Ok(number), _) => json!(number),
        (_, Ok(time)) => json!(time.as_secs()),
        _ => json!(value),
    };
    Ok((name.to_owned(), value))
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::List(ring) => list(&ring, context).await,
        Command::Rotate(args) => rotate(args, context).await,
        Command::Cancel(args) => change(Method::POST, &args.path("/cancel"), context).await,
        Command::Revert(args) => change(Method::POST, &args.path("/revert"), context).await,
        Command::Revoke(args) => revoke(args, context).await,
        Command::Delete(args) => delete(args, context).await,
        Command::Jwks => jwks(context).await,
        Command::Import(args) => import::run(args, context).await,
        Command::Policy(args) => policy(args, context).await,
        Command::Gc(args) => gc(args, context).await,
        Command::AcceptClock => {
            let client = Client::connect(context).await?;
            client.send(Request::new(Method::POST, "/v1/signing-keys/clock/accept")).await?;
            context.note("signing goes on; for a day no key leaves the JWKS");
            Ok(())
        }
    }
}

async fn gc(args: Gc, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    if let Some(id) = args.destroy {
        let path = format!("/v1/signing-keys/orphans/{}", encode(&id));
        client.send(Request::new(Method::DELETE, &path)).await?;
        context.note("the key was destroyed");
        return Ok(());
    }
    let items = client.items("/v1/signing-keys/orphans", None).await?;
    output::list(context.global.output, &items, &[("ID", "id"), ("KIND", "kind"), ("DEVICE", "device")], "id")
}

async fn list(ring: &Ring, context: &Context) -> Result<(), CliError> {
    let items = Client::connect(context).await?.items(&ring.path(""), None).await?;
    let columns = [
        ("KEY", "id"),
        ("STATUS", "status"),
        ("SIGNS", "is_signing"),
        ("ALGORITHM", "algorithm"),
        ("ALG", "alg"),
        ("ORIGIN", "origin"),
        ("DEVICE", "device"),
        ("CREATED", "created_at"),
        ("PUBLISHED UNTIL", "published_until"),
        ("KID", "kid"),
    ];
    output::list(context.global.output, &items, &columns, "id")
}

async fn rotate(args: Rotate, context: &Context) -> Result<(), CliError> {
    let mut body = json!({});
    if let Some(alg) = args.alg {
        body["algorithm"] = json!(alg);
    }
    if let Some(grace) = args.grace {
        body["grace"] = json!(grace);
    }
    let client = Client::connect(context).await?;
    let path = args.change.path("/rotate");
    let answer = client.json(Request::new(Method::POST, &path).json(body)).await?;
    show(&answer, context)
}

async fn change(method: Method, path: &str, context: &Context) -> Result<(), CliError> {
    let answer = Client::connect(context).await?.json(Request::new(method, path)).await?;
    show(&answer, context)
}

async fn delete(args: One, context: &Context) -> Result<(), CliError> {
    if !args.change.dry_run {
        let question = format!("Delete key {}? What it signed is not valid any more.", args.key);
        input::confirm(&question, args.yes)?;
    }
    let path = args.change.path(&format!("/{}", encode(&args.key)));
    change(Method::DELETE, &path, context).await
}

/// Nobody should find out afterwards how many tokens died: the daemon is asked first.
async fn revoke(args: One, context: &Context) -> Result<(), CliError> {
    let (ring, path) = (&args.change.ring, format!("/{}/revoke", encode(&args.key)));
    let ask = |dry_run| with_dry_run(ring.path(&path), dry_run);
    if !args.yes && !args.change.dry_run && !io::stdin().is_terminal() {
        return Err(CliError::usage("this cannot be undone and nobody can be asked", "add --yes"));
    }
    let client = Client::connect(context).await?;
    let would_be = ask(true);
    if args.change.dry_run {
        return show(&client.json(Request::new(Method::POST, &would_be)).await?, context);
    }
    if !args.yes {
        let answer = client.json(Request::new(Method::POST, &would_be)).await?;
        let dead = answer["dead_tokens"].as_u64();
        let dead = dead.map_or_else(|| "An unknown number of".to_owned(), |dead| format!("At least {dead}"));
        input::confirm_by_typing(&format!("{dead} live tokens die with {}.", args.key), "revoke")?;
    }
    let answer = client.json(Request::new(Method::POST, &ask(false))).await?;
    show(&answer, context)
}

async fn jwks(context: &Context) -> Result<(), CliError> {
    let document = Client::anonymous(context)?.json(Request::new(Method::GET, "/oidc/jwks")).await?;
    let keys = document["keys"].as_array().map(Vec::as_slice).unwrap_or_default();
    match context.global.output {
        Format::Table | Format::Json => output::json(&document),
        format => output::list(format, keys, &[], "kid"),
    }
}

async fn policy(args: Policy, context: &Context) -> Result<(), CliError> {
    let client = Client::connect(context).await?;
    let path = args.ring.path("/policy");
    let request = match args.set.is_empty() {
        true => Request::new(Method::GET, &path),
        false => {
            let members: Map<_, _> = args.set.into_iter().collect();
            Request::new(Method::PATCH, &path).json(Value::Object(members))
        }
    };
    output::object(context.global.output, &client.json(request).await?, "algorithm")
}

/// The timeline of a ring after a change; for a program the whole answer.
fn show(answer: &Value, context: &Context) -> Result<(), CliError> {
    let items = answer["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let columns = [
        ("KEY", "id"),
        ("PHASE", "phase"),
        ("SIGNS FROM", "signs_from"),
        ("SIGNS UNTIL", "signs_until"),
        ("PUBLISHED UNTIL", "published_until"),
    ];
    match context.global.output {
        Format::Json => output::json(answer)?,
        Format::Table => output::list(Format::Table, &timeline(items), &columns, "id")?,
        format => output::list(format, items, &columns, "id")?,
    }
    for waiting in items.iter().filter(|item| item["waits_for"].is_string()) {
        let [id, from, why] = ["id", "signs_from", "waits_for"].map(|name| output::text(&waiting[name]));
        context.note(&format!("{id} signs from {from}: {why}"));
    }
    if let Some(dead) = answer["dead_tokens"].as_u64() {
        let does = if answer["dry_run"] == true { "would die" } else { "died" };
        context.note(&format!("at least {dead} live tokens {does}"));
    }
    if answer["dry_run"] == true {
        context.note("nothing was changed");
    }
    Ok(())
}

/// A key that is called Current and one that signs are not always the same.
fn timeline(items: &[Value]) -> Vec<Value> {
    let row = |item: &Value| {
        let status = output::text(&item["status"]);
        let phase = match (status.as_str(), item["is_signing"].as_bool()) {
            ("Current", Some(false)) => "Current, waits".to_owned(),
            ("Next" | "Previous", Some(true)) => format!("{status}, signs"),
            _ => status,
        };
        let mut row = item.clone();
        row["phase"] = json!(phase);
        row
    };
    items.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_a_number_a_time_or_a_text() {
        let value = |text: &str| member(text).unwrap().1;
        assert_eq!(value("grace=14400"), json!(14_400));
        assert_eq!(value("rotate_every=90d"), json!(90 * 24 * 3600));
        assert_eq!(value("ec_curve=P-384"), json!("P-384"));
        assert_eq!(value("algorithm=ES256"), json!("ES256"));
        assert!(member("grace").is_err());
    }

    #[test]
    fn the_timeline_tells_a_current_key_that_waits_from_one_that_signs() {
        let key = |status: &str, signs: bool| json!({ "status": status, "is_signing": signs });
        let rows = timeline(&[key("Current", false), key("Previous", true), key("Previous", false)]);
        let phases: Vec<_> = rows.iter().map(|row| row["phase"].as_str().unwrap()).collect();
        assert_eq!(phases, ["Current, waits", "Previous, signs", "Previous"]);
    }
}
