//! What a run of a case left behind, and how two of them differ.

use std::fmt::Write as _;

use iced_x86::{InstructionInfoFactory, Mnemonic, OpAccess, RflagsBits};
use probe_core::{Registers, SystemRegisters, rflags};

use crate::case::{Case, FPU_BYTES};
use crate::layout::{DATA_OFFSET, HIGH, LOW, SYSTEM_BYTES};

/// What this host's KVM, and the CPU under it, are like, found out before the first case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// Guest code at CPL 0 runs in KVM's instruction emulator.
    pub emulates_kernel: bool,
    /// An int3 at CPL 3 stops at the host.
    pub user_breakpoints: bool,
    /// Faults set RFLAGS.RF in their frames (Intel SDM vol. 3B, 19.3.1.1). QEMU's TCG does not; KVM does when it injects them.
    pub sets_resume_flag: bool,
    /// A page fault of an instruction that reads, changes and writes an operand is a write. In QEMU's TCG it is a read
    /// if the read faults.
    pub changes_are_writes: bool,
    /// A non-canonical address that is relative to the stack segment raises #SS. In QEMU's TCG it raises #GP.
    pub stack_faults: bool,
    /// At CPL 3, RFLAGS.AC and CR0.AM make misaligned accesses #AC. QEMU's TCG does not look.
    pub checks_alignment: bool,
    /// The vector state is moved with XSAVE, AVX included.
    pub xsave: bool,
}

impl Host {
    /// Whether a CPU runs all guest code: the emulators known show themselves by what they leave out.
    #[must_use]
    pub fn is_hardware(self) -> bool {
        !self.emulates_kernel && self.sets_resume_flag && self.changes_are_writes && self.stack_faults
    }
}

impl Default for Host {
    /// What a CPU does.
    fn default() -> Self {
        Self {
            emulates_kernel: false,
            user_breakpoints: true,
            sets_resume_flag: true,
            changes_are_writes: true,
            stack_faults: true,
            checks_alignment: true,
            xsave: false,
        }
    }
}

/// A case that shows what the host is like, and what its outcome says.
pub type Question = (fn() -> Case, fn(&mut Host, &Outcome));

/// An absent page.
const ABSENT: u64 = LOW + DATA_OFFSET;

/// What is asked of the host before the first case.
pub const QUESTIONS: [Question; 5] = [
    // nop
    (
        || Case::plain(&[0x90], 3, 0, 0),
        |host, outcome| host.user_breakpoints = matches!(outcome.end, End::Reached { .. }),
    ),
    // mov rax, [rbx]
    (
        || Case::plain(&[0x48, 0x8b, 0x03], 0, 0, ABSENT),
        |host, outcome| host.sets_resume_flag = outcome.regs.rflags & rflags::RF != 0,
    ),
    // add [rbx], rax
    (
        || Case::plain(&[0x48, 0x01, 0x03], 0, 0, ABSENT),
        |host, outcome| {
            host.changes_are_writes = matches!(outcome.end, End::Exception { code: Some(code), .. } if code & PAGE_FAULT_WRITE != 0);
        },
    ),
    // mov rax, [rbp]
    (
        || Case::plain(&[0x48, 0x8b, 0x45, 0], 0, 0, 1 << 63),
        |host, outcome| {
            host.stack_faults = matches!(outcome.end, End::Exception { vector: STACK_FAULT, .. });
        },
    ),
    // mov rax, [rbx]
    (
        || Case::plain(&[0x48, 0x8b, 0x03], 3, rflags::AC, ABSENT + 4096 + 1),
        |host, outcome| host.checks_alignment = matches!(outcome.end, End::Exception { vector: 17, .. }),
    ),
];

pub(crate) const DEBUG: u8 = 1;
pub(crate) const STACK_FAULT: u8 = 12;
pub(crate) const GENERAL_PROTECTION: u8 = 13;
pub(crate) const PAGE_FAULT: u8 = 14;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It reached an int3 of the filler, or where SYSCALL goes.
    Reached {
        /// CPL there.
        cpl: u8,
        /// 64-bit code.
        long: bool,
    },
    /// An exception or interrupt was delivered; RIP, RSP and RFLAGS of [`Outcome::regs`] are those of its frame.
    Exception {
        /// Its vector.
        vector: u8,
        /// The error code, if one was pushed.
        code: Option<u64>,
        /// CR2 of a page fault.
        cr2: Option<u64>,
        /// CS and SS of the frame.
        selectors: [u64; 2],
    },
    /// HLT.
    Halted,
    /// KVM's emulator refused an instruction at this RIP.
    Refused(u64),
    /// The engine says that the VM can no longer be trusted.
    GaveUp(String),
    /// The machine ended.
    Died(String),
    /// Nothing happened any more.
    Hung,
}

/// What a run left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// Registers at the end.
    pub regs: Registers,
    /// Control registers and segment bases at the end.
    pub sys: SystemRegisters,
    /// x87, SSE and AVX state.
    pub fpu: Option<Box<[u8; FPU_BYTES]>>,
    /// Descriptor tables, segments, debug registers and MSRs.
    pub system: Option<[u8; SYSTEM_BYTES]>,
    /// The data pages, in the order of their linear addresses.
    pub data: Vec<u8>,
}

/// Bytes of the FXSAVE area that say where the last x87 instruction stood: FOP, FIP, FDP (Intel SDM vol. 1, 10.5.1). One that
/// runs out of line really stands elsewhere.
const LAST_X87_INSTRUCTION: std::ops::Range<usize> = 6..24;

/// Where the stored system state has the low byte of DR6, and B0 to B3 there: a CPU may set them for a breakpoint that is off
/// (Intel SDM vol. 3B, 17.2.3), and KVM leaves the host's own addresses in DR0 to DR3 while none of the guest's is on.
const DR6: usize = 0x50;
/// See [`DR6`].
const DR6_BREAKPOINTS: u8 = 0xf;

/// How a probed run differs from the bare one; empty if it does not. `emulated` says that the engine emulated the instruction.
#[must_use]
pub fn differences(case: &Case, host: Host, bare: &Outcome, probed: &Outcome, emulated: bool) -> Vec<String> {
    let mut found = Vec::new();
    let (before, after) = (as_seen_here(case, host, &bare.end), as_seen_here(case, host, &probed.end));
    if before != after {
        found.push(format!("end: {before:x?} -> {after:x?}"));
    }
    let ignored = ignored_registers(case);
    let names = register_values(&bare.regs).into_iter().zip(register_values(&probed.regs));
    for ((name, before), (_, after)) in names {
        if before != after && !ignored.iter().any(|ignored| ignored == name) {
            found.push(format!("{name}: {before:#x} -> {after:#x}"));
        }
    }
    let flags = !ignored_flags(case, host, bare, emulated);
    let (before, after) = (bare.regs.rflags & flags, probed.regs.rflags & flags);
    if before != after {
        found.push(format!("rflags: {before:#x} -> {after:#x}, changed {:#x}", before ^ after));
    }
    // CR2 is compared where a page fault sets it.
    let without_cr2 = |sys: &SystemRegisters| SystemRegisters { cr2: 0, ..*sys };
    if without_cr2(&bare.sys) != without_cr2(&probed.sys) {
        found.push(format!("system registers: {:x?} -> {:x?}", bare.sys, probed.sys));
    }
    if let (Some(before), Some(after)) = (&bare.fpu, &probed.fpu) {
        for (at, (before, after)) in before.iter().zip(after.iter()).enumerate() {
            if before != after && !LAST_X87_INSTRUCTION.contains(&at) {
                found.push(format!("vector state, byte {at:#x}: {before:#04x} -> {after:#04x}"));
            }
        }
    }
    if let (Some(before), Some(after)) = (&bare.system, &probed.system) {
        for (at, (before, after)) in before.iter().zip(after).enumerate() {
            let compared = if at == DR6 { !DR6_BREAKPOINTS } else { 0xff };
            if before & compared != after & compared {
                found.push(format!("system state, byte {at:#x}: {before:#04x} -> {after:#04x}"));
            }
        }
    }
    let ignored = half_stored(host, bare);
    for (at, (before, after)) in (FIRST_DATA..).zip(bare.data.iter().zip(&probed.data)) {
        if before != after && !ignored.contains(&at) {
            found.push(format!("data, byte {at:#x}: {before:#04x} -> {after:#04x}"));
        }
    }
    found
}

/// An end without what a CPU shows and this host does not.
fn as_seen_here(case: &Case, host: Host, end: &End) -> End {
    match end {
        End::Exception { vector: STACK_FAULT, code: Some(0), cr2, selectors } if !host.stack_faults => {
            End::Exception { vector: GENERAL_PROTECTION, code: Some(0), cr2: *cr2, selectors: *selectors }
        }
        End::Exception { vector: PAGE_FAULT, code: Some(code), cr2, selectors }
            if !host.changes_are_writes && changes_memory(case) =>
        {
            let code = Some(code & !PAGE_FAULT_WRITE);
            End::Exception { vector: PAGE_FAULT, code, cr2: *cr2, selectors: *selectors }
        }
        end => end.clone(),
    }
}

/// Whether the instruction reads and writes the same operand in memory.
fn changes_memory(case: &Case) -> bool {
    InstructionInfoFactory::new()
        .info(&case.instruction)
        .used_memory()
        .iter()
        .any(|memory| matches!(memory.access(), OpAccess::ReadWrite | OpAccess::ReadCondWrite))
}

/// Where the data begins that is RAM, as an offset from the first data page.
const FIRST_DATA: u64 = 4096;

/// KVM's emulator, and QEMU's TCG with more than 8 bytes, store the part of an operand in a writable page before they find that
/// the rest is in a page that faults. A CPU checks both pages first. The bytes, as offsets from the first data page.
fn half_stored(host: Host, bare: &Outcome) -> std::ops::Range<u64> {
    match bare.end {
        End::Exception { vector: PAGE_FAULT, code: Some(code), cr2: Some(cr2), .. }
            if !host.is_hardware() && code & PAGE_FAULT_WRITE != 0 && cr2 % 4096 == 0 =>
        {
            let start = [LOW, HIGH].map(|area| cr2.wrapping_sub(area + DATA_OFFSET)).into_iter().min();
            start.map_or(0..0, |end| end.saturating_sub(64)..end)
        }
        _ => 0..0,
    }
}

/// Error code of a page fault: the access was a write (Intel SDM vol. 3A, 4.7).
const PAGE_FAULT_WRITE: u64 = 1 << 1;

fn register_values(regs: &Registers) -> [(&'static str, u64); 17] {
    [
        ("rax", regs.rax),
        ("rbx", regs.rbx),
        ("rcx", regs.rcx),
        ("rdx", regs.rdx),
        ("rsi", regs.rsi),
        ("rdi", regs.rdi),
        ("rsp", regs.rsp),
        ("rbp", regs.rbp),
        ("r8", regs.r8),
        ("r9", regs.r9),
        ("r10", regs.r10),
        ("r11", regs.r11),
        ("r12", regs.r12),
        ("r13", regs.r13),
        ("r14", regs.r14),
        ("r15", regs.r15),
        ("rip", regs.rip),
    ]
}

/// Registers that two runs of the same instruction never have in common: time, and random numbers.
fn ignored_registers(case: &Case) -> Vec<String> {
    match case.instruction.mnemonic() {
        Mnemonic::Rdtsc | Mnemonic::Rdtscp | Mnemonic::Rdpru => vec!["rax".to_owned(), "rdx".to_owned()],
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            vec![format!("{:?}", case.instruction.op0_register().full_register()).to_ascii_lowercase()]
        }
        _ => Vec::new(),
    }
}

fn ignored_flags(case: &Case, host: Host, bare: &Outcome, emulated: bool) -> u64 {
    let mut ignored = 0;
    let exception = matches!(bare.end, End::Exception { .. });
    if exception && !host.sets_resume_flag {
        ignored |= rflags::RF;
    }
    // Flags that the manual leaves undefined: the engine gives what CPUs give, which emulators of CPUs do not.
    if emulated && !host.is_hardware() {
        let mut undefined = case.instruction.rflags_undefined();
        if matches!(case.instruction.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
            // Also where the count comes to 0 only modulo the operand's bits and CF: whether the CPU looks at that is its own
            // matter.
            undefined |= RflagsBits::OF;
        }
        let bits = [
            (RflagsBits::OF, rflags::OF),
            (RflagsBits::SF, rflags::SF),
            (RflagsBits::ZF, rflags::ZF),
            (RflagsBits::AF, rflags::AF),
            (RflagsBits::CF, rflags::CF),
            (RflagsBits::PF, rflags::PF),
        ];
        ignored |= bits.iter().filter(|(bit, _)| undefined & bit != 0).fold(0, |all, (_, flag)| all | flag);
    }
    ignored
}

/// The state of a run, for the report of a mismatch.
#[must_use]
pub fn describe(regs: &Registers) -> String {
    let mut text = String::new();
    for (name, value) in register_values(regs) {
        // Writing to a String does not fail.
        let _ = write!(text, "{name}={value:#x} ");
    }
    let _ = write!(text, "rflags={:#x}", regs.rflags);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(case: &Case) -> Outcome {
        Outcome {
            end: End::Reached { cpl: 0, long: true },
            regs: case.regs,
            sys: SystemRegisters::default(),
            fpu: Some(case.fpu.clone()),
            system: Some([0; SYSTEM_BYTES]),
            data: vec![0; 64],
        }
    }

    /// How many differences a change of the probed outcome makes.
    fn found(bytes: &[u8], host: Host, change: impl Fn(&mut Outcome)) -> usize {
        let case = Case::plain(bytes, 0, 0, 0);
        let mut probed = outcome(&case);
        change(&mut probed);
        differences(&case, host, &outcome(&case), &probed, true).len()
    }

    #[test]
    fn every_part_of_an_outcome_is_compared() {
        type Change = fn(&mut Outcome);
        let changes: [Change; 8] = [
            |outcome| outcome.end = End::Halted,
            |outcome| outcome.regs.r15 ^= 1 << 63,
            |outcome| outcome.regs.rip ^= 1,
            |outcome| outcome.regs.rflags ^= rflags::AF,
            |outcome| outcome.sys.cr4 ^= 1,
            |outcome| outcome.system = Some([1; SYSTEM_BYTES]),
            |outcome| outcome.data[63] ^= 1,
            |outcome| outcome.fpu.as_mut().expect("there is one")[200] ^= 1,
        ];
        assert_eq!(found(&[0x90], Host::default(), |_| {}), 0);
        for (index, change) in changes.into_iter().enumerate() {
            assert_ne!(found(&[0x90], Host::default(), change), 0, "{index}");
        }
    }

    #[test]
    fn time_randomness_and_the_place_of_the_last_x87_instruction_are_not_compared() {
        let host = Host::default();
        assert_eq!(found(&[0x0f, 0x31], host, |outcome| outcome.regs.rax ^= 1), 0); // rdtsc
        assert_eq!(found(&[0x0f, 0xc7, 0xf3], host, |outcome| outcome.regs.rbx ^= 1), 0); // rdrand %ebx
        assert_eq!(found(&[0x0f, 0xc7, 0xf3], host, |outcome| outcome.regs.rcx ^= 1), 1);
        let fip = |outcome: &mut Outcome| outcome.fpu.as_mut().expect("there is one")[8] ^= 1;
        assert_eq!(found(&[0x90], host, fip), 0);
    }

    #[test]
    fn undefined_flags_are_compared_on_hardware_only() {
        // shl $4,%rax leaves OF and AF undefined.
        let overflow = |outcome: &mut Outcome| outcome.regs.rflags ^= rflags::OF;
        let tcg = Host { stack_faults: false, ..Host::default() };
        assert_eq!(found(&[0x48, 0xc1, 0xe0, 4], Host::default(), overflow), 1);
        assert_eq!(found(&[0x48, 0xc1, 0xe0, 4], tcg, overflow), 0);
        let carry = |outcome: &mut Outcome| outcome.regs.rflags ^= rflags::CF;
        assert_eq!(found(&[0x48, 0xc1, 0xe0, 4], tcg, carry), 1);
    }
}
