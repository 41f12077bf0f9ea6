//! Calls the functions of functions.s, counts each call where it is made, and checks what came out.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::exceptions::{self, NON_CANONICAL, UNMAPPED};
use crate::serial;

/// Calls of `tick` by vCPU 0 and by each other vCPU.
const TICKS: (u64, u64) = (200, 100);
/// Calls of `smp_add` and of `smp_xadd` by each vCPU, and what one call adds.
const ADDITIONS: u64 = 50;
const ADDEND: u64 = 3;
/// The argument of `fib`, and the result.
const FIB: (u64, u64) = (12, 144);
/// Calls of `copy_bytes` and of `checksum`.
const COPIES: u64 = 10;
/// Calls of each function that raises an exception; `own_fault` is called so often for each of its two kinds.
const EXCEPTIONS: u64 = 5;
/// Bytes copied: seven words and five bytes, so that the loop and the rep movsb both have work.
const LEN: usize = 61;

static SOURCE: [u8; LEN] = pattern();
const CHECKSUM: u64 = rotate_and_xor(&SOURCE_BYTES);
const SOURCE_BYTES: [u8; LEN] = pattern();

struct Copy(UnsafeCell<[u8; LEN]>);
// SAFETY: only vCPU 0 uses it.
unsafe impl Sync for Copy {}
static COPY: Copy = Copy(UnsafeCell::new([0; LEN]));

static TICK_CALLS: AtomicU64 = AtomicU64::new(0);
static ADD_CALLS: AtomicU64 = AtomicU64::new(0);
static XADD_CALLS: AtomicU64 = AtomicU64::new(0);

// SAFETY: functions.s defines these with these signatures; they keep to the C calling convention.
unsafe extern "C" {
    safe fn tick(index: u64, cpu: u64);
    safe fn fib(n: u64) -> u64;
    fn copy_bytes(to: *mut u8, from: *const u8, len: u64) -> *mut u8;
    fn checksum(from: *const u8, len: u64) -> u64;
    safe fn smp_add(n: u64);
    safe fn smp_xadd(n: u64) -> u64;
    pub(crate) safe fn own_int3();
    pub(crate) safe fn own_ud2();
    pub(crate) safe fn own_fault(address: u64);
    safe fn own_step();

    #[link_name = "ticks"]
    safe static TICK_SUM: AtomicU64;
    #[link_name = "fib_calls"]
    safe static FIB_CALLS: AtomicU64;
    #[link_name = "smp_sum"]
    safe static SUM: AtomicU64;
}

/// The functions that every vCPU calls.
pub fn run_on_every_cpu(cpu: u64) {
    let ticks = if cpu == 0 { TICKS.0 } else { TICKS.1 };
    for index in 0..ticks {
        TICK_CALLS.fetch_add(1, Ordering::Relaxed);
        tick(index, cpu);
    }
    for _ in 0..ADDITIONS {
        ADD_CALLS.fetch_add(1, Ordering::Relaxed);
        smp_add(ADDEND);
        XADD_CALLS.fetch_add(1, Ordering::Relaxed);
        smp_xadd(ADDEND);
    }
}

/// The functions that only vCPU 0 calls.
pub fn run_once() {
    FIB_CALLS.fetch_add(1, Ordering::Relaxed);
    serial::check("fib", FIB.1, fib(FIB.0));

    let from = (&raw const SOURCE).cast::<u8>();
    let to = COPY.0.get().cast::<u8>();
    for _ in 0..COPIES {
        // SAFETY: both are LEN bytes long and do not overlap.
        let end = unsafe { copy_bytes(to, from, LEN as u64) };
        serial::check("copy_bytes", to as u64 + LEN as u64, end as u64);
        // SAFETY: LEN bytes long.
        let sum = unsafe { checksum(to, LEN as u64) };
        serial::check("checksum", CHECKSUM, sum);
    }

    for _ in 0..EXCEPTIONS {
        own_int3();
        own_ud2();
        own_step();
        own_fault(NON_CANONICAL);
        own_fault(UNMAPPED);
    }
    let handled = exceptions::handled();
    serial::check("own_int3", EXCEPTIONS, handled.int3);
    serial::check("own_ud2", EXCEPTIONS, handled.ud2);
    serial::check("own_step", EXCEPTIONS, handled.step);
    serial::check("own_fault #GP", EXCEPTIONS, handled.protection);
    serial::check("own_fault #PF", EXCEPTIONS, handled.page);
}

/// Prints the counts, after checking those that the called functions keep themselves.
pub fn report(cpus: u64) {
    let ticks = TICK_CALLS.load(Ordering::Relaxed);
    serial::check("tick", ticks, TICK_SUM.load(Ordering::Relaxed));
    let additions = ADDITIONS * cpus;
    serial::check("smp_add", additions * 2 * ADDEND, SUM.load(Ordering::Relaxed));

    serial::count("tick", ticks);
    serial::count("fib", FIB_CALLS.load(Ordering::Relaxed));
    serial::count("copy_bytes", COPIES);
    serial::count("checksum", COPIES);
    serial::count("smp_add", ADD_CALLS.load(Ordering::Relaxed));
    serial::count("smp_xadd", XADD_CALLS.load(Ordering::Relaxed));
    serial::count("own_int3", EXCEPTIONS);
    serial::count("own_ud2", EXCEPTIONS);
    serial::count("own_step", EXCEPTIONS);
    serial::count("own_fault", 2 * EXCEPTIONS);
}

const fn pattern() -> [u8; LEN] {
    let mut bytes = [0; LEN];
    let mut index = 0;
    while index < LEN {
        bytes[index] = (index * 7 + 3) as u8;
        index += 1;
    }
    bytes
}

/// What `checksum` computes, computed by the compiler.
const fn rotate_and_xor(bytes: &[u8; LEN]) -> u64 {
    let mut sum = 0_u64;
    let mut index = 0;
    while index < LEN {
        sum = sum.rotate_left(5) ^ bytes[index] as u64;
        index += 1;
    }
    sum
}
