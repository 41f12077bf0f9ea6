//! A run, from its start to its end.

use std::thread;
use std::time::{Duration, Instant};

use vmm::{Run, RunEnd, RunError, RunReport};

use crate::events::{Event, Readers};
use crate::exit::Code;
use crate::own::Panics;

/// How long a panicking guest may go on, to print its last words, where it does not reset by itself.
const PANIC_GRACE: Duration = Duration::from_secs(5);

/// The longest time that a guest gets to end by itself.
const MAX_GRACE: Duration = Duration::from_secs(24 * 60 * 60);

/// Somebody wants the end of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub by: Asked,
    /// How long the guest has to end by itself, once its power button has been pressed. Zero: the button is left alone.
    pub grace: Duration,
}

impl Wanted {
    pub fn at_once(by: Asked) -> Self {
        Self { by, grace: Duration::ZERO }
    }
}

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
/// does a guest that panics and does not reset. It is called once more when the run has ended. Who asks again may leave the guest less
/// time, not more. A guest that does not listen to its power button gets none.
pub fn drive(
    run: Run,
    mut readers: Readers,
    panics: &Panics,
    mut pass_on: impl FnMut(&[Event], Instant) -> Option<Wanted>,
) -> (Option<Asked>, Result<RunReport, RunError>) {
    let (stop, control) = (run.stop_handle(), run.control());
    let driver = thread::current();
    let (asked, outcome) = thread::scope(|scope| {
        let running = scope.spawn(move || {
            let outcome = run.wait();
            driver.unpark();
            outcome
        });
        let mut asked: Option<(Asked, Instant)> = None;
        let mut stopped = false;
        let mut panicked_at = None;
        while !running.is_finished() {
            readers.wait();
            let now = Instant::now();
            let overdue = panicked_at.is_some_and(|at| now - at > PANIC_GRACE);
            let asks = pass_on(readers.drain(), now);
            // A guest that has panicked does not end by itself any more, however long it was given.
            let panicked = overdue.then_some(Wanted::at_once(Asked::Panicked));
            if let Some(Wanted { by, grace }) = panicked.or(asks) {
                let grace = grace.min(MAX_GRACE);
                let listens = || !grace.is_zero() && control.press_power_button();
                let first = || (by, if listens() { now + grace } else { now });
                let (_, deadline) = asked.get_or_insert_with(first);
                *deadline = (*deadline).min(now + grace);
            }
            if panics.seen() {
                panicked_at.get_or_insert_with(Instant::now);
            }
            if !stopped && asked.is_some_and(|(_, deadline)| now >= deadline) {
                stopped = true;
                stop.stop();
            }
        }
        (asked.map(|(by, _)| by), running.join())
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
            (RunEnd::PowerOff, Some(Asked::TimedOut)) => {
                (Code::Timeout, "timeout; the guest powered off".to_owned())
            }
            (RunEnd::PowerOff, Some(Asked::Interrupted)) => {
                (Code::Interrupted, "interrupted; the guest powered off".to_owned())
            }
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
