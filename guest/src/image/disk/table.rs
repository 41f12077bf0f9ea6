//! Partition tables: GPT (UEFI specification, 5.3) and MBR with logical partitions.
//!
//! The crates that read them trust the counts in a header, or panic at them; a boot image comes from anywhere.

use std::fmt;

use super::{DiskError, ReadAt};
use crate::bytes::{array, u16_at, u32_at, u64_at};

/// Entries at most. GPT tables have 128; `sfdisk` makes no more than this.
const MAX_ENTRIES: u32 = 1024;
/// Bytes of a GPT entry at most; they have 128.
const MAX_ENTRY_BYTES: u32 = 4096;
/// Logical partitions at most: Linux counts no further than 255 minors for a disk.
const MAX_LOGICAL: u32 = 256;

const GPT_SIGNATURE: &[u8; 8] = b"EFI PART";
const GPT_HEADER_BYTES: usize = 92;

/// What a partition is for, as far as booting wants to know (UAPI.2, "Discoverable Partitions Specification").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionKind {
    /// The EFI system partition.
    Esp,
    /// An extended boot loader partition.
    Xbootldr,
    /// The root file system of an x86-64 system.
    Root,
    /// Anything else.
    Other,
}

impl fmt::Display for PartitionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PartitionKind::Esp => "EFI system partition",
            PartitionKind::Xbootldr => "extended boot loader partition",
            PartitionKind::Root => "root",
            PartitionKind::Other => "partition",
        })
    }
}

const TYPES: [([u8; 16], PartitionKind); 3] = [
    // c12a7328-f81f-11d2-ba4b-00a0c93ec93b
    (
        [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b],
        PartitionKind::Esp,
    ),
    // bc13c2ff-59e6-4262-a352-b275fd6f7172
    (
        [0xff, 0xc2, 0x13, 0xbc, 0xe6, 0x59, 0x62, 0x42, 0xa3, 0x52, 0xb2, 0x75, 0xfd, 0x6f, 0x71, 0x72],
        PartitionKind::Xbootldr,
    ),
    // 4f68bce3-e8cd-4db1-96e7-fbcaf984b709
    (
        [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09],
        PartitionKind::Root,
    ),
];

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// As Linux numbers it.
    pub number: u32,
    /// Its first byte.
    pub start: u64,
    /// Its size.
    pub bytes: u64,
    /// What it is for.
    pub kind: PartitionKind,
    /// As Linux's `root=PARTUUID=` takes it.
    pub part_uuid: String,
}

/// How a disk is divided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Table {
    /// A GUID partition table.
    Gpt(Vec<Partition>),
    /// A PC's master boot record.
    Mbr(Vec<Partition>),
}

/// The table. `None` for a disk without one.
///
/// # Errors
/// It cannot be read, or lies.
pub fn read(disk: &dyn ReadAt) -> Result<Option<Table>, DiskError> {
    for sector in [512, 4096] {
        let last = (disk.bytes() / sector).saturating_sub(1);
        // The backup is at the end (UEFI specification, 5.3.2).
        for lba in [1, last] {
            if let Some(partitions) = gpt(disk, sector, lba)? {
                return Ok(Some(Table::Gpt(partitions)));
            }
        }
    }
    mbr(disk)
}

/// A GPT whose header is in this sector. `None` if there is none, or a damaged one.
fn gpt(disk: &dyn ReadAt, sector: u64, lba: u64) -> Result<Option<Vec<Partition>>, DiskError> {
    let mut header = [0; GPT_HEADER_BYTES];
    let Some(at) = lba.checked_mul(sector) else { return Ok(None) };
    disk.read_at(&mut header, at)?;
    let word = |at| u32_at(&header, at).unwrap_or(0);
    let long = |at| u64_at(&header, at).unwrap_or(0);
    let (count, entry_bytes) = (word(80), word(84));
    let sound = header.starts_with(GPT_SIGNATURE)
        && word(12) as usize == GPT_HEADER_BYTES
        && long(24) == lba
        && (1..=MAX_ENTRIES).contains(&count)
        && (128..=MAX_ENTRY_BYTES).contains(&entry_bytes)
        && entry_bytes % 8 == 0;
    let (crc, entries_crc, entries_lba) = (word(16), word(88), long(72));
    header[16..20].fill(0);
    if !sound || crc32fast::hash(&header) != crc {
        return Ok(None);
    }
    let mut entries = vec![0; count as usize * entry_bytes as usize];
    let Some(at) = entries_lba.checked_mul(sector) else { return Ok(None) };
    disk.read_at(&mut entries, at)?;
    if crc32fast::hash(&entries) != entries_crc {
        return Ok(None);
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(entry_bytes as usize)) {
        let kind: [u8; 16] = array(entry, 0).unwrap_or_default();
        if kind == [0; 16] {
            continue;
        }
        let (first, last) = (u64_at(entry, 32).unwrap_or(0), u64_at(entry, 40).unwrap_or(0));
        let start = first.checked_mul(sector);
        let end = last.checked_add(1).and_then(|end| end.checked_mul(sector));
        let (start, bytes) = within(disk, number, start, end)?;
        let kind =
            TYPES.iter().find(|(guid, _)| *guid == kind).map_or(PartitionKind::Other, |(_, kind)| *kind);
        let part_uuid = guid(&array(entry, 16).unwrap_or_default());
        partitions.push(Partition { number, start, bytes, kind, part_uuid });
    }
    Ok(Some(partitions))
}

/// A GUID as text: its first three fields are little-endian (UEFI specification, appendix A).
fn guid(bytes: &[u8; 16]) -> String {
    let [a, b, c, d, e, f, g, h, tail @ ..] = bytes;
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let fields = [hex(&[*d, *c, *b, *a]), hex(&[*f, *e]), hex(&[*h, *g]), hex(&tail[..2]), hex(&tail[2..])];
    fields.join("-")
}

fn within(
    disk: &dyn ReadAt,
    number: u32,
    start: Option<u64>,
    end: Option<u64>,
) -> Result<(u64, u64), DiskError> {
    let range = start.zip(end).filter(|(start, end)| start < end && *end <= disk.bytes());
    range
        .map(|(start, end)| (start, end - start))
        .ok_or(DiskError::PartitionOutside { number, bytes: disk.bytes() })
}

/// An entry of a master boot record, or of an extended boot record.
struct MbrEntry {
    kind: u8,
    /// In sectors; of a logical partition from its boot record, or from the extended partition.
    start: u32,
    sectors: u32,
}

/// A master boot record, or an extended one.
struct BootRecord {
    signature: u32,
    entries: [MbrEntry; 4],
}

/// `None` if there is none.
fn boot_record(disk: &dyn ReadAt, at: u64) -> Result<Option<BootRecord>, DiskError> {
    let mut sector = [0; 512];
    disk.read_at(&mut sector, at)?;
    if u16_at(&sector, 510) != Some(0xaa55) {
        return Ok(None);
    }
    let entries = [446, 462, 478, 494].map(|at| MbrEntry {
        kind: sector[at + 4],
        start: u32_at(&sector, at + 8).unwrap_or(0),
        sectors: u32_at(&sector, at + 12).unwrap_or(0),
    });
    Ok(Some(BootRecord { signature: u32_at(&sector, 440).unwrap_or(0), entries }))
}

fn mbr(disk: &dyn ReadAt) -> Result<Option<Table>, DiskError> {
    const PROTECTIVE: u8 = 0xee;
    let Some(BootRecord { signature, entries }) = boot_record(disk, 0)? else { return Ok(None) };
    if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
        return Err(DiskError::DamagedGpt);
    }
    let mut partitions = Vec::new();
    let mut add = |number: u32, start: u64, entry: &MbrEntry| {
        let start = start + u64::from(entry.start);
        let end = start + u64::from(entry.sectors);
        let (start, bytes) = within(disk, number, Some(start * 512), Some(end * 512))?;
        let kind = match entry.kind {
            0xef => PartitionKind::Esp,
            0xea => PartitionKind::Xbootldr,
            _ => PartitionKind::Other,
        };
        let part_uuid = format!("{signature:08x}-{number:02x}");
        partitions.push(Partition { number, start, bytes, kind, part_uuid });
        Ok::<_, DiskError>(())
    };
    let is_extended = |entry: &MbrEntry| matches!(entry.kind, 0x05 | 0x0f | 0x85);
    for (number, entry) in (1..).zip(&entries) {
        if entry.kind != 0 && !is_extended(entry) {
            add(number, 0, entry)?;
        }
    }
    if let Some(extended) = entries.iter().find(|entry| is_extended(entry)) {
        let base = u64::from(extended.start);
        let mut record = base;
        for number in 5..5 + MAX_LOGICAL {
            let Some(BootRecord { entries: [logical, next, ..], .. }) = boot_record(disk, record * 512)?
            else {
                break;
            };
            if logical.kind != 0 {
                add(number, record, &logical)?;
            }
            // A chain that does not go on upwards is a loop, or the end.
            let following = base + u64::from(next.start);
            if next.kind == 0 || following <= record {
                break;
            }
            record = following;
        }
    }
    Ok(Some(Table::Mbr(partitions)))
}
