//! Looks ahead of a single step: would the instruction fault?
//!
//! A fault raised in the slot would show the guest the slot's address. So every fault that a steppable instruction can
//! raise is predicted here and delivered from the original RIP. Of a repeated string instruction one iteration is
//! checked; the check runs again before each further step.

use iced_x86::{
    Code, CodeSize, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, UsedMemory,
};

use crate::emulate::{address_register, bit_string_address, is_stack_segment, read_register};
use crate::paging::{Access, Marks, is_canonical};
use crate::space::{AccessError, AddressSpace, Operand, Span};
use crate::{Exception, Gva, VcpuState, control, rflags};

/// CR0: x87 and SSE are emulated by the guest's own software: #UD.
const CR0_EM: u64 = 1 << 2;
/// CR0: the vector registers belong to another task: #NM.
const CR0_TS: u64 = 1 << 3;
/// CR4: RDTSC only at CPL 0.
const CR4_TSD: u64 = 1 << 2;
/// CR4: SSE is on.
const CR4_OSFXSR: u64 = 1 << 9;
/// CR4: SGDT and its like only at CPL 0.
const CR4_UMIP: u64 = 1 << 11;
/// CR4: RDFSBASE and its like are on.
const CR4_FSGSBASE: u64 = 1 << 16;
/// CR4: XGETBV and AVX are on.
const CR4_OSXSAVE: u64 = 1 << 18;

/// Why an instruction must not be stepped now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StepHazard {
    /// It raises this exception; the guest gets it at the original RIP.
    #[error("The instruction raises {0:x?}")]
    Fault(Exception),
    /// The vCPU does not run 64-bit code.
    #[error("The vCPU does not run 64-bit code")]
    CodeSize,
    /// The operand cannot be translated in software.
    #[error("The operand at {0} cannot be translated by the software page walk")]
    Untranslatable(Gva),
    /// I/O at a CPL above IOPL: the task's permission bitmap decides.
    #[error("Whether the instruction may use the I/O port depends on the I/O permission bitmap")]
    IoPermission,
    /// XGETBV of another register than XCR0.
    #[error("Whether extended control register {0:#x} exists is not known")]
    ExtendedControlRegister(u32),
    /// A call with CR4.CET set: the return address on the shadow stack could not be put right.
    #[error("A call with a shadow stack (CR4.CET) cannot be stepped")]
    ShadowStack,
    /// A divisor, or the stack of a call, outside RAM: a fault could not be foreseen, or the return address not be put
    /// right.
    #[error("The operand at {0} is not in RAM, and the instruction needs it there")]
    NotRam(Gva),
}

const GENERAL_PROTECTION: StepHazard = StepHazard::Fault(Exception::GeneralProtection { code: 0 });
const INVALID_OPCODE: StepHazard = StepHazard::Fault(Exception::InvalidOpcode);

/// Checks that `instruction`, which [`crate::plan::check_step`] has let through, will complete when it is stepped from
/// `state`. Operands outside RAM are let through: they leave the step as MMIO exits.
///
/// # Errors
/// [`StepHazard`]
pub fn precheck(
    instruction: &Instruction,
    state: &VcpuState,
    space: &AddressSpace<'_>,
) -> Result<(), StepHazard> {
    if !state.sys.long_code
        || state.sys.efer & control::EFER_LMA == 0
        || instruction.code_size() != CodeSize::Code64
    {
        return Err(StepHazard::CodeSize);
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    let vector = info.used_registers().iter().any(|used| used.register().is_vector_register())
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr | Mnemonic::Vzeroupper | Mnemonic::Vzeroall
        );
    if vector {
        check_vector_unit(instruction, state)?;
    }
    check_rights(instruction, state)?;
    if !repeats_zero_times(instruction, state) {
        for used in info.used_memory() {
            check_memory(instruction, state, space, used)?;
        }
    }
    check_division(instruction, state, space)?;
    check_branch(instruction, state, space)
}

/// #UD and #NM of SSE and AVX (Intel SDM vol. 3A, 13.1 and table 2-21 of vol. 2A).
fn check_vector_unit(instruction: &Instruction, state: &VcpuState) -> Result<(), StepHazard> {
    let on = match instruction.code().encoding() {
        EncodingKind::VEX => state.sys.cr4 & CR4_OSXSAVE != 0,
        _ => state.sys.cr4 & CR4_OSFXSR != 0 && state.sys.cr0 & CR0_EM == 0,
    };
    if !on {
        return Err(INVALID_OPCODE);
    }
    if state.sys.cr0 & CR0_TS != 0 {
        return Err(StepHazard::Fault(Exception::DeviceNotAvailable));
    }
    Ok(())
}

/// What depends on CPL, CR4 and the registers that an instruction names.
fn check_rights(instruction: &Instruction, state: &VcpuState) -> Result<(), StepHazard> {
    let user = state.sys.cpl != 0;
    let cr4 = state.sys.cr4;
    match instruction.mnemonic() {
        Mnemonic::Clts | Mnemonic::Invlpg | Mnemonic::Swapgs | Mnemonic::Wbinvd if user => {
            Err(GENERAL_PROTECTION)
        }
        Mnemonic::Mov if user && instruction.code() == Code::Mov_r64_cr => Err(GENERAL_PROTECTION),
        Mnemonic::Clac | Mnemonic::Stac if user => Err(INVALID_OPCODE),
        Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Smsw | Mnemonic::Str
            if user && cr4 & CR4_UMIP != 0 =>
        {
            Err(GENERAL_PROTECTION)
        }
        Mnemonic::Rdtsc | Mnemonic::Rdtscp if user && cr4 & CR4_TSD != 0 => Err(GENERAL_PROTECTION),
        Mnemonic::In | Mnemonic::Out => {
            let iopl = (state.regs.rflags & rflags::IOPL) >> rflags::IOPL.trailing_zeros();
            if u64::from(state.sys.cpl) > iopl { Err(StepHazard::IoPermission) } else { Ok(()) }
        }
        Mnemonic::Xgetbv => {
            // The CPU looks at ECX alone.
            #[allow(clippy::cast_possible_truncation)]
            let register = state.regs.rcx as u32;
            match register {
                _ if cr4 & CR4_OSXSAVE == 0 => Err(INVALID_OPCODE),
                0 => Ok(()),
                _ => Err(StepHazard::ExtendedControlRegister(register)),
            }
        }
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            if cr4 & CR4_FSGSBASE == 0 {
                return Err(INVALID_OPCODE);
            }
            let written = matches!(instruction.mnemonic(), Mnemonic::Wrfsbase | Mnemonic::Wrgsbase);
            let base = read_register(&state.regs, instruction.op0_register()).unwrap_or_default();
            if written && !is_canonical(&state.sys, Gva(base)) { Err(GENERAL_PROTECTION) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

/// A repeated string instruction with a count of 0 accesses nothing.
fn repeats_zero_times(instruction: &Instruction, state: &VcpuState) -> bool {
    let repeated = instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix());
    let count = if (0..instruction.op_count())
        .any(|operand| matches!(instruction.op_kind(operand), OpKind::MemorySegESI | OpKind::MemoryESEDI))
    {
        state.regs.rcx & 0xffff_ffff
    } else {
        state.regs.rcx
    };
    repeated && count == 0
}

fn check_memory(
    instruction: &Instruction,
    state: &VcpuState,
    space: &AddressSpace<'_>,
    used: &UsedMemory,
) -> Result<(), StepHazard> {
    let flushes = matches!(instruction.mnemonic(), Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb);
    let access = match used.access() {
        OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
            Access::Write
        }
        OpAccess::Read | OpAccess::CondRead => Access::Read,
        // A flush needs the right to read its line.
        _ if flushes => Access::Read,
        _ => return Ok(()),
    };
    let len = used.memory_size().size().max(1);
    let Some(address) = used.virtual_address(0, |register, _, _| address_register(state, register)) else {
        return Ok(());
    };
    let mut gva = Gva(address);
    let bit_string =
        matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if bit_string && let Some(offset) = read_register(&state.regs, instruction.op1_register()) {
        gva = Gva(bit_string_address(address, offset, len));
    }
    if let Some(alignment) = required_alignment(instruction, len)
        && !gva.0.is_multiple_of(alignment)
    {
        return Err(GENERAL_PROTECTION);
    }
    let stack = is_stack_segment(instruction, used.base());
    resolve(state, space, Operand { gva, len, stack }, access).map(|_| ())
}

/// The span of an operand, or `None` where it is not RAM.
fn resolve(
    state: &VcpuState,
    space: &AddressSpace<'_>,
    operand: Operand,
    access: Access,
) -> Result<Option<Span>, StepHazard> {
    match space.resolve(state, operand, access, Marks::Keep) {
        Ok(span) => Ok(Some(span)),
        Err(AccessError::NotRam(_)) => Ok(None),
        Err(AccessError::Fault(exception)) => Err(StepHazard::Fault(exception)),
        Err(AccessError::Unsupported(gva)) => Err(StepHazard::Untranslatable(gva)),
    }
}

/// The alignment without which a memory operand of `len` bytes is #GP(0) (Intel SDM vol. 1, 11.6 and 14.9).
fn required_alignment(instruction: &Instruction, len: usize) -> Option<u64> {
    let vector =
        (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_vector_register());
    let aligned = match instruction.mnemonic() {
        Mnemonic::Cmpxchg16b => true,
        Mnemonic::Movups
        | Mnemonic::Movupd
        | Mnemonic::Movdqu
        | Mnemonic::Lddqu
        | Mnemonic::Pcmpestri
        | Mnemonic::Pcmpestri64
        | Mnemonic::Pcmpestrm
        | Mnemonic::Pcmpestrm64
        | Mnemonic::Pcmpistri
        | Mnemonic::Pcmpistrm => false,
        Mnemonic::Vmovaps
        | Mnemonic::Vmovapd
        | Mnemonic::Vmovdqa
        | Mnemonic::Vmovntps
        | Mnemonic::Vmovntpd
        | Mnemonic::Vmovntdq
        | Mnemonic::Vmovntdqa => true,
        _ => vector && instruction.code().encoding() == EncodingKind::Legacy && len == 16,
    };
    aligned.then_some(len as u64)
}

/// #DE: the divisor is 0, or the quotient does not fit.
fn check_division(
    instruction: &Instruction,
    state: &VcpuState,
    space: &AddressSpace<'_>,
) -> Result<(), StepHazard> {
    let signed = match instruction.mnemonic() {
        Mnemonic::Div => false,
        Mnemonic::Idiv => true,
        _ => return Ok(()),
    };
    let (divisor, size) = if instruction.op0_kind() == OpKind::Memory {
        let size = instruction.memory_size().size();
        let address = instruction.virtual_address(0, 0, |register, _, _| address_register(state, register));
        let gva = Gva(address.unwrap_or_default());
        let stack = is_stack_segment(instruction, instruction.memory_base());
        let Some(span) = resolve(state, space, Operand { gva, len: size, stack }, Access::Read)? else {
            return Err(StepHazard::NotRam(gva));
        };
        let value = space.read_value(&span).map_err(|_| StepHazard::NotRam(gva))?;
        (value, size)
    } else {
        let register = instruction.op0_register();
        (read_register(&state.regs, register).unwrap_or_default(), register.size())
    };
    let bits = 8 * size;
    let dividend = if size == 1 {
        u128::from(state.regs.rax & 0xffff)
    } else {
        let mask = u64::MAX >> (64 - bits);
        u128::from(state.regs.rdx & mask) << bits | u128::from(state.regs.rax & mask)
    };
    if quotient_fits(dividend, divisor, bits, signed) {
        Ok(())
    } else {
        Err(StepHazard::Fault(Exception::DivideError))
    }
}

/// Whether a dividend of `2 * bits` by a divisor of `bits` gives a quotient of `bits`.
fn quotient_fits(dividend: u128, divisor: u64, bits: usize, signed: bool) -> bool {
    if divisor == 0 {
        return false;
    }
    if !signed {
        return (dividend / u128::from(divisor)) >> bits == 0;
    }
    let unused = 128 - 2 * bits;
    let dividend = (dividend << unused).cast_signed() >> unused;
    let divisor = i128::from((divisor << (64 - bits)).cast_signed() >> (64 - bits));
    let Some(quotient) = dividend.checked_div(divisor) else {
        return false;
    };
    let limit = 1_i128 << (bits - 1);
    (-limit..limit).contains(&quotient)
}

/// Faults and obstacles of the branches that can be stepped: their target must be canonical, and a call must leave a
/// return address that can be put right.
fn check_branch(
    instruction: &Instruction,
    state: &VcpuState,
    space: &AddressSpace<'_>,
) -> Result<(), StepHazard> {
    if instruction.code() == Code::Call_rm64 {
        if state.sys.cr4 & control::CR4_CET != 0 {
            return Err(StepHazard::ShadowStack);
        }
        let gva = Gva(state.regs.rsp.wrapping_sub(8));
        let span = resolve(state, space, Operand { gva, len: 8, stack: true }, Access::Write)?;
        let readable = span.is_some_and(|span| space.read_value(&span).is_ok());
        if !readable {
            return Err(StepHazard::NotRam(gva));
        }
    }
    let target = match instruction.code() {
        Code::Retnq | Code::Retnq_imm16 => Some((Gva(state.regs.rsp), true)),
        Code::Jmp_rm64 | Code::Call_rm64 if instruction.op0_kind() == OpKind::Memory => instruction
            .virtual_address(0, 0, |register, _, _| address_register(state, register))
            .map(|address| (Gva(address), is_stack_segment(instruction, instruction.memory_base()))),
        _ => None,
    };
    let value = match target {
        Some((gva, stack)) => {
            let operand = Operand { gva, len: 8, stack };
            resolve(state, space, operand, Access::Read)?.and_then(|span| space.read_value(&span).ok())
        }
        None if matches!(instruction.code(), Code::Jmp_rm64 | Code::Call_rm64) => {
            read_register(&state.regs, instruction.op0_register())
        }
        None => None,
    };
    if value.is_some_and(|value| !is_canonical(&state.sys, Gva(value))) {
        return Err(GENERAL_PROTECTION);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
