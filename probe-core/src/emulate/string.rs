//! MOVS, STOS, LODS, SCAS, CMPS, also repeated.
//!
//! A repeated form runs to its end in one go, but only if all of it will succeed: the pages are checked first. Where
//! some would fault later on, or where it would take too long, the instruction is deferred to the CPU. Where the guest itself
//! single-steps, one iteration is run: a #DB follows each of them (Intel SDM vol. 3B, 19.3.1.4), with RIP still at the
//! instruction if there are more.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::flags::sub;
use super::operand::mask;
use super::{Context, DeferReason, Exit, Handler, Next};
use crate::paging::Access;
use crate::rflags::{ARITHMETIC, DF, TF, ZF};
use crate::{Gva, PAGE_SIZE};

/// The most bytes that a repeated form moves without letting the guest take an interrupt.
const MAX_BYTES: u64 = 256 * 1024;

const NOT_EMULATED: Exit = Exit::Defer(DeferReason::NotEmulated);

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => |context| run(context, movs),
        Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => |context| run(context, stos),
        Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => |context| run(context, lods),
        Mnemonic::Scasb | Mnemonic::Scasw | Mnemonic::Scasd | Mnemonic::Scasq => |context| run(context, scas),
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq => |context| run(context, cmps),
        _ => return None,
    })
}

/// One iteration, without the count.
type Iteration = fn(&mut Context<'_>) -> Result<(), Exit>;

fn run(context: &mut Context<'_>, iteration: Iteration) -> Result<Next, Exit> {
    let (repe, repne) = (context.instruction.has_rep_prefix(), context.instruction.has_repne_prefix());
    if !repe && !repne {
        iteration(context)?;
        return Ok(Next::Sequential);
    }
    let single_step = context.flag(TF);
    if !single_step {
        check_range(context, context.state.regs.rcx)?;
    }
    let compares = compares(context.instruction);
    while context.state.regs.rcx != 0 {
        iteration(context)?;
        context.state.regs.rcx -= 1;
        if compares && context.flag(ZF) != repe {
            break;
        }
        if single_step && context.state.regs.rcx != 0 {
            return Ok(Next::Jump(Gva(context.instruction.ip())));
        }
    }
    Ok(Next::Sequential)
}

/// Whether the prefix also looks at ZF.
fn compares(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Scasb
            | Mnemonic::Scasw
            | Mnemonic::Scasd
            | Mnemonic::Scasq
            | Mnemonic::Cmpsb
            | Mnemonic::Cmpsw
            | Mnemonic::Cmpsd
            | Mnemonic::Cmpsq
    )
}

/// Makes sure that `count` iterations will succeed.
fn check_range(context: &Context<'_>, count: u64) -> Result<(), Exit> {
    if count == 0 {
        return Ok(());
    }
    let size = element(context) as u64;
    let bytes = count.checked_mul(size).filter(|bytes| *bytes <= MAX_BYTES).ok_or(NOT_EMULATED)?;
    if context.flag(DF) {
        return Err(NOT_EMULATED);
    }
    // The source is read first.
    let source_last = context.instruction.op1_kind() == OpKind::MemorySegRSI;
    for operand in if source_last { [1, 0] } else { [0, 1] } {
        let Some(access) = string_access(context.instruction, operand) else { continue };
        let start = context.address(operand)?;
        // What stops the first iteration is the instruction's own result.
        context.check(start, element(context), access)?;
        let end = start.offset(bytes - 1);
        let pages = (end.page().0.wrapping_sub(start.page().0)) / PAGE_SIZE;
        for page in 0..=pages {
            let at = if page == 0 { start } else { start.page().offset(page * PAGE_SIZE) };
            context.check(at, 1, access).map_err(|_| NOT_EMULATED)?;
        }
    }
    Ok(())
}

/// How an operand in memory is accessed; `None` for the accumulator.
fn string_access(instruction: &Instruction, operand: u32) -> Option<Access> {
    match instruction.op_kind(operand) {
        OpKind::MemorySegRSI => Some(Access::Read),
        OpKind::MemoryESRDI if operand == 0 && !compares(instruction) => Some(Access::Write),
        OpKind::MemoryESRDI => Some(Access::Read),
        _ => None,
    }
}

/// Size of one element in bytes.
fn element(context: &Context<'_>) -> usize {
    context.instruction.memory_size().size()
}

/// `register` after one iteration: DF decides the direction.
fn advance(context: &Context<'_>, register: u64) -> u64 {
    let size = element(context) as u64;
    if context.flag(DF) { register.wrapping_sub(size) } else { register.wrapping_add(size) }
}

fn load(context: &Context<'_>, operand: u32) -> Result<u64, Exit> {
    context.load(&context.resolve(operand, Access::Read)?)
}

fn store(context: &Context<'_>, value: u64) -> Result<(), Exit> {
    context.store(&context.resolve(0, Access::Write)?, value)
}

fn movs(context: &mut Context<'_>) -> Result<(), Exit> {
    let value = load(context, 1)?;
    store(context, value)?;
    context.state.regs.rsi = advance(context, context.state.regs.rsi);
    context.state.regs.rdi = advance(context, context.state.regs.rdi);
    Ok(())
}

fn stos(context: &mut Context<'_>) -> Result<(), Exit> {
    store(context, context.state.regs.rax)?;
    context.state.regs.rdi = advance(context, context.state.regs.rdi);
    Ok(())
}

fn lods(context: &mut Context<'_>) -> Result<(), Exit> {
    let value = load(context, 1)?;
    context.write_register(context.instruction.op0_register(), value)?;
    context.state.regs.rsi = advance(context, context.state.regs.rsi);
    Ok(())
}

/// Compares the accumulator with the destination.
fn scas(context: &mut Context<'_>) -> Result<(), Exit> {
    let value = load(context, 1)?;
    let size = element(context);
    let accumulator = context.state.regs.rax & mask(size);
    context.set_flags(ARITHMETIC, sub(size, accumulator, value, false).1);
    context.state.regs.rdi = advance(context, context.state.regs.rdi);
    Ok(())
}

/// Compares the source with the destination.
fn cmps(context: &mut Context<'_>) -> Result<(), Exit> {
    let (source, destination) = (load(context, 0)?, load(context, 1)?);
    context.set_flags(ARITHMETIC, sub(element(context), source, destination, false).1);
    context.state.regs.rsi = advance(context, context.state.regs.rsi);
    context.state.regs.rdi = advance(context, context.state.regs.rdi);
    Ok(())
}
