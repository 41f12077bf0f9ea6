//! Who speaks: a user of this host, or the holder of a certificate.

use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

/// A client, as its connection shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A user of this host, as the kernel says (unix(7), SO_PEERCRED).
    User { uid: u32, pid: Option<i32> },
    /// The name in a certificate that the clients' CA has signed.
    Certificate {
        name: String,
        address: SocketAddr,
        /// It is valid no longer.
        expires: SystemTime,
    },
}

impl Identity {
    /// Whether it no longer counts: a certificate is checked when its client connects, and may expire while it is connected.
    pub fn expired(&self) -> bool {
        matches!(self, Identity::Certificate { expires, .. } if *expires < SystemTime::now())
    }
}

/// As the access file names it.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::User { uid, .. } => write!(f, "uid:{uid}"),
            Identity::Certificate { name, .. } => write!(f, "cert:{}", name.escape_debug()),
        }
    }
}

/// Why a certificate names nobody.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    #[error("The certificate cannot be read: {0}")]
    Malformed(String),
    #[error("The certificate has neither a URI or DNS name (subjectAltName) nor one common name")]
    Nameless,
}

/// What the service needs to know of a certificate.
#[derive(Debug, PartialEq, Eq)]
pub struct Certificate {
    pub name: Option<String>,
    pub valid_from: SystemTime,
    pub expires: SystemTime,
}

impl Certificate {
    /// Reads a certificate (DER, RFC 5280). Its name is its first URI (RFC 5280, 4.2.1.6), or else its first DNS name, or else
    /// its common name.
    ///
    /// # Errors
    /// It is malformed.
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        let malformed = |error: &dyn fmt::Display| CertificateError::Malformed(error.to_string());
        let (_, certificate) = X509Certificate::from_der(der).map_err(|error| malformed(&error))?;
        let alternatives = certificate.subject_alternative_name().map_err(|error| malformed(&error))?;
        let names = alternatives.map_or(&[][..], |extension| &extension.value.general_names);
        let uri = names.iter().find_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
        let dns = names.iter().find_map(|name| match name {
            GeneralName::DNSName(dns) => Some(*dns),
            _ => None,
        });
        let mut common = certificate.subject().iter_common_name();
        let common = match (common.next(), common.next()) {
            (Some(only), None) => only.as_str().ok(),
            _ => None,
        };
        let name = uri.or(dns).or(common).filter(|name| !name.is_empty());
        let time = |seconds: i64| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
        };
        let validity = certificate.validity();
        Ok(Self {
            name: name.map(ToOwned::to_owned),
            valid_from: time(validity.not_before.timestamp()),
            expires: time(validity.not_after.timestamp()),
        })
    }

    /// Whom it names, who speaks from an address.
    ///
    /// # Errors
    /// It names nobody.
    pub fn identify(self, address: SocketAddr) -> Result<Identity, CertificateError> {
        let name = self.name.ok_or(CertificateError::Nameless)?;
        Ok(Identity::Certificate { name, address, expires: self.expires })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn name(common: &[&str], alternatives: Vec<SanType>) -> Option<String> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for one in common {
            params.distinguished_name.push(DnType::CommonName, *one);
        }
        params.subject_alt_names = alternatives;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Certificate::parse(certificate.der()).unwrap().name
    }

    #[test]
    fn a_certificate_names_its_holder_by_uri_or_dns_name_or_common_name() {
        let uri = || SanType::URI("spiffe://example/ci".try_into().unwrap());
        let dns = || SanType::DnsName("ci.example".try_into().unwrap());
        let ip = || SanType::IpAddress([127, 0, 0, 1].into());
        assert_eq!(name(&["ci"], vec![dns(), uri()]).as_deref(), Some("spiffe://example/ci"));
        assert_eq!(name(&["ci"], vec![ip(), dns()]).as_deref(), Some("ci.example"));
        assert_eq!(name(&["ci"], vec![ip()]).as_deref(), Some("ci"));
        assert_eq!(name(&[], vec![ip()]), None);
        assert_eq!(name(&[""], vec![]), None);
    }

    proptest! {
        #[test]
        fn what_is_no_certificate_is_an_error(der in prop::collection::vec(any::<u8>(), 0..300)) {
            Certificate::parse(&der).unwrap_err();
        }

        #[test]
        fn a_certificate_with_a_bit_that_is_wrong_is_no_reason_to_panic(bit in 0_usize..2000) {
            let params = CertificateParams::new(vec!["ci.example".to_owned()]).unwrap();
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let mut der = certificate.der().to_vec();
            let bit = bit % (8 * der.len());
            der[bit / 8] ^= 1 << (bit % 8);
            let _ = Certificate::parse(&der);
        }
    }

    #[test]
    fn a_name_cannot_break_a_line_of_the_log() {
        let who = Identity::Certificate {
            name: "a\nb".to_owned(),
            address: ([127, 0, 0, 1], 1).into(),
            expires: SystemTime::UNIX_EPOCH,
        };
        assert_eq!(who.to_string(), "cert:a\\nb");
        assert!(who.expired());
        assert!(!Identity::User { uid: 0, pid: None }.expired());
    }
}
