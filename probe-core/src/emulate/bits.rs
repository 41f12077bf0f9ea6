//! BT, BTS, BTR, BTC.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::flags::when;
use super::{Context, Exit, Handler, Next};
use crate::paging::Access;
use crate::rflags::CF;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Bt => |context| bit(context, None),
        Mnemonic::Bts => |context| bit(context, Some(|value, bit| value | bit)),
        Mnemonic::Btr => |context| bit(context, Some(|value, bit| value & !bit)),
        Mnemonic::Btc => |context| bit(context, Some(|value, bit| value ^ bit)),
        _ => return None,
    })
}

/// CF becomes the selected bit, which `change` then alters. The other flags stay.
fn bit(context: &mut Context<'_>, change: Option<fn(u64, u64) -> u64>) -> Result<Next, Exit> {
    let size = context.size(0);
    let offset = context.read(1)?;
    let selected = 1 << (offset % (8 * size as u64));
    let test = |value: u64| (change.map_or(value, |change| change(value, selected)), value & selected != 0);

    let carry = if context.instruction.op_kind(0) == OpKind::Memory {
        let gva = if context.instruction.op_kind(1) == OpKind::Register {
            context.bit_string(0, offset)?
        } else {
            context.address(0)?
        };
        if change.is_some() {
            let span = context.resolve_at(0, gva, Access::Write)?;
            context.update_memory(&span, context.instruction.has_lock_prefix(), test)?
        } else {
            let span = context.resolve_at(0, gva, Access::Read)?;
            test(context.load(&span)?).1
        }
    } else if change.is_some() {
        context.update(0, test)?
    } else {
        test(context.read(0)?).1
    };
    context.set_flags(CF, when(carry, CF));
    Ok(Next::Sequential)
}
