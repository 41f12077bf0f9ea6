//! The guest: descriptor tables, page tables, and stubs that are all it has of a program.
//!
//! Every stub ends in an int3, which stops at the host; the host puts RIP to the next one. Each exception handler is a NOP
//! and an int3: the host reads vector, error code and frame from where it stopped. All code pages around a case are
//! filled with int3, so wherever an instruction goes on, the guest stops there.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, ax, dr0, dr1, dr2, dr3, dr6, dr7, ds, dword_ptr, eax, ebx, ecx, edx, es, fs, gs, ptr,
    qword_ptr, rax, rdx, ss, word_ptr,
};
use probe_core::{Gpa, MemoryError, PAGE_SIZE, PhysicalMemory};
use vmm::boot::KernelSegment;

use crate::layout::{
    CODE_BYTES, CODE_PAGES, CPUID, DATA_OFFSET, EXCEPTION_STACK, FPU_AFTER, FPU_BEFORE, GDT, GDT_DESCRIPTOR,
    HANDLER_BYTES, HANDLERS, HARNESS_END, HIGH, IDT, IDT_DESCRIPTOR, KERNEL_CODE, KERNEL_DATA, KERNEL_STACK,
    LOW, PAGES, Page, RAX, RDX, STUBS, SYSTEM, TABLES, TABLES_END, TASK, TSS, USER, USER_CODE, USER_DATA,
    data_page,
};

/// The breakpoint instruction.
pub const INT3: u8 = 0xcc;

/// Where the stubs begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stubs {
    /// Loads descriptor tables, segments, the task, MSRs and debug registers, and asks CPUID.
    pub reset: u64,
    /// Sets XCR0 to x87, SSE and, where EAX says so, AVX.
    pub enable_xsave: u64,
    /// Loads the vector state with FXRSTOR and leaves through IRETQ.
    pub enter: u64,
    /// The same with XRSTOR; EDX:EAX come from memory afterwards.
    pub enter_xsave: u64,
    /// Stores the vector state with FXSAVE.
    pub save: u64,
    /// The same with XSAVE.
    pub save_xsave: u64,
    /// Stores segment registers, descriptor tables, debug registers and some MSRs.
    pub system: u64,
    /// Where SYSCALL goes.
    pub syscall: u64,
}

/// Selectors, limits and bases of the descriptors, as the CPU packs them (Intel SDM vol. 3A, 3.4.5).
pub(crate) const DESCRIPTORS: [u64; 7] = [
    0,
    // KERNEL_CODE_32, KERNEL_CODE_64, KERNEL_DATA.
    0x00cf_9b00_0000_ffff,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    // USER_CODE_32, USER_DATA, USER_CODE_64.
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
];

const TSS_LIMIT: u64 = 103;

/// The task's descriptor, not busy.
const TASK_DESCRIPTOR: u64 = TSS_LIMIT | (TSS & 0xff_ffff) << 16 | 0x89 << 40 | (TSS >> 24 & 0xff) << 56;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER_BIT: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NO_EXECUTE: u64 = 1 << 63;

/// A guest-physical address with no memory behind it.
const NO_MEMORY: u64 = 0xc800_0000;

/// The guest's memory and its stubs.
#[derive(Clone, Debug)]
pub struct Guest {
    /// Where the stubs are.
    pub stubs: Stubs,
    pieces: Vec<(u64, Vec<u8>)>,
}

impl Guest {
    /// Assembles the guest.
    ///
    /// # Errors
    /// If a stub cannot be assembled, which would be a bug.
    pub fn new() -> Result<Self, IcedError> {
        let (stubs, code) = stubs()?;
        let mut pieces = vec![(STUBS, code)];
        pieces.extend(descriptor_tables());
        pieces.push((TABLES, page_tables()));
        let filler = vec![INT3; CODE_BYTES];
        pieces.push((KERNEL_CODE.0, filler.clone()));
        pieces.push((USER_CODE.0, filler));
        Ok(Self { stubs, pieces })
    }

    /// What is loaded where.
    #[must_use]
    pub fn segments(&self) -> Vec<KernelSegment<'_>> {
        let segment = |(gpa, data): &'_ (u64, Vec<u8>)| (Gpa(*gpa), data.len() as u64);
        let pieces = self.pieces.iter();
        pieces
            .map(|piece| {
                let (gpa, mem_size) = segment(piece);
                KernelSegment { gpa, data: &piece.1, mem_size }
            })
            .collect()
    }

    /// Puts descriptor tables back that instructions may have changed, so that the reset stub can run.
    ///
    /// # Errors
    /// None in practice: the tables are RAM.
    pub fn restore_descriptors(&self, memory: &dyn PhysicalMemory) -> Result<(), MemoryError> {
        for (gpa, data) in descriptor_tables() {
            memory.write(Gpa(gpa), &data)?;
        }
        Ok(())
    }
}

fn assemble(
    at: u64,
    build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<Vec<u8>, IcedError> {
    let mut assembler = CodeAssembler::new(64)?;
    build(&mut assembler)?;
    assembler.int3()?;
    assembler.assemble(at)
}

fn stubs() -> Result<(Stubs, Vec<u8>), IcedError> {
    let mut code: Vec<u8> = Vec::new();
    let mut add = |build: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let at = STUBS + code.len() as u64;
        code.extend(assemble(at, build)?);
        // No int3 may stand where a stub begins: the host tells stubs by where they stop.
        Ok::<u64, IcedError>(at)
    };
    let syscall = add(&|a| a.nop())?;
    let reset = add(&|a| reset(a, syscall))?;
    let enable_xsave = add(&|a| {
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.xsetbv()
    })?;
    let enter = add(&|a| {
        a.fxrstor64(ptr(FPU_BEFORE))?;
        a.iretq()
    })?;
    let enter_xsave = add(&|a| {
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xrstor64(ptr(FPU_BEFORE))?;
        a.mov(rax, qword_ptr(RAX))?;
        a.mov(rdx, qword_ptr(RDX))?;
        a.iretq()
    })?;
    let save = add(&|a| a.fxsave64(ptr(FPU_AFTER)))?;
    let save_xsave = add(&|a| {
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xsave64(ptr(FPU_AFTER))
    })?;
    let system = add(&store_system)?;
    Ok((Stubs { reset, enable_xsave, enter, enter_xsave, save, save_xsave, system, syscall }, code))
}

/// MSRs that instructions use, with what the reset stub puts there: STAR, LSTAR, CSTAR, SFMASK, KERNEL_GS_BASE, SYSENTER_CS,
/// SYSENTER_ESP, SYSENTER_EIP.
fn msrs(syscall: u64) -> [(u32, u64); 8] {
    let star = 0x20 << 48 | 0x10 << 32;
    [
        (0xc000_0081, star),
        (0xc000_0082, syscall),
        (0xc000_0083, syscall),
        (0xc000_0084, 0x4_0700),
        (0xc000_0102, 0xffff_8880_0000_1000),
        (0x174, 0x10),
        (0x175, KERNEL_STACK),
        (0x176, syscall),
    ]
}

fn reset(a: &mut CodeAssembler, syscall: u64) -> Result<(), IcedError> {
    a.lgdt(ptr(GDT_DESCRIPTOR))?;
    a.lidt(ptr(IDT_DESCRIPTOR))?;
    a.mov(eax, u32::from(USER_DATA))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(fs, eax)?;
    a.mov(gs, eax)?;
    a.mov(eax, u32::from(KERNEL_DATA))?;
    a.mov(ss, eax)?;
    a.mov(eax, u32::from(TASK))?;
    a.ltr(ax)?;
    a.xor(eax, eax)?;
    a.lldt(ax)?;
    a.mov(dr0, rax)?;
    a.mov(dr1, rax)?;
    a.mov(dr2, rax)?;
    a.mov(dr3, rax)?;
    a.mov(eax, 0xffff_0ff0_u32)?;
    a.mov(dr6, rax)?;
    a.mov(eax, 0x400)?;
    a.mov(dr7, rax)?;
    for (index, value) in msrs(syscall) {
        let [low, high] = halves(value);
        a.mov(ecx, index)?;
        a.mov(eax, low)?;
        a.mov(edx, high)?;
        a.wrmsr()?;
    }
    a.xor(eax, eax)?;
    a.cpuid()?;
    a.mov(dword_ptr(CPUID), ebx)?;
    a.mov(eax, 1)?;
    a.cpuid()?;
    a.mov(dword_ptr(CPUID + 4), ecx)?;
    a.mov(eax, 7)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    a.mov(dword_ptr(CPUID + 8), ebx)
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// GDTR, IDTR, segment selectors, TR, LDTR, DR0-3, DR6, DR7, then the MSRs.
fn store_system(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.sgdt(ptr(SYSTEM))?;
    a.sidt(ptr(SYSTEM + 0x10))?;
    for (index, segment) in (0..).zip([ds, es, fs, gs, ss]) {
        a.mov(word_ptr(SYSTEM + 0x20 + 2 * index), segment)?;
    }
    a.str(word_ptr(SYSTEM + 0x2a))?;
    a.sldt(word_ptr(SYSTEM + 0x2c))?;
    for (index, register) in (0..).zip([dr0, dr1, dr2, dr3, dr6, dr7]) {
        a.mov(rax, register)?;
        a.mov(qword_ptr(SYSTEM + 0x30 + 8 * index), rax)?;
    }
    for (index, (msr, _)) in (0..).zip(msrs(0)) {
        a.mov(ecx, msr)?;
        a.rdmsr()?;
        a.mov(dword_ptr(SYSTEM + 0x60 + 8 * index), eax)?;
        a.mov(dword_ptr(SYSTEM + 0x64 + 8 * index), edx)?;
    }
    Ok(())
}

fn words(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// GDT, IDT, TSS, handlers and the operands of LGDT and LIDT.
fn descriptor_tables() -> Vec<(u64, Vec<u8>)> {
    let mut gdt = DESCRIPTORS.to_vec();
    // The task's selector is 0x40; its descriptor is 16 bytes long.
    gdt.extend([0, TASK_DESCRIPTOR, TSS >> 32]);
    let idt = (0..256).flat_map(|vector| {
        let target = HANDLERS + HANDLER_BYTES * vector;
        // Interrupt gate on IST 1; INT3, INTO and INT 0x80 may come from CPL 3 (Intel SDM vol. 3A, 6.14.1).
        let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
        let access = 0x8e00 | dpl << 13 | 1;
        [target & 0xffff | 0x10 << 16 | access << 32 | (target >> 16 & 0xffff) << 48, target >> 32]
    });
    let mut tss = vec![0; usize::from(TSS_LIMIT.to_le_bytes()[0]) + 1];
    tss[4..12].copy_from_slice(&KERNEL_STACK.to_le_bytes());
    tss[36..44].copy_from_slice(&EXCEPTION_STACK.to_le_bytes());
    // The I/O permission bitmap begins behind the limit: no port at CPL 3 without IOPL.
    tss[102..104].copy_from_slice(&104u16.to_le_bytes());
    let handler = [[0x90, INT3].as_slice(), &[0x90; 14]].concat();
    let descriptor = |limit: u16, base: u64| [limit.to_le_bytes().as_slice(), &base.to_le_bytes()].concat();
    vec![
        (GDT, words(gdt)),
        (IDT, words(idt)),
        (TSS, tss),
        (HANDLERS, handler.repeat(256)),
        (GDT_DESCRIPTOR, descriptor(10 * 8 - 1, GDT)),
        (IDT_DESCRIPTOR, descriptor(0xfff, IDT)),
    ]
}

/// Four levels of page tables, built by walking and adding.
struct Tables {
    memory: Vec<u64>,
    used: usize,
}

impl Tables {
    const ENTRIES: usize = 512;

    fn map(&mut self, gva: u64, entry: u64) {
        let mut table = 0;
        for level in (1..4).rev() {
            let at = table * Self::ENTRIES + Self::index(gva, level);
            if self.memory[at] == 0 {
                self.memory[at] =
                    (TABLES + self.used as u64 * PAGE_SIZE) | PRESENT | WRITABLE | USER_BIT | ACCESSED;
                self.used += 1;
            }
            let next = ((self.memory[at] & 0x000f_ffff_ffff_f000) - TABLES) / PAGE_SIZE;
            table = usize::try_from(next).unwrap_or_default();
        }
        self.memory[table * Self::ENTRIES + Self::index(gva, 0)] = entry;
    }

    fn index(gva: u64, level: u32) -> usize {
        usize::try_from(gva >> (12 + 9 * level) & 0x1ff).unwrap_or_default()
    }
}

fn page_tables() -> Vec<u8> {
    let pages = usize::try_from((TABLES_END - TABLES) / PAGE_SIZE).unwrap_or_default();
    let mut tables = Tables { memory: vec![0; pages * Tables::ENTRIES], used: 1 };
    let ready = PRESENT | ACCESSED | DIRTY;
    for gva in (STUBS..HARNESS_END).step_by(4096) {
        tables.map(gva, gva | ready | WRITABLE);
    }
    for (start, code, user) in [(LOW, KERNEL_CODE, 0), (HIGH, KERNEL_CODE, 0), (USER, USER_CODE, USER_BIT)] {
        for page in 0..CODE_PAGES {
            tables.map(start + page * PAGE_SIZE, code.offset(page * PAGE_SIZE).0 | ready | user);
        }
    }
    for area in [LOW, HIGH] {
        for (index, page) in (0..).zip(PAGES) {
            let flags = match page {
                Page::Absent => continue,
                Page::Writable | Page::Mmio => WRITABLE | USER_BIT | NO_EXECUTE,
                Page::ReadOnly => USER_BIT | NO_EXECUTE,
                Page::Supervisor => WRITABLE | NO_EXECUTE,
                Page::Executable => WRITABLE | USER_BIT,
            };
            let gpa = data_page(index).map_or(NO_MEMORY, |gpa| gpa.0);
            tables.map(area + DATA_OFFSET + index * PAGE_SIZE, gpa | ready | flags);
        }
    }
    words(tables.memory)
}

#[cfg(test)]
mod tests {
    use probe_core::mock::MockMemory;
    use probe_core::paging::physical;
    use probe_core::{Gva, SystemRegisters, control};

    use super::*;
    use crate::layout::MEMORY;

    #[test]
    fn the_tables_map_what_the_layout_says() {
        let guest = Guest::new().unwrap();
        let memory = MockMemory::default();
        memory.add_ram(Gpa(0), MEMORY);
        for segment in guest.segments() {
            memory.write(segment.gpa, segment.data).unwrap();
        }
        let sys = SystemRegisters {
            cr0: control::CR0_PG | control::CR0_PE | control::CR0_WP,
            cr3: TABLES,
            cr4: control::CR4_PAE,
            efer: control::EFER_LMA | control::EFER_NXE,
            long_code: true,
            ..Default::default()
        };
        let at = |gva| physical(&sys, &memory, Gva(gva));
        assert_eq!(at(STUBS), Some(Gpa(STUBS)));
        assert_eq!(at(HIGH + 0x1005), Some(KERNEL_CODE.offset(0x1005)));
        assert_eq!(at(USER), Some(USER_CODE));
        assert_eq!(at(LOW + DATA_OFFSET), None);
        assert_eq!(at(LOW + DATA_OFFSET + 0x1001), data_page(1).map(|gpa| gpa.offset(1)));
        assert_eq!(at(HIGH + DATA_OFFSET + 0x5000), data_page(5));
        assert_eq!(at(HIGH + DATA_OFFSET + 0x7000), Some(Gpa(NO_MEMORY)));
    }

    #[test]
    fn stubs_fit_their_page_and_begin_with_no_int3() {
        let (stubs, code) = stubs().unwrap();
        assert!(code.len() < 4096, "{}", code.len());
        for at in [stubs.reset, stubs.enter, stubs.save, stubs.system, stubs.syscall] {
            assert_ne!(code[usize::try_from(at - STUBS).unwrap()], INT3);
        }
    }
}
