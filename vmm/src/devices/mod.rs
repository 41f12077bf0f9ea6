//! The devices of the machine, all of them on ports. The interrupt controllers and the timer are KVM's own.

mod serial;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use serial::SerialPort;

/// What a port write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The i8042's reset line.
    Reset,
    /// ACPI sleep state S5.
    PowerOff,
}

/// The i8042's command that pulses the CPU's reset line.
const I8042_RESET: u8 = 0xfe;

/// The i8042's status: output buffer full for ever, input buffer empty. A driver that drains the output buffer gives up
/// at once and finds no keyboard; one that waits for the input buffer before it sends the reset command does not wait.
const I8042_STATUS: u8 = 1 << 0;

/// SLP_EN, bit 13 of the PM1 control register (ACPI specification, 4.8.3.2.1), as seen in its high byte.
const PM1_HIGH_SLP_EN: u8 = 1 << 5;

/// Dispatches port accesses, byte by byte as an 8-bit bus does. Ports without a device read all ones and swallow writes; so
/// does PCI configuration space, which tells the guest that there is no PCI bus.
pub(crate) struct PortBus {
    serial: SerialPort,
}

impl PortBus {
    /// A bus whose serial line writes to `console` and raises `serial_irq`. A write to `console` that blocks is given up
    /// once `stop` is set and a signal arrives.
    pub fn new(console: Box<dyn io::Write + Send>, serial_irq: EventFd, stop: Arc<AtomicBool>) -> Self {
        Self { serial: SerialPort::new(console, serial_irq, stop) }
    }

    /// Fills `data` from `port` on.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        for (byte, port) in data.iter_mut().zip(ports_from(port)) {
            *byte = match (port, serial_offset(port)) {
                (_, Some(offset)) => self.serial.read(offset),
                (layout::I8042_COMMAND_PORT, _) => I8042_STATUS,
                _ => 0xff,
            };
        }
    }

    /// Writes `data` from `port` on. Returns what the last meaningful byte asked for.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        let mut request = None;
        for (byte, port) in data.iter().zip(ports_from(port)) {
            if let Some(offset) = serial_offset(port) {
                self.serial.write(offset, *byte);
            } else if port == layout::I8042_COMMAND_PORT && *byte == I8042_RESET {
                request = Some(Request::Reset);
            } else if port == layout::PM1A_CONTROL_PORT + 1 && byte & PM1_HIGH_SLP_EN != 0 {
                request = Some(Request::PowerOff);
            }
        }
        request
    }
}

fn ports_from(port: u16) -> impl Iterator<Item = u16> {
    (0..).map(move |i| port.wrapping_add(i))
}

fn serial_offset(port: u16) -> Option<u8> {
    port.checked_sub(layout::COM1_PORT)
        .and_then(|offset| u8::try_from(offset).ok())
        .filter(|offset| *offset < 8)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Console(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Console {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(buf);
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn bus() -> (PortBus, Console) {
        let console = Console::default();
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (PortBus::new(Box::new(console.clone()), irq, Arc::default()), console)
    }

    #[test]
    fn serial_output_reaches_the_console() {
        let (bus, console) = bus();
        for byte in b"hi\n" {
            assert_eq!(bus.write(0x3f8, &[*byte]), None);
        }
        assert_eq!(*console.0.lock().unwrap(), b"hi\n");
        let mut status = [0];
        bus.read(0x3fd, &mut status);
        assert_eq!(status[0] & 0x20, 0x20, "transmitter empty");
    }

    #[test]
    fn unknown_ports_and_pci_read_all_ones() {
        let (bus, _) = bus();
        for port in [0x80, 0xcf8, 0xcfc, 0x400, 0xfffe] {
            let mut data = [0; 4];
            bus.read(port, &mut data);
            assert_eq!(data, [0xff; 4], "{port:#x}");
            assert_eq!(bus.write(port, &[0xfe; 4]), None, "{port:#x}");
        }
        let mut below_serial = [0];
        bus.read(0x3f7, &mut below_serial);
        assert_eq!(below_serial, [0xff]);
    }

    #[test]
    fn i8042_resets_on_its_command_only() {
        let (bus, _) = bus();
        assert_eq!(bus.write(0x64, &[0xfe]), Some(Request::Reset));
        assert_eq!(bus.write(0x64, &[0xd1]), None);
        assert_eq!(bus.write(0x60, &[0xfe]), None);
        let mut status = [0];
        bus.read(0x64, &mut status);
        assert_eq!(status[0] & 2, 0, "the input buffer is empty, so a reset need not wait");
    }

    #[test]
    fn power_off_wants_slp_en() {
        let (bus, _) = bus();
        assert_eq!(bus.write(0x604, &0x2000u16.to_le_bytes()), Some(Request::PowerOff));
        assert_eq!(bus.write(0x604, &0x3c00u16.to_le_bytes()), Some(Request::PowerOff));
        assert_eq!(bus.write(0x604, &0x1c00u16.to_le_bytes()), None);
        assert_eq!(bus.write(0x604, &[0x20]), None, "the low byte has no SLP_EN");
    }
}
