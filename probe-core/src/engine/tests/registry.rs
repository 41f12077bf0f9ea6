//! Probes that come and go while the guest runs.

use super::*;
use crate::machine::{Alone, ControlError};
use crate::probe::Timed;

/// What the machine was asked for, in its order, with what stood at [`TEXT`] then.
#[derive(Debug, Default)]
struct Control {
    log: Mutex<Vec<Asked>>,
    refuse: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Watch(Vec<Gpa>),
    Unwatch(Vec<Gpa>),
    Synchronise,
}

impl MachineControl for Control {
    fn watch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        if self.refuse {
            return Err(ControlError::Watch { reason: "no slot left".into() });
        }
        self.log.lock().unwrap().push(Asked::Watch(pages.to_vec()));
        Ok(())
    }

    fn unwatch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        self.log.lock().unwrap().push(Asked::Unwatch(pages.to_vec()));
        Ok(())
    }

    fn guest_breakpoints(&self) -> usize {
        1
    }

    fn alone(&self) -> Box<dyn Alone> {
        NotRunning.alone()
    }

    fn synchronise(&self) {
        self.log.lock().unwrap().push(Asked::Synchronise);
    }
}

fn with_control(control: Control) -> (Guest, Arc<Control>) {
    let mut guest = Guest::new(PUSH_RBP, None);
    let control = Arc::new(control);
    guest.engine = Arc::new(engine(None, Arc::clone(&control) as Arc<dyn MachineControl>));
    guest.cpu = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(0), Sink::default());
    (guest, control)
}

#[test]
fn pages_are_watched_and_breakpoints_exit_before_the_first_int3_stands() {
    let (guest, control) = with_control(Control::default());
    let one = guest.arm(0);
    let pages = vec![TEXT_GPA, TEXT_GPA];
    assert_eq!(*control.log.lock().unwrap(), [Asked::Watch(pages.clone()), Asked::Synchronise]);
    control.log.lock().unwrap().clear();
    // They do already.
    guest.arm(1);
    assert_eq!(*control.log.lock().unwrap(), [Asked::Watch(pages.clone())]);
    control.log.lock().unwrap().clear();
    // A removal ends when no stop of before is under way any more.
    guest.engine.remove(&guest.memory, &one);
    assert_eq!(*control.log.lock().unwrap(), [Asked::Synchronise, Asked::Unwatch(pages)]);
}

#[test]
fn a_request_that_fails_watches_nothing_for_longer() {
    let (guest, control) = with_control(Control::default());
    guest.engine.arm(&guest.memory, &[ProbeRequest::new(place(2))]).unwrap_err();
    let pages = vec![TEXT_GPA, TEXT_GPA];
    let log = control.log.lock().unwrap().clone();
    assert_eq!(log, [Asked::Watch(pages.clone()), Asked::Synchronise, Asked::Unwatch(pages)]);
}

#[test]
fn a_page_that_cannot_be_watched_refuses_the_batch_and_changes_nothing() {
    let (guest, _) = with_control(Control { refuse: true, ..Control::default() });
    let error = guest.engine.arm(&guest.memory, &[ProbeRequest::new(place(0))]).unwrap_err();
    assert!(error.to_string().contains("no slot left"), "{error}");
    assert_eq!(guest.byte(0), 0x55);
    assert!(!guest.cpu.wants_breakpoints());
}

#[test]
fn a_batch_that_fails_leaves_nothing_behind_and_can_be_repeated() {
    let (guest, _) = with_control(Control::default());
    let requests = [ProbeRequest::new(place(0)), ProbeRequest::new(place(2))];
    let error = guest.engine.arm(&guest.memory, &requests).unwrap_err();
    assert!(matches!(error, EngineError::Arm(ArmError::NotABoundary { .. })), "{error}");
    assert!(!guest.cpu.wants_breakpoints());
    guest.memory.clear_log();
    guest.memory.fail(crate::mock::OperationKind::Write, 2);
    let requests = [ProbeRequest::new(place(0)), ProbeRequest::new(place(1))];
    let error = guest.engine.arm(&guest.memory, &requests).unwrap_err();
    assert!(matches!(error, EngineError::Arm(ArmError::NotRam { .. })), "{error}");
    assert_eq!((guest.byte(0), guest.byte(1)), (0x55, 0x48));
    assert!(!guest.cpu.wants_breakpoints());
    let probes = guest.engine.arm(&guest.memory, &requests).unwrap();
    assert_eq!([probes[0].id, probes[1].id], [ProbeId(0), ProbeId(1)]);
    assert_eq!((guest.byte(0), guest.byte(1)), (INT3, INT3));
}

#[test]
fn each_probe_of_an_address_is_disabled_enabled_and_removed_alone() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (one, two) = (guest.arm(0), guest.arm(0));
    let memory = &guest.memory;
    guest.engine.disable(memory, &one);
    assert_eq!(guest.byte(0), INT3, "the other needs it");
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((one.counts().hits, two.counts().hits), (0, 1));

    guest.engine.disable(&guest.memory, &two);
    assert_eq!(guest.byte(0), 0x55);
    assert!(!guest.cpu.wants_breakpoints());

    guest.engine.enable(&guest.memory, &one).unwrap();
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((one.counts().hits, two.counts().hits), (1, 1));

    guest.engine.remove(&guest.memory, &one);
    assert_eq!(guest.byte(0), 0x55, "the other is disabled");
    guest.engine.enable(&guest.memory, &two).unwrap();
    assert_eq!(guest.byte(0), INT3);
    guest.engine.remove(&guest.memory, &two);
    assert_eq!(guest.byte(0), 0x55);
    let gone = guest.engine.enable(&guest.memory, &two);
    assert_eq!(gone, Err(EngineError::Arm(ArmError::Gone { gva: TEXT })));
    assert!(!guest.cpu.wants_breakpoints());
    // And the address can be probed again.
    let three = guest.arm(0);
    guest.state.regs.rip = TEXT.0;
    guest.breakpoint();
    assert_eq!((three.id, three.counts().hits), (ProbeId(2), 1));
}

#[test]
fn a_removal_that_is_repeated_is_harmless() {
    let guest = Guest::new(PUSH_RBP, None);
    let one = guest.arm(0);
    guest.engine.remove(&guest.memory, &one);
    let two = guest.arm(0);
    guest.engine.remove(&guest.memory, &one);
    guest.engine.disable(&guest.memory, &two);
    guest.engine.disable(&guest.memory, &two);
    guest.engine.enable(&guest.memory, &two).unwrap();
    guest.engine.enable(&guest.memory, &two).unwrap();
    assert_eq!(guest.byte(0), INT3);
}

#[test]
fn a_hit_that_was_under_way_when_the_probe_went_is_run_over() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = guest.arm(0);
    guest.engine.remove(&guest.memory, &probe);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0, "the guest's own instruction runs now");
    assert_eq!(probe.counts().hits, 0);
}

#[test]
fn each_vcpu_has_its_own_account() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = guest.arm(0);
    let mut other = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(1), Sink::default());
    for _ in 0..3 {
        let mut state = guest.state;
        assert_eq!(other.on_stop(&mut state, &guest.memory, Stop::Breakpoint { pc: TEXT }), Resume::Run);
    }
    guest.breakpoint();
    assert_eq!((probe.counts_on(VcpuId(0)).hits, probe.counts_on(VcpuId(1)).hits), (1, 3));
    assert_eq!(probe.counts().hits, 4);
    assert_eq!(probe.counts_on(VcpuId(7)), Counts::default());
}

#[test]
fn an_int3_whose_probe_comes_between_the_two_looks_at_it_is_not_the_guests() {
    // What on_stop sees when a probe is armed after it has looked for a site and before it reads the byte: no site, but an int3.
    let guest = Guest::new(PUSH_RBP, None);
    guest.arm(0);
    assert!(!guest.engine.patches.is_guests_own(&guest.memory, TEXT_GPA));
    guest.memory.load(TEXT_GPA.offset(1), &[INT3]);
    assert!(guest.engine.patches.is_guests_own(&guest.memory, TEXT_GPA.offset(1)));
    assert!(!guest.engine.patches.is_guests_own(&guest.memory, TEXT_GPA.offset(2)));
}

#[test]
fn one_hit_of_sixty_four_is_timed() {
    /// A clock that goes on with each look.
    struct Clock(u64);

    impl HitSink for Clock {
        fn deliver(&mut self, _: &Report<'_>) -> bool {
            self.0 += 10;
            true
        }

        fn stamp(&mut self) -> u64 {
            self.0 += 1;
            self.0
        }
    }

    let guest = Guest::new(PUSH_RBP, None);
    let (probe, other) = (guest.arm(0), guest.arm(1));
    let mut cpu = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(0), Clock(0));
    for hits in 1..=200 {
        let mut state = guest.state;
        let stop = Stop::Breakpoint { pc: TEXT };
        assert_eq!(cpu.on_stop(&mut state, &guest.memory, stop), Resume::Run);
        assert_eq!(probe.timed().hits, hits / 64);
    }
    assert_eq!((probe.timed().time, other.timed()), (3 * 11, Timed::default()));
}
