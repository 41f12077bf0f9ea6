//! `vmprobe symbols`: what can be probed in an image.

use std::io::{self, Write};

use guest::Guest;
use guest::list::Listing;
use serde::Serialize;

use crate::cli::{Output, SymbolsArgs};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::output::{Hex, closed, json_lines};

#[derive(Serialize)]
struct Line<'a> {
    address: Hex,
    size: u64,
    name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    probe: Option<Hex>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

pub fn symbols(args: &SymbolsArgs) -> Result<Code, Failure> {
    let guest = images::open(&args.image)?;
    let list = list(&guest, args.glob.as_deref())?.filter(|one| !args.probeable || one.probe.is_ok());
    match args.output {
        _ if args.specs => specs(list).map_err(|error| closed(&error))?,
        Output::Json => json_lines(list.map(|one| Line {
            address: Hex(one.symbol.gva.0),
            size: one.symbol.size,
            name: one.symbol.name,
            probe: one.probe.as_ref().ok().map(|gva| Hex(gva.0)),
            refused: one.probe.as_ref().err().map(|error| chain(error)),
        }))?,
        Output::Text => {
            let mut out = io::BufWriter::new(io::stdout().lock());
            for one in list {
                text(&mut out, &one).map_err(|error| closed(&error))?;
            }
            out.flush().map_err(|error| closed(&error))?;
        }
    }
    Ok(Code::Done)
}

/// A spec for each place, by name where the name says which.
fn specs<'a>(list: impl Iterator<Item = Listing<'a>>) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut last = None;
    for one in list {
        let Ok(place) = one.probe else { continue };
        if last.replace(place) == Some(place) {
            continue;
        }
        if one.same_name == 1 {
            writeln!(out, "{}", one.symbol.name)?;
        } else {
            writeln!(out, "{place}")?;
        }
    }
    out.flush()
}

/// Code only: data cannot be probed.
fn list<'a>(
    guest: &'a Guest,
    pattern: Option<&'a str>,
) -> Result<impl Iterator<Item = Listing<'a>>, Failure> {
    let list = guest.list(pattern).map_err(|error| Failure::Usage(error.to_string()))?;
    Ok(list.filter(|one| one.symbol.kind.is_code()))
}

fn text(out: &mut impl Write, one: &Listing<'_>) -> io::Result<()> {
    let symbol = &one.symbol;
    write!(out, "{:016x} {:7} {}", symbol.gva, symbol.size, symbol.name)?;
    match &one.probe {
        Ok(gva) if *gva == symbol.gva => writeln!(out),
        Ok(gva) => writeln!(out, "  probed at +{:#x}", gva.0 - symbol.gva.0),
        Err(_) if one.same_name > 1 => writeln!(out, "  one of {}: probe by address", one.same_name),
        Err(error) => writeln!(out, "  refused: {}", chain(error)),
    }
}
