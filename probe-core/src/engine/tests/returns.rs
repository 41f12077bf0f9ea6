//! Return probes.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::PhysicalMemory;
use crate::handler::{Call, Flow, Hit, Verdict};
use crate::memory::MemoryError;
use crate::probe::Kind;

/// Where the function at [`TEXT`] is called from: `call TEXT` ends here, and `mov %rax,%rbx` follows.
pub(super) const CALLER: Gva = Gva(TEXT.0 + 0x100);
/// Another place.
pub(super) const OTHER_CALLER: Gva = Gva(TEXT.0 + 0x200);

type Log = Arc<Mutex<Vec<(Call, u64, u64)>>>;

/// Notes calls at their return, and carries the first argument there.
#[derive(Default)]
struct Carry {
    log: Log,
    veto: bool,
}

impl Handler for Carry {
    fn entry(&self, hit: &mut Hit<'_>) -> bool {
        let first = hit.argument(1);
        if let Some(call) = &mut hit.call {
            call.data = [first.unwrap_or(0), 2, 3, 4];
        }
        !self.veto
    }

    fn ret(&self, hit: &mut Hit<'_>) -> Verdict {
        let call = *hit.call.as_deref().expect("a return has its call");
        self.log.lock().unwrap().push((call, hit.state.regs.rip, hit.state.regs.rax));
        Verdict::REPORT
    }
}

/// A guest with a function of `push %rbp; mov %rsp,%rbp; ret` and two callers.
pub(super) struct Calls {
    pub guest: Guest,
}

impl Calls {
    pub(super) fn new() -> Self {
        let mut guest = Guest::new(PUSH_RBP, None);
        for caller in [CALLER, OTHER_CALLER] {
            guest.memory.load(TEXT_GPA.offset(caller.0 - TEXT.0), &[0x48, 0x89, 0xc3, 0xc3]);
        }
        guest.state.regs.rsp = STACK.0;
        Self { guest }
    }

    fn arm(&mut self, handler: impl Handler + 'static) -> Arc<Probe> {
        let request = ProbeRequest::for_returns(place(0)).with_handler(Arc::new(handler));
        self.guest.arm_request(request)
    }

    /// Calls the function from the instruction before `caller`, with the stack pointer at `sp` before the call.
    pub(super) fn call(&mut self, caller: Gva, sp: u64) {
        self.guest.memory.load(Gpa(sp - 8), &caller.0.to_le_bytes());
        self.guest.state.regs.rsp = sp - 8;
        self.guest.state.regs.rip = TEXT.0;
        assert_eq!(self.guest.breakpoint(), Resume::Run);
    }

    /// Arrives behind a call with the stack pointer at `sp`.
    pub(super) fn arrive(&mut self, caller: Gva, sp: u64, rax: u64) -> Resume {
        self.guest.state.regs.rsp = sp;
        self.guest.state.regs.rip = caller.0;
        self.guest.state.regs.rax = rax;
        self.guest.breakpoint()
    }

    fn byte_at(&self, gva: Gva) -> u8 {
        self.guest.byte(gva.0 - TEXT.0)
    }
}

#[test]
fn test_kretprobe_the_entry_handler_then_the_return_handler_with_value_and_data() {
    let mut calls = Calls::new();
    let handler = Carry::default();
    let log = Arc::clone(&handler.log);
    let probe = calls.arm(handler);
    calls.guest.state.regs.rdi = 0x77;
    calls.call(CALLER, 0x7000);
    assert_eq!(calls.byte_at(CALLER), INT3);
    assert_eq!(calls.guest.memory.word(Gpa(0x7000 - 8)), CALLER.0, "the guest's stack is as it was");
    assert_eq!(probe.awaited(), 1);
    assert_eq!(calls.arrive(CALLER, 0x7000, 42), Resume::Run);
    // The caller's instruction ran.
    assert_eq!((calls.guest.state.regs.rip, calls.guest.state.regs.rbx), (CALLER.0 + 3, 42));
    let log = log.lock().unwrap();
    let [(call, rip, rax)] = log[..] else { panic!("{log:?}") };
    assert_eq!((rip, rax, call.data, call.regs.rdi), (CALLER.0, 42, [0x77, 2, 3, 4], 0x77));
    assert_eq!(calls.guest.seen(), [(ProbeId(0), CALLER.0)]);
    let counts = probe.counts();
    assert_eq!((counts.entered, counts.hits, counts.delivered, counts.emulated), (1, 1, 1, 1));
    assert_eq!((probe.awaited(), probe.abandoned()), (0, 0));
}

#[test]
fn test_fprobe_skip_an_entry_that_is_vetoed_has_no_return_and_is_not_missed() {
    let mut calls = Calls::new();
    let probe = calls.arm(Carry { veto: true, ..Carry::default() });
    calls.call(CALLER, 0x7000);
    assert_eq!(calls.byte_at(CALLER), 0x48, "nobody waits for the return");
    let counts = probe.counts();
    assert_eq!((counts.entered, counts.ignored, counts.missed, counts.hits), (1, 1, 0, 0));
}

#[test]
fn a_recursion_returns_level_by_level() {
    let mut calls = Calls::new();
    let handler = Carry::default();
    let log = Arc::clone(&handler.log);
    let probe = calls.arm(handler);
    for (level, sp) in [0x7000_u64, 0x6f00, 0x6e00].into_iter().enumerate() {
        calls.guest.state.regs.rdi = level as u64;
        calls.call(CALLER, sp);
    }
    assert_eq!(probe.awaited(), 3);
    for (value, sp) in [(10, 0x6e00), (11, 0x6f00), (12, 0x7000)] {
        assert_eq!(calls.arrive(CALLER, sp, value), Resume::Run);
    }
    let seen: Vec<_> = log.lock().unwrap().iter().map(|(call, _, rax)| (call.data[0], *rax)).collect();
    assert_eq!(seen, [(2, 10), (1, 11), (0, 12)]);
    assert_eq!(probe.awaited(), 0);
}

#[test]
fn what_arrives_at_a_return_address_on_another_way_is_no_return() {
    let mut calls = Calls::new();
    let probe = calls.arm(Carry::default());
    calls.call(CALLER, 0x7000);
    // A jump, or the return of a function without a probe.
    assert_eq!(calls.arrive(CALLER, 0x6800, 1), Resume::Run);
    assert_eq!(calls.guest.state.regs.rbx, 1);
    assert_eq!(probe.counts().hits, 0);
    assert_eq!(calls.arrive(CALLER, 0x7000, 2), Resume::Run);
    assert_eq!(probe.counts().hits, 1);
}

#[test]
fn a_call_that_never_returns_is_found_out_when_its_place_is_used_again() {
    let mut calls = Calls::new();
    let probe = calls.arm(Carry::default());
    calls.call(CALLER, 0x7000);
    calls.call(OTHER_CALLER, 0x7000);
    assert_eq!((probe.awaited(), probe.abandoned()), (1, 1));
    // The same caller again, as when a task exits and the next one has its stack.
    calls.call(OTHER_CALLER, 0x7000);
    assert_eq!((probe.awaited(), probe.abandoned()), (1, 2));
    calls.arrive(OTHER_CALLER, 0x7000, 0);
    let counts = probe.counts();
    assert_eq!((counts.entered, counts.hits, probe.awaited()), (3, 1, 0));
}

#[test]
fn frames_below_the_stack_pointer_are_dead_where_a_page_belongs_to_one_stack() {
    for whole_pages in [false, true] {
        let mut calls = Calls::new();
        calls.guest.engine = Arc::new(Engine::new(EngineConfig {
            slots: REGION,
            vendor: Vendor::Unknown,
            vcpus: 1,
            max_hits: None,
            stacks_in_whole_pages: whole_pages,
            control: Arc::new(NotRunning),
            text: Arc::new(PlainText),
        }));
        calls.guest.cpu = VcpuEngine::new(Arc::clone(&calls.guest.engine), VcpuId(0), Sink::default());
        let probe = calls.arm(Carry::default());
        calls.call(CALLER, 0x7f00);
        calls.call(CALLER, 0x7e00);
        calls.call(CALLER, 0x7d00);
        calls.call(CALLER, 0x6d00); // on another page
        // longjmp-like: the middle one is left, and the outermost returns.
        assert_eq!(calls.arrive(CALLER, 0x7f00, 0), Resume::Run);
        assert_eq!(probe.counts().hits, 1);
        let (awaited, abandoned) = if whole_pages { (1, 2) } else { (3, 0) };
        assert_eq!((probe.awaited(), probe.abandoned()), (awaited, abandoned));
    }
}

#[test]
fn a_tail_call_returns_from_both_functions() {
    let mut calls = Calls::new();
    let outer = calls.arm(Carry::default());
    let inner = calls.guest.arm_request(ProbeRequest::for_returns(place(1)));
    calls.call(CALLER, 0x7000);
    // jmp to the second function: its return address is the first one's.
    calls.guest.state.regs.rsp = 0x7000 - 8;
    calls.guest.state.regs.rip = TEXT.0 + 1;
    assert_eq!(calls.guest.breakpoint(), Resume::Run);
    calls.arrive(CALLER, 0x7000, 5);
    assert_eq!((outer.counts().hits, inner.counts().hits), (1, 1));
    assert_eq!(calls.guest.seen(), [(inner.id, CALLER.0), (outer.id, CALLER.0)], "the inner one first");
}

#[test]
fn another_tasks_call_from_the_same_place_is_no_tail_call() {
    let mut calls = Calls::new();
    let exit = calls.arm(Carry::default());
    let next = calls.guest.arm_request(ProbeRequest::for_returns(place(1)));
    calls.call(CALLER, 0x7000);
    // The task is gone; the next one has its stack and other page tables.
    let mut tables = MockPageTables::new(&calls.guest.memory, Gpa(0x11_0000), 4);
    tables.map_identity(0x1_0000, RW);
    tables.map(TEXT, TEXT_GPA, 0x1000, entry::PRESENT);
    calls.guest.state.sys.cr3 = 0x11_0000;
    calls.guest.state.regs.rsp = 0x7000 - 8;
    calls.guest.state.regs.rip = TEXT.0 + 1;
    assert_eq!(calls.guest.breakpoint(), Resume::Run);
    calls.arrive(CALLER, 0x7000, 5);
    assert_eq!((exit.counts().hits, exit.abandoned()), (0, 1));
    assert_eq!(next.counts().hits, 1);
}

#[test]
fn kretprobe_maxactive_more_calls_than_are_awaited_are_missed_and_counted() {
    let mut calls = Calls::new();
    let kind = Kind::Return { max_active: 2 };
    let probe = calls.guest.arm_request(ProbeRequest { kind, ..ProbeRequest::for_returns(place(0)) });
    for sp in [0x7000, 0x6f00, 0x6e00] {
        calls.call(CALLER, sp);
    }
    let counts = probe.counts();
    assert_eq!((counts.entered, counts.missed, probe.awaited()), (3, 1, 2));
    for sp in [0x6e00, 0x6f00, 0x7000] {
        calls.arrive(CALLER, sp, 0);
    }
    assert_eq!((probe.counts().hits, probe.awaited()), (2, 0));
}

#[test]
fn a_call_whose_return_cannot_be_seen_is_missed_and_the_guest_goes_on() {
    let mut calls = Calls::new();
    let probe = calls.arm(Carry::default());
    // A return address in unmapped memory, then one on an instruction that no probe can stand on.
    calls.call(Gva(0xffff_ffff_9000_0000), 0x7000);
    calls.guest.memory.load(TEXT_GPA.offset(0x300), &[0x06]);
    calls.call(TEXT.offset(0x300), 0x7000);
    let counts = probe.counts();
    assert_eq!((counts.entered, counts.missed, probe.awaited()), (2, 2, 0));
    let unseen: Vec<Gva> = calls
        .guest
        .engine
        .take_notices()
        .into_iter()
        .map(|notice| match notice {
            Notice::ReturnUnseen { gva, .. } => gva,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(unseen, [Gva(0xffff_ffff_9000_0000), TEXT.offset(0x300)]);
}

#[test]
fn the_return_value_and_the_way_back_can_be_changed() {
    struct Change;
    impl Handler for Change {
        fn ret(&self, hit: &mut Hit<'_>) -> Verdict {
            hit.state.regs.rax = 0xabcd;
            Verdict::REPORT.with_flow(Flow::Redirect(OTHER_CALLER))
        }
    }
    let mut calls = Calls::new();
    calls.arm(Change);
    calls.call(CALLER, 0x7000);
    calls.arrive(CALLER, 0x7000, 1);
    assert_eq!((calls.guest.state.regs.rax, calls.guest.state.regs.rip), (0xabcd, OTHER_CALLER.0));
}

#[test]
fn a_function_that_is_made_to_return_returns_to_its_probe_too() {
    struct Fail;
    impl Handler for Fail {
        fn pre(&self, _: &mut Hit<'_>) -> Verdict {
            Verdict::REPORT.with_flow(Flow::Return(7))
        }
    }
    let mut calls = Calls::new();
    let probe = calls.arm(Carry::default());
    calls.guest.arm_with(0, Fail);
    calls.call(CALLER, 0x7000);
    let regs = calls.guest.state.regs;
    assert_eq!((regs.rip, regs.rsp, regs.rax), (CALLER.0, 0x7000, 7));
    assert_eq!(calls.guest.breakpoint(), Resume::Run);
    assert_eq!(probe.counts().hits, 1);
}

#[test]
fn a_return_probe_that_is_taken_out_leaves_no_int3_behind() {
    let mut calls = Calls::new();
    let text = calls.guest.memory.bytes(TEXT_GPA, 0x1000);
    let (one, two) = (calls.arm(Carry::default()), calls.arm(Carry::default()));
    calls.call(CALLER, 0x7000);
    calls.call(OTHER_CALLER, 0x6f00);
    calls.guest.engine.remove(&calls.guest.memory, &one);
    assert_eq!((one.awaited(), two.awaited()), (0, 2));
    assert_eq!(calls.byte_at(CALLER), INT3);
    calls.guest.engine.remove(&calls.guest.memory, &two);
    assert_eq!(calls.guest.memory.bytes(TEXT_GPA, 0x1000), text);
    assert!(!calls.guest.cpu.wants_breakpoints());
}

#[test]
fn a_disabled_return_probe_enters_no_more_calls_and_still_sees_the_open_ones_return() {
    let mut calls = Calls::new();
    let probe = calls.arm(Carry::default());
    calls.call(CALLER, 0x7000);
    calls.guest.engine.disable(&calls.guest.memory, &probe);
    assert_eq!(calls.guest.byte(0), 0x55);
    calls.arrive(CALLER, 0x7000, 0);
    assert_eq!((probe.counts().hits, probe.awaited()), (1, 0));
}

#[test]
fn a_probe_on_a_return_address_counts_for_itself() {
    let mut calls = Calls::new();
    let returns = calls.arm(Carry::default());
    let plain = calls.guest.arm_request(ProbeRequest::new(Place { function: None, ..place(0x100) }));
    calls.call(CALLER, 0x7000);
    calls.arrive(CALLER, 0x7000, 0);
    calls.arrive(CALLER, 0x7800, 0);
    assert_eq!((returns.counts().hits, plain.counts().hits), (1, 2));
    calls.guest.engine.remove(&calls.guest.memory, &returns);
    assert_eq!(calls.byte_at(CALLER), INT3);
}

/// Memory in which the int3 behind [`CALLER`] is long in coming: meanwhile another vCPU may do what it can.
struct Delayed<'m> {
    memory: &'m MockMemory,
    begins: mpsc::SyncSender<()>,
    other_is_done: mpsc::Receiver<()>,
}

impl PhysicalMemory for Delayed<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(gpa, buf)
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        if gpa == TEXT_GPA.offset(CALLER.0 - TEXT.0) && data == [INT3] {
            self.begins.send(()).unwrap();
            // It has to wait for this write, so this ends with the time.
            self.other_is_done.recv_timeout(Duration::from_millis(100)).ok();
        }
        self.memory.write(gpa, data)
    }

    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError> {
        self.memory.compare_exchange(gpa, width, current, new)
    }
}

#[test]
fn a_call_goes_on_when_the_int3_stands_that_another_vcpu_writes_behind_it() {
    let mut calls = Calls::new();
    let probe = calls.arm(Carry::default());
    let Guest { memory, state, engine, mut cpu, .. } = calls.guest;
    let mut other = VcpuEngine::new(engine, VcpuId(1), Sink::default());
    let entered = |sp: u64| {
        memory.load(Gpa(sp - 8), &CALLER.0.to_le_bytes());
        let mut state = state;
        (state.regs.rsp, state.regs.rip) = (sp - 8, TEXT.0);
        state
    };
    let (mut one, mut two) = (entered(0x7000), entered(0x6000));
    let stop = Stop::Breakpoint { pc: TEXT };
    let (begins, begun) = mpsc::sync_channel(1);
    let (done, other_is_done) = mpsc::channel();
    let behind = thread::scope(|scope| {
        let delayed = Delayed { memory: &memory, begins, other_is_done };
        scope.spawn(move || assert_eq!(cpu.on_stop(&mut one, &delayed, stop), Resume::Run));
        begun.recv().unwrap();
        assert_eq!(other.on_stop(&mut two, &memory, stop), Resume::Run);
        let behind = memory.bytes(TEXT_GPA.offset(CALLER.0 - TEXT.0), 1)[0];
        // Nobody listens once the write is over.
        done.send(()).ok();
        behind
    });
    assert_eq!(behind, INT3);
    assert_eq!((probe.counts().entered, probe.awaited()), (2, 2));
}
