//! Debian packages that must be installed on this machine for a preparation.

use std::process::Command;

use crate::Progress;
use crate::cache::CacheLock;
use crate::prepare::PrepareError;
use crate::process::{capture, run_logged};

/// Installs those of `needs` that are missing, as root, or says what to install.
pub(crate) fn install(
    lock: &CacheLock<'_>,
    needs: &[&'static str],
    progress: &dyn Progress,
) -> Result<(), PrepareError> {
    let mut query = Command::new("dpkg-query");
    // Lists every package known, so that unknown ones are no failure.
    query.args(["--show", "--showformat=${db:Status-Status} ${Package}\\n"]);
    let known = capture(query, &lock.log("dpkg-query"))?;
    let missing = not_installed(needs, &known);
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        return Err(PrepareError::MissingPackages { packages: missing.join(" ") });
    }
    progress.step(&format!("Installing {}", missing.join(" ")));
    let install = || {
        let mut command = Command::new("apt-get");
        command
            .args(["install", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300"])
            .args(&missing)
            .env("DEBIAN_FRONTEND", "noninteractive");
        run_logged(command, &lock.log("apt-install"), |_| {})
    };
    if install().is_err() {
        // The package lists may be absent or older than the archive.
        let mut update = Command::new("apt-get");
        update.args(["update", "-o", "DPkg::Lock::Timeout=300"]);
        run_logged(update, &lock.log("apt-install-update"), |_| {})?;
        install()?;
    }
    Ok(())
}

fn not_installed(needs: &[&'static str], dpkg_query: &str) -> Vec<&'static str> {
    let installed: Vec<&str> =
        dpkg_query.lines().filter_map(|line| line.strip_prefix("installed ")).collect();
    needs.iter().copied().filter(|need| !installed.contains(need)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_installed_packages_count() {
        let known = "installed gcc\nconfig-files meson\ninstalled make\n";
        assert_eq!(not_installed(&["gcc", "make"], known), Vec::<&str>::new());
        assert_eq!(not_installed(&["gcc", "meson", "patch"], known), ["meson", "patch"]);
    }
}
