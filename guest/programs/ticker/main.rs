//! The ticker: a guest that goes on until it is stopped, all of it in ticker.s.

#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(include_str!("../function.s"), include_str!("ticker.s"), options(raw));

/// There is no Rust code that could panic.
#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    loop {}
}
