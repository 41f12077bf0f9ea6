//! FADT: the fixed hardware (ACPI 5.2.9): power management registers, reset, and what a PC has that this machine lacks.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes};
use crate::devices::{I8042_RESET, PM1_CONTROL_BYTES, PM1_EVENT_BYTES};
use crate::layout;

/// IA-PC boot architecture flags (5.2.9.3): no VGA, no message-signalled interrupts, no PCIe power states, no CMOS clock. There is no
/// bit for an i8042 with a keyboard: this one only resets.
const IAPC_BOOT_ARCH: u16 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5;

/// The flags beside these stay 0. PWR_BUTTON at 0 means that the power button is fixed hardware; SMI_CMD at 0 that the machine is in
/// ACPI mode from the start (5.2.9).
const FLAGS: [Flags; 7] = [
    Flags::Wbinvd,
    Flags::ProcC1,
    // A sleep button would be a device: there is none.
    Flags::SlpButton,
    // Waking by the clock is not in the fixed registers: there is none.
    Flags::FixRtc,
    Flags::ResetRegSup,
    Flags::Headless,
    // More than eight processors cannot be told apart by xAPIC's logical destinations.
    Flags::ForceApicPhysicalDestinationMode,
];

pub(super) fn table(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION).dsdt_64(dsdt).firmware_ctrl_64(facs);
    fadt = FLAGS.into_iter().fold(fadt, FADTBuilder::flag);
    fadt.sci_int = u16::from(layout::SCI_GSI).into();
    fadt.pm1a_evt_blk = u32::from(layout::PM1A_EVENT_PORT).into();
    fadt.pm1_evt_len = PM1_EVENT_BYTES;
    fadt.x_pm1a_evt_blk = register(layout::PM1A_EVENT_PORT, PM1_EVENT_BYTES, AccessSize::WordAccess);
    fadt.pm1a_cnt_blk = u32::from(layout::PM1A_CONTROL_PORT).into();
    fadt.pm1_cnt_len = PM1_CONTROL_BYTES;
    fadt.x_pm1a_cnt_blk = register(layout::PM1A_CONTROL_PORT, PM1_CONTROL_BYTES, AccessSize::WordAccess);
    fadt.reset_reg = register(layout::I8042_COMMAND_PORT, 1, AccessSize::ByteAccess);
    fadt.reset_value = I8042_RESET;
    fadt.iapc_boot_arch = IAPC_BOOT_ARCH.into();
    // No processor goes deeper than C1: latencies above these limits say so (5.2.9).
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    bytes(&fadt.finalize())
}

/// A register of `bytes` at a port.
fn register(port: u16, bytes: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8 * bytes, 0, access, port.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acpi::tests::u32_at;

    /// By the offsets of table 5.9.
    #[test]
    fn the_fields_stand_where_the_specification_has_them() {
        let fadt = table(0xe_1000, 0xe_2000);
        assert_eq!(fadt.len(), 276);
        let word = |at: usize| u16::from_le_bytes([fadt[at], fadt[at + 1]]);
        assert_eq!((word(46), u32_at(&fadt, 48)), (9, 0), "SCI_INT, SMI_CMD");
        assert_eq!((u32_at(&fadt, 56), u32_at(&fadt, 64)), (0x600, 0x604), "PM1a_EVT_BLK, PM1a_CNT_BLK");
        assert_eq!((fadt[88], fadt[89]), (4, 2), "PM1_EVT_LEN, PM1_CNT_LEN");
        assert_eq!(u32_at(&fadt, 76), 0, "no PM timer");
        assert_eq!(word(109), 0x3c, "IAPC_BOOT_ARCH");
        let flags = u32_at(&fadt, 112);
        assert_eq!(flags & (1 << 4 | 1 << 5), 1 << 5, "a power button and no sleep button in fixed hardware");
        assert_eq!(flags & (1 << 10 | 1 << 20), 1 << 10, "a reset register, and fixed hardware at all");
        assert_eq!(fadt[116..128], [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0], "RESET_REG");
        assert_eq!(fadt[128], 0xfe, "RESET_VALUE");
        assert_eq!(fadt[148..160], [1, 32, 0, 2, 0, 6, 0, 0, 0, 0, 0, 0], "X_PM1a_EVT_BLK");
        assert_eq!(fadt[172..184], [1, 16, 0, 2, 4, 6, 0, 0, 0, 0, 0, 0], "X_PM1a_CNT_BLK");
    }
}
