use super::*;
use crate::mock::{MockMemory, MockPageTables, MockVcpu, Operation, OperationKind};

const ROOT: Gpa = Gpa(0x10_0000);
const KERNEL: Gva = Gva(0xffff_ffff_8100_0000);
const USER: Gva = Gva(0x40_0000);
const RW: u64 = entry::PRESENT | entry::WRITABLE;

fn run(
    sys: &SystemRegisters,
    flags: u64,
    pkru: u32,
    memory: &MockMemory,
    gva: Gva,
    access: Access,
) -> Result<Translation, TranslateError> {
    translate(sys, flags, pkru, memory, gva, access, Marks::Keep)
}

fn page_fault(gva: Gva, code: u32) -> Result<Translation, TranslateError> {
    Err(TranslateError::Fault(Exception::PageFault { address: gva, code }))
}

#[test]
fn every_page_size_is_translated_with_its_offset() {
    for (size, gpa) in [(0x1000, 0x5_6000), (0x20_0000, 0x60_0000), (0x4000_0000, 0x8000_0000)] {
        for levels in [4, 5] {
            let memory = MockMemory::new();
            let mut tables = MockPageTables::new(&memory, ROOT, levels);
            let gva = Gva(0xffff_ff00_4000_0000);
            tables.map(gva, Gpa(gpa), size, RW);
            let la57 = if levels == 5 { control::CR4_LA57 } else { 0 };
            let state = MockVcpu::new(tables.root()).cr4(la57).build();
            let at = gva.offset(size - 5);
            let expected =
                Translation { gpa: Gpa(gpa + size - 5), page_size: size, writable: true, user: false };
            assert_eq!(run(&state.sys, 2, 0, &memory, at, Access::Read), Ok(expected));
            assert_eq!(physical(&state.sys, &memory, at), Some(expected.gpa));
        }
    }
}

#[test]
fn paging_off_is_the_identity_in_32_bits() {
    let memory = MockMemory::new();
    let sys = SystemRegisters { cr0: control::CR0_PE, ..SystemRegisters::default() };
    assert_eq!(physical(&sys, &memory, Gva(0x1_0000_1234)), Some(Gpa(0x1234)));
    assert_eq!(walk_entries(&sys, &memory, Gva(5)).map(|walk| walk.entries().len()), Ok(0));
}

#[test]
fn thirty_two_bit_paging_is_unsupported() {
    let sys = SystemRegisters { cr0: control::CR0_PE | control::CR0_PG, ..SystemRegisters::default() };
    let memory = MockMemory::with_ram(0x1000);
    assert_eq!(walk_entries(&sys, &memory, Gva(5)), Err(TranslateError::Unsupported(Gva(5))));
    assert_eq!(physical(&sys, &memory, Gva(5)), None);
}

#[test]
fn canonical_addresses_depend_on_the_number_of_levels() {
    let four = MockVcpu::new(ROOT).build().sys;
    let five = MockVcpu::new(ROOT).cr4(control::CR4_LA57).build().sys;
    for (gva, in_four, in_five) in [
        (0x0000_7fff_ffff_ffff, true, true),
        (0x0000_8000_0000_0000, false, true),
        (0x00ff_ffff_ffff_ffff, false, true),
        (0x0100_0000_0000_0000, false, false),
        (0xff00_0000_0000_0000, false, true),
        (0xfeff_ffff_ffff_ffff, false, false),
        (0xffff_7fff_ffff_ffff, false, true),
        (0xffff_8000_0000_0000, true, true),
    ] {
        assert_eq!(is_canonical(&four, Gva(gva)), in_four, "{gva:#x}");
        assert_eq!(is_canonical(&five, Gva(gva)), in_five, "{gva:#x}");
    }
    let memory = MockMemory::with_ram(0x20_0000);
    let bad = Gva(0x8000_0000_0000);
    assert_eq!(run(&four, 2, 0, &memory, bad, Access::Read), Err(TranslateError::NonCanonical(bad)));
    let tagged = SystemRegisters { cr3: four.cr3 | CR3_LAM_USER, ..four };
    assert_eq!(run(&tagged, 2, 0, &memory, bad, Access::Read), Err(TranslateError::Unsupported(bad)));
}

/// Access, CPL, leaf bits, CR0.WP, CR4, RFLAGS.AC, PKRU, error code or none.
type Right = (Access, u8, u64, bool, u64, bool, u32, Option<u32>);

#[test]
fn rights_follow_the_manual() {
    use Access::{Execute, Read, Write};
    use control::{CR4_PKE, CR4_SMAP, CR4_SMEP};
    const P: u64 = entry::PRESENT;
    const U: u64 = entry::USER;
    const W: u64 = entry::WRITABLE;
    const NX: u64 = entry::NO_EXECUTE;
    const KEY1: u64 = 1 << entry::KEY_SHIFT;
    let table: &[Right] = &[
        // Supervisor, supervisor page.
        (Read, 0, P, true, 0, false, 0, None),
        (Write, 0, P, true, 0, false, 0, Some(0x3)),
        (Write, 0, P, false, 0, false, 0, None),
        (Write, 0, P | W, true, 0, false, 0, None),
        (Execute, 0, P, true, 0, false, 0, None),
        (Execute, 0, P | NX, true, 0, false, 0, Some(0x11)),
        // Supervisor, user page: SMEP, SMAP, AC.
        (Read, 0, P | U, true, 0, false, 0, None),
        (Read, 0, P | U, true, CR4_SMAP, false, 0, Some(0x1)),
        (Read, 0, P | U, true, CR4_SMAP, true, 0, None),
        (Write, 0, P | U | W, false, CR4_SMAP, false, 0, Some(0x3)),
        (Write, 0, P | U | W, true, CR4_SMAP, true, 0, None),
        (Write, 0, P | U, true, CR4_SMAP, true, 0, Some(0x3)),
        (Execute, 0, P | U, true, 0, false, 0, None),
        (Execute, 0, P | U, true, CR4_SMEP, false, 0, Some(0x11)),
        (Execute, 0, P | U, true, CR4_SMEP, true, 0, Some(0x11)),
        (Execute, 0, P, true, CR4_SMEP | CR4_SMAP, false, 0, None),
        // User.
        (Read, 3, P, true, 0, false, 0, Some(0x5)),
        (Write, 3, P | W, true, 0, false, 0, Some(0x7)),
        (Execute, 3, P, true, 0, false, 0, Some(0x15)),
        (Read, 3, P | U, true, CR4_SMAP, false, 0, None),
        (Write, 3, P | U, false, 0, false, 0, Some(0x7)),
        (Write, 3, P | U | W, true, 0, false, 0, None),
        (Execute, 3, P | U, true, CR4_SMEP, false, 0, None),
        (Execute, 3, P | U | NX, true, 0, false, 0, Some(0x15)),
        // Not present: the code describes the access alone.
        (Read, 0, 0, true, 0, false, 0, Some(0x0)),
        (Write, 3, U | W, true, 0, false, 0, Some(0x6)),
        (Execute, 0, 0, true, 0, false, 0, Some(0x10)),
        // Protection keys: access disable (bit 2 for key 1), write disable (bit 3), user pages and data only.
        (Read, 3, P | U | KEY1, true, CR4_PKE, false, 0b0100, Some(0x25)),
        (Read, 3, P | U | KEY1, true, CR4_PKE, false, 0b1000, None),
        (Write, 3, P | U | W | KEY1, true, CR4_PKE, false, 0b1000, Some(0x27)),
        (Write, 0, P | U | W | KEY1, false, CR4_PKE, false, 0b1000, None),
        (Write, 0, P | U | W | KEY1, true, CR4_PKE, false, 0b1000, Some(0x23)),
        (Read, 3, P | U | KEY1, true, 0, false, 0b0100, None),
        (Read, 0, P | KEY1, true, CR4_PKE, false, 0b0100, None),
        (Execute, 3, P | U | KEY1, true, CR4_PKE, false, 0b0100, None),
    ];
    for (row, &(access, cpl, leaf, wp, cr4, ac, pkru, code)) in table.iter().enumerate() {
        let memory = MockMemory::new();
        let mut tables = MockPageTables::new(&memory, ROOT, 4);
        tables.map(USER, Gpa(0x9000), 0x1000, leaf);
        let mut sys = MockVcpu::new(ROOT).cpl(cpl).cr4(cr4).build().sys;
        if !wp {
            sys.cr0 &= !control::CR0_WP;
        }
        let flags = if ac { rflags::AC } else { 0 };
        let got = run(&sys, flags, pkru, &memory, USER.offset(8), access);
        match code {
            None => {
                assert!(got.is_ok_and(|translation| translation.gpa == Gpa(0x9008)), "row {row}: {got:?}")
            }
            Some(code) => assert_eq!(got, page_fault(USER.offset(8), code), "row {row}"),
        }
    }
}

#[test]
fn rights_of_the_upper_levels_restrict_the_page() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    tables.map(USER, Gpa(0x9000), 0x1000, RW | entry::USER);
    let state = MockVcpu::new(ROOT).cpl(3).build();
    let walk = walk_entries(&state.sys, &memory, USER).unwrap();
    let directory = walk.entries()[2];
    assert_eq!(directory.level, 2);

    memory.load(directory.gpa, &(directory.value & !entry::WRITABLE).to_le_bytes());
    assert_eq!(run(&state.sys, 2, 0, &memory, USER, Access::Write), page_fault(USER, 7));
    memory.load(directory.gpa, &(directory.value & !entry::USER).to_le_bytes());
    assert_eq!(run(&state.sys, 2, 0, &memory, USER, Access::Read), page_fault(USER, 5));
    memory.load(directory.gpa, &(directory.value | entry::NO_EXECUTE).to_le_bytes());
    assert_eq!(run(&state.sys, 2, 0, &memory, USER, Access::Execute), page_fault(USER, 0x15));
}

#[test]
fn reserved_bits_fault_before_rights_and_after_presence() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    let leaf = tables.map(KERNEL, Gpa(0x60_0000), 0x20_0000, RW);
    let sys = MockVcpu::new(ROOT).build().sys;

    memory.load(leaf, &(0x60_0000 | RW | entry::LARGE | 1 << 13).to_le_bytes());
    assert_eq!(run(&sys, 2, 0, &memory, KERNEL, Access::Write), page_fault(KERNEL, 0xb));
    // Bit 12 of a large page is its PAT bit, neither reserved nor address.
    memory.load(leaf, &(0x60_0000 | RW | entry::LARGE | 1 << 12).to_le_bytes());
    let got = run(&sys, 2, 0, &memory, KERNEL, Access::Write).unwrap();
    assert_eq!(got.gpa, Gpa(0x60_0000));
    // Without EFER.NXE bit 63 is reserved.
    memory.load(leaf, &(0x60_0000 | RW | entry::LARGE | entry::NO_EXECUTE).to_le_bytes());
    let old = SystemRegisters { efer: control::EFER_LMA, ..sys };
    assert_eq!(run(&old, 2, 0, &memory, KERNEL, Access::Read), page_fault(KERNEL, 9));
    run(&sys, 2, 0, &memory, KERNEL, Access::Read).unwrap();
    // PS is reserved in the root.
    let root = walk_entries(&sys, &memory, KERNEL).unwrap().entries()[0];
    memory.load(root.gpa, &(root.value | entry::LARGE).to_le_bytes());
    assert_eq!(run(&sys, 2, 0, &memory, KERNEL, Access::Read), page_fault(KERNEL, 9));
    // Not present: nothing else counts.
    memory.load(root.gpa, &(root.value & !entry::PRESENT | entry::LARGE).to_le_bytes());
    assert_eq!(run(&sys, 2, 0, &memory, KERNEL, Access::Read), page_fault(KERNEL, 0));
}

#[test]
fn marks_are_set_as_the_cpu_does_and_once() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    let leaf = tables.map(KERNEL, Gpa(0x9000), 0x1000, RW);
    let sys = MockVcpu::new(ROOT).build().sys;
    let go = |access, marks| translate(&sys, 2, 0, &memory, KERNEL, access, marks).map(|_| memory.word(leaf));

    assert_eq!(go(Access::Write, Marks::Keep), Ok(0x9000 | RW));
    assert_eq!(go(Access::Read, Marks::Set), Ok(0x9000 | RW | entry::ACCESSED));
    let all = walk_entries(&sys, &memory, KERNEL).unwrap();
    assert!(all.entries().iter().all(|entry| entry.value & entry::ACCESSED != 0));
    assert_eq!(go(Access::Write, Marks::Set), Ok(0x9000 | RW | entry::ACCESSED | entry::DIRTY));
    assert_eq!(all.entries()[2].value & entry::DIRTY, 0);
    memory.clear_log();
    go(Access::Write, Marks::Set).unwrap();
    assert_eq!(memory.writes(), []);
}

#[test]
fn a_refused_access_leaves_no_marks() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    tables.map(KERNEL, Gpa(0x9000), 0x1000, entry::PRESENT);
    let sys = MockVcpu::new(ROOT).build().sys;
    let got = translate(&sys, 2, 0, &memory, KERNEL, Access::Write, Marks::Set);
    assert_eq!(got, page_fault(KERNEL, 3));
    assert_eq!(memory.writes(), []);
}

/// Memory whose leaf entry is rewritten by "another vCPU" after the first read of it.
struct Racing<'m> {
    memory: &'m MockMemory,
    leaf: Gpa,
    rewrites: std::sync::atomic::AtomicU64,
}

impl PhysicalMemory for Racing<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(gpa, buf)?;
        let left = self.rewrites.load(std::sync::atomic::Ordering::Relaxed);
        if gpa == self.leaf && left > 0 {
            self.rewrites.store(left - 1, std::sync::atomic::Ordering::Relaxed);
            self.memory.load(gpa, &((0xa000 + left * 0x1000) | RW).to_le_bytes());
        }
        Ok(())
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        self.memory.write(gpa, data)
    }

    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError> {
        self.memory.compare_exchange(gpa, width, current, new)
    }
}

#[test]
fn an_entry_changed_under_the_walk_is_walked_again() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    let leaf = tables.map(KERNEL, Gpa(0x9000), 0x1000, RW);
    let sys = MockVcpu::new(ROOT).build().sys;
    let racing = Racing { memory: &memory, leaf, rewrites: 3.into() };
    let got = translate(&sys, 2, 0, &racing, KERNEL, Access::Read, Marks::Set).unwrap();
    assert_eq!(got.gpa, Gpa(0xb000));
    memory.load(leaf, &(0x9000 | RW).to_le_bytes());
    let racing = Racing { memory: &memory, leaf, rewrites: (1 << 20).into() };
    let got = translate(&sys, 2, 0, &racing, KERNEL, Access::Read, Marks::Set);
    assert_eq!(got, Err(TranslateError::Unsupported(KERNEL)));
}

#[test]
fn tables_outside_ram_are_reported_with_the_entry() {
    let memory = MockMemory::new();
    let sys = MockVcpu::new(Gpa(0x7000)).build().sys;
    let root_entry = Gpa(0x7000 + 511 * 8);
    assert_eq!(run(&sys, 2, 0, &memory, KERNEL, Access::Read), Err(TranslateError::NotRam(root_entry)));
    memory.load(root_entry, &(0x000f_ffff_ffff_f000_u64 | RW).to_le_bytes());
    let got = run(&sys, 2, 0, &memory, KERNEL, Access::Read);
    assert_eq!(got, Err(TranslateError::NotRam(Gpa(0x000f_ffff_ffff_f000 + 510 * 8))));
}

#[test]
fn the_walk_shows_where_an_address_is_not_present() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    tables.map(KERNEL, Gpa(0x9000), 0x1000, RW);
    let sys = MockVcpu::new(ROOT).build().sys;
    // Same 1 GiB, another 2 MiB.
    let walk = walk_entries(&sys, &memory, Gva(0xffff_ffff_bf00_0000)).unwrap();
    let last = walk.last().unwrap();
    assert_eq!((last.level, last.is_present()), (2, false));
    let upper = walk.entries()[1];
    assert_eq!(last.gpa, Gpa((upper.value & entry::ADDRESS) + 504 * 8));
    assert_eq!(last.span(), 0x20_0000);
}

#[test]
fn the_walk_tells_where_an_address_lies_and_what_all_levels_allow() {
    let memory = MockMemory::new();
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    tables.map(KERNEL, Gpa(0x9000), 0x1000, RW);
    tables.map(KERNEL.offset(0x1000), Gpa(0xa000), 0x1000, entry::PRESENT | entry::NO_EXECUTE);
    let sys = MockVcpu::new(ROOT).build().sys;
    let at = |gva| walk_entries(&sys, &memory, gva).map(|walk| (walk.translation(gva), walk.is_executable()));
    let page = Translation { gpa: Gpa(0x9005), page_size: 0x1000, writable: true, user: false };
    assert_eq!(at(KERNEL.offset(5)), Ok((Some(page), true)));
    let page = Translation { gpa: Gpa(0xa007), writable: false, ..page };
    assert_eq!(at(KERNEL.offset(0x1007)), Ok((Some(page), false)));
    assert_eq!(at(KERNEL.offset(0x2000)).map(|(found, _)| found), Ok(None));
}

#[test]
fn reading_code_crosses_pages_one_by_one_and_stops_at_a_hole() {
    let memory = MockMemory::with_ram(0x8000);
    let mut tables = MockPageTables::new(&memory, ROOT, 4);
    tables.map(KERNEL, Gpa(0x5000), 0x1000, entry::PRESENT);
    tables.map(KERNEL.offset(0x1000), Gpa(0x3000), 0x1000, entry::PRESENT);
    memory.load(Gpa(0x5ffb), &[1, 2, 3, 4, 5]);
    memory.load(Gpa(0x3000), &[6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    let sys = MockVcpu::new(ROOT).build().sys;
    let mut buf = [0; 15];
    assert_eq!(read_virtual(&sys, &memory, KERNEL.offset(0xffb), &mut buf), 15);
    assert_eq!(buf, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
    assert_eq!(read_virtual(&sys, &memory, KERNEL.offset(0x1ffb), &mut buf), 5);
    assert_eq!(read_virtual(&sys, &memory, KERNEL.offset(0x2000), &mut buf), 0);
    memory.clear_log();
    memory.fail(OperationKind::Read, 5);
    assert_eq!(read_virtual(&sys, &memory, KERNEL, &mut buf), 0);
    assert_eq!(memory.log().last(), Some(&Operation::Read { gpa: Gpa(0x5000), len: 15 }));
}
