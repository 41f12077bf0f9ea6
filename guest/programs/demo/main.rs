//! The demo guest: a bare-metal program with work that is known exactly.
//!
//! It needs a machine that starts every vCPU at the ELF entry (see entry.s), a serial port at 0x3f8 and a power-off
//! port. It prints how often it called each of its functions, counted where the calls are made, so that a debugger's or
//! a prober's own count can be compared. It uses no instruction beyond the integer set, because a host without hardware
//! virtualization runs it in KVM's instruction emulator.
//!
//! How it ends: power-off when all is well; reset, after a line `demo: FAIL ...`, when a result was wrong; triple fault,
//! after a line `demo: exception ...`, when an exception came that it did not cause itself.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod exceptions;
mod families;
mod functions;
mod ports;
mod serial;

use core::arch::global_asm;
use core::hint::spin_loop;
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

global_asm!(
    include_str!("../function.s"),
    include_str!("entry.s"),
    include_str!("functions.s"),
    include_str!("families/table.s"),
    include_str!("families/moves.s"),
    include_str!("families/stack.s"),
    include_str!("families/arithmetic.s"),
    include_str!("families/branches.s"),
    include_str!("families/strings.s"),
    include_str!("families/system.s"),
    include_str!("families/layout.s"),
    options(raw)
);

/// As many vCPUs as entry.s has stacks for.
const MAX_CPUS: u64 = 64;

/// vCPUs that have finished their part.
static FINISHED: AtomicU64 = AtomicU64::new(0);
/// Set by vCPU 0 once the exception table is complete.
static READY: AtomicU64 = AtomicU64::new(0);

/// Called by entry.s on every vCPU.
#[unsafe(no_mangle)]
extern "C" fn demo_main(cpu: u64, cpus: u64, ram: u64) -> ! {
    if cpu == 0 {
        first(cpus, ram)
    }
    while READY.load(Ordering::Acquire) == 0 {
        spin_loop();
    }
    exceptions::load_table();
    functions::run_on_every_cpu(cpu);
    FINISHED.fetch_add(1, Ordering::Release);
    ports::halt_forever()
}

/// vCPU 0: everything that is done once, its share of what all do, and the report.
fn first(cpus: u64, ram: u64) -> ! {
    ports::mask_interrupts();
    serial::init();
    exceptions::build_table();
    exceptions::load_table();

    serial::text("demo: vmprobe's built-in guest, ");
    serial::decimal(cpus);
    serial::text(if cpus == 1 { " vCPU, " } else { " vCPUs, " });
    serial::decimal(ram >> 20);
    serial::text(" MiB\n");
    if cpus == 0 || cpus > MAX_CPUS {
        serial::fail("vcpus", "expected 1 to", MAX_CPUS, "but got", cpus);
    }
    READY.store(1, Ordering::Release);

    functions::run_on_every_cpu(0);
    functions::run_once();
    families::run();
    while FINISHED.load(Ordering::Acquire) != cpus - 1 {
        spin_loop();
    }

    functions::report(cpus);
    families::report();
    serial::text("demo: ok\n");
    ports::power_off()
}

/// No code here panics; the linker drops this and its formatting unless that changes.
#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    serial::text("demo: FAIL panic\n");
    ports::reset()
}
