//! What handlers can do, and what they cannot break.

use super::*;
use crate::handler::{Flow, Hit, Verdict};
use crate::{MemoryError, SystemRegisters};

/// A handler out of closures, which notes what was called.
struct Scripted<F> {
    pre: F,
    log: Arc<Mutex<Vec<(&'static str, u64)>>>,
}

impl<F: Fn(&mut Hit<'_>) -> Verdict + Send + Sync> Handler for Scripted<F> {
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        self.log.lock().unwrap().push(("pre", hit.state.regs.rip));
        (self.pre)(hit)
    }

    fn post(&self, hit: &mut Hit<'_>) {
        self.log.lock().unwrap().push(("post", hit.state.regs.rip));
    }

    fn fault(&self, hit: &mut Hit<'_>) {
        self.log.lock().unwrap().push(("fault", hit.state.regs.rip));
    }
}

type Log = Arc<Mutex<Vec<(&'static str, u64)>>>;

pub(super) fn scripted(pre: impl Fn(&mut Hit<'_>) -> Verdict + Send + Sync) -> (impl Handler, Log) {
    let log = Log::default();
    (Scripted { pre, log: Arc::clone(&log) }, log)
}

fn calls(log: &Log) -> Vec<(&'static str, u64)> {
    log.lock().unwrap().clone()
}

#[test]
fn test_kprobe_pre_and_post_run_once_a_call_around_the_instruction() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, log) = scripted(|_| Verdict::REPORT);
    guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(calls(&log), [("pre", TEXT.0), ("post", TEXT.0 + 1)]);
    assert_eq!(guest.state.regs.rsp, STACK.0 - 8);
}

#[test]
fn a_fault_calls_the_fault_handler_and_the_retry_the_post_handler() {
    // mov (%rdi),%rax
    let mut guest = Guest::new(&[0x48, 0x8b, 0x07, 0xc3], None);
    let (handler, log) = scripted(|_| Verdict::REPORT);
    let probe = guest.arm_with(0, handler);
    guest.state.regs.rdi = 0x5555_0000;
    assert!(matches!(guest.breakpoint(), Resume::Inject(Exception::PageFault { .. })));
    guest.state.regs.rflags |= rflags::RF;
    guest.state.regs.rdi = 0x2000;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(calls(&log), [("pre", TEXT.0), ("fault", TEXT.0), ("post", TEXT.0 + 3)]);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

#[test]
fn registers_and_memory_that_a_handler_changes_are_the_guests() {
    // mov (%rdi),%rax
    let mut guest = Guest::new(&[0x48, 0x8b, 0x07, 0xc3], None);
    let (handler, _) = scripted(|hit| {
        hit.state.regs.rdi = 0x3000;
        assert_eq!(hit.write(Gva(0x3000), &0x1234_u64.to_le_bytes()), 8);
        assert_eq!(hit.read_u64(Gva(0x3000)), Some(0x1234));
        // A write that runs off what is mapped stops there.
        assert_eq!(hit.write(Gva(0xfffc), &[1; 8]), 4);
        Verdict::REPORT
    });
    guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rax, 0x1234);
}

#[test]
fn a_handler_sees_and_writes_the_guests_own_text() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let mut tables = MockPageTables::new(&guest.memory, Gpa(0x11_0000), 4);
    tables.map(TEXT, TEXT_GPA, 0x1000, RW);
    guest.state.sys.cr3 = 0x11_0000;
    let (handler, _) = scripted(|hit| {
        let mut text = [0; 5];
        assert_eq!(hit.read(TEXT, &mut text), 5);
        assert_eq!(text, PUSH_RBP);
        hit.write(TEXT.offset(1), &[0x90]);
        Verdict::FILTER
    });
    guest.arm_with(0, handler);
    guest.arm(1);
    guest.state.regs.rsp = 0x8000;
    guest.breakpoint();
    assert_eq!(guest.byte(1), INT3);
    guest.engine.disarm_all(&guest.memory);
    assert_eq!((guest.byte(0), guest.byte(1)), (0x55, 0x90));
}

#[test]
fn memory_is_the_guests_own_and_the_slots_are_no_part_of_it() {
    let guest = Guest::new(PUSH_RBP, None);
    guest.arm(0);
    let (memory, sys) = (&guest.memory, &guest.state.sys);
    let mut text = [0; 5];
    assert_eq!(guest.engine.read_physical(memory, TEXT_GPA, &mut text), Ok(()));
    assert_eq!(text, PUSH_RBP);
    assert_eq!(guest.engine.write_physical(memory, TEXT_GPA, &[0x90]), Ok(()));
    assert_eq!(guest.byte(0), INT3);
    assert_eq!(guest.engine.read_virtual(sys, memory, TEXT, &mut text), 5);
    assert_eq!(text, [&[0x90], &PUSH_RBP[1..]].concat()[..]);

    for gpa in [REGION.base, REGION.base.offset(REGION.size - 1)] {
        assert_eq!(guest.engine.read_physical(memory, gpa, &mut [0]), Err(MemoryError::NotRam(gpa)));
        assert_eq!(guest.engine.write_physical(memory, gpa, &[1]), Err(MemoryError::NotRam(gpa)));
    }
    let mut tables = MockPageTables::new(memory, Gpa(0x11_0000), 4);
    tables.map(TEXT, TEXT_GPA, 0x1000, RW);
    tables.map(TEXT.offset(0x1000), REGION.base, 0x1000, RW);
    let sys = SystemRegisters { cr3: 0x11_0000, ..*sys };
    let mut across = [0; 8];
    assert_eq!(guest.engine.read_virtual(&sys, memory, TEXT.offset(0xffc), &mut across), 4);
    assert_eq!(guest.engine.write_virtual(&sys, memory, TEXT.offset(0xffc), &across), 4);
}

#[test]
fn a_skipped_instruction_does_not_run_and_has_no_post_handler() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, log) = scripted(|_| Verdict::REPORT.with_flow(Flow::Skip));
    let probe = guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rsp), (TEXT.0 + 1, STACK.0));
    assert_eq!(calls(&log), [("pre", TEXT.0)]);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, diverted: 1, ..Counts::default() });
}

#[test]
fn a_redirected_guest_goes_on_there() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, _) = scripted(|hit| {
        // RIP itself says nothing.
        hit.state.regs.rip = 0xdead;
        Verdict::REPORT.with_flow(Flow::Redirect(TEXT.offset(4)))
    });
    guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rsp), (TEXT.0 + 4, STACK.0));
}

#[test]
fn rip_that_a_handler_changes_without_saying_so_is_put_back() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, _) = scripted(|hit| {
        hit.state.regs.rip = 0xdead;
        Verdict::REPORT
    });
    guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
}

#[test]
fn a_function_can_be_made_to_return_a_value_at_once() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, _) = scripted(|_| Verdict::REPORT.with_flow(Flow::Return((-12_i64).cast_unsigned())));
    guest.arm_with(0, handler);
    guest.memory.load(Gpa(STACK.0), &0x1234_5678_u64.to_le_bytes());
    assert_eq!(guest.breakpoint(), Resume::Run);
    let regs = guest.state.regs;
    assert_eq!((regs.rip, regs.rsp, regs.rax), (0x1234_5678, STACK.0 + 8, (-12_i64).cast_unsigned()));
}

#[test]
fn a_function_without_a_readable_return_address_runs_on_and_the_user_hears_of_it() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, _) = scripted(|hit| {
        hit.state.regs.rsp = 0x9000;
        Verdict::REPORT.with_flow(Flow::Return(1))
    });
    guest.arm_with(0, handler);
    let mut tables = MockPageTables::new(&guest.memory, Gpa(0x11_0000), 4);
    tables.map(TEXT, TEXT_GPA, 0x1000, entry::PRESENT);
    tables.map(Gva(0x8000), Gpa(0x8000), 0x1000, RW);
    guest.state.sys.cr3 = 0x11_0000;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
    assert_eq!(guest.engine.take_notices(), [Notice::NoReturnAddress { gva: TEXT }]);
}

#[test]
fn a_filtered_hit_is_counted_and_costs_nothing_of_the_limit() {
    let mut guest = Guest::new(PUSH_RBP, Some(1));
    let (handler, _) =
        scripted(|hit| if hit.state.regs.rdi == 0 { Verdict::FILTER } else { Verdict::REPORT });
    let probe = guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    guest.state.regs.rip = TEXT.0;
    guest.state.regs.rdi = 1;
    assert_eq!(guest.breakpoint(), Resume::Finish);
    assert_eq!(guest.seen().len(), 1);
    let counts = probe.counts();
    assert_eq!((counts.hits, counts.delivered, counts.filtered), (2, 1, 1));
}

#[test]
fn a_handler_that_panics_loses_its_probe_and_nothing_else() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (bad, log) = scripted(|hit| {
        hit.state.regs.rbp = 0xbad;
        panic!("no such file")
    });
    let bad = guest.arm_with(0, bad);
    let good = guest.arm(0);
    assert_eq!(guest.breakpoint(), Resume::Run);
    // The instruction ran, from the state that the guest had.
    assert_eq!((guest.state.regs.rip, guest.state.regs.rbp), (TEXT.0 + 1, 0));
    assert!(!bad.is_enabled() && good.is_enabled());
    let notices = guest.engine.take_notices();
    let expected = Notice::HandlerPanicked { gva: TEXT, message: "no such file".into() };
    assert_eq!(notices, [expected]);
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(calls(&log).len(), 1, "never called again");
    assert_eq!((bad.counts().hits, good.counts().hits), (1, 2));
    assert_eq!(guest.byte(0), INT3);
}

#[test]
fn the_int3_of_a_panicked_handler_goes_if_nobody_else_needs_it() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (bad, _) = scripted(|_| panic!());
    guest.arm_with(0, bad);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.byte(0), 0x55);
    assert!(!guest.cpu.wants_breakpoints());
}

#[test]
fn the_first_probe_that_diverts_is_obeyed_and_all_count() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (skip, _) = scripted(|_| Verdict::REPORT.with_flow(Flow::Skip));
    let (elsewhere, _) = scripted(|_| Verdict::REPORT.with_flow(Flow::Redirect(Gva(0x4000))));
    let (one, two) = (guest.arm_with(0, skip), guest.arm_with(0, elsewhere));
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
    assert_eq!((one.counts().hits, two.counts().hits), (1, 1));
}

#[test]
fn arguments_are_in_registers_and_on_the_stack() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    let (handler, _) = scripted(move |hit| {
        *log.lock().unwrap() = (1..=9).map(|number| hit.argument(number)).collect();
        Verdict::REPORT
    });
    guest.arm_with(0, handler);
    let regs = &mut guest.state.regs;
    (regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9) = (1, 2, 3, 4, 5, 6);
    for (index, word) in [0xcafe_u64, 7, 8, 9].into_iter().enumerate() {
        guest.memory.load(Gpa(STACK.0 + 8 * index as u64), &word.to_le_bytes());
    }
    guest.breakpoint();
    assert_eq!(*seen.lock().unwrap(), (1..=9).map(Some).collect::<Vec<_>>());
}

#[test]
fn the_guests_single_step_sees_a_skipped_instruction_as_done() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, _) = scripted(|_| Verdict::REPORT.with_flow(Flow::Skip));
    guest.arm_with(0, handler);
    guest.state.regs.rflags |= rflags::TF;
    assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
}

#[test]
fn text_that_is_freed_takes_its_probes_along() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let inside = guest.arm(1);
    let (handler, _) = scripted(|hit| {
        assert_eq!(hit.text_is_freed(&(TEXT.offset(1)..TEXT.offset(5))), 1);
        Verdict::FILTER
    });
    guest.arm_with(0, handler);
    assert_eq!(guest.byte(1), INT3);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.byte(0), guest.byte(1)), (INT3, 0x48));
    assert!(!inside.is_enabled());
    let error = guest.engine.enable(&guest.memory, &inside);
    assert_eq!(error, Err(EngineError::Arm(ArmError::Gone { gva: TEXT.offset(1) })));
    assert_eq!(guest.byte(1), 0x48);
    // Other text that comes to lie there can be probed anew.
    let next = guest.arm(1);
    assert_eq!(guest.byte(1), INT3);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((inside.counts().hits, next.counts().hits), (0, 1));
}

#[test]
fn a_handler_can_arm_probes_that_take_the_next_hit() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let armed = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&armed);
    let (handler, _) = scripted(move |hit| {
        assert!(matches!(hit.arm(&[ProbeRequest::new(place(2))]), Err(EngineError::Arm(_))));
        log.lock().unwrap().extend(hit.arm(&[ProbeRequest::new(place(1))]).unwrap());
        Verdict::FILTER
    });
    guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.seen(), [(ProbeId(1), TEXT.0 + 1)]);
    assert_eq!(armed.lock().unwrap()[0].counts().hits, 1);
}

#[test]
fn a_handler_can_pause_the_machine_at_its_hit_which_counts_once() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, log) = scripted(|_| Verdict::REPORT.and_pause());
    let probe = guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Pause);
    // The vCPU stands at the probed instruction, which has not run.
    assert_eq!((guest.state.regs.rip, guest.state.regs.rsp), (TEXT.0, STACK.0));
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rsp), (TEXT.0 + 1, STACK.0 - 8));
    assert_eq!(guest.state.regs.rflags & rflags::RF, 0);
    assert_eq!(calls(&log), [("pre", TEXT.0), ("post", TEXT.0 + 1)]);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, emulated: 1, ..Counts::default() });
    // The next arrival is a hit of its own.
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.breakpoint(), Resume::Pause);
    assert_eq!(probe.counts().hits, 2);
}

#[test]
fn a_guest_that_was_sent_elsewhere_pauses_there() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (handler, _) = scripted(|_| Verdict::FILTER.with_flow(Flow::Skip).and_pause());
    guest.arm_with(0, handler);
    assert_eq!(guest.breakpoint(), Resume::Pause);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
}
