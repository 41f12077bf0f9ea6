//! Displaced instructions that run out of line, under the engine, on the local /dev/kvm: the guest's own handlers look at what
//! they are shown.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, cr2, dword_ptr, dx, eax, ebx, ecx, qword_ptr, rax, rbx, rcx, rsi, rsp, word_ptr, xmm0,
};
use probe_core::engine::{Engine, EngineConfig, HitSink, Report, VcpuEngine};
use probe_core::machine::{NotRunning, PlainText};
use probe_core::patch::Place;
use probe_core::probe::{Counts, Probe, ProbeRequest};
use probe_core::{Gpa, Gva, VcpuId, rflags};
use vmm::layout::SLOTS;
use vmm::{GuestRam, RunEnd, RunReport};

use crate::common::{
    CODE, DATA, Guest, IDT_HANDLERS, STACK, assemble, guest, interrupt_table, power_off, use_interrupts, word,
};
use crate::stops::{raise_serial_interrupt, serial_interrupt_handler};

const NMI: u8 = 2;
/// A canonical address that no identity map of RAM reaches.
const UNMAPPED: u64 = 0x4000_0000_0000;

struct Sink;

impl HitSink for Sink {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        true
    }
}

/// Code in three parts, of which the middle one is one instruction, to be probed.
struct Probed {
    code: Vec<u8>,
    /// Where the probed instruction stands.
    at: u64,
    /// And the one behind it.
    next: u64,
}

type Part<'a> = &'a dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>;

impl Probed {
    fn new(before: Part<'_>, instruction: Part<'_>, after: Part<'_>) -> Self {
        let start = |a: &mut CodeAssembler| {
            use_interrupts(a)?;
            before(a)
        };
        let mut code = assemble(CODE, start);
        let at = CODE + code.len() as u64;
        code.extend(assemble(at, instruction));
        let next = CODE + code.len() as u64;
        code.extend(assemble(next, after));
        Self { code, at, next }
    }

    /// Runs it with handlers for some vectors, probed.
    fn run(&self, handlers: &[(u8, Vec<u8>)], stop_after: Option<Duration>) -> Option<Outcome> {
        let Guest { machine, memory, console } = guest(&self.code, 1, &[])?;
        interrupt_table(&memory, handlers);
        let before = text(&memory);
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: SLOTS,
            vendor: probe_core::Vendor::Unknown,
            vcpus: 1,
            max_hits: None,
            stacks_in_whole_pages: false,
            control: Arc::new(NotRunning),
            text: Arc::new(PlainText),
        }));
        let place = Place { gva: Gva(self.at), gpa: Gpa(self.at), function: None };
        let probe = engine.arm(&memory, &[ProbeRequest::new(place)]).unwrap().remove(0);
        let handler = Box::new(VcpuEngine::new(Arc::clone(&engine), VcpuId(0), Sink));
        if let Some(after) = stop_after {
            let stop = machine.stop_handle();
            thread::spawn(move || {
                thread::sleep(after);
                stop.stop();
            });
        }
        let report = machine.run(vec![handler]).unwrap();
        engine.disarm_all(&memory);
        assert_eq!(engine.take_notices(), []);
        assert_eq!(text(&memory), before, "no int3 is left behind");
        Some(Outcome { report, memory, console: console.text(), probe })
    }
}

/// The code and the handlers.
fn text(memory: &GuestRam) -> Vec<u64> {
    let places = (CODE..CODE + 0x1000).chain(IDT_HANDLERS..IDT_HANDLERS + 64 * 256);
    places.step_by(8).map(|at| word(memory, at)).collect()
}

struct Outcome {
    report: RunReport,
    memory: GuestRam,
    console: String,
    probe: Arc<Probe>,
}

impl Outcome {
    fn counts(&self) -> Counts {
        self.probe.counts()
    }
}

/// A handler that stores its frame, the error code first if there is one, and CR2, and switches off.
fn reporter(vector: u8) -> (u8, Vec<u8>) {
    let code = assemble(IDT_HANDLERS + 64 * u64::from(vector), |a| {
        for offset in [0, 8, 16, 24] {
            a.pop(qword_ptr(DATA + offset))?;
        }
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(DATA + 32), rax)?;
        power_off(a)
    });
    (vector, code)
}

/// Interrupts on, with none to come.
fn interrupts_on(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sti()?;
    a.nop()
}

const ON: u64 = rflags::FIXED | rflags::IF;

#[test]
fn a_fault_with_an_error_code_shows_the_original_address() {
    let probed = Probed::new(
        &|a| {
            a.mov(ecx, 0x4fff_ffff)?; // no such MSR
            interrupts_on(a)
        },
        &|a| a.rdmsr(),
        &power_off,
    );
    let Some(run) = probed.run(&[reporter(13)], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    let seen = [0, 8, 16, 24].map(|offset| word(&run.memory, DATA + offset));
    assert_eq!((seen[0], seen[1], seen[2]), (0, probed.at, 0x10));
    assert_eq!(seen[3] & (rflags::TF | rflags::IF | rflags::RF), rflags::IF | rflags::RF);
    assert_eq!(run.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

#[test]
fn a_fault_without_an_error_code_shows_the_original_address() {
    let probed = Probed::new(
        &|a| {
            a.xor(ecx, ecx)?;
            interrupts_on(a)
        },
        &|a| a.div(ecx),
        &power_off,
    );
    let Some(run) = probed.run(&[reporter(0)], None) else { return };
    let seen = [0, 8, 16, 24].map(|offset| word(&run.memory, DATA + offset));
    assert_eq!((seen[0], seen[1], seen[3]), (probed.at, 0x10, STACK));
    assert_eq!(seen[2] & (rflags::TF | rflags::IF | rflags::RF), rflags::IF | rflags::RF);
    assert_eq!(run.counts().faulted, 1);
}

#[test]
fn a_page_fault_shows_the_original_address_and_is_counted_once_over_its_retries() {
    let probed = Probed::new(
        &|a| {
            a.mov(rbx, UNMAPPED)?;
            interrupts_on(a)
        },
        &|a| a.movups(xmm0, iced_x86::code_asm::xmmword_ptr(rbx)),
        &power_off,
    );
    let Some(run) = probed.run(&[reporter(14)], None) else { return };
    assert_eq!(word(&run.memory, DATA + 8), probed.at);
    assert_eq!(word(&run.memory, DATA + 32), UNMAPPED, "CR2");

    // The handler counts, and gives a better address at the third time.
    let retry = assemble(IDT_HANDLERS + 64 * 14, |a| {
        let mut again = a.create_label();
        a.inc(qword_ptr(DATA + 0x40))?;
        a.cmp(qword_ptr(DATA + 0x40), 3)?;
        a.jb(again)?;
        a.mov(rbx, DATA)?;
        a.set_label(&mut again)?;
        a.add(rsp, 8)?;
        a.iretq()
    });
    let Some(run) = probed.run(&[(14, retry)], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    assert_eq!(word(&run.memory, DATA + 0x40), 3);
    assert_eq!(run.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

#[test]
fn a_storm_of_nmis_loses_neither_nmis_nor_hits() {
    const ROUNDS: u64 = 500;
    let probed = Probed::new(
        &|a| {
            // The local APIC on: spurious-interrupt vector register (Intel SDM vol. 3A, 11.9).
            a.mov(rbx, 0xfee0_00f0_u64)?;
            a.mov(dword_ptr(rbx), 0x1ff)?;
            a.mov(rbx, 0xfee0_0300_u64)?;
            a.mov(eax, 0x4400)?;
            a.mov(rcx, ROUNDS)
        },
        // An NMI to APIC id 0 (Intel SDM vol. 3A, 11.6.1): its operand is no RAM, so the store runs in the slot.
        &|a| a.mov(dword_ptr(rbx), eax),
        &|_| Ok(()),
    );
    let loop_back = assemble(probed.next, |a| {
        a.dec(rcx)?;
        a.jne(probed.at)?;
        power_off(a)
    });
    let probed = Probed { code: [probed.code, loop_back].concat(), ..probed };
    let count = assemble(IDT_HANDLERS + 64 * u64::from(NMI), |a| {
        let mut good = a.create_label();
        a.inc(qword_ptr(DATA))?;
        a.cmp(qword_ptr(rsp), i32::try_from(CODE + 0x1000).unwrap())?;
        a.jb(good)?;
        a.inc(qword_ptr(DATA + 8))?;
        a.set_label(&mut good)?;
        a.iretq()
    });
    let Some(run) = probed.run(&[(NMI, count)], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    assert_eq!(word(&run.memory, DATA), ROUNDS, "NMIs");
    assert_eq!(word(&run.memory, DATA + 8), 0, "frames with a foreign address");
    let expected = Counts { hits: ROUNDS, delivered: ROUNDS, stepped: ROUNDS, ..Counts::default() };
    assert_eq!(run.counts(), expected);
}

#[test]
fn debug_regs_a_pending_interrupt_comes_behind_the_instruction() {
    let probed = Probed::new(
        &|a| {
            raise_serial_interrupt(a)?;
            a.sti()
        },
        &|a| a.cpuid(),
        &|a| {
            // KVM's emulator takes an interrupt late.
            let mut wait = a.create_label();
            a.set_label(&mut wait)?;
            a.mov(rbx, qword_ptr(DATA))?;
            a.test(rbx, rbx)?;
            a.je(wait)?;
            power_off(a)
        },
    );
    let Some(run) = probed.run(&[(0x24, serial_interrupt_handler())], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    let interrupted = word(&run.memory, DATA);
    assert!((probed.next..CODE + 0x1000).contains(&interrupted), "{interrupted:#x}");
    assert_eq!(word(&run.memory, DATA + 8) & (rflags::IF | rflags::TF), rflags::IF);
    assert_eq!(run.counts().stepped, 1);
}

#[test]
fn a_string_of_port_writes_is_one_step() {
    let probed = Probed::new(
        &|a| {
            a.mov(qword_ptr(DATA + 0x100), 0x63_6261i32)?;
            a.mov(rsi, DATA + 0x100)?;
            a.mov(rcx, 3u64)?;
            a.mov(dx, 0x3f8)
        },
        &|a| a.rep().outsb(),
        &power_off,
    );
    let Some(run) = probed.run(&[], None) else { return };
    assert_eq!(run.console, "abc");
    assert_eq!(run.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
}

#[test]
fn x87_and_mov_ss_run_out_of_line() {
    let probed = Probed::new(&|a| a.fninit(), &|a| a.fnstcw(word_ptr(DATA)), &power_off);
    let Some(run) = probed.run(&[], None) else { return };
    assert_eq!(word(&run.memory, DATA), 0x37f);
    assert_eq!(run.counts().stepped, 1);

    let load = |a: &mut CodeAssembler| a.mov(iced_x86::code_asm::ss, ebx);
    let probed = Probed::new(&|a| a.mov(ebx, 0x18), &load, &power_off);
    let Some(run) = probed.run(&[], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    assert_eq!(run.counts().stepped, 1);
}

#[test]
fn iretq_leaves_for_the_address_in_its_frame() {
    let probed = Probed::new(
        &|a| {
            let mut behind = a.create_label();
            a.mov(rax, rsp)?;
            a.push(0x18)?;
            a.push(rax)?;
            a.push(0x202)?;
            a.push(0x10)?;
            a.lea(rax, qword_ptr(behind))?;
            a.push(rax)?;
            let mut iret = a.create_label();
            a.jmp(iret)?;
            a.set_label(&mut behind)?;
            a.pushfq()?;
            a.pop(qword_ptr(DATA))?;
            a.mov(qword_ptr(DATA + 8), rsp)?;
            power_off(a)?;
            a.set_label(&mut iret)?;
            a.zero_bytes()
        },
        &|a| a.iretq(),
        &|_| Ok(()),
    );
    let Some(run) = probed.run(&[], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    assert_eq!((word(&run.memory, DATA), word(&run.memory, DATA + 8)), (ON, STACK));
    assert_eq!(run.counts().stepped, 1);
}

#[test]
fn a_run_that_is_stopped_in_a_slot_ends_at_the_original() {
    let probed = Probed::new(
        &|a| {
            a.mov(rsi, DATA)?;
            a.mov(rcx, u64::MAX >> 1)?;
            a.mov(dx, 0x80)?;
            a.cld()?;
            interrupts_on(a)
        },
        &|a| a.rep().outsb(),
        &power_off,
    );
    let Some(run) = probed.run(&[], Some(Duration::from_millis(200))) else { return };
    assert_eq!(run.report.end, RunEnd::Stopped);
    let state = run.report.vcpus[0].state;
    assert_eq!(state.regs.rip, probed.at);
    assert_eq!(state.regs.rflags & (rflags::IF | rflags::TF), rflags::IF);
    assert!(state.regs.rcx < u64::MAX >> 1);
}

#[test]
fn a_run_that_ends_by_a_port_write_in_a_slot_ends_behind_it() {
    let probed = Probed::new(
        &|a| {
            a.mov(dx, 0x604)?;
            a.mov(iced_x86::code_asm::ax, 0x2000)
        },
        &|a| a.out(dx, iced_x86::code_asm::ax),
        &|a| a.nop(),
    );
    let Some(run) = probed.run(&[], None) else { return };
    assert_eq!(run.report.end, RunEnd::PowerOff);
    assert_eq!(run.report.vcpus[0].state.regs.rip, probed.next);
    assert_eq!(run.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
}
