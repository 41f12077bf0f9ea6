//! Puts right what an instruction that ran in a slot, or in its place, has left: registers when it is complete, and the frame on the stack
//! when an event interrupted it.
//!
//! Meanwhile IF and TF are off. Nothing shows that, nor where the instruction ran, once this is done: neither RIP and
//! RFLAGS nor the frame that the guest's handler reads, goes back through, or looks up in its exception table.

use iced_x86::{Code, Instruction, Register};

use crate::{Gva, InterruptShadow, PhysicalMemory, SystemRegisters, VcpuState, paging, rflags};

/// The flags that are off while a displaced instruction runs.
pub const HELD_FLAGS: u64 = rflags::IF | rflags::TF;

/// How many events, each on the first instruction of the handler of the one before, are followed. An NMI and a machine
/// check can follow a fault; no more come before the guest's handlers have run.
const MAX_NESTED: usize = 4;

/// Makes `after`, the state at the guard, the state behind `instruction`, with IF and TF as they were before it.
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
    /// The frame on top of the stack, if it interrupted code at an address and a CPL that `is_return` knows. An error code may
    /// lie above it.
    fn read(
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        rsp: u64,
        is_return: impl Fn(Gva, u8) -> bool,
    ) -> Option<Self> {
        let mut bytes = [0; 40];
        let valid = paging::read_virtual(sys, memory, Gva(rsp), &mut bytes);
        let word = |index: usize| {
            let bytes = bytes[..valid].get(8 * index..)?.first_chunk()?;
            Some(u64::from_le_bytes(*bytes))
        };
        [0, 1].into_iter().find_map(|above| {
            let rip = word(above)?;
            let cpl = word(above + 1)?.to_le_bytes()[0] & 3;
            // Neither an error code nor CS is ever an address of the kernel's; user code may be at any address. But the CPU
            // aligns RSP to 16 bytes before it pushes the five words, and then the error code (Intel SDM vol. 3A, 6.14.2).
            let lies_here = cpl == 0 || rsp.is_multiple_of(16) == (above == 1);
            let at = Gva(rsp).offset(8 * above as u64);
            let frame = Self { at, rip, rflags: word(above + 2)?, rsp: word(above + 3)? };
            (lies_here && is_return(Gva(rip), cpl)).then_some(frame)
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

/// An event that interrupted a displaced instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interruption {
    /// Its frame; RIP lies where the instruction runs, or right behind it.
    pub frame: Frame,
    /// Its handler.
    pub handler: Gva,
    /// The frame of a further event that was taken on the first instruction of that handler.
    pub outer: Option<Frame>,
}

/// Finds what interrupted the instruction of `len` bytes that runs at `start` with this CPL, from the state at the start of an
/// event's handler. `is_handler` tells the handlers of the guest, which run at CPL 0.
#[must_use]
pub fn find_interruption(
    state: &VcpuState,
    memory: &dyn PhysicalMemory,
    start: Gva,
    len: u64,
    cpl: u8,
    is_handler: impl Fn(Gva) -> bool,
) -> Option<Interruption> {
    let is_at = |rip: Gva, at: u8| (start..=start.offset(len)).contains(&rip) && at == cpl;
    let (mut handler, mut rsp, mut outer) = (Gva(state.regs.rip), state.regs.rsp, None);
    if !is_handler(handler) {
        return None;
    }
    for _ in 0..MAX_NESTED {
        let is_return = |rip: Gva, at: u8| is_at(rip, at) || at == 0 && is_handler(rip);
        let frame = Frame::read(&state.sys, memory, rsp, is_return)?;
        if !is_handler(Gva(frame.rip)) {
            return Some(Interruption { frame, handler, outer });
        }
        (handler, rsp, outer) = (Gva(frame.rip), frame.rsp, Some(frame));
    }
    None
}

#[cfg(test)]
mod tests;
