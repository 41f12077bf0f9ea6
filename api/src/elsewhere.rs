//! The same command line inside the emulated AMD-V machine.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::CommandFactory;
use guest::image::Extras;
use guest::image::pack::{Packed, pack};
use nested::{Cache, Clock, NestedError, NestedRun, inner_arguments, prepare, stderr_progress};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::NamedTempFile;

use crate::cli::{Cli, RunArgs, Serial};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::serial;
use crate::terminal::{ENDS_THE_RUN, Keyboard};

/// Runs this process's own command line there; the exit code is the inner command's. `stdin` is what standard input held,
/// where a --probes reads it; the machine has none, so it gets a file. What a disk boots is a file there too.
pub fn run(args: &RunArgs, extras: &Extras, stdin: Option<&str>, clock: Clock) -> Result<Code, Failure> {
    let mut arguments = arguments();
    let stdin = stdin.map(stdin_file).transpose()?;
    if let Some(file) = &stdin {
        read_from(&mut arguments, file.path());
    }
    let mut image = images::is_file(&args.image).then(|| PathBuf::from(&args.image));
    let booted = extras.kernel_file.as_deref().map(|kernel| booted(kernel, extras)).transpose()?;
    if let Some(file) = &booted {
        if let Some(at) = image_at(&arguments) {
            arguments[at] = file.path().into();
        }
        image = Some(file.path().to_owned());
    }
    let outputs = args.serial.iter().filter_map(|to| match to {
        Serial::File(path) => Some(path.clone()),
        Serial::Stderr | Serial::Stdout | Serial::None | Serial::Tty => None,
    });
    let plain = NestedRun::new(inner_arguments(&arguments));
    let run = NestedRun {
        inputs: image
            .into_iter()
            .chain(args.guest.initrd.clone())
            .chain(probe_files(args, stdin.as_ref()))
            .collect(),
        outputs: outputs.chain(args.dump.clone()).chain(args.report.clone()).collect(),
        guest_memory: args.guest.memory,
        clock,
        stop_timeout: plain.stop_timeout.saturating_add(args.grace),
        ..plain
    };
    run_inside(run, serial::has_input(&args.serial))
}

/// The same for `vmprobe bench`, which needs no file.
pub fn bench(clock: Clock) -> Result<Code, Failure> {
    run_inside(NestedRun { clock, ..NestedRun::new(inner_arguments(&arguments())) }, false)
}

/// This process's own, behind its name.
fn arguments() -> Vec<OsString> {
    std::env::args_os().skip(1).collect()
}

/// `has_input` is for a command that reads standard input as it comes.
fn run_inside(mut run: NestedRun, has_input: bool) -> Result<Code, Failure> {
    let host = |error: &dyn std::error::Error| Failure::Host(chain(error));
    let cache = Cache::from_env().map_err(|error| host(&error))?;
    let rig = prepare(&cache, stderr_progress().as_ref()).map_err(|error| host(&error))?;
    let _keyboard = if has_input {
        // Until the run takes signals, one that would end the process without the terminal's modes does nothing.
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::default()).map_err(|error| host(&error))?;
        }
        let (keys, stdin) = UnixStream::pair().map_err(|error| host(&error))?;
        run.stdin = Some(stdin);
        // QEMU reads nothing more of a socket whose other side is closed, so it stays open behind the end of the input.
        let open = keys.try_clone().map_err(|error| host(&error))?;
        Some((Keyboard::attach(keys, ENDS_THE_RUN)?, open))
    } else {
        None
    };
    match rig.run(run) {
        Ok(exit) => Ok(Code::Inner(exit.code())),
        Err(NestedError::Interrupted) => Ok(Code::Interrupted),
        Err(error) => Err(host(&error)),
    }
}

fn stdin_file(text: &str) -> Result<NamedTempFile, Failure> {
    NamedTempFile::with_prefix("vmprobe-probes-")
        .and_then(|mut file| file.write_all(text.as_bytes()).map(|()| file))
        .map_err(|error| {
            Failure::Host(format!("A temporary file for the probes cannot be written: {error}; set TMPDIR"))
        })
}

/// What a disk boots, in one file.
fn booted(kernel: &[u8], extras: &Extras) -> Result<NamedTempFile, Failure> {
    let packed = pack(&Packed {
        kernel,
        initrd: extras.initrd.as_deref(),
        cmdline: extras.cmdline.as_deref(),
        os_release: None,
        stub: None,
    });
    let packed = packed.map_err(|error| Failure::Image(chain(&error)))?;
    NamedTempFile::with_prefix("vmprobe-image-")
        .and_then(|mut file| file.write_all(&packed).map(|()| file))
        .map_err(|error| {
            Failure::Host(format!("A temporary file for the kernel cannot be written: {error}; set TMPDIR"))
        })
}

/// Where IMAGE stands among the arguments of `vmprobe run`: it is the one that belongs to no option.
fn image_at(arguments: &[OsString]) -> Option<usize> {
    let command = Cli::command();
    let run = command.find_subcommand("run")?;
    let takes_value = |name: &str| {
        run.get_arguments().any(|one| one.get_long() == Some(name) && one.get_action().takes_values())
    };
    let mut at = 1;
    while let Some(argument) = arguments.get(at) {
        match argument.to_string_lossy().as_ref() {
            "--" => return Some(at + 1).filter(|at| *at < arguments.len()),
            option if option.starts_with("--") => at += if takes_value(&option[2..]) { 2 } else { 1 },
            option if option.starts_with('-') => at += 1,
            _ => return Some(at),
        }
    }
    None
}

fn probe_files(args: &RunArgs, stdin: Option<&NamedTempFile>) -> Vec<PathBuf> {
    let named = args.probe_files.iter().filter(|path| *path != Path::new("-")).cloned();
    named.chain(stdin.map(|file| file.path().to_owned())).collect()
}

/// Puts `file` in the place of standard input where --probes names it.
fn read_from(arguments: &mut [OsString], file: &Path) {
    let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    for at in 0..end {
        if arguments[at] == "--probes=-" {
            let mut option = OsString::from("--probes=");
            option.push(file);
            arguments[at] = option;
        } else if arguments[at] == "-" && at > 0 && arguments[at - 1] == "--probes" {
            arguments[at] = file.into();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_found_among_the_options() {
        let at = |arguments: &[&str]| image_at(&arguments.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(at(&["run", "disk.img"]), Some(1));
        assert_eq!(at(&["run", "--serial", "disk.img", "--verbose", "-v", "disk.img"]), Some(5));
        assert_eq!(at(&["run", "--serial=disk.img", "--count", "disk.img", "--probe", "x"]), Some(3));
        assert_eq!(at(&["run", "--cmdline", "--x", "--", "disk.img"]), Some(4));
        assert_eq!(at(&["run", "--probe"]), None);
    }

    #[test]
    fn standard_input_becomes_a_file_wherever_probes_names_it() {
        let mut arguments: Vec<OsString> =
            ["run", "-", "--probes", "-", "--probes=-", "--probes", "f", "--", "--probes=-"]
                .map(OsString::from)
                .into();
        read_from(&mut arguments, Path::new("/tmp/x"));
        assert_eq!(
            arguments,
            ["run", "-", "--probes", "/tmp/x", "--probes=/tmp/x", "--probes", "f", "--", "--probes=-"]
        );
    }
}
