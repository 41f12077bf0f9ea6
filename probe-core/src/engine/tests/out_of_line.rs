//! Displaced instructions in a slot, and what interrupts them there.

use super::*;
use crate::handler::{Hit, Verdict};
use crate::machine::{Alone, ControlError};
use crate::paging;

/// The interrupt table, and the handler of vector n: a nop at HANDLERS + 16 n.
const IDT: Gva = Gva(0x3000);
const HANDLERS: Gva = Gva(0x4000);
const NOP: u8 = 0x90;

const DEBUG: u8 = 1;
const NMI: u8 = 2;
const BREAKPOINT: u8 = 3;
pub(super) const GENERAL_PROTECTION: u8 = 13;
pub(super) const PAGE_FAULT: u8 = 14;

pub(super) const RDMSR: &[u8] = &[0x0f, 0x32, 0xc3]; // rdmsr; ret
const LOAD: &[u8] = &[0x0f, 0x10, 0x07, 0xc3]; // movups (%rdi),%xmm0; ret
const RDTSC: &[u8] = &[0x0f, 0x31];
const IRETQ: &[u8] = &[0x48, 0xcf];

/// A frame as the guest's handler reads it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub rip: u64,
    pub rflags: u64,
    pub rsp: u64,
}

pub(super) fn handler(vector: u8) -> Gva {
    HANDLERS.offset(16 * u64::from(vector))
}

/// An interrupt gate, or a trap gate.
fn gate(target: Gva, kind: u64) -> [u8; 16] {
    let low = target.0 & 0xffff | 0x10 << 16 | (0x80 | kind) << 40 | (target.0 >> 16 & 0xffff) << 48;
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&low.to_le_bytes());
    bytes[8..].copy_from_slice(&(target.0 >> 32).to_le_bytes());
    bytes
}

impl Guest {
    /// A guest with an interrupt table, probed at its first instruction.
    pub(super) fn with_table(code: &[u8]) -> (Self, Arc<Probe>) {
        let mut guest = Self::new(code, None);
        for vector in 0..=255 {
            guest.set_gate(vector, handler(vector), 0xe);
            guest.memory.load(Gpa(handler(vector).0), &[NOP; 16]);
        }
        guest.state.sys.idt_base = IDT.0;
        guest.state.sys.idt_limit = 0xfff;
        let probe = guest.arm(0);
        (guest, probe)
    }

    pub(super) fn set_gate(&self, vector: u8, target: Gva, kind: u64) {
        self.memory.load(Gpa(IDT.0 + 16 * u64::from(vector)), &gate(target, kind));
    }

    pub(super) fn caught(&self, vector: u8) -> bool {
        self.memory.bytes(Gpa(handler(vector).0), 1) == [INT3]
    }

    /// Hits the probe, and returns the slot's address.
    pub(super) fn enter(&mut self) -> u64 {
        assert_eq!(self.breakpoint(), Resume::Run);
        assert_ne!(self.state.regs.rip, TEXT.0);
        self.state.regs.rip
    }

    /// An event as the CPU delivers it (Intel SDM vol. 3A, 6.14): a frame, perhaps an error code, the handler.
    pub(super) fn event(&mut self, vector: u8, code: Option<u64>, rf: u64) {
        let regs = &mut self.state.regs;
        let frame = [regs.rip, 0x10, regs.rflags | rf, regs.rsp, 0x18];
        let words: Vec<u64> = code.into_iter().chain(frame).collect();
        regs.rsp = (regs.rsp & !0xf) - 8 * words.len() as u64;
        for (at, word) in (regs.rsp..).step_by(8).zip(words) {
            self.memory.load(Gpa(at), &word.to_le_bytes());
        }
        regs.rip = handler(vector).0;
        regs.rflags &= !(rflags::IF | rflags::TF | rflags::RF);
    }

    /// The frame at RSP, above an error code if there is one.
    pub(super) fn frame(&self, code: bool) -> Seen {
        let word = |index: u64| self.memory.word(Gpa(self.state.regs.rsp + 8 * (index + u64::from(code))));
        Seen { rip: word(0), rflags: word(2), rsp: word(3) }
    }

    /// IRETQ from the handler.
    pub(super) fn return_from(&mut self, code: bool) {
        let frame = self.frame(code);
        let regs = &mut self.state.regs;
        (regs.rip, regs.rflags, regs.rsp) = (frame.rip, frame.rflags, frame.rsp);
    }

    /// The vCPU runs into the catcher on a handler, which must be there. The handler's first instruction is then displaced, or in
    /// its place again if the catcher stood for the step alone.
    pub(super) fn catch(&mut self, vector: u8) {
        assert!(self.caught(vector), "vector {vector}");
        assert_eq!(self.breakpoint(), Resume::Run);
        assert_eq!(self.state.regs.rip, handler(vector).0 + u64::from(self.caught(vector)));
    }
}

#[test]
fn a_step_like_the_last_one_writes_nothing_and_ends_behind_the_original() {
    let (mut guest, probe) = Guest::with_table(LOAD_RIP);
    // Establishes the mapping, the copy and the catchers.
    guest.enter();
    assert_eq!(guest.guard(7), Resume::Run);
    guest.state.regs.rip = TEXT.0;
    guest.memory.clear_log();

    let slot = guest.enter();
    assert_eq!(guest.state.regs.rflags & (rflags::IF | rflags::TF), 0);
    let copy = guest.memory.bytes(paging::physical(&guest.state.sys, &guest.memory, Gva(slot)).unwrap(), 16);
    assert_eq!((copy[0], copy[7]), (0x0f, INT3));
    assert_eq!(guest.guard(7), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 7);
    assert_eq!(guest.state.regs.rflags, rflags::FIXED | rflags::IF);
    assert_eq!(guest.memory.writes(), []);
    assert_eq!(probe.counts(), Counts { hits: 2, delivered: 2, stepped: 2, ..Counts::default() });
}

#[test]
fn a_slot_is_filled_again_for_another_instruction_and_for_the_same_one_rewritten() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    let place = Place { gva: TEXT.offset(0x20), gpa: TEXT_GPA.offset(0x20), function: None };
    guest.memory.load(place.gpa, RDTSC);
    guest.engine.arm(&guest.memory, &[ProbeRequest::new(place)]).unwrap();
    for (at, code) in [(0, RDMSR), (0x20, RDTSC), (0, RDMSR)] {
        guest.state.regs.rip = TEXT.0 + at;
        guest.enter();
        assert_eq!(guest.memory.bytes(REGION.base, 2), code[..2], "{at:#x}");
        guest.guard(2);
    }
    guest.cpu.on_text_write(&guest.memory, TEXT_GPA, RDTSC);
    guest.state.regs.rip = TEXT.0;
    guest.enter();
    assert_eq!(guest.memory.bytes(REGION.base, 2), RDTSC);
}

#[test]
fn catchers_stand_on_all_handlers_but_one_from_the_first_step_on() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    assert!((0..=255).all(|vector| !guest.caught(vector)));
    guest.enter();
    let stands = |vector: u8| vector < 32 && vector != BREAKPOINT;
    assert!((0..=255).all(|vector| guest.caught(vector) == stands(vector)));
    guest.guard(2);
    assert!((0..=255).all(|vector| guest.caught(vector) == stands(vector)));
}

#[test]
fn the_page_fault_catcher_goes_with_the_first_fault_outside_of_steps_and_comes_back_with_the_next_step() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    for hits in 1..4 {
        guest.state.regs.rip = TEXT.0;
        guest.enter();
        guest.guard(2);
        assert!(guest.caught(PAGE_FAULT));
        guest.event(PAGE_FAULT, Some(0), rflags::RF);
        let frame = guest.frame(true);
        guest.catch(PAGE_FAULT);
        assert!(!guest.caught(PAGE_FAULT));
        assert_eq!((guest.frame(true), probe.counts().stepped), (frame, hits));
        guest.return_from(true);
    }
    // The last probe takes it along.
    guest.state.regs.rip = TEXT.0;
    guest.enter();
    guest.guard(2);
    guest.engine.remove(&guest.memory, &probe);
    assert!((0..=255).all(|vector| !guest.caught(vector)));
    assert!(!guest.cpu.wants_breakpoints());
}

#[test]
fn a_fault_shows_the_original_address_and_flags_and_counts_once() {
    for (vector, code) in [(GENERAL_PROTECTION, Some(0)), (6, None)] {
        let (mut guest, probe) = Guest::with_table(RDMSR);
        guest.state.regs.rflags |= rflags::TF;
        guest.enter();
        // As on TCG, which leaves RF out.
        guest.event(vector, code, 0);
        guest.catch(vector);
        let expected = rflags::FIXED | rflags::IF | rflags::TF | rflags::RF;
        let frame = guest.frame(code.is_some());
        assert_eq!(frame, Seen { rip: TEXT.0, rflags: expected, rsp: STACK.0 });
        let faulted = Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() };
        assert_eq!(probe.counts(), faulted);

        // The handler lets it try again.
        guest.return_from(code.is_some());
        guest.enter();
        assert_eq!(guest.guard(2), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
        assert_eq!(guest.state.regs.rflags & rflags::RF, 0);
        assert_eq!(probe.counts(), faulted, "the same hit");
        // The next arrival is a new one.
        guest.state.regs.rip = TEXT.0;
        guest.enter();
        assert_eq!(probe.counts().hits, 2);
    }
}

#[test]
fn a_fault_that_an_exception_table_resolves_leaves_a_later_hit_alone() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    for hits in 1..4 {
        guest.state.regs.rip = TEXT.0;
        guest.enter();
        guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
        guest.catch(GENERAL_PROTECTION);
        // Much later the guest calls again, from the same depth of its stack, without RF.
        guest.return_from(true);
        guest.state.regs.rflags &= !rflags::RF;
        assert_eq!((probe.counts().hits, probe.counts().faulted), (hits, hits));
    }
}

#[test]
fn a_page_fault_may_be_resolved_on_another_vcpu() {
    let (mut guest, probe) = Guest::with_table(LOAD);
    guest.enter();
    guest.state.sys.cr2 = 0x5555_0000;
    guest.event(PAGE_FAULT, Some(0), rflags::RF);
    guest.catch(PAGE_FAULT);
    guest.return_from(true);
    // The task sleeps for the page and wakes up elsewhere, under another PCID.
    let mut other = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(1), Sink::default());
    std::mem::swap(&mut guest.cpu, &mut other);
    guest.state.sys.cr3 |= 5;
    guest.enter();
    guest.guard(3);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

#[test]
fn the_page_fault_catcher_stands_while_any_vcpu_is_in_a_slot() {
    let (mut guest, _) = Guest::with_table(LOAD);
    let mut other = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(1), Sink::default());
    let mut other_state = guest.state;
    guest.enter();
    assert_eq!(other.on_stop(&mut other_state, &guest.memory, Stop::Breakpoint { pc: TEXT }), Resume::Run);
    guest.guard(3);
    assert!(guest.caught(PAGE_FAULT));
    // A fault of somebody else's goes through it unseen.
    guest.event(PAGE_FAULT, Some(0), rflags::RF);
    let frame = guest.frame(true);
    guest.catch(PAGE_FAULT);
    assert_eq!(guest.frame(true), frame);
    other_state.regs.rip += 3;
    let pc = Gva(other_state.regs.rip);
    assert_eq!(other.on_stop(&mut other_state, &guest.memory, Stop::Breakpoint { pc }), Resume::Run);
    // No step is open: the next one takes it out.
    guest.event(PAGE_FAULT, Some(0), rflags::RF);
    guest.catch(PAGE_FAULT);
    assert!(!guest.caught(PAGE_FAULT));
}

#[test]
fn an_nmi_before_the_instruction_makes_no_second_hit() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.enter();
    guest.event(NMI, None, 0);
    guest.catch(NMI);
    let rflags = rflags::FIXED | rflags::IF | rflags::RF;
    assert_eq!(guest.frame(false), Seen { rip: TEXT.0, rflags, rsp: STACK.0 });
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, ..Counts::default() });
    guest.return_from(false);
    guest.enter();
    guest.guard(2);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
}

#[test]
fn an_nmi_behind_the_instruction_finds_it_complete() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.enter();
    guest.state.regs.rip += 2;
    guest.event(NMI, None, 0);
    guest.catch(NMI);
    let rflags = rflags::FIXED | rflags::IF;
    assert_eq!(guest.frame(false), Seen { rip: TEXT.0 + 2, rflags, rsp: STACK.0 });
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
}

#[test]
fn a_watchpoint_of_the_guests_own_reports_the_next_instruction() {
    let (mut guest, _) = Guest::with_table(LOAD);
    guest.enter();
    guest.state.regs.rip += 3;
    guest.event(DEBUG, None, 0);
    guest.catch(DEBUG);
    assert_eq!(guest.frame(false).rip, TEXT.0 + 3);
}

#[test]
fn an_nmi_on_top_of_a_fault_finds_the_faults_frame_repaired() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    let fault = guest.state.regs.rsp;
    guest.event(NMI, None, 0);
    guest.catch(NMI);
    assert_eq!(guest.frame(false).rip, handler(GENERAL_PROTECTION).0);
    assert_eq!(guest.memory.word(Gpa(fault + 8)), TEXT.0);
    assert_eq!(probe.counts().faulted, 1);
    guest.return_from(false);
    guest.catch(GENERAL_PROTECTION);
    assert_eq!(guest.frame(true).rip, TEXT.0);
}

#[test]
fn a_trap_gate_leaves_interrupts_as_they_were_before_the_step() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    guest.set_gate(GENERAL_PROTECTION, handler(GENERAL_PROTECTION), 0xf);
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    guest.catch(GENERAL_PROTECTION);
    assert_ne!(guest.state.regs.rflags & rflags::IF, 0);
}

#[test]
fn a_slot_that_cannot_be_fetched_ends_the_run() {
    for offset in [0, 2] {
        let (mut guest, _) = Guest::with_table(RDMSR);
        let slot = guest.enter();
        guest.state.regs.rip = slot + offset;
        guest.state.sys.cr2 = slot + offset;
        guest.event(PAGE_FAULT, Some(0x10), rflags::RF);
        assert!(matches!(guest.breakpoint(), Resume::Fail { .. }));
    }
}

#[test]
fn a_hypercall_that_kvm_cannot_replace_faults_at_the_original_address() {
    let (mut guest, _) = Guest::with_table(&[0x0f, 0x01, 0xc1]); // vmcall
    let slot = guest.enter();
    guest.state.sys.cr2 = slot;
    guest.event(PAGE_FAULT, Some(3), rflags::RF);
    guest.catch(PAGE_FAULT);
    assert_eq!(guest.frame(true).rip, TEXT.0);
    assert_eq!(guest.state.sys.cr2, TEXT.0);
}

#[test]
fn the_probe_on_a_handler_sees_the_repaired_frame() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    let vector = GENERAL_PROTECTION;
    let place = Place { gva: handler(vector), gpa: Gpa(handler(vector).0), function: None };
    let on_handler = guest.arm_request(ProbeRequest::new(place));
    guest.enter();
    guest.event(vector, Some(0), rflags::RF);
    guest.catch(vector);
    assert_eq!(guest.frame(true).rip, TEXT.0);
    assert_eq!(on_handler.counts().hits, 1);
    assert_eq!(guest.seen(), [(ProbeId(0), TEXT.0), (ProbeId(1), handler(vector).0)]);
}

#[test]
fn a_new_table_moves_the_catchers() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    guest.enter();
    guest.guard(2);
    let elsewhere = handler(200);
    guest.set_gate(GENERAL_PROTECTION, elsewhere, 0xe);
    // A gate that is not present.
    guest.memory.load(Gpa(IDT.0 + 16 * u64::from(NMI) + 5), &[0x0e]);
    guest.state.regs.rip = TEXT.0;
    guest.enter();
    assert!(!guest.caught(GENERAL_PROTECTION) && !guest.caught(NMI) && guest.caught(200));
    assert!(guest.caught(DEBUG), "what both tables have stays");
}

#[test]
fn a_handler_that_cannot_be_caught_does_not_keep_the_step_from_running() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    guest.set_gate(GENERAL_PROTECTION, Gva(0x7777_0000), 0xe);
    guest.enter();
    // What then ends up there is told.
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    guest.state.regs.rip = TEXT.0 + 2;
    guest.memory.load(TEXT_GPA.offset(2), &[INT3]);
    assert!(matches!(guest.breakpoint(), Resume::Fail { .. }));
}

#[test]
fn a_handler_that_the_cpu_cannot_fetch_is_not_caught() {
    // Linux never sets some gates after early boot, and frees what they lead to.
    let (mut guest, _) = Guest::with_table(RDMSR);
    let freed = Gva(0x6000);
    guest.set_gate(22, freed, 0xe);
    MockPageTables::new(&guest.memory, ROOT, 4).map(freed, Gpa(freed.0), 0x1000, RW | entry::NO_EXECUTE);
    guest.memory.load(Gpa(freed.0), &[NOP]);
    guest.enter();
    assert_eq!(guest.memory.bytes(Gpa(freed.0), 1), [NOP]);
    assert!(guest.caught(21));
}

#[test]
fn int_n_returns_behind_the_original() {
    for (code, vector, len) in [(&[0xcd, 0x80, 0xc3][..], 0x80, 2), (&[0xf1, 0xc3], DEBUG, 1)] {
        // int $0x80; ret and int1; ret
        let (mut guest, probe) = Guest::with_table(code);
        guest.enter();
        guest.state.regs.rip += len;
        guest.event(vector, None, 0);
        guest.catch(vector);
        let rflags = rflags::FIXED | rflags::IF;
        assert_eq!(guest.frame(false), Seen { rip: TEXT.0 + len, rflags, rsp: STACK.0 });
        assert_eq!(probe.counts().stepped, 1);
        assert_eq!(guest.caught(vector), vector == DEBUG);
    }
}

#[test]
fn int_n_without_a_gate_faults_at_the_original() {
    let (mut guest, probe) = Guest::with_table(&[0xcd, 0x80, 0xc3]); // int $0x80; ret
    guest.state.sys.idt_limit = 0x1ff;
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0x802), rflags::RF);
    guest.catch(GENERAL_PROTECTION);
    assert_eq!(guest.frame(true).rip, TEXT.0);
    assert_eq!(probe.counts().faulted, 1);
}

#[test]
fn int_n_whose_handler_cannot_be_watched_is_withdrawn() {
    let (mut guest, _) = Guest::with_table(&[0xcd, 0x80, 0xc3]); // int $0x80; ret
    guest.set_gate(0x80, Gva(0x7777_0000), 0xe);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.byte(0)), (TEXT.0, 0xcd));
    assert!((0..=255).all(|vector| !guest.caught(vector)), "no catcher is left either");
    assert!(!guest.cpu.wants_breakpoints());
}

#[test]
fn iret_leaves_its_slot_for_good() {
    let (mut guest, probe) = Guest::with_table(IRETQ);
    guest.enter();
    // User code, and a system call later a stop of the guest's own.
    guest.state.regs.rip = TEXT.0 + 0x100;
    guest.memory.load(TEXT_GPA.offset(0x100), &[INT3]);
    assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Breakpoint));
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
}

#[test]
fn iret_that_faults_does_so_at_the_original() {
    let (mut guest, probe) = Guest::with_table(IRETQ);
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    guest.catch(GENERAL_PROTECTION);
    assert_eq!(guest.frame(true).rip, TEXT.0);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

#[test]
fn user_mode_that_jumps_to_the_slots_address_does_not_pass_for_it() {
    let (mut guest, probe) = Guest::with_table(IRETQ);
    let slot = guest.enter();
    guest.state.regs.rip = slot;
    guest.state.sys.cr2 = slot;
    guest.event(PAGE_FAULT, Some(0x15), rflags::RF);
    // CS of user mode.
    guest.memory.load(Gpa(guest.state.regs.rsp + 16), &0x33_u64.to_le_bytes());
    guest.catch(PAGE_FAULT);
    assert_eq!(guest.frame(true).rip, slot);
    assert_eq!(probe.counts().stepped, 1);
}

#[test]
fn what_leaves_its_slot_with_flags_as_they_are_does_so_only_with_interrupts_off() {
    let (mut guest, probe) = Guest::with_table(&[0xcb]); // lret
    guest.state.regs.rflags &= !rflags::IF;
    guest.enter();
    guest.state.regs.rip = TEXT.0 + 0x100;
    guest.memory.load(TEXT_GPA.offset(0x100), &[INT3]);
    guest.breakpoint();
    assert_eq!(probe.counts().stepped, 1);
    guest.state.regs.rip = TEXT.0;
    guest.state.regs.rflags |= rflags::IF;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.byte(0)), (TEXT.0, 0xcb), "withdrawn");
}

#[test]
fn xbegin_ends_at_its_abort_target() {
    let (mut guest, _) = Guest::with_table(&[0xc7, 0xf8, 0x10, 0, 0, 0, 0xc3]); // xbegin .+0x16; ret
    guest.enter();
    guest.state.regs.rax = 0x8;
    assert_eq!(guest.guard(6), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rax), (TEXT.0 + 0x16, 8));
}

#[test]
fn mov_ss_gives_the_guest_its_shadow_and_puts_a_single_step_off() {
    let (mut guest, _) = Guest::with_table(&[0x8e, 0xd0, 0xc3]); // mov %eax,%ss; ret
    guest.state.regs.rflags |= rflags::TF;
    guest.enter();
    assert_eq!(guest.guard(2), Resume::Run);
    assert!(guest.state.shadow.mov_ss);
    assert_ne!(guest.state.regs.rflags & rflags::TF, 0);
}

#[test]
fn what_a_slot_cannot_do_is_withdrawn_at_the_hit() {
    type Change = fn(&mut VcpuState);
    let cases: [(&[u8], Change, &str); 3] = [
        (RDMSR, |state| state.sys.long_code = false, "32-bit code"),
        (&[0x0f, 0x22, 0xc0], |state| state.regs.rax = 0x11, "paging"), // mov %rax,%cr0
        (&[0xff, 0x20], |state| state.regs.rax = 0x9000_0000_0000, "near branch"), // jmp *(%rax)
    ];
    for (code, change, reason) in cases {
        let (mut guest, _) = Guest::with_table(code);
        if reason == "near branch" {
            // An operand that is not in RAM.
            guest.state.sys.cr4 |= crate::control::CR4_CET;
        }
        change(&mut guest.state);
        assert_eq!(guest.breakpoint(), Resume::Run, "{reason}");
        assert_eq!((guest.state.regs.rip, guest.byte(0)), (TEXT.0, code[0]), "{reason}");
        let notices = guest.engine.take_notices();
        let [Notice::Withdrawn { reason: told, .. }] = &notices[..] else { panic!("{notices:?}") };
        assert!(told.contains(reason), "{told}");
    }
}

#[test]
fn a_vcpu_that_does_not_go_on_is_put_back_or_behind() {
    // Before the instruction.
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.enter();
    assert_eq!(guest.cpu.settle(&mut guest.state, &guest.memory), None);
    assert_eq!(guest.state.regs.rip, TEXT.0);
    assert_ne!(guest.state.regs.rflags & rflags::IF, 0);
    // It goes on after all: the same hit.
    guest.enter();
    // Behind it, with a single step of the guest's own due.
    guest.state.regs.rip += 2;
    assert_eq!(guest.cpu.settle(&mut guest.state, &guest.memory), None);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 2);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
    guest.state.regs.rip = TEXT.0;
    guest.state.regs.rflags |= rflags::TF;
    guest.enter();
    guest.state.regs.rip += 2;
    let due = guest.cpu.settle(&mut guest.state, &guest.memory);
    assert_eq!(due, Some(Exception::Debug { dr6: dr6::BS }));
    // In the handler of its fault, before the first instruction.
    guest.state.regs.rip = TEXT.0;
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    guest.cpu.settle(&mut guest.state, &guest.memory);
    assert_eq!(guest.frame(true).rip, TEXT.0);
    assert_eq!(probe.counts().faulted, 1);
    // Nothing is open: nothing changes.
    let state = guest.state;
    assert_eq!(guest.cpu.settle(&mut guest.state, &guest.memory), None);
    assert_eq!(guest.state, state);
}

#[test]
fn a_leaving_instruction_that_has_left_is_counted_when_the_vcpu_does_not_go_on() {
    let (mut guest, probe) = Guest::with_table(IRETQ);
    guest.enter();
    guest.state.regs.rip = 0x40_0000;
    guest.cpu.settle(&mut guest.state, &guest.memory);
    assert_eq!((guest.state.regs.rip, probe.counts().stepped), (0x40_0000, 1));
}

#[test]
fn disarming_takes_the_catchers_out_too_and_a_later_step_puts_them_back() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    guest.engine.disarm_all(&guest.memory);
    let before = (guest.memory.bytes(Gpa(0), 0x1_0000), guest.memory.bytes(ROOT, 0x4000));
    guest.arm(0);
    guest.enter();
    guest.cpu.settle(&mut guest.state, &guest.memory);
    guest.engine.disarm_all(&guest.memory);
    assert_eq!((guest.memory.bytes(Gpa(0), 0x1_0000), guest.memory.bytes(ROOT, 0x4000)), before);
    assert_eq!(guest.byte(0), RDMSR[0]);
    guest.arm(0);
    guest.state.regs.rflags &= !rflags::RF;
    guest.enter();
    assert!(guest.caught(GENERAL_PROTECTION) && guest.caught(PAGE_FAULT));
}

#[test]
fn catchers_in_init_text_go_with_it_and_nobody_is_told() {
    let (mut guest, _) = Guest::with_table(RDMSR);
    guest.enter();
    guest.guard(2);
    struct Freed;
    impl Handler for Freed {
        fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
            hit.text_is_freed(&(HANDLERS..HANDLERS.offset(0x200)));
            Verdict::FILTER
        }
    }
    guest.arm_with(2, Freed);
    guest.state.regs.rsp = STACK.0;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert!((0..=255).all(|vector| !guest.caught(vector)));
    assert_eq!(guest.engine.take_notices(), []);
}

#[test]
fn the_last_probe_that_is_removed_takes_the_catchers_along() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.enter();
    guest.guard(2);
    let other = guest.arm(2);
    guest.engine.remove(&guest.memory, &probe);
    assert!(guest.caught(GENERAL_PROTECTION) && guest.cpu.wants_breakpoints());
    guest.engine.remove(&guest.memory, &other);
    assert!((0..=255).all(|vector| !guest.caught(vector)));
    assert!(!guest.cpu.wants_breakpoints());
}

#[test]
fn catchers_that_no_enabled_probe_needs_go_at_their_next_hit() {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.enter();
    guest.guard(2);
    guest.engine.disable(&guest.memory, &probe);
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert!((0..=255).all(|vector| !guest.caught(vector)));
    assert!(!guest.cpu.wants_breakpoints());
}

#[test]
fn handlers_see_an_instruction_out_of_line_at_its_own_address() {
    /// Which handler, with RIP and RSP.
    type Call = (&'static str, u64, u64);
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<Call>>>);
    impl Log {
        fn note(&self, what: &'static str, hit: &mut Hit<'_>) {
            let regs = &mut hit.state.regs;
            self.0.lock().unwrap().push((what, regs.rip, regs.rsp));
            regs.rbx += 1;
        }
    }
    impl Handler for Log {
        fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
            self.note("pre", hit);
            Verdict::REPORT
        }
        fn post(&self, hit: &mut Hit<'_>) {
            self.note("post", hit);
        }
        fn fault(&self, hit: &mut Hit<'_>) {
            self.note("fault", hit);
        }
    }
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.engine.remove(&guest.memory, &probe);
    let log = Log::default();
    let probe = guest.arm_with(0, log.clone());
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    guest.catch(GENERAL_PROTECTION);
    guest.return_from(true);
    guest.enter();
    guest.guard(2);
    let expected = [("pre", TEXT.0, STACK.0), ("fault", TEXT.0, STACK.0), ("post", TEXT.0 + 2, STACK.0)];
    assert_eq!(*log.0.lock().unwrap(), expected);
    assert_eq!(guest.state.regs.rbx, 3, "what they change is the guest's");
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

/// A machine that counts how often each page is watched, and cannot watch one of them.
#[derive(Debug, Default)]
struct Watch {
    pages: Mutex<BTreeMap<Gpa, i32>>,
    refused: Option<Gpa>,
}

impl Watch {
    fn change(&self, pages: &[Gpa], by: i32) -> Result<(), ControlError> {
        if pages.iter().any(|page| self.refused == Some(*page)) {
            return Err(ControlError::Watch { reason: "no slot left".into() });
        }
        pages.iter().for_each(|page| *self.pages.lock().unwrap().entry(*page).or_default() += by);
        Ok(())
    }
}

impl MachineControl for Watch {
    fn watch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        self.change(pages, 1)
    }

    fn unwatch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        self.change(pages, -1)
    }

    fn guest_breakpoints(&self) -> usize {
        0
    }

    fn alone(&self) -> Box<dyn Alone> {
        NotRunning.alone()
    }

    fn synchronise(&self) {}
}

fn with_watch(watch: Watch) -> (Guest, Arc<Watch>) {
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.engine.remove(&guest.memory, &probe);
    let watch = Arc::new(watch);
    guest.engine = Arc::new(engine(None, Arc::clone(&watch) as Arc<dyn MachineControl>));
    guest.cpu = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(0), Sink::default());
    guest.arm(0);
    (guest, watch)
}

#[test]
fn the_pages_of_caught_handlers_are_watched_as_long_as_they_may_be_caught() {
    let (mut guest, watch) = with_watch(Watch::default());
    let handlers = Gpa(HANDLERS.0);
    let times = || watch.pages.lock().unwrap().get(&handlers).copied().unwrap_or_default();
    assert_eq!(times(), 0);
    guest.enter();
    guest.guard(2);
    assert_eq!(times(), 1);
    // The table moves to handlers elsewhere.
    for vector in 0..32 {
        guest.set_gate(vector, handler(vector).offset(0x800), 0xe);
    }
    guest.set_gate(PAGE_FAULT, Gva(0x6000), 0xe);
    guest.set_gate(NMI, Gva(0x5ff8), 0xe);
    guest.memory.load(Gpa(0x5ff8), &[NOP]);
    guest.state.regs.rip = TEXT.0;
    guest.enter();
    guest.guard(2);
    assert_eq!(times(), 1);
    assert_eq!(watch.pages.lock().unwrap()[&Gpa(0x5000)], 1);
    assert_eq!(watch.pages.lock().unwrap()[&Gpa(0x6000)], 1, "an instruction may cross into it");
}

#[test]
fn a_handler_whose_page_cannot_be_watched_is_not_caught() {
    let (mut guest, _) = with_watch(Watch { refused: Some(Gpa(HANDLERS.0)), ..Watch::default() });
    guest.enter();
    assert!((0..=255).all(|vector| !guest.caught(vector)));
    assert_eq!(guest.guard(2), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 2);
}
