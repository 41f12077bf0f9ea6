//! The table in the terminal.

use comfy_table::{Table, presets};

use super::{Grid, Report, ReportedCell};
use crate::check::Status;

/// The table of all cells.
#[must_use]
pub fn table(report: &Report) -> String {
    let grid = Grid::new(report);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    if grid.columns.iter().any(|name| !name.is_empty()) {
        table.set_header(std::iter::once("").chain(grid.columns.iter().map(String::as_str)));
    }
    for (name, cells) in &grid.rows {
        let words = (0..grid.columns.len())
            .map(|column| cells.get(column).copied().flatten().map_or_else(|| "-".to_owned(), word));
        table.add_row(std::iter::once(name.clone()).chain(words));
    }
    table.trim_fmt()
}

/// A cell in the table.
fn word(cell: &ReportedCell) -> String {
    match (cell.status, cell.result.outcome()) {
        (Status::Unavailable | Status::NotRun, _) | (_, None) => cell.status.name().to_owned(),
        (status, Some(outcome)) => format!("{} {:.1}s", status.name(), outcome.seconds),
    }
}

/// What is to be said of cells that did not pass, a line each.
#[must_use]
pub fn findings(report: &Report) -> Vec<String> {
    let told = |cell: &ReportedCell| {
        let mut reasons: Vec<String> = cell.result.findings().map(str::to_owned).collect();
        match (cell.status, cell.result.outcome()) {
            (Status::Unavailable, Some(outcome)) => reasons.push(outcome.message.clone()),
            // What the runs before the last one failed in.
            (Status::Flaky, _) => {
                reasons.extend(cell.result.attempts.iter().flat_map(|run| run.findings.clone()))
            }
            _ => {}
        }
        reasons
            .into_iter()
            .map(|reason| format!("{}: {}: {reason}", cell.label, cell.status.name()))
            .collect::<Vec<_>>()
    };
    report.cells.iter().flat_map(told).collect()
}
