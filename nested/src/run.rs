//! Running one command in the machine.
//!
//! The calling thread starts QEMU and then handles events: reports of the machine's process 1, signals to vmprobe, the
//! command's output having lost its reader. Threads carry stdout and stderr. QEMU dies with the calling thread.
//!
//! Nothing is written to the disk: the initramfs and the machine's console live in memory files (memfd_create(2)).

use std::error::Error;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use disk::{Access, Format};
use rustix::fs::MemfdFlags;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::control::{End, Order, Report};
use crate::emulator::{Machine, Wiring};
use crate::prepare::Rig;
use crate::process::last_lines;
use crate::stream::Stream;
use crate::{initramfs, request};

/// What the machine's own kernel and process 1 need besides the guest's memory and the initramfs.
const OWN_MEMORY: u64 = 1 << 30;

/// How many lines of the machine's console an error shows.
const CONSOLE_LINES: usize = 30;

/// What the machine's time follows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Clock {
    /// The host's time.
    #[default]
    Real,
    /// The instructions that have been emulated, one nanosecond each; while the machine is idle, the host's time. A busy or slow
    /// host then changes nothing for what runs in it, and a timer that comes due too fast for an emulated machine does not.
    /// Costs about 2.5 times the host's time.
    Instructions,
}

/// A disk that the command finds as a block device, whatever the format of its image.
#[derive(Clone, Debug)]
pub struct NestedDisk {
    /// What becomes of writes.
    pub access: Access,
    /// The image and those that it is stacked on, each on the next.
    pub images: Vec<(Format, PathBuf)>,
}

/// The block device of the disk number `index`: virtio disks get their letters in the order of their PCI slots (Linux:
/// drivers/block/virtio_blk.c). There are no more than [`MAX_DISKS`].
#[must_use]
pub fn disk_path(index: usize) -> PathBuf {
    let letter = ('a'..='z').nth(index).unwrap_or_default();
    format!("/dev/vd{letter}").into()
}

/// As many disks as a machine of vmprobe's own can have.
pub const MAX_DISKS: usize = 15;

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
    /// Disks that the command uses, at the places that [`disk_path`] gives.
    pub disks: Vec<NestedDisk>,
    /// Memory of the guest that the command runs, in bytes. The machine gets 1 GiB more, and the size of the inputs twice.
    pub guest_memory: u64,
    /// Virtual CPUs of the machine. With more than one it can freeze: QEMU's TCG may go on running an int3 that the machine's
    /// kernel has already patched away again, as it does on another CPU when a jump label changes.
    pub cpus: u32,
    /// What the machine's time follows.
    pub clock: Clock,
    /// How long the machine may take to start.
    pub boot_timeout: Duration,
    /// How long the command may go on after a signal (SIGINT, SIGTERM, SIGHUP), until all that it wrote has been carried. A machine
    /// that has frozen never tells it.
    pub stop_timeout: Duration,
    /// Where the command's standard input comes from; without it the command has none. What it does not read waits on the other side.
    pub stdin: Option<UnixStream>,
    /// Where the port leads that the command finds with [`vsock_port`](crate::init::vsock_port); without it there is none.
    pub vsock: Option<UnixStream>,
    /// Where the ports lead that the command finds with [`network_port`](crate::init::network_port), by their numbers.
    pub networks: Vec<UnixStream>,
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
            .field("disks", &self.disks)
            .field("guest_memory", &self.guest_memory)
            .field("cpus", &self.cpus)
            .field("clock", &self.clock)
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
            disks: Vec::new(),
            guest_memory: 512 << 20,
            cpus: 1,
            clock: Clock::default(),
            boot_timeout: Duration::from_secs(180),
            stop_timeout: Duration::from_secs(30),
            stdin: None,
            vsock: None,
            networks: Vec::new(),
            stdout: Box::new(io::stdout()),
            stderr: Box::new(io::stderr()),
        }
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
        source: Box<dyn Error + Send + Sync>,
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
        source: Box<dyn Error + Send + Sync>,
    },
    /// The working directory is gone.
    #[error("Cannot tell the working directory; change to one that exists")]
    Directory {
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
    #[error("The emulated machine stopped ({status}) before the command ended. Its last words:\n{console}")]
    Stopped {
        /// How the emulator ended.
        status: String,
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
    /// The command did not end in time after a signal; it was ended with the machine.
    #[error("The command did not end within {} s of a signal. The emulated machine's last words:\n{console}", timeout.as_secs())]
    StopTimeout {
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
pub(crate) enum Event {
    /// The machine's process 1 says something.
    Report(Report),
    /// The machine's control port is closed: the emulator has ended.
    Closed,
    /// The connection or an output file failed.
    Failed(NestedError),
    /// A signal has been sent to vmprobe.
    Signal(i32),
    /// An output has lost its reader.
    HangUp(Order),
    /// The command's output has been written to its end; false if some is missing.
    Carried(bool),
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
        let directory = std::env::current_dir().map_err(|source| NestedError::Directory { source })?;
        let outputs = output_paths(&directory, &run.outputs)?;
        let connection = |source| NestedError::Connection { source };
        let file_system = memory_file("initramfs").map_err(connection)?;
        let file_system_len = initramfs::write(&file_system, &run, &self.kernel, &directory, &outputs)?;
        let console = memory_file("console").map_err(connection)?;
        let messages = memory_file("messages").map_err(connection)?;
        let (control, control_end) = UnixStream::pair().map_err(connection)?;
        let (stdout, stdout_end) = UnixStream::pair().map_err(connection)?;
        let (stderr, stderr_end) = UnixStream::pair().map_err(connection)?;
        let mut orders = control.try_clone().map_err(connection)?;
        let (events, received) = mpsc::channel();
        let _signals = Signals::forward(events.clone()).map_err(connection)?;

        let wiring = Wiring {
            initramfs: file_system.into(),
            console: console.try_clone().map_err(connection)?.into(),
            messages: messages.try_clone().map_err(connection)?.into(),
            control: control_end.into(),
            stdin: run.stdin.map(Into::into),
            stdout: stdout_end.into(),
            stderr: stderr_end.into(),
            vsock: run.vsock.map(Into::into),
            networks: run.networks.into_iter().map(Into::into).collect(),
        };
        let memory = run.guest_memory.saturating_add(OWN_MEMORY).saturating_add(2 * file_system_len);
        let mut machine = Machine::start(self, wiring, memory, run.cpus, run.clock, &run.disks)
            .map_err(|source| NestedError::Start { path: self.qemu.binary(), source })?;
        tracing::debug!(elapsed = ?started.elapsed(), memory, file_system_len, "emulator started");

        let reports = events.clone();
        std::thread::spawn(move || read_reports(control, &outputs, &reports));
        let stdout = Stream::carry(stdout, run.stdout, Order::HangUpStdout, events.clone());
        let stderr = Stream::carry(stderr, run.stderr, Order::HangUpStderr, events.clone());

        let last_words = || last_words(&console, &messages);
        let mut ready = false;
        let mut interrupted = false;
        let mut deadline = Some(started + run.boot_timeout);
        let mut exit = None;
        loop {
            let Some(event) = next_event(&received, deadline) else {
                let console = last_words();
                return Err(if interrupted {
                    NestedError::StopTimeout { timeout: run.stop_timeout, console }
                } else {
                    NestedError::BootTimeout { timeout: run.boot_timeout, console }
                });
            };
            match event {
                Event::Report(Report::Ready) => {
                    tracing::debug!(elapsed = ?started.elapsed(), "machine ready");
                    ready = true;
                    deadline = None;
                }
                Event::Report(Report::Ended { end, stdout: stdout_len, stderr: stderr_len }) => {
                    tracing::debug!(elapsed = ?started.elapsed(), "command ended");
                    exit = Some(match end {
                        End::Exit(code) => NestedExit::Code(code),
                        End::Signal(signal) => NestedExit::Signal(signal),
                    });
                    let (stdout, stderr, events) = (stdout.clone(), stderr.clone(), events.clone());
                    std::thread::spawn(move || {
                        let all = stdout.wait(stdout_len) && stderr.wait(stderr_len);
                        // Fails only when the run is over.
                        let _ = events.send(Event::Carried(all));
                    });
                }
                Event::Carried(all) => {
                    let exit = exit.filter(|_| all);
                    return exit.ok_or_else(|| NestedError::Stopped {
                        status: machine.ended(),
                        console: last_words(),
                    });
                }
                Event::Report(Report::Failed(reason)) => return Err(NestedError::Machine { reason }),
                // Its contents have been handled where it was read.
                Event::Report(Report::File { .. }) => {}
                Event::Closed => {
                    return Err(NestedError::Stopped { status: machine.ended(), console: last_words() });
                }
                Event::Failed(error) => return Err(error),
                Event::Signal(signal) => {
                    if interrupted || !ready {
                        return Err(NestedError::Interrupted);
                    }
                    interrupted = true;
                    deadline = Instant::now().checked_add(run.stop_timeout);
                    let order = if signal == SIGINT { Order::Interrupt } else { Order::Terminate };
                    send(&mut orders, order);
                }
                Event::HangUp(order) => send(&mut orders, order),
            }
        }
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
            Ok(0) => Event::Closed,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Event::Failed(NestedError::Connection { source: error })
            }
            // The emulator closes its end when it ends; killed, it may leave a reset behind.
            Err(_) => Event::Closed,
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

/// Where the command writes its output files, on the host and in the machine.
fn output_paths(directory: &Path, outputs: &[PathBuf]) -> Result<Vec<PathBuf>, NestedError> {
    let place = |path: &PathBuf| {
        request::usable_place(directory, path).ok_or_else(|| NestedError::Place { path: path.clone() })
    };
    outputs.iter().map(place).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What `read_reports` makes of `bytes`, with one output file.
    fn events(bytes: &[u8], output: &Path) -> Vec<Event> {
        let (control, mut machine) = UnixStream::pair().unwrap();
        machine.write_all(bytes).unwrap();
        drop(machine);
        let (sender, received) = mpsc::channel();
        read_reports(control, &[output.to_owned()], &sender);
        drop(sender);
        received.iter().collect()
    }

    #[test]
    fn a_file_between_reports_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        std::fs::write(&path, "longer than what comes").unwrap();
        let events = events(b"ready\nfile 0 8\nexit 1\n\nexit 0 1 2\n", &path);
        assert!(
            matches!(
                events[..],
                [
                    Event::Report(Report::Ready),
                    Event::Report(Report::Ended { end: End::Exit(0), stdout: 1, stderr: 2 }),
                    Event::Closed
                ]
            ),
            "{} events",
            events.len()
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"exit 1\n\n");
    }

    #[test]
    fn what_cannot_be_written_or_understood_ends_the_run() {
        let dir = tempfile::tempdir().unwrap();
        for (bytes, path) in [
            // Cut short, not asked for, no such directory, no report.
            (&b"file 0 9\nshort"[..], dir.path().join("out")),
            (b"file 1 1\nx", dir.path().join("out")),
            (b"file 0 1\nx", dir.path().join("missing/out")),
            (b"nonsense\nready\n", dir.path().join("out")),
            (b"\xff\xfe\n", dir.path().join("out")),
        ] {
            let events = events(bytes, &path);
            assert!(matches!(events[..], [Event::Failed(_)]), "{bytes:?}: {} events", events.len());
        }
    }

    #[test]
    fn last_words_are_those_of_machine_and_emulator_without_harmless_warnings() {
        let mut console = memory_file("console").unwrap();
        let mut messages = memory_file("messages").unwrap();
        console.write_all(b"booting\r\nKernel panic\r\n").unwrap();
        messages
            .write_all(b"qemu: warning: TCG doesn't support requested feature: x\nqemu: no memory\n")
            .unwrap();
        assert_eq!(last_words(&console, &messages), "booting\nKernel panic\n\nqemu: no memory");
    }

    #[test]
    fn the_exit_code_of_a_signal_is_the_shells() {
        assert_eq!(NestedExit::Code(124).code(), 124);
        assert_eq!(NestedExit::Signal(9).code(), 137);
    }
}
