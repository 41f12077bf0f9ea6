//! Calls every function of the family table and checks registers and flags.

use core::mem::MaybeUninit;

use crate::serial;

/// Calls of each function.
const CALLS: u64 = 10;

/// A row of the table, as the macro `family` of families/table.s writes it.
#[repr(C)]
struct Family {
    name: *const u8,
    name_len: u64,
    entry: u64,
    /// RAX, RCX, RDX, RSI, RDI on entry.
    registers: [u64; 5],
    rax: u64,
    flags: u64,
    flags_mask: u64,
}

/// RAX and RFLAGS on return.
#[repr(C)]
struct Seen {
    rax: u64,
    flags: u64,
}

unsafe extern "C" {
    /// The linker script puts these around the table.
    static families_start: Family;
    static families_end: Family;

    /// Returns how many registers were changed that must not be (entry.s).
    fn call_checked(family: *const Family, seen: *mut Seen) -> u64;
}

impl Family {
    fn name(&self) -> &'static str {
        // SAFETY: the macro gives the address and length of ASCII text in read-only data.
        unsafe { str::from_utf8_unchecked(core::slice::from_raw_parts(self.name, self.name_len as usize)) }
    }
}

fn for_each(mut action: impl FnMut(&'static Family)) {
    let mut family = &raw const families_start;
    while family != &raw const families_end {
        // SAFETY: the table consists of whole rows and is never written.
        action(unsafe { &*family });
        // SAFETY: at most one behind the last row.
        family = unsafe { family.add(1) };
    }
}

/// Calls each function CALLS times.
pub fn run() {
    for_each(|family| {
        for _ in 0..CALLS {
            let mut seen = MaybeUninit::uninit();
            // SAFETY: a family function changes only caller-saved registers and the memory set aside for it.
            let changed = unsafe { call_checked(family, seen.as_mut_ptr()) };
            // SAFETY: call_checked stores both fields.
            let seen = unsafe { seen.assume_init() };
            let name = family.name();
            if seen.rax != family.rax {
                serial::fail(name, "expected RAX", family.rax, "got", seen.rax);
            }
            if (seen.flags ^ family.flags) & family.flags_mask != 0 {
                serial::fail(name, "expected RFLAGS", family.flags, "got", seen.flags);
            }
            if changed != 0 {
                serial::fail(name, "expected changed registers", 0, "got", changed);
            }
        }
    });
}

/// Prints the counts.
pub fn report() {
    for_each(|family| serial::count(family.name(), CALLS));
}
