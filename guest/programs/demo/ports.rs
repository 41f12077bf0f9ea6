//! Port I/O, and the ways a machine ends.

use core::arch::asm;

/// QEMU's PM1a control register, which vmprobe's machine has too.
const PM1A_CONTROL: u16 = 0x604;
/// SLP_EN with sleep type 0: soft-off (ACPI 6.5, 4.8.3.2.1).
const SLEEP_ENABLE: u16 = 1 << 13;
/// The keyboard controller's command port.
const I8042_COMMAND: u16 = 0x64;
/// Pulse output line 0, the CPU's reset.
const I8042_RESET: u8 = 0xfe;
/// The data ports of the two interrupt controllers (8259), where the mask is written.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];

/// Writes a byte to a port.
pub fn write_byte(port: u16, value: u8) {
    // SAFETY: a port write touches no memory of this program; the ports used here belong to it alone.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) }
}

/// Reads a byte from a port.
pub fn read_byte(port: u16) -> u8 {
    let value;
    // SAFETY: as `write_byte`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) }
    value
}

fn write_word(port: u16, value: u16) {
    // SAFETY: as `write_byte`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) }
}

/// Masks every interrupt line, for the few instructions that run with interrupts on.
pub fn mask_interrupts() {
    for port in PIC_MASKS {
        write_byte(port, 0xff);
    }
}

/// Ends the machine in order.
pub fn power_off() -> ! {
    write_word(PM1A_CONTROL, SLEEP_ENABLE);
    halt_forever()
}

/// Ends the machine by a reset: a wrong result.
pub fn reset() -> ! {
    write_byte(I8042_COMMAND, I8042_RESET);
    halt_forever()
}

/// Ends the machine by a triple fault: an exception that cannot be delivered.
pub fn triple_fault() -> ! {
    static EMPTY_TABLE: [u64; 2] = [0; 2];
    // SAFETY: does not return; with a table of no entries the invalid instruction cannot reach a handler.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &raw const EMPTY_TABLE, options(noreturn)) }
}

/// Sleeps with interrupts off.
pub fn halt_forever() -> ! {
    loop {
        // SAFETY: changes only IF, which this program never needs again.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
