use super::*;
use crate::mock::OperationKind;

const REP_STOSQ: [u8; 3] = [0xf3, 0x48, 0xab];
const REP_MOVSB: [u8; 2] = [0xf3, 0xa4];
const REPE_CMPSB: [u8; 2] = [0xf3, 0xa6];

fn deferred() -> Emulated {
    Emulated::Defer(DeferReason::NotEmulated)
}

#[test]
fn a_repeated_store_runs_to_its_end() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0 + 0x100;
    machine.state.regs.rcx = 4;
    machine.state.regs.rax = 0x1234_5678_9abc_def0;
    machine.done(&REP_STOSQ);
    assert_eq!(machine.state.regs.rdi, DATA.0 + 0x120);
    assert_eq!(machine.state.regs.rcx, 0);
    for at in [0x100, 0x108, 0x110, 0x118] {
        assert_eq!(machine.data_word(at), 0x1234_5678_9abc_def0);
    }
    assert_eq!((machine.data_word(0xf8), machine.data_word(0x120)), (0, 0));
}

#[test]
fn a_count_of_zero_touches_nothing() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = UNMAPPED.0;
    machine.state.regs.rsi = UNMAPPED.0;
    for bytes in [&REP_STOSQ[..], &REP_MOVSB, &REPE_CMPSB] {
        machine.state.regs.rip = RIP.0;
        machine.done(bytes);
    }
    assert_eq!((machine.state.regs.rdi, machine.state.regs.rsi), (UNMAPPED.0, UNMAPPED.0));
}

#[test]
fn the_source_may_have_a_segment_and_the_destination_has_none() {
    let mut machine = Machine::new();
    machine.state.sys.gs_base = DATA.0;
    machine.state.regs.rsi = 0x10;
    machine.state.regs.rdi = DATA.0 + 0x200;
    machine.load_data(0x10, 0x55);
    machine.done(&[0x65, 0x48, 0xa5]); // movsq %gs:(%rsi),(%rdi)
    assert_eq!(machine.data_word(0x200), 0x55);
}

#[test]
fn the_first_iterations_fault_is_the_instructions() {
    let mut machine = Machine::new();
    machine.state.regs.rcx = 4;
    machine.state.regs.rdi = READ_ONLY.0;
    assert_eq!(machine.run_refused(&REP_STOSQ), page_fault(READ_ONLY, 3));
    machine.state.regs.rdi = DATA.0;
    machine.state.regs.rsi = UNMAPPED.0;
    assert_eq!(machine.run_refused(&REP_MOVSB), page_fault(UNMAPPED, 0));
    machine.state.regs.rsi = MMIO.0;
    assert_eq!(machine.run_refused(&REP_MOVSB), Emulated::Defer(DeferReason::NotRam(MMIO)));
}

#[test]
fn what_would_stop_on_the_way_is_left_to_the_cpu() {
    let mut machine = Machine::new();
    // The fourth word lies in the read-only page.
    machine.state.regs.rdi = DATA.0 + 0xfe8;
    machine.state.regs.rcx = 4;
    assert_eq!(machine.run_refused(&REP_STOSQ), deferred());
    machine.state.regs.rcx = 3;
    machine.done(&REP_STOSQ);
    // More than is done in one go, and a count whose size overflows.
    for count in [256 * 1024 / 8 + 1, u64::MAX / 4] {
        machine.state.regs.rdi = DATA.0;
        machine.state.regs.rcx = count;
        assert_eq!(machine.run_refused(&REP_STOSQ), deferred());
    }
    machine.state.regs.rcx = 2;
    machine.state.regs.rflags = rflags::FIXED | rflags::DF;
    assert_eq!(machine.run_refused(&REP_STOSQ), deferred());
}

#[test]
fn a_guest_that_steps_itself_gets_one_iteration_at_a_time() {
    let mut machine = Machine::new();
    // The third word lies in the read-only page.
    machine.state.regs.rdi = DATA.0 + 0xff0;
    machine.state.regs.rcx = 3;
    machine.state.regs.rax = 0x77;
    machine.state.regs.rflags |= rflags::TF;
    for (left, offset) in [(2, 0xff0), (1, 0xff8)] {
        assert_eq!(machine.run(&REP_STOSQ), Emulated::Done);
        assert_eq!((machine.state.regs.rip, machine.state.regs.rcx), (RIP.0, left));
        assert_eq!(machine.data_word(offset), 0x77);
    }
    assert_eq!(machine.run_refused(&REP_STOSQ), page_fault(READ_ONLY, 3));
    machine.state.regs.rdi = DATA.0;
    machine.done(&REP_STOSQ);
    machine.done(&REP_STOSQ);
    assert_eq!((machine.state.regs.rcx, machine.state.regs.rdi), (0, DATA.0 + 8));
}

#[test]
fn a_stepped_comparison_ends_where_the_strings_differ() {
    let mut machine = Machine::new();
    machine.state.regs.rsi = DATA.0;
    machine.state.regs.rdi = DATA.0 + 0x100;
    machine.state.regs.rcx = 8;
    machine.state.regs.rflags |= rflags::TF;
    machine.load_data(0, 0x0201);
    machine.load_data(0x100, 0x0301);
    assert_eq!(machine.run(&REPE_CMPSB), Emulated::Done);
    assert_eq!(machine.state.regs.rip, RIP.0);
    machine.done(&REPE_CMPSB);
    assert_eq!(machine.state.regs.rcx, 6);
}

#[test]
fn a_source_that_cannot_be_read_faults_before_the_destination() {
    for bytes in [&REP_MOVSB[..], &[0xa4], &REPE_CMPSB, &[0xa6]] {
        let mut machine = Machine::new();
        machine.state.regs.rsi = UNMAPPED.0;
        machine.state.regs.rdi = UNMAPPED.0 + 0x100;
        machine.state.regs.rcx = 2;
        assert_eq!(machine.run_refused(bytes), page_fault(UNMAPPED, 0), "{bytes:x?}");
    }
}

#[test]
fn a_page_that_takes_no_write_is_found_before_the_first_store() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0;
    machine.state.regs.rcx = 2;
    machine.memory.clear_log();
    machine.memory.fail(OperationKind::CompareExchange, 1);
    assert_eq!(machine.run_refused(&REP_STOSQ), Emulated::Defer(DeferReason::NotRam(DATA)));
    machine.done(&REP_STOSQ);
}

#[test]
fn comparisons_stop_where_the_strings_differ() {
    let mut machine = Machine::new();
    machine.state.regs.rsi = DATA.0;
    machine.state.regs.rdi = DATA.0 + 0x100;
    machine.state.regs.rcx = 8;
    machine.load_data(0, 0x0000_0004_0302_0100);
    machine.load_data(0x100, 0x0000_0009_0302_0100);
    machine.done(&REPE_CMPSB);
    assert_eq!(machine.state.regs.rcx, 3);
    assert_eq!(machine.state.regs.rsi, DATA.0 + 5);
    assert_eq!(machine.state.regs.rflags & (rflags::ZF | rflags::CF), rflags::CF);
}
