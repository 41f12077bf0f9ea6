//! Runs of a stock kernel in the emulated machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{assert_code, nested, output, stdout};

/// One emulated machine at a time: each keeps two cores busy.
static MACHINE: Mutex<()> = Mutex::new(());

/// A stock Debian kernel and the workload, for the emulated machine.
pub struct Debian {
    pub kernel: String,
    pub initrd: String,
    console: tempfile::NamedTempFile,
    _machine: MutexGuard<'static, ()>,
}

impl Debian {
    /// The stock kernel and the workload, or None where this rung cannot run.
    #[track_caller]
    pub fn new() -> Option<Self> {
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        if !nested() {
            return None;
        }
        let prepared = |what: &str| {
            let path = output(&["prepare", what]);
            assert_code(&path, 0);
            stdout(&path).trim().to_owned()
        };
        let console = tempfile::NamedTempFile::new().expect("a temporary file");
        Some(Self { kernel: prepared("kernel"), initrd: prepared("initrd"), console, _machine: machine })
    }

    /// `vmprobe run` of the kernel and the workload with further arguments; the console goes to a file. In the emulated machine,
    /// and for no longer than 5 minutes, unless the arguments say otherwise.
    pub fn run(&self, arguments: &[&str]) -> Output {
        let console = path(self.console.path());
        let mut all = vec!["run", &self.kernel, "--initrd", &self.initrd, "--serial", &console];
        all.extend(arguments);
        for [option, value] in [["--accel", "nested"], ["--timeout", "5m"]] {
            if !arguments.contains(&option) {
                all.extend([option, value]);
            }
        }
        output(&all)
    }

    /// The same with the console on standard error, which is a pipe, while it runs.
    pub fn start(&self, arguments: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_vmprobe"))
            .args(["run", &self.kernel, "--initrd", &self.initrd, "--accel", "nested", "--timeout", "5m"])
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmprobe starts")
    }

    /// What the guest has written to its console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.console.path()).expect("the console was written")).into_owned()
    }
}

/// A path as an argument.
pub fn path(path: &Path) -> String {
    PathBuf::from(path).to_str().expect("temporary files have plain names").to_owned()
}
