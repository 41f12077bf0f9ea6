//! Where this host does not do what a CPU does, so that a run on it says nothing about ours: a list by instruction and
//! symptom. What is found here is counted in the report under its reason. On hardware the list is empty.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};
use probe_core::rflags;

use crate::case::Case;
use crate::outcome::{DEBUG, End, GENERAL_PROTECTION, Host, Outcome, PAGE_FAULT, STACK_FAULT, differences};

/// Why the runs of a case cannot be compared on this host; `None` if they can.
#[must_use]
pub fn reason(
    case: &Case,
    host: Host,
    bare: &Outcome,
    probed: &Outcome,
    emulated: bool,
) -> Option<&'static str> {
    if host.is_hardware() {
        return None;
    }
    if loses_step(case, host, bare, probed, emulated) {
        return Some("KVM loses the guest's own single step");
    }
    let instruction = &case.instruction;
    let stepping = case.regs.rflags & rflags::TF != 0;
    let exception = |outcome: &Outcome, wanted: u8| matches!(outcome.end, End::Exception { vector, .. } if vector == wanted);
    let table =
        matches!(instruction.mnemonic(), Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Lgdt | Mnemonic::Lidt);
    // With TF on, each attempt raises a #DB.
    let stays = |outcome: &Outcome| {
        outcome.end == End::Hung || exception(outcome, DEBUG) && outcome.regs.rip == case.site
    };
    if table && stays(bare) && stays(probed) {
        return Some("KVM's emulator never completes SGDT, LIDT and their like on memory-mapped I/O");
    }
    if host.emulates_kernel && case.cpl == 0 {
        if is_16_bit_branch(instruction) {
            return Some("KVM's emulator ignores prefix 66 on near branches also for a guest on AMD");
        }
        if instruction.mnemonic() == Mnemonic::Int && exception(bare, GENERAL_PROTECTION) {
            return Some("KVM's emulator has no INT n in 64-bit mode");
        }
        if stepping && instruction.op0_register() == Register::SS {
            return Some("KVM's emulator does not hold a single step behind a load of SS");
        }
        let call = instruction.mnemonic() == Mnemonic::Call;
        if call && exception(bare, GENERAL_PROTECTION) && exception(probed, PAGE_FAULT) {
            return Some(
                "KVM's emulator looks at the target of a CALL before its stack, AMD's CPUs behind it",
            );
        }
        let ignored =
            matches!(instruction.segment_prefix(), Register::ES | Register::CS | Register::SS | Register::DS);
        let either =
            |outcome: &Outcome| exception(outcome, STACK_FAULT) || exception(outcome, GENERAL_PROTECTION);
        let heeds_override = ignored && either(bare) && either(probed);
        return heeds_override
            .then_some("KVM's emulator heeds an override of ES, CS, SS or DS, which CPUs ignore");
    }
    let reached = |outcome: &Outcome| matches!(outcome.end, End::Reached { .. });
    if instruction.code().encoding() == EncodingKind::XOP {
        return Some("QEMU's TCG takes XOP for POP");
    }
    if instruction.op0_kind() == OpKind::NearBranch16 && probed.regs.rip == bare.regs.rip & 0xffff {
        return Some(
            "QEMU's TCG keeps the upper bits of a relative branch with prefix 66, of which AMD takes 16",
        );
    }
    match instruction.mnemonic() {
        Mnemonic::Shld | Mnemonic::Shrd
            if instruction.op2_kind() == OpKind::Immediate8 && instruction.is_ip_rel_memory_operand() =>
        {
            Some("QEMU's TCG forgets the immediate in a RIP-relative SHLD or SHRD")
        }
        Mnemonic::Ret if instruction.op_count() == 1 && instruction.immediate16() >= 0x8000 => {
            Some("QEMU's TCG sign-extends the immediate of RET")
        }
        Mnemonic::Ret | Mnemonic::Call | Mnemonic::Jmp
            if exception(bare, GENERAL_PROTECTION) && bare.regs.rip != case.site
                || exception(probed, GENERAL_PROTECTION) && probed.regs.rip == case.site =>
        {
            Some("QEMU's TCG goes to a non-canonical target and faults there")
        }
        Mnemonic::Adcx | Mnemonic::Adox if bare.regs.rflags > u64::from(u32::MAX >> 10) => {
            Some("QEMU's TCG leaves other bits in RFLAGS behind ADCX and ADOX")
        }
        Mnemonic::Rcl | Mnemonic::Rcr if exception(bare, PAGE_FAULT) && exception(probed, PAGE_FAULT) => {
            Some("QEMU's TCG changes CF of a rotation before its store faults")
        }
        Mnemonic::Cmpsb | Mnemonic::Cmpsw | Mnemonic::Cmpsd | Mnemonic::Cmpsq
            if [PAGE_FAULT, GENERAL_PROTECTION].iter().any(|vector| exception(bare, *vector))
                && [PAGE_FAULT, GENERAL_PROTECTION].iter().any(|vector| exception(probed, *vector)) =>
        {
            Some("which operand of CMPS faults first is up to the CPU")
        }
        // It raises #UD, at times after a fault at an address that leaves the immediate out.
        Mnemonic::Test if is_test_alias(case.code) => Some("QEMU's TCG has no TEST at F6 /1 and F7 /1"),
        Mnemonic::Clflush | Mnemonic::Clflushopt if reached(bare) => {
            Some("QEMU's TCG does not look at the operand of CLFLUSH")
        }
        Mnemonic::Xbegin if reached(bare) || exception(bare, DEBUG) => {
            Some("QEMU's TCG takes XBEGIN for MOV")
        }
        Mnemonic::Lgdt | Mnemonic::Lidt | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase if reached(bare) => {
            Some("QEMU's TCG takes a base that is not canonical")
        }
        _ => None,
    }
}

/// A near branch with prefix 66 as AMD takes it.
fn is_16_bit_branch(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::NearBranch16
        || matches!(instruction.code(), Code::Call_rm16 | Code::Jmp_rm16 | Code::Retnw | Code::Retnw_imm16)
}

/// The second encoding of TEST with an immediate, which all CPUs have (AMD APM vol. 3, table A-6).
fn is_test_alias(code: Code) -> bool {
    matches!(
        code,
        Code::Test_rm8_imm8_F6r1
            | Code::Test_rm16_imm16_F7r1
            | Code::Test_rm32_imm32_F7r1
            | Code::Test_rm64_imm32_F7r1
    )
}

/// Whether the runs agree but for the guest's own single step, which the bare run lost: KVM does not raise the #DB behind an
/// instruction that it completed itself in some of its paths, and its emulator stops a repeated string instruction only behind
/// the last iteration, with RIP still in front.
fn loses_step(case: &Case, host: Host, bare: &Outcome, probed: &Outcome, emulated: bool) -> bool {
    let stepped = |outcome: &Outcome| matches!(outcome.end, End::Exception { vector: DEBUG, .. });
    let (instruction, flags) = (&case.instruction, case.regs.rflags);
    let repeats = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    if instruction.is_string_instruction() && repeats && flags & rflags::TF != 0 {
        // Where KVM's emulator runs it: repeated to the end, whatever comes on the way.
        let ports = instruction.op_code().is_input_output();
        return host.emulates_kernel && case.cpl == 0 || ports && stepped(bare);
    }
    if flags & rflags::TF == 0 || !stepped(probed) || !matches!(bare.end, End::Reached { .. }) {
        return false;
    }
    let mut without = bare.clone();
    without.end = probed.end.clone();
    without.system.clone_from(&probed.system);
    // The handler's, where the bare run reached no handler.
    without.sys = probed.sys;
    without.regs.rflags |= rflags::TF;
    differences(case, host, &without, probed, emulated).is_empty()
}

#[cfg(test)]
mod tests {
    use probe_core::SystemRegisters;

    use super::*;

    fn outcome(case: &Case, end: End, rip: u64) -> Outcome {
        Outcome {
            end,
            regs: probe_core::Registers { rip, ..case.regs },
            sys: SystemRegisters::default(),
            fpu: None,
            system: None,
            data: Vec::new(),
        }
    }

    const REACHED: End = End::Reached { cpl: 0, long: true };
    const DEBUG_EXCEPTION: End =
        End::Exception { vector: DEBUG, code: None, cr2: None, selectors: [0x10, 0x18] };
    const EMULATOR: Host = Host {
        emulates_kernel: true,
        user_breakpoints: false,
        sets_resume_flag: true,
        changes_are_writes: true,
        stack_faults: true,
        checks_alignment: true,
        xsave: false,
    };

    #[test]
    fn a_step_that_the_host_loses_is_told_from_one_that_the_engine_invents() {
        // nop
        let mut case = Case::plain(&[0x90], 0, rflags::TF, 0);
        let next = case.next();
        let (lost, kept) = (outcome(&case, REACHED, next), outcome(&case, DEBUG_EXCEPTION, next));
        let lost = Outcome { regs: probe_core::Registers { rflags: rflags::FIXED, ..lost.regs }, ..lost };
        assert_eq!(
            reason(&case, EMULATOR, &lost, &kept, true),
            Some("KVM loses the guest's own single step")
        );
        // The other way round, or without TF, it is ours.
        assert_eq!(reason(&case, EMULATOR, &kept, &lost, true), None);
        case.regs.rflags = rflags::FIXED;
        assert_eq!(reason(&case, EMULATOR, &lost, &kept, true), None);
        // And whatever else differs is, too.
        case.regs.rflags |= rflags::TF;
        let mut other = kept.clone();
        other.regs.rax ^= 1;
        assert_eq!(reason(&case, EMULATOR, &lost, &other, true), None);
    }

    #[test]
    fn a_descriptor_table_register_that_never_gets_to_a_device_is_told_from_one_that_hangs_when_probed() {
        // sgdt (%rdi)
        let case = Case::plain(&[0x0f, 0x01, 0x07], 0, rflags::TF, 0);
        let hung = outcome(&case, End::Hung, 0);
        let (at, behind) =
            (outcome(&case, DEBUG_EXCEPTION, case.site), outcome(&case, DEBUG_EXCEPTION, case.next()));
        for host in [EMULATOR, Host { emulates_kernel: false, sets_resume_flag: false, ..EMULATOR }] {
            for bare in [&hung, &at] {
                let told = reason(&case, host, bare, &hung, false);
                assert!(told.is_some_and(|reason| reason.contains("never completes")));
            }
            assert_eq!(reason(&case, host, &behind, &hung, false), None);
        }
    }

    #[test]
    fn hardware_has_no_excuse() {
        // ret $0x8000, with another RSP.
        let case = Case::plain(&[0xc2, 0x00, 0x80], 0, 0, 0);
        let (bare, probed) = (outcome(&case, REACHED, 0), outcome(&case, REACHED, 8));
        assert_eq!(reason(&case, Host::default(), &bare, &probed, true), None);
        let tcg = Host { sets_resume_flag: false, ..Host::default() };
        assert!(reason(&case, tcg, &bare, &probed, true).is_some());
    }
}
