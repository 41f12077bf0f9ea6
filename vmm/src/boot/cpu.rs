//! The processor state that a 64-bit kernel starts in: segments, control registers, page tables. As values; Intel SDM
//! vol. 3A, 3.4.5 (descriptors), 4.5 (4-level paging), 2.5 (control registers).

use kvm_bindings::{kvm_segment, kvm_sregs};
use probe_core::{Gpa, PAGE_SIZE, control};

use crate::layout;

/// Selectors that the Linux boot protocol names __BOOT_CS and __BOOT_DS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Flat 64-bit code: present, DPL 0, execute/read, accessed, long, 4 KiB granularity.
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
/// Flat data: present, DPL 0, read/write, accessed, 32-bit, 4 KiB granularity.
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

const CR0_MP: u64 = 1 << 1;
const CR0_ET: u64 = 1 << 4;
const CR0_NE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;

const PAGE_PRESENT_WRITE: u64 = 3;
/// PS: the entry maps a page itself.
const PAGE_LARGE: u64 = 1 << 7;
const LARGE_PAGE_SIZE: u64 = 2 << 20;
const ENTRIES: u64 = 512;

/// The descriptor table and the page tables of a machine with `ram_bytes` of RAM, each with its address.
pub(super) fn boot_tables(ram_bytes: u64) -> Vec<(Gpa, Vec<u8>)> {
    let gdt = [0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR];
    let top =
        layout::ram(ram_bytes).last().map_or(0, |(start, bytes)| start.0 + bytes).max(layout::HIGH_RAM.0);
    let large_pages = top.div_ceil(LARGE_PAGE_SIZE);
    let directories = large_pages.div_ceil(ENTRIES);

    let directory = |i| layout::PAGE_DIRECTORIES.0 + i * PAGE_SIZE;
    let pdpt = (0..directories).map(|i| directory(i) | PAGE_PRESENT_WRITE);
    let pages = (0..large_pages).map(|i| (i * LARGE_PAGE_SIZE) | PAGE_PRESENT_WRITE | PAGE_LARGE);
    vec![
        (layout::GDT, bytes(gdt)),
        (layout::PML4, bytes([layout::PDPT.0 | PAGE_PRESENT_WRITE])),
        (layout::PDPT, bytes(pdpt)),
        (layout::PAGE_DIRECTORIES, bytes(pages)),
    ]
}

fn bytes(words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// Puts 64-bit mode with paging over the boot tables into the system registers that KVM gave a new vCPU. FPU and SSE are
/// switched on: code from an ordinary compiler uses them.
pub(crate) fn enter_long_mode(sregs: &mut kvm_sregs) {
    let code = segment(CODE_DESCRIPTOR, CODE_SELECTOR);
    let data = segment(DATA_DESCRIPTOR, DATA_SELECTOR);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = layout::GDT.0;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = control::CR0_PE | CR0_MP | CR0_ET | CR0_NE | control::CR0_WP | control::CR0_PG;
    sregs.cr3 = layout::PML4.0;
    sregs.cr4 = control::CR4_PAE | control::CR4_OSFXSR | control::CR4_OSXMMEXCPT;
    sregs.efer = EFER_LME | control::EFER_LMA;
}

/// KVM's form of a flat descriptor.
#[allow(clippy::cast_possible_truncation, reason = "each field is masked to its width")]
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bits = |shift: u32, mask: u64| (descriptor >> shift & mask) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: bits(40, 0xf),
        s: bits(44, 1),
        dpl: bits(45, 3),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        unusable: 0,
        padding: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A naive walk over the tables as the CPU does it.
    fn translate(tables: &[(Gpa, Vec<u8>)], address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = table + index * 8;
            let (start, bytes) =
                tables.iter().find(|(start, bytes)| at >= start.0 && at < start.0 + bytes.len() as u64)?;
            let offset = usize::try_from(at - start.0).unwrap();
            let word = u64::from_le_bytes(bytes[offset..offset + 8].try_into().unwrap());
            (word & 1 == 1).then_some(word)
        };
        let pml4 = entry(layout::PML4.0, address >> 39)?;
        let pdpt = entry(pml4 & !0xfff, address >> 30 & 511)?;
        let directory = entry(pdpt & !0xfff, address >> 21 & 511)?;
        assert_ne!(directory & PAGE_LARGE, 0);
        Some((directory & !0x1f_ffff) | (address & 0x1f_ffff))
    }

    #[test]
    fn the_identity_map_covers_4_gib_and_all_ram() {
        for ram_bytes in [2 << 20, 512 << 20, 5 << 30, layout::MAX_MEMORY_BYTES] {
            let tables = boot_tables(ram_bytes);
            let top = layout::ram(ram_bytes).last().map_or(0, |(start, bytes)| start.0 + bytes);
            for address in [0, 0x10_0000, layout::SLOT_REGION.0, (4 << 30) - 1, top - 1] {
                assert_eq!(translate(&tables, address), Some(address), "{address:#x} of {ram_bytes:#x}");
            }
            assert_eq!(translate(&tables, top.max(4 << 30)), None);
            assert_eq!(translate(&tables, u64::MAX >> 16), None);
        }
    }

    #[test]
    fn tables_stay_in_their_places() {
        for (gpa, bytes) in boot_tables(layout::MAX_MEMORY_BYTES) {
            let room = layout::boot_structures().into_iter().find(|(_, start, _)| *start == gpa);
            assert!(room.is_some_and(|(_, _, room)| bytes.len() as u64 <= room), "{gpa}");
        }
    }

    #[test]
    fn code_is_64_bit_and_data_is_flat() {
        let code = segment(CODE_DESCRIPTOR, CODE_SELECTOR);
        assert_eq!(
            (code.l, code.db, code.s, code.present, code.dpl, code.type_, code.g),
            (1, 0, 1, 1, 0, 0xb, 1)
        );
        let data = segment(DATA_DESCRIPTOR, DATA_SELECTOR);
        assert_eq!(
            (data.l, data.db, data.s, data.present, data.dpl, data.type_, data.g),
            (0, 1, 1, 1, 0, 3, 1)
        );
        assert_eq!((code.selector, data.selector), (0x10, 0x18));
    }

    #[test]
    fn long_mode_bits_go_together() {
        let mut sregs = kvm_sregs { apic_base: 0xfee0_0900, ..kvm_sregs::default() };
        enter_long_mode(&mut sregs);
        assert_eq!(sregs.cr0 & (control::CR0_PE | control::CR0_PG), control::CR0_PE | control::CR0_PG);
        assert_eq!(sregs.efer, 0x500);
        assert_eq!(sregs.cr4 & control::CR4_PAE, control::CR4_PAE);
        assert_eq!(sregs.cr3, layout::PML4.0);
        assert_eq!((sregs.gdt.base, sregs.gdt.limit), (layout::GDT.0, 31));
        assert_eq!(sregs.apic_base, 0xfee0_0900, "the rest is KVM's");
    }
}
