//! Checks of files: the module, the PIN, the latch, the data directory. Nothing is loaded or tried.

use std::fs::{self, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Finding;
use crate::cli::global::Context;
use crate::seal::DeviceConfig;
use crate::seal::pkcs11::Config;

/// An attribute of a `pkcs11:` URI (RFC 7512, section 2.3), percent-decoded.
fn uri_attribute(config: &Config, name: &str) -> Option<String> {
    let uri = config.uri.as_deref()?;
    let parts = uri.split(['?', '&', ';']);
    let raw = parts.filter_map(|part| part.split_once('=')).find(|(key, _)| *key == name)?.1;
    // "+" stands for itself in such a URI, and for a space in a form.
    let pairs = format!("v={}", raw.replace('+', "%2B"));
    url::form_urlencoded::parse(pairs.as_bytes()).next().map(|(_, value)| value.into_owned())
}

/// Whether the module's file can be loaded and may be: whoever can write it reads every PIN.
pub(crate) fn module(config: &Config) -> Vec<Finding> {
    const CHECK: &str = "module";
    let Some(path) =
        config.module.clone().or_else(|| uri_attribute(config, "module-path").map(PathBuf::from))
    else {
        let todo = "set `module` in [seal.pkcs11], or module-path in the URI";
        return vec![Finding::fail(CHECK, "no module is named", todo)];
    };
    let shown = path.display();
    let (meta, bytes) = match fs::metadata(&path).and_then(|meta| Ok((meta, fs::read(&path)?))) {
        Ok(read) => read,
        Err(error) => {
            let todo = "install the vendor's library, or correct `module`";
            return vec![Finding::fail(CHECK, format!("{shown}: {error}"), todo)];
        }
    };
    let mut findings = vec![library(&bytes, &path)];
    findings.extend(writable("module rights", &path, &meta));
    // The directory too: whoever can write there can replace the file. A link's target counts.
    let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
    for dir in [path.parent(), real.parent().filter(|dir| Some(*dir) != path.parent())].into_iter().flatten()
    {
        if let Ok(meta) = fs::metadata(dir) {
            findings.extend(writable("module directory", dir, &meta));
        }
    }
    findings
}

fn writable(check: &'static str, path: &Path, meta: &Metadata) -> Option<Finding> {
    let sticky = meta.mode() & 0o1000 != 0 && meta.is_dir();
    let open = meta.mode() & 0o002 != 0;
    open.then(|| {
        let found = format!(
            "{} can be written by everybody{}",
            path.display(),
            if sticky { " (sticky)" } else { "" }
        );
        Finding::fail(check, found, format!("chmod o-w {}; until then it is not loaded", path.display()))
    })
}

/// Looks into the ELF header (System V ABI, chapter 4) and for the one symbol that makes a module.
fn library(bytes: &[u8], path: &Path) -> Finding {
    const CHECK: &str = "module";
    let shown = path.display();
    if bytes.get(..4) != Some(b"\x7fELF") {
        return Finding::fail(CHECK, format!("{shown} is not a shared library"), "correct `module`");
    }
    let machine = bytes.get(18..20).map_or(0, |two| u16::from_le_bytes([two[0], two[1]]));
    let ours = match std::env::consts::ARCH {
        "x86_64" => Some(62),
        "aarch64" => Some(183),
        _ => None,
    };
    if ours.is_some_and(|ours| ours != machine) {
        let found = format!("{shown} is for another processor (ELF machine {machine})");
        return Finding::fail(CHECK, found, format!("install the {} build", std::env::consts::ARCH));
    }
    let symbol = b"C_GetFunctionList\0";
    if bytes.windows(symbol.len()).any(|window| window == symbol) {
        return Finding::ok(CHECK, format!("{shown} is a PKCS#11 library for this processor"));
    }
    Finding::fail(
        CHECK,
        format!("{shown} has no C_GetFunctionList, so it is not a PKCS#11 module"),
        "name the vendor's PKCS#11 library, not another one of its libraries",
    )
}

/// Whether the PIN can be read, by us and by nobody else. It is not read.
pub(crate) fn pin(config: &Config, context: &Context) -> Finding {
    const CHECK: &str = "pin";
    let source = config.pin_source.clone().or_else(|| uri_attribute(config, "pin-source"));
    let Some(source) = source else {
        return Finding::fail(
            CHECK,
            "no pin_source is set",
            "set pin_source = \"file:/path\" or \"credential:NAME\"",
        );
    };
    match source.split_once(':') {
        Some(("file", path)) => pin_file(Path::new(path.strip_prefix("//").unwrap_or(path))),
        Some(("credential", name)) => match &context.env.credentials {
            Some(dir) => pin_file(&dir.join(name)),
            None => Finding::ok(
                CHECK,
                format!("systemd gives credential {name} to the service; not visible here"),
            ),
        },
        _ if source == "prompt" => Finding::warn(
            CHECK,
            "asked for at every start",
            "use a file or a systemd credential if the daemon starts unattended",
        ),
        _ => {
            Finding::fail(CHECK, "pin_source is not understood", "use file:/path, credential:NAME or prompt")
        }
    }
}

/// Whether the TPM's device file can be opened, and its secret read by us alone.
#[cfg(feature = "tpm")]
pub(crate) fn tpm(config: &crate::seal::tpm::Config, context: &Context) -> Vec<Finding> {
    const CHECK: &str = "tpm";
    let mut findings = Vec::new();
    if let Some(path) = config.tcti.strip_prefix("device:") {
        findings.push(match fs::OpenOptions::new().read(true).write(true).open(path) {
            Ok(_) if path == "/dev/tpm0" => Finding::warn(
                CHECK,
                "/dev/tpm0 is for one program at a time",
                "use device:/dev/tpmrm0, which the kernel shares between programs",
            ),
            Ok(_) => Finding::ok(CHECK, format!("{path} can be opened")),
            Err(error) => Finding::fail(
                CHECK,
                format!("{path}: {error}"),
                "switch the TPM on in the firmware, and add the daemon's user to the group tss",
            ),
        });
    }
    findings.push(match config.auth_source.split_once(':') {
        Some(("file", path)) => pin_file(Path::new(path.strip_prefix("//").unwrap_or(path))),
        Some(("sealed", path)) if Path::new(path).is_file() => {
            Finding::ok(CHECK, format!("the secret is sealed in {path}"))
        }
        Some(("sealed", path)) => {
            Finding::fail(CHECK, format!("{path} is not there"), "make it with `lacre hsm seal-auth`")
        }
        Some(("credential", name)) => match &context.env.credentials {
            Some(dir) => pin_file(&dir.join(name)),
            None => Finding::ok(
                CHECK,
                format!("systemd gives credential {name} to the service; not visible here"),
            ),
        },
        _ => Finding::fail(
            CHECK,
            "auth_source is not understood",
            "use file:/path, credential:NAME or sealed:/path",
        ),
    });
    findings
}

/// Nothing to look at: the start says why.
#[cfg(not(feature = "tpm"))]
pub(crate) fn tpm(_: &crate::seal::tpm::Config, _: &Context) -> Vec<Finding> {
    Vec::new()
}

fn pin_file(path: &Path) -> Finding {
    const CHECK: &str = "pin";
    let shown = path.display();
    let meta = match fs::metadata(path).and_then(|meta| fs::File::open(path).map(|_| meta)) {
        Ok(meta) => meta,
        Err(error) => {
            return Finding::fail(
                CHECK,
                format!("{shown}: {error}"),
                "run as the daemon's user, or fix the path",
            );
        }
    };
    match meta.mode() & 0o777 {
        0o400 | 0o600 => Finding::ok(CHECK, format!("{shown} can be read by its owner only")),
        mode => Finding::fail(CHECK, format!("{shown} has mode {mode:04o}"), format!("chmod 0400 {shown}")),
    }
}

/// Whether the latch can be written: without it no login is tried at all.
pub(crate) fn latch(device: &DeviceConfig, data_dir: &Path) -> Finding {
    const CHECK: &str = "latch";
    let dir = device.latch_dir.clone().unwrap_or_else(|| data_dir.join("latch"));
    let shown = dir.display();
    match fs::read_dir(&dir) {
        Ok(entries) => match rustix::fs::access(&dir, rustix::fs::Access::WRITE_OK) {
            Ok(()) => Finding::ok(CHECK, format!("{shown} can be written, {} file(s)", entries.count())),
            Err(error) => Finding::fail(CHECK, format!("{shown}: {error}"), "give it to the daemon's user"),
        },
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Finding::ok(CHECK, format!("{shown} is not there yet; the daemon makes it"))
        }
        Err(error) => Finding::fail(CHECK, format!("{shown}: {error}"), "give it to the daemon's user"),
    }
}

/// Whether the daemon's files are the daemon's alone.
pub(crate) fn data_dir(dir: &Path) -> Finding {
    const CHECK: &str = "data directory";
    let shown = dir.display();
    match fs::metadata(dir).map(|meta| meta.mode()) {
        Ok(mode) if matches!(mode & 0o077, 0) => Finding::ok(CHECK, format!("{shown} is its owner's only")),
        Ok(mode) => Finding::warn(
            CHECK,
            format!("{shown} has mode {:04o}", mode & 0o777),
            format!("chmod 0700 {shown}"),
        ),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Finding::warn(CHECK, format!("{shown} is not there yet"), "`lacre init` makes it")
        }
        Err(error) => Finding::fail(CHECK, format!("{shown}: {error}"), "fix the path or its rights"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Level;

    #[test]
    fn a_text_file_is_no_module() {
        assert_eq!(library(b"#!/bin/sh\n", Path::new("m.so")).level, Level::Fail);
    }

    #[test]
    fn a_uri_gives_its_attributes_decoded() {
        let uri = "pkcs11:token=a%20b;serial=1?module-path=/usr/lib/m%2Bx.so&pin-source=file:/etc/pin";
        let config = Config { uri: Some(uri.into()), ..Config::default() };

        assert_eq!(uri_attribute(&config, "module-path").as_deref(), Some("/usr/lib/m+x.so"));
        assert_eq!(uri_attribute(&config, "pin-source").as_deref(), Some("file:/etc/pin"));
    }
}
