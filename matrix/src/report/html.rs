//! One page with everything in it: no script, no other file.

use askama::Template;

use super::{Grid, Report, ReportedCell};
use crate::check::Status;
use crate::outcome::{ProbeOutcome, Timeline};

/// How much of a console's end is shown, bytes.
const CONSOLE_BYTES: usize = 64 << 10;

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    report: &'a Report,
    columns: &'a [String],
    rows: Vec<Row<'a>>,
    statuses: [Status; 5],
    cells: Vec<Section<'a>>,
}

struct Row<'a> {
    name: &'a str,
    cells: Vec<Option<&'a ReportedCell>>,
}

/// All about one cell.
struct Section<'a> {
    cell: &'a ReportedCell,
    findings: Vec<String>,
    differences: Vec<String>,
    console: String,
}

/// The report as a page. `console` gives what a cell's guest wrote.
///
/// # Errors
/// None that is known of.
pub fn html(report: &Report, console: impl Fn(&ReportedCell) -> String) -> Result<String, askama::Error> {
    let grid = Grid::new(report);
    let rows = grid.rows.iter().map(|(name, cells)| Row {
        name,
        cells: (0..grid.columns.len()).map(|column| cells.get(column).copied().flatten()).collect(),
    });
    let cells = report.cells.iter().map(|cell| Section {
        cell,
        findings: findings(cell),
        differences: differences(report, cell),
        console: end_of(&console(cell)),
    });
    let page = Page {
        report,
        columns: &grid.columns,
        rows: rows.collect(),
        statuses: Status::ALL,
        cells: cells.collect(),
    };
    page.render()
}

fn findings(cell: &ReportedCell) -> Vec<String> {
    let mut findings: Vec<String> = cell.result.findings().map(str::to_owned).collect();
    let attempts = cell.result.attempts.iter().enumerate();
    let earlier = attempts.take(cell.result.attempts.len().saturating_sub(1));
    findings.extend(earlier.flat_map(|(number, attempt)| {
        attempt.findings.iter().map(move |finding| format!("run {}: {finding}", number + 1))
    }));
    findings
}

/// Where a cell differs from its neighbours: those whose values are the same on all axes but one.
fn differences(report: &Report, cell: &ReportedCell) -> Vec<String> {
    let Some(outcome) = cell.result.outcome() else { return Vec::new() };
    let mut differences = Vec::new();
    for axis in &report.axes {
        let neighbours = report.cells.iter().filter(|other| {
            other.result.cell != cell.result.cell
                && other.result.cell.differs_only(&cell.result.cell, &[*axis])
        });
        for neighbour in neighbours {
            let Some(other) = neighbour.result.outcome() else { continue };
            let mut what = Vec::new();
            if neighbour.status != cell.status {
                what.push(format!("it {}", neighbour.status.name()));
            }
            for (own, theirs) in outcome.probes.iter().zip(&other.probes) {
                let (own, theirs) = (&own.account, &theirs.account);
                if own.probe == theirs.probe && own.hits != theirs.hits {
                    what.push(format!("{}: {} hits there, {} here", own.probe, theirs.hits, own.hits));
                }
            }
            if !what.is_empty() {
                differences.push(format!("{}: {}", neighbour.label, what.join("; ")));
            }
        }
    }
    differences
}

/// The end of a console's text, from the start of a line on.
fn end_of(console: &str) -> String {
    let mut start = console.len().saturating_sub(CONSOLE_BYTES);
    while !console.is_char_boundary(start) {
        start += 1;
    }
    let end = &console[start..];
    let whole = if start == 0 { end } else { end.split_once('\n').map_or(end, |(_, rest)| rest) };
    whole.replace('\r', "")
}

impl Section<'_> {
    fn probes(&self) -> &[ProbeOutcome] {
        self.cell.result.outcome().map_or(&[], |outcome| &outcome.probes)
    }
}

/// How a status is called in the page's style sheet.
fn class(status: &Status) -> String {
    status.name().replace(' ', "-")
}

fn milliseconds(ns: &u64) -> String {
    format!("{}.{:03}", ns / 1_000_000, ns / 1000 % 1000)
}

/// The bars of a timeline in a box of 256 by 24: left edge, upper edge, height.
fn bars(timeline: &Timeline) -> Vec<(usize, u64, u64)> {
    let most = timeline.hits.iter().copied().max().unwrap_or(0).max(1);
    let bar = |(place, hits): (usize, &u64)| {
        // At least a line where there was a hit at all.
        let height = u64::try_from((u128::from(*hits) * 24).div_ceil(u128::from(most))).unwrap_or(24);
        (place * 4, 24 - height, height)
    };
    timeline.hits.iter().enumerate().filter(|(_, hits)| **hits > 0).map(bar).collect()
}
