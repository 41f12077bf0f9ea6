//! MOV, MOVZX, MOVSX, MOVSXD, XCHG, BSWAP, CMOVcc, SETcc, LEA.

use iced_x86::{Code, ConditionCode, FlowControl, Instruction, Mnemonic, OpKind};

use super::flags::holds;
use super::operand::{mask, sign_extend};
use super::{Context, Exit, Handler, Next};
use crate::paging::Access;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movzx => Some(mov),
        // AMD and Intel disagree on the source of the 16-bit form.
        Mnemonic::Movsxd if instruction.code() == Code::Movsxd_r16_rm16 => None,
        Mnemonic::Movsx | Mnemonic::Movsxd => Some(movsx),
        Mnemonic::Xchg => Some(xchg),
        // Undefined for 16-bit registers.
        Mnemonic::Bswap if instruction.code() == Code::Bswap_r16 => None,
        Mnemonic::Bswap => Some(bswap),
        Mnemonic::Lea => Some(lea),
        _ if instruction.condition_code() == ConditionCode::None => None,
        _ if instruction.flow_control() != FlowControl::Next => None,
        _ if instruction.op_count() == 2 => Some(cmov),
        _ => Some(setcc),
    }
}

fn mov(context: &mut Context<'_>) -> Result<Next, Exit> {
    let value = context.read(1)?;
    context.write(0, value)?;
    Ok(Next::Sequential)
}

fn movsx(context: &mut Context<'_>) -> Result<Next, Exit> {
    let value = sign_extend(context.read(1)?, context.size(1));
    context.write(0, value)?;
    Ok(Next::Sequential)
}

/// With a memory operand XCHG locks, prefix or not.
fn xchg(context: &mut Context<'_>) -> Result<Next, Exit> {
    let memory = u32::from(context.instruction.op_kind(1) == OpKind::Memory);
    let register = 1 - memory;
    let new = context.read(register)?;
    let old = if context.instruction.op_kind(memory) == OpKind::Memory {
        let span = context.resolve(memory, Access::Write)?;
        context.update_memory(&span, true, |old| (new, old))?
    } else {
        context.update(memory, |old| (new, old))?
    };
    context.write(register, old)?;
    Ok(Next::Sequential)
}

fn bswap(context: &mut Context<'_>) -> Result<Next, Exit> {
    let unused = 64 - 8 * context.size(0);
    let value = context.read(0)?.swap_bytes() >> unused;
    context.write(0, value)?;
    Ok(Next::Sequential)
}

/// The source is read and a 32-bit destination loses its upper half also if the condition is false.
fn cmov(context: &mut Context<'_>) -> Result<Next, Exit> {
    let source = context.read(1)?;
    let old = context.read(0)?;
    let moved = holds(context.instruction.condition_code(), context.state.regs.rflags);
    context.write(0, if moved { source } else { old })?;
    Ok(Next::Sequential)
}

fn setcc(context: &mut Context<'_>) -> Result<Next, Exit> {
    let condition = holds(context.instruction.condition_code(), context.state.regs.rflags);
    context.write(0, u64::from(condition))?;
    Ok(Next::Sequential)
}

fn lea(context: &mut Context<'_>) -> Result<Next, Exit> {
    let offset = context.offset(1)? & mask(context.size(0));
    context.write(0, offset)?;
    Ok(Next::Sequential)
}
