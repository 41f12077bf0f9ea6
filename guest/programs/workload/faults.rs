//! Addresses that are not there, given to system calls: the kernel faults where it copies, and its exception table sends it on.

use crate::Counts;
use crate::syscall;
use crate::text::{count, fail};

/// In user space, and mapped by nobody.
const NOWHERE: u64 = 0x10_0000_0000;
const FAULTS: u64 = 10;

/// Makes the calls and prints how many there were.
pub fn run(counts: &Counts) {
    for _ in 0..FAULTS {
        counts.opened();
        if syscall::openat_nowhere(NOWHERE) != syscall::EFAULT {
            fail(b"openat of a name that is not there");
        }
        if syscall::uname_nowhere(NOWHERE) != syscall::EFAULT {
            fail(b"uname to where nothing is");
        }
    }
    count(b"fault_from_user", FAULTS);
    count(b"fault_to_user", FAULTS);
}
