//! Symbols by name and by address.
//!
//! All names share one string, and an entry is 24 bytes, so that the hundred thousand symbols of a stock kernel take a
//! few megabytes.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ops::Range;

use probe_core::Gva;

/// A symbol's type, as nm's letter: T is code, D data, R read-only data, B zero-initialised data, A absolute, W and V
/// weak; lower case if local.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SymbolKind(pub char);

impl SymbolKind {
    /// Whether the symbol stands for code. Assembler labels in text do, as well as functions.
    #[must_use]
    pub fn is_code(self) -> bool {
        matches!(self.0, 'T' | 't' | 'W' | 'w')
    }

    fn is_global(self) -> bool {
        self.0.is_ascii_uppercase()
    }
}

/// A symbol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Symbol<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its address.
    pub gva: Gva,
    /// Its size in bytes: what the ELF symbol table says, else the distance to the next symbol or the end of the
    /// section. 0 if it is in no section, as per-CPU variables are not.
    pub size: u64,
    /// Its type.
    pub kind: SymbolKind,
}

impl Symbol<'_> {
    /// The addresses it covers.
    #[must_use]
    pub fn range(&self) -> Range<Gva> {
        self.gva..self.gva.offset(self.size)
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    gva: u64,
    size: u32,
    name: u32,
    name_len: u16,
    /// nm's letter, which is ASCII.
    kind: u8,
}

/// The symbols of an image.
#[derive(Debug, Default)]
pub struct SymbolTable {
    names: String,
    /// Sorted by address; symbols at one address are in the order in which they were read.
    entries: Vec<Entry>,
    /// Indices into `entries`, sorted by name, then address.
    by_name: Vec<u32>,
}

/// The most bytes that all names of an image may have together. A stock kernel's are 3 MiB; a hostile file can let a few
/// of its own bytes stand for many symbols' names.
const MAX_NAMES: usize = 256 << 20;

/// The names are longer together than [`MAX_NAMES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TooManyNames;

/// Collects symbols for a [`SymbolTable`].
#[derive(Debug, Default)]
pub(crate) struct Builder {
    table: SymbolTable,
}

impl Builder {
    /// Adds a symbol; `size` 0 if it is not known. A name is cut at 64 KiB.
    pub fn push(
        &mut self,
        name: impl IntoIterator<Item = char>,
        kind: SymbolKind,
        gva: Gva,
        size: u32,
    ) -> Result<(), TooManyNames> {
        let start = self.table.names.len();
        self.table.names.extend(name);
        let mut end = self.table.names.len().min(start + usize::from(u16::MAX));
        while !self.table.names.is_char_boundary(end) {
            end -= 1;
        }
        self.table.names.truncate(end);
        let name = u32::try_from(start).ok().filter(|_| end <= MAX_NAMES).ok_or(TooManyNames)?;
        let name_len = u16::try_from(end - start).map_err(|_| TooManyNames)?;
        let kind = u8::try_from(kind.0).unwrap_or(b'?');
        self.table.entries.push(Entry { gva: gva.0, size, name, name_len, kind });
        Ok(())
    }

    /// Sorts, and gives every symbol without a size that is in one of `regions` the distance to the next symbol or to the
    /// end of the region, whichever is nearer. `regions` are sorted by start.
    pub fn build(mut self, regions: &[Range<Gva>]) -> SymbolTable {
        let table = &mut self.table;
        table.names.shrink_to_fit();
        table.entries.shrink_to_fit();
        table.entries.sort_by_key(|entry| entry.gva);
        let mut next = None;
        let mut following = None;
        for entry in table.entries.iter_mut().rev() {
            if following != Some(entry.gva) {
                next = following;
                following = Some(entry.gva);
            }
            if entry.size == 0 {
                let behind = regions.partition_point(|region| region.start.0 <= entry.gva);
                let region = behind.checked_sub(1).and_then(|at| regions.get(at));
                let region_end = region.map(|region| region.end.0).filter(|end| *end > entry.gva);
                let end = region_end.map(|end| next.map_or(end, |next: u64| next.min(end)));
                entry.size = end.map_or(0, |end| u32::try_from(end - entry.gva).unwrap_or(u32::MAX));
            }
        }
        let count = u32::try_from(table.entries.len()).unwrap_or(u32::MAX);
        let mut by_name: Vec<u32> = (0..count).collect();
        let key = |&at: &u32| (table.name(&table.entries[at as usize]), table.entries[at as usize].gva);
        by_name.sort_unstable_by(|a, b| key(a).cmp(&key(b)));
        table.by_name = by_name;
        self.table
    }
}

impl SymbolTable {
    pub(crate) fn builder() -> Builder {
        Builder::default()
    }

    fn name(&self, entry: &Entry) -> &str {
        let start = entry.name as usize;
        &self.names[start..start + usize::from(entry.name_len)]
    }

    fn symbol(&self, entry: &Entry) -> Symbol<'_> {
        Symbol {
            name: self.name(entry),
            gva: Gva(entry.gva),
            size: u64::from(entry.size),
            kind: SymbolKind(char::from(entry.kind)),
        }
    }

    /// How many symbols there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Bytes of memory that the table holds.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.names.capacity()
            + self.entries.capacity() * size_of::<Entry>()
            + self.by_name.capacity() * size_of::<u32>()
    }

    /// All symbols by address.
    pub fn iter(&self) -> impl Iterator<Item = Symbol<'_>> {
        self.entries.iter().map(|entry| self.symbol(entry))
    }

    /// All symbols of that name, by address.
    pub fn lookup<'a>(&'a self, name: &'a str) -> impl Iterator<Item = Symbol<'a>> {
        let entry = |at: u32| &self.entries[at as usize];
        let start = self.by_name.partition_point(|&at| self.name(entry(at)) < name);
        self.by_name[start..]
            .iter()
            .map(move |&at| self.symbol(entry(at)))
            .take_while(move |symbol| symbol.name == name)
    }

    /// The address of the only symbol of that name.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<Gva> {
        let mut found = self.lookup(name);
        let first = found.next()?;
        found.all(|other| other.gva == first.gva).then_some(first.gva)
    }

    /// The symbol that covers `gva` and begins nearest to it, and the distance from its start. Of several at one address,
    /// code comes before data and global before local.
    #[must_use]
    pub fn at(&self, gva: Gva) -> Option<(Symbol<'_>, u64)> {
        let behind = self.entries.partition_point(|entry| entry.gva <= gva.0);
        let start = self.entries[..behind].last()?.gva;
        let first = self.entries[..behind].partition_point(|entry| entry.gva < start);
        let offset = gva.0 - start;
        let covers = |symbol: &Symbol<'_>| offset == 0 || offset < symbol.size;
        self.entries[first..behind]
            .iter()
            .map(|entry| self.symbol(entry))
            .filter(covers)
            .min_by_key(|symbol| Reverse((symbol.kind.is_code(), symbol.kind.is_global())))
            .map(|symbol| (symbol, offset))
    }

    /// Up to `count` names like `wanted`, the likeliest first: the same with a compiler's suffix (`.isra.0`, `.part.0`,
    /// `.constprop.0`, `.cold`), then by edit distance, no further than a third of the name.
    #[must_use]
    pub fn nearest(&self, wanted: &str, count: usize) -> Vec<&str> {
        let wanted_stem = stem(wanted);
        let wanted_len = wanted_stem.chars().count();
        let furthest = (wanted_len / 3).max(1);
        let mut seen = HashSet::new();
        let mut found: Vec<(usize, bool, &str)> = Vec::new();
        for &at in &self.by_name {
            let entry = &self.entries[at as usize];
            let name = self.name(entry);
            let name_stem = stem(name);
            // Bytes bound characters from above, so this drops nothing that is near.
            if name_stem.len().abs_diff(wanted_stem.len()) > furthest * 4 || !seen.insert(name) {
                continue;
            }
            if name_stem.is_ascii() && name_stem.len().abs_diff(wanted_len) > furthest {
                continue;
            }
            let distance = strsim::osa_distance(wanted_stem, name_stem);
            if distance <= furthest {
                found.push((distance, !SymbolKind(char::from(entry.kind)).is_code(), name));
            }
        }
        found.sort_unstable();
        found.into_iter().map(|(_, _, name)| name).take(count).collect()
    }
}

/// A name without what the compiler appends to clones and parts of a function.
fn stem(name: &str) -> &str {
    // A leading dot is no suffix.
    match name.char_indices().skip(1).find(|(_, char)| *char == '.') {
        Some((at, _)) => &name[..at],
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(symbols: &[(&str, char, u64, u32)], regions: &[Range<Gva>]) -> SymbolTable {
        let mut builder = SymbolTable::builder();
        for (name, kind, gva, size) in symbols {
            builder.push(name.chars(), SymbolKind(*kind), Gva(*gva), *size).unwrap();
        }
        builder.build(regions)
    }

    #[test]
    fn sizes_reach_to_the_next_symbol_or_the_end_of_the_section() {
        let table = table(
            &[("b", 't', 0x1010, 0), ("a", 'T', 0x1000, 0), ("alias", 't', 0x1000, 0), ("d", 'D', 0x3000, 0)],
            &[Gva(0x1000)..Gva(0x1080), Gva(0x3000)..Gva(0x3004)],
        );
        let sizes: Vec<_> = table.iter().map(|symbol| (symbol.name, symbol.size)).collect();
        assert_eq!(sizes, [("a", 0x10), ("alias", 0x10), ("b", 0x70), ("d", 4)]);
    }

    #[test]
    fn a_symbol_outside_every_region_has_no_size() {
        let table = table(&[("x", 'A', 0x10, 0), ("y", 'A', 0x18, 0)], &[]);
        assert!(table.iter().all(|symbol| symbol.size == 0));
        assert_eq!(table.at(Gva(0x11)), None);
    }

    #[test]
    fn lookup_finds_none_one_or_several() {
        let table = table(&[("f", 't', 0x20, 0), ("g", 't', 0x30, 0), ("f", 't', 0x10, 0)], &[]);
        let found = |name| table.lookup(name).map(|symbol| symbol.gva.0).collect::<Vec<_>>();
        assert_eq!(found("f"), [0x10, 0x20]);
        assert_eq!(found("g"), [0x30]);
        assert!(found("h").is_empty());
        assert_eq!(table.address("g"), Some(Gva(0x30)));
        assert_eq!(table.address("f"), None);
    }

    #[test]
    fn at_prefers_global_code_and_respects_sizes() {
        let table = table(
            &[
                ("label", 'd', 0x10, 0),
                ("local", 't', 0x10, 4),
                ("global", 'T', 0x10, 4),
                ("next", 'T', 0x20, 1),
            ],
            &[Gva(0)..Gva(0x30)],
        );
        let at = |gva| table.at(Gva(gva)).map(|(symbol, offset)| (symbol.name, offset));
        assert_eq!(at(0x0f), None);
        assert_eq!(at(0x10), Some(("global", 0)));
        assert_eq!(at(0x13), Some(("global", 3)));
        // Beyond the ELF size of the functions the unsized label still covers the padding.
        assert_eq!(at(0x14), Some(("label", 4)));
        assert_eq!(at(0x20), Some(("next", 0)));
        assert_eq!(at(0x21), None);
    }

    #[test]
    fn nearest_knows_typing_errors_and_suffixes() {
        let table = table(
            &[
                ("vfs_read", 'T', 1, 0),
                ("vfs_readv", 't', 2, 0),
                ("vfs_write", 'T', 3, 0),
                ("inet_csk_accept", 'T', 4, 0),
                ("tcp_check.isra.0", 't', 5, 0),
                ("tcp_check.isra.0", 't', 6, 0),
                ("vfs_raed", 'd', 7, 0),
            ],
            &[],
        );
        assert_eq!(table.nearest("vfs_raed", 3), ["vfs_raed", "vfs_read", "vfs_readv"]);
        assert_eq!(table.nearest("tnet_csk_accept", 3), ["inet_csk_accept"]);
        assert_eq!(table.nearest("tcp_check", 3), ["tcp_check.isra.0"]);
        assert!(table.nearest("unlike_anything_here", 3).is_empty());
        assert!(table.nearest("", 3).is_empty());
    }

    #[test]
    fn a_name_of_many_bytes_is_cut_at_a_character() {
        let mut builder = SymbolTable::builder();
        builder.push(std::iter::repeat_n('é', 40_000), SymbolKind('T'), Gva(1), 0).unwrap();
        builder.push("next".chars(), SymbolKind('T'), Gva(2), 0).unwrap();
        let table = builder.build(&[]);
        let lengths: Vec<_> = table.iter().map(|symbol| symbol.name.len()).collect();
        assert_eq!(lengths, [65_534, 4]);
    }
}
