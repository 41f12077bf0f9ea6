use super::*;

const ADDRESS: Gva = Gva(0xffff_ffff_8100_0000);

fn planned(bytes: &[u8]) -> Plan {
    let instruction = decode(bytes, ADDRESS).unwrap();
    assert_eq!(instruction.len(), bytes.len(), "{bytes:x?}");
    plan(&instruction)
}

#[test]
fn what_stands_at_most_function_entries_is_emulated() {
    for bytes in [
        &[0xf3, 0x0f, 0x1e, 0xfa][..],                  // endbr64
        &[0x0f, 0x1f, 0x44, 0x00, 0x00],                // nopl 0(%rax,%rax,1)
        &[0xe8, 0, 0, 0, 0],                            // call
        &[0x55],                                        // push %rbp
        &[0x48, 0x89, 0xe5],                            // mov %rsp,%rbp
        &[0x48, 0x83, 0xec, 0x20],                      // sub $0x20,%rsp
        &[0x65, 0x48, 0x8b, 0x04, 0x25, 0x28, 0, 0, 0], // mov %gs:0x28,%rax
        &[0x48, 0x8d, 0x05, 0, 0, 0, 0],                // lea 0(%rip),%rax
        &[0xf0, 0x0f, 0xc1, 0x07],                      // lock xadd %eax,(%rdi)
        &[0xf3, 0x48, 0xab],                            // rep stosq
        &[0xff, 0x60, 0x10],                            // jmp *0x10(%rax)
        &[0xf4],                                        // hlt
        &[0x9d],                                        // popf
        &[0xfb],                                        // sti
        &[0x0f, 0x01, 0xcb],                            // stac
    ] {
        assert_eq!(planned(bytes), Plan::Emulate, "{bytes:x?}");
    }
}

#[test]
fn what_cannot_fault_unforeseen_is_stepped() {
    for bytes in [
        &[0x67, 0x48, 0xa5][..],         // movsq (%esi),(%edi)
        &[0x48, 0xf7, 0xf1],             // div %rcx
        &[0x48, 0x0f, 0xaf, 0xc1],       // imul %rcx,%rax
        &[0xf0, 0x48, 0x0f, 0xc7, 0x0f], // lock cmpxchg16b (%rdi)
        &[0xf3, 0x48, 0x0f, 0xb8, 0xc1], // popcnt %rcx,%rax
        &[0xc4, 0xe2, 0x78, 0xf2, 0xc1], // andn %ecx,%eax,%eax
        &[0x0f, 0xa2],                   // cpuid
        &[0x0f, 0x31],                   // rdtsc
        &[0x0f, 0x20, 0xd0],             // mov %cr2,%rax
        &[0x0f, 0x01, 0xf8],             // swapgs
        &[0x0f, 0x01, 0x38],             // invlpg (%rax)
        &[0xe6, 0x80],                   // out %al,$0x80
        &[0x0f, 0x00, 0x2d, 0, 0, 0, 0], // verw 0(%rip)
        &[0x0f, 0x01, 0xd0],             // xgetbv
        &[0xf3, 0x48, 0x0f, 0xae, 0xd8], // wrgsbase %rax
        &[0x0f, 0xae, 0xf0],             // mfence
        &[0x8c, 0xd8],                   // mov %ds,%eax
        &[0x0f, 0x28, 0x07],             // movaps (%rdi),%xmm0
        &[0xf3, 0x0f, 0x10, 0x07],       // movss (%rdi),%xmm0
        &[0x66, 0x0f, 0xfe, 0xc1],       // paddd %xmm1,%xmm0
        &[0xc5, 0xfd, 0x6f, 0x07],       // vmovdqa (%rdi),%ymm0
        &[0xc5, 0xf8, 0x77],             // vzeroupper
        &[0x66, 0x0f, 0x38, 0xdc, 0xc1], // aesenc %xmm1,%xmm0
    ] {
        assert_eq!(planned(bytes), Plan::Step, "{bytes:x?}");
    }
}

#[test]
fn the_rest_is_refused_with_its_reason() {
    for (bytes, reason) in [
        (&[0xcc][..], Reason::SoftwareInterrupt),                     // int3
        (&[0xcd, 0x80], Reason::SoftwareInterrupt),                   // int $0x80
        (&[0xf1], Reason::SoftwareInterrupt),                         // int1
        (&[0x0f, 0x0b], Reason::Undefined),                           // ud2
        (&[0x0f, 0xb9, 0xc0], Reason::Undefined),                     // ud1 %eax,%eax
        (&[0x0f, 0x05], Reason::SystemCall),                          // syscall
        (&[0x0f, 0x34], Reason::SystemCall),                          // sysenter
        (&[0x48, 0x0f, 0x07], Reason::SystemCall),                    // sysretq
        (&[0x0f, 0x35], Reason::SystemCall),                          // sysexit
        (&[0x0f, 0x01, 0xc1], Reason::SystemCall),                    // vmcall
        (&[0x0f, 0x01, 0xd9], Reason::SystemCall),                    // vmmcall
        (&[0x48, 0xcf], Reason::FarTransfer),                         // iretq
        (&[0xcb], Reason::FarTransfer),                               // lret
        (&[0xca, 8, 0], Reason::FarTransfer),                         // lret $8
        (&[0xff, 0x2f], Reason::FarTransfer),                         // ljmp *(%rdi)
        (&[0xff, 0x1f], Reason::FarTransfer),                         // lcall *(%rdi)
        (&[0xc7, 0xf8, 0, 0, 0, 0], Reason::Transaction),             // xbegin
        (&[0x0f, 0x01, 0xd5], Reason::Transaction),                   // xend
        (&[0xc6, 0xf8, 0], Reason::Transaction),                      // xabort $0
        (&[0x8e, 0xd0], Reason::SegmentLoad),                         // mov %eax,%ss
        (&[0x8e, 0xd8], Reason::SegmentLoad),                         // mov %eax,%ds
        (&[0x0f, 0xa1], Reason::SegmentLoad),                         // pop %fs
        (&[0x0f, 0xb2, 0x07], Reason::SegmentLoad),                   // lss (%rdi),%eax
        (&[0x0f, 0x30], Reason::SystemRegister),                      // wrmsr
        (&[0x0f, 0x32], Reason::SystemRegister),                      // rdmsr
        (&[0x0f, 0x33], Reason::SystemRegister),                      // rdpmc
        (&[0x0f, 0x22, 0xd8], Reason::SystemRegister),                // mov %rax,%cr3
        (&[0x0f, 0x21, 0xf8], Reason::SystemRegister),                // mov %dr7,%rax
        (&[0x0f, 0x01, 0x17], Reason::SystemRegister),                // lgdt (%rdi)
        (&[0x0f, 0x00, 0xd8], Reason::SystemRegister),                // ltr %eax
        (&[0x0f, 0x01, 0xd1], Reason::SystemRegister),                // xsetbv
        (&[0x0f, 0x01, 0xc8], Reason::Wait),                          // monitor
        (&[0x0f, 0x01, 0xc9], Reason::Wait),                          // mwait
        (&[0x6e], Reason::PortString),                                // outsb
        (&[0xf3, 0x6d], Reason::PortString),                          // rep insl
        (&[0xd9, 0xc0], Reason::FloatingPoint),                       // fld %st(0)
        (&[0x0f, 0x77], Reason::FloatingPoint),                       // emms
        (&[0x0f, 0x38, 0x00, 0xc1], Reason::FloatingPoint),           // pshufb %mm1,%mm0
        (&[0x0f, 0x58, 0xc1], Reason::FloatingPoint),                 // addps %xmm1,%xmm0
        (&[0xf2, 0x48, 0x0f, 0x2a, 0xc0], Reason::FloatingPoint),     // cvtsi2sd %rax,%xmm0
        (&[0xc4, 0xe2, 0x7d, 0x2c, 0x07], Reason::VectorIndex),       // vmaskmovps (%rdi),%ymm0,%ymm0
        (&[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0f], Reason::VectorIndex), // vpgatherdd
        (&[0x0f, 0xae, 0x07], Reason::Unknown),                       // fxsave (%rdi)
        (&[0x0f, 0xae, 0x2f], Reason::Unknown),                       // xrstor (%rdi)
        (&[0x0f, 0xae, 0x17], Reason::Unknown),                       // ldmxcsr (%rdi)
        (&[0xc8, 0, 0, 0], Reason::Unknown),                          // enter $0,$0
        (&[0x62, 0xf1, 0x7c, 0x48, 0x28, 0x07], Reason::Unknown),     // vmovaps (%rdi),%zmm0
    ] {
        match planned(bytes) {
            Plan::Refuse(Refusal::Instruction { reason: got, .. }) => assert_eq!(got, reason, "{bytes:x?}"),
            other => panic!("{bytes:x?}: {other:?}"),
        }
    }
}

#[test]
fn a_refusal_names_the_instruction_and_the_way_out() {
    let Plan::Refuse(refusal) = planned(&[0x0f, 0x05]) else { panic!("syscall is refused") };
    assert_eq!(
        refusal.to_string(),
        "`syscall` at 0xffffffff81000000 cannot be probed: it changes between privilege levels or into a \
         hypervisor. The next instruction is at 0xffffffff81000002"
    );
}

#[test]
fn bytes_that_are_no_instruction_are_told_from_bytes_that_end_too_early() {
    let address = ADDRESS;
    assert_eq!(decode(&[0x06, 0, 0, 0], address), Err(Refusal::Invalid { address })); // push %es
    assert_eq!(decode(&[0x48, 0xb8, 1, 2], address), Err(Refusal::Truncated { address, available: 4 }));
    assert_eq!(decode(&[], address), Err(Refusal::Truncated { address, available: 0 }));
    // More than 15 bytes of prefixes are no instruction however much can be read.
    assert_eq!(decode(&[0x66; 32], address), Err(Refusal::Invalid { address }));
}

#[test]
fn operand_size_prefixes_on_near_branches_are_refused() {
    for bytes in [
        &[0x66, 0xe9, 0, 0, 0, 0][..],   // jmp
        &[0x66, 0xe8, 0, 0, 0, 0],       // call
        &[0x66, 0x0f, 0x84, 0, 0, 0, 0], // je
        &[0x66, 0xff, 0xe0],             // jmp *%rax
        &[0x66, 0xc3],                   // ret
    ] {
        match decode(bytes, ADDRESS) {
            Err(Refusal::Instruction { reason: Reason::VendorDependent, .. }) => {}
            other => panic!("{bytes:x?}: {other:?}"),
        }
    }
}

#[test]
fn ud0_is_refused_though_its_length_depends_on_the_vendor() {
    match decode(&[0x0f, 0xff, 0xc0], ADDRESS) {
        Err(Refusal::Instruction { reason: Reason::Undefined, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_emulated_instruction_tells_whether_a_step_would_do() {
    for (bytes, steppable) in [
        (&[0x8b, 0x07][..], true),    // mov (%rdi),%eax
        (&[0xff, 0x17], true),        // call *(%rdi)
        (&[0xff, 0xe0], true),        // jmp *%rax
        (&[0xc3], true),              // ret
        (&[0xe8, 0, 0, 0, 0], false), // call
        (&[0x74, 0], false),          // je
        (&[0xe2, 0], false),          // loop
        (&[0x9c], false),             // pushf
        (&[0x9d], false),             // popf
        (&[0xfa], false),             // cli
        (&[0xfb], false),             // sti
        (&[0xf4], false),             // hlt
    ] {
        let instruction = decode(bytes, ADDRESS).unwrap();
        assert_eq!(plan(&instruction), Plan::Emulate, "{bytes:x?}");
        assert_eq!(check_step(&instruction).is_ok(), steppable, "{bytes:x?}");
    }
}

proptest::proptest! {
    #[test]
    fn random_bytes_are_planned_without_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..20)) {
        if let Ok(instruction) = decode(&bytes, ADDRESS)
            && let Plan::Refuse(refusal) = plan(&instruction)
        {
            proptest::prop_assert!(refusal.to_string().contains("0xffffffff81000000"));
        }
    }
}
