use super::*;

/// RSP of every test machine, as an offset into the upper stack page.
const TOP: u64 = 0x100;

#[test]
fn push_stores_every_kind_of_operand() {
    for (bytes, size, pushed) in [
        (&[0x55][..], 8, 0x1122_3344_5566_7788),            // push %rbp
        (&[0x66, 0x55], 2, 0x7788),                         // push %bp
        (&[0x41, 0x57], 8, 0xf),                            // push %r15
        (&[0x54], 8, STACK.0 + TOP),                        // push %rsp: the value before
        (&[0x6a, 0xfe], 8, u64::MAX - 1),                   // push $-2
        (&[0x66, 0x6a, 0xfe], 2, 0xfffe),                   // pushw $-2
        (&[0x68, 0, 0, 0, 0x80], 8, 0xffff_ffff_8000_0000), // push $-0x80000000
        (&[0x66, 0x68, 0x34, 0x12], 2, 0x1234),             // pushw $0x1234
        (&[0xff, 0x37], 8, 0xdddd),                         // push (%rdi)
        (&[0x66, 0xff, 0x37], 2, 0xdddd),                   // pushw (%rdi)
        (&[0xff, 0x74, 0x24, 0x08], 8, 0xeeee),             // push 8(%rsp): address before the push
    ] {
        let mut machine = Machine::new();
        machine.state.regs.rbp = 0x1122_3344_5566_7788;
        machine.state.regs.r15 = 0xf;
        machine.state.regs.rdi = DATA.0;
        machine.load_data(0, 0xdddd);
        machine.load_stack(TOP + 8, 0xeeee);
        machine.done(bytes);
        assert_eq!(machine.state.regs.rsp, STACK.0 + TOP - size, "{bytes:x?}");
        let stored = machine.stack_word(TOP - size) & if size == 2 { 0xffff } else { u64::MAX };
        assert_eq!(stored, pushed, "{bytes:x?}");
        assert_eq!(machine.stack_word(TOP - size - 8), 0, "{bytes:x?}");
    }
}

#[test]
fn pop_loads_every_kind_of_operand() {
    type Expected = (&'static [u8], u64, fn(&Machine) -> u64, u64);
    let table: &[Expected] = &[
        (&[0x5d], 8, |machine| machine.state.regs.rbp, 0x1122_3344_5566_7788), // pop %rbp
        (&[0x66, 0x5d], 2, |machine| machine.state.regs.rbp, 0xffff_ffff_ffff_7788), // pop %bp
        (&[0x41, 0x5f], 8, |machine| machine.state.regs.r15, 0x1122_3344_5566_7788), // pop %r15
        (&[0x8f, 0x07], 8, |machine| machine.data_word(0), 0x1122_3344_5566_7788), // pop (%rdi)
        // pop 8(%rsp): the address after the increment
        (&[0x8f, 0x44, 0x24, 0x08], 8, |machine| machine.stack_word(TOP + 16), 0x1122_3344_5566_7788),
    ];
    for (bytes, size, got, popped) in table {
        let mut machine = Machine::new();
        machine.state.regs.rbp = u64::MAX;
        machine.state.regs.rdi = DATA.0;
        machine.load_stack(TOP, 0x1122_3344_5566_7788);
        machine.done(bytes);
        assert_eq!(got(&machine), *popped, "{bytes:x?}");
        assert_eq!(machine.state.regs.rsp, STACK.0 + TOP + size, "{bytes:x?}");
    }
}

#[test]
fn pop_rsp_keeps_the_popped_value() {
    let mut machine = Machine::new();
    machine.load_stack(TOP, 0x1234);
    machine.done(&[0x5c]); // pop %rsp
    assert_eq!(machine.state.regs.rsp, 0x1234);
    let mut machine = Machine::new();
    machine.load_stack(TOP, 0x1234);
    machine.done(&[0x66, 0x5c]); // pop %sp
    assert_eq!(machine.state.regs.rsp, STACK.0 & !0xffff | 0x1234);
}

#[test]
fn a_push_may_cross_a_page() {
    let mut machine = Machine::new();
    machine.state.regs.rsp = STACK.0 + 3;
    machine.state.regs.rax = 0x0807_0605_0403_0201;
    machine.done(&[0x50]); // push %rax
    assert_eq!(machine.memory.bytes(STACK_GPA[0].offset(0xffb), 5), [1, 2, 3, 4, 5]);
    assert_eq!(machine.memory.bytes(STACK_GPA[1], 3), [6, 7, 8]);
}

#[test]
fn stack_faults_leave_everything_as_it_was() {
    let mut machine = Machine::new();
    machine.state.regs.rsp = STACK.0 - PAGE_SIZE;
    let below = Gva(machine.state.regs.rsp - 8);
    assert_eq!(machine.run_refused(&[0x50]), page_fault(below, 2)); // push %rax
    machine.state.regs.rsp = STACK.0 + PAGE_SIZE;
    assert_eq!(machine.run_refused(&[0x58]), page_fault(Gva(machine.state.regs.rsp), 0)); // pop %rax
    machine.state.regs.rsp = 1 << 47;
    let stack_fault = Emulated::Fault(Exception::StackFault { code: 0 });
    assert_eq!(machine.run_refused(&[0x58]), stack_fault); // pop %rax
    machine.state.regs.rdi = READ_ONLY.0;
    machine.state.regs.rsp = STACK.0;
    assert_eq!(machine.run_refused(&[0x8f, 0x07]), page_fault(READ_ONLY, 3)); // pop (%rdi)
    machine.state.regs.rbp = 1 << 47;
    assert_eq!(machine.run_refused(&[0xc9]), stack_fault); // leave
    machine.state.regs.rsp = MMIO.offset(0x100).0;
    let mmio = Emulated::Defer(DeferReason::NotRam(MMIO.offset(0xf8)));
    assert_eq!(machine.run_refused(&[0x50]), mmio); // push %rax
}

#[test]
fn leave_takes_the_stack_back_to_the_frame() {
    let mut machine = Machine::new();
    machine.state.regs.rbp = STACK.0 + 0x200;
    machine.load_stack(0x200, 0xaaaa_bbbb_cccc_dddd);
    machine.done(&[0xc9]); // leave
    assert_eq!(machine.state.regs.rsp, STACK.0 + 0x208);
    assert_eq!(machine.state.regs.rbp, 0xaaaa_bbbb_cccc_dddd);
    let mut machine = Machine::new();
    machine.state.regs.rbp = STACK.0 + 0x200;
    machine.load_stack(0x200, 0xaaaa_bbbb_cccc_dddd);
    machine.done(&[0x66, 0xc9]); // leavew
    assert_eq!(machine.state.regs.rsp, STACK.0 + 0x202);
    assert_eq!(machine.state.regs.rbp, (STACK.0 + 0x200) & !0xffff | 0xdddd);
}

#[test]
fn pushf_shows_the_guests_own_flags_without_rf_and_vm() {
    let mut machine = Machine::new();
    machine.state.regs.rflags |= rflags::RF | rflags::TF | rflags::IF | rflags::AC | rflags::CF;
    machine.done(&[0x9c]); // pushf
    let image = rflags::FIXED | rflags::TF | rflags::IF | rflags::AC | rflags::CF;
    assert_eq!(machine.stack_word(TOP - 8), image);
    let mut machine = Machine::new();
    machine.state.regs.rflags |= rflags::IF | rflags::AC;
    machine.done(&[0x66, 0x9c]); // pushfw
    assert_eq!(machine.stack_word(TOP - 2), rflags::FIXED | rflags::IF);
    assert_eq!(machine.state.regs.rsp, STACK.0 + TOP - 2);
}

#[test]
fn popf_changes_what_cpl_and_iopl_allow() {
    use rflags::{AC, ARITHMETIC, DF, FIXED, ID, IF, IOPL, NT, RF, TF, VIF, VIP, VM};
    const PLAIN: u64 = ARITHMETIC | TF | DF | NT;
    for (cpl, iopl, wide, changed) in [
        (0, 0, true, PLAIN | AC | ID | IF | IOPL),
        (0, 0, false, PLAIN | IF | IOPL),
        (3, 0, true, PLAIN | AC | ID),
        (3, IOPL, true, PLAIN | AC | ID | IF),
        (3, IOPL, false, PLAIN | IF),
        (1, 1 << 12, true, PLAIN | AC | ID | IF),
    ] {
        for ones in [false, true] {
            let mut machine = Machine::new();
            machine.state.regs.rflags = if ones { FIXED } else { FIXED | PLAIN | AC | ID | IF | VIF | VIP };
            machine.state.regs.rflags |= iopl | RF;
            let mut before = machine.state;
            before.regs.rflags &= !RF;
            // The opposite of what is set, in every bit.
            let image = !before.regs.rflags;
            machine.load_stack(TOP, image);
            if cpl == 3 {
                open_to_user(&machine);
            }
            machine.state.sys.cpl = cpl;
            machine.done(if wide { &[0x9d] } else { &[0x66, 0x9d] });
            let expected = before.regs.rflags & !changed | image & changed;
            assert_eq!(
                machine.state.regs.rflags, expected,
                "cpl {cpl} iopl {iopl:#x} wide {wide} ones {ones}"
            );
            assert_eq!(machine.state.regs.rflags & VM, 0);
            assert_eq!(machine.state.regs.rsp, STACK.0 + TOP + if wide { 8 } else { 2 });
        }
    }
}

/// Lets CPL 3 use the stack page.
fn open_to_user(machine: &Machine) {
    let walk = crate::paging::walk_entries(&machine.state.sys, &machine.memory, STACK).unwrap();
    let leaf = walk.last().unwrap();
    machine.memory.load(leaf.gpa, &(leaf.value | entry::USER).to_le_bytes());
}
