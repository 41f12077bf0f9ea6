//! The properties that the kernel's own tests ask of kprobes (lib/tests/test_kprobes.c, lib/tests/test_fprobe.c,
//! tools/testing/selftests/ftrace), restated for a prober outside of the guest. Each test begins with the name of the one that
//! it restates; `docs/kprobes.md` lists them all.

use super::out_of_line::{GENERAL_PROTECTION, RDMSR, handler};
use super::returns::{CALLER, Calls, OTHER_CALLER};
use super::*;
use crate::handler::{Hit, Verdict};

/// Which handler of which probe, and RIP then.
type Log = Arc<Mutex<Vec<(&'static str, u64)>>>;

/// Notes every handler that is called, and reads and writes the guest's text in each.
struct Noting {
    names: [&'static str; 3],
    log: Log,
}

impl Noting {
    fn note(&self, which: usize, hit: &mut Hit<'_>) {
        self.log.lock().unwrap().push((self.names[which], hit.state.regs.rip));
        // Inside a kernel, whatever a handler calls may be probed. Nothing that a handler does here runs guest code.
        let mut text = [0; 8];
        hit.read(TEXT, &mut text);
        hit.write(TEXT, &text);
    }
}

impl Handler for Noting {
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        self.note(0, hit);
        Verdict::REPORT
    }

    fn post(&self, hit: &mut Hit<'_>) {
        self.note(1, hit);
    }

    fn fault(&self, hit: &mut Hit<'_>) {
        self.note(2, hit);
    }
}

fn noting(log: &Log, names: [&'static str; 3]) -> Noting {
    Noting { names, log: Arc::clone(log) }
}

fn calls(log: &Log) -> Vec<(&'static str, u64)> {
    log.lock().unwrap().clone()
}

#[test]
fn test_kprobes_of_one_batch_fire_independently_and_none_is_left() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let requests = [ProbeRequest::new(place(0)), ProbeRequest::new(place(4))];
    let probes = guest.engine.arm(&guest.memory, &requests).unwrap();
    guest.breakpoint();
    assert_eq!((probes[0].counts().hits, probes[1].counts().hits), (1, 0));
    guest.state.regs.rip = TEXT.0 + 4;
    guest.breakpoint();
    assert_eq!((probes[0].counts().hits, probes[1].counts().hits), (1, 1));
    probes.iter().for_each(|probe| guest.engine.remove(&guest.memory, probe));
    assert_eq!(guest.memory.bytes(TEXT_GPA, PUSH_RBP.len()), PUSH_RBP);
    assert!(!guest.cpu.wants_breakpoints());
    // Reached now, the functions run on their own.
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, probes[0].counts().hits), (TEXT.0, 1));
}

#[test]
fn test_kprobe_missed_nothing_is_missed_by_handlers_that_touch_what_is_probed() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let log = Log::default();
    let probe = guest.arm_with(0, noting(&log, ["pre", "post", "fault"]));
    for _ in 0..3 {
        guest.state.regs.rip = TEXT.0;
        assert_eq!(guest.breakpoint(), Resume::Run);
    }
    let once = [("pre", TEXT.0), ("post", TEXT.0 + 1)];
    assert_eq!(calls(&log), [once, once, once].concat());
    assert_eq!(probe.counts(), Counts { hits: 3, delivered: 3, emulated: 3, ..Counts::default() });
    assert_eq!(guest.byte(0), INT3);
}

#[test]
fn test_kprobe_missed_a_hit_while_an_instruction_is_out_of_line_is_counted_and_both_complete() {
    // The one way in which hits nest: the displaced RDMSR faults, and the guest's handler of that is probed too.
    let (mut guest, probe) = Guest::with_table(RDMSR);
    guest.engine.remove(&guest.memory, &probe);
    let log = Log::default();
    let outer = guest.arm_with(0, noting(&log, ["outer pre", "outer post", "outer fault"]));
    let on = handler(GENERAL_PROTECTION);
    let at = Place { gva: on, gpa: Gpa(on.0), function: None };
    let inner = Arc::new(noting(&log, ["inner pre", "inner post", "inner fault"]));
    let inner = guest.arm_request(ProbeRequest::new(at).with_handler(inner));
    guest.enter();
    guest.event(GENERAL_PROTECTION, Some(0), rflags::RF);
    guest.catch(GENERAL_PROTECTION);
    guest.return_from(true);
    guest.enter();
    assert_eq!(guest.guard(2), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 2);
    let expected = [
        ("outer pre", TEXT.0),
        ("outer fault", TEXT.0),
        ("inner pre", on.0),
        ("inner post", on.0 + 1),
        ("outer post", TEXT.0 + 2),
    ];
    assert_eq!(calls(&log), expected);
    assert_eq!(outer.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
    assert_eq!(inner.counts(), Counts { hits: 1, delivered: 1, emulated: 1, ..Counts::default() });
}

#[test]
fn test_kretprobes_of_one_batch_see_the_returns_of_their_own_functions() {
    let mut guest = Calls::new();
    // The second function begins at the second instruction.
    let requests = [ProbeRequest::for_returns(place(0)), ProbeRequest::for_returns(place(1))];
    let probes = guest.guest.engine.arm(&guest.guest.memory, &requests).unwrap();
    let text = guest.guest.memory.bytes(TEXT_GPA.offset(8), 0x400);
    guest.call(CALLER, 0x7000);
    assert_eq!(guest.arrive(CALLER, 0x7000, 1), Resume::Run);
    assert_eq!((probes[0].counts().hits, probes[1].counts().hits), (1, 0));
    guest.guest.memory.load(Gpa(0x6ff8), &OTHER_CALLER.0.to_le_bytes());
    (guest.guest.state.regs.rip, guest.guest.state.regs.rsp) = (TEXT.0 + 1, 0x6ff8);
    assert_eq!(guest.guest.breakpoint(), Resume::Run);
    assert_eq!(guest.arrive(OTHER_CALLER, 0x7000, 2), Resume::Run);
    assert_eq!((probes[0].counts().hits, probes[1].counts().hits), (1, 1));
    probes.iter().for_each(|probe| guest.guest.engine.remove(&guest.guest.memory, probe));
    assert_eq!(guest.guest.memory.bytes(TEXT_GPA.offset(8), 0x400), text);
}

#[test]
fn test_fprobe_multi_an_entry_and_a_return_probe_share_a_function_in_either_order() {
    for returns_first in [true, false] {
        let mut guest = Calls::new();
        let mut requests = [ProbeRequest::for_returns(place(0)), ProbeRequest::new(place(0))];
        if !returns_first {
            requests.reverse();
        }
        let mut probes = guest.guest.engine.arm(&guest.guest.memory, &requests).unwrap();
        if !returns_first {
            probes.reverse();
        }
        let [returns, entries] = &probes[..] else { panic!("{probes:?}") };
        guest.call(CALLER, 0x7000);
        assert_eq!((returns.counts().entered, entries.counts().hits), (1, 1));
        assert_eq!(guest.guest.state.regs.rip, TEXT.0 + 1, "the displaced instruction ran once");
        guest.arrive(CALLER, 0x7000, 0);
        assert_eq!((returns.counts().hits, entries.counts().hits), (1, 1));
        // Either goes alone.
        guest.guest.engine.remove(&guest.guest.memory, returns);
        guest.call(CALLER, 0x7000);
        assert_eq!((returns.counts().entered, entries.counts().hits), (1, 2));
        guest.guest.engine.remove(&guest.guest.memory, entries);
        assert_eq!(guest.guest.byte(0), PUSH_RBP[0]);
    }
}

#[test]
fn profile_counts_start_at_zero_grow_with_the_hits_and_stand_still_without() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = guest.arm(0);
    assert_eq!(probe.counts(), Counts::default());
    for hits in 1..=5 {
        guest.state.regs.rip = TEXT.0;
        guest.breakpoint();
        assert_eq!((probe.counts().hits, probe.counts().missed, probe.counts().lost), (hits, 0, 0));
    }
    guest.engine.disable(&guest.memory, &probe);
    guest.state.regs.rip = TEXT.0;
    guest.breakpoint();
    guest.engine.enable(&guest.memory, &probe).unwrap();
    assert_eq!(probe.counts().hits, 5);
    guest.breakpoint();
    // The account outlives the probe.
    guest.engine.remove(&guest.memory, &probe);
    assert_eq!(probe.counts().hits, 6);
}

#[test]
fn a_probe_that_goes_while_its_instruction_is_out_of_line_leaves_the_guest_behind_it() {
    type Leave = fn(&Guest, &Arc<Probe>);
    let ways: [Leave; 2] = [
        |guest, probe| guest.engine.disable(&guest.memory, probe),
        |guest, probe| guest.engine.remove(&guest.memory, probe),
    ];
    for leave in ways {
        let (mut guest, probe) = Guest::with_table(RDMSR);
        // Keeps the engine busy, so that only this probe goes.
        guest.arm(2);
        guest.enter();
        leave(&guest, &probe);
        assert_eq!(guest.byte(0), RDMSR[0]);
        assert_eq!(guest.guard(2), Resume::Run);
        assert_eq!((guest.state.regs.rip, guest.state.regs.rflags), (TEXT.0 + 2, rflags::FIXED | rflags::IF));
        assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
    }
}
