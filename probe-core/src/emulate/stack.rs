//! PUSH, POP, LEAVE, PUSHF, POPF.

use iced_x86::{Code, Instruction};

use super::{Context, Exit, Handler, Next};
use crate::rflags;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.code() {
        Code::Push_r16
        | Code::Push_r64
        | Code::Push_rm16
        | Code::Push_rm64
        | Code::Push_imm16
        | Code::Pushw_imm8
        | Code::Pushq_imm32
        | Code::Pushq_imm8 => push,
        Code::Pop_r16 | Code::Pop_r64 | Code::Pop_rm16 | Code::Pop_rm64 => pop,
        Code::Leavew | Code::Leaveq => leave,
        Code::Pushfw | Code::Pushfq => pushf,
        Code::Popfw | Code::Popfq => popf,
        _ => return None,
    })
}

/// How many bytes the instruction moves to or from the stack: 2 or 8.
fn width(context: &Context<'_>) -> usize {
    match context.instruction.code() {
        Code::Push_r16 | Code::Push_rm16 | Code::Push_imm16 | Code::Pushw_imm8 => 2,
        Code::Pop_r16 | Code::Pop_rm16 | Code::Leavew | Code::Pushfw | Code::Popfw => 2,
        _ => 8,
    }
}

/// The operand is evaluated with RSP before the push.
fn push(context: &mut Context<'_>) -> Result<Next, Exit> {
    let value = context.read(0)?;
    context.push(value, width(context))?;
    Ok(Next::Sequential)
}

/// The operand is evaluated with RSP after the increment; POP RSP keeps the popped value.
fn pop(context: &mut Context<'_>) -> Result<Next, Exit> {
    let value = context.pop(width(context))?;
    context.write(0, value)?;
    Ok(Next::Sequential)
}

fn leave(context: &mut Context<'_>) -> Result<Next, Exit> {
    context.state.regs.rsp = context.state.regs.rbp;
    let size = width(context);
    let value = context.pop(size)?;
    let rbp = context.state.regs.rbp;
    context.state.regs.rbp = if size == 2 { rbp & !0xffff | value } else { value };
    Ok(Next::Sequential)
}

/// VM and RF read as 0 in the image.
fn pushf(context: &mut Context<'_>) -> Result<Next, Exit> {
    let image = context.state.regs.rflags & !(rflags::VM | rflags::RF);
    context.push(image, width(context))?;
    Ok(Next::Sequential)
}

/// Which flags change depends on CPL and IOPL (Intel SDM vol. 2B, "POPF", table 4-21).
fn popf(context: &mut Context<'_>) -> Result<Next, Exit> {
    let size = width(context);
    let image = context.pop(size)?;
    let mut which = rflags::ARITHMETIC | rflags::TF | rflags::DF | rflags::NT;
    if size == 8 {
        which |= rflags::AC | rflags::ID;
    }
    if super::system::may_change_if(&context.state) {
        which |= rflags::IF;
    }
    if context.state.sys.cpl == 0 {
        which |= rflags::IOPL;
    }
    context.set_flags(which, image);
    Ok(Next::Sequential)
}
