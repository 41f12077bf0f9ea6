//! `vmprobe explain`: where a probe lands, the instruction there, and how it would run, or why not.

use guest::place::Place;
use probe_core::plan::{self, Plan};
use serde::Serialize;

use crate::cli::{ExplainArgs, Output};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::output::json_lines;

#[derive(Serialize)]
struct Explanation {
    spec: String,
    place: String,
    address: String,
    physical: String,
    function: Option<String>,
    notes: Vec<String>,
    bytes: String,
    instruction: String,
    runs: &'static str,
    exits_per_hit: u32,
}

pub fn explain(args: &ExplainArgs) -> Result<Code, Failure> {
    let guest = images::open(&args.image)?;
    let place = guest
        .place(&args.spec)
        .map_err(|error| Failure::Probe(format!("{}: {}", args.spec, chain(&error))))?;
    let (runs, exits_per_hit) = match plan::plan(&place.instruction) {
        Plan::Emulate => ("emulated in the host", 1),
        Plan::Step => ("stepped out of line, in a slot outside guest RAM", 2),
        Plan::Refuse(refusal) => {
            return Err(Failure::Probe(format!("{}: {place}: {refusal}", args.spec)));
        }
    };
    let explanation = Explanation {
        spec: args.spec.clone(),
        place: place.to_string(),
        address: format!("{:#x}", place.gva),
        physical: format!("{:#x}", place.gpa),
        function: place.function.as_ref().map(|range| format!("{:#x}..{:#x}", range.start, range.end)),
        notes: place.notes.iter().map(ToString::to_string).collect(),
        bytes: hex(&place),
        instruction: plan::text(&place.instruction),
        runs,
        exits_per_hit,
    };
    match args.output {
        Output::Json => json_lines([explanation])?,
        Output::Text => {
            println!(
                "place        {} at {}, guest-physical {}",
                explanation.place, explanation.address, explanation.physical
            );
            if let Some(function) = &explanation.function {
                println!("function     {function}");
            }
            for note in &explanation.notes {
                println!("note         {note}");
            }
            println!("instruction  {}  ({})", explanation.instruction, explanation.bytes);
            let plural = if exits_per_hit == 1 { "exit" } else { "exits" };
            println!("runs         {runs}: {exits_per_hit} {plural} a hit");
        }
    }
    Ok(Code::Done)
}

fn hex(place: &Place) -> String {
    let bytes: Vec<String> = place.bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(" ")
}
