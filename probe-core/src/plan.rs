//! What is to run a displaced instruction: decided once, when its probe is armed.
//!
//! Most instructions are emulated. Nearly all others run in a slot, out of line: whatever interrupts them there is caught
//! at the guest's handler ([`crate::engine`]), so nothing about them has to be foreseen. Refused is what a slot would
//! show to the guest or to a CPU: where it ran, or that interrupts were held.
//!
//! Above CPL 0 there is no slot, and an instruction runs in its place, ended by an int3 behind it: what never gets there is
//! refused at the hit.

use iced_x86::{Code, Decoder, DecoderError, FlowControl, Formatter, GasFormatter, Instruction, Mnemonic};

use crate::emulate::is_emulated;
use crate::{Gva, Vendor};

/// The longest instruction, in bytes (Intel SDM vol. 2A, 2.3.11).
pub const MAX_INSTRUCTION: usize = 15;

/// How a displaced instruction runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// In the host, by [`crate::emulate`]. Should it defer at a hit, [`check_step`] says whether a slot will do.
    Emulate,
    /// In a slot, out of line, put right by [`crate::fixup`].
    Step,
    /// Not at all: no probe can stand here.
    Refuse(Refusal),
}

/// Why no probe can stand on an instruction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The bytes do not decode.
    #[error(
        "The bytes at {address} are no valid instruction; give the address of an instruction in the guest's code"
    )]
    Invalid {
        /// Where they stand.
        address: Gva,
    },
    /// The instruction runs on into memory that cannot be read.
    #[error("The instruction at {address} goes on after {available} bytes, in a page that is not mapped")]
    Truncated {
        /// Where it begins.
        address: Gva,
        /// How many of its bytes can be read.
        available: usize,
    },
    /// The instruction is valid, but cannot run anywhere but in its place.
    #[error("`{instruction}` at {address} cannot be probed: {reason}. The next instruction is at {next}")]
    Instruction {
        /// Where it stands.
        address: Gva,
        /// Its text, in the syntax of the GNU assembler.
        instruction: String,
        /// What is in the way.
        reason: Reason,
        /// Where the instruction behind it stands.
        next: Gva,
    },
}

/// What is in the way of running an instruction out of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// XBEGIN with prefix 66, and UD0; near branches with prefix 66 where the vendor is not known.
    #[error("Intel and AMD CPUs give it different meanings")]
    VendorDependent,
    /// INT3.
    #[error("it is a breakpoint of the guest's own")]
    Breakpoint,
    /// SYSCALL, SYSENTER, UIRET, RSM and their like.
    #[error("it goes to an address that only the CPU knows, and shows where it came from")]
    SystemCall,
    /// Far CALL.
    #[error("it pushes its own address and a code segment")]
    FarCall,
    /// VMRUN, VMLAUNCH, VMRESUME.
    #[error("it enters a guest of the guest, which interrupts must be able to leave")]
    GuestEntry,
    /// A near branch whose emulation was put off.
    #[error("it is a near branch, which can be emulated but not moved")]
    NearBranch,
    /// CLI, STI, PUSHF, POPF, HLT.
    #[error("it reads or changes the interrupt flag, which is off while it runs elsewhere")]
    InterruptFlag,
    /// IRET, far RET and far JMP, in their place.
    #[error("it goes to an address that only the CPU works out, and in user mode nothing stops it there")]
    FarBranch,
    /// XBEGIN, in its place.
    #[error("it begins a transaction, which would be aborted to where nothing stops it in user mode")]
    Transaction,
    /// MWAITX and UMWAIT, in their place.
    #[error("it waits for a store of another CPU, and in user mode no other one runs meanwhile")]
    Wait,
}

/// Decodes the instruction that begins at `address` as the guest's CPU does; `bytes` may go on behind it.
///
/// # Errors
/// [`Refusal`] if there is no whole instruction, or one that depends on the CPU's vendor, which is not known.
pub fn decode(bytes: &[u8], address: Gva, vendor: Vendor) -> Result<Instruction, Refusal> {
    let bytes = bytes.get(..MAX_INSTRUCTION).unwrap_or(bytes);
    let mut decoder = Decoder::with_ip(64, bytes, address.0, vendor.decoder_options());
    let instruction = decoder.decode();
    if decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() < MAX_INSTRUCTION {
        return Err(Refusal::Truncated { address, available: bytes.len() });
    }
    if instruction.is_invalid() {
        return Err(Refusal::Invalid { address });
    }
    let other = Decoder::with_ip(64, bytes, address.0, vendor.other_options()).decode();
    let same_length = other.len() == instruction.len();
    if other.code() != instruction.code() || !same_length {
        // In a slot the length decides what comes behind.
        let certain = vendor != Vendor::Unknown && (same_length || is_emulated(&instruction));
        if !certain {
            return Err(refusal(&instruction, Reason::VendorDependent));
        }
    }
    Ok(instruction)
}

/// Decides how `instruction`, from [`decode`], runs when it is displaced.
#[must_use]
pub fn plan(instruction: &Instruction) -> Plan {
    if is_emulated(instruction) {
        return Plan::Emulate;
    }
    match check_step(instruction) {
        Ok(()) => Plan::Step,
        Err(refusal) => Plan::Refuse(refusal),
    }
}

/// Whether `instruction` can run in a slot.
///
/// # Errors
/// [`Refusal::Instruction`] with the reason why not.
pub fn check_step(instruction: &Instruction) -> Result<(), Refusal> {
    match obstacle(instruction) {
        None => Ok(()),
        Some(reason) => Err(refusal(instruction, reason)),
    }
}

/// Whether `instruction` can run in its place at a CPL above 0, with an int3 behind it.
///
/// # Errors
/// [`Refusal::Instruction`] with the reason why not.
pub fn check_in_place(instruction: &Instruction) -> Result<(), Refusal> {
    let reason = match instruction.mnemonic() {
        // At this CPL they raise an exception.
        Mnemonic::Sysret | Mnemonic::Sysretq | Mnemonic::Sysexit | Mnemonic::Sysexitq => None,
        _ if leaving(instruction).is_some() => Some(Reason::FarBranch),
        Mnemonic::Xbegin => Some(Reason::Transaction),
        // It enters an enclave, and leaves one (Intel SDM vol. 3D, 40.4).
        Mnemonic::Enclu => Some(Reason::SystemCall),
        Mnemonic::Mwaitx | Mnemonic::Umwait => Some(Reason::Wait),
        _ => obstacle(instruction),
    };
    reason.map_or(Ok(()), |reason| Err(refusal(instruction, reason)))
}

/// The instruction's text, in the syntax of the GNU assembler.
#[must_use]
pub fn text(instruction: &Instruction) -> String {
    let mut text = String::new();
    GasFormatter::new().format(instruction, &mut text);
    text
}

fn refusal(instruction: &Instruction, reason: Reason) -> Refusal {
    Refusal::Instruction {
        address: Gva(instruction.ip()),
        instruction: text(instruction),
        reason,
        next: Gva(instruction.next_ip()),
    }
}

/// What keeps an instruction from running in a slot.
fn obstacle(instruction: &Instruction) -> Option<Reason> {
    let mnemonic = instruction.mnemonic();
    match instruction.flow_control() {
        FlowControl::Interrupt => (mnemonic == Mnemonic::Int3).then_some(Reason::Breakpoint),
        FlowControl::XbeginXabortXend => {
            (instruction.code() == Code::Xbegin_rel16).then_some(Reason::VendorDependent)
        }
        FlowControl::Call if matches!(mnemonic, Mnemonic::Vmcall | Mnemonic::Vmmcall | Mnemonic::Vmgexit) => {
            None
        }
        FlowControl::Call
            if matches!(mnemonic, Mnemonic::Vmrun | Mnemonic::Vmlaunch | Mnemonic::Vmresume) =>
        {
            Some(Reason::GuestEntry)
        }
        _ if leaving(instruction).is_some() => None,
        _ if instruction.is_call_far() || instruction.is_call_far_indirect() => Some(Reason::FarCall),
        FlowControl::Return if mnemonic != Mnemonic::Ret => Some(Reason::SystemCall),
        FlowControl::Call if !instruction.is_call_near() => Some(Reason::SystemCall),
        FlowControl::Call
        | FlowControl::IndirectCall
        | FlowControl::Return
        | FlowControl::UnconditionalBranch
        | FlowControl::IndirectBranch
        | FlowControl::ConditionalBranch => Some(Reason::NearBranch),
        FlowControl::Next | FlowControl::Exception => matches!(
            mnemonic,
            Mnemonic::Cli
                | Mnemonic::Sti
                | Mnemonic::Hlt
                | Mnemonic::Pushf
                | Mnemonic::Pushfq
                | Mnemonic::Popf
                | Mnemonic::Popfq
        )
        .then_some(Reason::InterruptFlag),
    }
}

/// How an instruction leaves a slot for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leaving {
    /// With RFLAGS of its own: IRET, SYSRET.
    WithFlags,
    /// With RFLAGS as they are: far RET, far JMP, SYSEXIT.
    KeepingFlags,
}

/// Whether `instruction` goes to an address that only the CPU works out, so that it never reaches the end of its slot.
#[must_use]
pub fn leaving(instruction: &Instruction) -> Option<Leaving> {
    match instruction.mnemonic() {
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Sysret | Mnemonic::Sysretq => {
            Some(Leaving::WithFlags)
        }
        Mnemonic::Retf | Mnemonic::Sysexit | Mnemonic::Sysexitq => Some(Leaving::KeepingFlags),
        _ if instruction.is_jmp_far() || instruction.is_jmp_far_indirect() => Some(Leaving::KeepingFlags),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
