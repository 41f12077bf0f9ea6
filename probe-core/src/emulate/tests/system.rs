use super::*;
use rflags::{AC, IF, IOPL};

#[test]
fn sti_casts_a_shadow_only_if_interrupts_were_off() {
    let mut machine = Machine::new();
    machine.done(&[0xfb]); // sti
    assert_eq!(machine.state.regs.rflags, rflags::FIXED | IF);
    assert_eq!(machine.state.shadow, InterruptShadow { sti: true, mov_ss: false });
    machine.done(&[0xfb]); // sti
    assert_eq!(machine.state.shadow, InterruptShadow::default());
    machine.done(&[0xfa]); // cli
    assert_eq!(machine.state.regs.rflags, rflags::FIXED);
}

#[test]
fn cli_and_sti_need_iopl() {
    for bytes in [[0xfa], [0xfb]] {
        let mut machine = Machine::new();
        machine.state.sys.cpl = 3;
        assert_eq!(machine.run_refused(&bytes), GENERAL_PROTECTION);
        machine.state.sys.cpl = 1;
        machine.state.regs.rflags |= 1 << 12;
        machine.done(&bytes);
        machine.state.sys.cpl = 3;
        assert_eq!(machine.run_refused(&bytes), GENERAL_PROTECTION);
        machine.state.sys.cr4 |= 1 << 1; // PVI
        assert_eq!(machine.run_refused(&bytes), Emulated::Defer(DeferReason::NotEmulated));
        machine.state.regs.rflags |= IOPL;
        machine.done(&bytes);
    }
}

#[test]
fn hlt_waits_behind_itself_and_is_privileged() {
    let mut machine = Machine::new();
    machine.state.shadow.sti = true;
    machine.state.regs.rflags |= IF;
    machine.state.regs.rflags |= rflags::TF;
    machine.done(&[0xf4]);
    machine.state.regs.rip = RIP.0;
    machine.state.regs.rflags &= !rflags::TF;
    assert_eq!(machine.run(&[0xf4]), Emulated::Halt); // hlt
    assert_eq!(machine.state.regs.rip, RIP.0 + 1);
    assert_eq!(machine.state.shadow, InterruptShadow::default());
    assert_eq!(machine.state.regs.rflags & IF, IF);
    machine.state.sys.cpl = 3;
    assert_eq!(machine.run_refused(&[0xf4]), GENERAL_PROTECTION);
}

#[test]
fn clac_and_stac_need_smap_and_cpl_0() {
    const STAC: [u8; 3] = [0x0f, 0x01, 0xcb];
    const CLAC: [u8; 3] = [0x0f, 0x01, 0xca];
    let mut machine = Machine::new();
    assert_eq!(machine.run_refused(&STAC), Emulated::Defer(DeferReason::NotEmulated));
    machine.state.sys.cr4 |= control::CR4_SMAP;
    machine.done(&STAC);
    assert_eq!(machine.state.regs.rflags, rflags::FIXED | AC);
    machine.done(&CLAC);
    assert_eq!(machine.state.regs.rflags, rflags::FIXED);
    machine.state.sys.cpl = 3;
    assert_eq!(machine.run_refused(&STAC), Emulated::Fault(Exception::InvalidOpcode));
}

#[test]
fn other_instructions_end_the_shadow() {
    let mut machine = Machine::new();
    machine.state.shadow = InterruptShadow { sti: true, mov_ss: true };
    machine.done(&[0x48, 0xff, 0xc0]); // inc %rax
    assert_eq!(machine.state.shadow, InterruptShadow::default());
    machine.state.shadow.sti = true;
    machine.state.regs.rdi = UNMAPPED.0;
    machine.run_refused(&[0x48, 0x8b, 0x07]); // mov (%rdi),%rax faults: the shadow is still there
    assert!(machine.state.shadow.sti);
}

#[test]
fn undefined_instructions_fault_without_touching_their_operand() {
    for bytes in [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0x07]] {
        // ud2; ud1 (%rdi),%eax
        let mut machine = Machine::new();
        machine.state.regs.rdi = 0x5555_0000;
        assert_eq!(machine.run_refused(bytes), Emulated::Fault(Exception::InvalidOpcode));
    }
}

#[test]
fn another_address_space_is_loaded_and_the_same_one_left_to_the_cpu() {
    const LOAD: [u8; 3] = [0x0f, 0x22, 0xd8]; // mov %rax,%cr3
    const NO_FLUSH: u64 = 1 << 63;
    let mut machine = Machine::new();
    let old = machine.state.sys.cr3;
    machine.state.regs.rax = DATA_GPA.0 | 0x18;
    machine.done(&LOAD);
    assert_eq!(machine.state.sys.cr3, DATA_GPA.0 | 0x18);
    machine.state.sys.cr3 = old;
    machine.state.sys.cr4 |= 1 << 17; // PCIDE
    machine.state.regs.rax = DATA_GPA.0 | 5 | NO_FLUSH;
    machine.done(&LOAD);
    assert_eq!(machine.state.sys.cr3, DATA_GPA.0 | 5);

    machine.state.sys.cr3 = old;
    // A flush; a tag mask; no RAM there; and without PCIDE bit 63 is reserved.
    for value in [old, old | NO_FLUSH, old | 1 << 61, DATA_GPA.0 | 1 << 61, 0xf_0000_0000_0000] {
        machine.state.regs.rax = value;
        assert_eq!(machine.run_refused(&LOAD), Emulated::Defer(DeferReason::NotEmulated), "{value:#x}");
    }
    machine.state.sys.cr4 &= !(1 << 17);
    machine.state.regs.rax = DATA_GPA.0 | NO_FLUSH;
    assert_eq!(machine.run_refused(&LOAD), Emulated::Defer(DeferReason::NotEmulated));
    machine.state.sys.cpl = 3;
    assert_eq!(machine.run_refused(&LOAD), GENERAL_PROTECTION);
}
