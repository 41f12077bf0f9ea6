use super::*;
use crate::Gpa;
use crate::mock::{MockMemory, MockPageTables, MockVcpu, OperationKind};
use crate::paging::entry;
use crate::plan::decode;

const RIP: Gva = Gva(0xffff_ffff_8100_0000);
const SLOT: Gva = Gva(0xffff_ffff_bf00_0040);
const STACK: Gva = Gva(0xffff_c900_0000_0000);
const STACK_GPA: Gpa = Gpa(0x4_0000);
const TARGET: u64 = 0xffff_ffff_8123_4567;
const HANDLER: u64 = 0xffff_ffff_8200_0a00;

struct Machine {
    memory: MockMemory,
    before: VcpuState,
    after: VcpuState,
}

impl Machine {
    /// A vCPU that has been stepped in the slot with TF set by the host.
    fn new() -> Self {
        let memory = MockMemory::with_ram(0x8_0000);
        let mut tables = MockPageTables::new(&memory, Gpa(0x1000), 4);
        tables.map(STACK, STACK_GPA, 0x1000, entry::PRESENT | entry::WRITABLE);
        let before = MockVcpu::new(tables.root()).rip(RIP).rsp(STACK.offset(0x800)).flags(rflags::IF).build();
        let mut after = before;
        after.regs.rflags = rflags::FIXED | rflags::TF | rflags::RF | rflags::ZF;
        after.shadow.sti = true;
        Self { memory, before, after }
    }

    fn end(&mut self, bytes: &[u8]) -> StepEnd {
        let instruction = decode(bytes, RIP).unwrap();
        let space = AddressSpace { memory: &self.memory, pkru: 0 };
        after_step(&instruction, &self.before, &mut self.after, SLOT, &space)
    }

    /// Ends a step that must be found astray and leave state and memory alone.
    fn astray(&mut self, bytes: &[u8]) {
        let (state, stack) = (self.after, self.memory.bytes(STACK_GPA, 0x1000));
        assert_eq!(self.end(bytes), StepEnd::Astray { rip: Gva(self.after.regs.rip) }, "{bytes:x?}");
        assert_eq!(self.after, state);
        assert_eq!(self.memory.bytes(STACK_GPA, 0x1000), stack);
    }
}

#[test]
fn rip_returns_behind_the_original_and_the_flags_are_the_guests() {
    for bytes in [&[0x48, 0x0f, 0xaf, 0xc1][..], &[0x48, 0xf7, 0xf1], &[0xf3, 0x0f, 0x6f, 0x07], &[0xa4]] {
        for guest_tf in [0, rflags::TF] {
            let mut machine = Machine::new();
            machine.before.regs.rflags |= guest_tf;
            machine.after.regs.rip = SLOT.0 + bytes.len() as u64;
            assert_eq!(machine.end(bytes), StepEnd::Done, "{bytes:x?}");
            assert_eq!(machine.after.regs.rip, RIP.0 + bytes.len() as u64);
            let expected = rflags::FIXED | rflags::ZF | rflags::IF | guest_tf;
            assert_eq!(machine.after.regs.rflags, expected, "{bytes:x?}");
            assert_eq!(machine.after.shadow, InterruptShadow::default());
        }
    }
}

#[test]
fn a_repeated_string_instruction_goes_on_while_rip_stays() {
    let mut machine = Machine::new();
    machine.after.regs.rip = SLOT.0;
    machine.after.regs.rcx = 2;
    assert_eq!(machine.end(&[0xf3, 0xa4]), StepEnd::Again); // rep movsb
    assert_eq!(machine.after.regs.rip, RIP.0);
    assert_eq!(machine.after.regs.rflags, rflags::FIXED | rflags::ZF | rflags::IF);
    machine.after.regs.rip = SLOT.0 + 2;
    assert_eq!(machine.end(&[0xf3, 0xa4]), StepEnd::Done);
    machine.after.regs.rip = SLOT.0;
    machine.astray(&[0xa4]); // movsb does not repeat
}

#[test]
fn a_rip_that_the_instruction_cannot_reach_is_astray() {
    for rip in [HANDLER, SLOT.0, SLOT.0 + 3, SLOT.0 + 5, RIP.0 + 4] {
        let mut machine = Machine::new();
        machine.after.regs.rip = rip;
        machine.astray(&[0x48, 0x0f, 0xaf, 0xc1]); // imul %rcx,%rax
    }
}

#[test]
fn absolute_branches_keep_their_target() {
    for (bytes, moved) in [
        (&[0xff, 0xe0][..], 0_i64),  // jmp *%rax
        (&[0xff, 0x27], 0),          // jmp *(%rdi)
        (&[0xc3], 8),                // ret
        (&[0xc2, 0x10, 0x00], 0x18), // ret $0x10
    ] {
        let mut machine = Machine::new();
        machine.after.regs.rip = TARGET;
        machine.after.regs.rsp = machine.before.regs.rsp.wrapping_add_signed(moved);
        assert_eq!(machine.end(bytes), StepEnd::Done, "{bytes:x?}");
        assert_eq!(machine.after.regs.rip, TARGET);
        assert_eq!(machine.memory.writes(), []);

        // A fault instead: the handler has pushed a frame.
        machine.after.regs.rip = HANDLER;
        machine.after.regs.rsp = machine.before.regs.rsp - 48;
        machine.astray(bytes);
    }
}

#[test]
fn a_pushed_return_address_points_behind_the_original() {
    for bytes in [&[0xff, 0xd0][..], &[0xff, 0x57, 0x08], &[0x41, 0xff, 0x14, 0x24]] {
        let mut machine = Machine::new();
        machine.after.regs.rip = TARGET;
        machine.after.regs.rsp -= 8;
        let pushed = STACK_GPA.offset(0x7f8);
        machine.memory.load(pushed, &(SLOT.0 + bytes.len() as u64).to_le_bytes());
        assert_eq!(machine.end(bytes), StepEnd::Done, "{bytes:x?}");
        assert_eq!(machine.after.regs.rip, TARGET);
        assert_eq!(machine.memory.word(pushed), RIP.0 + bytes.len() as u64);
    }
}

#[test]
fn a_call_without_its_return_address_is_astray() {
    let mut machine = Machine::new();
    machine.after.regs.rip = TARGET;
    machine.after.regs.rsp -= 8;
    machine.memory.load(STACK_GPA.offset(0x7f8), &TARGET.to_le_bytes());
    machine.astray(&[0xff, 0xd0]); // call *%rax
    machine.memory.load(STACK_GPA.offset(0x7f8), &(SLOT.0 + 2).to_le_bytes());
    machine.memory.clear_log();
    machine.memory.fail(OperationKind::Write, 1);
    machine.astray(&[0xff, 0xd0]);
    assert_eq!(machine.end(&[0xff, 0xd0]), StepEnd::Done);
}
