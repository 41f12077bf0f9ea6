//! Pausing a running machine, and changing which pages it watches.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::common::{CODE, DATA, Guest, Scripted, assemble, guest, is_int3, no_stops, power_off, word};
use iced_x86::code_asm::{al, dx, qword_ptr, r9, rax, rbx, rcx, rdi};
use probe_core::machine::{Alone, MachineControl};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{Exception, Gpa, PhysicalMemory, VcpuId, VcpuState};
use vmm::{Control, GuestRam, RunEnd, RunError, RunReport, StopHandle, WatchError};

/// In the page that the guest's code is in: a word for each vCPU.
const IN_TEXT: u64 = CODE + 0x800;

/// Counts the text writes of its vCPU, and makes them.
struct Counter(Arc<AtomicU64>);

impl StopHandler for Counter {
    fn on_stop(&mut self, state: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
        Resume::Fail { reason: format!("Unexpected {stop:?} at {:#x}", state.regs.rip) }
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        self.0.fetch_add(1, Ordering::Relaxed);
        memory.write(gpa, data).unwrap();
    }

    fn wants_breakpoints(&self) -> bool {
        false
    }
}

type Running = JoinHandle<Result<RunReport, RunError>>;

fn start(machine: vmm::Machine, handlers: Vec<Box<dyn StopHandler>>) -> Running {
    thread::spawn(move || machine.run(handlers))
}

/// Each vCPU stores 1, 2, 3... into its word of the text page and reads it back, for ever; a wrong word is a triple fault.
fn storing_code() -> Vec<u8> {
    assemble(CODE, |a| {
        let (mut again, mut wrong) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.inc(rbx)?;
        a.mov(qword_ptr(rdi * 8 + i32::try_from(IN_TEXT).unwrap()), rbx)?;
        a.mov(rax, qword_ptr(rdi * 8 + i32::try_from(IN_TEXT).unwrap()))?;
        a.cmp(rax, rbx)?;
        a.je(again)?;
        a.set_label(&mut wrong)?;
        a.mov(rax, 1u64 << 40)?;
        a.mov(rax, qword_ptr(rax))
    })
}

#[test]
fn a_page_that_four_vcpus_run_and_write_is_watched_a_thousand_times_and_each_store_is_seen() {
    const VCPUS: u32 = 4;
    let Some(Guest { machine, memory, .. }) = guest(&storing_code(), VCPUS, &[]) else { return };
    let seen: Vec<Arc<AtomicU64>> = (0..VCPUS).map(|_| Arc::default()).collect();
    let handlers = seen.iter().map(|seen| Box::new(Counter(Arc::clone(seen))) as Box<dyn StopHandler>);
    let (control, stop) = (machine.control(), machine.stop_handle());
    let running = start(machine, handlers.collect());

    let stores = || (0..u64::from(VCPUS)).map(|vcpu| word(&memory, IN_TEXT + 8 * vcpu)).collect::<Vec<_>>();
    let counts = || seen.iter().map(|seen| seen.load(Ordering::Relaxed)).collect::<Vec<_>>();
    let page = [Gpa(IN_TEXT)];
    let (mut watched_stores, mut unwatched_stores) = (0, 0);
    let mut last = {
        let _paused = control.pause();
        (stores(), counts())
    };
    for round in 0..2000 {
        let watched = round % 2 == 1;
        thread::sleep(Duration::from_micros(100));
        let paused = control.pause();
        let now = (stores(), counts());
        for vcpu in 0..VCPUS as usize {
            let stored = now.0[vcpu] - last.0[vcpu];
            let seen = now.1[vcpu] - last.1[vcpu];
            assert_eq!(seen, if watched { stored } else { 0 }, "vCPU {vcpu}, round {round}");
            *if watched { &mut watched_stores } else { &mut unwatched_stores } += stored;
        }
        last = now;
        if watched { control.unwatch(&page) } else { control.watch(&page) }.unwrap();
        drop(paused);
    }
    stop.stop();
    let report = running.join().unwrap().unwrap();
    assert_eq!(report.end, RunEnd::Stopped);
    assert!(watched_stores > 1000 && unwatched_stores > 1000, "{watched_stores} {unwatched_stores}");
}

#[test]
fn registers_are_read_and_changed_before_the_run_and_at_rest() {
    // vCPU 0 waits for a value in RAX; vCPU 1 counts for ever.
    let code = assemble(CODE, |a| {
        let (mut wait, mut count) = (a.create_label(), a.create_label());
        a.mov(qword_ptr(DATA), r9)?;
        a.test(rdi, rdi)?;
        a.jne(count)?;
        a.set_label(&mut wait)?;
        a.test(rax, rax)?;
        a.je(wait)?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        power_off(a)?;
        a.set_label(&mut count)?;
        a.inc(rbx)?;
        a.jmp(count)
    });
    let Some(Guest { mut machine, memory, .. }) = guest(&code, 2, &[]) else { return };
    let mut first = machine.states();
    assert_eq!((first.len(), first[0].regs.rip, first[1].regs.rdi), (2, CODE, 1));
    for (vcpu, state) in (0..).map(VcpuId).zip(&mut first) {
        state.regs.r9 = 77;
        assert!(machine.set_state(vcpu, state));
    }
    assert!(!machine.set_state(VcpuId(2), &first[0]), "there is none");

    let control = machine.control();
    let run = machine.start(vec![no_stops(), no_stops()]).unwrap();
    let early = control.pause();
    let there = [0, 1, 2].map(|vcpu| early.state(VcpuId(vcpu)).is_some());
    assert_eq!(there, [true, true, false], "a pause behind the start is one of all vCPUs");
    drop(early);
    let running = thread::spawn(move || run.wait());
    let counted_beyond = |count| loop {
        let paused = control.pause();
        match paused.state(VcpuId(1)).map(|state| state.regs.rbx) {
            Some(now) if now > count => break (paused, now),
            _ => drop(paused),
        }
    };
    let (paused, before) = counted_beyond(0);
    assert_eq!(word(&memory, DATA), 77, "set before the run");
    let mut state = paused.state(VcpuId(1)).unwrap();
    state.regs.rbx = 1 << 32;
    assert!(paused.set_state(VcpuId(1), &state));
    drop(paused);
    assert!(before < 1 << 32, "{before:#x}");
    let (paused, _) = counted_beyond(1 << 32);
    let mut state = paused.state(VcpuId(0)).unwrap();
    assert!((CODE..CODE + code.len() as u64).contains(&state.regs.rip), "{:#x}", state.regs.rip);
    state.regs.rax = 42;
    assert!(paused.set_state(VcpuId(0), &state));
    drop(paused);
    let report = running.join().unwrap().unwrap();
    assert_eq!((report.end, word(&memory, DATA + 8)), (RunEnd::PowerOff, 42));
    assert_eq!(control.pause().state(VcpuId(0)), None, "the run is over");
}

#[test]
fn a_paused_machine_stands_still_and_goes_on() {
    // vCPU 2 sleeps with interrupts on.
    let code = assemble(CODE, |a| {
        let (mut again, mut sleep) = (a.create_label(), a.create_label());
        a.cmp(rdi, 2)?;
        a.je(sleep)?;
        a.set_label(&mut again)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.jmp(again)?;
        a.set_label(&mut sleep)?;
        a.sti()?;
        a.hlt()
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 3, &[]) else { return };
    let (control, stop) = (machine.control(), machine.stop_handle());
    let running = start(machine, vec![no_stops(), no_stops(), no_stops()]);
    for _ in 0..20 {
        let before = word(&memory, DATA);
        while word(&memory, DATA) == before {
            thread::yield_now();
        }
        let outer = control.pause();
        let at_rest = word(&memory, DATA);
        drop(control.pause());
        thread::sleep(Duration::from_millis(5));
        assert_eq!(word(&memory, DATA), at_rest);
        drop(outer);
    }
    stop.stop();
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::Stopped);
}

#[test]
fn a_pause_before_the_run_holds_its_first_instruction_and_a_stop_ends_it() {
    let code = assemble(CODE, |a| {
        a.mov(qword_ptr(DATA), 1)?;
        a.cli()?;
        a.hlt()
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 2, &[]) else { return };
    let stop = machine.stop_handle();
    let paused = machine.control().pause();
    let running = start(machine, vec![no_stops(), no_stops()]);
    thread::sleep(Duration::from_millis(400));
    assert!(!running.is_finished(), "a parked vCPU is not dead");
    stop.stop();
    let report = running.join().unwrap().unwrap();
    assert_eq!((report.end, word(&memory, DATA)), (RunEnd::Stopped, 0));
    drop(paused);
}

#[test]
fn vcpus_that_sleep_for_ever_are_found_dead_only_after_the_pause() {
    let code = assemble(CODE, |a| {
        a.mov(qword_ptr(rdi * 8 + i32::try_from(DATA).unwrap()), 1)?;
        a.cli()?;
        a.hlt()
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 2, &[]) else { return };
    let control = machine.control();
    let running = start(machine, vec![no_stops(), no_stops()]);
    while word(&memory, DATA) + word(&memory, DATA + 8) < 2 {
        thread::yield_now();
    }
    let paused = control.pause();
    thread::sleep(Duration::from_millis(400));
    assert!(!running.is_finished());
    drop(paused);
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::Halted);
}

#[test]
fn no_access_is_lost_or_repeated_by_a_pause() {
    const ACCESSES: u64 = 20_000;
    let code = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.mov(dx, 0x71)?;
        a.mov(rdi, 0xc000_0000u64)?;
        a.set_label(&mut again)?;
        a.in_(al, dx)?;
        a.inc(rbx)?;
        // All ones: adds -1.
        a.add(rcx, qword_ptr(rdi))?;
        a.cmp(rbx, i32::try_from(ACCESSES).unwrap())?;
        a.jne(again)?;
        a.mov(qword_ptr(DATA), rcx)?;
        power_off(a)
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 1, &[]) else { return };
    let control = machine.control();
    let running = start(machine, vec![no_stops()]);
    let mut pauses = 0;
    while !running.is_finished() {
        drop(control.pause());
        pauses += 1;
    }
    let report = running.join().unwrap().unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    let exits = report.vcpus[0].exits;
    assert_eq!((exits.port_in, exits.mmio_read), (ACCESSES, ACCESSES));
    assert_eq!(word(&memory, DATA), ACCESSES.wrapping_neg());
    assert!(pauses > 100, "{pauses}");
}

#[test]
fn a_repeated_string_instruction_does_not_keep_a_pause_waiting() {
    let code = assemble(CODE, |a| {
        a.mov(rcx, u64::MAX)?;
        // Where no memory is: each byte is an exit.
        a.mov(rdi, 0xc000_0000u64)?;
        a.rep().stosb()
    });
    let Some(Guest { machine, .. }) = guest(&code, 1, &[]) else { return };
    let (control, stop) = (machine.control(), machine.stop_handle());
    let running = start(machine, vec![no_stops()]);
    thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    drop(control.pause());
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    stop.stop();
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::Stopped);
}

#[test]
fn stop_handlers_of_several_vcpus_watch_and_unwatch_at_once() {
    const STOPS: u64 = 200;
    let code = assemble(CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        a.mov(rcx, STOPS)?;
        a.set_label(&mut again)?;
        a.int3()?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.test(rdi, rdi)?;
        a.je(wait)?;
        a.cli()?;
        a.hlt()?;
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(DATA), 3)?;
        a.jne(wait)?;
        power_off(a)
    });
    let Some(Guest { machine, .. }) = guest(&code, 3, &[]) else { return };
    let control = machine.control();
    let inside = Arc::new(AtomicU64::new(0));
    let handlers = (0..3).map(|vcpu| {
        let (control, inside) = (control.clone(), Arc::clone(&inside));
        let page = [Gpa(DATA + 0x1000 * (1 + vcpu))];
        Scripted::boxed(move |state, _, stop| {
            assert!(is_int3(&stop));
            control.watch(&page).unwrap();
            let paused = control.pause();
            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
            control.unwatch(&page).unwrap();
            inside.fetch_sub(1, Ordering::SeqCst);
            drop(paused);
            state.regs.rip += 1;
            Resume::Run
        })
    });
    let handlers = handlers.collect();
    let running = start(machine, handlers);
    // A pause from outside gets its turn, and sees no handler at work.
    while !running.is_finished() {
        let paused = control.pause();
        assert_eq!(inside.load(Ordering::SeqCst), 0);
        drop(paused);
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::PowerOff);
}

#[test]
fn a_vcpu_that_is_alone_across_its_entries_is_the_only_one_that_runs() {
    const ROUNDS: u64 = 200;
    const VCPUS: u64 = 3;
    // Each round between two int3s counts twice.
    let code = assemble(CODE, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        let count = rdi * 8 + i32::try_from(DATA).unwrap();
        a.mov(rcx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(count))?;
        a.int3()?;
        a.inc(qword_ptr(count))?;
        a.int3()?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.lock().inc(qword_ptr(DATA + 0x100))?;
        a.test(rdi, rdi)?;
        a.je(wait)?;
        a.cli()?;
        a.hlt()?;
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(DATA + 0x100), i32::try_from(VCPUS).unwrap())?;
        a.jne(wait)?;
        power_off(a)
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 3, &[]) else { return };
    let control = machine.control();
    let inside = Arc::new(AtomicU64::new(0));
    let handlers = (0..VCPUS).map(|vcpu| {
        let (control, inside) = (control.clone(), Arc::clone(&inside));
        let mut kept = None;
        Scripted::boxed(move |state, memory, stop| {
            assert!(is_int3(&stop));
            let counts = || (0..VCPUS).map(|vcpu| memory.read_u64(Gpa(DATA + 8 * vcpu)).unwrap());
            match kept.take() {
                None => {
                    let alone = control.alone();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    kept = Some((alone, counts().collect::<Vec<_>>()));
                }
                Some((alone, mut before)) => {
                    before[usize::try_from(vcpu).unwrap()] += 1;
                    assert_eq!(counts().collect::<Vec<_>>(), before, "vCPU {vcpu}");
                    assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                    drop(alone);
                }
            }
            state.regs.rip += 1;
            Resume::Run
        })
    });
    let handlers = handlers.collect();
    let running = start(machine, handlers);
    while !running.is_finished() {
        let paused = control.pause();
        assert_eq!(inside.load(Ordering::SeqCst), 0, "a pause from outside comes when none is alone");
        drop(paused);
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::PowerOff);
    for vcpu in 0..VCPUS {
        assert_eq!(word(&memory, DATA + 8 * vcpu), 2 * ROUNDS);
    }
}

/// Is alone from its vCPU's int3 on, until it is settled.
struct AloneUntilSettled {
    control: Control,
    alone: Option<Box<dyn Alone>>,
    settled: Arc<AtomicU64>,
}

impl StopHandler for AloneUntilSettled {
    fn on_stop(&mut self, state: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
        assert!(is_int3(&stop));
        self.alone = Some(self.control.alone());
        state.regs.rip += 1;
        Resume::Run
    }

    fn on_text_write(&mut self, _: &dyn PhysicalMemory, _: Gpa, _: &[u8]) {}

    fn settle(&mut self, _: &mut VcpuState, _: &dyn PhysicalMemory) -> Option<Exception> {
        if self.alone.take().is_some() {
            self.settled.fetch_add(1, Ordering::SeqCst);
        }
        None
    }

    fn wants_breakpoints(&self) -> bool {
        true
    }
}

/// The first vCPU counts for ever, and the second one does behind an int3.
fn second_is_alone(settles: bool) -> Option<(Running, Control, StopHandle, GuestRam, Arc<AtomicU64>)> {
    let code = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.test(rdi, rdi)?;
        a.je(again)?;
        a.int3()?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(rdi * 8 + i32::try_from(DATA).unwrap()))?;
        a.jmp(again)
    });
    let Guest { machine, memory, .. } = guest(&code, 2, &[])?;
    let (control, stop, settled) = (machine.control(), machine.stop_handle(), Arc::default());
    let handler: Box<dyn StopHandler> = if settles {
        Box::new(AloneUntilSettled { control: control.clone(), alone: None, settled: Arc::clone(&settled) })
    } else {
        let (control, mut kept) = (control.clone(), Vec::new());
        Scripted::boxed(move |state, _, stop| {
            assert!(is_int3(&stop));
            kept.push(control.alone());
            state.regs.rip += 1;
            Resume::Run
        })
    };
    let running = start(machine, vec![no_stops(), handler]);
    while word(&memory, DATA + 8) == 0 {
        thread::yield_now();
    }
    Some((running, control, stop, memory, settled))
}

#[test]
fn a_pause_takes_a_vcpu_that_is_alone_out_of_the_guest() {
    let Some((running, control, stop, memory, settled)) = second_is_alone(true) else { return };
    let first = word(&memory, DATA);
    thread::sleep(Duration::from_millis(20));
    assert_eq!((word(&memory, DATA), settled.load(Ordering::SeqCst)), (first, 0));
    let begun = Instant::now();
    let paused = control.pause();
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!((word(&memory, DATA), settled.load(Ordering::SeqCst)), (first, 1));
    drop(paused);
    while word(&memory, DATA) == first {
        thread::yield_now();
    }
    stop.stop();
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::Stopped);
}

#[test]
fn a_run_that_ends_while_a_vcpu_is_alone_leaves_nobody_held() {
    let Some((running, control, stop, ..)) = second_is_alone(false) else { return };
    stop.stop();
    assert_eq!(running.join().unwrap().unwrap().end, RunEnd::Stopped);
    drop(control.pause());
}

#[test]
fn a_panic_of_the_handler_that_paused_the_machine_ends_the_run() {
    let code = crate::common::one_spins_others_break();
    let Some(Guest { machine, .. }) = guest(&code, 3, &[]) else { return };
    let control = machine.control();
    let first = Arc::new(AtomicBool::new(true));
    let both = Arc::new(Barrier::new(2));
    let [one, two] = [(); 2].map(|()| {
        let (control, first, both) = (control.clone(), Arc::clone(&first), Arc::clone(&both));
        Scripted::boxed(move |_, _, _| -> Resume {
            both.wait();
            let _paused = control.pause();
            assert!(!first.swap(false, Ordering::SeqCst), "as planned by the test");
            Resume::Finish
        })
    });
    let start = Instant::now();
    let error = machine.run(vec![no_stops(), one, two]).unwrap_err();
    assert!(matches!(error, RunError::Panicked(VcpuId(1 | 2))), "{error}");
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn what_cannot_be_watched_is_refused_and_nothing_changes() {
    let code = assemble(CODE, power_off);
    let Some(Guest { machine, .. }) = guest(&code, 1, &[DATA]) else { return };
    let control = machine.control();
    let beyond = Gpa(4 << 20);
    assert!(matches!(control.watch(&[Gpa(CODE), beyond]), Err(WatchError::Slots(_))));
    let error = control.unwatch(&[Gpa(CODE)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Page 0x100000 is not watched; release each page as often as it was watched"
    );
    control.unwatch(&[Gpa(DATA + 5)]).unwrap();
    assert_eq!(machine.run(vec![no_stops()]).unwrap().end, RunEnd::PowerOff);
    control.watch(&[Gpa(CODE)]).unwrap();
}
