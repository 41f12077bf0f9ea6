//! JUnit's XML, as continuous integration reads it.

use std::time::Duration;

use quick_junit::{
    NonSuccessKind, NonSuccessReruns, Report as Document, SerializeError, TestCase, TestCaseStatus,
    TestRerun, TestSuite,
};

use super::{Report, ReportedCell};
use crate::check::{Attempt, Status};

/// The report as a JUnit document: a test case for each cell.
///
/// # Errors
/// None that is known of.
pub fn junit(report: &Report) -> Result<String, SerializeError> {
    let mut suite = TestSuite::new(&*report.name);
    suite.add_test_cases(report.cells.iter().map(case));
    let mut document = Document::new(&*report.name);
    document.add_test_suite(suite);
    document.to_string()
}

fn case(cell: &ReportedCell) -> TestCase {
    let attempts = &cell.result.attempts;
    let status = match cell.status {
        Status::Passed => TestCaseStatus::success(),
        Status::Flaky => {
            let mut status = TestCaseStatus::success();
            let failed = attempts.split_last().map_or(&[][..], |(_, failed)| failed);
            if let TestCaseStatus::Success { flaky_runs } = &mut status {
                flaky_runs.extend(failed.iter().map(rerun));
            }
            status
        }
        Status::Failed => {
            let mut status = TestCaseStatus::non_success(NonSuccessKind::Failure);
            let findings: Vec<&str> = cell.result.findings().collect();
            status.set_message(findings.first().copied().unwrap_or_default());
            status.set_description(findings.join("\n"));
            if let TestCaseStatus::NonSuccess { reruns, .. } = &mut status {
                let earlier = attempts.split_last().map_or(&[][..], |(_, earlier)| earlier);
                *reruns = NonSuccessReruns {
                    runs: earlier.iter().map(rerun).collect(),
                    ..NonSuccessReruns::default()
                };
            }
            status
        }
        Status::Unavailable | Status::NotRun => {
            let mut status = TestCaseStatus::skipped();
            let outcome = cell.result.outcome().map(|outcome| outcome.message.as_str());
            status.set_message(outcome.unwrap_or(cell.status.name()));
            status
        }
    };
    let mut case = TestCase::new(&*cell.label, status);
    case.set_classname(&*cell.result.cell.kernel);
    if let Some(outcome) = cell.result.outcome() {
        case.set_time(seconds(outcome.seconds));
    }
    case
}

fn rerun(attempt: &Attempt) -> TestRerun {
    let mut rerun = TestRerun::new(NonSuccessKind::Failure);
    rerun
        .set_message(attempt.findings.first().map_or("", String::as_str))
        .set_time(seconds(attempt.outcome.seconds));
    rerun.set_description(attempt.findings.join("\n"));
    rerun
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}
