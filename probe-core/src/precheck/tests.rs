use super::*;
use crate::Gpa;
use crate::mock::{MockMemory, MockPageTables, MockVcpu};
use crate::paging::entry;
use crate::plan::{check_step, decode};

const RIP: Gva = Gva(0xffff_ffff_8100_0000);
const STACK: Gva = Gva(0xffff_c900_0000_0000);
const DATA: Gva = Gva(0xffff_8880_0000_0000);
const READ_ONLY: Gva = Gva(DATA.0 + 0x1000);
const UNMAPPED: Gva = Gva(DATA.0 + 0x2000);
const MMIO: Gva = Gva(0xffff_ffff_ff5f_b000);
const CANONICAL_EDGE: u64 = 1 << 47;

struct Machine {
    memory: MockMemory,
    state: VcpuState,
}

impl Machine {
    fn new() -> Self {
        let memory = MockMemory::with_ram(0x8_0000);
        let mut tables = MockPageTables::new(&memory, Gpa(0x1000), 4);
        let rw = entry::PRESENT | entry::WRITABLE;
        tables.map(STACK, Gpa(0x4_0000), 0x1000, rw);
        tables.map(DATA, Gpa(0x6_0000), 0x1000, rw);
        tables.map(READ_ONLY, Gpa(0x6_1000), 0x1000, entry::PRESENT);
        tables.map(MMIO, Gpa(0xfee0_0000), 0x1000, rw);
        let mut state = MockVcpu::new(tables.root())
            .rip(RIP)
            .rsp(STACK.offset(0x800))
            .cr4(CR4_OSFXSR | CR4_OSXSAVE | CR4_FSGSBASE)
            .build();
        state.regs.rdi = DATA.0;
        state.regs.rsi = DATA.0;
        Self { memory, state }
    }

    fn check(&self, bytes: &[u8]) -> Result<(), StepHazard> {
        let instruction = decode(bytes, RIP).unwrap();
        check_step(&instruction).unwrap();
        precheck(&instruction, &self.state, &AddressSpace { memory: &self.memory, pkru: 0 })
    }
}

fn page_fault(address: Gva, code: u32) -> Result<(), StepHazard> {
    Err(StepHazard::Fault(Exception::PageFault { address, code }))
}

#[test]
fn explicit_operands_are_checked_for_their_access() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = READ_ONLY.0;
    assert_eq!(machine.check(&[0xf3, 0x0f, 0x6f, 0x07]), Ok(())); // movdqu (%rdi),%xmm0
    assert_eq!(machine.check(&[0xf3, 0x0f, 0x7f, 0x07]), page_fault(READ_ONLY, 3)); // movdqu %xmm0,(%rdi)
    assert_eq!(machine.check(&[0x48, 0x0f, 0xc3, 0x07]), page_fault(READ_ONLY, 3)); // movnti %rax,(%rdi)
    machine.state.regs.rdi = UNMAPPED.0;
    assert_eq!(machine.check(&[0x48, 0x0f, 0xaf, 0x07]), page_fault(UNMAPPED, 0)); // imul (%rdi),%rax
    assert_eq!(machine.check(&[0x0f, 0xae, 0x3f]), page_fault(UNMAPPED, 0)); // clflush (%rdi)
    assert_eq!(machine.check(&[0x0f, 0x01, 0x3f]), Ok(())); // invlpg (%rdi) looks at nothing
    machine.state.regs.rdi = READ_ONLY.0 + 0xff8;
    assert_eq!(machine.check(&[0xf3, 0x0f, 0x6f, 0x07]), page_fault(UNMAPPED, 0)); // movdqu: the second page
    machine.state.regs.rdi = CANONICAL_EDGE;
    assert_eq!(machine.check(&[0x48, 0x0f, 0xaf, 0x07]), Err(GENERAL_PROTECTION)); // imul (%rdi),%rax
    machine.state.regs.rbp = CANONICAL_EDGE;
    let stack_fault = Err(StepHazard::Fault(Exception::StackFault { code: 0 }));
    assert_eq!(machine.check(&[0x48, 0x0f, 0xaf, 0x45, 0x00]), stack_fault); // imul 0(%rbp),%rax
    assert_eq!(machine.memory.writes(), []);
}

#[test]
fn operands_outside_ram_are_let_through() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = MMIO.0;
    for bytes in [
        &[0x8b, 0x07][..],   // mov (%rdi),%eax
        &[0x89, 0x07],       // mov %eax,(%rdi)
        &[0xf0, 0xff, 0x07], // lock incl (%rdi)
        &[0xff, 0x17],       // call *(%rdi)
        &[0xaa],             // stosb
    ] {
        assert_eq!(machine.check(bytes), Ok(()), "{bytes:x?}");
    }
    assert_eq!(machine.check(&[0xf7, 0x37]), Err(StepHazard::NotRam(MMIO))); // divl (%rdi)
    machine.state.regs.rsp = MMIO.0 + 0x100;
    assert_eq!(machine.check(&[0xff, 0xd0]), Err(StepHazard::NotRam(MMIO.offset(0xf8)))); // call *%rax
}

#[test]
fn string_instructions_are_checked_at_both_ends_unless_they_do_nothing() {
    let mut machine = Machine::new();
    machine.state.regs.rsi = UNMAPPED.0;
    machine.state.regs.rcx = 1;
    assert_eq!(machine.check(&[0xf3, 0xa4]), page_fault(UNMAPPED, 0)); // rep movsb
    machine.state.regs.rsi = DATA.0;
    machine.state.regs.rdi = READ_ONLY.0;
    assert_eq!(machine.check(&[0xf3, 0xa4]), page_fault(READ_ONLY, 3));
    assert_eq!(machine.check(&[0xf3, 0xa6]), Ok(())); // repe cmpsb only reads
    machine.state.regs.rcx = 0;
    assert_eq!(machine.check(&[0xf3, 0xa4]), Ok(()));
    assert_eq!(machine.check(&[0xa4]), page_fault(READ_ONLY, 3)); // movsb has no count
    machine.state.regs.rcx = 1 << 32;
    assert_eq!(machine.check(&[0xf3, 0xa4]), page_fault(READ_ONLY, 3));
    assert_eq!(machine.check(&[0x67, 0xf3, 0xa4]), Ok(())); // rep movsb counted by ECX
}

#[test]
fn alignment_is_demanded_where_the_cpu_demands_it() {
    let mut machine = Machine::new();
    for (bytes, misaligned) in [
        (&[0x0f, 0x28, 0x07][..], Err(GENERAL_PROTECTION)), // movaps (%rdi),%xmm0
        (&[0x66, 0x0f, 0x7f, 0x07], Err(GENERAL_PROTECTION)), // movdqa %xmm0,(%rdi)
        (&[0x66, 0x0f, 0xef, 0x07], Err(GENERAL_PROTECTION)), // pxor (%rdi),%xmm0
        (&[0x0f, 0x10, 0x07], Ok(())),                      // movups (%rdi),%xmm0
        (&[0xf3, 0x0f, 0x6f, 0x07], Ok(())),                // movdqu (%rdi),%xmm0
        (&[0x66, 0x0f, 0x3a, 0x63, 0x07, 0], Ok(())),       // pcmpistri $0,(%rdi),%xmm0
        (&[0xf3, 0x0f, 0x10, 0x07], Ok(())),                // movss (%rdi),%xmm0
        (&[0xc5, 0xf9, 0xef, 0x07], Ok(())),                // vpxor (%rdi),%xmm0,%xmm0
        (&[0xc5, 0xf9, 0x6f, 0x07], Err(GENERAL_PROTECTION)), // vmovdqa (%rdi),%xmm0
        (&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], Err(GENERAL_PROTECTION)), // lock cmpxchg16b (%rdi)
        (&[0xf0, 0x0f, 0xc7, 0x0f], Ok(())),                // lock cmpxchg8b (%rdi)
    ] {
        machine.state.regs.rdi = DATA.0 + 0x20;
        assert_eq!(machine.check(bytes), Ok(()), "{bytes:x?}");
        machine.state.regs.rdi = DATA.0 + 0x24;
        assert_eq!(machine.check(bytes), misaligned, "{bytes:x?}");
    }
    machine.state.regs.rdi = DATA.0 + 0x10;
    assert_eq!(machine.check(&[0xc5, 0xfd, 0x6f, 0x07]), Err(GENERAL_PROTECTION)); // vmovdqa (%rdi),%ymm0
}

#[test]
fn the_vector_unit_must_be_on_and_owned() {
    const PXOR: [u8; 4] = [0x66, 0x0f, 0xef, 0xc1];
    const VPXOR: [u8; 4] = [0xc5, 0xf9, 0xef, 0xc1];
    const ANDN: [u8; 5] = [0xc4, 0xe2, 0x78, 0xf2, 0xc1];
    let mut machine = Machine::new();
    machine.state.sys.cr0 |= CR0_TS;
    let not_available = Err(StepHazard::Fault(Exception::DeviceNotAvailable));
    assert_eq!(machine.check(&PXOR), not_available);
    assert_eq!(machine.check(&[0xc5, 0xf8, 0x77]), not_available); // vzeroupper
    assert_eq!(machine.check(&ANDN), Ok(()));
    machine.state.sys.cr4 &= !CR4_OSXSAVE;
    assert_eq!(machine.check(&VPXOR), Err(INVALID_OPCODE));
    machine.state.sys.cr0 |= CR0_EM;
    assert_eq!(machine.check(&PXOR), Err(INVALID_OPCODE));
    assert_eq!(machine.check(&[0x0f, 0xae, 0xf0]), Ok(())); // mfence
}

#[test]
fn privileges_are_checked() {
    let mut machine = Machine::new();
    machine.state.sys.cr4 |= CR4_TSD | CR4_UMIP;
    machine.state.sys.cpl = 3;
    for (bytes, user, supervisor) in [
        (&[0x0f, 0x01, 0xf8][..], Err(GENERAL_PROTECTION), Ok(())), // swapgs
        (&[0x0f, 0x20, 0xd8], Err(GENERAL_PROTECTION), Ok(())),     // mov %cr3,%rax
        (&[0x0f, 0x01, 0xca], Err(INVALID_OPCODE), Ok(())),         // clac
        (&[0x0f, 0x31], Err(GENERAL_PROTECTION), Ok(())),           // rdtsc
        (&[0x0f, 0x01, 0xe0], Err(GENERAL_PROTECTION), Ok(())),     // smsw %eax
        (&[0xee], Err(StepHazard::IoPermission), Ok(())),           // out %al,(%dx)
        (&[0x0f, 0xa2], Ok(()), Ok(())),                            // cpuid
    ] {
        machine.state.sys.cpl = 3;
        assert_eq!(machine.check(bytes), user, "{bytes:x?}");
        machine.state.sys.cpl = 0;
        assert_eq!(machine.check(bytes), supervisor, "{bytes:x?}");
    }
    machine.state.sys.cpl = 3;
    machine.state.regs.rflags |= rflags::IOPL;
    assert_eq!(machine.check(&[0xee]), Ok(())); // out %al,(%dx)
}

#[test]
fn system_reads_and_base_writes_are_checked() {
    const XGETBV: [u8; 3] = [0x0f, 0x01, 0xd0];
    const WRGSBASE: [u8; 5] = [0xf3, 0x48, 0x0f, 0xae, 0xd8];
    let mut machine = Machine::new();
    machine.state.regs.rcx = 5 << 32;
    assert_eq!(machine.check(&XGETBV), Ok(()));
    machine.state.regs.rcx = 1;
    assert_eq!(machine.check(&XGETBV), Err(StepHazard::ExtendedControlRegister(1)));
    machine.state.sys.cr4 &= !CR4_OSXSAVE;
    assert_eq!(machine.check(&XGETBV), Err(INVALID_OPCODE));
    assert_eq!(machine.check(&WRGSBASE), Ok(()));
    machine.state.regs.rax = CANONICAL_EDGE;
    assert_eq!(machine.check(&WRGSBASE), Err(GENERAL_PROTECTION));
    machine.state.sys.cr4 &= !CR4_FSGSBASE;
    assert_eq!(machine.check(&WRGSBASE), Err(INVALID_OPCODE));
}

#[test]
fn divisions_that_do_not_fit_are_divide_errors() {
    const MIN: u64 = 1 << 63;
    let divide_error = Err(StepHazard::Fault(Exception::DivideError));
    // Bytes, RDX, RAX, RCX, fits.
    let table: &[(&[u8], u64, u64, u64, bool)] = &[
        (&[0x48, 0xf7, 0xf1], 0, 5, 0, false), // div %rcx
        (&[0x48, 0xf7, 0xf1], 4, u64::MAX, 5, true),
        (&[0x48, 0xf7, 0xf1], 5, 0, 5, false),
        (&[0xf7, 0xf1], 4, 0, 5 | 7 << 32, true), // div %ecx
        (&[0xf7, 0xf1], 5, 0, 5 | 7 << 32, false),
        (&[0x66, 0xf7, 0xf1], 0xffff_0004, 0, 5, true), // div %cx
        (&[0xf6, 0xf1], 0, 0x04ff, 5, true),            // div %cl divides AX
        (&[0xf6, 0xf1], 0, 0x0500, 5, false),
        (&[0x48, 0xf7, 0xf9], u64::MAX, MIN, u64::MAX, false), // idiv %rcx: -2^63 / -1
        (&[0x48, 0xf7, 0xf9], u64::MAX, MIN, 1, true),         // -2^63 / 1
        (&[0x48, 0xf7, 0xf9], MIN, 0, u64::MAX, false),        // -2^127 / -1
        (&[0x48, 0xf7, 0xf9], 0, MIN, 1, false),               // 2^63 / 1
        (&[0x48, 0xf7, 0xf9], 0, 7, 0, false),
        (&[0xf7, 0xf9], 0xffff_ffff, 0x8000_0000, 0xffff_ffff, false), // idiv %ecx: -2^31 / -1
        (&[0xf6, 0xf9], 0, 0xff80, 1, true),                           // idiv %cl: -128 / 1
        (&[0xf6, 0xf9], 0, 0xff80, 0xff, false),
    ];
    for &(bytes, rdx, rax, rcx, fits) in table {
        let mut machine = Machine::new();
        machine.state.regs.rdx = rdx;
        machine.state.regs.rax = rax;
        machine.state.regs.rcx = rcx;
        let expected = if fits { Ok(()) } else { divide_error };
        assert_eq!(machine.check(bytes), expected, "{bytes:x?} {rdx:#x}:{rax:#x} / {rcx:#x}");
    }
    let mut machine = Machine::new();
    assert_eq!(machine.check(&[0xf7, 0x37]), divide_error); // divl (%rdi), which is 0
    machine.memory.load(Gpa(0x6_0000), &[3, 0, 0, 0]);
    assert_eq!(machine.check(&[0xf7, 0x37]), Ok(()));
    machine.state.regs.rdi = UNMAPPED.0;
    assert_eq!(machine.check(&[0xf7, 0x37]), page_fault(UNMAPPED, 0));
}

#[test]
fn branches_need_a_canonical_target_and_a_stack() {
    let mut machine = Machine::new();
    machine.state.regs.rax = CANONICAL_EDGE;
    machine.memory.load(Gpa(0x4_0800), &CANONICAL_EDGE.to_le_bytes());
    machine.memory.load(Gpa(0x6_0000), &CANONICAL_EDGE.to_le_bytes());
    for bytes in [
        &[0xff, 0xe0][..], // jmp *%rax
        &[0xff, 0xd0],     // call *%rax
        &[0xff, 0x27],     // jmp *(%rdi)
        &[0xff, 0x17],     // call *(%rdi)
        &[0xc3],           // ret
    ] {
        assert_eq!(machine.check(bytes), Err(GENERAL_PROTECTION), "{bytes:x?}");
    }
    machine.state.regs.rax = RIP.0;
    machine.state.regs.rsp = STACK.0;
    assert_eq!(machine.check(&[0xff, 0xd0]), page_fault(Gva(STACK.0 - 8), 2)); // call *%rax
    machine.state.regs.rsp = STACK.0 + 0x800;
    machine.state.sys.cr4 |= control::CR4_CET;
    assert_eq!(machine.check(&[0xff, 0xd0]), Err(StepHazard::ShadowStack));
}

#[test]
fn bit_strings_are_checked_where_they_reach() {
    let mut machine = Machine::new();
    machine.state.regs.rax = 0x1000 * 8;
    // lock bts %rax,(%rdi): one page further on, read-only
    assert_eq!(machine.check(&[0xf0, 0x48, 0x0f, 0xab, 0x07]), page_fault(READ_ONLY, 3));
    machine.state.regs.rax = 0x2000 * 8;
    assert_eq!(machine.check(&[0x48, 0x0f, 0xa3, 0x07]), page_fault(UNMAPPED, 0)); // bt %rax,(%rdi)
}

#[test]
fn other_code_sizes_are_not_stepped() {
    let mut machine = Machine::new();
    machine.state.sys.long_code = false;
    assert_eq!(machine.check(&[0xaa]), Err(StepHazard::CodeSize));
}
