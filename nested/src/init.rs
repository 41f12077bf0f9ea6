//! Process 1 of the emulated machine: vmprobe itself.
//!
//! The program's `main` begins with
//!
//! ```no_run
//! if nested::init::is_init() {
//!     nested::init::main();
//! }
//! ```

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mount::MountFlags;
use rustix::process::{Pid, Signal};
use rustix::system::RebootCommand;

use crate::control::{End, Order, Report, port};
use crate::request::{self, Request};

/// The variable that the host sets on the kernel's command line for process 1.
pub(crate) const MARKER: &str = "VMPROBE_INIT";

/// How long the virtio ports may take to appear once their driver is loaded.
const PORT_TIMEOUT: Duration = Duration::from_secs(30);

/// Why process 1 cannot do its work.
#[derive(Debug, thiserror::Error)]
enum InitError {
    #[error("{what}: {source}")]
    Io { what: String, source: io::Error },
    #[error("The virtio port {0} did not appear")]
    NoPort(String),
    #[error("There is no /dev/kvm; the kernel's kvm-amd module did not accept the emulated CPU")]
    NoKvm,
}

/// Names what failed.
fn doing<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> InitError {
    let what = what.into();
    move |source| InitError::Io { what, source: source.into() }
}

/// Whether this process is process 1 of the emulated machine.
#[must_use]
pub fn is_init() -> bool {
    std::process::id() == 1 && std::env::var_os(MARKER).is_some_and(|value| value == "1")
}

/// Runs the command that the host asks for and reports its end. Does not return: the machine is killed by the host, or resets
/// when it cannot work.
pub fn main() -> ! {
    let Err(error) = work();
    // To the kernel's console, which the host shows.
    eprintln!("vmprobe: {error}");
    // With -no-reboot a reset ends the emulator.
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::exit(1)
}

fn work() -> Result<Infallible, InitError> {
    for (kind, target) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        rustix::mount::mount(kind, target, kind, MountFlags::empty(), None)
            .map_err(doing(format!("Cannot mount {target}")))?;
    }
    let text = fs::read(request::REQUEST).map_err(doing("Cannot read the request"))?;
    let request: Request = serde_json::from_slice(&text).map_err(doing("Cannot understand the request"))?;
    for module in &request.modules {
        load_module(Path::new(module))?;
    }
    let mut control = open_port(port::CONTROL)?;
    if let Err(error) = serve(&request, &control) {
        let report = Report::Failed(error.to_string());
        writeln!(control, "{report}").map_err(doing("Cannot report"))?;
    }
    // The host ends the machine when it has all output, which may still be on its way.
    loop {
        std::thread::park();
    }
}

/// Loads a module (finit_module(2)). The parameter keeps kvm-amd from offering SVM to the guest: nobody needs a third level.
fn load_module(path: &Path) -> Result<(), InitError> {
    let what = || format!("Cannot load the module {}", path.display());
    let file = File::open(path).map_err(doing(what()))?;
    let is_kvm_amd = path.to_string_lossy().contains("kvm_amd");
    let parameters = if is_kvm_amd { c"nested=0" } else { c"" };
    match rustix::system::finit_module(&file, parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(doing(what())(error)),
    }
}

/// The port that leads to [`NestedRun::vsock`](crate::NestedRun), for reading and writing without waiting.
///
/// # Errors
/// This is not the emulated machine, or it has no such port.
pub fn vsock_port() -> io::Result<File> {
    let port = open_port(port::VSOCK).map_err(io::Error::other)?;
    rustix::io::ioctl_fionbio(&port, true)?;
    Ok(port)
}

/// The port that leads to the network of this number ([`NestedRun::networks`](crate::NestedRun)).
///
/// # Errors
/// This is not the emulated machine, or it has no such port.
pub fn network_port(index: usize) -> io::Result<File> {
    open_port(&port::network(index)).map_err(io::Error::other)
}

/// Opens the virtio port of this name as soon as it is there and the host is connected to it.
fn open_port(name: &str) -> Result<File, InitError> {
    let deadline = Instant::now() + PORT_TIMEOUT;
    loop {
        if let Some(device) = find_port(name) {
            match File::options().read(true).write(true).open(&device) {
                Ok(file) => return Ok(file),
                // The host's side is not announced yet, or devtmpfs has no node yet.
                Err(error)
                    if error.kind() == io::ErrorKind::NotFound
                        || error.raw_os_error() == Some(rustix::io::Errno::NXIO.raw_os_error()) => {}
                Err(error) => return Err(doing(format!("Cannot open {device}"))(error)),
            }
        }
        if Instant::now() >= deadline {
            return Err(InitError::NoPort(name.to_owned()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The device node of a port; its name is an attribute in sysfs (virtio specification 1.2, 5.3.6.2).
fn find_port(name: &str) -> Option<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()?.flatten() {
        let found = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if found.trim_end() == name {
            return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    None
}

/// Runs the command between its two reports.
fn serve(request: &Request, control: &File) -> Result<(), InitError> {
    let mut reports = control;
    let stdout_port = open_port(port::STDOUT)?;
    let stderr_port = open_port(port::STDERR)?;
    let stdin = if request.stdin { open_port(port::STDIN)?.into() } else { Stdio::null() };
    if !Path::new("/dev/kvm").exists() {
        return Err(InitError::NoKvm);
    }
    place_files(request)?;
    writeln!(reports, "{}", Report::Ready).map_err(doing("Cannot report"))?;

    let mut child = Command::new(request::PROGRAM)
        .arg0(&request.name)
        .args(&request.arguments)
        .envs(request.environment.iter().cloned())
        .env_remove(MARKER)
        .env("PATH", "/usr/bin:/bin")
        .env("HOME", "/")
        .current_dir(&request.directory)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(doing("Cannot start the command"))?;
    let stdout = Forwarder::start(child.stdout.take(), stdout_port);
    let stderr = Forwarder::start(child.stderr.take(), stderr_port);
    follow_orders(control, &child, &stdout, &stderr)?;

    let status = child.wait().map_err(doing("Cannot wait for the command"))?;
    let stdout = stdout.finish()?;
    let stderr = stderr.finish()?;
    for (index, output) in request.outputs.iter().enumerate() {
        if let Ok(mut file) = File::open(output) {
            let what = || format!("Cannot send {}", output.display());
            let len = file.metadata().map_err(doing(what()))?.len();
            writeln!(reports, "{}", Report::File { index, len }).map_err(doing(what()))?;
            io::copy(&mut file, &mut reports).map_err(doing(what()))?;
        }
    }
    let end = match (status.code(), status.signal()) {
        (Some(code), _) => End::Exit(code),
        (None, signal) => End::Signal(signal.unwrap_or(0)),
    };
    writeln!(reports, "{}", Report::Ended { end, stdout, stderr }).map_err(doing("Cannot report"))
}

/// Puts the files that the command reads where it looks for them, and makes room for those it writes.
fn place_files(request: &Request) -> Result<(), InitError> {
    let make = |dir: &Path| fs::create_dir_all(dir).map_err(doing(format!("Cannot make {}", dir.display())));
    make(Path::new(&request.directory))?;
    for path in request.inputs.iter().chain(&request.outputs) {
        if let Some(parent) = Path::new(path).parent() {
            make(parent)?;
        }
    }
    for (index, path) in request.inputs.iter().enumerate() {
        // The loader may be there, or a file of devtmpfs; it is the user's file that is asked for by this name.
        let path = Path::new(path);
        if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_dir()) {
            fs::remove_file(path).map_err(doing(format!("Cannot replace {}", path.display())))?;
        }
        std::os::unix::fs::symlink(request::input_path(index), path)
            .map_err(doing(format!("Cannot place {}", path.display())))?;
    }
    Ok(())
}

/// A thread that carries an output of the command to a port.
struct Forwarder {
    thread: JoinHandle<io::Result<u64>>,
    hung_up: Arc<AtomicBool>,
}

impl Forwarder {
    fn start(pipe: Option<impl Read + Send + 'static>, mut port: File) -> Self {
        let hung_up = Arc::new(AtomicBool::new(false));
        let closed = Arc::clone(&hung_up);
        let thread = std::thread::spawn(move || {
            let Some(mut pipe) = pipe else { return Ok(0) };
            let mut carried = 0;
            // The size of a pipe.
            let mut buffer = vec![0; 64 << 10];
            loop {
                let len = match pipe.read(&mut buffer) {
                    Ok(len) => len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(error),
                };
                // Returning closes the pipe: the command's next write fails.
                if len == 0 || closed.load(Ordering::Relaxed) {
                    return Ok(carried);
                }
                port.write_all(&buffer[..len])?;
                carried += len as u64;
            }
        });
        Self { thread, hung_up }
    }

    /// Waits for the end of the output. Returns how many bytes the port was given.
    fn finish(self) -> Result<u64, InitError> {
        let carried = self.thread.join().unwrap_or_else(|_| Err(io::Error::other("its thread panicked")));
        carried.map_err(doing("Cannot carry the command's output"))
    }
}

/// Starts a thread that does what the host says, until the port is closed.
fn follow_orders(
    control: &File,
    child: &Child,
    stdout: &Forwarder,
    stderr: &Forwarder,
) -> Result<(), InitError> {
    let orders = BufReader::new(control.try_clone().map_err(doing("Cannot read orders"))?);
    let child = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let (stdout, stderr) = (Arc::clone(&stdout.hung_up), Arc::clone(&stderr.hung_up));
    std::thread::spawn(move || {
        for line in orders.lines().map_while(Result::ok) {
            let signal = match Order::parse(&line) {
                Some(Order::Interrupt) => Signal::INT,
                Some(Order::Terminate) => Signal::TERM,
                Some(Order::HangUpStdout) => {
                    stdout.store(true, Ordering::Relaxed);
                    continue;
                }
                Some(Order::HangUpStderr) => {
                    stderr.store(true, Ordering::Relaxed);
                    continue;
                }
                None => continue,
            };
            if let Some(child) = child {
                // The command may have ended meanwhile.
                let _ = rustix::process::kill_process(child, signal);
            }
        }
    });
    Ok(())
}
