//! The instructions that kprobes had trouble with, each probed and hit once. `docs/kprobes.md` lists them.

use super::out_of_line::{PAGE_FAULT, Seen};
use super::returns::Calls;
use super::*;
use crate::Registers;
use crate::plan::{Reason, Refusal};

/// A guest with an interrupt table, probed at `code`.
fn probed(code: &[u8]) -> (Guest, Arc<Probe>) {
    Guest::with_table(code)
}

/// Hits a probe on `code`, from a state that `change` has changed, and returns the guest behind the instruction.
#[track_caller]
fn emulated(code: &[u8], change: impl FnOnce(&mut VcpuState)) -> Guest {
    let (mut guest, probe) = probed(code);
    change(&mut guest.state);
    assert_eq!(guest.breakpoint(), Resume::Run, "{code:x?}");
    assert_eq!(probe.counts().emulated, 1, "{code:x?}");
    guest
}

/// Why no probe can stand on `code`.
fn refused(code: &[u8]) -> Refusal {
    let guest = Guest::new(code, None);
    match guest.engine.arm(&guest.memory, &[ProbeRequest::new(place(0))]) {
        Err(EngineError::Arm(ArmError::Refused(refusal))) => refusal,
        other => panic!("{code:x?}: {other:?}"),
    }
}

const STEP_FLAGS: u64 = rflags::IF | rflags::TF;

#[test]
fn corner_a_repeated_string_instruction_is_one_hit() {
    // rep stos %rax,(%rdi)
    const REP_STOSQ: &[u8] = &[0xf3, 0x48, 0xab, 0xc3];
    let store = |state: &mut VcpuState| {
        (state.regs.rdi, state.regs.rcx, state.regs.rax) = (0x2000, 4, 7);
    };
    let guest = emulated(REP_STOSQ, store);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rcx, guest.state.regs.rdi), (TEXT.0 + 3, 0, 0x2020));
    assert_eq!((guest.memory.word(Gpa(0x2018)), guest.memory.word(Gpa(0x2020))), (7, 0));

    // The guest's own single step has its #DB after each iteration, and each arrival at the instruction is a hit.
    let (mut guest, probe) = probed(REP_STOSQ);
    store(&mut guest.state);
    guest.state.regs.rflags |= rflags::TF;
    for (left, rip) in [(3, TEXT.0), (2, TEXT.0), (1, TEXT.0), (0, TEXT.0 + 3)] {
        assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
        assert_eq!((guest.state.regs.rcx, guest.state.regs.rip), (left, rip));
    }
    assert_eq!((probe.counts().hits, probe.counts().emulated), (4, 4));
}

#[test]
fn corner_a_repeated_string_instruction_that_faults_on_the_way_is_one_hit() {
    let (mut guest, probe) = probed(&[0xf3, 0x48, 0xab, 0xc3]); // rep stos %rax,(%rdi)
    (guest.state.regs.rdi, guest.state.regs.rcx) = (0xfff8, 2);
    guest.enter();
    // The first store is done; the second one meets a page that is not there.
    (guest.state.regs.rdi, guest.state.regs.rcx, guest.state.sys.cr2) = (0x1_0000, 1, 0x1_0000);
    guest.event(PAGE_FAULT, Some(2), rflags::RF);
    guest.catch(PAGE_FAULT);
    let expected = rflags::FIXED | rflags::IF | rflags::RF;
    assert_eq!(guest.frame(true), Seen { rip: TEXT.0, rflags: expected, rsp: STACK.0 });
    MockPageTables::new(&guest.memory, ROOT, 4).map(Gva(0x1_0000), Gpa(0x9000), 0x1000, RW);
    guest.return_from(true);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!((guest.state.regs.rip, guest.state.regs.rcx), (TEXT.0 + 3, 0));
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, faulted: 1, ..Counts::default() });
}

#[test]
fn corner_what_64_bit_mode_has_not_is_refused() {
    for code in [
        &[0x17][..],                                 // pop %ss
        &[0x1f],                                     // pop %ds
        &[0x9a, 0, 0, 0, 0, 0, 0],                   // lcall
        &[0xea, 0, 0, 0, 0, 0, 0],                   // ljmp
        &[0xce],                                     // into
        &[0x62, 0x07, 0x90],                         // bound
        &[0xd5, 0x00, 0xa1, 0, 0, 0, 0, 0, 0, 0, 0], // jmpabs: REX2 of APX, which is not decoded
    ] {
        assert!(matches!(refused(code), Refusal::Invalid { .. }), "{code:x?}");
    }
}

#[test]
fn corner_sti_before_hlt_keeps_its_shadow() {
    let mut guest = Guest::new(&[0xfb, 0xf4, 0xc3], None); // sti; hlt; ret
    let (sti, hlt) = (guest.arm(0), guest.arm(1));
    guest.state.regs.rflags &= !rflags::IF;
    assert_eq!(guest.breakpoint(), Resume::Run);
    // An interrupt that is pending now must come behind HLT, or nothing wakes the vCPU.
    assert!(guest.state.shadow.sti);
    assert_eq!(guest.breakpoint(), Resume::Halt);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 2);
    assert_eq!(guest.state.regs.rflags & rflags::IF, rflags::IF);
    assert!(!guest.state.shadow.sti);
    assert_eq!((sti.counts().emulated, hlt.counts().emulated), (1, 1));
}

#[test]
fn corner_interrupt_flag_instructions_keep_their_result_whatever_their_prefixes() {
    for (code, before, after) in [
        (&[0xfa, 0xc3][..], rflags::IF, 0),   // cli
        (&[0x66, 0xfa], rflags::IF, 0),       // data16 cli
        (&[0x2e, 0x48, 0xfa], rflags::IF, 0), // cs rex.W cli
        (&[0xf3, 0xfb], 0, rflags::IF),       // repz sti
        (&[0xf2, 0x4f, 0xfb], 0, rflags::IF), // repnz rex.WRXB sti
        (&[0x9d], rflags::IF, 0),             // popf
        (&[0x48, 0x9d], 0, rflags::IF),       // rex.W popf
        (&[0x66, 0x9d], 0, rflags::IF),       // popfw
        (&[0xf3, 0x9d], rflags::IF, 0),       // repz popf
    ] {
        let guest = Guest::new(code, None);
        guest.memory.load(Gpa(STACK.0), &(rflags::FIXED | after).to_le_bytes());
        let mut guest = guest;
        guest.arm(0);
        guest.state.regs.rflags = rflags::FIXED | before;
        assert_eq!(guest.breakpoint(), Resume::Run, "{code:x?}");
        assert_eq!(guest.state.regs.rflags, rflags::FIXED | after, "{code:x?}");
    }
}

#[test]
fn corner_popf_and_its_own_trap_flag() {
    // TF that it sets traps behind the next instruction; TF that it clears traps behind itself (Intel SDM vol. 3B, 19.3.1.4).
    for (before, image, resume) in [
        (0, rflags::TF, Resume::Run),
        (rflags::TF, 0, Resume::Inject(Exception::Debug { dr6: dr6::BS })),
        (rflags::TF, rflags::TF, Resume::Inject(Exception::Debug { dr6: dr6::BS })),
    ] {
        let (mut guest, _) = probed(&[0x9d, 0xc3]); // popf; ret
        guest.memory.load(Gpa(STACK.0), &(rflags::FIXED | image).to_le_bytes());
        guest.state.regs.rflags = rflags::FIXED | before;
        assert_eq!(guest.breakpoint(), resume);
        assert_eq!(guest.state.regs.rflags, rflags::FIXED | image);
    }
}

#[test]
fn corner_pushf_shows_what_the_guest_has_set() {
    for flags in [0, rflags::IF, rflags::TF, STEP_FLAGS] {
        let (mut guest, _) = probed(&[0x9c, 0xc3]); // pushf; ret
        guest.state.regs.rflags = rflags::FIXED | flags | rflags::RF;
        guest.breakpoint();
        assert_eq!(guest.memory.word(Gpa(STACK.0 - 8)), rflags::FIXED | flags);
    }
}

#[test]
fn corner_lahf_and_sahf_leave_the_flags_of_a_step_alone() {
    let all = rflags::FIXED | STEP_FLAGS | rflags::ARITHMETIC;
    let (mut guest, _) = probed(&[0x9f, 0xc3]); // lahf; ret
    guest.state.regs.rflags = all;
    guest.breakpoint();
    assert_eq!(guest.state.regs.rax, 0xd700, "SF ZF AF PF CF and the bit that is always 1");
    let (mut guest, _) = probed(&[0x9e, 0xc3]); // sahf; ret
    guest.state.regs.rflags = rflags::FIXED | STEP_FLAGS;
    guest.state.regs.rax = 0xff00;
    guest.breakpoint();
    assert_eq!(guest.state.regs.rflags, all & !rflags::OF);
}

#[test]
fn corner_what_only_the_cpu_knows_where_it_goes_is_refused() {
    for (code, expected) in [
        (&[0x0f, 0x05][..], Reason::SystemCall),   // syscall
        (&[0x0f, 0x34], Reason::SystemCall),       // sysenter
        (&[0xff, 0x1f], Reason::FarCall),          // lcall *(%rdi)
        (&[0x0f, 0x01, 0xd8], Reason::GuestEntry), // vmrun
        (&[0xcc], Reason::Breakpoint),             // int3
    ] {
        match refused(code) {
            Refusal::Instruction { reason, .. } => assert_eq!(reason, expected, "{code:x?}"),
            other => panic!("{code:x?}: {other:?}"),
        }
    }
}

#[test]
fn corner_sysret_and_sysexit_leave_with_the_registers_that_they_were_given() {
    for code in [&[0x48, 0x0f, 0x07][..], &[0x48, 0x0f, 0x35]] {
        // sysretq; sysexitq
        let (mut guest, probe) = probed(code);
        guest.state.regs.rflags &= !rflags::IF;
        (guest.state.regs.rcx, guest.state.regs.r11, guest.state.regs.rdx) = (0x40_0000, 0x302, 0x40_0000);
        let before = guest.state.regs;
        let slot = guest.enter();
        assert_eq!(guest.state.regs, Registers { rip: slot, ..before }, "{code:x?}");
        // User mode, where it stops at an int3 of its own, single-stepping itself.
        guest.state.regs.rip = TEXT.0 + 0x100;
        guest.memory.load(TEXT_GPA.offset(0x100), &[INT3]);
        guest.state.regs.rflags |= STEP_FLAGS;
        let user = guest.state.regs;
        assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Breakpoint));
        assert_eq!(guest.state.regs, user);
        assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, stepped: 1, ..Counts::default() });
    }
}

#[test]
fn corner_undefined_instructions_fault_where_they_stand() {
    for code in [&[0x0f, 0x0b, 0xc3][..], &[0x0f, 0xb9, 0xc0, 0xc3]] {
        // ud2; ret and ud1 %eax,%eax; ret
        let (mut guest, probe) = probed(code);
        assert_eq!(guest.breakpoint(), Resume::Inject(Exception::InvalidOpcode));
        assert_eq!(guest.state.regs.rip, TEXT.0);
        assert_eq!(guest.byte(0), INT3);
        assert_eq!(probe.counts().faulted, 1);
    }
}

#[test]
fn corner_endbr64_is_done_without_touching_anything() {
    let before = probed(&[0xf3, 0x0f, 0x1e, 0xfa, 0xc3]).0.state;
    let guest = emulated(&[0xf3, 0x0f, 0x1e, 0xfa, 0xc3], |_| {});
    let mut expected = before;
    expected.regs.rip += 4;
    assert_eq!(guest.state, expected);
}

#[test]
fn corner_group_five_is_told_apart_by_its_modrm() {
    // inc, dec, call, jmp, push through memory: RIP, RSP and the word at the operand afterwards.
    const TARGET: u64 = 0xffff_ffff_8123_4567;
    for (modrm, rip, rsp, word) in [
        (0x07, TEXT.0 + 3, STACK.0, TARGET + 1), // incq (%rdi)
        (0x0f, TEXT.0 + 3, STACK.0, TARGET - 1), // decq (%rdi)
        (0x17, TARGET, STACK.0 - 8, TARGET),     // call *(%rdi)
        (0x27, TARGET, STACK.0, TARGET),         // jmp *(%rdi)
        (0x37, TEXT.0 + 3, STACK.0 - 8, TARGET), // push (%rdi)
    ] {
        let (mut guest, _) = probed(&[0x48, 0xff, modrm, 0xc3]);
        guest.memory.load(Gpa(0x2000), &TARGET.to_le_bytes());
        guest.state.regs.rdi = 0x2000;
        assert_eq!(guest.breakpoint(), Resume::Run);
        let regs = guest.state.regs;
        assert_eq!((regs.rip, regs.rsp, guest.memory.word(Gpa(0x2000))), (rip, rsp, word), "{modrm:#x}");
        let pushed = match modrm {
            0x17 => TEXT.0 + 3,
            0x37 => TARGET,
            _ => 0,
        };
        assert_eq!(guest.memory.word(Gpa(STACK.0 - 8)), pushed, "{modrm:#x}");
    }
}

#[test]
fn corner_calls_and_pushes_relative_to_rsp_use_it_as_it_was() {
    let guest = emulated(&[0xff, 0x54, 0x24, 0x08], |_| {}); // call *8(%rsp)
    assert_eq!(guest.state.regs.rip, 0, "what lies at 8(%rsp) before the push");
    assert_eq!(guest.memory.word(Gpa(STACK.0 - 8)), TEXT.0 + 4);
    let guest = emulated(&[0x54], |_| {}); // push %rsp
    assert_eq!(guest.memory.word(Gpa(STACK.0 - 8)), STACK.0);
    let (mut guest, _) = probed(&[0x8f, 0x44, 0x24, 0x08]); // pop 8(%rsp)
    guest.memory.load(Gpa(STACK.0), &0x77_u64.to_le_bytes());
    guest.breakpoint();
    assert_eq!(guest.memory.word(Gpa(STACK.0 + 16)), 0x77, "8(%rsp) behind the pop");
}

#[test]
fn corner_loop_counts_down_and_then_decides() {
    for (code, rcx, rip, after) in [
        (&[0xe2, 0x10][..], 1, TEXT.0 + 2, 0),
        (&[0xe2, 0x10], 2, TEXT.0 + 0x12, 1),
        (&[0x67, 0xe2, 0x10], 0xffff_ffff_0000_0001, TEXT.0 + 3, 0),
        (&[0x67, 0xe3, 0x10], 0xffff_ffff_0000_0000, TEXT.0 + 0x13, 0xffff_ffff_0000_0000),
    ] {
        let guest = emulated(code, |state| state.regs.rcx = rcx);
        assert_eq!((guest.state.regs.rip, guest.state.regs.rcx), (rip, after), "{code:x?} {rcx:#x}");
    }
}

#[test]
fn corner_a_vex_opcode_is_not_the_branch_of_the_one_byte_map() {
    // vzeroupper, whose last byte is that of JA; vpmovmskb %ymm1,%eax ends on that of XLAT; vmovd on that of JLE.
    for code in [&[0xc5, 0xf8, 0x77][..], &[0xc5, 0xfd, 0xd7, 0xc1], &[0xc5, 0xf9, 0x7e, 0xc0]] {
        let (mut guest, probe) = probed(code);
        guest.state.regs.rflags |= rflags::CF | rflags::ZF;
        let slot = guest.enter();
        let copy = guest.memory.bytes(REGION.base, code.len() + 1);
        assert_eq!(copy, [code, &[INT3]].concat());
        assert_eq!(guest.state.regs.rip, slot);
        let len = code.len() as u64;
        assert_eq!(guest.guard(len), Resume::Run);
        assert_eq!(guest.state.regs.rip, TEXT.0 + len);
        assert_eq!(probe.counts().stepped, 1);
    }
}

#[test]
fn corner_an_instruction_of_15_bytes_has_room_for_its_guard() {
    // movups 0xff1(%rip),%xmm0 behind eight segment prefixes that 64-bit mode ignores.
    let code = [&[0x26; 8][..], &[0x0f, 0x10, 0x05, 0xf1, 0x0f, 0, 0]].concat();
    assert_eq!(code.len(), 15);
    let (mut guest, _) = probed(&code);
    let slot = guest.enter();
    let copy = guest.memory.bytes(REGION.base, 16);
    assert_eq!((&copy[..11], copy[15]), (&code[..11], INT3));
    let displacement = i32::from_le_bytes([copy[11], copy[12], copy[13], copy[14]]);
    let operand = slot.wrapping_add(15).wrapping_add_signed(i64::from(displacement));
    assert_eq!(operand, TEXT.0 + 0x1000);
    assert_eq!(guest.guard(15), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 15);
}

#[test]
fn corner_prefixes_do_not_hide_a_return_or_a_call() {
    for code in [[0xf3, 0xc3], [0xf2, 0xc3], [0x3e, 0xc3]] {
        // rep ret, bnd ret, ds ret
        let (mut guest, _) = probed(&code);
        guest.memory.load(Gpa(STACK.0), &0x1234_u64.to_le_bytes());
        assert_eq!(guest.breakpoint(), Resume::Run);
        assert_eq!((guest.state.regs.rip, guest.state.regs.rsp), (0x1234, STACK.0 + 8), "{code:x?}");
    }
    for code in [&[0xe8, 0, 1, 0, 0][..], &[0x2e, 0xe8, 0, 1, 0, 0], &[0xf2, 0xe8, 0, 1, 0, 0]] {
        // call .+0x105 behind none, cs and bnd
        let guest = emulated(code, |_| {});
        let next = TEXT.0 + code.len() as u64;
        assert_eq!(guest.state.regs.rip, next + 0x100, "{code:x?}");
        assert_eq!(guest.memory.word(Gpa(STACK.0 - 8)), next, "{code:x?}");
    }
}

/// Text of a module: two pages that lie apart in physical memory, with `code` across their border, and what `mov %rax,(%rax)`
/// would need where the first page goes on physically. Returns the address of the code.
fn module_text(guest: &Guest, code: &[u8], before: u64) -> Gva {
    const MODULE: Gva = Gva(0xffff_ffff_c000_0000);
    let mut tables = MockPageTables::new(&guest.memory, Gpa(0x12_0000), 4);
    tables.map_identity(0x1_0000, RW);
    tables.map(TEXT, TEXT_GPA, 0x1000, entry::PRESENT);
    tables.map(MODULE, Gpa(0x2000), 0x1000, entry::PRESENT);
    tables.map(MODULE.offset(0x1000), Gpa(0x5000), 0x1000, entry::PRESENT);
    let split = usize::try_from(before).unwrap();
    guest.memory.load(Gpa(0x3000 - before), &code[..split.min(code.len())]);
    guest.memory.load(Gpa(0x5000), code.get(split..).unwrap_or_default());
    MODULE.offset(0x1000 - before)
}

#[test]
fn corner_a_return_address_on_an_instruction_that_is_cut_in_physical_memory_is_told() {
    const MOV: &[u8] = &[0x48, 0x89, 0xc3, 0xc3]; // mov %rax,%rbx; ret
    let mut calls = Calls::new();
    let to = module_text(&calls.guest, MOV, 2);
    calls.guest.state.sys.cr3 = 0x12_0000;
    let probe = calls.guest.arm_request(ProbeRequest::for_returns(place(0)));
    calls.call(to, 0x7000);
    assert_eq!((probe.counts().entered, probe.counts().missed, probe.awaited()), (1, 1, 0));
    assert_eq!(calls.guest.memory.bytes(Gpa(0x2ffe), 2), MOV[..2], "no int3 on half of an instruction");
    let notices = calls.guest.engine.take_notices();
    assert!(matches!(&notices[..], [Notice::ReturnUnseen { gva, .. }] if *gva == to), "{notices:?}");

    // One that ends with its page is like any other.
    let mut calls = Calls::new();
    let to = module_text(&calls.guest, MOV, 3);
    calls.guest.state.sys.cr3 = 0x12_0000;
    let probe = calls.guest.arm_request(ProbeRequest::for_returns(place(0)));
    calls.call(to, 0x7000);
    assert_eq!(calls.arrive(to, 0x7000, 42), Resume::Run);
    assert_eq!(
        (probe.counts().hits, calls.guest.state.regs.rbx, calls.guest.state.regs.rip),
        (1, 42, to.0 + 3)
    );
}
