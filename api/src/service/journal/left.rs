//! A journal whose writer is gone.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use prost::Message;

use super::record::{FileError, Kind};
use super::{Cursor, JournalError, METADATA, lock, open, segment_path, segments};
use crate::contract::{ListProbesResponse, Machine, MachineState, Probe};

/// How long a process that was killed may take to be gone.
const PATIENCE: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// What a machine's process has left behind.
#[derive(Debug)]
pub struct Left {
    dir: PathBuf,
    /// As it was last written down.
    machine: Machine,
    pub probes: Vec<Probe>,
    /// The sequence number behind the last event.
    pub next: u64,
}

impl Left {
    /// Takes a machine's journal over. A torn record at its end is cut off; what else is wrong with files is among the machine's
    /// notices.
    ///
    /// # Errors
    /// It is written by somebody else, or cannot be read at all.
    pub fn take_over(dir: &Path, name: &str) -> Result<Self, JournalError> {
        let until = Instant::now() + PATIENCE;
        let _lock = loop {
            match lock(dir) {
                Ok(lock) => break lock,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Err(JournalError::file(dir, error));
                }
                Err(_) if Instant::now() >= until => {
                    return Err(JournalError::Locked(dir.display().to_string()));
                }
                Err(_) => std::thread::sleep(LOOK_AGAIN),
            }
        };
        let mut notices = Vec::new();
        let (mut machine, probes) = metadata(dir, name).unwrap_or_else(|error| {
            notices.push(error.to_string());
            (Machine { name: name.to_owned(), ..Machine::default() }, Vec::new())
        });
        let next = cut(dir, name, &mut notices).map_err(|error| JournalError::file(dir, error))?;
        machine.durable_sequence = Some(next);
        machine.notices.extend(notices);
        Ok(Self { dir: dir.to_owned(), machine, probes, next })
    }

    /// The machine as clients see it: at the end of its run, or failed because of what became of its process.
    pub fn machine(&self, fate: &str) -> Machine {
        let mut machine = self.machine.clone();
        if !matches!(machine.state(), MachineState::Ended | MachineState::Failed) {
            machine.state = MachineState::Failed.into();
            fate.clone_into(&mut machine.end);
        }
        machine
    }

    /// A reader of its events.
    pub fn cursor(&self) -> Cursor {
        Cursor::new(self.dir.clone(), self.machine.name.clone())
    }
}

fn metadata(dir: &Path, name: &str) -> Result<(Machine, Vec<Probe>), JournalError> {
    let path = dir.join(METADATA);
    let mut records = open(&path, name, 0)?;
    let (mut machine, mut probes) = (None, None);
    while let Some((frame, payload)) = records.take().map_err(|error| JournalError::file(&path, error))? {
        match frame.kind {
            Kind::Machine => machine = Machine::decode(payload).ok(),
            Kind::Probes => probes = ListProbesResponse::decode(payload).ok(),
            _ => {}
        }
    }
    let damaged = || JournalError::file(&path, FileError::Damaged);
    Ok((machine.ok_or_else(damaged)?, probes.ok_or_else(damaged)?.probes))
}

/// Cuts off what is torn at the end. Returns the sequence number behind the last event.
fn cut(dir: &Path, name: &str, notices: &mut Vec<String>) -> io::Result<u64> {
    let mut next = None;
    for first in segments(dir)?.into_iter().rev() {
        let path = segment_path(dir, first);
        let mut records = match open(&path, name, first) {
            Ok(records) => records,
            // It had just been begun.
            Err(JournalError::File { error: FileError::Short, .. }) if next.is_none() => {
                fs::remove_file(&path)?;
                continue;
            }
            Err(error) => {
                notices.push(error.to_string());
                next = next.or(Some(first));
                continue;
            }
        };
        if next.is_some() {
            // That of its end is the next one's beginning.
            continue;
        }
        let mut end = first;
        while let Some((frame, _)) = records.take()? {
            end = match frame.kind {
                Kind::Event => frame.sequence.saturating_add(1),
                _ => frame.sequence.max(end),
            };
        }
        next = Some(end);
        let damaged = records.damaged();
        if damaged > 0 {
            notices.push(format!("{}: {damaged} bytes are damaged; their events are lost", path.display()));
        }
        let torn = fs::metadata(&path)?.len().saturating_sub(records.good());
        if torn > 0 {
            OpenOptions::new().write(true).open(&path)?.set_len(records.good())?;
            tracing::info!("{}: {torn} bytes of a torn record were cut off", path.display());
        }
    }
    Ok(next.unwrap_or(0))
}
