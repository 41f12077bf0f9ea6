//! What an outcome is worth: a cell's own expectations, and what must hold between cells.

use serde::{Deserialize, Serialize};

use crate::axes::{Axis, Cell};
use crate::file::{Console, Expected, MatrixFile, NoSlower, Pattern, Probe, Same};
use crate::outcome::{CommandEnd, End, Outcome, ProbeOutcome};
use crate::quantity::Time;

/// How a cell stands.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// All that was expected came.
    Passed,
    /// It failed first and passed when it was run again.
    Flaky,
    /// Something did not come as expected.
    Failed,
    /// This host cannot run it.
    Unavailable,
    /// It has not been run, or not to its end.
    NotRun,
}

impl Status {
    /// All of them, the best first.
    pub const ALL: [Status; 5] =
        [Status::Passed, Status::Flaky, Status::Failed, Status::Unavailable, Status::NotRun];

    /// For people.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Status::Passed => "passed",
            Status::Flaky => "flaky",
            Status::Failed => "failed",
            Status::Unavailable => "unavailable",
            Status::NotRun => "not run",
        }
    }
}

/// One run of a cell.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Attempt {
    /// What came of it.
    pub outcome: Outcome,
    /// What was not as expected.
    pub findings: Vec<String>,
}

impl Attempt {
    fn status(&self) -> Status {
        match self.outcome.end {
            end if end.is_unavailable() => Status::Unavailable,
            end if end.is_interrupted() => Status::NotRun,
            _ if self.findings.is_empty() => Status::Passed,
            _ => Status::Failed,
        }
    }
}

/// A cell with all its runs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct CellResult {
    /// Which.
    pub cell: Cell,
    /// Its runs, the last of which counts.
    pub attempts: Vec<Attempt>,
    /// What it fails in beside other cells.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub relations: Vec<String>,
}

impl CellResult {
    /// A cell that has not been run.
    #[must_use]
    pub fn not_run(cell: Cell) -> Self {
        Self { cell, attempts: Vec::new(), relations: Vec::new() }
    }

    /// How it stands.
    #[must_use]
    pub fn status(&self) -> Status {
        let Some(last) = self.attempts.last() else { return Status::NotRun };
        match last.status() {
            Status::Passed if !self.relations.is_empty() => Status::Failed,
            Status::Passed if self.attempts.len() > 1 => Status::Flaky,
            status => status,
        }
    }

    /// The outcome that counts.
    #[must_use]
    pub fn outcome(&self) -> Option<&Outcome> {
        self.attempts.last().map(|attempt| &attempt.outcome)
    }

    /// What was not as expected in the run that counts, and beside other cells.
    pub fn findings(&self) -> impl Iterator<Item = &str> {
        let own = self.attempts.last().into_iter().flat_map(|attempt| &attempt.findings);
        own.chain(&self.relations).map(String::as_str)
    }
}

/// What is not as expected of one run: nothing, or a sentence each. `console` is what the guest wrote.
#[must_use]
pub fn findings(file: &MatrixFile, cell: &Cell, outcome: &Outcome, console: &str) -> Vec<String> {
    // Neither says anything about the guest.
    if outcome.end.is_unavailable() || outcome.end.is_interrupted() {
        return Vec::new();
    }
    let mut findings = Vec::new();
    if outcome.end != End::DONE {
        findings.push(outcome.message.clone());
    }
    match outcome.command {
        None | Some(CommandEnd::Code(0)) => {}
        // Why the guest ended has been said.
        Some(CommandEnd::NotSeen) if outcome.end != End::DONE => {}
        Some(end) => findings.push(end.to_string()),
    }
    console_findings(&file.console, console, &mut findings);
    for (place, probe) in file.probes.get(&cell.probes).into_iter().flatten().enumerate() {
        match outcome.probes.get(place) {
            Some(came) => probe_findings(probe, came, console, &mut findings),
            // A run that was cut off, or refused, has said so already.
            None if outcome.end != End::DONE => {}
            None => findings.push(format!("{}: the run gave no account of it", probe.spec)),
        }
    }
    findings
}

fn console_findings(expected: &Console, console: &str, findings: &mut Vec<String>) {
    for Pattern(pattern) in &expected.must {
        if !pattern.is_match(console) {
            findings.push(format!("nothing on the console matches `{pattern}`"));
        }
    }
    for Pattern(pattern) in &expected.must_not {
        if let Some(found) = pattern.find(console) {
            let line_start = console[..found.start()].rfind('\n').map_or(0, |newline| newline + 1);
            let line = console[line_start..].lines().next().unwrap_or_default().trim_end();
            findings.push(format!("the console matches `{pattern}`: {line}"));
        }
    }
}

fn probe_findings(probe: &Probe, came: &ProbeOutcome, console: &str, findings: &mut Vec<String>) {
    let mut finding = |text: String| findings.push(format!("{}: {text}", probe.spec));
    let hits = came.account.hits;
    match &probe.count {
        Some(Expected::Bounds(bounds)) if !bounds.hold(hits) => {
            finding(format!("{hits} hits, expected {bounds}"))
        }
        Some(Expected::Console(number)) => match console_number(&number.console, console) {
            Some(told) if told == hits => {}
            Some(told) => finding(format!("{hits} hits, and the guest counted {told}")),
            None => finding(format!("no number on the console matches `{}`", number.console.0)),
        },
        Some(Expected::Bounds(_)) | None => {}
    }
    if came.account.lost > 0 {
        finding(format!("{} of {hits} hits were lost", came.account.lost));
    }
    for (name, bounds) in &probe.values {
        match came.values.get(name) {
            None if hits == 0 => {}
            None => finding(format!("no hit has a value `{name}`")),
            Some(seen) if seen.faults > 0 => {
                finding(format!("{name} could not be read at {} hits", seen.faults))
            }
            Some(seen) if !(bounds.hold(seen.min) && bounds.hold(seen.max)) => {
                finding(format!("{name} was {:#x} to {:#x}, expected {bounds}", seen.min, seen.max));
            }
            Some(_) => {}
        }
    }
    let durations = came.durations.as_ref();
    let limits = [
        ("half of the calls", probe.median, durations.map(|durations| durations.median_ns)),
        ("99 of 100 calls", probe.p99, durations.map(|durations| durations.p99_ns)),
        ("every call", probe.max, durations.map(|durations| durations.max_ns)),
    ];
    for (which, limit, came) in limits {
        match (limit, came) {
            (Some(Time(limit)), Some(ns)) if u128::from(ns) > limit.as_nanos() => {
                finding(format!("{which} took up to {}, expected {}", time(ns), Time(limit)));
            }
            (Some(_), None) if hits > 0 => {
                finding("no hit has a duration; only return probes have".to_owned())
            }
            _ => {}
        }
    }
}

/// The number in the first group of the first match.
fn console_number(pattern: &Pattern, console: &str) -> Option<u64> {
    pattern.0.captures(console)?.get(1)?.as_str().parse().ok()
}

fn time(ns: u64) -> Time {
    Time(std::time::Duration::from_nanos(ns))
}

/// Puts into each cell what it fails in beside others; what an earlier call has put there goes.
pub fn relate(file: &MatrixFile, results: &mut [CellResult]) {
    let varying = file.varying();
    let mut found: Vec<Vec<String>> = vec![Vec::new(); results.len()];
    file.same.iter().for_each(|same| same_findings(same, results, &varying, &mut found));
    file.no_slower.iter().for_each(|pair| slower_findings(pair, results, &varying, &mut found));
    for (result, found) in results.iter_mut().zip(found) {
        result.relations = found;
    }
}

/// Outcomes of runs that came to their end.
fn ended(result: &CellResult) -> Option<&Outcome> {
    result.outcome().filter(|outcome| outcome.end == End::DONE)
}

fn same_findings(same: &Same, results: &[CellResult], varying: &[Axis], found: &mut [Vec<String>]) {
    let across: Vec<Axis> = same.across.iter().copied().collect();
    for (place, result) in results.iter().enumerate().filter(|(_, result)| same.cells.matches(&result.cell)) {
        let Some(outcome) = ended(result) else { continue };
        // The first cell of each group is what the others are held against.
        let first = results.iter().take(place).find(|other| {
            same.cells.matches(&other.cell)
                && other.cell.differs_only(&result.cell, &across)
                && ended(other).is_some()
        });
        let Some((first, beside)) = first.and_then(|first| Some((first, ended(first)?))) else { continue };
        for (probe, other) in outcome.probes.iter().zip(&beside.probes) {
            let spec = &probe.account.probe;
            let meant =
                same.probes.as_ref().is_none_or(|meant| meant.iter().any(|meant| meant.get_ref() == spec));
            if meant && probe.account.hits != other.account.hits {
                found[place].push(format!(
                    "{}: {} hits, and {} in {}",
                    probe.account.probe,
                    probe.account.hits,
                    other.account.hits,
                    first.cell.label(varying)
                ));
            }
        }
    }
}

fn slower_findings(pair: &NoSlower, results: &[CellResult], varying: &[Axis], found: &mut [Vec<String>]) {
    let along = pair.than.named();
    let measure = |outcome: &Outcome| match &pair.probe {
        None => Some(outcome.seconds * 1e9),
        Some(spec) => {
            let probe = outcome.probes.iter().find(|probe| probe.account.probe == *spec)?;
            #[allow(clippy::cast_precision_loss, reason = "a time of 52 bits of nanoseconds is a month")]
            probe.durations.map(|durations| durations.median_ns as f64)
        }
    };
    for (place, result) in results.iter().enumerate().filter(|(_, result)| pair.cells.matches(&result.cell)) {
        let Some(own) = ended(result).and_then(measure) else { continue };
        let beside = results.iter().find(|other| {
            other.cell != result.cell
                && pair.than.matches(&other.cell)
                && other.cell.differs_only(&result.cell, &along)
        });
        let Some((beside, other)) =
            beside.and_then(|beside| Some((beside, ended(beside).and_then(measure)?)))
        else {
            continue;
        };
        if own > other * (1.0 + pair.by.0 / 100.0) {
            found[place].push(format!(
                "{}: {:.1}% slower than {}, expected at most {}",
                pair.probe.as_deref().unwrap_or("the run"),
                (own / other - 1.0) * 100.0,
                beside.cell.label(varying),
                pair.by
            ));
        }
    }
}

#[cfg(test)]
mod tests;
