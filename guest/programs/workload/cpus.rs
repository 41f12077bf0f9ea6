//! The processors: how many there are, a process on each, and what the kernel says of them.

use core::ffi::CStr;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::syscall;
use crate::text::{count, fail};
use crate::{Counts, close, open, parse};

/// Bits that a mask of processors has, which is more than the machine has processors.
const MASK_WORDS: usize = 16;
type Mask = [u64; MASK_WORDS];

const CPUINFO: &CStr = c"/proc/cpuinfo";
/// A line of it has fewer bytes: the flags are the longest.
const LINE_BYTES: usize = 4096;

/// How many processors there are. They are numbered from 0.
pub fn number() -> u64 {
    let mut mask: Mask = [0; MASK_WORDS];
    if syscall::affinity(&mut mask) <= 0 {
        fail(b"sched_getaffinity");
    }
    mask.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Has this process run on one processor only.
pub fn pin(cpu: u64) {
    let mut mask: Mask = [0; MASK_WORDS];
    if let Some(word) = mask.get_mut((cpu / 64) as usize) {
        *word = 1 << (cpu % 64);
    }
    if syscall::set_affinity(&mask) != 0 {
        fail(b"sched_setaffinity");
    }
}

/// Waits until `all` processes have come here.
pub fn meet(arrived: &AtomicU64, all: u64) {
    arrived.fetch_add(1, Ordering::AcqRel);
    while arrived.load(Ordering::Acquire) < all {
        syscall::sched_yield();
    }
}

/// Checks that every processor is a core of one package, and says how many there are.
pub fn run(counts: &Counts, cpus: u64) {
    let mut seen = 0;
    let file = open(counts, CPUINFO);
    let mut line = [0; LINE_BYTES];
    let mut len = 0;
    loop {
        let mut bytes = [0; LINE_BYTES];
        counts.read.fetch_add(1, Ordering::Relaxed);
        let read = syscall::read(file, &mut bytes);
        if read < 0 {
            fail(CPUINFO.to_bytes());
        }
        if read == 0 {
            break;
        }
        for &byte in bytes.get(..read as usize).unwrap_or_default() {
            if byte != b'\n' {
                if let Some(free) = line.get_mut(len) {
                    *free = byte;
                    len += 1;
                }
                continue;
            }
            check(line.get(..len).unwrap_or_default(), cpus, &mut seen);
            len = 0;
        }
    }
    close(counts, file);
    if seen != cpus {
        fail(b"/proc/cpuinfo has not every processor");
    }
    count(b"cpus", seen);
}

/// Checks a line, `key : value`. `seen` processors have begun.
fn check(line: &[u8], cpus: u64, seen: &mut u64) {
    let Some(colon) = line.iter().position(|byte| *byte == b':') else { return };
    let (key, value) = line.split_at(colon);
    let (key, value) = (key.trim_ascii_end(), value.get(1..).unwrap_or_default().trim_ascii());
    let expected = match key {
        b"processor" => {
            *seen += 1;
            *seen - 1
        }
        b"apicid" | b"initial apicid" | b"core id" => *seen - 1,
        b"physical id" => 0,
        b"siblings" | b"cpu cores" => cpus,
        _ => return,
    };
    if parse(value) != expected {
        fail(line);
    }
}
