//! What clients speak to: hands each call on to the process of the machine that it is for.

mod access;
mod audit;
mod calls;
mod connections;
mod events;
mod gate;
mod guest;
mod host;
mod identity;
mod journals;
mod machines;
mod members;
mod metrics;
mod probes;
mod server;
mod tls;

pub use calls::{Role, Rule};
pub use identity::Identity;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::FutureExt;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::rustls::ServerConfig;
use tokio_stream::{Stream, StreamExt};
use tonic::service::Routes;
use tonic::{Request, Response, Status};

use super::answers::Answers;
use super::cgroup::Cgroups;
use super::encoded::EventsServer;
use super::{Responses, broken, ended_by_signal, finish, runtime, socket, status};
use crate::cli::ServeArgs;
use crate::contract::guest_server::GuestServer;
use crate::contract::host_server::HostServer;
use crate::contract::machines_server::MachinesServer;
use crate::contract::probes_server::ProbesServer;
use crate::contract::{self, Machine};
use crate::exit::{Code, Failure};

use access::Access;
use audit::Audit;
use calls::About;
use gate::{Call, Gate};
use journals::Journals;
use members::Member;

/// How long the processes of the machines may take to end with the service.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the service knows.
struct Front {
    /// Where the sockets of the machines' processes are.
    dir: PathBuf,
    cgroups: Option<Cgroups>,
    /// If the machines' events are to be on disk too.
    journals: Option<Journals>,
    members: Mutex<BTreeMap<String, Arc<Member>>>,
    answers: Answers<Machine>,
    naming: tokio::sync::Mutex<()>,
    audit: Arc<Audit>,
}

impl Front {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Member>>> {
        // What it guards is changed at once.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// PERMISSION_DENIED, whether there is such a machine or not. NOT_FOUND.
    fn get(&self, call: &Call, name: &str) -> Result<Arc<Member>, Status> {
        call.check(name)?;
        self.lock().get(name).cloned().ok_or_else(|| status::no_machine(name))
    }

    /// All machines: for the service itself, not for its clients.
    fn all(&self) -> Vec<Arc<Member>> {
        self.lock().values().cloned().collect()
    }

    /// The machines that a client may see.
    fn seen_by(&self, call: &Call) -> Vec<Arc<Member>> {
        self.lock().values().filter(|member| call.check(&member.name).is_ok()).cloned().collect()
    }

    /// Does something with a request's machine, if its client may, and writes down what became of it.
    async fn act<T: About, R, F: Future<Output = Result<Response<R>, Status>>>(
        &self,
        call: &Call,
        request: T,
        act: impl FnOnce(Arc<Member>, T) -> F,
    ) -> Result<(Arc<Member>, R), Status> {
        let (machine, what) = (request.machine().to_owned(), request.what());
        let result = match self.get(call, &machine) {
            // Without what else the process's answer had in its header.
            Ok(member) => match act(Arc::clone(&member), request).await {
                Ok(response) => Ok((member, response.into_inner())),
                Err(error) => Err(member.explain(error)),
            },
            Err(status) => Err(status),
        };
        self.audit.note(&call.who, call.rule, &machine, &what, &result);
        result
    }

    /// Answers a request that is for one machine.
    async fn pass<T: About + Send + 'static, R: Send + 'static, F>(
        self: &Arc<Self>,
        request: Request<T>,
        act: impl FnOnce(Arc<Member>, T) -> F + Send + 'static,
    ) -> Result<Response<R>, Status>
    where
        F: Future<Output = Result<Response<R>, Status>> + Send,
    {
        let (call, front) = (Call::of(&request)?, Arc::clone(self));
        carry_out(async move {
            let (_, answer) = front.act(&call, request.into_inner(), act).await?;
            Ok(Response::new(answer))
        })
        .await
    }

    /// The same, with a stream. It ends where the service ends, and where the client's right to it does.
    async fn stream<
        T: About,
        R: Send + 'static,
        S: Stream<Item = Result<R, Status>> + Send + Unpin + 'static,
        F: Future<Output = Result<Response<S>, Status>>,
    >(
        &self,
        request: Request<T>,
        act: impl FnOnce(Arc<Member>, T) -> F,
    ) -> Result<Response<Responses<R>>, Status> {
        let call = Call::of(&request)?;
        let ends = call.ends(request.get_ref().machine().to_owned());
        let (member, items) = self.act(&call, request.into_inner(), act).await?;
        Ok(pass_on(member, items, ends))
    }

    /// Forgets a machine, if it is still this one.
    fn forget(&self, member: &Arc<Member>) {
        let mut members = self.lock();
        if members.get(&member.name).is_some_and(|known| Arc::ptr_eq(known, member)) {
            members.remove(&member.name);
        }
    }
}

/// Does what a request asks for to its end, also when its client goes meanwhile: what was begun is written down.
async fn carry_out<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    tokio::spawn(work).await.unwrap_or_else(|_| Err(status::internal()))
}

/// Serves until SIGTERM or SIGINT. Then every machine is stopped, unless they are to be left running, and the socket is gone.
pub fn serve(args: &ServeArgs) -> Result<Code, Failure> {
    // Before there are other threads, which inherit it.
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| broken("Privileges cannot be given up", &error))?;
    runtime()?.block_on(run(&args.socket, args))
}

async fn run(path: &Path, args: &ServeArgs) -> Result<Code, Failure> {
    let audit = Arc::new(Audit::open(args.audit_log.as_deref())?);
    let access = Access::read(args.access.as_deref())?;
    let tls = args.tls.as_ref().map(tls::config).transpose()?;
    let socket = Arc::new(socket::Socket::bind(path)?);
    let tcp = match args.listen {
        Some(address) => Some(connections::bind(address).await?),
        None => None,
    };
    let dir = members::directory(path)?;
    let journals = Journals::open(&args.journal)?;
    let (cgroups, without) = match Cgroups::claim() {
        Ok(cgroups) => (Some(cgroups), None),
        Err(why) => (None, Some(why)),
    };
    let front = Arc::new(Front {
        dir,
        cgroups,
        journals,
        members: Mutex::default(),
        answers: Answers::new(),
        naming: tokio::sync::Mutex::default(),
        audit: Arc::clone(&audit),
    });
    let mut found = members::adopt(&front.dir, front.cgroups.as_ref(), front.journals.as_ref()).await?;
    if let Some(journals) = &front.journals {
        let running = found.iter().map(|member| member.name.clone()).collect();
        found.extend(journals.left(&running)?);
    }
    front.lock().extend(found.into_iter().map(|member| (member.name.clone(), member)));

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

    let ended = ended_by_signal()?;
    let (leaving, leave) = (Arc::clone(&front), args.leave_machines);
    let (end, ending) = oneshot::channel();
    let until = async move {
        ended.await;
        notify(NotifyState::Stopping);
        // Streams end with the runs, and with the connections to the processes.
        let members = leaving.all();
        let ends = members.iter().map(|member| member.end(leave));
        tokio::time::timeout(PATIENCE, futures_util::future::join_all(ends)).await.ok();
        end.send(()).ok();
    };
    let metrics = match args.metrics {
        Some(address) => Some(metrics::serve(address, Arc::clone(&front)).await?),
        None => None,
    };

    socket.open_to_others(access.lets_other_users_in())?;
    let (access, gate) = watch::channel(Arc::new(access));
    let (to, incoming) = mpsc::channel(1);
    tokio::spawn(connections::accept_on_socket(socket.listener()?, gate.clone(), to.clone()));
    eprintln!("vmprobe: serving at {}", path.display());
    if let Some(address) = metrics {
        eprintln!("vmprobe: metrics at http://{address}/metrics");
    }
    let tls = tls.map(|tls| Arc::new(ArcSwap::new(tls)));
    if let (Some((listener, address)), Some(tls)) = (tcp, &tls) {
        tokio::spawn(connections::accept_on_tcp(listener, Arc::clone(tls), to));
        eprintln!("vmprobe: serving at https://{address}");
    }
    let reloading = Reloading { args: args.clone(), access, tls, socket: Arc::clone(&socket) };
    let mut hangup =
        signal(SignalKind::hangup()).map_err(|error| broken("SIGHUP cannot be handled", &error))?;
    tokio::spawn(async move {
        while hangup.recv().await.is_some() {
            reloading.reload();
        }
    });
    notify(NotifyState::Ready);
    if let Some(why) = without {
        eprintln!("vmprobe: machines get no cgroup of their own: {why}; docs/service.md tells where they do");
    }
    let gate = Gate { access: gate, audit };
    let routes = Routes::new(health)
        .add_service(newer)
        .add_service(older)
        .add_service(MachinesServer::new(Arc::clone(&front)))
        .add_service(ProbesServer::new(Arc::clone(&front)))
        .add_service(EventsServer::new(Arc::clone(&front)))
        .add_service(GuestServer::new(Arc::clone(&front)))
        .add_service(HostServer::new(front));
    let server = server::serve(incoming, gate, routes, until);
    finish(server.map(Ok), ending).await?;
    Ok(Code::Done)
}

/// Tells systemd, if that has started the service as Type=notify (sd_notify(3)).
fn notify(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!("systemd is not told: {error}");
    }
}

/// What is read again at SIGHUP.
struct Reloading {
    args: ServeArgs,
    access: watch::Sender<Arc<Access>>,
    tls: Option<Arc<ArcSwap<ServerConfig>>>,
    socket: Arc<socket::Socket>,
}

impl Reloading {
    /// Reads the access file and the certificates again, if there are any. One that is broken changes nothing, which is said.
    fn reload(&self) {
        if self.args.access.is_none() {
            eprintln!("vmprobe: there is no access file to be read again");
            return;
        }
        let access = Access::read(self.args.access.as_deref()).and_then(|access| {
            self.socket.open_to_others(access.lets_other_users_in())?;
            self.access.send_replace(Arc::new(access));
            Ok(())
        });
        match access {
            Ok(()) => eprintln!("vmprobe: the access file was read again"),
            Err(failure) => eprintln!("vmprobe: the rights stay as they were: {failure}"),
        }
        if let (Some(tls), Some(args)) = (&self.tls, &self.args.tls) {
            match tls::config(args) {
                Ok(config) => {
                    tls.store(config);
                    eprintln!("vmprobe: the certificates were read again");
                }
                Err(failure) => eprintln!("vmprobe: the certificates stay as they were: {failure}"),
            }
        }
    }
}

/// A process's stream, as the front's own. It ends where the service ends, and with an error where the client's right does.
fn pass_on<T: Send + 'static>(
    member: Arc<Member>,
    items: impl Stream<Item = Result<T, Status>> + Send + Unpin + 'static,
    ends: impl Future<Output = Status> + Send + 'static,
) -> Response<Responses<T>> {
    let left = member.leaving();
    let items = items.map(move |item| item.map_err(|error| member.explain(error)));
    let items = futures_util::stream::unfold(Some((items, Box::pin(ends))), |state| async {
        let (mut items, mut ends) = state?;
        tokio::select! {
            biased;
            status = &mut ends => Some((Err(status), None)),
            item = items.next() => item.map(|item| (item, Some((items, ends)))),
        }
    });
    Response::new(Box::pin(futures_util::StreamExt::take_until(items, left)))
}
