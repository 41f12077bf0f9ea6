//! What goes wrong, as gRPC has it: a code, a message for people, and a reason for programs (google.rpc.ErrorInfo).

use std::path::Path;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::front::{Identity, Role, Rule};
use crate::exit::Failure;
use crate::vm::VmError;

/// The domain of the reasons.
const DOMAIN: &str = "vmprobe.v1";

fn status(code: Code, reason: &str, message: impl Into<String>) -> Status {
    let details = ErrorDetails::with_error_info(reason, DOMAIN, []);
    Status::with_error_details(code, message, details)
}

/// A process of a machine's speaks to nobody but the service.
pub fn not_the_owner() -> Status {
    status(Code::PermissionDenied, "NOT_THE_OWNER", "Only the user that runs the service may use it")
}

/// A client has no role, or a lesser one than a call needs: on a machine, or on any.
pub fn denied(who: &Identity, rule: &Rule, machine: Option<&str>, has: Option<Role>) -> Status {
    let has = has.map_or_else(|| "none".to_owned(), |role| format!("'{role}'"));
    let place = machine.map(|machine| format!(" on machine '{machine}'")).unwrap_or_default();
    let message = format!(
        "{who} may not {}{place}: that needs the role '{}', and it has {has}; whoever runs the service gives roles, with --access",
        rule.call, rule.needs
    );
    status(Code::PermissionDenied, "PERMISSION_DENIED", message)
}

/// A client's certificate has expired since it connected.
pub fn expired() -> Status {
    status(
        Code::Unauthenticated,
        "CERTIFICATE_EXPIRED",
        "The client's certificate has expired; connect with a new one",
    )
}

pub fn no_call() -> Status {
    status(Code::Unimplemented, "NO_SUCH_CALL", "The service has no such call; its contract is docs/api.md")
}

pub fn no_machine(name: &str) -> Status {
    let message = format!("There is no machine '{name}'; list them with 'vmprobe vm ls'");
    status(Code::NotFound, "NO_SUCH_MACHINE", message)
}

pub fn name_taken(name: &str) -> Status {
    let message = format!("There is a machine '{name}' already; choose another name, or delete that one");
    status(Code::AlreadyExists, "NAME_TAKEN", message)
}

pub fn journal_there(name: &str, dir: &Path) -> Status {
    let dir = dir.display();
    let message = format!(
        "There is the journal of another machine '{name}' at {dir}; choose another name, or move that directory away"
    );
    status(Code::AlreadyExists, "JOURNAL_THERE", message)
}

pub fn invalid(message: impl Into<String>) -> Status {
    status(Code::InvalidArgument, "INVALID_ARGUMENT", message)
}

pub fn key_reused() -> Status {
    let message = "The idempotency key was used for a different request; use a new one";
    status(Code::InvalidArgument, "KEY_REUSED", message)
}

pub fn beyond(from: u64, next: u64) -> Status {
    let message =
        format!("from_sequence is {from}, and the next event is {next}; leave it out to begin there");
    status(Code::OutOfRange, "BEYOND_THE_NEXT_EVENT", message)
}

pub fn process_gone(name: &str, why: &str, journal: bool) -> Status {
    let read = if journal {
        format!("read its events with 'vmprobe events {name} --from 0', or ")
    } else {
        String::new()
    };
    let message = format!("Machine '{name}' is gone: {why}; {read}delete it with 'vmprobe vm rm {name}'");
    status(Code::FailedPrecondition, "PROCESS_GONE", message)
}

/// A bug: work of ours has panicked.
pub fn internal() -> Status {
    status(Code::Internal, "PANICKED", "The service failed at this request; this is a bug, please report it")
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let (code, reason) = match failure {
            Failure::Usage(_) => (Code::InvalidArgument, "INVALID_ARGUMENT"),
            Failure::Image(_) => (Code::InvalidArgument, "IMAGE"),
            Failure::Probe(_) => (Code::InvalidArgument, "PROBE_REFUSED"),
            Failure::Host(_) => (Code::FailedPrecondition, "HOST"),
            Failure::Guest(_) => (Code::FailedPrecondition, "GUEST"),
            Failure::Timeout(_) => (Code::DeadlineExceeded, "TIMEOUT"),
            Failure::OutputClosed => (Code::Internal, "INTERNAL"),
        };
        status(code, reason, failure.to_string())
    }
}

impl From<VmError> for Status {
    fn from(error: VmError) -> Self {
        let message = error.to_string();
        match error {
            VmError::State(..) => status(Code::FailedPrecondition, "STATE", message),
            VmError::ConsoleFull => status(Code::ResourceExhausted, "CONSOLE_FULL", message),
            VmError::Ending => status(Code::FailedPrecondition, "STATE", message),
            VmError::StatesLost => status(Code::FailedPrecondition, "REGISTERS_LOST", message),
            VmError::NoVcpu(..) => status(Code::NotFound, "NO_SUCH_VCPU", message),
            VmError::Registers(_) => status(Code::InvalidArgument, "REGISTERS_REFUSED", message),
            VmError::NotMapped(..) | VmError::NotRam(_) => {
                status(Code::FailedPrecondition, "NO_MEMORY", message)
            }
            VmError::Translate(_) => status(Code::FailedPrecondition, "NOT_TRANSLATED", message),
            VmError::NoProbe(_) => status(Code::NotFound, "NO_SUCH_PROBE", message),
            VmError::Removed(_) => status(Code::FailedPrecondition, "PROBE_REMOVED", message),
            VmError::Module(_) => status(Code::Unimplemented, "MODULE_PROBE", message),
            VmError::Refused(failure) => failure.into(),
        }
    }
}
