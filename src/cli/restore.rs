//! `lacre restore`: after a disaster. `run` works on the daemon's host while no daemon runs; `release` asks
//! the daemon. The whole drill is in `docs/operations/restore.md`.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use reqwest::Method;
use secrecy::{ExposeSecret, SecretString};
use serde_json::json;

use super::client::{Client, Request};
use super::error::CliError;
use super::global::Context;
use super::hsm::device_name;
use super::kek::Style;
use super::progress::Show;
use super::{input, local, output};
use crate::daemon;
use crate::ids::{ClientId, generate_client_secret};
use crate::seal::DeviceName;
use crate::vault::JobInfo;

/// After a disaster: bring an installation back, in quarantine, and release it
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Put the installation into quarantine, and replace what lost devices held
    #[command(after_help = "EXAMPLES
  lacre restore run
  lacre restore run --lost default --secrets-dir /root/new-secrets

Run it while no daemon runs, on the restored database, with a configuration that names the new device and the
one with the backup KEK. Without --lost it only sets the quarantine: for a database that was put back from a
copy. Killed or failed, it goes on when it is run again.")]
    Run(Run),
    /// End the quarantine: scheduled work and rotations go on
    #[command(after_help = "EXAMPLES
  lacre restore release
  lacre restore release -o json")]
    Release,
}

/// Arguments of `run`.
#[derive(Args)]
pub(crate) struct Run {
    /// A device that is gone, by the name that it had in the configuration; may be repeated
    #[arg(long, value_name = "NAME", value_parser = device_name, requires = "secrets_dir")]
    lost: Vec<DeviceName>,
    /// Directory for the applications' new secrets: a file of mode 0600 for each, named after the client id
    #[arg(long, value_name = "DIR")]
    secrets_dir: Option<PathBuf>,
    /// How progress is shown on standard error
    #[arg(long, value_enum, default_value = "auto", value_name = "STYLE")]
    progress: Style,
}

/// Runs the command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<(), CliError> {
    match command {
        Command::Run(args) => restore(args, context).await,
        Command::Release => {
            let client = Client::connect(context).await?;
            let answer = client.json(Request::new(Method::POST, "/v1/restore/release")).await?;
            if answer["released"] != true {
                context.note("there was no quarantine");
            }
            output::object(context.global.output, &answer, "released")
        }
    }
}

async fn restore(args: Run, context: &Context) -> Result<(), CliError> {
    let config = local::config(context)?;
    let lost: BTreeSet<_> = args.lost.into_iter().collect();
    if let Some(dir) = &args.secrets_dir {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|e| CliError::local(format!("cannot make {}", dir.display()), e))?;
    }
    let dir = args.secrets_dir.unwrap_or_default();
    let style = if context.global.quiet { Style::None } else { args.progress };
    let show = OnceCell::new();
    let tell = |job: &JobInfo| {
        let job = json!({
            "id": job.id, "state": job.state, "total": job.total, "done": job.done, "failed": job.failed,
        });
        show.get_or_init(|| Show::new(style, &job)).update(&job);
    };
    let restored = daemon::restore(config, &lost, |id| kept_secret(&dir, id), tell).await;
    if let Some(show) = show.get() {
        show.end();
    }
    let report = restored.map_err(|e| CliError::local("cannot restore", e))?;
    context.note("the installation is in quarantine: look at it, then `lacre restore release`");
    let shown = json!({
        "quarantined_at": report.quarantined_at.to_rfc3339(),
        "replaced_keys": report.replaced_keys,
        "restored": report.restored,
        "failed": report.failed,
        "reissued": report.reissued,
    });
    output::object(context.global.output, &shown, "quarantined_at")?;
    match report.failed {
        0 => Ok(()),
        failed => Err(CliError::Partial {
            failed,
            total: report.restored + failed,
            last_error: Some("records without a wrap under the backup KEK, or altered".to_owned()),
        }),
    }
}

/// The application's new secret, on the disk before it is valid. Asked again, the one that is there.
fn kept_secret(dir: &Path, id: &ClientId) -> io::Result<SecretString> {
    let path = dir.join(format!("{}.secret", id.as_str()));
    match std::fs::read_to_string(&path) {
        Ok(text) if !text.is_empty() => return Ok(SecretString::from(text)),
        // Made by a run that was killed before it wrote.
        Ok(_) => std::fs::remove_file(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let secret = generate_client_secret().map_err(|error| io::Error::other(error.to_string()))?;
    let keep = || {
        let file = input::create_private(&path)?;
        input::fill_private(&file, &path, secret.expose_secret().as_bytes())
    };
    keep().map_err(|error| io::Error::other(error.to_string()))?;
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use secrecy::ExposeSecret;

    use super::kept_secret;
    use crate::ids::ClientId;

    #[test]
    fn a_secret_is_kept_before_it_is_used_and_given_again() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (ClientId::generate(), ClientId::generate());
        let kept = |id| kept_secret(dir.path(), id).unwrap().expose_secret().to_owned();

        let first = kept(&one);
        assert_eq!((kept(&one), first.len()), (first.clone(), kept(&two).len()));
        assert_ne!(kept(&two), first);
        let path = dir.path().join(format!("{}.secret", one.as_str()));
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);

        // Of a run that was killed between making and writing it.
        std::fs::write(&path, "").unwrap();
        assert_ne!(kept(&one), first);
    }
}
