//! ACPI's fixed power management registers: the PM1a event and control blocks (ACPI specification 6.5, 4.8.3), with a power
//! button and the sleep state S5.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use super::Request;
use crate::snapshot::{Mirror, Pm1};

/// Bytes of the event block: status, then enable.
pub(crate) const PM1_EVENT_BYTES: u8 = 4;
/// Bytes of the control block.
pub(crate) const PM1_CONTROL_BYTES: u8 = 2;

/// Of status and enable (tables 4.13 and 4.14): the power button.
const POWER_BUTTON: u16 = 1 << 8;
/// Of status and enable: what raises the interrupt. Timer, global lock, power button, sleep button, clock.
const EVENTS: u16 = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;

/// Of control (table 4.15): the machine is in ACPI mode; it has no other.
const SCI_EN: u16 = 1 << 0;
/// Of control: bus master reload and sleep type, which a guest reads back. Global release and SLP_EN read 0.
const CONTROL_KEPT: u16 = 1 << 1 | 0b111 << 10;
/// Of control, as seen in its high byte: go to the sleep state.
const HIGH_SLP_EN: u8 = 1 << 5;

/// The interrupt line of these registers, to be set to a level.
pub(crate) type InterruptLine = Box<dyn Fn(bool) + Send + Sync>;

/// The registers and their interrupt, which is high while an enabled event is pending.
pub(super) struct PowerManagement {
    registers: Mutex<Registers>,
    interrupt: InterruptLine,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Registers {
    pub status: u16,
    pub enable: u16,
    pub control: u16,
}

impl Registers {
    fn interrupt(self) -> bool {
        self.status & self.enable & EVENTS != 0
    }
}

impl fmt::Debug for PowerManagement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PowerManagement").field("registers", &self.registers).finish_non_exhaustive()
    }
}

impl PowerManagement {
    pub fn new(interrupt: InterruptLine) -> Self {
        Self { registers: Mutex::default(), interrupt }
    }

    pub fn save(&self) -> Pm1 {
        Pm1::save(&self.registers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub fn restore(&self, saved: &Pm1) {
        self.change(|registers| *registers = saved.restore());
    }

    /// Presses the power button and lets go of it. Returns whether the guest listens: it has enabled the event.
    pub fn press_power_button(&self) -> bool {
        self.change(|registers| {
            registers.status |= POWER_BUTTON;
            registers.enable & POWER_BUTTON != 0
        })
    }

    /// Reads a byte of the event block.
    pub fn read_event(&self, offset: u8) -> u8 {
        let registers = *self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let word = if offset < 2 { registers.status } else { registers.enable };
        word.to_le_bytes()[usize::from(offset % 2)]
    }

    /// Writes a byte of the event block: a one clears a bit of the status, and sets one of the enable register.
    pub fn write_event(&self, offset: u8, value: u8) {
        self.change(|registers| {
            let at = usize::from(offset % 2);
            if offset < 2 {
                let mut cleared = [0; 2];
                cleared[at] = value;
                registers.status &= !u16::from_le_bytes(cleared);
            } else {
                let mut bytes = registers.enable.to_le_bytes();
                bytes[at] = value;
                registers.enable = u16::from_le_bytes(bytes);
            }
        });
    }

    /// Reads a byte of the control block.
    pub fn read_control(&self, offset: u8) -> u8 {
        let control = self.registers.lock().unwrap_or_else(PoisonError::into_inner).control;
        (control | SCI_EN).to_le_bytes()[usize::from(offset % 2)]
    }

    /// Writes a byte of the control block. Every sleep state is S5, the only one that the guest is told of.
    pub fn write_control(&self, offset: u8, value: u8) -> Option<Request> {
        self.change(|registers| {
            let mut bytes = registers.control.to_le_bytes();
            bytes[usize::from(offset % 2)] = value;
            registers.control = u16::from_le_bytes(bytes) & CONTROL_KEPT;
        });
        (offset == 1 && value & HIGH_SLP_EN != 0).then_some(Request::PowerOff)
    }

    /// Changes the registers, and the interrupt with them. The line is set with the lock held, so that its level is that of the last
    /// change.
    fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let before = registers.interrupt();
        let result = change(&mut registers);
        if registers.interrupt() != before {
            (self.interrupt)(registers.interrupt());
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    type Levels = Arc<Mutex<Vec<bool>>>;

    fn power() -> (PowerManagement, Levels) {
        let levels = Levels::default();
        let log = Arc::clone(&levels);
        (PowerManagement::new(Box::new(move |level| log.lock().unwrap().push(level))), levels)
    }

    fn status(power: &PowerManagement) -> [u8; 2] {
        [power.read_event(0), power.read_event(1)]
    }

    #[test]
    fn a_pressed_button_raises_the_line_until_the_guest_clears_its_status() {
        let (power, levels) = power();
        power.write_event(3, 1);
        assert!(power.press_power_button());
        assert!(power.press_power_button(), "twice is once");
        assert_eq!((status(&power), power.read_event(3)), ([0, 1], 1));
        power.write_event(0, 0xff);
        assert_eq!(status(&power), [0, 1], "the low byte's ones clear none of the high byte");
        power.write_event(1, 1);
        assert_eq!(status(&power), [0, 0]);
        assert_eq!(*levels.lock().unwrap(), [true, false]);
    }

    #[test]
    fn a_button_that_nobody_listens_to_is_remembered() {
        let (power, levels) = power();
        assert!(!power.press_power_button());
        assert!(levels.lock().unwrap().is_empty());
        power.write_event(3, 1);
        assert_eq!(*levels.lock().unwrap(), [true]);
        power.write_event(3, 0);
        assert_eq!(*levels.lock().unwrap(), [true, false]);
    }

    #[test]
    fn control_reads_back_what_was_written_but_for_its_triggers() {
        let (power, _) = power();
        let control = || [power.read_control(0), power.read_control(1)];
        assert_eq!(control(), [1, 0], "ACPI mode");
        assert_eq!(power.write_control(0, 0), None);
        assert_eq!(control(), [1, 0], "which cannot be left");
        assert_eq!(power.write_control(1, 0x14), None);
        assert_eq!(control(), [1, 0x14]);
        assert_eq!(power.write_control(0, 0xff), None);
        assert_eq!(power.write_control(1, 0x3c), Some(Request::PowerOff));
        assert_eq!(control(), [3, 0x1c]);
    }
}
