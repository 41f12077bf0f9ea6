//! ELF executables: load segments, sections, notes and the symbol table.

use std::ops::Range;

use object::elf::{self, FileHeader32, FileHeader64};
use object::endian::LittleEndian;
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym};
use probe_core::{Gpa, Gva};

use super::{ImageError, Section, Segment};
use crate::symbols::{SymbolKind, SymbolTable};

/// Physical addresses have at most 52 bits (Intel SDM vol. 3A, 4.1.4).
const PHYSICAL_END: u64 = 1 << 52;

/// Section names are short; a hostile file can let one long name stand for thousands of sections.
const MAX_SECTION_NAME: usize = 256;

/// A build id has 20 bytes (SHA-1), rarely 16 or 32.
const MAX_BUILD_ID: usize = 64;

/// What the ELF headers say, checked.
#[derive(Debug)]
pub struct Layout {
    /// ELFCLASS64; ELFCLASS32 otherwise.
    pub is_64: bool,
    /// `e_entry`, uninterpreted.
    pub entry: u64,
    /// `NT_GNU_BUILD_ID`.
    pub build_id: Option<Vec<u8>>,
    /// The load segments in file order, without empty ones.
    pub segments: Vec<Segment>,
    /// The sections that are part of the loaded program, by address.
    pub sections: Vec<Section>,
}

/// Reads and checks the headers.
pub fn parse(data: &[u8]) -> Result<Layout, ImageError> {
    match class(data)? {
        Class::Elf32(header) => layout(header, data),
        Class::Elf64(header) => layout(header, data),
    }
}

/// The two forms of a header.
enum Class<'data> {
    Elf32(&'data FileHeader32<LittleEndian>),
    Elf64(&'data FileHeader64<LittleEndian>),
}

fn class(data: &[u8]) -> Result<Class<'_>, ImageError> {
    let elf64 = FileHeader64::parse(data).ok().filter(|header| header.is_little_endian()).map(Class::Elf64);
    let elf32 =
        || FileHeader32::parse(data).ok().filter(|header| header.is_little_endian()).map(Class::Elf32);
    elf64.or_else(elf32).ok_or(ImageError::NotElf)
}

fn layout<Elf: FileHeader<Endian = LittleEndian>>(header: &Elf, data: &[u8]) -> Result<Layout, ImageError> {
    let endian = LittleEndian;
    let machine = header.e_machine(endian);
    let right = if header.is_class_64() { elf::EM_X86_64 } else { elf::EM_386 };
    if machine != right {
        return Err(ImageError::Machine { machine: machine.0 });
    }
    let kind = header.e_type(endian);
    if kind != elf::ET_EXEC {
        return Err(ImageError::NotExecutable { kind: kind.0 });
    }
    let program_headers = header.program_headers(endian, data).map_err(|_| ImageError::HeaderTable {
        table: "program headers",
        offset: header.e_phoff(endian).into(),
    })?;
    let mut segments = Vec::new();
    for header in program_headers.iter().filter(|header| header.p_type(endian) == elf::PT_LOAD) {
        segments.extend(segment(header, data.len())?);
    }
    if segments.is_empty() {
        return Err(ImageError::NoSegments);
    }
    check_overlap(&segments)?;
    let sections = sections(header, data)?;
    let mut build_id = None;
    for header in program_headers {
        // Notes tell of the program; one that cannot be read is as good as none.
        let notes = header.notes(endian, data).ok().flatten();
        for note in notes.into_iter().flatten().map_while(Result::ok) {
            let (owner, kind, desc) = (note.name(), note.n_type(endian), note.desc());
            if owner == elf::ELF_NOTE_GNU && kind == elf::NT_GNU_BUILD_ID && desc.len() <= MAX_BUILD_ID {
                build_id.get_or_insert_with(|| desc.to_vec());
            }
        }
    }
    let entry = header.e_entry(endian).into();
    Ok(Layout { is_64: header.is_class_64(), entry, build_id, segments, sections })
}

fn segment<Header: ProgramHeader<Endian = LittleEndian>>(
    header: &Header,
    file_size: usize,
) -> Result<Option<Segment>, ImageError> {
    let endian = LittleEndian;
    let (gva, gpa): (u64, u64) = (header.p_vaddr(endian).into(), header.p_paddr(endian).into());
    let (offset, in_file, mem_size): (u64, u64, u64) =
        (header.p_offset(endian).into(), header.p_filesz(endian).into(), header.p_memsz(endian).into());
    if in_file > mem_size {
        return Err(ImageError::SegmentSize { gpa: Gpa(gpa), in_file, mem_size });
    }
    if mem_size == 0 {
        return Ok(None);
    }
    let start = usize::try_from(offset).ok();
    let end = offset.checked_add(in_file).and_then(|end| usize::try_from(end).ok());
    let file = match start.zip(end).filter(|(_, end)| *end <= file_size) {
        Some((start, end)) => start..end,
        None => return Err(ImageError::SegmentOutsideFile { gpa: Gpa(gpa), offset, in_file, file_size }),
    };
    let physical_end = gpa.checked_add(mem_size).filter(|end| *end <= PHYSICAL_END);
    if physical_end.is_none() || gva.checked_add(mem_size).is_none() {
        return Err(ImageError::SegmentWraps { gva: Gva(gva), gpa: Gpa(gpa), mem_size });
    }
    let flags = header.p_flags(endian);
    Ok(Some(Segment {
        gva: Some(Gva(gva)),
        gpa: Gpa(gpa),
        file,
        mem_size,
        writable: flags.contains(elf::PF_W),
        executable: flags.contains(elf::PF_X),
    }))
}

fn check_overlap(segments: &[Segment]) -> Result<(), ImageError> {
    let overlap = |mut ranges: Vec<Range<u64>>| {
        ranges.sort_unstable_by_key(|range| range.start);
        ranges.windows(2).find(|pair| pair[0].end > pair[1].start).map(|pair| (pair[0].start, pair[1].start))
    };
    let physical = segments.iter().map(|segment| segment.gpa.0..segment.gpa.0 + segment.mem_size);
    if let Some((first, second)) = overlap(physical.collect()) {
        return Err(ImageError::SegmentsOverlap { space: "physical", first, second });
    }
    let virtual_ = segments.iter().filter_map(Segment::gva_range).map(|range| range.start.0..range.end.0);
    if let Some((first, second)) = overlap(virtual_.collect()) {
        return Err(ImageError::SegmentsOverlap { space: "virtual", first, second });
    }
    Ok(())
}

/// The loaded sections. Their contents are read through the segments, so only addresses are taken from here.
fn sections<Elf: FileHeader<Endian = LittleEndian>>(
    header: &Elf,
    data: &[u8],
) -> Result<Vec<Section>, ImageError> {
    let endian = LittleEndian;
    let bad = || ImageError::HeaderTable { table: "section headers", offset: header.e_shoff(endian).into() };
    let table = header.sections(endian, data).map_err(|_| bad())?;
    let mut sections = Vec::new();
    for section in table.iter() {
        let flags = section.sh_flags(endian);
        let (gva, size): (u64, u64) = (section.sh_addr(endian).into(), section.sh_size(endian).into());
        let loaded = flags.contains(elf::SHF_ALLOC) && !flags.contains(elf::SHF_TLS);
        if !loaded || size == 0 {
            continue;
        }
        let name = table.section_name(endian, section).ok();
        let name = name.filter(|name| name.len() <= MAX_SECTION_NAME).ok_or_else(bad)?;
        let name = String::from_utf8_lossy(name).into_owned();
        if gva.checked_add(size).is_none() {
            return Err(ImageError::SectionWraps { name, gva: Gva(gva), size });
        }
        let executable = flags.contains(elf::SHF_EXECINSTR);
        sections.push(Section { name, gva: Gva(gva), size, executable });
    }
    sections.sort_by_key(|section| section.gva);
    Ok(sections)
}

/// The symbols with an address of the ELF symbol table, with nm's type letters; empty if the file has none.
/// `moved` says where an address of the file lies.
pub fn symbols(
    data: &[u8],
    regions: &[Range<Gva>],
    moved: impl Fn(Gva) -> Gva,
) -> Result<SymbolTable, ImageError> {
    match class(data)? {
        Class::Elf32(header) => symbol_table(header, data, regions, moved),
        Class::Elf64(header) => symbol_table(header, data, regions, moved),
    }
}

fn symbol_table<Elf: FileHeader<Endian = LittleEndian>>(
    header: &Elf,
    data: &[u8],
    regions: &[Range<Gva>],
    moved: impl Fn(Gva) -> Gva,
) -> Result<SymbolTable, ImageError> {
    let endian = LittleEndian;
    let bad = || ImageError::HeaderTable { table: "symbol table", offset: header.e_shoff(endian).into() };
    let sections = header.sections(endian, data).map_err(|_| bad())?;
    let table = sections.symbols(endian, data, elf::SHT_SYMTAB).map_err(|_| bad())?;
    let mut symbols = SymbolTable::builder();
    for (index, symbol) in table.enumerate() {
        let kind = symbol.st_type();
        let is_code_or_data = matches!(kind, elf::STT_NOTYPE | elf::STT_FUNC | elf::STT_OBJECT);
        // Absolute symbols are the assembler's constants, not addresses.
        let has_address = !matches!(symbol.st_shndx(endian), elf::SHN_UNDEF | elf::SHN_ABS);
        if !has_address || !is_code_or_data {
            continue;
        }
        let name = symbol.name(endian, table.strings()).map_err(|_| bad())?;
        if name.is_empty() {
            continue;
        }
        let section = table.symbol_section(endian, symbol, index).map_err(|_| bad())?;
        let section = section.and_then(|index| sections.section(index).ok());
        let letter = letter::<Elf>(symbol, section);
        let size = u32::try_from(symbol.st_size(endian).into()).unwrap_or(u32::MAX);
        let name = String::from_utf8_lossy(name);
        let gva = moved(Gva(symbol.st_value(endian).into()));
        symbols.push(name.chars(), SymbolKind(letter), gva, size).map_err(|_| bad())?;
    }
    Ok(symbols.build(regions))
}

/// The letter that nm prints for a symbol.
fn letter<Elf: FileHeader<Endian = LittleEndian>>(
    symbol: &Elf::Sym,
    section: Option<&Elf::SectionHeader>,
) -> char {
    let endian = LittleEndian;
    let local = symbol.st_bind() == elf::STB_LOCAL;
    if symbol.st_bind() == elf::STB_WEAK {
        return if symbol.st_type() == elf::STT_OBJECT { 'V' } else { 'W' };
    }
    let letter = match section {
        None => 'A',
        Some(section) => {
            let flags = section.sh_flags(endian);
            if flags.contains(elf::SHF_EXECINSTR) {
                'T'
            } else if section.sh_type(endian) == elf::SHT_NOBITS {
                'B'
            } else if flags.contains(elf::SHF_WRITE) {
                'D'
            } else {
                'R'
            }
        }
    };
    if local { letter.to_ascii_lowercase() } else { letter }
}
