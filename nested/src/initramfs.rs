//! The machine's file system: vmprobe itself, the kernel modules, the user's files and the request.
//!
//! Not compressed: unpacking would cost more time in the emulated machine than reading.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use guest::initramfs::{Archive, PackError};

use crate::debian::StockKernel;
use crate::executable::{self, Executable};
use crate::request::{self, Request};
use crate::run::{NestedError, NestedRun};

/// All our files may be read and run.
const MODE: u32 = 0o755;

/// Why a file of the host is not in the archive.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("The file cannot be read")]
    Read(#[from] io::Error),
    #[error(transparent)]
    Pack(#[from] PackError),
}

/// Writes the file system that `run` needs, seen from the working directory `directory`, to `file`. Returns its size in bytes.
pub(crate) fn write(
    file: &File,
    run: &NestedRun,
    kernel: &StockKernel,
    directory: &Path,
    outputs: &[PathBuf],
) -> Result<u64, NestedError> {
    let other = |source: CopyError| NestedError::Initramfs { source: Box::new(source) };
    let mut archive = Archive::new(BufWriter::new(file));
    program(&mut archive).map_err(other)?;
    let modules = modules(&mut archive, kernel).map_err(other)?;
    let inputs = inputs(&mut archive, run, directory)?;
    let request = Request {
        modules,
        name: run.name.clone(),
        arguments: run.arguments.clone(),
        environment: std::env::vars_os().filter(|(name, _)| request::is_passed(name)).collect(),
        directory: directory.as_os_str().to_owned(),
        inputs,
        outputs: outputs.iter().map(|path| path.clone().into_os_string()).collect(),
        stdin: run.stdin.is_some(),
    };
    let end = |archive: &mut Archive<_>| {
        let request = serde_json::to_vec(&request).map_err(io::Error::from)?;
        Ok(archive.file(request::REQUEST, MODE, &request)?)
    };
    end(&mut archive).map_err(other)?;
    archive.finish().map_err(|error| other(error.into()))?;
    Ok(file.metadata().map_err(|error| other(error.into()))?.len())
}

/// The running program with what it is linked with, mount points, and the console that the kernel opens for process 1
/// (Linux: Documentation/admin-guide/devices.txt).
fn program(archive: &mut Archive<impl Write>) -> Result<(), CopyError> {
    for dir in ["dev", "proc", "sys", "tmp"] {
        archive.directory(dir, MODE)?;
    }
    archive.char_device("dev/console", 0o600, 5, 1)?;
    copy(archive, request::PROGRAM, Path::new(executable::SELF))?;
    let executable = Executable::running()?;
    if let Some(loader) = &executable.loader {
        copy(archive, &loader.to_string_lossy(), loader)?;
    }
    for (name, path) in &executable.libraries {
        let place = format!("{}/{}", request::LIBRARIES, name.to_string_lossy());
        copy(archive, &place, path)?;
    }
    Ok(())
}

/// The kernel modules. Returns their paths in the machine, in the order in which to load them.
fn modules(archive: &mut Archive<impl Write>, kernel: &StockKernel) -> Result<Vec<String>, CopyError> {
    let mut places = Vec::new();
    for module in kernel.modules()? {
        let name = module.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let place = format!("{}/modules/{name}", request::HOME);
        copy(archive, &place, &module)?;
        places.push(place);
    }
    Ok(places)
}

/// The user's files. Returns where the command looks for each.
fn inputs(
    archive: &mut Archive<impl Write>,
    run: &NestedRun,
    directory: &Path,
) -> Result<Vec<OsString>, NestedError> {
    let mut places: Vec<OsString> = Vec::new();
    for path in &run.inputs {
        let place = request::usable_place(directory, path)
            .ok_or_else(|| NestedError::Place { path: path.clone() })?
            .into_os_string();
        if !places.contains(&place) {
            copy(archive, &request::input_path(places.len()), path)
                .map_err(|source| NestedError::Input { path: path.clone(), source: Box::new(source) })?;
            places.push(place);
        }
    }
    Ok(places)
}

/// Adds a copy of the host's file `from`.
fn copy(archive: &mut Archive<impl Write>, place: &str, from: &Path) -> Result<(), CopyError> {
    let mut file = File::open(from)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory).into());
    }
    if metadata.is_file() {
        return Ok(archive.file_from(place, MODE, metadata.len(), file)?);
    }
    // A pipe has no size before it is read.
    let mut contents = Vec::new();
    file.read_to_end(&mut contents)?;
    Ok(archive.file(place, MODE, &contents)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_read_to_its_end_and_a_directory_refused() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let mut archive = Archive::new(Vec::new());
        std::thread::scope(|scope| {
            scope.spawn(|| std::fs::write(&pipe, b"through a pipe").unwrap());
            copy(&mut archive, "x", &pipe).unwrap();
        });
        let error = copy(&mut archive, "y", dir.path()).unwrap_err();
        assert!(matches!(error, CopyError::Read(_)), "{error:?}");
        let bytes = archive.finish().unwrap();
        let reader = cpio::newc::Reader::new(&bytes[..]).unwrap();
        assert_eq!((reader.entry().name(), reader.entry().file_size()), ("x", 14));
        let mut contents = Vec::new();
        reader.to_writer(&mut contents).unwrap();
        assert_eq!(contents, b"through a pipe");
    }
}
