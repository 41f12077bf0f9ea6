//! The guest's own debugging, as a kernel developer would use it through tracefs: the function tracer, kprobes, uprobes,
//! a tracepoint, and a jump label. Each rewrites kernel or user text while the system runs, and each must see exactly what it
//! would see without a prober on the host.

use core::ffi::CStr;

use crate::syscall;
use crate::text::{count, fail};
use crate::{Counts, MISSING_FILE, close, open, open_to_write};

/// Calls that each tool is to see.
const CALLS: u64 = 20;

const TRACE: &CStr = c"/tracing/trace";
const SWITCH: &CStr = c"/tracing/tracing_on";
const KPROBES: &CStr = c"/tracing/kprobe_events";
const UPROBES: &CStr = c"/tracing/uprobe_events";

// SAFETY: entry.s defines it; it keeps to the C calling convention.
unsafe extern "C" {
    safe fn traced_function();
}

/// Room for what the trace file holds at once.
static mut BUFFER: [u8; 1 << 18] = [0; 1 << 18];

/// Runs every tool and prints what each saw. `kprobe` is where the kernel's own kprobe goes, in its language.
pub fn run(counts: &Counts, kprobe: Option<&[u8]>) {
    if syscall::mount(c"tracefs", c"/tracing") != 0 {
        fail(b"mount tracefs");
    }
    function_tracer(counts);
    if let Some(place) = kprobe {
        kernel_probe(counts, place);
    }
    user_probe(counts);
    tracepoint(counts);
    jump_label(counts);
}

/// A file of tracefs or procfs set to `text`. Truncating the lists of probes takes all of them out.
fn set(counts: &Counts, path: &CStr, text: &[u8]) {
    let file = open_to_write(counts, path);
    if syscall::write(file, text) != text.len() as i64 {
        fail(path.to_bytes());
    }
    close(counts, file);
}

/// Lines of the trace with `word` in them, without comments.
fn lines_with(counts: &Counts, word: &[u8]) -> u64 {
    let file = open(counts, TRACE);
    // SAFETY: the program has one thread, and no other reference to the buffer is alive.
    let buffer = unsafe { &mut *(&raw mut BUFFER) };
    let mut len = 0;
    loop {
        let read = syscall::pread(file, &mut buffer[len..], len as u64);
        if read < 0 {
            fail(TRACE.to_bytes());
        }
        if read == 0 {
            break;
        }
        len += read as usize;
    }
    close(counts, file);
    let text = &buffer[..len];
    let mut found = 0;
    for line in text.split(|byte| *byte == b'\n') {
        let hit = line.windows(word.len()).any(|window| window == word);
        if hit && !line.starts_with(b"#") {
            found += 1;
        }
    }
    found
}

fn open_missing_file(counts: &Counts) {
    counts.opened();
    if syscall::openat(MISSING_FILE) != syscall::ENOENT {
        fail(b"openat of a missing file");
    }
}

/// Reports what a tool saw; anything but the `expected` lines ends the run.
fn report(name: &[u8], seen: u64, expected: u64) {
    count(name, seen);
    if seen != expected {
        fail(name);
    }
}

/// The kernel turns the nop at the function's entry into a call of its tracer, and back.
fn function_tracer(counts: &Counts) {
    set(counts, c"/tracing/set_ftrace_filter", b"do_sys_openat2");
    set(counts, c"/tracing/current_tracer", b"function");
    for _ in 0..CALLS {
        open_missing_file(counts);
    }
    // Opening the switch is the last call that it sees.
    set(counts, SWITCH, b"0");
    report(b"own_ftrace", lines_with(counts, b": do_sys_openat2 <-"), CALLS + 1);
    set(counts, c"/tracing/current_tracer", b"nop");
    set(counts, c"/tracing/set_ftrace_filter", b"\n");
    set(counts, TRACE, b"\n");
    set(counts, SWITCH, b"1");
}

/// The kernel's own int3, or its call, on a function that the host may probe too; and its return probe.
fn kernel_probe(counts: &Counts, place: &[u8]) {
    let mut definition = [0; 128];
    let start = b"p:own ";
    let len = start.len() + place.len();
    if len > definition.len() {
        fail(b"kprobe= is too long");
    }
    definition[..start.len()].copy_from_slice(start);
    definition[start.len()..len].copy_from_slice(place);
    set(counts, KPROBES, &definition[..len]);
    set(counts, c"/tracing/events/kprobes/own/enable", b"1");
    for _ in 0..CALLS {
        open_missing_file(counts);
    }
    set(counts, c"/tracing/events/kprobes/own/enable", b"0");
    set(counts, SWITCH, b"0");
    // The opening of `enable` to switch it off is seen too.
    report(b"own_kprobe", lines_with(counts, b": own: ("), CALLS + 1);
    set(counts, KPROBES, b"");
    set(counts, TRACE, b"\n");
    set(counts, SWITCH, b"1");

    set(counts, KPROBES, b"r:back do_sys_openat2 value=$retval:s32");
    set(counts, c"/tracing/events/kprobes/back/enable", b"1");
    for _ in 0..CALLS {
        open_missing_file(counts);
    }
    set(counts, c"/tracing/events/kprobes/back/enable", b"0");
    set(counts, SWITCH, b"0");
    report(b"own_kretprobe", lines_with(counts, b" value=-2"), CALLS);
    set(counts, KPROBES, b"");
    set(counts, TRACE, b"\n");
    set(counts, SWITCH, b"1");
}

/// An int3 of the kernel's in this program.
fn user_probe(counts: &Counts) {
    let mut definition = [0; 64];
    let start = b"p:user /init:0x";
    definition[..start.len()].copy_from_slice(start);
    let mut len = start.len();
    let offset = file_offset(counts, traced_function as *const () as u64);
    for shift in (0..8).rev() {
        definition[len] = b"0123456789abcdef"[(offset >> (4 * shift) & 15) as usize];
        len += 1;
    }
    set(counts, UPROBES, &definition[..len]);
    set(counts, c"/tracing/events/uprobes/user/enable", b"1");
    for _ in 0..CALLS {
        traced_function();
    }
    set(counts, c"/tracing/events/uprobes/user/enable", b"0");
    report(b"own_uprobe", lines_with(counts, b": user: ("), CALLS);
    set(counts, UPROBES, b"");
    set(counts, TRACE, b"\n");
}

/// Where the byte at `address` is in this program's file, by its program headers (System V ABI, 5).
fn file_offset(counts: &Counts, address: u64) -> u64 {
    const PT_LOAD: u64 = 1;
    let file = open(counts, c"/init");
    let mut header = [0; 1024];
    let read = syscall::pread(file, &mut header, 0);
    close(counts, file);
    if read < 64 {
        fail(b"/init");
    }
    let word = |at: usize, len: usize| {
        header.get(at..at + len).into_iter().flatten().rev().fold(0, |word, byte| word << 8 | u64::from(*byte))
    };
    let (table, size, entries) = (word(32, 8) as usize, word(54, 2) as usize, word(56, 2) as usize);
    for index in 0..entries {
        let entry = table + index * size;
        let (kind, offset, start, len) =
            (word(entry, 4), word(entry + 8, 8), word(entry + 16, 8), word(entry + 32, 8));
        if kind == PT_LOAD && address >= start && address - start < len {
            return address - start + offset;
        }
    }
    fail(b"the program headers of /init")
}

/// Static keys and calls of the tracepoint.
fn tracepoint(counts: &Counts) {
    set(counts, c"/tracing/events/syscalls/sys_enter_getppid/enable", b"1");
    for _ in 0..CALLS {
        counts.asked();
        syscall::getppid();
    }
    set(counts, c"/tracing/events/syscalls/sys_enter_getppid/enable", b"0");
    report(b"own_tracepoint", lines_with(counts, b": sys_getppid("), CALLS);
    set(counts, TRACE, b"\n");
}

/// A static key all over the scheduler.
fn jump_label(counts: &Counts) {
    for _ in 0..CALLS {
        set(counts, c"/proc/sys/kernel/sched_schedstats", b"1");
        set(counts, c"/proc/sys/kernel/sched_schedstats", b"0");
    }
    count(b"own_jump_label", 2 * CALLS);
}
