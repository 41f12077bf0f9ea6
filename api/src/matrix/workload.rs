//! What a cell's guest does: the initial ramdisk that it boots with.

use std::fs;
use std::path::{Path, PathBuf};

use guest::initramfs::{self, Archive, PackError};
use matrix::file::Workload;
use nested::debian::StockKernel;
use nested::{Cache, stderr_progress};

use super::host_failure;
use crate::exit::Failure;
use crate::images::{self, chain};
use crate::prepare;

/// vmprobe's own workload, as the file's `initrd`.
const OWN: &str = "workload";
/// Below the results, the initial ramdisks that were made.
const MADE: &str = "initrd";

/// The initial ramdisks of a matrix, one for each kernel where they differ.
pub struct Initrds<'a> {
    asked: &'a Workload,
    /// Where they go.
    directory: PathBuf,
    /// The archive that is added to each: the file's `files` and `command`.
    added: Vec<u8>,
    made: usize,
}

impl<'a> Initrds<'a> {
    /// Packs what is asked for.
    ///
    /// # Errors
    /// A file cannot be read, a shell not be had.
    pub fn new(asked: &'a Workload, results: &Path) -> Result<Self, Failure> {
        let added = if asked.files.is_some() || asked.command.is_some() { added(asked)? } else { Vec::new() };
        Ok(Self { asked, directory: results.join(MADE), added, made: 0 })
    }

    /// The one for a Linux kernel, if the matrix asks for any.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make(&mut self, kernel: Option<&StockKernel>) -> Result<Option<PathBuf>, Failure> {
        let mut archive = match self.asked.initrd.as_deref() {
            Some(OWN) => prepare::workload(kernel)?,
            Some(file) if self.added.is_empty() => return Ok(Some(file.into())),
            Some(file) => images::read_initrd(Path::new(file))?,
            None if self.added.is_empty() => return Ok(None),
            None => Vec::new(),
        };
        initramfs::append(&mut archive, &self.added);
        self.made += 1;
        let path = self.directory.join(format!("{}.cpio", self.made));
        fs::create_dir_all(&self.directory)
            .and_then(|()| fs::write(&path, archive))
            .map_err(|error| host_failure(&path, &error))?;
        Ok(Some(path))
    }
}

/// An archive with the workload's files and command.
fn added(asked: &Workload) -> Result<Vec<u8>, Failure> {
    let failure = |error: PackError| Failure::Usage(format!("workload: {}", chain(&error)));
    let mut archive = Archive::new(Vec::new());
    // The kernel opens it as init's standard input, output and error (Documentation/admin-guide/devices.txt).
    archive.char_device("dev/console", 0o600, 5, 1).map_err(failure)?;
    if let Some(command) = &asked.command {
        let host = |error: &dyn std::error::Error| Failure::Host(chain(error));
        let cache = Cache::from_env().map_err(|error| host(&error))?;
        let shell = nested::shell(&cache, stderr_progress().as_ref()).map_err(|error| host(&error))?;
        let shell = fs::read(&shell).map_err(|error| host_failure(&shell, &error))?;
        initramfs::add_command(&mut archive, &shell, command).map_err(failure)?;
    }
    if let Some(files) = &asked.files {
        archive.tree(Path::new(files)).map_err(failure)?;
    }
    archive.finish().map_err(failure)
}
