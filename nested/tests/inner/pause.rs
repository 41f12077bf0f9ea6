//! Pausing a machine whose vCPUs store into a page that comes to be watched and is released again, over and over.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{Gpa, PhysicalMemory, VcpuState};
use vmm::boot::{Kernel, KernelSegment, Protocol};
use vmm::{Host, Machine, MachineConfig, RunEnd};

const CODE: u64 = 0x10_0000;
/// In the page that the code is in: a word for each vCPU.
const WORDS: u64 = CODE + 0x800;

/// Each vCPU stores 1, 2, 3... into its word, for ever.
const PROGRAM: [u8; 13] = [
    0x48, 0xff, 0xc3, // inc rbx
    0x48, 0x89, 0x1c, 0xfd, 0x00, 0x08, 0x10, 0x00, // mov [WORDS + rdi * 8], rbx
    0xeb, 0xf3, // jmp to the start
];

const ROUNDS: u32 = 200;

type Error = Box<dyn std::error::Error>;

/// Makes the guest's stores, and counts them.
struct Stores(Arc<AtomicU64>);

impl StopHandler for Stores {
    fn on_stop(&mut self, state: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
        Resume::Fail { reason: format!("{stop:x?} at {:#x}", state.regs.rip) }
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        if memory.write(gpa, data).is_ok() {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn wants_breakpoints(&self) -> bool {
        false
    }
}

/// Runs the guest on 1, 2 and 4 vCPUs; says on `times` how long pausing took and on `out` whether every store made while the
/// page was watched, and no other, was seen.
pub fn report(out: &mut impl Write, times: &mut impl Write) -> Result<(), Error> {
    for vcpus in [1, 2, 4] {
        let exact = measure(vcpus, times)?;
        writeln!(out, "{vcpus} vCPUs: {exact}")?;
    }
    Ok(())
}

/// What [`report`] writes where everything is right.
pub const ANSWER: &str = "1 vCPUs: exact\n2 vCPUs: exact\n4 vCPUs: exact\n";

fn measure(vcpus: u32, times: &mut impl Write) -> Result<&'static str, Error> {
    let machine = Machine::new(MachineConfig {
        host: &Host::open()?,
        memory_bytes: 64 << 20,
        vcpus,
        kernel: Kernel {
            entry: Gpa(CODE),
            segments: vec![KernelSegment { gpa: Gpa(CODE), data: &PROGRAM, mem_size: 0x1000 }],
            protocol: Protocol::BareMetal,
        },
        watched_pages: [].into(),
        serial: Box::new(std::io::sink()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })?;
    let (memory, control, stop) = (machine.memory(), machine.control(), machine.stop_handle());
    let seen = Arc::<AtomicU64>::default();
    let handlers = (0..vcpus).map(|_| Box::new(Stores(Arc::clone(&seen))) as Box<dyn StopHandler>).collect();
    let running = std::thread::spawn(move || machine.run(handlers));

    let stored = || -> Result<u64, Error> {
        let words = (0..u64::from(vcpus)).map(|vcpu| memory.read_u64(Gpa(WORDS + 8 * vcpu)));
        Ok(words.collect::<Result<Vec<_>, _>>()?.iter().sum())
    };
    let page = [Gpa(WORDS)];
    let at_rest = || -> Result<(u64, u64), Error> {
        let _paused = control.pause();
        Ok((stored()?, seen.load(Ordering::Relaxed)))
    };
    let (mut pauses, mut watches) = (Vec::new(), Vec::new());
    let mut exact = true;
    for _ in 0..ROUNDS {
        // The vCPUs are to be in the guest, not on their way there.
        std::thread::sleep(Duration::from_millis(2));
        let started = Instant::now();
        drop(control.pause());
        pauses.push(started.elapsed());
        let unseen = at_rest()?.1;
        std::thread::sleep(Duration::from_millis(2));
        let started = Instant::now();
        {
            let paused = control.pause();
            exact &= seen.load(Ordering::Relaxed) == unseen;
            control.watch(&page)?;
            drop(paused);
        }
        watches.push(started.elapsed());
        let before = at_rest()?;
        std::thread::sleep(Duration::from_millis(1));
        let _paused = control.pause();
        let after = at_rest()?;
        exact &= after.0 - before.0 == after.1 - before.1;
        control.unwatch(&page)?;
    }
    stop.stop();
    let end = running.join().map_err(|_| "the machine panicked")??.end;
    exact &= end == RunEnd::Stopped && seen.load(Ordering::Relaxed) > 0;
    for (what, mut durations) in [("pause", pauses), ("pause and split", watches)] {
        durations.sort_unstable();
        let (median, max) = (durations[durations.len() / 2], durations[durations.len() - 1]);
        writeln!(times, "{vcpus} vCPUs, {what}: p50 {median:?}, max {max:?}")?;
    }
    Ok(if exact { "exact" } else { "not exact" })
}
