//! `vmprobe explain`: where a probe lands, the instruction there, and how it would run, or why not.

use std::io::{self, BufWriter, Write};

use guest::Guest;
use guest::place::{Boundary, Place, PlaceError, Target, Watched};
use guest::spec::{Kind, Location, Spec};
use probe_core::plan::{self, Plan};
use serde::Serialize;

use crate::cli::{ExplainArgs, Output};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::output::{closed, json_lines};

/// One probe.
#[derive(Serialize)]
struct Explanation {
    spec: String,
    event: String,
    place: String,
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<CodePlace>,
    runs: String,
    exits_per_hit: u32,
    notes: Vec<String>,
}

/// The instruction that a probe stands on.
#[derive(Serialize)]
struct CodePlace {
    physical: String,
    function: Option<String>,
    bytes: String,
    instruction: String,
    at_entry: bool,
    exception_table: bool,
    freed_after_boot: bool,
}

/// A probe that cannot be placed.
#[derive(Serialize)]
struct Refused<'a> {
    spec: &'a str,
    refused: String,
}

/// One instruction of many.
#[derive(Serialize)]
struct Row {
    address: String,
    place: String,
    bytes: String,
    instruction: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    exits_per_hit: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
}

pub fn explain(args: &ExplainArgs) -> Result<Code, Failure> {
    let guest = images::open(&args.image)?;
    let failure = |error: &dyn std::error::Error| Failure::Probe(format!("{}: {}", args.spec, chain(error)));
    let spec: Spec = args.spec.parse().map_err(|error| failure(&error))?;
    if args.all || spec.pattern().is_some() {
        let rows = rows(&guest, &spec, args.all).map_err(|error| failure(&error))?;
        match args.output {
            Output::Json => json_lines(rows)?,
            Output::Text => table(&rows).map_err(|error| closed(&error))?,
        }
        return Ok(Code::Done);
    }
    let explanation = match guest.target(&spec) {
        Ok(Target::Code(place)) => of_code(&spec, &place),
        Ok(Target::Data(watched)) => of_data(&spec, &watched),
        Err(error) => {
            if args.output == Output::Json {
                json_lines([Refused { spec: &args.spec, refused: chain(&error) }])?;
            }
            return Err(failure(&error));
        }
    };
    match args.output {
        Output::Json => json_lines([explanation])?,
        Output::Text => text(&explanation).map_err(|error| closed(&error))?,
    }
    Ok(Code::Done)
}

/// How an instruction that can be probed runs at a hit, and how many exits a hit is.
fn runs(place: &Place) -> (&'static str, u32) {
    match plan::plan(&place.instruction) {
        Plan::Emulate => ("emulated in the host", 1),
        Plan::Step | Plan::Refuse(_) => ("out of line, in a slot outside guest RAM", 2),
    }
}

fn of_code(spec: &Spec, place: &Place) -> Explanation {
    let (how, exits) = runs(place);
    let (runs, exits_per_hit) = match spec.kind {
        Kind::Return { .. } => {
            (format!("{how}; the return is one more hit, on the instruction behind the call"), exits + 1)
        }
        Kind::Entry | Kind::Watch { .. } => (how.to_owned(), exits),
    };
    Explanation {
        spec: spec.to_string(),
        event: format!("{}/{}", spec.group(), spec.event()),
        place: place.to_string(),
        address: format!("{:#x}", place.gva),
        code: Some(CodePlace {
            physical: format!("{:#x}", place.gpa),
            function: place.function.as_ref().map(|range| format!("{:#x}..{:#x}", range.start, range.end)),
            bytes: hex(&place.bytes),
            instruction: plan::text(&place.instruction),
            at_entry: place.at_entry,
            exception_table: place.has_exception_entry,
            freed_after_boot: place.freed_after_boot,
        }),
        runs,
        exits_per_hit,
        notes: place.notes.iter().map(ToString::to_string).collect(),
    }
}

fn of_data(spec: &Spec, watched: &Watched) -> Explanation {
    Explanation {
        spec: spec.to_string(),
        event: format!("{}/{}", spec.group(), spec.event()),
        place: watched.spot.name.clone().unwrap_or_else(|| watched.spot.gva.to_string()),
        address: format!("{:#x}", watched.spot.gva),
        code: None,
        runs: format!("where it is; a debug register watches {} bytes ({})", watched.len, watched.access),
        exits_per_hit: 1,
        notes: Vec::new(),
    }
}

fn text(explanation: &Explanation) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    write!(out, "place        {} at {}", explanation.place, explanation.address)?;
    if let Some(code) = &explanation.code {
        writeln!(out, ", guest-physical {}", code.physical)?;
        if let Some(function) = &code.function {
            writeln!(out, "function     {function}{}", if code.at_entry { ", at its entry" } else { "" })?;
        }
    } else {
        writeln!(out)?;
    }
    for note in &explanation.notes {
        writeln!(out, "note         {note}")?;
    }
    if let Some(code) = &explanation.code {
        if code.exception_table {
            writeln!(
                out,
                "note         The kernel's exception table covers it: a fault is reported at this address"
            )?;
        }
        writeln!(out, "instruction  {}  ({})", code.instruction, code.bytes)?;
    }
    let plural = if explanation.exits_per_hit == 1 { "exit" } else { "exits" };
    writeln!(out, "runs         {}: {} {plural} a hit", explanation.runs, explanation.exits_per_hit)?;
    writeln!(out, "event        {}", explanation.event)?;
    out.flush()
}

/// Every instruction of a function, or the place in every function of a pattern.
fn rows(guest: &Guest, spec: &Spec, all: bool) -> Result<Vec<Row>, PlaceError> {
    match &spec.place {
        Location::Symbol { name, .. } if all && spec.pattern().is_none() => {
            Ok(guest.boundaries(name)?.iter().map(of_boundary).collect())
        }
        _ => Ok(guest.matches(spec).into_iter().map(|(spec, place)| of_match(&spec, place)).collect()),
    }
}

fn of_boundary(boundary: &Boundary) -> Row {
    Row {
        address: format!("{:#x}", boundary.spot.gva),
        place: boundary.spot.name.clone().unwrap_or_default(),
        bytes: boundary.place.as_ref().map(|place| hex(&place.bytes)).unwrap_or_default(),
        instruction: plan::text(&boundary.instruction),
        exits_per_hit: boundary.place.as_ref().ok().map(|place| runs(place).1),
        refused: boundary.place.as_ref().err().map(|error| chain(error)),
    }
}

fn of_match(spec: &Spec, place: Result<Place, PlaceError>) -> Row {
    match place {
        Ok(place) => Row {
            address: format!("{:#x}", place.gva),
            place: place.to_string(),
            bytes: hex(&place.bytes),
            instruction: plan::text(&place.instruction),
            exits_per_hit: Some(runs(&place).1),
            refused: None,
        },
        Err(error) => Row {
            address: String::new(),
            place: spec.place.to_string(),
            bytes: String::new(),
            instruction: String::new(),
            exits_per_hit: None,
            refused: Some(chain(&error)),
        },
    }
}

fn table(rows: &[Row]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    let place = rows.iter().map(|row| row.place.len()).max().unwrap_or_default();
    let instruction = rows.iter().map(|row| row.instruction.len()).max().unwrap_or_default();
    for row in rows {
        write!(out, "{:18} {:place$}  {:instruction$}  ", row.address, row.place, row.instruction)?;
        match (row.exits_per_hit, &row.refused) {
            (_, Some(reason)) => writeln!(out, "refused: {reason}")?,
            (Some(1), None) => writeln!(out, "emulated")?,
            (_, None) => writeln!(out, "out of line")?,
        }
    }
    let count = |exits| rows.iter().filter(|row| row.exits_per_hit == exits).count();
    let (emulated, stepped, refused) = (count(Some(1)), count(Some(2)), count(None));
    writeln!(out, "{} places: {emulated} emulated, {stepped} out of line, {refused} refused", rows.len())?;
    out.flush()
}

fn hex(bytes: &[u8]) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}
