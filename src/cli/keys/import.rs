//! `lacre keys import`: private keys from a PEM file, standard input, or Logto's environment, never from an
//! argument. They are sent and forgotten.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, ValueEnum};
use reqwest::Method;
use serde_json::json;
use zeroize::Zeroizing;

use super::{show, with_dry_run};
use crate::cli::client::{Client, Request};
use crate::cli::error::CliError;
use crate::cli::global::Context;
use crate::cli::input;

pub(super) const HELP: &str = "EXAMPLES
  lacre keys import --file key.pem --as previous --lifetime 3600
  lacre keys import --logto-env logto.env --lifetime 3600 --dry-run

Whoever had the file can still sign with the key: rotate as soon as its tokens have expired, and destroy the file.";

/// Logto's variable: PEM texts, or base64 of them, with commas between.
const VARIABLE: &str = "OIDC_PRIVATE_KEYS";

/// What the key becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum As {
    /// It takes over, as after a rotation.
    Current,
    /// It verifies only.
    Previous,
}

const LIST_HELP: &str =
    "Read all keys of a file with Logto's OIDC_PRIVATE_KEYS: the first becomes current, the others previous";

/// Arguments of `import`.
#[derive(Args)]
pub(crate) struct Import {
    /// Read the PEM from this file; - and the default are standard input
    #[arg(long, value_name = "FILE", conflicts_with = "logto_env")]
    file: Option<PathBuf>,
    /// What it becomes
    #[arg(
        long = "as",
        value_enum,
        value_name = "STATUS",
        default_value = "current",
        conflicts_with = "logto_env"
    )]
    status: As,
    /// The longest lifetime of a token that a previous key has signed elsewhere
    #[arg(long, value_name = "SECONDS", required_if_eq("status", "previous"))]
    lifetime: Option<u64>,
    /// A file with a list of keys.
    #[arg(long, value_name = "FILE", help = LIST_HELP)]
    logto_env: Option<PathBuf>,
    /// Only show what the keys would be
    #[arg(long)]
    dry_run: bool,
}

/// A key to be sent.
struct Key {
    pem: Zeroizing<String>,
    status: As,
}

/// Runs the command.
pub(super) async fn run(args: Import, context: &Context) -> Result<(), CliError> {
    let keys = match &args.logto_env {
        Some(path) => of_logto(path)?,
        None => vec![Key { pem: input::document(args.file.as_deref())?, status: args.status }],
    };
    if args.lifetime.is_none() && keys.iter().any(|key| key.status == As::Previous) {
        return Err(CliError::usage(
            "previous keys need --lifetime",
            "give the longest lifetime of their tokens in seconds",
        ));
    }
    let client = Client::connect(context).await?;
    let path = with_dry_run("/v1/signing-keys/jwt/import".to_owned(), args.dry_run);
    let many = keys.len();
    for (at, key) in keys.into_iter().enumerate() {
        let status = if key.status == As::Current { "current" } else { "previous" };
        let mut body = json!({ "pem": key.pem.as_str(), "as": status });
        if args.lifetime.is_some() {
            body["lifetime"] = json!(args.lifetime);
        }
        if many > 1 {
            context.note(&format!("key {} of {many}, as {status}", at + 1));
        }
        let answer = client.json(Request::new(Method::POST, &path).json(body)).await?;
        // Of several only the last answer is the ring as it stays.
        if at + 1 == many || args.dry_run {
            show(&answer, context)?;
        }
    }
    Ok(())
}

/// The previous keys first: if one of them is refused, nothing has taken over yet.
fn of_logto(path: &Path) -> Result<Vec<Key>, CliError> {
    let text = input::document(Some(path))?;
    let mut pems = private_keys(&text).ok_or_else(|| {
        CliError::usage(
            format!("{} holds no list of private keys", path.display()),
            "it is OIDC_PRIVATE_KEYS=..., or the value alone: PEM or base64 of PEM, commas between",
        )
    })?;
    let current = pems.remove(0);
    let previous = pems.into_iter().map(|pem| Key { pem, status: As::Previous });
    Ok(previous.chain([Key { pem: current, status: As::Current }]).collect())
}

/// The list in a file of variables, or the list alone; `None` if anything in it is no PEM.
fn private_keys(text: &str) -> Option<Vec<Zeroizing<String>>> {
    let value = match text.split_once(&format!("{VARIABLE}=")) {
        // In quotes it may have line ends in it; without, it ends with its line.
        Some((_, rest)) => match rest.chars().next()? {
            quote @ ('"' | '\'') => rest[1..].split(quote).next()?,
            _ => rest.lines().next()?,
        },
        None => text,
    };
    let keys: Option<Vec<_>> = value.split(',').map(str::trim).map(pem).collect();
    keys.filter(|keys| !keys.is_empty())
}

fn pem(text: &str) -> Option<Zeroizing<String>> {
    const BEGIN: &str = "-----BEGIN ";
    if text.starts_with(BEGIN) {
        return Some(Zeroizing::new(text.replace("\\n", "\n")));
    }
    let decoded = Zeroizing::new(STANDARD.decode(text).ok()?);
    let decoded = std::str::from_utf8(&decoded).ok()?.trim();
    decoded.starts_with(BEGIN).then(|| Zeroizing::new(decoded.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----";
    const B: &str = "-----BEGIN PRIVATE KEY-----\nBBBB\n-----END PRIVATE KEY-----";

    #[test]
    fn logtos_list_is_read_in_every_form() {
        let (a64, b64) = (STANDARD.encode(A), STANDARD.encode(format!("{B}\n")));
        for text in [
            format!("{A},{B}"),
            format!("{A},\n{B}\n"),
            format!("{a64},{b64}\n"),
            format!("DB_URL=postgres://x\nOIDC_PRIVATE_KEYS={a64},{b64}\nOIDC_COOKIE_KEYS=c\n"),
            format!("export OIDC_PRIVATE_KEYS=\"{A},{B}\"\nOTHER=1\n"),
            format!("OIDC_PRIVATE_KEYS='{},{}'", A.replace('\n', "\\n"), B.replace('\n', "\\n")),
        ] {
            let keys = private_keys(&text).unwrap();
            let keys: Vec<_> = keys.iter().map(|key| key.as_str()).collect();
            assert_eq!(keys, [A, B], "{text}");
        }
        for bad in ["", "OIDC_PRIVATE_KEYS=", "hello", &format!("{A},hello"), "OIDC_COOKIE_KEYS=c"] {
            assert!(private_keys(bad).is_none(), "{bad}");
        }
    }
}
