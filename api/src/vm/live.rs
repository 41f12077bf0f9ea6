//! One machine of the service, from its making to its end.

use std::io::Write;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use std::{fmt, io};

use guest::Guest;
use probe_core::engine::Engine;
use probe_core::paging::TranslateError;
use probe_core::probe::{Counts, Probe, Timed};
use probe_core::stop::StopHandler;
use probe_core::{Gpa, Gva, RegistersError, VcpuId, VcpuState};
use vmm::{Control, ExitCounts, GuestRam, Host, Machine, Paused, Run};

use super::drive::{Asked, End, Wanted, drive};
use super::log::Log;
use super::setup::{Beginning, Order, Setup, arm, program};
use crate::events::{Event, Programs, Readers};
use crate::exit::{Code, Failure};
use crate::images::chain;
use crate::output::Label;
use crate::own::Own;
use crate::probes::{self, Resolved};
use crate::snapshot::{Part, SavedProbe, Source};

/// Events that are kept.
const EVENTS: usize = 65_536;
/// Bytes of the console that are kept.
const CONSOLE_BYTES: usize = 1 << 20;
/// How often something may be sent to the console before the guest reads.
const CONSOLE_WAITING: usize = 16;

/// Why a machine does not do what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error("{0}; it is {1} now")]
    State(&'static str, State),
    #[error("The machine has no probe {0}; list them with 'vmprobe probe ls'")]
    NoProbe(u32),
    #[error("Probe {0} was removed; add it anew")]
    Removed(u32),
    #[error("The machine has no vCPU {0}; they are 0 to {last}", last = .1 - 1)]
    NoVcpu(u32, u32),
    #[error(
        "The guest does not read its serial line, and enough waits there; try again when it has read some"
    )]
    ConsoleFull,
    #[error("The run is about to end; ask again")]
    Ending,
    #[error(
        "The run failed, and what was in its vCPUs is lost; its memory can be read by physical addresses"
    )]
    StatesLost,
    #[error(transparent)]
    Registers(#[from] RegistersError),
    #[error(
        "{0} is not mapped in the address space of vCPU {1}, or is no RAM; 'vmprobe guest translate' shows how far its page tables lead"
    )]
    NotMapped(Gva, VcpuId),
    #[error("{0} is not in the guest's RAM")]
    NotRam(Gpa),
    #[error(transparent)]
    Translate(#[from] TranslateError),
    #[error(
        "{0}: Probes on modules cannot be added to a machine of the service yet; use 'vmprobe run', or probe an address"
    )]
    Module(String),
    #[error(transparent)]
    Refused(#[from] Failure),
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Created,
    Running,
    Paused,
    Ended,
    Failed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "new",
            State::Running => "running",
            State::Paused => "paused",
            State::Ended => "at its end",
            State::Failed => "at its end, and has failed",
        })
    }
}

pub(super) enum Phase {
    Created {
        machine: Machine,
        handlers: Vec<Box<dyn StopHandler>>,
        readers: Readers,
    },
    Running,
    Paused(Paused),
    /// `states` are the vCPUs', none if the host failed.
    Ended {
        age: Duration,
        end: End,
        states: Vec<VcpuState>,
    },
}

impl Phase {
    pub(super) fn state(&self) -> State {
        match self {
            Phase::Created { .. } => State::Created,
            Phase::Running => State::Running,
            Phase::Paused(_) => State::Paused,
            Phase::Ended { end: End { code: Code::Done | Code::Interrupted, .. }, .. } => State::Ended,
            Phase::Ended { .. } => State::Failed,
        }
    }
}

/// A hit, with what it takes to show it.
#[derive(Clone, Debug)]
pub struct Hit {
    pub event: Event,
    pub label: Arc<Label>,
}

struct Entry {
    label: Arc<Label>,
    probe: Arc<Probe>,
    removed: bool,
}

/// A probe as clients see it.
#[derive(Clone, Debug)]
pub struct ProbeStatus {
    pub number: u32,
    pub label: Arc<Label>,
    pub enabled: bool,
    pub removed: bool,
    pub counts: Counts,
    /// In nanoseconds.
    pub timed: Timed,
}

impl Entry {
    fn status(&self, number: u32) -> ProbeStatus {
        ProbeStatus {
            number,
            label: Arc::clone(&self.label),
            enabled: self.probe.is_enabled(),
            removed: self.removed,
            counts: self.probe.counts(),
            timed: self.probe.timed(),
        }
    }
}

/// The entries of probes that were armed.
fn entries(found: &[Resolved], armed: Vec<Option<Arc<Probe>>>) -> impl Iterator<Item = Entry> {
    found.iter().zip(armed).filter_map(|(resolved, probe)| {
        Some(Entry { label: Arc::new(Label::of(resolved)), probe: probe?, removed: false })
    })
}

/// A machine. Its methods may wait for its vCPUs, so they are not for threads that must not wait.
pub struct Vm {
    made: Instant,
    host: Host,
    image: String,
    pub(super) guest: Guest,
    pub(super) memory: GuestRam,
    pub(super) engine: Arc<Engine>,
    pub(super) control: Control,
    pub(super) vcpus: u32,
    programs: Programs,
    own: Own,
    pub(super) phase: Mutex<Phase>,
    phase_changed: Condvar,
    probes: Mutex<Vec<Entry>>,
    notices: Mutex<Vec<String>>,
    /// Whoever drives it is to stop it, when the guest has had this long to end by itself.
    stopping: Mutex<Option<Duration>>,
    pub events: Log<Hit>,
    pub console: Arc<Log<u8>>,
    /// What is sent to the console, to the thread that waits until the guest reads it.
    to_console: SyncSender<Vec<u8>>,
}

/// The guest's first serial line, into the log.
struct Console(Arc<Log<u8>>);

impl Write for Console {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.append(buf.iter().copied());
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What they guard is changed at once, when nothing can fail any more.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vm {
    /// Makes a machine of an image (as it was asked for), with the probes of the snapshot if it is restored from one.
    ///
    /// # Errors
    /// What is wrong with the image, the snapshot, the sizes or the host.
    pub fn new(host: Host, image: &str, guest: Guest, beginning: Beginning<'_>) -> Result<Self, Failure> {
        let specs = match &beginning {
            Beginning::Boot(_) => Vec::new(),
            Beginning::Restore(saved) => saved.specs(),
        };
        let found = probes::find(&guest, &specs)?.found;
        let made = Instant::now();
        let console = Arc::new(Log::new(CONSOLE_BYTES));
        let setup = Setup::new(Order {
            host: &host,
            guest,
            beginning,
            serial: Box::new(Console(Arc::clone(&console))),
            probes: found,
            count_only: false,
            max_hits: None,
            report_init: false,
            pause_at_panic: false,
            start: made,
        })?;
        let Setup { machine, guest, probes, handlers, readers, memory, engine, programs, own, armed } = setup;
        let entries = entries(&probes, armed).collect();
        let (to_console, sent) = sync_channel::<Vec<u8>>(CONSOLE_WAITING);
        let mut line = machine.serial_input();
        // It ends with the machine, or with this.
        let sender = thread::Builder::new().name("serial input".to_owned());
        let sender = sender.spawn(move || sent.iter().try_for_each(|bytes| line.write_all(&bytes)).ok());
        sender.map_err(|error| Failure::Host(format!("No thread for the serial line: {error}")))?;
        Ok(Self {
            made,
            host,
            image: image.to_owned(),
            guest,
            memory,
            engine,
            control: machine.control(),
            vcpus: u32::try_from(machine.states().len()).unwrap_or(u32::MAX),
            programs,
            own,
            phase: Mutex::new(Phase::Created { machine, handlers, readers }),
            phase_changed: Condvar::new(),
            probes: Mutex::new(entries),
            notices: Mutex::default(),
            stopping: Mutex::default(),
            events: Log::new(EVENTS),
            console,
            to_console,
        })
    }

    /// Sends bytes to the guest over its first serial line, when it reads them.
    ///
    /// # Errors
    /// Too much waits there, or the run is over.
    pub fn send_to_console(&self, bytes: Vec<u8>) -> Result<(), VmError> {
        let state = self.state();
        let over = || VmError::State("The guest reads nothing any more", state);
        if matches!(state, State::Ended | State::Failed) {
            return Err(over());
        }
        self.to_console.try_send(bytes).map_err(|error| match error {
            TrySendError::Full(_) => VmError::ConsoleFull,
            TrySendError::Disconnected(_) => over(),
        })
    }

    /// Its image, as it was asked for.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// How often each vCPU has left the guest, and why.
    pub fn exits(&self) -> Vec<ExitCounts> {
        self.control.exits()
    }

    /// Guest memory, bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.bytes()
    }

    pub fn state(&self) -> State {
        lock(&self.phase).state()
    }

    /// How the run ended, for people; empty before.
    pub fn end(&self) -> String {
        match &*lock(&self.phase) {
            Phase::Ended { end, .. } => end.message.clone(),
            _ => String::new(),
        }
    }

    /// Since it was made, and until its end.
    pub fn age(&self) -> Duration {
        match &*lock(&self.phase) {
            Phase::Ended { age, .. } => *age,
            _ => self.made.elapsed(),
        }
    }

    /// What has to be said about the probes.
    pub fn notices(&self) -> Vec<String> {
        let mut notices = lock(&self.notices);
        notices.extend(self.engine.take_notices().iter().map(ToString::to_string));
        notices.extend(self.own.take_notes());
        notices.clone()
    }

    /// Lets it run for the first time.
    ///
    /// # Errors
    /// It has been started before, or no thread can be had.
    pub fn start(self: &Arc<Self>) -> Result<(), VmError> {
        let mut phase = lock(&self.phase);
        let (machine, handlers, readers) = match std::mem::replace(&mut *phase, Phase::Running) {
            Phase::Created { machine, handlers, readers } => (machine, handlers, readers),
            other => {
                *phase = other;
                return Err(VmError::State("A machine is started once", phase.state()));
            }
        };
        // The phase says that it runs when its threads are there to be paused.
        let vm = Arc::clone(self);
        let started = machine.start(handlers).map_err(|error| chain(&error)).and_then(|run| {
            let keeper = thread::Builder::new().name("keeper".to_owned());
            let kept = keeper.spawn(move || vm.keep(run, readers));
            kept.map_err(|error| format!("no thread could be had for it: {error}"))
        });
        if let Err(message) = started {
            let end = End { code: Code::Host, message: message.clone() };
            *phase = Phase::Ended { age: self.made.elapsed(), end, states: Vec::new() };
            return Err(Failure::Host(message).into());
        }
        Ok(())
    }

    /// Waits for its end, on a thread of its own, and passes on what comes of it.
    fn keep(&self, run: Run, readers: Readers) {
        let (asked, outcome) = drive(run, readers, &self.own.panics, |hits, _| {
            self.publish(hits);
            lock(&self.stopping).map(|grace| Wanted { by: Asked::Client, grace })
        });
        let (end, states) = match outcome {
            Ok(report) => (
                End::of(asked, &report.end, self.own.panics.seen()),
                report.vcpus.iter().map(|vcpu| vcpu.state).collect(),
            ),
            Err(error) => (End { code: Code::Host, message: error.to_string() }, Vec::new()),
        };
        // Nobody arms anything between the two.
        let probes = lock(&self.probes);
        self.engine.disarm_all(&self.memory);
        self.finish(end, states);
        drop(probes);
    }

    fn publish(&self, batch: &[Event]) {
        if batch.is_empty() {
            return;
        }
        let probes = lock(&self.probes);
        let hits = batch.iter().filter_map(|event| {
            let entry = probes.get(usize::try_from(event.probe).ok()?)?;
            Some(Hit { event: event.clone(), label: Arc::clone(&entry.label) })
        });
        self.events.append(hits);
    }

    fn finish(&self, end: End, states: Vec<VcpuState>) {
        *lock(&self.phase) = Phase::Ended { age: self.made.elapsed(), end, states };
        self.phase_changed.notify_all();
        self.events.close();
        self.console.close();
    }

    /// Has every vCPU stand between two instructions.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&self) -> Result<(), VmError> {
        let mut phase = lock(&self.phase);
        if !matches!(*phase, Phase::Running) {
            return Err(VmError::State("Only a machine that runs can be paused", phase.state()));
        }
        *phase = Phase::Paused(self.control.pause());
        Ok(())
    }

    /// Lets a paused machine run on.
    ///
    /// # Errors
    /// It is not paused.
    pub fn resume(&self) -> Result<(), VmError> {
        let mut phase = lock(&self.phase);
        if !matches!(*phase, Phase::Paused(_)) {
            return Err(VmError::State("Only a paused machine can be resumed", phase.state()));
        }
        *phase = Phase::Running;
        Ok(())
    }

    /// Saves it, with the probes that have not been removed. It is paused until `write` has taken its memory.
    ///
    /// # Errors
    /// It has not been started or has ended, or what failed; the machine goes on.
    pub fn save(&self, write: &mut dyn FnMut(Part<'_>) -> io::Result<()>) -> Result<(), VmError> {
        let state = self.state();
        if !matches!(state, State::Running | State::Paused) {
            return Err(VmError::State("Only a machine that runs or is paused can be saved", state));
        }
        let entries = lock(&self.probes);
        let there = entries.iter().filter(|entry| !entry.removed && self.engine.has(&entry.probe));
        let source = Source {
            control: &self.control,
            engine: &self.engine,
            image: &self.image,
            guest: &self.guest,
            memory_bytes: self.memory.bytes(),
            booted: self.own.text.has_booted(),
            probes: there
                .map(|entry| SavedProbe { spec: entry.label.spec.clone(), enabled: entry.probe.is_enabled() })
                .collect(),
        };
        drop(entries);
        Ok(source.save(write)?)
    }

    /// Ends the run, and returns when it has ended. A guest that runs has `grace` to do so by itself when its power button has been
    /// pressed; one whose `grace` is zero, or that does not listen to its button, has not.
    pub fn stop(&self, grace: Duration) {
        let grace = if self.state() == State::Running { grace } else { Duration::ZERO };
        {
            let mut stopping = lock(&self.stopping);
            *stopping = Some(stopping.map_or(grace, |earlier| earlier.min(grace)));
        }
        self.programs.wake_reader();
        let mut phase = lock(&self.phase);
        if let Phase::Created { machine, .. } = &*phase {
            let states = machine.states();
            drop(phase);
            self.finish(End { code: Code::Done, message: "it was never started".to_owned() }, states);
            return;
        }
        while !matches!(*phase, Phase::Ended { .. }) {
            phase = self.phase_changed.wait(phase).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Arms all of the probes, or none. Returns them, and what has to be said about them.
    ///
    /// # Errors
    /// The first one that is refused, and why.
    pub fn add(&self, specs: &[String]) -> Result<(Vec<ProbeStatus>, Vec<String>), VmError> {
        let found = probes::find(&self.guest, specs)?;
        if let Some(probe) = found.found.iter().find(|probe| probe.waits_for_module()) {
            return Err(VmError::Module(probe.text.clone()));
        }
        let mut notes = found.notes;
        let about = |probe: &Resolved| {
            let place = probe.place.iter().flat_map(|place| &place.notes);
            place.map(|note| format!("{}: {note}", probe.text)).collect::<Vec<_>>()
        };
        notes.extend(found.found.iter().flat_map(about));

        let mut entries = lock(&self.probes);
        let state = self.state();
        if matches!(state, State::Ended | State::Failed) {
            return Err(VmError::State("The run is over", state));
        }
        let first = entries.len();
        // In this order: a hit finds what its probe fetches.
        let mut programs = Vec::clone(&self.programs.load());
        programs.truncate(first);
        programs.extend(found.found.iter().map(|probe| program(probe, false)));
        self.programs.store(Arc::new(programs));
        let armed = arm(&self.host, &self.engine, &self.memory, &found.found, first as u64)?;
        entries.extend(self::entries(&found.found, armed));
        let added = (0..).zip(entries.iter()).skip(first).map(|(number, entry)| entry.status(number));
        Ok((added.collect(), notes))
    }

    pub fn probes(&self) -> Vec<ProbeStatus> {
        (0..).zip(lock(&self.probes).iter()).map(|(number, entry)| entry.status(number)).collect()
    }

    /// Does something with each of the probes, if all of them are there.
    fn with_probes(
        &self,
        numbers: &[u32],
        mut act: impl FnMut(u32, &mut Entry) -> Result<(), VmError>,
    ) -> Result<Vec<ProbeStatus>, VmError> {
        let mut entries = lock(&self.probes);
        let index = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        if let Some(number) = numbers.iter().find(|number| index(**number) >= entries.len()) {
            return Err(VmError::NoProbe(*number));
        }
        numbers
            .iter()
            .map(|number| {
                let entry = &mut entries[index(*number)];
                act(*number, entry)?;
                Ok(entry.status(*number))
            })
            .collect()
    }

    /// Lets probes take hits, or keeps them from it.
    ///
    /// # Errors
    /// One of them does not exist, or cannot be enabled again; those before it have been.
    pub fn set_enabled(&self, numbers: &[u32], enabled: bool) -> Result<Vec<ProbeStatus>, VmError> {
        self.with_probes(numbers, |number, entry| {
            if entry.removed {
                return Err(VmError::Removed(number));
            }
            if enabled {
                let result = self.engine.enable(&self.memory, &entry.probe);
                result.map_err(|error| Failure::Probe(error.to_string()))?;
            } else {
                self.engine.disable(&self.memory, &entry.probe);
            }
            Ok(())
        })
    }

    /// Takes probes out.
    ///
    /// # Errors
    /// One of them does not exist.
    pub fn remove(&self, numbers: &[u32]) -> Result<Vec<ProbeStatus>, VmError> {
        self.with_probes(numbers, |_, entry| {
            self.engine.remove(&self.memory, &entry.probe);
            entry.removed = true;
            Ok(())
        })
    }
}
