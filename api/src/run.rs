//! `vmprobe run`: boots a guest, arms the probes, reports the hits until the run ends.

use std::io::{self, BufWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::Guest;
use guest::image::Extras;
use probe_core::probe::Counts;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use vmm::RunReport;

use crate::cli::{Output, RunArgs};
use crate::events::Event;
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::output::{Label, Writer, closed, json_lines};
use crate::own;
use crate::probes::{MANY, Probes};
use crate::serial;
use crate::summary;
use crate::terminal::{self, ENDS_THE_RUN, Keyboard};
use crate::vm::{Asked, End, Order, Setup, UNPACKING, drive, open_host};

/// Runs a guest on this host's KVM.
pub fn run(args: &RunArgs, guest: Guest, extras: Extras, probes: Probes) -> Result<Code, Failure> {
    for note in &probes.notes {
        eprintln!("vmprobe: {note}");
    }
    let start = Instant::now();
    let initrd = args.guest.initrd.as_deref().map(images::read_initrd).transpose()?;
    let extras = extras.with(initrd, args.guest.cmdline.as_deref());
    let setup = Setup::new(Order {
        host: &open_host()?,
        image: &args.image,
        guest,
        kaslr: args.guest.kaslr,
        unpacking: args.timeout.map_or(UNPACKING, |timeout| timeout.min(UNPACKING)),
        initrd: extras.initrd,
        cmdline: extras.cmdline.as_deref(),
        memory: args.guest.memory,
        vcpus: args.guest.cpus,
        serial: serial::outputs(&args.serial)?,
        probes: probes.found,
        count_only: args.count,
        max_hits: args.max_hits,
        report_init: args.verbose,
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
    drop(guest);
    let has_input = serial::has_input(&args.serial);
    let signals = signals(has_input)?;
    let labels = probes.iter().map(Label::of).collect();
    let mut report = Reporter {
        writer: Writer::new(BufWriter::new(io::stdout().lock()), args.output, labels),
        reached_init: None,
    };

    let keyboard = has_input.then(|| Keyboard::attach(machine.serial_input(), ENDS_THE_RUN)).transpose()?;
    let run = machine.start(handlers).map_err(|error| Failure::Host(chain(&error)))?;
    let mut unwritten = None;
    let deadline = args.timeout.map(|limit| start + limit);
    let (asked, outcome) = drive(run, readers, &own.panics, |hits, now| {
        if unwritten.is_none() {
            unwritten = report.pass_on(hits).err();
        }
        if unwritten.is_some() {
            Some(Asked::OutputLost)
        } else if signals.load(Ordering::Relaxed) {
            Some(Asked::Interrupted)
        } else if deadline.is_some_and(|deadline| now >= deadline) {
            Some(Asked::TimedOut)
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
    if args.verbose {
        details(&outcome, reached_init);
    }
    unwritten.map_or(Ok(end.code), |error| Err(closed(&error)))
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
fn signals(has_input: bool) -> Result<Arc<AtomicBool>, Failure> {
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
