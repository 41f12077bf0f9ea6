//! Guest RAM.
//!
//! No reference into guest RAM is ever held: the guest writes it at any time. Every access goes through vm-memory's
//! volatile or atomic operations.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use probe_core::{Gpa, MemoryError, PAGE_SIZE, PhysicalMemory};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice, mmap::FromRangesError,
};

use crate::layout;

/// Why guest RAM could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AllocateError {
    /// A machine needs RAM.
    #[error("A memory size of 0 was asked for; give at least {min} MiB", min = layout::MIN_MEMORY_BYTES >> 20)]
    Zero,
    /// Pages are 4 KiB.
    #[error("Memory size {0:#x} is not a multiple of 4096 bytes; round it")]
    NotPageMultiple(u64),
    /// Boot structures would not fit.
    #[error("Memory size {0:#x} is too small; give at least {min} MiB", min = layout::MIN_MEMORY_BYTES >> 20)]
    TooSmall(u64),
    /// The identity map would not fit.
    #[error("Memory size {0:#x} is too large; give at most {max} GiB", max = layout::MAX_MEMORY_BYTES >> 30)]
    TooLarge(u64),
    /// More than the host has.
    #[error("Memory size {asked:#x} exceeds this host's memory of {host:#x} bytes; ask for less")]
    BeyondHost {
        /// Bytes asked for.
        asked: u64,
        /// Bytes the host has (MemTotal).
        host: u64,
    },
    /// The host's mmap failed.
    #[error("This host did not give {asked:#x} bytes of memory; ask for less, or allow overcommit")]
    Map {
        /// Bytes asked for.
        asked: u64,
        /// What mmap said.
        #[source]
        source: FromRangesError,
    },
    /// The file with the memory's contents is not as long as the memory.
    #[error("The snapshot's memory has {found:#x} bytes and should have {expected:#x}; it is not complete")]
    FileSize {
        /// The size of the memory.
        expected: u64,
        /// The size of the file.
        found: u64,
    },
}

/// A file with what is in a guest's RAM, open for reading. All that there is to ask of it is asked at once, so a process can give up
/// asking before it makes a machine of it.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    file: Arc<File>,
    bytes: u64,
}

impl MemoryFile {
    /// # Errors
    /// The file's size cannot be had.
    pub fn new(file: File) -> io::Result<Self> {
        let bytes = file.metadata()?.len();
        Ok(Self { file: Arc::new(file), bytes })
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn file(&self) -> &File {
        &self.file
    }
}

/// Guest RAM and the slot region. Clones share the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: Arc<GuestMemoryMmap>,
    /// The same without the slot region, which no device of the guest's may touch.
    ram: GuestMemoryMmap,
    bytes: u64,
}

/// A stretch of guest-physical memory and the host memory behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct HostRange {
    pub gpa: Gpa,
    pub bytes: u64,
    /// Host-virtual address of the first byte.
    pub host: u64,
}

impl GuestRam {
    /// Maps `bytes` of RAM, and the slot region. The pages are zero, and taken from the host when first touched.
    ///
    /// # Errors
    /// [`AllocateError`] when the size makes no sense or the host cannot give it.
    pub fn new(bytes: u64) -> Result<Self, AllocateError> {
        Self::mapped(bytes, |_| None)
    }

    /// Maps RAM whose first contents are those of `file`, all ranges one behind the other, and an empty slot region. A page is read
    /// when it is first touched, and copied when it is first written: the file stays as it is. It has to, while this memory lives:
    /// touching a page that has been cut off is SIGBUS.
    ///
    /// # Errors
    /// [`AllocateError`] when the size is not the file's, makes no sense or cannot be had.
    pub fn from_file(contents: &MemoryFile, bytes: u64) -> Result<Self, AllocateError> {
        let MemoryFile { file, bytes: found } = contents;
        if *found != bytes {
            return Err(AllocateError::FileSize { expected: bytes, found: *found });
        }
        Self::mapped(bytes, |offset| Some(FileOffset::from_arc(Arc::clone(file), offset)))
    }

    /// `contents` says what is in RAM from the given offset on, its ranges taken one behind the other.
    fn mapped(bytes: u64, contents: impl Fn(u64) -> Option<FileOffset>) -> Result<Self, AllocateError> {
        check_size(bytes, None)?;
        let refused = |source| AllocateError::Map { asked: bytes, source };
        let mut offset = 0;
        let mut regions = Vec::new();
        for (start, bytes) in layout::ram(bytes) {
            regions.push(map(start, bytes, contents(offset)).map_err(refused)?);
            offset += bytes;
        }
        let slots = map(layout::SLOT_REGION, layout::SLOT_REGION_BYTES, None).map_err(refused)?;
        let (memory, ram) = GuestMemoryMmap::from_regions(regions)
            .and_then(|ram| Ok((ram.insert_region(Arc::new(slots))?, ram)))
            .map_err(|error| refused(FromRangesError::Collection(error)))?;
        Ok(Self { memory: Arc::new(memory), ram, bytes })
    }

    /// The size of RAM, bytes, without the slot region.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether `bytes` from `gpa` on are all RAM (the slot region is not).
    #[must_use]
    pub fn is_ram(&self, gpa: Gpa, bytes: u64) -> bool {
        layout::ram(self.bytes).iter().any(|(start, length)| {
            gpa >= *start && gpa.0.checked_add(bytes).is_some_and(|end| end <= start.0 + length)
        })
    }

    /// The memory as the guest's devices may use it: RAM and nothing else.
    pub(crate) fn device_memory(&self) -> GuestMemoryMmap {
        self.ram.clone()
    }

    /// The memory as vm-memory's loaders take it.
    pub(crate) fn backend(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// RAM and the slot region with the host addresses behind them, for KVM's memory slots. The mappings live as long
    /// as any clone of this.
    pub(crate) fn host_ranges(&self) -> Vec<HostRange> {
        self.memory
            .iter()
            .map(|region| HostRange {
                gpa: Gpa(region.start_addr().0),
                bytes: region.len(),
                host: region.as_ptr() as u64,
            })
            .collect()
    }

    /// The region that `gpa` is in, and where in it.
    fn region(&self, gpa: Gpa) -> Option<(&GuestRegionMmap, usize)> {
        // RAM from address 0 comes first, and is where nearly all accesses go.
        let region =
            self.memory.iter().find(|region| gpa.0.wrapping_sub(region.start_addr().0) < region.len())?;
        Some((region, usize::try_from(gpa.0 - region.start_addr().0).ok()?))
    }

    /// Bytes that lie in one region, as nearly all do.
    fn slice(&self, gpa: Gpa, len: usize) -> Option<VolatileSlice<'_>> {
        let (region, offset) = self.region(gpa)?;
        region.get_slice(MemoryRegionAddress(offset as u64), len).ok()
    }

    /// One atomic operation on the naturally aligned integer at `gpa`.
    fn atomic<A: vm_memory::AtomicInteger, R>(
        &self,
        gpa: Gpa,
        op: impl FnOnce(&A) -> R,
    ) -> Result<R, MemoryError> {
        let (region, offset) = self.region(gpa).ok_or(MemoryError::NotRam(gpa))?;
        // The reference is to an atomic, which shared mutation cannot invalidate, and ends with `op`.
        region.get_atomic_ref::<A>(offset).map(op).map_err(|_| MemoryError::NotRam(gpa))
    }
}

impl PhysicalMemory for GuestRam {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        const ORDER: Ordering = Ordering::Acquire;
        match buf.len() as u64 {
            1 => buf.copy_from_slice(&self.atomic(gpa, |a: &AtomicU8| a.load(ORDER))?.to_le_bytes()),
            2 if gpa.0.is_multiple_of(2) => {
                buf.copy_from_slice(&self.atomic(gpa, |a: &AtomicU16| a.load(ORDER))?.to_le_bytes());
            }
            4 if gpa.0.is_multiple_of(4) => {
                buf.copy_from_slice(&self.atomic(gpa, |a: &AtomicU32| a.load(ORDER))?.to_le_bytes());
            }
            8 if gpa.0.is_multiple_of(8) => {
                buf.copy_from_slice(&self.atomic(gpa, |a: &AtomicU64| a.load(ORDER))?.to_le_bytes());
            }
            _ => match self.slice(gpa, buf.len()) {
                Some(slice) => {
                    slice.copy_to(buf);
                }
                None => {
                    self.memory.read_slice(buf, GuestAddress(gpa.0)).map_err(|_| MemoryError::NotRam(gpa))?;
                }
            },
        }
        Ok(())
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, MemoryError> {
        if gpa.0.is_multiple_of(8) {
            return self.atomic(gpa, |a: &AtomicU64| a.load(Ordering::Acquire)).map(u64::from_le);
        }
        let mut word = [0; 8];
        self.read(gpa, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        const ORDER: Ordering = Ordering::Release;
        match *data {
            [a] => self.atomic(gpa, |atomic: &AtomicU8| atomic.store(a, ORDER)),
            [a, b] if gpa.0.is_multiple_of(2) => {
                self.atomic(gpa, |atomic: &AtomicU16| atomic.store(u16::from_le_bytes([a, b]), ORDER))
            }
            [a, b, c, d] if gpa.0.is_multiple_of(4) => {
                self.atomic(gpa, |atomic: &AtomicU32| atomic.store(u32::from_le_bytes([a, b, c, d]), ORDER))
            }
            [a, b, c, d, e, f, g, h] if gpa.0.is_multiple_of(8) => self.atomic(gpa, |atomic: &AtomicU64| {
                atomic.store(u64::from_le_bytes([a, b, c, d, e, f, g, h]), ORDER);
            }),
            _ => {
                if let Some(slice) = self.slice(gpa, data.len()) {
                    slice.copy_from(data);
                    return Ok(());
                }
                let start = GuestAddress(gpa.0);
                if !self.memory.check_range(start, data.len()) {
                    return Err(MemoryError::NotRam(gpa));
                }
                self.memory.write_slice(data, start).map_err(|_| MemoryError::NotRam(gpa))
            }
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "the operands are `width` bytes wide by contract")]
    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError> {
        macro_rules! exchange {
            ($atomic:ty, $int:ty) => {
                self.atomic(gpa, |a: &$atomic| {
                    let result =
                        a.compare_exchange(current as $int, new as $int, Ordering::SeqCst, Ordering::SeqCst);
                    u64::from(result.unwrap_or_else(|found| found))
                })
            };
        }
        match width {
            1 => exchange!(AtomicU8, u8),
            2 => exchange!(AtomicU16, u16),
            4 => exchange!(AtomicU32, u32),
            8 => exchange!(AtomicU64, u64),
            _ => Err(MemoryError::NotRam(gpa)),
        }
    }
}

/// A region of this process's own, with what is in a file, or with zeros.
fn map(start: Gpa, bytes: u64, contents: Option<FileOffset>) -> Result<GuestRegionMmap, FromRangesError> {
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    let anonymous = if contents.is_none() { libc::MAP_ANONYMOUS } else { 0 };
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | anonymous;
    let region = MmapRegion::build(contents, bytes, libc::PROT_READ | libc::PROT_WRITE, flags)?;
    GuestRegionMmap::new(region, GuestAddress(start.0)).ok_or(FromRangesError::InvalidGuestRegion)
}

/// Whether `bytes` of RAM can be a machine on a host with `host` bytes (unknown when `None`).
pub(crate) fn check_size(bytes: u64, host: Option<u64>) -> Result<(), AllocateError> {
    if bytes == 0 {
        return Err(AllocateError::Zero);
    }
    if !bytes.is_multiple_of(PAGE_SIZE) {
        return Err(AllocateError::NotPageMultiple(bytes));
    }
    if bytes < layout::MIN_MEMORY_BYTES {
        return Err(AllocateError::TooSmall(bytes));
    }
    if let Some(host) = host.filter(|host| bytes > *host) {
        return Err(AllocateError::BeyondHost { asked: bytes, host });
    }
    if bytes > layout::MAX_MEMORY_BYTES {
        return Err(AllocateError::TooLarge(bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> GuestRam {
        GuestRam::new(layout::MIN_MEMORY_BYTES).unwrap()
    }

    #[test]
    fn bad_sizes_are_refused_with_their_reason() {
        let host = Some(1 << 30);
        assert!(matches!(check_size(0, host), Err(AllocateError::Zero)));
        assert!(matches!(check_size(0x20_0001, host), Err(AllocateError::NotPageMultiple(0x20_0001))));
        assert!(matches!(check_size(0x1000, host), Err(AllocateError::TooSmall(0x1000))));
        assert!(matches!(check_size(2 << 30, host), Err(AllocateError::BeyondHost { .. })));
        assert!(matches!(check_size(128 << 30, None), Err(AllocateError::TooLarge(_))));
        check_size(512 << 20, host).unwrap();
    }

    #[test]
    fn reads_back_what_was_written_at_every_width_and_offset() {
        let ram = ram();
        for start in [0x1000u64, 0x1001, 0x1002, 0x1004, 0x1ffd] {
            for length in 0..=17u8 {
                let data: Vec<u8> = (1..=length).collect();
                ram.write(Gpa(start), &data).unwrap();
                let mut back = vec![0; data.len()];
                ram.read(Gpa(start), &mut back).unwrap();
                assert_eq!(back, data, "{length} bytes at {start:#x}");
            }
        }
    }

    #[test]
    fn beyond_ram_is_not_ram_and_nothing_is_written() {
        let ram = ram();
        let end = layout::MIN_MEMORY_BYTES;
        assert_eq!(ram.write(Gpa(end - 2), &[1, 2, 3]), Err(MemoryError::NotRam(Gpa(end - 2))));
        let mut tail = [0xff; 2];
        ram.read(Gpa(end - 2), &mut tail).unwrap();
        assert_eq!(tail, [0, 0]);
        for gpa in [end, layout::MMIO_HOLE.0, u64::MAX, u64::MAX - 7] {
            for length in [1, 2, 4, 8, 15] {
                assert!(ram.read(Gpa(gpa), &mut vec![0; length]).is_err(), "{length} bytes at {gpa:#x}");
                assert!(ram.write(Gpa(gpa), &vec![0; length]).is_err(), "{length} bytes at {gpa:#x}");
            }
        }
        assert!(!ram.is_ram(Gpa(end - 1), 2));
        assert!(!ram.is_ram(Gpa(1), u64::MAX));
        assert!(ram.is_ram(Gpa(end - 1), 1));
    }

    #[test]
    fn slot_region_is_memory_but_not_ram() {
        let ram = ram();
        let last = layout::SLOT_REGION.offset(layout::SLOT_REGION_BYTES - 1);
        ram.write(last, &[0xcc]).unwrap();
        let mut byte = [0];
        ram.read(last, &mut byte).unwrap();
        assert_eq!(byte, [0xcc]);
        assert!(ram.write(last, &[0, 0]).is_err());
        assert!(!ram.is_ram(layout::SLOT_REGION, 1));
        let devices = ram.device_memory();
        assert!(GuestMemoryBackend::check_range(&devices, GuestAddress(0), 1 << 20));
        assert!(!GuestMemoryBackend::check_range(&devices, GuestAddress(layout::SLOT_REGION.0), 1));
    }

    #[test]
    fn compare_exchange_swaps_only_on_a_match() {
        let ram = ram();
        for width in [1usize, 2, 4, 8] {
            let mask = u64::MAX >> (64 - 8 * width);
            let at = Gpa(0x3000);
            ram.write(at, &0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
            let now = 0x1122_3344_5566_7788 & mask;
            assert_eq!(ram.compare_exchange(at, width, now ^ 1, 0), Ok(now));
            assert_eq!(ram.compare_exchange(at, width, now, 0xaabb_ccdd_eeff_0011 & mask), Ok(now));
            let expected = (0x1122_3344_5566_7788 & !mask) | (0xaabb_ccdd_eeff_0011 & mask);
            assert_eq!(ram.read_u64(at), Ok(expected), "width {width}");
        }
        ram.compare_exchange(Gpa(0x3001), 4, 0, 0).unwrap_err();
        ram.compare_exchange(Gpa(0x3000), 3, 0, 0).unwrap_err();
        ram.compare_exchange(layout::MMIO_HOLE, 8, 0, 0).unwrap_err();
    }

    #[test]
    fn clones_share_memory() {
        let ram = ram();
        ram.clone().write(Gpa(0x5000), b"shared").unwrap();
        let mut back = [0; 6];
        ram.read(Gpa(0x5000), &mut back).unwrap();
        assert_eq!(&back, b"shared");
    }
}
