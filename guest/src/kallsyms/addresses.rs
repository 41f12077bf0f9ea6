//! The symbols' addresses.

use probe_core::Gva;

use super::Block;
use super::names::Names;
use super::tokens::Tokens;
use crate::bytes::{i32_at, relative, u32_at, u64_at};

/// How one symbol's address is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// 64-bit addresses.
    Absolute,
    /// 32-bit distances from a base.
    Base(u64),
    /// CONFIG_KALLSYMS_ABSOLUTE_PERCPU: a word that is not negative is an address near 0, in the per-CPU area; the
    /// complement of a negative one counts from a base.
    BaseOrPercpu(u64),
    /// 32-bit distances from the word itself.
    Relative,
}

/// An array of addresses, checked.
#[derive(Debug)]
pub struct Addresses {
    start: usize,
    encoding: Encoding,
}

impl Addresses {
    /// Finds the addresses that belong to `names`: before num_syms, or behind the token index. They must rise, and at
    /// least half of them must be in the image.
    pub fn find(
        block: Block<'_>,
        tokens: &Tokens<'_>,
        names: &Names,
        is_mapped: impl Fn(Gva) -> bool,
    ) -> Option<Self> {
        let count = names.count;
        let offset_bytes = (4 * count).next_multiple_of(8);
        let based = |start: usize, base_at: usize| {
            let base = u64_at(block.data, base_at)?;
            let negative =
                (0..count).any(|at| i32_at(block.data, start + 4 * at).is_some_and(|word| word < 0));
            let encoding = if negative { Encoding::BaseOrPercpu(base) } else { Encoding::Base(base) };
            Some(Addresses { start, encoding })
        };
        // Tables were aligned to 8 bytes when there was a base.
        let aligned = |at: usize| block.gva_of(at).0.next_multiple_of(8) - block.gva.0;
        let behind = usize::try_from(aligned(tokens.index_end)).ok()?;
        let absolute = |start| Addresses { start, encoding: Encoding::Absolute };
        let candidates = [
            // 4.6 to 6.3; the base is right before num_syms.
            names
                .count_start
                .checked_sub(8)
                .and_then(|base_at| based(base_at.checked_sub(offset_bytes)?, base_at)),
            // To 4.5, and later with CONFIG_KALLSYMS_BASE_RELATIVE off.
            names.count_start.checked_sub(8 * count).map(absolute),
            // 6.4 to 6.19.
            based(behind, behind + offset_bytes),
            Some(absolute(behind)),
            // 7.0.
            Some(Addresses { start: tokens.index_end, encoding: Encoding::Relative }),
        ];
        candidates.into_iter().flatten().find(|found| found.fit(block, count, &is_mapped))
    }

    /// The address of symbol number `index`.
    pub fn get(&self, block: Block<'_>, index: usize) -> Option<Gva> {
        let at = self.start + 4 * index;
        Some(Gva(match self.encoding {
            Encoding::Absolute => u64_at(block.data, self.start + 8 * index)?,
            // One that wraps around is no address: two absolute ones could be read so.
            Encoding::Base(base) => base.checked_add(u64::from(u32_at(block.data, at)?))?,
            Encoding::BaseOrPercpu(base) => match i32_at(block.data, at)? {
                word @ ..0 => base.checked_add(u64::from((!word).cast_unsigned()))?,
                word => u64::from(word.cast_unsigned()),
            },
            Encoding::Relative => relative(block.gva_of(at).0, i32_at(block.data, at)?),
        }))
    }

    fn fit(&self, block: Block<'_>, count: usize, is_mapped: impl Fn(Gva) -> bool) -> bool {
        let mut previous = Gva(0);
        let mut mapped = 0;
        for index in 0..count {
            match self.get(block, index) {
                Some(gva) if gva >= previous => previous = gva,
                _ => return false,
            }
            mapped += usize::from(is_mapped(previous));
        }
        mapped * 2 >= count
    }
}
