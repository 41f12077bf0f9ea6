//! Read-modify-write and locked operands, and the faults of data accesses.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;
use crate::mock::{Operation, OperationKind};
use crate::{MemoryError, PhysicalMemory};

/// The operations on the data page that could change it.
fn stores(machine: &Machine) -> Vec<Operation> {
    let mut log = machine.memory.writes();
    log.retain(|operation| match operation {
        Operation::Write { gpa, .. } | Operation::CompareExchange { gpa, .. } => gpa.page() == DATA_GPA,
        Operation::Read { .. } => false,
    });
    log
}

#[test]
fn locked_forms_exchange_and_plain_forms_store_once() {
    let data =
        |new: u64, len: usize| Operation::Write { gpa: DATA_GPA, data: new.to_le_bytes()[..len].to_vec() };
    let exchange = |width, current, new| Operation::CompareExchange { gpa: DATA_GPA, width, current, new };
    let table: [(&[u8], Operation); 9] = [
        (&[0x48, 0x01, 0x07], data(15, 8)),                     // add %rax,(%rdi)
        (&[0xf0, 0x48, 0x01, 0x07], exchange(8, 10, 15)),       // lock add %rax,(%rdi)
        (&[0xf0, 0xff, 0x0f], exchange(4, 10, 9)),              // lock decl (%rdi)
        (&[0x48, 0x87, 0x07], exchange(8, 10, 5)),              // xchg %rax,(%rdi): locks by itself
        (&[0x86, 0x07], exchange(1, 10, 5)),                    // xchg %al,(%rdi)
        (&[0xf0, 0x66, 0x0f, 0xc1, 0x07], exchange(2, 10, 15)), // lock xadd %ax,(%rdi)
        (&[0xf0, 0x48, 0x0f, 0xba, 0x2f, 0x04], exchange(8, 10, 26)), // lock btsq $4,(%rdi)
        (&[0xf0, 0x0f, 0xb1, 0x0f], exchange(4, 5, 7)),         // lock cmpxchg %ecx,(%rdi): differs
        (&[0x0f, 0xb1, 0x0f], data(10, 4)), // cmpxchg %ecx,(%rdi): writes the old value back
    ];
    for (bytes, operation) in table {
        let mut machine = Machine::new();
        machine.state.regs.rdi = DATA.0;
        machine.state.regs.rax = 5;
        machine.state.regs.rcx = 7;
        machine.load_data(0, 10);
        machine.done(bytes);
        assert_eq!(stores(&machine), [operation], "{bytes:x?}");
    }
}

#[test]
fn cmpxchg_stores_on_equality_and_loads_otherwise() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0;
    machine.state.regs.rax = 0xffff_ffff_0000_000a;
    machine.state.regs.rcx = 7;
    machine.load_data(0, 10);
    machine.done(&[0xf0, 0x0f, 0xb1, 0x0f]); // lock cmpxchg %ecx,(%rdi)
    assert_eq!(machine.data_word(0), 7);
    assert_eq!(machine.state.regs.rax, 0xffff_ffff_0000_000a);
    assert_eq!(machine.state.regs.rflags & rflags::ZF, rflags::ZF);
    machine.done(&[0xf0, 0x0f, 0xb1, 0x0f]);
    assert_eq!(machine.data_word(0), 7);
    assert_eq!(machine.state.regs.rax, 7);
    assert_eq!(machine.state.regs.rflags & rflags::ZF, 0);
}

#[test]
fn a_locked_operand_that_is_not_aligned_is_deferred() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0 + 4;
    let misaligned = Emulated::Defer(DeferReason::Misaligned(DATA.offset(4)));
    assert_eq!(machine.run_refused(&[0xf0, 0x48, 0xff, 0x07]), misaligned); // lock incq (%rdi)
    assert_eq!(machine.run_refused(&[0x48, 0x87, 0x07]), misaligned); // xchg %rax,(%rdi)
    machine.done(&[0xf0, 0xff, 0x07]); // lock incl (%rdi)
}

/// Memory in which another vCPU adds 100 to the word at `gpa` before each of the first exchanges.
struct Contended<'m> {
    memory: &'m MockMemory,
    gpa: Gpa,
    left: AtomicU32,
}

impl PhysicalMemory for Contended<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(gpa, buf)
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(gpa, data)
    }

    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError> {
        if gpa == self.gpa && self.left.load(Ordering::Relaxed) > 0 {
            self.left.fetch_sub(1, Ordering::Relaxed);
            self.memory.load(gpa, &(self.memory.word(gpa) + 100).to_le_bytes());
        }
        self.memory.compare_exchange(gpa, width, current, new)
    }
}

#[test]
fn a_locked_update_loses_nothing_of_what_others_add() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0;
    machine.state.regs.rax = 1;
    machine.load_data(0, 10);
    let contended = Contended { memory: &machine.memory, gpa: DATA_GPA, left: 3.into() };
    let space = AddressSpace { memory: &contended, pkru: 0 };
    // lock xadd %rax,(%rdi)
    let instruction = Machine::decode(&[0xf0, 0x48, 0x0f, 0xc1, 0x07]);
    assert_eq!(emulate(&instruction, &mut machine.state, &space), Emulated::Done);
    assert_eq!(machine.data_word(0), 311);
    assert_eq!(machine.state.regs.rax, 310);
}

#[test]
fn a_bit_string_with_32_bit_addresses_wraps_below_4_gib() {
    // bt %r11,0x10(%ebx): 64 bits per element; the offset is 2^61 - 1 elements, of which the address keeps 32 bits.
    let bytes = [0x67, 0x4c, 0x0f, 0xa3, 0x5b, 0x10];
    let mut machine = Machine::new();
    machine.state.regs.rbx = 0xffff_ffff_0000_0100;
    machine.state.regs.r11 = 1 << 62 | 0x40;
    assert_eq!(machine.run_refused(&bytes), page_fault(Gva(0x118), 0));
    machine.state.regs.r11 = (-0x140_i64 * 8).cast_unsigned();
    assert_eq!(machine.run_refused(&bytes), page_fault(Gva(0xffff_ffd0), 0));
    // With FS the base is added to the wrapped offset.
    machine.state.sys.fs_base = DATA.0;
    machine.state.regs.r11 = 0x40 | 1;
    machine.load_data(0x118, 2);
    machine.done(&[0x64, 0x67, 0x4c, 0x0f, 0xa3, 0x5b, 0x10]);
    assert_eq!(machine.state.regs.rflags & rflags::CF, rflags::CF);
}

#[test]
fn a_bit_string_reaches_beyond_its_operand() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0 + 0x100;
    machine.state.regs.rax = 64 * 3 + 5;
    machine.done(&[0x48, 0x0f, 0xab, 0x07]); // bts %rax,(%rdi)
    assert_eq!(machine.data_word(0x118), 1 << 5);
    assert_eq!(machine.state.regs.rflags & rflags::CF, 0);
    machine.state.regs.rax = 0_u64.wrapping_sub(1);
    machine.load_data(0xf8, 1 << 63);
    machine.done(&[0x48, 0x0f, 0xb3, 0x07]); // btr %rax,(%rdi)
    assert_eq!(machine.data_word(0xf8), 0);
    assert_eq!(machine.state.regs.rflags & rflags::CF, rflags::CF);
    machine.state.regs.rax = 0x1_ffff_fff0;
    machine.load_data(0xfc, 1 << 16);
    machine.done(&[0x0f, 0xa3, 0x07]); // bt %eax,(%rdi): the offset is 32 bits wide, -16
    assert_eq!(machine.state.regs.rflags & rflags::CF, rflags::CF);
    machine.done(&[0x0f, 0xba, 0x67, 0xfc, 0x30]); // btl $0x30,-4(%rdi): an immediate stays in the operand
    assert_eq!(machine.state.regs.rflags & rflags::CF, rflags::CF);
}

#[test]
fn faults_of_data_accesses_carry_the_cpus_error_code() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = READ_ONLY.0;
    let table: [(&[u8], Emulated); 6] = [
        (&[0x48, 0x89, 0x07], page_fault(READ_ONLY, 3)), // mov %rax,(%rdi)
        (&[0x48, 0x01, 0x07], page_fault(READ_ONLY, 3)), // add %rax,(%rdi): asked for as a write
        (&[0x48, 0x8b, 0x87, 0, 0x10, 0, 0], page_fault(UNMAPPED, 0)), // mov 0x1000(%rdi),%rax
        (&[0x48, 0x8b, 0x87, 0xfc, 0x0f, 0, 0], page_fault(UNMAPPED, 0)), // mov 0xffc(%rdi),%rax: second page
        (&[0x48, 0x89, 0x47, 0xfc], page_fault(READ_ONLY, 3)), // mov %rax,-4(%rdi): second page
        (&[0x48, 0x0f, 0xb1, 0x07], page_fault(READ_ONLY, 3)), // cmpxchg %rax,(%rdi)
    ];
    for (bytes, fault) in table {
        assert_eq!(machine.run_refused(bytes), fault, "{bytes:x?}");
    }
    machine.done(&[0x48, 0x8b, 0x07]); // mov (%rdi),%rax
}

#[test]
fn a_non_canonical_address_is_a_stack_fault_relative_to_rbp() {
    let mut machine = Machine::new();
    machine.state.regs.rbp = 1 << 47;
    machine.state.regs.rsi = 1 << 47;
    machine.state.regs.r13 = 1 << 47;
    let stack_fault = Emulated::Fault(Exception::StackFault { code: 0 });
    let table: [(&[u8], Emulated); 5] = [
        (&[0x48, 0x8b, 0x06], GENERAL_PROTECTION),       // mov (%rsi),%rax
        (&[0x48, 0x8b, 0x45, 0x00], stack_fault),        // mov 0(%rbp),%rax
        (&[0x49, 0x8b, 0x45, 0x00], GENERAL_PROTECTION), // mov 0(%r13),%rax
        (&[0x3e, 0x48, 0x8b, 0x45, 0x00], stack_fault),  // mov %ds:0(%rbp),%rax: override ignored
        (&[0x65, 0x48, 0x8b, 0x45, 0x00], GENERAL_PROTECTION), // mov %gs:0(%rbp),%rax
    ];
    for (bytes, fault) in table {
        assert_eq!(machine.run_refused(bytes), fault, "{bytes:x?}");
    }
}

#[test]
fn operands_outside_ram_are_deferred_untouched() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = MMIO.0;
    let mmio = Emulated::Defer(DeferReason::NotRam(MMIO));
    for bytes in [
        &[0x8b, 0x07][..],   // mov (%rdi),%eax
        &[0x89, 0x07],       // mov %eax,(%rdi)
        &[0xf0, 0xff, 0x07], // lock incl (%rdi)
        &[0x87, 0x07],       // xchg %eax,(%rdi)
        &[0xff, 0x37],       // push (%rdi)
        &[0xff, 0x17],       // call *(%rdi)
    ] {
        assert_eq!(machine.run_refused(bytes), mmio, "{bytes:x?}");
    }
}

#[test]
fn a_store_that_memory_refuses_defers_and_works_on_retry() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0;
    machine.state.regs.rax = 5;
    machine.memory.clear_log();
    machine.memory.fail(OperationKind::Write, 1);
    let refused = Emulated::Defer(DeferReason::NotRam(DATA));
    assert_eq!(machine.run_refused(&[0x48, 0x01, 0x07]), refused); // add %rax,(%rdi)
    assert_eq!(machine.memory.pending_failures(), 0);
    machine.done(&[0x48, 0x01, 0x07]);
    assert_eq!(machine.data_word(0), 5);
}

#[test]
fn user_accesses_obey_protection_keys() {
    let mut machine = Machine::new();
    let walk = crate::paging::walk_entries(&machine.state.sys, &machine.memory, DATA).unwrap();
    let leaf = walk.last().unwrap();
    let opened = leaf.value | entry::USER | 2 << entry::KEY_SHIFT;
    machine.memory.load(leaf.gpa, &opened.to_le_bytes());
    machine.state.sys.cpl = 3;
    machine.state.sys.cr4 |= control::CR4_PKE;
    machine.state.regs.rdi = DATA.0;
    let space = AddressSpace { memory: &machine.memory, pkru: 0b10 << 4 };
    let load = Machine::decode(&[0x8b, 0x07]); // mov (%rdi),%eax
    assert_eq!(emulate(&load, &mut machine.state.clone(), &space), Emulated::Done);
    let store = Machine::decode(&[0x89, 0x07]); // mov %eax,(%rdi)
    assert_eq!(emulate(&store, &mut machine.state.clone(), &space), page_fault(DATA, 0x27));
}
