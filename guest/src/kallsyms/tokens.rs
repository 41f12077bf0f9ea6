//! The token table and its index.

use crate::bytes::u16_at;

/// How many tokens there are: one per byte value.
const TOKENS: usize = 256;

/// Bytes of the token index.
const INDEX_BYTES: usize = 2 * TOKENS;

/// The longest token. A token is part of a name.
const MAX_TOKEN: usize = super::MAX_NAME;

/// A token table that its index describes.
#[derive(Debug)]
pub struct Tokens<'a> {
    /// Offset of the table in the block.
    pub table_start: usize,
    /// Offset of the first byte behind the index.
    pub index_end: usize,
    tokens: Vec<&'a str>,
}

impl<'a> Tokens<'a> {
    /// The text that a code stands for.
    pub fn token(&self, code: u8) -> &'a str {
        // There are 256 tokens, so every code has one.
        self.tokens.get(usize::from(code)).copied().unwrap_or_default()
    }
}

/// All token tables in `data`. The work is linear in its size.
pub fn candidates(data: &[u8]) -> impl Iterator<Item = Tokens<'_>> {
    index_candidates(data).filter_map(move |index_start| {
        let index: Vec<usize> =
            (0..TOKENS).map_while(|at| u16_at(data, index_start + 2 * at)).map(usize::from).collect();
        // Between table and index is at most the padding to the next multiple of 8.
        let last = *index.last()?;
        let latest = index_start.checked_sub(last + 1)?;
        let earliest = latest.saturating_sub(MAX_TOKEN + 8);
        (earliest..=latest).rev().filter(|start| start % 4 == index_start % 4).find_map(|table_start| {
            let tokens = table(&data[table_start..index_start], &index)?;
            Some(Tokens { table_start, index_end: index_start + INDEX_BYTES, tokens })
        })
    })
}

/// Offsets at which 256 rising words begin with a zero.
fn index_candidates(data: &[u8]) -> impl Iterator<Item = usize> {
    let last = data.len().saturating_sub(INDEX_BYTES - 1);
    (0..last).step_by(4).filter(move |&start| {
        // Nearly every place fails at the first word; a run of rising words has no zero but its first, so no byte is
        // looked at more than a few times.
        let words = data[start..start + INDEX_BYTES].chunks_exact(2);
        let mut words = words.map(|word| u16::from_le_bytes([word[0], word[1]]));
        words.next() == Some(0)
            && words.try_fold(0, |previous, word| (word > previous).then_some(word)).is_some()
    })
}

/// The tokens of `table`, if its strings begin where `index` says, and after the last comes only padding.
fn table<'a>(table: &'a [u8], index: &[usize]) -> Option<Vec<&'a str>> {
    let last = *index.last()?;
    let last_len = table.get(last..)?.iter().position(|byte| *byte == 0)?;
    let end = last + last_len + 1;
    if table.len() - end >= 8 || table[end..].iter().any(|byte| *byte != 0) {
        return None;
    }
    let mut tokens = Vec::with_capacity(TOKENS);
    let mut some = false;
    for (at, start) in index.iter().enumerate() {
        let next = index.get(at + 1).copied().unwrap_or(end);
        let (terminator, token) = table.get(*start..next)?.split_last()?;
        if *terminator != 0 || !token.iter().all(u8::is_ascii_graphic) {
            return None;
        }
        some |= !token.is_empty();
        tokens.push(std::str::from_utf8(token).ok()?);
    }
    // Zeros followed by the numbers 0 to 255 are no token table.
    some.then_some(tokens)
}
