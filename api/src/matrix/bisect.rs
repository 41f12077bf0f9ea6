//! `vmprobe matrix bisect`: the first kernel, in the order of the file, whose cell is unlike that of the first one.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use matrix::bisect::{Measure, Next, next};
use matrix::results::{Header, complete};
use matrix::{Axis, Cell, CellResult, Only};

use super::directory::Directory;
use super::plan::{Plan, Room};
use crate::cli::MatrixBisectArgs;
use crate::exit::{Code, Failure};
use crate::run::signals;

/// Searches along the kernels, once for each combination of values on the other axes.
pub fn bisect(args: &MatrixBisectArgs) -> Result<Code, Failure> {
    let (text, file) = super::read(&args.file)?;
    let cells = file.cells().map_err(super::too_many)?;
    let axes = file.varying();
    let others: Vec<Axis> = axes.iter().copied().filter(|axis| *axis != Axis::Kernel).collect();
    let lines = lines(&cells, &args.only);
    if lines.is_empty() {
        return Err(Failure::Usage(
            "There are no two kernels whose cells differ in nothing else; --list of `matrix` shows the cells"
                .to_owned(),
        ));
    }
    let measure = match &args.count {
        Some(spec) if !file.probes.values().flatten().any(|probe| probe.spec == *spec) => {
            return Err(Failure::Usage(format!("--count {spec}: the file has no probe with this spec")));
        }
        Some(spec) => Measure::Count(spec.clone()),
        None => Measure::Verdict,
    };
    let path = args.results.clone().unwrap_or_else(|| args.file.with_extension("results"));
    let (verdict, host) = super::host();
    let header = Header::new(text, host, super::seconds_since_1970());
    let mut directory = Directory::open(&path, &header, false)?;
    let stop = signals(false)?;
    let plan =
        Plan { file: &file, cells: &cells, axes: &axes, directory: path.clone(), verdict, stop: &stop };

    let room = Room { jobs: args.jobs, memory: args.memory };
    let mut code = Code::Done;
    let mut said = Vec::new();
    'lines: for line in &lines {
        let mut runs = 0;
        let end = loop {
            let results = results(line, &cells, &directory);
            let places = match next(&measure.marks(&results)) {
                Next::Run(places) => places,
                end => break (end, results),
            };
            runs += places.len();
            let places: Vec<usize> = places.into_iter().map(|place| line[place]).collect();
            plan.run(&places, room, &mut directory)?;
            if stop.load(Ordering::Relaxed) {
                code = Code::Interrupted;
                break 'lines;
            }
        };
        let label = cells[line[0]].label(&others);
        let label = if others.is_empty() { String::new() } else { format!("{label}: ") };
        let (end, results) = end;
        if !matches!(end, Next::Found { .. }) {
            code = Code::CellsFailed;
        }
        said.push(format!("{label}{} ({runs} runs)", sentence(&end, &results, &measure)));
    }
    super::finish(&args.file, &file, &cells, &directory, &path)?;
    for line in said {
        println!("{line}");
    }
    Ok(code)
}

/// The cells that are picked, by what they have in common besides their kernel; those with one kernel alone are left out.
fn lines(cells: &[Cell], only: &[Only]) -> Vec<Vec<usize>> {
    let mut lines: BTreeMap<Cell, Vec<usize>> = BTreeMap::new();
    for (place, cell) in cells.iter().enumerate().filter(|(_, cell)| Only::picks(only, cell)) {
        lines.entry(Cell { kernel: String::new(), ..cell.clone() }).or_default().push(place);
    }
    let mut lines: Vec<Vec<usize>> = lines.into_values().filter(|line| line.len() > 1).collect();
    lines.sort();
    lines
}

fn results(line: &[usize], cells: &[Cell], directory: &Directory) -> Vec<CellResult> {
    let cells: Vec<Cell> = line.iter().map(|place| cells[*place].clone()).collect();
    complete(&cells, directory.results())
}

fn sentence(end: &Next, results: &[CellResult], measure: &Measure) -> String {
    let kernel = |place: usize| results[place].cell.kernel.as_str();
    let value = |place: usize| {
        measure.of(&results[place]).unwrap_or_else(|| results[place].status().name().to_owned())
    };
    let last = results.len() - 1;
    match end {
        Next::Found { like, unlike } => {
            let reason = match (measure, results[*unlike].findings().next()) {
                (Measure::Verdict, Some(finding)) => format!(": {finding}"),
                _ => String::new(),
            };
            let between = match unlike - like - 1 {
                0 => String::new(),
                count => format!("; {count} between the two cannot be told"),
            };
            format!(
                "the first that differs is {}, {}{reason}; {} is the last with {}{between}",
                kernel(*unlike),
                value(*unlike),
                kernel(*like),
                value(*like)
            )
        }
        Next::Unclear(place) => {
            format!("{} is {}: it cannot be told from others", kernel(*place), value(*place))
        }
        Next::Alike | Next::Run(_) => {
            format!("{} and {} are alike, {}", kernel(0), kernel(last), value(0))
        }
    }
}
