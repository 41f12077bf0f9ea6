//! After a single step in a slot: the state as it would be, had the instruction run in its place.
//!
//! Nothing the step has left shows the slot or the host's TF any more: RIP points behind the original instruction, a
//! pushed return address too, and TF and IF are the guest's own. Only instructions that [`crate::plan::check_step`] lets
//! through come here, and none of those changes TF or IF.

use iced_x86::{Code, Instruction};

use crate::paging::{Access, Marks};
use crate::space::{AddressSpace, Operand};
use crate::{Gva, InterruptShadow, VcpuState, rflags};

/// How a step ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepEnd {
    /// The instruction is complete.
    Done,
    /// One iteration of a repeated string instruction is complete, and RIP is back on it: check and step again.
    Again,
    /// RIP or the stack is where this instruction cannot have taken it: a fault, an interrupt, or a lost step. The state
    /// is left as the step left it.
    Astray {
        /// Where RIP was found.
        rip: Gva,
    },
}

/// Puts `after`, as a step of `instruction` in the slot at `slot` has left it, right. `before` is the state at the hit,
/// with the original RIP. The step may have stopped on the guard behind the instruction just as well as after it.
///
/// Consistency on error: [`StepEnd::Astray`] leaves `after` and memory alone.
pub fn after_step(
    instruction: &Instruction,
    before: &VcpuState,
    after: &mut VcpuState,
    slot: Gva,
    space: &AddressSpace<'_>,
) -> StepEnd {
    let astray = StepEnd::Astray { rip: Gva(after.regs.rip) };
    let slot_end = slot.offset(instruction.len() as u64);
    let (end, rip) = match instruction.code() {
        Code::Jmp_rm64 | Code::Call_rm64 | Code::Retnq | Code::Retnq_imm16 => {
            let moved = after.regs.rsp.wrapping_sub(before.regs.rsp).cast_signed();
            if moved != stack_movement(instruction) {
                return astray;
            }
            let called = instruction.code() == Code::Call_rm64;
            if called && !fix_return_address(instruction, after, slot_end, space) {
                return astray;
            }
            (StepEnd::Done, after.regs.rip)
        }
        _ if after.regs.rip == slot_end.0 => (StepEnd::Done, instruction.next_ip()),
        _ if after.regs.rip == slot.0 && is_repeated(instruction) => (StepEnd::Again, instruction.ip()),
        _ => return astray,
    };
    let kept = rflags::TF | rflags::IF;
    after.regs.rip = rip;
    after.regs.rflags = (after.regs.rflags & !kept & !rflags::RF) | (before.regs.rflags & kept);
    after.shadow = InterruptShadow::default();
    end
}

/// By how much a near branch moves RSP.
fn stack_movement(instruction: &Instruction) -> i64 {
    match instruction.code() {
        Code::Call_rm64 => -8,
        Code::Retnq => 8,
        Code::Retnq_imm16 => 8 + i64::from(instruction.immediate16()),
        _ => 0,
    }
}

fn is_repeated(instruction: &Instruction) -> bool {
    instruction.is_string_instruction() && (instruction.has_rep_prefix() || instruction.has_repne_prefix())
}

/// Replaces the slot's return address on the stack; false if it is not there.
fn fix_return_address(
    instruction: &Instruction,
    after: &VcpuState,
    slot_end: Gva,
    space: &AddressSpace<'_>,
) -> bool {
    let operand = Operand { gva: Gva(after.regs.rsp), len: 8, stack: true };
    let Ok(span) = space.resolve(after, operand, Access::Write, Marks::Keep) else {
        return false;
    };
    space.read_value(&span) == Ok(slot_end.0) && space.write_value(&span, instruction.next_ip()).is_ok()
}

#[cfg(test)]
mod tests;
