//! Watchpoints of the host's on the demo guest, which counts for itself how often it changes and reads the variable.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use guest::Guest;
use guest::image::Image;
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::watch::{Access, REGISTERS, WatchSet, Watchpoint};
use probe_core::{Exception, Gpa, PhysicalMemory, VcpuState};
use vmm::boot::{Kernel, KernelSegment, Protocol};
use vmm::{Host, Machine, MachineConfig};

use super::Console;

/// What [`report`] writes where everything is right. `smp_sum` is changed by each call of `smp_add` and `smp_xadd`, `ticks` by
/// each of `tick` and read once at the end. Each variable has one watchpoint: QEMU notes only the first that an access meets.
pub const ANSWER: &str = "\
smp_sum, 8 bytes, writes: 200
ticks, 2 upper bytes, reads and writes: 301
smp_add, execution: 100
count tick 300
count smp_add 100
count smp_xadd 100
demo: ok
PowerOff
";

type Error = Box<dyn std::error::Error>;

/// Counts the hits of each watchpoint, and gives the guest what is its own.
struct Counter {
    watchpoints: WatchSet,
    hits: Arc<[AtomicU64; REGISTERS]>,
}

impl StopHandler for Counter {
    fn on_stop(&mut self, state: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
        match stop {
            Stop::Watchpoint { hits, guest_dr6: 0, .. } => {
                for number in hits.numbers() {
                    self.hits[number].fetch_add(1, Ordering::Relaxed);
                }
                Resume::Run
            }
            Stop::Debug { dr6, .. } => Resume::Inject(Exception::Debug { dr6 }),
            _ => Resume::Fail { reason: format!("{stop:x?} at {:#x}", state.regs.rip) },
        }
    }

    fn on_text_write(&mut self, _: &dyn PhysicalMemory, _: Gpa, _: &[u8]) {}

    fn wants_breakpoints(&self) -> bool {
        false
    }

    fn watchpoints(&self) -> WatchSet {
        self.watchpoints
    }
}

/// Runs the guest with three watchpoints and says how often each was met, and what the guest says.
pub fn report(out: &mut impl Write) -> Result<(), Error> {
    let guest = Guest::new(Image::parse(guest::programs::DEMO.to_vec())?)?;
    let address = |name| guest.symbols.address(name).ok_or_else(|| format!("no {name}"));
    let mut watchpoints = WatchSet::default();
    watchpoints.add(Watchpoint::new(address("smp_sum")?, 8, Access::Write)?, 0)?;
    watchpoints.add(Watchpoint::new(address("ticks")?.offset(6), 2, Access::ReadWrite)?, 0)?;
    watchpoints.add(Watchpoint::execution(address("smp_add")?), 0)?;

    let image = &guest.image;
    let segments = image.segments.iter().map(|segment| KernelSegment {
        gpa: segment.gpa,
        data: image.segment_data(segment),
        mem_size: segment.mem_size,
    });
    let console = Console::default();
    let machine = Machine::new(MachineConfig {
        host: &Host::open()?,
        memory_bytes: 16 << 20,
        vcpus: 2,
        kernel: Kernel { entry: image.entry, segments: segments.collect(), protocol: Protocol::BareMetal },
        watched_pages: [].into(),
        serial: Box::new(console.clone()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })?;
    let hits = Arc::<[AtomicU64; REGISTERS]>::default();
    let handlers = (0..2)
        .map(|_| Box::new(Counter { watchpoints, hits: Arc::clone(&hits) }) as Box<dyn StopHandler>)
        .collect();
    let end = machine.run(handlers)?.end;

    let hits = |number: usize| hits[number].load(Ordering::Relaxed);
    writeln!(out, "smp_sum, 8 bytes, writes: {}", hits(0))?;
    writeln!(out, "ticks, 2 upper bytes, reads and writes: {}", hits(1))?;
    writeln!(out, "smp_add, execution: {}", hits(2))?;
    let console = console.text();
    let of_interest = ["count tick", "count smp_", "demo: ok", "demo: FAIL", "demo: exception"];
    for line in console.lines().filter(|line| of_interest.iter().any(|word| line.starts_with(word))) {
        writeln!(out, "{}", line.split_whitespace().collect::<Vec<_>>().join(" "))?;
    }
    writeln!(out, "{end:?}")?;
    Ok(())
}
