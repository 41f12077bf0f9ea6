//! The journal: a machine's events on disk, for when they are no longer in memory or their process is gone.
//!
//! Each machine has a directory with segments, which hold its events in order, and a file about the machine. Its process writes
//! it ([`Writer`]) and holds its lock; readers have a place in the segments ([`Cursor`]). When that process is gone the service
//! takes the journal over ([`Left`]). docs/journal.md has the layout.

mod cursor;
mod left;
mod record;
mod writer;

pub use cursor::Cursor;
pub use left::Left;
pub use writer::{Writer, sync_directory};

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use record::{FileError, Records};

/// The file about the machine.
const METADATA: &str = "machine";

/// What a journal is bounded by.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Bytes of its segments.
    pub size: u64,
    /// How long an event is kept.
    pub age: Duration,
}

/// Why a journal cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("{path}: {error}")]
    File { path: String, error: FileError },
    #[error("{path}: It is of machine '{found}'; move it back to that one's directory")]
    Stranger { path: String, found: String },
    #[error("{0}: A process that still runs writes it")]
    Locked(String),
}

impl JournalError {
    fn file(path: &Path, error: impl Into<FileError>) -> Self {
        Self::File { path: path.display().to_string(), error: error.into() }
    }
}

/// Takes a directory's lock, which goes with the file, and with the process.
///
/// # Errors
/// Somebody else has it (WouldBlock), or the directory cannot be opened.
pub fn lock(dir: &Path) -> io::Result<File> {
    let file = File::open(dir)?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

fn segment_path(dir: &Path, first: u64) -> PathBuf {
    // As many digits as the largest number has, so that the names are in order too.
    dir.join(format!("{first:020}.events"))
}

/// The first sequence numbers of a journal's segments, in order.
fn segments(dir: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        // Not what is only like one.
        found.extend(number.filter(|number| segment_path(dir, *number) == path));
    }
    found.sort_unstable();
    Ok(found)
}

/// Opens one of the files of a machine's journal, whose first sequence number is known.
fn open(path: &Path, machine: &str, first: u64) -> Result<Records<File>, JournalError> {
    let file = File::open(path).map_err(|error| JournalError::file(path, error))?;
    let (records, found, begins) = Records::open(file).map_err(|error| JournalError::file(path, error))?;
    if found != machine {
        return Err(JournalError::Stranger { path: path.display().to_string(), found });
    }
    if begins != first {
        return Err(JournalError::file(path, FileError::Damaged));
    }
    Ok(records)
}
