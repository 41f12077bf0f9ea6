//! A root disk with Debian on it, made from Debian's packages by mmdebstrap: no root is needed, and no network beyond the
//! package sources of this machine.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use crate::cache::{self, Cache, CacheLock};
use crate::debian::{self, OsRelease};
use crate::prepare::PrepareError;
use crate::process::run_logged;
use crate::{Progress, packages};

/// What is done to the file system before it becomes an image, and how it becomes one.
const SETUP: &str = include_str!("../debian/root-disk.sh");

/// What is on the disk beside Debian's essential packages: a stock kernel with its stock initramfs, systemd, ssh.
const PACKAGES: &str =
    "dbus,init,initramfs-tools,iproute2,kmod,libpam-systemd,linux-image-cloud-amd64,openssh-server,udev,zstd";

/// Packages that must be installed here to make it.
const NEEDS: [&str; 6] = ["e2fsprogs", "fdisk", "mmdebstrap", "mount", "openssh-client", "uidmap"];

/// The image's name within its directory.
const IMAGE: &str = "disk.img";
/// The private key's.
const SSH_KEY: &str = "id_ed25519";

/// A disk image in the cache: Debian on one ext4 partition, sparse. To be used read-only or below an overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootDisk {
    dir: PathBuf,
}

impl RootDisk {
    /// The raw image.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }

    /// The private key that lets root in by ssh.
    #[must_use]
    pub fn ssh_key(&self) -> PathBuf {
        self.dir.join(SSH_KEY)
    }
}

/// A root disk with the Debian release that this host runs, from the cache or made, which takes a few minutes and about
/// 2 GB of temporary space.
///
/// # Errors
/// [`PrepareError`], when this is not Debian, packages that are needed are missing, the cache cannot be written or a tool
/// fails.
pub fn root_disk(cache: &Cache, progress: &dyn Progress) -> Result<RootDisk, PrepareError> {
    let os = OsRelease::of_system()?;
    if let Some(disk) = cached(cache, &os) {
        return Ok(disk);
    }
    let disk = make_locked(cache, &os, progress);
    // Also before an error is shown.
    progress.finish();
    disk
}

fn make_locked(cache: &Cache, os: &OsRelease, progress: &dyn Progress) -> Result<RootDisk, PrepareError> {
    let lock = cache.lock(progress)?;
    // Another process may have made it meanwhile.
    match cached(cache, os) {
        Some(disk) => Ok(disk),
        None => make(&lock, os, progress),
    }
}

fn make(lock: &CacheLock<'_>, os: &OsRelease, progress: &dyn Progress) -> Result<RootDisk, PrepareError> {
    packages::install(lock, &NEEDS, progress)?;
    let work = lock.work_dir()?;
    let apt = debian::own_apt(lock, work.path(), os, progress)?;
    let dir = work.path().join("disk");
    let file_error = |path: PathBuf| move |source| PrepareError::File { path, source };
    fs::create_dir(&dir).map_err(file_error(dir.clone()))?;

    progress.step("Making a root disk from Debian's packages (a few minutes, once per machine)");
    let mut mmdebstrap = Command::new("mmdebstrap");
    mmdebstrap.args(["--format=null", "--variant=minbase"]).arg(format!("--include={PACKAGES}"));
    mmdebstrap.arg(format!("--customize-hook={SETUP}"));
    // These two run outside the user namespace and may write here.
    for file in [IMAGE, SSH_KEY] {
        mmdebstrap.arg(format!("--customize-hook=download /{file} {}", dir.join(file).display()));
    }
    mmdebstrap.arg(os.codename()).arg("/dev/null").args(apt.source_files());
    run_logged(mmdebstrap, &lock.log("mmdebstrap"), |_| {})?;

    // ssh takes no key that others can read.
    let key = dir.join(SSH_KEY);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).map_err(file_error(key))?;
    let mut sparse = Command::new("fallocate");
    sparse.arg("--dig-holes").arg(dir.join(IMAGE));
    run_logged(sparse, &lock.log("fallocate"), |_| {})?;
    let dir = lock.publish(&dir, &format!("disk/{}-{}", os.cache_name(), recipe()), &disk_name(os))?;
    Ok(RootDisk { dir })
}

fn cached(cache: &Cache, os: &OsRelease) -> Option<RootDisk> {
    cache.current(&disk_name(os)).map(|dir| RootDisk { dir })
}

fn disk_name(os: &OsRelease) -> String {
    format!("{}-disk-{}", os.cache_name(), recipe())
}

fn recipe() -> String {
    cache::recipe([SETUP, PACKAGES].into_iter())
}
