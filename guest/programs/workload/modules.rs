//! Loads and unloads a module of the stock kernel, and has it do countable work: msr.ko reads model-specific registers,
//! also ones that do not exist, at which RDMSR faults inside the kernel.

use crate::syscall;
use crate::text::{count, fail};
use crate::{Counts, close, open};

const MODULE: &core::ffi::CStr = c"/modules/msr.ko";
/// The module's device node, in the initramfs.
const DEVICE: &core::ffi::CStr = c"/modules/msr";
const LOADS: u64 = 2;
/// IA32_EFER, which is always there.
const EFER: u64 = 0xc000_0080;
/// No CPU has it.
const ABSENT: u64 = 0x0bad_0bad;
const READS: u64 = 10;
const FAULTS: u64 = 5;
/// Long mode active (EFER.LMA).
const LMA: u64 = 1 << 10;

/// Does the work and prints its counts.
pub fn run(counts: &Counts) {
    for _ in 0..LOADS {
        let file = open(counts, MODULE);
        if syscall::load_module(file) != 0 {
            fail(b"finit_module");
        }
        close(counts, file);
        let device = open(counts, DEVICE);
        for _ in 0..READS {
            let mut value = [0; 8];
            if syscall::pread(device, &mut value, EFER) != 8 || u64::from_le_bytes(value) & LMA == 0 {
                fail(b"the value of EFER");
            }
        }
        for _ in 0..FAULTS {
            if syscall::pread(device, &mut [0; 8], ABSENT) != syscall::EIO {
                fail(b"a register that is not there");
            }
        }
        close(counts, device);
        if syscall::unload_module(c"msr") != 0 {
            fail(b"delete_module");
        }
    }
    count(b"msr_open", LOADS);
    count(b"msr_read", LOADS * (READS + FAULTS));
    count(b"msr_fault", LOADS * FAULTS);
}
