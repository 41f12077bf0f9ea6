//! Before/after tests of what the test against the host's CPU cannot run: stack, branches, system instructions, faults.

mod branch;
mod memory;
mod stack;
mod string;
mod system;
mod transfer;

use iced_x86::{Decoder, DecoderOptions};

use super::*;
use crate::mock::{MockMemory, MockPageTables, MockVcpu};
use crate::paging::entry;
use crate::{Gpa, PAGE_SIZE};

/// Where the instruction stands; the page is mapped but not read by the emulation.
const RIP: Gva = Gva(0xffff_ffff_8100_0ff8);
/// A stack of two pages that lie apart in physical memory.
const STACK: Gva = Gva(0xffff_c900_0000_2000);
/// A writable page for operands, followed by a read-only one, followed by none.
const DATA: Gva = Gva(0xffff_8880_0000_0000);
const READ_ONLY: Gva = Gva(DATA.0 + 0x1000);
const UNMAPPED: Gva = Gva(DATA.0 + 0x2000);
/// Mapped to an address that is not RAM.
const MMIO: Gva = Gva(0xffff_ffff_ff5f_b000);

const STACK_GPA: [Gpa; 2] = [Gpa(0x5_0000), Gpa(0x4_0000)];
const DATA_GPA: Gpa = Gpa(0x6_0000);

struct Machine {
    memory: MockMemory,
    state: VcpuState,
}

impl Machine {
    fn new() -> Self {
        let memory = MockMemory::with_ram(0x8_0000);
        let mut tables = MockPageTables::new(&memory, Gpa(0x1000), 4);
        let rw = entry::PRESENT | entry::WRITABLE;
        tables.map(Gva(STACK.0 - PAGE_SIZE), STACK_GPA[0], PAGE_SIZE, rw);
        tables.map(STACK, STACK_GPA[1], PAGE_SIZE, rw);
        tables.map(DATA, DATA_GPA, PAGE_SIZE, rw);
        tables.map(READ_ONLY, DATA_GPA.offset(PAGE_SIZE), PAGE_SIZE, entry::PRESENT);
        tables.map(MMIO, Gpa(0xfee0_0000), PAGE_SIZE, rw);
        let state = MockVcpu::new(tables.root()).rip(RIP).rsp(STACK.offset(0x100)).build();
        Self { memory, state }
    }

    fn decode(bytes: &[u8]) -> Instruction {
        let instruction = Decoder::with_ip(64, bytes, RIP.0, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), bytes.len(), "{bytes:x?}");
        instruction
    }

    fn run(&mut self, bytes: &[u8]) -> Emulated {
        let space = AddressSpace { memory: &self.memory, pkru: 0 };
        emulate(&Self::decode(bytes), &mut self.state, &space)
    }

    /// Runs an instruction that must not complete: it must leave the state and all bytes of data and stack alone.
    fn run_refused(&mut self, bytes: &[u8]) -> Emulated {
        let state = self.state;
        let before = self.content();
        let end = self.run(bytes);
        assert!(matches!(end, Emulated::Fault(_) | Emulated::Defer(_)), "{end:?}");
        assert_eq!(self.state, state);
        assert_eq!(self.content(), before);
        end
    }

    fn content(&self) -> Vec<u8> {
        let mut content = self.memory.bytes(DATA_GPA, 0x2000);
        content.extend(self.memory.bytes(STACK_GPA[0], 0x1000));
        content.extend(self.memory.bytes(STACK_GPA[1], 0x1000));
        content
    }

    /// Runs an instruction that completes and goes on behind itself.
    fn done(&mut self, bytes: &[u8]) -> &mut Self {
        assert_eq!(self.run(bytes), Emulated::Done, "{bytes:x?}");
        assert_eq!(self.state.regs.rip, RIP.0 + bytes.len() as u64, "{bytes:x?}");
        self
    }

    /// The word at `offset` bytes into the upper stack page.
    fn stack_word(&self, offset: u64) -> u64 {
        self.memory.word(STACK_GPA[1].offset(offset))
    }

    fn data_word(&self, offset: u64) -> u64 {
        self.memory.word(DATA_GPA.offset(offset))
    }

    fn load_data(&self, offset: u64, value: u64) {
        self.memory.load(DATA_GPA.offset(offset), &value.to_le_bytes());
    }

    fn load_stack(&self, offset: u64, value: u64) {
        self.memory.load(STACK_GPA[1].offset(offset), &value.to_le_bytes());
    }
}

fn page_fault(address: Gva, code: u32) -> Emulated {
    Emulated::Fault(Exception::PageFault { address, code })
}

const GENERAL_PROTECTION: Emulated = Emulated::Fault(Exception::GeneralProtection { code: 0 });

#[test]
fn nops_change_nothing_but_rip_rf_and_the_shadow() {
    for bytes in [
        &[0x90][..],                                    // nop
        &[0x66, 0x90],                                  // xchg %ax,%ax
        &[0xf3, 0x90],                                  // pause
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],                // nopl 0(%rax,%rax,1)
        &[0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], // cs nopw 0(%rax,%rax,1)
        &[0xf3, 0x0f, 0x1e, 0xfa],                      // endbr64
        &[0xf3, 0x0f, 0x1e, 0xfb],                      // endbr32
        &[0x0f, 0x18, 0x0f],                            // prefetcht0 (%rdi)
        &[0x0f, 0x0d, 0x0f],                            // prefetchw (%rdi)
    ] {
        let mut machine = Machine::new();
        machine.state.regs.rdi = UNMAPPED.0;
        machine.state.regs.rflags |= rflags::RF | rflags::TF | rflags::CF;
        machine.state.shadow = InterruptShadow { sti: true, mov_ss: true };
        let mut expected = machine.state;
        expected.regs.rip += bytes.len() as u64;
        expected.regs.rflags &= !rflags::RF;
        expected.shadow = InterruptShadow::default();
        machine.done(bytes);
        assert_eq!(machine.state, expected, "{bytes:x?}");
        assert_eq!(machine.memory.log(), [], "{bytes:x?}");
    }
}

#[test]
fn other_code_sizes_are_deferred() {
    let mut machine = Machine::new();
    machine.state.sys.long_code = false;
    assert_eq!(machine.run_refused(&[0x90]), Emulated::Defer(DeferReason::CodeSize));
    let instruction = Decoder::with_ip(32, &[0x55], RIP.0, DecoderOptions::NONE).decode();
    let mut state = Machine::new().state;
    let space = AddressSpace { memory: &machine.memory, pkru: 0 };
    assert_eq!(emulate(&instruction, &mut state, &space), Emulated::Defer(DeferReason::CodeSize));
}

#[test]
fn what_no_family_covers_is_deferred() {
    for bytes in [
        &[0xc5, 0xf8, 0x77][..],         // vzeroupper: opcode 77 is JA in the one-byte map
        &[0xc4, 0xe2, 0x78, 0xf2, 0xc1], // andn %ecx,%eax,%eax: opcode F2
        &[0xf2, 0x0f, 0x10, 0x07],       // movsd (%rdi),%xmm0
        &[0x0f, 0x20, 0xc0],             // mov %cr0,%rax
        &[0x8e, 0xd8],                   // mov %eax,%ds
        &[0x0f, 0xa0],                   // push %fs
        &[0x67, 0x48, 0xa5],             // movsq (%esi),(%edi)
        &[0x48, 0xf7, 0xe1],             // mul %rcx
        &[0x66, 0x0f, 0xc8],             // bswap %ax: undefined
        &[0x0f, 0xb1, 0xc8],             // cmpxchg %ecx,%eax: the upper half is up to the CPU
        &[0xf3, 0x41, 0x90],             // decoded as pause, run as xchg %r8,%rax
        &[0xc8, 0, 0, 0],                // enter $0,$0
    ] {
        let mut machine = Machine::new();
        assert!(!is_emulated(&Machine::decode(bytes)), "{bytes:x?}");
        assert_eq!(machine.run_refused(bytes), Emulated::Defer(DeferReason::NotEmulated), "{bytes:x?}");
    }
}

#[test]
fn random_bytes_never_panic() {
    let mut seed = 0x1234_5678_u64;
    let mut byte = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 56) as u8
    };
    let mut machine = Machine::new();
    for _ in 0..200_000 {
        let bytes: [u8; 15] = std::array::from_fn(|_| byte());
        let instruction = Decoder::with_ip(64, &bytes, RIP.0, DecoderOptions::NONE).decode();
        let mut state = machine.state;
        state.regs.rax = u64::from(byte()) << 56 | u64::from(byte());
        state.regs.rcx = DATA.0 | u64::from(byte()) << 4;
        state.regs.rdi = DATA.0 + 0xff8 + u64::from(byte() & 15);
        state.regs.rflags |= u64::from(byte());
        let space = AddressSpace { memory: &machine.memory, pkru: 0 };
        let before = state;
        match emulate(&instruction, &mut state, &space) {
            Emulated::Done | Emulated::Halt => machine.state.regs.rbx = state.regs.rbx,
            Emulated::Fault(_) | Emulated::Defer(_) => assert_eq!(state, before),
        }
    }
}
