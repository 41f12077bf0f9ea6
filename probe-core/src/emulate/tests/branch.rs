use super::*;

const TOP: u64 = 0x100;
const TARGET: u64 = 0xffff_ffff_8123_4567;

impl Machine {
    /// Runs a branch and returns how far RIP moved.
    fn branch(&mut self, bytes: &[u8]) -> u64 {
        assert_eq!(self.run(bytes), Emulated::Done, "{bytes:x?}");
        self.state.regs.rip.wrapping_sub(RIP.0)
    }
}

#[test]
fn jumps_reach_relative_register_and_memory_targets() {
    let mut machine = Machine::new();
    assert_eq!(machine.branch(&[0xeb, 0x10]), 0x12); // jmp .+0x12
    assert_eq!(machine.branch(&[0xe9, 0, 0, 0, 0xff]), 5_u64.wrapping_sub(0x100_0000)); // jmp .-0xfffffb
    machine.state.regs.rax = TARGET;
    machine.branch(&[0xff, 0xe0]); // jmp *%rax
    assert_eq!(machine.state.regs.rip, TARGET);
    machine.state.regs.rdi = DATA.0;
    machine.load_data(8, TARGET + 1);
    machine.branch(&[0xff, 0x67, 0x08]); // jmp *8(%rdi)
    assert_eq!(machine.state.regs.rip, TARGET + 1);
    machine.state.sys.gs_base = DATA.0;
    machine.load_data(0x28, TARGET + 2);
    machine.branch(&[0x65, 0xff, 0x24, 0x25, 0x28, 0, 0, 0]); // jmp *%gs:0x28
    assert_eq!(machine.state.regs.rip, TARGET + 2);
    assert_eq!(machine.state.regs.rsp, STACK.0 + TOP);
}

#[test]
fn calls_push_the_address_behind_themselves_whatever_their_length() {
    for (bytes, target) in [
        (&[0xe8, 0xfb, 0xff, 0xff, 0x7f][..], RIP.0.wrapping_add(0x8000_0000)), // call .+0x80000000
        (&[0xff, 0xd0], TARGET),                                                // call *%rax
        (&[0x41, 0xff, 0xd3], TARGET + 1),                                      // call *%r11
        (&[0x3e, 0xff, 0xd0], TARGET),                                          // notrack call *%rax
        (&[0xff, 0x57, 0x08], TARGET + 2),                                      // call *8(%rdi)
        (&[0xff, 0x14, 0xf5, 0, 0, 0, 0], TARGET + 2),                          // call *0(,%rsi,8)
        (&[0xff, 0x54, 0x24, 0x08], TARGET + 3), // call *8(%rsp), before the push
    ] {
        let mut machine = Machine::new();
        machine.state.regs.rax = TARGET;
        machine.state.regs.r11 = TARGET + 1;
        machine.state.regs.rdi = DATA.0;
        machine.state.regs.rsi = ((DATA.0 + 8) / 8) | (7 << 61);
        machine.load_data(8, TARGET + 2);
        machine.load_stack(TOP + 8, TARGET + 3);
        if target == RIP.0.wrapping_add(0x8000_0000) {
            // Beyond the top of the address space: 0x...0ff8, canonical.
            assert_eq!(target, 0x100_0ff8);
        }
        assert_eq!(machine.run(bytes), Emulated::Done, "{bytes:x?}");
        assert_eq!(machine.state.regs.rip, target, "{bytes:x?}");
        assert_eq!(machine.state.regs.rsp, STACK.0 + TOP - 8);
        assert_eq!(machine.stack_word(TOP - 8), RIP.0 + bytes.len() as u64, "{bytes:x?}");
    }
}

#[test]
fn returns_pop_and_release_their_arguments() {
    for (bytes, released) in [
        (&[0xc3][..], 8),              // ret
        (&[0xf3, 0xc3], 8),            // rep ret
        (&[0xf2, 0xc3], 8),            // bnd ret
        (&[0xc2, 0x10, 0x00], 0x18),   // ret $0x10
        (&[0xc2, 0x00, 0x80], 0x8008), // ret $0x8000: not sign-extended
    ] {
        let mut machine = Machine::new();
        machine.load_stack(TOP, TARGET);
        assert_eq!(machine.run(bytes), Emulated::Done, "{bytes:x?}");
        assert_eq!(machine.state.regs.rip, TARGET);
        assert_eq!(machine.state.regs.rsp, STACK.0 + TOP + released, "{bytes:x?}");
    }
}

#[test]
fn targets_that_are_not_canonical_fault_at_the_branch_and_push_nothing() {
    let mut machine = Machine::new();
    machine.state.regs.rax = 1 << 47;
    machine.load_stack(TOP, 1 << 47);
    for bytes in [
        &[0xff, 0xe0][..],   // jmp *%rax
        &[0xff, 0xd0],       // call *%rax
        &[0xff, 0x24, 0x24], // jmp *(%rsp)
        &[0xff, 0x14, 0x24], // call *(%rsp)
        &[0xc3],             // ret
        &[0xc2, 0x08, 0x00], // ret $8
    ] {
        assert_eq!(machine.run_refused(bytes), GENERAL_PROTECTION, "{bytes:x?}");
    }
    machine.state.sys.cr4 |= control::CR4_LA57;
    // With five levels the address is canonical; these page tables have four, so only the register forms work.
    assert_eq!(machine.run(&[0xff, 0xe0]), Emulated::Done);
}

#[test]
fn a_call_that_cannot_push_does_not_jump() {
    let mut machine = Machine::new();
    machine.state.regs.rsp = STACK.0 - PAGE_SIZE;
    machine.state.regs.rax = TARGET;
    let below = Gva(machine.state.regs.rsp - 8);
    assert_eq!(machine.run_refused(&[0xff, 0xd0]), page_fault(below, 2)); // call *%rax
    machine.state.regs.rdi = UNMAPPED.0;
    assert_eq!(machine.run_refused(&[0xff, 0x17]), page_fault(UNMAPPED, 0)); // call *(%rdi)
}

#[test]
fn all_sixteen_conditions_follow_the_flags() {
    use rflags::{CF, OF, PF, SF, ZF};
    // Each even condition; the odd one is its opposite.
    let conditions: [fn(u64) -> bool; 8] = [
        |flags| flags & OF != 0,                                           // o
        |flags| flags & CF != 0,                                           // b
        |flags| flags & ZF != 0,                                           // e
        |flags| flags & CF != 0 || flags & ZF != 0,                        // be
        |flags| flags & SF != 0,                                           // s
        |flags| flags & PF != 0,                                           // p
        |flags| (flags & SF != 0) != (flags & OF != 0),                    // l
        |flags| flags & ZF != 0 || (flags & SF != 0) != (flags & OF != 0), // le
    ];
    for combination in 0..32_u64 {
        let flags = [CF, ZF, SF, OF, PF]
            .iter()
            .enumerate()
            .filter(|(bit, _)| combination >> bit & 1 != 0)
            .fold(0, |flags, (_, flag)| flags | flag);
        for (number, condition) in (0_u8..).zip(conditions) {
            for opposite in [0, 1] {
                let taken = condition(flags) != (opposite == 1);
                let mut machine = Machine::new();
                machine.state.regs.rflags |= flags;
                let code = number * 2 + opposite;
                let short = machine.branch(&[0x70 | code, 0x20]); // jcc .+0x22
                assert_eq!(short, if taken { 0x22 } else { 2 }, "{code:#x} {flags:#x}");
                let near = machine.branch(&[0x0f, 0x80 | code, 0, 1, 0, 0]); // jcc .+0x106
                assert_eq!(near, if taken { 0x106 } else { 6 }, "{code:#x} {flags:#x}");
            }
        }
    }
}

#[test]
fn loops_count_down_first_and_then_decide() {
    use rflags::ZF;
    const HIGH: u64 = 0xffff_ffff_0000_0000;
    // Bytes, RCX, ZF, RCX after, taken.
    let table: &[(&[u8], u64, u64, u64, bool)] = &[
        (&[0xe2, 0x10], 2, 0, 1, true),               // loop
        (&[0xe2, 0x10], 1, 0, 0, false),              // the count reaches 0
        (&[0xe2, 0x10], 0, 0, u64::MAX, true),        // and wraps
        (&[0x67, 0xe2, 0x10], HIGH | 1, 0, 0, false), // loop with ECX: the upper half is cleared
        (&[0x67, 0xe2, 0x10], HIGH, 0, 0xffff_ffff, true),
        (&[0xe1, 0x10], 2, ZF, 1, true), // loope
        (&[0xe1, 0x10], 2, 0, 1, false),
        (&[0xe1, 0x10], 1, ZF, 0, false),
        (&[0xe0, 0x10], 2, 0, 1, true), // loopne
        (&[0xe0, 0x10], 2, ZF, 1, false),
        (&[0xe3, 0x10], 0, 0, 0, true), // jrcxz
        (&[0xe3, 0x10], HIGH, 0, HIGH, false),
        (&[0x67, 0xe3, 0x10], HIGH, 0, HIGH, true), // jecxz
        (&[0x67, 0xe3, 0x10], 1, 0, 1, false),
    ];
    for &(bytes, rcx, flags, after, taken) in table {
        let mut machine = Machine::new();
        machine.state.regs.rcx = rcx;
        machine.state.regs.rflags |= flags;
        let distance = machine.branch(bytes);
        let len = bytes.len() as u64;
        assert_eq!(distance, if taken { len + 0x10 } else { len }, "{bytes:x?} rcx {rcx:#x}");
        assert_eq!(machine.state.regs.rcx, after, "{bytes:x?} rcx {rcx:#x}");
        assert_eq!(machine.state.regs.rflags, rflags::FIXED | flags, "{bytes:x?}");
    }
}

#[test]
fn control_flow_enforcement_is_left_to_the_cpu() {
    let mut machine = Machine::new();
    machine.state.sys.cr4 |= control::CR4_CET;
    machine.state.regs.rax = TARGET;
    for bytes in [
        &[0xe8, 0, 0, 0, 0][..],   // call .+5
        &[0xff, 0xd0],             // call *%rax
        &[0xff, 0xe0],             // jmp *%rax
        &[0xc3],                   // ret
        &[0xf3, 0x0f, 0x1e, 0xfa], // endbr64
    ] {
        let deferred = Emulated::Defer(DeferReason::ControlFlowEnforcement);
        assert_eq!(machine.run_refused(bytes), deferred, "{bytes:x?}");
    }
    assert_eq!(machine.branch(&[0xeb, 0x10]), 0x12); // jmp .+0x12 is neither tracked nor on the shadow stack
}

#[test]
fn amd_takes_16_bits_of_a_near_branch_with_an_operand_size_prefix() {
    /// Runs `bytes` as an AMD CPU decodes them; returns RIP and how far RSP moved.
    fn run(bytes: &[u8], prepare: impl Fn(&mut Machine)) -> (u64, i64) {
        let mut machine = Machine::new();
        prepare(&mut machine);
        let instruction = Decoder::with_ip(64, bytes, RIP.0, DecoderOptions::AMD).decode();
        assert_eq!(instruction.len(), bytes.len(), "{bytes:x?}");
        let before = machine.state.regs.rsp;
        let space = AddressSpace { memory: &machine.memory, pkru: 0 };
        assert_eq!(emulate(&instruction, &mut machine.state, &space), Emulated::Done, "{bytes:x?}");
        let moved = machine.state.regs.rsp.wrapping_sub(before).cast_signed();
        if moved == -2 {
            assert_eq!(machine.stack_word(0xfe) & 0xffff, (RIP.0 + bytes.len() as u64) & 0xffff);
        }
        (machine.state.regs.rip, moved)
    }
    // As measured on an AMD EPYC: only a branch that is taken loses the upper bits.
    let after = |length: u64| RIP.0 + length;
    let low = |address: u64| address & 0xffff;
    let rest = |_: &mut Machine| {};
    assert_eq!(run(&[0x66, 0xeb, 0x10], rest), (low(after(3) + 0x10), 0)); // jmp
    assert_eq!(run(&[0x66, 0xe9, 0x00, 0x80], rest), (low(after(4) + 0x8000), 0));
    assert_eq!(run(&[0x66, 0xe8, 0x10, 0x00], rest), (low(after(4) + 0x10), -2)); // call
    assert_eq!(run(&[0x66, 0x75, 0x10], |m| m.state.regs.rflags &= !rflags::ZF), (low(after(3) + 0x10), 0)); // jne
    assert_eq!(run(&[0x66, 0x75, 0x10], |m| m.state.regs.rflags |= rflags::ZF), (after(3), 0));
    assert_eq!(run(&[0x66, 0xe3, 0x10], |m| m.state.regs.rcx = 0), (low(after(3) + 0x10), 0)); // jrcxz
    assert_eq!(run(&[0x66, 0xe1, 0x10], |m| m.state.regs.rcx = 9), (after(3), 0)); // loope
    let target = |m: &mut Machine| m.state.regs.rax = 0xffff_1234;
    assert_eq!(run(&[0x66, 0xff, 0xe0], target), (0x1234, 0)); // jmp *%ax
    assert_eq!(run(&[0x66, 0xff, 0xd0], target), (0x1234, -2)); // call *%ax
    let returns = |m: &mut Machine| m.load_stack(0x100, 0xffff_5678);
    assert_eq!(run(&[0x66, 0xc3], returns), (0x5678, 2)); // ret
    assert_eq!(run(&[0x66, 0xc2, 0x08, 0x00], returns), (0x5678, 10));
}

#[test]
fn a_call_faults_at_its_stack_before_it_faults_at_its_target() {
    let mut machine = Machine::new();
    machine.state.regs.rax = 1 << 63;
    assert_eq!(machine.run_refused(&[0xff, 0xd0]), GENERAL_PROTECTION); // call *%rax
    machine.state.regs.rsp = UNMAPPED.0 + 0x100;
    assert_eq!(machine.run_refused(&[0xff, 0xd0]), page_fault(UNMAPPED.offset(0xf8), 2));
}
