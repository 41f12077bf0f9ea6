//! The instruction forms and byte strings that are each of them.
//!
//! Bytes are put together from iced's description of a form (prefixes, opcode, then random ModRM, SIB, displacement and
//! immediate) and kept if they decode to the form. So encodings that no assembler emits come up too: prefixes without
//! effect, REX bits that are ignored, a SIB byte without need.

use fastrand::Rng;
use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, Instruction, MandatoryPrefix, Mnemonic, OpCodeInfo,
    OpCodeOperandKind, OpCodeTableKind,
};
use probe_core::Vendor;

/// The longest instruction, in bytes.
const MAX_INSTRUCTION: usize = 15;

/// How many byte strings are tried for a form before it counts as having none.
const ATTEMPTS: u32 = 4000;

/// Why a form is not among those that run. Everything else runs, or is counted with what kept it from running.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Exclusion {
    /// The form is data for an assembler, or iced's mark of bytes that do not decode.
    #[error("no instruction (INVALID, DB, DW, DD, DQ, zero bytes)")]
    NoInstruction,
    /// Other modes are not what vmprobe's guests run in.
    #[error("not available in 64-bit mode")]
    NotIn64BitMode,
    /// FINIT, FSTCW and their like: FWAIT and the form without it, one behind the other.
    #[error("two instructions, the first of which is FWAIT")]
    WithWait,
    /// The same bytes are another instruction on every CPU sold now: MPX, Knights Corner, Cyrix and early steppings.
    #[error("an opcode of dropped or never sold CPUs, which means something else today")]
    Dropped,
    /// MONTMUL in 64-bit mode, for which iced's table has a form but its decoder no bytes.
    #[error("no bytes decode to it")]
    NoBytes,
}

/// Whether a vendor's CPUs decode the form at all.
#[must_use]
pub fn decodes(vendor: Vendor, code: Code) -> bool {
    let info = code.op_code();
    match vendor {
        Vendor::Amd => info.amd_decoder64(),
        Vendor::Intel | Vendor::Unknown => info.intel_decoder64(),
    }
}

/// Every form that iced knows, with the reason for which it does not run.
pub fn all() -> impl Iterator<Item = (Code, Option<Exclusion>)> {
    Code::values().map(|code| (code, exclusion(code)))
}

fn exclusion(code: Code) -> Option<Exclusion> {
    let info = code.op_code();
    if !info.is_instruction() || code == Code::Zero_bytes {
        Some(Exclusion::NoInstruction)
    } else if info.fwait() {
        Some(Exclusion::WithWait)
    } else if code == Code::Montmul_64 {
        Some(Exclusion::NoBytes)
    } else if !info.mode64() {
        Some(Exclusion::NotIn64BitMode)
    } else if info.decoder_option() != DecoderOptions::NONE || info.encoding() == EncodingKind::MVEX {
        Some(Exclusion::Dropped)
    } else {
        None
    }
}

/// Bytes of one instruction of this form, at most 15; None if none were found.
#[must_use]
pub fn encode(code: Code, vendor: Vendor, rng: &mut Rng) -> Option<Vec<u8>> {
    let info = code.op_code();
    (0..ATTEMPTS).find_map(|_| {
        let bytes = candidate(info, rng);
        let instruction = decode(&bytes, 0, vendor);
        let fits = instruction.code() == code && instruction.len() <= MAX_INSTRUCTION;
        fits.then(|| bytes[..instruction.len()].to_vec())
    })
}

/// Decodes an instruction at `ip`.
#[must_use]
pub fn decode(bytes: &[u8], ip: u64, vendor: Vendor) -> Instruction {
    Decoder::with_ip(64, bytes, ip, vendor.decoder_options()).decode()
}

/// True once in `n` times.
pub(crate) fn one_in(rng: &mut Rng, n: u32) -> bool {
    rng.u32(0..n) == 0
}

/// One element of a slice that is not empty.
pub(crate) fn pick<T: Copy>(rng: &mut Rng, of: &[T]) -> T {
    of[rng.usize(0..of.len())]
}

fn candidate(info: &OpCodeInfo, rng: &mut Rng) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    if one_in(rng, 8) {
        bytes.push(pick(rng, &[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
    }
    if info.address_size() == 32 || info.address_size() == 0 && one_in(rng, 8) {
        bytes.push(0x67);
    }
    match info.encoding() {
        EncodingKind::VEX => vex(info, rng, &mut bytes),
        EncodingKind::XOP => xop(info, rng, &mut bytes),
        EncodingKind::EVEX => evex(info, rng, &mut bytes),
        EncodingKind::D3NOW => {
            // The opcode stands behind the operands.
            bytes.extend([0x0f, 0x0f, modrm(info, rng)]);
            tail(rng, &mut bytes);
            let operands = Decoder::new(64, &[&bytes[..], &[0x9e; 8]].concat(), DecoderOptions::NONE)
                .decode()
                .len()
                .clamp(1, bytes.len());
            bytes.truncate(operands - 1);
            bytes.push(info.op_code().to_le_bytes()[0]);
            return bytes;
        }
        _ => legacy(info, rng, &mut bytes),
    }
    bytes.push(modrm(info, rng));
    tail(rng, &mut bytes);
    bytes
}

/// Bytes that become SIB, displacement and immediate, as far as the instruction has them. Half of them are at the edges of
/// their ranges.
fn tail(rng: &mut Rng, bytes: &mut Vec<u8>) {
    bytes.push(rng.u8(..));
    for _ in 0..3 {
        let edge = pick(rng, &[0, 1, 0x7f, 0x80, 0xff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff_u32]);
        let value = if rng.bool() { edge } else { rng.u32(..) };
        bytes.extend(value.to_le_bytes());
    }
}

fn modrm(info: &OpCodeInfo, rng: &mut Rng) -> u8 {
    let mut modrm = rng.u8(..);
    if one_in(rng, 10) {
        // RIP-relative.
        modrm = modrm & 0x38 | 0x05;
    }
    if let Ok(reg) = u8::try_from(info.group_index()) {
        modrm = modrm & !0x38 | reg << 3;
    }
    if let Ok(rm) = u8::try_from(info.rm_group_index()) {
        modrm = modrm & !0x07 | rm;
    }
    modrm
}

/// Low and high byte of the opcode, the high one if there are two; a register in the low bits is drawn.
fn opcode(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    use OpCodeOperandKind as Kind;
    let [mut low, high, ..] = info.op_code().to_le_bytes();
    let register = info.op_kinds().iter().any(|kind| {
        matches!(
            kind,
            Kind::r8_opcode | Kind::r16_opcode | Kind::r32_opcode | Kind::r64_opcode | Kind::sti_opcode
        )
    });
    if register {
        low |= rng.u8(..8);
    }
    if info.op_code_len() == 2 {
        bytes.push(high);
    }
    bytes.push(low);
}

fn legacy(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    if info.can_use_lock_prefix() && one_in(rng, 3) {
        bytes.push(0xf0);
    }
    let fixed = info.mandatory_prefix();
    match fixed {
        MandatoryPrefix::P66 => bytes.push(0x66),
        MandatoryPrefix::PF3 => bytes.push(0xf3),
        MandatoryPrefix::PF2 => bytes.push(0xf2),
        MandatoryPrefix::PNP | MandatoryPrefix::None => {}
    }
    if info.operand_size() == 16 && fixed != MandatoryPrefix::P66
        || fixed == MandatoryPrefix::None && one_in(rng, 16)
    {
        bytes.push(0x66);
    }
    let repeats = info.can_use_rep_prefix() || info.can_use_repne_prefix();
    if fixed == MandatoryPrefix::None && one_in(rng, if repeats { 2 } else { 16 }) {
        bytes.push(pick(rng, &[0xf2, 0xf3]));
    }
    let wide = info.operand_size() == 64 && !info.default_op_size64();
    if wide || rng.bool() {
        let mut rex = 0x40 | rng.u8(..8);
        if wide || one_in(rng, 8) {
            rex |= 0x08;
        }
        bytes.push(rex);
    }
    match info.table() {
        OpCodeTableKind::T0F => bytes.push(0x0f),
        OpCodeTableKind::T0F38 => bytes.extend([0x0f, 0x38]),
        OpCodeTableKind::T0F3A => bytes.extend([0x0f, 0x3a]),
        _ => {}
    }
    opcode(info, rng, bytes);
}

/// The prefix that a vector encoding holds in two bits.
fn implied_prefix(info: &OpCodeInfo) -> u8 {
    match info.mandatory_prefix() {
        MandatoryPrefix::None | MandatoryPrefix::PNP => 0,
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
    }
}

fn map(info: &OpCodeInfo) -> u8 {
    match info.table() {
        OpCodeTableKind::T0F => 1,
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        OpCodeTableKind::MAP5 => 5,
        OpCodeTableKind::MAP6 => 6,
        OpCodeTableKind::MAP8 => 8,
        OpCodeTableKind::MAP9 => 9,
        OpCodeTableKind::MAP10 => 10,
        // One-byte opcodes have no such encoding; nothing decodes from map 0.
        _ => 0,
    }
}

fn width(info: &OpCodeInfo, rng: &mut Rng) -> u8 {
    if info.is_wig() || info.is_wig32() { rng.u8(..2) } else { u8::from(info.w() != 0) }
}

/// The vector length. Where the CPU ignores it any will do, except that QEMU's TCG aborts at a VROUNDSS or VROUNDSD with L set.
fn length(info: &OpCodeInfo, rng: &mut Rng) -> u8 {
    let aborts = matches!(info.mnemonic(), Mnemonic::Vroundss | Mnemonic::Vroundsd);
    if info.is_lig() && !aborts { rng.u8(..2) } else { info.l().to_le_bytes()[0] }
}

/// vvvv, inverted: none or any.
fn second_source(rng: &mut Rng) -> u8 {
    if rng.bool() { 0x0f } else { rng.u8(..16) }
}

fn vex(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    let (map, w) = (map(info), width(info, rng));
    let rest = second_source(rng) << 3 | length(info, rng) << 2 | implied_prefix(info);
    if map == 1 && w == 0 && rng.bool() {
        bytes.extend([0xc5, rng.u8(..2) << 7 | rest]);
    } else {
        bytes.extend([0xc4, rng.u8(..8) << 5 | map, w << 7 | rest]);
    }
    opcode(info, rng, bytes);
}

fn xop(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    let rest = second_source(rng) << 3 | length(info, rng) << 2 | implied_prefix(info);
    bytes.extend([0x8f, rng.u8(..8) << 5 | map(info), width(info, rng) << 7 | rest]);
    opcode(info, rng, bytes);
}

fn evex(info: &OpCodeInfo, rng: &mut Rng, bytes: &mut Vec<u8>) {
    let first = rng.u8(..16) << 4 | map(info);
    let second = width(info, rng) << 7 | second_source(rng) << 3 | 1 << 2 | implied_prefix(info);
    let masked = info.require_op_mask_register() || info.can_use_op_mask_register() && rng.bool();
    let mask = if masked { rng.u8(1..8) } else { 0 };
    let zero = u8::from(masked && info.can_use_zeroing_masking() && one_in(rng, 3)) << 7;
    let broadcast = u8::from(one_in(rng, 6)) << 4;
    let high = u8::from(!one_in(rng, 4)) << 3;
    bytes.extend([0x62, first, second, zero | length(info, rng) << 5 | broadcast | high | mask]);
    opcode(info, rng, bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    const VENDORS: [Vendor; 2] = [Vendor::Intel, Vendor::Amd];

    #[test]
    fn every_form_that_runs_has_an_encoding() {
        let mut rng = Rng::with_seed(1);
        for vendor in VENDORS {
            let runs =
                |(code, exclusion): &(Code, Option<Exclusion>)| exclusion.is_none() && decodes(vendor, *code);
            let missing: Vec<Code> = all()
                .filter(runs)
                .map(|(code, _)| code)
                .filter(|code| encode(*code, vendor, &mut rng).is_none())
                .collect();
            assert_eq!(missing, [], "{vendor:?}");
        }
    }

    #[test]
    fn every_form_that_runs_is_decoded_by_some_vendor() {
        let nobody = |code: &Code| !VENDORS.iter().any(|vendor| decodes(*vendor, *code));
        let orphans: Vec<Code> =
            all().filter(|(_, exclusion)| exclusion.is_none()).map(|(code, _)| code).filter(nobody).collect();
        assert_eq!(orphans, []);
    }

    #[test]
    fn the_excluded_forms_are_few_and_counted_by_reason() {
        let count = |wanted| all().filter(|(_, exclusion)| *exclusion == wanted).count();
        assert!(count(None) > 4000, "{}", count(None));
        assert!(count(Some(Exclusion::NoInstruction)) <= 6);
        assert!(count(Some(Exclusion::WithWait)) <= 14);
    }

    #[test]
    fn encodings_vary_and_decode_to_their_form() {
        let mut rng = Rng::with_seed(7);
        for code in [Code::Add_rm64_r64, Code::VEX_Vaddps_xmm_xmm_xmmm128, Code::Jmp_rm64, Code::Movsb_m8_m8]
        {
            let some: Vec<_> = (0..20).filter_map(|_| encode(code, Vendor::Amd, &mut rng)).collect();
            assert_eq!(some.len(), 20);
            for bytes in &some {
                let instruction = decode(bytes, 0, Vendor::Amd);
                assert_eq!((instruction.code(), instruction.len()), (code, bytes.len()));
            }
            assert!(some.iter().any(|bytes| *bytes != some[0]), "{code:?}");
        }
    }
}
