//! The engine, as a case needs it: one probe, armed before the run and taken out after it.

use std::sync::Arc;

use probe_core::engine::{Engine, EngineConfig, EngineError, HitSink, Notice, Report, VcpuEngine};
use probe_core::machine::{NotRunning, PlainText};
use probe_core::patch::{ArmError, Place};
use probe_core::plan::Refusal;
use probe_core::probe::{Counts, Probe, ProbeRequest};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{Gpa, Gva, PhysicalMemory, VcpuId, VcpuState, Vendor};
use vmm::layout::SLOTS;

/// A sink that always has room.
struct Counted;

impl HitSink for Counted {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        true
    }
}

/// An armed probe.
pub struct Armed {
    engine: Arc<Engine>,
    vcpu: VcpuEngine<Counted>,
    probe: Arc<Probe>,
}

impl std::fmt::Debug for Armed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Armed").field("probe", &self.probe).finish_non_exhaustive()
    }
}

/// What a probe counted until it was taken out.
#[derive(Clone, Debug)]
pub struct Account {
    /// Its counters.
    pub counts: Counts,
    /// Why the engine took it out by itself, if it did.
    pub withdrawn: Option<String>,
}

impl Armed {
    /// Arms a probe.
    ///
    /// # Errors
    /// Why the engine refuses, in words that do not name the address.
    pub fn new(memory: &dyn PhysicalMemory, gva: Gva, gpa: Gpa, vendor: Vendor) -> Result<Self, String> {
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: SLOTS,
            vcpus: 1,
            vendor,
            max_hits: None,
            stacks_in_whole_pages: false,
            // The one vCPU is at a stop while probes come and go, and its code is watched from the start.
            control: Arc::new(NotRunning),
            text: Arc::new(PlainText),
        }));
        let place = Place { gva, gpa, function: None };
        match engine.arm(memory, &[ProbeRequest::new(place)]) {
            Ok(probes) => {
                let vcpu = VcpuEngine::new(Arc::clone(&engine), VcpuId(0), Counted);
                let probe = probes.into_iter().next().ok_or("no probe was armed")?;
                Ok(Self { engine, vcpu, probe })
            }
            Err(EngineError::Arm(ArmError::Refused(Refusal::Instruction { reason, .. }))) => {
                Err(reason.to_string())
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Gives the engine a stop.
    pub fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        self.vcpu.on_stop(state, memory, stop)
    }

    /// Takes the probe out.
    pub fn disarm(self, memory: &dyn PhysicalMemory) -> Account {
        self.engine.disarm_all(memory);
        let withdrawn = self.engine.take_notices().into_iter().find_map(|notice| match notice {
            Notice::Withdrawn { reason, .. } => Some(reason),
            _ => None,
        });
        Account { counts: self.probe.counts(), withdrawn }
    }
}
