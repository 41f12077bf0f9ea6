//! Guest images: one file, recognised by its content.
//!
//! A bzImage is unpacked here, and the vmlinux inside it is what is read, and as a rule what is loaded too, which skips the
//! guest's own decompressor and with it KASLR; [`crate::relocation`] is about the other way. An ELF file is taken as it is.
//! Either way the unpacked ELF file is held in memory once, and everything else borrows from it.
//!
//! Images are untrusted: every offset, size and address in them is checked before it is used.

mod bzimage;
mod decompress;
pub mod disk;
pub(crate) mod elf;
mod extras;
pub mod pack;
mod uki;

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use probe_core::{Gpa, Gva, MemoryError, PhysicalMemory};

use crate::relocation::Relocation;

pub use bzimage::{ProtectedMode, SETUP_HEADER_OFFSET, SetupHeader};
pub use decompress::{Compression, DecompressError, MAX_UNPACKED};
pub use extras::{Bootable, Container, Extras, UkiFacts, initrd_format};
pub use uki::UkiError;

/// Where x86-64 Linux maps its own image: the top 2 GiB (the kernel's Documentation/arch/x86/x86_64/mm.rst).
pub(crate) const HIGH_HALF: u64 = 0xffff_ffff_8000_0000;

/// The largest file that is read. A vmlinux with debug information is about 1 GiB.
const MAX_FILE: u64 = 4 << 30;

/// Begins `linux_banner` in every kernel (init/version.c).
const BANNER: &[u8] = b"Linux version ";

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageKind {
    /// A compressed Linux kernel, unpacked.
    BzImage,
    /// A Linux kernel as ELF file.
    Vmlinux,
    /// Any other statically linked x86-64 ELF program, entered in 64-bit mode.
    BareMetal,
}

impl ImageKind {
    /// Whether the image is a Linux kernel and wants the Linux boot protocol.
    #[must_use]
    pub fn is_linux(self) -> bool {
        matches!(self, ImageKind::BzImage | ImageKind::Vmlinux)
    }
}

/// A part of the image that belongs into guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it is linked. `None` for a Linux kernel's per-CPU template, which is linked at 0 but never mapped there.
    pub gva: Option<Gva>,
    /// Where it is loaded.
    pub gpa: Gpa,
    /// Its bytes in [`Image::data`]; the rest of `mem_size` is zeros.
    pub file: Range<usize>,
    /// Its size in memory in bytes, at least the file range's.
    pub mem_size: u64,
    /// PF_W.
    pub writable: bool,
    /// PF_X.
    pub executable: bool,
}

impl Segment {
    /// The virtual addresses it covers in memory.
    #[must_use]
    pub fn gva_range(&self) -> Option<Range<Gva>> {
        self.gva.map(|gva| gva..gva.offset(self.mem_size))
    }

    /// The physical addresses it covers in memory.
    #[must_use]
    pub fn gpa_range(&self) -> Range<Gpa> {
        self.gpa..self.gpa.offset(self.mem_size)
    }
}

/// A named part of the loaded program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its name, ".text" for one.
    pub name: String,
    /// Where it is linked.
    pub gva: Gva,
    /// Its size in bytes, not 0.
    pub size: u64,
    /// Whether it holds code.
    pub executable: bool,
}

impl Section {
    /// The addresses it covers.
    #[must_use]
    pub fn range(&self) -> Range<Gva> {
        self.gva..self.gva.offset(self.size)
    }
}

/// Why a file is not a usable guest image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("Cannot read the image {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A directory, device or pipe.
    #[error("The image {} is not a regular file; pass a bzImage or an ELF file", path.display())]
    NotAFile {
        /// What was given.
        path: PathBuf,
    },
    /// Far larger than any kernel.
    #[error("The image {} has {size:#x} bytes; no more than {MAX_FILE:#x} are accepted", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Neither format.
    #[error(
        "The file is neither a bzImage (no \"HdrS\" at offset 0x202) nor an ELF file; pass a kernel's vmlinuz or \
         vmlinux, or a bare-metal ELF program"
    )]
    Unrecognised,
    /// An executable for Windows or for UEFI firmware.
    #[error(
        "The file is a PE executable that holds no Linux kernel: no boot header, and no section .linux of a unified kernel image; \
         pass a vmlinuz, or a unified kernel image"
    )]
    Pe,
    /// A disk without a kernel, or one that cannot be read.
    #[error(transparent)]
    Disk(#[from] disk::DiskError),
    /// A unified kernel image that lies.
    #[error(transparent)]
    Uki(#[from] UkiError),
    /// The boot header ends early.
    #[error("The bzImage ends inside its boot header; the file is truncated")]
    TruncatedHeader,
    /// No payload fields.
    #[error(
        "The bzImage has boot protocol {}.{:02}, older than 2.08, and does not say where its payload is; use a \
         kernel newer than 2.6.24",
        protocol >> 8, protocol & 0xff
    )]
    OldProtocol {
        /// The version in the header.
        protocol: u16,
    },
    /// The header lies, or the file is cut.
    #[error(
        "The bzImage's payload at {start:#x}..{end:#x} is empty or reaches beyond the file's {file_size:#x} bytes; \
         the file is truncated or its header is wrong"
    )]
    PayloadOutside {
        /// First byte of the payload in the file.
        start: u64,
        /// Its end.
        end: u64,
        /// The file's size in bytes.
        file_size: usize,
    },
    /// The payload cannot be unpacked.
    #[error("The bzImage cannot be unpacked")]
    Decompress(#[from] DecompressError),
    /// What is in the bzImage is no ELF file.
    #[error("The bzImage's payload is not an ELF file")]
    PayloadNotElf,
    /// Big-endian, or too short.
    #[error("The ELF file is not a complete little-endian one; vmprobe runs x86 guests")]
    NotElf,
    /// A 32-bit program that says nothing of how it is entered.
    #[error("The ELF file is a 32-bit one; vmprobe runs x86-64 guests")]
    Elf32,
    /// Another architecture.
    #[error("The ELF file is for machine {machine}, not for x86-64 (62)")]
    Machine {
        /// `e_machine`.
        machine: u16,
    },
    /// A module, a shared library, a position-independent or core file.
    #[error("The ELF file has type {kind}; link it statically, not position-independent (ET_EXEC, 2)")]
    NotExecutable {
        /// `e_type`.
        kind: u16,
    },
    /// A table of the file cannot be read.
    #[error("The ELF file's {table} (offset {offset:#x}) cannot be read; the file is truncated or damaged")]
    HeaderTable {
        /// Which table.
        table: &'static str,
        /// The offset that the file gives for it.
        offset: u64,
    },
    /// Nothing to load.
    #[error("The ELF file has no load segment")]
    NoSegments,
    /// More bytes in the file than in memory.
    #[error(
        "The ELF segment at physical {gpa} has {in_file:#x} bytes in the file but {mem_size:#x} in memory"
    )]
    SegmentSize {
        /// Its load address.
        gpa: Gpa,
        /// `p_filesz`.
        in_file: u64,
        /// `p_memsz`.
        mem_size: u64,
    },
    /// Its bytes are not there.
    #[error(
        "The ELF segment at physical {gpa} takes {in_file:#x} bytes at offset {offset:#x} of a file of \
         {file_size:#x}; the file is truncated or damaged"
    )]
    SegmentOutsideFile {
        /// Its load address.
        gpa: Gpa,
        /// `p_offset`.
        offset: u64,
        /// `p_filesz`.
        in_file: u64,
        /// The file's size in bytes.
        file_size: usize,
    },
    /// Its addresses overflow.
    #[error(
        "The ELF segment at {gva} (physical {gpa}) with {mem_size:#x} bytes reaches beyond the end of the address \
         space"
    )]
    SegmentWraps {
        /// Its link address.
        gva: Gva,
        /// Its load address.
        gpa: Gpa,
        /// Its size in memory.
        mem_size: u64,
    },
    /// Two segments want the same memory.
    #[error("The ELF segments at {space} {first:#x} and {second:#x} overlap")]
    SegmentsOverlap {
        /// "physical" or "virtual".
        space: &'static str,
        /// Start of the first.
        first: u64,
        /// Start of the second.
        second: u64,
    },
    /// Its addresses overflow.
    #[error(
        "The ELF section {name} at {gva} with {size:#x} bytes reaches beyond the end of the address space"
    )]
    SectionWraps {
        /// Its name.
        name: String,
        /// Its link address.
        gva: Gva,
        /// Its size.
        size: u64,
    },
    /// The program would start in nothing.
    #[error("The ELF file's entry point {entry:#x} is not in an executable segment")]
    EntryOutside {
        /// `e_entry`.
        entry: u64,
    },
}

/// A guest image, unpacked and checked.
pub struct Image {
    /// What it is.
    pub kind: ImageKind,
    /// Where it is entered, in 64-bit mode, as physical address. For Linux that is `startup_64`, which wants what the
    /// 64-bit boot protocol gives: RSI with the physical address of the zero page, interrupts off, an identity mapping
    /// of the kernel, the zero page and the command line, flat segments 0x10 (code) and 0x18 (data).
    pub entry: Gpa,
    /// What is to be loaded.
    pub segments: Vec<Segment>,
    /// How the payload of a bzImage was compressed.
    pub compression: Option<Compression>,
    /// The setup header of a bzImage. A bare vmlinux has none.
    pub setup_header: Option<SetupHeader>,
    /// What a boot loader would load of a bzImage, for a guest that is to unpack itself.
    pub protected_mode: Option<ProtectedMode>,
    /// By how much the program lies behind where it was linked; all addresses here are those where it lies.
    pub relocation: Relocation,
    /// A Linux kernel's version, "6.1.0-56-cloud-amd64" for one.
    pub version: Option<String>,
    /// The build id that the linker gave the program (NT_GNU_BUILD_ID).
    pub build_id: Option<Vec<u8>>,
    data: Vec<u8>,
    sections: Vec<Section>,
    /// Executable addresses, sorted and disjoint.
    code: Vec<Range<Gva>>,
    /// Indices into `segments` of those with a virtual address, by that address.
    by_gva: Vec<usize>,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image")
            .field("kind", &self.kind)
            .field("entry", &self.entry)
            .field("version", &self.version)
            .field("compression", &self.compression)
            .field("segments", &self.segments)
            .finish_non_exhaustive()
    }
}

impl Image {
    /// Reads the file at `path`, and the kernel that it holds.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Ok(Bootable::parse(Self::read_file(path)?)?.kernel)
    }

    /// The bytes of the file at `path`, for [`Bootable::parse`]; nothing looks at them.
    ///
    /// # Errors
    /// It is no file, is too large or cannot be read.
    pub fn read_file(path: &Path) -> Result<Vec<u8>, ImageError> {
        let read = |source| ImageError::Read { path: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(read)?;
        if !metadata.is_file() {
            return Err(ImageError::NotAFile { path: path.to_owned() });
        }
        let size = metadata.len();
        if size > MAX_FILE {
            return Err(ImageError::FileTooLarge { path: path.to_owned(), size });
        }
        let mut file = Vec::new();
        file.try_reserve_exact(usize::try_from(size).unwrap_or(0)).map_err(|error| read(error.into()))?;
        File::open(path).map_err(read)?.take(MAX_FILE).read_to_end(&mut file).map_err(read)?;
        Ok(file)
    }

    /// Recognises and checks a kernel: the contents of a file, or of a part of one.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn parse(file: Vec<u8>) -> Result<Self, ImageError> {
        if file.starts_with(&object::elf::ELFMAG) {
            let layout = elf::parse(&file)?;
            let version = banner_version(&file, &layout.segments);
            let kind = if version.is_some() { ImageKind::Vmlinux } else { ImageKind::BareMetal };
            return Self::new(kind, layout, version, file);
        }
        if !bzimage::is_bzimage(&file) {
            return Err(if file.starts_with(b"MZ") { ImageError::Pe } else { ImageError::Unrecognised });
        }
        let (header, payload) = bzimage::split(&file)?;
        let (compression, vmlinux) = decompress::decompress(payload, MAX_UNPACKED)?;
        let header_version = bzimage::version(&file);
        let protected_mode = ProtectedMode::new(&header, file);
        if !vmlinux.starts_with(&object::elf::ELFMAG) {
            return Err(ImageError::PayloadNotElf);
        }
        let layout = elf::parse(&vmlinux)?;
        let version = banner_version(&vmlinux, &layout.segments).or(header_version);
        let mut image = Self::new(ImageKind::BzImage, layout, version, vmlinux)?;
        image.compression = Some(compression);
        image.setup_header = Some(header);
        image.protected_mode = protected_mode;
        Ok(image)
    }

    /// The same kernel as it is in `memory` when it has been unpacked and relocated there: its addresses and its bytes.
    ///
    /// # Errors
    /// It would not be in RAM.
    pub fn relocated(
        mut self,
        relocation: Relocation,
        memory: &dyn PhysicalMemory,
    ) -> Result<Self, MemoryError> {
        self = self.moved(relocation);
        for segment in &self.segments {
            memory.read(segment.gpa, &mut self.data[segment.file.clone()])?;
        }
        Ok(self)
    }

    /// The same kernel with its addresses there, of a file whose bytes are those of the kernel that has been relocated:
    /// [`Image::data`] of what [`Image::relocated`] returned.
    #[must_use]
    pub fn moved(mut self, relocation: Relocation) -> Self {
        let moved = |gva: Gva| gva.offset(relocation.gva_offset);
        for segment in &mut self.segments {
            segment.gva = segment.gva.map(moved);
            segment.gpa = segment.gpa.offset(relocation.gpa_offset);
        }
        for section in &mut self.sections {
            section.gva = moved(section.gva);
        }
        for range in &mut self.code {
            *range = moved(range.start)..moved(range.end);
        }
        self.entry = self.entry.offset(relocation.gpa_offset);
        self.relocation = relocation;
        self
    }

    fn new(
        kind: ImageKind,
        layout: elf::Layout,
        version: Option<String>,
        data: Vec<u8>,
    ) -> Result<Self, ImageError> {
        let elf::Layout { is_64, entry, build_id, mut segments, mut sections } = layout;
        if !is_64 {
            return Err(ImageError::Elf32);
        }
        if kind.is_linux() {
            // The per-CPU template is linked at 0 and copied by the kernel; nothing ever runs or reads there.
            for segment in &mut segments {
                segment.gva = segment.gva.filter(|gva| gva.0 >= HIGH_HALF);
            }
            sections.retain(|section| section.gva.0 >= HIGH_HALF);
        }
        let mut by_gva: Vec<usize> = (0..segments.len()).filter(|&at| segments[at].gva.is_some()).collect();
        by_gva.sort_unstable_by_key(|&at| segments[at].gva);
        let code = code_ranges(&segments, &sections);
        let mut image = Self {
            kind,
            entry: Gpa(entry),
            segments,
            compression: None,
            setup_header: None,
            protected_mode: None,
            relocation: Relocation::default(),
            version,
            build_id,
            data,
            sections,
            code,
            by_gva,
        };
        image.entry = image.physical_entry(entry)?;
        Ok(image)
    }

    /// Linux gives its entry point as physical address, other programs as virtual one; mostly the two are the same.
    fn physical_entry(&self, entry: u64) -> Result<Gpa, ImageError> {
        let physical = || {
            let mut segments = self.segments.iter().filter(|segment| segment.executable);
            segments.find(|segment| segment.gpa_range().contains(&Gpa(entry))).map(|_| Gpa(entry))
        };
        // Linux 7.2 has the code of its start in the segment of its data, which is not marked as executable: only the section is. The
        // boot protocol knows no such marks.
        let in_section = || {
            let segment = self.segments.iter().find(|segment| segment.gpa_range().contains(&Gpa(entry)))?;
            let gva = segment.gva?.offset(entry - segment.gpa.0);
            let mut code = self.sections.iter().filter(|section| section.executable);
            code.find(|section| section.range().contains(&gva)).map(|_| Gpa(entry))
        };
        let virtual_ = || {
            let segment = self.segment_at(Gva(entry)).filter(|segment| segment.executable);
            segment.and_then(|_| self.gva_to_gpa(Gva(entry)))
        };
        let found = if self.kind.is_linux() {
            physical().or_else(in_section).or_else(virtual_)
        } else {
            virtual_().or_else(physical)
        };
        found.ok_or(ImageError::EntryOutside { entry })
    }

    /// The whole ELF file, unpacked.
    #[must_use]
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The bytes of a segment that are in the file.
    #[must_use]
    pub fn segment_data(&self, segment: &Segment) -> &[u8] {
        self.data.get(segment.file.clone()).unwrap_or_default()
    }

    /// The section of that name, if the file has section headers.
    #[must_use]
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The loaded sections, by address.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// The segment mapped at `gva`.
    #[must_use]
    pub fn segment_at(&self, gva: Gva) -> Option<&Segment> {
        let behind = self.by_gva.partition_point(|&at| self.segments[at].gva <= Some(gva));
        let segment = &self.segments[*self.by_gva.get(behind.checked_sub(1)?)?];
        segment.gva_range()?.contains(&gva).then_some(segment)
    }

    /// The `len` bytes at `gva` as they are in the file. `None` if they are not all mapped, in one segment, and in the
    /// file; zero-initialised memory is not.
    #[must_use]
    pub fn read(&self, gva: Gva, len: usize) -> Option<&[u8]> {
        self.read_up_to(gva, len).filter(|bytes| bytes.len() == len)
    }

    /// As [`Image::read`], but cut off where the segment's bytes in the file end.
    #[must_use]
    pub fn read_up_to(&self, gva: Gva, len: usize) -> Option<&[u8]> {
        let segment = self.segment_at(gva)?;
        let offset = usize::try_from(gva.0 - segment.gva?.0).ok()?;
        let bytes = self.segment_data(segment).get(offset..)?;
        Some(&bytes[..len.min(bytes.len())])
    }

    /// The `len` bytes that are loaded at `gpa`, as they are in the file.
    #[must_use]
    pub fn read_physical(&self, gpa: Gpa, len: usize) -> Option<&[u8]> {
        let segment = self.segments.iter().find(|segment| segment.gpa_range().contains(&gpa))?;
        let offset = usize::try_from(gpa.0 - segment.gpa.0).ok()?;
        self.segment_data(segment).get(offset..offset.checked_add(len)?)
    }

    /// Where the byte at `gva` is loaded.
    #[must_use]
    pub fn gva_to_gpa(&self, gva: Gva) -> Option<Gpa> {
        let segment = self.segment_at(gva)?;
        Some(segment.gpa.offset(gva.0 - segment.gva?.0))
    }

    /// Where the program lies, for people.
    #[must_use]
    pub fn place(&self) -> String {
        let Relocation { gva_offset, gpa_offset } = self.relocation;
        let start = self.gva_range().unwrap_or_default().start;
        let entry = self.entry;
        format!(
            "The kernel lies at {start}, {gva_offset:#x} behind where it was linked, and is entered at guest-physical {entry}, \
             {gpa_offset:#x} behind where it would be loaded"
        )
    }

    /// From the first to the last virtual address of the image, with what lies between the segments.
    #[must_use]
    pub fn gva_range(&self) -> Option<Range<Gva>> {
        let first = self.segments[*self.by_gva.first()?].gva?;
        Some(first..self.segments[*self.by_gva.last()?].gva_range()?.end)
    }

    /// Whether `gva` holds code: in an executable section, or in an executable segment of a file without sections.
    #[must_use]
    pub fn is_code(&self, gva: Gva) -> bool {
        self.code_range(gva).is_some()
    }

    /// The stretch of code around `gva`.
    #[must_use]
    pub fn code_range(&self, gva: Gva) -> Option<Range<Gva>> {
        let behind = self.code.partition_point(|range| range.start <= gva);
        self.code.get(behind.checked_sub(1)?).filter(|range| range.contains(&gva)).cloned()
    }

    /// All stretches of code, by address, disjoint.
    #[must_use]
    pub fn code(&self) -> &[Range<Gva>] {
        &self.code
    }

    /// The addresses over which a symbol can extend: sections, or segments where there are none. Sorted; disjoint if
    /// the file is well-formed.
    pub(crate) fn regions(&self) -> Vec<Range<Gva>> {
        if self.sections.is_empty() {
            self.by_gva.iter().filter_map(|&at| self.segments[at].gva_range()).collect()
        } else {
            self.sections.iter().map(Section::range).collect()
        }
    }
}

fn code_ranges(segments: &[Segment], sections: &[Section]) -> Vec<Range<Gva>> {
    let mut ranges: Vec<Range<Gva>> = if sections.iter().any(|section| section.executable) {
        sections.iter().filter(|section| section.executable).map(Section::range).collect()
    } else {
        segments.iter().filter(|segment| segment.executable).filter_map(Segment::gva_range).collect()
    };
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<Gva>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            // Only hostile files have sections that overlap; one that merely touches its neighbour stays separate.
            Some(last) if range.start < last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// The version of a program that is linked to the high half and has Linux's banner there. The banner is followed by a
/// digit; format strings with the same beginning are not.
fn banner_version(data: &[u8], segments: &[Segment]) -> Option<String> {
    let finder = memchr::memmem::Finder::new(BANNER);
    let mut high = segments.iter().filter(|segment| segment.gva.is_some_and(|gva| gva.0 >= HIGH_HALF));
    high.find_map(|segment| {
        let bytes = data.get(segment.file.clone())?;
        finder.find_iter(bytes).find_map(|at| version_word(&bytes[at + BANNER.len()..]))
    })
}

/// The word at the start of `text`, if it looks like a kernel version: a digit first, no longer than 64 bytes
/// (`__NEW_UTS_LEN`), printable.
fn version_word(text: &[u8]) -> Option<String> {
    let text = &text[..text.len().min(65)];
    let end = text.iter().position(|byte| !byte.is_ascii_graphic())?;
    let word = std::str::from_utf8(&text[..end]).ok()?;
    word.starts_with(|first: char| first.is_ascii_digit()).then(|| word.to_owned())
}

#[cfg(test)]
mod tests;
