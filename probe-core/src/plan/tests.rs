use super::*;

const ADDRESS: Gva = Gva(0xffff_ffff_8100_0000);

fn planned(bytes: &[u8]) -> Plan {
    let instruction = decode(bytes, ADDRESS, Vendor::Unknown).unwrap();
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
        &[0x0f, 0x0b],                                  // ud2
        &[0x0f, 0xb9, 0xc0],                            // ud1 %eax,%eax
    ] {
        assert_eq!(planned(bytes), Plan::Emulate, "{bytes:x?}");
    }
}

#[test]
fn what_is_not_emulated_runs_in_a_slot() {
    for bytes in [
        &[0x67, 0x48, 0xa5][..],               // movsq (%esi),(%edi)
        &[0x48, 0xf7, 0xf1],                   // div %rcx
        &[0x48, 0x0f, 0xaf, 0xc1],             // imul %rcx,%rax
        &[0xf0, 0x48, 0x0f, 0xc7, 0x0f],       // lock cmpxchg16b (%rdi)
        &[0xc8, 0, 0, 0],                      // enter $0,$0
        &[0x0f, 0xa2],                         // cpuid
        &[0x0f, 0x32],                         // rdmsr
        &[0x0f, 0x30],                         // wrmsr
        &[0x0f, 0x33],                         // rdpmc
        &[0x0f, 0x22, 0xe0],                   // mov %rax,%cr4
        &[0x0f, 0x21, 0xf8],                   // mov %dr7,%rax
        &[0x0f, 0x01, 0x17],                   // lgdt (%rdi)
        &[0x0f, 0x00, 0xd8],                   // ltr %eax
        &[0x0f, 0x01, 0xd1],                   // xsetbv
        &[0x0f, 0x01, 0xf8],                   // swapgs
        &[0x0f, 0x01, 0x38],                   // invlpg (%rax)
        &[0x0f, 0x01, 0xc8],                   // monitor
        &[0x0f, 0x01, 0xc9],                   // mwait
        &[0x0f, 0x01, 0xc1],                   // vmcall
        &[0x0f, 0x01, 0xd9],                   // vmmcall
        &[0xf3, 0x0f, 0x01, 0xd9],             // vmgexit
        &[0xe6, 0x80],                         // out %al,$0x80
        &[0xf3, 0x6d],                         // rep insl
        &[0x8e, 0xd0],                         // mov %eax,%ss
        &[0x0f, 0xa1],                         // pop %fs
        &[0x0f, 0xb2, 0x07],                   // lss (%rdi),%eax
        &[0xd9, 0xc0],                         // fld %st(0)
        &[0x0f, 0x38, 0x00, 0xc1],             // pshufb %mm1,%mm0
        &[0x0f, 0x58, 0xc1],                   // addps %xmm1,%xmm0
        &[0xc5, 0xfd, 0x6f, 0x07],             // vmovdqa (%rdi),%ymm0
        &[0xc4, 0xe2, 0x6d, 0x90, 0x04, 0x0f], // vpgatherdd
        &[0x62, 0xf1, 0x7c, 0x48, 0x28, 0x07], // vmovaps (%rdi),%zmm0
        &[0x0f, 0xae, 0x2f],                   // xrstor (%rdi)
        &[0x0f, 0xae, 0x17],                   // ldmxcsr (%rdi)
        &[0xc7, 0xf8, 0, 0, 0, 0],             // xbegin
        &[0x0f, 0x01, 0xd5],                   // xend
        &[0xc6, 0xf8, 0],                      // xabort $0
        &[0xcd, 0x80],                         // int $0x80
        &[0xf1],                               // int1
        &[0x48, 0xcf],                         // iretq
        &[0x48, 0x0f, 0x07],                   // sysretq
        &[0xcb],                               // lret
        &[0xff, 0x2f],                         // ljmp *(%rdi)
    ] {
        assert_eq!(planned(bytes), Plan::Step, "{bytes:x?}");
    }
}

#[test]
fn the_rest_is_refused_with_its_reason() {
    for (bytes, reason) in [
        (&[0xcc][..], Reason::Breakpoint),                    // int3
        (&[0x0f, 0x05], Reason::SystemCall),                  // syscall
        (&[0x0f, 0x34], Reason::SystemCall),                  // sysenter
        (&[0xf3, 0x0f, 0x01, 0xec], Reason::SystemCall),      // uiret
        (&[0xff, 0x1f], Reason::FarCall),                     // lcall *(%rdi)
        (&[0x0f, 0x01, 0xd8], Reason::GuestEntry),            // vmrun
        (&[0x0f, 0x01, 0xc2], Reason::GuestEntry),            // vmlaunch
        (&[0x66, 0xc7, 0xf8, 0, 0], Reason::VendorDependent), // xbeginw
    ] {
        match planned(bytes) {
            Plan::Refuse(Refusal::Instruction { reason: got, .. }) => assert_eq!(got, reason, "{bytes:x?}"),
            other => panic!("{bytes:x?}: {other:?}"),
        }
    }
}

#[test]
fn what_leaves_a_slot_brings_its_flags_or_keeps_them() {
    for (bytes, expected) in [
        (&[0x48, 0xcf][..], Some(Leaving::WithFlags)), // iretq
        (&[0x0f, 0x07], Some(Leaving::WithFlags)),     // sysretl
        (&[0xca, 8, 0], Some(Leaving::KeepingFlags)),  // lret $8
        (&[0x0f, 0x35], Some(Leaving::KeepingFlags)),  // sysexit
        (&[0xff, 0x2f], Some(Leaving::KeepingFlags)),  // ljmp *(%rdi)
        (&[0xff, 0xe0], None),                         // jmp *%rax
        (&[0xc3], None),                               // ret
        (&[0xcd, 0x80], None),                         // int $0x80
    ] {
        let instruction = decode(bytes, ADDRESS, Vendor::Unknown).unwrap();
        assert_eq!(leaving(&instruction), expected, "{bytes:x?}");
    }
}

#[test]
fn in_its_place_everything_runs_that_comes_to_the_instruction_behind_it_or_to_a_handler() {
    for (bytes, expected) in [
        (&[0x0f, 0x58, 0xc1][..], None),          // addps %xmm1,%xmm0
        (&[0x0f, 0xc7, 0x0f], None),              // cmpxchg8b (%rdi)
        (&[0xf3, 0xa4], None),                    // rep movsb
        (&[0x0f, 0x0b], None),                    // ud2
        (&[0x0f, 0x32], None),                    // rdmsr
        (&[0xcd, 0x80], None),                    // int $0x80
        (&[0x0f, 0x07], None),                    // sysretl
        (&[0x48, 0x0f, 0x35], None),              // sysexitq
        (&[0x0f, 0x01, 0xd9], None),              // vmmcall
        (&[0x0f, 0x01, 0xd5], None),              // xend
        (&[0x48, 0xcf], Some(Reason::FarBranch)), // iretq
        (&[0xcb], Some(Reason::FarBranch)),       // lret
        (&[0xff, 0x2f], Some(Reason::FarBranch)), // ljmp *(%rdi)
        (&[0xff, 0x1f], Some(Reason::FarCall)),   // lcall *(%rdi)
        (&[0xc7, 0xf8, 0x10, 0x20, 0, 0], Some(Reason::Transaction)), // xbegin
        (&[0x0f, 0x05], Some(Reason::SystemCall)), // syscall
        (&[0x0f, 0x01, 0xd7], Some(Reason::SystemCall)), // enclu
        (&[0x0f, 0x01, 0xfb], Some(Reason::Wait)), // mwaitx
        (&[0xf2, 0x0f, 0xae, 0xf1], Some(Reason::Wait)), // umwait %ecx
        (&[0xff, 0xe0], Some(Reason::NearBranch)), // jmp *%rax
        (&[0x9c], Some(Reason::InterruptFlag)),   // pushf
    ] {
        let instruction = decode(bytes, ADDRESS, Vendor::Amd).unwrap();
        let got = match check_in_place(&instruction) {
            Ok(()) => None,
            Err(Refusal::Instruction { reason, .. }) => Some(reason),
            Err(other) => panic!("{bytes:x?}: {other:?}"),
        };
        assert_eq!(got, expected, "{bytes:x?}");
    }
}

#[test]
fn a_refusal_names_the_instruction_and_the_way_out() {
    let Plan::Refuse(refusal) = planned(&[0x0f, 0x05]) else { panic!("syscall is refused") };
    assert_eq!(
        refusal.to_string(),
        "`syscall` at 0xffffffff81000000 cannot be probed: it goes to an address that only the CPU knows, and shows \
         where it came from. The next instruction is at 0xffffffff81000002"
    );
}

#[test]
fn bytes_that_are_no_instruction_are_told_from_bytes_that_end_too_early() {
    let address = ADDRESS;
    assert_eq!(decode(&[0x06, 0, 0, 0], address, Vendor::Unknown), Err(Refusal::Invalid { address })); // push %es
    assert_eq!(
        decode(&[0x48, 0xb8, 1, 2], address, Vendor::Unknown),
        Err(Refusal::Truncated { address, available: 4 })
    );
    assert_eq!(decode(&[], address, Vendor::Unknown), Err(Refusal::Truncated { address, available: 0 }));
    // More than 15 bytes of prefixes are no instruction however much can be read.
    assert_eq!(decode(&[0x66; 32], address, Vendor::Unknown), Err(Refusal::Invalid { address }));
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
        match decode(bytes, ADDRESS, Vendor::Unknown) {
            Err(Refusal::Instruction { reason: Reason::VendorDependent, .. }) => {}
            other => panic!("{bytes:x?}: {other:?}"),
        }
    }
}

#[test]
fn a_vendor_settles_what_near_branches_with_an_operand_size_prefix_are() {
    for (bytes, intel, amd) in [
        (&[0x66, 0xe8, 0x10, 0, 0, 0][..], Code::Call_rel32_64, Code::Call_rel16),
        (&[0x66, 0x74, 0x10], Code::Je_rel8_64, Code::Je_rel8_16),
        (&[0x66, 0xff, 0xe0], Code::Jmp_rm64, Code::Jmp_rm16),
        (&[0x66, 0xc3], Code::Retnq, Code::Retnw),
    ] {
        for (vendor, code) in [(Vendor::Intel, intel), (Vendor::Amd, amd)] {
            let instruction = decode(bytes, ADDRESS, vendor).unwrap();
            assert_eq!(instruction.code(), code, "{bytes:x?}");
            assert_eq!(plan(&instruction), Plan::Emulate);
        }
    }
    // ud0 raises #UD whatever its length is.
    for (vendor, length) in [(Vendor::Intel, 3), (Vendor::Amd, 2)] {
        let instruction = decode(&[0x0f, 0xff, 0xc0], ADDRESS, vendor).unwrap();
        assert_eq!((instruction.len(), plan(&instruction)), (length, Plan::Emulate));
    }
}

#[test]
fn ud0_is_refused_though_its_length_depends_on_the_vendor() {
    match decode(&[0x0f, 0xff, 0xc0], ADDRESS, Vendor::Unknown) {
        Err(Refusal::Instruction { reason: Reason::VendorDependent, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_emulated_instruction_tells_whether_a_slot_would_do() {
    for (bytes, reason) in [
        (&[0x8b, 0x07][..], None),                       // mov (%rdi),%eax
        (&[0x0f, 0x01, 0xcb], None),                     // stac
        (&[0xff, 0x17], Some(Reason::NearBranch)),       // call *(%rdi)
        (&[0xff, 0xe0], Some(Reason::NearBranch)),       // jmp *%rax
        (&[0xc3], Some(Reason::NearBranch)),             // ret
        (&[0xe8, 0, 0, 0, 0], Some(Reason::NearBranch)), // call
        (&[0x74, 0], Some(Reason::NearBranch)),          // je
        (&[0xe2, 0], Some(Reason::NearBranch)),          // loop
        (&[0x9c], Some(Reason::InterruptFlag)),          // pushf
        (&[0x9d], Some(Reason::InterruptFlag)),          // popf
        (&[0xfa], Some(Reason::InterruptFlag)),          // cli
        (&[0xfb], Some(Reason::InterruptFlag)),          // sti
        (&[0xf4], Some(Reason::InterruptFlag)),          // hlt
    ] {
        let instruction = decode(bytes, ADDRESS, Vendor::Unknown).unwrap();
        assert_eq!(plan(&instruction), Plan::Emulate, "{bytes:x?}");
        assert_eq!(obstacle(&instruction), reason, "{bytes:x?}");
        assert_eq!(check_step(&instruction).is_ok(), reason.is_none(), "{bytes:x?}");
    }
}

proptest::proptest! {
    #[test]
    fn insn_sanity_random_bytes_are_planned_without_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..20)) {
        if let Ok(instruction) = decode(&bytes, ADDRESS, Vendor::Unknown)
            && let Plan::Refuse(refusal) = plan(&instruction)
        {
            proptest::prop_assert!(refusal.to_string().contains("0xffffffff81000000"));
        }
    }
}
