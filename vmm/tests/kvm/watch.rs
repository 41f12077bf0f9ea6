//! Watchpoints in debug registers. Counts of data watchpoints are tested on the nested rung: KVM's instruction emulator, which
//! runs guest kernel code where there is no hardware virtualization, looks at debug registers for execution only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::common::{
    CODE, DATA, Guest, Scripted, assemble, guest, interrupt_table, power_off, use_interrupts, word,
};
use iced_x86::code_asm::{al, dr0, dr1, dr6 as debug_status, dr7, qword_ptr, rax, rcx, rsp};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::watch::{Access, WatchSet, Watchpoint};
use probe_core::{Exception, Gva};
use vmm::Host;
use vmm::RunEnd;
use vmm::doctor::watches_data;

/// Bytes of `nop`.
const NOP: u64 = 1;

/// Counts hits of watchpoint 0 at `at`; carries its `nop` out if `carry_out`. The guest's own #DBs are its own.
fn watcher(at: u64, carry_out: bool, hits: &Arc<AtomicU64>) -> Box<dyn StopHandler> {
    let hits = Arc::clone(hits);
    Scripted::watching(WatchSet::from(Watchpoint::execution(Gva(at))), move |state, _, stop| match stop {
        Stop::Watchpoint { pc, hits: met, guest_dr6: 0 } => {
            assert_eq!((pc.0, state.regs.rip, met.numbers().collect::<Vec<_>>()), (at, at, vec![0]));
            hits.fetch_add(1, Ordering::Relaxed);
            if carry_out {
                state.regs.rip += NOP;
            }
            Resume::Run
        }
        Stop::Debug { dr6, .. } => Resume::Inject(Exception::Debug { dr6 }),
        _ => Resume::Fail { reason: format!("Unexpected {stop:?} at {:#x}", state.regs.rip) },
    })
}

#[test]
fn a_watched_instruction_stops_each_vcpu_each_time() {
    const TIMES: u64 = 100;
    let code = assemble(CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.nop()?;
        a.inc(rcx)?;
        a.cmp(rcx, i32::try_from(TIMES).unwrap())?;
        a.jne(again)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(DATA), 2)?;
        a.jne(wait)?;
        power_off(a)
    });
    for carry_out in [true, false] {
        let Some(Guest { machine, .. }) = guest(&code, 2, &[]) else { return };
        let hits = Arc::default();
        let report = machine.run((0..2).map(|_| watcher(CODE, carry_out, &hits)).collect()).unwrap();
        match report.end {
            RunEnd::PowerOff => assert_eq!(hits.load(Ordering::Relaxed), 2 * TIMES),
            RunEnd::Failed { reason, .. } if !carry_out => {
                assert!(reason.starts_with("KVM emulates the instruction at 0x100000"), "{reason}");
            }
            end => panic!("{end:?}"),
        }
    }
}

#[test]
fn the_guests_own_breakpoints_go_on_beside_the_hosts() {
    const OWN: [u64; 2] = [CODE + 0x200, CODE + 0x240];
    // The guest's breakpoints: DR0 before the host's watchpoint is reached, DR1 set up later. Its handler notes DR6, switches
    // DR7 off and returns.
    let mut code = assemble(CODE, |a| {
        use_interrupts(a)?;
        a.mov(rax, OWN[0])?;
        a.mov(dr0, rax)?;
        a.mov(rax, 0x402u64)?;
        a.mov(dr7, rax)?;
        // An exit: what the guest has set up works from here on.
        a.out(0x80, al)?;
        a.call(OWN[0])?;
        a.mov(rax, OWN[1])?;
        a.mov(dr1, rax)?;
        a.mov(rax, 0x408u64)?;
        a.mov(dr7, rax)?;
        a.out(0x80, al)?;
        a.call(OWN[1])?;
        // What the guest reads is its own.
        a.mov(rax, dr7)?;
        a.mov(qword_ptr(DATA + 0x18), rax)?;
        a.mov(rax, dr1)?;
        a.mov(qword_ptr(DATA + 0x20), rax)?;
        power_off(a)
    });
    code.resize(0x200, 0xcc);
    // Both functions: the host watches the second instruction of the first.
    code.extend([0x90, 0x90, 0xc3]);
    code.resize(0x240, 0xcc);
    code.extend([0x90, 0xc3]);
    let handler = assemble(0, |a| {
        a.push(rax)?;
        a.inc(qword_ptr(DATA))?;
        a.mov(rax, debug_status)?;
        a.add(qword_ptr(DATA + 8), rax)?;
        a.mov(rax, 0x400u64)?;
        a.mov(dr7, rax)?;
        a.mov(rax, qword_ptr(rsp + 8))?;
        a.mov(qword_ptr(DATA + 0x10), rax)?;
        a.mov(rax, 0xffff_0ff0u64)?;
        a.mov(debug_status, rax)?;
        a.pop(rax)?;
        a.iretq()
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 1, &[]) else { return };
    interrupt_table(&memory, &[(1, handler)]);
    let hits = Arc::default();
    let report = machine.run(vec![watcher(OWN[0] + NOP, true, &hits)]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(hits.load(Ordering::Relaxed), 1);
    assert_eq!(word(&memory, DATA), 2, "#DBs of the guest's own");
    assert_eq!(word(&memory, DATA + 8), 2 * 0xffff_0ff0 + 0b01 + 0b10);
    assert_eq!(word(&memory, DATA + 0x10), OWN[1], "where the second stood");
    assert_eq!((word(&memory, DATA + 0x18), word(&memory, DATA + 0x20)), (0x400, OWN[1]));
}

#[test]
fn stores_are_seen_exactly_where_the_diagnosis_says_so() {
    let code = assemble(CODE, |a| {
        a.inc(qword_ptr(DATA))?;
        a.inc(qword_ptr(DATA + 8))?;
        a.inc(qword_ptr(DATA))?;
        power_off(a)
    });
    let Some(Guest { machine, .. }) = guest(&code, 1, &[]) else { return };
    let hits = Arc::<AtomicU64>::default();
    let counted = Arc::clone(&hits);
    let watchpoint = Watchpoint::new(Gva(DATA), 8, Access::Write).unwrap();
    let handler = Scripted::watching(WatchSet::from(watchpoint), move |_, _, stop| {
        assert!(matches!(stop, Stop::Watchpoint { guest_dr6: 0, .. }), "{stop:?}");
        counted.fetch_add(1, Ordering::Relaxed);
        Resume::Run
    });
    assert_eq!(machine.run(vec![handler]).unwrap().end, RunEnd::PowerOff);
    assert_eq!(hits.load(Ordering::Relaxed), if watches_data(&Host::open().unwrap()) { 2 } else { 0 });
}
