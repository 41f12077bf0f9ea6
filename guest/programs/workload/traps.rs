//! Breakpoints and single steps of the program's own, which must reach it as SIGTRAP.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::syscall::{self, SignalAction};
use crate::text::fail;

const SIGTRAP: u64 = 5;
const SA_SIGINFO: u64 = 4;
const SA_RESTORER: u64 = 0x0400_0000;
/// Offset of the saved RFLAGS in the handler's third argument (struct ucontext, struct sigcontext_64).
const UCONTEXT_RFLAGS: usize = 40 + 17 * 8;
const TF: u64 = 1 << 8;

/// How often each is raised.
pub const TRAPS: u64 = 5;

static HANDLED: AtomicU64 = AtomicU64::new(0);

// SAFETY: entry.s defines these; the own_* functions keep to the C calling convention.
unsafe extern "C" {
    fn signal_return();
    safe fn own_int3();
    safe fn own_step();
}

extern "C" fn handler(_signal: i32, _info: *const u8, context: *mut u8) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
    // SAFETY: the kernel passes a struct ucontext in this process's memory.
    unsafe {
        let rflags = context.add(UCONTEXT_RFLAGS).cast::<u64>();
        rflags.write(rflags.read() & !TF);
    }
}

/// Raises each trap TRAPS times and checks that each arrived once.
pub fn run() {
    let action = SignalAction {
        handler: handler as *const () as u64,
        flags: SA_SIGINFO | SA_RESTORER,
        restorer: signal_return as *const () as u64,
        mask: 0,
    };
    // SAFETY: the handler takes what SA_SIGINFO passes; the restorer is rt_sigreturn.
    if unsafe { syscall::handle_signal(SIGTRAP, &action) } != 0 {
        fail(b"rt_sigaction");
    }
    let kinds: [(extern "C" fn(), &[u8]); 2] = [(own_int3, b"own_int3"), (own_step, b"own_step")];
    for (trap, name) in kinds {
        HANDLED.store(0, Ordering::Relaxed);
        for _ in 0..TRAPS {
            trap();
        }
        if HANDLED.load(Ordering::Relaxed) != TRAPS {
            fail(name);
        }
    }
}
