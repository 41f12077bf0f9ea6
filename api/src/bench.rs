//! `vmprobe bench`: what a hit costs, next to a bare exit in the same run.
//!
//! The guest marks the start and end of each batch with a byte on its serial line, whose sink here is a clock. Exits and ioctls
//! are the machine's own counts, of two runs of one function alone of which one goes round twice as often.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use guest::Guest;
use guest::image::Image;
use probe_core::engine::{Engine, EngineConfig, VcpuEngine};
use probe_core::handler::{Handler, Hit, Verdict};
use probe_core::machine::PlainText;
use probe_core::patch::Place;
use probe_core::probe::{Counts, Probe, ProbeRequest};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{Gpa, Gva, PhysicalMemory, VcpuId, VcpuState};
use serde::Serialize;
use vmm::doctor;
use vmm::quartiles::Quartiles;
use vmm::{GuestRam, Machine, MachineConfig, RunEnd, RunReport, VcpuReport, layout};

use crate::cli::{BenchArgs, Output};
use crate::events::{self, Programs};
use crate::exit::{Code, Failure};
use crate::images::chain;
use crate::output::json_lines;
use crate::vm::{create_failure, kernel, open_host};

/// Rounds of a batch: short against the time that the host's scheduler gives a thread, so that most batches are undisturbed.
const BATCH: u32 = 20;

/// How often the idle machines take turns.
const IDLE_RUNS: u32 = 10;

/// Rounds after which exits and ioctls are counted.
const COUNTED: u32 = 1000;

/// What happens in a function of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Case {
    Plain,
    Port,
    Emulated,
    Filtered,
    Stepped,
    Returned,
}

impl Case {
    const ALL: [Self; 6] =
        [Self::Plain, Self::Port, Self::Emulated, Self::Filtered, Self::Stepped, Self::Returned];

    /// The function.
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Port => "port",
            Self::Emulated => "emulated",
            Self::Filtered => "filtered",
            Self::Stepped => "stepped",
            Self::Returned => "returned",
        }
    }

    fn probe(self, guest: &Guest) -> Result<Option<ProbeRequest>, Failure> {
        let at = |name: &str| {
            let gva = symbol(guest, name)?;
            let function = Some(symbol(guest, self.name())?);
            Ok::<_, Failure>(Place { gva, gpa: Gpa(gva.0), function })
        };
        Ok(match self {
            Self::Plain | Self::Port => None,
            Self::Emulated => Some(ProbeRequest::new(at(self.name())?)),
            Self::Filtered => Some(ProbeRequest::new(at(self.name())?).with_handler(Arc::new(Filter))),
            Self::Stepped => Some(ProbeRequest::new(at("stepped_instruction")?)),
            Self::Returned => Some(ProbeRequest::for_returns(at(self.name())?)),
        })
    }
}

/// Wants no hit reported.
struct Filter;

impl Handler for Filter {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        Verdict::FILTER
    }
}

/// Who handles the stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stops {
    /// The engine, with every case's probe armed.
    Probed,
    /// The engine, without a probe.
    Idle,
    /// Nobody: there is no engine.
    Nobody,
}

/// A machine without an engine.
struct NoEngine;

impl StopHandler for NoEngine {
    fn on_stop(&mut self, _: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
        Resume::Fail { reason: format!("{stop:?} in a machine without probes") }
    }

    fn on_text_write(&mut self, _: &dyn PhysicalMemory, _: Gpa, _: &[u8]) {}

    fn wants_breakpoints(&self) -> bool {
        false
    }
}

/// A sink that notes when it is written to.
#[derive(Clone)]
struct Clock(Arc<Mutex<Vec<Instant>>>);

impl Clock {
    fn with_room(marks: usize) -> Self {
        Self(Arc::new(Mutex::new(Vec::with_capacity(marks))))
    }

    /// Nanoseconds a round between each mark and the next one.
    fn rounds(&self) -> Vec<f64> {
        let marks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let pairs = marks.windows(2);
        pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e9 / f64::from(BATCH)).collect()
    }
}

impl io::Write for Clock {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(Instant::now());
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What one run of the guest has shown.
struct Run {
    /// Nanoseconds a round, by the entries of the schedule.
    rounds: Vec<f64>,
    report: RunReport,
    /// By the order of [`Case::ALL`], those that have a probe.
    counts: Vec<(Case, Counts)>,
}

/// Measures on this host's KVM.
pub fn bench(args: &BenchArgs) -> Result<Code, Failure> {
    let image = Image::parse(guest::programs::BENCH.to_vec());
    let guest = image.map_err(Into::into).and_then(Guest::new);
    let guest = guest.map_err(|error| Failure::Image(format!("The bench guest: {}", chain(&error))))?;
    let (exit_ns, instruction_ns) = doctor::costs();
    let mut rows = hits(&guest, args.turns)?;
    rows.extend(idle(&guest, args.turns.div_ceil(IDLE_RUNS))?);
    match args.output {
        Output::Json => json_lines(&rows)?,
        Output::Text => {
            if let (Some(exit_ns), Some(instruction_ns)) = (exit_ns, instruction_ns) {
                println!("KVM alone: {exit_ns:.0} ns a bare exit, {instruction_ns:.1} ns an instruction");
            }
            println!("{} turns of {BATCH} rounds each\n", args.turns);
            println!(
                "{:9} {:>10} {:>21}  {:>6} {:>15}  {:>6} {:>6}",
                "", "ns", "", "x", "", "exits", "ioctls"
            );
            rows.iter().for_each(|row| println!("{row}"));
        }
    }
    Ok(Code::Done)
}

/// One case's figures.
#[derive(Debug, Serialize)]
struct Row {
    case: &'static str,
    /// Nanoseconds a round; but for the plain loop and the idle ones less those of the plain loop.
    ns: f64,
    ns_quartiles: [f64; 2],
    /// As a multiple of a bare exit, or of the time without an engine.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_quartiles: Option<[f64; 2]>,
    /// A round.
    #[serde(skip_serializing_if = "Option::is_none")]
    exits: Option<f64>,
    /// A round, besides KVM_RUN.
    #[serde(skip_serializing_if = "Option::is_none")]
    ioctls: Option<f64>,
    /// Hits that the reader did not come to, of all turns.
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<u64>,
}

impl Row {
    fn new(case: &'static str, ns: Vec<f64>, ratios: Vec<f64>) -> Option<Self> {
        let (ns, ratio) = (Quartiles::of(ns)?, Quartiles::of(ratios));
        Some(Self {
            case,
            ns: ns.median,
            ns_quartiles: [ns.lower, ns.upper],
            ratio: ratio.map(|ratio| ratio.median),
            ratio_quartiles: ratio.map(|ratio| [ratio.lower, ratio.upper]),
            exits: None,
            ioctls: None,
            lost: None,
        })
    }
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [lower, upper] = self.ns_quartiles;
        write!(f, "{:9} {:10.0} {:>21}", self.case, self.ns, format!("{lower:.0}..{upper:.0}"))?;
        if let (Some(ratio), Some([lower, upper])) = (self.ratio, self.ratio_quartiles) {
            write!(f, "  {ratio:6.3} {:>15}", format!("{lower:.3}..{upper:.3}"))?;
        }
        if let (Some(exits), Some(ioctls)) = (self.exits, self.ioctls) {
            let ratio_columns = if self.ratio.is_none() { 24 } else { 0 };
            write!(f, "{:ratio_columns$}  {exits:6.2} {ioctls:6.2}", "")?;
        }
        match self.lost {
            Some(lost) if lost > 0 => write!(f, "  {lost} lost"),
            _ => Ok(()),
        }
    }
}

/// All cases, in turns.
fn hits(guest: &Guest, turns: u32) -> Result<Vec<Row>, Failure> {
    let schedule: Vec<(Case, u32)> = (0..turns).flat_map(|_| Case::ALL.map(|case| (case, BATCH))).collect();
    let run = run(guest, &schedule, Stops::Probed)?;
    let expected = u64::from(turns) * u64::from(BATCH);
    for (case, counts) in &run.counts {
        if counts.hits != expected {
            let (name, hits) = (case.name(), counts.hits);
            return Err(Failure::Host(format!(
                "The probe in {name} was hit {hits} times, and the guest went there {expected} times; this is a bug, please report it"
            )));
        }
    }
    let (turns, _) = run.rounds.as_chunks::<{ Case::ALL.len() }>();
    let mut rows = Vec::new();
    for (index, case) in Case::ALL.into_iter().enumerate() {
        let (plain, port) = (0, 1);
        let cost = |turn: &[f64; Case::ALL.len()], index: usize| turn[index] - turn[plain];
        let is_plain = case == Case::Plain;
        let ns = turns.iter().map(|turn| if is_plain { turn[plain] } else { cost(turn, index) });
        let ratios = turns.iter().filter(|_| !is_plain).map(|turn| cost(turn, index) / cost(turn, port));
        let Some(row) = Row::new(case.name(), ns.collect(), ratios.collect()) else { continue };
        let (exits, ioctls) = count(guest, case)?;
        let lost = run.counts.iter().find(|(counted, _)| *counted == case).map(|(_, counts)| counts.lost);
        rows.push(Row { exits: Some(exits), ioctls: Some(ioctls), lost, ..row });
    }
    Ok(rows)
}

/// Exits and ioctls besides KVM_RUN of one round.
fn count(guest: &Guest, case: Case) -> Result<(f64, f64), Failure> {
    let counted = |rounds| {
        let run = run(guest, &[(case, rounds)], Stops::Probed)?;
        Ok::<_, Failure>(
            run.report.vcpus.iter().map(totals).fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1)),
        )
    };
    let (once, twice) = (counted(COUNTED)?, counted(2 * COUNTED)?);
    let rounds = f64::from(COUNTED);
    Ok(((twice.0 - once.0) / rounds, (twice.1 - once.1) / rounds))
}

/// Exits and ioctls besides KVM_RUN. What signals do is left out: it does not come from the guest.
#[allow(clippy::cast_precision_loss, reason = "a few thousands")]
fn totals(vcpu: &VcpuReport) -> (f64, f64) {
    let (exits, ioctls) = (vcpu.exits, vcpu.ioctls);
    let accesses = exits.port_in + exits.port_out + exits.mmio_read + exits.mmio_write;
    let all = accesses + exits.debug + exits.emulation_failure + exits.other;
    (all as f64, (ioctls.set_guest_debug + ioctls.other) as f64)
}

/// A machine whose engine has no probe against one that has no engine, in turns.
fn idle(guest: &Guest, turns: u32) -> Result<Vec<Row>, Failure> {
    let cases = [Case::Port, Case::Plain];
    let schedule: Vec<(Case, u32)> = (0..turns).flat_map(|_| cases.map(|case| (case, BATCH))).collect();
    let mut ns = cases.map(|_| Vec::new());
    let mut ratios = cases.map(|_| Vec::new());
    for turn in 0..IDLE_RUNS {
        // Who goes first changes, so that a host that slows down or speeds up favours neither.
        let order = if turn % 2 == 0 { [Stops::Idle, Stops::Nobody] } else { [Stops::Nobody, Stops::Idle] };
        let [first, second] = order.map(|stops| run(guest, &schedule, stops));
        let (first, second) = (first?.rounds, second?.rounds);
        let (idle, without) = if turn % 2 == 0 { (first, second) } else { (second, first) };
        for (index, (idle, without)) in idle.into_iter().zip(without).enumerate() {
            let case = index % cases.len();
            ns[case].push(idle);
            ratios[case].push(idle / without);
        }
    }
    let names = ["idle", "idle loop"];
    let rows = names.into_iter().zip(ns.into_iter().zip(ratios));
    Ok(rows.filter_map(|(name, (ns, ratios))| Row::new(name, ns, ratios)).collect())
}

fn symbol(guest: &Guest, name: &str) -> Result<Gva, Failure> {
    let missing =
        || Failure::Image(format!("The bench guest has no symbol {name}; this is a bug, please report it"));
    guest.symbols.address(name).ok_or_else(missing)
}

/// Writes what the guest is to do into its memory.
fn write_schedule(guest: &Guest, memory: &GuestRam, schedule: &[(Case, u32)]) -> Result<(), Failure> {
    let mut at = Gpa(symbol(guest, "schedule")?.0);
    for (case, rounds) in schedule {
        let start = symbol(guest, &format!("{}_loop", case.name()))?;
        for word in [start.0, u64::from(*rounds)] {
            memory.write(at, &word.to_le_bytes()).map_err(|error| Failure::Host(error.to_string()))?;
            at = at.offset(8);
        }
    }
    Ok(())
}

/// Runs the guest through a schedule. A ring and its reader are there as in `vmprobe run`.
fn run(guest: &Guest, schedule: &[(Case, u32)], stops: Stops) -> Result<Run, Failure> {
    let clock = Clock::with_room(schedule.len() + 1);
    let machine = Machine::new(MachineConfig {
        host: &open_host()?,
        memory_bytes: layout::MIN_MEMORY_BYTES,
        vcpus: 1,
        kernel: kernel(guest, "", None)?,
        watched_pages: BTreeSet::new(),
        serial: Box::new(clock.clone()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })
    .map_err(|error| create_failure(&error))?;
    let memory = machine.memory();
    write_schedule(guest, &memory, schedule)?;
    let engine = Arc::new(Engine::new(EngineConfig {
        slots: layout::SLOTS,
        vcpus: 1,
        vendor: machine.vendor(),
        max_hits: None,
        stacks_in_whole_pages: false,
        control: Arc::new(machine.control()),
        text: Arc::new(PlainText),
    }));
    let mut probed = Vec::new();
    let mut requests = Vec::new();
    if stops == Stops::Probed {
        for case in Case::ALL {
            if let Some(request) = case.probe(guest)? {
                probed.push(case);
                requests.push(request);
            }
        }
    }
    let probes: Vec<Arc<Probe>> =
        engine.arm(&memory, &requests).map_err(|error| Failure::Probe(error.to_string()))?;
    let programs = Programs::default();
    let (rings, mut readers) = events::rings(1, Instant::now(), &programs);
    let handlers = rings.into_iter().map(|ring| match stops {
        Stops::Probed | Stops::Idle => {
            Box::new(VcpuEngine::new(Arc::clone(&engine), VcpuId(0), ring)) as Box<dyn StopHandler>
        }
        Stops::Nobody => Box::new(NoEngine),
    });
    let handlers = handlers.collect();
    let reading = thread::current();
    let outcome = thread::scope(|scope| {
        let running = scope.spawn(move || {
            let outcome = machine.run(handlers);
            reading.unpark();
            outcome
        });
        while !running.is_finished() {
            readers.wait();
            readers.drain();
        }
        running.join()
    });
    engine.disarm_all(&memory);
    let report = match outcome {
        Ok(outcome) => outcome.map_err(|error| Failure::Host(chain(&error)))?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    if report.end != RunEnd::PowerOff {
        return Err(Failure::Host(format!(
            "The bench guest did not come to its end ({:?}); this is a bug, please report it",
            report.end
        )));
    }
    let counts = probed.into_iter().zip(&probes).map(|(case, probe)| (case, probe.counts()));
    Ok(Run { rounds: clock.rounds(), report, counts: counts.collect() })
}

#[cfg(test)]
mod tests {
    use probe_core::mock::MockVcpu;

    use super::*;

    /// A page table whose first entry maps a page of 1 GiB (Intel SDM vol. 3A, 4.5): present, writable, accessed, dirty.
    fn identity_map(memory: &GuestRam, root: Gpa) {
        let table = root.offset(0x1000);
        memory.write(root, &(table.0 | 0x23).to_le_bytes()).unwrap();
        memory.write(table, &0xe3_u64.to_le_bytes()).unwrap();
    }

    #[test]
    fn ten_thousand_emulated_hits_allocate_nothing() {
        const HITS: u64 = 10_000;
        let memory = GuestRam::new(layout::MIN_MEMORY_BYTES).unwrap();
        let (root, text) = (Gpa(0x1000), Gva(0x8000));
        identity_map(&memory, root);
        memory.write(Gpa(text.0), &[0x55 /* push %rbp */]).unwrap();
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: layout::SLOTS,
            vcpus: 1,
            vendor: probe_core::Vendor::Unknown,
            max_hits: None,
            stacks_in_whole_pages: false,
            control: Arc::new(probe_core::machine::NotRunning),
            text: Arc::new(PlainText),
        }));
        let place = Place { gva: text, gpa: Gpa(text.0), function: None };
        let probe = engine.arm(&memory, &[ProbeRequest::new(place)]).unwrap().remove(0);
        let programs = Programs::default();
        let (mut rings, mut readers) = events::rings(1, Instant::now(), &programs);
        let mut cpu = VcpuEngine::new(engine, VcpuId(0), rings.remove(0));
        let before = MockVcpu::new(root).rip(text).rsp(Gva(0x7000)).build();
        let mut hit = || {
            let mut state = before;
            assert_eq!(cpu.on_stop(&mut state, &memory, Stop::Breakpoint { pc: text }), Resume::Run);
            assert_eq!(state.regs.rip, text.0 + 1);
        };
        // A thread's first look at what others may change makes its note of that.
        hit();
        let allocated = allocation_counter::measure(|| (1..HITS).for_each(|_| hit()));
        assert_eq!((allocated.count_total, allocated.bytes_total), (0, 0));
        let expected = Counts { hits: HITS, delivered: HITS, emulated: HITS, ..Counts::default() };
        assert_eq!(probe.counts(), expected);
        assert_eq!(readers.drain().len() as u64, HITS);
    }
}
