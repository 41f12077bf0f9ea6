//! What can be probed, for listing.

use probe_core::Gva;

use crate::Guest;
use crate::place::{Asked, Place, PlaceError};
use crate::spec::{Location, Spec};
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

    /// What `spec` stands for if its symbol is a pattern: each function whose name matches once, by address, as the spec
    /// for it alone, with its place or why it has none. Nothing if it is no pattern, or one of a module.
    #[must_use]
    pub fn matches(&self, spec: &Spec) -> Vec<(Spec, Result<Place, PlaceError>)> {
        let (Some(pattern), Location::Symbol { module: None, offset, .. }) = (spec.pattern(), &spec.place)
        else {
            return Vec::new();
        };
        let mut functions: Vec<Symbol<'_>> = Vec::new();
        let matching = |symbol: &Symbol<'_>| symbol.kind.is_code() && pattern.matches(symbol.name);
        for symbol in self.symbols.iter().filter(matching) {
            match functions.last_mut() {
                // Another name of the same function: the better known one.
                Some(last) if last.gva == symbol.gva => {
                    if self.symbols.at(symbol.gva).is_some_and(|(best, _)| best == symbol) {
                        *last = symbol;
                    }
                }
                _ => functions.push(symbol),
            }
        }
        let one = |symbol: Symbol<'_>| {
            let place = Location::Symbol { module: None, name: symbol.name.to_owned(), offset: *offset };
            let one = Spec { place, ..spec.clone() };
            let place = self.place_in(symbol, *offset, &one);
            (one, place)
        };
        functions.into_iter().map(one).collect()
    }
}
