//! Displaced instructions above CPL 0, which run in their place.

use std::sync::{Condvar, atomic::AtomicUsize};
use std::thread;

use super::out_of_line::{GENERAL_PROTECTION, PAGE_FAULT, Seen, handler};
use super::*;
use crate::handler::{Hit, Verdict};
use crate::machine::{Alone, ControlError};
use crate::mock::OperationKind;

const NMI: u8 = 2;
const DEBUG: u8 = 1;
const NOP: u8 = 0x90;
/// Where the CPU pushes frames that come from user mode.
const KERNEL_STACK: u64 = 0x9000;
/// CS and SS of user mode.
const SELECTORS: [u64; 2] = [0x33, 0x2b];
const ON: u64 = rflags::FIXED | rflags::IF;

const LOAD: &[u8] = &[0x0f, 0x10, 0x07, NOP, NOP, 0xc3]; // movups (%rdi),%xmm0; nop; nop; ret
const LEN: u64 = 3;
const INT_80: &[u8] = &[0xcd, 0x80, NOP]; // int $0x80; nop

/// What happens to the guest while the others are being held.
type Meanwhile = Box<dyn Fn() + Send + Sync>;

/// A machine that tells whether one vCPU is alone; another one that wants to be waits.
#[derive(Default)]
struct Machine {
    alone: Mutex<bool>,
    changed: Condvar,
    times: AtomicUsize,
    watched: Mutex<BTreeMap<Gpa, i32>>,
    refused: Mutex<Option<Gpa>>,
    meanwhile: Mutex<Option<Meanwhile>>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Held(Arc<Machine>);

impl Alone for Held {}

impl Drop for Held {
    fn drop(&mut self) {
        *self.0.alone.lock().unwrap() = false;
        self.0.changed.notify_one();
    }
}

#[derive(Debug)]
struct Control(Arc<Machine>);

impl Control {
    fn change(&self, pages: &[Gpa], by: i32) -> Result<(), ControlError> {
        let refused = *self.0.refused.lock().unwrap();
        if pages.iter().any(|page| refused == Some(*page)) {
            return Err(ControlError::Watch { reason: "no slot left".into() });
        }
        pages.iter().for_each(|page| *self.0.watched.lock().unwrap().entry(*page).or_default() += by);
        Ok(())
    }
}

impl MachineControl for Control {
    fn watch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        self.change(pages, 1)
    }

    fn unwatch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        self.change(pages, -1)
    }

    fn guest_breakpoints(&self) -> usize {
        0
    }

    fn alone(&self) -> Box<dyn Alone> {
        let mut alone = self.0.alone.lock().unwrap();
        while *alone {
            alone = self.0.changed.wait(alone).unwrap();
        }
        *alone = true;
        self.0.times.fetch_add(1, Ordering::Relaxed);
        if let Some(meanwhile) = self.0.meanwhile.lock().unwrap().take() {
            meanwhile();
        }
        Box::new(Held(Arc::clone(&self.0)))
    }

    fn synchronise(&self) {}
}

/// A guest whose vCPU is in user mode, at a probed instruction.
struct User {
    guest: Guest,
    probe: Arc<Probe>,
    machine: Arc<Machine>,
    code: Vec<u8>,
}

impl User {
    fn new(code: &[u8]) -> Self {
        let (mut guest, probe) = Guest::with_table(code);
        guest.engine.remove(&guest.memory, &probe);
        let mut tables = MockPageTables::new(&guest.memory, ROOT, 4);
        tables.map(TEXT, TEXT_GPA, 0x1000, entry::PRESENT | entry::USER);
        let machine = Arc::new(Machine::default());
        guest.engine = Arc::new(engine(None, Arc::new(Control(Arc::clone(&machine)))));
        guest.cpu = VcpuEngine::new(Arc::clone(&guest.engine), VcpuId(0), Sink::default());
        let probe = guest.arm(0);
        guest.state.sys.cpl = 3;
        Self { guest, probe, machine, code: code.to_vec() }
    }

    /// Hits the probe; the step is then open.
    fn enter(&mut self) {
        assert_eq!(self.guest.breakpoint(), Resume::Run);
        assert_eq!(self.guest.state.regs.rip, TEXT.0);
        assert!(self.is_alone());
        assert_eq!(self.guest.byte(0), self.code[0]);
    }

    fn is_alone(&self) -> bool {
        *self.machine.alone.lock().unwrap()
    }

    /// No step is open: the int3 stands, nothing else does, and the others run.
    fn assert_closed(&self) {
        assert!(!self.is_alone());
        let text = self.guest.memory.bytes(TEXT_GPA, self.code.len());
        assert_eq!(text, [&[INT3], &self.code[1..]].concat());
    }

    /// An event as the CPU delivers it.
    fn event(&mut self, vector: u8, code: Option<u64>, rf: u64) {
        let state = &mut self.guest.state;
        let stack = if state.sys.cpl == 0 { state.regs.rsp & !0xf } else { KERNEL_STACK };
        let [cs, ss] = if state.sys.cpl == 0 { [0x10, 0x18] } else { SELECTORS };
        let frame = [state.regs.rip, cs, state.regs.rflags | rf, state.regs.rsp, ss];
        let words: Vec<u64> = code.into_iter().chain(frame).collect();
        state.regs.rsp = stack - 8 * words.len() as u64;
        for (at, word) in (state.regs.rsp..).step_by(8).zip(words) {
            self.guest.memory.load(Gpa(at), &word.to_le_bytes());
        }
        state.regs.rip = handler(vector).0;
        state.regs.rflags &= !(rflags::IF | rflags::TF | rflags::RF);
        state.sys.cpl = 0;
    }

    /// IRETQ from the handler to user mode.
    fn return_from(&mut self, code: bool) {
        self.guest.return_from(code);
        self.guest.state.sys.cpl = 3;
    }

    fn counts(&self) -> Counts {
        self.probe.counts()
    }
}

fn at(offset: u64, rflags: u64) -> Seen {
    Seen { rip: TEXT.0 + offset, rflags, rsp: STACK.0 }
}

/// One hit, of which nothing else has come.
fn one_hit() -> Counts {
    Counts { hits: 1, delivered: 1, ..Counts::default() }
}

#[test]
fn an_instruction_in_user_mode_runs_in_its_place_between_four_writes() {
    let mut user = User::new(LOAD);
    // Establishes the catchers.
    user.enter();
    user.guest.guard(LEN);
    user.assert_closed();
    let tables = user.guest.memory.bytes(ROOT, 0x4000);
    user.guest.state.regs.rip = TEXT.0;
    user.guest.state.regs.rflags |= rflags::TF;
    user.guest.memory.clear_log();

    user.enter();
    assert_eq!(user.guest.byte(LEN), INT3);
    assert_eq!(user.guest.state.regs.rflags, rflags::FIXED | rflags::RF);
    assert_eq!(user.guest.guard(LEN), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
    user.assert_closed();
    assert_eq!((user.guest.state.regs.rip, user.guest.state.regs.rflags), (TEXT.0 + LEN, ON | rflags::TF));
    let write = |offset: u64, byte| Operation::Write { gpa: TEXT_GPA.offset(offset), data: vec![byte] };
    let expected = [write(LEN, INT3), write(0, LOAD[0]), write(LEN, NOP), write(0, INT3)];
    assert_eq!(user.guest.memory.writes(), expected);
    assert_eq!(user.counts(), Counts { hits: 2, delivered: 2, stepped: 2, ..Counts::default() });
    assert_eq!(user.guest.memory.bytes(ROOT, 0x4000), tables, "no slot is mapped");
}

#[test]
fn a_fault_in_user_mode_shows_the_flags_from_before_and_its_retry_is_the_same_hit() {
    for (vector, code) in [(PAGE_FAULT, Some(4)), (GENERAL_PROTECTION, Some(0)), (6, None)] {
        let mut user = User::new(LOAD);
        user.guest.state.regs.rflags |= rflags::TF;
        user.enter();
        // As on TCG, which leaves RF out.
        user.event(vector, code, 0);
        user.guest.state.sys.cr2 = TEXT.0 + 1;
        user.guest.catch(vector);
        user.assert_closed();
        assert_eq!(user.guest.frame(code.is_some()), at(0, ON | rflags::TF | rflags::RF));
        assert_eq!(user.guest.state.sys.cr2, TEXT.0 + 1);
        let faulted = Counts { faulted: 1, ..one_hit() };
        assert_eq!(user.counts(), faulted);
        user.return_from(code.is_some());
        user.enter();
        assert_eq!(user.guest.guard(LEN), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
        assert_eq!(user.counts(), faulted, "the same hit");
        user.assert_closed();
    }
}

#[test]
fn an_nmi_in_user_mode_finds_the_instruction_complete_or_not_begun() {
    let mut user = User::new(LOAD);
    user.enter();
    user.event(NMI, None, 0);
    user.guest.catch(NMI);
    user.assert_closed();
    assert_eq!(user.guest.frame(false), at(0, ON | rflags::RF));
    assert_eq!(user.counts(), one_hit());
    user.return_from(false);
    user.enter();
    user.guest.state.regs.rip += LEN;
    user.event(NMI, None, 0);
    user.guest.catch(NMI);
    user.assert_closed();
    assert_eq!(user.guest.frame(false), at(LEN, ON));
    assert_eq!(user.counts(), Counts { stepped: 1, ..one_hit() });
}

#[test]
fn an_nmi_on_top_of_a_fault_in_user_mode_closes_the_step() {
    let mut user = User::new(LOAD);
    user.enter();
    user.event(PAGE_FAULT, Some(4), rflags::RF);
    let fault = user.guest.state.regs.rsp;
    user.event(NMI, None, 0);
    user.guest.catch(NMI);
    user.assert_closed();
    assert_eq!(user.guest.memory.word(Gpa(fault + 24)), ON | rflags::RF);
    user.guest.return_from(false);
    user.guest.catch(PAGE_FAULT);
    assert_eq!(user.counts(), Counts { faulted: 1, ..one_hit() });
}

#[test]
fn int_n_in_user_mode_shows_the_guests_flags_or_faults_where_it_stands() {
    for (vector, code, offset, rf) in [(0x80, None, 2, 0), (GENERAL_PROTECTION, Some(0x402), 0, rflags::RF)] {
        let mut user = User::new(INT_80);
        user.enter();
        user.guest.state.regs.rip += offset;
        user.event(vector, code, rf);
        user.guest.catch(vector);
        user.assert_closed();
        assert_eq!(user.guest.frame(code.is_some()), at(offset, ON | rf));
        assert!(!user.guest.caught(0x80));
        let counts = user.counts();
        assert_eq!((counts.stepped, counts.faulted), (u64::from(rf == 0), u64::from(rf != 0)));
    }
}

#[test]
fn a_vcpu_that_is_settled_lets_the_others_go_on() {
    let mut user = User::new(LOAD);
    for behind in [0, LEN] {
        user.enter();
        user.guest.state.regs.rip += behind;
        assert_eq!(user.guest.cpu.settle(&mut user.guest.state, &user.guest.memory), None);
        user.assert_closed();
        let rf = if behind == 0 { rflags::RF } else { 0 };
        assert_eq!((user.guest.state.regs.rip, user.guest.state.regs.rflags), (TEXT.0 + behind, ON | rf));
    }
    assert_eq!(user.counts(), Counts { stepped: 1, ..one_hit() });
    // In the handler of its fault.
    user.guest.state.regs.rip = TEXT.0;
    user.enter();
    user.event(PAGE_FAULT, Some(4), rflags::RF);
    assert_eq!(user.guest.cpu.settle(&mut user.guest.state, &user.guest.memory), None);
    user.assert_closed();
    assert_eq!(user.guest.frame(true), at(0, ON | rflags::RF));
}

#[test]
fn a_stop_elsewhere_ends_the_run_and_leaves_no_guard() {
    let mut user = User::new(LOAD);
    user.enter();
    user.guest.state.regs.rip = TEXT.0 + 5;
    assert!(matches!(user.guest.breakpoint(), Resume::Fail { .. }));
    user.assert_closed();
}

#[test]
fn a_frame_of_the_kernels_at_the_same_address_is_not_the_steps() {
    let mut user = User::new(LOAD);
    user.enter();
    user.event(PAGE_FAULT, Some(0), rflags::RF);
    let cs = user.guest.state.regs.rsp + 16;
    user.guest.memory.load(Gpa(cs), &0x10_u64.to_le_bytes());
    assert!(matches!(user.guest.breakpoint(), Resume::Fail { .. }));
}

#[test]
fn an_engine_that_is_dropped_in_a_step_lets_the_others_go_on_and_disarming_clears_the_text() {
    let mut user = User::new(LOAD);
    user.enter();
    let other = VcpuEngine::new(Arc::clone(&user.guest.engine), VcpuId(0), Sink::default());
    drop(std::mem::replace(&mut user.guest.cpu, other));
    assert!(!user.is_alone());
    user.guest.engine.disarm_all(&user.guest.memory);
    assert_eq!(user.guest.memory.bytes(TEXT_GPA, LOAD.len()), LOAD);
}

#[test]
fn the_guard_stands_on_a_site_and_on_a_breakpoint_of_the_guests_too() {
    let mut user = User::new(LOAD);
    let next = user.guest.arm(LEN);
    user.enter();
    // The site goes meanwhile, and comes back.
    user.guest.engine.disable(&user.guest.memory, &next);
    assert_eq!(user.guest.byte(LEN), INT3);
    user.guest.guard(LEN);
    assert_eq!(user.guest.byte(LEN), NOP);
    assert!(!user.is_alone());
    user.guest.state.regs.rip = TEXT.0;
    user.enter();
    user.guest.engine.enable(&user.guest.memory, &next).unwrap();
    user.guest.guard(LEN);
    assert_eq!(user.guest.byte(LEN), INT3);
    assert_eq!(next.counts().hits, 0);

    let mut user = User::new(&[0x0f, 0x10, 0x07, INT3, 0xc3]); // movups (%rdi),%xmm0; int3; ret
    user.enter();
    assert_eq!(user.guest.guard(LEN), Resume::Run);
    user.assert_closed();
    assert_eq!(user.guest.breakpoint(), Resume::Inject(Exception::Breakpoint));
    assert_eq!(user.guest.state.regs.rip, TEXT.0 + LEN);
}

/// A guest whose probed instruction ends with its page; `next_page` is what is mapped behind that.
fn at_page_end(next_page: Option<(Gpa, &[u8])>) -> (User, VcpuState) {
    let mut user = User::new(LOAD);
    let offset = 0x1000 - LEN;
    user.guest.engine.remove(&user.guest.memory, &user.probe);
    user.guest.memory.load(TEXT_GPA.offset(offset), &LOAD[..3]);
    let mut tables = MockPageTables::new(&user.guest.memory, Gpa(0x11_0000), 4);
    tables.map_identity(0x1_0000, RW);
    tables.map(TEXT, TEXT_GPA, 0x1000, entry::PRESENT | entry::USER);
    if let Some((gpa, bytes)) = next_page {
        tables.map(TEXT.offset(0x1000), gpa, 0x1000, entry::PRESENT | entry::USER);
        if !bytes.is_empty() {
            user.guest.memory.load(gpa, bytes);
        }
    }
    user.probe = user.guest.arm_request(ProbeRequest::new(Place { function: None, ..place(offset) }));
    user.guest.state.sys.cr3 = 0x11_0000;
    user.guest.state.regs.rip = TEXT.0 + offset;
    let state = user.guest.state;
    (user, state)
}

#[test]
fn at_the_end_of_a_page_the_guard_is_in_the_next_one_which_is_watched_for_the_step() {
    let elsewhere = Gpa(0xa000);
    let (mut user, state) = at_page_end(Some((elsewhere, LOAD)));
    let watched = |user: &User| user.machine.watched.lock().unwrap().get(&elsewhere).copied();
    assert_eq!(user.guest.breakpoint(), Resume::Run);
    assert_eq!((user.guest.memory.bytes(elsewhere, 1), watched(&user)), (vec![INT3], Some(1)));
    assert_eq!(user.guest.guard(LEN), Resume::Run);
    assert_eq!((user.guest.memory.bytes(elsewhere, 1), watched(&user)), (vec![LOAD[0]], Some(0)));
    // It cannot be watched.
    *user.machine.refused.lock().unwrap() = Some(elsewhere);
    user.guest.state = state;
    assert_eq!(user.guest.breakpoint(), Resume::Run);
    assert_withdrawn(&user, "no slot left");
}

#[test]
fn where_nothing_is_mapped_behind_the_instruction_the_page_fault_there_ends_it() {
    let (mut user, _) = at_page_end(None);
    assert_eq!(user.guest.breakpoint(), Resume::Run);
    assert!(user.is_alone());
    user.guest.state.regs.rip += LEN;
    user.guest.state.sys.cr2 = TEXT.0 + 0x1000;
    user.event(PAGE_FAULT, Some(0x14), rflags::RF);
    user.guest.catch(PAGE_FAULT);
    assert!(!user.is_alone());
    assert_eq!(user.guest.frame(true).rip, TEXT.0 + 0x1000);
    assert_eq!(user.counts(), Counts { stepped: 1, ..one_hit() });
}

/// The probe is gone with the reason, the guest is where it was, and nobody is held.
fn assert_withdrawn(user: &User, reason: &str) {
    let notices = user.guest.engine.take_notices();
    let [Notice::Withdrawn { gva, reason: told }] = &notices[..] else { panic!("{notices:?}") };
    assert!(told.contains(reason), "{told}");
    assert_eq!(gva.0, user.guest.state.regs.rip);
    assert!(!user.is_alone() && user.guest.cpu.step.is_none());
    assert_eq!(user.guest.state.regs.rflags & (rflags::RF | rflags::IF), rflags::IF);
    let offset = gva.0 - TEXT.0;
    assert_ne!(user.guest.byte(offset), INT3);
    assert!(!user.guest.caught(PAGE_FAULT) && !user.guest.caught(0x80), "no catcher is left either");
}

#[test]
fn what_cannot_run_in_its_place_is_withdrawn_and_holds_nobody() {
    let (mut user, _) = at_page_end(Some((Gpa(0xc000_0000), &[])));
    assert_eq!(user.guest.breakpoint(), Resume::Run);
    assert_withdrawn(&user, "no RAM");

    type Change = fn(&mut Guest);
    let cases: [(&[u8], Change, &str); 6] = [
        (LOAD, |guest| guest.state.sys.long_code = false, "32-bit code"),
        (&[0x48, 0xcf, NOP], |_| (), "nothing stops it"), // iretq
        (&[0xc7, 0xf8, 0x10, 0, 0, 0, NOP], |_| (), "transaction"), // xbegin .+0x16
        (LOAD, |guest| guest.set_gate(PAGE_FAULT, Gva(0x7777_0000), 0xe), "exception 14"),
        (LOAD, |guest| guest.set_gate(8, Gva(0x7777_0000), 0xe), "exception 8"),
        (INT_80, |guest| guest.set_gate(0x80, Gva(0x7777_0000), 0xe), "0x77770000"),
    ];
    for (code, change, reason) in cases {
        let mut user = User::new(code);
        change(&mut user.guest);
        assert_eq!(user.guest.breakpoint(), Resume::Run, "{reason}");
        assert_withdrawn(&user, reason);
    }
}

#[test]
fn a_handler_that_cannot_be_watched_keeps_the_instruction_from_running() {
    let mut user = User::new(LOAD);
    user.guest.set_gate(GENERAL_PROTECTION, Gva(0x6000), 0xe);
    *user.machine.refused.lock().unwrap() = Some(Gpa(0x6000));
    assert_eq!(user.guest.breakpoint(), Resume::Run);
    assert_withdrawn(&user, "exception 13, at 0x6000");
}

#[test]
fn a_handler_that_the_cpu_cannot_fetch_need_not_be_held() {
    // As Linux leaves gates that it never uses: what they lead to has been freed.
    let mut user = User::new(LOAD);
    let vector = 22;
    let freed = Gva(0x6000);
    user.guest.set_gate(vector, freed, 0xe);
    MockPageTables::new(&user.guest.memory, ROOT, 4).map(freed, Gpa(freed.0), 0x1000, RW | entry::NO_EXECUTE);
    user.guest.memory.load(Gpa(freed.0), &[NOP; 16]);
    user.enter();
    assert_eq!(user.guest.memory.bytes(Gpa(freed.0), 1), [NOP], "it is no text any more");
    // The event comes, and the page fault at its handler is caught.
    user.event(vector, None, rflags::RF);
    user.guest.state.regs.rip = freed.0;
    user.event(PAGE_FAULT, Some(0x11), rflags::RF);
    user.guest.catch(PAGE_FAULT);
    user.assert_closed();
    assert_eq!(user.guest.memory.word(Gpa(KERNEL_STACK - 40)), TEXT.0);
    assert_eq!(user.guest.memory.word(Gpa(KERNEL_STACK - 24)), ON | rflags::RF);
}

#[test]
fn a_write_that_fails_leaves_the_text_as_it_was_and_a_later_hit_is_retried() {
    for (nth, reason) in [(1, Some("no RAM")), (2, None)] {
        let mut user = User::new(LOAD);
        user.enter();
        user.guest.guard(LEN);
        user.guest.state.regs.rip = TEXT.0;
        user.guest.memory.clear_log();
        user.guest.memory.fail(OperationKind::Write, nth);
        assert_eq!(user.guest.breakpoint(), Resume::Run);
        assert_eq!(user.guest.memory.pending_failures(), 0);
        assert!(!user.is_alone());
        assert_eq!(user.guest.byte(LEN), NOP);
        if let Some(reason) = reason {
            assert!(user.guest.engine.take_notices()[0].to_string().contains(reason));
        } else {
            user.assert_closed();
            user.enter();
            user.guest.guard(LEN);
            assert_eq!(user.counts(), Counts { hits: 2, delivered: 2, stepped: 2, ..Counts::default() });
        }
    }
}

#[test]
fn what_the_guest_changes_before_the_others_are_held_is_looked_at_again() {
    // Its text.
    let mut user = User::new(LOAD);
    let (engine, memory) = (Arc::clone(&user.guest.engine), Arc::new(MockMemory::new()));
    let all = [(Gpa(0), 0x1_0000), (TEXT_GPA, 0x2000), (ROOT, 0x8000), (REGION.base, 0x1000)];
    for (gpa, len) in all {
        memory.load(gpa, &user.guest.memory.bytes(gpa, len));
    }
    let text = Arc::clone(&memory);
    let rewrite: Meanwhile =
        Box::new(move || engine.patches.guest_write(&*text, TEXT_GPA, &[0x0f, 0x10, 0x06]));
    *user.machine.meanwhile.lock().unwrap() = Some(rewrite);
    let hit = |user: &mut User| {
        let pc = Gva(user.guest.state.regs.rip);
        let resume = user.guest.cpu.on_stop(&mut user.guest.state, &*memory, Stop::Breakpoint { pc });
        assert_eq!(resume, Resume::Run);
    };
    hit(&mut user);
    assert!(!user.is_alone());
    assert_eq!((user.guest.state.regs.rip, user.guest.state.regs.rflags), (TEXT.0, ON | rflags::RF));
    assert_eq!(memory.bytes(TEXT_GPA, 3), [INT3, 0x10, 0x06]);
    hit(&mut user);
    assert!(user.is_alone());
    assert_eq!(memory.bytes(TEXT_GPA, 3), [0x0f, 0x10, 0x06]);
    user.guest.state.regs.rip += LEN;
    hit(&mut user);
    assert_eq!(user.counts(), Counts { stepped: 1, ..one_hit() });

    // Its page tables.
    user.guest.state.regs.rip = TEXT.0;
    let tables = Arc::clone(&memory);
    *user.machine.meanwhile.lock().unwrap() = Some(Box::new(move || {
        MockPageTables::new(&tables, ROOT, 4).map(TEXT, Gpa(0xa000), 0x1000, entry::PRESENT);
    }));
    hit(&mut user);
    assert!(!user.is_alone() && user.guest.cpu.step.is_none());
    assert_eq!(user.guest.state.regs.rip, TEXT.0);
}

#[test]
fn probes_come_and_go_while_their_instruction_runs_in_its_place() {
    let mut user = User::new(LOAD);
    let memory = |user: &User| user.guest.memory.bytes(TEXT_GPA, LOAD.len());
    let open = [&LOAD[..3], &[INT3], &LOAD[4..]].concat();
    // Disabled and enabled again.
    user.enter();
    user.guest.engine.disable(&user.guest.memory, &user.probe);
    assert_eq!(memory(&user), open);
    user.guest.engine.enable(&user.guest.memory, &user.probe).unwrap();
    assert_eq!(memory(&user), open);
    assert_eq!(user.guest.guard(LEN), Resume::Run);
    user.assert_closed();
    // Another one in its stead.
    user.guest.state.regs.rip = TEXT.0;
    user.enter();
    user.guest.engine.remove(&user.guest.memory, &user.probe);
    let again = user.guest.arm(0);
    assert_eq!(memory(&user), open);
    assert_eq!(user.guest.guard(LEN), Resume::Run);
    user.assert_closed();
    assert_eq!(again.counts().hits, 0);
    // Gone.
    user.guest.state.regs.rip = TEXT.0;
    user.enter();
    user.guest.engine.disable(&user.guest.memory, &again);
    assert_eq!(user.guest.guard(LEN), Resume::Run);
    assert_eq!((memory(&user), user.is_alone()), (LOAD.to_vec(), false));
}

#[test]
fn what_the_instruction_writes_over_itself_and_the_guard_comes_out_beneath_them() {
    let mut user = User::new(LOAD);
    user.enter();
    // movups (%rsi),%xmm0; ret
    let written = [0x0f, 0x10, 0x06, 0xc3];
    user.guest.cpu.on_text_write(&user.guest.memory, TEXT_GPA, &written);
    assert_eq!(user.guest.memory.bytes(TEXT_GPA, 4), [0x0f, 0x10, 0x06, INT3]);
    assert_eq!(user.guest.guard(LEN), Resume::Run);
    assert_eq!(user.guest.memory.bytes(TEXT_GPA, 4), [INT3, 0x10, 0x06, 0xc3]);
    user.guest.engine.disarm_all(&user.guest.memory);
    assert_eq!(user.guest.memory.bytes(TEXT_GPA, 4), written);
}

#[test]
fn handlers_run_when_the_others_do_again() {
    struct Look(Arc<Machine>, Arc<Mutex<Vec<(&'static str, bool)>>>);
    impl Look {
        fn note(&self, what: &'static str) {
            self.1.lock().unwrap().push((what, *self.0.alone.lock().unwrap()));
        }
    }
    impl Handler for Look {
        fn pre(&self, _: &mut Hit<'_>) -> Verdict {
            self.note("pre");
            Verdict::REPORT
        }
        fn post(&self, _: &mut Hit<'_>) {
            self.note("post");
        }
        fn fault(&self, _: &mut Hit<'_>) {
            self.note("fault");
        }
    }
    let mut user = User::new(LOAD);
    user.guest.engine.remove(&user.guest.memory, &user.probe);
    let log = Arc::new(Mutex::new(Vec::new()));
    user.guest.arm_with(0, Look(Arc::clone(&user.machine), Arc::clone(&log)));
    user.enter();
    user.event(DEBUG, None, rflags::RF);
    user.guest.catch(DEBUG);
    user.return_from(false);
    user.enter();
    user.guest.guard(LEN);
    assert_eq!(*log.lock().unwrap(), [("pre", false), ("fault", false), ("post", false)]);
}

#[test]
fn vcpus_in_user_mode_take_turns() {
    const HITS: u64 = 2001;
    const STEPPED: u64 = HITS / 3 * 2;
    const VCPUS: u32 = 2;
    let User { guest, probe, machine, code } = User::new(LOAD);
    let Guest { memory, state, engine, .. } = guest;
    let run = |vcpu: u32| {
        let mut cpu = VcpuEngine::new(Arc::clone(&engine), VcpuId(vcpu), Sink::default());
        let mut start = state;
        start.regs.rsp -= 0x100 * u64::from(vcpu);
        for round in 0..HITS {
            let mut state = start;
            let mut stop = |state: &mut VcpuState, offset| {
                let pc = TEXT.offset(offset);
                state.regs.rip = pc.0;
                assert_eq!(cpu.on_stop(state, &memory, Stop::Breakpoint { pc }), Resume::Run);
                cpu.step.is_some()
            };
            assert!(stop(&mut state, 0));
            assert_eq!(memory.bytes(TEXT_GPA, 4), [&code[..3], &[INT3]].concat());
            if round % 3 == 0 {
                cpu.settle(&mut state, &memory);
                assert_eq!(state.regs.rip, TEXT.0);
                continue;
            }
            thread::yield_now();
            assert!(!stop(&mut state, LEN));
        }
    };
    thread::scope(|scope| {
        for vcpu in 0..VCPUS {
            let run = &run;
            scope.spawn(move || run(vcpu));
        }
    });
    assert_eq!(memory.bytes(TEXT_GPA, 4), [&[INT3], &code[1..4]].concat());
    let counts = probe.counts();
    assert_eq!((counts.hits, counts.stepped), (HITS * u64::from(VCPUS), STEPPED * u64::from(VCPUS)));
    assert!(machine.times.load(Ordering::Relaxed) as u64 >= counts.hits);
}
