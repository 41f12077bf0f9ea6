use super::*;

#[test]
fn addresses_follow_segment_bases_and_sizes() {
    let mut machine = Machine::new();
    machine.state.sys.fs_base = DATA.0;
    machine.state.sys.gs_base = DATA.0 - 0x10;
    machine.state.regs.rsi = 0xffff_ffff_0000_0020;
    machine.load_data(0x20, 0x1111_2222_3333_4444);
    let loads: [(&[u8], u64); 5] = [
        (&[0x64, 0x48, 0x8b, 0x04, 0x25, 0x20, 0, 0, 0], 0x1111_2222_3333_4444), // mov %fs:0x20,%rax
        (&[0x65, 0x48, 0x8b, 0x04, 0x25, 0x30, 0, 0, 0], 0x1111_2222_3333_4444), // mov %gs:0x30,%rax
        (&[0x64, 0x67, 0x48, 0x8b, 0x06], 0x1111_2222_3333_4444),                // mov %fs:(%esi),%rax
        (&[0x65, 0x67, 0x8b, 0x46, 0x10], 0x3333_4444),                          // mov %gs:0x10(%esi),%eax
        // mov %gs:0x30,%rax with a 64-bit offset
        (&[0x65, 0x48, 0xa1, 0x30, 0, 0, 0, 0, 0, 0, 0], 0x1111_2222_3333_4444),
    ];
    for (bytes, value) in loads {
        machine.state.regs.rax = u64::MAX;
        machine.done(bytes);
        assert_eq!(machine.state.regs.rax, value, "{bytes:x?}");
    }
}

#[test]
fn lea_knows_no_segment_and_truncates() {
    let mut machine = Machine::new();
    machine.state.sys.fs_base = 0x7777_0000;
    machine.state.regs.rsi = 0xffff_ffff_ffff_fff0;
    machine.state.regs.rcx = 4;
    let forms: [(&[u8], u64); 5] = [
        (&[0x48, 0x8d, 0x44, 0x8e, 0x10], 0x10),  // lea 0x10(%rsi,%rcx,4),%rax
        (&[0x64, 0x48, 0x8d, 0x46, 0x20], 0x10),  // lea %fs:0x20(%rsi),%rax
        (&[0x67, 0x48, 0x8d, 0x06], 0xffff_fff0), // lea (%esi),%rax
        (&[0x8d, 0x06], 0xffff_fff0),             // lea (%rsi),%eax
        (&[0x48, 0x8d, 0x05, 0x10, 0, 0, 0], RIP.0 + 0x17), // lea 0x10(%rip),%rax
    ];
    for (bytes, value) in forms {
        machine.state.regs.rax = u64::MAX;
        machine.done(bytes);
        assert_eq!(machine.state.regs.rax, value, "{bytes:x?}");
    }
    machine.state.regs.rax = u64::MAX;
    machine.done(&[0x66, 0x8d, 0x06]); // lea (%rsi),%ax
    assert_eq!(machine.state.regs.rax, 0xffff_ffff_ffff_fff0);
}

#[test]
fn a_false_cmov_still_reads_and_still_clears_the_upper_half() {
    let mut machine = Machine::new();
    machine.state.regs.rax = u64::MAX;
    machine.done(&[0x0f, 0x44, 0xc1]); // cmove %ecx,%eax
    assert_eq!(machine.state.regs.rax, 0xffff_ffff);
    machine.state.regs.rdi = UNMAPPED.0;
    assert_eq!(machine.run_refused(&[0x48, 0x0f, 0x44, 0x07]), page_fault(UNMAPPED, 0)); // cmove (%rdi),%rax
}

#[test]
fn stores_go_to_memory_in_their_own_size() {
    let mut machine = Machine::new();
    machine.state.regs.rdi = DATA.0;
    machine.state.regs.rax = 0x1122_3344_5566_7788;
    machine.load_data(0, u64::MAX);
    machine.done(&[0x88, 0x27]); // mov %ah,(%rdi)
    assert_eq!(machine.data_word(0), 0xffff_ffff_ffff_ff77);
    machine.done(&[0x66, 0x89, 0x47, 0x02]); // mov %ax,2(%rdi)
    assert_eq!(machine.data_word(0), 0xffff_ffff_7788_ff77);
    machine.done(&[0x48, 0xc7, 0x07, 0, 0, 0, 0x80]); // movq $-0x80000000,(%rdi)
    assert_eq!(machine.data_word(0), 0xffff_ffff_8000_0000);
    machine.done(&[0x0f, 0x95, 0x07]); // setne (%rdi)
    assert_eq!(machine.data_word(0), 0xffff_ffff_8000_0001);
}
