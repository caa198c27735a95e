//! Values on their way in and out of this machine: stdin, file or prompt; a new file of mode 0600.
//!
//! A value is never an argument: arguments show in the process list and in the shell's history.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use secrecy::SecretString;
use serde_json::Value;
use zeroize::Zeroizing;

use super::error::CliError;
use super::global::Context;

/// The server's limit; more is refused before it is read.
const LARGEST_VALUE: u64 = 1 << 20;

/// Reads a value from `file` (`-` is stdin), from stdin if that is not a terminal, or by a prompt
/// without echo.
pub(crate) fn value(context: &Context, file: Option<&Path>) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let stdin = io::stdin();
    let bytes = match file {
        Some(path) if path.as_os_str() != "-" => {
            let shown = path.display();
            let file = File::open(path).map_err(|e| CliError::local(format!("cannot open {shown}"), e))?;
            limited(file, &shown.to_string())?
        }
        None if stdin.is_terminal() => return prompt(),
        _ => limited(stdin.lock(), "standard input")?,
    };
    if bytes.is_empty() {
        return Err(CliError::usage("the value is empty", "pipe it in, or give --from-file"));
    }
    if bytes.ends_with(b"\n") {
        context.note("note: the value ends with a line end, which is stored with it (printf writes none)");
    }
    Ok(bytes)
}

/// Reads a text that is a document of its own, such as a PEM file, from `file` (`-` is stdin) or from stdin.
pub(crate) fn document(file: Option<&Path>) -> Result<Zeroizing<String>, CliError> {
    let (bytes, name) = match file.filter(|path| path.as_os_str() != "-") {
        Some(path) => {
            let shown = path.display().to_string();
            let file = File::open(path).map_err(|e| CliError::local(format!("cannot open {shown}"), e))?;
            (limited(file, &shown)?, shown)
        }
        None if io::stdin().is_terminal() => {
            return Err(CliError::usage("nothing to read", "pipe it in, or give --file"));
        }
        None => (limited(io::stdin().lock(), "standard input")?, "standard input".to_owned()),
    };
    match std::str::from_utf8(&bytes) {
        Ok(text) if !text.trim().is_empty() => Ok(Zeroizing::new(text.to_owned())),
        Ok(_) => Err(CliError::usage(format!("{name} is empty"), "it is a text such as a PEM file")),
        Err(_) => Err(CliError::usage(format!("{name} is not text"), "it is a text such as a PEM file")),
    }
}

fn prompt() -> Result<Zeroizing<Vec<u8>>, CliError> {
    let read = |text: &str| {
        rpassword::prompt_password(text).map_err(|e| CliError::local("cannot read from the terminal", e))
    };
    let first = Zeroizing::new(read("Value (not shown): ")?);
    let second = Zeroizing::new(read("Again: ")?);
    if first != second || first.is_empty() {
        return Err(CliError::usage("the two values differ or are empty", "try again, or use --from-file"));
    }
    Ok(Zeroizing::new(first.as_bytes().to_vec()))
}

fn limited(source: impl Read, name: &str) -> Result<Zeroizing<Vec<u8>>, CliError> {
    // Sized at once: growing would leave copies of the value behind.
    let capacity = usize::try_from(LARGEST_VALUE + 1).unwrap_or(usize::MAX);
    let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
    let read = source.take(LARGEST_VALUE + 1).read_to_end(&mut bytes);
    read.map_err(|e| CliError::local(format!("cannot read {name}"), e))?;
    if bytes.len() as u64 > LARGEST_VALUE {
        return Err(CliError::usage(
            "the value is larger than 1 MiB",
            "keep large data elsewhere and seal its key",
        ));
    }
    Ok(bytes)
}

/// Reads a JSON document from a file; `-` is standard input.
pub(crate) fn json(path: &Path) -> Result<Value, CliError> {
    let bytes = match path.as_os_str() == "-" {
        true => limited(io::stdin().lock(), "standard input")?,
        false => {
            let shown = path.display();
            let file = File::open(path).map_err(|e| CliError::local(format!("cannot open {shown}"), e))?;
            limited(file, &shown.to_string())?
        }
    };
    serde_json::from_slice(&bytes).map_err(|e| CliError::local(format!("{} is not JSON", path.display()), e))
}

/// How a value travels in JSON: as text if it is text, else as base64.
pub(crate) fn encode(bytes: &[u8]) -> (&'static str, Zeroizing<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => ("utf8", Zeroizing::new(text.to_owned())),
        Err(_) => ("base64", Zeroizing::new(STANDARD.encode(bytes))),
    }
}

/// Takes a value out of the server's answer.
pub(crate) fn decode(answer: &Value) -> Option<Zeroizing<Vec<u8>>> {
    let text = answer["value"].as_str()?;
    match answer["encoding"].as_str()? {
        "utf8" => Some(Zeroizing::new(text.as_bytes().to_vec())),
        "base64" => STANDARD.decode(text).ok().map(Zeroizing::new),
        _ => None,
    }
}

/// Opens a new file of mode 0600; refuses to touch one that exists. Done before the value is asked
/// for, so that no value is released (and recorded) that then cannot be kept.
pub(crate) fn create_private(path: &Path) -> Result<File, CliError> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => CliError::usage(
            format!("{} exists and is not overwritten", path.display()),
            "choose another file, or remove that one first",
        ),
        _ => CliError::local(format!("cannot create {}", path.display()), error),
    })
}

/// Writes `bytes` to a file from [`create_private`] and waits until the disk has them.
pub(crate) fn fill_private(mut file: &File, path: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(|e| CliError::local(format!("cannot write {}", path.display()), e))
}

/// Reads a one-line secret (token, client secret) from a file.
pub(crate) fn secret_file(path: &Path) -> Result<SecretString, CliError> {
    let shown = path.display();
    let file = File::open(path).map_err(|e| CliError::local(format!("cannot open {shown}"), e))?;
    let bytes = limited(file, &shown.to_string())?;
    let text = std::str::from_utf8(&bytes).map_err(|e| CliError::local(format!("{shown}"), e))?;
    Ok(SecretString::from(text.trim().to_owned()))
}

/// Asks yes or no on a terminal; elsewhere `--yes` is needed.
pub(crate) fn confirm(question: &str, yes: bool) -> Result<(), CliError> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() {
        return Err(CliError::usage("this cannot be undone and nobody can be asked", "add --yes"));
    }
    eprint!("{} [y/N] ", super::output::printable(question));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|e| CliError::local("cannot read from the terminal", e))?;
    match answer.trim() {
        "y" | "Y" | "yes" => Ok(()),
        _ => Err(CliError::usage("not confirmed, nothing was done", "answer y, or add --yes")),
    }
}

/// Asks for a word on a terminal, so that nobody agrees by habit.
pub(crate) fn confirm_by_typing(statement: &str, word: &str) -> Result<(), CliError> {
    eprint!("{} Type {word} to go on: ", super::output::printable(statement));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|e| CliError::local("cannot read from the terminal", e))?;
    match answer.trim() == word {
        true => Ok(()),
        false => Err(CliError::usage("not confirmed, nothing was done", "type the word, or add --yes")),
    }
}
