//! A case: one instruction with everything it can see.

use fastrand::Rng;
use iced_x86::{
    Code, Decoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
    UsedMemory,
};
use probe_core::{Registers, Vendor, rflags};

use crate::forms::{self, one_in, pick};
use crate::layout::{
    CODE_PAGES, DATA_OFFSET, HIGH, KERNEL_CODE, KERNEL_CODE_32, KERNEL_CODE_64, KERNEL_DATA, LOW, PAGES,
    Page, USER, USER_CODE, USER_CODE_32, USER_CODE_64, USER_DATA, data_page,
};
use probe_core::{Gpa, PAGE_SIZE};

/// Bytes of x87, SSE and AVX state in the standard form of XSAVE (Intel SDM vol. 1, 13.4).
pub const FPU_BYTES: usize = 832;
/// Of these, what FXSAVE stores.
pub const FXSAVE_BYTES: usize = 512;

/// One instruction, where it stands, and the state that it starts from.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its form.
    pub code: Code,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What they decode to at [`Case::site`].
    pub instruction: Instruction,
    /// Its linear address.
    pub site: u64,
    /// CPL, 0 or 3.
    pub cpl: u8,
    /// Registers before; RIP is the site.
    pub regs: Registers,
    /// FS base.
    pub fs_base: u64,
    /// GS base.
    pub gs_base: u64,
    /// x87, SSE and AVX state.
    pub fpu: Box<[u8; FPU_BYTES]>,
    /// Bytes put into data pages first: guest-physical address and bytes.
    pub data: Vec<(Gpa, Vec<u8>)>,
}

/// Which areas a case uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Area {
    code: u64,
    data: u64,
}

/// The guest-physical address of code, by its linear address.
#[must_use]
pub fn code_gpa(gva: u64) -> Option<Gpa> {
    let areas = [(LOW, KERNEL_CODE), (HIGH, KERNEL_CODE), (USER, USER_CODE)];
    areas
        .into_iter()
        .find(|(start, _)| gva.wrapping_sub(*start) < CODE_PAGES * PAGE_SIZE)
        .map(|(start, gpa)| gpa.offset(gva - start))
}

/// The guest-physical address of data that is RAM, by its linear address.
#[must_use]
pub fn data_gpa(gva: u64) -> Option<Gpa> {
    let start = [LOW, HIGH].map(|area| area + DATA_OFFSET);
    let offset = start.map(|start| gva.wrapping_sub(start));
    let offset = offset.into_iter().find(|offset| *offset < PAGES.len() as u64 * PAGE_SIZE)?;
    Some(data_page(offset / PAGE_SIZE)?.offset(offset % PAGE_SIZE))
}

/// Values at the edges of the integer types.
const EDGES: [u64; 18] = [
    0,
    1,
    2,
    7,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_fff0,
    u64::MAX,
];

impl Case {
    /// A case of the form `code` at CPL 0 or 3; `None` if none was found.
    #[must_use]
    pub fn generate(code: Code, cpl: u8, vendor: Vendor, rng: &mut Rng) -> Option<Self> {
        (0..32).find_map(|_| attempt(code, cpl, vendor, rng))
    }

    /// A case of `bytes` with every register 0 but RSP, and RBX and RBP, which are `address`.
    #[must_use]
    pub fn plain(bytes: &[u8], cpl: u8, flags: u64, address: u64) -> Self {
        let site = if cpl == 0 { HIGH } else { USER } + PAGE_SIZE;
        let instruction = forms::decode(bytes, site, Vendor::Intel);
        let mut fpu = Box::new([0; FPU_BYTES]);
        fpu[0..2].copy_from_slice(&0x037f_u16.to_le_bytes());
        fpu[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Self {
            code: instruction.code(),
            bytes: bytes.to_vec(),
            instruction,
            site,
            cpl,
            regs: Registers {
                rbx: address,
                rbp: address,
                rsp: LOW + DATA_OFFSET + 2 * PAGE_SIZE + 0x800,
                rip: site,
                rflags: rflags::FIXED | flags,
                ..Registers::default()
            },
            fs_base: 0,
            gs_base: 0,
            fpu,
            data: Vec::new(),
        }
    }

    /// The linear address behind the instruction.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.site + self.bytes.len() as u64
    }

    /// The guest-physical address of the instruction.
    #[must_use]
    pub fn gpa(&self) -> Gpa {
        // `attempt` places every case in an area.
        code_gpa(self.site).unwrap_or(KERNEL_CODE)
    }
}

fn attempt(code: Code, cpl: u8, vendor: Vendor, rng: &mut Rng) -> Option<Case> {
    let bytes = forms::encode(code, vendor, rng)?;
    let area = match cpl {
        0 if one_in(rng, 3) => Area { code: LOW, data: LOW + DATA_OFFSET },
        0 => Area { code: HIGH, data: HIGH + DATA_OFFSET },
        _ => Area { code: USER, data: LOW + DATA_OFFSET },
    };
    let site = place_code(area, bytes.len() as u64, rng);
    let mut case = Case {
        code,
        instruction: forms::decode(&bytes, site, vendor),
        bytes,
        site,
        cpl,
        regs: registers(area, rng),
        fs_base: 0,
        gs_base: 0,
        fpu: fpu(rng),
        data: Vec::new(),
    };
    case.regs.rip = site;
    case.regs.rflags = flags(cpl, rng);
    for base in [&mut case.fs_base, &mut case.gs_base] {
        *base = if rng.bool() { 0 } else { pick(rng, &[0x1000, LOW, HIGH, 0xffff_8000_0000_0000]) };
    }
    tame_registers(&mut case, rng);
    let mut factory = InstructionInfoFactory::new();
    let used: Vec<UsedMemory> = factory.info(&case.instruction).used_memory().to_vec();
    for memory in &used {
        aim(&mut case, memory, area, vendor, rng);
    }
    aim_branch(&mut case, area, vendor, rng);
    // The address of data may have been put into the instruction.
    (case.instruction.code() == code && !runs_into_itself(&case)).then_some(case)
}

/// In the middle of a page, across a page edge, or up to it.
fn place_code(area: Area, length: u64, rng: &mut Rng) -> u64 {
    let edge = area.code + 2 * PAGE_SIZE;
    match rng.u32(0..8) {
        0 if length > 1 => edge - rng.u64(1..length),
        1 => edge - length,
        _ => area.code + PAGE_SIZE + 0x800 + rng.u64(0..64),
    }
}

fn registers(area: Area, rng: &mut Rng) -> Registers {
    let mut value = || match rng.u32(0..8) {
        0..3 => pick(rng, &EDGES),
        3 => area.data + PAGE_SIZE + rng.u64(0..64) * 8,
        4 => rng.u64(..) >> rng.u32(0..64),
        _ => rng.u64(..),
    };
    Registers {
        rax: value(),
        rbx: value(),
        rcx: value(),
        rdx: value(),
        rsi: value(),
        rdi: value(),
        rsp: area.data + 2 * PAGE_SIZE + 0x800,
        rbp: value(),
        r8: value(),
        r9: value(),
        r10: value(),
        r11: value(),
        r12: value(),
        r13: value(),
        r14: value(),
        r15: value(),
        rip: 0,
        rflags: 0,
    }
}

/// IF stays clear: no interrupt is to come at one run and not at the other. TF is rare: most cases are to show the instruction
/// without the guest's own #DB behind it.
fn flags(cpl: u8, rng: &mut Rng) -> u64 {
    let mut flags = rflags::FIXED | rng.u64(..) & rflags::ARITHMETIC;
    let mut rarely = |rng: &mut Rng, n, flag| {
        if one_in(rng, n) {
            flags |= flag;
        }
    };
    rarely(rng, 4, rflags::DF);
    rarely(rng, 8, rflags::AC);
    rarely(rng, 8, rflags::IOPL);
    rarely(rng, 8, rflags::ID);
    rarely(rng, 16, rflags::TF);
    if cpl == 3 {
        rarely(rng, 16, rflags::NT);
    }
    flags
}

/// Registers with a meaning of their own to some instructions get values that let these do something.
fn tame_registers(case: &mut Case, rng: &mut Rng) {
    let instruction = case.instruction;
    let repeats = instruction.is_string_instruction()
        && (instruction.has_rep_prefix() || instruction.has_repne_prefix());
    if repeats && !one_in(rng, 6) {
        case.regs.rcx = pick(rng, &[0, 1, 2, 3, 5, 16, 70]) | if one_in(rng, 8) { 1 << 32 } else { 0 };
    }
    match instruction.mnemonic() {
        Mnemonic::Div | Mnemonic::Idiv if !one_in(rng, 4) => {
            case.regs.rdx = if rng.bool() { 0 } else { u64::MAX };
            case.regs.rax = rng.u64(..) >> rng.u32(0..64);
        }
        Mnemonic::In
        | Mnemonic::Out
        | Mnemonic::Insb
        | Mnemonic::Insw
        | Mnemonic::Insd
        | Mnemonic::Outsb
        | Mnemonic::Outsw
        | Mnemonic::Outsd => {
            // A port where no device is; the machine's own would answer, or end the run.
            case.regs.rdx = case.regs.rdx & !0xffff | 0xe0;
            if instruction.op_count() > 1 {
                for operand in 0..2 {
                    if instruction.op_kind(operand) == OpKind::Immediate8 {
                        set_immediate(case, 0xe0, Vendor::Intel);
                    }
                }
            }
        }
        Mnemonic::Rdmsr | Mnemonic::Wrmsr | Mnemonic::Rdmsrlist | Mnemonic::Wrmsrlist => {
            // LSTAR, KERNEL_GS_BASE, SYSENTER_EIP, and one that does not exist.
            case.regs.rcx = pick(rng, &[0xc000_0082, 0xc000_0102, 0x176, 0x9999_0000]);
        }
        Mnemonic::Xgetbv | Mnemonic::Xsetbv => case.regs.rcx = pick(rng, &[0, 0, 1, 2, 0x7fff_ffff]),
        Mnemonic::Rdpmc => case.regs.rcx = pick(rng, &[0, 1, 0x4000_0000, 0x7777_7777]),
        Mnemonic::Cpuid => case.regs.rax = pick(rng, &[0, 1, 7, 0x8000_0000, 0x8000_0001]),
        _ => {}
    }
}

/// x87 state with some registers full, SSE and AVX registers with floats and integers, exceptions masked or not.
fn fpu(rng: &mut Rng) -> Box<[u8; FPU_BYTES]> {
    const FLOATS: [u32; 12] = [
        0,
        0x8000_0000,
        0x3f80_0000,
        0xbf80_0000,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x7f80_0001,
        0x0000_0001,
        0x007f_ffff,
        0x7f7f_ffff,
        0x4b00_0001,
    ];
    let mut area = Box::new([0; FPU_BYTES]);
    let control: u16 = if one_in(rng, 8) { 0x0340 | rng.u16(0..64) } else { 0x037f };
    let top = rng.u16(0..8);
    area[0..2].copy_from_slice(&control.to_le_bytes());
    area[2..4].copy_from_slice(&(top << 11 | rng.u16(..) & 0x4700).to_le_bytes());
    area[4] = if rng.bool() { 0 } else { rng.u8(..) };
    let mxcsr: u32 = match rng.u32(0..8) {
        0 => rng.u32(0..0x40) << 7,
        1 => 0x1f80 | rng.u32(0..4) << 13 | 0x8040,
        _ => 0x1f80,
    };
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for register in area[32..160].chunks_exact_mut(16) {
        // An extended-precision number: mantissa with its leading one, then sign and exponent.
        let exponent = pick(rng, &[0u16, 0x3fff, 0x3ffe, 0x4010, 0x7fff, 0xbfff]);
        let mantissa = if one_in(rng, 4) { rng.u64(..) } else { 1 << 63 | rng.u64(..) };
        register[..8].copy_from_slice(&mantissa.to_le_bytes());
        register[8..10].copy_from_slice(&exponent.to_le_bytes());
    }
    let vectors = [160..416, 576..832];
    for range in vectors {
        for register in area[range].chunks_exact_mut(16) {
            let floats = rng.bool();
            for lane in register.chunks_exact_mut(4) {
                let value = if floats { pick(rng, &FLOATS) } else { rng.u32(..) };
                lane.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    // XSTATE_BV: x87, SSE and AVX are not in their initial state.
    area[512] = 7;
    area
}

/// Where a memory operand of `size` bytes goes.
fn place_data(area: Area, size: u64, rng: &mut Rng) -> u64 {
    let page = |index: u64| area.data + index * PAGE_SIZE;
    let size = size.clamp(1, 64);
    let middle = rng.u64(4..40) * 64;
    match rng.u32(0..32) {
        // Within a page, aligned and not.
        0..12 => page(1 + rng.u64(0..2)) + middle,
        12..16 => page(1) + middle + rng.u64(1..64),
        // Across the edge between two writable pages, and up to it.
        16..19 => page(2) - rng.u64(1..size.max(2)),
        19 => page(2) - size,
        // Not writable; into such a page.
        20 | 21 => page(3) + middle,
        22 => page(3) - rng.u64(1..size.max(2)),
        // Supervisor, executable, absent, partly absent at either end.
        23 | 24 => page(4) + middle,
        25 => page(5) + middle,
        26 => page(0) + middle,
        27 => page(1) - rng.u64(1..size.max(2)),
        28 => page(6) - rng.u64(1..size.max(2)),
        29 => page(7) + middle,
        30 => pick(rng, &[0x8000_0000_0000_0000, 0x0000_8000_0000_0000, 0xffff_7fff_ffff_fff8]),
        _ => pick(rng, &[0, 8, u64::MAX - 7, 0x0000_7fff_ffff_fffc]),
    }
}

/// Changes registers, or the displacement, so that an access goes where [`place_data`] says.
fn aim(case: &mut Case, memory: &UsedMemory, area: Area, vendor: Vendor, rng: &mut Rng) {
    let size = memory.memory_size().size().max(1) as u64;
    let segment_base = match memory.segment() {
        Register::FS => case.fs_base,
        Register::GS => case.gs_base,
        _ => 0,
    };
    let target = place_data(area, size, rng);
    let offset = target.wrapping_sub(segment_base);
    let (base, index) = (memory.base(), memory.index());
    if index.is_vector_register() {
        small_indexes(case, index, rng);
    }
    let index_value = case.regs.full_mut(index).map_or(0, |value| *value);
    let scaled = index_value.wrapping_mul(u64::from(memory.scale().to_le_bytes()[0]));
    if matches!(base, Register::RIP | Register::EIP) || base == Register::None && index == Register::None {
        set_displacement(case, target, segment_base, vendor);
    } else if base.full_register() == index.full_register() {
        // Base and index at once: the address is what it is.
    } else if let Some(register) = case.regs.full_mut(base) {
        *register = offset.wrapping_sub(scaled).wrapping_sub(memory.displacement());
    } else if base == Register::None
        && let Some(register) = case.regs.full_mut(index)
    {
        *register =
            offset.wrapping_sub(memory.displacement()) / u64::from(memory.scale().to_le_bytes()[0].max(1));
    }
    if memory.access() != OpAccess::Write
        && matches!(
            case.instruction.mnemonic(),
            Mnemonic::Cmpxchg | Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b
        )
        && rng.bool()
    {
        // The comparison succeeds.
        let (low, high) = (case.regs.rax.to_le_bytes(), case.regs.rdx.to_le_bytes());
        let half = if case.instruction.mnemonic() == Mnemonic::Cmpxchg8b { 4 } else { 8 };
        let mut expected = [&low[..half], &high[..half]].concat();
        expected.truncate(usize::try_from(size).unwrap_or_default());
        poke(case, target, &expected);
    }
}

/// Puts bytes at a linear address of the data, as far as RAM is there.
fn poke(case: &mut Case, gva: u64, bytes: &[u8]) {
    for (at, byte) in (gva..=u64::MAX).zip(bytes) {
        if let Some(gpa) = data_gpa(at) {
            case.data.push((gpa, vec![*byte]));
        }
    }
}

/// A vector register of indexes: small ones, so that most elements hit data.
fn small_indexes(case: &mut Case, index: Register, rng: &mut Rng) {
    let number = index.number() % 16;
    for half in [160 + 16 * number, 576 + 16 * number] {
        for lane in case.fpu[half..half + 16].chunks_exact_mut(8) {
            lane.copy_from_slice(&rng.u64(0..64).to_le_bytes());
        }
    }
}

/// Puts `target` into the displacement of an operand without registers, as far as it reaches.
fn set_displacement(case: &mut Case, target: u64, segment_base: u64, vendor: Vendor) {
    let mut decoder = Decoder::with_ip(64, &case.bytes, case.site, vendor.decoder_options());
    let instruction = decoder.decode();
    let offsets = decoder.get_constant_offsets(&instruction);
    let offset = target.wrapping_sub(segment_base);
    let value =
        if instruction.is_ip_rel_memory_operand() { offset.wrapping_sub(case.next()) } else { offset };
    if offsets.has_displacement() {
        let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
        case.bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        case.instruction = forms::decode(&case.bytes, case.site, vendor);
    }
}

/// Replaces an immediate, a branch displacement included.
fn set_immediate(case: &mut Case, value: u64, vendor: Vendor) {
    let mut decoder = Decoder::with_ip(64, &case.bytes, case.site, vendor.decoder_options());
    let instruction = decoder.decode();
    let offsets = decoder.get_constant_offsets(&instruction);
    if offsets.has_immediate() {
        let (at, size) = (offsets.immediate_offset(), offsets.immediate_size());
        case.bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        case.instruction = forms::decode(&case.bytes, case.site, vendor);
    }
}

/// Gives a branch somewhere to go.
fn aim_branch(case: &mut Case, area: Area, vendor: Vendor, rng: &mut Rng) {
    let instruction = case.instruction;
    let target = match rng.u32(0..8) {
        0..5 => area.code + rng.u64(0..CODE_PAGES * PAGE_SIZE),
        5 => area.data + PAGE_SIZE + 0x100,
        6 => area.data + rng.u64(0..8) * PAGE_SIZE,
        _ => pick(rng, &[0, 0x0000_7fff_ffff_ffff, 0x8000_0000_0000_0000, 0x0000_8000_0000_0000]),
    };
    match instruction.flow_control() {
        FlowControl::UnconditionalBranch
        | FlowControl::ConditionalBranch
        | FlowControl::Call
        | FlowControl::XbeginXabortXend
            if instruction.is_jcc_short_or_near()
                || instruction.op0_kind() == OpKind::NearBranch64
                || instruction.op0_kind() == OpKind::NearBranch16 =>
        {
            let short = target.wrapping_sub(case.next());
            set_immediate(case, if one_in(rng, 4) { rng.u64(..) } else { short }, vendor);
        }
        FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return => {
            if let Some(register) = case.regs.full_mut(instruction.op0_register()) {
                *register = target;
            } else {
                aim_through_memory(case, target, rng);
            }
        }
        FlowControl::UnconditionalBranch | FlowControl::Call => aim_through_memory(case, target, rng),
        _ => {}
    }
    if matches!(
        instruction.mnemonic(),
        Mnemonic::Sysret | Mnemonic::Sysretq | Mnemonic::Sysexit | Mnemonic::Sysexitq
    ) {
        case.regs.rcx = target;
        case.regs.rdx = target;
    }
}

/// Puts a target, and for far transfers and IRET what goes with it, where the instruction reads it.
fn aim_through_memory(case: &mut Case, target: u64, rng: &mut Rng) {
    let instruction = case.instruction;
    let regs = case.regs;
    let (fs_base, gs_base) = (case.fs_base, case.gs_base);
    let operand = (instruction.op0_kind() == OpKind::Memory).then(|| {
        instruction.virtual_address(0, 0, |register, _, _| match register {
            Register::FS => Some(fs_base),
            Register::GS => Some(gs_base),
            _ if register.is_segment_register() => Some(0),
            _ => read(&regs, register),
        })
    });
    let at = operand.flatten().unwrap_or(regs.rsp);
    let selectors = [
        0,
        KERNEL_CODE_64,
        USER_CODE_64,
        USER_CODE_64,
        KERNEL_CODE_32,
        USER_CODE_32,
        KERNEL_DATA,
        USER_DATA,
        0x77,
    ];
    let own = if case.cpl == 0 { KERNEL_CODE_64 } else { USER_CODE_64 };
    let selector = if rng.bool() { own } else { pick(rng, &selectors) };
    let stack = if case.cpl == 0 && selector == KERNEL_CODE_64 { KERNEL_DATA } else { USER_DATA };
    let frame = [
        target,
        u64::from(selector),
        rflags::FIXED | rng.u64(..) & (rflags::ARITHMETIC | rflags::DF | rflags::AC),
        case.regs.rsp.wrapping_add(0x40) & !0xf,
        u64::from(stack),
    ];
    let width = match instruction.code() {
        Code::Iretw | Code::Retfw | Code::Retfw_imm16 | Code::Jmp_m1616 | Code::Call_m1616 => 2,
        Code::Iretd | Code::Retfd | Code::Retfd_imm16 | Code::Jmp_m1632 | Code::Call_m1632 => 4,
        _ => 8,
    };
    let words = match instruction.mnemonic() {
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => 5,
        Mnemonic::Retf => 4,
        _ if instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect() => 2,
        _ => 1,
    };
    // RETF takes RSP and SS directly behind CS.
    let skip = usize::from(instruction.mnemonic() == Mnemonic::Retf);
    let frame = frame.into_iter().enumerate().filter(|(index, _)| skip == 0 || *index != 2);
    let bytes: Vec<u8> =
        frame.take(words).flat_map(|(_, word)| word.to_le_bytes()[..width].to_vec()).collect();
    poke(case, at, &bytes);
}

/// A branch to itself never ends, and one into itself, or into the int3 that stands there when probed, cannot be compared.
fn runs_into_itself(case: &Case) -> bool {
    let instruction = &case.instruction;
    // Of a 16-bit target an emulator of AMD's CPUs may keep the upper bits.
    let mask = match instruction.op0_kind() {
        OpKind::NearBranch64 => u64::MAX,
        OpKind::NearBranch16 => 0xffff,
        _ => return false,
    };
    let target = instruction.near_branch_target() & mask;
    (case.site..case.next()).any(|own| own & mask == target)
}

/// A general-purpose register as an address computation reads it.
fn read(regs: &Registers, wanted: Register) -> Option<u64> {
    let full = *{ *regs }.full_mut(wanted)?;
    Some(if wanted.size() == 4 { full & 0xffff_ffff } else { full })
}

/// What `page` holds where memory can be read, for the report.
#[must_use]
pub fn page_of(gva: u64) -> Option<Page> {
    let offset = [LOW, HIGH].map(|area| gva.wrapping_sub(area + DATA_OFFSET)).into_iter().min()?;
    PAGES.get(usize::try_from(offset / PAGE_SIZE).ok()?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases(code: Code, cpl: u8) -> Vec<Case> {
        let mut rng = Rng::with_seed(3);
        (0..200).filter_map(|_| Case::generate(code, cpl, Vendor::Amd, &mut rng)).collect()
    }

    #[test]
    fn a_seed_gives_the_same_cases_again() {
        let text = |cases: Vec<Case>| format!("{cases:?}");
        assert_eq!(text(cases(Code::Add_rm64_r64, 0)), text(cases(Code::Add_rm64_r64, 0)));
    }

    #[test]
    fn operands_hit_every_kind_of_page_at_every_address_form() {
        let mut seen = std::collections::BTreeSet::new();
        for case in cases(Code::Add_rm64_r64, 0) {
            let Some(gva) = case.instruction.virtual_address(0, 0, |register, _, _| match register {
                Register::FS => Some(case.fs_base),
                Register::GS => Some(case.gs_base),
                _ if register.is_segment_register() => Some(0),
                _ => read(&case.regs, register),
            }) else {
                continue;
            };
            seen.insert(format!("{:?}", page_of(gva)));
        }
        for page in [Page::Absent, Page::Writable, Page::ReadOnly, Page::Supervisor] {
            assert!(seen.contains(&format!("{:?}", Some(page))), "{page:?} of {seen:?}");
        }
    }

    #[test]
    fn code_stands_in_pages_and_across_their_edges() {
        let cases = cases(Code::Add_rm64_r64, 3);
        let crossing =
            cases.iter().filter(|case| case.site / PAGE_SIZE != (case.next() - 1) / PAGE_SIZE).count();
        let ending = cases.iter().filter(|case| case.next() % PAGE_SIZE == 0).count();
        assert!(crossing > 5 && ending > 5 && crossing + ending < cases.len() / 2);
        assert!(cases.iter().all(|case| code_gpa(case.site).is_some() && case.cpl == 3));
    }

    #[test]
    fn no_case_branches_into_itself() {
        for code in [Code::Jmp_rel8_64, Code::Je_rel8_64, Code::Loop_rel8_64_RCX] {
            assert!(cases(code, 0).iter().all(|case| !runs_into_itself(case)));
        }
    }
}
