//! Bounds-checked little-endian reads.
//!
//! Everything read here comes from a file that may be truncated, corrupted or hostile, so every read can fail.

/// The `N` bytes at `at`, if all are there.
pub fn array<const N: usize>(data: &[u8], at: usize) -> Option<[u8; N]> {
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// The 16-bit word at byte offset `at`.
pub fn u16_at(data: &[u8], at: usize) -> Option<u16> {
    array(data, at).map(u16::from_le_bytes)
}

/// The 32-bit word at byte offset `at`.
pub fn u32_at(data: &[u8], at: usize) -> Option<u32> {
    array(data, at).map(u32::from_le_bytes)
}

/// The signed 32-bit word at byte offset `at`.
pub fn i32_at(data: &[u8], at: usize) -> Option<i32> {
    array(data, at).map(i32::from_le_bytes)
}

/// The 64-bit word at byte offset `at`.
pub fn u64_at(data: &[u8], at: usize) -> Option<u64> {
    array(data, at).map(u64::from_le_bytes)
}

/// The address that a self-relative 32-bit word at `address` points to.
pub fn relative(address: u64, word: i32) -> u64 {
    address.wrapping_add_signed(i64::from(word))
}
