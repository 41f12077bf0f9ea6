//! What a probe fetches at a hit: the sources of the kernel's fetch arguments (Documentation/trace/kprobetrace.rst) that
//! need no types.
//!
//! The text of a source is the kernel's: `%di`, `$arg1`, `$retval`, `$stack`, `$stack3`.

use std::fmt;

use crate::paging::read_virtual;
use crate::{Gva, PhysicalMemory, Registers, VcpuState};

/// How many arguments the System V AMD64 ABI passes in registers (3.2.3).
const REGISTER_ARGUMENTS: u16 = 6;

/// Bytes of a stack word.
const WORD: usize = 8;

macro_rules! registers {
    ($($variant:ident $name:literal $field:ident),* $(,)?) => {
        /// A register that can be fetched, by the name that the kernel gives it (`struct pt_regs`, arch/x86).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[allow(missing_docs)]
        pub enum RegisterName { $($variant),* }

        impl RegisterName {
            /// All of them.
            pub const ALL: &[RegisterName] = &[$(RegisterName::$variant),*];

            /// The register of that name, the kernel's (`di`) or the manuals' (`rdi`).
            #[must_use]
            pub fn parse(name: &str) -> Option<Self> {
                match name {
                    $($name | stringify!($field) => Some(RegisterName::$variant),)*
                    _ => None,
                }
            }

            /// The kernel's name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(RegisterName::$variant => $name),* }
            }

            /// Gives it another value.
            pub const fn set(self, regs: &mut Registers, value: u64) {
                match self { $(RegisterName::$variant => regs.$field = value),* }
            }

            /// The manuals' name.
            #[must_use]
            pub const fn manual_name(self) -> &'static str {
                match self { $(RegisterName::$variant => stringify!($field)),* }
            }

            /// Its value.
            #[must_use]
            pub const fn value(self, regs: &Registers) -> u64 {
                match self { $(RegisterName::$variant => regs.$field),* }
            }
        }
    };
}

registers! {
    Ax "ax" rax, Bx "bx" rbx, Cx "cx" rcx, Dx "dx" rdx, Si "si" rsi, Di "di" rdi, Sp "sp" rsp, Bp "bp" rbp,
    R8 "r8" r8, R9 "r9" r9, R10 "r10" r10, R11 "r11" r11, R12 "r12" r12, R13 "r13" r13, R14 "r14" r14, R15 "r15" r15,
    Ip "ip" rip, Flags "flags" rflags,
}

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fetch {
    /// A register.
    Register(RegisterName),
    /// The function's n-th integer argument, counted from 1, at its entry: in RDI, RSI, RDX, RCX, R8, R9, then on the stack
    /// above the return address (System V AMD64 ABI, 3.2.3).
    Argument(u16),
    /// What the function returns, at its return: RAX.
    ReturnValue,
    /// The stack pointer.
    StackAddress,
    /// The n-th 8-byte word of the stack, counted from 0.
    StackWord(u16),
}

impl Fetch {
    /// Reads the value at a hit. `None` where it is in memory that cannot be read.
    ///
    /// Allocates nothing and takes no lock of its own; leaves the guest's memory and page tables as they are.
    #[must_use]
    pub fn value(&self, state: &VcpuState, memory: &dyn PhysicalMemory) -> Option<u64> {
        if let Some(value) = self.in_registers(&state.regs) {
            return Some(value);
        }
        let gva = Gva(state.regs.rsp).offset(u64::from(self.stack_word()?) * WORD as u64);
        let mut word = [0; WORD];
        let read = read_virtual(&state.sys, memory, gva, &mut word);
        (read == WORD).then(|| u64::from_le_bytes(word))
    }

    /// The value, where the registers hold it.
    #[must_use]
    pub fn in_registers(&self, regs: &Registers) -> Option<u64> {
        Some(match self {
            Fetch::Register(register) => register.value(regs),
            Fetch::Argument(1) => regs.rdi,
            Fetch::Argument(2) => regs.rsi,
            Fetch::Argument(3) => regs.rdx,
            Fetch::Argument(4) => regs.rcx,
            Fetch::Argument(5) => regs.r8,
            Fetch::Argument(6) => regs.r9,
            Fetch::ReturnValue => regs.rax,
            Fetch::StackAddress => regs.rsp,
            Fetch::Argument(_) | Fetch::StackWord(_) => return None,
        })
    }

    /// The 8-byte word of the stack, counted from 0 at RSP, that holds the value where the registers do not.
    #[must_use]
    pub fn stack_word(&self) -> Option<u16> {
        match self {
            // The word at RSP is the return address, which is where argument 6 would be.
            Fetch::Argument(number) => number.checked_sub(REGISTER_ARGUMENTS).filter(|word| *word > 0),
            Fetch::StackWord(index) => Some(*index),
            Fetch::Register(_) | Fetch::ReturnValue | Fetch::StackAddress => None,
        }
    }
}

impl fmt::Display for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fetch::Register(register) => write!(f, "%{}", register.name()),
            Fetch::Argument(number) => write!(f, "$arg{number}"),
            Fetch::ReturnValue => f.write_str("$retval"),
            Fetch::StackAddress => f.write_str("$stack"),
            Fetch::StackWord(index) => write!(f, "$stack{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Gpa;
    use crate::mock::{MockMemory, MockPageTables, MockVcpu, OperationKind};
    use crate::paging::entry;

    const ROOT: Gpa = Gpa(0x10_0000);
    /// A kernel stack of two pages that lie apart in physical memory, the second one at 0x6000.
    const STACK: u64 = 0xffff_c900_0000_0000;

    fn guest() -> (MockMemory, VcpuState) {
        let memory = MockMemory::with_ram(0x8000);
        let mut tables = MockPageTables::new(&memory, ROOT, 4);
        tables.map(Gva(STACK), Gpa(0x3000), 0x1000, entry::PRESENT | entry::WRITABLE);
        tables.map(Gva(STACK + 0x1000), Gpa(0x6000), 0x1000, entry::PRESENT | entry::WRITABLE);
        let state = MockVcpu::new(ROOT).rsp(Gva(STACK + 0xfe0)).regs(|regs| {
            (regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9) = (1, 2, 3, 4, 5, 6);
            regs.rax = 0xaaaa;
        });
        // [RSP] is the return address, then arguments 7, 8 and so on; the fifth word is on the second page.
        for (index, word) in (0..).zip([0xdead_u64, 7, 8, 9]) {
            memory.load(Gpa(0x3fe0 + 8 * index), &word.to_le_bytes());
        }
        memory.load(Gpa(0x6000), &10_u64.to_le_bytes());
        (memory, state.build())
    }

    #[test]
    fn kprobe_args_come_from_six_registers_and_then_from_the_stack() {
        let (memory, state) = guest();
        for number in 1..=10 {
            assert_eq!(Fetch::Argument(number).value(&state, &memory), Some(u64::from(number)), "{number}");
        }
    }

    #[test]
    fn stack_words_are_counted_from_the_stack_pointer() {
        let (memory, state) = guest();
        assert_eq!(Fetch::StackAddress.value(&state, &memory), Some(STACK + 0xfe0));
        assert_eq!(Fetch::StackWord(0).value(&state, &memory), Some(0xdead));
        assert_eq!(Fetch::StackWord(4).value(&state, &memory), Some(10));
        assert_eq!(Fetch::ReturnValue.value(&state, &memory), Some(0xaaaa));
    }

    #[test]
    fn a_word_across_two_pages_is_read_from_both() {
        let (memory, mut state) = guest();
        state.regs.rsp = STACK + 0xffc;
        assert_eq!(Fetch::StackWord(0).value(&state, &memory), Some(10 << 32));
    }

    #[test]
    fn memory_that_cannot_be_read_is_no_value() {
        let (memory, mut state) = guest();
        // Not mapped: behind the second page, and half of a word there.
        assert_eq!(Fetch::StackWord(516).value(&state, &memory), None);
        state.regs.rsp = STACK + 0x1ffc;
        assert_eq!(Fetch::StackWord(0).value(&state, &memory), None);
        // Not canonical.
        state.regs.rsp = 1 << 47;
        assert_eq!(Fetch::Argument(7).value(&state, &memory), None);
        // Registers are there all the same.
        assert_eq!(Fetch::Argument(6).value(&state, &memory), Some(6));
        // Not RAM.
        let (memory, state) = guest();
        memory.fail(OperationKind::Read, 5);
        assert_eq!(Fetch::StackWord(0).value(&state, &memory), None);
        assert_eq!(memory.pending_failures(), 0);
    }

    #[test]
    fn fetching_changes_nothing_in_the_guest() {
        let (memory, state) = guest();
        for index in 0..5 {
            let _ = Fetch::StackWord(index).value(&state, &memory);
        }
        assert_eq!(memory.writes(), []);
    }

    #[test]
    fn every_register_has_the_kernels_and_the_manuals_name() {
        for register in RegisterName::ALL {
            assert_eq!(RegisterName::parse(register.name()), Some(*register));
        }
        assert_eq!(RegisterName::parse("rdi"), Some(RegisterName::Di));
        assert_eq!(RegisterName::parse("rflags"), Some(RegisterName::Flags));
        assert_eq!(RegisterName::parse("edi"), None);
        let regs = Registers { rsi: 5, rip: 6, ..Registers::default() };
        assert_eq!((RegisterName::Si.value(&regs), RegisterName::Ip.value(&regs)), (5, 6));
    }
}
