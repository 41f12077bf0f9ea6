//! Lines on the console, each one write.

use crate::syscall;

const CONSOLE: i64 = 1;

/// A line under construction; what does not fit is cut off.
pub struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Line {
    pub fn new() -> Self {
        Line { bytes: [0; 256], len: 0 }
    }

    pub fn text(mut self, text: &[u8]) -> Self {
        for &byte in text {
            self.push(byte);
        }
        self
    }

    pub fn decimal(mut self, value: u64) -> Self {
        if value >= 10 {
            self = self.decimal(value / 10);
        }
        self.push(b'0' + (value % 10) as u8);
        self
    }

    fn push(&mut self, byte: u8) {
        if let Some(free) = self.bytes.get_mut(self.len) {
            *free = byte;
            self.len += 1;
        }
    }

    pub fn print(mut self) {
        self.push(b'\n');
        syscall::write(CONSOLE, self.bytes.get(..self.len).unwrap_or_default());
    }
}

/// Prints one line of the report.
pub fn count(name: &[u8], calls: u64) {
    Line::new().text(b"count ").text(name).text(b" ").decimal(calls).print();
}

/// Says that something came out wrong, and ends the process. In PID 1 the kernel then panics.
pub fn fail(what: &[u8]) -> ! {
    Line::new().text(b"workload: FAIL ").text(what).print();
    drain();
    syscall::exit(1)
}

/// Waits until the console has sent everything.
pub fn drain() {
    syscall::drain(CONSOLE);
}
