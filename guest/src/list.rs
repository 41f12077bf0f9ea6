//! What can be probed, for listing.

use probe_core::Gva;

use crate::Guest;
use crate::place::{Asked, PlaceError};
use crate::symbols::Symbol;

/// A symbol, and what a probe by its name would meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing<'a> {
    /// The symbol.
    pub symbol: Symbol<'a>,
    /// At how many addresses a symbol of this name stands. With more than one, a probe needs the address.
    pub same_name: usize,
    /// Where a probe on the symbol would be placed, or why it cannot be. It is behind the symbol where that begins with an
    /// ftrace site.
    pub probe: Result<Gva, PlaceError>,
}

/// A pattern that is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("The pattern {pattern:?} is wrong at character {at}: {reason}")]
pub struct PatternError {
    /// The pattern.
    pub pattern: String,
    /// Where, counted from 1.
    pub at: usize,
    /// What is wrong.
    pub reason: &'static str,
}

impl Guest {
    /// The symbols whose names match `pattern` (`*`, `?`, `[a-z]`, `[!a-z]`), by address; all of them if it is `None`.
    ///
    /// # Errors
    /// If the pattern is wrong.
    pub fn list(&self, pattern: Option<&str>) -> Result<impl Iterator<Item = Listing<'_>>, PatternError> {
        let pattern = pattern.map(glob::Pattern::new).transpose().map_err(|error| PatternError {
            pattern: pattern.unwrap_or_default().to_owned(),
            at: error.pos + 1,
            reason: error.msg,
        })?;
        let matching = self
            .symbols
            .iter()
            .filter(move |symbol| pattern.as_ref().is_none_or(|pattern| pattern.matches(symbol.name)));
        Ok(matching.map(|symbol| {
            let mut addresses: Vec<Gva> = self.symbols.lookup(symbol.name).map(|symbol| symbol.gva).collect();
            addresses.dedup();
            let probe = self.place_at(symbol.gva, Asked::Function, Some(symbol)).map(|place| place.gva);
            Listing { symbol, same_name: addresses.len(), probe }
        }))
    }
}
