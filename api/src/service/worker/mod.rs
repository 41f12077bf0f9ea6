//! A machine's own process: one machine, served on a socket of its own to the service that started the process, or to its successor.
//!
//! tokio never runs on a vCPU's thread; what may wait for a vCPU runs on tokio's threads for blocking work.

mod events;
mod guest;
mod journal;
mod machines;
mod probes;
mod sandbox;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Status;
use tonic::service::InterceptorLayer;
use tonic::transport::Server;

use super::answers::Answers;
use super::encoded::EventsServer;
use super::journal::Limits;
use super::{Responses, cgroup, ended_by_signal, finish, runtime, socket, status};
use crate::cli::WorkerArgs;
use crate::contract::guest_server::GuestServer;
use crate::contract::machines_server::MachinesServer;
use crate::contract::probes_server::ProbesServer;
use crate::contract::{AddProbesResponse, Isolation, MachineSpec};
use crate::exit::{Code, Failure};
use crate::vm::Vm;

use journal::Journal;
use machines::Material;
use sandbox::Sandbox;

/// Items of a response that is one of several: some 100 to 300 KiB, well below what clients take.
const CHUNK: usize = 1000;

/// The machine with what it was made from.
pub struct Member {
    name: String,
    spec: MachineSpec,
    isolation: Isolation,
    pub vm: Arc<Vm>,
    pub journal: Option<Arc<Journal>>,
}

impl Member {
    /// Has the change written down.
    fn probes_changed(&self) {
        if let Some(journal) = &self.journal {
            journal.probes_changed();
        }
    }

    /// Ends the run. Returns when that is in the journal too, if it can be.
    fn stop(&self, grace: Duration) {
        self.vm.stop(grace);
        if let Some(journal) = &self.journal {
            Handle::current().block_on(journal.finished());
        }
    }
}

/// What this process serves.
struct Worker {
    /// Until the machine is made of it; or why it cannot be.
    material: Mutex<Option<Result<Material, Failure>>>,
    isolation: Isolation,
    member: OnceLock<Arc<Member>>,
    /// The machine's journal is to be there, and so large.
    journal: Option<(PathBuf, Limits)>,
    answers: Answers<AddProbesResponse>,
    /// The machine has been deleted, and the process is to end.
    deleted: Notify,
}

impl Worker {
    fn take_material(&self) -> Option<Result<Material, Failure>> {
        self.material.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// # Errors
    /// NOT_FOUND.
    fn get(&self, name: &str) -> Result<Arc<Member>, Status> {
        let member = self.member.get().filter(|member| member.name == name);
        member.cloned().ok_or_else(|| status::no_machine(name))
    }
}

/// Serves until its machine is deleted, or until SIGTERM.
///
/// What it needs of the host is opened first; then it gives up its rights, before it looks at the image and makes threads.
pub fn work(args: &WorkerArgs) -> Result<Code, Failure> {
    // Its program is called as /proc/self/exe is.
    rustix::thread::set_name(c"vmprobe worker").ok();
    let group = args.cgroup.as_deref().and_then(cgroup::join);
    let limits = args.journal.limits();
    let journal = args.journal.journal.clone().map(|dir| (dir, limits));
    let mut material = Material::gather(args);
    let socket = socket::Socket::bind(&args.socket)?.leave_file();
    // The journal is the one directory in which it writes.
    let disks = material.as_ref().is_ok_and(|material| material.has_disks());
    let sandbox = Sandbox { write: args.journal.journal.iter().cloned().collect(), disks };
    let isolation = match sandbox.enter() {
        Ok(isolation) => isolation,
        // Whoever asks for the machine is told.
        Err(error) => {
            material = Err(error.into());
            Isolation::default()
        }
    };
    let (cgroup, memory_limit_bytes) = group.unwrap_or_default();
    let isolation = Isolation { cgroup, memory_limit_bytes, ..isolation };
    runtime()?.block_on(async {
        let worker = Arc::new(Worker {
            material: Mutex::new(Some(material)),
            isolation,
            member: OnceLock::new(),
            journal,
            answers: Answers::new(),
            deleted: Notify::new(),
        });
        let ending = Arc::clone(&worker);
        let signal = ended_by_signal()?;
        let (end, ended) = oneshot::channel();
        let until = async move {
            tokio::select! {
                () = signal => {}
                () = ending.deleted.notified() => {}
            }
            // Streams end with the run.
            if let Some(member) = ending.member.get().cloned() {
                tokio::task::spawn_blocking(move || member.stop(Duration::ZERO)).await.ok();
            }
            end.send(()).ok();
        };
        let server = Server::builder()
            // The service has one connection for all clients, and limits theirs.
            .max_concurrent_streams(u32::MAX)
            .layer(InterceptorLayer::new(socket::check_peer))
            .add_service(MachinesServer::new(Arc::clone(&worker)))
            .add_service(ProbesServer::new(Arc::clone(&worker)))
            .add_service(EventsServer::new(Arc::clone(&worker)))
            .add_service(GuestServer::new(worker))
            .serve_with_incoming_shutdown(UnixListenerStream::new(socket.listener()?), until);
        finish(server, ended).await?;
        Ok(Code::Done)
    })
}

/// A stream of responses, each of them with some of the items: a list can be longer than one may be.
fn in_responses<T: Clone, R: Send + 'static>(items: &[T], respond: impl Fn(Vec<T>) -> R) -> Responses<R> {
    let responses: Vec<_> = items.chunks(CHUNK).map(|chunk| Ok(respond(chunk.to_vec()))).collect();
    Box::pin(futures_util::stream::iter(responses))
}

/// Runs what may wait for a vCPU.
///
/// # Errors
/// What it says, or INTERNAL if it panics.
async fn blocking<T: Send + 'static, E: Into<Status> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(status::internal()),
    }
}
