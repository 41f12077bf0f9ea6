//! What clients speak to: hands each call on to the process of the machine that it is for.

mod events;
mod guest;
mod host;
mod machines;
mod members;
mod metrics;
mod probes;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::oneshot;
use tokio_stream::StreamExt;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;
use tonic::{Response, Status, Streaming};

use super::answers::Answers;
use super::audit::Audit;
use super::cgroup::Cgroups;
use super::{Responses, broken, ended_by_signal, finish, runtime, socket, status};
use crate::cli::ServeArgs;
use crate::contract::events_server::EventsServer;
use crate::contract::guest_server::GuestServer;
use crate::contract::host_server::HostServer;
use crate::contract::machines_server::MachinesServer;
use crate::contract::probes_server::ProbesServer;
use crate::contract::{self, Machine};
use crate::exit::{Code, Failure};

use members::Member;

/// How long the processes of the machines may take to end with the service.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the service knows.
struct Front {
    /// Where the sockets of the machines' processes are.
    dir: PathBuf,
    cgroups: Option<Cgroups>,
    members: Mutex<BTreeMap<String, Arc<Member>>>,
    answers: Answers<Machine>,
    naming: tokio::sync::Mutex<()>,
    audit: Audit,
}

impl Front {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Member>>> {
        // What it guards is changed at once.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// NOT_FOUND.
    fn get(&self, name: &str) -> Result<Arc<Member>, Status> {
        self.lock().get(name).cloned().ok_or_else(|| status::no_machine(name))
    }

    fn all(&self) -> Vec<Arc<Member>> {
        self.lock().values().cloned().collect()
    }

    /// Forgets a machine, if it is still this one.
    fn forget(&self, member: &Arc<Member>) {
        let mut members = self.lock();
        if members.get(&member.name).is_some_and(|known| Arc::ptr_eq(known, member)) {
            members.remove(&member.name);
        }
    }
}

/// Serves until SIGTERM or SIGINT. Then every machine is stopped, unless they are to be left running, and the socket is gone.
pub fn serve(args: &ServeArgs) -> Result<Code, Failure> {
    // Before there are other threads, which inherit it.
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| broken("Privileges cannot be given up", &error))?;
    runtime()?.block_on(run(&args.socket, args))
}

async fn run(path: &Path, args: &ServeArgs) -> Result<Code, Failure> {
    let audit = Audit::open(args.audit_log.as_deref())?;
    let socket = socket::Socket::bind(path)?;
    let dir = members::directory(path)?;
    let (cgroups, without) = match Cgroups::claim() {
        Ok(cgroups) => (Some(cgroups), None),
        Err(why) => (None, Some(why)),
    };
    let front = Arc::new(Front {
        dir,
        cgroups,
        members: Mutex::default(),
        answers: Answers::new(),
        naming: tokio::sync::Mutex::default(),
        audit,
    });
    for member in members::adopt(&front.dir, front.cgroups.as_ref()).await? {
        front.lock().insert(member.name.clone(), member);
    }

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
    reporter.set_serving::<MachinesServer<Arc<Front>>>().await;
    reporter.set_serving::<ProbesServer<Arc<Front>>>().await;
    reporter.set_serving::<EventsServer<Arc<Front>>>().await;
    reporter.set_serving::<GuestServer<Arc<Front>>>().await;
    reporter.set_serving::<HostServer<Arc<Front>>>().await;

    let signal = ended_by_signal()?;
    let (leaving, leave) = (Arc::clone(&front), args.leave_machines);
    let (end, ending) = oneshot::channel();
    let until = async move {
        signal.await;
        notify(NotifyState::Stopping);
        // Streams end with the runs, and with the connections to the processes.
        let members = leaving.all();
        let ended = members.iter().map(|member| member.end(leave));
        tokio::time::timeout(PATIENCE, futures_util::future::join_all(ended)).await.ok();
        end.send(()).ok();
    };
    let metrics = match args.metrics {
        Some(address) => Some(metrics::serve(address, Arc::clone(&front)).await?),
        None => None,
    };
    eprintln!("vmprobe: serving at {}", path.display());
    if let Some(address) = metrics {
        eprintln!("vmprobe: metrics at http://{address}/metrics");
    }
    notify(NotifyState::Ready);
    if let Some(why) = without {
        eprintln!("vmprobe: machines get no cgroup of their own: {why}; docs/service.md tells where they do");
    }
    let server = Server::builder()
        .layer(InterceptorLayer::new(socket::check_peer))
        .add_service(health)
        .add_service(newer)
        .add_service(older)
        .add_service(MachinesServer::new(Arc::clone(&front)))
        .add_service(ProbesServer::new(Arc::clone(&front)))
        .add_service(EventsServer::new(Arc::clone(&front)))
        .add_service(GuestServer::new(Arc::clone(&front)))
        .add_service(HostServer::new(front))
        .serve_with_incoming_shutdown(socket.incoming()?, until);
    finish(server, ending).await?;
    Ok(Code::Done)
}

/// Tells systemd, if that has started the service as Type=notify (sd_notify(3)).
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("systemd is not told: {error}");
    }
}

/// A process's stream, as the front's own. It ends where the service ends.
fn pass_on<T: Send + 'static>(member: Arc<Member>, stream: Streaming<T>) -> Response<Responses<T>> {
    let left = member.left();
    let items = stream.map(move |item| item.map_err(|error| member.explain(error)));
    Response::new(Box::pin(futures_util::StreamExt::take_until(items, left)))
}
