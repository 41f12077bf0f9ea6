//! One cell: a `vmprobe run` in a process of its own, watched to its end.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use guest::initramfs;
use matrix::axes::Kpti;
use matrix::check::{Attempt, findings};
use matrix::outcome::{CommandEnd, End, Observer, Outcome, RunReport};
use matrix::{Cell, MatrixFile};
use rustix::process::{Pid, Signal, kill_process};

use super::directory::CELLS;
use super::kernels::Kernel;
use crate::exit::{Code, Failure};

/// What the guest wrote.
const CONSOLE: &str = "console.log";
/// What the run said.
const LOG: &str = "vmprobe.log";
/// What it said of itself at the end.
const REPORT: &str = "report.json";

/// How much of a console's beginning and of its end is read, bytes: a guest may write for ever.
const CONSOLE_BYTES: u64 = 8 << 20;

/// How much longer than its timeout a run may take until its process is killed: it prepares and starts the emulated machine before it
/// begins to count.
const START_TIME: Duration = Duration::from_secs(300);
/// How long a process may take to end when it is told.
const END_TIME: Duration = Duration::from_secs(60);
/// How often a process is looked at.
const LOOK: Duration = Duration::from_millis(20);

/// What one run needs to know.
pub struct Order<'a> {
    pub file: &'a MatrixFile,
    pub cell: &'a Cell,
    pub kernel: Kernel,
    /// Where its files go.
    pub directory: PathBuf,
    /// Set when the user interrupts the matrix.
    pub stop: &'a AtomicBool,
}

impl Order<'_> {
    /// Whether the guest runs the workload's command.
    fn runs_command(&self) -> bool {
        self.file.workload.command.is_some() && self.kernel.initrd.is_some()
    }
}

/// Where a cell's files are.
pub fn directory(results: &Path, name: &str) -> PathBuf {
    results.join(CELLS).join(name)
}

/// What a cell's guest wrote, as far as it is kept.
pub fn console(directory: &Path) -> String {
    let mut bytes = Vec::new();
    // What can be read of it is better than nothing.
    let mut read = || {
        let mut file = File::open(directory.join(CONSOLE))?;
        let size = file.metadata()?.len();
        (&mut file).take(CONSOLE_BYTES).read_to_end(&mut bytes)?;
        if size > CONSOLE_BYTES {
            file.seek(SeekFrom::Start(CONSOLE_BYTES.max(size - CONSOLE_BYTES)))?;
            file.take(CONSOLE_BYTES).read_to_end(&mut bytes)?;
        }
        Ok::<_, std::io::Error>(())
    };
    read().ok();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Runs the cell once. A run that cannot even begin is an outcome too.
pub fn run(order: &Order<'_>) -> Attempt {
    let start = Instant::now();
    let (mut outcome, mut extra) = match attempt(order, start) {
        Ok(done) => done,
        Err(failure) => {
            let end = End::Code(failure.code().number());
            (Outcome::without_report(end, failure.to_string(), start.elapsed().as_secs_f64()), Vec::new())
        }
    };
    let console = console(&order.directory);
    outcome.command = order.runs_command().then(|| CommandEnd::of_console(&console));
    let mut all = findings(order.file, order.cell, &outcome, &console);
    all.append(&mut extra);
    Attempt { outcome, findings: all }
}

fn attempt(order: &Order<'_>, start: Instant) -> Result<(Outcome, Vec<String>), Failure> {
    let directory = &order.directory;
    let host = |path: &Path, error: std::io::Error| super::host_failure(path, &error);
    // What an earlier run has left would pass for this one's.
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(host(directory, error)),
        _ => fs::create_dir_all(directory).map_err(|error| host(directory, error))?,
    }
    let log = directory.join(LOG);
    let stderr = File::create(&log).map_err(|error| host(&log, error))?;
    let program = std::env::current_exe().map_err(|error| host(Path::new("/proc/self/exe"), error))?;
    let mut child = Command::new(program)
        .args(arguments(order)?)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr)
        // An interrupt from the terminal is passed on, and once.
        .process_group(0)
        .spawn()
        .map_err(|error| Failure::Host(format!("A run cannot be started: {error}")))?;

    let stdout = child.stdout.take();
    let (observed, status) = thread::scope(|scope| {
        let reader = scope.spawn(|| observe(stdout));
        let limit = order.file.limits.timeout.0 + START_TIME;
        let status = watch(&mut child, start + limit, order.stop);
        // A panic there is a bug; the run is worth as much as one that wrote nothing.
        (reader.join().unwrap_or_default(), status)
    });
    let (observer, unreadable) = observed;
    let status = status.map_err(|error| Failure::Host(format!("A run cannot be watched: {error}")))?;
    let end = match (status.code(), status.signal()) {
        (Some(code), _) => End::Code(code),
        (None, signal) => End::Signal(signal.unwrap_or_default()),
    };
    let report = fs::read(directory.join(REPORT)).ok();
    let outcome = match report.and_then(|text| serde_json::from_slice::<RunReport>(&text).ok()) {
        Some(report) => observer.finish(end, report),
        None => Outcome::without_report(end, message(status, &log), start.elapsed().as_secs_f64()),
    };
    Ok((outcome, unreadable.into_iter().collect()))
}

/// The command line of the run.
fn arguments(order: &Order<'_>) -> Result<Vec<OsString>, Failure> {
    let Order { file, cell, kernel, directory, .. } = order;
    let mut arguments: Vec<OsString> = Vec::new();
    let mut option = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
        // In one word, so that no value passes for an option.
        let mut word = OsString::from(name);
        word.push("=");
        word.push(value);
        arguments.push(word);
    };
    option("--output", &"json");
    option("--report", &directory.join(REPORT));
    option("--serial", &directory.join(CONSOLE));
    option("--timeout", &file.limits.timeout.to_string());
    option("--cpus", &cell.vcpus.to_string());
    option("--memory", &cell.memory.to_string());
    option("--accel", &cell.accel.to_string());
    let pti = match cell.kpti {
        Kpti::Auto => "",
        Kpti::On => "pti=on",
        Kpti::Off => "pti=off",
    };
    let command = if order.runs_command() { initramfs::COMMAND_CMDLINE } else { "" };
    let words: Vec<&str> = [command, file.workload.cmdline.as_str(), cell.cmdline.as_str(), pti]
        .into_iter()
        .filter(|word| !word.is_empty())
        .collect();
    if !words.is_empty() {
        option("--cmdline", &words.join(" "));
    }
    if let Some(initrd) = &kernel.initrd {
        option("--initrd", initrd);
    }
    for probe in file.probes.get(&cell.probes).into_iter().flatten() {
        option("--probe", &probe.spec);
    }
    if cell.kaslr {
        arguments.push("--kaslr".into());
    }
    arguments.insert(0, "run".into());
    arguments.push("--".into());
    arguments.push(kernel.image.clone().into());
    Ok(arguments)
}

/// Reads the hits to their end. Returns what was no hit, too.
fn observe(stdout: Option<ChildStdout>) -> (Observer, Option<String>) {
    let mut observer = Observer::default();
    let mut unreadable = None;
    for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
        let taken = line.map_err(|error| error.to_string());
        let taken = taken.and_then(|line| observer.line(&line).map_err(|error| error.to_string()));
        if let Err(error) = taken {
            unreadable.get_or_insert(error);
        }
    }
    (observer, unreadable)
}

/// Waits for a process to end, and sees to it that it does.
fn watch(child: &mut Child, deadline: Instant, stop: &AtomicBool) -> std::io::Result<ExitStatus> {
    let mut told: Option<Instant> = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let now = Instant::now();
        match told {
            None if now >= deadline || stop.load(Ordering::Relaxed) => {
                if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                    // It may have ended just now.
                    kill_process(pid, Signal::INT).ok();
                }
                told = Some(now);
            }
            Some(told) if now >= told + END_TIME => child.kill()?,
            _ => {}
        }
        thread::sleep(LOOK);
    }
}

/// Why a run that left no report ended.
fn message(status: ExitStatus, log: &Path) -> String {
    if let Some(signal) = status.signal() {
        return format!("its process was killed (signal {signal})");
    }
    let text = fs::read_to_string(log).unwrap_or_default();
    let last = text
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("vmprobe: ").or_else(|| line.strip_prefix("error: ")));
    let code = status.code().unwrap_or_default();
    if code == Code::Interrupted.number() {
        return "interrupted".to_owned();
    }
    last.map_or_else(|| format!("it ended with exit code {code}"), str::to_owned)
}
