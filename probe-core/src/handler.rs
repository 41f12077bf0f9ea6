//! What a program that embeds the engine does at a hit.
//!
//! The handlers are those of kprobes (Documentation/trace/kprobes.rst), seen from outside: they run on the host, on the
//! thread of the vCPU that hit, while only that vCPU stands still. No guest code runs inside one, so a handler cannot hit
//! a probe, and no hit is ever missed for that reason.

use std::ops::Range;

use std::sync::Arc;

use crate::engine::{Engine, EngineError};
use crate::fetch::Fetch;
use crate::patch::Place;
use crate::probe::{Probe, ProbeId, ProbeRequest};
use crate::{Gva, PhysicalMemory, Registers, VcpuId, VcpuState};

/// Words that a return probe's handler keeps from the entry of a call to its return.
pub type CallData = [u64; 4];

/// A call of a function with a return probe, as it was at the function's entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Registers at the entry; RSP points to the return address.
    pub regs: Registers,
    /// What [`crate::engine::HitSink::stamp`] said then.
    pub stamp: u64,
    /// The handler's own.
    pub data: CallData,
}

/// A hit: the vCPU has stopped before the probed instruction, or, for a return, before the first one behind the call.
pub struct Hit<'a> {
    /// Which probe.
    pub probe: ProbeId,
    /// Where.
    pub vcpu: VcpuId,
    /// Registers and control registers; RIP is the address of the hit. What a handler changes, the guest goes on with; to
    /// go on elsewhere say so with [`Flow`].
    pub state: &'a mut VcpuState,
    /// For a return probe: the call that is entered or has returned.
    pub call: Option<&'a mut Call>,
    pub(crate) memory: &'a dyn PhysicalMemory,
    pub(crate) engine: &'a Engine,
}

impl std::fmt::Debug for Hit<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hit")
            .field("probe", &self.probe)
            .field("vcpu", &self.vcpu)
            .field("state", &self.state)
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

impl Hit<'_> {
    /// Reads guest-virtual memory as the guest has it, without our int3s, whatever its rights say. Returns how many
    /// bytes from the start of `buf` are valid: fewer than asked for where a page is not mapped or not RAM.
    pub fn read(&self, gva: Gva, buf: &mut [u8]) -> usize {
        self.engine.read_virtual(&self.state.sys, self.memory, gva, buf)
    }

    /// Reads a little-endian 64-bit word of guest-virtual memory; `None` where it cannot be read.
    #[must_use]
    pub fn read_u64(&self, gva: Gva) -> Option<u64> {
        let mut word = [0; 8];
        (self.read(gva, &mut word) == word.len()).then(|| u64::from_le_bytes(word))
    }

    /// Writes guest-virtual memory, whatever its rights say; bytes under our int3s go beneath them. Returns how many bytes
    /// were written: fewer than given where a page is not mapped or not RAM.
    pub fn write(&self, gva: Gva, data: &[u8]) -> usize {
        self.engine.write_virtual(&self.state.sys, self.memory, gva, data)
    }

    /// The function's integer argument `number`, counted from 1, at its first instruction (see [`Fetch::Argument`]). At a return,
    /// the argument as it was at the entry; those on the stack are then read now. `None` where the stack cannot be read.
    #[must_use]
    pub fn argument(&self, number: u16) -> Option<u64> {
        let regs = self.call.as_ref().map_or(self.state.regs, |call| call.regs);
        Fetch::Argument(number).value(&VcpuState { regs, ..*self.state }, self.memory)
    }

    /// Arms further probes, or none, from within a handler: those of a module that is being loaded, for one. They take hits when this
    /// returns.
    ///
    /// # Errors
    /// The first request that cannot be armed, and why.
    pub fn arm(&self, requests: &[ProbeRequest]) -> Result<Vec<Arc<Probe>>, EngineError> {
        self.engine.arm_at_hit(self.memory, requests)
    }

    /// The place at a linear address, see [`Place::at`].
    #[must_use]
    pub fn place(&self, gva: Gva, function: Option<Gva>) -> Option<Place> {
        Place::at(&self.state.sys, self.memory, gva, function)
    }

    /// To be called when the guest is about to drop the text in `range`: every probe in it is taken out. Returns how many
    /// that were.
    pub fn text_is_freed(&self, range: &Range<Gva>) -> usize {
        self.engine.drop_text(self.memory, range)
    }
}

/// Where the guest goes on after a hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Flow {
    /// The probed instruction runs.
    #[default]
    Run,
    /// Behind the probed instruction, which does not run. There is no post handler.
    Skip,
    /// At this address, and the probed instruction does not run. There is no post handler.
    Redirect(Gva),
    /// In the caller, as if the function had returned this value at once (RAX; the return address is popped). Only at a
    /// function's first instruction, or behind its ftrace site. There is no post handler.
    Return(u64),
}

/// What a handler decides about a hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Verdict {
    /// Where the guest goes on.
    pub flow: Flow,
    /// Whether the hit goes to the sink; otherwise it is counted as filtered.
    pub report: bool,
    /// Whether the whole machine pauses before the guest goes on. This vCPU then stands at the hit, with RFLAGS.RF set, or
    /// where the handler sent it.
    pub pause: bool,
}

impl Verdict {
    /// Report the hit and run on.
    pub const REPORT: Self = Self { flow: Flow::Run, report: true, pause: false };
    /// Do not report the hit and run on.
    pub const FILTER: Self = Self { flow: Flow::Run, report: false, pause: false };

    /// The same, but the guest goes on elsewhere.
    pub const fn with_flow(self, flow: Flow) -> Self {
        Self { flow, ..self }
    }

    /// The same, but the machine pauses.
    pub const fn and_pause(self) -> Self {
        Self { pause: true, ..self }
    }
}

/// What a probe does besides being counted. One handler serves all vCPUs, at the same time.
///
/// A handler runs on a vCPU's thread: it must not block; of the engine it may use what [`Hit`] offers. One that panics is never
/// called again: its probe is disabled, and the guest goes on as if the handler had said [`Verdict::REPORT`].
pub trait Handler: Send + Sync {
    /// Before the probed instruction runs. Not called for return probes.
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        let _ = hit;
        Verdict::REPORT
    }

    /// After the probed instruction has run; RIP is where the guest goes on. Not called for an instruction that leaves for
    /// good (IRET, SYSRET, a far transfer), or halts.
    fn post(&self, hit: &mut Hit<'_>) {
        let _ = hit;
    }

    /// The probed instruction raised an exception, which the guest is about to handle; RIP is the instruction's. If the guest
    /// comes back to it, it runs again without [`Handler::pre`].
    fn fault(&self, hit: &mut Hit<'_>) {
        let _ = hit;
    }

    /// A function with a return probe is entered; `hit.call` is what will be there at its return. False: its return is
    /// not awaited.
    fn entry(&self, hit: &mut Hit<'_>) -> bool {
        let _ = hit;
        true
    }

    /// A function with a return probe has returned: RIP is in the caller, RAX holds the return value.
    fn ret(&self, hit: &mut Hit<'_>) -> Verdict {
        let _ = hit;
        Verdict::REPORT
    }
}
