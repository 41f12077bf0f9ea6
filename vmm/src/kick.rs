//! Takes a vCPU thread out of KVM_RUN: a real-time signal with a handler that does nothing, so that the ioctl returns EINTR.
//!
//! A signal that arrives just before KVM_RUN is lost; the sender repeats it until the thread has answered.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::thread::JoinHandle;
use std::time::Duration;

use std::os::unix::thread::JoinHandleExt;
use vmm_sys_util::errno;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

extern "C" fn ignore(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {}

/// Installs the signal's handler, once per process.
pub(crate) fn install() -> Result<(), errno::Error> {
    static INSTALLED: OnceLock<Result<(), errno::Error>> = OnceLock::new();
    *INSTALLED.get_or_init(|| register_signal_handler(SIGRTMIN(), ignore))
}

/// Lets the signal reach the calling thread, whatever mask it inherited.
pub(crate) fn accept() {
    if let Err(error) = unblock_signal(SIGRTMIN()) {
        tracing::warn!(%error, "The kick signal stays blocked");
    }
}

/// How often a kick is repeated until its thread has answered.
pub(crate) const KICK_REPEAT: Duration = Duration::from_millis(1);

/// A thread that can be kicked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    thread: libc::pid_t,
}

impl Target {
    /// The calling thread. It should not be kicked once it has ended: its number may then be another thread's.
    pub fn this_thread() -> Self {
        // SAFETY: gettid(2) takes nothing and cannot fail.
        Self { thread: unsafe { libc::gettid() } }
    }

    /// Sends the signal.
    pub fn send(self) {
        // SAFETY: tgkill(2) takes three integers and touches no memory of ours; a thread that is not in this process gives
        // ESRCH, and every thread of this process has the handler, once `install` has been called.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, SIGRTMIN()) };
        if sent != 0 {
            tracing::debug!(error = %std::io::Error::last_os_error(), "Kick");
        }
    }
}

/// Sends the signal to a thread that has not been joined.
pub(crate) fn send<T>(thread: &JoinHandle<T>) {
    if let Err(error) = thread.kill(SIGRTMIN()) {
        tracing::debug!(%error, "Kick");
    }
}

/// CPU time that a thread has used, guest code included; `None` once it has ended.
pub(crate) fn cpu_time<T>(thread: &JoinHandle<T>) -> Option<Duration> {
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pthread_t is valid until the thread is joined, and joining takes the JoinHandle by value, which the
    // borrow prevents; `clock` is a valid place for the result.
    let found = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
    // SAFETY: `time` is a valid place for the result; an id of an ended thread gives EINVAL.
    if found != 0 || unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return None;
    }
    Some(Duration::new(u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn a_kick_interrupts_a_sleeping_system_call() {
        install().unwrap();
        let (ready, is_ready) = mpsc::channel();
        let thread = thread::spawn(move || {
            accept();
            ready.send(()).unwrap();
            let wait = libc::timespec { tv_sec: 60, tv_nsec: 0 };
            // SAFETY: `wait` is valid; no remainder is asked for.
            unsafe { libc::nanosleep(&raw const wait, std::ptr::null_mut()) }
        });
        is_ready.recv().unwrap();
        while !thread.is_finished() {
            send(&thread);
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(thread.join().unwrap(), -1);
    }

    #[test]
    fn cpu_time_grows_with_work_and_stands_still_without() {
        let (stop, stopped) = mpsc::channel::<()>();
        let busy =
            thread::spawn(move || while matches!(stopped.try_recv(), Err(mpsc::TryRecvError::Empty)) {});
        let (wake, woken) = mpsc::channel::<()>();
        let (idle_ready, idle_is_ready) = mpsc::channel();
        let idle = thread::spawn(move || {
            idle_ready.send(()).unwrap();
            woken.recv().unwrap_or(());
        });
        idle_is_ready.recv().unwrap();
        thread::sleep(Duration::from_millis(20));
        let (busy_before, idle_before) = (cpu_time(&busy).unwrap(), cpu_time(&idle).unwrap());
        while cpu_time(&busy).unwrap() <= busy_before {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(cpu_time(&idle).unwrap(), idle_before);
        drop((stop, wake));
        busy.join().unwrap();
        idle.join().unwrap();
    }
}
