//! Saves and restores a bare-metal guest on the local /dev/kvm and compares every set of registers.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, ax, dr0, dr7, dword_ptr, dx, eax, ecx, edx, ptr, qword_ptr, r8, r9, r10, r11, r12,
    r13, r14, r15, rax, rbp, rbx, rcx, rdi, rsi, rsp, xmm1,
};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{Gpa, PhysicalMemory, VcpuState};

use super::*;
use crate::boot::{Kernel, KernelSegment, Protocol};
use crate::{
    CreateError, GuestRam, Host, Machine, MachineConfig, MemoryFile, RestoreConfig, RunReport, StopHandle,
};

const CODE: u64 = 0x10_0000;
const HANDLER: u64 = 0x11_0000;
const IDT: u64 = 0x12_0000;
const IDT_DESCRIPTOR: u64 = 0x12_2000;
/// For each vCPU 16 bytes: rounds, interrupts.
const COUNTS: u64 = 0x13_0000;
const VECTOR_DATA: u64 = 0x13_1000;
const VCPUS: u32 = 2;
const TIMER_VECTOR: u64 = 0x40;

struct NoStops;

impl StopHandler for NoStops {
    fn on_stop(&mut self, state: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
        Resume::Fail { reason: format!("Unexpected {stop:?} at {:#x}", state.regs.rip) }
    }

    fn on_text_write(&mut self, _: &dyn PhysicalMemory, _: Gpa, _: &[u8]) {}

    fn wants_breakpoints(&self) -> bool {
        false
    }
}

fn assemble(at: u64, build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(64).unwrap();
    build(&mut assembler).unwrap();
    assembler.assemble(at).unwrap()
}

fn out(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(dx, port)?;
    a.mov(al, value)?;
    a.out(dx, al)
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u64) -> Result<(), IcedError> {
    let [low, high] = [value & 0xffff_ffff, value >> 32].map(|half| u32::try_from(half).unwrap());
    a.mov(ecx, index)?;
    a.mov(eax, low)?;
    a.mov(edx, high)?;
    a.wrmsr()
}

/// Puts something of its own everywhere, then counts rounds, and interrupts of its APIC timer. RDI is the number of the vCPU;
/// what the vCPUs share is the first one's: two that write an 8259's initialization words at once leave neither's.
fn code() -> Vec<u8> {
    assemble(CODE, |a| {
        a.lidt(ptr(IDT_DESCRIPTOR))?;
        a.mov(rsp, rdi)?;
        a.shl(rsp, 12)?;
        a.add(rsp, 0x18_0000)?;
        let mut own = a.create_label();
        a.test(rdi, rdi)?;
        a.jnz(own)?;
        // The serial line: divisor 3, eight bits, a scratch value.
        out(a, 0x3fb, 0x83)?;
        out(a, 0x3f8, 3)?;
        out(a, 0x3fb, 3)?;
        out(a, 0x3ff, 0x5a)?;
        // The power button is listened to.
        a.mov(dx, 0x602)?;
        a.mov(ax, 0x100)?;
        a.out(dx, ax)?;
        // The 8259s at vectors 0x30 and 0x38, all masked but the timer; the 8254's channel 0 in mode 2.
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xff), (0xa1, 0xff)] {
            out(a, port, value)?;
        }
        for (port, value) in [(0x43, 0x34), (0x40, 0x34), (0x40, 0x12)] {
            out(a, port, value)?;
        }
        // An entry of the I/O APIC, masked.
        a.mov(rsi, 0xfec0_0000_u64)?;
        a.mov(dword_ptr(rsi), 0x10 + 2 * 9)?;
        a.mov(dword_ptr(rsi + 0x10), 0x1_0051)?;
        a.set_label(&mut own)?;
        wrmsr(a, 0xc000_0102, 0x1234_5678_9abc)?;
        wrmsr(a, 0xc000_0082, 0xffff_8000_0000_1000_u64)?;
        a.movups(xmm1, ptr(VECTOR_DATA))?;
        a.mov(rax, 0x7777_0000_u64)?;
        a.mov(dr0, rax)?;
        a.mov(rax, 0x400_u64)?;
        a.mov(dr7, rax)?;
        // The local APIC: on, its timer periodic.
        a.mov(rsi, 0xfee0_0000_u64)?;
        a.mov(dword_ptr(rsi + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rsi + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rsi + 0x320), 0x2_0000 | i32::try_from(TIMER_VECTOR).unwrap())?;
        a.mov(dword_ptr(rsi + 0x380), 1_000_000)?;
        for (value, register) in (0x1001_u64..).zip([rbx, rcx, rbp, r8, r9, r10, r11, r12, r13, r14, r15]) {
            a.mov(register, value)?;
        }
        a.shl(rdi, 4)?;
        a.add(rdi, i32::try_from(COUNTS).unwrap())?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rdi))?;
        a.out(0x80, al)?;
        a.jmp(again)
    })
}

fn handler() -> Vec<u8> {
    assemble(HANDLER, |a| {
        a.inc(qword_ptr(rdi + 8))?;
        a.mov(dword_ptr(rsi + 0xb0), 0)?;
        a.iretq()
    })
}

fn gate_table(memory: &GuestRam) {
    let low = (HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (HANDLER >> 16 & 0xffff) << 48;
    memory.write(Gpa(IDT + 16 * TIMER_VECTOR), &low.to_le_bytes()).unwrap();
    let mut descriptor = 0xfffu16.to_le_bytes().to_vec();
    descriptor.extend(IDT.to_le_bytes());
    memory.write(Gpa(IDT_DESCRIPTOR), &descriptor).unwrap();
    memory.write(Gpa(HANDLER), &handler()).unwrap();
    memory.write(Gpa(VECTOR_DATA), b"sixteen bytes...").unwrap();
}

/// This host's KVM; `None` after saying that there is none, which CI=true does not allow.
fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error) => {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "CI needs /dev/kvm: {error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

fn new(host: &Host) -> Result<Machine, CreateError> {
    with_memory(host, 4 << 20)
}

fn with_memory(host: &Host, memory_bytes: u64) -> Result<Machine, CreateError> {
    let code = code();
    let machine = Machine::new(MachineConfig {
        host,
        memory_bytes,
        vcpus: VCPUS,
        kernel: Kernel {
            entry: Gpa(CODE),
            segments: vec![KernelSegment { gpa: Gpa(CODE), data: &code, mem_size: code.len() as u64 }],
            protocol: Protocol::BareMetal,
        },
        watched_pages: BTreeSet::new(),
        serial: Box::new(io::sink()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })?;
    gate_table(&machine.memory());
    Ok(machine)
}

fn save_to(control: &Control, file: &File) -> Result<Vec<u8>, SaveError> {
    control.save(&|_, _| {}, &mut |at, bytes| file.write_all_at(bytes, at))
}

/// A machine that runs.
struct Running {
    control: Control,
    stop: StopHandle,
    memory: GuestRam,
    run: JoinHandle<RunReport>,
}

impl Running {
    fn start(machine: Machine) -> Self {
        let handlers = (0..VCPUS).map(|_| Box::new(NoStops) as Box<dyn StopHandler>).collect();
        let (control, stop, memory) = (machine.control(), machine.stop_handle(), machine.memory());
        let run = thread::spawn(move || machine.run(handlers).unwrap());
        Self { control, stop, memory, run }
    }

    /// Rounds and interrupts of each vCPU.
    fn counts(&self) -> Vec<u64> {
        (0..u64::from(VCPUS) * 2).map(|word| self.memory.read_u64(Gpa(COUNTS + 8 * word)).unwrap()).collect()
    }

    /// Waits until each vCPU has had some more rounds and interrupts.
    fn goes_on(&self) {
        let before = self.counts();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.counts().iter().zip(&before).any(|(now, before)| *now < before + 3) {
            assert!(Instant::now() < deadline, "{:?} after {before:?}", self.counts());
            assert!(!self.run.is_finished(), "{:?}", self.control.exits());
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn save(&self) -> (Snapshot, File) {
        let file = tempfile::tempfile().unwrap();
        let bytes = self.save_to(&file).unwrap();
        file.set_len(self.memory.bytes()).unwrap();
        (Snapshot::decode(&bytes).unwrap(), file)
    }

    fn save_to(&self, file: &File) -> Result<Vec<u8>, SaveError> {
        save_to(&self.control, file)
    }

    fn end(self) {
        self.stop.stop();
        self.run.join().unwrap();
    }
}

fn restore(host: &Host, (snapshot, file): &(Snapshot, File)) -> Machine {
    let memory = &MemoryFile::new(file.try_clone().unwrap()).unwrap();
    Machine::restore(RestoreConfig { host, snapshot, memory, serial: Box::new(io::sink()) }).unwrap()
}

/// Without what goes on with time: the time-stamp counter, the APIC timer's count, when the 8254 was loaded and whether its
/// interrupt is waiting at the 8259 (it counts while the vCPUs are parked), the clock.
fn without_time(saved: &Saved) -> Saved {
    let mut saved = saved.clone();
    for vcpu in &mut saved.vcpus {
        vcpu.msrs.retain(|(index, _)| *index != 0x10);
        vcpu.lapic[0x390..0x394].fill(0);
    }
    for channel in &mut saved.pit.channels {
        channel.count_load_time = 0;
    }
    let timer = &mut saved.interrupts.master;
    (timer.irr, timer.last_irr) = (timer.irr & !1, timer.last_irr & !1);
    saved.clock = 0;
    saved
}

fn tsc(saved: &Saved) -> Vec<u64> {
    saved.vcpus.iter().map(|vcpu| vcpu.msrs.iter().find(|(index, _)| *index == 0x10).unwrap().1).collect()
}

#[test]
fn every_register_of_a_restored_machine_is_what_was_saved_and_both_go_on() {
    let Some(host) = host() else { return };
    let original = Running::start(new(&host).unwrap());
    original.goes_on();
    let saved = original.save();
    let saved_at = Instant::now();
    original.goes_on();

    for _ in 0..2 {
        let machine = restore(&host, &saved);
        // The vCPUs park before their first instruction.
        let paused = machine.control().pause();
        let copy = Running::start(machine);
        let again = loop {
            let file = tempfile::tempfile().unwrap();
            match copy.save_to(&file) {
                Ok(bytes) => break Snapshot::decode(&bytes).unwrap(),
                // Its threads are not there yet.
                Err(SaveError::NotRunning) => thread::sleep(Duration::from_millis(1)),
                Err(error) => panic!("{error:?}"),
            }
        };
        let (before, after) = (&saved.0.0, &again.0);
        assert_eq!(without_time(before), without_time(after));
        let passed = u64::try_from(saved_at.elapsed().as_nanos()).unwrap();
        assert!(
            (before.clock..before.clock + passed).contains(&after.clock),
            "the clock goes on: {} {}",
            before.clock,
            after.clock
        );
        assert!(tsc(before).iter().zip(tsc(after)).all(|(before, after)| *before <= after));
        let vector = &before.vcpus[1].xsave[160 + 16..160 + 32];
        assert_eq!(vector, b"sixteen bytes...", "what is compared is what the guest has");
        assert_eq!(before.vcpus[1].registers.r15, 0x100b);
        assert_eq!((before.devices.serial.scratch, before.devices.serial.baud_divisor_low), (0x5a, 3));
        assert_eq!(before.devices.power.enable, 0x100);
        assert_eq!(before.interrupts.io_apic.redirtbl[9] & 0xff, 0x51);
        assert_eq!((before.interrupts.master.irq_base, before.pit.channels[0].count), (0x30, 0x1234));
        drop(paused);
        copy.goes_on();
        copy.end();
    }
    original.goes_on();
    original.end();
}

#[test]
fn a_state_that_was_set_while_paused_is_what_is_saved() {
    let Some(host) = host() else { return };
    let machine = Running::start(new(&host).unwrap());
    machine.goes_on();
    let paused = machine.control.pause();
    let vcpu = probe_core::VcpuId(1);
    let mut state = paused.state(vcpu).unwrap();
    (state.regs.r15, state.sys.fs_base) = (0x5555, 0x6666);
    assert!(paused.set_state(vcpu, &state));
    let (snapshot, _) = machine.save();
    let saved = &snapshot.0.vcpus[1];
    assert_eq!((saved.registers.r15, saved.system.fs.base), (0x5555, 0x6666));
    assert_eq!(paused.state(vcpu).unwrap(), state);
    drop(paused);
    machine.goes_on();
    let (snapshot, _) = machine.save();
    assert_eq!(snapshot.0.vcpus[1].registers.r15, 0x5555, "it runs on from there");
    machine.end();
}

#[test]
fn clones_of_one_snapshot_run_at_once_and_do_not_see_each_others_writes() {
    let Some(host) = host() else { return };
    let original = Running::start(new(&host).unwrap());
    original.goes_on();
    let saved = original.save();
    original.end();
    let clones: Vec<_> = (0..4).map(|_| Running::start(restore(&host, &saved))).collect();
    let mark = Gpa(0x20_0000);
    for (number, clone) in (1_u64..).zip(&clones) {
        clone.memory.write(mark, &number.to_le_bytes()).unwrap();
        clone.goes_on();
    }
    for (number, clone) in (1_u64..).zip(clones) {
        clone.goes_on();
        assert_eq!(clone.memory.read_u64(mark).unwrap(), number);
        clone.end();
    }
    saved.0.verify_memory(&MemoryFile::new(saved.1).unwrap()).unwrap();
}

#[test]
fn what_this_host_cannot_be_is_refused() {
    let Some(host) = host() else { return };
    let original = Running::start(new(&host).unwrap());
    original.goes_on();
    let (snapshot, file) = original.save();
    original.end();
    let refused = |change: fn(&mut Saved), file: &File| {
        let mut snapshot = snapshot.clone();
        change(&mut snapshot.0);
        let memory = &MemoryFile::new(file.try_clone().unwrap()).unwrap();
        let config = RestoreConfig { host: &host, snapshot: &snapshot, memory, serial: Box::new(io::sink()) };
        Machine::restore(config).unwrap_err()
    };
    let vendor = refused(|saved| saved.vcpus[0].cpuid.iter_mut().for_each(|entry| entry.ebx ^= 1), &file);
    assert!(matches!(vendor, crate::RestoreError::Cpu(differs) if differs.leaf == 0), "{vendor}");
    let msr = refused(|saved| saved.vcpus[0].msrs.insert(1, (0xdead_0000, 1)), &file);
    assert!(msr.to_string().contains("MSR 0xdead0000"), "{msr}");
    let none = refused(|saved| saved.vcpus.clear(), &file);
    assert!(matches!(none, crate::RestoreError::Create(CreateError::Vcpus { asked: 0, .. })), "{none}");
    file.set_len((4 << 20) - 1).unwrap();
    let short = refused(|_| {}, &file);
    assert!(short.to_string().contains("not complete"), "{short}");
}

#[test]
fn a_full_disk_fails_the_snapshot_and_nothing_else() {
    let Some(host) = host() else { return };
    let machine = Running::start(new(&host).unwrap());
    machine.goes_on();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = machine.save_to(&full).unwrap_err();
    assert!(matches!(error, SaveError::Write(_)), "{error:?}");
    machine.goes_on();
    machine.end();
}

#[test]
fn a_machine_that_does_not_run_is_not_saved() {
    let Some(host) = host() else { return };
    let machine = new(&host).unwrap();
    let (control, file) = (machine.control(), tempfile::tempfile().unwrap());
    let save = || save_to(&control, &file);
    assert!(matches!(save(), Err(SaveError::NotRunning)));
    let running = Running::start(machine);
    running.goes_on();
    save().unwrap();
    running.end();
    assert!(matches!(save(), Err(SaveError::NotRunning)));
}

#[test]
fn how_long_a_restore_of_512_mib_takes_to_the_first_exit_is_told() {
    const BYTES: u64 = 512 << 20;
    let Some(host) = host() else { return };
    let machine = with_memory(&host, BYTES).unwrap();
    let memory = machine.memory();
    // Every other page holds data.
    for at in (0x40_0000..BYTES).step_by(8192) {
        memory.write(Gpa(at), &at.to_le_bytes()).unwrap();
    }
    let original = Running::start(machine);
    original.goes_on();
    let started = Instant::now();
    let saved = original.save();
    println!("saved in {:.1} ms", started.elapsed().as_secs_f64() * 1e3);
    original.end();
    let mut times: Vec<f64> = (0..9)
        .map(|_| {
            let started = Instant::now();
            let copy = Running::start(restore(&host, &saved));
            while copy.control.exits().iter().all(|exits| exits.port_out == 0) {
                thread::yield_now();
            }
            let took = started.elapsed().as_secs_f64() * 1e3;
            assert_eq!(copy.memory.read_u64(Gpa(0x40_0000)).unwrap(), 0x40_0000);
            copy.end();
            took
        })
        .collect();
    times.sort_by(f64::total_cmp);
    println!(
        "restored, to the first exit: {:.1} ms, the fastest {:.1}, the slowest {:.1}",
        times[4], times[0], times[8]
    );
}
