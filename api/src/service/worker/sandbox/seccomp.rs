//! The system calls of a machine's process. Any other ends it with SIGSYS, which the service reports.
//!
//! The list was found with strace(1) on machines that live through all that clients can do with them, with glibc, and has what musl and
//! rare ways of the same libraries take. Nothing on it opens, connects or executes.

use std::collections::BTreeMap;

use SeccompCmpOp::{Eq, MaskedEq};
use rustix::process::getpid;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Memory, without what depends on the protection.
const MEMORY: &[i64] = &[libc::SYS_brk, libc::SYS_madvise, libc::SYS_mremap, libc::SYS_munmap];

/// Threads: made, named by their signal stacks, waiting for each other, ended; the process's end.
const THREADS: &[i64] = &[
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
];

/// Signals: SIGTERM, the kick that takes a vCPU out of KVM_RUN, a stack overflow's report.
const SIGNALS: &[i64] = &[
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

/// Time, where the vDSO does not tell it: a thread's own, or a host whose clock the vDSO cannot read. musl sleeps with nanosleep.
const TIME: &[i64] = &[libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_nanosleep];

/// What is open already, and the socket's connections: tokio's loop. No sendmsg and recvmsg, which pass descriptors on.
const DESCRIPTORS: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_write,
    libc::SYS_writev,
];

/// Questions that tell nothing of others. [`crate::service::socket::check_peer`] asks for the user; hash tables for random bytes.
const QUESTIONS: &[i64] = &[libc::SYS_geteuid, libc::SYS_getrandom];

/// The content of files that are open: disks, the journal.
const CONTENT: &[i64] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
];

/// Files below the directories that the process may write, beside [`CONTENT`] and [`OPENING`]; Landlock says which those are.
const FILES: &[i64] = &[libc::SYS_flock, libc::SYS_getdents64, libc::SYS_rename, libc::SYS_unlink];

/// What finds or opens a file. Libraries ask for files that they can do without: a panic's backtrace for the program, tokio for the
/// cgroup's limits, glibc's heap for /proc/sys/vm/overcommit_memory and the number of CPUs. So this is refused, not punished.
const OPENING: &[i64] = &[
    libc::SYS_access,
    libc::SYS_getcwd,
    libc::SYS_lstat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_statx,
];

/// Numbers of KVM's ioctls are of this type (Linux: include/uapi/linux/kvm.h, KVMIO), in the second byte (ioctl(2)).
const KVM_IOCTL: u32 = 0xae00;
const IOCTL_TYPE: u64 = 0xff00;

/// Linux: include/uapi/asm-generic/ioctls.h.
const FIONBIO: u32 = 0x5421;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Adds a way to make a call: with argument `index`, an `int`, as `op` and `value` say.
fn allow_where(
    rules: &mut Rules,
    call: i64,
    index: u8,
    op: SeccompCmpOp,
    value: u32,
) -> Result<(), BackendError> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, op, value.into())?;
    rules.entry(call).or_default().push(SeccompRule::new(vec![condition])?);
    Ok(())
}

/// The files of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct Files {
    /// It reads and writes some that are open.
    pub opened: bool,
    /// It opens, makes and removes some.
    pub below: bool,
}

fn allowed(files: Files) -> Result<Rules, BackendError> {
    let mut plain = [MEMORY, THREADS, SIGNALS, TIME, DESCRIPTORS, QUESTIONS, OPENING].concat();
    if files.opened || files.below {
        plain.extend(CONTENT);
    }
    if files.below {
        plain.extend(FILES);
    }
    let mut rules: Rules = plain.into_iter().map(|call| (call, Vec::new())).collect();
    // KVM, and sockets that do not block.
    allow_where(&mut rules, libc::SYS_ioctl, 1, MaskedEq(IOCTL_TYPE), KVM_IOCTL)?;
    allow_where(&mut rules, libc::SYS_ioctl, 1, Eq, FIONBIO)?;
    // No memory becomes code.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        allow_where(&mut rules, call, 2, MaskedEq(libc::PROT_EXEC.cast_unsigned().into()), 0)?;
    }
    // Threads, and no processes. clone3 has its flags where seccomp does not see them; without it libraries take this one.
    let thread = libc::CLONE_THREAD.cast_unsigned();
    allow_where(&mut rules, libc::SYS_clone, 0, MaskedEq(thread.into()), thread)?;
    rules.insert(libc::SYS_clone3, Vec::new());
    // Signals to its own threads: the kick, and abort(3).
    allow_where(&mut rules, libc::SYS_tgkill, 0, Eq, getpid().as_raw_pid().cast_unsigned())?;
    // Names of threads and, in newer C libraries, of memory.
    for option in [libc::PR_SET_NAME, libc::PR_SET_VMA] {
        allow_where(&mut rules, libc::SYS_prctl, 0, Eq, option.cast_unsigned())?;
    }
    // Limits are asked for, by pthread_getattr_np(3), and not set: the third argument is a null pointer.
    let nothing = SeccompCondition::new(2, SeccompCmpArgLen::Qword, Eq, 0)?;
    rules.insert(libc::SYS_prlimit64, vec![SeccompRule::new(vec![nothing])?]);
    // tokio's signals come through a pair of sockets.
    allow_where(&mut rules, libc::SYS_socketpair, 0, Eq, libc::AF_UNIX.cast_unsigned())?;
    for command in [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_GETFL, libc::F_SETFD, libc::F_SETFL] {
        allow_where(&mut rules, libc::SYS_fcntl, 1, Eq, command.cast_unsigned())?;
    }
    Ok(rules)
}

/// The filters, to be applied in this order, since the second forbids more of them; the kernel heeds the strictest answer.
///
/// # Errors
/// A bug in the rules.
pub fn filters(files: Files) -> Result<[BpfProgram; 2], BackendError> {
    let filter = |rules, otherwise, matched| {
        SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64).and_then(BpfProgram::try_from)
    };
    let absent = if files.below { &[] } else { OPENING };
    let absent = absent.iter().chain([&libc::SYS_clone3]).map(|call| (*call, Vec::new())).collect();
    // As in a kernel that does not have them.
    let refuse = SeccompAction::Errno(libc::ENOSYS.cast_unsigned());
    Ok([
        filter(absent, SeccompAction::Allow, refuse)?,
        filter(allowed(files)?, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Files = Files { opened: false, below: false };
    const BELOW: Files = Files { opened: false, below: true };

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;
    const ENOSYS: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();

    /// What a filter answers to a call, as the kernel runs it (Linux: Documentation/userspace-api/seccomp_filter.rst).
    fn answer(program: &BpfProgram, call: i64, arguments: [u64; 6]) -> u32 {
        const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
        let call = u32::try_from(call).unwrap();
        let data: Vec<u32> = [call, AUDIT_ARCH_X86_64, 0, 0]
            .into_iter()
            .chain(arguments.iter().flat_map(|one| {
                [u32::try_from(one & 0xffff_ffff).unwrap(), u32::try_from(one >> 32).unwrap()]
            }))
            .collect();
        let (mut accumulator, mut at) = (0_u32, 0_usize);
        loop {
            let instruction = &program[at];
            let (k, code) = (instruction.k, u32::from(instruction.code));
            let mut jump =
                |taken: bool| at += usize::from(if taken { instruction.jt } else { instruction.jf });
            match code {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = data[k as usize / 4]
                }
                code if code == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => accumulator &= k,
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => jump(accumulator == k),
                code if code == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => jump(accumulator >= k),
                code if code == libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K => jump(accumulator > k),
                code if code == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code => panic!("instruction {code:#x}"),
            }
            at += 1;
        }
    }

    /// What the kernel does with a call: the action of the lowest value, as a signed number, is the strictest.
    fn verdict(files: Files, call: i64, arguments: [u64; 6]) -> u32 {
        let answers = filters(files).unwrap().map(|filter| answer(&filter, call, arguments));
        answers.into_iter().min_by_key(|answer| answer.cast_signed()).unwrap()
    }

    #[test]
    fn what_a_machine_needs_is_allowed_and_all_else_ends_the_process() {
        let own = u64::from(getpid().as_raw_pid().cast_unsigned());
        let thread = u64::from(libc::CLONE_THREAD.cast_unsigned());
        let read_write = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        let exec = u64::from((libc::PROT_READ | libc::PROT_EXEC).cast_unsigned());
        for (call, arguments, expected) in [
            // KVM_RUN, KVM_SET_USER_MEMORY_REGION, TIOCSTI
            (libc::SYS_ioctl, [9, 0xae80, 0, 0, 0, 0], ALLOW),
            (libc::SYS_ioctl, [9, 0x4020_ae46, 0, 0, 0, 0], ALLOW),
            (libc::SYS_ioctl, [0, 0x5412, 0, 0, 0, 0], KILL),
            (libc::SYS_mmap, [0, 4096, read_write, 0, 0, 0], ALLOW),
            (libc::SYS_mmap, [0, 4096, exec, 0, 0, 0], KILL),
            (libc::SYS_mprotect, [0, 4096, read_write, 0, 0, 0], ALLOW),
            (libc::SYS_mprotect, [0, 4096, exec, 0, 0, 0], KILL),
            (libc::SYS_clone, [thread, 0, 0, 0, 0, 0], ALLOW),
            (libc::SYS_clone, [17, 0, 0, 0, 0, 0], KILL),
            (libc::SYS_clone3, [0; 6], ENOSYS),
            (libc::SYS_tgkill, [own, 1, 34, 0, 0, 0], ALLOW),
            (libc::SYS_tgkill, [own + 1, 1, 34, 0, 0, 0], KILL),
            (libc::SYS_prlimit64, [0, 7, 0, 1, 0, 0], ALLOW),
            (libc::SYS_prlimit64, [0, 7, 1 << 32, 0, 0, 0], KILL),
            (libc::SYS_socketpair, [1, 1, 0, 0, 0, 0], ALLOW),
            (libc::SYS_prctl, [15, 0, 0, 0, 0, 0], ALLOW),
            (libc::SYS_prctl, [libc::PR_SET_DUMPABLE.cast_unsigned().into(), 1, 0, 0, 0, 0], KILL),
            (libc::SYS_openat, [0; 6], ENOSYS),
            (libc::SYS_unlink, [0; 6], KILL),
            (libc::SYS_write, [2, 0, 0, 0, 0, 0], ALLOW),
        ] {
            assert_eq!(verdict(NONE, call, arguments), expected, "{call} {arguments:x?}");
        }
        for call in [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_kill,
            libc::SYS_ptrace,
            libc::SYS_process_vm_readv,
            libc::SYS_bpf,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_unshare,
            libc::SYS_setuid,
            libc::SYS_mount,
            libc::SYS_pkey_mprotect,
            libc::SYS_personality,
            libc::SYS_sendmsg,
            libc::SYS_seccomp,
        ] {
            assert_eq!(verdict(NONE, call, [0; 6]), KILL, "{call}");
            assert_eq!(verdict(BELOW, call, [0; 6]), KILL, "{call}");
        }
    }

    #[test]
    fn files_are_open_to_a_process_that_may_write_some() {
        for call in [libc::SYS_openat, libc::SYS_rename, libc::SYS_fdatasync, libc::SYS_ftruncate] {
            assert_eq!(verdict(BELOW, call, [0; 6]), ALLOW, "{call}");
        }
        assert_eq!(verdict(BELOW, libc::SYS_clone3, [0; 6]), ENOSYS);
    }

    #[test]
    fn a_process_with_disks_reads_and_writes_what_is_open_and_opens_nothing() {
        let disks = Files { opened: true, below: false };
        for call in [libc::SYS_pread64, libc::SYS_pwritev, libc::SYS_fdatasync, libc::SYS_fallocate] {
            assert_eq!(verdict(disks, call, [0; 6]), ALLOW, "{call}");
            assert_eq!(verdict(NONE, call, [0; 6]), KILL, "{call}");
        }
        assert_eq!(verdict(disks, libc::SYS_openat, [0; 6]), ENOSYS);
        for call in [libc::SYS_unlink, libc::SYS_rename, libc::SYS_flock] {
            assert_eq!(verdict(disks, call, [0; 6]), KILL, "{call}");
        }
    }

    #[test]
    fn another_architectures_calls_end_the_process() {
        let [_, allowed] = filters(NONE).unwrap();
        // The second word of what a filter sees is the architecture, so this one asks for it first.
        assert_eq!(u32::from(allowed[0].code), libc::BPF_LD | libc::BPF_W | libc::BPF_ABS);
        assert_eq!((allowed[0].k, allowed[1].k), (4, 0xc000_003e));
        assert_eq!(allowed[2].k, KILL);
    }
}
