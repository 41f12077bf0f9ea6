//! `vmprobe run`: boots a guest, arms the probes, reports the hits until the run ends.

use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use disk::DiskOptions;
use guest::Guest;
use guest::image::Extras;
use probe_core::VcpuId;
use probe_core::probe::Counts;
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::RunReport;

use crate::cli::{Output, RunArgs};
use crate::events::Event;
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::network::NetworkWanted;
use crate::output::{Label, Writer, closed, json_lines};
use crate::own;
use crate::probes::{MANY, Probes, Resolved};
use crate::serial;
use crate::snapshot::{self, Saved, SavedProbe};
use crate::summary;
use crate::terminal::{self, ENDS_THE_RUN, Keyboard};
use crate::vm::{Asked, Beginning, Boot, End, Order, Setup, UNPACKING, Wanted, drive, dump_to, open_host};
use crate::vsock::VsockWanted;

/// How long a panic that has been seen may take to become a pause.
const PANIC_PAUSE: Duration = Duration::from_secs(10);

/// Runs a guest on this host's KVM.
pub fn run(
    args: &RunArgs,
    disks: &[DiskOptions],
    guest: Guest,
    extras: Extras,
    probes: Probes,
    saved: Option<&Saved>,
) -> Result<Code, Failure> {
    for note in &probes.notes {
        eprintln!("vmprobe: {note}");
    }
    let start = Instant::now();
    let mut snapshot = Snapshotting::new(args, &probes.found)?;
    let initrd = args.guest.initrd.as_deref().map(images::read_initrd).transpose()?;
    let extras = extras.with(initrd, args.guest.cmdline.as_deref());
    // passt is there until the run has ended.
    let opened = args.networks.iter().map(NetworkWanted::open).collect::<Result<Vec<_>, _>>()?;
    let (networks, _passts): (Vec<_>, Vec<_>) = opened.into_iter().unzip();
    let beginning = match saved {
        Some(saved) => Beginning::Restore(saved),
        None => Beginning::Boot(Boot {
            image: &args.image,
            disks: disks.iter().map(images::open_disk).collect::<Result<_, _>>()?,
            vsock: args.vsock.as_ref().map(VsockWanted::open).transpose()?,
            networks,
            kaslr: args.guest.kaslr,
            unpacking: args.timeout.map_or(UNPACKING, |timeout| timeout.min(UNPACKING)),
            initrd: extras.initrd,
            cmdline: extras.cmdline.as_deref(),
            memory: args.guest.memory,
            vcpus: args.guest.cpus,
        }),
    };
    let setup = Setup::new(Order {
        host: &open_host()?,
        guest,
        beginning,
        serial: serial::outputs(&args.serial)?,
        probes: probes.found,
        count_only: args.count,
        max_hits: args.max_hits,
        report_init: args.verbose || args.report.is_some(),
        pause_at_panic: args.dump.is_some(),
        start,
    })?;
    let Setup { machine, guest, probes, handlers, readers, memory, engine, own, armed, .. } = setup;
    if args.guest.kaslr {
        eprintln!("vmprobe: {}", guest.image.place());
    }
    if probes.len() <= MANY {
        for probe in &probes {
            for note in probe.place.iter().flat_map(|place| &place.notes) {
                eprintln!("vmprobe: {}: {note}", probe.text);
            }
        }
    }
    // Its image is large.
    let guest = Some(guest).filter(|_| args.snapshot.is_some() || args.dump.is_some());
    let has_input = serial::has_input(&args.serial);
    let signals = signals(has_input)?;
    let vcpus = u32::try_from(machine.states().len()).unwrap_or(u32::MAX);
    let labels = probes.iter().map(Label::of).collect();
    let mut report = Reporter {
        writer: Writer::new(BufWriter::new(io::stdout().lock()), args.output, labels),
        reached_init: None,
    };

    let keyboard = has_input.then(|| Keyboard::attach(machine.serial_input(), ENDS_THE_RUN)).transpose()?;
    let control = machine.control();
    let image = saved.map_or(args.image.as_str(), |saved| saved.manifest.image.as_str());
    let save = |writer: &mut snapshot::Writer| {
        let Some(guest) = &guest else { return Ok(()) };
        let probes = probes.iter().zip(&armed).filter_map(|(resolved, probe)| {
            let probe = probe.as_ref().filter(|probe| engine.has(probe))?;
            Some(SavedProbe { spec: resolved.text.clone(), enabled: probe.is_enabled() })
        });
        let source = snapshot::Source {
            control: &control,
            engine: &engine,
            image,
            guest,
            memory_bytes: memory.bytes(),
            booted: own.text.has_booted(),
            probes: probes.collect(),
        };
        source.save(&mut |part| writer.write(&part))
    };
    let mut dumped = None;
    let run = machine.start(handlers).map_err(|error| Failure::Host(chain(&error)))?;
    let mut unwritten = None;
    let deadline = args.timeout.map(|limit| start + limit);
    let (asked, outcome) = drive(run, readers, &own.panics, |hits, now| {
        if unwritten.is_none() {
            unwritten = report.pass_on(hits).err();
        }
        let taken = || armed.iter().flatten().map(|probe| probe.counts().hits).sum();
        snapshot.pass_on(taken, save);
        if let (Some(path), Some(guest), None, true) = (&args.dump, &guest, &dumped, own.panics.seen())
            && let Some((_, paused)) = control.take_pause(PANIC_PAUSE)
        {
            let states = (0..vcpus).filter_map(|vcpu| paused.state(VcpuId(vcpu)));
            dumped = Some(dump_to(path, guest, &engine, &memory, &states.collect::<Vec<_>>()));
        }
        if unwritten.is_some() {
            Some(Wanted::at_once(Asked::OutputLost))
        } else if signals.load(Ordering::Relaxed) {
            Some(Wanted { by: Asked::Interrupted, grace: args.grace })
        } else if deadline.is_some_and(|deadline| now >= deadline) {
            Some(Wanted { by: Asked::TimedOut, grace: args.grace })
        } else {
            None
        }
    });
    drop(keyboard);
    let reached_init = report.reached_init;
    drop(report);
    engine.disarm_all(&memory);

    let outcome = outcome.map_err(|error| Failure::Host(error.to_string()))?;
    let end = End::of(asked, &outcome.end, own.panics.seen());
    for notice in engine.take_notices() {
        eprintln!("vmprobe: {notice}");
    }
    for note in own.take_notes() {
        eprintln!("vmprobe: {note}");
    }
    let counted = (0..).zip(probes.iter().zip(&armed)).map(|(number, (probe, armed))| {
        let mut counts = own.modules.as_ref().map(|modules| modules.counts(number)).unwrap_or_default();
        counts += armed.as_ref().map(|armed| armed.counts()).unwrap_or_default();
        (probe.place_name(), counts)
    });
    let counted: Vec<(String, Counts)> = counted.collect();
    for line in summary::lines(&counted) {
        eprintln!("vmprobe: {line}");
    }
    if args.count && args.output == Output::Json {
        let all = probes.iter().zip(&counted);
        json_lines(all.map(|(probe, (place, counts))| summary::JsonCounts::new(&probe.text, place, counts)))?;
    }
    eprintln!("vmprobe: {} after {:.3} s", end.message, start.elapsed().as_secs_f64());
    if let (Some(path), Some(guest)) = (&args.dump, &guest) {
        let at_end = || {
            let states: Vec<_> = outcome.vcpus.iter().map(|vcpu| vcpu.state).collect();
            dump_to(path, guest, &engine, &memory, &states)
        };
        eprintln!("vmprobe: {}: {}", path.display(), dumped.unwrap_or_else(at_end)?);
    }
    if args.verbose {
        details(&outcome, reached_init);
    }
    if let Some(path) = &args.report {
        let accounts = probes.iter().zip(&counted);
        let report = JsonReport {
            message: &end.message,
            code: end.code.number(),
            seconds: start.elapsed().as_secs_f64(),
            init_seconds: reached_init.map(|ts_ns| Duration::from_nanos(ts_ns).as_secs_f64()),
            probes: accounts
                .map(|(probe, (place, counts))| summary::JsonCounts::new(&probe.text, place, counts))
                .collect(),
        };
        write_report(path, &report)?;
    }
    snapshot.finish()?;
    unwritten.map_or(Ok(end.code), |error| Err(closed(&error)))
}

/// What --report writes.
#[derive(Serialize)]
struct JsonReport<'a> {
    /// How the run ended, in words and as exit code.
    message: &'a str,
    code: i32,
    /// From the start to the end.
    seconds: f64,
    /// From the start to the guest's init.
    #[serde(skip_serializing_if = "Option::is_none")]
    init_seconds: Option<f64>,
    probes: Vec<summary::JsonCounts<'a>>,
}

fn write_report(path: &Path, report: &JsonReport<'_>) -> Result<(), Failure> {
    let written = serde_json::to_string(report).map_err(io::Error::from).and_then(|mut text| {
        text.push('\n');
        std::fs::write(path, text)
    });
    written.map_err(|error| Failure::Host(format!("--report {}: cannot be written: {error}", path.display())))
}

/// The snapshot that --snapshot asks for.
struct Snapshotting {
    /// Until it is written, or cannot be.
    wanted: Option<snapshot::Writer>,
    /// It is written after so many hits.
    at: u64,
    failed: Option<Failure>,
}

impl Snapshotting {
    /// # Errors
    /// It cannot be made.
    fn new(args: &RunArgs, probes: &[Resolved]) -> Result<Self, Failure> {
        let wanted = args.snapshot.as_deref().map(snapshot::Writer::create).transpose()?;
        let module = probes.iter().find(|probe| probe.waits_for_module());
        if let Some(probe) = module.filter(|_| wanted.is_some()) {
            return Err(Failure::Usage(format!(
                "--snapshot: {}: a restored machine cannot have probes on modules yet",
                probe.text
            )));
        }
        Ok(Self { wanted, at: args.snapshot_at.unwrap_or_default(), failed: None })
    }

    /// Saves the machine when it is time. If that fails the run goes on.
    fn pass_on(
        &mut self,
        hits: impl FnOnce() -> u64,
        save: impl FnOnce(&mut snapshot::Writer) -> Result<(), Failure>,
    ) {
        let due = |_: &mut snapshot::Writer| hits() >= self.at;
        if let Some(mut writer) = self.wanted.take_if(due) {
            match save(&mut writer).and_then(|()| writer.finish()) {
                Ok(()) => eprintln!("vmprobe: the machine was saved"),
                Err(error) => self.failed = Some(error),
            }
        }
    }

    /// # Errors
    /// There is no snapshot.
    fn finish(self) -> Result<(), Failure> {
        if let Some(failed) = self.failed {
            return Err(failed);
        }
        if self.wanted.is_some() {
            return Err(Failure::Host(format!("No snapshot: the run ended before hit {}", self.at)));
        }
        Ok(())
    }
}

/// Passes hits on to the user while the guest runs.
struct Reporter<W: Write> {
    writer: Writer<W>,
    /// When the guest started its init, nanoseconds since the start.
    reached_init: Option<u64>,
}

impl<W: Write> Reporter<W> {
    fn pass_on(&mut self, hits: &[Event]) -> io::Result<()> {
        for event in hits {
            if u64::from(event.probe) != own::INIT {
                self.writer.write(event)?;
            } else {
                self.reached_init.get_or_insert(event.ts_ns);
            }
        }
        if hits.is_empty() { Ok(()) } else { self.writer.flush() }
    }
}

/// Sets a flag on SIGINT and SIGTERM, and on SIGHUP where the terminal is the guest's; the second one ends the process at once.
pub fn signals(has_input: bool) -> Result<Arc<AtomicBool>, Failure> {
    let flag = Arc::new(AtomicBool::new(false));
    let asked = Arc::clone(&flag);
    let signals: &[i32] = if has_input { &[SIGINT, SIGTERM, SIGHUP] } else { &[SIGINT, SIGTERM] };
    let started = Signals::new(signals).and_then(|mut signals| {
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for _ in &mut signals {
                if asked.swap(true, Ordering::Relaxed) {
                    terminal::restore();
                    signal_hook::low_level::exit(Code::Interrupted.number());
                }
            }
        })
    });
    started.map_err(|error| Failure::Host(format!("Signals cannot be handled: {error}")))?;
    Ok(flag)
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
