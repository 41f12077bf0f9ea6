//! ADD, ADC, SUB, SBB, CMP, AND, OR, XOR, TEST, INC, DEC, NEG, NOT, XADD, CMPXCHG.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::flags::{add, logic, sub};
use super::operand::mask;
use super::{Context, Exit, Handler, Next};
use crate::paging::Access;
use crate::rflags::{ARITHMETIC, CF};

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Add => |context| binary(context, |size, a, b, _| add(size, a, b, false)),
        Mnemonic::Adc => |context| binary(context, add),
        Mnemonic::Sub => |context| binary(context, |size, a, b, _| sub(size, a, b, false)),
        Mnemonic::Sbb => |context| binary(context, sub),
        Mnemonic::And => |context| binary(context, |size, a, b, _| (a & b, logic(size, a & b))),
        Mnemonic::Or => |context| binary(context, |size, a, b, _| (a | b, logic(size, a | b))),
        Mnemonic::Xor => |context| binary(context, |size, a, b, _| (a ^ b, logic(size, a ^ b))),
        Mnemonic::Cmp => |context| compare(context, |size, a, b| sub(size, a, b, false).1),
        Mnemonic::Test => |context| compare(context, |size, a, b| logic(size, a & b)),
        Mnemonic::Inc => |context| unary(context, ARITHMETIC & !CF, |size, a| add(size, a, 1, false)),
        Mnemonic::Dec => |context| unary(context, ARITHMETIC & !CF, |size, a| sub(size, a, 1, false)),
        Mnemonic::Neg => |context| unary(context, ARITHMETIC, |size, a| sub(size, 0, a, false)),
        Mnemonic::Not => |context| unary(context, 0, |size, a| (!a & mask(size), 0)),
        Mnemonic::Xadd => xadd,
        // Whether a 32-bit register that differs loses its upper half is up to the CPU.
        Mnemonic::Cmpxchg if instruction.op0_kind() == OpKind::Memory => cmpxchg,
        _ => return None,
    })
}

/// `operation(size, a, b, CF)` gives the result and the flags.
fn binary(
    context: &mut Context<'_>,
    operation: impl Fn(usize, u64, u64, bool) -> (u64, u64),
) -> Result<Next, Exit> {
    let size = context.size(0);
    let carry = context.flag(CF);
    let b = context.read(1)?;
    let flags = context.update(0, |a| operation(size, a, b, carry))?;
    context.set_flags(ARITHMETIC, flags);
    Ok(Next::Sequential)
}

fn compare(context: &mut Context<'_>, flags: impl Fn(usize, u64, u64) -> u64) -> Result<Next, Exit> {
    let size = context.size(0);
    let flags = flags(size, context.read(0)?, context.read(1)?);
    context.set_flags(ARITHMETIC, flags);
    Ok(Next::Sequential)
}

fn unary(
    context: &mut Context<'_>,
    which: u64,
    operation: impl Fn(usize, u64) -> (u64, u64),
) -> Result<Next, Exit> {
    let size = context.size(0);
    let flags = context.update(0, |a| operation(size, a))?;
    context.set_flags(which, flags);
    Ok(Next::Sequential)
}

fn xadd(context: &mut Context<'_>) -> Result<Next, Exit> {
    let size = context.size(0);
    let addend = context.read(1)?;
    let exchange = |old| {
        let (sum, flags) = add(size, old, addend, false);
        (sum, (old, sum, flags))
    };
    let (old, sum, flags) = context.update(0, exchange)?;
    context.write(1, old)?;
    if context.instruction.op_kind(0) == OpKind::Register {
        // With twice the same register the sum is what stays.
        context.write(0, sum)?;
    }
    context.set_flags(ARITHMETIC, flags);
    Ok(Next::Sequential)
}

fn cmpxchg(context: &mut Context<'_>) -> Result<Next, Exit> {
    let size = context.size(0);
    let accumulator = match size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    let expected = context.state.regs.rax & mask(size);
    let new = context.read(1)?;
    // The CPU writes in any case: the old value if the comparison fails.
    let span = context.resolve(0, Access::Write)?;
    let found = if context.instruction.has_lock_prefix() {
        context.exchange(&span, expected, new)?
    } else {
        let old = context.load(&span)?;
        context.store(&span, if old == expected { new } else { old })?;
        old
    };
    if found != expected {
        context.write_register(accumulator, found)?;
    }
    context.set_flags(ARITHMETIC, sub(size, expected, found, false).1);
    Ok(Next::Sequential)
}
