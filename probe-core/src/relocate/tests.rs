use iced_x86::Instruction;
use proptest::prelude::*;

use super::*;

const ADDRESS: Gva = Gva(0xffff_ffff_8134_a350);
/// About 988 MiB above.
const SLOT: Gva = Gva(0xffff_ffff_bf00_0040);

fn decode(bytes: &[u8], address: Gva) -> Instruction {
    Decoder::with_ip(64, bytes, address.0, DecoderOptions::NONE).decode()
}

/// Relocates `before` and compares with `after`, the guard and the operand's address.
fn check(before: &[u8], after: &[u8]) {
    let code = relocate(before, ADDRESS, SLOT).unwrap();
    assert_eq!(&code.bytes()[..code.instruction_len()], after, "{before:x?}");
    assert!(code.bytes()[code.instruction_len()..].iter().all(|byte| *byte == GUARD));
    let (old, new) = (decode(before, ADDRESS), decode(code.bytes(), SLOT));
    assert_eq!(old.ip_rel_memory_address(), new.ip_rel_memory_address(), "{before:x?}");
}

#[test]
fn instructions_without_a_rip_relative_operand_stay_as_they_are() {
    for bytes in [
        &[0x48, 0x89, 0xe5][..],                              // mov %rsp,%rbp
        &[0x8b, 0x04, 0x25, 0x10, 0, 0, 0],                   // mov 0x10,%eax: absolute
        &[0xff, 0xd0],                                        // call *%rax
        &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8],                // movabs $...,%rax
        &[0x66, 0x66, 0x2e, 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0], // nopw %cs:0(%rax,%rax,1)
    ] {
        let code = relocate(bytes, ADDRESS, SLOT).unwrap();
        assert_eq!(&code.bytes()[..bytes.len()], bytes);
        assert_eq!(code.bytes()[bytes.len()..], [GUARD; SLOT_SIZE][bytes.len()..]);
    }
}

#[test]
fn rip_relative_operands_keep_their_address() {
    // The slot is 0x3dcb5cf0 higher, so each displacement falls by that much: 0x1000 becomes -0x3dcb4cf0.
    // mov 0x1000(%rip),%rax
    check(&[0x48, 0x8b, 0x05, 0x00, 0x10, 0, 0], &[0x48, 0x8b, 0x05, 0x10, 0xb3, 0x34, 0xc2]);
    // movl $0x11223344,0x1000(%rip): the immediate behind does not matter
    check(
        &[0xc7, 0x05, 0x00, 0x10, 0, 0, 0x44, 0x33, 0x22, 0x11],
        &[0xc7, 0x05, 0x10, 0xb3, 0x34, 0xc2, 0x44, 0x33, 0x22, 0x11],
    );
    // call *0x1000(%rip)
    check(&[0xff, 0x15, 0x00, 0x10, 0, 0], &[0xff, 0x15, 0x10, 0xb3, 0x34, 0xc2]);
    // popcnt 0x1000(%rip),%eax
    check(&[0xf3, 0x0f, 0xb8, 0x05, 0x00, 0x10, 0, 0], &[0xf3, 0x0f, 0xb8, 0x05, 0x10, 0xb3, 0x34, 0xc2]);
    // vmread %rax,0x1000(%rip)
    check(&[0x0f, 0x78, 0x05, 0x00, 0x10, 0, 0], &[0x0f, 0x78, 0x05, 0x10, 0xb3, 0x34, 0xc2]);
    // vfrczps 0x1000(%rip),%xmm0: XOP
    check(
        &[0x8f, 0xe9, 0x78, 0x80, 0x05, 0x00, 0x10, 0, 0],
        &[0x8f, 0xe9, 0x78, 0x80, 0x05, 0x10, 0xb3, 0x34, 0xc2],
    );
    // pshufb 0x1000(%rip),%xmm0: map 0F 38
    check(
        &[0x66, 0x0f, 0x38, 0x00, 0x05, 0x00, 0x10, 0, 0],
        &[0x66, 0x0f, 0x38, 0x00, 0x05, 0x10, 0xb3, 0x34, 0xc2],
    );
    // palignr $8,0x1000(%rip),%xmm0: map 0F 3A
    check(
        &[0x66, 0x0f, 0x3a, 0x0f, 0x05, 0x00, 0x10, 0, 0, 0x08],
        &[0x66, 0x0f, 0x3a, 0x0f, 0x05, 0x10, 0xb3, 0x34, 0xc2, 0x08],
    );
    // vmovdqa 0x1000(%rip),%ymm0: VEX of two bytes
    check(&[0xc5, 0xfd, 0x6f, 0x05, 0x00, 0x10, 0, 0], &[0xc5, 0xfd, 0x6f, 0x05, 0x10, 0xb3, 0x34, 0xc2]);
    // rorx $3,0x1000(%rip),%rax: VEX of three bytes
    check(
        &[0xc4, 0xe3, 0xfb, 0xf0, 0x05, 0x00, 0x10, 0, 0, 0x03],
        &[0xc4, 0xe3, 0xfb, 0xf0, 0x05, 0x10, 0xb3, 0x34, 0xc2, 0x03],
    );
    // vmovdqu64 0x1000(%rip),%zmm0: EVEX, the displacement is not scaled
    check(
        &[0x62, 0xf1, 0xfe, 0x48, 0x6f, 0x05, 0x00, 0x10, 0, 0],
        &[0x62, 0xf1, 0xfe, 0x48, 0x6f, 0x05, 0x10, 0xb3, 0x34, 0xc2],
    );
    // mov %gs:0x1000(%rip),%rax
    check(&[0x65, 0x48, 0x8b, 0x05, 0x00, 0x10, 0, 0], &[0x65, 0x48, 0x8b, 0x05, 0x10, 0xb3, 0x34, 0xc2]);
}

#[test]
fn eip_relative_operands_wrap_at_four_gigabytes() {
    // mov 0x1000(%eip),%eax
    check(&[0x67, 0x8b, 0x05, 0x00, 0x10, 0, 0], &[0x67, 0x8b, 0x05, 0x10, 0xb3, 0x34, 0xc2]);
    // From any distance: only the low 32 bits count.
    let far = Gva(0x40_0000);
    let code = relocate(&[0x67, 0x8b, 0x05, 0x00, 0x10, 0, 0], ADDRESS, far).unwrap();
    assert_eq!(decode(code.bytes(), far).ip_rel_memory_address(), 0x8134_b357);
}

#[test]
fn a_slot_may_be_just_within_reach() {
    let target = ADDRESS.0 + 7 + 0x1000;
    let bytes = [0x48, 0x8b, 0x05, 0x00, 0x10, 0, 0]; // mov 0x1000(%rip),%rax
    for (slot_end, reachable) in [
        (target.wrapping_add(0x8000_0000), true),
        (target.wrapping_add(0x8000_0001), false),
        (target.wrapping_sub(0x7fff_ffff), true),
        (target.wrapping_sub(0x8000_0000), false),
    ] {
        let slot = Gva(slot_end.wrapping_sub(7));
        let expected = RelocateError::OutOfReach { address: ADDRESS, target: Gva(target), slot };
        assert_eq!(relocate(&bytes, ADDRESS, slot).err(), (!reachable).then_some(expected));
    }
}

#[test]
fn relative_branches_and_broken_bytes_are_refused() {
    for bytes in [&[0xe8, 0, 0, 0, 0][..], &[0x74, 0], &[0xe2, 0], &[0xe3, 0]] {
        assert_eq!(relocate(bytes, ADDRESS, SLOT), Err(RelocateError::RelativeBranch(ADDRESS)));
    }
    for bytes in [&[0x48, 0x8b, 0x05, 0, 0, 0][..], &[0x06], &[]] {
        assert_eq!(relocate(bytes, ADDRESS, SLOT), Err(RelocateError::Invalid(ADDRESS)));
    }
}

/// Prefixes and an opcode of any map and encoding, then a ModRM that is often RIP-relative.
fn instruction_bytes() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop_oneof![
        Just(vec![]),
        Just(vec![0x66]),
        Just(vec![0x67]),
        Just(vec![0xf2]),
        Just(vec![0xf3]),
        Just(vec![0x65]),
        Just(vec![0xf0]),
    ];
    let map = prop_oneof![
        any::<u8>().prop_map(|rex| vec![0x40 | rex & 15]),
        any::<u8>().prop_map(|rex| vec![0x40 | rex & 15, 0x0f]),
        Just(vec![0x0f, 0x38]),
        Just(vec![0x0f, 0x3a]),
        any::<u8>().prop_map(|vex| vec![0xc5, vex]),
        any::<[u8; 2]>().prop_map(|[a, b]| vec![0xc4, (a & 0xe0) | (1 + a % 3), b]),
        any::<[u8; 3]>().prop_map(|[a, b, c]| vec![0x62, (a & 0xf0) | (1 + a % 3), b | 4, c]),
    ];
    let modrm = prop_oneof![3 => any::<u8>().prop_map(|modrm| modrm & 0x38 | 5), 1 => any::<u8>()];
    (prefix, map, any::<u8>(), modrm, any::<[u8; 8]>()).prop_map(|(prefix, map, opcode, modrm, rest)| {
        let mut bytes = [prefix, map, vec![opcode, modrm]].concat();
        bytes.extend(rest);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn a_relocated_instruction_differs_only_in_its_displacement(
        bytes in instruction_bytes(),
        distance in -0x4000_0000_i64..0x4000_0000,
    ) {
        let before = decode(&bytes, ADDRESS);
        let slot = ADDRESS.offset(distance.cast_unsigned());
        match relocate(&bytes, ADDRESS, slot) {
            Ok(code) => {
                let after = decode(code.bytes(), slot);
                prop_assert_eq!(code.instruction_len(), before.len());
                prop_assert_eq!(after.len(), before.len());
                if before.is_ip_rel_memory_operand() {
                    prop_assert_eq!(after.ip_rel_memory_address(), before.ip_rel_memory_address());
                }
                // iced keeps the absolute address in the displacement, so instructions compare whole. XBEGIN gets another target.
                if before.code() == Code::Xbegin_rel32 {
                    prop_assert_eq!(after.near_branch64(), after.next_ip());
                } else {
                    prop_assert_eq!(after, before);
                }
            }
            Err(RelocateError::Invalid(_)) => prop_assert!(before.is_invalid()),
            Err(RelocateError::RelativeBranch(_)) => prop_assert!(before.near_branch_target() != 0),
            Err(RelocateError::OutOfReach { target, .. }) => {
                prop_assert_eq!(target.0, before.ip_rel_memory_address());
                prop_assert!(before.ip_rel_memory_address().wrapping_sub(slot.0).cast_signed().unsigned_abs() > 0x7fff_0000);
            }
        }
    }
}

#[test]
fn a_transaction_aborts_to_the_guard() {
    for bytes in [&[0xc7, 0xf8, 0x10, 0x20, 0, 0][..], &[0x48, 0xc7, 0xf8, 0x10, 0x20, 0, 0]] {
        let code = relocate(bytes, ADDRESS, SLOT).unwrap();
        let target = decode(code.bytes(), SLOT).near_branch64();
        assert_eq!(target, SLOT.0 + bytes.len() as u64, "{bytes:x?}");
        assert_eq!(code.bytes()[code.instruction_len()], GUARD);
    }
}
