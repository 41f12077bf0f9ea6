//! Guest memory in its file: the ranges of RAM one behind the other, pages of zeros as holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use probe_core::{Gpa, MemoryError, PhysicalMemory};

use crate::layout;
use crate::memory::GuestRam;

/// The bytes that one checksum is of, and that are copied at once.
pub(crate) const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;
const ZERO_PAGE: [u8; PAGE] = [0; PAGE];

/// Why memory could not be written.
#[derive(Debug)]
pub(super) enum WriteError {
    Memory(MemoryError),
    File(io::Error),
}

/// The chunks of a machine's memory: where in the file, where in the guest, bytes.
fn chunks(memory_bytes: u64) -> impl Iterator<Item = (u64, Gpa, usize)> {
    let ranges = layout::ram(memory_bytes).into_iter().scan(0, |offset, (start, bytes)| {
        let at = *offset;
        *offset += bytes;
        Some((at, start, bytes))
    });
    ranges.flat_map(|(at, start, bytes)| {
        (0..bytes).step_by(CHUNK).map(move |from| {
            let len = usize::try_from(bytes - from).unwrap_or(usize::MAX).min(CHUNK);
            (at + from, start.offset(from), len)
        })
    })
}

/// Writes all of RAM but pages of zeros, as `uncover` changes it; returns the checksums.
pub(super) fn write(
    ram: &GuestRam,
    uncover: &dyn Fn(Gpa, &mut [u8]),
    write_at: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<Vec<u32>, WriteError> {
    let mut buffer = vec![0; CHUNK];
    let mut checksums = Vec::new();
    for (at, gpa, len) in chunks(ram.bytes()) {
        let chunk = &mut buffer[..len];
        ram.read(gpa, chunk).map_err(WriteError::Memory)?;
        uncover(gpa, chunk);
        write_pages(write_at, at, chunk).map_err(WriteError::File)?;
        checksums.push(crc32fast::hash(chunk));
    }
    Ok(checksums)
}

/// Writes the runs of pages that are not all zeros.
fn write_pages(
    write_at: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    at: u64,
    chunk: &[u8],
) -> io::Result<()> {
    let (pages, _) = chunk.as_chunks::<PAGE>();
    let mut from = 0;
    for run in pages.chunk_by(|one, next| (*one == ZERO_PAGE) == (*next == ZERO_PAGE)) {
        let bytes = run.as_flattened();
        if run[0] != ZERO_PAGE {
            write_at(at + from, bytes)?;
        }
        from += bytes.len() as u64;
    }
    Ok(())
}

/// Why a memory file is not what was saved.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// It cannot be read.
    #[error("The snapshot's memory cannot be read")]
    Read(#[source] io::Error),
    /// It is not as it was written.
    #[error(
        "The snapshot's memory is damaged: the {bytes:#x} bytes of guest memory from {gpa:#x} on are not what was saved"
    )]
    Damaged {
        /// Where the damage is, at the earliest.
        gpa: Gpa,
        /// How much the checksum is of.
        bytes: usize,
    },
}

/// Reads all of a memory file and compares the checksums.
pub(super) fn verify(file: &File, memory_bytes: u64, checksums: &[u32]) -> Result<(), VerifyError> {
    let mut buffer = vec![0; CHUNK];
    for ((at, gpa, len), checksum) in chunks(memory_bytes).zip(checksums) {
        let chunk = &mut buffer[..len];
        file.read_exact_at(chunk, at).map_err(VerifyError::Read)?;
        if crc32fast::hash(chunk) != *checksum {
            return Err(VerifyError::Damaged { gpa, bytes: len });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory::MemoryFile;

    #[test]
    fn chunks_cover_both_ranges_of_ram_one_behind_the_other() {
        let all: Vec<_> = chunks((4 << 30) + 4096).collect();
        assert_eq!(all.first(), Some(&(0, Gpa(0), CHUNK)));
        assert_eq!(all[3071], ((3 << 30) - CHUNK as u64, Gpa((3 << 30) - CHUNK as u64), CHUNK));
        assert_eq!(all[3072], (3 << 30, Gpa(4 << 30), CHUNK), "the hole is left out");
        assert_eq!(all.last(), Some(&(4 << 30, Gpa(5 << 30), 4096)));
    }

    #[test]
    fn memory_comes_back_sparse_uncovered_and_verified() {
        let ram = GuestRam::new(8 << 20).unwrap();
        ram.write(Gpa(0x10_0ffe), &[1, 2, 0xcc, 4]).unwrap();
        ram.write(Gpa((8 << 20) - 1), &[5]).unwrap();
        let file = tempfile::tempfile().unwrap();
        let uncover = |gpa: Gpa, bytes: &mut [u8]| {
            let at = 0x10_1000_u64.checked_sub(gpa.0).and_then(|at| usize::try_from(at).ok());
            if let Some(byte) = at.and_then(|at| bytes.get_mut(at)) {
                *byte = 3;
            }
        };
        let checksums = write(&ram, &uncover, &mut |at, bytes| file.write_all_at(bytes, at)).unwrap();
        file.set_len(8 << 20).unwrap();
        verify(&file, 8 << 20, &checksums).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), 8 << 20);
        assert!(metadata.blocks() * 512 < 1 << 20, "three pages hold data");

        let restored =
            GuestRam::from_file(&MemoryFile::new(file.try_clone().unwrap()).unwrap(), 8 << 20).unwrap();
        let mut bytes = [0; 4];
        restored.read(Gpa(0x10_0ffe), &mut bytes).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4]);
        restored.read(Gpa((8 << 20) - 4), &mut bytes).unwrap();
        assert_eq!(bytes, [0, 0, 0, 5]);

        restored.write(Gpa(0x10_0ffe), &[9]).unwrap();
        verify(&file, 8 << 20, &checksums).unwrap();
        file.write_all_at(&[6], (8 << 20) - 1).unwrap();
        let error = verify(&file, 8 << 20, &checksums).unwrap_err();
        assert!(matches!(error, VerifyError::Damaged { gpa: Gpa(0x70_0000), .. }), "{error}");
    }

    #[test]
    fn a_file_of_another_size_is_no_memory() {
        let file = tempfile::tempfile().unwrap();
        file.set_len((4 << 20) - 4096).unwrap();
        let short = GuestRam::from_file(&MemoryFile::new(file).unwrap(), 4 << 20).unwrap_err();
        assert!(short.to_string().contains("0x3ff000 bytes"), "{short}");
    }
}
