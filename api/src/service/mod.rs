//! The service: machines, probes and events for several clients at once, over gRPC on Unix sockets.
//!
//! ```text
//! client ──socket──► front (`vmprobe serve`)          names, identity, audit, supervision
//!                      ├──socket──► worker (`vmprobe worker`)    one machine, its probes, its events ──► journal
//!                      └──socket──► worker ...
//! ```
//!
//! Both speak the contract, so the front hands calls on as they are. A worker outlives a front that is killed, and is found again by
//! the next one; a worker that dies takes nothing with it but its machine. It gives up nearly all rights before it looks at a guest's
//! image ([`worker`]), and is in a cgroup of its own where the host allows that ([`cgroup`]). It may write its machine's events to a
//! journal, which the front reads when the worker is gone.

mod answers;
mod cgroup;
mod encoded;
mod front;
mod journal;
mod socket;
mod status;
mod stream;
mod worker;

pub use front::serve;
pub use journal::Limits;
pub use worker::work;

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio_stream::Stream;
use tonic::Status;

use crate::contract::MachineSpec;
use crate::exit::Failure;
use crate::images::chain;
use crate::snapshot;

fn broken(what: &str, error: &dyn std::error::Error) -> Failure {
    Failure::Host(format!("{what}: {}", chain(error)))
}

/// Guest memory where it is not said, bytes.
const MEMORY_BYTES: u64 = 512 << 20;

/// Guest memory, bytes.
fn memory_bytes(spec: &MachineSpec) -> u64 {
    match spec.memory_bytes {
        0 if spec.snapshot.is_empty() => MEMORY_BYTES,
        // What cannot be read is refused by whoever restores it.
        0 => snapshot::memory_bytes(Path::new(&spec.snapshot)).unwrap_or(MEMORY_BYTES),
        bytes => bytes,
    }
}

/// A server's stream of responses.
type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// How long clients may take to close their connections when the service ends.
const LINGER: Duration = Duration::from_secs(1);

/// Waits for a server that ends in order after `ending`, but only a moment: a client that does not answer keeps no service.
async fn finish(
    server: impl Future<Output = Result<(), tonic::transport::Error>>,
    ending: oneshot::Receiver<()>,
) -> Result<(), Failure> {
    let overdue = async {
        // Without a word of it the server itself has ended.
        if ending.await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(LINGER).await;
    };
    tokio::select! {
        served = server => served.map_err(|error| broken("The service failed", &error)),
        () = overdue => Ok(()),
    }
}

fn runtime() -> Result<Runtime, Failure> {
    Runtime::new().map_err(|error| broken("No threads for the service", &error))
}

/// Comes with SIGTERM or SIGINT.
fn ended_by_signal() -> Result<impl Future<Output = ()>, Failure> {
    let signal = |kind| signal(kind).map_err(|error| broken("Signals cannot be handled", &error));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
