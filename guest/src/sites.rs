//! The places in its own text that a Linux kernel rewrites, from the tables that tell the kernel where they are.
//!
//! A probe on such a place would be lost when the kernel writes there, or the kernel would find a byte that it does not
//! expect. Entry layouts differ between versions and nothing in the image names them, so the layout is the one with which
//! every entry of the table makes sense; a table with which none does is reported in [`PatchSites::unreadable`].

use std::fmt;
use std::ops::Range;

use iced_x86::{Decoder, DecoderOptions};
use probe_core::Gva;

use crate::bytes::{i32_at, relative, u64_at};
use crate::image::Image;
use crate::symbols::SymbolTable;

/// The longest x86 instruction (Intel SDM vol. 2, 2.3.11), in bytes.
pub(crate) const MAX_INSTRUCTION: usize = 15;

/// A `call` or `jmp` with a 32-bit displacement, and the nop that replaces it.
pub(crate) const CALL_LEN: u8 = 5;

/// Why the kernel rewrites a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// `call __fentry__` or its nop, for ftrace (`__mcount_loc`).
    Ftrace,
    /// Chosen by CPU feature at boot (`.altinstructions`).
    Alternative,
    /// A paravirtual operation, replaced at boot (`.parainstructions`, to 6.7).
    Paravirt,
    /// An indirect branch through a thunk (`.retpoline_sites`).
    Retpoline,
    /// A jump to the return thunk (`.return_sites`).
    Return,
    /// A static key's jump or nop (`__jump_table`).
    JumpLabel,
    /// A static call or its trampoline (`.static_call_sites`).
    StaticCall,
    /// An `endbr64` that no indirect branch needs, replaced by a nop at boot (`.ibt_endbr_seal`).
    Endbr,
    /// A LOCK prefix, which a kernel with one CPU replaces by a DS prefix (`.smp_locks`).
    LockPrefix,
}

impl fmt::Display for SiteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SiteKind::Ftrace => "ftrace site",
            SiteKind::Alternative => "alternative instruction",
            SiteKind::Paravirt => "paravirtual operation",
            SiteKind::Retpoline => "retpoline branch",
            SiteKind::Return => "return-thunk jump",
            SiteKind::JumpLabel => "jump label",
            SiteKind::StaticCall => "static call",
            SiteKind::Endbr => "sealed endbr64",
            SiteKind::LockPrefix => "lock prefix",
        })
    }
}

/// A stretch of text that the kernel rewrites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its first byte.
    pub start: Gva,
    /// Its length in bytes, at least 1.
    pub len: u8,
    /// Why it is rewritten.
    pub kind: SiteKind,
    /// Where the jump of a jump label goes when there is one.
    pub target: Option<Gva>,
}

impl SiteKind {
    /// Whether what the kernel writes here does the same as what was there before, and has the same length. A probe can
    /// stay on such a place if the write is merged under it.
    #[must_use]
    pub fn keeps_meaning(self) -> bool {
        matches!(self, SiteKind::Endbr | SiteKind::LockPrefix)
    }

    /// Whether the kernel writes here only while it boots.
    #[must_use]
    pub fn is_final_after_boot(self) -> bool {
        !matches!(self, SiteKind::Ftrace | SiteKind::JumpLabel | SiteKind::StaticCall)
    }
}

impl Site {
    /// The addresses it covers.
    #[must_use]
    pub fn range(&self) -> Range<Gva> {
        self.start..self.start.offset(u64::from(self.len))
    }
}

/// All places that a kernel rewrites, and those that its exception table covers.
#[derive(Debug, Default)]
pub struct PatchSites {
    /// Sorted by start.
    sites: Vec<Site>,
    /// Instructions whose faults the kernel expects, sorted.
    exceptions: Vec<Gva>,
    has_ftrace_table: bool,
    has_call_thunks: bool,
    unreadable: Vec<&'static str>,
}

/// One of the kernel's tables.
struct Table {
    /// Its section.
    section: &'static str,
    /// The symbols around it, for when it has no section of its own.
    bounds: (&'static str, &'static str),
    /// What its entries may look like.
    layouts: &'static [Layout],
}

/// A layout of a table's entries.
struct Layout {
    /// Bytes of an entry.
    size: usize,
    /// Reads the entry at an address. `None` says that the bytes cannot be such an entry.
    read: fn(&Image, Gva, &[u8]) -> Option<Entry>,
}

/// What an entry says.
enum Entry {
    /// So many bytes at that address.
    At(Gva, u8),
    /// The same, and where they jump to if they jump.
    Jump(Gva, u8, Gva),
    /// The build has voided it.
    Void,
}

/// `struct alt_instr` has two 32-bit self-relative pointers, then a CPU feature, then lengths: two until 4.0, with a third
/// for padding from 4.1 to 5.12, two again from 5.13, behind a feature of 32 bits from 6.3.
const ALTERNATIVES: Table = Table {
    section: ".altinstructions",
    bounds: ("__alt_instructions", "__alt_instructions_end"),
    layouts: &[
        Layout { size: 12, read: |image, at, entry| alternative(image, at, entry, 10) },
        Layout { size: 13, read: |image, at, entry| alternative(image, at, entry, 10) },
        Layout { size: 14, read: |image, at, entry| alternative(image, at, entry, 12) },
    ],
};

/// `struct paravirt_patch_site`: address, type, length, padding.
const PARAVIRT: Table = Table {
    section: ".parainstructions",
    bounds: ("__parainstructions", "__parainstructions_end"),
    layouts: &[Layout { size: 16, read: |image, _, entry| code(image, u64_at(entry, 0)?, *entry.get(9)?) }],
};

const RETPOLINES: Table = Table {
    section: ".retpoline_sites",
    bounds: ("__retpoline_sites", "__retpoline_sites_end"),
    layouts: &[Layout { size: 4, read: branch }],
};

const RETURNS: Table = Table {
    section: ".return_sites",
    bounds: ("__return_sites", "__return_sites_end"),
    layouts: &[Layout { size: 4, read: branch }],
};

/// Every call in the kernel. They are so many that only the table's being there is noted.
const CALLS: Table =
    Table { section: ".call_sites", bounds: ("__call_sites", "__call_sites_end"), layouts: &[] };

const ENDBRS: Table = Table {
    section: ".ibt_endbr_seal",
    bounds: ("__ibt_endbr_seal", "__ibt_endbr_seal_end"),
    layouts: &[Layout { size: 4, read: branch }],
};

const LOCKS: Table = Table {
    section: ".smp_locks",
    bounds: ("__smp_locks", "__smp_locks_end"),
    layouts: &[Layout {
        size: 4,
        // The section is padded to a page.
        read: |image, at, entry| match i32_at(entry, 0)? {
            0 => Some(Entry::Void),
            _ => code(image, target(at, entry, 0)?, 1),
        },
    }],
};

/// `struct jump_entry`: code, target, key; self-relative from 4.19.
const JUMP_LABELS: Table = Table {
    section: "__jump_table",
    bounds: ("__start___jump_table", "__stop___jump_table"),
    layouts: &[
        Layout {
            size: 16,
            read: |image, at, entry| jump(image, target(at, entry, 0)?, Gva(target(at, entry, 4)?)),
        },
        Layout { size: 24, read: |image, _, entry| jump(image, u64_at(entry, 0)?, Gva(u64_at(entry, 8)?)) },
    ],
};

/// `struct static_call_site`: address and key, self-relative.
const STATIC_CALLS: Table = Table {
    section: ".static_call_sites",
    bounds: ("__start_static_call_sites", "__stop_static_call_sites"),
    layouts: &[Layout { size: 8, read: branch }],
};

/// Addresses; the build sets those of functions that were dropped to zero, and a kernel that relocates itself relocates these too.
const FTRACE: Table = Table {
    section: "__mcount_loc",
    bounds: ("__start_mcount_loc", "__stop_mcount_loc"),
    layouts: &[Layout {
        size: 8,
        read: |image, _, entry| match u64_at(entry, 0)? {
            dropped if dropped == image.relocation.gva_offset => Some(Entry::Void),
            start => code(image, start, CALL_LEN),
        },
    }],
};

/// `struct exception_table_entry`: instruction and fixup, self-relative; from 4.6 with a handler or type.
const EXCEPTIONS: Table = Table {
    section: "__ex_table",
    bounds: ("__start___ex_table", "__stop___ex_table"),
    layouts: &[Layout { size: 12, read: exception }, Layout { size: 8, read: exception }],
};

/// The name of a static call's trampoline begins so (include/linux/static_call_types.h).
const STATIC_CALL_TRAMPOLINE: &str = "__SCT__";

impl PatchSites {
    /// Reads the tables of a Linux kernel. Any other image has none.
    #[must_use]
    pub fn new(image: &Image, symbols: &SymbolTable) -> Self {
        let mut sites = Self::default();
        if !image.kind.is_linux() {
            return sites;
        }
        for (kind, table) in [
            (SiteKind::Alternative, ALTERNATIVES),
            (SiteKind::Paravirt, PARAVIRT),
            (SiteKind::Retpoline, RETPOLINES),
            (SiteKind::Return, RETURNS),
            (SiteKind::Endbr, ENDBRS),
            (SiteKind::LockPrefix, LOCKS),
            (SiteKind::JumpLabel, JUMP_LABELS),
            (SiteKind::StaticCall, STATIC_CALLS),
            (SiteKind::Ftrace, FTRACE),
        ] {
            match read_table(image, symbols, &table) {
                None => {}
                Some(Ok(found)) => {
                    sites.has_ftrace_table |= kind == SiteKind::Ftrace;
                    sites.sites.extend(found.iter().map(|&(start, len, target)| Site {
                        start,
                        len,
                        kind,
                        target,
                    }));
                }
                Some(Err(Unreadable)) => sites.unreadable.push(table.section),
            }
        }
        sites.has_call_thunks = bounds(image, symbols, &CALLS).is_some();
        match read_table(image, symbols, &EXCEPTIONS) {
            None => {}
            Some(Ok(found)) => sites.exceptions.extend(found.iter().map(|&(start, ..)| start)),
            Some(Err(Unreadable)) => sites.unreadable.push(EXCEPTIONS.section),
        }
        let trampolines = symbols.iter().filter(|symbol| symbol.name.starts_with(STATIC_CALL_TRAMPOLINE));
        sites.sites.extend(trampolines.filter(|symbol| symbol.kind.is_code()).map(|symbol| Site {
            start: symbol.gva,
            len: CALL_LEN,
            kind: SiteKind::StaticCall,
            target: None,
        }));
        sites.sites.sort_unstable_by_key(|site| (site.start, site.len));
        sites.sites.shrink_to_fit();
        sites.exceptions.sort_unstable();
        sites
    }

    /// The sites that share a byte with `range`.
    pub fn overlapping(&self, range: Range<Gva>) -> impl Iterator<Item = Site> {
        let earliest = Gva(range.start.0.saturating_sub(u64::from(u8::MAX)));
        let first = self.sites.partition_point(|site| site.start < earliest);
        self.sites[first..]
            .iter()
            .copied()
            .take_while(move |site| site.start < range.end)
            .filter(move |site| site.range().end > range.start)
    }

    /// Whether the kernel's exception table covers the instruction at `gva`.
    #[must_use]
    pub fn has_exception_entry(&self, gva: Gva) -> bool {
        self.exceptions.binary_search(&gva).is_ok()
    }

    /// Whether the image lists its ftrace sites. Where it does not, they are only known by their instruction.
    #[must_use]
    pub fn has_ftrace_table(&self) -> bool {
        self.has_ftrace_table
    }

    /// Whether the kernel can be told to redirect its direct calls through thunks (`retbleed=stuff`).
    #[must_use]
    pub fn has_call_thunks(&self) -> bool {
        self.has_call_thunks
    }

    /// The tables that the image has but whose entries make no sense. Places that they list are not recognised.
    #[must_use]
    pub fn unreadable(&self) -> &[&'static str] {
        &self.unreadable
    }

    /// How many sites of a kind there are.
    #[must_use]
    pub fn count(&self, kind: SiteKind) -> usize {
        self.sites.iter().filter(|site| site.kind == kind).count()
    }
}

/// The table is there but has none of the known layouts.
#[derive(Clone, Copy, Debug)]
struct Unreadable;

/// Where a table is, if it is there and not empty. Symbols are more exact than sections, which may be padded.
fn bounds(image: &Image, symbols: &SymbolTable, table: &Table) -> Option<Range<Gva>> {
    let (start, end) = table.bounds;
    let by_symbols = symbols.address(start).zip(symbols.address(end)).map(|(start, end)| start..end);
    let range = by_symbols.or_else(|| image.section(table.section).map(|section| section.range()))?;
    (range.start < range.end).then_some(range)
}

/// A place in a table: its first byte, its length, where it jumps to.
type Listed = (Gva, u8, Option<Gva>);

/// Reads a table with the first layout in which all of it makes sense. `None` if the image has no such table.
fn read_table(
    image: &Image,
    symbols: &SymbolTable,
    table: &Table,
) -> Option<Result<Vec<Listed>, Unreadable>> {
    let range = bounds(image, symbols, table)?;
    let len = usize::try_from(range.end.0 - range.start.0).ok()?;
    let Some(data) = image.read(range.start, len) else { return Some(Err(Unreadable)) };
    let found = table.layouts.iter().find_map(|layout| {
        if !len.is_multiple_of(layout.size) {
            return None;
        }
        let mut sites = Vec::new();
        for (index, entry) in data.chunks_exact(layout.size).enumerate() {
            match (layout.read)(image, range.start.offset((index * layout.size) as u64), entry)? {
                Entry::At(start, len) => sites.push((start, len, None)),
                Entry::Jump(start, len, target) => sites.push((start, len, Some(target))),
                Entry::Void => {}
            }
        }
        Some(sites)
    });
    Some(found.ok_or(Unreadable))
}

/// `len` bytes of code.
fn code(image: &Image, start: u64, len: u8) -> Option<Entry> {
    (len > 0 && image.is_code(Gva(start))).then_some(Entry::At(Gva(start), len))
}

/// The instruction at `start`.
fn instruction(image: &Image, start: u64) -> Option<Entry> {
    let bytes = image.read_up_to(Gva(start), MAX_INSTRUCTION)?;
    let instruction = Decoder::with_ip(64, bytes, start, DecoderOptions::NONE).decode();
    let len = u8::try_from(instruction.len()).ok().filter(|_| !instruction.is_invalid())?;
    code(image, start, len)
}

/// The instruction that the entry at `at` points to with its first word.
fn branch(image: &Image, at: Gva, entry: &[u8]) -> Option<Entry> {
    instruction(image, target(at, entry, 0)?)
}

/// The jump, or the nop in its place, at `start`.
fn jump(image: &Image, start: u64, target: Gva) -> Option<Entry> {
    match instruction(image, start)? {
        Entry::At(start, len) if image.is_code(target) => Some(Entry::Jump(start, len, target)),
        _ => None,
    }
}

/// What the self-relative 32-bit word at `offset` of the entry at `at` points to.
fn target(at: Gva, entry: &[u8], offset: usize) -> Option<u64> {
    Some(relative(at.0.wrapping_add(offset as u64), i32_at(entry, offset)?))
}

/// An alternative with its two lengths at `lengths`. Its replacement is code too, and no longer.
fn alternative(image: &Image, at: Gva, entry: &[u8], lengths: usize) -> Option<Entry> {
    let (len, replacement_len) = (*entry.get(lengths)?, *entry.get(lengths + 1)?);
    let replacement = Gva(target(at, entry, 4)?);
    if replacement_len > len || (replacement_len > 0 && !image.is_code(replacement)) {
        return None;
    }
    code(image, target(at, entry, 0)?, len)
}

/// An instruction that may fault, and where the kernel then goes on.
fn exception(image: &Image, at: Gva, entry: &[u8]) -> Option<Entry> {
    image.is_code(Gva(target(at, entry, 4)?)).then_some(())?;
    let start = Gva(target(at, entry, 0)?);
    // The length is of no interest; the kernel looks for the first byte.
    image.is_code(start).then_some(Entry::At(start, 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Guest;
    use crate::testing::{Kernel, TEXT, relative_words};

    /// A kernel whose text is nops, jumps and returns, with a table made from its address and the text's.
    fn with_table(section: &'static str, entries: impl Fn(u64) -> Vec<u8>) -> Guest {
        let mut kernel = Kernel::default();
        let mut code = vec![0x90; 32];
        // A jump of two bytes, one of five, a locked increment.
        code.extend([0xeb, 0x00, 0xe9, 0, 0, 0, 0, 0xf0, 0xff, 0x07, 0xc3]);
        kernel.function("f", &code);
        kernel.function("replacement", &[0x90; 32]);
        kernel.table(section, entries);
        Guest::new(Image::parse(kernel.build()).unwrap()).unwrap()
    }

    fn found(guest: &Guest, kind: SiteKind) -> Vec<(u64, u8)> {
        let all = guest.sites.overlapping(Gva(TEXT)..Gva(TEXT + 0x1000));
        all.filter(|site| site.kind == kind).map(|site| (site.start.0 - TEXT, site.len)).collect()
    }

    /// The replacement function's address: behind the first, aligned to 16.
    const REPLACEMENT: u64 = TEXT + 48;

    #[test]
    fn alternatives_of_every_layout_are_read() {
        let lengths: [(usize, &[u8]); 3] =
            [(12, &[0x34, 0x12, 5, 3]), (13, &[0x34, 0x12, 5, 3, 2]), (14, &[0x34, 0x12, 1, 0, 5, 3])];
        for (size, tail) in lengths {
            let guest = with_table(".altinstructions", |at| {
                let mut data = vec![];
                for index in 0..7 {
                    let targets = [TEXT + 2 * index, REPLACEMENT];
                    data.extend(relative_words(at + data.len() as u64, &targets));
                    data.extend(tail);
                }
                assert_eq!(data.len(), 7 * size);
                data
            });
            let expected: Vec<_> = (0..7).map(|index| (2 * index, 5)).collect();
            assert_eq!(found(&guest, SiteKind::Alternative), expected, "{size} bytes an entry");
            assert!(guest.sites.unreadable().is_empty());
        }
    }

    #[test]
    fn jump_labels_of_both_layouts_have_the_length_of_their_instruction() {
        let relative = with_table("__jump_table", |at| {
            let mut data = relative_words(at, &[TEXT + 32, TEXT]);
            data.extend(7u64.to_le_bytes());
            data.extend(relative_words(at + 16, &[TEXT + 34, TEXT]));
            data.extend(7u64.to_le_bytes());
            data
        });
        let absolute = with_table("__jump_table", |_| {
            [TEXT + 32, TEXT, 7, TEXT + 34, TEXT, 7]
                .iter()
                .flat_map(|word: &u64| word.to_le_bytes())
                .collect()
        });
        for guest in [relative, absolute] {
            assert_eq!(found(&guest, SiteKind::JumpLabel), [(32, 2), (34, 5)]);
            let targets: Vec<_> =
                guest.sites.overlapping(Gva(TEXT)..Gva(TEXT + 64)).map(|site| site.target).collect();
            assert_eq!(targets, [Some(Gva(TEXT)); 2]);
        }
    }

    #[test]
    fn tables_of_plain_pointers_are_read() {
        for (section, kind) in [
            (".retpoline_sites", SiteKind::Retpoline),
            (".return_sites", SiteKind::Return),
            (".ibt_endbr_seal", SiteKind::Endbr),
        ] {
            let guest = with_table(section, |at| relative_words(at, &[TEXT + 34, TEXT + 42]));
            assert_eq!(found(&guest, kind), [(34, 5), (42, 1)]);
        }
        let guest = with_table(".static_call_sites", |at| relative_words(at, &[TEXT + 34, TEXT]));
        assert_eq!(found(&guest, SiteKind::StaticCall), [(34, 5)]);
        let guest = with_table(".smp_locks", |at| {
            let mut data = relative_words(at, &[TEXT + 39]);
            data.resize(64, 0);
            data
        });
        assert_eq!(found(&guest, SiteKind::LockPrefix), [(39, 1)]);
        let guest = with_table(".parainstructions", |_| {
            let mut data = (TEXT + 4).to_le_bytes().to_vec();
            data.extend([12, 6, 0, 0, 0, 0, 0, 0]);
            data
        });
        assert_eq!(found(&guest, SiteKind::Paravirt), [(4, 6)]);
        let guest = with_table("__mcount_loc", |_| {
            [TEXT, 0, TEXT + 16].iter().flat_map(|word: &u64| word.to_le_bytes()).collect()
        });
        assert_eq!(found(&guest, SiteKind::Ftrace), [(0, 5), (16, 5)]);
        assert!(guest.sites.has_ftrace_table());
    }

    #[test]
    fn exception_entries_of_both_layouts_are_read() {
        let long =
            with_table("__ex_table", |at| relative_words(at, &[TEXT + 3, TEXT + 8, TEXT - 0x1000_0000]));
        let short = with_table("__ex_table", |at| relative_words(at, &[TEXT + 3, TEXT + 8]));
        for guest in [long, short] {
            assert!(guest.sites.has_exception_entry(Gva(TEXT + 3)));
            assert!(!guest.sites.has_exception_entry(Gva(TEXT + 8)));
        }
    }

    #[test]
    fn a_table_between_symbols_is_read_without_its_section() {
        let mut kernel = Kernel::default();
        kernel.function("f", &[0x90; 32]);
        kernel.table(".rodata.other", |at| {
            let mut data = relative_words(at, &[TEXT + 2, TEXT + 3]);
            data.resize(32, 0xff);
            data
        });
        let at = crate::testing::RODATA + 64;
        kernel.symbol("D__return_sites", at);
        kernel.symbol("D__return_sites_end", at + 8);
        let guest = Guest::new(Image::parse(kernel.build()).unwrap()).unwrap();
        assert_eq!(found(&guest, SiteKind::Return), [(2, 1), (3, 1)]);
    }

    #[test]
    fn a_table_of_no_known_layout_is_told() {
        let tables: [(&'static str, &[u8]); 4] = [
            (".altinstructions", &[0x11; 36]),
            (".return_sites", &[0x11; 6]),
            ("__jump_table", &[0x11; 48]),
            ("__ex_table", &[0x11; 24]),
        ];
        for (section, data) in tables {
            let guest = with_table(section, |_| data.to_vec());
            assert_eq!(guest.sites.unreadable(), [section]);
            let place = guest.place("f").unwrap();
            assert_eq!(place.notes, [crate::place::Note::UnreadableTable(section)]);
        }
    }

    #[test]
    fn overlapping_finds_a_site_by_any_of_its_bytes() {
        let guest = with_table(".retpoline_sites", |at| relative_words(at, &[TEXT + 34]));
        let hits = |start, end| guest.sites.overlapping(Gva(TEXT + start)..Gva(TEXT + end)).count();
        assert_eq!([hits(33, 34), hits(33, 35), hits(36, 37), hits(38, 40), hits(39, 40)], [0, 1, 1, 1, 0]);
    }
}
