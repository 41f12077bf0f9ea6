//! CBW, CWDE, CDQE, CWD, CDQ, CQO.

use iced_x86::{Instruction, Mnemonic, Register};

use super::operand::{read_register, sign_extend};
use super::{Context, DeferReason, Exit, Handler, Next};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Cbw => |context| widen(context, Register::AL, Register::AX),
        Mnemonic::Cwde => |context| widen(context, Register::AX, Register::EAX),
        Mnemonic::Cdqe => |context| widen(context, Register::EAX, Register::RAX),
        Mnemonic::Cwd => |context| spread(context, Register::AX, Register::DX),
        Mnemonic::Cdq => |context| spread(context, Register::EAX, Register::EDX),
        Mnemonic::Cqo => |context| spread(context, Register::RAX, Register::RDX),
        _ => return None,
    })
}

fn signed(context: &Context<'_>, register: Register) -> Result<u64, Exit> {
    let value = read_register(&context.state.regs, register);
    let value = value.ok_or(Exit::Defer(DeferReason::NotEmulated))?;
    Ok(sign_extend(value, register.size()))
}

/// The source, sign-extended, becomes the destination.
fn widen(context: &mut Context<'_>, from: Register, to: Register) -> Result<Next, Exit> {
    let value = signed(context, from)?;
    context.write_register(to, value)?;
    Ok(Next::Sequential)
}

/// The source's sign fills the destination.
fn spread(context: &mut Context<'_>, from: Register, to: Register) -> Result<Next, Exit> {
    let sign = (signed(context, from)?.cast_signed() >> 63).cast_unsigned();
    context.write_register(to, sign)?;
    Ok(Next::Sequential)
}
