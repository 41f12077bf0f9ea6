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
use std::time::Duration;

use tonic::Status;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_types::StatusExt;

use crate::cli::ServiceArgs;
use crate::contract::is_lost;
use crate::exit::Failure;
use crate::images::chain;

/// How long a service on TCP may take to answer at first.
const CONNECT: Duration = Duration::from_secs(10);
/// How often it is asked whether it is still there, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// Connects to the service and does something with it.
fn with_service<T, F: Future<Output = Result<T, Failure>>>(
    args: &ServiceArgs,
    work: impl FnOnce(Channel) -> F,
) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::Host(format!("The client cannot start: {error}")))?;
    runtime.block_on(async {
        let channel = connect(args).await?;
        work(channel).await
    })
}

async fn connect(args: &ServiceArgs) -> Result<Channel, Failure> {
    let failure = |error: &dyn std::error::Error| {
        Failure::Host(format!(
            "No service answers at {} ({}); start one with 'vmprobe serve', or say where it is with --service",
            args.service.display(),
            chain(error)
        ))
    };
    let endpoint = match args.service.to_str().filter(|place| place.contains("://")) {
        Some(url) => over_tls(url, args)?,
        None => Endpoint::try_from(format!("unix://{}", args.service.display()))
            .map_err(|error| failure(&error))?,
    };
    endpoint.connect().await.map_err(|error| failure(&error))
}

fn over_tls(url: &str, args: &ServiceArgs) -> Result<Endpoint, Failure> {
    let usage = |what: &str| Failure::Usage(format!("--service {url}: {what}"));
    if !url.starts_with("https://") {
        return Err(usage("give the path of a Unix socket, or https://HOST:PORT"));
    }
    let (Some(certificate), Some(key), Some(ca)) = (&args.tls_cert, &args.tls_key, &args.tls_ca) else {
        return Err(usage("it takes --tls-cert, --tls-key and --tls-ca"));
    };
    let read = |option: &str, path: &Path| {
        std::fs::read(path)
            .map_err(|error| Failure::Usage(format!("{option} {}: cannot be read: {error}", path.display())))
    };
    let identity = Identity::from_pem(read("--tls-cert", certificate)?, read("--tls-key", key)?);
    let tls = ClientTlsConfig::new()
        .identity(identity)
        .ca_certificate(Certificate::from_pem(read("--tls-ca", ca)?))
        .timeout(CONNECT);
    let endpoint = Endpoint::try_from(url.to_owned()).map_err(|error| usage(&chain(&error)))?;
    let endpoint = endpoint.tls_config(tls).map_err(|error| {
        usage(&format!("the certificate, its key or the CA cannot be used: {}", chain(&error)))
    })?;
    Ok(endpoint
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1))
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
            Some("GUEST") => Failure::Guest(message),
            Some("TIMEOUT") => Failure::Timeout(message),
            Some(_) => Failure::Usage(message),
            // With TLS 1.3 a client hears only now that its certificate was refused (RFC 8446, 4.4.2.4), and only as an end.
            None if is_lost(&status) => Failure::Host(format!(
                "The service is gone: {message}; over TLS it goes where it does not trust the client's certificate, and its log \
                 says why"
            )),
            None => Failure::Host(format!("{}: {message}", status.code())),
        }
    }
}
