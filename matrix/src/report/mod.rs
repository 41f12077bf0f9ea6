//! What a matrix came to, for people and for other programs.

mod html;
mod junit;
mod tap;
mod text;

use std::collections::{BTreeMap, HashSet};

use serde::Serialize;

use crate::axes::{Axis, Cell};
use crate::check::{CellResult, Status};

pub use html::html;
pub use junit::junit;
pub use tap::tap;
pub use text::{findings, table};

/// All that a report says.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// What it is called: the matrix file's name.
    pub name: String,
    /// Where it ran.
    pub host: String,
    /// When it began, as RFC 3339 has it.
    pub started: String,
    /// Where the cells differ.
    pub axes: Vec<Axis>,
    /// How many cells stand how.
    pub summary: BTreeMap<Status, usize>,
    /// The cells.
    pub cells: Vec<ReportedCell>,
}

/// A cell with what is said of it.
#[derive(Clone, Debug, Serialize)]
pub struct ReportedCell {
    /// What tells it from others.
    pub label: String,
    /// The file name of its things.
    pub files: String,
    /// How it stands.
    pub status: Status,
    /// What came of it.
    #[serde(flatten)]
    pub result: CellResult,
}

impl Report {
    /// A report on these cells.
    #[must_use]
    pub fn new(
        name: String,
        host: String,
        started: String,
        axes: Vec<Axis>,
        results: Vec<CellResult>,
    ) -> Self {
        let cells = results.into_iter().enumerate().map(|(place, result)| ReportedCell {
            label: result.cell.label(&axes),
            files: result.cell.file_name(place, &axes),
            status: result.status(),
            result,
        });
        let cells: Vec<ReportedCell> = cells.collect();
        let mut summary = BTreeMap::new();
        cells.iter().for_each(|cell| *summary.entry(cell.status).or_default() += 1);
        Self { name, host, started, axes, summary, cells }
    }

    /// How many cells stand how, in words: "11 passed, 1 failed".
    #[must_use]
    pub fn in_words(&self) -> String {
        let words: Vec<String> =
            self.summary.iter().map(|(status, count)| format!("{count} {}", status.name())).collect();
        if words.is_empty() { "no cells".to_owned() } else { words.join(", ") }
    }

    /// Whether every cell passed.
    #[must_use]
    pub fn all_passed(&self) -> bool {
        self.summary.keys().all(|status| *status == Status::Passed)
    }

    /// As one JSON object.
    ///
    /// # Errors
    /// None that is known of: there is nothing in it that JSON cannot say.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }
}

/// The cells in two dimensions.
struct Grid<'a> {
    /// The values of one axis: the last one along which there are cells that differ in nothing else.
    columns: Vec<String>,
    /// The values of the others, and the cells by column.
    rows: Vec<(String, Vec<Option<&'a ReportedCell>>)>,
}

impl<'a> Grid<'a> {
    fn new(report: &'a Report) -> Self {
        let others = |axis: &Axis| -> Vec<Axis> {
            report.axes.iter().copied().filter(|other| other != axis).collect()
        };
        let has_neighbours = |axis: &Axis| {
            let (others, mut seen) = (others(axis), HashSet::new());
            !report.cells.iter().all(|cell| seen.insert(cell.result.cell.label(&others)))
        };
        // A single axis goes down the page.
        let across = report.axes.iter().rev().find(|axis| report.axes.len() > 1 && has_neighbours(axis));
        let down = across.map_or_else(|| report.axes.clone(), others);
        let column = |cell: &Cell| across.map(|axis| cell.label(&[*axis])).unwrap_or_default();
        let mut columns: Vec<String> = Vec::new();
        let mut rows: Vec<(String, Vec<Option<&ReportedCell>>)> = Vec::new();
        for cell in &report.cells {
            let (name, row) = (column(&cell.result.cell), cell.result.cell.label(&down));
            let place = columns.iter().position(|known| *known == name).unwrap_or_else(|| {
                columns.push(name);
                columns.len() - 1
            });
            let row = match rows.iter().position(|(known, _)| *known == row) {
                Some(at) => &mut rows[at].1,
                None => {
                    rows.push((row, Vec::new()));
                    let last = rows.len() - 1;
                    &mut rows[last].1
                }
            };
            if row.len() <= place {
                row.resize(place + 1, None);
            }
            row[place] = Some(cell);
        }
        Self { columns, rows }
    }
}

#[cfg(test)]
mod tests;
