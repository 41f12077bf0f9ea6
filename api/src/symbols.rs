//! `vmprobe symbols`: what can be probed in an image.

use std::io::{self, Write};

use guest::Guest;
use guest::list::Listing;
use probe_core::Gva;
use serde::Serialize;

use crate::cli::{Output, SymbolsArgs, WhichSymbols};
use crate::contract::{Symbol, SymbolKind};
use crate::exit::{Code, Failure};
use crate::images::{self, Opened, chain};
use crate::output::{Hex, closed, json_lines};

#[derive(Serialize)]
struct Line<'a> {
    address: Hex,
    size: u64,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe: Option<Hex>,
    #[serde(skip_serializing_if = "str::is_empty")]
    refused: &'a str,
}

pub fn symbols(args: &SymbolsArgs) -> Result<Code, Failure> {
    let Opened { guest, .. } = images::open(&args.image)?;
    show(list(&guest, args.which.glob.as_deref())?, &args.which, args.output)?;
    Ok(Code::Done)
}

/// The symbols whose names match, by address; all of them without a pattern.
///
/// # Errors
/// The pattern is wrong.
pub fn list<'a>(
    guest: &'a Guest,
    pattern: Option<&'a str>,
) -> Result<impl Iterator<Item = Symbol> + 'a, Failure> {
    let list = guest.list(pattern).map_err(|error| Failure::Usage(error.to_string()))?;
    Ok(list.map(|listing| symbol(&listing)))
}

fn symbol(listing: &Listing<'_>) -> Symbol {
    let kind = if listing.symbol.kind.is_code() { SymbolKind::Code } else { SymbolKind::Data };
    Symbol {
        name: listing.symbol.name.to_owned(),
        address: listing.symbol.gva.0,
        size: listing.symbol.size,
        kind: kind.into(),
        probe_address: listing.probe.as_ref().ok().map(|gva| gva.0),
        refused: listing.probe.as_ref().err().map(|error| chain(error)).unwrap_or_default(),
        same_name: u32::try_from(listing.same_name).unwrap_or(u32::MAX),
    }
}

/// Prints those of the symbols that are code, since data has no instruction to probe.
pub fn show(
    symbols: impl Iterator<Item = Symbol>,
    which: &WhichSymbols,
    output: Output,
) -> Result<(), Failure> {
    let shown =
        |one: &Symbol| one.kind() == SymbolKind::Code && (!which.probeable || one.probe_address.is_some());
    let mut list = symbols.filter(shown);
    if which.specs {
        return specs(list).map_err(|error| closed(&error));
    }
    match output {
        Output::Json => {
            let list: Vec<Symbol> = list.collect();
            json_lines(list.iter().map(|one| Line {
                address: Hex(one.address),
                size: one.size,
                name: &one.name,
                probe: one.probe_address.map(Hex),
                refused: &one.refused,
            }))
        }
        Output::Text => {
            let mut out = io::BufWriter::new(io::stdout().lock());
            list.try_for_each(|one| text(&mut out, &one))
                .and_then(|()| out.flush())
                .map_err(|error| closed(&error))
        }
    }
}

/// A spec for each place, by name where the name says which.
fn specs(list: impl Iterator<Item = Symbol>) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut last = None;
    for one in list {
        let Some(place) = one.probe_address else { continue };
        if last.replace(place) == Some(place) {
            continue;
        }
        if one.same_name == 1 {
            writeln!(out, "{}", one.name)?;
        } else {
            writeln!(out, "{}", Gva(place))?;
        }
    }
    out.flush()
}

fn text(out: &mut impl Write, one: &Symbol) -> io::Result<()> {
    write!(out, "{:016x} {:7} {}", one.address, one.size, one.name)?;
    match one.probe_address {
        Some(place) if place == one.address => writeln!(out),
        Some(place) => writeln!(out, "  probed at +{:#x}", place.wrapping_sub(one.address)),
        None if one.same_name > 1 => writeln!(out, "  one of {}: probe by address", one.same_name),
        None => writeln!(out, "  refused: {}", one.refused),
    }
}
