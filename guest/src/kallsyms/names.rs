//! The compressed names and the markers into them.

use std::cell::Cell;
use std::ops::RangeInclusive;

use super::MAX_SYMBOLS;
use crate::bytes::{u32_at, u64_at};

/// Every so manyth name has a marker.
const PER_MARKER: usize = 256;

/// Bytes of a compressed name with its length: at least a length and one code, at most a two-byte length and 511 codes
/// (KSYM_NAME_LEN less its zero).
const NAME_BYTES: RangeInclusive<usize> = 2..=513;

/// How many names, and places where names could begin, may be looked at while searching. A stock kernel's names are found at the first attempt; a hostile image
/// can be full of places that look right until the last name.
#[derive(Debug)]
pub struct Budget(Cell<usize>);

impl Default for Budget {
    fn default() -> Self {
        Budget(Cell::new(4 * MAX_SYMBOLS))
    }
}

impl Budget {
    /// Takes one from the budget; false if none is left.
    fn take(&self) -> bool {
        let left = self.0.get().checked_sub(1);
        self.0.set(left.unwrap_or(0));
        left.is_some()
    }
}

/// Where the names are. Every marker has been compared with the name it points to.
#[derive(Debug, PartialEq, Eq)]
pub struct Names {
    /// Offset of num_syms in the block.
    pub count_start: usize,
    /// Offset of the first name.
    pub start: usize,
    /// How many names.
    pub count: usize,
}

/// An array of markers, not yet compared with names.
#[derive(Debug)]
struct Markers {
    /// Offset of the first.
    start: usize,
    /// 4 or 8 bytes each.
    width: usize,
    /// How many.
    len: usize,
}

impl Markers {
    fn get(&self, data: &[u8], at: usize) -> Option<usize> {
        marker(data, self.start + at * self.width, self.width)
    }
}

impl Names {
    /// Finds the names before the token table, with its markers between the two.
    pub fn find(data: &[u8], token_table: usize, budget: &Budget) -> Option<Self> {
        let adjacent = markers_before(data, token_table);
        adjacent
            .chain(markers_before_seqs(data, token_table))
            .find_map(|markers| before(data, &markers, budget))
    }

    /// Each name's offset in `data` and its token codes.
    pub fn iter<'a>(&self, data: &'a [u8]) -> impl Iterator<Item = (usize, &'a [u8])> {
        let mut at = self.start;
        (0..self.count).map_while(move |_| {
            let (codes, next) = name(data, at)?;
            let offset = at;
            at = next;
            Some((offset, codes))
        })
    }
}

/// The codes of the name at `at`, and the offset behind it.
fn name(data: &[u8], at: usize) -> Option<(&[u8], usize)> {
    let first = usize::from(*data.get(at)?);
    let (len, start) = if first & 0x80 == 0 {
        (first, at + 1)
    } else {
        ((first & 0x7f) | usize::from(*data.get(at + 1)?) << 7, at + 2)
    };
    let codes = data.get(start..start.checked_add(len)?)?;
    (!codes.is_empty()).then_some((codes, start + len))
}

fn marker(data: &[u8], at: usize, width: usize) -> Option<usize> {
    match width {
        4 => usize::try_from(u32_at(data, at)?).ok(),
        _ => usize::try_from(u64_at(data, at)?).ok(),
    }
}

/// Whether a marker can follow another: 256 names lie between them.
fn follows(previous: usize, next: usize) -> bool {
    let step = next.wrapping_sub(previous);
    (PER_MARKER * NAME_BYTES.start()..=PER_MARKER * NAME_BYTES.end()).contains(&step)
}

/// Markers that end at `end`, or before padding there. They are read backwards, down to the first, which is 0.
fn markers_before(data: &[u8], end: usize) -> impl Iterator<Item = Markers> {
    [(4, 0), (4, 4), (8, 0)].into_iter().filter_map(move |(width, padding)| {
        let mut at = end.checked_sub(padding)?;
        let mut later: Option<usize> = None;
        for len in 1..=MAX_SYMBOLS / PER_MARKER {
            at = at.checked_sub(width)?;
            let value = marker(data, at, width)?;
            if later.is_some_and(|later| !follows(value, later)) {
                return None;
            }
            if value == 0 {
                return Some(Markers { start: at, width, len });
            }
            later = Some(value);
        }
        None
    })
}

/// Markers before an array of 3-byte numbers, one per symbol, that ends at `end` (Linux 6.2 and 6.3). Neither array says
/// how long it is, but both lengths follow from the number of symbols.
fn markers_before_seqs(data: &[u8], end: usize) -> impl Iterator<Item = Markers> {
    const SEQ: usize = 3;
    (1..=MAX_SYMBOLS)
        .map_while(move |count| {
            let len = count.div_ceil(PER_MARKER);
            let start = end.checked_sub((count * SEQ).next_multiple_of(8) + (len * 4).next_multiple_of(8))?;
            Some(Markers { start, width: 4, len })
        })
        .filter(move |markers| {
            // The first marker is 0 and the second already says that 256 names lie between: nearly nothing passes.
            markers.get(data, 0) == Some(0)
                && (1..markers.len).all(|at| {
                    markers.get(data, at - 1).zip(markers.get(data, at)).is_some_and(|(a, b)| follows(a, b))
                })
        })
}

/// The names that end before `markers`, or before padding there, and that all markers point to.
fn before(data: &[u8], markers: &Markers, budget: &Budget) -> Option<Names> {
    let last = markers.get(data, markers.len - 1)?;
    let (least, most) = (*NAME_BYTES.start(), PER_MARKER * NAME_BYTES.end() + 8);
    let latest = markers.start.checked_sub(last + least)?;
    let earliest = markers.start.saturating_sub(last + most);
    let starts = (earliest..=latest).rev().filter(|start| start % 4 == markers.start % 4);
    starts.take_while(|_| budget.take()).find_map(|start| {
        // num_syms is a 64-bit word, or a 32-bit word padded to 8 bytes, or one that is not.
        let wide = start.checked_sub(8).and_then(|at| Some((at, usize::try_from(u64_at(data, at)?).ok()?)));
        let narrow = start.checked_sub(4).and_then(|at| Some((at, usize::try_from(u32_at(data, at)?).ok()?)));
        let (count_start, count) = [wide, narrow]
            .into_iter()
            .flatten()
            .find(|(_, count)| *count <= MAX_SYMBOLS && count.div_ceil(PER_MARKER) == markers.len)?;
        let names = Names { count_start, start, count };
        fit(data, &names, markers, budget).then_some(names)
    })
}

/// Whether the names end at the markers, and every marker is the offset of its name.
fn fit(data: &[u8], names: &Names, markers: &Markers, budget: &Budget) -> bool {
    let mut at = names.start;
    for index in 0..names.count {
        if index % PER_MARKER == 0 && markers.get(data, index / PER_MARKER) != Some(at - names.start) {
            return false;
        }
        match name(data, at) {
            Some((_, next)) if next <= markers.start && budget.take() => at = next,
            _ => return false,
        }
    }
    let padding = &data[at..markers.start];
    padding.len() < 8 && padding.iter().all(|byte| *byte == 0)
}
