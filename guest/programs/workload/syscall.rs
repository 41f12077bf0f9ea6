//! The system calls that a program makes (x86-64 numbers, arch/x86/entry/syscalls/syscall_64.tbl).

use core::arch::asm;
use core::ffi::CStr;

const READ: u64 = 0;
const WRITE: u64 = 1;
const CLOSE: u64 = 3;
const MMAP: u64 = 9;
const RT_SIGACTION: u64 = 13;
const IOCTL: u64 = 16;
const PREAD64: u64 = 17;
const PWRITE64: u64 = 18;
const SCHED_YIELD: u64 = 24;
const PAUSE: u64 = 34;
const SOCKET: u64 = 41;
const CONNECT: u64 = 42;
const ACCEPT: u64 = 43;
const SENDTO: u64 = 44;
const RECVFROM: u64 = 45;
const BIND: u64 = 49;
const LISTEN: u64 = 50;
const SETSOCKOPT: u64 = 54;
const FORK: u64 = 57;
const EXIT: u64 = 60;
const WAIT4: u64 = 61;
const UNAME: u64 = 63;
const FSYNC: u64 = 74;
const GETPPID: u64 = 110;
const MOUNT: u64 = 165;
const REBOOT: u64 = 169;
const DELETE_MODULE: u64 = 176;
const SCHED_SETAFFINITY: u64 = 203;
const SCHED_GETAFFINITY: u64 = 204;
const OPENAT: u64 = 257;
const FINIT_MODULE: u64 = 313;

const AT_FDCWD: u64 = -100_i64 as u64;
const PROT_READ_WRITE: u64 = 3;
const MAP_SHARED_ANONYMOUS: u64 = 0x21;
const NO_FILE: u64 = -1_i64 as u64;
/// Waits until everything written to a terminal has left (tty_ioctl(4), with a non-zero argument).
const TCSBRK: u64 = 0x5409;
const REBOOT_MAGIC: (u64, u64) = (0xfee1_dead, 672_274_793);

/// "No such file or directory".
pub const ENOENT: i64 = -2;
/// "Input/output error".
pub const EIO: i64 = -5;
/// "File exists".
pub const EEXIST: i64 = -17;
/// "Bad address".
pub const EFAULT: i64 = -14;

const O_WRONLY_TRUNC: u64 = 0o1001;
const O_RDWR_DIRECT: u64 = 0o40002;

const AF_VSOCK: u16 = 40;
const SOCK_STREAM: u64 = 1;
const SOL_SOCKET: u64 = 1;
const SO_LINGER: u64 = 13;

/// An address of vsock(7).
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: u32,
}

const AF_INET: u16 = 2;
/// Requests of netdevice(7).
const SIOCSIFFLAGS: u64 = 0x8914;
const SIOCSIFADDR: u64 = 0x8916;
const SIOCSIFNETMASK: u64 = 0x891c;
const IFF_UP: u8 = 1;

/// An address of ip(7).
#[repr(C)]
struct IpAddress {
    family: u16,
    /// The most significant byte first.
    port: [u8; 2],
    address: [u8; 4],
    zero: [u8; 8],
}

impl IpAddress {
    fn new(address: [u8; 4], port: u16) -> Self {
        Self { family: AF_INET, port: port.to_be_bytes(), address, zero: [0; 8] }
    }
}

/// What is asked of a network interface: its name, and what it is to get.
#[repr(C)]
struct InterfaceRequest<T> {
    name: [u8; 16],
    value: T,
    rest: u64,
}

/// The commands of reboot(2).
pub const RESTART: u64 = 0x0123_4567;
pub const POWER_OFF: u64 = 0x4321_fedc;
pub const HALT: u64 = 0xcdef_0123;

/// A signal's handler as the kernel wants it (rt_sigaction(2)).
#[repr(C)]
pub struct SignalAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

/// # Safety
/// The arguments must be what the system call expects; memory that it writes to must be writable and not borrowed.
pub unsafe fn call(number: u64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64 {
    let result;
    // SAFETY: the kernel changes RAX, RCX and R11 and, as the caller answers for, memory.
    unsafe {
        asm!("syscall", inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d,
            in("r8") e, in("r9") f, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

/// Opens for reading. The file descriptor, or a negative error number.
pub fn openat(path: &CStr) -> i64 {
    // SAFETY: the path is read, and ends with a zero byte.
    unsafe { call(OPENAT, AT_FDCWD, path.as_ptr() as u64, 0, 0, 0, 0) }
}

/// Opens a file whose name is at an address where nothing is. A negative error number.
pub fn openat_nowhere(path: u64) -> i64 {
    // SAFETY: the kernel finds out that it cannot read the path.
    unsafe { call(OPENAT, AT_FDCWD, path, 0, 0, 0, 0) }
}

/// Has the kernel write to an address where nothing is. A negative error number.
pub fn uname_nowhere(names: u64) -> i64 {
    // SAFETY: the kernel finds out that it cannot write there.
    unsafe { call(UNAME, names, 0, 0, 0, 0, 0) }
}

/// Opens for writing and drops what the file holds. The file descriptor, or a negative error number.
pub fn openat_to_write(path: &CStr) -> i64 {
    // SAFETY: the path is read, and ends with a zero byte.
    unsafe { call(OPENAT, AT_FDCWD, path.as_ptr() as u64, O_WRONLY_TRUNC, 0, 0, 0) }
}

/// Opens for reading and writing past the page cache. The file descriptor, or a negative error number.
pub fn openat_direct(path: &CStr) -> i64 {
    // SAFETY: the path is read, and ends with a zero byte.
    unsafe { call(OPENAT, AT_FDCWD, path.as_ptr() as u64, O_RDWR_DIRECT, 0, 0, 0) }
}

/// Writes to a place in a file. How many bytes, or a negative error number.
pub fn pwrite(file: i64, bytes: &[u8], at: u64) -> i64 {
    // SAFETY: the bytes are read.
    unsafe { call(PWRITE64, file as u64, bytes.as_ptr() as u64, bytes.len() as u64, at, 0, 0) }
}

/// Waits until what has been written to a file is durable. 0, or a negative error number.
pub fn fsync(file: i64) -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(FSYNC, file as u64, 0, 0, 0, 0, 0) }
}

/// Reads from a place in a file. How many bytes, or a negative error number.
pub fn pread(file: i64, buffer: &mut [u8], at: u64) -> i64 {
    // SAFETY: the buffer is writable for its length.
    unsafe { call(PREAD64, file as u64, buffer.as_mut_ptr() as u64, buffer.len() as u64, at, 0, 0) }
}

/// Loads the module in an open file, without parameters. 0, or a negative error number.
pub fn load_module(file: i64) -> i64 {
    // SAFETY: the parameters are read, and end with a zero byte.
    unsafe { call(FINIT_MODULE, file as u64, c"".as_ptr() as u64, 0, 0, 0, 0) }
}

/// Makes a stream socket between machines and their hosts. The file descriptor, or a negative error number.
pub fn vsock_socket() -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(SOCKET, AF_VSOCK.into(), SOCK_STREAM, 0, 0, 0, 0) }
}

/// Gives a socket an address of its own. 0, or a negative error number.
pub fn bind_vsock(socket: i64, cid: u32, port: u32) -> i64 {
    let address = VsockAddress { family: AF_VSOCK, reserved: 0, port, cid, zero: 0 };
    // SAFETY: the address is read.
    unsafe { call(BIND, socket as u64, &raw const address as u64, size_of::<VsockAddress>() as u64, 0, 0, 0) }
}

/// Connects a socket. 0, or a negative error number.
pub fn connect_vsock(socket: i64, cid: u32, port: u32) -> i64 {
    let address = VsockAddress { family: AF_VSOCK, reserved: 0, port, cid, zero: 0 };
    // SAFETY: the address is read.
    unsafe { call(CONNECT, socket as u64, &raw const address as u64, size_of::<VsockAddress>() as u64, 0, 0, 0) }
}

/// Makes a TCP socket. The file descriptor, or a negative error number.
pub fn tcp_socket() -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(SOCKET, AF_INET.into(), SOCK_STREAM, 0, 0, 0, 0) }
}

/// Connects a TCP socket. 0, or a negative error number.
pub fn connect_ip(socket: i64, address: [u8; 4], port: u16) -> i64 {
    let address = IpAddress::new(address, port);
    // SAFETY: the address is read.
    unsafe { call(CONNECT, socket as u64, &raw const address as u64, size_of::<IpAddress>() as u64, 0, 0, 0) }
}

/// Gives eth0 an address. 0, or a negative error number.
pub fn set_interface_address(socket: i64, address: [u8; 4]) -> i64 {
    set_interface(socket, SIOCSIFADDR, IpAddress::new(address, 0))
}

/// Says which addresses eth0 reaches. 0, or a negative error number.
pub fn set_interface_mask(socket: i64, mask: [u8; 4]) -> i64 {
    set_interface(socket, SIOCSIFNETMASK, IpAddress::new(mask, 0))
}

/// Brings eth0 up. 0, or a negative error number.
pub fn set_interface_up(socket: i64) -> i64 {
    let mut flags = [0; 16];
    flags[0] = IFF_UP;
    set_interface(socket, SIOCSIFFLAGS, flags)
}

fn set_interface<T>(socket: i64, what: u64, value: T) -> i64 {
    let mut name = [0; 16];
    name[..4].copy_from_slice(b"eth0");
    let request = InterfaceRequest { name, value, rest: 0 };
    // SAFETY: the request is read, all 40 bytes of it.
    unsafe { call(IOCTL, socket as u64, what, &raw const request as u64, 0, 0, 0) }
}

/// Lets others connect. 0, or a negative error number.
pub fn listen(socket: i64) -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(LISTEN, socket as u64, 1, 0, 0, 0, 0) }
}

/// Waits for a connection. Its file descriptor, or a negative error number.
pub fn accept(socket: i64) -> i64 {
    // SAFETY: touches no memory: the address is not wanted.
    unsafe { call(ACCEPT, socket as u64, 0, 0, 0, 0, 0) }
}

/// Sends over a connection. How many bytes, or a negative error number.
pub fn send(socket: i64, bytes: &[u8]) -> i64 {
    // SAFETY: the bytes are read.
    unsafe { call(SENDTO, socket as u64, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0, 0) }
}

/// Receives over a connection. How many bytes, none at its end, or a negative error number.
pub fn receive(socket: i64, buffer: &mut [u8]) -> i64 {
    // SAFETY: the buffer is writable for its length.
    unsafe { call(RECVFROM, socket as u64, buffer.as_mut_ptr() as u64, buffer.len() as u64, 0, 0, 0) }
}

/// Has the close of a connection wait until the other side knows of it, a minute at most. 0, or a negative error number.
pub fn linger(socket: i64) -> i64 {
    let linger = [1_i32, 60];
    // SAFETY: the option's value is read.
    unsafe {
        call(SETSOCKOPT, socket as u64, SOL_SOCKET, SO_LINGER, linger.as_ptr() as u64, size_of_val(&linger) as u64, 0)
    }
}

/// Unloads a module that nobody uses. 0, or a negative error number.
pub fn unload_module(name: &CStr) -> i64 {
    // SAFETY: the name is read, and ends with a zero byte.
    unsafe { call(DELETE_MODULE, name.as_ptr() as u64, 0, 0, 0, 0, 0) }
}

pub fn read(file: i64, buffer: &mut [u8]) -> i64 {
    // SAFETY: the buffer is writable for its length.
    unsafe { call(READ, file as u64, buffer.as_mut_ptr() as u64, buffer.len() as u64, 0, 0, 0) }
}

pub fn write(file: i64, bytes: &[u8]) -> i64 {
    // SAFETY: the bytes are read.
    unsafe { call(WRITE, file as u64, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0, 0) }
}

pub fn close(file: i64) -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(CLOSE, file as u64, 0, 0, 0, 0, 0) }
}

pub fn getppid() -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(GETPPID, 0, 0, 0, 0, 0, 0) }
}

/// Memory that a child made later shares, filled with zeros. Its address, or a negative error number.
pub fn shared_memory(len: usize) -> i64 {
    // SAFETY: makes new memory.
    unsafe { call(MMAP, 0, len as u64, PROT_READ_WRITE, MAP_SHARED_ANONYMOUS, NO_FILE, 0) }
}

/// 0 in the child, the child's number in the parent, or a negative error number.
pub fn fork() -> i64 {
    // SAFETY: the child gets a copy of everything; the program has one thread.
    unsafe { call(FORK, 0, 0, 0, 0, 0, 0) }
}

/// Waits for a child to end. Its wait status (wait(2)), or nothing if there is no child.
pub fn wait_for_any() -> Option<i32> {
    const ANY: u64 = -1_i64 as u64;
    let mut status = 0;
    // SAFETY: the status is writable.
    let waited = unsafe { call(WAIT4, ANY, &raw mut status as u64, 0, 0, 0, 0) };
    (waited > 0).then_some(status)
}

/// Which processors this process may run on. How many bytes of it the kernel has written, or a negative error number.
pub fn affinity(mask: &mut [u64]) -> i64 {
    // SAFETY: the mask is writable for its length.
    unsafe { call(SCHED_GETAFFINITY, 0, size_of_val(mask) as u64, mask.as_mut_ptr() as u64, 0, 0, 0) }
}

/// Has this process run on these processors only. 0, or a negative error number.
pub fn set_affinity(mask: &[u64]) -> i64 {
    // SAFETY: the mask is read.
    unsafe { call(SCHED_SETAFFINITY, 0, size_of_val(mask) as u64, mask.as_ptr() as u64, 0, 0, 0) }
}

/// Lets another process run.
pub fn sched_yield() {
    // SAFETY: touches no memory.
    unsafe { call(SCHED_YIELD, 0, 0, 0, 0, 0, 0) };
}

/// Mounts a virtual file system. 0, or a negative error number.
pub fn mount(kind: &CStr, at: &CStr) -> i64 {
    let kind = kind.as_ptr() as u64;
    // SAFETY: the strings are read, and end with a zero byte.
    unsafe { call(MOUNT, kind, at.as_ptr() as u64, kind, 0, 0, 0) }
}

/// Six fields of 65 bytes, each ended by a zero byte (uname(2)).
pub fn uname(names: &mut [[u8; 65]; 6]) -> i64 {
    // SAFETY: the buffer is writable and as long as the kernel's structure.
    unsafe { call(UNAME, names.as_mut_ptr() as u64, 0, 0, 0, 0, 0) }
}

/// # Safety
/// The action must name a handler and a restorer that keep to the signal ABI.
pub unsafe fn handle_signal(signal: u64, action: &SignalAction) -> i64 {
    // SAFETY: the action is read; the mask is 8 bytes.
    unsafe { call(RT_SIGACTION, signal, &raw const *action as u64, 0, 8, 0, 0) }
}

/// Waits until the terminal has sent everything.
pub fn drain(file: i64) {
    // SAFETY: touches no memory.
    unsafe { call(IOCTL, file as u64, TCSBRK, 1, 0, 0, 0) };
}

/// Sleeps until a signal.
pub fn pause() {
    // SAFETY: touches no memory.
    unsafe { call(PAUSE, 0, 0, 0, 0, 0, 0) };
}

pub fn exit(code: u64) -> ! {
    // SAFETY: does not return.
    unsafe { call(EXIT, code, 0, 0, 0, 0, 0) };
    loop {
        pause();
    }
}

/// Ends the machine; returns only if the kernel refuses.
pub fn reboot(command: u64) -> i64 {
    // SAFETY: touches no memory.
    unsafe { call(REBOOT, REBOOT_MAGIC.0, REBOOT_MAGIC.1, command, 0, 0, 0) }
}
