//! How a run ended, and what it took.

use std::time::Duration;

use probe_core::{Gva, VcpuId, VcpuState};

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// The guest asked for a reset (i8042 command 0xfe). A Linux guest does so on `reboot=k`, also after a panic with
    /// `panic=-1`.
    Reset,
    /// The guest switched itself off (ACPI S5).
    PowerOff,
    /// Every vCPU sleeps with interrupts off: nothing can ever happen again.
    Halted,
    /// A fault while delivering a double fault.
    TripleFault {
        /// The vCPU.
        vcpu: VcpuId,
        /// RIP where it happened; `None` where the host's CPU has reset it (AMD does).
        rip: Option<Gva>,
    },
    /// A handler answered [`probe_core::stop::Resume::Finish`].
    Finished {
        /// The vCPU.
        vcpu: VcpuId,
    },
    /// [`crate::StopHandle::stop`].
    Stopped,
    /// The machine cannot be trusted any more.
    Failed {
        /// The vCPU.
        vcpu: VcpuId,
        /// What was seen and what to do.
        reason: String,
    },
}

/// How often a vCPU left KVM_RUN, by reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ExitCounts {
    /// Port reads.
    pub port_in: u64,
    /// Port writes.
    pub port_out: u64,
    /// Loads without memory.
    pub mmio_read: u64,
    /// Stores without memory, to watched pages included.
    pub mmio_write: u64,
    /// Breakpoints and single steps.
    pub debug: u64,
    /// KVM's emulator gave up; on a host that emulates kernel code, an int3.
    pub emulation_failure: u64,
    /// Signals, and ends of accesses within a step.
    pub interrupted: u64,
    /// All others.
    pub other: u64,
}

/// How many ioctls a vCPU took.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct IoctlCounts {
    /// KVM_RUN.
    pub run: u64,
    /// KVM_SET_GUEST_DEBUG.
    pub set_guest_debug: u64,
    /// All others.
    pub other: u64,
}

impl IoctlCounts {
    /// What was counted since `before`.
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            run: self.run - before.run,
            set_guest_debug: self.set_guest_debug - before.set_guest_debug,
            other: self.other - before.other,
        }
    }
}

/// One vCPU's share of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VcpuReport {
    /// The vCPU.
    pub vcpu: VcpuId,
    /// Exits.
    pub exits: ExitCounts,
    /// Ioctls since the run began.
    pub ioctls: IoctlCounts,
    /// Its state at the end.
    pub state: VcpuState,
}

/// A run that has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunReport {
    /// Why.
    pub end: RunEnd,
    /// Each vCPU, by index.
    pub vcpus: Vec<VcpuReport>,
    /// Wall time from the first entry to the last exit.
    pub wall: Duration,
}
