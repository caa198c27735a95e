//! Options that every command takes, and the environment that commands read.
//!
//! What is secret or belongs to other programs is read from the environment only: such variables
//! are parsed from a command line of their own, which is empty, so that no option exists for them.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};
use secrecy::SecretString;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people; may change.
    Table,
    /// One JSON document; stable.
    Json,
    /// One JSON document per line, for lists and streams.
    Ndjson,
    /// Names or ids only, one per line.
    Name,
}

/// Options of every command.
#[derive(Clone, Args)]
pub(crate) struct Global {
    /// Configuration file of the daemon
    #[arg(long, global = true, env = "LACRE_CONFIG", value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// How results are printed
    #[arg(
        short,
        long,
        global = true,
        env = "LACRE_FORMAT",
        value_enum,
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub(crate) output: Format,
    /// Only results and errors, no notes
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Where the daemon is and who asks.
    #[command(flatten)]
    pub(crate) connection: Connection,
}

const ADDR_HELP: &str =
    "Address of the daemon: http(s)://HOST:PORT or unix:///PATH [default: http://127.0.0.1:8280]";

/// Where the daemon is and who asks.
#[derive(Clone, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Connection {
    /// Address of the daemon.
    #[arg(long, global = true, env = "LACRE_ADDR", value_name = "URL", help = ADDR_HELP)]
    pub(crate) addr: Option<String>,
    /// File that holds an access token
    #[arg(long, global = true, env = "LACRE_TOKEN_FILE", value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// Client id to fetch a token with
    #[arg(long, global = true, env = "LACRE_CLIENT_ID", value_name = "ID", requires = "client_secret_file")]
    pub(crate) client_id: Option<String>,
    /// File that holds the client's secret
    #[arg(long, global = true, env = "LACRE_CLIENT_SECRET_FILE", value_name = "FILE")]
    pub(crate) client_secret_file: Option<PathBuf>,
    /// The dev.json that `lacre dev` wrote: gives address and credentials
    #[arg(long, global = true, env = "LACRE_DEV", value_name = "FILE")]
    pub(crate) dev_json: Option<PathBuf>,
    /// Certificate authorities to trust (PEM) instead of the system's
    #[arg(long, global = true, env = "LACRE_CACERT", value_name = "FILE")]
    pub(crate) cacert: Option<PathBuf>,
    /// Client certificate (PEM)
    #[arg(long, global = true, env = "LACRE_CLIENT_CERT", value_name = "FILE", requires = "client_key")]
    pub(crate) client_cert: Option<PathBuf>,
    /// Private key of the client certificate (PEM)
    #[arg(long, global = true, env = "LACRE_CLIENT_KEY", value_name = "FILE")]
    pub(crate) client_key: Option<PathBuf>,
}

/// What is read from the environment and has no option.
#[derive(Clone, Parser)]
#[command(disable_help_flag = true)]
pub(crate) struct Environment {
    /// An access token.
    #[arg(long, env = "LACRE_TOKEN", hide_env_values = true)]
    pub(crate) token: Option<SecretString>,
    /// Where state of this user is kept.
    #[arg(long, env = "XDG_STATE_HOME")]
    pub(crate) state_home: Option<PathBuf>,
    /// SoftHSM's own setting; `lacre dev` compares it.
    #[arg(long, env = "SOFTHSM2_CONF")]
    pub(crate) softhsm2_conf: Option<PathBuf>,
    /// Where systemd puts credentials.
    #[arg(long, env = "CREDENTIALS_DIRECTORY")]
    pub(crate) credentials: Option<PathBuf>,
}

impl Environment {
    /// Reads the environment.
    pub(crate) fn read() -> Result<Self, clap::Error> {
        Self::try_parse_from(["lacre"])
    }
}

/// What a command's function gets besides its own arguments.
pub(crate) struct Context {
    /// The global options.
    pub(crate) global: Global,
    /// The environment.
    pub(crate) env: Environment,
}

impl Context {
    /// Talk: goes to standard error unless `--quiet`.
    pub(crate) fn note(&self, text: &str) {
        if !self.global.quiet {
            eprintln!("{}", super::output::printable(text));
        }
    }
}
