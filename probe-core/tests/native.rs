//! Differential test: random instructions that `emulate` covers are also run by the host's own CPU, in user space, and
//! registers, flags and memory compared. Branches, stack and privileged instructions have their own tests.
#![cfg(target_arch = "x86_64")]
// An integration test is a test module; and it runs on 64-bit hosts only, where these casts lose nothing unmeant.
#![allow(clippy::tests_outside_test_module)]
#![allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, clippy::cast_sign_loss)]

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, GasFormatter, Instruction, InstructionInfoFactory,
    Mnemonic, OpKind, Register,
};
use probe_core::emulate::{Emulated, emulate, is_emulated};
use probe_core::mock::{MockMemory, MockPageTables, MockVcpu};
use probe_core::{AddressSpace, Gpa, Gva, PAGE_SIZE, Registers, VcpuState, control, rflags};

const SEED: u64 = 0x7669_6d70_726f_6265;
const CASES: u32 = 100_000;

/// Offsets in the mapping: code in the first page, the register frame in the second, operands in the third.
const FRAME: u64 = 0x1000;
const OPERANDS: u64 = 0x2000;
const OPERANDS_LEN: usize = 0x1000;
const MAPPING_LEN: usize = 0x3000;
/// In the frame: 15 registers in the order of [`REGISTERS`], then RFLAGS.
const FRAME_FLAGS: u64 = 15 * 8;

type Field = fn(&mut Registers) -> &mut u64;

/// ModRM register number and a way to reach it in [`Registers`], all but RSP.
const REGISTERS: [(u8, Field); 15] = [
    (0, |regs| &mut regs.rax),
    (1, |regs| &mut regs.rcx),
    (2, |regs| &mut regs.rdx),
    (3, |regs| &mut regs.rbx),
    (5, |regs| &mut regs.rbp),
    (6, |regs| &mut regs.rsi),
    (7, |regs| &mut regs.rdi),
    (8, |regs| &mut regs.r8),
    (9, |regs| &mut regs.r9),
    (10, |regs| &mut regs.r10),
    (11, |regs| &mut regs.r11),
    (12, |regs| &mut regs.r12),
    (13, |regs| &mut regs.r13),
    (14, |regs| &mut regs.r14),
    (15, |regs| &mut regs.r15),
];

/// `splitmix64`, so that a failure can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn chance(&mut self, one_in: u64) -> bool {
        self.next().is_multiple_of(one_in)
    }

    /// A value near an edge of its range half of the time.
    fn value(&mut self) -> u64 {
        let width = [8, 16, 32, 64][(self.next() % 4) as usize];
        let edge = [0, 1, 2, 1 << (width - 1), (1 << (width - 1)) - 1, u64::MAX >> (64 - width), u64::MAX];
        match self.next() % 14 {
            n @ 0..7 => edge[n as usize],
            _ => self.next(),
        }
    }
}

/// A page of machine code and its data.
struct Native {
    base: *mut u8,
}

impl Native {
    fn new() -> Self {
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                MAPPING_LEN,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED, "no executable page: {}", std::io::Error::last_os_error());
        Self { base: base.cast() }
    }

    fn address(&self, offset: u64) -> u64 {
        self.base as u64 + offset
    }

    fn store(&self, offset: u64, bytes: &[u8]) {
        assert!(offset as usize + bytes.len() <= MAPPING_LEN);
        // SAFETY: the range lies in the mapping, which is writable and no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset as usize), bytes.len()) }
    }

    fn load(&self, offset: u64, len: usize) -> Vec<u8> {
        assert!(offset as usize + len <= MAPPING_LEN);
        let mut bytes = vec![0; len];
        // SAFETY: the range lies in the mapping, which is readable, and no code runs in it now.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(offset as usize), bytes.as_mut_ptr(), len) }
        bytes
    }

    fn load_word(&self, offset: u64) -> u64 {
        self.load(offset, 8).iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
    }

    /// Runs the code at the start of the mapping.
    fn call(&self) {
        // SAFETY: the code was written by `program`: it keeps the callee-saved registers and the stack, accesses only
        // the mapping, leaves DF clear, and returns.
        unsafe {
            let code: extern "sysv64" fn() = std::mem::transmute(self.base);
            code();
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), MAPPING_LEN) };
    }
}

/// Machine code that loads registers and flags from the frame, runs one instruction, and stores them back.
struct Program {
    code: Vec<u8>,
}

impl Program {
    fn emit(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    /// `opcode` with a RIP-relative operand `offset` bytes into the frame.
    fn frame_operand(&mut self, rex: Option<u8>, opcode: u8, reg: u8, offset: u64) {
        self.code.extend(rex);
        self.emit(&[opcode, (reg & 7) << 3 | 5]);
        let next = self.code.len() as u64 + 4;
        self.emit(&((FRAME + offset - next) as u32).to_le_bytes());
    }

    fn each_register(&mut self, opcode: u8) {
        for (at, (number, _)) in (0..).zip(REGISTERS) {
            let rex = 0x48 | (number >> 3) << 2;
            self.frame_operand(Some(rex), opcode, number, at * 8);
        }
    }

    /// Everything before the instruction.
    fn prologue() -> Self {
        let mut program = Self { code: Vec::new() };
        program.emit(&[0x53]); // push %rbx
        program.emit(&[0x55]); // push %rbp
        program.emit(&[0x41, 0x54]); // push %r12
        program.emit(&[0x41, 0x55]); // push %r13
        program.emit(&[0x41, 0x56]); // push %r14
        program.emit(&[0x41, 0x57]); // push %r15
        program.frame_operand(None, 0xff, 6, FRAME_FLAGS); // push flags(%rip)
        program.emit(&[0x9d]); // popf
        program.each_register(0x8b); // mov frame(%rip), %reg
        program
    }

    /// The instruction and everything behind it.
    fn finish(mut self, instruction: &[u8]) -> Vec<u8> {
        self.emit(instruction);
        self.each_register(0x89); // mov %reg, frame(%rip)
        self.emit(&[0x9c]); // pushf
        self.frame_operand(None, 0x8f, 0, FRAME_FLAGS); // pop flags(%rip)
        self.emit(&[0xfc]); // cld
        self.emit(&[0x41, 0x5f]); // pop %r15
        self.emit(&[0x41, 0x5e]); // pop %r14
        self.emit(&[0x41, 0x5d]); // pop %r13
        self.emit(&[0x41, 0x5c]); // pop %r12
        self.emit(&[0x5d]); // pop %rbp
        self.emit(&[0x5b]); // pop %rbx
        self.emit(&[0xc3]); // ret
        self.code
    }
}

/// Random bytes that often decode to an instruction with register operands, or with one RIP-relative operand at
/// `operand`.
fn random_bytes(random: &mut Random, ip: u64, operand: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    if random.chance(8) {
        bytes.push(0xf0);
    }
    if random.chance(4) {
        bytes.push(0x66);
    }
    if random.chance(6) {
        bytes.push(0xf2 | random.byte() & 1);
    }
    if random.chance(20) {
        // A string instruction, with and without REX.W.
        if random.chance(2) {
            bytes.push(0x48);
        }
        bytes.push(
            [0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf][(random.next() % 10) as usize],
        );
        return bytes;
    }
    if !random.chance(3) {
        bytes.push(0x40 | random.byte() & 15);
    }
    if random.chance(2) {
        bytes.push(0x0f);
    }
    bytes.push(random.byte());
    let modrm = random.byte();
    if random.chance(3) {
        bytes.push(modrm & 0x38 | 5);
        // The length decides what the displacement counts from; an immediate may follow.
        let immediate = [0, 1, 2, 4][(random.next() % 4) as usize];
        let next = ip + bytes.len() as u64 + 4 + immediate;
        bytes.extend_from_slice(&(operand.wrapping_sub(next) as u32).to_le_bytes());
    } else {
        bytes.push(modrm | 0xc0);
    }
    bytes.extend_from_slice(&random.value().to_le_bytes());
    bytes.truncate(15);
    bytes
}

/// Whether the instruction can run in user space, without a stack, and in the operand page.
fn is_suitable(instruction: &Instruction, factory: &mut InstructionInfoFactory, operands: &[u64; 2]) -> bool {
    let kernel =
        matches!(instruction.mnemonic(), Mnemonic::Clac | Mnemonic::Stac | Mnemonic::Cli | Mnemonic::Sti);
    if !is_emulated(instruction)
        || instruction.flow_control() != FlowControl::Next
        || instruction.is_stack_instruction()
        || instruction.is_privileged()
        || kernel
    {
        return false;
    }
    let info = factory.info(instruction);
    if info.used_registers().iter().any(|used| used.register().full_register() == Register::RSP) {
        return false;
    }
    let range = operands[0] + 0x400..operands[1] - 0x400;
    info.used_memory().is_empty()
        || instruction.is_string_instruction()
        || instruction.is_ip_rel_memory_operand() && range.contains(&instruction.ip_rel_memory_address())
}

fn name(instruction: &Instruction) -> String {
    let mut text = String::new();
    GasFormatter::new().format(instruction, &mut text);
    text
}

#[test]
fn emulation_equals_the_hosts_cpu() {
    let native = Native::new();
    let base = native.address(0);
    let ip = base + Program::prologue().code.len() as u64;
    let operands = [native.address(OPERANDS), native.address(OPERANDS) + OPERANDS_LEN as u64];

    let memory = MockMemory::new();
    let physical = Gpa(0x10_0000);
    let mut tables = MockPageTables::new(&memory, Gpa(0x1000), 4);
    let flags = probe_core::paging::entry::PRESENT | probe_core::paging::entry::WRITABLE;
    tables.map(Gva(operands[0]), physical, PAGE_SIZE, flags);
    let space = AddressSpace { memory: &memory, pkru: 0 };

    let mut random = Random(SEED);
    let mut factory = InstructionInfoFactory::new();
    let mut done = 0;
    let mut with_memory = 0;
    let mut kinds = std::collections::BTreeMap::new();
    while done < CASES {
        let aligned = if random.chance(2) { 7 } else { 0 };
        let operand = operands[0] + 0x400 + (random.next() & 0x7ff & !aligned);
        let bytes = random_bytes(&mut random, ip, operand);
        let instruction = Decoder::with_ip(64, &bytes, ip, DecoderOptions::NONE).decode();
        if instruction.is_invalid() || !is_suitable(&instruction, &mut factory, &operands) {
            continue;
        }

        let strings = [OpKind::Memory, OpKind::MemorySegRSI, OpKind::MemoryESRDI];
        let has_memory = instruction.op_kinds().any(|kind| strings.contains(&kind));
        let mut before = MockVcpu::new(tables.root()).rip(Gva(ip)).build();
        before.sys.cr4 |= control::CR4_SMAP;
        for (_, register) in REGISTERS {
            *register(&mut before.regs) = random.value();
        }
        before.regs.rflags = 0x202 | random.next() & (rflags::ARITHMETIC | rflags::DF);
        confine_bit_offset(&instruction, &mut before);
        if instruction.is_string_instruction() {
            before.regs.rsi = operand;
            before.regs.rdi = operands[0] + 0x400 + (random.next() & 0x7ff);
            before.regs.rcx = random.next() % 32;
            if random.chance(2) {
                // Equal or overlapping strings, and few elements.
                before.regs.rdi = operand + random.next() % 3;
                before.regs.rax = 0;
            }
        }
        let data: Vec<u8> = std::iter::repeat_with(|| random.byte()).take(32).collect();
        let window = operand - operands[0] - 16;
        memory.load(physical.offset(window), &data);
        native.store(OPERANDS + window, &data);

        let mut emulated = before;
        match emulate(&instruction, &mut emulated, &space) {
            Emulated::Done => {}
            Emulated::Defer(_) => continue,
            other => panic!("{other:?} of `{}` {bytes:x?}", name(&instruction)),
        }

        for (at, (_, register)) in (0..).zip(REGISTERS) {
            native.store(FRAME + at * 8, &register(&mut before.regs).to_le_bytes());
        }
        native.store(FRAME + FRAME_FLAGS, &before.regs.rflags.to_le_bytes());
        native.store(0, &Program::prologue().finish(&bytes[..instruction.len()]));
        native.call();

        let mut expected = before.regs;
        for (at, (_, register)) in (0..).zip(REGISTERS) {
            *register(&mut expected) = native.load_word(FRAME + at * 8);
        }
        let vary = varying_flags(&instruction, &before.regs);
        expected.rflags = native.load_word(FRAME + FRAME_FLAGS) & !vary | emulated.regs.rflags & vary;
        expected.rip = instruction.next_ip();
        let context = || {
            format!("`{}` {:x?}\nbefore {:x?}", name(&instruction), &bytes[..instruction.len()], before.regs)
        };
        assert_eq!(
            emulated.regs,
            expected,
            "{}\nemulated {:x?}\nhardware {expected:x?}",
            context(),
            emulated.regs
        );
        if has_memory {
            let whole = native.load(OPERANDS, OPERANDS_LEN);
            assert_eq!(memory.bytes(physical, OPERANDS_LEN), whole, "memory after {}", context());
        }

        done += 1;
        with_memory += u32::from(has_memory);
        *kinds.entry(instruction.code() as u32).or_insert(0) += 1;
    }
    // The generator must keep reaching what it is meant to reach.
    assert!(kinds.len() > 250, "only {} instruction forms were reached", kinds.len());
    assert!(with_memory > CASES / 10, "only {with_memory} cases had a memory operand");
}

/// The undefined flags in which CPUs are known to differ: AF after shifts (AMD sets it), and OF after SHLD and SHRD by
/// more than one. All other undefined flags are compared.
fn varying_flags(instruction: &Instruction, before: &Registers) -> u64 {
    match instruction.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar => rflags::AF,
        Mnemonic::Shld | Mnemonic::Shrd => {
            let limit = if instruction.op1_register().size() == 8 { 63 } else { 31 };
            let count = if instruction.op2_kind() == OpKind::Register {
                before.rcx
            } else {
                instruction.immediate(2)
            };
            if count & limit == 1 { rflags::AF } else { rflags::AF | rflags::OF }
        }
        _ => 0,
    }
}

/// Keeps a bit string in the operand page: BT and its like reach as far as the register says.
fn confine_bit_offset(instruction: &Instruction, state: &mut VcpuState) {
    let bit_string =
        matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
            && instruction.op0_kind() == OpKind::Memory
            && instruction.op1_kind() == OpKind::Register;
    if !bit_string {
        return;
    }
    let register = instruction.op1_register().full_register();
    for (number, field) in REGISTERS {
        if register.number() == usize::from(number) {
            let value = field(&mut state.regs);
            // -4096..4096 bits, in whatever width the operand has.
            *value = (*value as i64 % 4096) as u64;
        }
    }
}
