//! The directory with the results.

use std::fs::{self, File};
use std::io::{BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use matrix::results::{self, Header};
use matrix::{Axis, Cell, CellResult};
use rustix::fs::{FlockOperation, flock, fstat};

use super::host_failure;
use crate::exit::Failure;

/// The results' file in it.
const RESULTS: &str = "results.jsonl";
/// Below it, a directory for each cell.
pub const CELLS: &str = "cells";

/// Results on disk, held by this process alone.
pub struct Directory {
    path: PathBuf,
    file: File,
    header: Header,
    results: Vec<CellResult>,
}

impl Directory {
    /// Opens the directory, or makes it. Results of the same matrix are gone on with, unless a fresh start is wanted.
    ///
    /// # Errors
    /// Another matrix's results are there, another process uses them, the host says no.
    pub fn open(path: &Path, header: &Header, fresh: bool) -> Result<Self, Failure> {
        fs::create_dir_all(path.join(CELLS)).map_err(|error| host_failure(path, &error))?;
        let results = path.join(RESULTS);
        let failure = |error: &dyn std::error::Error| host_failure(&results, error);
        let options = File::options().create(true).truncate(false).read(true).write(true).clone();
        let mut file = options.open(&results).map_err(|error| failure(&error))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Failure::Usage(format!(
                "{} is in use by another `vmprobe matrix`; name another directory with --results",
                path.display()
            ))
        })?;
        let empty = file.metadata().map_err(|error| failure(&error))?.len() == 0;
        if fresh || empty {
            file.set_len(0)
                .and_then(|()| results::write(&mut file, header))
                .map_err(|error| failure(&error))?;
            return Ok(Self { path: path.to_owned(), file, header: header.clone(), results: Vec::new() });
        }
        let (known, cells, good) = results::read(BufReader::new(&file)).map_err(|error| failure(&error))?;
        if known.matrix != header.matrix {
            return Err(Failure::Usage(format!(
                "The results in {} are of another version of the matrix; --results names another directory, `vmprobe matrix --fresh` starts over",
                path.display()
            )));
        }
        file.set_len(good as u64)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map_err(|error| failure(&error))?;
        Ok(Self { path: path.to_owned(), file, header: known, results: cells })
    }

    /// Where and when they are from.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What is known.
    pub fn results(&self) -> &[CellResult] {
        &self.results
    }

    /// Keeps a result. One of the same cell that is there already no longer counts.
    ///
    /// # Errors
    /// The host says no.
    pub fn add(&mut self, result: CellResult) -> Result<(), Failure> {
        results::write(&mut self.file, &result)
            .map_err(|error| host_failure(&self.path.join(RESULTS), &error))?;
        self.results.retain(|known| known.cell != result.cell);
        self.results.push(result);
        Ok(())
    }

    /// Adds the results of another directory, with what their guests wrote. This directory's own are there already.
    ///
    /// # Errors
    /// They are of another matrix, or cannot be read.
    pub fn merge(&mut self, from: &Path, cells: &[Cell], axes: &[Axis]) -> Result<(), Failure> {
        let path = from.join(RESULTS);
        let file = File::open(&path).map_err(|error| host_failure(&path, &error))?;
        let (ours, theirs) = (fstat(&self.file), fstat(&file));
        if ours.is_ok_and(|ours| {
            theirs.is_ok_and(|theirs| (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino))
        }) {
            return Ok(());
        }
        let (header, results, _) =
            results::read(BufReader::new(file)).map_err(|error| host_failure(&path, &error))?;
        if header.matrix != self.header.matrix {
            return Err(Failure::Usage(format!("The results in {} are of another matrix", from.display())));
        }
        for result in results {
            if let Some(place) = cells.iter().position(|cell| *cell == result.cell) {
                let name = result.cell.file_name(place, axes);
                copy(&from.join(CELLS).join(&name), &self.path.join(CELLS).join(&name))?;
            }
            self.add(result)?;
        }
        Ok(())
    }
}

/// Copies the files of a directory, if it is there.
fn copy(from: &Path, to: &Path) -> Result<(), Failure> {
    let Ok(entries) = fs::read_dir(from) else { return Ok(()) };
    fs::create_dir_all(to).map_err(|error| host_failure(to, &error))?;
    for entry in entries {
        let entry = entry.map_err(|error| host_failure(from, &error))?;
        let target = to.join(entry.file_name());
        fs::copy(entry.path(), &target).map_err(|error| host_failure(&target, &error))?;
    }
    Ok(())
}
