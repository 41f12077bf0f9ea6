//! Operands: registers, immediates, memory.

use iced_x86::{Instruction, OpKind, Register};

use super::{DeferReason, Exit};
use crate::paging::{Access, Marks};
use crate::space::{AddressSpace, Operand, Span};
use crate::{Gpa, Gva, Registers, VcpuState};

/// One instruction at work on a copy of the state.
pub(super) struct Context<'a> {
    pub instruction: &'a Instruction,
    pub state: VcpuState,
    space: &'a AddressSpace<'a>,
}

/// The bits of a value of `size` bytes (1, 2, 4, 8).
pub(super) const fn mask(size: usize) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (8 * size)) - 1 }
}

/// Sign-extends the low `size` bytes (1, 2, 4, 8).
pub(super) const fn sign_extend(value: u64, size: usize) -> u64 {
    if size >= 8 {
        return value;
    }
    let unused = 64 - 8 * size;
    ((value << unused).cast_signed() >> unused).cast_unsigned()
}

/// Reads a general-purpose register, zero-extended; `None` if it is of another kind.
pub(crate) fn read_register(regs: &Registers, register: Register) -> Option<u64> {
    let full = *{ *regs }.full_mut(register)?;
    Some(match register {
        Register::AH | Register::CH | Register::DH | Register::BH => full >> 8 & 0xff,
        _ => full & mask(register.size()),
    })
}

/// Writes a general-purpose register as the CPU does: 8 and 16 bits are merged, 32 bits clear the upper half.
pub(super) fn write_register(regs: &mut Registers, register: Register, value: u64) -> Option<()> {
    let full = regs.full_mut(register)?;
    *full = match (register, register.size()) {
        (Register::AH | Register::CH | Register::DH | Register::BH, _) => {
            *full & !0xff00 | (value & 0xff) << 8
        }
        (_, 8) => value,
        (_, 4) => value & mask(4),
        (_, size) => *full & !mask(size) | value & mask(size),
    };
    Some(())
}

/// What address arithmetic adds for `register`: a general-purpose register, or a segment base. In 64-bit mode only FS
/// and GS have one.
pub(crate) fn address_register(state: &VcpuState, register: Register) -> Option<u64> {
    match register {
        Register::FS => Some(state.sys.fs_base),
        Register::GS => Some(state.sys.gs_base),
        Register::ES | Register::CS | Register::SS | Register::DS => Some(0),
        _ => read_register(&state.regs, register),
    }
}

/// Whether a memory operand with this base register is relative to the stack segment. Overrides other than FS and GS
/// are ignored in 64-bit mode (Intel SDM vol. 1, 3.3.7.1).
fn is_stack_segment(instruction: &Instruction, base: Register) -> bool {
    let overridden = matches!(instruction.segment_prefix(), Register::FS | Register::GS);
    !overridden && matches!(base.full_register(), Register::RSP | Register::RBP)
}

/// The memory operand of BT, BTS, BTR and BTC with the bit offset in a register: the offset is signed and reaches
/// beyond the operand (Intel SDM vol. 2A, "BT"). `address` is that of the operand itself; `size` is its size in bytes.
pub(super) const fn bit_string_address(address: u64, offset: u64, size: usize) -> u64 {
    let elements = sign_extend(offset, size).cast_signed() >> (8 * size).trailing_zeros();
    address.wrapping_add((elements * size.cast_signed() as i64).cast_unsigned())
}

/// Size of the addresses that an instruction's memory operand is computed in, bytes: 8, or 4 with prefix 67.
fn address_size(instruction: &Instruction) -> usize {
    match (instruction.memory_base(), instruction.memory_index()) {
        (Register::None, Register::None) => instruction.memory_displ_size() as usize,
        (Register::None, register) | (register, _) => register.size(),
    }
}

impl<'a> Context<'a> {
    pub(super) fn new(instruction: &'a Instruction, state: VcpuState, space: &'a AddressSpace<'a>) -> Self {
        Self { instruction, state, space }
    }

    /// Size of an operand in bytes; an immediate is as wide as the first operand.
    pub(super) fn size(&self, operand: u32) -> usize {
        match self.instruction.op_kind(operand) {
            OpKind::Register => self.instruction.op_register(operand).size(),
            OpKind::Memory | OpKind::MemorySegRSI | OpKind::MemoryESRDI => {
                self.instruction.memory_size().size()
            }
            _ if operand > 0 => self.size(0),
            _ => 8,
        }
    }

    /// The linear address of a memory operand.
    pub(super) fn address(&self, operand: u32) -> Result<Gva, Exit> {
        self.instruction
            .virtual_address(operand, 0, |register, _, _| address_register(&self.state, register))
            .map(Gva)
            .ok_or(Exit::Defer(DeferReason::NotEmulated))
    }

    /// The effective address of a memory operand, without the segment base.
    pub(super) fn offset(&self, operand: u32) -> Result<u64, Exit> {
        self.instruction
            .virtual_address(operand, 0, |register, _, _| {
                if register.is_segment_register() {
                    Some(0)
                } else {
                    read_register(&self.state.regs, register)
                }
            })
            .ok_or(Exit::Defer(DeferReason::NotEmulated))
    }

    /// The linear address of the element of a bit string that bit `bit` is in. It wraps around as the operand's own address
    /// does, before the segment base is added.
    pub(super) fn bit_string(&self, operand: u32, bit: u64) -> Result<Gva, Exit> {
        let offset = self.offset(operand)?;
        let segment_base = self.address(operand)?.0.wrapping_sub(offset);
        let element =
            bit_string_address(offset, bit, self.size(operand)) & mask(address_size(self.instruction));
        Ok(Gva(element.wrapping_add(segment_base)))
    }

    /// Checks the access to a memory operand and finds its bytes.
    pub(super) fn resolve(&self, operand: u32, access: Access) -> Result<Span, Exit> {
        let gva = self.address(operand)?;
        self.resolve_at(operand, gva, access)
    }

    /// As [`Context::resolve`], at another address than the operand's own.
    pub(super) fn resolve_at(&self, operand: u32, gva: Gva, access: Access) -> Result<Span, Exit> {
        let stack = is_stack_segment(self.instruction, self.instruction.memory_base());
        let operand = Operand { gva, len: self.size(operand), stack };
        Ok(self.space.resolve(&self.state, operand, access, Marks::Set)?)
    }

    /// The value of an operand, zero-extended; an immediate is sign-extended to 64 bits first.
    pub(super) fn read(&self, operand: u32) -> Result<u64, Exit> {
        let value = match self.instruction.op_kind(operand) {
            OpKind::Register => read_register(&self.state.regs, self.instruction.op_register(operand)),
            OpKind::Memory => Some(self.load(&self.resolve(operand, Access::Read)?)?),
            _ => self.instruction.try_immediate(operand).ok().map(|value| value & mask(self.size(operand))),
        };
        value.ok_or(Exit::Defer(DeferReason::NotEmulated))
    }

    /// Stores an operand.
    pub(super) fn write(&mut self, operand: u32, value: u64) -> Result<(), Exit> {
        if self.instruction.op_kind(operand) == OpKind::Memory {
            let span = self.resolve(operand, Access::Write)?;
            return self.store(&span, value);
        }
        self.write_register(self.instruction.op_register(operand), value)
    }

    pub(super) fn write_register(&mut self, register: Register, value: u64) -> Result<(), Exit> {
        write_register(&mut self.state.regs, register, value).ok_or(Exit::Defer(DeferReason::NotEmulated))
    }

    pub(super) fn load(&self, span: &Span) -> Result<u64, Exit> {
        Ok(self.space.read_value(span)?)
    }

    pub(super) fn store(&self, span: &Span, value: u64) -> Result<(), Exit> {
        Ok(self.space.write_value(span, value)?)
    }

    /// Replaces an operand by `change` of it and returns what `change` says besides. With a LOCK prefix the exchange
    /// is atomic and `change` may be called more than once.
    pub(super) fn update<T>(&mut self, operand: u32, change: impl Fn(u64) -> (u64, T)) -> Result<T, Exit> {
        if self.instruction.op_kind(operand) != OpKind::Memory {
            let (new, told) = change(self.read(operand)?);
            self.write(operand, new)?;
            return Ok(told);
        }
        let span = self.resolve(operand, Access::Write)?;
        self.update_memory(&span, self.instruction.has_lock_prefix(), change)
    }

    /// As [`Context::update`], on memory that has been resolved for writing.
    pub(super) fn update_memory<T>(
        &self,
        span: &Span,
        locked: bool,
        change: impl Fn(u64) -> (u64, T),
    ) -> Result<T, Exit> {
        let mut current = self.load(span)?;
        loop {
            let (new, told) = change(current);
            if !locked {
                self.store(span, new)?;
                return Ok(told);
            }
            let found = self.exchange(span, current, new)?;
            if found == current {
                return Ok(told);
            }
            current = found;
        }
    }

    /// An atomic compare-exchange on memory that has been resolved for writing; returns what was found.
    pub(super) fn exchange(&self, span: &Span, current: u64, new: u64) -> Result<u64, Exit> {
        match self.space.compare_exchange(span, current, new) {
            Some(found) => Ok(found?),
            None => Err(Exit::Defer(DeferReason::Misaligned(span.gva()))),
        }
    }

    /// Whether `len` bytes at `gva` would take the access; nothing is marked or changed.
    pub(super) fn check(&self, gva: Gva, len: usize, access: Access) -> Result<(), Exit> {
        let operand = Operand { gva, len, stack: false };
        let span = self.space.resolve(&self.state, operand, access, Marks::Keep)?;
        Ok(self.space.check_ram(&span, access)?)
    }

    /// Whether there is RAM at a guest-physical address.
    pub(super) fn is_ram(&self, gpa: Gpa) -> bool {
        self.space.memory.read(gpa, &mut [0]).is_ok()
    }

    /// Resolves `len` bytes of stack at `rsp`.
    pub(super) fn stack(&self, rsp: u64, len: usize, access: Access) -> Result<Span, Exit> {
        let operand = Operand { gva: Gva(rsp), len, stack: true };
        Ok(self.space.resolve(&self.state, operand, access, Marks::Set)?)
    }

    /// Pushes the low `size` bytes of `value`. The store is the last thing that can fail.
    pub(super) fn push(&mut self, value: u64, size: usize) -> Result<(), Exit> {
        let rsp = self.state.regs.rsp.wrapping_sub(size as u64);
        let span = self.stack(rsp, size, Access::Write)?;
        self.store(&span, value)?;
        self.state.regs.rsp = rsp;
        Ok(())
    }

    /// Pops `size` bytes, zero-extended.
    pub(super) fn pop(&mut self, size: usize) -> Result<u64, Exit> {
        let span = self.stack(self.state.regs.rsp, size, Access::Read)?;
        let value = self.load(&span)?;
        self.state.regs.rsp = self.state.regs.rsp.wrapping_add(size as u64);
        Ok(value)
    }

    /// Replaces the flags selected by `which`.
    pub(super) fn set_flags(&mut self, which: u64, flags: u64) {
        let old = self.state.regs.rflags;
        self.state.regs.rflags = old & !which | flags & which;
    }

    pub(super) fn flag(&self, which: u64) -> bool {
        self.state.regs.rflags & which != 0
    }
}
