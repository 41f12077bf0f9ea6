//! Every fixed guest-physical address and port, with its reason.
//!
//! ```text
//! 0          GDT, boot parameters, page-table roots        (boot structures, below 640 KiB)
//! 0x2_0000   kernel command line
//! 0x3_0000   page directories of the identity map
//! 0x9_fc00   extended BIOS data area .. 1 MiB               (reserved: what a PC has there)
//! 0xe_0000   ACPI tables, within it
//! 0x10_0000  kernel; the initial ramdisk at the top of low RAM
//! 3 GiB      hole: slot region, virtio-mmio windows, I/O APIC, KVM's own pages, local APIC
//! 4 GiB      the rest of RAM
//! ```

use probe_core::slot::SlotRegion;
use probe_core::{Gpa, PAGE_SIZE};

/// Lowest RAM that a machine can have: boot structures and the reserved area fill the first MiB.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;

/// Highest RAM that a machine can have: its identity map must fit between [`PAGE_DIRECTORIES`] and [`EBDA`].
pub const MAX_MEMORY_BYTES: u64 = 64 << 30;

/// The global descriptor table, three 8-byte entries and a null. Below the boot parameters, above the real-mode
/// interrupt table (0..0x400) and the BIOS data area (0x400..0x500) that a guest may expect.
pub const GDT: Gpa = Gpa(0x500);
/// Bytes reserved for the global descriptor table.
pub const GDT_BYTES: u64 = 0x100;

/// `struct boot_params` of the Linux boot protocol (Documentation/arch/x86/zero-page.rst), one page.
pub const BOOT_PARAMS: Gpa = Gpa(0x7000);

/// Root of the first page tables (PML4), one page.
pub const PML4: Gpa = Gpa(0x9000);
/// Page-directory-pointer table, one page; covers 512 GiB.
pub const PDPT: Gpa = Gpa(0xa000);

/// The kernel command line, zero-terminated.
pub const CMDLINE: Gpa = Gpa(0x2_0000);
/// Bytes reserved for the command line.
pub const CMDLINE_BYTES: u64 = 0x1_0000;

/// Page directories of 2 MiB pages, one page for each GiB of the identity map: 4 for the low 4 GiB, the rest for
/// RAM above.
pub const PAGE_DIRECTORIES: Gpa = Gpa(0x3_0000);
/// Bytes reserved for page directories.
pub const PAGE_DIRECTORIES_BYTES: u64 = (4 + MAX_MEMORY_BYTES / (1 << 30)) * PAGE_SIZE;

/// Start of the area that a PC's firmware keeps: extended BIOS data, video memory, ROMs. Not RAM in the e820 map.
pub const EBDA: Gpa = Gpa(0x9_fc00);
/// ACPI tables, the RSDP first: where a guest looks for that without being told (ACPI 5.2.5.1).
pub const ACPI_TABLES: Gpa = Gpa(0xe_0000);
/// Bytes reserved for ACPI tables.
pub const ACPI_TABLES_BYTES: u64 = HIGH_MEMORY.0 - ACPI_TABLES.0;
/// End of that area, and the lowest address for a kernel that follows the Linux boot protocol.
pub const HIGH_MEMORY: Gpa = Gpa(0x10_0000);

/// Start of the hole for memory-mapped devices. RAM beyond this size continues at [`HIGH_RAM`].
pub const MMIO_HOLE: Gpa = Gpa(3 << 30);
/// RAM above 4 GiB.
pub const HIGH_RAM: Gpa = Gpa(4 << 30);

/// Memory of the host's own that the guest runs displaced instructions from. In the hole and in no memory map that the
/// guest is given, so the guest never allocates it.
pub const SLOT_REGION: Gpa = Gpa(0xd000_0000);
/// Size of [`SLOT_REGION`], bytes.
pub const SLOT_REGION_BYTES: u64 = 64 << 10;
/// The same for the engine.
pub const SLOTS: SlotRegion = SlotRegion { base: SLOT_REGION, size: SLOT_REGION_BYTES };

/// The register windows of virtio-mmio devices, a page each, one behind the other.
pub const MMIO_WINDOWS_BASE: Gpa = Gpa(0xd010_0000);
/// Bytes of one window.
pub const MMIO_WINDOW_BYTES: u64 = PAGE_SIZE;
/// How many there can be: as many as there are interrupts for them.
pub const MMIO_WINDOWS: usize = MMIO_GSIS.len();
/// The interrupts (GSIs) of those windows, by their order: inputs of the I/O APIC that nothing else has. 0 is the timer's, 1 the
/// keyboard's, 2 joins the 8259s, 3 and 4 are the serial lines', 8 the clock's, for which KVM does more, 9 ACPI's, 13 the
/// coprocessor's.
const MMIO_GSIS: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// Where a guest reaches a virtio-mmio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MmioWindow {
    /// First address, below 4 GiB.
    pub base: Gpa,
    /// Size, bytes.
    pub bytes: u64,
    /// Its interrupt, an edge.
    pub gsi: u32,
}

/// The window of the virtio-mmio device number `index`; `None` beyond the last.
#[must_use]
pub fn mmio_window(index: usize) -> Option<MmioWindow> {
    let gsi = *MMIO_GSIS.get(index)?;
    let base = MMIO_WINDOWS_BASE.offset(index as u64 * MMIO_WINDOW_BYTES);
    Some(MmioWindow { base, bytes: MMIO_WINDOW_BYTES, gsi })
}

/// The I/O APIC of KVM's in-kernel interrupt controller.
pub const IO_APIC: Gpa = Gpa(0xfec0_0000);
/// The local APIC, at its architectural reset address (Intel SDM vol. 3A, 11.4.1).
pub const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);

/// One page that KVM on Intel CPUs needs for real mode without unrestricted guest (KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: Gpa = Gpa(0xfffb_c000);
/// Three pages behind it for the same reason (KVM_SET_TSS_ADDR).
pub const KVM_TSS: Gpa = Gpa(0xfffb_d000);
/// Size of [`KVM_TSS`], bytes.
pub const KVM_TSS_BYTES: u64 = 3 * PAGE_SIZE;

/// First port of the first serial line (COM1, 8 ports).
pub const COM1_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const COM1_IRQ: u32 = 4;
/// Data port of the i8042 keyboard controller.
pub const I8042_DATA_PORT: u16 = 0x60;
/// Command and status port of the i8042 keyboard controller.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// ACPI's interrupt, where a PC has it.
pub const SCI_GSI: u8 = 9;
/// ACPI PM1a event block, 4 ports: status and enable.
pub const PM1A_EVENT_PORT: u16 = 0x600;
/// ACPI PM1a control register, 2 ports, where QEMU's machines have it, so that guest code for those powers off here too.
pub const PM1A_CONTROL_PORT: u16 = 0x604;

/// RAM as (start, bytes), for a machine with `memory_bytes` of it.
#[must_use]
pub fn ram(memory_bytes: u64) -> Vec<(Gpa, u64)> {
    let low = memory_bytes.min(MMIO_HOLE.0);
    let mut ranges = vec![(Gpa(0), low)];
    if memory_bytes > low {
        ranges.push((HIGH_RAM, memory_bytes - low));
    }
    ranges
}

/// The areas below 1 MiB that the machine fills before its guest starts: nothing of a kernel may be loaded over them.
#[must_use]
pub fn boot_structures() -> [(&'static str, Gpa, u64); 7] {
    [
        ("the global descriptor table", GDT, GDT_BYTES),
        ("the boot parameters", BOOT_PARAMS, PAGE_SIZE),
        ("the page-map root", PML4, PAGE_SIZE),
        ("the page-directory-pointer table", PDPT, PAGE_SIZE),
        ("the command line", CMDLINE, CMDLINE_BYTES),
        ("the page directories", PAGE_DIRECTORIES, PAGE_DIRECTORIES_BYTES),
        ("the ACPI tables", ACPI_TABLES, ACPI_TABLES_BYTES),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_never_overlap() {
        let mut regions: Vec<(&str, Gpa, u64)> = boot_structures().to_vec();
        regions.extend([
            ("firmware area below the ACPI tables", EBDA, ACPI_TABLES.0 - EBDA.0),
            ("low RAM above 1 MiB", HIGH_MEMORY, MMIO_HOLE.0 - HIGH_MEMORY.0),
            ("slot region", SLOT_REGION, SLOT_REGION_BYTES),
            ("virtio-mmio windows", MMIO_WINDOWS_BASE, MMIO_WINDOWS as u64 * MMIO_WINDOW_BYTES),
            ("I/O APIC", IO_APIC, PAGE_SIZE),
            ("local APIC", LOCAL_APIC, PAGE_SIZE),
            ("KVM identity map", KVM_IDENTITY_MAP, PAGE_SIZE),
            ("KVM TSS", KVM_TSS, KVM_TSS_BYTES),
            ("high RAM", HIGH_RAM, MAX_MEMORY_BYTES - MMIO_HOLE.0),
        ]);
        for (i, (name, start, bytes)) in regions.iter().enumerate() {
            assert!(*bytes > 0, "{name} is empty");
            for (other, other_start, other_bytes) in &regions[i + 1..] {
                assert!(
                    start.0 + bytes <= other_start.0 || other_start.0 + other_bytes <= start.0,
                    "{name} overlaps {other}"
                );
            }
        }
    }

    #[test]
    fn host_pages_lie_in_the_hole() {
        for (start, bytes) in [
            (SLOT_REGION, SLOT_REGION_BYTES),
            (MMIO_WINDOWS_BASE, MMIO_WINDOWS as u64 * MMIO_WINDOW_BYTES),
            (IO_APIC, PAGE_SIZE),
            (LOCAL_APIC, PAGE_SIZE),
            (KVM_IDENTITY_MAP, PAGE_SIZE),
            (KVM_TSS, KVM_TSS_BYTES),
        ] {
            assert!(start >= MMIO_HOLE && start.0 + bytes <= HIGH_RAM.0, "{start}");
        }
    }

    #[test]
    fn every_window_has_an_address_and_an_interrupt_of_its_own() {
        let windows: Vec<_> = (0..).map_while(mmio_window).collect();
        assert_eq!(windows.len(), MMIO_WINDOWS);
        assert_eq!(windows[0], MmioWindow { base: Gpa(0xd010_0000), bytes: 0x1000, gsi: 5 });
        for pair in windows.windows(2) {
            assert_eq!(pair[0].base.offset(pair[0].bytes), pair[1].base);
            assert!(pair[0].gsi < pair[1].gsi);
        }
        let taken = [COM1_IRQ, u32::from(SCI_GSI)];
        assert!(windows.iter().all(|window| window.gsi < 24 && !taken.contains(&window.gsi)));
    }

    #[test]
    fn ram_leaves_the_hole_out() {
        assert_eq!(ram(128 << 20), [(Gpa(0), 128 << 20)]);
        assert_eq!(ram(3 << 30), [(Gpa(0), 3 << 30)]);
        assert_eq!(ram(5 << 30), [(Gpa(0), 3 << 30), (HIGH_RAM, 2 << 30)]);
    }

    #[test]
    fn page_directories_hold_the_largest_machine() {
        let top = ram(MAX_MEMORY_BYTES).last().map_or(0, |(start, bytes)| start.0 + bytes);
        assert!(top.div_ceil(1 << 30) * PAGE_SIZE <= PAGE_DIRECTORIES_BYTES);
    }
}
