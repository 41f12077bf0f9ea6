//! The engine as one vCPU drives it: what each of its stops is, and who hears of a hit.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::{ArcSwap, Cache};

use super::catchers::Catchers;
use super::displaced::{Interrupted, SlotCopy, Step, after_instruction, astray};
use super::restart::Restart;
use super::{BySite, Engine, EngineError, HitSink, Notice, Report, Users};
use crate::handler::{Call, CallData, Flow, Hit, Verdict};
use crate::paging;
use crate::patch::{Code, INT3, Lookup, Place, Site, Standing};
use crate::probe::{Executed, Kind, Probe, VcpuCounts};
use crate::returns::{Pending, landings};
use crate::stop::{Cause, Here, Phase, Resume, Stop, StopHandler, classify};
use crate::watch::{WatchHits, WatchSet};
use crate::{Exception, Gpa, Gva, InterruptShadow, PhysicalMemory, VcpuId, VcpuState, rflags};

/// The engine as one vCPU drives it.
#[derive(Debug)]
pub struct VcpuEngine<S> {
    pub(super) engine: Arc<Engine>,
    pub(super) vcpu: VcpuId,
    pub(super) step: Option<Step>,
    pub(super) catchers: Catchers,
    pub(super) lookup: Lookup,
    users: Cache<Arc<ArcSwap<BySite>>, Arc<BySite>>,
    /// What this vCPU's slot holds.
    pub(super) copy: Option<SlotCopy>,
    /// Hits from now to the next one that is timed, with that one.
    until_timed: u32,
    sink: S,
}

/// One hit of so many on a vCPU is timed.
const TIMED: u32 = 64;

/// Those who were told of a hit: what becomes of its displaced instruction is theirs too, also when they are disabled or taken
/// out meanwhile.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    users: Option<Arc<Users>>,
    /// By their place among the users; beyond the last bit, whoever is enabled still.
    mask: u64,
    /// It was counted when the instruction was tried before.
    pub(super) counted: bool,
}

impl Told {
    /// All who are enabled.
    fn enabled(users: Option<Arc<Users>>, counted: bool) -> Self {
        let mut told = Self { users, mask: 0, counted };
        let probes = told.users.iter().flat_map(|users| &users.probes);
        let enabled = probes.enumerate().filter(|(_, probe)| probe.is_enabled());
        told.mask = enabled.fold(0, |mask, (place, _)| mask | Self::bit(place));
        told
    }

    fn bit(place: usize) -> u64 {
        u32::try_from(place).ok().and_then(|place| 1_u64.checked_shl(place)).unwrap_or(0)
    }

    fn probes(&self) -> impl Iterator<Item = &Arc<Probe>> {
        let probes = self.users.iter().flat_map(|users| &users.probes).enumerate();
        let told = probes.filter(|(place, probe)| match Self::bit(*place) {
            0 => probe.is_enabled(),
            bit => self.mask & bit != 0,
        });
        told.map(|(_, probe)| probe)
    }
}

/// What the probes of a site want.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// Where the guest is to go on.
    pub flow: Flow,
    /// This was the last hit that is to be reported.
    pub finish: bool,
    /// The machine is to pause.
    pub pause: bool,
}

impl Outcome {
    /// The first probe that sends the guest elsewhere is obeyed.
    pub(super) fn and(self, next: Self) -> Self {
        let flow = if self.flow == Flow::Run { next.flow } else { self.flow };
        Self { flow, finish: self.finish || next.finish, pause: self.pause || next.pause }
    }

    /// How the vCPU goes on, where it went on with `resume` otherwise.
    pub(super) fn resume(self, resume: Resume) -> Resume {
        match resume {
            _ if self.finish => Resume::Finish,
            Resume::Run if self.pause => Resume::Pause,
            resume => resume,
        }
    }
}

impl<S: HitSink> VcpuEngine<S> {
    /// The handler for one vCPU.
    pub fn new(engine: Arc<Engine>, vcpu: VcpuId, sink: S) -> Self {
        let (lookup, users) = (engine.patches.lookup(), Cache::new(Arc::clone(&engine.by_site)));
        Self {
            engine,
            vcpu,
            step: None,
            catchers: Catchers::default(),
            lookup,
            users,
            copy: None,
            until_timed: TIMED,
            sink,
        }
    }

    /// When this hit began, if it is timed.
    #[inline]
    fn begin_timing(&mut self) -> Option<u64> {
        self.until_timed -= 1;
        if self.until_timed == 0 { Some(self.start_of_timed()) } else { None }
    }

    #[cold]
    fn start_of_timed(&mut self) -> u64 {
        self.until_timed = TIMED;
        self.sink.stamp()
    }

    /// The probes at `gpa` have had the host since `start`.
    #[cold]
    fn end_timing(&mut self, gpa: Gpa, start: u64) {
        let took = self.sink.stamp().saturating_sub(start);
        let users = self.users.load().get(&gpa);
        users.into_iter().flat_map(|users| &users.probes).for_each(|probe| probe.add_timed(took));
    }

    fn phase(&self) -> Phase {
        match &self.step {
            Some(step) => Phase::Stepping { at: step.at, len: step.len },
            None => Phase::Running,
        }
    }

    /// A vCPU reached an armed site: tell those who wait for it, then run the displaced instruction.
    #[inline]
    pub(super) fn hit(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        gpa: Gpa,
        site: &Site,
        code: &Arc<Code>,
    ) -> Resume {
        let pc = Gva(state.regs.rip);
        let before = state.regs.rflags;
        let restart = self.take_restart(state);
        // No users where the int3 is the engine's own, or has just lost its last one.
        let counted = restart.is_some_and(|restart| restart.executed);
        let told = Told::enabled(self.users.load().get(&gpa).cloned(), counted);
        if told.users.is_none() && !site.is_enabled() {
            self.tidy(memory, site);
            if !site.is_armed() {
                return Resume::Run;
            }
        }
        let outcome = if restart.is_some() {
            Outcome::default()
        } else {
            match self.tell(state, memory, &told) {
                Some(outcome) => outcome,
                None => return Resume::Finish,
            }
        };
        // A handler says with its verdict where the guest goes on, not with RIP.
        state.regs.rip = pc.0;
        if (outcome.flow != Flow::Run || outcome.pause)
            && let Some(resume) = self.hold_up(state, memory, code, &told, outcome, before)
        {
            return resume;
        }
        self.run_displaced(state, memory, site, code, told, outcome.finish)
    }

    /// A handler sends the guest elsewhere, or wants a pause before the displaced instruction runs: how the vCPU goes on then.
    #[cold]
    fn hold_up(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        code: &Code,
        told: &Told,
        outcome: Outcome,
        flags_before: u64,
    ) -> Option<Resume> {
        let pc = Gva(state.regs.rip);
        if let Some(to) = self.diversion(outcome.flow, state, memory, pc, || code.decode_at(pc).next_ip()) {
            state.regs.rip = to.0;
            state.regs.rflags &= !rflags::RF;
            state.shadow = InterruptShadow::default();
            self.executed(state, memory, told, Executed::Diverted);
            let resume = after_instruction(flags_before, state, 0);
            return Some(outcome.resume(resume));
        }
        if outcome.pause && !outcome.finish {
            // The guest comes back to this hit, which has been told.
            state.regs.rflags |= rflags::RF;
            self.engine.restarts.remember(state, Restart { executed: false });
            return Some(Resume::Pause);
        }
        None
    }

    /// Counts and reports the hit for every probe of the site, and the returns that it is. `None` if the run is to finish
    /// without it.
    fn tell(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, told: &Told) -> Option<Outcome> {
        let mut outcome = Outcome::default();
        for probe in told.probes() {
            match probe.kind {
                Kind::Instruction => outcome = outcome.and(self.take(probe, state, memory, None)?),
                Kind::Return { max_active } => self.enter_call(probe, state, memory, max_active),
                // Watchpoints stand at no site.
                Kind::Access(_) => {}
            }
        }
        if told.users.as_ref().is_some_and(|users| users.returns) {
            let (pc, sp) = (Gva(state.regs.rip), state.regs.rsp);
            while let Some(mut pending) = self.engine.returns.take(pc, sp) {
                outcome = outcome.and(self.take(&pending.probe, state, memory, Some(&mut pending.call))?);
            }
        }
        Some(outcome)
    }

    /// One probe's hit: the handler's verdict, then the sink. `None` where enough have been reported: it does not count any
    /// more, and the run is to finish.
    pub(super) fn take(
        &mut self,
        probe: &Probe,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        mut call: Option<&mut Call>,
    ) -> Option<Outcome> {
        if probe.limited && self.engine.is_spent() {
            return None;
        }
        // Only a handler changes it.
        let before = probe.handler.is_some().then_some(*state);
        let verdict = probe.handler.as_deref().and_then(|handler| {
            self.guarded(probe, state, memory, call.as_deref_mut(), |hit| {
                if hit.call.is_some() { handler.ret(hit) } else { handler.pre(hit) }
            })
        });
        let verdict = verdict.unwrap_or(Verdict::REPORT);
        let finish = verdict.report && probe.limited && self.engine.spend()?;
        let outcome = Outcome { flow: verdict.flow, finish, pause: verdict.pause };
        let Some(counts) = probe.on(self.vcpu) else { return Some(outcome) };
        VcpuCounts::add(&counts.hits);
        let report = Report {
            probe: probe.id,
            cookie: probe.cookie,
            vcpu: self.vcpu,
            state: before.as_ref().unwrap_or(state),
            call: call.as_deref(),
            memory,
        };
        VcpuCounts::add(if !verdict.report {
            &counts.filtered
        } else if self.sink.deliver(&report) {
            &counts.delivered
        } else {
            &counts.lost
        });
        Some(outcome)
    }

    /// A function with a return probe is entered.
    #[inline(never)]
    fn enter_call(
        &mut self,
        probe: &Arc<Probe>,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        most: u32,
    ) {
        let Some(counts) = probe.on(self.vcpu) else { return };
        VcpuCounts::add(&counts.entered);
        let mut call = Call { regs: state.regs, stamp: self.sink.stamp(), data: CallData::default() };
        let awaited = probe.handler.as_deref().is_none_or(|handler| {
            self.guarded(probe, state, memory, Some(&mut call), |hit| handler.entry(hit)).unwrap_or(false)
        });
        if !awaited {
            VcpuCounts::add(&counts.ignored);
            return;
        }
        if !self.await_return(probe, state, memory, call, most) {
            VcpuCounts::add(&counts.missed);
        }
    }

    fn await_return(
        &self,
        probe: &Arc<Probe>,
        state: &VcpuState,
        memory: &dyn PhysicalMemory,
        call: Call,
        most: u32,
    ) -> bool {
        let sp = state.regs.rsp;
        let mut to = [0; 8];
        if paging::read_virtual(&state.sys, memory, Gva(sp), &mut to) != to.len() {
            return false;
        }
        let to = Gva(u64::from_le_bytes(to));
        let unseen = |reason: String| {
            self.engine.notice(Notice::ReturnUnseen { gva: to, reason });
            false
        };
        let Some(landings) = landings(&*self.engine.text, to) else {
            return unseen("the guest rewrites the instruction there and would find an int3".to_owned());
        };
        for gva in &landings {
            // A return address is where an instruction begins; which function it is in does not matter.
            let Some(place) = Place::at(&state.sys, memory, *gva, None) else {
                return unseen("the instruction there is not mapped, or on pages that lie apart".to_owned());
            };
            match self.engine.await_returns(memory, place) {
                Ok(()) => {}
                // Nobody waits for the return any more.
                Err(EngineError::LastProbeGone) => return false,
                Err(error) => return unseen(error.to_string()),
            }
        }
        let pending = Pending { probe: Arc::clone(probe), to, landings, sp, cr3: state.sys.cr3, call };
        self.engine.returns.enter(pending, most)
    }

    /// Where the guest goes on if a handler diverts it, with the rest of the state as it is there.
    pub(super) fn diversion(
        &self,
        flow: Flow,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        pc: Gva,
        next: impl FnOnce() -> u64,
    ) -> Option<Gva> {
        match flow {
            Flow::Run => None,
            Flow::Skip => Some(Gva(next())),
            Flow::Redirect(to) => Some(to),
            Flow::Return(value) => {
                let mut to = [0; 8];
                let sp = Gva(state.regs.rsp);
                if paging::read_virtual(&state.sys, memory, sp, &mut to) != to.len() {
                    self.engine.notice(Notice::NoReturnAddress { gva: pc });
                    return None;
                }
                state.regs.rsp = sp.offset(8).0;
                state.regs.rax = value;
                Some(Gva(u64::from_le_bytes(to)))
            }
        }
    }

    /// Calls a handler. One that panics loses its probe and nothing else: `None`.
    #[inline(never)]
    fn guarded<T>(
        &self,
        probe: &Probe,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        call: Option<&mut Call>,
        handler: impl FnOnce(&mut Hit<'_>) -> T,
    ) -> Option<T> {
        let before = *state;
        let mut hit = Hit { probe: probe.id, vcpu: self.vcpu, state, call, memory, engine: &self.engine };
        // Unwind safety: the state is put back below, and what else a handler reaches is its own.
        match catch_unwind(AssertUnwindSafe(|| handler(&mut hit))) {
            Ok(value) => Some(value),
            Err(panic) => {
                *state = before;
                self.engine.detach(memory, probe, panic_message(&*panic));
                None
            }
        }
    }

    /// The displaced instruction of a site was executed, or raised an exception: counts it, unless that was done when it
    /// was tried before, and tells the handlers. `state` is the one behind it, or at it if it raised an exception.
    #[inline]
    pub(super) fn executed(
        &self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        told: &Told,
        how: Executed,
    ) {
        for probe in told.probes() {
            if !told.counted {
                probe.count_executed(self.vcpu, how);
            }
            let Some(handler) = probe.handler.as_deref() else { continue };
            if probe.kind != Kind::Instruction || !probe.is_enabled() {
                continue;
            }
            self.guarded(probe, state, memory, None, |hit| match how {
                Executed::Emulated | Executed::Stepped => handler.post(hit),
                Executed::Faulted => handler.fault(hit),
                Executed::Halted | Executed::Left | Executed::Diverted => {}
            });
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}

impl<S: HitSink> StopHandler for VcpuEngine<S> {
    fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        if self.has_left_step(state)
            && let Interrupted::Instead(resume) = self.leave_step(state, memory)
        {
            return resume;
        }
        let pc = Gva(state.regs.rip);
        let phase = self.phase();
        let (mut gpa, mut site) = (None, None);
        let here = || {
            gpa = paging::physical(&state.sys, memory, pc);
            let known = gpa.and_then(|gpa| self.lookup.sites().get(&gpa));
            site = known.map(|site| (site.code(), Arc::clone(site)));
            site.take_if(|(code, _)| code.standing != Standing::Armed);
            let mut byte = [INT3];
            let readable = site.is_some() || gpa.is_some_and(|gpa| memory.read(gpa, &mut byte).is_ok());
            Here { armed: site.is_some(), byte: readable.then_some(byte[0]) }
        };
        let watched = match stop {
            Stop::Watchpoint { hits, .. } => hits,
            _ => WatchHits::NONE,
        };
        match (classify(&stop, pc, phase, here), gpa, site) {
            (Cause::Probe, Some(gpa), Some((code, site))) => {
                let start = self.begin_timing();
                let resume = self.hit(state, memory, gpa, &site, &code);
                if let Some(start) = start {
                    self.end_timing(gpa, start);
                }
                resume
            }
            (Cause::Probe | Cause::GhostBreakpoint, ..) => Resume::Run,
            (Cause::GuestBreakpoint, Some(gpa), _) if !self.engine.patches.is_guests_own(memory, gpa) => {
                // A probe came or went between the looks at its site and at its byte: the guest runs what is there now.
                Resume::Run
            }
            (Cause::GuestBreakpoint, ..) => Resume::Inject(Exception::Breakpoint),
            (Cause::Watchpoint { guest_dr6: 0 }, ..) => self.watch_hit(state, memory, watched, Resume::Run),
            (Cause::Watchpoint { guest_dr6: dr6 }, ..) => {
                self.watch_hit(state, memory, watched, Resume::Inject(Exception::Debug { dr6 }))
            }
            (Cause::GuestDebug { dr6 }, ..) => Resume::Inject(Exception::Debug { dr6 }),
            (Cause::StepDone { guest_dr6 }, ..) => {
                let resume = self.end_step(state, memory, guest_dr6);
                self.watch_emulated(state, memory, watched, resume)
            }
            (Cause::Astray, ..) => self.close_step(memory).map_or(Resume::Run, |step| astray(&step, state)),
            (Cause::EmulatorRefused, ..) => {
                Resume::Fail { reason: "KVM on this host emulates guest kernel code".to_owned() }
            }
        }
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        self.engine.patches.guest_write(memory, gpa, data);
    }

    fn settle(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Option<Exception> {
        // What has been taken out is let go of.
        self.lookup.sites();
        self.users.load();
        self.settle_step(state, memory)
    }

    fn wants_breakpoints(&self) -> bool {
        self.engine.armed.load(Ordering::Relaxed)
    }

    fn watchpoints(&self) -> WatchSet {
        if self.engine.any_watches() { self.engine.watches.load().set } else { WatchSet::default() }
    }
}
