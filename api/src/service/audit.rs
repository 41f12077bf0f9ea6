//! Who changed what, when: a JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::Serialize;
use tonic::{Code, Status};

use super::socket::Peer;
use crate::exit::Failure;

/// The audit log.
pub struct Audit(Option<Mutex<File>>);

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    uid: Option<u32>,
    pid: Option<i32>,
    call: &'a str,
    machine: &'a str,
    what: &'a str,
    /// A gRPC status code.
    result: String,
}

impl Audit {
    /// Appends to a file, or writes nothing.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn open(path: Option<&Path>) -> Result<Self, Failure> {
        let file = path.map(|path| {
            OpenOptions::new().create(true).append(true).open(path).map_err(|error| {
                Failure::Usage(format!("--audit-log {}: cannot be opened: {error}", path.display()))
            })
        });
        Ok(Self(file.transpose()?.map(Mutex::new)))
    }

    /// Writes down a change that was asked for, and what became of it. Told of on stderr where the log cannot take it.
    pub fn write<T>(
        &self,
        peer: Option<Peer>,
        call: &str,
        machine: &str,
        what: &str,
        result: &Result<T, Status>,
    ) {
        let Some(file) = &self.0 else { return };
        let code = result.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let line = Line {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            uid: peer.map(|peer| peer.uid),
            pid: peer.and_then(|peer| peer.pid),
            call,
            machine,
            what,
            result: format!("{code:?}"),
        };
        let written = serde_json::to_vec(&line).map_err(std::io::Error::from).and_then(|mut text| {
            text.push(b'\n');
            file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&text)
        });
        if let Err(error) = written {
            tracing::error!("The audit log cannot be written ({error}): {call} {machine} {what}");
        }
    }
}
