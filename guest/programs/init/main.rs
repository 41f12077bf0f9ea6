//! The init process that runs one command: `/vmprobe/sh /vmprobe/command`, with the usual file systems mounted, the console as its
//! input and output, and the words of the kernel's command line in its environment. When it ends, init writes how it ended as the
//! console's last line, `vmprobe: exit code N` or `vmprobe: signal N`, and restarts the machine.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod process;
#[path = "../workload/syscall.rs"]
#[allow(dead_code, reason = "it makes other system calls than the workload")]
mod syscall;
#[path = "../workload/text.rs"]
#[allow(dead_code, reason = "it counts nothing")]
mod text;

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;
use core::ptr;

use text::Line;

global_asm!(include_str!("../workload/memory.s"), include_str!("entry.s"), options(raw));

/// Where the virtual file systems go, and their modes. A file system that is there already, or that the kernel does not have, is no
/// error: the command will say what it misses.
const FILE_SYSTEMS: [(&CStr, &CStr, u64); 5] = [
    (c"proc", c"/proc", 0o555),
    (c"sysfs", c"/sys", 0o555),
    (c"devtmpfs", c"/dev", 0o755),
    (c"tmpfs", c"/tmp", 0o777),
    (c"tmpfs", c"/run", 0o755),
];

const SHELL: &CStr = c"/vmprobe/sh";
const COMMAND: &CStr = c"/vmprobe/command";
const PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a shell ends with when it does not find a command (POSIX, 2.8.2 Exit Status for Commands).
const NOT_FOUND: u64 = 127;

/// The kernel hands on 32 words at most (init/main.c, MAX_INIT_ENVS); our own and the end come besides.
const WORDS: usize = 34;

/// Called by entry.s with the address of argc.
#[unsafe(no_mangle)]
extern "C" fn init_main(stack: *const u64) -> ! {
    for (kind, at, mode) in FILE_SYSTEMS {
        process::make_directory(at, mode);
        syscall::mount(kind, at);
    }
    // SAFETY: the kernel's start-up layout (entry.s).
    let environment = unsafe { environment(stack) };
    let arguments = [c"sh".as_ptr(), COMMAND.as_ptr(), ptr::null()];
    let child = syscall::fork();
    if child == 0 {
        process::lead_session();
        // SAFETY: both lists end with a null pointer, and every string with a zero byte.
        unsafe { process::execute(SHELL, &arguments, &environment) };
        Line::new().text(b"vmprobe: /vmprobe/sh cannot be run").print();
        syscall::exit(NOT_FOUND)
    }
    let status = if child < 0 { (NOT_FOUND as i32) << 8 } else { process::wait_for(child) };
    // What the kernel says from now on would run through the last line.
    text::drain();
    process::quiet_console();
    report(status);
    process::sync();
    text::drain();
    syscall::reboot(syscall::RESTART);
    syscall::exit(1)
}

/// How a process ended, by wait(2)'s status. A line of its own, whatever the command has left unfinished.
fn report(status: i32) {
    let line = Line::new().text(b"\nvmprobe: ");
    let line = match status & 0x7f {
        0 => line.text(b"exit code ").decimal((status >> 8 & 0xff) as u64),
        signal => line.text(b"signal ").decimal(signal as u64),
    };
    line.print();
}

/// What the command finds in its environment.
///
/// # Safety
/// `stack` must be the stack pointer that the kernel started the process with.
unsafe fn environment(stack: *const u64) -> [*const c_char; WORDS] {
    let mut words = [ptr::null(); WORDS];
    words[0] = PATH.as_ptr();
    // SAFETY: argc, as many pointers, a null pointer, and the pointers to the environment's words up to another null pointer.
    unsafe {
        let mut from: *const *const c_char = stack.add(stack.read() as usize + 2).cast();
        // The last one stays null.
        for word in words.iter_mut().take(WORDS - 1).skip(1) {
            *word = from.read();
            if word.is_null() {
                break;
            }
            from = from.add(1);
        }
    }
    words
}

/// No code here panics; the linker drops this unless that changes.
#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    syscall::exit(1)
}
