//! Reads a journal, also while it is written.

use std::fs::File;
use std::io;
use std::path::PathBuf;

use prost::Message;

use super::record::{FileError, Kind, Records};
use super::{JournalError, open, segment_path, segments};
use crate::contract::Event;
use crate::vm::Page;

/// How often a segment may go before a reader has opened it.
const LOOKS: u32 = 100;

/// A reader's place in a machine's journal.
#[derive(Debug)]
pub struct Cursor {
    dir: PathBuf,
    machine: String,
    at: Option<At>,
}

#[derive(Debug)]
struct At {
    /// The segment's first sequence number.
    first: u64,
    records: Records<File>,
    /// The sequence number that is wanted next.
    next: u64,
}

impl Cursor {
    pub fn new(dir: PathBuf, machine: String) -> Self {
        Self { dir, machine, at: None }
    }

    /// At most `most` events from `from` on that are below `limit`, the first sequence number that may not be there yet. The page is
    /// closed if there are no more.
    ///
    /// # Errors
    /// A segment cannot be read, or is not this machine's. Damaged ones are passed over.
    pub fn page(&mut self, from: u64, most: usize, limit: u64) -> Result<Page<Event>, JournalError> {
        let mut at = match self.at.take().filter(|at| at.next == from) {
            Some(at) => Some(at),
            None => self.segment(limit, |segments| {
                let behind = segments.partition_point(|first| *first <= from);
                behind.saturating_sub(1)
            })?,
        };
        let mut start = from;
        let mut items = Vec::new();
        let mut closed = false;
        while items.len() < most {
            let Some(here) = &mut at else {
                closed = true;
                break;
            };
            let next = start + items.len() as u64;
            let path = segment_path(&self.dir, here.first);
            let unread = |error: io::Error| JournalError::file(&path, error);
            let Some(frame) = here.records.peek().map_err(unread)? else {
                let first = here.first;
                match self.segment(limit, |segments| segments.partition_point(|one| *one <= first))? {
                    Some(further) => at = Some(further),
                    None => closed = true,
                }
                if closed {
                    break;
                }
                continue;
            };
            // A gap leads to its sequence number, an event stands on it.
            if frame.sequence > limit || frame.kind == Kind::Event && frame.sequence == limit {
                closed = true;
                break;
            }
            if frame.sequence > next && !items.is_empty() {
                break;
            }
            let Some((_, payload)) = here.records.take().map_err(unread)? else { continue };
            match frame.kind {
                Kind::Gap if items.is_empty() => start = start.max(frame.sequence),
                Kind::Event if frame.sequence >= next => match Event::decode(payload) {
                    Ok(event) => {
                        start = if items.is_empty() { frame.sequence } else { start };
                        items.push(event);
                    }
                    Err(error) => tracing::warn!("{}: Event {}: {error}", path.display(), frame.sequence),
                },
                _ => {}
            }
        }
        if let Some(at) = &mut at {
            at.next = start + items.len() as u64;
        }
        self.at = at;
        Ok(Page { from: start, items, lost: start - from, closed })
    }

    /// The segment that is chosen from those that may be read, or the first good one behind it.
    fn segment(&self, limit: u64, choose: impl Fn(&[u64]) -> usize) -> Result<Option<At>, JournalError> {
        let mut looked = 0;
        loop {
            looked += 1;
            let mut all = segments(&self.dir).map_err(|error| JournalError::file(&self.dir, error))?;
            all.retain(|first| *first < limit);
            let mut removed = false;
            for first in all.iter().copied().skip(choose(&all)) {
                let path = segment_path(&self.dir, first);
                match open(&path, &self.machine, first) {
                    Ok(records) => return Ok(Some(At { first, records, next: first })),
                    Err(JournalError::File { error: FileError::Read(error), .. })
                        if error.kind() == io::ErrorKind::NotFound && looked < LOOKS =>
                    {
                        removed = true;
                        break;
                    }
                    Err(JournalError::File {
                        path,
                        error: error @ (FileError::Damaged | FileError::Short),
                    }) => {
                        tracing::warn!("{path}: {error}");
                    }
                    Err(error) => return Err(error),
                }
            }
            // It was too old or too much meanwhile; those behind it are still there.
            if !removed {
                return Ok(None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{Limits, Writer};
    use super::*;

    fn put(writer: &mut Writer, sequence: u64) -> io::Result<()> {
        let event = Event { sequence, place: "tick".repeat(20), ..Event::default() };
        writer.event(sequence, |to| event.encode_raw(to))
    }

    fn writer(dir: &tempfile::TempDir, size: u64) -> Writer {
        let limits = Limits { size, age: Duration::from_secs(3600) };
        Writer::create(dir.path(), "t", limits).unwrap()
    }

    fn cursor(dir: &tempfile::TempDir) -> Cursor {
        Cursor::new(dir.path().to_owned(), "t".to_owned())
    }

    /// A page as its beginning, its events, its losses, and whether it is the last one.
    fn page(cursor: &mut Cursor, from: u64, most: usize, limit: u64) -> (u64, Vec<u64>, u64, bool) {
        let Page { from, items, lost, closed } = cursor.page(from, most, limit).unwrap();
        (from, items.iter().map(|event| event.sequence).collect(), lost, closed)
    }

    #[test]
    fn gaps_are_told_wherever_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(&dir, 1 << 20);
        writer.gap(3).unwrap();
        for sequence in [3, 4, 5] {
            put(&mut writer, sequence).unwrap();
        }
        writer.gap(8).unwrap();
        put(&mut writer, 8).unwrap();
        writer.gap(11).unwrap();
        writer.sync().unwrap();
        let mut cursor = cursor(&dir);
        assert_eq!(page(&mut cursor, 0, 2, 11), (3, vec![3, 4], 3, false));
        assert_eq!(page(&mut cursor, 5, 9, 11), (5, vec![5], 0, false));
        assert_eq!(page(&mut cursor, 6, 9, 11), (8, vec![8], 2, false));
        assert_eq!(page(&mut cursor, 9, 9, 11), (11, vec![], 2, true));
        assert_eq!(page(&mut cursor, 11, 9, 11), (11, vec![], 0, true));
        // What is no segment is none.
        std::fs::write(dir.path().join("4.events"), "").unwrap();
        std::fs::write(dir.path().join("machine.new"), "").unwrap();
        // From anywhere, and no further than the limit.
        assert_eq!(page(&mut cursor, 4, 9, 5), (4, vec![4], 0, true));
        assert_eq!(page(&mut cursor, 7, 9, 11), (8, vec![8], 1, false));
    }

    #[test]
    fn what_was_given_up_after_an_error_is_written_again_and_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(&dir, 1 << 20);
        // Before anything was durable, and after.
        put(&mut writer, 0).unwrap();
        writer.abandon();
        assert!(segments(dir.path()).unwrap().is_empty());
        for sequence in 0..4 {
            put(&mut writer, sequence).unwrap();
        }
        writer.sync().unwrap();
        let mut cursor = cursor(&dir);
        assert_eq!(page(&mut cursor, 0, 9, writer.durable()), (0, vec![0, 1, 2, 3], 0, true));
        for sequence in 4..6 {
            put(&mut writer, sequence).unwrap();
        }
        writer.settle().unwrap();
        assert_eq!(page(&mut cursor, 4, 9, writer.durable()), (4, vec![], 0, true));
        writer.abandon();
        assert_eq!(writer.durable(), 4);
        for sequence in 4..7 {
            put(&mut writer, sequence).unwrap();
        }
        writer.sync().unwrap();
        assert_eq!(page(&mut cursor, 4, 9, writer.durable()), (4, vec![4, 5, 6], 0, true));
        assert_eq!(segments(dir.path()).unwrap(), [0, 4]);
    }

    #[test]
    fn a_reader_of_a_segment_that_goes_reads_it_to_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = writer(&dir, 16 << 10);
        put(&mut writer, 0).unwrap();
        writer.sync().unwrap();
        let mut cursor = cursor(&dir);
        assert_eq!(page(&mut cursor, 0, 1, writer.durable()), (0, vec![0], 0, false));
        for sequence in 1..1000 {
            put(&mut writer, sequence).unwrap();
        }
        writer.sync().unwrap();
        let kept = segments(dir.path()).unwrap();
        let bytes: u64 =
            kept.iter().map(|first| segment_path(dir.path(), *first).metadata().unwrap().len()).sum();
        assert!(kept.len() > 10 && bytes <= 16 << 10, "{kept:?}: {bytes}");
        let (from, read, lost, _) = page(&mut cursor, 1, 1000, writer.durable());
        assert!(from == 1 && lost == 0 && read.len() < 50, "{read:?}");
        let next = from + read.len() as u64;
        let (from, read, lost, closed) = page(&mut cursor, next, 1000, writer.durable());
        assert_eq!((from, lost, closed), (kept[0], kept[0] - next, true));
        assert_eq!(from + read.len() as u64, 1000);
    }
}
