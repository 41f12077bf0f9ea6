//! Puts right what an instruction that ran in a slot has left: registers when it is complete, and the frame on the stack
//! when an event interrupted it.
//!
//! In a slot IF and TF are off. Nothing shows that, nor where the instruction ran, once this is done: neither RIP and
//! RFLAGS nor the frame that the guest's handler reads, goes back through, or looks up in its exception table.

use iced_x86::{Code, Instruction, Register};

use crate::{Gva, InterruptShadow, PhysicalMemory, SystemRegisters, VcpuState, paging, rflags};

/// The flags that are off in a slot.
pub const HELD_FLAGS: u64 = rflags::IF | rflags::TF;

/// How many events, each on the first instruction of the handler of the one before, are followed. An NMI and a machine
/// check can follow a fault; no more come before the guest's handlers have run.
const MAX_NESTED: usize = 4;

/// Makes `after`, the state at the end of the slot, the state behind `instruction`, with IF and TF as they were before it.
pub fn complete(instruction: &Instruction, flags_before: u64, after: &mut VcpuState) {
    let transaction = instruction.code() == Code::Xbegin_rel32;
    after.regs.rip = if transaction { instruction.near_branch64() } else { instruction.next_ip() };
    after.regs.rflags = after.regs.rflags & !(HELD_FLAGS | rflags::RF) | flags_before & HELD_FLAGS;
    after.shadow = InterruptShadow { sti: false, mov_ss: casts_shadow(instruction) };
}

/// Makes `state`, in which `instruction` has not run or not to its end, the state before it. RF is set, as in the frame of a
/// fault (Intel SDM vol. 3B, 17.3.1.1).
pub fn go_back(instruction: &Instruction, flags_before: u64, state: &mut VcpuState) {
    state.regs.rip = instruction.ip();
    state.regs.rflags = state.regs.rflags & !HELD_FLAGS | flags_before & HELD_FLAGS | rflags::RF;
}

/// MOV SS holds interrupts and debug exceptions off for one instruction (Intel SDM vol. 3A, 6.8.3). POP SS does not exist in
/// 64-bit mode.
fn casts_shadow(instruction: &Instruction) -> bool {
    let loads =
        matches!(instruction.code(), Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16);
    loads && instruction.op0_register() == Register::SS
}

/// What the CPU pushes for an event in 64-bit mode, without the error code (Intel SDM vol. 3A, 6.14.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where it lies: the linear address of RIP's image.
    at: Gva,
    /// RIP of the interrupted instruction, or of the next one.
    pub rip: u64,
    /// RFLAGS of the interrupted code.
    pub rflags: u64,
    /// RSP of the interrupted code.
    pub rsp: u64,
}

impl Frame {
    /// The frame on top of the stack, if it interrupted CPL 0 at an address that `is_return` knows: user mode may jump
    /// anywhere. An error code may lie above it. Neither an error code nor CS is ever such an address, so the two places
    /// cannot be mistaken for each other.
    fn read(
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        rsp: u64,
        is_return: impl Fn(Gva) -> bool,
    ) -> Option<Self> {
        let mut bytes = [0; 40];
        let valid = paging::read_virtual(sys, memory, Gva(rsp), &mut bytes);
        let word = |index: usize| {
            let bytes = bytes[..valid].get(8 * index..)?.first_chunk()?;
            Some(u64::from_le_bytes(*bytes))
        };
        [0, 1].into_iter().find_map(|above| {
            let rip = word(above).filter(|rip| is_return(Gva(*rip)))?;
            let kernel = word(above + 1)? & 3 == 0;
            let at = Gva(rsp).offset(8 * above as u64);
            kernel.then_some(Self { at, rip, rflags: word(above + 2)?, rsp: word(above + 3)? })
        })
    }

    /// The error code that lies above it, where the vector has one.
    #[must_use]
    pub fn error_code(&self, sys: &SystemRegisters, memory: &dyn PhysicalMemory) -> Option<u64> {
        let gpa = paging::physical(sys, memory, self.at.offset(8_u64.wrapping_neg()))?;
        memory.read_u64(gpa).ok()
    }

    /// Writes the frame back. False if its page is gone.
    #[must_use]
    pub fn write(&self, sys: &SystemRegisters, memory: &dyn PhysicalMemory) -> bool {
        [(0, self.rip), (16, self.rflags), (24, self.rsp)].into_iter().all(|(offset, value)| {
            // The CPU aligns a frame to 16 bytes, so no word of it crosses a page.
            let gpa = paging::physical(sys, memory, self.at.offset(offset));
            gpa.is_some_and(|gpa| memory.write(gpa, &value.to_le_bytes()).is_ok())
        })
    }
}

/// An event that took a vCPU out of its slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interruption {
    /// Its frame; RIP lies in the slot, or right behind the instruction there.
    pub frame: Frame,
    /// Its handler.
    pub handler: Gva,
    /// The frame of a further event that was taken on the first instruction of that handler.
    pub outer: Option<Frame>,
}

/// Finds what interrupted the instruction of `len` bytes at `slot`, from the state at the start of an event's handler.
/// `is_handler` tells the handlers of the guest.
#[must_use]
pub fn find_interruption(
    state: &VcpuState,
    memory: &dyn PhysicalMemory,
    slot: Gva,
    len: u64,
    is_handler: impl Fn(Gva) -> bool,
) -> Option<Interruption> {
    let in_slot = |rip: Gva| (slot..=slot.offset(len)).contains(&rip);
    let (mut handler, mut rsp, mut outer) = (Gva(state.regs.rip), state.regs.rsp, None);
    if !is_handler(handler) {
        return None;
    }
    for _ in 0..MAX_NESTED {
        let frame = Frame::read(&state.sys, memory, rsp, |rip| in_slot(rip) || is_handler(rip))?;
        if in_slot(Gva(frame.rip)) {
            return Some(Interruption { frame, handler, outer });
        }
        (handler, rsp, outer) = (Gva(frame.rip), frame.rsp, Some(frame));
    }
    None
}

#[cfg(test)]
mod tests;
