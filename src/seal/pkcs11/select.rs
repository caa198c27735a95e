//! Which module, which token, where the PIN is: from the configuration or a `pkcs11:` URI (RFC 7512).
//!
//! Checks that need no module happen here, before anything is loaded and long before a PIN is sent.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::seal::StartError;
use crate::seal::guarded::{Arena, SecretBuf};
use crate::seal::key::WrapMechanism;
use crate::seal::pin::{PROMPT, PinSource, TypedPin};
use crate::seal::pkcs11::custody::EVIDENCE;
use crate::seal::pkcs11::{Config, GcmIv};

/// A checked selection.
pub(crate) struct Selection {
    pub(crate) module: PathBuf,
    pub(crate) label: Option<String>,
    pub(crate) serial: Option<String>,
    pub(crate) manufacturer: Option<String>,
    pub(crate) model: Option<String>,
    pub(crate) pin: PinSource,
    pub(crate) wrap: Option<WrapMechanism>,
    pub(crate) gcm_iv: GcmIv,
    pub(crate) init_parameters: Option<CString>,
    pub(crate) without_evidence: Vec<String>,
}

/// What a URI may say about a token; percent-decoded.
#[derive(Default)]
struct FromUri {
    module: Option<PathBuf>,
    label: Option<String>,
    serial: Option<String>,
    manufacturer: Option<String>,
    model: Option<String>,
    pin_source: Option<String>,
}

impl Selection {
    /// Puts configuration and URI together and checks files.
    pub(crate) fn new(config: &Config, arena: &Arena) -> Result<Self, StartError> {
        let uri = config.uri.as_deref().map_or_else(|| Ok(FromUri::default()), parse_uri)?;
        let label = config.token.clone().or(uri.label);
        let serial = config.serial.clone().or(uri.serial);
        if label.is_none() && serial.is_none() {
            return Err(selection("name the token by `token` (label), `serial` or `uri`"));
        }
        let module = config.module.clone().or(uri.module);
        let module = module.ok_or_else(|| selection("no `module` (path of the vendor's library)"))?;
        let wrap = match config.wrap.as_deref() {
            None | Some("auto") => None,
            Some(name) => {
                let known = WrapMechanism::PREFERENCE.into_iter().find(|known| known.name() == name);
                Some(known.ok_or_else(|| {
                    selection("`wrap` must be auto or a token's mechanism of docs/formats/sealed-v1.md")
                })?)
            }
        };
        let init_parameters = config.init_parameters.clone().map(CString::new).transpose();
        let init_parameters = init_parameters.map_err(|_| selection("`init_parameters` has a NUL"))?;
        let without_evidence = without_evidence(&config.without_evidence)?;
        let source = config.pin_source.clone().or(uri.pin_source);
        let source =
            source.ok_or_else(|| selection("no `pin_source` (file:/path, credential:NAME, prompt)"))?;
        let module = check_module(&module)?;
        let pin = match &config.typed_pin {
            Some(typed) => PinSource::Typed(Arc::clone(&typed.0)),
            None => PinSource::parse(&source, config.credentials_dir.as_deref(), arena)?,
        };
        let (manufacturer, model) = (uri.manufacturer, uri.model);
        let gcm_iv = config.gcm_iv;
        Ok(Self {
            module,
            label,
            serial,
            manufacturer,
            model,
            pin,
            wrap,
            gcm_iv,
            init_parameters,
            without_evidence,
        })
    }

    /// Reads the PIN into guarded memory.
    pub(crate) fn read_pin(&self, arena: &Arena) -> Result<SecretBuf, StartError> {
        self.pin.read(arena)
    }
}

/// Only what is evidence can be done without: protection cannot.
fn without_evidence(names: &[String]) -> Result<Vec<String>, StartError> {
    if let Some(other) = names.iter().find(|name| !EVIDENCE.contains(&name.as_str())) {
        let known = EVIDENCE.join(", ");
        return Err(StartError::Selection(format!("`without_evidence` may have {known}; not {other}")));
    }
    if !names.is_empty() {
        tracing::warn!(?names, "Keys are used without this evidence of their custody, as configured");
    }
    Ok(names.to_vec())
}

fn selection(reason: &str) -> StartError {
    StartError::Selection(reason.to_owned())
}

fn parse_uri(uri: &str) -> Result<FromUri, StartError> {
    // The parser's own message quotes the URI, which may hold a PIN; say only that it is wrong.
    let parsed = pk11_uri_parser::parse(uri).map_err(|error| {
        StartError::Selection(format!("the `pkcs11:` URI is not valid: {}", violation(&error)))
    })?;
    if parsed.pin_value().is_some() {
        return Err(selection(
            "`pin-value` in a URI would put the PIN into a file and into process lists; use pin-source",
        ));
    }
    // RFC 7512, section 2.4: an attribute that is not matched would select more than the URI says.
    let ignored = [
        ("slot-id", parsed.slot_id().is_some()),
        ("slot-description", parsed.slot_description().is_some()),
        ("slot-manufacturer", parsed.slot_manufacturer().is_some()),
        ("library-description", parsed.library_description().is_some()),
        ("library-manufacturer", parsed.library_manufacturer().is_some()),
        ("library-version", parsed.library_version().is_some()),
        ("object", parsed.object().is_some()),
        ("id", parsed.id().is_some()),
        ("type", parsed.r#type().is_some()),
        ("module-name", parsed.module_name().is_some()),
    ];
    if let Some((name, _)) = ignored.iter().find(|(_, is_there)| *is_there) {
        return Err(StartError::Selection(format!(
            "`{name}` in the `pkcs11:` URI is not supported; name the token by token, serial, manufacturer, model"
        )));
    }
    let decode = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(percent_decode).transpose();
    Ok(FromUri {
        module: decode(parsed.module_path())?.map(PathBuf::from),
        label: decode(parsed.token())?,
        serial: decode(parsed.serial())?,
        manufacturer: decode(parsed.manufacturer())?,
        model: decode(parsed.model())?,
        pin_source: decode(parsed.pin_source())?,
    })
}

/// The rule that was broken, without the URI around it.
fn violation(error: &pk11_uri_parser::PK11URIError) -> String {
    let text = error.to_string();
    text.lines().nth(1).map_or_else(
        || "it does not follow RFC 7512".to_owned(),
        |line| line.trim_matches([' ', '^']).to_owned(),
    )
}

fn percent_decode(text: &str) -> Result<String, StartError> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'%' {
            let pair =
                bytes.get(at + 1..at + 3).ok_or_else(|| selection("cut percent-encoding in the URI"))?;
            let mut byte = [0];
            hex::decode_to_slice(pair, &mut byte)
                .map_err(|_| selection("bad percent-encoding in the URI"))?;
            out.push(byte[0]);
            at += 3;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8(out).map_err(|_| selection("a URI value is not UTF-8"))
}

/// Resolves links and refuses a module that somebody else could replace: it will run in this process.
fn check_module(path: &Path) -> Result<PathBuf, StartError> {
    let problem =
        |reason: &str| StartError::Module { path: path.display().to_string(), reason: reason.to_owned() };
    if !path.is_absolute() {
        return Err(problem("give an absolute path, so that no search path decides which file is loaded"));
    }
    let real = fs::canonicalize(path).map_err(|error| problem(&error.to_string()))?;
    let file = fs::metadata(&real).map_err(|error| problem(&error.to_string()))?;
    if !file.is_file() {
        return Err(problem("not a regular file"));
    }
    let writable = |meta: &fs::Metadata| meta.permissions().mode() & 0o002 != 0;
    let parent = real.parent().and_then(|dir| fs::metadata(dir).ok());
    // A world-writable directory with the sticky bit (such as a temporary directory) lets others add
    // files, but not replace this one.
    let open_parent = parent.is_some_and(|dir| writable(&dir) && dir.mode() & 0o1000 == 0);
    if writable(&file) || open_parent {
        return Err(problem("the file or its directory is writable by everybody; refusing to load it"));
    }
    Ok(real)
}

/// See [`super::ask_pin`].
pub(super) fn ask_pin(config: &Config, arena: &Arena) -> Result<Option<TypedPin>, StartError> {
    let uri = config.uri.as_deref().map_or_else(|| Ok(FromUri::default()), parse_uri)?;
    let source = config.pin_source.clone().or(uri.pin_source);
    (source.as_deref() == Some(PROMPT)).then(|| TypedPin::ask(arena)).transpose()
}

#[cfg(test)]
mod tests {
    use super::{parse_uri, percent_decode};

    #[test]
    fn a_uri_names_token_serial_module_and_pin_source() {
        let uri = "pkcs11:token=my%20token;serial=0a1b?module-path=/usr/lib/x.so&pin-source=file:/etc/pin";
        let parsed = parse_uri(uri).unwrap();
        assert_eq!(parsed.label.as_deref(), Some("my token"));
        assert_eq!(parsed.serial.as_deref(), Some("0a1b"));
        assert_eq!(parsed.module.unwrap().to_str(), Some("/usr/lib/x.so"));
        assert_eq!(parsed.pin_source.as_deref(), Some("file:/etc/pin"));
    }

    #[test]
    fn a_uri_is_matched_whole_or_refused() {
        let parsed = parse_uri("pkcs11:manufacturer=Vendor%20X;model=M;token=prod").unwrap();
        assert_eq!((parsed.manufacturer.as_deref(), parsed.model.as_deref()), (Some("Vendor X"), Some("M")));
        for more in ["slot-id=1", "library-manufacturer=x", "object=k", "type=private", "id=%01"] {
            let error = parse_uri(&format!("pkcs11:token=t;{more}")).err().unwrap().to_string();
            assert!(error.contains(more.split('=').next().unwrap()), "{error}");
        }
        assert!(parse_uri("pkcs11:token=t?module-name=x").is_err());
    }

    #[test]
    fn a_pin_inside_a_uri_is_refused_without_being_repeated() {
        let error = parse_uri("pkcs11:token=t?pin-value=1234567").err().unwrap().to_string();
        assert!(error.contains("pin-source") && !error.contains("1234567"));
        let broken = parse_uri("pkcs11:token=a b?pin-value=7654321").err().unwrap().to_string();
        assert!(!broken.contains("7654321"));
    }

    #[test]
    fn cut_or_wrong_percent_encoding_is_refused() {
        assert!(percent_decode("a%2").is_err());
        assert!(percent_decode("a%zz").is_err());
        assert_eq!(percent_decode("a%2Fb").unwrap(), "a/b");
    }
}
