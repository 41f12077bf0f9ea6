//! Guest-physical memory as the engine sees it.

use crate::Gpa;

/// Why guest-physical memory could not be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// No RAM there: MMIO, a hole, or beyond the end.
    #[error("Guest-physical address {0} is not in RAM")]
    NotRam(Gpa),
}

/// Read, write and compare-exchange on guest RAM.
///
/// An access may cross a page edge as long as every byte is RAM. Implementations are shared by all vCPU threads
/// while the guest runs, so every method takes `&self`.
pub trait PhysicalMemory {
    /// Fills `buf` from `gpa` on. Aligned reads of 2, 4 and 8 bytes are single loads.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] when any byte is not RAM; `buf` is then unspecified.
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Stores `data` from `gpa` on. Aligned writes of 2, 4 and 8 bytes are single stores.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] when any byte is not RAM; nothing is then written.
    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError>;

    /// Atomically replaces the `width` bytes (1, 2, 4 or 8, naturally aligned) at `gpa` by `new` if they equal
    /// `current`. Returns the value found, which equals `current` exactly if the exchange took place.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] when the bytes are not RAM.
    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError>;

    /// Reads a little-endian 64-bit word.
    ///
    /// # Errors
    /// As [`PhysicalMemory::read`].
    fn read_u64(&self, gpa: Gpa) -> Result<u64, MemoryError> {
        let mut word = [0; 8];
        self.read(gpa, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }
}
