//! Watchpoints.

use super::*;
use crate::handler::Verdict;
use crate::probe::WatchRequest;
use crate::watch::{Access, WatchHits, WatchSet, Watchpoint, WatchpointError};

fn data(gva: u64, len: u8, access: Access) -> WatchRequest {
    WatchRequest::new(Watchpoint::new(Gva(gva), len, access).unwrap())
}

fn set(guest: &Guest, request: WatchRequest) -> Arc<Probe> {
    guest.engine.watch_accesses(&[request]).unwrap().remove(0)
}

/// The hits that the CPU reports for an access.
fn hits(guest: &Guest, gva: u64, write: bool) -> WatchHits {
    guest.cpu.watchpoints().touched(Gva(gva), 8, write)
}

#[test]
fn a_watchpoint_takes_its_hits_behind_the_access() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = set(&guest, data(0x3000, 8, Access::Write));
    guest.state.regs.rip = TEXT.0 + 1;
    let stop = Stop::Watchpoint { pc: TEXT.offset(1), hits: hits(&guest, 0x3000, true), guest_dr6: 0 };
    assert_eq!(guest.stop(stop), Resume::Run);
    assert_eq!(guest.seen(), [(ProbeId(0), TEXT.0 + 1)]);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, ..Counts::default() });
    // What is the guest's of the same #DB goes to it.
    let stop = Stop::Watchpoint { pc: TEXT.offset(1), hits: hits(&guest, 0x3000, true), guest_dr6: dr6::BS };
    assert_eq!(guest.stop(stop), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
    assert_eq!(probe.counts().hits, 2);
}

#[test]
fn an_access_of_an_emulated_instruction_is_seen_too() {
    // mov %rax,(%rdi); mov (%rdi),%rbx; ret
    let mut guest = Guest::new(&[0x48, 0x89, 0x07, 0x48, 0x8b, 0x1f, 0xc3], None);
    let writes = set(&guest, data(0x3000, 4, Access::Write));
    let both = set(&guest, data(0x3004, 4, Access::ReadWrite));
    let elsewhere = set(&guest, data(0x3008, 8, Access::ReadWrite));
    guest.arm(0);
    guest.arm(3);
    guest.state.regs.rdi = 0x3000;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.breakpoint(), Resume::Run);
    let counted = [&writes, &both, &elsewhere].map(|probe| probe.counts().hits);
    assert_eq!(counted, [1, 2, 0]);
    // Watchpoints are traps: RIP is behind the instruction.
    assert!(guest.seen().contains(&(writes.id, TEXT.0 + 3)));
}

#[test]
fn a_handler_can_pause_the_machine_at_an_emulated_access() {
    // mov %rax,(%rdi)
    let mut guest = Guest::new(&[0x48, 0x89, 0x07, 0xc3], None);
    let handler = handlers::scripted(|_| Verdict::REPORT.and_pause()).0;
    let probe = set(&guest, data(0x3000, 8, Access::Write).with_handler(Arc::new(handler)));
    guest.arm(0);
    guest.state.regs.rdi = 0x3000;
    assert_eq!(guest.breakpoint(), Resume::Pause);
    assert_eq!((guest.state.regs.rip, probe.counts().hits), (TEXT.0 + 3, 1));
}

#[test]
fn an_access_that_faults_is_none() {
    let mut guest = Guest::new(&[0x48, 0x89, 0x07, 0xc3], None);
    let probe = set(&guest, data(0x5555_0000, 8, Access::Write));
    guest.arm(0);
    guest.state.regs.rdi = 0x5555_0000;
    assert!(matches!(guest.breakpoint(), Resume::Inject(Exception::PageFault { .. })));
    assert_eq!(probe.counts().hits, 0);
}

#[test]
fn a_repeated_string_instruction_is_seen_over_its_whole_length() {
    // rep stosb
    let mut guest = Guest::new(&[0xf3, 0xaa, 0xc3], None);
    let inside = set(&guest, data(0x3008, 1, Access::Write));
    let behind = set(&guest, data(0x3010, 1, Access::Write));
    let before = set(&guest, data(0x2fff, 1, Access::Write));
    guest.arm(0);
    (guest.state.regs.rdi, guest.state.regs.rcx) = (0x3000, 16);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!([&inside, &behind, &before].map(|probe| probe.counts().hits), [1, 0, 0]);
}

#[test]
fn an_instruction_that_is_watched_for_execution_runs_after_its_hit() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = set(&guest, WatchRequest::new(Watchpoint::execution(TEXT)));
    let hits = guest.cpu.watchpoints().executed(first_hit());
    let stop = Stop::Watchpoint { pc: TEXT, hits, guest_dr6: 0 };
    assert_eq!(guest.stop(stop), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rsp), (TEXT.0 + 1, STACK.0 - 8));
    assert_eq!(guest.seen(), [(probe.id, TEXT.0)]);
    // With an int3 of ours at the same address both count.
    let int3 = guest.arm(0);
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.stop(stop), Resume::Run);
    assert_eq!((probe.counts().hits, int3.counts().hits), (2, 1));
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
}

/// Number 0, as the CPU reports it in B0.
fn first_hit() -> WatchHits {
    let anything = Watchpoint::new(Gva(0), 1, Access::ReadWrite).unwrap();
    WatchSet::from(anything).touched(Gva(0), 1, true)
}

#[test]
fn there_are_four_less_what_the_guest_uses_and_a_batch_is_all_or_nothing() {
    let guest = Guest::new(PUSH_RBP, None);
    let five: Vec<_> = (0..5).map(|number| data(0x3000 + 8 * number, 8, Access::Write)).collect();
    let error = guest.engine.watch_accesses(&five).unwrap_err();
    assert_eq!(error, EngineError::Watchpoint(WatchpointError::NoneFree { host: 4, guest: 0 }));
    assert!(guest.cpu.watchpoints().is_empty());
    let probes = guest.engine.watch_accesses(&five[..4]).unwrap();
    assert_eq!(guest.cpu.watchpoints().len(), 4);
    guest.engine.watch_accesses(&five[4..]).unwrap_err();
    guest.engine.remove(&guest.memory, &probes[2]);
    let last = set(&guest, five[4].clone());
    assert_eq!((last.id, guest.cpu.watchpoints().len()), (ProbeId(4), 4));
}

#[test]
fn a_watchpoint_is_disabled_enabled_and_removed() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = set(&guest, data(0x3000, 8, Access::Write));
    guest.engine.disable(&guest.memory, &probe);
    assert!(guest.cpu.watchpoints().is_empty() && !probe.is_enabled());
    guest.engine.enable(&guest.memory, &probe).unwrap();
    guest.engine.enable(&guest.memory, &probe).unwrap();
    assert_eq!(guest.cpu.watchpoints().len(), 1);
    let stop = Stop::Watchpoint { pc: TEXT, hits: hits(&guest, 0x3000, true), guest_dr6: 0 };
    guest.stop(stop);
    guest.engine.remove(&guest.memory, &probe);
    assert!(guest.cpu.watchpoints().is_empty());
    let gone = guest.engine.enable(&guest.memory, &probe);
    assert_eq!(gone, Err(EngineError::Arm(ArmError::Gone { gva: Gva(0x3000) })));
    // A hit that was under way when it went.
    assert_eq!(guest.stop(stop), Resume::Run);
    assert_eq!(probe.counts().hits, 1);
}

#[test]
fn hits_of_a_watchpoint_count_towards_the_limit() {
    let mut guest = Guest::new(PUSH_RBP, Some(1));
    set(&guest, data(0x3000, 8, Access::Write));
    let stop = Stop::Watchpoint { pc: TEXT, hits: hits(&guest, 0x3000, true), guest_dr6: 0 };
    assert_eq!(guest.stop(stop), Resume::Finish);
}
