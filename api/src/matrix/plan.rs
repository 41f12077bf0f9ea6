//! Runs the cells, as many at once as the host has room for.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;

use matrix::axes::Accel;
use matrix::schedule::{Resources, next};
use matrix::{Axis, Cell, CellResult, MatrixFile, Status};
use nested::{Cache, stderr_progress};
use vmm::doctor::Verdict;

use super::cell;
use super::directory::Directory;
use super::kernels::{Kernel, Kernels};
use super::progress::Progress;
use super::workload::Initrds;
use crate::accel::{Host, Place, choose};
use crate::cli;
use crate::exit::Failure;
use crate::images::{self, chain};

/// What a run takes beside its guest's memory, bytes: on KVM the command itself, nested the emulated machine with its files.
const KVM_MEMORY: u64 = 64 << 20;
const NESTED_MEMORY: u64 = (1 << 30) + (256 << 20);

/// Room that is left to the rest of the host, bytes.
const SPARE_MEMORY: u64 = 512 << 20;

/// What the cells may use of the host together; what is free, where nothing is said.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// CPUs.
    pub jobs: Option<u32>,
    /// Bytes.
    pub memory: Option<u64>,
}

/// The cells of a matrix, and where they go.
pub struct Plan<'a> {
    pub file: &'a MatrixFile,
    pub cells: &'a [Cell],
    pub axes: &'a [Axis],
    pub directory: PathBuf,
    pub verdict: Verdict,
    pub stop: &'a AtomicBool,
}

/// A cell that can be run.
struct Ready {
    place: usize,
    kernel: Kernel,
    need: Resources,
}

impl Plan<'_> {
    /// Runs the cells at these places. Results are kept as they come.
    ///
    /// # Errors
    /// A kernel cannot be had, or a result not be kept: then no further cell begins.
    pub fn run(&self, places: &[usize], room: Room, directory: &mut Directory) -> Result<(), Failure> {
        let mut waiting = self.ready(places)?;
        let free = Resources {
            memory: room.memory.unwrap_or_else(|| available_memory().saturating_sub(SPARE_MEMORY)),
            cpus: room.jobs.unwrap_or_else(host_cpus),
        };
        let progress = Progress::new(waiting.len());
        let done = thread::scope(|scope| {
            let (sender, finished) = mpsc::channel();
            let (mut free, mut running) = (free, 0);
            let mut kept = Ok(());
            loop {
                while kept.is_ok() && !self.stop.load(Ordering::Relaxed) {
                    let needs: Vec<Resources> = waiting.iter().map(|ready| ready.need).collect();
                    let Some(at) = next(&needs, free, running == 0) else { break };
                    let ready = waiting.remove(at);
                    free = free.less(ready.need);
                    running += 1;
                    let line = progress.begin(&self.label(ready.place));
                    let sender = sender.clone();
                    scope.spawn(move || {
                        let result = self.attempts(&ready);
                        // The receiver is there until all have come.
                        sender.send((ready, result, line)).ok();
                    });
                }
                if running == 0 {
                    break kept;
                }
                // A sender is held above.
                let Ok((ready, result, line)) = finished.recv() else { break kept };
                (free, running) = (free.more(ready.need), running - 1);
                progress.end(&line, &self.label(ready.place), &result);
                // What was interrupted is to be run by the next call.
                if result.status() != Status::NotRun && kept.is_ok() {
                    kept = directory.add(result);
                }
            }
        });
        progress.finish();
        done
    }

    fn label(&self, place: usize) -> String {
        self.cells[place].label(self.axes)
    }

    /// Finds the kernels, and prepares the emulated machine if a cell needs it, before anything runs.
    fn ready(&self, places: &[usize]) -> Result<Vec<Ready>, Failure> {
        let mut kernels = Kernels::new(Initrds::new(&self.file.workload, &self.directory)?);
        let mut ready = Vec::with_capacity(places.len());
        let mut nested = false;
        for place in places {
            let cell = &self.cells[*place];
            let kernel = kernels.find(&cell.kernel)?;
            let linux = images::is_file(&kernel.image);
            let is_nested = self.is_nested(cell.accel, linux);
            nested |= is_nested;
            let (memory, cpus) = if is_nested { (NESTED_MEMORY, 1) } else { (KVM_MEMORY, cell.vcpus) };
            let need = Resources { memory: cell.memory.0.saturating_add(memory), cpus };
            ready.push(Ready { place: *place, kernel, need });
        }
        if nested {
            let cache = Cache::from_env().map_err(|error| Failure::Host(chain(&error)))?;
            nested::prepare(&cache, stderr_progress().as_ref())
                .map_err(|error| Failure::Host(chain(&error)))?;
        }
        Ok(ready)
    }

    /// Whether a cell runs in the emulated machine, which has one busy thread however many vCPUs the guest has.
    fn is_nested(&self, accel: Accel, linux: bool) -> bool {
        let asked = match accel {
            Accel::Auto => cli::Accel::Auto,
            Accel::Kvm => cli::Accel::Kvm,
            Accel::Nested => cli::Accel::Nested,
            Accel::NestedIcount => cli::Accel::NestedIcount,
        };
        matches!(choose(asked, Host::of(self.verdict), linux).0, Place::Nested(_))
    }

    /// Runs a cell until it passes or has been tried often enough.
    fn attempts(&self, ready: &Ready) -> CellResult {
        let cell = &self.cells[ready.place];
        let directory = cell::directory(&self.directory, &cell.file_name(ready.place, self.axes));
        let mut result = CellResult::not_run(cell.clone());
        for _ in 0..=self.file.limits.retries {
            let order = cell::Order {
                file: self.file,
                cell,
                kernel: ready.kernel.clone(),
                directory: directory.clone(),
                stop: self.stop,
            };
            result.attempts.push(cell::run(&order));
            if result.status() != Status::Failed || self.stop.load(Ordering::Relaxed) {
                break;
            }
        }
        result
    }
}

/// CPUs that this process may run on.
pub fn host_cpus() -> u32 {
    thread::available_parallelism().map_or(1, |count| u32::try_from(count.get()).unwrap_or(u32::MAX))
}

/// Memory that can be had without swapping, bytes (MemAvailable of proc_meminfo(5)); what cannot be told is taken for little.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse::<u64>().ok());
    kib.map_or(2 << 30, |kib| kib << 10)
}
