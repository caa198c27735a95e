//! `lacre init`: the first application of a new installation.

use std::path::PathBuf;

use secrecy::ExposeSecret;
use serde_json::json;

use super::error::CliError;
use super::global::Context;
use super::{input, local, output};
use crate::daemon;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre init --secret-out admin.secret
  lacre init --app-name ops --reveal

Makes the keys on the device and one application with all rights. Run while the daemon is stopped.";

/// Arguments of `init`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the application
    #[arg(long, default_value = "admin", value_name = "NAME")]
    app_name: String,
    /// Write the client secret to a new file of mode 0600
    #[arg(long, value_name = "FILE", required_unless_present = "reveal")]
    secret_out: Option<PathBuf>,
    /// Print the client secret on standard output
    #[arg(long, conflicts_with = "secret_out")]
    reveal: bool,
}

/// Runs the command.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let config = local::config(context)?;
    // The file first: a secret that is shown once must have somewhere to go.
    // Repeated, the command finds its file there: then nothing will be written, or beside it.
    let place = args.secret_out.map(|path| {
        let mut name = path.clone().into_os_string();
        name.push(".new");
        if path.exists() { PathBuf::from(name) } else { path }
    });
    let create = |path| input::create_private(path).map(|file| (file, path));
    let file = place.as_deref().map(create).transpose()?;
    let made =
        daemon::init(config, &args.app_name).await.map_err(|e| CliError::local("cannot initialise", e));
    let kept = match (&made, &file) {
        (Ok(report), Some((file, path))) if report.created => {
            input::fill_private(file, path, report.client_secret.expose_secret().as_bytes())
        }
        _ => Ok(()),
    };
    let created = made.as_ref().is_ok_and(|report| report.created);
    if let (Some((_, path)), true) = (&file, kept.is_err() || !created) {
        // Empty or incomplete, and ours; that it cannot be removed changes nothing about the result.
        let _ = std::fs::remove_file(path);
    }
    kept?;
    let report = made?;
    let mut shown = json!({ "client_id": report.client_id.as_str(), "created": report.created });
    match report.created {
        true if args.reveal => shown["client_secret"] = report.client_secret.expose_secret().into(),
        true => {
            if let Some((_, path)) = &file {
                context.note(&format!("the client secret is in {}", path.display()));
            }
        }
        false => context.note("the application exists already; its secret was shown when it was made"),
    }
    output::object(context.global.output, &shown, "client_id")
}
