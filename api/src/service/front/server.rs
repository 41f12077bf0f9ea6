//! HTTP/2 on the connections of clients.
//!
//! hyper's own builder, for tonic's server does not let the bytes be bounded that are under way to a client.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::codegen::http::Request;
use tonic::service::Routes;

use super::connections::Connection;
use super::gate::Gate;

/// Requests and streams of a connection at once. More wait in the client.
const MAX_STREAMS: u32 = 256;
/// Bytes of a stream that wait for a client that takes nothing from its connection.
const SEND_BUFFER: usize = 64 << 10;
/// How often a client is asked whether it is still there, and how long it may take to answer, before it is let go.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Serves the connections that come until `until`, and then those that are there, to the end of what is under way on them.
pub async fn serve(
    mut incoming: mpsc::Receiver<Connection>,
    gate: Gate,
    routes: Routes,
    until: impl Future<Output = ()>,
) {
    let mut http = http2::Builder::new(TokioExecutor::new());
    http.timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_send_buf_size(SEND_BUFFER)
        .keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1);
    let (routes, open) = (TowerToHyperService::new(routes), GracefulShutdown::new());
    let mut until = pin!(until);
    loop {
        let connection = tokio::select! {
            Some(connection) = incoming.recv() => connection,
            () = &mut until => break,
        };
        let (who, gate, routes) = (connection.who(), gate.clone(), routes.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let admitted = gate.admit(Arc::clone(&who), request.map(Body::new));
            let answer = admitted.map(|request| routes.call(request));
            async move {
                match answer {
                    Ok(answer) => answer.await,
                    Err(refused) => Ok(refused.into_http()),
                }
            }
        });
        let served = open.watch(http.serve_connection(TokioIo::new(connection), service));
        tokio::spawn(async move {
            if let Err(error) = served.await {
                tracing::debug!("A connection was broken off: {error}");
            }
        });
    }
    // Whoever connects from now on is told at once that nobody listens.
    drop(incoming);
    open.shutdown().await;
}
