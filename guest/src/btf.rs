//! Where the members of a kernel's structures are, from the type information in its image (Documentation/bpf/btf.rst).
//!
//! Only structures and their members are looked up; the data are read in place and never trusted.

use crate::bytes::{u16_at, u32_at};

const MAGIC: u16 = 0xeb9f;
/// `struct btf_type` without what follows it.
const TYPE_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;
const POINTER_BYTES: u64 = 8;
/// How many type definitions are followed to the type itself.
const MAX_CHAIN: usize = 32;

/// `BTF_KIND_*`.
mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// Why type information cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// Not BTF, or of another byte order.
    #[error("The image's type information (BTF) does not begin as such")]
    Magic,
    /// It ends early, or a count in it does not fit.
    #[error("The image's type information (BTF) is cut off or corrupt")]
    Corrupt,
}

/// A type, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TypeId(u32);

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its distance from the structure's start, bytes.
    pub offset: u64,
    /// Its type.
    pub type_id: TypeId,
}

/// The type information of one kernel.
#[derive(Clone, Copy)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
}

impl std::fmt::Debug for Btf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Btf").field("bytes", &(self.types.len() + self.strings.len())).finish()
    }
}

/// One record.
#[derive(Clone, Copy, Debug)]
struct Record {
    /// Where it begins in the type section.
    at: usize,
    name: u32,
    info: u32,
    /// Its size in bytes, or the type that it refers to.
    size_or_type: u32,
}

impl Record {
    fn kind(self) -> u32 {
        self.info >> 24 & 0x1f
    }

    fn count(self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// Bytes of the whole record.
    fn bytes(self) -> usize {
        let count = self.count();
        TYPE_BYTES
            + match self.kind() {
                kind::INT | kind::VAR | kind::DECL_TAG => 4,
                kind::ARRAY => 12,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => count * 12,
                kind::ENUM | kind::FUNC_PROTO => count * 8,
                _ => 0,
            }
    }

    fn is_structure(self) -> bool {
        matches!(self.kind(), kind::STRUCT | kind::UNION)
    }
}

impl<'a> Btf<'a> {
    /// Takes the contents of a `.BTF` section.
    ///
    /// # Errors
    /// [`BtfError`]
    pub fn new(data: &'a [u8]) -> Result<Self, BtfError> {
        if u16_at(data, 0) != Some(MAGIC) {
            return Err(BtfError::Magic);
        }
        let word = |at| u32_at(data, at).map(|word| word as usize).ok_or(BtfError::Corrupt);
        let header = word(4)?;
        let section = |offset: usize, len: usize| {
            let start = header.checked_add(offset)?;
            data.get(start..start.checked_add(len)?)
        };
        let types = section(word(8)?, word(12)?).ok_or(BtfError::Corrupt)?;
        let strings = section(word(16)?, word(20)?).ok_or(BtfError::Corrupt)?;
        Ok(Self { types, strings })
    }

    /// All records with their numbers, which count from 1; ends at the first one that is cut off.
    fn records(&self) -> impl Iterator<Item = (TypeId, Record)> + use<'a> {
        let types = self.types;
        let mut at = 0;
        (1..).map_while(move |number| {
            let record = Record {
                at,
                name: u32_at(types, at)?,
                info: u32_at(types, at + 4)?,
                size_or_type: u32_at(types, at + 8)?,
            };
            at += record.bytes();
            Some((TypeId(number), record))
        })
    }

    /// How many types there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.records().count()
    }

    fn record(&self, id: TypeId) -> Option<Record> {
        // Types are asked for a few times a run, so no table of a hundred thousand places is kept.
        self.records().find(|(found, _)| *found == id).map(|(_, record)| record)
    }

    fn name(&self, offset: u32) -> Option<&'a str> {
        let bytes = self.strings.get(offset as usize..)?;
        let len = bytes.iter().position(|byte| *byte == 0)?;
        str::from_utf8(bytes.get(..len)?).ok()
    }

    /// The structure of that name.
    #[must_use]
    pub fn structure(&self, name: &str) -> Option<TypeId> {
        let found = self
            .records()
            .find(|(_, record)| record.kind() == kind::STRUCT && self.name(record.name) == Some(name));
        found.map(|(id, _)| id)
    }

    /// The record behind names and qualifiers.
    fn bare(&self, mut id: TypeId) -> Option<Record> {
        for _ in 0..MAX_CHAIN {
            let record = self.record(id)?;
            match record.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = TypeId(record.size_or_type);
                }
                _ => return Some(record),
            }
        }
        None
    }

    /// Size of a type in bytes; `None` for a function, or what has none.
    #[must_use]
    pub fn size(&self, id: TypeId) -> Option<u64> {
        let record = self.bare(id)?;
        match record.kind() {
            kind::PTR => Some(POINTER_BYTES),
            kind::ARRAY => {
                let count = u32_at(self.types, record.at + TYPE_BYTES + 8)?;
                self.size(self.element(record)?)?.checked_mul(u64::from(count))
            }
            kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 => {
                Some(u64::from(record.size_or_type))
            }
            _ => None,
        }
    }

    fn element(&self, array: Record) -> Option<TypeId> {
        u32_at(self.types, array.at + TYPE_BYTES).map(TypeId)
    }

    /// The type of an array's elements.
    #[must_use]
    pub fn element_of(&self, id: TypeId) -> Option<TypeId> {
        self.bare(id).filter(|record| record.kind() == kind::ARRAY).and_then(|array| self.element(array))
    }

    /// The member of a structure or union by its name, also in one without a name inside it.
    #[must_use]
    pub fn member(&self, of: TypeId, name: &str) -> Option<Member> {
        self.member_within(of, name, MAX_CHAIN)
    }

    fn member_within(&self, of: TypeId, name: &str, depth: usize) -> Option<Member> {
        let record = self.bare(of).filter(|record| record.is_structure() && depth > 0)?;
        // With the kind flag a member's offset holds the width of a bit field in its top byte.
        let bits = if record.info >> 31 == 0 { u32::MAX } else { 0x00ff_ffff };
        let word = |index: usize, field: usize| {
            u32_at(self.types, record.at + TYPE_BYTES + index * MEMBER_BYTES + 4 * field)
        };
        for index in 0..record.count() {
            let (member_name, type_id) = (self.name(word(index, 0)?)?, TypeId(word(index, 1)?));
            let offset = u64::from(word(index, 2)? & bits) / 8;
            if member_name == name {
                return Some(Member { offset, type_id });
            }
            if member_name.is_empty()
                && let Some(inner) = self.member_within(type_id, name, depth - 1)
            {
                return Some(Member { offset: offset + inner.offset, ..inner });
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type information in the making.
    #[derive(Default)]
    struct Builder {
        types: Vec<u8>,
        strings: Vec<u8>,
        count: u32,
    }

    impl Builder {
        fn name(&mut self, name: &str) -> u32 {
            if self.strings.is_empty() {
                self.strings.push(0);
            }
            if name.is_empty() {
                return 0;
            }
            let at = u32::try_from(self.strings.len()).unwrap();
            self.strings.extend(name.as_bytes());
            self.strings.push(0);
            at
        }

        fn add(&mut self, name: &str, info: u32, size_or_type: u32, rest: &[u32]) -> u32 {
            let name = self.name(name);
            for word in [name, info, size_or_type].into_iter().chain(rest.iter().copied()) {
                self.types.extend(word.to_le_bytes());
            }
            self.count += 1;
            self.count
        }

        fn structure(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
            let members: Vec<u32> = members
                .iter()
                .flat_map(|(name, type_id, offset)| [self.name(name), *type_id, offset * 8])
                .collect();
            let count = u32::try_from(members.len() / 3).unwrap();
            self.add(name, kind::STRUCT << 24 | count, size, &members)
        }

        fn build(&self) -> Vec<u8> {
            let mut data = Vec::new();
            data.extend(MAGIC.to_le_bytes());
            data.extend([1, 0]);
            let types = u32::try_from(self.types.len()).unwrap();
            for word in [24, 0, types, types, u32::try_from(self.strings.len()).unwrap()] {
                data.extend(word.to_le_bytes());
            }
            data.extend(&self.types);
            data.extend(&self.strings);
            data
        }
    }

    fn example() -> Vec<u8> {
        let mut btf = Builder::default();
        let long = btf.add("long", kind::INT << 24, 8, &[64]);
        let pointer = btf.add("", kind::PTR << 24, long, &[]);
        let alias = btf.add("word", kind::TYPEDEF << 24, long, &[]);
        btf.add("colour", kind::ENUM << 24 | 2, 4, &[0, 0, 0, 1]);
        btf.add("", kind::FUNC_PROTO << 24 | 1, 0, &[0, 1]);
        let inner = btf.structure("", 16, &[("hidden", long, 0), ("behind", pointer, 8)]);
        let part = btf.structure("part", 24, &[("base", pointer, 0), ("size", alias, 16)]);
        let array = btf.add("", kind::ARRAY << 24, 0, &[part, long, 7]);
        btf.structure("whole", 300, &[("", inner, 8), ("parts", array, 100), ("last", alias, 292)]);
        btf.build()
    }

    #[test]
    fn members_are_found_also_in_nameless_structures() {
        let data = example();
        let btf = Btf::new(&data).unwrap();
        let whole = btf.structure("whole").unwrap();
        assert_eq!(btf.size(whole), Some(300));
        assert_eq!(btf.member(whole, "behind").map(|member| member.offset), Some(16));
        assert_eq!(btf.member(whole, "last").and_then(|member| btf.size(member.type_id)), Some(8));
        assert_eq!(btf.member(whole, "absent"), None);
        assert_eq!(btf.structure("word"), None, "a name of another kind");
    }

    #[test]
    fn arrays_of_structures_are_seen_through() {
        let data = example();
        let btf = Btf::new(&data).unwrap();
        let parts = btf.member(btf.structure("whole").unwrap(), "parts").unwrap();
        assert_eq!((parts.offset, btf.size(parts.type_id)), (100, Some(7 * 24)));
        let part = btf.element_of(parts.type_id).unwrap();
        assert_eq!(btf.member(part, "size").map(|member| member.offset), Some(16));
        assert_eq!(btf.element_of(part), None);
    }

    #[test]
    fn damaged_information_is_an_error_or_has_no_answer() {
        let data = example();
        assert_eq!(Btf::new(&data[1..]).err(), Some(BtfError::Magic));
        assert_eq!(Btf::new(&data[..30]).err(), Some(BtfError::Corrupt));
        for at in 0..data.len() {
            let mut damaged = data.clone();
            damaged[at] ^= 0xff;
            let Ok(btf) = Btf::new(&damaged) else { continue };
            for name in ["whole", "part"] {
                if let Some(id) = btf.structure(name) {
                    let parts = btf.member(id, "parts").map(|member| btf.size(member.type_id));
                    let _ = (btf.member(id, "behind"), parts);
                }
            }
        }
    }

    #[test]
    fn a_type_that_refers_to_itself_has_no_size() {
        let mut btf = Builder::default();
        btf.add("loop", kind::TYPEDEF << 24, 1, &[]);
        btf.structure("inside", 8, &[("", 2, 0)]);
        btf.add("", kind::ARRAY << 24, 0, &[3, 3, 2]);
        let data = btf.build();
        let btf = Btf::new(&data).unwrap();
        assert_eq!(btf.size(TypeId(1)), None);
        assert_eq!(btf.member(btf.structure("inside").unwrap(), "x"), None);
    }
}
