//! The power button: the stock kernel's ACPI button is an input device, whose events evdev.ko hands out.

use core::ffi::CStr;

use crate::syscall;
use crate::text::{Line, fail};

const MODULES: [&CStr; 2] = [c"/modules/button.ko", c"/modules/evdev.ko"];
/// The first input device, in the initramfs. The machine has no other.
const DEVICE: &CStr = c"/modules/event0";

/// struct input_event (Linux: include/uapi/linux/input.h): time, type, code, value.
const EVENT_BYTES: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: u32 = 1;

/// Waits until the button is pressed.
pub fn wait() {
    for path in MODULES {
        let module = syscall::openat(path);
        if module < 0 || syscall::load_module(module) != 0 {
            fail(path.to_bytes());
        }
        syscall::close(module);
    }
    let device = syscall::openat(DEVICE);
    if device < 0 {
        fail(DEVICE.to_bytes());
    }
    Line::new().text(b"workload: waits for the power button").print();
    loop {
        let mut event = [0; EVENT_BYTES];
        if syscall::read(device, &mut event) != EVENT_BYTES as i64 {
            fail(DEVICE.to_bytes());
        }
        let [.., type_0, type_1, code_0, code_1, a, b, c, d] = event;
        let kind = (u16::from_le_bytes([type_0, type_1]), u16::from_le_bytes([code_0, code_1]));
        if kind == (EV_KEY, KEY_POWER) && u32::from_le_bytes([a, b, c, d]) == PRESSED {
            break;
        }
    }
    Line::new().text(b"workload: the power button was pressed").print();
}
