//! Running the tools that prepare the machine, with a log of each.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::Signal;

/// How many lines of a failed step's log are shown.
const TAIL_LINES: usize = 15;

/// A tool that could not be run or failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The program is not there, or not executable.
    #[error("Cannot start {program}; is it installed?")]
    Start {
        /// The program's name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The log could not be written or the output not read.
    #[error("Cannot write the log {}", log.display())]
    Log {
        /// The log file.
        log: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It ran and reported failure.
    #[error("{program} failed ({status}). The end of its log {}:\n{tail}", log.display())]
    Failed {
        /// The program's name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The whole log.
        log: PathBuf,
        /// The log's last lines.
        tail: String,
    },
}

/// Makes the kernel kill the child when the thread that starts it ends, however it ends (prctl(2), PR_SET_PDEATHSIG).
pub(crate) fn die_with_parent(command: &mut Command, signal: Signal) {
    let parent = rustix::process::getpid();
    // SAFETY: the closure runs between fork and exec.
    // - It makes two system calls through rustix, which neither allocates nor takes a lock.
    // - It touches nothing but the two `Copy` values that it has captured.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(signal))?;
            // The parent may have died before the call above.
            if rustix::process::getppid() != Some(parent) {
                return Err(io::Error::from(rustix::io::Errno::SRCH));
            }
            Ok(())
        });
    }
}

/// Runs `command` with its output in `log` and, line by line, handed to `on_line`.
///
/// The log is written anew. The command reads nothing and is killed when vmprobe ends.
pub(crate) fn run_logged(
    mut command: Command,
    log: &Path,
    mut on_line: impl FnMut(&str),
) -> Result<(), StepError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let log_error = |source| StepError::Log { log: log.to_owned(), source };
    let mut file = File::create(log).map_err(log_error)?;
    let (reader, writer) = io::pipe().map_err(log_error)?;
    let stdout = writer.try_clone().map_err(log_error)?;
    command.stdin(Stdio::null()).stdout(stdout).stderr(writer);
    die_with_parent(&mut command, Signal::TERM);
    let mut child =
        command.spawn().map_err(|source| StepError::Start { program: program.clone(), source })?;
    // The command holds the pipe's write ends; without this the reader would never see the end.
    drop(command);

    let mut tail = VecDeque::with_capacity(TAIL_LINES);
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    let mut copied = Ok(());
    while copied.is_ok() {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => break,
            Ok(_) => {}
            Err(error) => copied = Err(error),
        }
        copied = copied.and_then(|()| file.write_all(&line));
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        on_line(&text);
        if tail.len() == TAIL_LINES {
            tail.pop_front();
        }
        tail.push_back(text);
    }
    // Closed before waiting, so that a child whose log could not be written ends too.
    drop(reader);
    let status = child.wait().map_err(|source| StepError::Start { program: program.clone(), source })?;
    copied.map_err(log_error)?;
    if status.success() {
        Ok(())
    } else {
        let tail = Vec::from(tail).join("\n");
        Err(StepError::Failed { program, status, log: log.to_owned(), tail })
    }
}

/// Runs `command` and returns what it prints on stdout. What it prints on stderr is the log of a failure.
pub(crate) fn capture(mut command: Command, log: &Path) -> Result<String, StepError> {
    let program = command.get_program().to_string_lossy().into_owned();
    die_with_parent(&mut command, Signal::TERM);
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| StepError::Start { program: program.clone(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    std::fs::write(log, &output.stderr).map_err(|source| StepError::Log { log: log.to_owned(), source })?;
    let tail = last_lines(&String::from_utf8_lossy(&output.stderr), TAIL_LINES);
    Err(StepError::Failed { program, status: output.status, log: log.to_owned(), tail })
}

/// The last `count` lines of `text`.
pub(crate) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn lines_of_both_streams_reach_the_log_and_the_listener() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut seen = Vec::new();
        run_logged(shell("echo one; echo two >&2; printf three"), &log, |line| seen.push(line.to_owned()))
            .unwrap();
        assert_eq!(seen, ["one", "two", "three"]);
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "one\ntwo\nthree");
    }

    #[test]
    fn a_failure_shows_the_end_of_the_log_and_where_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let error = run_logged(shell("for i in $(seq 40); do echo line$i; done; exit 3"), &log, |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("line39\nline40"), "{error}");
        assert!(!error.contains("line25\n"), "{error}");
        assert!(error.contains(log.to_str().unwrap()), "{error}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = run_logged(Command::new("no-such-tool-here"), &dir.path().join("log"), |_| {})
            .unwrap_err()
            .to_string();
        assert!(error.contains("no-such-tool-here"), "{error}");
    }

    #[test]
    fn captured_output_is_stdout_alone() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        assert_eq!(capture(shell("echo out; echo err >&2"), &log).unwrap(), "out\n");
        let error = capture(shell("echo why >&2; false"), &log).unwrap_err().to_string();
        assert!(error.ends_with("why"), "{error}");
    }
}
