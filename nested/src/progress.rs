//! What the user sees while the machine is prepared. Everything goes to stderr.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Told what goes on during [`prepare`](crate::prepare).
pub trait Progress: Send + Sync {
    /// A step begins; the one before it is done.
    fn step(&self, name: &str);
    /// `done` of `total` parts of the current step are done.
    fn position(&self, done: u64, total: u64);
    /// Everything is done.
    fn finish(&self);
}

/// A bar or spinner that is redrawn in place.
#[derive(Debug)]
pub struct TerminalProgress(ProgressBar);

impl TerminalProgress {
    /// A spinner on stderr.
    #[must_use]
    pub fn new() -> Self {
        let bar = ProgressBar::new(0);
        bar.set_style(Self::style("{spinner} [{elapsed}] {msg}"));
        bar.enable_steady_tick(Duration::from_millis(120));
        Self(bar)
    }

    fn style(template: &str) -> ProgressStyle {
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    }
}

impl Default for TerminalProgress {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for TerminalProgress {
    fn step(&self, name: &str) {
        self.0.set_style(Self::style("{spinner} [{elapsed}] {msg}"));
        self.0.set_length(0);
        self.0.set_message(name.to_owned());
    }

    fn position(&self, done: u64, total: u64) {
        if self.0.length() != Some(total) {
            self.0.set_style(Self::style("{spinner} [{elapsed}] {msg} [{bar:30}] {pos}/{len}"));
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }

    fn finish(&self) {
        self.0.finish_and_clear();
    }
}

/// One line a step, and one for every tenth of a step that counts.
#[derive(Debug, Default)]
pub struct LineProgress(Mutex<LineState>);

#[derive(Debug, Default)]
struct LineState {
    started: Option<Instant>,
    tenth: u64,
}

impl Progress for LineProgress {
    fn step(&self, name: &str) {
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let started = *state.started.get_or_insert_with(Instant::now);
        state.tenth = 0;
        eprintln!("vmprobe: [{:>3}s] {name}", started.elapsed().as_secs());
    }

    fn position(&self, done: u64, total: u64) {
        let mut state = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let tenth = done.saturating_mul(10).checked_div(total).unwrap_or(0);
        if tenth > state.tenth {
            state.tenth = tenth;
            let elapsed = state.started.map_or(0, |started| started.elapsed().as_secs());
            eprintln!("vmprobe: [{elapsed:>3}s]   {done}/{total}");
        }
    }

    fn finish(&self) {}
}

/// [`TerminalProgress`] when stderr is a terminal, otherwise [`LineProgress`].
#[must_use]
pub fn stderr_progress() -> Box<dyn Progress> {
    if std::io::stderr().is_terminal() {
        Box::new(TerminalProgress::new())
    } else {
        Box::new(LineProgress::default())
    }
}
