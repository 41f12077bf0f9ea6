//! The same command line inside the emulated AMD-V machine.

use std::ffi::OsString;
use std::path::PathBuf;

use nested::{Cache, NestedError, NestedRun, inner_arguments, prepare, stderr_progress};

use crate::cli::{RunArgs, Serial};
use crate::exit::{Code, Failure};
use crate::images::{self, chain};

/// Runs this process's own command line there; the exit code is the inner command's.
pub fn run(args: &RunArgs) -> Result<Code, Failure> {
    let host = |error: &dyn std::error::Error| Failure::Host(chain(error));
    let cache = Cache::from_env().map_err(|error| host(&error))?;
    let rig = prepare(&cache, stderr_progress().as_ref()).map_err(|error| host(&error))?;
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let image = (args.image != images::DEMO).then(|| PathBuf::from(&args.image));
    let outputs = match &args.serial {
        Serial::File(path) => vec![path.clone()],
        Serial::Stderr | Serial::Stdout | Serial::None => Vec::new(),
    };
    let run = NestedRun {
        inputs: image.into_iter().chain(args.initrd.clone()).collect(),
        outputs,
        guest_memory: args.memory,
        ..NestedRun::new(inner_arguments(&arguments))
    };
    match rig.run(run) {
        Ok(exit) => Ok(Code::Inner(exit.code())),
        Err(NestedError::Interrupted) => Ok(Code::Interrupted),
        Err(error) => Err(host(&error)),
    }
}
