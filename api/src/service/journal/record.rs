//! A file of a journal, as bytes: what it begins with, and its records. docs/journal.md has the layout.

use std::io::{self, Read};

/// What each file begins with.
const MAGIC: [u8; 8] = *b"VMPROBEJ";
/// The version of the layout.
pub const VERSION: u32 = 1;
/// Magic, version, and the checksum of both.
const PREFIX: usize = 16;
/// What stands before a record's payload: checksum, length, kind, sequence number.
const FRAME: usize = 17;
/// Bytes of a payload at most; what claims more is damaged.
const MAX_PAYLOAD: usize = 16 << 20;
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

/// What a record holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The first of each file: its machine's name. The sequence number is that of the file's first event.
    File = 1,
    /// One event, as the contract has it.
    Event = 2,
    /// Nothing: the events before the sequence number that are not there were lost.
    Gap = 3,
    /// The machine, as the contract has it.
    Machine = 4,
    /// Its probes, as the contract's ListProbesResponse.
    Probes = 5,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Kind::File, Kind::Event, Kind::Gap, Kind::Machine, Kind::Probes]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("It cannot be read: {0}")]
    Read(#[from] io::Error),
    #[error("It ends within its header")]
    Short,
    #[error("It is no file of a journal of vmprobe's; move it somewhere else")]
    NotOurs,
    #[error("Its header is damaged, and its events are lost")]
    Damaged,
    #[error(
        "It has version {0} of the layout, and this vmprobe reads version {VERSION}; use the vmprobe that wrote it"
    )]
    Version(u32),
}

/// Appends what a file begins with.
pub fn begin(out: &mut Vec<u8>, machine: &str, first: u64) {
    let start = out.len();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    let checksum = crc32fast::hash(&out[start..]);
    out.extend(checksum.to_le_bytes());
    append(out, Kind::File, first, machine.as_bytes());
}

/// Appends a record. Payloads are far from four gigabytes long.
pub fn append(out: &mut Vec<u8>, kind: Kind, sequence: u64, payload: &[u8]) {
    let start = out.len();
    out.extend([0; 4]);
    out.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.push(kind as u8);
    out.extend(sequence.to_le_bytes());
    out.extend(payload);
    let checksum = crc32fast::hash(&out[start + 4..]);
    out[start..start + 4].copy_from_slice(&checksum.to_le_bytes());
}

/// Bytes of a record with such a payload.
pub const fn length(payload: usize) -> u64 {
    (FRAME + payload) as u64
}

/// A record without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub sequence: u64,
    /// Bytes of the whole record.
    length: usize,
}

enum Decoded {
    Good(Frame),
    /// More bytes are needed.
    Short,
    /// It is damaged; if only its payload is, the next one stands so many bytes behind it.
    Bad(usize),
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at + N)?.try_into().ok()
}

/// The record that begins with `bytes`.
fn decode(bytes: &[u8]) -> Decoded {
    let (Some(checksum), Some(payload), Some(sequence)) = (array(bytes, 0), array(bytes, 4), array(bytes, 9))
    else {
        return Decoded::Short;
    };
    let length = match usize::try_from(u32::from_le_bytes(payload)) {
        Ok(payload) if payload <= MAX_PAYLOAD => FRAME + payload,
        _ => return Decoded::Bad(usize::MAX),
    };
    let Some(checked) = bytes.get(4..length) else { return Decoded::Short };
    match Kind::of(bytes[8]) {
        Some(kind) if crc32fast::hash(checked) == u32::from_le_bytes(checksum) => {
            Decoded::Good(Frame { kind, sequence: u64::from_le_bytes(sequence), length })
        }
        _ => Decoded::Bad(length),
    }
}

/// The good records of a file, in order.
///
/// A damaged record is never given out. It is passed over if a good one stands right behind it; otherwise the file ends there.
#[derive(Debug)]
pub struct Records<R> {
    source: R,
    buffer: Vec<u8>,
    /// Where the next record begins in the buffer.
    at: usize,
    /// Bytes of the file up to the end of the last good record.
    good: u64,
    /// Bytes of damaged records that were passed over since the last good one, and in all.
    passed: u64,
    damaged: u64,
}

impl<R: Read> Records<R> {
    /// Begins to read a file. Returns its machine's name and its first sequence number too.
    ///
    /// # Errors
    /// It cannot be read, or is not what it should be.
    pub fn open(source: R) -> Result<(Self, String, u64), FileError> {
        let mut records = Self { source, buffer: Vec::new(), at: 0, good: 0, passed: 0, damaged: 0 };
        while records.buffer.len() < PREFIX && records.fill()? {}
        let prefix = records.buffer.get(..PREFIX).ok_or(FileError::Short)?;
        let (Some(magic), Some(version), Some(checksum)) =
            (array::<8>(prefix, 0), array(prefix, 8), array(prefix, 12))
        else {
            return Err(FileError::Short);
        };
        let whole = crc32fast::hash(&prefix[..12]) == u32::from_le_bytes(checksum);
        match u32::from_le_bytes(version) {
            _ if magic != MAGIC => return Err(FileError::NotOurs),
            _ if !whole => return Err(FileError::Damaged),
            VERSION => {}
            version => return Err(FileError::Version(version)),
        }
        records.at = PREFIX;
        records.good = PREFIX as u64;
        match records.look(0)? {
            Decoded::Good(Frame { kind: Kind::File, sequence, .. }) => {
                let name = records.take()?.map(|(_, name)| String::from_utf8_lossy(name).into_owned());
                Ok((records, name.unwrap_or_default(), sequence))
            }
            Decoded::Short => Err(FileError::Short),
            _ => Err(FileError::Damaged),
        }
    }

    /// Whether there was more.
    fn fill(&mut self) -> io::Result<bool> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let read = self.source.by_ref().take(CHUNK as u64).read_to_end(&mut self.buffer)?;
        Ok(read > 0)
    }

    /// The record so many bytes ahead.
    fn look(&mut self, ahead: usize) -> io::Result<Decoded> {
        loop {
            let bytes = ahead.checked_add(self.at).and_then(|from| self.buffer.get(from..));
            let decoded = bytes.map_or(Decoded::Short, decode);
            if !matches!(decoded, Decoded::Short) || ahead > MAX_PAYLOAD + FRAME || !self.fill()? {
                return Ok(decoded);
            }
        }
    }

    /// The next good record, which stays the next one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn peek(&mut self) -> io::Result<Option<Frame>> {
        loop {
            match self.look(0)? {
                Decoded::Good(frame) => return Ok(Some(frame)),
                Decoded::Bad(length) if matches!(self.look(length)?, Decoded::Good(_)) => {
                    self.at += length;
                    self.passed += length as u64;
                    self.damaged += length as u64;
                }
                _ => return Ok(None),
            }
        }
    }

    /// The next good record with its payload; `None` behind the last one.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn take(&mut self) -> io::Result<Option<(Frame, &[u8])>> {
        let Some(frame) = self.peek()? else { return Ok(None) };
        let payload = self.at + FRAME;
        self.at += frame.length;
        self.good += std::mem::take(&mut self.passed) + frame.length as u64;
        Ok(Some((frame, &self.buffer[payload..self.at])))
    }

    /// Bytes of the file up to the end of the last good record.
    pub fn good(&self) -> u64 {
        self.good
    }

    /// Bytes of the damaged records between good ones.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Written = Vec<(u64, Vec<u8>)>;

    /// A file with these events, and where each record ends.
    fn file(events: &Written) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = Vec::new();
        begin(&mut bytes, "t", 7);
        let mut ends = vec![bytes.len()];
        for (sequence, payload) in events {
            append(&mut bytes, Kind::Event, *sequence, payload);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    fn read(bytes: &[u8]) -> (Written, u64) {
        let (mut records, name, first) = Records::open(bytes).unwrap();
        assert_eq!((name.as_str(), first), ("t", 7));
        let mut read = Vec::new();
        while let Some((frame, payload)) = records.take().unwrap() {
            read.push((frame.sequence, payload.to_vec()));
        }
        (read, records.good())
    }

    fn events() -> impl Strategy<Value = Written> {
        let payload = prop::collection::vec(any::<u8>(), 0..300);
        prop::collection::vec((any::<u64>(), payload), 1..20)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(events in events()) {
            let (bytes, _) = file(&events);
            prop_assert_eq!(read(&bytes), (events, bytes.len() as u64));
        }

        #[test]
        fn a_torn_tail_leaves_what_is_whole_before_it(events in events(), cut in any::<prop::sample::Index>()) {
            let (bytes, ends) = file(&events);
            let torn = ends[0] + cut.index(bytes.len() - ends[0]);
            let whole = ends.iter().rposition(|end| *end <= torn).unwrap();
            prop_assert_eq!(read(&bytes[..torn]), (events[..whole].to_vec(), ends[whole] as u64));
        }

        #[test]
        fn a_changed_byte_costs_events_and_never_changes_one(
            events in events(),
            at in any::<prop::sample::Index>(),
            flip in 1..=u8::MAX,
        ) {
            let (mut bytes, ends) = file(&events);
            let at = ends[0] + at.index(bytes.len() - ends[0]);
            bytes[at] ^= flip;
            let hit = ends.iter().rposition(|end| *end <= at).unwrap();
            let (read, good) = read(&bytes);
            prop_assert_eq!(&read[..hit], &events[..hit]);
            // Behind it come all the others where its length still holds; otherwise the file ends there, unless by chance the
            // false length leads to another record.
            prop_assert!(events[hit + 1..].ends_with(&read[hit..]));
            prop_assert!((ends[hit] + 4..ends[hit] + 8).contains(&at) || read.len() == events.len() - 1);
            prop_assert_eq!(good, if read.len() > hit { bytes.len() } else { ends[hit] } as u64);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..500), ours in any::<bool>()) {
            let mut all = Vec::new();
            if ours {
                begin(&mut all, "t", 7);
            }
            all.extend(bytes);
            if let Ok((mut records, ..)) = Records::open(&all[..]) {
                while records.take().unwrap().is_some() {}
                prop_assert!(records.good() <= all.len() as u64);
            }
        }
    }

    #[test]
    fn the_last_record_may_be_torn_at_any_byte() {
        let events = vec![(7, vec![1; 200]), (8, vec![2; 100_000]), (9, vec![3; 250])];
        let (bytes, ends) = file(&events);
        for torn in ends[2]..bytes.len() {
            assert_eq!(read(&bytes[..torn]), (events[..2].to_vec(), ends[2] as u64), "{torn}");
        }
        // A file that had its length but not yet its data reads as zeros.
        let mut zeros = bytes[..ends[2]].to_vec();
        zeros.resize(ends[2] + 4096, 0);
        assert_eq!(read(&zeros), (events[..2].to_vec(), ends[2] as u64));
    }

    #[test]
    fn a_header_that_is_not_right_says_why() {
        let (bytes, ends) = file(&vec![(7, vec![1])]);
        for short in 0..ends[0] {
            assert!(matches!(Records::open(&bytes[..short]), Err(FileError::Short)), "{short}");
        }
        let changed = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            Records::open(&bytes[..]).map(drop).unwrap_err()
        };
        assert!(matches!(changed(0), FileError::NotOurs));
        assert!(matches!(changed(8), FileError::Damaged));
        assert!(matches!(changed(ends[0] - 1), FileError::Damaged));
        let mut newer = bytes.clone();
        newer[8..12].copy_from_slice(&2_u32.to_le_bytes());
        let checksum = crc32fast::hash(&newer[..12]);
        newer[12..16].copy_from_slice(&checksum.to_le_bytes());
        assert!(matches!(Records::open(&newer[..]).map(drop), Err(FileError::Version(2))));
    }
}
