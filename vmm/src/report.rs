//! How a run ended, and what it took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use probe_core::{Gva, VcpuId, VcpuState};

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RunEnd {
    /// The guest asked for a reset (i8042 command 0xfe). A Linux guest does so to reboot, also after a panic with
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

macro_rules! exit_counts {
    ($($(#[$doc:meta])* $name:ident)*) => {
        /// How often a vCPU left KVM_RUN, by reason.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
        pub struct ExitCounts { $($(#[$doc])* pub $name: u64),* }

        impl ExitCounts {
            /// The reasons, by the names of the fields, and how often each came.
            pub fn by_reason(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),*].into_iter()
            }
        }

        /// The same while it runs, written by the vCPU's thread alone. A cache line of its own.
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub(crate) struct ExitCounters { $(pub $name: AtomicU64),* }

        impl ExitCounters {
            /// What has been counted so far.
            pub fn read(&self) -> ExitCounts {
                ExitCounts { $($name: self.$name.load(Ordering::Relaxed)),* }
            }
        }
    };
}

exit_counts! {
    /// Port reads.
    port_in
    /// Port writes.
    port_out
    /// Loads without memory.
    mmio_read
    /// Stores without memory, to watched pages included.
    mmio_write
    /// Breakpoints and single steps.
    debug
    /// KVM's emulator gave up; on a host that emulates kernel code, an int3.
    emulation_failure
    /// Signals, and ends of accesses within a step.
    interrupted
    /// All others.
    other
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
