//! The part of a vCPU's state that the engine reads and writes.
//!
//! Plain values: the `vmm` crate fills them from KVM's shared run page and writes back what changed.

use iced_x86::Register;

use crate::paging::is_canonical;

/// RFLAGS bits (Intel SDM vol. 1, 3.4.3).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    /// Parity of the low byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap flag: #DB after every instruction.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// Direction of string instructions.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level, two bits.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume: no instruction breakpoint on the next instruction.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check; with SMAP, permission for supervisor accesses to user pages.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt flag.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID available.
    pub const ID: u64 = 1 << 21;
    /// The six flags that arithmetic sets.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Control-register and EFER bits: how memory is accessed, and which instructions are enabled (Intel SDM vol. 3A, 2.5 and 4.1).
pub mod control {
    /// CR0: protected mode.
    pub const CR0_PE: u64 = 1 << 0;
    /// CR0: supervisor writes obey read-only pages.
    pub const CR0_WP: u64 = 1 << 16;
    /// CR0: alignment checks at CPL 3 when RFLAGS.AC is set.
    pub const CR0_AM: u64 = 1 << 18;
    /// CR0: paging.
    pub const CR0_PG: u64 = 1 << 31;
    /// CR4: physical-address extension.
    pub const CR4_PAE: u64 = 1 << 5;
    /// CR4: FXSAVE and SSE.
    pub const CR4_OSFXSR: u64 = 1 << 9;
    /// CR4: unmasked SSE exceptions raise #XM.
    pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
    /// CR4: five-level paging.
    pub const CR4_LA57: u64 = 1 << 12;
    /// CR4: RDFSBASE and its kind.
    pub const CR4_FSGSBASE: u64 = 1 << 16;
    /// CR4: XSAVE and XSETBV.
    pub const CR4_OSXSAVE: u64 = 1 << 18;
    /// CR4: no supervisor fetch from user pages.
    pub const CR4_SMEP: u64 = 1 << 20;
    /// CR4: no supervisor access to user pages unless RFLAGS.AC is set.
    pub const CR4_SMAP: u64 = 1 << 21;
    /// CR4: protection keys for user pages.
    pub const CR4_PKE: u64 = 1 << 22;
    /// CR4: control-flow enforcement.
    pub const CR4_CET: u64 = 1 << 23;
    /// EFER: long mode active.
    pub const EFER_LMA: u64 = 1 << 10;
    /// EFER: no-execute pages.
    pub const EFER_NXE: u64 = 1 << 11;
}

/// The general-purpose registers, RIP and RFLAGS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl Registers {
    /// All 64 bits of the general-purpose register that `register` is or is part of; `None` if it is of another kind.
    pub fn full_mut(&mut self, register: Register) -> Option<&mut u64> {
        Some(match register.full_register() {
            Register::RAX => &mut self.rax,
            Register::RBX => &mut self.rbx,
            Register::RCX => &mut self.rcx,
            Register::RDX => &mut self.rdx,
            Register::RSI => &mut self.rsi,
            Register::RDI => &mut self.rdi,
            Register::RSP => &mut self.rsp,
            Register::RBP => &mut self.rbp,
            Register::R8 => &mut self.r8,
            Register::R9 => &mut self.r9,
            Register::R10 => &mut self.r10,
            Register::R11 => &mut self.r11,
            Register::R12 => &mut self.r12,
            Register::R13 => &mut self.r13,
            Register::R14 => &mut self.r14,
            Register::R15 => &mut self.r15,
            _ => return None,
        })
    }
}

/// The control registers and segment facts that decide how an instruction runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct SystemRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR2: the linear address of the last page fault. The engine writes it when it injects one.
    pub cr2: u64,
    /// CR3: the root of the page tables, with PCID and flag bits.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// Linear address of the interrupt descriptor table (IDTR.base).
    pub idt_base: u64,
    /// Offset of that table's last byte (IDTR.limit).
    pub idt_limit: u16,
    /// Current privilege level, 0..=3.
    pub cpl: u8,
    /// CS.L: the code segment is 64-bit.
    pub long_code: bool,
}

/// Whether the instruction now at RIP stands in the one-instruction shadow of STI or MOV SS
/// (Intel SDM vol. 3A, 6.8.3; KVM_X86_SHADOW_INT_STI and KVM_X86_SHADOW_INT_MOV_SS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct InterruptShadow {
    /// After STI.
    pub sti: bool,
    /// After MOV SS or POP SS.
    pub mov_ss: bool,
}

/// A vCPU's state at a stop.
///
/// Consistency on error: an operation that fails leaves the state it was given untouched; it works on a copy and
/// assigns at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct VcpuState {
    /// General-purpose registers, RIP, RFLAGS.
    pub regs: Registers,
    /// Control registers and segment facts.
    pub sys: SystemRegisters,
    /// The interrupt shadow.
    pub shadow: InterruptShadow,
}

/// Why a vCPU cannot run on with other registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegistersError {
    /// The CPU would refuse to enter the guest.
    #[error(
        "RIP {0} is not canonical, or beyond 4 GiB outside 64-bit code; give an address that can be fetched from"
    )]
    Rip(crate::Gva),
    /// TF, RF, VM, VIF, VIP and the reserved bits.
    #[error("RFLAGS bits {0:#x} cannot be changed from outside; leave them as they are")]
    Flags(u64),
}

impl VcpuState {
    /// RFLAGS bits that are taken over: those that decide neither how the guest is debugged nor in which mode it runs.
    const FLAGS: u64 =
        rflags::ARITHMETIC | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;

    /// The same vCPU with other registers, if it can run on so (Intel SDM vol. 3C, 26.3.1.4).
    ///
    /// # Errors
    /// [`RegistersError`].
    pub fn with_registers(&self, regs: Registers) -> Result<Self, RegistersError> {
        let rip = crate::Gva(regs.rip);
        let fetched = if self.sys.long_code { is_canonical(&self.sys, rip) } else { rip.0 >> 32 == 0 };
        if !fetched {
            return Err(RegistersError::Rip(rip));
        }
        let changed = regs.rflags ^ self.regs.rflags;
        if changed & !Self::FLAGS != 0 {
            return Err(RegistersError::Flags(changed & !Self::FLAGS));
        }
        // The shadow is that of the instruction which stood at RIP, and goes with interrupts.
        let stays = regs.rip == self.regs.rip && changed & rflags::IF == 0;
        let shadow = if stays { self.shadow } else { InterruptShadow::default() };
        Ok(Self { regs, shadow, ..*self })
    }
}

/// An exception to deliver to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #DE, vector 0.
    DivideError,
    /// #DB, vector 1, with the DR6 bits to report.
    Debug {
        /// Bits to set in DR6 (BS, B0-B3, BD).
        dr6: u64,
    },
    /// #BP, vector 3.
    Breakpoint,
    /// #UD, vector 6.
    InvalidOpcode,
    /// #NM, vector 7.
    DeviceNotAvailable,
    /// #SS, vector 12.
    StackFault {
        /// The error code; 0 for a non-canonical stack address.
        code: u32,
    },
    /// #GP, vector 13.
    GeneralProtection {
        /// The error code; 0 for a non-canonical address.
        code: u32,
    },
    /// #PF, vector 14.
    PageFault {
        /// The linear address, for CR2.
        address: crate::Gva,
        /// P, W/R, U/S, RSVD, I/D, PK (Intel SDM vol. 3A, 4.7).
        code: u32,
    },
    /// #AC, vector 17.
    AlignmentCheck,
}

impl Exception {
    /// The vector number (Intel SDM vol. 3A, table 6-1).
    #[must_use]
    pub const fn vector(self) -> u8 {
        match self {
            Exception::DivideError => 0,
            Exception::Debug { .. } => 1,
            Exception::Breakpoint => 3,
            Exception::InvalidOpcode => 6,
            Exception::DeviceNotAvailable => 7,
            Exception::StackFault { .. } => 12,
            Exception::GeneralProtection { .. } => 13,
            Exception::PageFault { .. } => 14,
            Exception::AlignmentCheck => 17,
        }
    }

    /// The error code that the CPU pushes, for the vectors that have one.
    #[must_use]
    pub const fn error_code(self) -> Option<u32> {
        match self {
            Exception::StackFault { code }
            | Exception::GeneralProtection { code }
            | Exception::PageFault { code, .. } => Some(code),
            Exception::AlignmentCheck => Some(0),
            Exception::DivideError
            | Exception::Debug { .. }
            | Exception::Breakpoint
            | Exception::InvalidOpcode
            | Exception::DeviceNotAvailable => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gva;

    fn state() -> VcpuState {
        let regs = Registers { rip: 0x1000, rflags: rflags::FIXED | rflags::IF, ..Registers::default() };
        let sys = SystemRegisters { long_code: true, ..SystemRegisters::default() };
        VcpuState { regs, sys, shadow: InterruptShadow { sti: true, mov_ss: false } }
    }

    #[test]
    fn registers_that_the_cpu_takes_are_taken_over_with_their_shadow() {
        let before = state();
        let regs = Registers { rax: 7, rflags: before.regs.rflags | rflags::ZF, ..before.regs };
        assert_eq!(before.with_registers(regs), Ok(VcpuState { regs, ..before }));
    }

    #[test]
    fn the_shadow_ends_with_its_instruction_and_with_interrupts() {
        let before = state();
        let elsewhere = Registers { rip: 0x1001, ..before.regs };
        let held = Registers { rflags: rflags::FIXED, ..before.regs };
        for regs in [elsewhere, held] {
            assert_eq!(before.with_registers(regs).unwrap().shadow, InterruptShadow::default());
        }
    }

    #[test]
    fn registers_with_which_the_guest_could_not_be_entered_are_refused() {
        let before = state();
        let hole = Gva(1 << 47);
        let there = Registers { rip: hole.0, ..before.regs };
        assert_eq!(before.with_registers(there), Err(RegistersError::Rip(hole)));
        let long = SystemRegisters { long_code: false, ..before.sys };
        let above = Registers { rip: 1 << 32, ..before.regs };
        let narrow = VcpuState { sys: long, ..before };
        assert_eq!(narrow.with_registers(above), Err(RegistersError::Rip(Gva(1 << 32))));
        for bit in
            [rflags::TF, rflags::RF, rflags::VM, rflags::VIF, rflags::VIP, rflags::FIXED, 1 << 3, 1 << 40]
        {
            let regs = Registers { rflags: before.regs.rflags ^ bit, ..before.regs };
            assert_eq!(before.with_registers(regs), Err(RegistersError::Flags(bit)));
        }
    }
}
