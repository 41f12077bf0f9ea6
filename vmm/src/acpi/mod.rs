//! ACPI tables, by which a guest that knows nothing of this machine finds its processors, interrupts, devices and power switch.
//! ACPI specification 6.5; each table is a pure function from a description to bytes.
//!
//! ```text
//! RSDP ──► XSDT ──► FADT ──► DSDT   COM1, the virtio-mmio windows, the processors, S5
//!               │        └─► FACS   nothing but its global lock
//!               └─► MADT            local APICs, I/O APIC, interrupts that are not as on a PC/AT
//! ```

mod dsdt;
mod fadt;
mod madt;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use probe_core::Gpa;

use crate::layout::{self, MmioWindow};

/// Who made the tables, by name and number: OEMID, OEM Table ID, OEM Revision (5.2.6).
const OEM_ID: [u8; 6] = *b"VMPROB";
const OEM_TABLE_ID: [u8; 8] = *b"VMPROBE ";
const OEM_REVISION: u32 = 1;

/// FACS has to be aligned to this (5.2.10); the others are aligned along with it.
const ALIGNMENT: u64 = 64;

/// What the tables describe.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Platform<'a> {
    /// How many vCPUs there are. Their APIC ids are their indices.
    pub vcpus: u32,
    /// Where the guest reaches its virtio devices.
    pub mmio_windows: &'a [MmioWindow],
}

/// Every table with its address, the RSDP first: at the start of the firmware area, where a guest without boot parameters looks for
/// it (5.2.5.1).
pub(crate) fn tables(platform: &Platform<'_>) -> Vec<(Gpa, Vec<u8>)> {
    let mut next = layout::ACPI_TABLES.offset(Rsdp::len() as u64);
    let mut tables = Vec::new();
    let mut place = |table: Vec<u8>| {
        let at = Gpa(next.0.next_multiple_of(ALIGNMENT));
        next = at.offset(table.len() as u64);
        tables.push((at, table));
        at.0
    };
    let dsdt = place(dsdt::table(platform));
    let facs = place(bytes(&FACS::new()));
    let fadt = place(fadt::table(dsdt, facs));
    let madt = place(madt::table(platform.vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt] {
        xsdt.add_entry(table);
    }
    let xsdt = place(bytes(&xsdt));
    tables.insert(0, (layout::ACPI_TABLES, bytes(&Rsdp::new(OEM_ID, xsdt))));
    tables
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    const ALL_WINDOWS: usize = layout::MMIO_WINDOWS;

    fn windows(count: usize) -> Vec<MmioWindow> {
        (0..count).map(|index| layout::mmio_window(index).unwrap()).collect()
    }

    fn tables_of(vcpus: u32, window_count: usize) -> Vec<(Gpa, Vec<u8>)> {
        tables(&Platform { vcpus, mmio_windows: &windows(window_count) })
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    pub(crate) fn u32_at(table: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(table[at..at + 4].try_into().unwrap())
    }

    fn u64_at(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    /// A table as a guest finds it: by following addresses from the RSDP, each checked.
    fn follow(tables: &[(Gpa, Vec<u8>)], at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let (_, table) = tables.iter().find(|(gpa, _)| gpa.0 == at).expect("a table at this address");
        assert_eq!(&table[..4], signature);
        assert_eq!(u32_at(table, 4) as usize, table.len());
        table.clone()
    }

    #[test]
    fn a_guest_finds_every_table_from_the_rsdp() {
        for (vcpus, window_count) in [(1, 0), (2, 1), (64, 4), (255, ALL_WINDOWS)] {
            let tables = tables_of(vcpus, window_count);
            let (at, rsdp) = &tables[0];
            // A multiple of 16 between 0xe0000 and 0xfffff (5.2.5.1).
            assert_eq!((at.0, &rsdp[..8]), (0xe_0000, b"RSD PTR ".as_slice()));
            assert_eq!((sum(&rsdp[..20]), sum(rsdp)), (0, 0));
            let xsdt = follow(&tables, u64_at(rsdp, 24), b"XSDT");
            let fadt = follow(&tables, u64_at(&xsdt, 36), b"FACP");
            let madt = follow(&tables, u64_at(&xsdt, 44), b"APIC");
            assert_eq!(xsdt.len(), 52);
            let dsdt = follow(&tables, u64_at(&fadt, 140), b"DSDT");
            let facs = follow(&tables, u64_at(&fadt, 132), b"FACS");
            for table in [xsdt, fadt, madt, dsdt] {
                assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
            }
            assert_eq!(facs.len(), 64);
        }
    }

    #[test]
    fn the_tables_of_the_largest_machine_fit_and_do_not_overlap() {
        let tables = tables_of(255, ALL_WINDOWS);
        let mut end = layout::ACPI_TABLES;
        for (at, table) in &tables {
            assert!(*at >= end, "{at}");
            end = at.offset(table.len() as u64);
        }
        assert!(end.0 <= layout::ACPI_TABLES.0 + layout::ACPI_TABLES_BYTES, "{end}");
    }
}
