use iced_x86::{Decoder, DecoderOptions};

use super::*;
use crate::mock::{MockMemory, MockPageTables, MockVcpu};
use crate::paging::entry;
use crate::{Gpa, PAGE_SIZE};

const HOME: Gva = Gva(0xffff_ffff_8134_a355);
const SLOT: Gva = Gva(0xffff_ffff_bf00_0040);
const STACK: Gva = Gva(0xffff_c900_0000_4000);
const STACK_GPA: Gpa = Gpa(0x4000);
const LEN: u64 = 3;

const PAGE_FAULT: Gva = Gva(0xffff_ffff_81c0_0010);
const NMI: Gva = Gva(0xffff_ffff_81c0_0020);

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::with_ip(64, bytes, HOME.0, DecoderOptions::NONE).decode()
}

fn is_handler(gva: Gva) -> bool {
    [PAGE_FAULT, NMI].contains(&gva)
}

/// Words on the guest's stack.
struct Stack {
    memory: MockMemory,
    state: VcpuState,
}

impl Stack {
    fn new() -> Self {
        let memory = MockMemory::with_ram(0x8000);
        let mut tables = MockPageTables::new(&memory, Gpa(0x10_0000), 4);
        // The second page lies elsewhere, so that what crosses has to be found in two pieces.
        tables.map(STACK, STACK_GPA, PAGE_SIZE, entry::PRESENT | entry::WRITABLE);
        tables.map(STACK.offset(PAGE_SIZE), Gpa(0x2000), PAGE_SIZE, entry::PRESENT | entry::WRITABLE);
        let state = MockVcpu::new(tables.root()).rip(PAGE_FAULT).build();
        Self { memory, state }
    }

    fn put(&mut self, rsp: Gva, words: &[u64]) {
        for (index, word) in (0..).zip(words) {
            let at = rsp.offset(8 * index);
            let gpa = paging::physical(&self.state.sys, &self.memory, at).unwrap();
            self.memory.load(gpa, &word.to_le_bytes());
        }
        self.state.regs.rsp = rsp.0;
    }

    fn word(&self, at: Gva) -> u64 {
        self.memory.word(paging::physical(&self.state.sys, &self.memory, at).unwrap())
    }

    fn find(&self) -> Option<Interruption> {
        find_interruption(&self.state, &self.memory, SLOT, LEN, 0, is_handler)
    }
}

#[test]
fn a_complete_instruction_ends_behind_the_original_with_the_flags_from_before() {
    for (before, after) in [(0, 0), (rflags::IF, rflags::IF), (rflags::TF, rflags::TF)] {
        let mut state = VcpuState::default();
        state.regs.rip = SLOT.0 + LEN;
        state.regs.rflags = rflags::FIXED | rflags::ZF | rflags::RF;
        state.shadow.mov_ss = true;
        complete(&decode(&[0x0f, 0x58, 0xc1]), before | rflags::CF, &mut state); // addps %xmm1,%xmm0
        assert_eq!(state.regs.rip, HOME.0 + LEN);
        assert_eq!(state.regs.rflags, rflags::FIXED | rflags::ZF | after);
        assert_eq!(state.shadow, InterruptShadow::default());
    }
}

#[test]
fn only_mov_ss_casts_a_shadow() {
    for (bytes, shadow) in [(&[0x8e, 0xd0][..], true), (&[0x8e, 0xd8], false), (&[0x0f, 0xb2, 0x07], false)] {
        // mov %eax,%ss; mov %eax,%ds; lss (%rdi),%eax
        let mut state = VcpuState::default();
        complete(&decode(bytes), 0, &mut state);
        assert_eq!(state.shadow, InterruptShadow { sti: false, mov_ss: shadow }, "{bytes:x?}");
    }
}

#[test]
fn a_transaction_ends_at_its_abort_target() {
    let mut state = VcpuState::default();
    state.regs.rax = 0x1234;
    complete(&decode(&[0xc7, 0xf8, 0x00, 0x10, 0, 0]), 0, &mut state); // xbegin .+0x1006
    assert_eq!((state.regs.rip, state.regs.rax), (HOME.0 + 0x1006, 0x1234));
}

#[test]
fn an_instruction_that_has_not_run_is_gone_back_to_as_from_a_fault() {
    let mut state = VcpuState::default();
    state.regs.rip = SLOT.0;
    state.regs.rflags = rflags::FIXED;
    go_back(&decode(&[0x0f, 0x32]), rflags::IF, &mut state); // rdmsr
    assert_eq!(state.regs.rip, HOME.0);
    assert_eq!(state.regs.rflags, rflags::FIXED | rflags::IF | rflags::RF);
}

#[test]
fn a_frame_is_found_and_written_with_and_without_error_code_and_across_pages() {
    for at in [STACK.offset(0x800), STACK.offset(PAGE_SIZE - 16)] {
        for code in [&[][..], &[0]] {
            let mut stack = Stack::new();
            let frame = [SLOT.0, 0x10, 0x2, 0x1111, 0x18];
            stack.put(at, &[code, &frame].concat());
            let found = stack.find().unwrap();
            assert_eq!((found.handler, found.outer), (PAGE_FAULT, None));
            assert_eq!((found.frame.rip, found.frame.rflags, found.frame.rsp), (SLOT.0, 2, 0x1111));
            let repaired = Frame { rip: HOME.0, rflags: 0x1_0202, ..found.frame };
            assert!(repaired.write(&stack.state.sys, &stack.memory));
            let above = at.offset(8 * code.len() as u64);
            let words: Vec<u64> = (0..5).map(|index| stack.word(above.offset(8 * index))).collect();
            assert_eq!(words, [HOME.0, 0x10, 0x1_0202, 0x1111, 0x18]);
        }
    }
}

#[test]
fn only_a_frame_of_the_slot_counts() {
    let at = STACK.offset(0x800);
    for (frame, expected) in [
        ([SLOT.0, 0x10, 2, 0, 0], true),
        ([SLOT.0 + LEN, 0x10, 2, 0, 0], true),
        ([SLOT.0 + LEN + 1, 0x10, 2, 0, 0], false),
        ([SLOT.0 - 1, 0x10, 2, 0, 0], false),
        ([HOME.0, 0x10, 2, 0, 0], false),
        // User mode that has jumped to where the slot is.
        ([SLOT.0, 0x33, 2, 0, 0], false),
    ] {
        let mut stack = Stack::new();
        stack.put(at, &frame);
        assert_eq!(stack.find().is_some(), expected, "{frame:x?}");
        stack.state.regs.rip = HOME.0;
        assert_eq!(stack.find(), None, "not at a handler");
    }
    let mut stack = Stack::new();
    stack.state.regs.rsp = 0x7fff_0000;
    assert_eq!(stack.find(), None, "no stack there");
}

#[test]
fn an_nmi_on_the_first_instruction_of_the_faults_handler_is_looked_through() {
    let mut stack = Stack::new();
    let (fault, nmi) = (STACK.offset(0x800), STACK.offset(0x1800 - 0x40));
    stack.put(fault, &[0, SLOT.0, 0x10, 0x2, 0x1111, 0x18]);
    stack.put(nmi, &[PAGE_FAULT.0, 0x10, 0x46, fault.0, 0x18]);
    stack.state.regs.rip = NMI.0;
    let found = stack.find().unwrap();
    assert_eq!((found.handler, found.frame.rip), (PAGE_FAULT, SLOT.0));
    let outer = found.outer.unwrap();
    assert_eq!((outer.rip, outer.rsp, outer.rflags), (PAGE_FAULT.0, fault.0, 0x46));
}

#[test]
fn frames_that_lead_to_each_other_end() {
    let mut stack = Stack::new();
    let at = STACK.offset(0x800);
    stack.put(at, &[PAGE_FAULT.0, 0x10, 0x2, at.0, 0x18]);
    assert_eq!(stack.find(), None);
}

#[test]
fn a_frame_of_user_mode_is_found_at_any_address_by_how_the_cpu_aligns_it() {
    // Code at an address that might be an error code, and an error code that might be its address.
    let start = Gva(0x4);
    for (words, code) in [(&[4, 0x33, 2, 0x1111, 0x2b][..], false), (&[7, 5, 0x33, 2, 0x1111, 0x2b], true)] {
        let mut stack = Stack::new();
        stack.put(STACK.offset(0x800 - 8 * words.len() as u64), words);
        let find = |cpl| find_interruption(&stack.state, &stack.memory, start, LEN, cpl, is_handler);
        let frame = find(3).unwrap().frame;
        assert_eq!((frame.rip, frame.rflags, frame.rsp), (4 + u64::from(code), 2, 0x1111));
        assert_eq!(frame.error_code(&stack.state.sys, &stack.memory), code.then_some(7).or(Some(0)));
        assert_eq!(find(0), None);
        assert_eq!(find(2), None);
    }
}
