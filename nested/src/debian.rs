//! Debian's packages: which release this is, and its stock cloud kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest::image::Image;

use crate::apt::{Apt, Sources};
use crate::cache::CacheLock;
use crate::prepare::PrepareError;
use crate::process::{StepError, capture, run_logged};
use crate::{Cache, Progress, kmod};

/// The metapackage that depends on the newest kernel built for virtual machines.
const KERNEL_METAPACKAGE: &str = "linux-image-cloud-amd64";

/// The modules whose work the emulated machine needs; what they depend on comes with them.
const WANTED_MODULES: [&str; 4] = ["virtio_pci", "virtio_console", "virtio_blk", "kvm-amd"];

/// The modules that the workload guest loads; what they depend on comes with them.
const GUEST_MODULES: [&str; 7] =
    ["msr", "button", "evdev", "virtio_mmio", "virtio_blk", "vmw_vsock_virtio_transport", "virtio_net"];

/// What os-release(5) says of this system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OsRelease {
    version: String,
    codename: String,
    /// The suite of the archive that is wanted in place of the release's own.
    suite: Option<String>,
}

impl OsRelease {
    /// Reads the system's os-release file.
    pub(crate) fn of_system() -> Result<Self, PrepareError> {
        let text = fs::read_to_string("/etc/os-release").unwrap_or_default();
        Self::parse(&text)
    }

    /// Understands an os-release file of Debian.
    pub(crate) fn parse(text: &str) -> Result<Self, PrepareError> {
        let value = |name: &str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim_matches(['"', '\'']).to_owned())
        };
        if value("ID").as_deref() != Some("debian") {
            let found = value("PRETTY_NAME").unwrap_or_else(|| "an unknown system".into());
            return Err(PrepareError::NotDebian { found });
        }
        // Testing and unstable have a codename but no version.
        let codename = value("VERSION_CODENAME")
            .ok_or(PrepareError::NotDebian { found: "a Debian without codename".into() })?;
        let version = value("VERSION_ID").unwrap_or_else(|| codename.clone());
        Ok(Self { version, codename, suite: None })
    }

    /// The same system, with packages of another suite of its archive.
    pub(crate) fn with_suite(self, suite: &str) -> Self {
        let suite = Some(suite.to_owned()).filter(|suite| *suite != self.codename);
        Self { suite, ..self }
    }

    /// The release's name in package sources.
    pub(crate) fn codename(&self) -> &str {
        &self.codename
    }

    /// What the cache's names of this release begin with.
    pub(crate) fn cache_name(&self) -> String {
        format!("debian-{}", self.version)
    }

    /// The suite to read where the system's sources name `suite`: of the release, its updates and security updates, by codename or by
    /// a name that moves with releases, the same; where another suite is wanted, that one in place of the release. `None` for what is
    /// no part of either.
    pub(crate) fn wanted_suite(&self, suite: &str) -> Option<String> {
        let suite = suite.trim_end_matches('/');
        let endings = ["-updates", "-security", "/updates"];
        let base = endings.iter().find_map(|ending| suite.strip_suffix(ending)).unwrap_or(suite);
        let is_own = base == self.codename
            || ["stable", "oldstable", "oldoldstable", "testing", "sid", "unstable"].contains(&base);
        match &self.suite {
            None => is_own.then(|| suite.to_owned()),
            Some(other) => (is_own && base == suite).then(|| other.clone()),
        }
    }
}

/// A stock Debian kernel, unpacked in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StockKernel {
    dir: PathBuf,
}

impl StockKernel {
    /// The kernel that the cache knows by this name, if it is there.
    pub(crate) fn in_cache(cache: &Cache, name: &str) -> Option<Self> {
        let kernel = cache.current(name).map(|dir| StockKernel { dir })?;
        // An earlier version did not keep every module.
        GUEST_MODULES.iter().all(|name| kernel.dir.join(format!("{name}.ko")).is_file()).then_some(kernel)
    }

    /// The compressed kernel (bzImage).
    #[must_use]
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The kernel itself (ELF), which the emulated machine starts with: unpacking itself there would take it a second.
    pub(crate) fn vmlinux(&self) -> PathBuf {
        self.dir.join("vmlinux")
    }

    /// The modules for the workload guest to load, uncompressed, with their file names.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn guest_modules(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let mut modules = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.ends_with(".ko") {
                modules.push((name, fs::read(entry.path())?));
            }
        }
        // A file system has no order of its own.
        modules.sort();
        Ok(modules)
    }

    /// The modules that the emulated machine loads, in that order.
    pub(crate) fn modules(&self) -> io::Result<Vec<PathBuf>> {
        let mut modules = Vec::new();
        for entry in fs::read_dir(self.dir.join("modules"))? {
            modules.push(entry?.path());
        }
        // Their names begin with their place.
        modules.sort();
        Ok(modules)
    }
}

/// The stock cloud kernel of the Debian release that this host runs, from the cache or fetched through apt.
///
/// No root is needed and nothing is installed. A kernel that is in the cache is used as it is, without network, also when
/// Debian has a newer one; remove the cache directory to fetch anew.
///
/// # Errors
/// [`PrepareError`], when this is not Debian, the cache cannot be written or a tool fails.
pub fn stock_kernel(cache: &Cache, progress: &dyn Progress) -> Result<StockKernel, PrepareError> {
    let os = OsRelease::of_system()?;
    if let Some(kernel) = cached_kernel(cache, &os) {
        return Ok(kernel);
    }
    let kernel = fetch_locked(cache, &os, progress);
    // Also before an error is shown.
    progress.finish();
    kernel
}

fn fetch_locked(cache: &Cache, os: &OsRelease, progress: &dyn Progress) -> Result<StockKernel, PrepareError> {
    let lock = cache.lock(progress)?;
    // Another process may have fetched it meanwhile.
    if let Some(kernel) = cached_kernel(cache, os) {
        return Ok(kernel);
    }
    let work = lock.work_dir()?;
    let apt = own_apt(&lock, work.path(), os, progress)?;
    fetch_kernel(&lock, work.path(), &apt, &Wanted::own(os), progress)
}

/// Which kernel is fetched.
pub(crate) struct Wanted {
    /// Its package, or one that depends on it.
    pub(crate) package: String,
    /// What the cache calls it.
    pub(crate) name: String,
}

impl Wanted {
    /// The newest kernel for virtual machines of the release.
    pub(crate) fn own(os: &OsRelease) -> Self {
        Self { package: KERNEL_METAPACKAGE.to_owned(), name: kernel_name(os) }
    }
}

fn kernel_name(os: &OsRelease) -> String {
    os.cache_name() + "-kernel"
}

/// The kernel in the cache, if there is one.
pub(crate) fn cached_kernel(cache: &Cache, os: &OsRelease) -> Option<StockKernel> {
    StockKernel::in_cache(cache, &kernel_name(os))
}

/// The stock kernel, if it has been fetched already.
#[must_use]
pub fn cached(cache: &Cache) -> Option<StockKernel> {
    cached_kernel(cache, &OsRelease::of_system().ok()?)
}

/// An apt of our own below `work`, with fresh package lists.
pub(crate) fn own_apt(
    lock: &CacheLock<'_>,
    work: &Path,
    os: &OsRelease,
    progress: &dyn Progress,
) -> Result<Apt, PrepareError> {
    progress.step("Fetching Debian's package lists");
    let file_error = |source| PrepareError::File { path: "/etc/apt".into(), source };
    let sources = Sources::of_system(os).map_err(file_error)?;
    if sources.is_empty() {
        return Err(PrepareError::NoSources { codename: os.codename.clone() });
    }
    let apt = Apt::new(&work.join("apt"), &sources)
        .map_err(|source| PrepareError::File { path: work.join("apt"), source })?;
    run_logged(apt.command("apt-get", &["update"]), &lock.log("apt-update"), |_| {})?;
    Ok(apt)
}

/// Fetches the kernel, keeps what is needed of it and publishes that.
pub(crate) fn fetch_kernel(
    lock: &CacheLock<'_>,
    work: &Path,
    apt: &Apt,
    wanted: &Wanted,
    progress: &dyn Progress,
) -> Result<StockKernel, PrepareError> {
    progress.step("Fetching Debian's kernel package");
    let record = record(lock, apt, &wanted.package)?;
    let package =
        kernel_package(&record).ok_or_else(|| PrepareError::NoPackage { package: wanted.package.clone() })?;
    // The package is named after the kernel's release, and the files in it too.
    let release = package.trim_start_matches("linux-image-");
    let tree = work.join("kernel-tree");
    let version = download_and_unpack(lock, apt, package, &tree)?;
    for part in part_packages(&self::record(lock, apt, package)?, release) {
        download_and_unpack(lock, apt, part, &tree)?;
    }

    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| PrepareError::File { path, source }
    };
    let dir = work.join("kernel");
    let modules_dir = dir.join("modules");
    fs::create_dir_all(&modules_dir).map_err(file_error(&modules_dir))?;
    // In newer releases of Debian /lib is part of /usr in packages too.
    let module_tree = ["lib/modules", "usr/lib/modules"]
        .map(|prefix| tree.join(prefix).join(release))
        .into_iter()
        .find(|dir| dir.is_dir())
        .ok_or_else(|| PrepareError::NoModule {
            module: WANTED_MODULES[0].to_owned(),
            kernel: release.to_owned(),
        })?;
    // The newest ones have the image with the modules, and copy it to /boot when they are installed.
    let in_boot = tree.join("boot").join(format!("vmlinuz-{release}"));
    let vmlinuz = if in_boot.is_file() { in_boot } else { module_tree.join("vmlinuz") };
    fs::rename(&vmlinuz, dir.join("vmlinuz")).map_err(file_error(&vmlinuz))?;
    let image = Image::open(&dir.join("vmlinuz"))
        .map_err(|source| PrepareError::Kernel { package: package.to_owned(), source: Box::new(source) })?;
    let vmlinux = dir.join("vmlinux");
    fs::write(&vmlinux, image.data()).map_err(file_error(&vmlinux))?;
    let modules = kmod::Modules::of_tree(&module_tree).map_err(file_error(&module_tree))?;
    for (place, module) in modules.load_order(&WANTED_MODULES, release)?.iter().enumerate() {
        let to = modules_dir.join(format!("{place:02}-{}.ko", module.name));
        fs::write(&to, &module.contents).map_err(file_error(&to))?;
    }
    for module in modules.load_order(&GUEST_MODULES, release)? {
        let to = dir.join(format!("{}.ko", module.name));
        fs::write(&to, &module.contents).map_err(file_error(&to))?;
    }
    let published = lock.publish(&dir, &format!("kernel/{package}_{version}"), &wanted.name)?;
    Ok(StockKernel { dir: published })
}

/// What apt knows of a package.
fn record(lock: &CacheLock<'_>, apt: &Apt, package: &str) -> Result<String, PrepareError> {
    let show = apt.command("apt-cache", &["show", "--no-all-versions", package]);
    capture(show, &lock.log("apt-show-kernel")).map_err(|error| match error {
        StepError::Failed { .. } => PrepareError::NoPackage { package: package.to_owned() },
        other => other.into(),
    })
}

/// Downloads the newest version of a binary package and unpacks its files below `to`. Returns the version.
pub(crate) fn download_and_unpack(
    lock: &CacheLock<'_>,
    apt: &Apt,
    package: &str,
    to: &Path,
) -> Result<String, PrepareError> {
    let log = lock.log(&format!("download-{package}"));
    run_logged(apt.command("apt-get", &["download", package]), &log, |_| {})?;
    let prefix = format!("{package}_");
    let downloads = apt.downloads();
    let mut names = Vec::new();
    for entry in
        fs::read_dir(downloads).map_err(|source| PrepareError::File { path: downloads.into(), source })?
    {
        let entry = entry.map_err(|source| PrepareError::File { path: downloads.into(), source })?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    let (file, version) = names
        .iter()
        .find_map(|name| Some((name, name.strip_prefix(&prefix)?.split('_').next()?)))
        .ok_or_else(|| PrepareError::NoPackage { package: package.to_owned() })?;
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(downloads.join(file)).arg(to);
    run_logged(unpack, &lock.log(&format!("unpack-{package}")), |_| {})?;
    // An epoch's colon is written %3a in file names.
    Ok(version.replace("%3a", ":"))
}

/// The kernel package that a package's record is of, or depends on.
fn kernel_package(record: &str) -> Option<&str> {
    // A metapackage depends on a kernel, no kernel on another one.
    let kernel = dependencies(record).find(|package| package.starts_with("linux-image-"));
    let own = || Some(field(record, "Package:")?.trim()).filter(|own| own.starts_with("linux-image-"));
    kernel.or_else(own)
}

/// The packages with the files of a kernel whose own package has none: from Linux 7.2 on these are linux-base-RELEASE,
/// linux-binary-RELEASE and linux-modules-RELEASE.
fn part_packages<'a>(record: &'a str, release: &str) -> Vec<&'a str> {
    let is_part = |package: &&str| {
        package
            .strip_suffix(release)
            .and_then(|kind| kind.strip_suffix('-'))
            .is_some_and(|kind| kind.strip_prefix("linux-").is_some_and(|kind| kind != "image"))
    };
    dependencies(record).filter(is_part).collect()
}

fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    record.lines().find_map(|line| line.strip_prefix(name))
}

/// The names of the packages that a package depends on; of alternatives the first.
fn dependencies(record: &str) -> impl Iterator<Item = &str> {
    let depends = field(record, "Depends:").unwrap_or_default().split(',');
    depends.filter_map(|dependency| dependency.split_whitespace().next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_metapackage_leads_to_the_kernel() {
        let record = "Package: linux-image-cloud-amd64\nVersion: 6.1.192-2\n\
                      Depends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2), other\n";
        assert_eq!(kernel_package(record), Some("linux-image-6.1.0-56-cloud-amd64"));
        let series = "Package: linux-image-6.12-amd64\nDepends: linux-image-6.12.117+deb12-amd64 (= 6.12.117-1~deb12u1)\n";
        assert_eq!(kernel_package(series), Some("linux-image-6.12.117+deb12-amd64"));
        assert_eq!(kernel_package("Package: x\n"), None);
        assert_eq!(kernel_package("Package: x\nDepends: libc6\n"), None);
        let own = "Package: linux-image-6.1.0-50-rt-amd64\nDepends: kmod, linux-base (>= 4.3~)\n";
        assert_eq!(kernel_package(own), Some("linux-image-6.1.0-50-rt-amd64"));
    }

    #[test]
    fn a_kernel_in_parts_leads_to_them() {
        let record = "Package: linux-image-7.2.13+deb14-amd64\nDepends: dracut | initramfs-tools (>= 0.120), \
                      linux-base-7.2.13+deb14-amd64 (= 7.2.13-1), linux-binary-7.2.13+deb14-amd64 (= 7.2.13-1), \
                      linux-modules-7.2.13+deb14-amd64 (= 7.2.13-1)\n";
        let release = "7.2.13+deb14-amd64";
        assert_eq!(kernel_package(record), Some("linux-image-7.2.13+deb14-amd64"));
        let parts = ["linux-base-", "linux-binary-", "linux-modules-"].map(|kind| kind.to_owned() + release);
        assert_eq!(part_packages(record, release), parts);
        let whole =
            "Package: linux-image-6.1.0-50-amd64\nDepends: kmod, linux-base (>= 4.3~), initramfs-tools\n";
        assert_eq!(part_packages(whole, "6.1.0-50-amd64"), Vec::<&str>::new());
    }

    #[test]
    fn suites_of_the_release_are_told_from_others() {
        let os = OsRelease::parse("ID=debian\nVERSION_ID=\"12\"\nVERSION_CODENAME=bookworm").unwrap();
        for own in [
            "bookworm",
            "bookworm-updates",
            "bookworm-security",
            "bookworm/updates",
            "stable",
            "stable-updates",
        ] {
            assert_eq!(os.wanted_suite(own).as_deref(), Some(own));
        }
        for other in ["bookworm-backports", "nodistro", "cloud-sdk-bookworm", "trixie", "bookworm-pgdg", "./"]
        {
            assert_eq!(os.wanted_suite(other), None, "{other}");
        }
        let newer = os.with_suite("trixie");
        assert_eq!(newer.wanted_suite("bookworm").as_deref(), Some("trixie"));
        assert_eq!(newer.wanted_suite("bookworm-updates"), None, "not every suite has these");
        assert_eq!(
            newer.with_suite("bookworm").wanted_suite("bookworm-updates").as_deref(),
            Some("bookworm-updates")
        );
    }

    #[test]
    fn other_systems_are_refused_by_name() {
        let error = OsRelease::parse("ID=fedora\nPRETTY_NAME=\"Fedora Linux 42\"\n").unwrap_err().to_string();
        assert!(error.contains("Fedora Linux 42"), "{error}");
        OsRelease::parse("").unwrap_err();
        let sid = OsRelease::parse("ID=debian\nVERSION_CODENAME=forky\n").unwrap();
        assert_eq!(sid.cache_name(), "debian-forky");
    }
}
