//! Writes a journal: segments that are bounded in size and age, with an fsync now and then.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prost::Message;

use super::record::{self, Kind};
use super::{Limits, METADATA, segment_path};
use crate::contract::{ListProbesResponse, Machine, Probe};

/// How long an event may wait for its fsync.
const SYNC_INTERVAL: Duration = Duration::from_millis(200);
/// How many bytes may wait for theirs.
const SYNC_BYTES: u64 = 4 << 20;
/// Bytes that are written at once.
const WRITE_BYTES: usize = 256 << 10;
/// A journal consists of about so many segments, and is cut back by one.
const SEGMENTS: u32 = 16;
/// Bytes of a segment at most, so that a reader finds its place soon.
const MAX_SEGMENT: u64 = 64 << 20;

#[derive(Debug)]
struct Segment {
    first: u64,
    bytes: u64,
    /// When its first event was written.
    began: Option<Instant>,
}

/// The segment that is written.
#[derive(Debug)]
struct Active {
    file: File,
    segment: Segment,
    /// Bytes of the header, and bytes that are on disk for good.
    header: u64,
    synced: u64,
}

/// The writer of a machine's journal. There is one: whoever makes it holds the directory's lock.
///
/// # Consistency on error
/// After an error of any method, [`Writer::abandon`] is to be called, which cuts off what may be there in part. What is durable stays
/// so.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    machine: String,
    limits: Limits,
    closed: VecDeque<Segment>,
    /// There is none after an error, until the next record.
    active: Option<Active>,
    /// Records that are not written yet.
    buffer: Vec<u8>,
    payload: Vec<u8>,
    /// The sequence number behind the last record's, and behind the last one's that is on disk for good.
    next: u64,
    durable: u64,
    unsynced_since: Option<Instant>,
}

impl Writer {
    /// Begins a journal in a directory without one.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn create(dir: &Path, machine: &str, limits: Limits) -> io::Result<Self> {
        let mut writer = Self {
            dir: dir.to_owned(),
            machine: machine.to_owned(),
            limits,
            closed: VecDeque::new(),
            active: None,
            buffer: Vec::new(),
            payload: Vec::new(),
            next: 0,
            durable: 0,
            unsynced_since: None,
        };
        writer.begin()?;
        Ok(writer)
    }

    /// The sequence number below which all is on disk for good, or lost.
    pub fn durable(&self) -> u64 {
        self.durable
    }

    fn segment_bytes(&self) -> u64 {
        (self.limits.size / u64::from(SEGMENTS)).min(MAX_SEGMENT)
    }

    /// Begins the next segment.
    fn begin(&mut self) -> io::Result<()> {
        let most = self.limits.size.saturating_sub(self.segment_bytes());
        while self.closed.iter().map(|segment| segment.bytes).sum::<u64>() > most {
            self.remove_oldest()?;
        }
        let mut header = Vec::new();
        record::begin(&mut header, &self.machine, self.next);
        let mut file = create(&segment_path(&self.dir, self.next))?;
        file.write_all(&header)?;
        file.sync_all()?;
        sync_directory(&self.dir)?;
        let bytes = header.len() as u64;
        let segment = Segment { first: self.next, bytes, began: None };
        self.active = Some(Active { file, segment, header: bytes, synced: bytes });
        Ok(())
    }

    fn remove_oldest(&mut self) -> io::Result<()> {
        if let Some(oldest) = self.closed.front() {
            match fs::remove_file(segment_path(&self.dir, oldest.first)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => self.closed.pop_front(),
            };
        }
        Ok(())
    }

    /// Ends the segment that is written, and begins the next.
    fn rotate(&mut self) -> io::Result<()> {
        self.sync()?;
        self.closed.extend(self.active.take().map(|active| active.segment));
        self.begin()
    }

    /// The next event, which `encode` writes, of the next sequence number or, behind a gap, of a later one.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn event(&mut self, sequence: u64, encode: impl FnOnce(&mut Vec<u8>)) -> io::Result<()> {
        self.payload.clear();
        encode(&mut self.payload);
        self.record(Kind::Event, sequence)?;
        self.next = sequence + 1;
        Ok(())
    }

    /// Events before `next` are lost.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn gap(&mut self, next: u64) -> io::Result<()> {
        self.payload.clear();
        self.record(Kind::Gap, next)?;
        self.next = next;
        Ok(())
    }

    fn record(&mut self, kind: Kind, sequence: u64) -> io::Result<()> {
        let now = Instant::now();
        let full = self.segment_bytes();
        let spread = self.limits.age / SEGMENTS;
        let length = record::length(self.payload.len()) + self.buffer.len() as u64;
        match &self.active {
            None => self.begin()?,
            Some(Active { segment: Segment { bytes, began: Some(began), .. }, .. })
                if bytes + length > full || now - *began > spread =>
            {
                self.rotate()?;
            }
            _ => {}
        }
        if let Some(active) = &mut self.active {
            active.segment.began.get_or_insert(now);
        }
        self.unsynced_since.get_or_insert(now);
        record::append(&mut self.buffer, kind, sequence, &self.payload);
        if self.buffer.len() >= WRITE_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(active) = self.active.as_mut().filter(|_| !self.buffer.is_empty()) {
            active.file.write_all(&self.buffer)?;
            active.segment.bytes += self.buffer.len() as u64;
            self.buffer.clear();
        }
        Ok(())
    }

    /// Has all that was written on disk for good.
    ///
    /// # Errors
    /// It is not.
    pub fn sync(&mut self) -> io::Result<()> {
        self.flush()?;
        if let Some(active) = self.active.as_mut().filter(|active| active.synced < active.segment.bytes) {
            active.file.sync_data()?;
            active.synced = active.segment.bytes;
        }
        self.durable = self.next;
        self.unsynced_since = None;
        Ok(())
    }

    /// When [`Writer::settle`] has something to do again.
    pub fn due(&self) -> Option<Instant> {
        let oldest = self.closed.front().or(self.active.as_ref().map(|active| &active.segment));
        let expires = oldest.and_then(|oldest| oldest.began?.checked_add(self.limits.age));
        let sync = self.unsynced_since.map(|since| since + SYNC_INTERVAL);
        expires.into_iter().chain(sync).min()
    }

    /// Whether what was written waits for an fsync that is due.
    fn must_sync(&self) -> bool {
        let waits = self.active.as_ref().map_or(0, |active| active.segment.bytes - active.synced);
        self.unsynced_since.is_some_and(|since| since.elapsed() >= SYNC_INTERVAL) || waits >= SYNC_BYTES
    }

    /// Does what is due: an fsync, and removing segments that have become too old.
    ///
    /// # Errors
    /// It cannot be done.
    pub fn settle(&mut self) -> io::Result<()> {
        self.flush()?;
        if self.must_sync() {
            self.sync()?;
        }
        let age = self.limits.age;
        let old = |segment: &Segment| segment.began.is_some_and(|began| began.elapsed() >= age);
        if self.active.as_ref().is_some_and(|active| old(&active.segment)) {
            self.rotate()?;
        }
        while self.closed.front().is_some_and(old) {
            self.remove_oldest()?;
        }
        Ok(())
    }

    /// Gives up what is not on disk for good, after an error. The next record is to be that behind [`Writer::durable`]; it begins a
    /// new segment.
    pub fn abandon(&mut self) {
        self.buffer.clear();
        self.unsynced_since = None;
        self.next = self.durable;
        let Some(Active { file, mut segment, header, synced }) = self.active.take() else { return };
        // What cannot be cut off has a wrong checksum, or is the same as what will be written again.
        file.set_len(synced).ok();
        if synced > header {
            segment.bytes = synced;
            self.closed.push_back(segment);
        } else {
            fs::remove_file(segment_path(&self.dir, segment.first)).ok();
        }
    }

    /// Replaces what is known of the machine and its probes, for those who come when nobody else can tell.
    ///
    /// # Errors
    /// It cannot be written; what was there before still is.
    pub fn describe(&self, machine: &Machine, probes: Vec<Probe>) -> io::Result<()> {
        let mut bytes = Vec::new();
        record::begin(&mut bytes, &self.machine, 0);
        record::append(&mut bytes, Kind::Machine, 0, &machine.encode_to_vec());
        record::append(&mut bytes, Kind::Probes, 0, &ListProbesResponse { probes }.encode_to_vec());
        let (path, new) = (self.dir.join(METADATA), self.dir.join(METADATA).with_extension("new"));
        let mut file = create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        sync_directory(&self.dir)
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

/// Makes what was made, renamed or removed there last (fsync(2)).
pub fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}
