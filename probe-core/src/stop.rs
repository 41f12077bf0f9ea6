//! Why did a vCPU stop, and how does it go on?

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
    /// Run exactly one instruction from the state's RIP with interrupts held (KVM_GUESTDBG_SINGLESTEP and
    /// KVM_GUESTDBG_BLOCKIRQ), then stop again with [`Stop::Debug`]. The guest's own TF stays as the state says.
    Step,
    /// Deliver the exception as hardware would have at the state's RIP, then run. For [`Exception::Breakpoint`] RIP
    /// is the int3's own address and the guest's frame shows the address behind it.
    Inject(Exception),
    /// HLT has been executed: RIP is behind it and the vCPU sleeps until an interrupt.
    Halt,
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

    /// Whether #BP must exit to the host at all (KVM_GUESTDBG_USE_SW_BP). Asked before every entry; cheap.
    fn wants_breakpoints(&self) -> bool;
}
