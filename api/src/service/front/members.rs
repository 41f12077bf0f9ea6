//! The processes of the machines: started, watched, found again.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::Signal;
use tokio::process::{Child, Command};
use tokio::sync::{OnceCell, watch};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::super::cgroup::{self, Cgroups};
use super::super::encoded::EventsClient;
use super::super::journal::{Left, Limits};
use super::super::{memory_bytes, status};
use super::journals::{self, Journals};
use crate::contract::guest_client::GuestClient;
use crate::contract::is_lost;
use crate::contract::machines_client::MachinesClient;
use crate::contract::probes_client::ProbesClient;
use crate::contract::{
    CreateMachineRequest, DeleteMachineRequest, GetMachineRequest, GetStatisticsRequest, ListMachinesRequest,
    ListProbesRequest, Machine, MachineSpec, MachineState, Probe, Statistics,
};
use crate::exit::Failure;

/// How often a new process is looked for.
const START_INTERVAL: Duration = Duration::from_millis(2);

/// Bytes of a stream that may be under way from a machine's process: what a client that does not read costs the service.
const STREAM_WINDOW: u32 = 64 << 10;

/// The same of all streams of a process, the most that there can be (RFC 9113, 6.9.1): those that are not read hold up no other call.
const CONNECTION_WINDOW: u32 = (1 << 31) - 1;

/// This program, also where a newer one has taken its place on the disk.
const PROGRAM: &str = "/proc/self/exe";

/// Variables that the processes of the machines get: how much they say, a panic's backtrace, where overlays of disks go.
const ENVIRONMENT: [&str; 3] = ["VMPROBE_LOG", "RUST_BACKTRACE", "TMPDIR"];

/// A machine and the way to its process.
pub struct Member {
    pub name: String,
    pub spec: Option<MachineSpec>,
    channel: Channel,
    /// What the service takes away when the process is gone: its socket's file, and its cgroup if it has one.
    socket: PathBuf,
    cgroup: Option<PathBuf>,
    /// Why its process is gone; empty while it is there.
    fate: Mutex<String>,
    /// False until the process is gone, where the service started it.
    gone: watch::Sender<bool>,
    started_here: bool,
    /// The service is about to end, and leaves the process alone.
    leaving: watch::Sender<bool>,
    /// Where its journal is, if it has one.
    pub journal: Option<PathBuf>,
    /// What is in that, when its process is gone.
    left: OnceCell<Arc<Left>>,
}

/// The directory for the sockets of the processes of a service's machines, its owner's alone.
///
/// # Errors
/// It cannot be made.
pub fn directory(socket: &Path) -> Result<PathBuf, Failure> {
    let dir = std::path::absolute(socket.with_extension("d"));
    let dir = dir.map_err(|error| Failure::Host(format!("--socket {}: {error}", socket.display())))?;
    match std::fs::DirBuilder::new().mode(0o700).create(&dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Failure::Host(format!("{}: cannot be made: {error}", dir.display())))
        }
        _ => Ok(dir),
    }
}

fn socket_of(dir: &Path, name: &str) -> PathBuf {
    dir.join(name).with_extension("sock")
}

async fn connect(socket: &Path) -> Option<Channel> {
    let endpoint = Endpoint::try_from(format!("unix://{}", socket.display())).ok()?;
    endpoint
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect()
        .await
        .ok()
}

/// The machines whose processes an earlier service has left behind. The sockets of those that are gone are removed.
///
/// # Errors
/// The directory cannot be read.
pub async fn adopt(
    dir: &Path,
    cgroups: Option<&Cgroups>,
    journals: Option<&Journals>,
) -> Result<Vec<Arc<Member>>, Failure> {
    let cannot = |error| Failure::Host(format!("{}: cannot be read: {error}", dir.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(cannot)? {
        let path = entry.map_err(cannot)?.path();
        if path.extension().is_none_or(|extension| extension != "sock") {
            continue;
        }
        let Some(channel) = connect(&path).await else {
            std::fs::remove_file(&path).ok();
            continue;
        };
        let list = MachinesClient::new(channel.clone()).list_machines(ListMachinesRequest {}).await;
        let machine = list.ok().and_then(|list| list.into_inner().machines.pop());
        match machine {
            Some(Machine { name, spec, isolation, durable_sequence, .. }) => {
                let journal = journals.and_then(|journals| journals.of_running(&name));
                if durable_sequence.is_some() && journal.is_none() {
                    eprintln!(
                        "vmprobe: machine {name} writes a journal that this service does not know; see --journal"
                    );
                }
                let group = isolation.and_then(|isolation| cgroups?.directory(&isolation.cgroup));
                let place = Place { socket: path, cgroup: group, journal };
                found.push(Arc::new(Member::new(name, spec, channel, place, false)));
            }
            _ => tracing::warn!("{} answers, and has no machine", path.display()),
        }
    }
    Ok(found)
}

/// Starts a process and has it make the machine.
///
/// # Errors
/// The process cannot be started, or refuses.
pub async fn start(
    dir: &Path,
    cgroups: Option<&Cgroups>,
    journals: Option<&Journals>,
    name: String,
    spec: MachineSpec,
) -> Result<(Arc<Member>, Machine), Status> {
    let Some(journals) = journals else { return start_process(dir, cgroups, None, name, spec).await };
    let journal = journals.make(&name)?;
    let started = start_process(dir, cgroups, Some((journal.clone(), journals.limits)), name, spec).await;
    if started.is_err() {
        journals::remove(&journal).ok();
    }
    started
}

async fn start_process(
    dir: &Path,
    cgroups: Option<&Cgroups>,
    journal: Option<(PathBuf, Limits)>,
    name: String,
    spec: MachineSpec,
) -> Result<(Arc<Member>, Machine), Status> {
    let host = |what: String| Status::from(Failure::Host(what));
    let socket = socket_of(dir, &name);
    let initrd = Some(&spec.initrd).filter(|path| !path.is_empty());
    let group = cgroups.and_then(|cgroups| {
        let initrd_bytes = initrd.and_then(|path| std::fs::metadata(path).ok()).map_or(0, |file| file.len());
        let made = cgroups.make(&name, memory_bytes(&spec), initrd_bytes);
        made.inspect_err(|error| tracing::warn!("Machine {name} gets no cgroup of its own: {error}")).ok()
    });
    let mut command = Command::new(PROGRAM);
    command.arg0("vmprobe").arg("worker").arg("--socket").arg(&socket);
    if spec.snapshot.is_empty() {
        command.arg("--image").arg(&spec.image);
    } else {
        command.arg("--restore").arg(&spec.snapshot);
    }
    command.args(initrd.iter().flat_map(|initrd| ["--initrd", initrd]));
    for disk in &spec.disks {
        let known = disk.options().ok_or_else(|| {
            status::invalid(
                "A disk's format or access is none that this service knows; see DiskFormat, DiskAccess",
            )
        })?;
        command.arg("--disk").arg(known.to_string());
    }
    if let Some(group) = &group {
        command.arg("--cgroup").arg(group);
    }
    if let Some((dir, limits)) = &journal {
        command.arg("--journal").arg(dir).args(["--journal-size", &limits.size.to_string()]);
        command.args(["--journal-age", &humantime::format_duration(limits.age).to_string()]);
    }
    let passed_on = |name: &str| Some((name.to_owned(), std::env::var_os(name)?));
    let mut child = command
        // What is in the service's environment may be secret.
        .env_clear()
        .envs(ENVIRONMENT.into_iter().filter_map(passed_on))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        // A terminal's Ctrl-C is for the service.
        .process_group(0)
        .spawn()
        .map_err(|error| host(format!("No process for the machine: {error}")))?;
    let channel = loop {
        if let Some(channel) = connect(&socket).await {
            break channel;
        }
        if let Ok(Some(ended)) = child.try_wait() {
            clean_up(&socket, group.as_deref()).await;
            return Err(host(format!("The machine's process ended before it was there: {}", fate(ended))));
        }
        tokio::time::sleep(START_INTERVAL).await;
    };
    let request =
        CreateMachineRequest { name: name.clone(), spec: Some(spec.clone()), idempotency_key: String::new() };
    let made = MachinesClient::new(channel.clone()).create_machine(request).await;
    let place = Place { socket, cgroup: group, journal: journal.map(|(dir, _)| dir) };
    match made.map(Response::into_inner) {
        Ok(machine) => {
            let spec = machine.spec.clone().unwrap_or(spec);
            let member = Arc::new(Member::new(name, Some(spec), channel, place, true));
            tokio::spawn(watch_over(Arc::clone(&member), child));
            Ok((member, machine))
        }
        Err(refused) => {
            let ended = child.try_wait().ok().flatten();
            child.kill().await.ok();
            let member = Member::new(name, Some(spec), channel, place, true);
            if let Some(ended) = ended {
                member.set_fate(fate(ended));
            }
            member.clean_up().await;
            Err(member.explain(refused))
        }
    }
}

async fn watch_over(member: Arc<Member>, mut child: Child) {
    let mut fate = child.wait().await.map_or_else(|error| error.to_string(), fate);
    if member.cgroup.as_deref().is_some_and(cgroup::ran_out_of_memory) {
        fate.push_str(": it had used up the memory that its cgroup may use");
    }
    member.set_fate(fate);
    member.clean_up().await;
    member.gone.send_replace(true);
}

/// Takes away what belongs to a process that has ended, or is about to.
async fn clean_up(socket: &Path, group: Option<&Path>) {
    std::fs::remove_file(socket).ok();
    if let Some(group) = group {
        cgroup::remove(group).await;
    }
}

/// How a process ended, for people.
fn fate(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(signal), _) if signal == Signal::SYS.as_raw() => format!(
            "its process was ended by signal {signal} (SIGSYS): it made a system call that it must not; the host's kernel log names it"
        ),
        (Some(signal), _) => format!("its process was ended by signal {signal}"),
        (None, Some(code)) => format!("its process ended with code {code}"),
        (None, None) => "its process ended".to_owned(),
    }
}

/// What a machine's process has in the file system.
#[derive(Default)]
struct Place {
    socket: PathBuf,
    cgroup: Option<PathBuf>,
    journal: Option<PathBuf>,
}

impl Member {
    fn new(
        name: String,
        spec: Option<MachineSpec>,
        channel: Channel,
        place: Place,
        started_here: bool,
    ) -> Self {
        let Place { socket, cgroup, journal } = place;
        Self {
            name,
            spec,
            channel,
            socket,
            cgroup,
            fate: Mutex::default(),
            gone: watch::Sender::new(false),
            started_here,
            leaving: watch::Sender::new(false),
            journal,
            left: OnceCell::new(),
        }
    }

    async fn clean_up(&self) {
        clean_up(&self.socket, self.cgroup.as_deref()).await;
    }

    /// A machine of which only the journal is there.
    pub fn left_behind(dir: PathBuf, left: Left) -> Self {
        let fate = "its process ended with an earlier service";
        let Machine { name, spec, .. } = left.machine(fate);
        // Nobody listens there.
        let nowhere = Endpoint::from_static("unix:///dev/null").connect_lazy();
        let member = Self::new(name, spec, nowhere, Place { journal: Some(dir), ..Place::default() }, false);
        *member.fate.lock().unwrap_or_else(PoisonError::into_inner) = fate.to_owned();
        member.left.set(Arc::new(left)).ok();
        member
    }

    /// What is in its journal, if its process is gone and has written one.
    pub async fn left(&self) -> Option<Arc<Left>> {
        self.fate()?;
        let dir = self.journal.clone()?;
        let left = self.left.get_or_try_init(|| async {
            let name = self.name.clone();
            let taken = tokio::task::spawn_blocking(move || Left::take_over(&dir, &name)).await;
            taken.map_err(|error| error.to_string())?.map(Arc::new).map_err(|error| error.to_string())
        });
        left.await
            .inspect_err(|why| tracing::warn!("Machine {}: its journal: {why}", self.name))
            .ok()
            .cloned()
    }

    fn set_fate(&self, why: String) {
        tracing::info!("Machine {}: {why}", self.name);
        *self.fate.lock().unwrap_or_else(PoisonError::into_inner) = why;
    }

    /// Why its process is gone, if it is.
    fn fate(&self) -> Option<String> {
        let fate = self.fate.lock().unwrap_or_else(PoisonError::into_inner);
        Some(fate.clone()).filter(|fate| !fate.is_empty())
    }

    pub fn machines(&self) -> MachinesClient<Channel> {
        MachinesClient::new(self.channel.clone())
    }

    pub fn probes(&self) -> ProbesClient<Channel> {
        ProbesClient::new(self.channel.clone())
    }

    pub fn guest(&self) -> GuestClient<Channel> {
        GuestClient::new(self.channel.clone())
    }

    pub fn events(&self) -> EventsClient<Channel> {
        EventsClient::new(self.channel.clone())
    }

    /// What a client hears of an error of the process's, or of its absence.
    pub fn explain(&self, error: Status) -> Status {
        // How it ended is told where it was started.
        if is_lost(&error) && self.fate().is_none() {
            self.set_fate("its process is gone".to_owned());
        }
        match self.fate() {
            // What has details was answered: by a process that was there, or out of its journal.
            Some(fate) if error.details().is_empty() => {
                status::process_gone(&self.name, &fate, self.journal.is_some())
            }
            // Without what else the process's answer had in its header.
            _ => Status::with_details(error.code(), error.message(), error.details().to_vec().into()),
        }
    }

    /// As clients see it, also when its process is gone.
    pub async fn describe(&self) -> Machine {
        let request = GetMachineRequest { name: self.name.clone() };
        let error = match self.machines().get_machine(request).await {
            Ok(machine) => return machine.into_inner(),
            Err(error) => self.explain(error),
        };
        if let Some(left) = self.left().await {
            return left.machine(&self.fate().unwrap_or_default());
        }
        Machine {
            name: self.name.clone(),
            spec: self.spec.clone(),
            state: MachineState::Failed.into(),
            end: self.fate().unwrap_or_else(|| error.message().to_owned()),
            ..Machine::default()
        }
    }

    /// # Errors
    /// Its process is gone.
    pub async fn statistics(&self) -> Result<Statistics, Status> {
        let request = GetStatisticsRequest { name: self.name.clone() };
        let told = self.machines().get_statistics(request).await;
        told.map(Response::into_inner).map_err(|error| self.explain(error))
    }

    /// Its probes, also those that a process that is gone has left in its journal.
    ///
    /// # Errors
    /// Its process is gone.
    pub async fn list_probes(&self) -> Result<Vec<Probe>, Status> {
        let request = ListProbesRequest { machine: self.name.clone() };
        let listed = self.probes().list_probes(request).await;
        match listed.map_err(|error| self.explain(error)) {
            Ok(listed) => Ok(listed.into_inner().probes),
            Err(error) => self.left().await.map(|left| left.probes.clone()).ok_or(error),
        }
    }

    /// Ends the run, and the process with it.
    ///
    /// # Errors
    /// The process refuses. One that is gone does not.
    pub async fn delete(&self) -> Result<(), Status> {
        let request = DeleteMachineRequest { name: self.name.clone() };
        let deleted = self.machines().delete_machine(request).await;
        match deleted.map_err(|error| self.explain(error)) {
            Err(error) if self.fate().is_none() => return Err(error),
            _ => {}
        }
        if self.started_here {
            self.gone.subscribe().wait_for(|gone| *gone).await.ok();
        } else {
            self.clean_up().await;
        }
        Ok(())
    }

    /// The service ends: so does the machine, unless it is to be left.
    pub async fn end(&self, leave: bool) {
        if !leave {
            self.delete().await.ok();
        }
        self.leaving.send_replace(true);
    }

    /// Comes when the service is about to end.
    pub fn leaving(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut leaving = self.leaving.subscribe();
        async move {
            // Nobody is left to say so: the machine was forgotten, and its process goes on until its streams have ended.
            if leaving.wait_for(|leaving| *leaving).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}
