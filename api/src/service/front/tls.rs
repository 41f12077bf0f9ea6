//! The service's certificate, its key, and the CA of its clients.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::{Error as PemError, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::identity::Certificate;
use crate::cli::TlsArgs;
use crate::exit::Failure;

/// Reads a file of the option `option`.
fn read(option: &str, path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| wrong(option, path, &format!("cannot be read: {error}")))
}

fn wrong(option: &str, path: &Path, what: &str) -> Failure {
    Failure::Usage(format!("{option} {}: {what}", path.display()))
}

/// The certificates of a PEM file, one at least.
fn certificates(option: &str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Failure> {
    let text = read(option, path)?;
    let found: Result<Vec<_>, PemError> = CertificateDer::pem_slice_iter(&text).collect();
    let found = found.map_err(|error| wrong(option, path, &format!("is no PEM file: {error}")))?;
    if found.is_empty() {
        return Err(wrong(option, path, "has no certificate in it (PEM, 'BEGIN CERTIFICATE')"));
    }
    Ok(found)
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, Failure> {
    let text = read("--tls-key", path)?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|_| {
        let what = "has no private key in it that can be used (PEM, PKCS #8, SEC 1 or PKCS #1, without a passphrase)";
        wrong("--tls-key", path, what)
    })
}

/// Whether the service's own certificate is valid now: clients would refuse it, each with a message of its own.
fn check_dates(path: &Path, certificate: &CertificateDer<'_>) -> Result<(), Failure> {
    let wrong = |what: String| wrong("--tls-cert", path, &what);
    let parsed = Certificate::parse(certificate).map_err(|error| wrong(error.to_string()))?;
    let now = SystemTime::now();
    if now > parsed.expires {
        let when = humantime::format_rfc3339_seconds(parsed.expires);
        return Err(wrong(format!("expired at {when}; give one that is valid")));
    }
    if now < parsed.valid_from {
        let when = humantime::format_rfc3339_seconds(parsed.valid_from);
        return Err(wrong(format!("is valid from {when} on; give one that is valid now")));
    }
    Ok(())
}

/// TLS as the service speaks it: no client without a certificate that the CA has signed.
///
/// # Errors
/// A file cannot be read, or is not what it must be.
pub fn config(args: &TlsArgs) -> Result<Arc<ServerConfig>, Failure> {
    let chain = certificates("--tls-cert", &args.tls_cert)?;
    check_dates(&args.tls_cert, &chain[0])?;
    let mut roots = RootCertStore::empty();
    for root in certificates("--tls-client-ca", &args.tls_client_ca)? {
        roots.add(root).map_err(|error| wrong("--tls-client-ca", &args.tls_client_ca, &error.to_string()))?;
    }
    let provider = Arc::new(ring::default_provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider)).build();
    let verifier =
        verifier.map_err(|error| wrong("--tls-client-ca", &args.tls_client_ca, &error.to_string()))?;
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| Failure::Host(format!("TLS is not to be had: {error}")))?;
    let config = builder.with_client_cert_verifier(verifier).with_single_cert(chain, key(&args.tls_key)?);
    let mut config = config.map_err(|error| {
        let what = format!("is not the key of --tls-cert {}: {error}", args.tls_cert.display());
        wrong("--tls-key", &args.tls_key, &what)
    })?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    // A resumed session would not look at the client's certificate again.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}
