//! Debian's kernels by name.

use std::fmt;
use std::str::FromStr;

use crate::debian::{self, OsRelease, StockKernel, Wanted};
use crate::prepare::PrepareError;
use crate::{Cache, Progress};

/// A kernel of Debian's archive: `debian:SUITE/FLAVOUR`, the newest of its suite, or `debian:SUITE/FLAVOUR@RELEASE`.
///
/// SUITE is a release (`bookworm`, `trixie`) or another suite of the archive (`bookworm-backports`, `sid`), FLAVOUR one of `cloud`,
/// `generic` and `rt`, RELEASE what the kernel calls itself without the flavour (`6.1.0-50`), or a series that the suite has beside its
/// own (`6.12` in bookworm): the newest of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelName {
    suite: String,
    flavour: Flavour,
    release: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flavour {
    Cloud,
    Generic,
    Rt,
}

impl Flavour {
    const ALL: [Flavour; 3] = [Flavour::Cloud, Flavour::Generic, Flavour::Rt];

    fn name(self) -> &'static str {
        match self {
            Flavour::Cloud => "cloud",
            Flavour::Generic => "generic",
            Flavour::Rt => "rt",
        }
    }

    /// What the names of its packages end with, behind the release.
    fn package_ending(self) -> &'static str {
        match self {
            Flavour::Cloud => "cloud-amd64",
            Flavour::Generic => "amd64",
            Flavour::Rt => "rt-amd64",
        }
    }
}

impl KernelName {
    /// Whether a text is meant as such a name: what a file would be called differently for.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        text.starts_with("debian:")
    }

    fn wanted(&self) -> Wanted {
        let ending = self.flavour.package_ending();
        let (package, release) = match &self.release {
            None => (format!("linux-image-{ending}"), String::new()),
            Some(release) => (format!("linux-image-{release}-{ending}"), format!("-{release}")),
        };
        Wanted { package, name: format!("debian-{}-{}{release}-kernel", self.suite, self.flavour.name()) }
    }
}

impl FromStr for KernelName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no kernel of Debian's; write debian:SUITE/FLAVOUR or debian:SUITE/FLAVOUR@RELEASE, with a flavour of \
                 cloud, generic and rt, as debian:bookworm/cloud"
            )
        };
        let name = text.strip_prefix("debian:").ok_or_else(wrong)?;
        let (name, release) = match name.split_once('@') {
            Some((name, release)) => (name, Some(release)),
            None => (name, None),
        };
        let (suite, flavour) = name.split_once('/').ok_or_else(wrong)?;
        // They become part of file names and of the command line of apt.
        let is_plain = |word: &str| {
            word.starts_with(|c: char| c.is_ascii_alphanumeric())
                && word.chars().all(|c| c.is_ascii_alphanumeric() || "+-.~_".contains(c))
        };
        let flavour = Flavour::ALL.into_iter().find(|known| known.name() == flavour).ok_or_else(wrong)?;
        if !is_plain(suite) || !release.is_none_or(is_plain) {
            return Err(wrong());
        }
        Ok(Self { suite: suite.to_owned(), flavour, release: release.map(str::to_owned) })
    }
}

impl fmt::Display for KernelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "debian:{}/{}", self.suite, self.flavour.name())?;
        self.release.as_ref().map_or(Ok(()), |release| write!(f, "@{release}"))
    }
}

/// A kernel by its name, from the cache or fetched through apt from this machine's Debian mirror.
///
/// One that is in the cache is used as it is, without network, also when Debian has a newer one.
///
/// # Errors
/// [`PrepareError`]: this is not Debian, its archive has no such kernel, the cache cannot be written, a tool fails.
pub fn named_kernel(
    cache: &Cache,
    name: &KernelName,
    progress: &dyn Progress,
) -> Result<StockKernel, PrepareError> {
    let os = OsRelease::of_system()?.with_suite(&name.suite);
    let wanted = name.wanted();
    let cached = || StockKernel::in_cache(cache, &wanted.name);
    if let Some(kernel) = cached() {
        return Ok(kernel);
    }
    let fetch = || {
        let lock = cache.lock(progress)?;
        // Another process may have fetched it meanwhile.
        if let Some(kernel) = cached() {
            return Ok(kernel);
        }
        let work = lock.work_dir()?;
        let apt = debian::own_apt(&lock, work.path(), &os, progress)?;
        debian::fetch_kernel(&lock, work.path(), &apt, &wanted, progress)
    };
    let kernel = fetch();
    // Also before an error is shown.
    progress.finish();
    kernel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_to_packages() {
        for (text, package, cached) in [
            ("debian:bookworm/cloud", "linux-image-cloud-amd64", "debian-bookworm-cloud-kernel"),
            ("debian:trixie/generic", "linux-image-amd64", "debian-trixie-generic-kernel"),
            (
                "debian:bookworm/rt@6.1.0-50",
                "linux-image-6.1.0-50-rt-amd64",
                "debian-bookworm-rt-6.1.0-50-kernel",
            ),
        ] {
            let name: KernelName = text.parse().unwrap();
            assert_eq!(name.to_string(), text);
            let wanted = name.wanted();
            assert_eq!((wanted.package.as_str(), wanted.name.as_str()), (package, cached));
        }
    }

    #[test]
    fn other_names_are_refused_with_an_example() {
        for text in [
            "debian:bookworm",
            "debian:bookworm/fast",
            "debian:/cloud",
            "debian:../cloud",
            "debian:-o/cloud",
            "debian:bookworm/cloud@",
            "debian:bookworm/cloud@a b",
            "fedora:40/cloud",
        ] {
            let error = text.parse::<KernelName>().unwrap_err();
            assert!(error.contains(text) && error.contains("debian:bookworm/cloud"), "{error}");
        }
    }
}
