//! What is to run a displaced instruction: decided once, when its probe is armed.
//!
//! Most instructions are emulated. An instruction is stepped out of line only if every fault it can raise in the slot
//! is foreseen by [`crate::precheck`]; the list of those is positive, so an instruction nobody has thought about is
//! refused. Not foreseen is that the guest's CPUID lacks an instruction its text contains.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderError, DecoderOptions, EncodingKind, FlowControl, Formatter,
    GasFormatter, Instruction, MemorySize, Mnemonic, OpKind, Register,
};

use crate::Gva;
use crate::emulate::is_emulated;

/// The longest instruction, in bytes (Intel SDM vol. 2A, 2.3.11).
pub const MAX_INSTRUCTION: usize = 15;

/// How a displaced instruction runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Plan {
    /// In the host, by [`crate::emulate`]. Should it defer at a hit, [`check_step`] says whether a step will do.
    Emulate,
    /// In a slot, single-stepped, after [`crate::precheck`] and followed by [`crate::fixup`].
    Step,
    /// Not at all: no probe can stand here.
    Refuse(Refusal),
}

/// Why no probe can stand on an instruction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The bytes do not decode.
    #[error(
        "The bytes at {address} are no valid instruction; give the address of an instruction in the guest's code"
    )]
    Invalid {
        /// Where they stand.
        address: Gva,
    },
    /// The instruction runs on into memory that cannot be read.
    #[error("The instruction at {address} goes on after {available} bytes, in a page that is not mapped")]
    Truncated {
        /// Where it begins.
        address: Gva,
        /// How many of its bytes can be read.
        available: usize,
    },
    /// The instruction is valid, but cannot run anywhere but in its place.
    #[error("`{instruction}` at {address} cannot be probed: {reason}. The next instruction is at {next}")]
    Instruction {
        /// Where it stands.
        address: Gva,
        /// Its text, in the syntax of the GNU assembler.
        instruction: String,
        /// What is in the way.
        reason: Reason,
        /// Where the instruction behind it stands.
        next: Gva,
    },
}

/// What is in the way of running an instruction out of its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// 66 on a near branch.
    #[error("Intel and AMD CPUs give it different meanings")]
    VendorDependent,
    /// INT n, INT3, INT1.
    #[error("it raises an interrupt, whose frame would show where it really ran")]
    SoftwareInterrupt,
    /// UD0, UD1, UD2.
    #[error("it raises #UD on purpose, and the guest looks up its address")]
    Undefined,
    /// SYSCALL, SYSENTER, SYSRET, SYSEXIT, VMCALL and their like.
    #[error("it changes between privilege levels or into a hypervisor")]
    SystemCall,
    /// IRET, far JMP, CALL and RET.
    #[error("it is a far transfer")]
    FarTransfer,
    /// XBEGIN, XEND, XABORT.
    #[error("it is part of a hardware transaction")]
    Transaction,
    /// A load of a segment register.
    #[error("loading a segment register may fault, and MOV SS holds back the step")]
    SegmentLoad,
    /// Privileged, and its faults depend on more than is known here.
    #[error("it changes system registers and may fault in a way that cannot be foreseen")]
    SystemRegister,
    /// MONITOR, MWAIT and their like.
    #[error("it waits for events, which a single step holds back")]
    Wait,
    /// x87, MMX and floating-point arithmetic.
    #[error("it may raise a floating-point exception, which cannot be foreseen")]
    FloatingPoint,
    /// Gather, scatter and masked moves.
    #[error("which memory it accesses depends on a vector register")]
    VectorIndex,
    /// INS and OUTS.
    #[error("it moves strings to or from I/O ports")]
    PortString,
    /// It changes TF, IF or RIP in a way that only emulation gets right.
    #[error("it can be emulated but not stepped")]
    EmulationOnly,
    /// Anything else.
    #[error("it is not among the instructions known to run out of place")]
    Unknown,
}

/// Decodes the instruction that begins at `address`; `bytes` may go on behind it.
///
/// # Errors
/// [`Refusal`] if there is no whole instruction, or one that depends on the CPU's vendor.
pub fn decode(bytes: &[u8], address: Gva) -> Result<Instruction, Refusal> {
    let bytes = bytes.get(..MAX_INSTRUCTION).unwrap_or(bytes);
    let mut decoder = Decoder::with_ip(64, bytes, address.0, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if decoder.last_error() == DecoderError::NoMoreBytes && bytes.len() < MAX_INSTRUCTION {
        return Err(Refusal::Truncated { address, available: bytes.len() });
    }
    if instruction.is_invalid() {
        return Err(Refusal::Invalid { address });
    }
    // Intel ignores an operand-size prefix on a near branch in 64-bit mode, AMD obeys it. They also disagree on the
    // length of UD0.
    let amd = Decoder::with_ip(64, bytes, address.0, DecoderOptions::AMD).decode();
    if amd.code() != instruction.code() || amd.len() != instruction.len() {
        let undefined = instruction.flow_control() == FlowControl::Exception;
        let reason = if undefined { Reason::Undefined } else { Reason::VendorDependent };
        return Err(refusal(&instruction, reason));
    }
    Ok(instruction)
}

/// Decides how `instruction`, from [`decode`], runs when it is displaced.
#[must_use]
pub fn plan(instruction: &Instruction) -> Plan {
    if is_emulated(instruction) {
        return Plan::Emulate;
    }
    match check_step(instruction) {
        Ok(()) => Plan::Step,
        Err(refusal) => Plan::Refuse(refusal),
    }
}

/// Whether `instruction` can be single-stepped in a slot.
///
/// # Errors
/// [`Refusal::Instruction`] with the reason why not.
pub fn check_step(instruction: &Instruction) -> Result<(), Refusal> {
    match obstacle(instruction) {
        None => Ok(()),
        Some(reason) => Err(refusal(instruction, reason)),
    }
}

/// The instruction's text, in the syntax of the GNU assembler.
#[must_use]
pub fn text(instruction: &Instruction) -> String {
    let mut text = String::new();
    GasFormatter::new().format(instruction, &mut text);
    text
}

fn refusal(instruction: &Instruction, reason: Reason) -> Refusal {
    Refusal::Instruction {
        address: Gva(instruction.ip()),
        instruction: text(instruction),
        reason,
        next: Gva(instruction.next_ip()),
    }
}

/// What keeps an instruction from being stepped.
fn obstacle(instruction: &Instruction) -> Option<Reason> {
    flow_obstacle(instruction)
        .or_else(|| system_obstacle(instruction))
        .or_else(|| vector_obstacle(instruction))
        .or_else(|| {
            let known = instruction.cpuid_features().iter().all(|feature| is_known_feature(*feature));
            let odd =
                matches!(instruction.mnemonic(), Mnemonic::Enter | Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr);
            let xgetbv = instruction.mnemonic() == Mnemonic::Xgetbv;
            ((!known && !xgetbv) || odd).then_some(Reason::Unknown)
        })
}

fn flow_obstacle(instruction: &Instruction) -> Option<Reason> {
    let steppable =
        matches!(instruction.code(), Code::Jmp_rm64 | Code::Call_rm64 | Code::Retnq | Code::Retnq_imm16);
    let own_flags = matches!(
        instruction.mnemonic(),
        Mnemonic::Cli
            | Mnemonic::Sti
            | Mnemonic::Hlt
            | Mnemonic::Pushf
            | Mnemonic::Pushfq
            | Mnemonic::Popf
            | Mnemonic::Popfq
    );
    let far = instruction.is_jmp_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far()
        || instruction.is_call_far_indirect();
    match instruction.flow_control() {
        _ if steppable => None,
        _ if own_flags => Some(Reason::EmulationOnly),
        _ if far => Some(Reason::FarTransfer),
        _ if matches!(instruction.mnemonic(), Mnemonic::Xend | Mnemonic::Xabort) => Some(Reason::Transaction),
        FlowControl::Next => None,
        FlowControl::Interrupt => Some(Reason::SoftwareInterrupt),
        FlowControl::Exception => Some(Reason::Undefined),
        FlowControl::XbeginXabortXend => Some(Reason::Transaction),
        FlowControl::Return => Some(match instruction.mnemonic() {
            Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf => Reason::FarTransfer,
            Mnemonic::Ret => Reason::EmulationOnly,
            _ => Reason::SystemCall,
        }),
        FlowControl::Call if !instruction.is_call_near() => Some(Reason::SystemCall),
        _ => Some(Reason::EmulationOnly),
    }
}

fn system_obstacle(instruction: &Instruction) -> Option<Reason> {
    match instruction.mnemonic() {
        Mnemonic::Monitor
        | Mnemonic::Mwait
        | Mnemonic::Monitorx
        | Mnemonic::Mwaitx
        | Mnemonic::Umonitor
        | Mnemonic::Umwait
        | Mnemonic::Tpause => return Some(Reason::Wait),
        Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => {
            return Some(Reason::PortString);
        }
        Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lds | Mnemonic::Les => {
            return Some(Reason::SegmentLoad);
        }
        Mnemonic::Rdpmc => return Some(Reason::SystemRegister),
        _ => {}
    }
    let loads_segment =
        instruction.op0_register().is_segment_register() && instruction.mnemonic() != Mnemonic::Push;
    if instruction.op0_kind() == OpKind::Register && loads_segment {
        return Some(Reason::SegmentLoad);
    }
    let reads_control_register = instruction.code() == Code::Mov_r64_cr
        && matches!(
            instruction.op1_register(),
            Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4 | Register::CR8
        );
    let faults_foreseen = reads_control_register
        || matches!(
            instruction.mnemonic(),
            Mnemonic::In
                | Mnemonic::Out
                | Mnemonic::Clts
                | Mnemonic::Invlpg
                | Mnemonic::Swapgs
                | Mnemonic::Wbinvd
                | Mnemonic::Clac
                | Mnemonic::Stac
        );
    let control_register = instruction.op0_register().is_cr() || instruction.op1_register().is_cr();
    let system = instruction.is_privileged() || control_register;
    (system && !faults_foreseen).then_some(Reason::SystemRegister)
}

fn vector_obstacle(instruction: &Instruction) -> Option<Reason> {
    let features = instruction.cpuid_features();
    let x87 = features.iter().any(|feature| {
        matches!(
            feature,
            CpuidFeature::FPU
                | CpuidFeature::FPU287
                | CpuidFeature::FPU387
                | CpuidFeature::MMX
                | CpuidFeature::D3NOW
        )
    });
    let mmx = (0..instruction.op_count()).any(|operand| instruction.op_register(operand).is_mm());
    if x87 || mmx {
        return Some(Reason::FloatingPoint);
    }
    let masked = matches!(
        instruction.mnemonic(),
        Mnemonic::Maskmovdqu
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
    );
    if masked || instruction.vsib().is_some() {
        return Some(Reason::VectorIndex);
    }
    if instruction.code().encoding() == EncodingKind::EVEX {
        return Some(Reason::Unknown);
    }
    (has_float_operand(instruction) && !moves_floats(instruction.mnemonic())).then_some(Reason::FloatingPoint)
}

/// Whether the instruction takes floating-point numbers, or makes them.
fn has_float_operand(instruction: &Instruction) -> bool {
    let element = instruction.op_code().memory_size().element_type();
    matches!(element, MemorySize::Float16 | MemorySize::Float32 | MemorySize::Float64)
        || matches!(
            instruction.mnemonic(),
            Mnemonic::Cvtdq2pd
                | Mnemonic::Cvtdq2ps
                | Mnemonic::Cvtsi2sd
                | Mnemonic::Cvtsi2ss
                | Mnemonic::Vcvtdq2pd
                | Mnemonic::Vcvtdq2ps
                | Mnemonic::Vcvtsi2sd
                | Mnemonic::Vcvtsi2ss
        )
}

/// Whether an instruction on floating-point operands only moves or combines their bits. Its page in the Intel SDM,
/// vol. 2, says "SIMD Floating-Point Exceptions: None".
fn moves_floats(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Movaps
            | Mnemonic::Movapd
            | Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movss
            | Mnemonic::Movsd
            | Mnemonic::Movhps
            | Mnemonic::Movhpd
            | Mnemonic::Movlps
            | Mnemonic::Movlpd
            | Mnemonic::Movntps
            | Mnemonic::Movntpd
            | Mnemonic::Movddup
            | Mnemonic::Movshdup
            | Mnemonic::Movsldup
            | Mnemonic::Andps
            | Mnemonic::Andpd
            | Mnemonic::Andnps
            | Mnemonic::Andnpd
            | Mnemonic::Orps
            | Mnemonic::Orpd
            | Mnemonic::Xorps
            | Mnemonic::Xorpd
            | Mnemonic::Shufps
            | Mnemonic::Shufpd
            | Mnemonic::Unpckhps
            | Mnemonic::Unpckhpd
            | Mnemonic::Unpcklps
            | Mnemonic::Unpcklpd
            | Mnemonic::Blendps
            | Mnemonic::Blendpd
            | Mnemonic::Insertps
            | Mnemonic::Extractps
            | Mnemonic::Vmovaps
            | Mnemonic::Vmovapd
            | Mnemonic::Vmovups
            | Mnemonic::Vmovupd
            | Mnemonic::Vmovss
            | Mnemonic::Vmovsd
            | Mnemonic::Vmovhps
            | Mnemonic::Vmovhpd
            | Mnemonic::Vmovlps
            | Mnemonic::Vmovlpd
            | Mnemonic::Vmovntps
            | Mnemonic::Vmovntpd
            | Mnemonic::Vmovddup
            | Mnemonic::Vmovshdup
            | Mnemonic::Vmovsldup
            | Mnemonic::Vandps
            | Mnemonic::Vandpd
            | Mnemonic::Vandnps
            | Mnemonic::Vandnpd
            | Mnemonic::Vorps
            | Mnemonic::Vorpd
            | Mnemonic::Vxorps
            | Mnemonic::Vxorpd
            | Mnemonic::Vshufps
            | Mnemonic::Vshufpd
            | Mnemonic::Vunpckhps
            | Mnemonic::Vunpckhpd
            | Mnemonic::Vunpcklps
            | Mnemonic::Vunpcklpd
            | Mnemonic::Vblendps
            | Mnemonic::Vblendpd
            | Mnemonic::Vinsertps
            | Mnemonic::Vextractps
            | Mnemonic::Vbroadcastss
            | Mnemonic::Vbroadcastsd
            | Mnemonic::Vbroadcastf128
            | Mnemonic::Vinsertf128
            | Mnemonic::Vextractf128
            | Mnemonic::Vperm2f128
            | Mnemonic::Vpermilps
            | Mnemonic::Vpermilpd
    )
}

/// Extensions whose instructions are known to be safe in a slot, once the other obstacles are excluded.
fn is_known_feature(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL186
            | F::INTEL286
            | F::INTEL386
            | F::INTEL486
            | F::X64
            | F::CMOV
            | F::CX8
            | F::CMPXCHG16B
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::CPUID
            | F::TSC
            | F::RDTSCP
            | F::RDPID
            | F::RDRAND
            | F::RDSEED
            | F::FSGSBASE
            | F::SMAP
            | F::CET_IBT
            | F::CLFSH
            | F::CLFLUSHOPT
            | F::CLWB
            | F::CLDEMOTE
            | F::PREFETCHW
            | F::MOVBE
            | F::MOVDIRI
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::ADX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::AVX
            | F::AVX2
            | F::GFNI
            | F::VAES
            | F::VPCLMULQDQ
    )
}

#[cfg(test)]
mod tests;
