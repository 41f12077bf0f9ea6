//! The service's client: `vmprobe vm`, `probe`, `guest`, `events` and `console`.

mod events;
mod guest;
mod probes;
mod vms;

pub use events::{console, events};
pub use guest::guest;
pub use probes::probe;
pub use vms::vm;

use std::future::Future;
use std::path::Path;

use tonic::Status;
use tonic::transport::{Channel, Endpoint};
use tonic_types::StatusExt;

use crate::contract::is_lost;
use crate::exit::Failure;
use crate::images::chain;

/// Connects to the service and does something with it.
fn with_service<T, F: Future<Output = Result<T, Failure>>>(
    socket: &Path,
    work: impl FnOnce(Channel) -> F,
) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::Host(format!("The client cannot start: {error}")))?;
    runtime.block_on(async {
        let channel = connect(socket).await?;
        work(channel).await
    })
}

async fn connect(socket: &Path) -> Result<Channel, Failure> {
    let failure = |error: &dyn std::error::Error| {
        Failure::Host(format!(
            "No service answers at {} ({}); start one with 'vmprobe serve', or say where it is with --socket",
            socket.display(),
            chain(error)
        ))
    };
    let endpoint =
        Endpoint::try_from(format!("unix://{}", socket.display())).map_err(|error| failure(&error))?;
    endpoint.connect().await.map_err(|error| failure(&error))
}

/// What the service refused, as the command that asks itself would have put it.
impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        let message = status.message().to_owned();
        let details = status.get_error_details();
        match details.error_info().map(|info| info.reason.as_str()) {
            Some("PROBE_REFUSED") => Failure::Probe(message),
            Some("IMAGE") => Failure::Image(message),
            Some("HOST") => Failure::Host(message),
            Some(_) => Failure::Usage(message),
            None if is_lost(&status) => Failure::Host(format!("The service is gone: {message}")),
            None => Failure::Host(format!("{}: {message}", status.code())),
        }
    }
}
