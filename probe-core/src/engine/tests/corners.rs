//! The instructions that kprobes had trouble with, each probed and hit once. `docs/kprobes.md` lists them.

use super::returns::Calls;
use super::*;

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
