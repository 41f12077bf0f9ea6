//! Runs one displaced instruction in the host, exactly as the guest's CPU would have.
//!
//! Dispatch is by iced's decoded mnemonic and code, never by raw bytes. One file per instruction family; each works on
//! a copy of the state.
//!
//! Consistency on error: the state is changed only by [`Emulated::Done`] and [`Emulated::Halt`], and memory only by
//! [`Emulated::Done`]. Every instruction makes its one store last, when nothing else can fail; a repeated string store
//! checks all its pages first. Accessed and dirty bits may be set by an instruction that then faults, as on a CPU.

mod arithmetic;
mod bits;
mod branch;
mod convert;
mod flags;
mod operand;
mod shift;
mod stack;
mod string;
mod system;
mod transfer;

use iced_x86::{CodeSize, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::space::{AccessError, AddressSpace};
use crate::{Exception, Gva, InterruptShadow, VcpuState, control, rflags};

use operand::Context;
pub(crate) use operand::{address_register, read_register};

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulated {
    /// It is done; the state is the one after it. If RFLAGS.TF was set before, a single-step #DB is due now.
    Done,
    /// It raises this exception; the state is the one before it.
    Fault(Exception),
    /// HLT: RIP is behind it, and the vCPU waits for an interrupt.
    Halt,
    /// It has to run on the CPU; nothing has changed.
    Defer(DeferReason),
}

/// Why an instruction cannot be emulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeferReason {
    /// No family covers this form.
    #[error("The instruction has no emulation")]
    NotEmulated,
    /// The vCPU does not run 64-bit code.
    #[error("The vCPU does not run 64-bit code")]
    CodeSize,
    /// An operand is MMIO, or in RAM that the host watches.
    #[error("The operand at {0} is not in RAM")]
    NotRam(Gva),
    /// The address cannot be translated in software.
    #[error("The operand at {0} cannot be translated by the software page walk")]
    Untranslatable(Gva),
    /// A locked operand is not naturally aligned.
    #[error("The locked operand at {0} is not naturally aligned")]
    Misaligned(Gva),
    /// CR4.CET is set: the shadow stack and the branch tracker are the CPU's.
    #[error("Control-flow enforcement (CR4.CET) is on")]
    ControlFlowEnforcement,
}

/// How an instruction ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Exit {
    Fault(Exception),
    Defer(DeferReason),
}

impl From<AccessError> for Exit {
    fn from(error: AccessError) -> Self {
        match error {
            AccessError::Fault(exception) => Exit::Fault(exception),
            AccessError::NotRam(gva) => Exit::Defer(DeferReason::NotRam(gva)),
            AccessError::Unsupported(gva) => Exit::Defer(DeferReason::Untranslatable(gva)),
        }
    }
}

/// Where an instruction goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Sequential,
    Jump(Gva),
    Halt,
}

type Handler = fn(&mut Context<'_>) -> Result<Next, Exit>;

/// Runs `instruction`, decoded at the state's RIP, on `state`.
pub fn emulate(instruction: &Instruction, state: &mut VcpuState, space: &AddressSpace<'_>) -> Emulated {
    if !is_64_bit(instruction, state) {
        return Emulated::Defer(DeferReason::CodeSize);
    }
    Emulation::of(instruction).map_or(Emulated::Defer(DeferReason::NotEmulated), |emulation| {
        emulation.run(instruction, state, space)
    })
}

fn is_64_bit(instruction: &Instruction, state: &VcpuState) -> bool {
    let long = state.sys.long_code && state.sys.efer & control::EFER_LMA != 0;
    long && instruction.code_size() == CodeSize::Code64
}

/// How instructions with the same bytes are emulated, found out once.
#[derive(Clone, Copy, Debug)]
pub struct Emulation(Handler);

impl Emulation {
    /// `None` for an instruction that is not emulated.
    #[must_use]
    pub fn of(instruction: &Instruction) -> Option<Self> {
        family(instruction).map(Self)
    }

    /// Runs `instruction`, decoded at the state's RIP, on `state`.
    pub fn run(self, instruction: &Instruction, state: &mut VcpuState, space: &AddressSpace<'_>) -> Emulated {
        if !is_64_bit(instruction, state) {
            return Emulated::Defer(DeferReason::CodeSize);
        }
        let mut context = Context::new(instruction, *state, space);
        context.state.shadow = InterruptShadow::default();
        let next = match self.0(&mut context) {
            Ok(next) => next,
            Err(Exit::Fault(exception)) => return Emulated::Fault(exception),
            Err(Exit::Defer(reason)) => return Emulated::Defer(reason),
        };
        let mut after = context.state;
        after.regs.rflags &= !rflags::RF;
        after.regs.rip = match next {
            Next::Jump(target) => target.0,
            Next::Sequential | Next::Halt => instruction.next_ip(),
        };
        *state = after;
        if next == Next::Halt { Emulated::Halt } else { Emulated::Done }
    }
}

/// Whether [`emulate`] covers this instruction, leaving aside what depends on the state at the hit.
#[must_use]
pub fn is_emulated(instruction: &Instruction) -> bool {
    family(instruction).is_some()
}

/// The handler of an instruction, if all its operands are of kinds the families know.
fn family(instruction: &Instruction) -> Option<Handler> {
    let address_space = system::address_space_handler(instruction);
    if address_space.is_some() {
        return address_space;
    }
    if instruction.code().encoding() != EncodingKind::Legacy
        || !(0..instruction.op_count()).all(|operand| is_known_operand(instruction, operand))
    {
        return None;
    }
    branch::handler(instruction)
        .or_else(|| stack::handler(instruction))
        .or_else(|| transfer::handler(instruction))
        .or_else(|| arithmetic::handler(instruction))
        .or_else(|| shift::handler(instruction))
        .or_else(|| bits::handler(instruction))
        .or_else(|| string::handler(instruction))
        .or_else(|| convert::handler(instruction))
        .or_else(|| system::handler(instruction))
        .or_else(|| is_nop(instruction).then_some(nop as Handler))
}

fn is_known_operand(instruction: &Instruction, operand: u32) -> bool {
    match instruction.op_kind(operand) {
        OpKind::Register => instruction.op_register(operand).is_gpr(),
        OpKind::Memory
        | OpKind::MemorySegRSI
        | OpKind::MemoryESRDI
        | OpKind::NearBranch16
        | OpKind::NearBranch64
        | OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => true,
        _ => false,
    }
}

/// Instructions that do nothing but take their place. Their memory operand is not accessed.
fn is_nop(instruction: &Instruction) -> bool {
    // With REX.B the CPU does not pause but exchanges RAX and R8; the decoder does not tell.
    let longer_pause = instruction.mnemonic() == Mnemonic::Pause && instruction.len() > 2;
    !longer_pause
        && matches!(
            instruction.mnemonic(),
            Mnemonic::Nop
                | Mnemonic::Pause
                | Mnemonic::Prefetch
                | Mnemonic::Prefetchnta
                | Mnemonic::Prefetcht0
                | Mnemonic::Prefetcht1
                | Mnemonic::Prefetcht2
                | Mnemonic::Prefetchw
                | Mnemonic::Prefetchwt1
        )
}

// The handlers share one signature.
#[allow(clippy::unnecessary_wraps)]
fn nop(_: &mut Context<'_>) -> Result<Next, Exit> {
    Ok(Next::Sequential)
}

#[cfg(test)]
mod tests;
