//! Preparing the machine: once, kept in the cache.

use std::io;
use std::path::PathBuf;

use crate::Progress;
use crate::cache::{Cache, CacheError};
use crate::debian::{self, OsRelease, StockKernel, Wanted};
use crate::packages;
use crate::process::StepError;
use crate::qemu::{self, Qemu};

/// The emulated machine could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// Not a Debian system.
    #[error(
        "The emulated machine is made from Debian's packages, and this is {found}; run vmprobe on Debian (a container \
         will do), or on a host with hardware virtualization and --accel kvm"
    )]
    NotDebian {
        /// What it is.
        found: String,
    },
    /// No package source for this release.
    #[error(
        "No source of Debian {codename} with the component main is in /etc/apt/sources.list or /etc/apt/sources.list.d; \
         add one"
    )]
    NoSources {
        /// The release.
        codename: String,
    },
    /// Debian's archive lacks a package.
    #[error(
        "The package {package} is not in this machine's Debian sources (/etc/apt); use a full Debian mirror"
    )]
    NoPackage {
        /// The package.
        package: String,
    },
    /// Packages are missing and vmprobe may not install them.
    #[error(
        "Packages that are needed for this are missing. Run: sudo apt-get install -y --no-install-recommends {packages}"
    )]
    MissingPackages {
        /// Their names.
        packages: String,
    },
    /// The kernel lacks a module, or its modules depend on each other in a circle.
    #[error("The kernel {kernel} has no usable module {module}; vmprobe does not know this kernel package")]
    NoModule {
        /// The module.
        module: String,
        /// The kernel's release.
        kernel: String,
    },
    /// The kernel cannot be unpacked.
    #[error("The kernel in {package} cannot be unpacked")]
    Kernel {
        /// The package.
        package: String,
        /// Why.
        source: Box<guest::image::ImageError>,
    },
    /// QEMU's source is not as expected.
    #[error("QEMU {version} is not a version that vmprobe knows how to correct: {what}")]
    UnknownQemu {
        /// The source package's version.
        version: String,
        /// What differs.
        what: &'static str,
    },
    /// A correction does not fit QEMU's source.
    #[error("The correction {name} does not fit QEMU {version}; vmprobe does not know this version")]
    Patch {
        /// The patch.
        name: String,
        /// The source package's version.
        version: String,
        /// patch(1)'s failure.
        source: Box<StepError>,
    },
    /// A tool failed.
    #[error("Cannot prepare the emulated machine")]
    Step(#[from] StepError),
    /// The cache failed.
    #[error("Cannot keep the emulated machine")]
    Cache(#[from] CacheError),
    /// A file could not be read or written.
    #[error("Cannot read or write {} while preparing the emulated machine", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The prepared machine: an emulator and a kernel. [`Rig::run`] runs a command in it.
#[derive(Clone, Debug)]
pub struct Rig {
    pub(crate) qemu: Qemu,
    pub(crate) kernel: StockKernel,
}

/// The machine from the cache, or prepared: Debian's kernel fetched and QEMU built from Debian's source package, which
/// takes minutes and about 1 GB of disk meanwhile.
///
/// A machine in the cache is used without network, at once, whatever Debian has published since. Several processes may
/// call this at a time: one works, the others wait. It may be killed at any time and called again.
///
/// # Errors
/// [`PrepareError`]; what was complete stays in the cache.
pub fn prepare(cache: &Cache, progress: &dyn Progress) -> Result<Rig, PrepareError> {
    let os = OsRelease::of_system()?;
    if let Some(rig) = cached(cache, &os) {
        return Ok(rig);
    }
    let rig = prepare_locked(cache, &os, progress);
    // Also before an error is shown.
    progress.finish();
    rig
}

fn prepare_locked(cache: &Cache, os: &OsRelease, progress: &dyn Progress) -> Result<Rig, PrepareError> {
    let lock = cache.lock(progress)?;
    // Another process may have finished it meanwhile.
    if let Some(rig) = cached(cache, os) {
        return Ok(rig);
    }
    let qemu = qemu::cached_qemu(cache, os);
    if qemu.is_none() {
        packages::install(&lock, &qemu::BUILD_NEEDS, progress)?;
    }
    let work = lock.work_dir()?;
    let apt = debian::own_apt(&lock, work.path(), os, progress)?;
    let kernel = match debian::cached_kernel(cache, os) {
        Some(kernel) => kernel,
        None => debian::fetch_kernel(&lock, work.path(), &apt, &Wanted::own(os), progress)?,
    };
    let qemu = match qemu {
        Some(qemu) => qemu,
        None => qemu::build(&lock, work.path(), &apt, os, progress)?,
    };
    Ok(Rig { qemu, kernel })
}

fn cached(cache: &Cache, os: &OsRelease) -> Option<Rig> {
    Some(Rig { qemu: qemu::cached_qemu(cache, os)?, kernel: debian::cached_kernel(cache, os)? })
}
