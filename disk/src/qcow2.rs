//! What a qcow2 file says of itself, checked before it is opened (QEMU: docs/interop/qcow2.txt).
//!
//! What lies behind the end of a file reads as zeros, so a file that is cut short would pass for a disk with zeros in it. Its
//! reference counts tell which cluster is its last.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use crate::Format;

/// `QFI\xfb`.
const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The header of version 2, and what version 3 has at least.
const HEADER_BYTES: usize = 104;

/// The most that QEMU takes for the two tables that are read as a whole (block/qcow2.h).
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Where an entry of the refcount table says that its block is.
const REFCOUNT_BLOCK_OFFSET: u64 = !0x1ff;

/// Why a file is no qcow2 image that can be used.
#[derive(Debug, thiserror::Error)]
pub enum Qcow2Error {
    /// The host says no.
    #[error("The file cannot be read")]
    Read(#[source] io::Error),
    /// Something else.
    #[error("It does not begin as a qcow2 image does; leave format=qcow2 out, or say format=raw")]
    Magic,
    /// Neither of the two there are.
    #[error("It is of qcow2 version {0}; convert it to version 2 or 3 with `qemu-img convert -O qcow2`")]
    Version(u32),
    /// With a password.
    #[error("It is encrypted, which is not supported; convert it with `qemu-img convert -O qcow2`")]
    Encrypted,
    /// A number in its header is out of bounds.
    #[error("Its header is damaged: {name} is {value:#x}; `qemu-img check` tells more")]
    Header {
        /// What the number is.
        name: &'static str,
        /// The number.
        value: u64,
    },
    /// Part of it is missing.
    #[error(
        "It is cut short: it has {has:#x} bytes, and {what} is at {at:#x}; copy it again, or have `qemu-img check -r all` look at it"
    )]
    Truncated {
        /// Bytes that are there.
        has: u64,
        /// What is missing.
        what: &'static str,
        /// Where that should be.
        at: u64,
    },
}

/// The format of an image, told from how it begins.
pub(crate) fn probe(file: &File) -> Result<Format, Qcow2Error> {
    let mut magic = [0; MAGIC.len()];
    let read = read_up_to(file, &mut magic, 0)?;
    Ok(if read == MAGIC.len() && magic == MAGIC { Format::Qcow2 } else { Format::Raw })
}

/// Checks what would otherwise go unnoticed. Returns the size of a cluster, bytes.
pub(crate) fn check(file: &File) -> Result<u64, Qcow2Error> {
    let mut header = [0; HEADER_BYTES];
    let read = read_up_to(file, &mut header, 0)?;
    // Of a block device fstat(2) does not tell the size.
    let has = { file }.seek(SeekFrom::End(0)).map_err(Qcow2Error::Read)?;
    if read < MAGIC.len() || header[..MAGIC.len()] != MAGIC {
        return Err(Qcow2Error::Magic);
    }
    let version = word(&header, 4);
    if !(2..=3).contains(&version) {
        return Err(Qcow2Error::Version(version));
    }
    if read < HEADER_BYTES {
        return Err(Qcow2Error::Truncated { has, what: "the end of its header", at: HEADER_BYTES as u64 });
    }
    if word(&header, 32) != 0 {
        return Err(Qcow2Error::Encrypted);
    }
    let cluster_bits = bounded("the cluster size's power of two", word(&header, 20), 9, 21)?;
    let cluster = 1u64 << cluster_bits;
    // Version 2 has counts of 16 bits.
    let order = if version == 2 { 4 } else { bounded("the refcount order", word(&header, 96), 0, 6)? };

    let missing = |what, at| Qcow2Error::Truncated { has, what, at };
    let table = |what, name, offset: u64, bytes: u64, most| {
        if bytes > most {
            return Err(Qcow2Error::Header { name, value: bytes });
        }
        match offset.checked_add(bytes) {
            Some(end) if end <= has => Ok(()),
            _ => Err(missing(what, offset)),
        }
    };
    let l1_bytes = u64::from(word(&header, 36)) * 8;
    table("its L1 table", "the size of its L1 table", long(&header, 40), l1_bytes, MAX_L1_BYTES)?;
    let counts = long(&header, 48);
    let count_bytes = u64::from(word(&header, 56)) << cluster_bits;
    table(
        "its refcount table",
        "the size of its refcount table",
        counts,
        count_bytes,
        MAX_REFCOUNT_TABLE_BYTES,
    )?;

    let mut blocks = vec![0; usize::try_from(count_bytes).unwrap_or_default()];
    file.read_exact_at(&mut blocks, counts).map_err(Qcow2Error::Read)?;
    let mut block = vec![0; 1 << cluster_bits];
    let per_block = (cluster * 8) >> order;
    for (index, entry) in blocks.chunks_exact(8).enumerate().rev() {
        let at = long(entry, 0) & REFCOUNT_BLOCK_OFFSET;
        if at == 0 {
            continue;
        }
        if at.checked_add(cluster).is_none_or(|end| end > has) {
            return Err(missing("one of its refcount blocks", at));
        }
        file.read_exact_at(&mut block, at).map_err(Qcow2Error::Read)?;
        if let Some(last) = last_counted(&block, order) {
            let at = (index as u64).checked_mul(per_block).and_then(|first| first.checked_add(last));
            // The last cluster may be written in part.
            return match at.and_then(|at| at.checked_mul(cluster)) {
                Some(at) if at < has => Ok(cluster),
                at => Err(missing("its last cluster", at.unwrap_or(u64::MAX))),
            };
        }
    }
    Ok(cluster)
}

/// The last count in a block that is not zero. Counts narrower than a byte begin with its lowest bit.
fn last_counted(block: &[u8], order: u32) -> Option<u64> {
    let byte = block.iter().rposition(|byte| *byte != 0)?;
    let bit = byte as u64 * 8 + u64::from(block[byte].ilog2());
    Some(bit >> order)
}

fn bounded(name: &'static str, value: u32, least: u32, most: u32) -> Result<u32, Qcow2Error> {
    if (least..=most).contains(&value) {
        Ok(value)
    } else {
        Err(Qcow2Error::Header { name, value: value.into() })
    }
}

/// Fills `buffer` as far as the file goes.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, Qcow2Error> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Qcow2Error::Read(error)),
        }
    }
    Ok(done)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let array = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    array.map_or(0, u32::from_be_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    let array = bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
    array.map_or(0, u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_count_is_found_at_every_width() {
        let mut block = [0u8; 64];
        assert_eq!(last_counted(&block, 4), None);
        // Counts 0 to 2 at 16 bits, big-endian.
        block[..6].copy_from_slice(&[0, 1, 0, 2, 1, 0]);
        assert_eq!(last_counted(&block, 4), Some(2));
        assert_eq!(last_counted(&block, 3), Some(4));
        assert_eq!(last_counted(&block, 6), Some(0));
        // The lowest bit of byte 4 is count 32 at one bit, count 16 at two.
        assert_eq!(last_counted(&block, 0), Some(32));
        assert_eq!(last_counted(&block, 1), Some(16));
        block[4] = 0x80;
        assert_eq!(last_counted(&block, 0), Some(39));
        assert_eq!(last_counted(&block, 2), Some(9));
    }
}
