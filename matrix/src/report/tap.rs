//! The Test Anything Protocol, version 14 (testanything.org).

use std::fmt::Write as _;

use super::Report;
use crate::check::Status;

/// The report in TAP: a test point for each cell.
#[must_use]
pub fn tap(report: &Report) -> String {
    let mut text = format!("TAP version 14\n1..{}\n", report.cells.len());
    for (number, cell) in (1..).zip(&report.cells) {
        let ok = match cell.status {
            Status::Passed | Status::Unavailable | Status::NotRun => "ok",
            // A cell that needed more than one run has not passed.
            Status::Flaky | Status::Failed => "not ok",
        };
        let directive = match cell.status {
            Status::Unavailable | Status::NotRun => {
                let reason = cell.result.outcome().map_or(cell.status.name(), |outcome| &outcome.message);
                format!(" # SKIP {}", line(reason))
            }
            _ => String::new(),
        };
        let _ = writeln!(text, "{ok} {number} - {}{directive}", line(&cell.label).replace('#', "\\#"));
        if ok == "not ok" {
            let mut findings: Vec<&str> = cell.result.findings().collect();
            if cell.status == Status::Flaky {
                findings
                    .extend(cell.result.attempts.iter().flat_map(|run| &run.findings).map(String::as_str));
            }
            let _ = writeln!(text, "  ---\n  status: {}\n  findings:", cell.status.name());
            for finding in findings {
                // A JSON string is a YAML one.
                let _ = writeln!(text, "    - {}", serde_json::Value::from(finding));
            }
            text.push_str("  ...\n");
        }
    }
    text
}

/// A text on one line.
fn line(text: &str) -> String {
    text.replace(['\n', '\r'], " ")
}
