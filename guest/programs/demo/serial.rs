//! Text on the first serial port (16550).

use crate::ports;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_CONTROL: u16 = DATA + 3;
const LINE_STATUS: u16 = DATA + 5;
/// Eight bits, no parity, one stop bit.
const EIGHT_BITS: u8 = 3;
const FIFO_ENABLE: u8 = 1;
/// The transmitter has nothing left to send, and takes FIFO_LEN bytes.
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const FIFO_LEN: usize = 16;

/// Polled operation; the speed stays as it is.
pub fn init() {
    ports::write_byte(INTERRUPT_ENABLE, 0);
    ports::write_byte(FIFO_CONTROL, FIFO_ENABLE);
    ports::write_byte(LINE_CONTROL, EIGHT_BITS);
}

fn bytes(bytes: &[u8]) {
    for burst in bytes.chunks(FIFO_LEN) {
        while ports::read_byte(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {}
        for &byte in burst {
            ports::write_byte(DATA, byte);
        }
    }
}

/// Prints text.
pub fn text(text: &str) {
    bytes(text.as_bytes());
}

/// Prints a number in decimal.
pub fn decimal(value: u64) {
    if value >= 10 {
        decimal(value / 10);
    }
    digit(value % 10);
}

/// Prints a number in hexadecimal.
pub fn hex(value: u64) {
    text("0x");
    let mut shift = 60;
    while shift > 0 && value >> shift == 0 {
        shift -= 4;
    }
    loop {
        digit(value >> shift & 0xf);
        if shift == 0 {
            break;
        }
        shift -= 4;
    }
}

fn digit(value: u64) {
    let value = value as u8;
    bytes(&[if value < 10 { b'0' + value } else { b'a' + value - 10 }]);
}

/// Prints one line of the report.
pub fn count(name: &str, calls: u64) {
    text("count ");
    text(name);
    text(" ");
    decimal(calls);
    text("\n");
}

/// Says that something came out wrong, and ends the run.
pub fn fail(name: &str, expected: &str, want: u64, but: &str, got: u64) -> ! {
    text("demo: FAIL ");
    text(name);
    text(": ");
    text(expected);
    text(" ");
    hex(want);
    text(", ");
    text(but);
    text(" ");
    hex(got);
    text("\n");
    ports::reset()
}

/// Fails unless the two are equal.
pub fn check(name: &str, want: u64, got: u64) {
    if want != got {
        fail(name, "expected", want, "got", got);
    }
}
