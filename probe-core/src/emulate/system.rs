//! CLI, STI, HLT, CLAC, STAC, CLD, STD, CLC, STC, CMC, LAHF, SAHF.

use iced_x86::{Instruction, Mnemonic, Register};

use super::{Context, DeferReason, Exit, Handler, Next};
use crate::rflags::{AC, AF, CF, DF, FIXED, IF, IOPL, PF, SF, ZF};
use crate::{Exception, VcpuState, control};

/// CR4: CLI and STI at CPL 3 act on VIF.
const CR4_PVI: u64 = 1 << 1;
/// The flags that LAHF and SAHF move.
const AH_FLAGS: u64 = CF | PF | AF | ZF | SF;

pub(super) fn handler(instruction: &Instruction) -> Option<Handler> {
    Some(match instruction.mnemonic() {
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Hlt => hlt,
        Mnemonic::Clac => |context| access_control(context, 0),
        Mnemonic::Stac => |context| access_control(context, AC),
        Mnemonic::Cld => |context| change(context, |flags| flags & !DF),
        Mnemonic::Std => |context| change(context, |flags| flags | DF),
        Mnemonic::Clc => |context| change(context, |flags| flags & !CF),
        Mnemonic::Stc => |context| change(context, |flags| flags | CF),
        Mnemonic::Cmc => |context| change(context, |flags| flags ^ CF),
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        _ => return None,
    })
}

/// Whether CPL and IOPL allow a change of IF.
pub(super) fn may_change_if(state: &VcpuState) -> bool {
    u64::from(state.sys.cpl) <= (state.regs.rflags & IOPL) >> IOPL.trailing_zeros()
}

fn check_interrupt_rights(context: &Context<'_>) -> Result<(), Exit> {
    if may_change_if(&context.state) {
        return Ok(());
    }
    if context.state.sys.cpl == 3 && context.state.sys.cr4 & CR4_PVI != 0 {
        return Err(Exit::Defer(DeferReason::NotEmulated));
    }
    Err(Exit::Fault(Exception::GeneralProtection { code: 0 }))
}

fn cli(context: &mut Context<'_>) -> Result<Next, Exit> {
    check_interrupt_rights(context)?;
    context.set_flags(IF, 0);
    Ok(Next::Sequential)
}

/// The shadow arises only if IF was clear (Intel SDM vol. 2B, "STI").
fn sti(context: &mut Context<'_>) -> Result<Next, Exit> {
    check_interrupt_rights(context)?;
    context.state.shadow.sti = !context.flag(IF);
    context.set_flags(IF, IF);
    Ok(Next::Sequential)
}

fn hlt(context: &mut Context<'_>) -> Result<Next, Exit> {
    if context.state.sys.cpl != 0 {
        return Err(Exit::Fault(Exception::GeneralProtection { code: 0 }));
    }
    Ok(Next::Halt)
}

/// CLAC and STAC exist where SMAP does; CR4.SMAP being set proves it, otherwise the CPU has to say.
fn access_control(context: &mut Context<'_>, ac: u64) -> Result<Next, Exit> {
    if context.state.sys.cpl != 0 {
        return Err(Exit::Fault(Exception::InvalidOpcode));
    }
    if context.state.sys.cr4 & control::CR4_SMAP == 0 {
        return Err(Exit::Defer(DeferReason::NotEmulated));
    }
    context.set_flags(AC, ac);
    Ok(Next::Sequential)
}

// The handlers share one signature.
#[allow(clippy::unnecessary_wraps)]
fn change(context: &mut Context<'_>, flags: impl Fn(u64) -> u64) -> Result<Next, Exit> {
    context.state.regs.rflags = flags(context.state.regs.rflags);
    Ok(Next::Sequential)
}

fn lahf(context: &mut Context<'_>) -> Result<Next, Exit> {
    let image = context.state.regs.rflags & AH_FLAGS | FIXED;
    context.write_register(Register::AH, image)?;
    Ok(Next::Sequential)
}

// The handlers share one signature.
#[allow(clippy::unnecessary_wraps)]
fn sahf(context: &mut Context<'_>) -> Result<Next, Exit> {
    context.set_flags(AH_FLAGS, context.state.regs.rax >> 8);
    Ok(Next::Sequential)
}
