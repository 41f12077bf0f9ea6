//! The header of a bzImage (the kernel's Documentation/arch/x86/boot.rst).

use super::ImageError;
use crate::bytes::{array, u16_at, u32_at};

/// Offset of the first byte of the setup header in a bzImage, and in the zero page that the boot protocol hands over.
pub const SETUP_HEADER_OFFSET: usize = 0x1f1;

/// The oldest boot protocol with `payload_offset` and `payload_length` (Linux 2.6.24).
const OLDEST_PROTOCOL: u16 = 0x0208;

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
        self.u32(0x260).filter(|_| self.protocol() >= 0x020a)
    }

    fn u16(&self, offset: usize) -> Option<u16> {
        u16_at(&self.bytes, offset.checked_sub(SETUP_HEADER_OFFSET)?)
    }

    fn u32(&self, offset: usize) -> Option<u32> {
        u32_at(&self.bytes, offset.checked_sub(SETUP_HEADER_OFFSET)?)
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
    // Zero stands for four, for the sake of very old boot loaders.
    let sectors = match file[SETUP_HEADER_OFFSET] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let start = (sectors + 1) * 512 + u64::from(offset);
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
