//! CLI, STI, HLT, CLAC, STAC, CLD, STD, CLC, STC, CMC, LAHF, SAHF, UD0, UD1, UD2, MOV to CR3.

use iced_x86::{Code, Instruction, Mnemonic, Register};

use super::{Context, DeferReason, Exit, Handler, Next};
use crate::paging::entry;
use crate::rflags::{AC, AF, CF, DF, FIXED, IF, IOPL, PF, SF, TF, ZF};
use crate::{Exception, Gpa, VcpuState, control};

/// CR4: CLI and STI at CPL 3 act on VIF.
const CR4_PVI: u64 = 1 << 1;
/// CR4: CR3 holds a process-context identifier.
const CR4_PCIDE: u64 = 1 << 17;
/// MOV to CR3 with CR4.PCIDE: keep what the TLB holds for that identifier. Not a bit of CR3.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// The identifier, or PWT and PCD.
const CR3_LOW: u64 = 0xfff;
/// The flags that LAHF and SAHF move.
const AH_FLAGS: u64 = CF | PF | AF | ZF | SF;

/// The one instruction with a control register as operand.
pub(super) fn address_space_handler(instruction: &Instruction) -> Option<Handler> {
    let loads = instruction.code() == Code::Mov_cr_r64 && instruction.op0_register() == Register::CR3;
    loads.then_some(load_address_space)
}

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
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => undefined,
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

/// The #DB of the guest's own single step wakes the vCPU at once (Intel SDM vol. 2A, "HLT").
fn hlt(context: &mut Context<'_>) -> Result<Next, Exit> {
    if context.state.sys.cpl != 0 {
        return Err(Exit::Fault(Exception::GeneralProtection { code: 0 }));
    }
    Ok(if context.flag(TF) { Next::Sequential } else { Next::Halt })
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

/// The operands of UD0 and UD1 are not accessed.
fn undefined(_: &mut Context<'_>) -> Result<Next, Exit> {
    Err(Exit::Fault(Exception::InvalidOpcode))
}

/// MOV to CR3. Elsewhere than in its place it could not run: in the new address space there may be nothing behind it to
/// fetch. A new value makes KVM flush the TLB; the same one is loaded to flush the TLB, which only the CPU does.
fn load_address_space(context: &mut Context<'_>) -> Result<Next, Exit> {
    let (cpl, cr4) = (context.state.sys.cpl, context.state.sys.cr4);
    if cpl != 0 {
        return Err(Exit::Fault(Exception::GeneralProtection { code: 0 }));
    }
    let mut value = context.read(1)?;
    if cr4 & CR4_PCIDE != 0 {
        value &= !CR3_NO_FLUSH;
    }
    // Further bits fault or tag addresses, which depends on the CPU; a root in RAM is within its physical addresses.
    let plain = value & !(entry::ADDRESS | CR3_LOW) == 0 && context.is_ram(Gpa(value & entry::ADDRESS));
    if !plain || value == context.state.sys.cr3 {
        return Err(Exit::Defer(DeferReason::NotEmulated));
    }
    context.state.sys.cr3 = value;
    Ok(Next::Sequential)
}
