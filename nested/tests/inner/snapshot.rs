//! A stock kernel that is saved in the middle of its workload, and goes on from there twice: where it was, and restored.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use guest::Guest;
use guest::image::Image;
use probe_core::VcpuId;
use probe_core::engine::{Engine, EngineConfig, HitSink, Report, VcpuEngine};
use probe_core::patch::Place;
use probe_core::probe::{Probe, ProbeRequest};
use probe_core::stop::StopHandler;
use vmm::boot::{Kernel, KernelSegment, LinuxBoot, Protocol};
use vmm::{Host, Machine, MachineConfig, MemoryFile, RestoreConfig, RunError, RunReport, Snapshot, layout};

use super::Console;

const MEMORY: u64 = 256 << 20;
const VCPUS: u32 = 2;
const PROBE: &str = "do_sys_openat2";
/// As the guest's init calls it.
const COUNTED: &str = "openat";
/// The machine is saved after so many hits.
const SAVED_AFTER: u64 = 100;

type Error = Box<dyn std::error::Error>;

/// Takes every hit.
struct Taken;

impl HitSink for Taken {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        true
    }
}

/// A machine with its probe armed.
struct Armed {
    machine: Machine,
    engine: Arc<Engine>,
    probe: Arc<Probe>,
}

impl Armed {
    fn new(machine: Machine, guest: &Guest) -> Result<Self, Error> {
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: layout::SLOTS,
            vcpus: VCPUS as usize,
            vendor: machine.vendor(),
            max_hits: None,
            stacks_in_whole_pages: true,
            control: Arc::new(machine.control()),
            text: Arc::new(guest.text()),
        }));
        let place = guest.place(PROBE)?;
        let function = place.function.as_ref().map(|range| range.start);
        let request = ProbeRequest::new(Place { gva: place.gva, gpa: place.gpa, function });
        let mut probes = engine.arm(&machine.memory(), &[request])?;
        let probe = probes.pop().ok_or("no probe")?;
        Ok(Self { machine, engine, probe })
    }

    fn run(self) -> Result<RunReport, RunError> {
        let handlers = (0..VCPUS).map(|vcpu| {
            Box::new(VcpuEngine::new(Arc::clone(&self.engine), VcpuId(vcpu), Taken)) as Box<dyn StopHandler>
        });
        self.machine.run(handlers.collect())
    }
}

/// Runs the guest and says whether the host's counts are the guest's; how long things took goes to `times`.
pub fn report(kernel: &Path, out: &mut impl Write, times: &mut impl Write) -> Result<(), Error> {
    let host = Host::open()?;
    let guest = Guest::open(kernel)?;
    let console = Console::default();
    let original = Armed::new(boot(&host, &guest, &console)?, &guest)?;
    let (control, engine, probe) =
        (original.machine.control(), Arc::clone(&original.engine), Arc::clone(&original.probe));
    let running = thread::spawn(move || original.run());
    let hits = || probe.counts().hits;
    while hits() < SAVED_AFTER {
        if running.is_finished() {
            return Err(format!("ended after {} hits: {}", hits(), console.text()).into());
        }
        thread::sleep(Duration::from_millis(1));
    }
    let file = File::options().read(true).write(true).create_new(true).open("/snapshot-memory")?;
    let paused = control.pause();
    let started = Instant::now();
    let state = control
        .save(&|gpa, bytes| engine.uncover(gpa, bytes), &mut |at, bytes| file.write_all_at(bytes, at))?;
    file.set_len(MEMORY)?;
    writeln!(times, "saved in {:?}, {} bytes of state", started.elapsed(), state.len())?;
    let (saved_hits, said) = (hits(), console.text().len());
    drop(paused);

    let report = running.join().map_err(|_| "the original panicked")??;
    writeln!(out, "original: {:?}, {}", report.end, compare(&console.text(), hits()))?;

    let started = Instant::now();
    let memory = MemoryFile::new(file)?;
    let snapshot = Snapshot::decode(&state)?;
    snapshot.verify_memory(&memory)?;
    writeln!(times, "verified in {:?}", started.elapsed())?;
    // As a snapshot has the image.
    let guest = Guest::new(Image::parse(guest.image.data().to_vec())?.moved(guest.image.relocation))?;
    for _ in 0..2 {
        let rest = Console::default();
        let started = Instant::now();
        let config = RestoreConfig {
            host: &host,
            snapshot: &snapshot,
            memory: &memory,
            serial: Box::new(rest.clone()),
        };
        let restored = Armed::new(Machine::restore(config)?, &guest)?;
        writeln!(times, "restored in {:?}", started.elapsed())?;
        let probe = Arc::clone(&restored.probe);
        let report = restored.run()?;
        let console_text = format!("{}{}", &console.text()[..said], rest.text());
        let hits = saved_hits + probe.counts().hits;
        writeln!(out, "restored: {:?}, {}", report.end, compare(&console_text, hits))?;
        if !console_text.contains("workload: ok") {
            writeln!(times, "{console_text}")?;
        }
    }
    Ok(())
}

/// What [`report`] writes where everything is right.
pub const ANSWER: &str = "original: Reset, exact\nrestored: Reset, exact\nrestored: Reset, exact\n";

fn boot(host: &Host, guest: &Guest, console: &Console) -> Result<Machine, Error> {
    let image = &guest.image;
    let segments = image.segments.iter().map(|segment| KernelSegment {
        gpa: segment.gpa,
        data: image.segment_data(segment),
        mem_size: segment.mem_size,
    });
    let initrd = guest::initramfs::workload(&[])?;
    let boot = LinuxBoot {
        setup_header: image.setup_header.as_ref().map(|header| header.bytes()),
        initrd: Some(&initrd),
        cmdline: "console=ttyS0 panic=-1 quiet",
    };
    Ok(Machine::new(MachineConfig {
        host,
        memory_bytes: MEMORY,
        vcpus: VCPUS,
        kernel: Kernel { entry: image.entry, segments: segments.collect(), protocol: Protocol::Linux(boot) },
        watched_pages: [].into(),
        serial: Box::new(console.clone()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })?)
}

/// Whether the guest is content and has counted what the host has.
fn compare(console: &str, hits: u64) -> String {
    let counted = console.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next() == Some("count") && words.next() == Some(COUNTED))
            .then(|| words.next()?.parse::<u64>().ok())?
    });
    match counted {
        Some(counted) if counted == hits && console.contains("workload: ok") => "exact".to_owned(),
        _ => format!("{hits} hits where the guest counted {counted:?}"),
    }
}
