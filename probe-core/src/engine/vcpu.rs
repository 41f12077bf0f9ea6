//! The engine as one vCPU drives it: what each of its stops is, and who hears of a hit.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::displaced::{Restart, Step, astray};
use super::{Engine, Hit, HitSink, Notice};
use crate::patch::Site;
use crate::probe::Purpose;
use crate::stop::{Cause, Here, Phase, Resume, Stop, StopHandler, classify};
use crate::{Exception, Gpa, Gva, PhysicalMemory, VcpuId, VcpuState, paging};

/// The engine as one vCPU drives it.
#[derive(Debug)]
pub struct VcpuEngine<S> {
    pub(super) engine: Arc<Engine>,
    pub(super) vcpu: VcpuId,
    pub(super) step: Option<Step>,
    pub(super) restart: Option<Restart>,
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
        self.run_displaced(state, memory, gpa, site, &code, finish)
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
