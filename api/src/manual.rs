//! `vmprobe completions` and `vmprobe man`: what the command line says of itself, for shells and for man.

use std::io;
use std::path::Path;

use clap::CommandFactory;

use crate::cli::Cli;
use crate::exit::{Code, Failure};
use crate::output::closed;

/// Prints a shell's completions.
pub fn completions(shell: clap_complete::Shell) -> Result<Code, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "vmprobe", &mut text);
    io::Write::write_all(&mut io::stdout().lock(), &text).map_err(|error| closed(&error))?;
    Ok(Code::Done)
}

/// Writes `vmprobe.1` and a page for each command.
pub fn pages(directory: &Path) -> Result<Code, Failure> {
    let written =
        std::fs::create_dir_all(directory).and_then(|()| clap_mangen::generate_to(Cli::command(), directory));
    written
        .map_err(|error| Failure::Usage(format!("{}: cannot be written: {error}", directory.display())))?;
    Ok(Code::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page_and_the_commands_are_consistent() {
        Cli::command().debug_assert();
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(pages(directory.path()).unwrap(), Code::Done);
        for page in ["vmprobe.1", "vmprobe-run.1", "vmprobe-vm-create.1", "vmprobe-events.1"] {
            assert!(directory.path().join(page).exists(), "{page}");
        }
        assert!(!directory.path().join("vmprobe-worker.1").exists(), "it is the service's own");
    }
}
