//! The header of a bzImage (the kernel's Documentation/arch/x86/boot.rst).

use probe_core::Gpa;

use super::ImageError;
use crate::bytes::{array, u16_at, u32_at, u64_at};

/// Offset of the first byte of the setup header in a bzImage, and in the zero page that the boot protocol hands over.
pub const SETUP_HEADER_OFFSET: usize = 0x1f1;

/// The oldest boot protocol with `payload_offset` and `payload_length` (Linux 2.6.24).
const OLDEST_PROTOCOL: u16 = 0x0208;

/// The oldest one with `pref_address` and `init_size` (Linux 2.6.31).
const PREFERRED_ADDRESS: u16 = 0x020a;

/// The 64-bit entry's distance from the start of the protected-mode part (boot.rst, "64-bit Boot Protocol").
const ENTRY_64: u64 = 0x200;

const MAGIC_OFFSET: usize = 0x202;
const MAGIC: [u8; 4] = *b"HdrS";

/// The setup header of a bzImage, as it is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SetupHeader {
    bytes: Vec<u8>,
}

impl SetupHeader {
    /// The header's bytes, to be copied to offset [`SETUP_HEADER_OFFSET`] of the zero page.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The boot protocol's version, 0x020c for 2.12.
    #[must_use]
    pub fn protocol(&self) -> u16 {
        self.u16(0x206).unwrap_or(0)
    }

    /// The longest command line in bytes, without the terminating zero.
    #[must_use]
    pub fn cmdline_size(&self) -> u32 {
        // Protocol 2.06 and later have the field; before, the limit was 255.
        self.u32(0x238).filter(|_| self.protocol() >= 0x0206).unwrap_or(255)
    }

    /// How much memory the kernel needs from its load address on until it reads the memory map, in bytes
    /// (`init_size`, protocol 2.10).
    #[must_use]
    pub fn init_size(&self) -> Option<u32> {
        self.u32(0x260).filter(|_| self.protocol() >= PREFERRED_ADDRESS)
    }

    /// Where the kernel is to be loaded, if there is a choice (`pref_address`, protocol 2.10).
    fn preferred_address(&self) -> Option<Gpa> {
        let address = u64_at(&self.bytes, 0x258 - SETUP_HEADER_OFFSET)?;
        Some(Gpa(address)).filter(|_| self.protocol() >= PREFERRED_ADDRESS)
    }

    /// Offset of the protected-mode part in the file.
    fn protected_mode_offset(&self) -> usize {
        // Zero stands for four, for the sake of very old boot loaders.
        let sectors = self.bytes.first().copied().filter(|sectors| *sectors != 0).unwrap_or(4);
        (usize::from(sectors) + 1) * 512
    }

    fn u16(&self, offset: usize) -> Option<u16> {
        u16_at(&self.bytes, offset.checked_sub(SETUP_HEADER_OFFSET)?)
    }

    fn u32(&self, offset: usize) -> Option<u32> {
        u32_at(&self.bytes, offset.checked_sub(SETUP_HEADER_OFFSET)?)
    }
}

/// What a boot loader loads of a bzImage: the decompressor, with the packed kernel in it.
#[derive(Clone, PartialEq, Eq)]
pub struct ProtectedMode {
    bytes: Vec<u8>,
    /// Where it is loaded.
    pub gpa: Gpa,
    /// How much memory it needs from there on, bytes.
    pub init_size: u64,
}

impl std::fmt::Debug for ProtectedMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProtectedMode")
            .field("gpa", &self.gpa)
            .field("init_size", &self.init_size)
            .finish_non_exhaustive()
    }
}

impl ProtectedMode {
    /// That of the bzImage `file`, if its header says where it wants to be.
    pub(super) fn new(header: &SetupHeader, mut file: Vec<u8>) -> Option<Self> {
        let (gpa, init_size) = (header.preferred_address()?, header.init_size()?);
        file.drain(..header.protected_mode_offset().min(file.len()));
        Some(Self { bytes: file, gpa, init_size: u64::from(init_size) })
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where it is entered, in 64-bit mode.
    #[must_use]
    pub fn entry(&self) -> Gpa {
        self.gpa.offset(ENTRY_64)
    }

    /// What is at the entry.
    pub(crate) fn code(&self) -> &[u8] {
        let start = usize::try_from(ENTRY_64).unwrap_or(usize::MAX);
        self.bytes.get(start..).unwrap_or_default()
    }
}

/// Whether the file has a Linux boot header.
pub fn is_bzimage(file: &[u8]) -> bool {
    array(file, MAGIC_OFFSET) == Some(MAGIC)
}

/// The setup header and the compressed payload.
pub fn split(file: &[u8]) -> Result<(SetupHeader, &[u8]), ImageError> {
    // The byte at 0x201 is the displacement of the jump at 0x200 and so the distance from 0x202 to the header's end.
    let header_end = MAGIC_OFFSET + usize::from(*file.get(0x201).ok_or(ImageError::TruncatedHeader)?);
    let header = file.get(SETUP_HEADER_OFFSET..header_end).ok_or(ImageError::TruncatedHeader)?;
    let header = SetupHeader { bytes: header.to_vec() };
    let protocol = u16_at(file, 0x206).ok_or(ImageError::TruncatedHeader)?;
    if protocol < OLDEST_PROTOCOL {
        return Err(ImageError::OldProtocol { protocol });
    }
    let word = |at| u32_at(file, at).ok_or(ImageError::TruncatedHeader);
    let (offset, length) = (word(0x248)?, word(0x24c)?);
    let start = header.protected_mode_offset() as u64 + u64::from(offset);
    let end = start + u64::from(length);
    let payload = usize::try_from(start).ok().zip(usize::try_from(end).ok());
    let payload = payload.and_then(|(start, end)| file.get(start..end)).filter(|payload| !payload.is_empty());
    payload.map(|payload| (header, payload)).ok_or(ImageError::PayloadOutside {
        start,
        end,
        file_size: file.len(),
    })
}

/// The version string that `kernel_version` in the header points to, up to the first blank.
pub fn version(file: &[u8]) -> Option<String> {
    let at = usize::from(u16_at(file, 0x20e).filter(|pointer| *pointer != 0)?) + 0x200;
    super::version_word(file.get(at..)?)
}
