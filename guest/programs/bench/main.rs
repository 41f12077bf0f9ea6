//! The bench guest: loops whose times the host compares, all of it in bench.s.

#![no_std]
#![no_main]

use core::arch::global_asm;
use core::panic::PanicInfo;

global_asm!(include_str!("../function.s"), include_str!("bench.s"), options(raw));

/// There is no Rust code that could panic.
#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    loop {}
}
