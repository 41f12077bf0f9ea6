//! A guest as an ELF core file ("vmcore"), which gdb, drgn and crash open.
//!
//! The file is as Linux's own /proc/vmcore (fs/proc/vmcore.c): a note with the registers of each vCPU, one with what the kernel says
//! of itself for such files (VMCOREINFO, Documentation/admin-guide/kdump/vmcoreinfo.rst), the kernel's image at its linear
//! addresses, and each stretch of RAM at its physical ones and at those where the kernel maps all of it. RAM is in the file once, each
//! byte as far behind its stretch's start as in memory.

use probe_core::{Gpa, Gva, PAGE_SIZE, PhysicalMemory, VcpuState, control, paging};

use crate::Guest;
use crate::bytes::u32_at;

/// Where RAM begins without `page_offset_base`, with four levels of page tables (Documentation/arch/x86/x86_64/mm.rst).
const PAGE_OFFSET: u64 = 0xffff_8880_0000_0000;

/// VMCOREINFO is a page at most (VMCOREINFO_BYTES); its note has a header besides.
const MAX_VMCOREINFO: usize = 4096;
const VMCOREINFO: &[u8] = b"VMCOREINFO";

/// Sizes of ELF's structures (System V ABI, "ELF Header", "Program Header", "Note Section").
const FILE_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const NOTE_HEADER: usize = 12;
const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const PF_RWX: u32 = 7;
const NT_PRSTATUS: u32 = 1;

/// Selectors of Linux at CPL 0 and 3 (arch/x86/include/asm/segment.h): code, stack.
const KERNEL_SELECTORS: [u64; 2] = [0x10, 0x18];
const USER_SELECTORS: [u64; 2] = [0x33, 0x2b];

/// A stretch of linear addresses in which physical memory is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mapping {
    gva: Gva,
    gpa: Gpa,
    bytes: u64,
}

/// A core file: what comes before RAM, and where RAM goes.
#[derive(Debug)]
pub struct Vmcore {
    header: Vec<u8>,
    ram: Vec<Ram>,
    /// Whether the guest's own note is in it.
    pub has_vmcoreinfo: bool,
}

/// A stretch of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ram {
    /// Where it is in the guest.
    pub gpa: Gpa,
    /// How long it is.
    pub bytes: u64,
    /// Where it is in the file.
    pub offset: u64,
}

impl Vmcore {
    /// For a guest at rest: the states of its vCPUs, in order, and its RAM as start and length.
    #[must_use]
    pub fn new(guest: &Guest, vcpus: &[VcpuState], memory: &dyn PhysicalMemory, ram: &[(Gpa, u64)]) -> Self {
        let vmcoreinfo = vcpus.first().and_then(|vcpu| guest.vmcoreinfo(vcpu, memory));
        let mut notes = Vec::new();
        for (pid, vcpu) in (1..).zip(vcpus) {
            push_note(&mut notes, b"CORE", NT_PRSTATUS, &prstatus(pid, vcpu));
        }
        if let Some(text) = &vmcoreinfo {
            push_note(&mut notes, VMCOREINFO, 0, text);
        }
        let image = guest.image_mappings().filter(|image| {
            ram.iter().any(|(gpa, bytes)| image.gpa >= *gpa && image.gpa.0 + image.bytes <= gpa.0 + bytes)
        });
        let all = |(gpa, bytes): &(Gpa, u64)| Mapping {
            gva: guest.mapped_at(memory, *gpa),
            gpa: *gpa,
            bytes: *bytes,
        };
        let mappings: Vec<Mapping> = image.chain(ram.iter().map(all)).collect();

        let headers = FILE_HEADER + (1 + mappings.len()) * PROGRAM_HEADER;
        let mut at = (headers + notes.len()) as u64;
        let ram = ram.iter().map(|&(gpa, bytes)| {
            let offset = at.next_multiple_of(PAGE_SIZE);
            at = offset + bytes;
            Ram { gpa, bytes, offset }
        });
        let ram: Vec<Ram> = ram.collect();

        let mut header = file_header(1 + mappings.len());
        push_program_header(&mut header, PT_NOTE, headers as u64, notes.len() as u64, None);
        for mapping in &mappings {
            let place = ram.iter().find(|ram| mapping.gpa.0.wrapping_sub(ram.gpa.0) < ram.bytes);
            let offset = place.map_or(0, |ram| ram.offset + (mapping.gpa.0 - ram.gpa.0));
            push_program_header(&mut header, PT_LOAD, offset, mapping.bytes, Some(mapping));
        }
        header.extend(notes);
        Self { header, ram, has_vmcoreinfo: vmcoreinfo.is_some() }
    }

    /// What the file begins with.
    #[must_use]
    pub fn header(&self) -> &[u8] {
        &self.header
    }

    /// What follows.
    #[must_use]
    pub fn ram(&self) -> &[Ram] {
        &self.ram
    }

    /// How long the file is, bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.ram.last().map_or(self.header.len() as u64, |ram| ram.offset + ram.bytes)
    }
}

impl Guest {
    /// The image where it is mapped.
    fn image_mappings(&self) -> impl Iterator<Item = Mapping> {
        let mapped = |segment: &crate::image::Segment| {
            Some(Mapping { gva: segment.gva?, gpa: segment.gpa, bytes: segment.mem_size })
        };
        let same = |mapping: &Mapping| mapping.gva.0 == mapping.gpa.0;
        // A program that is linked where it is loaded needs no second mention.
        self.image.segments.iter().filter_map(mapped).filter(move |mapping| !same(mapping))
    }

    /// A word of the kernel's that a symbol names.
    fn word(&self, memory: &dyn PhysicalMemory, symbol: &str) -> Option<u64> {
        memory.read_u64(self.image.gva_to_gpa(self.symbols.address(symbol)?)?).ok()
    }

    /// Where the guest sees the physical address `gpa` among all others: Linux in its direct map, another program where it is.
    fn mapped_at(&self, memory: &dyn PhysicalMemory, gpa: Gpa) -> Gva {
        let base = match &self.linux {
            Some(_) => self.word(memory, "page_offset_base").unwrap_or(PAGE_OFFSET),
            None => 0,
        };
        Gva(base).offset(gpa.0)
    }

    /// What the kernel says of itself for core files, once it has booted so far. `vcpu` tells its paging mode.
    fn vmcoreinfo(&self, vcpu: &VcpuState, memory: &dyn PhysicalMemory) -> Option<Vec<u8>> {
        let note = Gva(self.word(memory, "vmcoreinfo_note").filter(|note| *note != 0)?);
        // A vCPU in user mode may have page tables without the kernel's data.
        let root = self.image.gva_to_gpa(self.symbols.address("init_top_pgt")?)?;
        let mut sys = vcpu.sys;
        sys.cr3 = root.0;
        sys.cr0 |= control::CR0_PG;
        let read = |at: Gva, len: usize| {
            let mut bytes = vec![0; len];
            (paging::read_virtual(&sys, memory, at, &mut bytes) == len).then_some(bytes)
        };
        let header = read(note, NOTE_HEADER)?;
        let length =
            |at| usize::try_from(u32_at(&header, at)?).ok().filter(|length| *length <= MAX_VMCOREINFO);
        let (name, text) = (length(0)?, length(4)?);
        let name_at = note.offset(NOTE_HEADER as u64);
        let named = read(name_at, name)?.strip_suffix(&[0]) == Some(VMCOREINFO);
        let text_at = name_at.offset(name.next_multiple_of(4) as u64);
        if named { read(text_at, text) } else { None }
    }
}

/// The file header of a core with so many program headers behind it.
#[allow(
    clippy::cast_possible_truncation,
    reason = "the sizes are constants, and no guest has 65,536 stretches of RAM"
)]
fn file_header(program_headers: usize) -> Vec<u8> {
    // ELFMAG, ELFCLASS64, ELFDATA2LSB, EV_CURRENT.
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    header.extend(ET_CORE.to_le_bytes());
    header.extend(EM_X86_64.to_le_bytes());
    header.extend(1_u32.to_le_bytes());
    // Entry, program headers, section headers.
    for word in [0, FILE_HEADER as u64, 0] {
        header.extend(word.to_le_bytes());
    }
    header.extend(0_u32.to_le_bytes());
    for half in [FILE_HEADER, PROGRAM_HEADER, program_headers, 0, 0, 0] {
        header.extend((half as u16).to_le_bytes());
    }
    header
}

fn push_program_header(out: &mut Vec<u8>, kind: u32, offset: u64, bytes: u64, mapping: Option<&Mapping>) {
    let (gva, gpa, flags) = mapping.map_or((0, 0, 0), |mapping| (mapping.gva.0, mapping.gpa.0, PF_RWX));
    out.extend(kind.to_le_bytes());
    out.extend(flags.to_le_bytes());
    for word in [offset, gva, gpa, bytes, bytes, 0] {
        out.extend(word.to_le_bytes());
    }
}

/// Name and text, each padded to 4 bytes.
fn push_note(out: &mut Vec<u8>, name: &[u8], kind: u32, text: &[u8]) {
    // Both are a page at most.
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(0).to_le_bytes();
    out.extend(length(name.len() + 1));
    out.extend(length(text.len()));
    out.extend(kind.to_le_bytes());
    out.extend(name);
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(text);
    out.resize(out.len().next_multiple_of(4), 0);
}

/// `struct elf_prstatus` (Linux: include/linux/elfcore.h) with a `struct user_regs_struct` (arch/x86/include/asm/user_64.h) in it.
/// Selectors are those of Linux for the vCPU's privilege level.
fn prstatus(pid: u32, vcpu: &VcpuState) -> Vec<u8> {
    const PID: usize = 32;
    const REGISTERS: usize = 112;
    const SIZE: usize = 336;
    let (regs, sys) = (&vcpu.regs, &vcpu.sys);
    let [code, stack] = if sys.cpl == 3 { USER_SELECTORS } else { KERNEL_SELECTORS };
    // No system call under way.
    let orig_rax = u64::MAX;
    let words = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        orig_rax,
        regs.rip,
        code,
        regs.rflags,
        regs.rsp,
        stack,
        sys.fs_base,
        sys.gs_base,
        0,
        0,
        0,
        0,
    ];
    let mut status = vec![0; PID];
    status.extend(pid.to_le_bytes());
    status.resize(REGISTERS, 0);
    status.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    status.resize(SIZE, 0);
    status
}

#[cfg(test)]
mod tests {
    use object::read::elf::{FileHeader, NoteIterator, ProgramHeader};
    use probe_core::Registers;
    use probe_core::mock::{MockMemory, MockPageTables, MockVcpu};
    use probe_core::paging::entry;

    use super::*;
    use crate::image::Image;
    use crate::testing::{Elf, Kernel, RODATA, TEXT, TEXT_GPA};

    type Header = object::elf::FileHeader64<object::LittleEndian>;
    const LE: object::LittleEndian = object::LittleEndian;
    const RAM: u64 = 64 << 20;
    const ROOT: Gpa = Gpa(0x1000);
    const DIRECT: u64 = 0xffff_9000_0000_0000;
    const NOTE: u64 = 0x20_0000;

    fn notes(core: &Vmcore) -> Vec<(Vec<u8>, u32, Vec<u8>)> {
        let header = Header::parse(core.header()).unwrap();
        let segments = header.program_headers(LE, core.header()).unwrap();
        let mut notes: NoteIterator<'_, Header> = segments[0].notes(LE, core.header()).unwrap().unwrap();
        let mut found = Vec::new();
        while let Some(note) = notes.next().unwrap() {
            found.push((note.name().to_vec(), note.n_type(LE).0, note.desc().to_vec()));
        }
        found
    }

    fn loads(core: &Vmcore) -> Vec<[u64; 4]> {
        let header = Header::parse(core.header()).unwrap();
        assert_eq!((header.e_type(LE).0, header.e_machine(LE).0), (ET_CORE, EM_X86_64));
        let segments = header.program_headers(LE, core.header()).unwrap();
        let loads = segments.iter().filter(|segment| segment.p_type(LE) == object::elf::PT_LOAD);
        loads
            .map(|load| {
                assert_eq!(load.p_filesz(LE), load.p_memsz(LE));
                [load.p_vaddr(LE), load.p_paddr(LE), load.p_memsz(LE), load.p_offset(LE)]
            })
            .collect()
    }

    /// A kernel that has booted: its direct map is where it says, and its note lies in it.
    fn linux(text: &[u8]) -> (Guest, MockMemory, VcpuState) {
        let mut kernel = Kernel::default();
        kernel.function("startup_64", &[0xf4]);
        kernel
            .table(".data", |_| [DIRECT, DIRECT + NOTE].iter().flat_map(|word| word.to_le_bytes()).collect());
        kernel.symbol("Dpage_offset_base", RODATA + 64);
        kernel.symbol("Dvmcoreinfo_note", RODATA + 72);
        kernel.table(".top", |_| vec![0; 8192]);
        kernel.symbol("Dinit_top_pgt", RODATA + PAGE_SIZE);
        let guest = Guest::new(Image::parse(kernel.build()).unwrap()).unwrap();
        let memory = MockMemory::with_ram(RAM);
        for segment in &guest.image.segments {
            memory.load(segment.gpa, guest.image.segment_data(segment));
        }
        let mut note = Vec::new();
        push_note(&mut note, VMCOREINFO, 0, text);
        memory.load(Gpa(NOTE), &note);
        let mut tables = MockPageTables::new(&memory, ROOT, 4);
        tables.map(Gva(DIRECT), Gpa(0), 1 << 30, entry::PRESENT);
        let root = guest.image.gva_to_gpa(Gva(RODATA + PAGE_SIZE)).unwrap();
        let state =
            MockVcpu::new(Gpa(0)).regs(|regs| *regs = Registers { rip: TEXT, rsp: 7, ..*regs }).build();
        memory.load(root, &memory.bytes(ROOT, 4096));
        (guest, memory, state)
    }

    #[test]
    fn registers_are_where_debuggers_look_for_them() {
        let state =
            MockVcpu::new(ROOT).rip(Gva(0x1122)).rsp(Gva(0x3344)).regs(|regs| regs.r15 = 0x55).build();
        let status = prstatus(3, &state);
        let word = |at: usize| u64::from_le_bytes(status[at..at + 8].try_into().unwrap());
        assert_eq!(status.len(), 336);
        assert_eq!(u32_at(&status, 32), Some(3));
        assert_eq!(
            [word(112), word(112 + 16 * 8), word(112 + 17 * 8), word(112 + 19 * 8), word(112 + 20 * 8)],
            [0x55, 0x1122, 0x10, 0x3344, 0x18]
        );
        let user = MockVcpu::new(ROOT).cpl(3).build();
        assert_eq!(u32_at(&prstatus(1, &user), 112 + 17 * 8), Some(0x33));
    }

    #[test]
    fn a_bare_metal_core_has_ram_where_the_guest_sees_it() {
        let guest = Guest::new(Image::parse(Elf::bare_metal(0x10_0000, &[0xf4]).build()).unwrap()).unwrap();
        let memory = MockMemory::with_ram(0x20_0000);
        let states = [MockVcpu::new(ROOT).build(); 2];
        let ram = [(Gpa(0), 0x20_0000), (Gpa(4 << 30), 0x1000)];
        let core = Vmcore::new(&guest, &states, &memory, &ram);
        let [low, high] = *core.ram() else { panic!("{core:?}") };
        assert!(low.offset >= core.header().len() as u64 && low.offset.is_multiple_of(PAGE_SIZE));
        assert_eq!((high.offset, core.size()), (low.offset + 0x20_0000, high.offset + 0x1000));
        assert_eq!(loads(&core), [[0, 0, 0x20_0000, low.offset], [4 << 30, 4 << 30, 0x1000, high.offset]]);
        let notes = notes(&core);
        assert_eq!(notes.len(), 2);
        assert!(notes.iter().all(|(name, kind, _)| name == b"CORE" && *kind == NT_PRSTATUS));
        assert!(!core.has_vmcoreinfo);
    }

    #[test]
    fn a_linux_core_has_the_kernels_note_its_image_and_its_direct_map() {
        let (guest, memory, state) = linux(b"OSRELEASE=6.1\nKERNELOFFSET=0\n");
        let core = Vmcore::new(&guest, &[state], &memory, &[(Gpa(0), RAM)]);
        assert!(core.has_vmcoreinfo);
        let notes = notes(&core);
        assert_eq!(notes[1], (VMCOREINFO.to_vec(), 0, b"OSRELEASE=6.1\nKERNELOFFSET=0\n".to_vec()));
        let loads = loads(&core);
        let offset = core.ram()[0].offset;
        assert_eq!(loads.last(), Some(&[DIRECT, 0, RAM, offset]));
        assert_eq!(loads[0][..2], [TEXT, TEXT_GPA]);
        assert_eq!(loads[0][3], offset + TEXT_GPA);
    }

    #[test]
    fn a_note_that_is_none_is_left_out() {
        let (guest, memory, state) = linux(b"text");
        let has_note = || Vmcore::new(&guest, &[state], &memory, &[(Gpa(0), RAM)]).has_vmcoreinfo;
        assert!(has_note());
        for (at, byte) in [(0, 0xff), (4, 0xff), (7, 1), (12, b'v')] {
            let before = memory.bytes(Gpa(NOTE + at), 1);
            memory.load(Gpa(NOTE + at), &[byte]);
            // A length that is merely wrong gives the text that it says.
            assert_eq!(has_note(), at == 4, "{at}");
            memory.load(Gpa(NOTE + at), &before);
        }
        // The kernel has not made it yet.
        memory.load(guest.image.gva_to_gpa(Gva(RODATA + 72)).unwrap(), &[0; 8]);
        assert!(!has_note());
    }
}
