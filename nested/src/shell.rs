//! A shell for guests: Debian's busybox, one static file with the usual tools in it.

use std::fs;
use std::path::PathBuf;

use crate::debian::{self, OsRelease};
use crate::prepare::PrepareError;
use crate::{Cache, Progress};

const PACKAGE: &str = "busybox-static";
/// Where the package has it; in newer releases of Debian /bin is part of /usr in packages too.
const PLACES: [&str; 2] = ["usr/bin/busybox", "bin/busybox"];
/// The file's name in the cache.
const NAME: &str = "busybox";

/// The shell's file, from the cache or fetched through apt from this machine's Debian mirror. It is a shell when it is called `sh`.
///
/// # Errors
/// [`PrepareError`]: this is not Debian, the cache cannot be written, a tool fails.
pub fn shell(cache: &Cache, progress: &dyn Progress) -> Result<PathBuf, PrepareError> {
    let os = OsRelease::of_system()?;
    let name = format!("{}-shell", os.cache_name());
    let cached = || cache.current(&name).map(|dir| dir.join(NAME));
    if let Some(file) = cached() {
        return Ok(file);
    }
    let fetch = || {
        let lock = cache.lock(progress)?;
        // Another process may have fetched it meanwhile.
        if let Some(file) = cached() {
            return Ok(file);
        }
        let work = lock.work_dir()?;
        let apt = debian::own_apt(&lock, work.path(), &os, progress)?;
        progress.step("Fetching Debian's busybox");
        let tree = work.path().join("tree");
        let version = debian::download_and_unpack(&lock, &apt, PACKAGE, &tree)?;
        let from = PLACES.map(|place| tree.join(place)).into_iter().find(|file| file.is_file());
        let from = from.ok_or_else(|| PrepareError::NoPackage { package: PACKAGE.to_owned() })?;
        let dir = work.path().join("shell");
        let file_error = |source| PrepareError::File { path: dir.clone(), source };
        fs::create_dir(&dir).and_then(|()| fs::rename(&from, dir.join(NAME))).map_err(file_error)?;
        let dir = lock.publish(&dir, &format!("shell/{PACKAGE}_{version}"), &name)?;
        Ok(dir.join(NAME))
    };
    let file = fetch();
    // Also before an error is shown.
    progress.finish();
    file
}
