//! The workload: the init process of a small initramfs, doing work that is known exactly.
//!
//! It and its child processes are all that runs in user space, so that every system call they count is every one there
//! is: a prober's hits in the kernel can be compared with the lines `count NAME CALLS` that it prints. There is a process on
//! each processor, two on a single one, and they work at the same time.
//!
//! Words on the kernel's command line, which the kernel hands on in the environment, change what it does: `rounds=N` how
//! often the work is done, `exercise=` some of `disks`, `faults`, `modules`, `network`, `topology`, `tracing`, `vsock` (with commas) what is done besides,
//! `kprobe=PLACE` where the kernel's own kprobe goes, `port=N` where the network's peer listens, and `workload=ENDING` how the run ends (`Ending`). A wrong result is a
//! line `workload: FAIL ...` and the end of the init process, at which the kernel panics.

#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod button;
mod cpus;
mod disks;
mod faults;
mod messages;
mod modules;
mod network;
mod syscall;
mod text;
mod tracing;
mod traps;
mod vsock;

use core::arch::global_asm;
use core::ffi::{CStr, c_char};
use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use text::{Line, count, fail};

global_asm!(include_str!("memory.s"), include_str!("entry.s"), options(raw));

const DEFAULT_ROUNDS: u64 = 100;
/// getppid calls of the parent and of a child in each round.
const GETPPIDS: (u64, u64) = (3, 2);
/// In the initramfs, next to the program.
const KNOWN_FILE: &CStr = c"/known.txt";
const KNOWN_TEXT: &[u8] = include_bytes!("known.txt");
const MISSING_FILE: &CStr = c"/missing.txt";
const VERSION_FILE: &CStr = c"/proc/version";
const VERSION_START: &[u8] = b"Linux version ";

/// System calls made by all processes, counted before each is made. In memory that they share.
#[derive(Default)]
struct Counts {
    openat: AtomicU64,
    read: AtomicU64,
    close: AtomicU64,
    getppid: AtomicU64,
    /// Processes that are ready to work.
    ready: AtomicU64,
}

impl Counts {
    /// An openat is about to be made.
    fn opened(&self) {
        self.openat.fetch_add(1, Ordering::Relaxed);
    }

    /// A getppid is about to be made.
    fn asked(&self) {
        self.getppid.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is done besides the work.
#[derive(Default)]
struct Exercises {
    disks: bool,
    faults: bool,
    modules: bool,
    network: bool,
    topology: bool,
    tracing: bool,
    vsock: bool,
    kprobe: Option<&'static [u8]>,
    port: u64,
}

impl Exercises {
    fn name(&mut self, names: &[u8]) {
        for name in names.split(|byte| *byte == b',') {
            match name {
                b"disks" => self.disks = true,
                b"faults" => self.faults = true,
                b"modules" => self.modules = true,
                b"network" => self.network = true,
                b"topology" => self.topology = true,
                b"tracing" => self.tracing = true,
                b"vsock" => self.vsock = true,
                _ => fail(b"exercise= is none of disks, faults, modules, network, topology, tracing, vsock"),
            }
        }
    }
}

/// Called by entry.s with the address of argc.
#[unsafe(no_mangle)]
extern "C" fn workload_main(stack: *const u64) -> ! {
    let mut rounds = DEFAULT_ROUNDS;
    let mut ending = Ending::Restart;
    let mut exercises = Exercises::default();
    // SAFETY: the kernel's start-up layout (entry.s).
    let environment = unsafe { Environment::new(stack) };
    for word in environment {
        if let Some(value) = word.strip_prefix(b"rounds=") {
            rounds = parse(value);
        } else if let Some(value) = word.strip_prefix(b"workload=") {
            ending = ending_by_name(value);
        } else if let Some(value) = word.strip_prefix(b"exercise=") {
            exercises.name(value);
        } else if let Some(value) = word.strip_prefix(b"kprobe=") {
            exercises.kprobe = Some(value);
        } else if let Some(value) = word.strip_prefix(b"port=") {
            exercises.port = parse(value);
        }
    }
    banner();
    if syscall::mount(c"proc", c"/proc") != 0 {
        fail(b"mount /proc");
    }
    work(rounds, &exercises);
    Line::new().text(b"workload: ok").print();
    end(ending)
}

fn banner() {
    let mut names = [[0; 65]; 6];
    syscall::uname(&mut names);
    let [system, _, release, version, machine, _] = &names;
    let mut line = Line::new().text(b"workload: ");
    for name in [system, release, version, machine] {
        let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
        line = line.text(name).text(b" ");
    }
    line.print();
}

fn work(rounds: u64, exercises: &Exercises) {
    let memory = syscall::shared_memory(size_of::<Counts>());
    if memory < 0 {
        fail(b"mmap");
    }
    // SAFETY: new memory of this size, aligned to a page; zeros are valid counters; it is never unmapped.
    let counts = unsafe { &*(memory as *const Counts) };

    let cpus = cpus::number();
    let children = cpus.max(2) - 1;
    for child in 1..=children {
        let forked = syscall::fork();
        if forked < 0 {
            fail(b"fork");
        }
        if forked == 0 {
            cpus::pin(child % cpus);
            cpus::meet(&counts.ready, children + 1);
            for _ in 0..rounds {
                read_file(counts, KNOWN_FILE, KNOWN_TEXT);
                ask_for_parent(counts, GETPPIDS.1, 1);
            }
            syscall::exit(0)
        }
    }
    cpus::pin(0);
    cpus::meet(&counts.ready, children + 1);

    for _ in 0..rounds {
        read_file(counts, KNOWN_FILE, KNOWN_TEXT);
        counts.opened();
        if syscall::openat(MISSING_FILE) != syscall::ENOENT {
            fail(b"openat of a missing file");
        }
        ask_for_parent(counts, GETPPIDS.0, 0);
    }
    read_file(counts, VERSION_FILE, VERSION_START);
    traps::run();
    if exercises.disks {
        disks::run(counts);
    }
    if exercises.faults {
        faults::run(counts);
    }
    if exercises.modules {
        modules::run(counts);
    }
    if exercises.network {
        network::run(counts, exercises.port);
    }
    if exercises.topology {
        cpus::run(counts, cpus);
    }
    if exercises.tracing {
        tracing::run(counts, exercises.kprobe);
    }
    if exercises.vsock {
        vsock::run(counts);
    }
    for _ in 0..children {
        if syscall::wait_for_any() != Some(0) {
            fail(b"a child process");
        }
    }

    for (name, counter) in [
        (b"openat".as_slice(), &counts.openat),
        (b"read", &counts.read),
        (b"close", &counts.close),
        (b"getppid", &counts.getppid),
    ] {
        count(name, counter.load(Ordering::Relaxed));
    }
    count(b"fork", children);
    for name in [b"own_int3".as_slice(), b"own_step"] {
        count(name, traps::TRAPS);
    }
}

/// Opens a file, reads its beginning in one read, and closes it.
fn read_file(counts: &Counts, path: &CStr, start: &[u8]) {
    let file = open(counts, path);
    let mut buffer = [0; 128];
    counts.read.fetch_add(1, Ordering::Relaxed);
    let len = syscall::read(file, &mut buffer);
    if len < start.len() as i64 || !buffer.starts_with(start) {
        fail(path.to_bytes());
    }
    close(counts, file);
}

/// Loads drivers, each behind those that it needs. In some kernels the first ones are built in.
fn load_drivers(counts: &Counts, modules: &[&CStr]) {
    for module in modules {
        counts.opened();
        let file = syscall::openat(module);
        if file == syscall::ENOENT {
            continue;
        }
        opened(module, file);
        let loaded = syscall::load_module(file);
        if loaded != 0 && loaded != syscall::EEXIST {
            fail(module.to_bytes());
        }
        close(counts, file);
    }
}

/// Opens a file that must be there.
fn open(counts: &Counts, path: &CStr) -> i64 {
    counts.opened();
    opened(path, syscall::openat(path))
}

/// Opens a file of a virtual file system that must be there, for writing; what it held is gone.
fn open_to_write(counts: &Counts, path: &CStr) -> i64 {
    counts.opened();
    opened(path, syscall::openat_to_write(path))
}

fn opened(path: &CStr, file: i64) -> i64 {
    if file < 0 {
        fail(path.to_bytes());
    }
    file
}

fn close(counts: &Counts, file: i64) {
    counts.close.fetch_add(1, Ordering::Relaxed);
    if syscall::close(file) != 0 {
        fail(b"close");
    }
}

fn ask_for_parent(counts: &Counts, calls: u64, parent: i64) {
    for _ in 0..calls {
        counts.asked();
        if syscall::getppid() != parent {
            fail(b"getppid");
        }
    }
}

/// How the run ends.
#[derive(Clone, Copy)]
enum Ending {
    Restart,
    PowerOff,
    /// Power off, when the power button has been pressed.
    Button,
    Halt,
    /// The kernel panics when init ends.
    Panic,
    /// All processors idle, with interrupts on.
    Hang,
    /// One processor busy in user mode.
    Loop,
}

fn ending_by_name(name: &[u8]) -> Ending {
    match name {
        b"reboot" => Ending::Restart,
        b"poweroff" => Ending::PowerOff,
        b"button" => Ending::Button,
        b"halt" => Ending::Halt,
        b"panic" => Ending::Panic,
        b"hang" => Ending::Hang,
        b"loop" => Ending::Loop,
        _ => fail(b"workload= is none of reboot, poweroff, button, halt, panic, hang, loop"),
    }
}

fn end(ending: Ending) -> ! {
    text::drain();
    match ending {
        Ending::Restart => syscall::reboot(syscall::RESTART),
        Ending::PowerOff => syscall::reboot(syscall::POWER_OFF),
        Ending::Button => {
            button::wait();
            text::drain();
            syscall::reboot(syscall::POWER_OFF)
        }
        Ending::Halt => syscall::reboot(syscall::HALT),
        Ending::Panic => syscall::exit(0),
        Ending::Hang => loop {
            syscall::pause();
        },
        Ending::Loop => loop {
            core::hint::spin_loop();
        },
    };
    fail(b"reboot(2) returned")
}

fn parse(digits: &[u8]) -> u64 {
    let mut value = 0_u64;
    for digit in digits {
        match digit {
            b'0'..=b'9' if value < 1_000_000 => value = value * 10 + u64::from(digit - b'0'),
            _ => fail(b"a number below 10000000 is none"),
        }
    }
    value
}

/// The words of the environment.
struct Environment(*const *const c_char);

impl Environment {
    /// # Safety
    /// `stack` must be the stack pointer that the kernel started the process with.
    unsafe fn new(stack: *const u64) -> Self {
        // SAFETY: argc, as many pointers, and a null pointer come first.
        unsafe { Environment(stack.add(stack.read() as usize + 2).cast()) }
    }
}

impl Iterator for Environment {
    type Item = &'static [u8];

    fn next(&mut self) -> Option<&'static [u8]> {
        // SAFETY: within the array, which ends with a null pointer; its strings end with a zero byte and stay.
        unsafe {
            let word = self.0.read();
            if word.is_null() {
                return None;
            }
            self.0 = self.0.add(1);
            Some(CStr::from_ptr(word).to_bytes())
        }
    }
}

/// No code here panics; the linker drops this unless that changes.
#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    fail(b"panic")
}
