//! MADT: processors and interrupt controllers (ACPI 5.2.12).
//!
//! The acpi_tables crate has the table only with the interrupt controllers of other machines, so its structures are written here.

use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout;

const REVISION: u8 = 5;
/// The header, the local APICs' address, and flags.
const HEADER_BYTES: u32 = 44;
const LOCAL_APIC_OFFSET: usize = 36;
const FLAGS_OFFSET: usize = 40;
/// There is a PC/AT's pair of 8259s too.
const PCAT_COMPAT: u32 = 1 << 0;

/// MPS INTI flags (table 5.25): active high, level-triggered.
const ACTIVE_HIGH_LEVEL: u8 = 0b11 << 2 | 0b01;

pub(super) fn table(vcpus: u32) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_bytes(LOCAL_APIC_OFFSET, &low_half(layout::LOCAL_APIC.0));
    madt.write_u32(FLAGS_OFFSET, PCAT_COMPAT);
    // Without ids from 255 on, which alone need the x2APIC structures (5.2.12.12). A guest may use x2APIC all the same.
    for index in 0..u8::try_from(vcpus).unwrap_or(u8::MAX) {
        madt.append_slice(&local_apic(index));
    }
    madt.append_slice(&io_apic());
    // Every other ISA interrupt has its own number at the I/O APIC, the timer's too, and rises (KVM's default routing).
    madt.append_slice(&level_interrupt(layout::SCI_GSI));
    madt.append_slice(&local_apic_nmi());
    madt.as_slice().to_vec()
}

/// Processor Local APIC (5.2.12.2), enabled. UID and APIC id are the vCPU's index.
fn local_apic(index: u8) -> [u8; 8] {
    [0, 8, index, index, 1, 0, 0, 0]
}

/// I/O APIC (5.2.12.3), for interrupts from 0 on. Its id is the one that KVM gives it at first.
fn io_apic() -> [u8; 12] {
    let [a, b, c, d] = low_half(layout::IO_APIC.0);
    [1, 12, 0, 0, a, b, c, d, 0, 0, 0, 0]
}

/// Interrupt Source Override (5.2.12.5): an ISA interrupt that keeps its number, but is active while high.
fn level_interrupt(irq: u8) -> [u8; 10] {
    [2, 10, 0, irq, irq, 0, 0, 0, ACTIVE_HIGH_LEVEL, 0]
}

/// Local APIC NMI (5.2.12.7): NMIs arrive at LINT1 of every processor, as on a PC.
fn local_apic_nmi() -> [u8; 6] {
    [4, 6, 0xff, 0, 0, 1]
}

/// An address below 4 GiB, as the table has it.
const fn low_half(address: u64) -> [u8; 4] {
    let [a, b, c, d, ..] = address.to_le_bytes();
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::tests::u32_at;

    /// The structures behind the header: type and content.
    fn structures(vcpus: u32) -> Vec<(u8, Vec<u8>)> {
        let madt = table(vcpus);
        assert_eq!((u32_at(&madt, 36), u32_at(&madt, 40)), (0xfee0_0000, 1));
        let mut rest = &madt[44..];
        let mut structures = Vec::new();
        while let [kind, length, ..] = rest {
            let (structure, behind) = rest.split_at(usize::from(*length));
            structures.push((*kind, structure.to_vec()));
            rest = behind;
        }
        structures
    }

    #[test]
    fn every_vcpu_has_an_enabled_local_apic() {
        for vcpus in [1, 2, 64, 255] {
            let structures = structures(vcpus);
            let apics: Vec<_> = structures.iter().filter(|(kind, _)| *kind == 0).collect();
            assert_eq!(apics.len(), vcpus as usize);
            for (index, (_, apic)) in (0..=u8::MAX).zip(apics) {
                assert_eq!(apic[2..], [index, index, 1, 0, 0, 0]);
            }
        }
    }

    #[test]
    fn the_acpi_interrupt_alone_is_a_level() {
        let structures = structures(1);
        let overrides: Vec<_> = structures.iter().filter(|(kind, _)| *kind == 2).collect();
        assert_eq!(overrides.len(), 1);
        assert_eq!(overrides[0].1[2..], [0, 9, 9, 0, 0, 0, 0x0d, 0]);
        let io_apic = structures.iter().find(|(kind, _)| *kind == 1).unwrap();
        assert_eq!((u32_at(&io_apic.1, 4), u32_at(&io_apic.1, 8)), (0xfec0_0000, 0));
    }
}
