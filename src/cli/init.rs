//! `lacre init`: the first application of a new installation.

use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

use secrecy::ExposeSecret;
use serde_json::json;

use super::error::CliError;
use super::global::Context;
use super::{input, local, output};
use crate::config::Config;
use crate::daemon;

/// The help's end.
pub(crate) const HELP: &str = "EXAMPLES
  lacre init --app-name ops --secret-out ops.secret
  lacre init --device tpm --secret-out admin.secret

Makes the keys on the device and one application with all rights. Run while the daemon is stopped.
With --device tpm and no [seal] in the configuration the TPM of this host is used; the section to put into the
configuration is printed on standard error.";

/// Arguments of `init`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name of the application
    #[arg(long, default_value = "admin", value_name = "NAME")]
    app_name: String,
    /// The device, where the configuration names none
    #[arg(long, value_enum, value_name = "KIND")]
    device: Option<Kind>,
    /// Where the TPM is, as a TCTI of tpm2-tss
    #[arg(long, default_value = "device:/dev/tpmrm0", value_name = "TCTI", requires = "device")]
    tcti: String,
    /// Write the client secret to a new file of mode 0600
    #[arg(long, value_name = "FILE", required_unless_present = "reveal")]
    secret_out: Option<PathBuf>,
    /// Print the client secret on standard output
    #[arg(long, conflicts_with = "secret_out")]
    reveal: bool,
}

/// A device that needs nothing but to be named.
#[derive(Clone, Copy, clap::ValueEnum)]
enum Kind {
    Tpm,
}

/// The TPM as the configuration's device, with a secret that is made where it is missing.
fn use_tpm(config: &mut Config, tcti: &str, context: &Context) -> Result<(), CliError> {
    match &config.seal {
        Some(seal) if seal.tpm.is_some() => return Ok(()),
        Some(_) => {
            return Err(CliError::usage(
                "the configuration names another device",
                "leave out --device, or remove [seal.pkcs11]",
            ));
        }
        None => {}
    }
    let auth = config.data_dir.join("tpm-auth");
    let unusable = |e: std::io::Error| CliError::local(format!("cannot make {}", auth.display()), e);
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&config.data_dir).map_err(unusable)?;
    if daemon::dev::ensure_auth_file(&auth).map_err(unusable)? {
        context.note(&format!("{} is new: without it no key can be used, so keep a copy", auth.display()));
    }
    let source = format!("file:{}", auth.display());
    context.note(&format!(
        "put this into the configuration:\n[seal.tpm]\ntcti = \"{tcti}\"\nauth_source = \"{source}\""
    ));
    let seal = json!({ "tpm": { "tcti": tcti, "auth_source": source } });
    config.seal = serde_json::from_value(seal).map_err(|e| CliError::local("configuration", e))?;
    Ok(())
}

/// Runs the command.
pub(crate) async fn run(args: Args, context: &Context) -> Result<(), CliError> {
    let mut config = local::config(context)?;
    if matches!(args.device, Some(Kind::Tpm)) {
        use_tpm(&mut config, &args.tcti, context)?;
    }
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
