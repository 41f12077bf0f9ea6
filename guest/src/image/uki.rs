//! Unified kernel images: a PE executable with the kernel, its initial RAM disk and its command line as sections (UAPI.5, "Unified
//! Kernel Image Specification"). What is read here is what the image says of itself; its EFI stub never runs.

use object::LittleEndian as LE;
use object::pe::{IMAGE_FILE_MACHINE_AMD64, ImageDosHeader, ImageNtHeaders64, ImageSectionHeader};
use object::read::pe::ImageNtHeaders;

/// Why a unified kernel image cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UkiError {
    /// Another architecture.
    #[error("The unified kernel image is for PE machine {machine:#06x}, not for x86-64 (0x8664)")]
    Machine {
        /// `Machine` of the file header.
        machine: u16,
    },
    /// Its bytes are not there.
    #[error(
        "The unified kernel image's section {name} takes {size:#x} bytes at offset {offset:#x} of a file of {file_size:#x}; the \
         file is truncated or damaged"
    )]
    SectionOutside {
        /// Its name.
        name: String,
        /// `PointerToRawData`.
        offset: u32,
        /// Its size in the file.
        size: u32,
        /// The file's size in bytes.
        file_size: usize,
    },
    /// What should be text is none.
    #[error("The unified kernel image's section {name} is not UTF-8 text; the file is damaged")]
    Text {
        /// Its name.
        name: &'static str,
    },
    /// The kernel in it is another one, or a disk.
    #[error(
        "The unified kernel image's section .linux holds a unified kernel image again; it must be a bzImage or a vmlinux"
    )]
    Nested,
}

/// What a unified kernel image holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uki<'a> {
    /// `.linux`
    pub linux: &'a [u8],
    /// `.initrd`
    pub initrd: Option<&'a [u8]>,
    /// `.cmdline`
    pub cmdline: Option<&'a str>,
    /// `.osrel`: an os-release file.
    pub os_release: Option<&'a str>,
    /// `.uname`: the version of the kernel.
    pub uname: Option<&'a str>,
}

/// The headers of a PE32+ file and its section table. `None` for anything else.
pub(super) fn headers(file: &[u8]) -> Option<(&ImageNtHeaders64, &[ImageSectionHeader])> {
    let dos = ImageDosHeader::parse(file).ok()?;
    let mut offset = dos.nt_headers_offset().into();
    let (nt, _) = ImageNtHeaders64::parse(file, &mut offset).ok()?;
    let sections = nt.sections(file, offset).ok()?;
    Some((nt, sections.iter().as_slice()))
}

/// A section's name, without the zeros behind it.
pub(super) fn name(section: &ImageSectionHeader) -> &[u8] {
    let end = section.name.iter().position(|byte| *byte == 0).unwrap_or(section.name.len());
    &section.name[..end]
}

/// Reads the sections. `None` if the file is none: no PE32+ executable, or one without `.linux`.
///
/// Of an image with several profiles the first is taken, which is the one that boots if nothing is said: what stands before the first
/// `.profile` is common to all, and what stands behind it is this profile's own.
///
/// # Errors
/// See [`UkiError`].
pub fn read(file: &[u8]) -> Result<Option<Uki<'_>>, UkiError> {
    let Some((nt, sections)) = headers(file) else { return Ok(None) };
    if !sections.iter().any(|section| name(section) == b".linux") {
        return Ok(None);
    }
    let machine = nt.file_header().machine.get(LE);
    if machine != IMAGE_FILE_MACHINE_AMD64 {
        return Err(UkiError::Machine { machine: machine.0 });
    }
    let mut uki = Uki::default();
    let mut profiles = 0;
    for section in sections {
        let data = || data(section, file);
        match name(section) {
            b".profile" => profiles += 1,
            _ if profiles > 1 => break,
            b".linux" => uki.linux = data()?,
            b".initrd" => uki.initrd = Some(data()?),
            b".cmdline" => uki.cmdline = Some(text(".cmdline", data()?)?),
            b".osrel" => uki.os_release = Some(text(".osrel", data()?)?),
            b".uname" => uki.uname = Some(text(".uname", data()?)?),
            _ => {}
        }
    }
    Ok(Some(uki))
}

fn data<'a>(section: &ImageSectionHeader, file: &'a [u8]) -> Result<&'a [u8], UkiError> {
    let (offset, size) = section.pe_file_range();
    section.pe_data(file).map_err(|_| UkiError::SectionOutside {
        name: String::from_utf8_lossy(name(section)).into_owned(),
        offset,
        size,
        file_size: file.len(),
    })
}

/// A section's text, without the zeros and line ends behind it.
fn text<'a>(name: &'static str, data: &'a [u8]) -> Result<&'a str, UkiError> {
    let text = std::str::from_utf8(data).map_err(|_| UkiError::Text { name })?;
    Ok(text.trim_end_matches(['\0', '\n', '\r', ' ']))
}
