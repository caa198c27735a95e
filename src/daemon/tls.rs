//! TLS on the TCP listener: rustls with aws-lc-rs, TLS 1.2 and up, optional client certificates,
//! and a server certificate that is read again on SIGHUP while connections go on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsConfig;

/// Why TLS cannot be offered.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read or does not hold what it should.
    #[error("{path}: {reason}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong; never what is in it.
        reason: String,
    },
    /// The files are well and do not go together.
    #[error("certificates cannot be used")]
    Unusable(#[from] rustls::Error),
}

/// The server's certificate of the moment.
#[derive(Debug)]
pub(super) struct Certificates {
    files: TlsConfig,
    provider: Arc<CryptoProvider>,
    current: ArcSwap<CertifiedKey>,
}

impl Certificates {
    fn load(files: &TlsConfig, provider: &Arc<CryptoProvider>) -> Result<CertifiedKey, TlsError> {
        let chain = read_chain(&files.cert)?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|error| bad(&files.key, &error))?;
        Ok(CertifiedKey::from_der(chain, key, provider)?)
    }

    /// Reads the files again. After an error the old certificate stays in use.
    pub(super) fn reload(&self) -> Result<(), TlsError> {
        self.current.store(Arc::new(Self::load(&self.files, &self.provider)?));
        Ok(())
    }
}

impl ResolvesServerCert for Certificates {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current.load_full())
    }
}

/// The server's TLS configuration, and the handle that reloads its certificate.
pub(super) fn configure(files: &TlsConfig) -> Result<(ServerConfig, Arc<Certificates>), TlsError> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let current = ArcSwap::from_pointee(Certificates::load(files, &provider)?);
    let certificates =
        Arc::new(Certificates { files: files.clone(), provider: Arc::clone(&provider), current });
    let builder =
        ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for authority in read_chain(path)? {
                roots.add(authority)?;
            }
            // Optional: tokens stay possible. Who has a certificate must have a valid one.
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .allow_unauthenticated()
                .build()
                .map_err(|error| bad(path, &error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let resolver: Arc<dyn ResolvesServerCert> = Arc::clone(&certificates) as _;
    Ok((builder.with_cert_resolver(resolver), certificates))
}

fn read_chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| bad(path, &error))?;
    let chain = certificates.collect::<Result<Vec<_>, _>>().map_err(|error| bad(path, &error))?;
    if chain.is_empty() { Err(bad(path, &"no certificate in it")) } else { Ok(chain) }
}

fn bad(path: &Path, reason: &dyn std::fmt::Display) -> TlsError {
    TlsError::File { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(dir: &Path, name: &str) -> TlsConfig {
        let made = rcgen::generate_simple_self_signed([name.to_owned()]).unwrap();
        let files =
            TlsConfig { cert: dir.join("c"), key: dir.join("k"), client_ca: None, client_rules: Vec::new() };
        std::fs::write(&files.cert, made.cert.pem()).unwrap();
        std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        files
    }

    #[test]
    fn a_new_certificate_is_used_after_a_reload_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let config = files(dir.path(), "first");
        let (_, certificates) = configure(&config).unwrap();
        let first = certificates.current.load_full().cert[0].clone();

        files(dir.path(), "second");
        certificates.reload().unwrap();
        let second = certificates.current.load_full().cert[0].clone();
        assert_ne!(first, second);

        std::fs::write(&config.cert, "nothing").unwrap();
        assert!(certificates.reload().is_err());
        assert_eq!(certificates.current.load_full().cert[0], second);
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let config = files(dir.path(), "first");
        let key = std::fs::read(&config.key).unwrap();
        files(dir.path(), "second");
        std::fs::write(&config.key, key).unwrap();

        assert!(configure(&config).is_err());
    }
}
