//! The directory of the machines' journals.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tonic::Status;

use super::super::journal::{self, Left, Limits};
use super::super::status;
use super::machines::check_name;
use super::members::Member;
use crate::cli::JournalArgs;
use crate::exit::Failure;

/// What a journal is renamed to before it is removed. No machine has a name with a dot.
const REMOVED: &str = "removed";

/// The journals of a service's machines, each in a directory with its machine's name.
pub struct Journals {
    dir: PathBuf,
    pub limits: Limits,
    /// No other service uses the directory.
    _lock: File,
}

fn refused(dir: &Path, what: impl std::fmt::Display) -> Failure {
    Failure::Usage(format!("--journal {}: {what}", dir.display()))
}

/// What it is that makes a directory unfit for secrets; events hold registers, which count as such.
fn unfit(found: &fs::Metadata) -> Option<&'static str> {
    if !found.is_dir() {
        Some("Is no directory")
    } else if found.uid() != rustix::process::geteuid().as_raw() {
        Some("Belongs to another user; give a directory of the user that runs the service")
    } else if found.mode() & 0o022 != 0 {
        Some("Others can write there; take that right from them (chmod go-w)")
    } else {
        None
    }
}

fn make(dir: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).create(dir)?;
    sync_parent(dir)
}

fn sync_parent(dir: &Path) -> io::Result<()> {
    dir.parent().map_or(Ok(()), journal::sync_directory)
}

impl Journals {
    /// Makes the directory if need be, and takes it for this service.
    ///
    /// # Errors
    /// It cannot be made or used, or belongs to somebody else.
    pub fn open(args: &JournalArgs) -> Result<Option<Self>, Failure> {
        let Some(dir) = &args.journal else { return Ok(None) };
        let dir = std::path::absolute(dir).map_err(|error| refused(dir, error))?;
        match make(&dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(refused(&dir, format_args!("Cannot be made: {error}")));
            }
            _ => {}
        }
        let found = fs::metadata(&dir).map_err(|error| refused(&dir, error))?;
        if let Some(what) = unfit(&found) {
            return Err(refused(&dir, what));
        }
        let lock = journal::lock(&dir).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => refused(&dir, "Another service uses it; give another directory"),
            _ => refused(&dir, format_args!("Cannot be used: {error}")),
        })?;
        Ok(Some(Self { dir, limits: args.limits(), _lock: lock }))
    }

    /// Makes the directory for a new machine's journal.
    ///
    /// # Errors
    /// ALREADY_EXISTS, or the host cannot.
    pub fn make(&self, name: &str) -> Result<PathBuf, Status> {
        let dir = self.dir.join(name);
        match make(&dir) {
            Ok(()) => Ok(dir),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(status::journal_there(name, &dir))
            }
            Err(error) => {
                Err(Failure::Host(format!("{}: cannot be made for the journal: {error}", dir.display()))
                    .into())
            }
        }
    }

    /// Where the journal of a machine is that an earlier service has left running, if it writes one here.
    pub fn of_running(&self, name: &str) -> Option<PathBuf> {
        let dir = self.dir.join(name);
        let locked = journal::lock(&dir).is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
        locked.then_some(dir)
    }

    /// The machines whose processes are gone, from what they have left. What was half removed is removed.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn left(&self, running: &BTreeSet<String>) -> Result<Vec<Arc<Member>>, Failure> {
        let unread = |error| refused(&self.dir, format_args!("Cannot be read: {error}"));
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(unread)? {
            let dir = entry.map_err(unread)?.path();
            if dir.extension().is_some_and(|extension| extension == REMOVED) {
                fs::remove_dir_all(&dir).ok();
                continue;
            }
            let name = dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if running.contains(&name) {
                continue;
            }
            // A directory that has just been made is empty.
            if check_name(&name).is_err() || fs::remove_dir(&dir).is_ok() {
                continue;
            }
            let taken = match fs::symlink_metadata(&dir).map(|found| unfit(&found)) {
                Ok(None) => Left::take_over(&dir, &name).map_err(|error| error.to_string()),
                Ok(Some(what)) => Err(format!("{}: {what}", dir.display())),
                Err(error) => Err(format!("{}: {error}", dir.display())),
            };
            match taken {
                Ok(left) => found.push(Arc::new(Member::left_behind(dir, left))),
                Err(why) => eprintln!("vmprobe: no machine is listed for a journal: {why}"),
            }
        }
        Ok(found)
    }
}

/// Removes a machine's journal, at once for those who look later.
///
/// # Errors
/// It cannot be removed.
pub fn remove(dir: &Path) -> Result<(), Status> {
    let removed = dir.with_extension(REMOVED);
    fs::remove_dir_all(&removed).ok();
    let result = match fs::rename(dir, &removed) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Err(_) => Ok(()),
        Ok(()) => fs::remove_dir_all(&removed).and_then(|()| sync_parent(dir)),
    };
    let failed =
        |error| format!("{}: the journal cannot be removed: {error}; remove it by hand", dir.display());
    result.map_err(|error| Failure::Host(failed(error)).into())
}
