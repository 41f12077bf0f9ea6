//! DSDT: what is on the machine's buses (ACPI 5.2.11.1), in AML.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, bytes};
use crate::layout::{self, MmioWindow};

/// From this revision on, integers in AML have 64 bits (5.2.11.1).
const REVISION: u8 = 2;
const HEADER_BYTES: u32 = 36;

pub(super) fn table(platform: &Platform<'_>) -> Vec<u8> {
    let windows: Vec<Virtio> =
        (0..).zip(platform.mmio_windows).map(|(uid, window)| Virtio { uid, window }).collect();
    let processors: Vec<Processor> = (0..platform.vcpus).map(|uid| Processor { uid }).collect();
    let mut devices: Vec<&dyn Aml> = vec![&Serial];
    devices.extend(windows.iter().map(|window| window as &dyn Aml));
    devices.extend(processors.iter().map(|processor| processor as &dyn Aml));

    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&bytes(&Scope::new(Path::new("\\_SB_"), devices)));
    // S5 (7.4.2.5): the SLP_TYP value for PM1a and PM1b, two reserved. QEMU's machines have 0 for it too.
    dsdt.append_slice(&bytes(&Name::new(
        Path::new("\\_S5_"),
        &Package::new(vec![&ZERO, &ZERO, &ZERO, &ZERO]),
    )));
    dsdt.as_slice().to_vec()
}

/// An interrupt that rises and falls at once, which nobody else has.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// COM1.
struct Serial;

impl Aml for Serial {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            Path::new("COM1"),
            vec![
                // A 16550A-compatible port.
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &IO::new(layout::COM1_PORT, layout::COM1_PORT, 1, 8),
                        &edge(layout::COM1_IRQ),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A virtio-mmio device. Linux's virtio_mmio driver goes by this _HID (drivers/virtio/virtio_mmio.c), and udev loads it for it.
struct Virtio<'a> {
    uid: u32,
    window: &'a MmioWindow,
}

impl Aml for Virtio<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        #[allow(clippy::cast_possible_truncation, reason = "windows lie in the hole below 4 GiB (layout.rs)")]
        let (base, bytes) = (self.window.base.0 as u32, self.window.bytes as u32);
        Device::new(
            Path::new(&format!("V{:03X}", self.uid)),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &self.uid),
                // Its DMA is coherent with the processors' caches (6.2.17).
                &Name::new(Path::new("_CCA"), &acpi_tables::aml::ONE),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, base, bytes),
                        &edge(self.window.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// A processor (8.4), by the UID that it has in the MADT.
struct Processor {
    uid: u32,
}

impl Aml for Processor {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        Device::new(
            Path::new(&format!("C{:03X}", self.uid)),
            vec![&Name::new(Path::new("_HID"), &"ACPI0007"), &Name::new(Path::new("_UID"), &self.uid)],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(table: &[u8], bytes: &[u8]) -> usize {
        table.windows(bytes.len()).filter(|window| *window == bytes).count()
    }

    #[test]
    fn every_device_is_announced_with_its_resources() {
        let windows: Vec<_> = (0..3).map_while(layout::mmio_window).collect();
        let dsdt = table(&Platform { vcpus: 20, mmio_windows: &windows });
        // EISA id, compressed (19.3.4); IO and extended interrupt descriptors (6.4.2.5, 6.4.3.6).
        assert_eq!(count(&dsdt, &[0x41, 0xd0, 0x05, 0x01]), 1, "PNP0501");
        assert_eq!(count(&dsdt, &[0x47, 1, 0xf8, 3, 0xf8, 3, 1, 8, 0x89, 6, 0, 3, 1, 4, 0, 0, 0]), 1);
        assert_eq!(count(&dsdt, b"LNRO0005\0"), 3);
        // 32-bit fixed memory (6.4.3.4), read and write, then the interrupt: consumer, edge, high, exclusive.
        let window = [0x86, 9, 0, 1, 0, 0x20, 0x10, 0xd0, 0, 0x10, 0, 0, 0x89, 6, 0, 3, 1, 7, 0, 0, 0];
        assert_eq!(count(&dsdt, &window), 1);
        assert_eq!(count(&dsdt, b"ACPI0007\0"), 20);
        assert_eq!(count(&dsdt, b"C013"), 1, "the last, by its number in hexadecimal");
    }

    #[test]
    fn soft_off_is_the_only_sleep_state() {
        let dsdt = table(&Platform { vcpus: 1, mmio_windows: &[] });
        // Name, package of four zeros (20.2.5).
        assert_eq!(count(&dsdt, b"\x08\\_S5_\x12\x06\x04\0\0\0\0"), 1);
        for state in [b"_S1_", b"_S2_", b"_S3_", b"_S4_"] {
            assert_eq!(count(&dsdt, state), 0);
        }
    }
}
