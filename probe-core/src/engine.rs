//! The engine: takes the stops of all vCPUs and decides how each goes on.
//!
//! One [`Engine`] serves a guest; each vCPU thread drives a [`VcpuEngine`] of its own, so hits on different vCPUs run in
//! parallel. What they share is the patch table (looked up without a lock), the probes' counters and the slots.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use iced_x86::Instruction;

use crate::emulate::{DeferReason, Emulated, emulate};
use crate::fixup::{StepEnd, after_step};
use crate::patch::{ArmError, Code, PatchTable, Place, Site};
use crate::plan::{Plan, check_step, text};
use crate::precheck::{StepHazard, precheck};
use crate::probe::{Executed, Probe, ProbeId, Purpose};
use crate::relocate::relocate;
use crate::slot::{SlotRegion, Slots};
use crate::space::AddressSpace;
use crate::stop::{Cause, Here, Phase, Resume, Stop, StopHandler, classify, dr6};
use crate::{Exception, Gpa, Gva, PhysicalMemory, VcpuId, VcpuState, paging, rflags};

/// A hit, as a sink sees it: the state before the displaced instruction.
#[derive(Clone, Copy, Debug)]
pub struct Hit<'a> {
    /// Which probe.
    pub probe: ProbeId,
    /// Where.
    pub vcpu: VcpuId,
    /// Registers at the hit; RIP is the probe's address.
    pub state: &'a VcpuState,
}

/// Takes the hits of one vCPU, on that vCPU's thread. Must not block.
pub trait HitSink: Send {
    /// Takes a hit, or returns false where there is no room for it: it is then counted as lost.
    fn deliver(&mut self, hit: &Hit<'_>) -> bool;
}

/// What to arm.
#[derive(Clone, Debug)]
pub struct ProbeRequest {
    /// Where.
    pub place: Place,
    /// What for.
    pub purpose: Purpose,
}

/// Something that happened to the probes while the guest ran, for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A probe had to be taken out because its instruction could not be executed out of place after all.
    #[error("Probe at {gva:#x} was taken out: {reason}")]
    Withdrawn {
        /// Its address.
        gva: Gva,
        /// Why.
        reason: String,
    },
    /// The guest frees its init text.
    #[error("Probes in init text were taken out: the guest has booted and frees it")]
    InitTextFreed,
}

type BySite = BTreeMap<Gpa, Vec<Arc<Probe>>>;

/// The probes of one guest.
#[derive(Debug)]
pub struct Engine {
    patches: PatchTable,
    slots: Slots,
    vcpus: usize,
    by_site: ArcSwap<BySite>,
    /// How many probes were ever armed; held while arming and disarming.
    edit: Mutex<u32>,
    /// True while any int3 of ours is in guest memory.
    armed: AtomicBool,
    /// How many more hits may be reported before the run finishes.
    budget: AtomicU64,
    guest_panicked: AtomicBool,
    notices: Mutex<Vec<Notice>>,
}

impl Engine {
    /// An engine without probes for a guest of `vcpus` vCPUs. `max_hits` ends the run after that many reported hits.
    #[must_use]
    pub fn new(region: SlotRegion, vcpus: usize, max_hits: Option<u64>) -> Self {
        Self {
            patches: PatchTable::default(),
            slots: Slots::new(region),
            vcpus,
            by_site: ArcSwap::default(),
            edit: Mutex::new(0),
            armed: AtomicBool::new(false),
            budget: AtomicU64::new(max_hits.unwrap_or(u64::MAX)),
            guest_panicked: AtomicBool::new(false),
            notices: Mutex::new(Vec::new()),
        }
    }

    /// Arms all of the requests, or none.
    ///
    /// # Errors
    /// The first request that cannot be armed, and why.
    pub fn arm(
        &self,
        memory: &dyn PhysicalMemory,
        requests: &[ProbeRequest],
    ) -> Result<Vec<Arc<Probe>>, ArmError> {
        let mut edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let places: Vec<Place> = requests.iter().map(|request| request.place).collect();
        // Breakpoints must exit to the host before the first int3 stands in memory.
        let before = self.armed.fetch_or(!places.is_empty(), Ordering::SeqCst);
        let sites = self.patches.arm(memory, &places).inspect_err(|_| {
            self.armed.store(before, Ordering::SeqCst);
        })?;
        let mut by_site = BySite::clone(&self.by_site.load());
        let mut probes = Vec::with_capacity(sites.len());
        for (request, site) in requests.iter().zip(sites) {
            let gpa = site.place.gpa;
            let probe = Arc::new(Probe::new(ProbeId(*edit), site, request.purpose.clone(), self.vcpus));
            *edit += 1;
            by_site.entry(gpa).or_default().push(Arc::clone(&probe));
            probes.push(probe);
        }
        self.by_site.store(Arc::new(by_site));
        Ok(probes)
    }

    /// Takes out every probe and every trace of the slots: the guest's memory is as if it had never been probed. Only
    /// while no vCPU runs.
    pub fn disarm_all(&self, memory: &dyn PhysicalMemory) {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        self.patches.remove_all(memory);
        self.slots.unmap_all(memory);
        self.armed.store(false, Ordering::SeqCst);
    }

    /// True once a [`Purpose::GuestPanic`] probe was hit.
    #[must_use]
    pub fn guest_panicked(&self) -> bool {
        self.guest_panicked.load(Ordering::SeqCst)
    }

    /// What happened to the probes since the last call.
    #[must_use]
    pub fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn notice(&self, notice: Notice) {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).push(notice);
    }

    /// Takes one from the budget of hits. None where it is used up; otherwise whether this hit is the last one.
    fn spend(&self) -> Option<bool> {
        let spend = |left: u64| left.checked_sub(1);
        let left = self.budget.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).ok()?;
        Some(left == 1)
    }
}

/// A displaced instruction that runs out of line.
#[derive(Debug)]
struct Step {
    gpa: Gpa,
    instruction: Instruction,
    slot: Gva,
    len: u64,
    before: VcpuState,
}

/// Why a displaced instruction does not run out of line.
enum StepRefusal {
    /// It would raise this exception.
    Fault(Exception),
    /// It cannot.
    Impossible(String),
}

/// A fault that a displaced instruction raised: when the guest comes back to it with RFLAGS.RF set, as every fault frame
/// has it (Intel SDM vol. 3B, 19.3.1.1), the hit has been counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Restart {
    pc: Gva,
    rsp: u64,
    cr3: u64,
}

/// The engine as one vCPU drives it.
#[derive(Debug)]
pub struct VcpuEngine<S> {
    engine: Arc<Engine>,
    vcpu: VcpuId,
    step: Option<Step>,
    restart: Option<Restart>,
    sink: S,
}

impl<S: HitSink> VcpuEngine<S> {
    /// The handler for one vCPU.
    pub fn new(engine: Arc<Engine>, vcpu: VcpuId, sink: S) -> Self {
        Self { engine, vcpu, step: None, restart: None, sink }
    }

    fn phase(&self) -> Phase {
        match &self.step {
            Some(step) => Phase::Stepping { slot: step.slot, len: step.len },
            None => Phase::Running,
        }
    }

    /// A vCPU reached an armed site: report it, then run the displaced instruction.
    fn hit(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, gpa: Gpa, site: &Site) -> Resume {
        let pc = Gva(state.regs.rip);
        let code = site.code();
        let by_site = self.engine.by_site.load();
        let probes = by_site.get(&gpa).map_or(&[][..], Vec::as_slice);
        let mut finish = false;
        if !self.is_restart(state) {
            for probe in probes {
                if probe.purpose == Purpose::Report {
                    let Some(last) = self.engine.spend() else { return Resume::Finish };
                    finish |= last;
                }
                probe.count_hit(self.vcpu);
                match &probe.purpose {
                    Purpose::Report | Purpose::Milestone => {
                        let hit = Hit { probe: probe.id, vcpu: self.vcpu, state };
                        let delivered = self.sink.deliver(&hit);
                        probe.count_delivery(self.vcpu, delivered);
                    }
                    Purpose::GuestPanic => {
                        self.engine.guest_panicked.store(true, Ordering::SeqCst);
                    }
                    Purpose::InitTextFreed(range) => {
                        self.engine.patches.remove_range(memory, range);
                        self.engine.notice(Notice::InitTextFreed);
                    }
                }
            }
        }
        if code.is_guest_breakpoint() {
            return Resume::Inject(Exception::Breakpoint);
        }
        // The same page may be mapped at another address than the symbols say, as in early boot.
        let instruction = if pc == site.place.gva { code.instruction } else { code.decode_at(pc) };
        let engine = Arc::clone(&self.engine);
        let merged = MergedMemory { memory, patches: &engine.patches };
        let space = AddressSpace { memory: &merged, pkru: 0 };
        let before = state.regs.rflags;
        let outcome = match code.plan {
            Plan::Emulate => emulate(&instruction, state, &space),
            _ => Emulated::Defer(DeferReason::NotEmulated),
        };
        let (how, resume) = match outcome {
            Emulated::Done => (Executed::Emulated, self.after_instruction(before, 0)),
            Emulated::Halt => (Executed::Emulated, Resume::Halt),
            Emulated::Fault(exception) => (Executed::Faulted, self.fault(state, exception)),
            // With the int3 taken out the guest could go on from here.
            Emulated::Defer(_) if finish => return Resume::Finish,
            Emulated::Defer(_) => match self.begin_step(state, &space, gpa, instruction, &code) {
                Ok(()) => return Resume::Step,
                Err(StepRefusal::Fault(exception)) => (Executed::Faulted, self.fault(state, exception)),
                Err(StepRefusal::Impossible(reason)) => return self.withdraw(memory, site, reason),
            },
        };
        self.count(gpa, how);
        if finish { Resume::Finish } else { resume }
    }

    fn begin_step(
        &mut self,
        state: &mut VcpuState,
        space: &AddressSpace<'_>,
        gpa: Gpa,
        instruction: Instruction,
        code: &Code,
    ) -> Result<(), StepRefusal> {
        let impossible = |reason: &dyn std::fmt::Display| StepRefusal::Impossible(reason.to_string());
        if state.sys.cpl != 0 {
            return Err(impossible(
                &"it would have to run out of line in user mode, where there is no slot yet",
            ));
        }
        check_step(&instruction).map_err(|refusal| impossible(&refusal))?;
        match precheck(&instruction, state, space) {
            Ok(()) => {}
            Err(StepHazard::Fault(exception)) => return Err(StepRefusal::Fault(exception)),
            Err(hazard) => return Err(impossible(&hazard)),
        }
        let near = Gva(instruction.ip());
        let slots = &self.engine.slots;
        let slot =
            slots.map(&state.sys, space.memory, self.vcpu, near).map_err(|error| impossible(&error))?;
        let copy = relocate(code.bytes(), near, slot).map_err(|error| impossible(&error))?;
        space.memory.write(slots.gpa(self.vcpu), copy.bytes()).map_err(|error| impossible(&error))?;
        self.step = Some(Step { gpa, instruction, slot, len: copy.instruction_len() as u64, before: *state });
        state.regs.rip = slot.0;
        Ok(())
    }

    /// Takes a probe out whose instruction turned out to be impossible to execute out of place, and runs it in place.
    fn withdraw(&self, memory: &dyn PhysicalMemory, site: &Site, reason: String) -> Resume {
        self.engine.patches.remove(memory, site);
        self.engine.armed.store(self.engine.patches.any_armed(), Ordering::SeqCst);
        self.engine.notice(Notice::Withdrawn { gva: site.place.gva, reason });
        Resume::Run
    }

    fn end_step(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, guest_dr6: u64) -> Resume {
        let Some(step) = self.step.take() else { return Resume::Run };
        let engine = Arc::clone(&self.engine);
        let merged = MergedMemory { memory, patches: &engine.patches };
        let space = AddressSpace { memory: &merged, pkru: 0 };
        match after_step(&step.instruction, &step.before, state, step.slot, &space) {
            StepEnd::Again => self.step_again(state, &space, step),
            StepEnd::Astray { .. } => astray(&step, state),
            StepEnd::Done => {
                self.count(step.gpa, Executed::Stepped);
                self.after_instruction(step.before.regs.rflags, guest_dr6)
            }
        }
    }

    /// Goes on with a repeated string instruction, whose next iteration may fault.
    fn step_again(&mut self, state: &mut VcpuState, space: &AddressSpace<'_>, step: Step) -> Resume {
        match precheck(&step.instruction, state, space) {
            Ok(()) => {
                state.regs.rip = step.slot.0;
                self.step = Some(step);
                Resume::Step
            }
            Err(StepHazard::Fault(exception)) => {
                self.count(step.gpa, Executed::Faulted);
                self.fault(state, exception)
            }
            Err(hazard) => Resume::Fail {
                reason: format!(
                    "`{}` at {near:#x} cannot go on: {hazard}",
                    text(&step.instruction),
                    near = step.instruction.ip()
                ),
            },
        }
    }

    fn count(&self, gpa: Gpa, how: Executed) {
        for probe in self.engine.by_site.load().get(&gpa).into_iter().flatten() {
            probe.count_executed(self.vcpu, how);
        }
    }

    /// What follows a completed instruction: the guest's own single step, if TF was set before it, and watchpoints.
    fn after_instruction(&mut self, flags_before: u64, guest_dr6: u64) -> Resume {
        self.restart = None;
        let stepped = if flags_before & rflags::TF != 0 { dr6::BS } else { 0 };
        match guest_dr6 | stepped {
            0 => Resume::Run,
            dr6 => Resume::Inject(Exception::Debug { dr6 }),
        }
    }

    /// Gives the guest a fault of the displaced instruction, at the original RIP.
    fn fault(&mut self, state: &VcpuState, exception: Exception) -> Resume {
        self.restart = Some(Restart { pc: Gva(state.regs.rip), rsp: state.regs.rsp, cr3: state.sys.cr3 });
        Resume::Inject(exception)
    }

    fn is_restart(&self, state: &VcpuState) -> bool {
        let here = Restart { pc: Gva(state.regs.rip), rsp: state.regs.rsp, cr3: state.sys.cr3 };
        state.regs.rflags & rflags::RF != 0 && self.restart == Some(here)
    }
}

/// Nothing explains where a vCPU is that should have completed a step.
fn astray(step: &Step, state: &VcpuState) -> Resume {
    Resume::Fail {
        reason: format!(
            "`{}`, displaced from {:#x}, did not complete out of line (the vCPU is now at {:#x}); the guest's exception \
             frame cannot be trusted",
            text(&step.instruction),
            step.instruction.ip(),
            state.regs.rip
        ),
    }
}

impl<S: HitSink> StopHandler for VcpuEngine<S> {
    fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        let pc = Gva(state.regs.rip);
        let gpa = paging::physical(&state.sys, memory, pc);
        let site = gpa.and_then(|gpa| self.engine.patches.find(gpa)).filter(|site| site.is_armed());
        let mut byte = [0];
        let byte = gpa.filter(|gpa| memory.read(*gpa, &mut byte).is_ok()).map(|_| byte[0]);
        let here = Here { armed: site.is_some(), byte };
        match (classify(&stop, pc, self.phase(), here), gpa, site) {
            (Cause::Probe, Some(gpa), Some(site)) => self.hit(state, memory, gpa, &site),
            (Cause::Probe | Cause::GhostBreakpoint, ..) => Resume::Run,
            (Cause::GuestBreakpoint, ..) => Resume::Inject(Exception::Breakpoint),
            (Cause::GuestDebug { dr6 }, ..) => Resume::Inject(Exception::Debug { dr6 }),
            (Cause::StepDone { guest_dr6 }, ..) => self.end_step(state, memory, guest_dr6),
            (Cause::Astray, ..) => self.step.take().map_or(Resume::Run, |step| astray(&step, state)),
            (Cause::EmulatorRefused, ..) => {
                Resume::Fail { reason: "KVM on this host emulates guest kernel code".to_owned() }
            }
        }
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        self.engine.patches.guest_write(memory, gpa, data);
    }

    fn wants_breakpoints(&self) -> bool {
        self.engine.armed.load(Ordering::Relaxed)
    }
}

/// Guest memory as displaced instructions write it: a store to patched text goes under the int3.
struct MergedMemory<'a> {
    memory: &'a dyn PhysicalMemory,
    patches: &'a PatchTable,
}

impl PhysicalMemory for MergedMemory<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), crate::MemoryError> {
        self.memory.read(gpa, buf)
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), crate::MemoryError> {
        if self.patches.covers(gpa, data.len()) {
            self.patches.guest_write(self.memory, gpa, data);
            return Ok(());
        }
        self.memory.write(gpa, data)
    }

    fn compare_exchange(
        &self,
        gpa: Gpa,
        width: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, crate::MemoryError> {
        if !self.patches.covers(gpa, width) {
            return self.memory.compare_exchange(gpa, width, current, new);
        }
        let mut word = [0; 8];
        self.memory.read(gpa, &mut word[..width])?;
        let found = u64::from_le_bytes(word);
        if found == current {
            self.patches.guest_write(self.memory, gpa, &new.to_le_bytes()[..width]);
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
