//! `vmprobe explain`: where a probe lands, the instruction there, and how it would run, or why not.

use std::io::{self, BufWriter, Write};

use guest::Guest;
use guest::place::{Boundary, Place, PlaceError, Target, Watched};
use guest::spec::{Kind, Location, Spec};
use probe_core::Gva;
use probe_core::plan::{self, Plan};
use serde::Serialize;

use crate::cli::{ExplainArgs, Explained, Output};
use crate::contract::{Explanation, Instruction};
use crate::exit::{Code, Failure};
use crate::images::{self, Opened, chain};
use crate::output::{Hex, closed, json_lines};

/// One probe.
#[derive(Serialize)]
struct JsonExplanation<'a> {
    spec: &'a str,
    event: &'a str,
    place: &'a str,
    address: Option<Hex>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<JsonInstruction<'a>>,
    runs: &'a str,
    exits_per_hit: Option<u32>,
    notes: &'a [String],
}

/// The instruction that a probe stands on.
#[derive(Serialize)]
struct JsonInstruction<'a> {
    physical: Hex,
    function: Option<String>,
    bytes: String,
    instruction: &'a str,
    at_entry: bool,
    exception_table: bool,
    freed_after_boot: bool,
}

/// A probe that cannot be placed.
#[derive(Serialize)]
struct Refused<'a> {
    spec: &'a str,
    refused: &'a str,
}

/// One instruction of many.
#[derive(Serialize)]
struct Row<'a> {
    address: Option<Hex>,
    place: &'a str,
    bytes: String,
    instruction: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    exits_per_hit: Option<u32>,
    #[serde(skip_serializing_if = "str::is_empty")]
    refused: &'a str,
}

pub fn explain(args: &ExplainArgs) -> Result<Code, Failure> {
    let Opened { guest, .. } = images::open(&args.image)?;
    show(find(&guest, &args.what.spec, args.what.all), &args.what, args.output)
}

/// What a probe stands for: one place, or many for a pattern or, with `all`, every instruction of the function.
///
/// # Errors
/// It cannot be understood, or stands nowhere.
pub fn find(guest: &Guest, text: &str, all: bool) -> Result<Vec<Explanation>, Failure> {
    let failure = |error: &dyn std::error::Error| Failure::Probe(format!("{text}: {}", chain(error)));
    let spec: Spec = text.parse().map_err(|error| failure(&error))?;
    if all || spec.pattern().is_some() {
        return many(guest, &spec, all).map_err(|error| failure(&error));
    }
    match guest.target(&spec).map_err(|error| failure(&error))? {
        Target::Code(place) => Ok(vec![of_code(&spec, &place)]),
        Target::Data(watched) => Ok(vec![of_data(&spec, &watched)]),
    }
}

/// Prints what was found: one as a whole, many as a table.
///
/// # Errors
/// Nothing was found; in JSON that is printed too.
pub fn show(
    found: Result<Vec<Explanation>, Failure>,
    what: &Explained,
    output: Output,
) -> Result<Code, Failure> {
    let found = match found {
        Ok(found) => found,
        Err(Failure::Probe(message)) => {
            if output == Output::Json {
                let prefix = format!("{}: ", what.spec);
                let refused = message.strip_prefix(&prefix).unwrap_or(&message);
                json_lines([Refused { spec: &what.spec, refused }])?;
            }
            return Err(Failure::Probe(message));
        }
        Err(failure) => return Err(failure),
    };
    let several = what.all || what.spec.parse::<Spec>().is_ok_and(|spec| spec.pattern().is_some());
    match (output, several) {
        (Output::Json, true) => json_lines(found.iter().map(Row::of))?,
        (Output::Json, false) => json_lines(found.iter().map(JsonExplanation::of))?,
        (Output::Text, true) => table(&found).map_err(|error| closed(&error))?,
        (Output::Text, false) => {
            found.iter().try_for_each(text).map_err(|error| closed(&error))?;
        }
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

fn instruction(place: &Place) -> Instruction {
    let function = place.function.clone().unwrap_or_default();
    Instruction {
        physical: place.gpa.0,
        code: place.bytes.to_vec(),
        text: plan::text(&place.instruction),
        function_start: function.start.0,
        function_end: function.end.0,
        at_entry: place.at_entry,
        exception_table: place.has_exception_entry,
        freed_after_boot: place.freed_after_boot,
    }
}

fn event(spec: &Spec) -> String {
    format!("{}/{}", spec.group(), spec.event())
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
        event: event(spec),
        place: place.to_string(),
        address: Some(place.gva.0),
        instruction: Some(instruction(place)),
        runs,
        exits_per_hit: Some(exits_per_hit),
        notes: place.notes.iter().map(ToString::to_string).collect(),
        refused: String::new(),
    }
}

fn of_data(spec: &Spec, watched: &Watched) -> Explanation {
    Explanation {
        spec: spec.to_string(),
        event: event(spec),
        place: watched.spot.name.clone().unwrap_or_else(|| watched.spot.gva.to_string()),
        address: Some(watched.spot.gva.0),
        instruction: None,
        runs: format!("where it is; a debug register watches {} bytes ({})", watched.len, watched.access),
        exits_per_hit: Some(1),
        notes: Vec::new(),
        refused: String::new(),
    }
}

/// Every instruction of a function, or the place in every function of a pattern.
fn many(guest: &Guest, spec: &Spec, all: bool) -> Result<Vec<Explanation>, PlaceError> {
    match &spec.place {
        Location::Symbol { name, .. } if all && spec.pattern().is_none() => {
            Ok(guest.boundaries(name)?.iter().map(of_boundary).collect())
        }
        _ => Ok(guest.matches(spec).into_iter().map(|(spec, place)| of_match(&spec, place)).collect()),
    }
}

fn of_boundary(boundary: &Boundary) -> Explanation {
    let refused = |error: &PlaceError| {
        let text = plan::text(&boundary.instruction);
        Explanation {
            instruction: Some(Instruction { text, ..Instruction::default() }),
            refused: chain(error),
            ..Explanation::default()
        }
    };
    let place = boundary.place.as_ref();
    Explanation {
        place: boundary.spot.name.clone().unwrap_or_default(),
        address: Some(boundary.spot.gva.0),
        ..place.map_or_else(refused, of_place)
    }
}

/// A place that is not one of a single probe's.
fn of_place(place: &Place) -> Explanation {
    let (how, exits) = runs(place);
    Explanation {
        place: place.to_string(),
        address: Some(place.gva.0),
        instruction: Some(instruction(place)),
        runs: how.to_owned(),
        exits_per_hit: Some(exits),
        ..Explanation::default()
    }
}

fn of_match(spec: &Spec, place: Result<Place, PlaceError>) -> Explanation {
    let of = match place {
        Ok(place) => of_place(&place),
        Err(error) => {
            Explanation { place: spec.place.to_string(), refused: chain(&error), ..Explanation::default() }
        }
    };
    Explanation { spec: spec.to_string(), event: event(spec), ..of }
}

impl Instruction {
    fn function(&self) -> Option<String> {
        let range = Gva(self.function_start)..Gva(self.function_end);
        (!range.is_empty()).then(|| format!("{:#x}..{:#x}", range.start, range.end))
    }
}

impl<'a> JsonExplanation<'a> {
    fn of(explanation: &'a Explanation) -> Self {
        let code = explanation.instruction.as_ref().map(|instruction| JsonInstruction {
            physical: Hex(instruction.physical),
            function: instruction.function(),
            bytes: hex(&instruction.code),
            instruction: &instruction.text,
            at_entry: instruction.at_entry,
            exception_table: instruction.exception_table,
            freed_after_boot: instruction.freed_after_boot,
        });
        Self {
            spec: &explanation.spec,
            event: &explanation.event,
            place: &explanation.place,
            address: explanation.address.map(Hex),
            code,
            runs: &explanation.runs,
            exits_per_hit: explanation.exits_per_hit,
            notes: &explanation.notes,
        }
    }
}

impl<'a> Row<'a> {
    fn of(explanation: &'a Explanation) -> Self {
        let instruction = explanation.instruction.as_ref();
        Self {
            address: explanation.address.map(Hex),
            place: &explanation.place,
            bytes: instruction.map(|instruction| hex(&instruction.code)).unwrap_or_default(),
            instruction: instruction.map_or("", |instruction| &instruction.text),
            exits_per_hit: explanation.exits_per_hit,
            refused: &explanation.refused,
        }
    }
}

fn text(explanation: &Explanation) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    write!(out, "place        {} at {:#x}", explanation.place, explanation.address.unwrap_or_default())?;
    if let Some(code) = &explanation.instruction {
        writeln!(out, ", guest-physical {:#x}", code.physical)?;
        if let Some(function) = code.function() {
            writeln!(out, "function     {function}{}", if code.at_entry { ", at its entry" } else { "" })?;
        }
    } else {
        writeln!(out)?;
    }
    for note in &explanation.notes {
        writeln!(out, "note         {note}")?;
    }
    if let Some(code) = &explanation.instruction {
        if code.exception_table {
            writeln!(
                out,
                "note         The kernel's exception table covers it: a fault is reported at this address"
            )?;
        }
        writeln!(out, "instruction  {}  ({})", code.text, hex(&code.code))?;
    }
    let exits = explanation.exits_per_hit.unwrap_or_default();
    let plural = if exits == 1 { "exit" } else { "exits" };
    writeln!(out, "runs         {}: {exits} {plural} a hit", explanation.runs)?;
    writeln!(out, "event        {}", explanation.event)?;
    out.flush()
}

fn table(found: &[Explanation]) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    let rows: Vec<Row<'_>> = found.iter().map(Row::of).collect();
    let place = rows.iter().map(|row| row.place.len()).max().unwrap_or_default();
    let instruction = rows.iter().map(|row| row.instruction.len()).max().unwrap_or_default();
    for row in &rows {
        let address = row.address.as_ref().map(|address| format!("{:#x}", address.0)).unwrap_or_default();
        write!(out, "{address:18} {:place$}  {:instruction$}  ", row.place, row.instruction)?;
        match row.exits_per_hit {
            None => writeln!(out, "refused: {}", row.refused)?,
            Some(1) => writeln!(out, "emulated")?,
            Some(_) => writeln!(out, "out of line")?,
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
