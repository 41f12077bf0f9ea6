//! User mode on several vCPUs at once: is every hit seen, whoever else runs?
//!
//! The guest's vCPUs run one loop at CPL 3. Each round loads a word, at times from where nothing is mapped, looks at its own
//! flags and makes an INT n; the guest's handlers check RIP and flags of their frames and count. Three of these instructions
//! are probed. The first and the last cannot be emulated, so they run in their place, which another vCPU may be about to run
//! through; the one in the middle is where the first one's guard stands, and its probe comes and goes.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, ax, cl, cr3, dword_ptr, dx, eax, edi, ptr, qword_ptr, rax, rbx, rcx, rdi, rsi, rsp, ss,
};
use probe_core::engine::{Engine, EngineConfig, EngineError, HitSink, Notice, Report, VcpuEngine};
use probe_core::machine::PlainText;
use probe_core::patch::Place;
use probe_core::probe::{Counts, ProbeRequest};
use probe_core::stop::StopHandler;
use probe_core::{Gpa, Gva, PhysicalMemory, VcpuId, Vendor, rflags};
use vmm::boot::{Kernel, KernelSegment, Protocol};
use vmm::layout::SLOTS;
use vmm::{Host, Machine, MachineConfig, RunEnd, VcpuReport};

use crate::guest::DESCRIPTORS;
use crate::layout::{KERNEL_CODE_64, KERNEL_DATA, MEMORY, TASK, USER_CODE_64, USER_DATA};
use crate::machine::CampaignError;

/// Most vCPUs: those whose stacks fit.
pub const MAX_VCPUS: u32 = 16;

// Guest-physical and linear addresses.
const KERNEL: u64 = 0x10_0000;
const BAD: u64 = 0x10_0800;
const PAGE_FAULT: u64 = 0x10_0900;
const CALL: u64 = 0x10_0a00;
const DONE: u64 = 0x10_0b00;
/// Handlers of all other vectors, 16 bytes apart: [`BAD`].
const HANDLERS: u64 = 0x10_1000;
const IDT: u64 = 0x10_2000;
const GDT: u64 = 0x10_3000;
const GDT_DESCRIPTOR: u64 = 0x10_3800;
const IDT_DESCRIPTOR: u64 = 0x10_3810;
/// Task-state segments, 0x80 bytes apart.
const TASKS: u64 = 0x10_4000;
const TABLES: u64 = 0x11_0000;
const USER: u64 = 0x12_0000;
/// A word to load, then a word of each vCPU: rounds, page faults, calls.
const DATA: u64 = 0x13_0000;
const ROUNDS: u64 = DATA + 0x100;
const FAULTS: u64 = DATA + 0x200;
const CALLS: u64 = DATA + 0x300;
/// vCPUs that are done.
const ENDED: u64 = DATA + 0x400;
/// RIP at which something was wrong.
const WRONG: u64 = DATA + 0x408;
/// Each vCPU has two stacks here, for CPL 0 and above that for CPL 3.
const STACKS: u64 = 0x14_0000;
const STACK_BYTES: u64 = 0x2000;
/// Nothing is mapped here.
const UNMAPPED: u64 = 1 << 40;
/// One round in so many loads from there.
const FAULT_EVERY: u64 = 8;
const TSS_BYTES: u64 = 104;

/// How long the guest may go on without any of its vCPUs completing a round.
const PATIENCE: Duration = Duration::from_secs(30);

/// What was counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How the run ended.
    pub end: RunEnd,
    /// What each vCPU had done by then, and where it was.
    pub vcpus: Vec<VcpuReport>,
    /// By the guest: rounds, page faults and calls of all vCPUs.
    pub guest: [u64; 3],
    /// By the probes on the load, on the instruction behind it and on the call.
    pub probes: [Counts; 3],
    /// How often the probe in the middle was switched.
    pub switched: u64,
    /// What the engine had to say.
    pub notices: Vec<Notice>,
    /// Where a frame or a flag was not as it should be.
    pub wrong: Option<u64>,
    /// The guest's text is as it was.
    pub restored: bool,
}

impl Outcome {
    /// What is not as it should be after so many rounds of all vCPUs.
    #[must_use]
    pub fn faults(&self, rounds: u64) -> Vec<String> {
        let [load, _, call] = &self.probes;
        let faults = rounds / FAULT_EVERY;
        let checks = [
            (self.end == RunEnd::PowerOff, "the guest did not come to its end"),
            (self.wrong.is_none(), "a frame or a flag was wrong"),
            (self.notices.is_empty(), "a probe was taken out"),
            (self.restored, "the guest's text is not as it was"),
            (self.guest == [rounds, faults, rounds], "the guest's own counts are wrong"),
            (load.hits == rounds && load.delivered == rounds, "hits of the load were lost or invented"),
            // A pause may come when a fault is on its way to its handler: the load has then not run, and is counted when it does.
            (load.faulted + load.stepped == rounds, "the load did not run or fault as often"),
            ((faults / 2..=faults).contains(&load.faulted), "faults of the load were lost or invented"),
            (call.hits == rounds && call.stepped == rounds, "calls were lost or invented"),
        ];
        checks.iter().filter(|(holds, _)| !holds).map(|(_, text)| (*text).to_owned()).collect()
    }
}

/// A sink that always has room.
struct Counted;

impl HitSink for Counted {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        true
    }
}

/// Why it could not be carried through.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No machine, or no run.
    #[error(transparent)]
    Campaign(#[from] CampaignError),
    /// No probe.
    #[error("The guest cannot be probed")]
    Engine(#[from] EngineError),
}

/// Runs `rounds` on each of so many vCPUs, at most [`MAX_VCPUS`].
///
/// # Errors
/// [`UserError`] where the host cannot run it.
pub fn run(vcpus: u32, rounds: u32) -> Result<Outcome, UserError> {
    let vcpus = vcpus.clamp(1, MAX_VCPUS);
    let program = Program::new(vcpus, rounds).map_err(CampaignError::from)?;
    let machine = Machine::new(MachineConfig {
        host: &Host::open().map_err(CampaignError::from)?,
        memory_bytes: MEMORY,
        vcpus,
        kernel: Kernel { entry: Gpa(KERNEL), segments: program.segments(), protocol: Protocol::BareMetal },
        watched_pages: BTreeSet::new(),
        serial: Box::new(io::sink()),
        disks: Vec::new(),
        vsock: None,
        networks: Vec::new(),
    })
    .map_err(CampaignError::from)?;
    let (memory, control, stop) = (machine.memory(), machine.control(), machine.stop_handle());
    let engine = Arc::new(Engine::new(EngineConfig {
        slots: SLOTS,
        vcpus: usize::try_from(vcpus).unwrap_or_default(),
        vendor: Vendor::Unknown,
        max_hits: None,
        stacks_in_whole_pages: false,
        control: Arc::new(machine.control()),
        text: Arc::new(PlainText),
    }));
    let requests =
        program.probed.map(|at| ProbeRequest::new(Place { gva: Gva(at), gpa: Gpa(at), function: None }));
    let probes = engine.arm(&memory, &requests)?;
    let handlers = (0..vcpus).map(|vcpu| {
        Box::new(VcpuEngine::new(Arc::clone(&engine), VcpuId(vcpu), Counted)) as Box<dyn StopHandler>
    });
    let handlers = handlers.collect();
    let running = thread::spawn(move || machine.run(handlers));
    let sum = {
        let memory = memory.clone();
        move |at: u64| {
            let words = (0..u64::from(vcpus)).map(|vcpu| memory.read_u64(Gpa(at + 8 * vcpu)));
            words.map(Result::unwrap_or_default).sum::<u64>()
        }
    };
    let (ended, is_over) = mpsc::channel::<()>();
    let rounds = sum.clone();
    // A thread of its own: the pauses below wait for each vCPU.
    thread::spawn(move || {
        let mut done = 0;
        while is_over.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            let now = rounds(ROUNDS);
            if now == done {
                stop.stop();
            }
            done = now;
        }
    });
    let mut switched = 0;
    while !running.is_finished() {
        engine.disable(&memory, &probes[1]);
        thread::sleep(Duration::from_micros(500));
        drop(control.pause());
        engine.enable(&memory, &probes[1])?;
        thread::sleep(Duration::from_micros(500));
        switched += 1;
    }
    drop(ended);
    let report = match running.join() {
        Ok(report) => report.map_err(CampaignError::from)?,
        Err(panic) => std::panic::resume_unwind(panic),
    };
    engine.disarm_all(&memory);
    let mut text = vec![0; program.user.len()];
    let read = memory.read(Gpa(USER), &mut text);
    let counts = |index: usize| probes.get(index).map(|probe| probe.counts()).unwrap_or_default();
    Ok(Outcome {
        end: report.end,
        vcpus: report.vcpus,
        guest: [ROUNDS, FAULTS, CALLS].map(sum),
        probes: [0, 1, 2].map(counts),
        switched,
        notices: engine.take_notices(),
        wrong: memory.read_u64(Gpa(WRONG)).ok().filter(|rip| *rip != 0),
        restored: read.is_ok() && text == program.user,
    })
}

/// The guest.
struct Program {
    pieces: Vec<(u64, Vec<u8>)>,
    user: Vec<u8>,
    /// The load, the instruction behind it, and the call.
    probed: [u64; 3],
}

type Assemble<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn assemble(at: u64, build: Assemble<'_>) -> Result<Vec<u8>, IcedError> {
    let mut assembler = CodeAssembler::new(64)?;
    build(&mut assembler)?;
    assembler.assemble(at)
}

impl Program {
    fn new(vcpus: u32, rounds: u32) -> Result<Self, IcedError> {
        let (user, probed) = user(rounds)?;
        let [load, _, call] = probed;
        let mut pieces = vec![
            (KERNEL, assemble(KERNEL, &start)?),
            (BAD, assemble(BAD, &bad)?),
            (PAGE_FAULT, assemble(PAGE_FAULT, &|a| page_fault(a, load))?),
            (CALL, assemble(CALL, &|a| called(a, call + 2))?),
            (DONE, assemble(DONE, &|a| done(a, vcpus))?),
            (USER, user.clone()),
            (TABLES, tables()),
        ];
        for vector in 0..256_u64 {
            let at = HANDLERS + 16 * vector;
            pieces.push((at, assemble(at, &|a| a.jmp(BAD))?));
        }
        let idt = (0..256_u64).flat_map(|vector| {
            let target = match vector {
                14 => PAGE_FAULT,
                0x80 => CALL,
                0x81 => DONE,
                _ => HANDLERS + 16 * vector,
            };
            // Interrupt gate; those of INT n may come from CPL 3 (Intel SDM vol. 3A, 6.14.1).
            let access: u64 = if vector < 0x80 { 0x8e00 } else { 0xee00 };
            let selector = u64::from(KERNEL_CODE_64);
            [target & 0xffff | selector << 16 | access << 32 | (target >> 16 & 0xffff) << 48, target >> 32]
        });
        pieces.push((IDT, words(idt)));
        let mut gdt = DESCRIPTORS.to_vec();
        gdt.push(0);
        for vcpu in 0..u64::from(vcpus) {
            let task = TASKS + 0x80 * vcpu;
            let low = (TSS_BYTES - 1) | (task & 0xff_ffff) << 16 | 0x89 << 40 | (task >> 24 & 0xff) << 56;
            gdt.extend([low, task >> 32]);
            let mut segment = vec![0; 104];
            segment[4..12].copy_from_slice(&(STACKS + (2 * vcpu + 1) * STACK_BYTES).to_le_bytes());
            pieces.push((task, segment));
        }
        let limit = |bytes: usize| u16::try_from(bytes - 1).unwrap_or(u16::MAX).to_le_bytes();
        let descriptor = |bytes, base: u64| [limit(bytes).as_slice(), &base.to_le_bytes()].concat();
        pieces.push((GDT_DESCRIPTOR, descriptor(8 * gdt.len(), GDT)));
        pieces.push((IDT_DESCRIPTOR, descriptor(16 * 256, IDT)));
        pieces.push((GDT, words(gdt)));
        Ok(Self { pieces, user, probed })
    }

    fn segments(&self) -> Vec<KernelSegment<'_>> {
        let segment = |(gpa, data): &'_ (u64, Vec<u8>)| (Gpa(*gpa), data.len() as u64);
        let pieces = self.pieces.iter().map(|piece| (segment(piece), &piece.1));
        pieces.map(|((gpa, mem_size), data)| KernelSegment { gpa, data, mem_size }).collect()
    }
}

fn words(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The first 4 MiB mapped to themselves, for user mode too.
fn tables() -> Vec<u8> {
    const ALL: u64 = 0b111;
    const LARGE: u64 = 1 << 7;
    let mut tables = vec![0; 3 * 512];
    tables[0] = (TABLES + 0x1000) | ALL;
    tables[512] = (TABLES + 0x2000) | ALL;
    tables[1024] = ALL | LARGE;
    tables[1025] = 0x20_0000 | ALL | LARGE;
    words(tables)
}

/// A word of each vCPU, whose number is in RDI.
fn own(at: u64) -> iced_x86::code_asm::AsmMemoryOperand {
    qword_ptr(rdi * 8 + i32::try_from(at).unwrap_or_default())
}

/// Where each vCPU starts.
fn start(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, TABLES)?;
    a.mov(cr3, rax)?;
    a.lgdt(ptr(GDT_DESCRIPTOR))?;
    a.lidt(ptr(IDT_DESCRIPTOR))?;
    a.mov(eax, u32::from(KERNEL_DATA))?;
    a.mov(ss, eax)?;
    a.mov(eax, edi)?;
    a.shl(eax, 4)?;
    a.add(eax, i32::from(TASK))?;
    a.ltr(ax)?;
    a.mov(rax, rdi)?;
    a.imul_3(rax, rax, i32::try_from(2 * STACK_BYTES).unwrap_or_default())?;
    a.lea(rsp, qword_ptr(rax + i32::try_from(STACKS + STACK_BYTES).unwrap_or_default()))?;
    a.lea(rbx, qword_ptr(rax + i32::try_from(STACKS + 2 * STACK_BYTES).unwrap_or_default()))?;
    a.push(i32::from(USER_DATA))?;
    a.push(rbx)?;
    a.push(i32::try_from(rflags::FIXED | rflags::IF).unwrap_or_default())?;
    a.push(i32::from(USER_CODE_64))?;
    a.push(i32::try_from(USER).unwrap_or_default())?;
    a.iretq()
}

/// User mode: its code, and the probed instructions.
fn user(rounds: u32) -> Result<(Vec<u8>, [u64; 3]), IcedError> {
    let mut code: Vec<u8> = Vec::new();
    let mut add = |build: Assemble<'_>| {
        let at = USER + code.len() as u64;
        code.extend(assemble(at, build)?);
        Ok::<u64, IcedError>(at)
    };
    add(&|a| a.mov(rcx, u64::from(rounds)))?;
    let again = add(&|a| {
        let mut mapped = a.create_label();
        a.mov(rsi, DATA)?;
        a.test(cl, i32::try_from(FAULT_EVERY - 1).unwrap_or_default())?;
        a.jne(mapped)?;
        a.mov(rsi, UNMAPPED)?;
        a.set_label(&mut mapped)?;
        a.nop()
    })?;
    let load = add(&|a| a.popcnt(rax, qword_ptr(rsi)))?;
    let behind = add(&|a| a.pushfq())?;
    add(&|a| {
        let mut right = a.create_label();
        a.pop(rax)?;
        a.test(eax, i32::try_from(rflags::IF).unwrap_or_default())?;
        a.jne(right)?;
        a.ud2()?;
        a.set_label(&mut right)?;
        a.nop()
    })?;
    let call = add(&|a| a.int(0x80))?;
    add(&|a| {
        a.inc(own(ROUNDS))?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.int(0x81)
    })?;
    Ok((code, [load, behind, call]))
}

/// Goes to [`BAD`] unless the frame at `offset` bytes from RSP shows `rip`, and interrupts on.
fn check_frame(a: &mut CodeAssembler, offset: i32, rip: u64) -> Result<(), IcedError> {
    a.cmp(qword_ptr(rsp + offset), i32::try_from(rip).unwrap_or_default())?;
    a.jne(BAD)?;
    a.test(dword_ptr(rsp + offset + 16), i32::try_from(rflags::IF).unwrap_or_default())?;
    a.je(BAD)
}

fn page_fault(a: &mut CodeAssembler, load: u64) -> Result<(), IcedError> {
    check_frame(a, 8, load)?;
    a.mov(rsi, DATA)?;
    a.inc(own(FAULTS))?;
    a.add(rsp, 8)?;
    a.iretq()
}

fn called(a: &mut CodeAssembler, from: u64) -> Result<(), IcedError> {
    check_frame(a, 0, from)?;
    a.inc(own(CALLS))?;
    a.iretq()
}

/// The last INT of each vCPU: the first one waits for all, and switches off.
fn done(a: &mut CodeAssembler, vcpus: u32) -> Result<(), IcedError> {
    let (mut wait, mut sleep) = (a.create_label(), a.create_label());
    a.lock().inc(qword_ptr(ENDED))?;
    a.test(rdi, rdi)?;
    a.jne(sleep)?;
    a.set_label(&mut wait)?;
    a.pause()?;
    a.cmp(qword_ptr(ENDED), i32::try_from(vcpus).unwrap_or_default())?;
    a.jne(wait)?;
    power_off(a)?;
    a.set_label(&mut sleep)?;
    a.cli()?;
    a.hlt()
}

fn bad(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(rsp))?;
    a.or(rax, 1)?;
    a.mov(qword_ptr(WRONG), rax)?;
    power_off(a)
}

fn power_off(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(dx, 0x604)?;
    a.mov(ax, 0x2000)?;
    a.out(dx, ax)
}
