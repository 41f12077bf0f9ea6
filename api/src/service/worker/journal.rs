//! Writes the machine's events to its journal: one more reader of its log, so that it slows neither the guest nor other clients.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};

use super::super::encoded::encode;
use super::super::journal::{Cursor, Limits, Writer, lock};
use super::super::stream::BATCH;
use super::Member;
use crate::contract::Probe;
use crate::exit::Failure;
use crate::vm::{Hit, Page, State};

/// How soon what could not be written is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How old what the journal knows of the machine, and its probes' counts, may become while events come.
const COUNTS_AGE: Duration = Duration::from_secs(1);
/// Notices that are kept.
const NOTICES: usize = 10;

#[derive(Clone, Copy, Debug)]
struct Progress {
    /// All events below it are on disk for good, or lost.
    durable: u64,
    /// The run is over, and its rest was written, or could not be at first.
    finished: bool,
}

/// A machine's journal, as its process sees it.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    machine: String,
    /// Of the directory, as long as the process lives, so that nobody takes it over.
    _lock: File,
    progress: watch::Sender<Progress>,
    /// The probes have changed.
    probes_changed: Notify,
    notices: Mutex<Vec<String>>,
}

impl Journal {
    /// Begins the journal of a machine.
    ///
    /// # Errors
    /// It cannot be written, or another process does so.
    pub fn create(dir: &Path, limits: Limits, machine: &str) -> Result<(Self, Writer), Failure> {
        let refused = |error| refused(dir, &error);
        let lock = lock(dir).map_err(refused)?;
        let writer = Writer::create(dir, machine, limits).map_err(refused)?;
        let journal = Self {
            dir: dir.to_owned(),
            machine: machine.to_owned(),
            _lock: lock,
            progress: watch::Sender::new(Progress { durable: 0, finished: false }),
            probes_changed: Notify::new(),
            notices: Mutex::default(),
        };
        Ok((journal, writer))
    }

    pub fn durable(&self) -> u64 {
        self.progress.borrow().durable
    }

    /// A reader of what is durable.
    pub fn cursor(&self) -> Cursor {
        Cursor::new(self.dir.clone(), self.machine.clone())
    }

    /// Comes when more is durable than `told`; never if that is all below `next`.
    pub async fn beyond(&self, told: Option<u64>, next: u64) {
        let more = |progress: &Progress| told.is_none_or(|told| told < progress.durable);
        let waits = told.is_none_or(|told| told < next);
        if !waits || self.progress.subscribe().wait_for(more).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Comes when the run is over and its rest was written, or could not be at first.
    pub async fn finished(&self) {
        self.progress.subscribe().wait_for(|progress| progress.finished).await.ok();
    }

    pub fn probes_changed(&self) {
        self.probes_changed.notify_one();
    }

    pub fn notices(&self) -> Vec<String> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn note(&self, notice: String) {
        tracing::warn!("Machine {}: {notice}", self.machine);
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if notices.len() == NOTICES {
            notices.remove(0);
        }
        notices.push(notice);
    }
}

fn refused(dir: &Path, error: &io::Error) -> Failure {
    Failure::Host(format!(
        "{}: The machine's journal cannot be written: {error}; make room there, or start the service without --journal",
        dir.display()
    ))
}

/// What keeps a journal: its writer, and where that is.
pub struct Keeper {
    member: Arc<Member>,
    journal: Arc<Journal>,
    writer: Writer,
    /// The sequence number that is written next.
    next: u64,
    /// How many probes the journal knows, and since when.
    probes: usize,
    described: Instant,
    /// It could not be written the last time.
    broken: bool,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // Nobody waits for a keeper that has panicked.
        self.progress(true);
    }
}

impl Keeper {
    /// Writes down what the machine is.
    ///
    /// # Errors
    /// That cannot be written.
    pub fn new(member: Arc<Member>, journal: Arc<Journal>, writer: Writer) -> Result<Self, Failure> {
        let (next, probes, described) = (0, 0, Instant::now());
        let mut keeper = Self { member, journal, writer, next, probes, described, broken: false };
        keeper.describe().map_err(|error| refused(&keeper.journal.dir, &error))?;
        Ok(keeper)
    }

    fn describe(&mut self) -> io::Result<()> {
        self.described = Instant::now();
        let probes: Vec<Probe> = self.member.vm.probes().into_iter().map(Probe::from).collect();
        let known = probes.len();
        self.writer.describe(&self.member.describe(), probes)?;
        self.probes = known;
        Ok(())
    }

    /// Writes until the run is over and all is written.
    pub fn keep(mut self, runtime: &Handle) {
        loop {
            let (page, described) = runtime.block_on(self.page());
            let closed = page.closed;
            match self.write(&page, described) {
                Ok(()) => self.progress(closed),
                Err(error) => self.fail(&error),
            }
            if closed && !self.broken {
                return;
            }
        }
    }

    /// The events that are to be written next, and whether the probes are to be written down too. It comes when something is to be done.
    async fn page(&self) -> (Page<Hit>, bool) {
        let log = &self.member.vm.events;
        if self.broken {
            // Meanwhile memory keeps what it can.
            tokio::time::sleep(RETRY).await;
            return (log.page(self.next, BATCH), true);
        }
        let due = async {
            match self.writer.due() {
                Some(due) => tokio::time::sleep_until(due.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            page = log.wait(self.next, BATCH) => (page, false),
            () = self.journal.probes_changed.notified() => (log.page(self.next, BATCH), true),
            () = due => (log.page(self.next, BATCH), false),
        }
    }

    fn write(&mut self, page: &Page<Hit>, described: bool) -> io::Result<()> {
        // A probe is written down before its events are durable, which they may be as soon as a segment is full.
        let probe = page.items.iter().map(|hit| hit.event.probe).max();
        let new = probe.is_some_and(|probe| usize::try_from(probe).is_ok_and(|probe| probe >= self.probes));
        let old = !page.items.is_empty() && self.described.elapsed() > COUNTS_AGE;
        if described || new || old {
            self.describe()?;
        }
        if page.lost > 0 {
            self.writer.gap(page.from)?;
        }
        for (sequence, hit) in (page.from..).zip(&page.items) {
            self.writer.event(sequence, |to| encode(sequence, hit, false, to))?;
        }
        if page.closed {
            self.writer.sync()?;
        }
        self.writer.settle()?;
        if std::mem::take(&mut self.broken) {
            let Page { from, lost, .. } = page;
            self.journal.note(format!(
                "The journal goes on with event {from}; {lost} events before it are lost to it"
            ));
        }
        if page.closed {
            // The end, with all that has to be said.
            self.describe()?;
        }
        self.next = page.from + page.items.len() as u64;
        Ok(())
    }

    fn progress(&self, finished: bool) {
        let durable = self.writer.durable();
        self.journal.progress.send_if_modified(|progress| {
            let changed = progress.durable != durable || progress.finished != finished;
            *progress = Progress { durable, finished };
            changed
        });
    }

    /// Goes back to what is durable.
    fn fail(&mut self, error: &io::Error) {
        self.writer.abandon();
        self.next = self.writer.durable();
        if !std::mem::replace(&mut self.broken, true) {
            let next = self.next;
            self.journal.note(format!(
                "The journal cannot be written from event {next} on: {error}; it is tried again"
            ));
        }
        // Nobody waits for a disk that may stay full.
        let over = matches!(self.member.vm.state(), State::Ended | State::Failed);
        self.progress(over);
    }
}
