//! Every fixed address of the guest, guest-physical and linear.
//!
//! ```text
//! guest-physical = linear: the harness              guest-physical      linear
//! 0x10_0000  stubs                                  0x14_0000  code     LOW, HIGH (supervisor)
//! 0x10_1000  GDT, IDT, TSS, handlers                0x14_8000  code     USER (user)
//! 0x10_5000  what the host and the stubs exchange   0x15_0000  data     LOW + DATA, HIGH + DATA (user)
//! 0x10_8000  stacks
//! 0x11_0000  page tables
//! ```

use probe_core::{Gpa, PAGE_SIZE};

/// RAM of the machine, bytes.
pub const MEMORY: u64 = 4 << 20;

/// The stubs, see [`crate::guest`].
pub const STUBS: u64 = 0x10_0000;
/// The global descriptor table.
pub const GDT: u64 = 0x10_1000;
/// The interrupt descriptor table, 256 gates.
pub const IDT: u64 = 0x10_2000;
/// The task-state segment.
pub const TSS: u64 = 0x10_3000;
/// The handlers of all vectors, [`HANDLER_BYTES`] apart: one page.
pub const HANDLERS: u64 = 0x10_4000;
/// Bytes from one handler to the next.
pub const HANDLER_BYTES: u64 = 16;
/// The frame that IRETQ enters a case with.
pub const FRAME: u64 = 0x10_5000;
/// Where a stub finds RAX and RDX of a case.
pub const RAX: u64 = 0x10_5100;
/// See [`RAX`].
pub const RDX: u64 = 0x10_5108;
/// What CPUID said: leaf 0 EBX, leaf 1 ECX, leaf 7 EBX.
pub const CPUID: u64 = 0x10_5200;
/// Operands of LGDT and LIDT.
pub const GDT_DESCRIPTOR: u64 = 0x10_5300;
/// See [`GDT_DESCRIPTOR`].
pub const IDT_DESCRIPTOR: u64 = 0x10_5310;
/// What the system stub stores, see [`SYSTEM_BYTES`].
pub const SYSTEM: u64 = 0x10_5400;
/// Bytes at [`SYSTEM`].
pub const SYSTEM_BYTES: usize = 0xc0;
/// x87, SSE and AVX state of a case before, as XRSTOR and FXRSTOR take it.
pub const FPU_BEFORE: u64 = 0x10_6000;
/// And after it.
pub const FPU_AFTER: u64 = 0x10_7000;
/// Top of the stack that every exception switches to (IST 1).
pub const EXCEPTION_STACK: u64 = 0x10_9000;
/// Top of the stack in the TSS for CPL 0. No gate uses it.
pub const KERNEL_STACK: u64 = 0x10_a000;
/// End of the harness.
pub const HARNESS_END: u64 = 0x10_b000;

/// Page tables.
pub const TABLES: u64 = 0x11_0000;
/// End of the page tables.
pub const TABLES_END: u64 = 0x13_0000;

/// Pages of code around a case, in each code area: two in which instructions stand, one before and one behind.
pub const CODE_PAGES: u64 = 4;
/// The same in bytes.
pub const CODE_BYTES: usize = 4 * 4096;
/// Supervisor code.
pub const KERNEL_CODE: Gpa = Gpa(0x14_0000);
/// User code.
pub const USER_CODE: Gpa = Gpa(0x14_8000);
/// Data: the pages of [`PAGES`] that are RAM, see [`data_page`].
pub const DATA: Gpa = Gpa(0x15_0000);

/// Linear address of supervisor code in the lower half.
pub const LOW: u64 = 0x4000_0000;
/// Linear address of supervisor code in the upper half, where a kernel's is.
pub const HIGH: u64 = 0xffff_ffff_9000_0000;
/// Linear address of user code.
pub const USER: u64 = LOW + 0x10_0000;
/// Offset of the data from [`LOW`] and [`HIGH`].
pub const DATA_OFFSET: u64 = 0x20_0000;

/// Selectors: 32-bit and 64-bit code and data at CPL 0 and 3, as SYSCALL and SYSRET want them ordered (Intel SDM vol. 2B,
/// "SYSRET").
pub const KERNEL_CODE_32: u16 = 0x08;
/// See [`KERNEL_CODE_32`].
pub const KERNEL_CODE_64: u16 = 0x10;
/// See [`KERNEL_CODE_32`].
pub const KERNEL_DATA: u16 = 0x18;
/// See [`KERNEL_CODE_32`].
pub const USER_CODE_32: u16 = 0x23;
/// See [`KERNEL_CODE_32`].
pub const USER_DATA: u16 = 0x2b;
/// See [`KERNEL_CODE_32`].
pub const USER_CODE_64: u16 = 0x33;
/// The task.
pub const TASK: u16 = 0x40;

/// What a page of data allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// Not present.
    Absent,
    /// User, read and write, not executable.
    Writable,
    /// User, read, not executable.
    ReadOnly,
    /// Supervisor, read and write, not executable.
    Supervisor,
    /// User, read and write, executable.
    Executable,
    /// User, read and write; no memory is behind it.
    Mmio,
}

/// The data pages in the order of their linear addresses.
pub const PAGES: [Page; 8] = [
    Page::Absent,
    Page::Writable,
    Page::Writable,
    Page::ReadOnly,
    Page::Supervisor,
    Page::Executable,
    Page::Absent,
    Page::Mmio,
];

/// How many bytes of data are RAM: pages 1 to 5.
pub const DATA_BYTES: usize = 5 * 4096;

/// Guest-physical address of data page `index`, if it is RAM. Neighbours are not neighbours in physical memory.
#[must_use]
pub fn data_page(index: u64) -> Option<Gpa> {
    const ORDER: [u64; 5] = [3, 0, 4, 1, 2];
    let slot = ORDER.get(usize::try_from(index.checked_sub(1)?).ok()?)?;
    Some(DATA.offset(slot * PAGE_SIZE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn data_pages_are_behind_each_other_only_in_linear_memory() {
        let pages: Vec<u64> = (0..8).filter_map(|page| data_page(page).map(|gpa| gpa.0)).collect();
        assert_eq!(pages.len() * 4096, DATA_BYTES);
        assert!(pages.windows(2).any(|pair| pair[1] != pair[0] + 4096));
        let mut sorted = pages.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), pages.len());
    }

    #[test]
    fn regions_never_overlap() {
        let regions = [
            (STUBS, HARNESS_END),
            (TABLES, TABLES_END),
            (KERNEL_CODE.0, KERNEL_CODE.0 + CODE_PAGES * PAGE_SIZE),
            (USER_CODE.0, USER_CODE.0 + CODE_PAGES * PAGE_SIZE),
            (DATA.0, DATA.0 + DATA_BYTES as u64),
        ];
        for pair in regions.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(regions.last().is_some_and(|last| last.1 <= MEMORY));
    }
}
