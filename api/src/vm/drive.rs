//! A run, from its start to its end.

use std::thread;
use std::time::{Duration, Instant};

use vmm::{Run, RunEnd, RunError, RunReport};

use crate::events::{Event, Readers};
use crate::exit::Code;
use crate::own::Panics;

/// How long a panicking guest may go on, to print its last words, where it does not reset by itself.
const PANIC_GRACE: Duration = Duration::from_secs(5);

/// Why a machine was asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Interrupted,
    TimedOut,
    Panicked,
    OutputLost,
    Client,
}

/// Waits for the end of a run. Until then `pass_on` is called again and again with the hits that have come, and may ask for the end; so
/// does a guest that panics and does not reset. It is called once more when the run has ended.
pub fn drive(
    run: Run,
    mut readers: Readers,
    panics: &Panics,
    mut pass_on: impl FnMut(&[Event], Instant) -> Option<Asked>,
) -> (Option<Asked>, Result<RunReport, RunError>) {
    let stop = run.stop_handle();
    let driver = thread::current();
    let (asked, outcome) = thread::scope(|scope| {
        let running = scope.spawn(move || {
            let outcome = run.wait();
            driver.unpark();
            outcome
        });
        let mut asked = None;
        let mut panicked_at = None;
        while !running.is_finished() {
            readers.wait();
            let now = Instant::now();
            let overdue = panicked_at.is_some_and(|at| now - at > PANIC_GRACE);
            let reason = pass_on(readers.drain(), now).or(overdue.then_some(Asked::Panicked));
            if panics.seen() {
                panicked_at.get_or_insert_with(Instant::now);
            }
            if let (None, Some(reason)) = (asked, reason) {
                asked = Some(reason);
                stop.stop();
            }
        }
        (asked, running.join())
    });
    pass_on(readers.drain(), Instant::now());
    match outcome {
        Ok(outcome) => (asked, outcome),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// How a run ended, for the user.
#[derive(Debug, PartialEq, Eq)]
pub struct End {
    pub code: Code,
    pub message: String,
}

impl End {
    pub fn of(asked: Option<Asked>, end: &RunEnd, panicked: bool) -> Self {
        let (code, message) = match (end, asked) {
            (RunEnd::Failed { reason, .. }, _) => (Code::GuestCrashed, reason.clone()),
            (RunEnd::TripleFault { rip, .. }, _) => {
                let place = rip.map(|rip| format!(" at {rip:#x}")).unwrap_or_default();
                (Code::GuestCrashed, format!("the guest crashed: triple fault{place}"))
            }
            _ if panicked => (Code::GuestCrashed, "the guest kernel panicked".to_owned()),
            (RunEnd::Finished { .. }, _) => (Code::Done, "--max-hits reached".to_owned()),
            (RunEnd::Reset, _) => (Code::Done, "the guest rebooted".to_owned()),
            (RunEnd::PowerOff, _) => (Code::Done, "the guest powered off".to_owned()),
            (RunEnd::Halted, _) => (Code::Done, "the guest halted".to_owned()),
            (RunEnd::Stopped, Some(Asked::TimedOut)) => (Code::Timeout, "timeout".to_owned()),
            (RunEnd::Stopped, Some(Asked::OutputLost)) => {
                (Code::Done, "standard output takes no more".to_owned())
            }
            (RunEnd::Stopped, Some(Asked::Client)) => (Code::Done, "it was stopped".to_owned()),
            (RunEnd::Stopped, _) => (Code::Interrupted, "interrupted".to_owned()),
        };
        Self { code, message }
    }
}
