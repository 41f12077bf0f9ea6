//! The same command line inside the emulated AMD-V machine.

mod arguments;

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arguments::Arguments;
use disk::{Access, DiskOptions, Format};
use guest::image::Extras;
use guest::image::pack::{Packed, pack};
use nested::{
    Cache, Clock, MAX_DISKS, NestedDisk, NestedError, NestedRun, disk_path, inner_arguments, prepare,
    stderr_progress,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::NamedTempFile;

use crate::cli::{RunArgs, Serial};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};
use crate::network::NetworkWanted;
use crate::serial;
use crate::terminal::{ENDS_THE_RUN, Keyboard};

/// Runs this process's own command line there; the exit code is the inner command's. `stdin` is what standard input held,
/// where a --probes reads it; the machine has none, so it gets a file. What a disk boots is a file there too.
pub fn run(
    args: &RunArgs,
    attached: &[DiskOptions],
    extras: &Extras,
    stdin: Option<&str>,
    clock: Clock,
) -> Result<Code, Failure> {
    let mut arguments = Arguments::new(arguments());
    let stdin = stdin.map(stdin_file).transpose()?;
    if let Some(file) = &stdin {
        arguments.replace(Some("probes"), |value| (value == "-").then(|| file.path().into()));
    }
    // Until the machine, which has the other end, is gone.
    let mut served = None;
    let mut vsock_end = None;
    if let Some(vsock) = &args.vsock {
        let (ours, theirs) = UnixStream::pair().map_err(|error| Failure::Host(error.to_string()))?;
        served = Some(vsock.serve(ours)?);
        vsock_end = Some(theirs);
        arguments.replace(Some("vsock"), |_| Some(vsock.relayed().into()));
    }
    let far_ends = args.networks.iter().map(NetworkWanted::far_end).collect::<Result<Vec<_>, _>>()?;
    let (networks, passts): (Vec<_>, Vec<_>) = far_ends.into_iter().unzip();
    let mut inner = args.networks.iter().enumerate().map(|(index, network)| network.relayed(index).into());
    arguments.replace(Some("net"), |_| inner.next());
    let disks = disks(attached)?;
    let mut inner_disks = attached.iter().enumerate().map(|(index, options)| inner_disk(index, options));
    // One that is attached without a word of the user's is the first.
    let unnamed: Vec<OsString> = inner_disks
        .by_ref()
        .take(attached.len().saturating_sub(args.guest.disks.len()))
        .flat_map(|disk| ["--disk".into(), disk])
        .collect();
    arguments.replace(Some("disk"), |_| inner_disks.next());
    let mut image = images::is_file(&args.image).then(|| PathBuf::from(&args.image));
    let booted = extras.kernel_file.as_deref().map(|kernel| booted(kernel, extras)).transpose()?;
    if let Some(file) = &booted {
        arguments.replace(None, |_| Some(file.path().into()));
        image = Some(file.path().to_owned());
    }
    let outputs = args.serial.iter().filter_map(|to| match to {
        Serial::File(path) => Some(path.clone()),
        Serial::Stderr | Serial::Stdout | Serial::None | Serial::Tty => None,
    });
    let plain = NestedRun::new(inner_arguments(&arguments.into_words(unnamed)));
    let run = NestedRun {
        inputs: image
            .into_iter()
            .chain(args.guest.initrd.clone())
            .chain(probe_files(args, stdin.as_ref()))
            .collect(),
        outputs: outputs.chain(args.dump.clone()).chain(args.report.clone()).collect(),
        disks,
        vsock: vsock_end,
        networks,
        guest_memory: args.guest.memory,
        clock,
        stop_timeout: plain.stop_timeout.saturating_add(args.grace),
        ..plain
    };
    let code = run_inside(run, serial::has_input(&args.serial));
    drop((served, passts));
    code
}

/// The disks as the emulator gives them to the machine. What is wrong with an image is said here, where the user knows it by its name.
fn disks(options: &[DiskOptions]) -> Result<Vec<NestedDisk>, Failure> {
    let asked = options.len();
    if asked > MAX_DISKS {
        return Err(Failure::Usage(format!("{asked} disks were asked for; there is room for {MAX_DISKS}")));
    }
    let disk = |options: &DiskOptions| {
        // The overlay is the emulator's.
        let access = if options.access == Access::Write { Access::Write } else { Access::ReadOnly };
        let opened = images::open_disk(&DiskOptions { access, ..options.clone() })?;
        Ok(NestedDisk { access: options.access, images: opened.images().to_vec() })
    };
    options.iter().map(disk).collect()
}

/// As the emulated machine has them: formats and overlays end at the emulator.
fn inner_disk(index: usize, options: &DiskOptions) -> OsString {
    let access = if options.access == Access::ReadOnly { Access::ReadOnly } else { Access::Write };
    let disk = DiskOptions { format: Some(Format::Raw), access, ..DiskOptions::new(disk_path(index)) };
    disk.to_string().into()
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

fn probe_files(args: &RunArgs, stdin: Option<&NamedTempFile>) -> Vec<PathBuf> {
    let named = args.probe_files.iter().filter(|path| *path != Path::new("-")).cloned();
    named.chain(stdin.map(|file| file.path().to_owned())).collect()
}
