//! Why did a vCPU stop, and how does it go on?

use crate::patch::INT3;
use crate::watch::{WatchHits, WatchSet};
use crate::{Exception, Gpa, Gva, PhysicalMemory, VcpuState};

/// A debug-related exit of a vCPU, owned, as `vmm` hands it over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// KVM_EXIT_DEBUG with exception 3: an int3 at `pc`; RIP equals `pc`, not advanced.
    Breakpoint {
        /// Linear address of the int3.
        pc: Gva,
    },
    /// KVM_EXIT_DEBUG with exception 1.
    Debug {
        /// Linear address of the next instruction.
        pc: Gva,
        /// DR6 of this exit: BS, B0-B3, BD.
        dr6: u64,
    },
    /// KVM_EXIT_DEBUG with exception 1, for watchpoints of [`StopHandler::watchpoints`]. RIP is behind the instruction that
    /// read or wrote, and at the one that is watched for execution. Going on from there, [`Resume::Run`] runs it where the CPU
    /// runs guest code; a host that emulates it does not get past, and the handler has to carry the instruction out itself.
    Watchpoint {
        /// Linear address of the next instruction.
        pc: Gva,
        /// The watchpoints that were met.
        hits: WatchHits,
        /// What else DR6 says, which is the guest's: BS, BD and its own of B0-B3.
        guest_dr6: u64,
    },
    /// KVM_EXIT_INTERNAL_ERROR with suberror 1 (KVM_INTERNAL_ERROR_EMULATION): KVM's instruction emulator runs this
    /// guest code and could not go on at RIP. An int3 arrives so on hosts that emulate kernel code.
    EmulationFailure {
        /// The bytes KVM fetched at RIP, zero-filled.
        bytes: [u8; 15],
        /// How many of them are valid, 0..=15.
        len: u8,
    },
}

/// How a vCPU goes on after a stop. The [`VcpuState`] given with the stop has been changed as needed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// Run on from the state.
    Run,
    /// Deliver the exception as hardware would have at the state's RIP, then run. For [`Exception::Breakpoint`] RIP
    /// is the int3's own address and the guest's frame shows the address behind it.
    Inject(Exception),
    /// HLT has been executed: RIP is behind it and the vCPU sleeps until an interrupt.
    Halt,
    /// As [`Resume::Run`], but only when whoever embeds the machine has had its pause: a handler asked for one.
    Pause,
    /// End the whole run in order, from this state: enough hits have been seen.
    Finish,
    /// The stop cannot be explained, and going on would run the guest wrongly.
    Fail {
        /// What was seen, for the user.
        reason: String,
    },
}

/// Takes the debug stops of one vCPU. Called on that vCPU's thread only, never concurrently with itself; the handlers of
/// several vCPUs run in parallel.
pub trait StopHandler: Send {
    /// Decides how to go on. `memory` is guest RAM, raw: bytes read back as the guest would read them.
    fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume;

    /// The guest stored `data` at `gpa`, in a watched (read-only mapped) page. KVM has not stored it: the handler
    /// writes what should be in memory.
    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]);

    /// The vCPU is not going to run on, for good or for a while: makes `state` what the guest takes it to be, wherever the
    /// handler has put RIP. Any port or MMIO access under way has been completed. Returns an exception that is due before
    /// the next instruction.
    fn settle(&mut self, _state: &mut VcpuState, _memory: &dyn PhysicalMemory) -> Option<Exception> {
        None
    }

    /// Whether #BP must exit to the host at all (KVM_GUESTDBG_USE_SW_BP). Asked before every entry; cheap.
    fn wants_breakpoints(&self) -> bool;

    /// The host's watchpoints, which stop with [`Stop::Watchpoint`]; the same on every vCPU. Asked before every entry; cheap. A
    /// vCPU in the guest goes by the new ones after its next exit: pause the machine to have them take effect on all.
    fn watchpoints(&self) -> WatchSet {
        WatchSet::default()
    }
}

/// What a vCPU was doing when it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Running guest code.
    Running,
    /// Running one displaced instruction.
    Stepping {
        /// Where it runs: in a slot, or in its place.
        at: Gva,
        /// Its length in bytes; an int3 stands behind it as a guard.
        len: u64,
    },
}

/// What lies at the stop's address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Here {
    /// A patch of ours is armed there.
    pub armed: bool,
    /// The byte in guest memory, our int3 where one is armed; None where it cannot be read.
    pub byte: Option<u8>,
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// An armed probe was reached.
    Probe,
    /// The guest's own int3.
    GuestBreakpoint,
    /// The int3 that stopped the vCPU has meanwhile gone: run the instruction that stands there now.
    GhostBreakpoint,
    /// The displaced instruction is complete. `guest_dr6` holds the B0-B3 and BD bits that belong to the guest.
    StepDone {
        /// DR6 bits to report to the guest.
        guest_dr6: u64,
    },
    /// Watchpoints of the host's were met, those that the stop names.
    Watchpoint {
        /// DR6 bits to report to the guest; it has a #DB coming unless they are 0.
        guest_dr6: u64,
    },
    /// A single step, watchpoint or icebp of the guest's own.
    GuestDebug {
        /// DR6 bits to report to the guest.
        dr6: u64,
    },
    /// KVM's emulator cannot run the instruction at RIP on this host.
    EmulatorRefused,
    /// A displaced instruction was under way, and the vCPU turned up somewhere else.
    Astray,
}

/// DR6 bits (Intel SDM vol. 3B, 19.2.3).
pub mod dr6 {
    /// Breakpoint conditions B0 to B3.
    pub const B: u64 = 0xf;
    /// Debug register access.
    pub const BD: u64 = 1 << 13;
    /// Single step.
    pub const BS: u64 = 1 << 14;
}

/// Tells why a vCPU stopped, from what KVM reported, what the vCPU was doing and what lies at RIP.
///
/// `rip` is the vCPU's RIP at the stop. KVM leaves it at an int3 that exits, on KVM_EXIT_DEBUG as on an emulation
/// failure. `here` looks at what lies there; it is called only where that matters.
#[must_use]
pub fn classify(stop: &Stop, rip: Gva, phase: Phase, mut here: impl FnMut() -> Here) -> Cause {
    let at_breakpoint = match stop {
        Stop::Breakpoint { .. } => true,
        Stop::Debug { .. } | Stop::Watchpoint { .. } => false,
        Stop::EmulationFailure { bytes, len } => {
            // KVM reports the bytes that it fetched; where it reports none, memory tells.
            if *len > 0 { bytes[0] == INT3 } else { here().byte == Some(INT3) }
        }
    };
    match (phase, stop) {
        (Phase::Stepping { at, len }, Stop::Watchpoint { guest_dr6, .. }) if rip == at.offset(len) => {
            Cause::StepDone { guest_dr6: guest_dr6 & (dr6::B | dr6::BD) }
        }
        (_, Stop::Watchpoint { guest_dr6, .. }) => Cause::Watchpoint { guest_dr6: *guest_dr6 },
        (Phase::Stepping { at, len }, Stop::Debug { dr6, .. }) if rip == at.offset(len) => {
            Cause::StepDone { guest_dr6: dr6 & (dr6::B | dr6::BD) }
        }
        (Phase::Stepping { at, len }, _) if at_breakpoint && rip == at.offset(len) => {
            Cause::StepDone { guest_dr6: 0 }
        }
        (Phase::Stepping { at, .. }, Stop::EmulationFailure { .. }) if rip == at => Cause::EmulatorRefused,
        (Phase::Stepping { .. }, _) => Cause::Astray,
        (Phase::Running, Stop::Debug { dr6, .. }) => {
            Cause::GuestDebug { dr6: dr6 & (dr6::B | dr6::BD | dr6::BS) }
        }
        (Phase::Running, _) if !at_breakpoint => Cause::EmulatorRefused,
        (Phase::Running, _) => match here() {
            Here { armed: true, .. } => Cause::Probe,
            Here { byte: Some(INT3), .. } => Cause::GuestBreakpoint,
            Here { .. } => Cause::GhostBreakpoint,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PC: Gva = Gva(0xffff_ffff_8134_a355);
    const SLOT: Gva = Gva(0xffff_ffff_bf00_0040);
    const STEPPING: Phase = Phase::Stepping { at: SLOT, len: 3 };
    const BREAKPOINT: Stop = Stop::Breakpoint { pc: PC };

    fn here(armed: bool, byte: u8) -> impl FnMut() -> Here + Copy {
        move || Here { armed, byte: Some(byte) }
    }

    fn failure(first: &[u8]) -> Stop {
        let mut bytes = [0; 15];
        bytes[..first.len()].copy_from_slice(first);
        Stop::EmulationFailure { bytes, len: u8::try_from(first.len()).unwrap() }
    }

    #[test]
    fn an_int3_is_ours_the_guests_or_already_gone() {
        assert_eq!(classify(&BREAKPOINT, PC, Phase::Running, here(true, 0xcc)), Cause::Probe);
        assert_eq!(classify(&BREAKPOINT, PC, Phase::Running, here(false, 0xcc)), Cause::GuestBreakpoint);
        assert_eq!(classify(&BREAKPOINT, PC, Phase::Running, here(false, 0x55)), Cause::GhostBreakpoint);
    }

    #[test]
    fn an_emulation_failure_at_an_int3_is_the_same_stop() {
        for stop in [failure(&[0xcc, 0x0f]), failure(&[])] {
            assert_eq!(classify(&stop, PC, Phase::Running, here(true, 0xcc)), Cause::Probe);
            assert_eq!(classify(&stop, PC, Phase::Running, here(false, 0xcc)), Cause::GuestBreakpoint);
        }
        assert_eq!(
            classify(&failure(&[0xf3, 0x0f, 0xb8]), PC, Phase::Running, here(false, 0xf3)),
            Cause::EmulatorRefused
        );
        assert_eq!(classify(&failure(&[]), PC, Phase::Running, here(false, 0xf3)), Cause::EmulatorRefused);
    }

    #[test]
    fn a_step_ends_at_the_guard() {
        let guard = Stop::Breakpoint { pc: SLOT.offset(3) };
        for stop in [guard, failure(&[0xcc]), failure(&[])] {
            assert_eq!(
                classify(&stop, SLOT.offset(3), STEPPING, here(false, 0xcc)),
                Cause::StepDone { guest_dr6: 0 }
            );
        }
    }

    #[test]
    fn the_guests_watchpoint_bits_survive_a_step() {
        let watch = Stop::Debug { pc: SLOT.offset(3), dr6: 0xffff_0ff2 };
        assert_eq!(
            classify(&watch, SLOT.offset(3), STEPPING, here(false, 0xcc)),
            Cause::StepDone { guest_dr6: 2 }
        );
    }

    #[test]
    fn a_stop_elsewhere_during_a_step_is_astray() {
        assert_eq!(classify(&BREAKPOINT, PC, STEPPING, here(true, 0xcc)), Cause::Astray);
        let watch = Stop::Debug { pc: PC, dr6: 0xffff_0ff1 };
        assert_eq!(classify(&watch, PC, STEPPING, here(false, 0x90)), Cause::Astray);
        assert_eq!(
            classify(&failure(&[0x0f, 0xae]), SLOT, STEPPING, here(false, 0x0f)),
            Cause::EmulatorRefused
        );
    }

    #[test]
    fn a_watchpoint_of_the_hosts_also_ends_a_step_and_leaves_the_guest_its_own_bits() {
        let stop = |guest_dr6| Stop::Watchpoint { pc: PC, hits: WatchHits::NONE, guest_dr6 };
        let here = here(true, 0xcc);
        assert_eq!(classify(&stop(0), PC, Phase::Running, here), Cause::Watchpoint { guest_dr6: 0 });
        let both = stop(dr6::BS | 2);
        assert_eq!(classify(&both, PC, Phase::Running, here), Cause::Watchpoint { guest_dr6: dr6::BS | 2 });
        assert_eq!(classify(&both, SLOT.offset(3), STEPPING, here), Cause::StepDone { guest_dr6: 2 });
        assert_eq!(classify(&stop(0), PC, STEPPING, here), Cause::Watchpoint { guest_dr6: 0 });
    }

    #[test]
    fn a_debug_exception_outside_a_step_is_the_guests() {
        let watch = Stop::Debug { pc: PC, dr6: 0xffff_0ff1 };
        assert_eq!(classify(&watch, PC, Phase::Running, here(true, 0xcc)), Cause::GuestDebug { dr6: 1 });
        let step = Stop::Debug { pc: PC, dr6: 0xffff_4ff0 };
        assert_eq!(
            classify(&step, PC, Phase::Running, here(false, 0x90)),
            Cause::GuestDebug { dr6: dr6::BS }
        );
    }
}
