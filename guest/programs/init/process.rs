//! System calls around a process that is run (x86-64 numbers, arch/x86/entry/syscalls/syscall_64.tbl).

use core::ffi::{CStr, c_char};

use crate::syscall::call;

const IOCTL: u64 = 16;
const EXECVE: u64 = 59;
const WAIT4: u64 = 61;
const MKDIR: u64 = 83;
const SYSLOG: u64 = 103;
const SETSID: u64 = 112;
const SYNC: u64 = 162;

/// Makes a terminal the session's (ioctl_tty(2)).
const TIOCSCTTY: u64 = 0x540e;
/// Keeps the kernel's messages, but for the gravest, off the console (syslog(2)).
const SYSLOG_ACTION_CONSOLE_OFF: u64 = 6;
/// "Interrupted system call".
const EINTR: i64 = -4;

pub fn make_directory(path: &CStr, mode: u64) {
    // SAFETY: the path is read, and ends with a zero byte.
    unsafe { call(MKDIR, path.as_ptr() as u64, mode, 0, 0, 0, 0) };
}

/// Has this process lead a session on the console, so that a shell has job control.
pub fn lead_session() {
    // SAFETY: touches no memory.
    unsafe {
        call(SETSID, 0, 0, 0, 0, 0, 0);
        call(IOCTL, 0, TIOCSCTTY, 0, 0, 0, 0);
    }
}

/// Becomes another program; returns only if that is impossible.
///
/// # Safety
/// Both lists must end with a null pointer, and their strings with a zero byte.
pub unsafe fn execute(path: &CStr, arguments: &[*const c_char], environment: &[*const c_char]) {
    let lists = (arguments.as_ptr() as u64, environment.as_ptr() as u64);
    // SAFETY: the kernel reads what the caller answers for.
    unsafe { call(EXECVE, path.as_ptr() as u64, lists.0, lists.1, 0, 0, 0) };
}

/// Takes the status of every process that ends, until this one has. Its status.
pub fn wait_for(process: i64) -> i32 {
    const ANY: u64 = -1_i64 as u64;
    loop {
        let mut status = 0_i32;
        // SAFETY: the kernel writes the status.
        let ended = unsafe { call(WAIT4, ANY, &raw mut status as u64, 0, 0, 0, 0) };
        if ended == process || (ended < 0 && ended != EINTR) {
            return status;
        }
    }
}

pub fn quiet_console() {
    // SAFETY: touches no memory.
    unsafe { call(SYSLOG, SYSLOG_ACTION_CONSOLE_OFF, 0, 0, 0, 0, 0) };
}

pub fn sync() {
    // SAFETY: touches no memory.
    unsafe { call(SYNC, 0, 0, 0, 0, 0, 0) };
}
