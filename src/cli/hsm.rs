//! `lacre hsm`: the device itself.

#[cfg(feature = "tpm")]
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::json;

use super::error::CliError;
use super::global::Context;
#[cfg(feature = "tpm")]
use super::input;
use super::{local, output};
use crate::seal::{self, Arena, DeviceName};

/// The HSM itself
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Allow login again after a wrong PIN was replaced
    #[command(after_help = "EXAMPLES
  lacre hsm unlatch --config /etc/lacre/lacre.toml
  lacre hsm unlatch --device backup --force

A wrong PIN stops all logins, because every further try brings the token nearer to its lock. Replace
the PIN file first. --force allows one more try with the same PIN.")]
    Unlatch(Unlatch),
    /// Bind a TPM's secret to the state of this host
    #[cfg(feature = "tpm")]
    #[command(after_help = "EXAMPLES
  lacre hsm seal-auth --pcr 7 --authority authority.pem --out tpm-auth.sealed
  lacre hsm seal-auth --pcr 7 --pcr 11 --authority authority.pem --out tpm-auth.sealed

Seals what auth_source of [seal.tpm] gives now. Then set auth_source = \"sealed:FILE\", put the plain secret
where you keep backups, and remove it from this host. The authority's private key stays elsewhere: whoever
has it can approve other PCR values with `lacre hsm pcr-digest` and openssl.")]
    SealAuth(SealAuth),
    /// Write what an approval of the present PCR values has to sign
    #[cfg(feature = "tpm")]
    #[command(after_help = "EXAMPLES
  lacre hsm pcr-digest --pcr 7 --out digest
  lacre hsm pcr-digest --pcr 7 --pcr 11 --out digest

Sign it where the authority's key is: openssl dgst -sha256 -sign authority.key -out FILE.approval digest.
The daemon looks for FILE.approval, FILE.approval.2 and so on beside the sealed FILE; it needs no restart.")]
    PcrDigest(PcrDigest),
}

/// Arguments of `seal-auth`.
#[cfg(feature = "tpm")]
#[derive(Args)]
pub(crate) struct SealAuth {
    /// A PCR of the SHA-256 bank; may be given several times
    #[arg(long = "pcr", required = true, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(0..24))]
    pcrs: Vec<u8>,
    /// Public key of the policy authority: P-256, PEM
    #[arg(long, value_name = "FILE")]
    authority: PathBuf,
    /// A new file for the sealed secret
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    on: On,
}

/// Arguments of `pcr-digest`.
#[cfg(feature = "tpm")]
#[derive(Args)]
pub(crate) struct PcrDigest {
    /// A PCR of the SHA-256 bank; those that the secret was sealed under
    #[arg(long = "pcr", required = true, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(0..24))]
    pcrs: Vec<u8>,
    /// A new file for the 32 bytes
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    on: On,
}

/// Arguments of `unlatch`.
#[derive(Args)]
pub(crate) struct Unlatch {
    /// Also if the PIN is still the one that was refused
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    on: On,
}

/// Which device.
#[derive(Args)]
pub(crate) struct On {
    /// The device, by its name in the configuration
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = device_name)]
    device: DeviceName,
}

impl Command {
    const fn device(&self) -> &DeviceName {
        match self {
            Self::Unlatch(args) => &args.on.device,
            #[cfg(feature = "tpm")]
            Self::SealAuth(args) => &args.on.device,
            #[cfg(feature = "tpm")]
            Self::PcrDigest(args) => &args.on.device,
        }
    }
}

/// Reads a device's name.
pub(crate) fn device_name(text: &str) -> Result<DeviceName, &'static str> {
    DeviceName::try_from(text.to_owned())
}

/// Runs the command.
pub(crate) fn run(command: &Command, context: &Context) -> Result<(), CliError> {
    let mut parts = local::Local::of(&local::config(context)?)?;
    let Some(config) = parts.devices.remove(command.device()) else {
        return Err(CliError::usage(
            format!("no device `{}` is configured", command.device()),
            "see the sections [seal] and [devices.NAME] of the configuration",
        ));
    };
    match command {
        Command::Unlatch(args) => {
            // The PIN alone passes through, so that little memory can be locked under any limit.
            parts.memory.slots = 8;
            unlatch(args, &config, &arena(&parts.memory)?, context)
        }
        #[cfg(feature = "tpm")]
        Command::SealAuth(args) => {
            let pem = std::fs::read_to_string(&args.authority)
                .map_err(|e| CliError::local("cannot read the authority's key", e))?;
            let sealed = seal::tpm::seal_auth(&config, &arena(&parts.memory)?, &args.pcrs, &pem);
            let sealed = sealed.map_err(|reason| CliError::local("the secret was not sealed", reason))?;
            write_new(&args.out, sealed.as_bytes())?;
            context.note("keep a copy of the plain secret elsewhere: this TPM alone can open the file");
            output::object(context.global.output, &json!({ "sealed": args.out, "pcrs": args.pcrs }), "sealed")
        }
        #[cfg(feature = "tpm")]
        Command::PcrDigest(args) => {
            let digest = seal::tpm::pcr_digest(&config, &arena(&parts.memory)?, &args.pcrs);
            let digest = digest.map_err(|reason| CliError::local("no digest", reason))?;
            write_new(&args.out, &digest)?;
            let shown = json!({ "digest": hex::encode(&digest), "file": args.out });
            output::object(context.global.output, &shown, "digest")
        }
    }
}

fn arena(options: &seal::guarded::Options) -> Result<Arena, CliError> {
    Arena::new(options).map_err(|e| CliError::local("guarded memory", e))
}

#[cfg(feature = "tpm")]
fn write_new(path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let file = input::create_private(path)?;
    input::fill_private(&file, path, bytes)
}

fn unlatch(
    args: &Unlatch,
    config: &seal::DeviceConfig,
    arena: &Arena,
    context: &Context,
) -> Result<(), CliError> {
    let Some(serial) = seal::unlatch(config, arena, args.force)
        .map_err(|e| CliError::local("cannot change the latch", e))?
    else {
        return Err(CliError::local(
            "logins stay off",
            "the PIN is still the one that the token refused; replace it, or use --force to send it again",
        ));
    };
    context.note("the next login uses the PIN that its source gives now");
    output::object(context.global.output, &json!({ "unlatched": serial }), "unlatched")
}
