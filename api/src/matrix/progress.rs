//! What is shown while cells run: on a terminal a line for each that runs and how many are left, elsewhere a line for each that ends.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use matrix::CellResult;

/// How often the lines are drawn anew.
const TICK: Duration = Duration::from_millis(250);

pub struct Progress {
    lines: MultiProgress,
    all: ProgressBar,
    terminal: bool,
}

impl Progress {
    /// For this many cells.
    pub fn new(count: usize) -> Self {
        let lines = MultiProgress::new();
        let all = lines.add(ProgressBar::new(count as u64));
        all.set_style(style("{pos}/{len} cells {wide_bar} {elapsed} so far, {eta} left"));
        all.enable_steady_tick(TICK);
        Self { lines, all, terminal: std::io::stderr().is_terminal() }
    }

    /// A cell begins.
    pub fn begin(&self, label: &str) -> ProgressBar {
        let line = self.lines.insert_before(&self.all, ProgressBar::new_spinner());
        line.set_style(style("  {spinner} {msg} {elapsed}"));
        line.set_message(label.to_owned());
        line.enable_steady_tick(TICK);
        line
    }

    /// It has ended.
    pub fn end(&self, line: &ProgressBar, label: &str, result: &CellResult) {
        line.finish_and_clear();
        self.lines.remove(line);
        self.all.inc(1);
        let seconds = result.outcome().map_or(0.0, |outcome| outcome.seconds);
        let said = format!("vmprobe: {label}: {} after {seconds:.1} s", result.status().name());
        let said = match result.findings().next() {
            Some(finding) => format!("{said}: {finding}"),
            None => said,
        };
        if self.terminal {
            self.lines.println(&said).ok();
        } else {
            eprintln!("{said}");
        }
    }

    /// No more cells.
    pub fn finish(&self) {
        self.all.finish_and_clear();
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
