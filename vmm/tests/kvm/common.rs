//! Runs a few assembled instructions as a bare-metal guest.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use disk::Disk;
use iced_x86::IcedError;
use iced_x86::code_asm::{CodeAssembler, al, ax, dx, rdi, rsp};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::watch::WatchSet;
use probe_core::{Gpa, PhysicalMemory, VcpuState};
use vmm::boot::{Kernel, KernelSegment, Protocol};
use vmm::{CreateError, GuestRam, Host, Machine, MachineConfig, Network, RunReport, Vsock};

/// Where the code of every guest here stands.
pub const CODE: u64 = 0x10_0000;
/// Top of the guest's stack.
pub const STACK: u64 = 0x18_0000;
/// A page that guests use for data.
pub const DATA: u64 = 0x19_0000;
/// The interrupt table, its descriptor and its handlers, as [`interrupt_table`] lays them out.
pub const IDT: u64 = 0x1a_0000;
pub const IDT_DESCRIPTOR: u64 = IDT + 0x1000;
/// Handler of vector n: IDT_HANDLERS + 64 n.
pub const IDT_HANDLERS: u64 = 0x1b_0000;

const MEMORY: u64 = 4 << 20;

/// What a guest writes to its serial line.
#[derive(Clone, Default)]
pub struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap()).into_owned()
    }
}

impl io::Write for Console {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A stop handler out of a closure; it takes breakpoints, and applies the guest's text writes as they are.
pub struct Scripted<F> {
    on_stop: F,
    text_writes: TextWrites,
    watchpoints: WatchSet,
}

type TextWrites = Arc<Mutex<Vec<(u64, Vec<u8>)>>>;

impl<F> Scripted<F>
where
    F: FnMut(&mut VcpuState, &dyn PhysicalMemory, Stop) -> Resume + Send + 'static,
{
    pub fn boxed(on_stop: F) -> Box<dyn StopHandler> {
        Self::watching(WatchSet::default(), on_stop)
    }

    /// With watchpoints.
    pub fn watching(watchpoints: WatchSet, on_stop: F) -> Box<dyn StopHandler> {
        Box::new(Self { on_stop, text_writes: TextWrites::default(), watchpoints })
    }
}

impl<F> StopHandler for Scripted<F>
where
    F: FnMut(&mut VcpuState, &dyn PhysicalMemory, Stop) -> Resume + Send,
{
    fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        (self.on_stop)(state, memory, stop)
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        self.text_writes.lock().unwrap().push((gpa.0, data.to_vec()));
        memory.write(gpa, data).unwrap();
    }

    fn wants_breakpoints(&self) -> bool {
        true
    }

    fn watchpoints(&self) -> WatchSet {
        self.watchpoints
    }
}

/// A handler for guests that must not stop.
pub fn no_stops() -> Box<dyn StopHandler> {
    Scripted::boxed(|state, _, stop| Resume::Fail {
        reason: format!("Unexpected {stop:?} at {:#x}", state.regs.rip),
    })
}

/// The two ways an int3 arrives, by host.
pub fn is_int3(stop: &Stop) -> bool {
    match stop {
        Stop::Breakpoint { .. } => true,
        Stop::EmulationFailure { bytes, len } => *len > 0 && bytes[0] == 0xcc,
        Stop::Debug { .. } | Stop::Watchpoint { .. } => false,
    }
}

pub fn assemble(at: u64, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    build(&mut assembler).unwrap();
    assembler.assemble(at).unwrap()
}

/// Switches the machine off.
pub fn power_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0x604)?;
    a.mov(ax, 0x2000)?;
    a.out(dx, ax)
}

/// Writes one character to the serial line.
pub fn put(a: &mut CodeAssembler, character: u8) -> Result<(), IcedError> {
    a.mov(dx, 0x3f8)?;
    a.mov(al, u32::from(character))?;
    a.out(dx, al)
}

/// Loads the interrupt table and a stack. The table must be there, see [`interrupt_table`].
pub fn use_interrupts(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rsp, STACK)?;
    a.lidt(iced_x86::code_asm::ptr(IDT_DESCRIPTOR))
}

/// Puts an interrupt table for 256 vectors into guest memory, with `handlers` for some of them.
pub fn interrupt_table(memory: &dyn PhysicalMemory, handlers: &[(u8, Vec<u8>)]) {
    for vector in 0..256u64 {
        let target = IDT_HANDLERS + 64 * vector;
        // Interrupt gate, present, DPL 0, 64-bit, selector 0x10 (Intel SDM vol. 3A, 6.14.1).
        let low = (target & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (target >> 16 & 0xffff) << 48;
        memory.write(Gpa(IDT + 16 * vector), &low.to_le_bytes()).unwrap();
        memory.write(Gpa(IDT + 16 * vector + 8), &(target >> 32).to_le_bytes()).unwrap();
    }
    let mut descriptor = 0xfffu16.to_le_bytes().to_vec();
    descriptor.extend(IDT.to_le_bytes());
    memory.write(Gpa(IDT_DESCRIPTOR), &descriptor).unwrap();
    for (vector, code) in handlers {
        assert!(code.len() <= 64);
        memory.write(Gpa(IDT_HANDLERS + 64 * u64::from(*vector)), code).unwrap();
    }
}

pub struct Guest {
    pub machine: Machine,
    pub memory: GuestRam,
    pub console: Console,
}

/// A machine with `code` at [`CODE`]; `None` where this host has no /dev/kvm, after saying so. Under CI=true that fails.
pub fn guest(code: &[u8], vcpus: u32, watched: &[u64]) -> Option<Guest> {
    machine(code, vcpus, watched, Attached::default())
}

/// What a machine is connected to.
#[derive(Default)]
pub struct Attached {
    pub disks: Vec<Disk>,
    pub vsock: Option<Vsock>,
    pub networks: Vec<Network>,
}

/// The same with one vCPU, and connected to something.
pub fn guest_with(code: &[u8], attached: Attached) -> Option<Guest> {
    machine(code, 1, &[], attached)
}

fn machine(code: &[u8], vcpus: u32, watched: &[u64], attached: Attached) -> Option<Guest> {
    let console = Console::default();
    let host = match Host::open() {
        Ok(host) => host,
        Err(error) => {
            skip(&error);
            return None;
        }
    };
    let config = MachineConfig {
        host: &host,
        memory_bytes: MEMORY,
        vcpus,
        kernel: Kernel {
            entry: Gpa(CODE),
            segments: vec![KernelSegment { gpa: Gpa(CODE), data: code, mem_size: code.len() as u64 }],
            protocol: Protocol::BareMetal,
        },
        watched_pages: watched.iter().copied().map(Gpa).collect::<BTreeSet<_>>(),
        serial: Box::new(console.clone()),
        disks: attached.disks,
        vsock: attached.vsock,
        networks: attached.networks,
    };
    match Machine::new(config) {
        Ok(machine) => Some(Guest { memory: machine.memory(), machine, console }),
        Err(CreateError::Host(error)) => {
            skip(&error);
            None
        }
        Err(error) => panic!("{error:?}"),
    }
}

pub fn skip(error: &dyn std::error::Error) {
    assert!(std::env::var("CI").as_deref() != Ok("true"), "CI needs /dev/kvm: {error}");
    eprintln!("skipped: {error}");
}

/// Runs `code` on one vCPU with a handler, to its end.
pub fn run(code: &[u8], handler: Box<dyn StopHandler>) -> Option<(RunReport, GuestRam, String)> {
    let Guest { machine, memory, console } = guest(code, 1, &[])?;
    let report = machine.run(vec![handler]).unwrap();
    Some((report, memory, console.text()))
}

/// A word of guest memory.
pub fn word(memory: &GuestRam, at: u64) -> u64 {
    memory.read_u64(Gpa(at)).unwrap()
}

/// The first vCPU loops for ever, every other one meets an int3.
pub fn one_spins_others_break() -> Vec<u8> {
    assemble(CODE, |a| {
        let (mut second, mut spin) = (a.create_label(), a.create_label());
        a.test(rdi, rdi)?;
        a.jne(second)?;
        a.set_label(&mut spin)?;
        a.jmp(spin)?;
        a.set_label(&mut second)?;
        a.int3()
    })
}
