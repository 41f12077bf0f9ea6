//! Builds small images for tests.

use probe_core::Gva;

use crate::kallsyms::synthetic::{self, Layout};

/// Where a synthetic kernel's text is linked, as in a real one.
pub const TEXT: u64 = 0xffff_ffff_8100_0000;
/// Where it is loaded.
pub const TEXT_GPA: u64 = 0x100_0000;
/// Where its read-only data is linked.
pub const RODATA: u64 = 0xffff_ffff_8200_0000;

pub const PF_X: u32 = 1;
pub const PF_W: u32 = 2;
pub const PF_R: u32 = 4;
pub const SHF_WRITE: u64 = 1;
pub const SHF_ALLOC: u64 = 2;
pub const SHF_EXECINSTR: u64 = 4;
const STT_FUNC: u8 = 2;

/// A load segment.
#[derive(Clone, Debug)]
pub struct Segment {
    pub vaddr: u64,
    pub paddr: u64,
    pub flags: u32,
    pub data: Vec<u8>,
    pub memsz: u64,
}

#[derive(Default)]
struct SectionHeader {
    name: u32,
    kind: u32,
    /// Flags, address, offset in the file, size.
    words: [u64; 4],
    link: u32,
    entry_size: u64,
}

/// An ELF file in the making.
#[derive(Clone, Debug, Default)]
pub struct Elf {
    pub entry: u64,
    pub segments: Vec<Segment>,
    /// Name, flags, address, size.
    pub sections: Vec<(String, u64, u64, u64)>,
    /// Name, st_info, section number (from 1), address, size.
    pub symbols: Vec<(String, u8, u16, u64, u64)>,
}

impl Elf {
    /// One executable segment with `code` at `address`, virtual and physical, entered at its start.
    pub fn bare_metal(address: u64, code: &[u8]) -> Self {
        Self { entry: address, ..Self::default() }.segment(address, address, PF_R | PF_X, code)
    }

    pub fn segment(mut self, vaddr: u64, paddr: u64, flags: u32, data: &[u8]) -> Self {
        self.segments.push(Segment { vaddr, paddr, flags, data: data.to_vec(), memsz: data.len() as u64 });
        self
    }

    pub fn section(mut self, name: &str, flags: u64, address: u64, size: u64) -> Self {
        self.sections.push((name.to_owned(), SHF_ALLOC | flags, address, size));
        self
    }

    /// A global function in the first section.
    pub fn function(mut self, name: &str, address: u64, size: u64) -> Self {
        self.symbols.push((name.to_owned(), 0x10 | STT_FUNC, 1, address, size));
        self
    }

    pub fn build(&self) -> Vec<u8> {
        let mut out = vec![0; 64 + 56 * self.segments.len()];
        for (index, segment) in self.segments.iter().enumerate() {
            out.resize(out.len().next_multiple_of(16), 0);
            let offset = out.len() as u64;
            out.extend(&segment.data);
            let mut header = vec![];
            header.extend(1u32.to_le_bytes());
            header.extend(segment.flags.to_le_bytes());
            let size = segment.data.len() as u64;
            for word in [offset, segment.vaddr, segment.paddr, size, segment.memsz, 0x1000] {
                header.extend(word.to_le_bytes());
            }
            out[64 + 56 * index..][..56].copy_from_slice(&header);
        }
        let mut strings = vec![0];
        let mut string = |text: &str| {
            let at = u32::try_from(strings.len()).unwrap();
            strings.extend(text.bytes());
            strings.push(0);
            at
        };
        let mut symbols = vec![0; 24];
        for (name, info, section, address, size) in &self.symbols {
            symbols.extend(string(name).to_le_bytes());
            symbols.extend([*info, 0]);
            symbols.extend(section.to_le_bytes());
            symbols.extend(address.to_le_bytes());
            symbols.extend(size.to_le_bytes());
        }
        let mut headers = vec![SectionHeader::default()];
        for (name, flags, address, size) in &self.sections {
            headers.push(SectionHeader {
                name: string(name),
                kind: 1,
                words: [*flags, *address, 0, *size],
                ..SectionHeader::default()
            });
        }
        let strings_index = u32::try_from(headers.len() + 1).unwrap();
        let names = [string(".symtab"), string(".strtab")];
        out.resize(out.len().next_multiple_of(8), 0);
        let words = [0, 0, out.len() as u64, symbols.len() as u64];
        headers.push(SectionHeader { name: names[0], kind: 2, words, link: strings_index, entry_size: 24 });
        out.extend(&symbols);
        let words = [0, 0, out.len() as u64, strings.len() as u64];
        headers.push(SectionHeader { name: names[1], kind: 3, words, ..SectionHeader::default() });
        out.extend(&strings);
        out.resize(out.len().next_multiple_of(8), 0);
        let sections_offset = out.len() as u64;
        for header in &headers {
            out.extend(header.name.to_le_bytes());
            out.extend(header.kind.to_le_bytes());
            for word in header.words {
                out.extend(word.to_le_bytes());
            }
            out.extend(header.link.to_le_bytes());
            out.extend(0u32.to_le_bytes());
            out.extend(1u64.to_le_bytes());
            out.extend(header.entry_size.to_le_bytes());
        }
        let mut header = b"\x7fELF\x02\x01\x01".to_vec();
        header.resize(16, 0);
        header.extend(2u16.to_le_bytes());
        header.extend(62u16.to_le_bytes());
        header.extend(1u32.to_le_bytes());
        for word in [self.entry, 64, sections_offset] {
            header.extend(word.to_le_bytes());
        }
        header.extend(0u32.to_le_bytes());
        let counts = [64, 56, self.segments.len(), 64, headers.len(), strings_index as usize];
        for word in counts {
            header.extend(u16::try_from(word).unwrap().to_le_bytes());
        }
        out[..64].copy_from_slice(&header);
        out
    }
}

/// A small Linux kernel: text, tables in read-only data, a banner and kallsyms.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    text: Vec<u8>,
    /// Type letter and name together, address.
    symbols: Vec<(String, u64)>,
    /// Section name, contents.
    tables: Vec<(&'static str, Vec<u8>)>,
}

impl Kernel {
    /// Adds a function and returns its address.
    pub fn function(&mut self, name: &str, code: &[u8]) -> u64 {
        let address = self.next();
        self.symbols.push((format!("T{name}"), address));
        self.text.extend(code);
        self.text.resize(self.text.len().next_multiple_of(16), 0xcc);
        address
    }

    /// The address of the next function.
    pub fn next(&self) -> u64 {
        TEXT + self.text.len() as u64
    }

    /// Adds a symbol without contents.
    pub fn symbol(&mut self, kind_and_name: &str, address: u64) {
        self.symbols.push((kind_and_name.to_owned(), address));
    }

    /// Adds a table in a section of its own. `entries` makes its contents from its address.
    pub fn table(&mut self, section: &'static str, entries: impl FnOnce(u64) -> Vec<u8>) {
        let address = self.table_address(self.tables.len());
        self.tables.push((section, entries(address)));
    }

    fn table_address(&self, index: usize) -> u64 {
        let before: usize =
            self.tables[..index].iter().map(|(_, data)| data.len().next_multiple_of(16)).sum();
        RODATA + 64 + before as u64
    }

    pub fn elf(&self) -> Elf {
        let mut rodata = b"Linux version %s\0Linux version 6.1.0-test (nobody) #1\n\0".to_vec();
        rodata.resize(64, 0);
        for (_, data) in &self.tables {
            rodata.extend(data);
            rodata.resize(rodata.len().next_multiple_of(16), 0);
        }
        let tables_end = RODATA + rodata.len() as u64;
        let mut symbols = self.symbols.clone();
        symbols.push(("T_text".to_owned(), TEXT));
        symbols.push(("Rlinux_banner".to_owned(), RODATA));
        symbols.push(("Apercpu_counter".to_owned(), 0x40));
        symbols.sort_by_key(|(_, address)| *address);
        rodata.extend(synthetic::build(Layout::Offsets32, &symbols, Gva(tables_end)));
        let rodata_gpa = TEXT_GPA + (RODATA - TEXT);
        let mut elf = Elf { entry: TEXT_GPA, ..Elf::default() }
            .segment(TEXT, TEXT_GPA, PF_R | PF_X, &self.text)
            .segment(RODATA, rodata_gpa, PF_R, &rodata)
            .segment(0, rodata_gpa + 0x100_0000, PF_R | PF_W, &[0; 0x100])
            .section(".text", SHF_EXECINSTR, TEXT, self.text.len() as u64)
            .section(".rodata.banner", 0, RODATA, 64)
            .section(".data..percpu", SHF_WRITE, 0, 0x100);
        for (index, (name, data)) in self.tables.iter().enumerate() {
            elf = elf.section(name, 0, self.table_address(index), data.len() as u64);
        }
        elf.section(".rodata", 0, tables_end, RODATA + rodata.len() as u64 - tables_end)
    }

    pub fn build(&self) -> Vec<u8> {
        self.elf().build()
    }
}

/// The bytes of self-relative 32-bit words at `address` that point to `targets`.
pub fn relative_words(address: u64, targets: &[u64]) -> Vec<u8> {
    let mut out = vec![];
    for target in targets {
        let here = address + out.len() as u64;
        out.extend(i32::try_from(target.wrapping_sub(here).cast_signed()).unwrap().to_le_bytes());
    }
    out
}

/// Where the protected-mode part of [`bzimage`] is loaded.
pub const PREFERRED: u64 = 0x100_0000;

/// A bzImage of protocol 2.15 around a compressed payload that includes its size.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    bzimage_with(&[], payload)
}

/// The same with code at its 64-bit entry, 0x200 bytes into its protected-mode part.
pub fn bzimage_with(code: &[u8], payload: &[u8]) -> Vec<u8> {
    let setup_sectors = 3usize;
    let protected_mode = (setup_sectors + 1) * 512;
    let payload_offset = 0x200 + code.len();
    let mut out = vec![0; protected_mode + payload_offset];
    out[protected_mode + 0x200..].copy_from_slice(code);
    out[0x1f1] = u8::try_from(setup_sectors).unwrap();
    out[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    out[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    out[0x202..0x206].copy_from_slice(b"HdrS");
    out[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    out[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    out[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    out[0x248..0x24c].copy_from_slice(&u32::try_from(payload_offset).unwrap().to_le_bytes());
    out[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    out[0x258..0x260].copy_from_slice(&PREFERRED.to_le_bytes());
    out[0x260..0x264].copy_from_slice(&0x300_0000u32.to_le_bytes());
    out[0x300..0x316].copy_from_slice(b"6.6.6-header (x) #1 \0\0");
    out.extend(payload);
    // A bzImage goes on behind its payload.
    out.extend([0x90; 100]);
    out
}
