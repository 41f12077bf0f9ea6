//! The directory that holds what has been prepared.
//!
//! ```text
//! lock                      held (flock) by the vmprobe that prepares; others wait for it
//! logs/STEP.log             output of each tool, kept from the last time
//! tmp/...                   work in progress; removed by the next vmprobe that holds the lock
//! kernel/PACKAGE_VERSION/   published by rename, complete, never changed
//! qemu/VERSION-RECIPE/      likewise
//! disk/RECIPE/              likewise
//! NAME -> kernel/...        the one to use; replaced by rename
//! ```
//!
//! Consistency on error: killed at any moment, the cache holds only complete directories outside `tmp`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use tempfile::TempDir;

use crate::Progress;

/// The cache directory could not be found or used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// None of the variables that say where it is are set.
    #[error("Cannot tell where to keep prepared files; set VMPROBE_CACHE to a directory, or HOME")]
    NoDirectory,
    /// A file or directory in it could not be read or written.
    #[error("Cannot use {} in the cache; check its permissions and free space, or set VMPROBE_CACHE", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Names what something was made with, so that another recipe's product is told from it.
pub(crate) fn recipe<'a>(parts: impl Iterator<Item = &'a str>) -> String {
    format!("{:016x}", fnv1a(parts.flat_map(|part| part.bytes().chain([0]))))
}

/// The 64-bit FNV-1a hash: the same in every build of vmprobe, which std's hashers do not promise.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// Where prepared files are kept.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// `$VMPROBE_CACHE`, else `$XDG_CACHE_HOME/vmprobe`, else `~/.cache/vmprobe`.
    ///
    /// # Errors
    /// [`CacheError::NoDirectory`] when none of the three is set.
    pub fn from_env() -> Result<Self, CacheError> {
        let root = locate(|name| std::env::var_os(name)).ok_or(CacheError::NoDirectory)?;
        // Tools run with other working directories.
        let root = std::path::absolute(&root).map_err(|source| CacheError::Io { path: root, source })?;
        Ok(Self { root })
    }

    /// A cache at `root`, an absolute path; created when something is prepared.
    #[must_use]
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The published directory that `name` stands for, if there is one.
    pub(crate) fn current(&self, name: &str) -> Option<PathBuf> {
        let target = self.root.join(fs::read_link(self.root.join(name)).ok()?);
        target.is_dir().then_some(target)
    }

    /// Waits for the lock and removes what an interrupted preparation has left.
    pub(crate) fn lock(&self, progress: &dyn Progress) -> Result<CacheLock<'_>, CacheError> {
        let logs = self.root.join("logs");
        fs::create_dir_all(&logs).map_err(|source| CacheError::Io { path: logs, source })?;
        let path = self.root.join("lock");
        let io_error = |source| CacheError::Io { path: path.clone(), source };
        let file = File::create(&path).map_err(io_error)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                progress.step("Waiting for another vmprobe that is preparing the emulated machine");
                while let Err(error) = rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                    if error != rustix::io::Errno::INTR {
                        return Err(io_error(error.into()));
                    }
                }
            }
            Err(error) => return Err(io_error(error.into())),
        }
        let tmp = self.root.join("tmp");
        if fs::read_dir(&tmp).is_ok_and(|mut left| left.next().is_some()) {
            progress.step("Removing what an interrupted preparation has left");
        }
        // A tool whose vmprobe was killed may still be writing there; what it leaves is removed the next time.
        if let Err(error) = fs::remove_dir_all(&tmp) {
            tracing::debug!(%error, "leftovers not removed");
        }
        fs::create_dir_all(&tmp).map_err(|source| CacheError::Io { path: tmp, source })?;
        Ok(CacheLock { cache: self, _file: file })
    }
}

/// The right to change the cache. Ends with the process at the latest (flock(2)).
#[derive(Debug)]
pub(crate) struct CacheLock<'a> {
    cache: &'a Cache,
    _file: File,
}

impl CacheLock<'_> {
    /// The log file of a step.
    pub(crate) fn log(&self, step: &str) -> PathBuf {
        self.cache.root.join("logs").join(format!("{step}.log"))
    }

    /// A new directory for work in progress.
    pub(crate) fn work_dir(&self) -> Result<TempDir, CacheError> {
        let tmp = self.cache.root.join("tmp");
        TempDir::new_in(&tmp).map_err(|source| CacheError::Io { path: tmp, source })
    }

    /// Moves the finished directory `from` to `to` (relative to the cache) and makes `name` stand for it.
    pub(crate) fn publish(&self, from: &Path, to: &str, name: &str) -> Result<PathBuf, CacheError> {
        let target = self.cache.root.join(to);
        let io_error = |source| CacheError::Io { path: target.clone(), source };
        sync_tree(from).map_err(io_error)?;
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(io_error)?;
        }
        match fs::remove_dir_all(&target) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(error)),
            _ => {}
        }
        fs::rename(from, &target).map_err(io_error)?;
        let link = self.cache.root.join("tmp").join(name);
        std::os::unix::fs::symlink(to, &link).map_err(io_error)?;
        fs::rename(&link, self.cache.root.join(name)).map_err(io_error)?;
        Ok(target)
    }
}

/// Writes every file below `dir` to the disk, so that a rename never publishes an empty one after a power cut.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            sync_tree(&entry.path())?;
        } else if kind.is_file() {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}

/// The cache directory by the environment. A relative XDG_CACHE_HOME is ignored, as the XDG base directory
/// specification asks.
fn locate(var: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let set = |name| var(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("VMPROBE_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").filter(|path| path.is_absolute()).map(|path| path.join("vmprobe")))
        .or_else(|| set("HOME").map(|path| path.join(".cache/vmprobe")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LineProgress;

    fn located(vars: &[(&str, &str)]) -> Option<PathBuf> {
        locate(|name| vars.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn the_most_specific_variable_wins() {
        let all = [("VMPROBE_CACHE", "/a"), ("XDG_CACHE_HOME", "/b"), ("HOME", "/c")];
        assert_eq!(located(&all), Some("/a".into()));
        assert_eq!(located(&all[1..]), Some("/b/vmprobe".into()));
        assert_eq!(located(&all[2..]), Some("/c/.cache/vmprobe".into()));
        assert_eq!(located(&[]), None);
    }

    #[test]
    fn empty_and_relative_values_are_passed_over() {
        let vars = [("VMPROBE_CACHE", ""), ("XDG_CACHE_HOME", "relative"), ("HOME", "/c")];
        assert_eq!(located(&vars), Some("/c/.cache/vmprobe".into()));
    }

    #[test]
    fn what_is_published_is_current_and_leftovers_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("cache"));
        assert_eq!(cache.current("name"), None);
        for version in ["1", "2", "2"] {
            let lock = cache.lock(&LineProgress::default()).unwrap();
            let work = lock.work_dir().unwrap();
            let made = work.path().join("made");
            fs::create_dir(&made).unwrap();
            fs::write(made.join("file"), version).unwrap();
            let published = lock.publish(&made, &format!("kind/{version}"), "name").unwrap();
            assert_eq!(cache.current("name"), Some(published.clone()));
            assert_eq!(fs::read_to_string(published.join("file")).unwrap(), version);
            // As if killed: the work directory stays behind.
            let left = work.keep();
            drop(lock);
            drop(cache.lock(&LineProgress::default()).unwrap());
            assert!(!left.exists());
        }
        assert!(cache.root().join("kind/1").exists(), "an older one may be in use by a running machine");
    }

    #[test]
    fn the_recipe_is_the_published_hash_of_its_parts() {
        // Test vectors of the FNV authors.
        assert_eq!(fnv1a([].into_iter()), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(b"foobar".iter().copied()), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn a_second_holder_waits_for_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().into());
        let first = cache.lock(&LineProgress::default()).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let second = cache.lock(&LineProgress::default()).unwrap();
                sender.send(()).unwrap();
                drop(second);
            });
            let wait = std::time::Duration::from_millis(200);
            assert!(receiver.recv_timeout(wait).is_err(), "the lock was given twice");
            drop(first);
            receiver.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        });
    }
}
