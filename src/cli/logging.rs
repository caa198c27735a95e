//! The daemon's log: standard error, text on a terminal, JSON elsewhere; its level can change while
//! the daemon runs.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use super::error::CliError;

/// Changes the level of a running daemon.
pub(crate) struct Levels(reload::Handle<EnvFilter, Registry>);

impl Levels {
    /// Sets another filter, for example `info,lacre::seal=debug`.
    ///
    /// # Errors
    /// If the filter is not understood; the old one stays.
    pub(crate) fn set(&self, filter: &str) -> Result<(), CliError> {
        self.0.reload(parse(filter)?).map_err(|e| CliError::local("cannot change the log level", e))
    }
}

/// Starts logging. `json` also on a terminal.
pub(crate) fn start(filter: &str, json: bool) -> Result<Levels, CliError> {
    let (filter, handle) = reload::Layer::new(parse(filter)?);
    let lines = if json || !stderr().is_terminal() {
        fmt::layer().json().flatten_event(true).with_writer(stderr).boxed()
    } else {
        fmt::layer().with_ansi(false).with_writer(stderr).boxed()
    };
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .try_init()
        .map_err(|e| CliError::local("cannot start logging", e))?;
    std::panic::set_hook(Box::new(log_panic));
    Ok(Levels(handle))
}

/// Says where a thread panicked. The text of a panic may quote what was at hand, so it is withheld.
fn log_panic(info: &std::panic::PanicHookInfo<'_>) {
    let place = info.location().map_or_else(String::new, ToString::to_string);
    let thread = std::thread::current();
    let thread = thread.name().unwrap_or_default();
    tracing::error!(place, thread, "a thread panicked");
}

fn parse(filter: &str) -> Result<EnvFilter, CliError> {
    // The HTTP libraries' traces show bodies and headers: never below info, whatever is asked for.
    let capped = format!("{filter},hyper=info,hyper_util=info,reqwest=info,actix_http=info,h2=info");
    EnvFilter::try_new(capped).map_err(|e| CliError::local(format!("log level {filter}"), e))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex, PoisonError};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_panic_is_logged_by_its_place_and_without_its_text() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(super::log_panic));

        let unwound = tracing::subscriber::with_default(subscriber, || {
            std::panic::catch_unwind(|| panic!("{}", "secret-".to_owned() + "4711"))
        });

        std::panic::set_hook(before);
        assert!(unwound.is_err());
        let log = log.0.lock().unwrap();
        let text = String::from_utf8_lossy(&log);
        assert!(text.contains("a thread panicked") && text.contains("logging.rs"), "{text}");
        assert!(!text.contains("4711"), "{text}");
    }
}
