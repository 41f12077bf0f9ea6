//! The devices of the machine: those of a PC on ports, virtio devices in memory. The interrupt controllers and the timer are KVM's own.

mod mmio;
mod power;
pub(crate) mod serial;
pub(crate) mod virtio;

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use vmm_sys_util::eventfd::EventFd;

use crate::layout;
use crate::snapshot::Devices;
pub(crate) use mmio::MmioBus;
use power::PowerManagement;
pub(crate) use power::{InterruptLine, PM1_CONTROL_BYTES, PM1_EVENT_BYTES, Registers as Pm1Registers};
use serial::SerialPort;

/// What a port write asks of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// The i8042's reset line.
    Reset,
    /// ACPI sleep state S5.
    PowerOff,
}

/// Registers of a 16550.
const COM1_PORTS: u8 = 8;

/// The i8042's command that pulses the CPU's reset line.
pub(crate) const I8042_RESET: u8 = 0xfe;

/// The i8042's status: output buffer full for ever, input buffer empty. A driver that drains the output buffer gives up
/// at once and finds no keyboard; one that waits for the input buffer before it sends the reset command does not wait.
const I8042_STATUS: u8 = 1 << 0;

/// Where the vCPUs reach devices.
#[derive(Debug)]
pub(crate) struct Buses {
    pub ports: PortBus,
    pub mmio: MmioBus,
}

/// Dispatches port accesses, byte by byte as an 8-bit bus does. Ports without a device read all ones and swallow writes; so
/// does PCI configuration space, which tells the guest that there is no PCI bus.
#[derive(Debug)]
pub(crate) struct PortBus {
    serial: Arc<SerialPort>,
    power: PowerManagement,
}

impl PortBus {
    /// A bus whose serial line writes to `console` and raises `serial_irq`, and whose power management registers set `sci`. A write to
    /// `console` that blocks is given up once `stop` is set and a signal arrives.
    pub fn new(
        console: Box<dyn io::Write + Send>,
        serial_irq: EventFd,
        sci: InterruptLine,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self {
            serial: Arc::new(SerialPort::new(console, serial_irq, stop)),
            power: PowerManagement::new(sci),
        }
    }

    /// The first serial line.
    pub fn serial(&self) -> Arc<SerialPort> {
        Arc::clone(&self.serial)
    }

    /// Presses the power button and lets go of it. Returns whether the guest listens to it.
    pub fn press_power_button(&self) -> bool {
        self.power.press_power_button()
    }

    /// What there is to save of the devices on ports. The i8042 has no state.
    pub fn save(&self) -> Devices {
        Devices { serial: self.serial.save(), power: self.power.save(), virtio: Vec::new() }
    }

    /// Makes the devices what they were. An interrupt that they wait to have served is raised once more.
    pub fn restore(&self, saved: &Devices) -> io::Result<()> {
        let Devices { serial, power, virtio: _ } = saved;
        self.power.restore(power);
        self.serial.restore(serial)
    }

    /// Fills `data` from `port` on.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        for (byte, port) in data.iter_mut().zip(ports_from(port)) {
            *byte = match device(port) {
                Some(Device::Serial(offset)) => self.serial.read(offset),
                Some(Device::PowerEvent(offset)) => self.power.read_event(offset),
                Some(Device::PowerControl(offset)) => self.power.read_control(offset),
                Some(Device::I8042Command) => I8042_STATUS,
                None => 0xff,
            };
        }
    }

    /// Writes `data` from `port` on. Returns what the last meaningful byte asked for.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<Request> {
        let mut request = None;
        for (byte, port) in data.iter().zip(ports_from(port)) {
            match device(port) {
                Some(Device::Serial(offset)) => self.serial.write(offset, *byte),
                Some(Device::PowerEvent(offset)) => self.power.write_event(offset, *byte),
                Some(Device::PowerControl(offset)) => {
                    request = self.power.write_control(offset, *byte).or(request);
                }
                Some(Device::I8042Command) if *byte == I8042_RESET => request = Some(Request::Reset),
                Some(Device::I8042Command) | None => {}
            }
        }
        request
    }
}

/// What is at a port, with the offset in its registers.
enum Device {
    Serial(u8),
    PowerEvent(u8),
    PowerControl(u8),
    I8042Command,
}

fn device(port: u16) -> Option<Device> {
    let within = |first: u16, count: u8| {
        let offset = u8::try_from(port.checked_sub(first)?).ok()?;
        (offset < count).then_some(offset)
    };
    let serial = || within(layout::COM1_PORT, COM1_PORTS).map(Device::Serial);
    let event = || within(layout::PM1A_EVENT_PORT, PM1_EVENT_BYTES).map(Device::PowerEvent);
    let control = || within(layout::PM1A_CONTROL_PORT, PM1_CONTROL_BYTES).map(Device::PowerControl);
    let command = || within(layout::I8042_COMMAND_PORT, 1).map(|_| Device::I8042Command);
    serial().or_else(event).or_else(control).or_else(command)
}

fn ports_from(port: u16) -> impl Iterator<Item = u16> {
    (0..).map(move |i| port.wrapping_add(i))
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
        (PortBus::new(Box::new(console.clone()), irq, Box::new(|_| {}), Arc::default()), console)
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
        for port in [0x80, 0xcf8, 0xcfc, 0x400, 0x5fc, 0x606, 0xfffe] {
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

    #[test]
    fn a_guest_that_enables_the_power_button_sees_it_pressed_and_clears_it() {
        let (bus, _) = bus();
        let status = || {
            let mut status = [0; 2];
            bus.read(0x600, &mut status);
            u16::from_le_bytes(status)
        };
        assert_eq!(bus.write(0x602, &0x100u16.to_le_bytes()), None);
        assert_eq!(status(), 0);
        assert!(bus.press_power_button());
        assert_eq!(status(), 0x100);
        assert_eq!(bus.write(0x600, &0x100u16.to_le_bytes()), None);
        assert_eq!(status(), 0);
    }
}
