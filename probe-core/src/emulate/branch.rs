//! Near branches: JMP, Jcc, CALL, RET, LOOP, LOOPcc, JECXZ, JRCXZ; and ENDBR.
//!
//! With prefix 66 an AMD CPU takes 16 bits of the target, and pushes or pops 16 bits of RIP (AMD APM vol. 3, "CALL (Near)"). An
//! Intel CPU ignores the prefix, and for its guests the decoder gives the plain forms.
//!
//! A target that is not canonical is #GP(0) at the branch itself, before anything is stored (Intel SDM vol. 2A, "CALL").

use iced_x86::{Code, Instruction};

use super::flags::holds;
use super::operand::mask;
use super::{Context, DeferReason, Exit, Handler, Next};
use crate::paging::{Access, is_canonical};
use crate::{Exception, Gva, control, rflags};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    if instruction.is_jcc_short_or_near() {
        return Some(jcc);
    }
    Some(match instruction.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 | Code::Jmp_rel8_16 | Code::Jmp_rel16 => jmp_relative,
        Code::Jmp_rm64 | Code::Jmp_rm16 => jmp_indirect,
        Code::Call_rel32_64 | Code::Call_rel16 => call_relative,
        Code::Call_rm64 | Code::Call_rm16 => call_indirect,
        Code::Retnq | Code::Retnq_imm16 | Code::Retnw | Code::Retnw_imm16 => ret,
        Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Loop_rel8_16_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loopne_rel8_16_RCX => |context| loop_count(context, 8),
        Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_64_ECX
        | Code::Loop_rel8_16_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loopne_rel8_16_ECX => |context| loop_count(context, 4),
        Code::Jrcxz_rel8_64 | Code::Jrcxz_rel8_16 => |context| jcxz(context, 8),
        Code::Jecxz_rel8_64 | Code::Jecxz_rel8_16 => |context| jcxz(context, 4),
        Code::Endbr64 | Code::Endbr32 => endbr,
        _ => return None,
    })
}

fn jump(context: &Context<'_>, target: u64) -> Result<Next, Exit> {
    if is_canonical(&context.state.sys, Gva(target)) {
        Ok(Next::Jump(Gva(target)))
    } else {
        Err(Exit::Fault(Exception::GeneralProtection { code: 0 }))
    }
}

/// Jumps to the relative target if `taken`.
fn jump_if(context: &Context<'_>, taken: bool) -> Result<Next, Exit> {
    if taken { jump(context, context.instruction.near_branch_target()) } else { Ok(Next::Sequential) }
}

/// Shadow stack and branch tracker belong to the CPU.
fn refuse_enforced(context: &Context<'_>) -> Result<(), Exit> {
    if context.state.sys.cr4 & control::CR4_CET != 0 {
        return Err(Exit::Defer(DeferReason::ControlFlowEnforcement));
    }
    Ok(())
}

fn jmp_relative(context: &mut Context<'_>) -> Result<Next, Exit> {
    jump_if(context, true)
}

fn jcc(context: &mut Context<'_>) -> Result<Next, Exit> {
    jump_if(context, holds(context.instruction.condition_code(), context.state.regs.rflags))
}

fn jmp_indirect(context: &mut Context<'_>) -> Result<Next, Exit> {
    refuse_enforced(context)?;
    jump(context, context.read(0)?)
}

fn call_relative(context: &mut Context<'_>) -> Result<Next, Exit> {
    call(context, context.instruction.near_branch_target())
}

/// The operand is evaluated with RSP before the push.
fn call_indirect(context: &mut Context<'_>) -> Result<Next, Exit> {
    let target = context.read(0)?;
    call(context, target)
}

/// Bytes of a return address.
fn stack_width(instruction: &Instruction) -> usize {
    match instruction.code() {
        Code::Call_rel16 | Code::Call_rm16 | Code::Retnw | Code::Retnw_imm16 => 2,
        _ => 8,
    }
}

/// A stack that takes no push faults before a target that is not canonical does, as measured on AMD.
fn call(context: &mut Context<'_>, target: u64) -> Result<Next, Exit> {
    refuse_enforced(context)?;
    let size = stack_width(context.instruction);
    let rsp = context.state.regs.rsp.wrapping_sub(size as u64);
    context.stack(rsp, size, Access::Write)?;
    let next = jump(context, target)?;
    context.push(context.instruction.next_ip() & mask(size), size)?;
    Ok(next)
}

fn ret(context: &mut Context<'_>) -> Result<Next, Exit> {
    refuse_enforced(context)?;
    let target = context.pop(stack_width(context.instruction))?;
    if context.instruction.op_count() == 1 {
        let released = u64::from(context.instruction.immediate16());
        context.state.regs.rsp = context.state.regs.rsp.wrapping_add(released);
    }
    jump(context, target)
}

/// Counts down in RCX or ECX, then jumps if the count is not 0 and the condition of LOOPcc holds. Writing ECX clears
/// the upper half of RCX.
fn loop_count(context: &mut Context<'_>, size: usize) -> Result<Next, Exit> {
    let count = context.state.regs.rcx.wrapping_sub(1) & mask(size);
    context.state.regs.rcx = count;
    let zero = context.flag(rflags::ZF);
    let condition = match context.instruction.code() {
        Code::Loope_rel8_64_RCX
        | Code::Loope_rel8_64_ECX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_16_ECX => zero,
        Code::Loopne_rel8_64_RCX
        | Code::Loopne_rel8_64_ECX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_16_ECX => !zero,
        _ => true,
    };
    jump_if(context, count != 0 && condition)
}

fn jcxz(context: &mut Context<'_>, size: usize) -> Result<Next, Exit> {
    jump_if(context, context.state.regs.rcx & mask(size) == 0)
}

fn endbr(context: &mut Context<'_>) -> Result<Next, Exit> {
    refuse_enforced(context)?;
    Ok(Next::Sequential)
}
