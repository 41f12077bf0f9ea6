//! Who changed what, when, and who was refused: a JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use serde::Serialize;
use tonic::{Code, Status};

use super::calls::Rule;
use super::identity::Identity;
use crate::exit::Failure;

/// The audit log.
pub struct Audit(Option<Mutex<File>>);

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    /// As the access file names it.
    who: String,
    uid: Option<u32>,
    pid: Option<i32>,
    address: Option<SocketAddr>,
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

    /// Writes down what became of a request, if its call is one that is recorded or the client was refused, which is also a
    /// warning in the service's own log. Told of there where the audit log cannot take it.
    pub fn note<T>(
        &self,
        who: &Identity,
        rule: &Rule,
        machine: &str,
        what: &str,
        result: &Result<T, Status>,
    ) {
        let code = result.as_ref().map_or_else(Status::code, |_| Code::Ok);
        let refused = matches!(code, Code::PermissionDenied | Code::Unauthenticated);
        if refused {
            tracing::warn!("{who} was refused {}, machine {machine:?}: {code:?}", rule.call);
        }
        let Some(file) = self.0.as_ref().filter(|_| rule.recorded || refused) else { return };
        let (uid, pid, address) = match who {
            Identity::User { uid, pid } => (Some(*uid), *pid, None),
            Identity::Certificate { address, .. } => (None, None, Some(*address)),
        };
        let line = Line {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            who: who.to_string(),
            uid,
            pid,
            address,
            call: rule.call,
            machine,
            what,
            result: format!("{code:?}"),
        };
        let written = serde_json::to_vec(&line).map_err(std::io::Error::from).and_then(|mut text| {
            text.push(b'\n');
            file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&text)
        });
        if let Err(error) = written {
            tracing::error!(
                "The audit log cannot be written ({error}): {who} {} {machine} {what}",
                rule.call
            );
        }
    }
}
