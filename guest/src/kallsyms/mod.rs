//! Symbols from the compressed tables that a Linux kernel carries for its own use (CONFIG_KALLSYMS).
//!
//! A stock kernel has neither a symbol table nor a usable System.map, but these tables hold all its names. No header
//! points to them, so they are found by their structure. The parts, as the kernel's scripts/kallsyms.c writes them:
//!
//! ```text
//! token_table    256 zero-terminated strings, in the order of their codes
//! token_index    256 16-bit words: where each string begins in token_table
//! num_syms       how many symbols
//! names          per symbol: length, then that many token codes; the first character is nm's type letter
//! markers        the offset in `names` of every 256th symbol
//! offsets        per symbol: its address, see `addresses`
//! relative_base  what the offsets count from
//! ```
//!
//! Order and widths by version:
//!
//! | Linux | order | words |
//! |---|---|---|
//! | to 4.5 | addresses, num_syms, names, markers, token_table, token_index | 64-bit addresses, num_syms, markers |
//! | 4.6 | offsets, relative_base, num_syms, ... as before | 32-bit offsets |
//! | 4.20 | the same | 32-bit num_syms and markers |
//! | 6.1 | the same | a length above 127 takes two bytes, low seven bits first |
//! | 6.2 | seqs_of_names (3 bytes a symbol) behind markers | |
//! | 6.4 | num_syms, names, markers, token_table, token_index, offsets, relative_base, seqs_of_names | |
//! | 7.0 | the same without relative_base | aligned to 4 bytes, not 8; offsets relative to themselves |
//!
//! The search goes by what must hold between the parts, not by the version: the token index must describe the token
//! table, every marker must point at its name, the addresses must rise. Tables that only look like these are passed
//! over; if one passes the first checks and then fails, that is the error reported.

mod addresses;
mod names;
mod tokens;

use std::ops::Range;

use probe_core::Gva;

use crate::symbols::{SymbolKind, SymbolTable};
use addresses::Addresses;
use names::{Budget, Names};
use tokens::Tokens;

/// The most symbols that are believed. Stock kernels have a hundred to two hundred thousand.
const MAX_SYMBOLS: usize = 8 << 20;

/// How many token tables are tried. An image has one.
const MAX_TOKEN_TABLES: usize = 16;

/// The longest name, decompressed. KSYM_NAME_LEN is 512 since 6.1 and was 128.
const MAX_NAME: usize = 1024;

/// Why no symbols could be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KallsymsError {
    /// Nothing in the image looks like the tables.
    #[error(
        "The image has no kallsyms tables (CONFIG_KALLSYMS is off, or it is not Linux) and no ELF symbol table; give \
         addresses instead of names"
    )]
    NotFound,
    /// Tokens without names.
    #[error(
        "The kallsyms token table at {tokens} has no names that fit to it; the image is damaged, or its layout is \
         newer than this vmprobe knows"
    )]
    NoNames {
        /// Where the token table is.
        tokens: Gva,
    },
    /// Names without addresses.
    #[error(
        "The {count} kallsyms names at {names} have no addresses that rise and lie in the image; the image is \
         damaged, or its layout is newer than this vmprobe knows"
    )]
    NoAddresses {
        /// Where the names are.
        names: Gva,
        /// How many there are.
        count: usize,
    },
    /// A name that cannot be one.
    #[error("The kallsyms name number {index} (at {at}) {fault}; the image is damaged")]
    BadName {
        /// Its number, from 0.
        index: usize,
        /// Where its compressed form is.
        at: Gva,
        /// What is wrong with it.
        fault: NameFault,
    },
}

/// What can be wrong with a compressed name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameFault {
    /// Longer than any.
    #[error("is longer than {MAX_NAME} bytes")]
    TooLong,
    /// No letter first, or nothing behind it.
    #[error("does not have the form of a type letter and a name")]
    Form,
    /// All names together are too long.
    #[error("makes the names too long together")]
    TooMany,
}

/// A piece of the image: its bytes and where they are linked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block<'a> {
    pub data: &'a [u8],
    pub gva: Gva,
}

impl Block<'_> {
    fn gva_of(&self, offset: usize) -> Gva {
        self.gva.offset(offset as u64)
    }
}

/// Finds and decodes the tables in any of `blocks`.
///
/// `regions` are the image's sections; symbols end where they do. `is_mapped` tells whether an address is in the image.
///
/// # Errors
/// See [`KallsymsError`].
pub(crate) fn read(
    blocks: &[Block<'_>],
    regions: &[Range<Gva>],
    is_mapped: impl Fn(Gva) -> bool,
) -> Result<SymbolTable, KallsymsError> {
    let mut error = KallsymsError::NotFound;
    let budget = Budget::default();
    let candidates =
        blocks.iter().flat_map(|block| tokens::candidates(block.data).map(move |tokens| (*block, tokens)));
    for (block, tokens) in candidates.take(MAX_TOKEN_TABLES) {
        match decode(block, &tokens, regions, &is_mapped, &budget) {
            Ok(table) => return Ok(table),
            Err(found) if rank(&found) > rank(&error) => error = found,
            Err(_) => {}
        }
    }
    Err(error)
}

/// How far the search came before the error.
fn rank(error: &KallsymsError) -> u8 {
    match error {
        KallsymsError::NotFound => 0,
        KallsymsError::NoNames { .. } => 1,
        KallsymsError::NoAddresses { .. } => 2,
        KallsymsError::BadName { .. } => 3,
    }
}

fn decode(
    block: Block<'_>,
    tokens: &Tokens<'_>,
    regions: &[Range<Gva>],
    is_mapped: impl Fn(Gva) -> bool,
    budget: &Budget,
) -> Result<SymbolTable, KallsymsError> {
    let no_names = || KallsymsError::NoNames { tokens: block.gva_of(tokens.table_start) };
    let names = Names::find(block.data, tokens.table_start, budget).ok_or_else(no_names)?;
    let no_addresses = || KallsymsError::NoAddresses { names: block.gva_of(names.start), count: names.count };
    let addresses = Addresses::find(block, tokens, &names, is_mapped).ok_or_else(no_addresses)?;

    let mut table = SymbolTable::builder();
    let mut text = String::new();
    for (index, (offset, codes)) in names.iter(block.data).enumerate() {
        let bad = |fault| KallsymsError::BadName { index, at: block.gva_of(offset), fault };
        text.clear();
        for &code in codes {
            text.push_str(tokens.token(code));
            if text.len() > MAX_NAME {
                return Err(bad(NameFault::TooLong));
            }
        }
        let mut chars = text.chars();
        let kind = chars.next().filter(char::is_ascii_alphabetic).ok_or_else(|| bad(NameFault::Form))?;
        if chars.as_str().is_empty() {
            return Err(bad(NameFault::Form));
        }
        let gva = addresses.get(block, index).ok_or_else(no_addresses)?;
        table.push(chars, SymbolKind(kind), gva, 0).map_err(|_| bad(NameFault::TooMany))?;
    }
    Ok(table.build(regions))
}

#[cfg(test)]
pub(crate) mod synthetic;
#[cfg(test)]
mod tests;
