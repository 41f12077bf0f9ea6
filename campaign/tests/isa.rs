//! A slice of the campaign on each rung: no form may behave differently when it is probed.

#![allow(clippy::tests_outside_test_module)]

use std::process::{Command, Output};

/// The seed of these runs. The campaign itself draws a new one each time it is not given one.
const SEED: &str = "2026";

fn campaign(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_campaign"))
        .args(["isa", "--seed", SEED])
        .args(arguments)
        .output()
        .expect("campaign starts")
}

/// Runs a slice, or says why it cannot run; in CI that is a failure. Returns the report.
fn slice(arguments: &[&str]) -> Option<String> {
    let output = campaign(arguments);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report = String::from_utf8_lossy(&output.stdout).into_owned();
    if report.is_empty() {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "the campaign cannot run: {stderr}");
        eprintln!("skipped: {stderr}");
        return None;
    }
    assert_eq!(output.status.code(), Some(0), "{report}\n{stderr}");
    assert!(report.ends_with("## Mismatches\n\nNone.\n"), "{report}");
    Some(report)
}

/// The cases of one outcome, by the report's table.
fn cases(report: &str, outcome: &str) -> u64 {
    let row = report.lines().find_map(|line| line.strip_prefix(&format!("| {outcome} | ")));
    row.map_or(0, |row| row.split('|').filter_map(|cell| cell.trim().parse::<u64>().ok()).sum())
}

#[test]
fn no_form_differs_on_the_local_kvm() {
    let Some(report) = slice(&["--cases", "4"]) else { return };
    assert!(cases(&report, "equal") > 2000, "{report}");
}

#[test]
fn no_form_differs_on_nested_kvm() {
    let Some(report) = slice(&["--cases", "4", "--every", "4", "--accel", "nested"]) else { return };
    assert!(cases(&report, "equal") > 2000, "{report}");
}
