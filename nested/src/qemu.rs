//! QEMU, built from Debian's source package with corrections to its emulated AMD-V.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Progress;
use crate::apt::Apt;
use crate::cache::{self, CacheLock};
use crate::debian::{OsRelease, download_and_unpack};
use crate::prepare::PrepareError;
use crate::process::{capture, run_logged};

/// INT3 takes the #BP intercept. Needed by every version of QEMU so far.
const INT3_PATCH: &str = include_str!("../qemu/int3-intercept.patch");
/// VMRUN arms the DR7 that it loads. Newer versions do.
const DR7_PATCH: &str = include_str!("../qemu/vmrun-dr7.patch");
/// XSETBV takes its intercept.
const XSETBV_PATCH: &str = include_str!("../qemu/xsetbv-intercept.patch");
/// FXRSTOR and its like leave the other CPUs' flags alone.
const IGNNE_PATCH: &str = include_str!("../qemu/ignne-race.patch");
/// The device list.
const DEVICES: &str = include_str!("../qemu/devices.mak");

/// The emulator's file name, also ninja's target.
const BINARY: &str = "qemu-system-x86_64";

/// One target, no optional feature, no tool, no document, no debug information.
const CONFIGURE: [&str; 13] = [
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=vmprobe",
    "--enable-tcg",
    "--disable-kvm",
    "--disable-docs",
    "--disable-tools",
    "--disable-guest-agent",
    "--disable-werror",
    "--disable-debug-info",
    "--disable-qom-cast-debug",
    "--disable-install-blobs",
];

/// Packages that must be installed for the build.
pub(crate) const BUILD_NEEDS: [&str; 13] = [
    "dpkg-dev",
    "gcc",
    "libc6-dev",
    "libfdt-dev",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "make",
    "meson",
    "ninja-build",
    "patch",
    "pkg-config",
    "python3-venv",
    "xz-utils",
];

/// Packages with the firmware that QEMU loads, and the files wanted of each.
const FIRMWARE: [(&str, &[&str]); 2] = [
    ("seabios", &["usr/share/seabios/bios-256k.bin"]),
    (
        "qemu-system-data",
        &["usr/share/qemu/kvmvapic.bin", "usr/share/qemu/linuxboot_dma.bin", "usr/share/qemu/pvh.bin"],
    ),
];

/// An emulator in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Qemu {
    dir: PathBuf,
}

impl Qemu {
    /// The emulator.
    pub(crate) fn binary(&self) -> PathBuf {
        self.dir.join(BINARY)
    }

    /// The firmware directory, for QEMU's `-L`.
    pub(crate) fn firmware(&self) -> PathBuf {
        self.dir.join("firmware")
    }
}

/// The emulator in the cache, if it was built by the recipe of this vmprobe.
pub(crate) fn cached_qemu(cache: &crate::Cache, os: &OsRelease) -> Option<Qemu> {
    cache.current(&qemu_name(os)).map(|dir| Qemu { dir })
}

fn qemu_name(os: &OsRelease) -> String {
    format!("{}-qemu-{}", os.cache_name(), recipe())
}

/// Names the patches, devices and options that an emulator was built with.
fn recipe() -> String {
    let parts = [INT3_PATCH, DR7_PATCH, XSETBV_PATCH, IGNNE_PATCH, DEVICES].into_iter().chain(CONFIGURE);
    cache::recipe(parts)
}

/// Builds the emulator and publishes it.
pub(crate) fn build(
    lock: &CacheLock<'_>,
    work: &Path,
    apt: &Apt,
    os: &OsRelease,
    progress: &dyn Progress,
) -> Result<Qemu, PrepareError> {
    let file_error = |path: &Path| {
        let path = path.to_owned();
        move |source| PrepareError::File { path, source }
    };

    progress.step("Fetching QEMU's source package");
    let fetch = apt.command("apt-get", &["source", "--download-only", "--only-source", "qemu"]);
    run_logged(fetch, &lock.log("qemu-fetch"), |_| {})?;
    let (dsc, version) = source_package(apt.downloads())?;

    progress.step("Unpacking QEMU's source");
    let source = work.join("qemu-source");
    let mut unpack = Command::new("dpkg-source");
    unpack.arg("-x").arg(&dsc).arg(&source);
    run_logged(unpack, &lock.log("qemu-unpack"), |_| {})?;
    apply_patches(lock, &source, &version)?;
    let devices = source.join("configs/devices/x86_64-softmmu/vmprobe.mak");
    fs::write(&devices, DEVICES).map_err(file_error(&devices))?;

    progress.step("Configuring QEMU");
    let build_dir = source.join("build-vmprobe");
    fs::create_dir(&build_dir).map_err(file_error(&build_dir))?;
    let mut configure = nice(&source.join("configure"));
    configure.args(CONFIGURE).current_dir(&build_dir);
    run_logged(configure, &lock.log("qemu-configure"), |_| {})?;

    progress.step("Building QEMU (a few minutes, once per machine)");
    let mut ninja = nice(Path::new("ninja"));
    ninja.arg(BINARY).current_dir(&build_dir);
    run_logged(ninja, &lock.log("qemu-build"), |line| {
        if let Some((done, total)) = ninja_position(line) {
            progress.position(done, total);
        }
    })?;

    progress.step("Fetching QEMU's firmware");
    let dir = work.join("qemu");
    let firmware = dir.join("firmware");
    fs::create_dir_all(&firmware).map_err(file_error(&firmware))?;
    for (package, files) in FIRMWARE {
        let tree = work.join(package);
        download_and_unpack(lock, apt, package, &tree)?;
        for file in files {
            let from = tree.join(file);
            let to = firmware.join(from.file_name().unwrap_or_default());
            fs::copy(&from, &to).map_err(file_error(&from))?;
        }
    }
    let binary = dir.join(BINARY);
    fs::copy(build_dir.join(BINARY), &binary).map_err(file_error(&binary))?;
    let mut check = Command::new(&binary);
    check.arg("--version");
    capture(check, &lock.log("qemu-check"))?;

    let key = format!("qemu/{version}-{}", recipe());
    Ok(Qemu { dir: lock.publish(&dir, &key, &qemu_name(os))? })
}

/// `program` at a low priority: the user may be working meanwhile.
fn nice(program: &Path) -> Command {
    let mut command = Command::new("nice");
    command.arg("-n10").arg(program);
    command
}

/// The downloaded source package's control file, and its version.
fn source_package(downloads: &Path) -> Result<(PathBuf, String), PrepareError> {
    let file_error = |source| PrepareError::File { path: downloads.to_owned(), source };
    for entry in fs::read_dir(downloads).map_err(file_error)? {
        let path = entry.map_err(file_error)?.path();
        if path.extension().is_some_and(|extension| extension == "dsc") {
            let text = fs::read_to_string(&path).map_err(file_error)?;
            let version = text.lines().find_map(|line| line.strip_prefix("Version:"));
            // A signed file names its version once; without one the file is not a source package.
            if let Some(version) = version {
                return Ok((path, version.trim().to_owned()));
            }
        }
    }
    Err(PrepareError::NoPackage { package: "qemu (source)".to_owned() })
}

/// Applies the corrections that this version of QEMU needs.
fn apply_patches(lock: &CacheLock<'_>, source: &Path, version: &str) -> Result<(), PrepareError> {
    let has_helpers = |dir: &&str| source.join(dir).join("svm_helper.c").exists();
    let helpers = ["target/i386/tcg/sysemu", "target/i386/tcg/system"].into_iter().find(has_helpers);
    let helpers = helpers.ok_or_else(|| PrepareError::UnknownQemu {
        version: version.to_owned(),
        what: "svm_helper.c is not where it was",
    })?;
    let read = |name: &str| {
        let path = source.join(name);
        fs::read_to_string(&path).map_err(|error| PrepareError::File { path, source: error })
    };
    let of_helpers = |patch: &str| patch.replace("target/i386/tcg/sysemu", helpers);
    let mut patches =
        vec![("int3-intercept", INT3_PATCH.to_owned()), ("ignne-race", of_helpers(IGNNE_PATCH))];
    if !arms_dr7(&read(&format!("{helpers}/svm_helper.c"))?) {
        patches.push(("vmrun-dr7", of_helpers(DR7_PATCH)));
    }
    if !intercepts_xsetbv(&read("target/i386/tcg/translate.c")?) {
        patches.push(("xsetbv-intercept", XSETBV_PATCH.to_owned()));
    }
    for (name, patch) in patches {
        let file = source.join(format!("{name}.patch"));
        fs::write(&file, patch).map_err(|error| PrepareError::File { path: file.clone(), source: error })?;
        let mut command = Command::new("patch");
        // Three lines of context may have moved, but a hunk that only fits elsewhere must not be applied there.
        command.args(["-p1", "--batch", "--forward", "--fuzz=1", "-i"]).arg(&file).current_dir(source);
        run_logged(command, &lock.log(&format!("qemu-patch-{name}")), |_| {}).map_err(|error| {
            PrepareError::Patch {
                name: name.to_owned(),
                version: version.to_owned(),
                source: Box::new(error),
            }
        })?;
    }
    Ok(())
}

/// Whether this svm_helper.c arms the breakpoints of the DR7 it loads.
fn arms_dr7(svm_helper: &str) -> bool {
    svm_helper.contains("cpu_x86_update_dr7(")
}

/// Whether this translate.c lets a hypervisor intercept XSETBV.
fn intercepts_xsetbv(translate: &str) -> bool {
    translate.contains("SVM_EXIT_XSETBV")
}

/// The counts in a line of ninja's output, `[12/1189] Compiling ...`.
fn ninja_position(line: &str) -> Option<(u64, u64)> {
    let (counts, _) = line.strip_prefix('[')?.split_once(']')?;
    let (done, total) = counts.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ninja_counts_are_read() {
        assert_eq!(ninja_position("[12/1189] Compiling C object x.o"), Some((12, 1189)));
        assert_eq!(ninja_position("[1/2"), None);
        assert_eq!(ninja_position("warning: [a/b]"), None);
        assert_eq!(ninja_position("[a/b] x"), None);
    }

    #[test]
    fn the_newer_form_of_dr7_loading_is_known() {
        assert!(arms_dr7("    cpu_x86_update_dr7(env, new_dr7);"));
        assert!(!arms_dr7("    env->dr[7] = x86_ldq_phys(cs,"));
    }

    #[test]
    fn an_intercepted_xsetbv_is_known() {
        assert!(intercepts_xsetbv("            gen_svm_check_intercept(s, SVM_EXIT_XSETBV);"));
        assert!(!intercepts_xsetbv("        case 0xd1: /* xsetbv */"));
    }

    #[test]
    fn a_source_package_gives_its_version() {
        let dir = tempfile::tempdir().unwrap();
        source_package(dir.path()).unwrap_err();
        let dsc = dir.path().join("qemu_7.2.dsc");
        fs::write(&dsc, "Format: 3.0 (quilt)\nSource: qemu\nVersion: 1:7.2+dfsg-7\n").unwrap();
        assert_eq!(source_package(dir.path()).unwrap(), (dsc, "1:7.2+dfsg-7".to_owned()));
    }
}
