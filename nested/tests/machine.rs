//! The nested rung, proven from outside: this program re-executes itself in the emulated machine.
//!
//! Three roles: process 1 of the machine (`nested::init`), the command that runs in it (`--inner NAME`), and on the host the
//! tests, some of which start this program once more to have a process of its own that can be interrupted (`--outer NAME`).
//!
//! The first run prepares the machine, which takes minutes. Where that is not possible the tests are skipped with the reason,
//! or fail if CI is true.

mod inner;

use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};
use nested::{Cache, NestedError, NestedExit, NestedRun, Rig};
use rustix::process::{Pid, Signal};

fn main() -> ExitCode {
    if nested::init::is_init() {
        nested::init::main();
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    match arguments.get(1).and_then(|argument| argument.to_str()) {
        Some("--inner") => inner::run(&arguments[2..]),
        Some("--outer") => outer(arguments[2..].to_vec()),
        _ => tests(),
    }
}

/// The variable that gives the outer role another [`NestedRun::stop_timeout`], in seconds.
const STOP_TIMEOUT: &str = "TEST_STOP_TIMEOUT";

/// A test that needs the machine.
type Test = fn(&Rig) -> Result<(), Failed>;

fn tests() -> ExitCode {
    let tests: [(&str, Test); 14] = [
        ("output_and_exit_code_are_exact", output_and_exit_code_are_exact),
        ("files_go_in_and_come_back", files_go_in_and_come_back),
        ("debug_exits_are_real", debug_exits_are_real),
        ("watchpoints_count_what_the_guest_counts", watchpoints_count_what_the_guest_counts),
        ("watching_changes_while_vcpus_run", watching_changes_while_vcpus_run),
        ("a_stock_kernel_goes_on_from_a_snapshot", a_stock_kernel_goes_on_from_a_snapshot),
        ("lines_arrive_as_they_are_written", lines_arrive_as_they_are_written),
        ("much_output_to_a_slow_reader_is_complete", much_output_to_a_slow_reader_is_complete),
        ("a_lost_reader_is_the_commands_matter", a_lost_reader_is_the_commands_matter),
        ("an_interrupt_reaches_the_command", an_interrupt_reaches_the_command),
        ("a_second_interrupt_ends_the_machine", a_second_interrupt_ends_the_machine),
        (
            "a_command_that_does_not_end_when_told_ends_with_the_machine",
            a_command_that_does_not_end_when_told_ends_with_the_machine,
        ),
        ("the_machine_dies_with_vmprobe", the_machine_dies_with_vmprobe),
        ("a_machine_that_does_not_start_is_reported", a_machine_that_does_not_start_is_reported),
    ];
    let trials: Vec<Trial> = tests
        .into_iter()
        .map(|(name, test)| Trial::test(name, move || rig()?.map_or(Ok(()), |rig| test(&rig))))
        .collect();
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// The machine, or None with the reason printed where it cannot be had.
fn rig() -> Result<Option<Rig>, Failed> {
    match prepared() {
        Ok(rig) => Ok(Some(rig)),
        Err(reason) if std::env::var_os("CI").is_some_and(|ci| ci == "true") => Err(reason.into()),
        Err(reason) => {
            eprintln!("skipped: {reason}");
            Ok(None)
        }
    }
}

fn prepared() -> Result<Rig, String> {
    let cache = Cache::from_env().map_err(|error| error.to_string())?;
    nested::prepare(&cache, &*nested::stderr_progress()).map_err(|error| with_sources(&error))
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// The host's side in a process of its own.
fn outer(arguments: Vec<OsString>) -> ExitCode {
    let mut run = NestedRun::new(inner_command(arguments));
    if let Some(seconds) = std::env::var_os(STOP_TIMEOUT) {
        let seconds = seconds.to_str().and_then(|seconds| seconds.parse().ok());
        run.stop_timeout = seconds.map_or(run.stop_timeout, Duration::from_secs);
    }
    let result = prepared().and_then(|rig| rig.run(run).map_err(|error| with_sources(&error)));
    match result {
        Ok(exit) => ExitCode::from(u8::try_from(exit.code()).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("outer: {error}");
            ExitCode::from(99)
        }
    }
}

fn inner_command(arguments: Vec<OsString>) -> Vec<OsString> {
    std::iter::once("--inner".into()).chain(arguments).collect()
}

/// Some output, and when it arrived.
type Arrival = (Instant, Vec<u8>);

/// A writer that sends what it is given.
struct Record(Sender<Arrival>);

impl Write for Record {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0
            .send((Instant::now(), data.to_vec()))
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn recorded(arguments: &[&OsStr]) -> (NestedRun, Receiver<Arrival>, Receiver<Arrival>) {
    let mut run =
        NestedRun::new(inner_command(arguments.iter().map(|argument| (*argument).to_owned()).collect()));
    let (stdout, stdout_received) = mpsc::channel();
    let (stderr, stderr_received) = mpsc::channel();
    run.stdout = Box::new(Record(stdout));
    run.stderr = Box::new(Record(stderr));
    (run, stdout_received, stderr_received)
}

fn all(received: &Receiver<Arrival>) -> Vec<u8> {
    received.try_iter().flat_map(|(_, data)| data).collect()
}

fn check(condition: bool, what: impl Into<String>) -> Result<(), Failed> {
    if condition { Ok(()) } else { Err(what.into().into()) }
}

fn failure(result: Result<NestedExit, NestedError>) -> Result<NestedError, Failed> {
    result.err().ok_or_else(|| "the run did not fail".into())
}

fn output_and_exit_code_are_exact(rig: &Rig) -> Result<(), Failed> {
    let odd = OsString::from_vec(b"\xff\xfe\n ".to_vec());
    let (run, stdout, stderr) = recorded(&[OsStr::new("echo"), &odd]);
    let started = Instant::now();
    let exit = rig.run(run)?;
    println!("a trivial command took {:?}", started.elapsed());
    check(exit == NestedExit::Code(42), format!("{exit:?}"))?;
    let mut expected = inner::every_byte();
    expected.extend(b"\xff\xfe\n ");
    expected.extend(std::env::current_dir()?.as_os_str().as_encoded_bytes());
    let (stdout, stderr) = (all(&stdout), all(&stderr));
    check(stdout == expected, format!("stdout: {:?}", String::from_utf8_lossy(&stdout)))?;
    let mut expected = inner::every_byte();
    expected.reverse();
    check(stderr == expected, format!("stderr: {:?}", String::from_utf8_lossy(&stderr)))
}

fn files_go_in_and_come_back(rig: &Rig) -> Result<(), Failed> {
    let dir = tempfile::tempdir()?;
    let path = |name: &str| dir.path().join(name);
    // Larger than a message, not a multiple of anything.
    let text = "a line of the input\n".repeat(50_001);
    std::fs::write(path("in"), &text)?;
    std::fs::write(path("both"), "before")?;
    let names = ["in", "out", "both", "untouched"].map(|name| path(name).into_os_string());
    let mut arguments: Vec<&OsStr> = vec![OsStr::new("files")];
    arguments.extend(names.iter().map(OsString::as_os_str));
    let (mut run, _stdout, stderr) = recorded(&arguments);
    run.inputs = vec![path("in"), path("both"), path("in")];
    run.outputs = ["out", "both", "untouched"].map(path).into();
    let exit = rig.run(run)?;
    check(exit == NestedExit::Code(0), String::from_utf8_lossy(&all(&stderr)))?;
    check(std::fs::read_to_string(path("out"))? == text.to_uppercase(), "the output file differs")?;
    check(std::fs::read_to_string(path("both"))? == "before and after", "the changed file differs")?;
    check(!path("untouched").exists(), "a file was made that the command had not made")?;

    let (mut run, ..) = recorded(&[OsStr::new("files")]);
    run.inputs = vec![path("missing")];
    let error = failure(rig.run(run))?;
    check(matches!(error, NestedError::Input { .. }), format!("{error:?}"))?;
    let (mut run, ..) = recorded(&[OsStr::new("files")]);
    run.outputs = vec![PathBuf::from("/proc/x")];
    let error = failure(rig.run(run))?;
    check(matches!(error, NestedError::Place { .. }), format!("{error:?}"))
}

fn debug_exits_are_real(rig: &Rig) -> Result<(), Failed> {
    answers(rig, "kvm", inner::KVM_ANSWER)
}

fn watchpoints_count_what_the_guest_counts(rig: &Rig) -> Result<(), Failed> {
    answers(rig, "watch", inner::WATCH_ANSWER)
}

fn watching_changes_while_vcpus_run(rig: &Rig) -> Result<(), Failed> {
    answers(rig, "pause", inner::PAUSE_ANSWER)
}

fn a_stock_kernel_goes_on_from_a_snapshot(rig: &Rig) -> Result<(), Failed> {
    let cache = Cache::from_env()?;
    let kernel = nested::debian::stock_kernel(&cache, &*nested::stderr_progress())?.vmlinuz();
    let (mut run, stdout, stderr) = recorded(&[OsStr::new("snapshot"), kernel.as_os_str()]);
    run.inputs = vec![kernel];
    // The guest's memory, the snapshot's, and that of the machine restored from it.
    run.guest_memory = 768 << 20;
    answer(rig.run(run)?, inner::SNAPSHOT_ANSWER, &stdout, &stderr)
}

/// Checks that a command writes what is expected; what it writes to stderr is shown.
fn answers(rig: &Rig, command: &str, expected: &str) -> Result<(), Failed> {
    let (run, stdout, stderr) = recorded(&[OsStr::new(command)]);
    answer(rig.run(run)?, expected, &stdout, &stderr)
}

fn answer(
    exit: NestedExit,
    expected: &str,
    stdout: &Receiver<Arrival>,
    stderr: &Receiver<Arrival>,
) -> Result<(), Failed> {
    let (stdout, stderr) = (all(stdout), String::from_utf8_lossy(&all(stderr)).into_owned());
    print!("{stderr}");
    check(
        exit == NestedExit::Code(0) && stdout == expected.as_bytes(),
        format!("{exit:?}\n{}\n{stderr}", String::from_utf8_lossy(&stdout)),
    )
}

fn lines_arrive_as_they_are_written(rig: &Rig) -> Result<(), Failed> {
    let (run, stdout, _stderr) = recorded(&[OsStr::new("slowly")]);
    rig.run(run)?;
    let arrivals: Vec<Instant> = stdout.try_iter().map(|(when, _)| when).collect();
    check(arrivals.len() == inner::LINES, format!("{} arrivals", arrivals.len()))?;
    let gaps: Vec<Duration> = arrivals.windows(2).map(|pair| pair[1] - pair[0]).collect();
    println!("gaps between lines written {:?} apart: {gaps:?}", inner::LINE_GAP);
    // Lines that waited for each other would arrive together.
    check(gaps.iter().all(|gap| *gap > inner::LINE_GAP / 2), format!("{gaps:?}"))
}

fn much_output_to_a_slow_reader_is_complete(rig: &Rig) -> Result<(), Failed> {
    /// Takes its time at first, so that everything in between fills up.
    struct Slow(Sender<(u64, u64)>, u64, u64);
    impl Write for Slow {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            if self.1 == 0 {
                std::thread::sleep(Duration::from_secs(2));
            }
            self.1 += data.len() as u64;
            self.2 = inner::checksum(self.2, data);
            self.0.send((self.1, self.2)).map_err(io::Error::other)?;
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let (mut run, _stdout, stderr) = recorded(&[OsStr::new("flood")]);
    let (sender, received) = mpsc::channel();
    run.stdout = Box::new(Slow(sender, 0, 0));
    let exit = rig.run(run)?;
    check(exit == NestedExit::Code(0), format!("{exit:?}"))?;
    let last = received.try_iter().last();
    let expected = inner::flood_facts();
    check(last == Some(expected), format!("{last:?} is not {expected:?}"))?;
    println!("{}", String::from_utf8_lossy(&all(&stderr)));
    Ok(())
}

fn a_lost_reader_is_the_commands_matter(rig: &Rig) -> Result<(), Failed> {
    let (mut run, stdout, stderr) = recorded(&[OsStr::new("until-broken")]);
    drop(stdout);
    run.boot_timeout = Duration::from_secs(300);
    let exit = rig.run(run)?;
    let stderr = all(&stderr);
    check(
        exit == NestedExit::Code(7) && stderr == b"broken pipe",
        format!("{exit:?} {}", String::from_utf8_lossy(&stderr)),
    )
}

/// This program in the outer role, and the lines of its standard output.
fn start_outer(name: &str, stop_timeout: Option<u64>) -> io::Result<(Child, BufReader<impl Read + use<>>)> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["--outer", name])
        .envs(stop_timeout.map(|seconds| (STOP_TIMEOUT, seconds.to_string())))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    Ok((child, BufReader::new(stdout)))
}

fn wait_for_line(stdout: &mut impl BufRead, expected: &str) -> Result<(), Failed> {
    let mut line = String::new();
    stdout.read_line(&mut line)?;
    check(line.trim_end() == expected, format!("{line:?} is not {expected:?}"))
}

fn pid(child: &Child) -> Result<Pid, Failed> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or_else(|| "no process id".into())
}

/// The emulators that `parent` has started.
fn emulators(parent: &Child) -> Result<Vec<PathBuf>, Failed> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let dir = entry?.path();
        let Ok(stat) = std::fs::read_to_string(dir.join("stat")) else { continue };
        // pid (name) state ppid ...; the name may hold anything.
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        if rest.split_whitespace().nth(1) == Some(&parent.id().to_string()) {
            found.push(dir);
        }
    }
    check(!found.is_empty(), "the emulator does not run")?;
    Ok(found)
}

fn gone(processes: &[PathBuf]) -> Result<(), Failed> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while processes.iter().any(|process| process.join("exe").read_link().is_ok()) {
        check(Instant::now() < deadline, format!("still running: {processes:?}"))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn an_interrupt_reaches_the_command(_: &Rig) -> Result<(), Failed> {
    for (signal, name) in [(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM")] {
        let (mut child, mut stdout) = start_outer("wait", None)?;
        wait_for_line(&mut stdout, "waiting")?;
        rustix::process::kill_process(pid(&child)?, signal)?;
        wait_for_line(&mut stdout, &format!("ended by {name}"))?;
        let status = child.wait()?;
        check(status.code() == Some(130), format!("{status:?}"))?;
    }
    Ok(())
}

fn a_second_interrupt_ends_the_machine(_: &Rig) -> Result<(), Failed> {
    let (mut child, mut stdout) = start_outer("stubborn", None)?;
    wait_for_line(&mut stdout, "waiting")?;
    let emulators = emulators(&child)?;
    rustix::process::kill_process(pid(&child)?, Signal::INT)?;
    wait_for_line(&mut stdout, "not yet")?;
    rustix::process::kill_process(pid(&child)?, Signal::INT)?;
    let status = child.wait()?;
    check(status.code() == Some(99), format!("{status:?}"))?;
    let mut stderr = String::new();
    child.stderr.take().ok_or("no stderr")?.read_to_string(&mut stderr)?;
    check(stderr.contains("Interrupted"), stderr)?;
    gone(&emulators)
}

fn a_command_that_does_not_end_when_told_ends_with_the_machine(_: &Rig) -> Result<(), Failed> {
    let (mut child, mut stdout) = start_outer("stubborn", Some(1))?;
    wait_for_line(&mut stdout, "waiting")?;
    let emulators = emulators(&child)?;
    rustix::process::kill_process(pid(&child)?, Signal::INT)?;
    let status = child.wait()?;
    check(status.code() == Some(99), format!("{status:?}"))?;
    let mut stderr = String::new();
    child.stderr.take().ok_or("no stderr")?.read_to_string(&mut stderr)?;
    check(stderr.contains("did not end within 1 s of a signal"), stderr)?;
    gone(&emulators)
}

fn the_machine_dies_with_vmprobe(_: &Rig) -> Result<(), Failed> {
    let (mut child, mut stdout) = start_outer("stubborn", None)?;
    wait_for_line(&mut stdout, "waiting")?;
    let emulators = emulators(&child)?;
    child.kill()?;
    child.wait()?;
    gone(&emulators)
}

fn a_machine_that_does_not_start_is_reported(rig: &Rig) -> Result<(), Failed> {
    let (mut run, ..) = recorded(&[OsStr::new("echo")]);
    run.boot_timeout = Duration::from_millis(300);
    let error = failure(rig.run(run))?;
    check(matches!(error, NestedError::BootTimeout { .. }), format!("{error:?}"))?;
    // More memory than an address space: the emulator itself refuses.
    let (mut run, ..) = recorded(&[OsStr::new("echo")]);
    run.guest_memory = 1 << 60;
    let error = failure(rig.run(run))?;
    check(matches!(error, NestedError::Stopped { .. }), format!("{error:?}"))?;
    println!("{error}");
    // A command that crashes is no failure of the machine.
    let (run, ..) = recorded(&[OsStr::new("crash")]);
    let exit = rig.run(run)?;
    check(exit == NestedExit::Signal(6) && exit.code() == 134, format!("{exit:?}"))
}
