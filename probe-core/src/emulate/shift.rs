//! SHL, SHR, SAR, ROL, ROR, RCL, RCR, SHLD, SHRD.
//!
//! Counts are taken modulo 32, or 64 for 64-bit operands; a count of 0 changes no flag. OF is defined for a count of 1
//! only; for others it is computed the same way from the result, as CPUs do.

use iced_x86::{Instruction, Mnemonic};

use super::flags::{of_result, sign, when};
use super::operand::{mask, sign_extend};
use super::{Context, DeferReason, Exit, Handler, Next};
use crate::rflags::{ARITHMETIC, CF, OF};

/// The result and the flags.
type Shifted = (u64, u64);

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => {
            |context| shift(context, ARITHMETIC, |size, a, count, _| shl(size, a, count))
        }
        Mnemonic::Shr => |context| shift(context, ARITHMETIC, |size, a, count, _| shr(size, a, count)),
        Mnemonic::Sar => |context| shift(context, ARITHMETIC, |size, a, count, _| sar(size, a, count)),
        Mnemonic::Rol => |context| shift(context, CF | OF, |size, a, count, _| rol(size, a, count)),
        Mnemonic::Ror => |context| shift(context, CF | OF, |size, a, count, _| ror(size, a, count)),
        Mnemonic::Rcl => |context| shift(context, CF | OF, rcl),
        Mnemonic::Rcr => |context| shift(context, CF | OF, rcr),
        Mnemonic::Shld => |context| double(context, shld),
        Mnemonic::Shrd => |context| double(context, shrd),
        _ => return None,
    })
}

/// The count in operand `operand` as the CPU masks it.
fn count(context: &Context<'_>, operand: u32) -> Result<u32, Exit> {
    let limit = if context.size(0) == 8 { 63 } else { 31 };
    // At most 63.
    #[allow(clippy::cast_possible_truncation)]
    let count = (context.read(operand)? & limit) as u32;
    Ok(count)
}

fn shift(
    context: &mut Context<'_>,
    which: u64,
    operation: impl Fn(usize, u64, u32, bool) -> Shifted,
) -> Result<Next, Exit> {
    let size = context.size(0);
    let carry = context.flag(CF);
    let count = count(context, 1)?;
    let flags = context.update(0, |a| if count == 0 { (a, 0) } else { operation(size, a, count, carry) })?;
    if count != 0 {
        context.set_flags(which, flags);
    }
    Ok(Next::Sequential)
}

fn double(
    context: &mut Context<'_>,
    operation: impl Fn(usize, u64, u64, u32) -> Shifted,
) -> Result<Next, Exit> {
    let size = context.size(0);
    let count = count(context, 2)?;
    if count as usize > 8 * size {
        // Undefined for 16-bit operands.
        return Err(Exit::Defer(DeferReason::NotEmulated));
    }
    let other = context.read(1)?;
    let flags = context.update(0, |a| if count == 0 { (a, 0) } else { operation(size, a, other, count) })?;
    if count != 0 {
        context.set_flags(ARITHMETIC, flags);
    }
    Ok(Next::Sequential)
}

const fn bits(size: usize) -> u32 {
    mask(size).count_ones()
}

/// OF of a left shift: the sign bit differs from CF.
const fn left_overflow(size: usize, result: u64, carry: bool) -> u64 {
    when((result & sign(size) != 0) != carry, OF)
}

/// OF of a right shift or rotation: the two highest bits of the result differ.
const fn right_overflow(size: usize, result: u64) -> u64 {
    when((result ^ result << 1) & sign(size) != 0, OF)
}

fn shl(size: usize, a: u64, count: u32) -> Shifted {
    let wide = u128::from(a) << count;
    // The operand is at most 64 bits wide; what leaves it is looked at in the wide value.
    #[allow(clippy::cast_possible_truncation)]
    let result = wide as u64 & mask(size);
    let carry = wide >> bits(size) & 1 != 0;
    (result, of_result(size, result) | when(carry, CF) | left_overflow(size, result, carry))
}

fn shr(size: usize, a: u64, count: u32) -> Shifted {
    let before = a >> (count - 1);
    let result = before >> 1;
    (result, of_result(size, result) | when(before & 1 != 0, CF) | right_overflow(size, result))
}

fn sar(size: usize, a: u64, count: u32) -> Shifted {
    let before = sign_extend(a, size).cast_signed() >> (count - 1);
    let result = (before >> 1).cast_unsigned() & mask(size);
    (result, of_result(size, result) | when(before & 1 != 0, CF))
}

fn rol(size: usize, a: u64, count: u32) -> Shifted {
    let turn = count % bits(size);
    let result = if turn == 0 { a } else { (a << turn | a >> (bits(size) - turn)) & mask(size) };
    let carry = result & 1 != 0;
    (result, when(carry, CF) | left_overflow(size, result, carry))
}

fn ror(size: usize, a: u64, count: u32) -> Shifted {
    let turn = count % bits(size);
    let result = if turn == 0 { a } else { (a >> turn | a << (bits(size) - turn)) & mask(size) };
    (result, when(result & sign(size) != 0, CF) | right_overflow(size, result))
}

/// Rotates through CF: one bit more than the operand.
fn through_carry(size: usize, a: u64, carry: bool, left: u32) -> (u64, bool) {
    let width = bits(size) + 1;
    let ring = u128::from(a) | u128::from(carry) << bits(size);
    let turned = if left == 0 { ring } else { ring << left | ring >> (width - left) };
    // Bits above the ring are cut off, and the operand is at most 64 bits wide.
    #[allow(clippy::cast_possible_truncation)]
    let result = turned as u64 & mask(size);
    (result, turned >> bits(size) & 1 != 0)
}

fn rcl(size: usize, a: u64, count: u32, carry: bool) -> Shifted {
    let (result, out) = through_carry(size, a, carry, count % (bits(size) + 1));
    (result, when(out, CF) | left_overflow(size, result, out))
}

fn rcr(size: usize, a: u64, count: u32, carry: bool) -> Shifted {
    let width = bits(size) + 1;
    let (result, out) = through_carry(size, a, carry, (width - count % width) % width);
    (result, when(out, CF) | right_overflow(size, result))
}

fn shld(size: usize, a: u64, low: u64, count: u32) -> Shifted {
    let wide = (u128::from(a) << bits(size) | u128::from(low)) << (count - 1);
    let last = wide >> bits(size);
    // At most 64 bits are kept.
    #[allow(clippy::cast_possible_truncation)]
    let result = (wide << 1 >> bits(size)) as u64 & mask(size);
    // The last bit that leaves is the sign bit of the value before the last step.
    #[allow(clippy::cast_possible_truncation)]
    let carry = last as u64 & sign(size) != 0;
    (result, of_result(size, result) | when(carry, CF) | left_overflow(size, result, carry))
}

fn shrd(size: usize, a: u64, high: u64, count: u32) -> Shifted {
    let wide = (u128::from(high) << bits(size) | u128::from(a)) >> (count - 1);
    // At most 64 bits are kept.
    #[allow(clippy::cast_possible_truncation)]
    let result = (wide >> 1) as u64 & mask(size);
    (result, of_result(size, result) | when(wide & 1 != 0, CF) | right_overflow(size, result))
}
