//! Certificates of a test's own, valid or not.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, SanType,
};

const HOUR: Duration = Duration::from_secs(3600);

/// A certificate authority.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// Its certificate's file.
    pub file: PathBuf,
}

/// What a certificate is to be.
pub struct Wanted {
    pub common_name: Option<&'static str>,
    pub alternatives: Vec<SanType>,
    pub from: SystemTime,
    pub until: SystemTime,
    pub purpose: ExtendedKeyUsagePurpose,
}

impl Wanted {
    /// A client's, valid from an hour ago for two.
    pub fn client(common_name: &'static str) -> Self {
        let now = SystemTime::now();
        Self {
            common_name: Some(common_name),
            alternatives: Vec::new(),
            from: now - HOUR,
            until: now + HOUR,
            purpose: ExtendedKeyUsagePurpose::ClientAuth,
        }
    }

    /// A service's on 127.0.0.1.
    pub fn server() -> Self {
        let alternatives = vec![SanType::IpAddress(Ipv4Addr::LOCALHOST.into())];
        Self { alternatives, purpose: ExtendedKeyUsagePurpose::ServerAuth, ..Self::client("service") }
    }

    pub fn expired(self) -> Self {
        Self { from: self.from - HOUR, until: SystemTime::now() - Duration::from_secs(60), ..self }
    }

    pub fn not_yet_valid(self) -> Self {
        Self { from: SystemTime::now() + HOUR, until: self.until + HOUR, ..self }
    }

    fn params(self) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(name) = self.common_name {
            params.distinguished_name.push(DnType::CommonName, name);
        }
        params.subject_alt_names = self.alternatives;
        params.not_before = self.from.into();
        params.not_after = self.until.into();
        params.extended_key_usages = vec![self.purpose];
        params
    }
}

/// A certificate and its key, as files.
#[derive(Clone, Debug)]
pub struct Files {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

impl Files {
    fn write(at: &Path, certificate: &rcgen::Certificate, key: &KeyPair) -> Self {
        let files = Self { certificate: at.with_extension("pem"), key: at.with_extension("key") };
        std::fs::write(&files.certificate, certificate.pem()).expect("written");
        std::fs::write(&files.key, key.serialize_pem()).expect("written");
        files
    }
}

impl Authority {
    /// One whose certificate is the file `at`.
    pub fn new(at: &Path) -> Self {
        let mut params = Wanted { common_name: None, ..Wanted::client("") }.params();
        params.distinguished_name.push(DnType::CommonName, at.display().to_string());
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.extended_key_usages.clear();
        let key = KeyPair::generate().expect("a key");
        std::fs::write(at, params.self_signed(&key).expect("signed").pem()).expect("written");
        Self { issuer: Issuer::new(params, key), file: at.to_owned() }
    }

    /// A certificate that it has signed, in the files `at`.pem and `at`.key.
    pub fn issue(&self, at: &Path, wanted: Wanted) -> Files {
        let key = KeyPair::generate().expect("a key");
        Files::write(at, &wanted.params().signed_by(&key, &self.issuer).expect("signed"), &key)
    }
}

/// A certificate that nobody has signed but its holder.
pub fn self_signed(at: &Path, wanted: Wanted) -> Files {
    let key = KeyPair::generate().expect("a key");
    Files::write(at, &wanted.params().self_signed(&key).expect("signed"), &key)
}
