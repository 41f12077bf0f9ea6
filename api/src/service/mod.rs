//! `vmprobe serve`: machines, probes and events for several clients at once, over gRPC on a Unix socket.
//!
//! The service owns the machines ([`crate::vm::Vm`]), by name. Its calls translate between the contract and them; what may wait
//! for a vCPU runs on tokio's threads for blocking work, and tokio never runs on a vCPU's thread.

mod audit;
mod events;
mod host;
mod machines;
mod probes;
mod registry;
mod socket;
mod status;

use std::path::Path;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;

use crate::cli::ServeArgs;
use crate::contract::events_server::EventsServer;
use crate::contract::host_server::HostServer;
use crate::contract::machines_server::MachinesServer;
use crate::contract::probes_server::ProbesServer;
use crate::contract::{self};
use crate::exit::{Code, Failure};
use crate::images::chain;

use audit::Audit;
use registry::Registry;

/// Serves until SIGTERM or SIGINT; then every machine is stopped, its probes are out, and the socket is gone.
pub fn serve(args: &ServeArgs) -> Result<Code, Failure> {
    let runtime = tokio::runtime::Runtime::new()
        .map_err(|error| Failure::Host(format!("No threads for the service: {error}")))?;
    runtime.block_on(run(&args.socket, args.audit_log.as_deref()))
}

async fn run(path: &Path, audit_log: Option<&Path>) -> Result<Code, Failure> {
    let audit = Audit::open(audit_log)?;
    let registry = Arc::new(Registry::new(audit));
    let socket = socket::Socket::bind(path)?;
    let broken =
        |what: &str, error: &dyn std::error::Error| Failure::Host(format!("{what}: {}", chain(error)));

    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(contract::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let unreflected = |error| broken("The contract cannot be reflected", &error);
    // Many clients ask for the older version alone.
    let (newer, older) = (reflection().build_v1(), reflection().build_v1alpha());
    let (newer, older) = (newer.map_err(unreflected)?, older.map_err(unreflected)?);
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_serving::<MachinesServer<Arc<Registry>>>().await;
    reporter.set_serving::<ProbesServer<Arc<Registry>>>().await;
    reporter.set_serving::<EventsServer<Arc<Registry>>>().await;
    reporter.set_serving::<HostServer<Arc<Registry>>>().await;

    let signal = |kind| signal(kind).map_err(|error| broken("Signals cannot be handled", &error));
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = Arc::clone(&registry);
    let until = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // Streams end with the runs, so that nothing keeps the server.
        tokio::task::spawn_blocking(move || stopping.stop_all()).await.ok();
    };
    eprintln!("vmprobe: serving at {}", path.display());
    Server::builder()
        .layer(InterceptorLayer::new(socket::check_peer))
        .add_service(health)
        .add_service(newer)
        .add_service(older)
        .add_service(MachinesServer::new(Arc::clone(&registry)))
        .add_service(ProbesServer::new(Arc::clone(&registry)))
        .add_service(EventsServer::new(Arc::clone(&registry)))
        .add_service(HostServer::new(Arc::clone(&registry)))
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket.listener()?), until)
        .await
        .map_err(|error| broken("The service failed", &error))?;
    Ok(Code::Done)
}
