//! Running one command in the machine.
//!
//! The calling thread starts QEMU and then handles events: reports of the machine's process 1, signals to vmprobe, the
//! command's output having lost its reader. Threads carry stdout and stderr. QEMU dies with the calling thread.
//!
//! Nothing is written to the disk: the initramfs and the machine's console live in memory files (memfd_create(2)).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Cursor, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::MemfdFlags;
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::control::{End, Order, Report, port};
use crate::executable::{self, Executable};
use crate::initramfs::Archive;
use crate::prepare::Rig;
use crate::process::{die_with_parent, last_lines};
use crate::request::{self, Request};

/// What the machine's own kernel and process 1 need besides the guest's memory and the initramfs.
const OWN_MEMORY: u64 = 1 << 30;

/// How many lines of the machine's console an error shows.
const CONSOLE_LINES: usize = 30;

/// The kernel's command line: its console, an end instead of a hang when it panics, and nothing that costs time and is of no
/// use in this machine. A variable on it becomes part of process 1's environment (Linux: kernel-parameters).
const KERNEL_OPTIONS: &str = "console=ttyS0 panic=-1 nokaslr mitigations=off quiet cryptomgr.notests";

/// A command to run in the machine: this same program with other arguments.
pub struct NestedRun {
    /// `argv[0]`.
    pub name: OsString,
    /// The arguments behind it, see [`inner_arguments`](crate::inner_arguments).
    pub arguments: Vec<OsString>,
    /// Files that the command reads, as its arguments name them.
    pub inputs: Vec<PathBuf>,
    /// Files that the command writes, as its arguments name them; copied back when it has ended. A file may be in both.
    pub outputs: Vec<PathBuf>,
    /// Memory of the guest that the command runs, in bytes. The machine gets 1 GiB more, and the size of the inputs twice.
    pub guest_memory: u64,
    /// Virtual CPUs of the machine; see [`NestedRun::default_cpus`].
    pub cpus: u32,
    /// How long the machine may take to start.
    pub boot_timeout: Duration,
    /// Where the command's standard output goes.
    pub stdout: Box<dyn Write + Send>,
    /// Where the command's standard error goes.
    pub stderr: Box<dyn Write + Send>,
}

impl std::fmt::Debug for NestedRun {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NestedRun")
            .field("name", &self.name)
            .field("arguments", &self.arguments)
            .field("inputs", &self.inputs)
            .field("outputs", &self.outputs)
            .field("guest_memory", &self.guest_memory)
            .field("cpus", &self.cpus)
            .finish_non_exhaustive()
    }
}

impl NestedRun {
    /// A run of this program with `arguments`, with 512 MiB for the guest and this process's output streams.
    #[must_use]
    pub fn new(arguments: Vec<OsString>) -> Self {
        Self {
            name: std::env::args_os().next().unwrap_or_else(|| "vmprobe".into()),
            arguments,
            inputs: Vec::new(),
            outputs: Vec::new(),
            guest_memory: 512 << 20,
            cpus: Self::default_cpus(),
            boot_timeout: Duration::from_secs(180),
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
        }
    }

    /// As many virtual CPUs as this process may use, 2 at most: each is a busy thread of the emulator.
    #[must_use]
    pub fn default_cpus() -> u32 {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        u32::try_from(cpus.min(2)).unwrap_or(1)
    }
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NestedExit {
    /// By itself, with this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl NestedExit {
    /// The exit code to end with; for a signal 128 and its number, as shells report it.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            NestedExit::Code(code) => code,
            NestedExit::Signal(signal) => 128 + signal,
        }
    }
}

/// The command could not be run in the machine.
#[derive(Debug, thiserror::Error)]
pub enum NestedError {
    /// An input cannot be read.
    #[error("Cannot read {} to give it to the emulated machine", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is where the machine's kernel has its own.
    #[error("{} cannot be used in the emulated machine, which has its own /proc and /sys; use a copy elsewhere", path.display())]
    Place {
        /// The file.
        path: PathBuf,
    },
    /// The machine's file system could not be made.
    #[error("Cannot make the emulated machine's file system")]
    Initramfs {
        /// Why.
        source: io::Error,
    },
    /// The emulator could not be started.
    #[error("Cannot start {}; remove it to have it built anew", path.display())]
    Start {
        /// The emulator.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The emulator ended before the command did.
    #[error("The emulated machine stopped before the command ended. Its last words:\n{console}")]
    Stopped {
        /// The last lines of its console and of the emulator's messages.
        console: String,
    },
    /// The machine did not get as far as the command in time.
    #[error("The emulated machine did not start within {} s. Its last words:\n{console}", timeout.as_secs())]
    BootTimeout {
        /// The time it had.
        timeout: Duration,
        /// The last lines of its console and of the emulator's messages.
        console: String,
    },
    /// The machine started but cannot run the command.
    #[error("The emulated machine cannot run the command: {reason}")]
    Machine {
        /// What its process 1 says.
        reason: String,
    },
    /// A signal ended the run: a second one, or one before the command had started.
    #[error("Interrupted")]
    Interrupted,
    /// An output could not be written on the host.
    #[error("Cannot write {}", path.display())]
    Output {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The connection to the machine failed.
    #[error("The connection to the emulated machine failed")]
    Connection {
        /// Why.
        source: io::Error,
    },
}

/// What the calling thread waits for.
enum Event {
    Report(Report),
    /// The machine's control port is closed: the emulator has ended.
    Closed,
    /// The connection or an output file failed.
    Failed(NestedError),
    /// A signal has been sent to vmprobe.
    Signal(i32),
    /// An output has lost its reader.
    HangUp(Order),
}

impl Rig {
    /// Runs the command and returns how it ended. Its output arrives byte for byte as it is written.
    ///
    /// SIGINT, SIGTERM and SIGHUP are passed to the command, which ends in its own way; a second one ends the machine. The
    /// signals' other handlers in this process run too.
    ///
    /// # Errors
    /// [`NestedError`]. The machine has then ended.
    pub fn run(&self, run: NestedRun) -> Result<NestedExit, NestedError> {
        let started = Instant::now();
        let outputs = output_paths(&run)?;
        let initramfs = self.initramfs(&run, &outputs)?;
        let connection = |source| NestedError::Connection { source };
        let console = memory_file("console").map_err(connection)?;
        let messages = memory_file("messages").map_err(connection)?;
        let (control, control_end) = UnixStream::pair().map_err(connection)?;
        let (stdout, stdout_end) = UnixStream::pair().map_err(connection)?;
        let (stderr, stderr_end) = UnixStream::pair().map_err(connection)?;
        let (events, received) = mpsc::channel();
        let signals = Signals::forward(events.clone()).map_err(connection)?;

        let initramfs_len = initramfs.metadata().map_err(connection)?.len();
        let wiring = Wiring {
            initramfs: initramfs.into(),
            console: console.try_clone().map_err(connection)?.into(),
            control: control_end.into(),
            stdout: stdout_end.into(),
            stderr: stderr_end.into(),
        };
        let memory = run.guest_memory.saturating_add(OWN_MEMORY).saturating_add(2 * initramfs_len);
        let arguments = self.emulator_arguments(&wiring, memory, run.cpus);
        let messages_end = messages.try_clone().map_err(connection)?;
        let machine = Machine::start(&self.qemu.binary(), &arguments, wiring, messages_end)?;
        tracing::debug!(elapsed = ?started.elapsed(), "emulator started");

        let mut orders = control.try_clone().map_err(connection)?;
        let reports = events.clone();
        std::thread::spawn(move || read_reports(control, &outputs, &reports));
        let stdout = Stream::carry(stdout, run.stdout, Order::HangUpStdout, events.clone());
        let stderr = Stream::carry(stderr, run.stderr, Order::HangUpStderr, events);

        let last_words = || last_words(&console, &messages);
        let deadline = started + run.boot_timeout;
        let mut ready = false;
        let mut interrupted = false;
        loop {
            match next_event(&received, (!ready).then_some(deadline)) {
                None => {
                    return Err(NestedError::BootTimeout {
                        timeout: run.boot_timeout,
                        console: last_words(),
                    });
                }
                Some(Event::Report(Report::Ready)) => {
                    tracing::debug!(elapsed = ?started.elapsed(), "machine ready");
                    ready = true;
                }
                Some(Event::Report(Report::Ended { end, stdout: stdout_len, stderr: stderr_len })) => {
                    tracing::debug!(elapsed = ?started.elapsed(), "command ended");
                    if !stdout.wait(stdout_len) || !stderr.wait(stderr_len) {
                        return Err(NestedError::Stopped { console: last_words() });
                    }
                    drop(machine);
                    drop(signals);
                    return Ok(match end {
                        End::Exit(code) => NestedExit::Code(code),
                        End::Signal(signal) => NestedExit::Signal(signal),
                    });
                }
                Some(Event::Report(Report::Failed(reason))) => return Err(NestedError::Machine { reason }),
                // Handled by the reader.
                Some(Event::Report(Report::File { .. })) => {}
                Some(Event::Closed) => return Err(NestedError::Stopped { console: last_words() }),
                Some(Event::Failed(error)) => return Err(error),
                Some(Event::Signal(signal)) => {
                    if interrupted || !ready {
                        return Err(NestedError::Interrupted);
                    }
                    interrupted = true;
                    let order = if signal == SIGINT { Order::Interrupt } else { Order::Terminate };
                    send(&mut orders, order);
                }
                Some(Event::HangUp(order)) => send(&mut orders, order),
            }
        }
    }

    /// The machine's file system, in memory.
    fn initramfs(&self, run: &NestedRun, outputs: &[PathBuf]) -> Result<File, NestedError> {
        let directory = current_directory()?;
        let other = |source| NestedError::Initramfs { source };
        let mut archive = Archive::new(BufWriter::new(memory_file("initramfs").map_err(other)?));
        for dir in ["/dev", "/proc", "/sys", "/tmp"] {
            archive.directory(Path::new(dir)).map_err(other)?;
        }

        let executable = Executable::running().map_err(other)?;
        archive.copy(Path::new(request::PROGRAM), Path::new(executable::SELF)).map_err(other)?;
        if let Some(loader) = &executable.loader {
            archive.copy(loader, loader).map_err(other)?;
        }
        for (name, path) in &executable.libraries {
            archive.copy(&Path::new(request::LIBRARIES).join(name), path).map_err(other)?;
        }

        let mut modules = Vec::new();
        for module in self.kernel.modules().map_err(other)? {
            let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let place = format!("{}/modules/{name}", request::HOME);
            archive.copy(Path::new(&place), &module).map_err(other)?;
            modules.push(place);
        }

        let mut inputs: Vec<OsString> = Vec::new();
        for path in &run.inputs {
            let place = usable_place(&directory, path)?.into_os_string();
            if !inputs.contains(&place) {
                archive
                    .copy(Path::new(&request::input_path(inputs.len())), path)
                    .map_err(|source| NestedError::Input { path: path.clone(), source })?;
                inputs.push(place);
            }
        }

        let request = Request {
            modules,
            name: run.name.clone(),
            arguments: run.arguments.clone(),
            environment: std::env::vars_os().filter(|(name, _)| request::is_passed(name)).collect(),
            directory: directory.into_os_string(),
            inputs,
            outputs: outputs.iter().map(|path| path.clone().into_os_string()).collect(),
        };
        let request = serde_json::to_vec(&request).map_err(|error| other(error.into()))?;
        archive.file(Path::new(request::REQUEST), &mut Cursor::new(request)).map_err(other)?;
        let file =
            archive.finish().and_then(|writer| writer.into_inner().map_err(Into::into)).map_err(other)?;
        Ok(file)
    }

    fn emulator_arguments(&self, wiring: &Wiring, memory: u64, cpus: u32) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = [
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            // A machine that resets or panics has ended.
            "-no-reboot",
            "-machine",
            "pc",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "EPYC,+svm,+npt",
        ]
        .map(OsString::from)
        .into();
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        option("-smp", cpus.max(1).to_string().into());
        option("-m", format!("{}M", memory.div_ceil(1 << 20)).into());
        option("-L", self.qemu.firmware().into());
        option("-kernel", self.kernel.vmlinuz().into());
        option("-initrd", file_of(&wiring.initramfs).into());
        let init = format!(
            "{KERNEL_OPTIONS} {}=1 LD_LIBRARY_PATH={} rdinit={}",
            crate::init::MARKER,
            request::LIBRARIES,
            request::PROGRAM
        );
        option("-append", init.into());
        option("-chardev", format!("file,id=console,path={}", file_of(&wiring.console)).into());
        option("-serial", "chardev:console".into());
        option("-device", "virtio-serial-pci".into());
        for (name, socket) in
            [(port::CONTROL, &wiring.control), (port::STDOUT, &wiring.stdout), (port::STDERR, &wiring.stderr)]
        {
            option("-chardev", format!("socket,id={name},fd={}", socket.as_raw_fd()).into());
            option("-device", format!("virtserialport,chardev={name},name={name}").into());
        }
        arguments
    }
}

/// The emulator's ends of what connects it with vmprobe. Their numbers are the same in both processes.
struct Wiring {
    initramfs: OwnedFd,
    console: OwnedFd,
    control: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

/// A path that opens the same file in the emulator.
fn file_of(fd: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The running emulator. Dropped, it is killed: what it computes has been fetched before, or is not wanted any more.
struct Machine(Child);

impl Machine {
    fn start(
        binary: &Path,
        arguments: &[OsString],
        wiring: Wiring,
        messages: File,
    ) -> Result<Self, NestedError> {
        let start = |source| NestedError::Start { path: binary.to_owned(), source };
        // Only the emulator gets them: they are closed here when it has been started, so that its end is seen.
        for fd in [&wiring.initramfs, &wiring.console, &wiring.control, &wiring.stdout, &wiring.stderr] {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).map_err(|error| start(error.into()))?;
        }
        let mut command = Command::new(binary);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(messages);
        // A terminal sends its Ctrl-C to the whole process group; the emulator must not get it.
        command.process_group(0);
        die_with_parent(&mut command, Signal::KILL);
        command.spawn().map(Self).map_err(start)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended and been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends an order. A machine that is gone is noticed by the reader of its reports.
fn send(orders: &mut UnixStream, order: Order) {
    if let Err(error) = writeln!(orders, "{order}") {
        tracing::debug!(%error, %order, "order not sent");
    }
}

/// The next event, or None when the deadline is over first. The senders outlive the receiver.
fn next_event(received: &Receiver<Event>, deadline: Option<Instant>) -> Option<Event> {
    match deadline {
        None => Some(received.recv().unwrap_or(Event::Closed)),
        Some(deadline) => match received.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Event::Closed),
        },
    }
}

/// Reads the machine's reports, and the output files that it sends, until the port is closed.
fn read_reports(control: UnixStream, outputs: &[PathBuf], events: &Sender<Event>) {
    let mut control = BufReader::new(control);
    let mut line = String::new();
    loop {
        line.clear();
        let event = match control.read_line(&mut line) {
            // The emulator closes its end when it ends; killed, it may leave a reset behind.
            Ok(0) | Err(_) => Event::Closed,
            Ok(_) => match Report::parse(&line) {
                Some(Report::File { index, len }) => match receive_file(&mut control, outputs, index, len) {
                    Ok(()) => continue,
                    Err(error) => Event::Failed(error),
                },
                Some(report) => Event::Report(report),
                None => {
                    let source =
                        io::Error::new(io::ErrorKind::InvalidData, format!("unexpected report {line:?}"));
                    Event::Failed(NestedError::Connection { source })
                }
            },
        };
        let last = matches!(event, Event::Closed | Event::Failed(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

/// Writes an output file of the command.
fn receive_file(
    control: &mut impl Read,
    outputs: &[PathBuf],
    index: usize,
    len: u64,
) -> Result<(), NestedError> {
    let path = outputs.get(index).ok_or_else(|| NestedError::Connection {
        source: io::Error::new(io::ErrorKind::InvalidData, "a file that was not asked for"),
    })?;
    let received = File::create(path).and_then(|mut file| io::copy(&mut control.take(len), &mut file));
    match received {
        Ok(received) if received == len => Ok(()),
        Ok(_) => Err(NestedError::Output { path: path.clone(), source: io::ErrorKind::UnexpectedEof.into() }),
        Err(source) => Err(NestedError::Output { path: path.clone(), source }),
    }
}

/// One of the command's output streams.
struct Stream(Arc<(Mutex<Carried>, Condvar)>);

#[derive(Default)]
struct Carried {
    bytes: u64,
    ended: bool,
}

impl Stream {
    /// Starts a thread that carries what comes from `socket` to `writer`.
    ///
    /// A slow writer slows the command, as it would on the host. When the writer fails, the command is told by `hang_up` and
    /// the rest is thrown away.
    fn carry(
        mut socket: UnixStream,
        writer: Box<dyn Write + Send>,
        hang_up: Order,
        events: Sender<Event>,
    ) -> Self {
        let shared = Arc::new((Mutex::new(Carried::default()), Condvar::new()));
        let carried = Arc::clone(&shared);
        std::thread::spawn(move || {
            let update = |change: &dyn Fn(&mut Carried)| {
                change(&mut carried.0.lock().unwrap_or_else(PoisonError::into_inner));
                carried.1.notify_all();
            };
            let mut writer = Some(writer);
            let mut buffer = vec![0; 64 << 10];
            loop {
                let len = match socket.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(len) => len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                let written = writer
                    .as_mut()
                    .map(|writer| writer.write_all(&buffer[..len]).and_then(|()| writer.flush()));
                if let Some(Err(error)) = written {
                    tracing::debug!(%error, order = %hang_up, "output lost its reader");
                    writer = None;
                    // Fails only when the run is over.
                    let _ = events.send(Event::HangUp(hang_up));
                }
                update(&|carried| carried.bytes += len as u64);
            }
            update(&|carried| carried.ended = true);
        });
        Self(shared)
    }

    /// Waits until `bytes` bytes have been carried. False if the stream ended earlier.
    fn wait(&self, bytes: u64) -> bool {
        let carried = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let carried = self
            .0
            .1
            .wait_while(carried, |carried| carried.bytes < bytes && !carried.ended)
            .unwrap_or_else(PoisonError::into_inner);
        carried.bytes >= bytes
    }
}

/// Forwards signals to vmprobe as events, until dropped.
struct Signals(signal_hook::iterator::Handle);

impl Signals {
    fn forward(events: Sender<Event>) -> io::Result<Self> {
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let handle = signals.handle();
        std::thread::spawn(move || {
            for signal in signals.forever() {
                if events.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        });
        Ok(Self(handle))
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?))
}

fn current_directory() -> Result<PathBuf, NestedError> {
    std::env::current_dir().map_err(|source| NestedError::Input { path: ".".into(), source })
}

/// Where a file of the user's is in the machine.
fn usable_place(directory: &Path, path: &Path) -> Result<PathBuf, NestedError> {
    let place = request::place(directory, path);
    if request::is_usable(&place) { Ok(place) } else { Err(NestedError::Place { path: path.to_owned() }) }
}

fn output_paths(run: &NestedRun) -> Result<Vec<PathBuf>, NestedError> {
    let directory = current_directory()?;
    run.outputs.iter().map(|path| usable_place(&directory, path)).collect()
}

/// The end of the machine's console and of the emulator's messages.
fn last_words(console: &File, messages: &File) -> String {
    let read = |mut file: &File| {
        let mut bytes = Vec::new();
        // A memory file; what cannot be read is not shown.
        let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let messages: Vec<String> = read(messages)
        .lines()
        // Of the CPU model's features some are unknown to the emulator, which does no harm.
        .filter(|line| !line.contains("TCG doesn't support requested feature"))
        .map(str::to_owned)
        .collect();
    let console = read(console).replace('\r', "");
    last_lines(&format!("{console}\n{}", messages.join("\n")), CONSOLE_LINES)
}
