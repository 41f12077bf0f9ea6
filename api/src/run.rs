//! `vmprobe run`: boots a guest, arms the probes, reports the hits until the run ends.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::Guest;
use probe_core::VcpuId;
use probe_core::engine::{Engine, EngineConfig, EngineError, VcpuEngine};
use probe_core::probe::{Counts, ProbeRequest, WatchRequest};
use probe_core::stop::StopHandler;
use probe_core::watch::Access;
use signal_hook::consts::{SIGINT, SIGTERM};
use vmm::boot::{Kernel, KernelSegment, LinuxBoot, Protocol};
use vmm::{CreateError, Machine, MachineConfig, RunEnd, RunReport};
use vmm::{doctor, layout};

use crate::cli::{Output, RunArgs, Serial};
use crate::events::{self, Event, Program, Reader};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::output::{Label, Writer, closed, json_lines};
use crate::own::{self, Own};
use crate::probes::{MANY, Probes, Resolved};
use crate::summary;

/// How often the rings are read. Long against a hit, short against a reader's patience.
pub const READ_INTERVAL: Duration = Duration::from_millis(5);

/// How long a panicking guest may go on, to print its last words, where it does not reset by itself.
const PANIC_GRACE: Duration = Duration::from_secs(5);

/// Words before the user's own: a console, a reset that ends the run, no second boot after a panic.
const LINUX_CMDLINE: &str = "console=ttyS0 reboot=k panic=-1";

/// Why the main loop asked the machine to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    Interrupted,
    TimedOut,
    Panicked,
    OutputLost,
}

/// vCPUs of the built-in guest, which has work for two.
const DEMO_VCPUS: u32 = 2;

/// Runs a guest on this host's KVM.
pub fn run(args: &RunArgs, guest: &Guest, probes: &Probes) -> Result<Code, Failure> {
    for note in &probes.notes {
        eprintln!("vmprobe: {note}");
    }
    let probes = probes.found.as_slice();
    if probes.len() <= MANY {
        for probe in probes {
            for note in probe.place.iter().flat_map(|place| &place.notes) {
                eprintln!("vmprobe: {}: {note}", probe.text);
            }
        }
    }
    let vcpus = args.cpus.unwrap_or(if args.image == images::DEMO { DEMO_VCPUS } else { 1 });
    let own = Own::new(guest, probes)?;
    // The place of a probe on the command line is the cookie of its reports.
    let (mut numbers, mut requests): (Vec<usize>, Vec<ProbeRequest>) = probes
        .iter()
        .enumerate()
        .filter_map(|(number, probe)| Some((number, probe.request()?.with_cookie(number as u64))))
        .unzip();
    let (watch_numbers, watches): (Vec<usize>, Vec<WatchRequest>) = probes
        .iter()
        .enumerate()
        .filter_map(|(number, probe)| Some((number, probe.watch_request()?.with_cookie(number as u64))))
        .unzip();
    if watches.iter().any(|watch| watch.watchpoint.access() != Access::Execute) && !doctor::watches_data() {
        return Err(Failure::Host(
            "This host's KVM emulates guest kernel code and does not look at data watchpoints; use --accel nested".into(),
        ));
    }
    requests.extend(own.requests(guest, args.verbose));

    let start = Instant::now();
    let initrd = args.initrd.as_deref().map(read_initrd).transpose()?;
    let cmdline = match &args.cmdline {
        Some(words) => format!("{LINUX_CMDLINE} {words}"),
        None => LINUX_CMDLINE.to_owned(),
    };
    let machine = Machine::new(MachineConfig {
        memory_bytes: args.memory,
        vcpus,
        kernel: kernel(guest, &cmdline, initrd.as_deref())?,
        watched_pages: BTreeSet::new(),
        serial: serial(&args.serial)?,
    })
    .map_err(|error| create_failure(&error))?;
    drop(initrd);
    let memory = machine.memory();
    let engine = Arc::new(Engine::new(EngineConfig {
        slots: layout::SLOTS,
        vcpus: vcpus as usize,
        vendor: machine.vendor(),
        max_hits: args.max_hits,
        stacks_in_whole_pages: guest.linux.is_some(),
        control: Arc::new(machine.control()),
        text: own.text.clone(),
    }));
    let refused = |error: EngineError| Failure::Probe(error.to_string());
    let mut armed = engine.arm(&memory, &requests).map_err(refused)?;
    armed.truncate(numbers.len());
    armed.extend(engine.watch_accesses(&watches).map_err(refused)?);
    numbers.extend(watch_numbers);

    let programs: Arc<[Program]> = probes.iter().map(|probe| program(probe, args.count)).collect();
    let (sinks, readers): (Vec<_>, Vec<_>) = (0..vcpus).map(|_| events::ring(start, &programs)).unzip();
    let handlers: Vec<Box<dyn StopHandler>> = (0..vcpus)
        .zip(sinks)
        .map(|(vcpu, sink)| {
            Box::new(VcpuEngine::new(Arc::clone(&engine), VcpuId(vcpu), sink)) as Box<dyn StopHandler>
        })
        .collect();
    let stop = machine.stop_handle();
    let signals = signals()?;
    let labels = probes.iter().map(label).collect();
    let mut report = Reporter {
        readers,
        batch: Vec::new(),
        writer: Writer::new(BufWriter::new(io::stdout().lock()), args.output, labels),
        reached_init: None,
    };

    let main = thread::current();
    let mut unwritten = None;
    let (asked, outcome) = thread::scope(|scope| {
        let running = scope.spawn(move || {
            let outcome = machine.run(handlers);
            main.unpark();
            outcome
        });
        let deadline = args.timeout.map(|limit| start + limit);
        let mut asked = None;
        let mut panicked_at = None;
        while !running.is_finished() {
            thread::park_timeout(READ_INTERVAL);
            let now = Instant::now();
            if unwritten.is_none() {
                unwritten = report.pass_on().err();
            }
            if own.panics.seen() {
                panicked_at.get_or_insert(now);
            }
            let reason = if unwritten.is_some() {
                Some(Asked::OutputLost)
            } else if signals.load(Ordering::Relaxed) {
                Some(Asked::Interrupted)
            } else if deadline.is_some_and(|deadline| now >= deadline) {
                Some(Asked::TimedOut)
            } else if panicked_at.is_some_and(|at| now - at > PANIC_GRACE) {
                Some(Asked::Panicked)
            } else {
                None
            };
            if let (None, Some(reason)) = (asked, reason) {
                asked = Some(reason);
                stop.stop();
            }
        }
        (asked, running.join())
    });
    if unwritten.is_none() {
        unwritten = report.pass_on().err();
    }
    let reached_init = report.reached_init;
    drop(report);
    engine.disarm_all(&memory);

    let outcome = match outcome {
        Ok(outcome) => outcome.map_err(|error| Failure::Host(error.to_string()))?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    let end = End::of(asked, &outcome.end, own.panics.seen());
    for notice in engine.take_notices() {
        eprintln!("vmprobe: {notice}");
    }
    for note in own.take_notes() {
        eprintln!("vmprobe: {note}");
    }
    let mut counted: Vec<(String, Counts)> = (0..)
        .zip(probes)
        .map(|(cookie, probe)| {
            let counts = own.modules.as_ref().map(|modules| modules.counts(cookie));
            (probe.place_name(), counts.unwrap_or_default())
        })
        .collect();
    for (number, armed) in numbers.iter().zip(&armed) {
        counted[*number].1 += armed.counts();
    }
    for line in summary::lines(&counted) {
        eprintln!("vmprobe: {line}");
    }
    if args.count && args.output == Output::Json {
        let all = probes.iter().zip(&counted);
        json_lines(all.map(|(probe, (place, counts))| summary::JsonCounts::new(&probe.text, place, counts)))?;
    }
    eprintln!("vmprobe: {} after {:.3} s", end.message, start.elapsed().as_secs_f64());
    if args.verbose {
        details(&outcome, reached_init);
    }
    unwritten.map_or(Ok(end.code), |error| Err(closed(&error)))
}

/// Passes hits on to the user while the guest runs.
struct Reporter<W: Write> {
    readers: Vec<Reader>,
    batch: Vec<Event>,
    writer: Writer<W>,
    /// When the guest started its init, nanoseconds since the start.
    reached_init: Option<u64>,
}

impl<W: Write> Reporter<W> {
    fn pass_on(&mut self) -> io::Result<()> {
        events::drain(&mut self.readers, &mut self.batch);
        for event in &self.batch {
            if u64::from(event.probe) != own::INIT {
                self.writer.write(event)?;
            } else {
                self.reached_init.get_or_insert(event.ts_ns);
            }
        }
        if self.batch.is_empty() { Ok(()) } else { self.writer.flush() }
    }
}

/// How a run ended, for the user.
#[derive(Debug, PartialEq, Eq)]
struct End {
    code: Code,
    message: String,
}

impl End {
    fn of(asked: Option<Asked>, end: &RunEnd, panicked: bool) -> Self {
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
            (RunEnd::Stopped, _) => (Code::Interrupted, "interrupted".to_owned()),
        };
        Self { code, message }
    }
}

/// Sets a flag on SIGINT and SIGTERM; the second one ends the process at once.
fn signals() -> Result<Arc<AtomicBool>, Failure> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first signal finds the flag false and sets it, the second finds it true.
        signal_hook::flag::register_conditional_shutdown(
            signal,
            Code::Interrupted.number(),
            Arc::clone(&flag),
        )
        .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
        .map_err(|error| Failure::Host(format!("Signals cannot be handled: {error}")))?;
    }
    Ok(flag)
}

fn read_initrd(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path)
        .map_err(|error| Failure::Image(format!("--initrd {}: cannot be read: {error}", path.display())))
}

pub fn kernel<'a>(
    guest: &'a Guest,
    cmdline: &'a str,
    initrd: Option<&'a [u8]>,
) -> Result<Kernel<'a>, Failure> {
    let image = &guest.image;
    let segments = image.segments.iter().map(|segment| KernelSegment {
        gpa: segment.gpa,
        data: image.segment_data(segment),
        mem_size: segment.mem_size,
    });
    let protocol = if image.kind.is_linux() {
        Protocol::Linux(LinuxBoot {
            setup_header: image.setup_header.as_ref().map(|header| header.bytes()),
            initrd,
            cmdline,
        })
    } else if initrd.is_some() {
        return Err(Failure::Usage("--initrd is for Linux guests; this image is bare metal".to_owned()));
    } else {
        Protocol::BareMetal
    };
    Ok(Kernel { entry: image.entry, segments: segments.collect(), protocol })
}

/// What a machine that cannot be made says about the host, the image or the command line.
pub fn create_failure(error: &CreateError) -> Failure {
    let text = chain(error);
    match error {
        CreateError::Boot(_) => Failure::Image(text),
        CreateError::Memory(_) | CreateError::Vcpus { .. } => Failure::Usage(text),
        _ => Failure::Host(text),
    }
}

fn label(probe: &Resolved) -> Label {
    Label {
        spec: probe.text.clone(),
        place: probe.place_name(),
        event: probe.spec.name.as_ref().and_then(|name| name.event.clone()),
        at_entry: probe.at_entry(),
        values: probe.spec.fetches.iter().map(|argument| argument.name.clone()).collect(),
    }
}

fn program(probe: &Resolved, count_only: bool) -> Program {
    Program { count_only, fetches: probe.spec.fetches.iter().map(|argument| argument.fetch).collect() }
}

fn serial(to: &Serial) -> Result<Box<dyn Write + Send>, Failure> {
    Ok(match to {
        Serial::Stderr => Box::new(io::stderr()),
        Serial::Stdout => Box::new(io::stdout()),
        Serial::None => Box::new(io::sink()),
        Serial::File(path) => Box::new(File::create(path).map_err(|error| {
            Failure::Usage(format!("--serial {}: cannot be created: {error}", path.display()))
        })?),
    })
}

/// What --verbose adds.
fn details(report: &RunReport, reached_init: Option<u64>) {
    if let Some(ts_ns) = reached_init {
        let after = Duration::from_nanos(ts_ns);
        eprintln!("vmprobe: the guest started its init after {:.3} s", after.as_secs_f64());
    }
    for vcpu in &report.vcpus {
        let (exits, ioctls) = (&vcpu.exits, &vcpu.ioctls);
        eprintln!(
            "vmprobe: {:?}: exits: {} debug, {} emulation failure, {} port in, {} port out, {} mmio read, {} mmio write, \
             {} interrupted, {} other; ioctls: {} KVM_RUN, {} KVM_SET_GUEST_DEBUG, {} other",
            vcpu.vcpu,
            exits.debug,
            exits.emulation_failure,
            exits.port_in,
            exits.port_out,
            exits.mmio_read,
            exits.mmio_write,
            exits.interrupted,
            exits.other,
            ioctls.run,
            ioctls.set_guest_debug,
            ioctls.other
        );
    }
}
