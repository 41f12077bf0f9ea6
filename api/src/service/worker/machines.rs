//! The service Machines, for the one machine.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::{io, iter};

use disk::Disk;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use vmm::{ExitCounts, Host};

use super::super::journal::Limits;
use super::super::{Responses, memory_bytes, status};
use super::journal::{Journal, Keeper};
use super::{Member, Worker, blocking};
use crate::cli::WorkerArgs;
use crate::contract::machines_server::Machines;
use crate::contract::{
    CreateMachineRequest, DeleteMachineRequest, DeleteMachineResponse, DumpMachineRequest,
    DumpMachineResponse, ExitCount, GetMachineRequest, GetStatisticsRequest, Isolation, ListMachinesRequest,
    ListMachinesResponse, Machine, MachineSpec, MachineState, PauseMachineRequest, ResumeMachineRequest,
    SaveMachineRequest, SaveMachineResponse, StartMachineRequest, Statistics, StopMachineRequest,
    StreamConsoleRequest, StreamConsoleResponse, VcpuExits, WriteConsoleRequest, WriteConsoleResponse,
};
use crate::exit::Failure;
use crate::images::Opened;
use crate::snapshot::{Part, Saved};
use crate::vm::{Beginning, Boot, DumpPart, State, UNPACKING, Vm, VmError, open_host};
use crate::{accel, images};

/// vCPUs at most.
const MAX_VCPUS: u32 = 64;
/// Parts of a snapshot or a core file that wait for their client, a MiB each at most.
const PARTS: usize = 4;
/// How long a client may take for one of them: its machine stands still meanwhile.
const SAVE_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a response of the console at most.
const CONSOLE_CHUNK: usize = 64 << 10;
/// Bytes that are sent to the console at once at most.
const MAX_SENT: usize = 4096;

impl Member {
    /// What has to be said about the probes and the journal.
    fn notices(&self) -> Vec<String> {
        let mut notices = self.vm.notices();
        notices.extend(self.journal.iter().flat_map(|journal| journal.notices()));
        notices
    }

    /// As clients see it.
    pub fn describe(&self) -> Machine {
        let state = match self.vm.state() {
            State::Created => MachineState::Created,
            State::Running => MachineState::Running,
            State::Paused => MachineState::Paused,
            State::Ended => MachineState::Ended,
            State::Failed => MachineState::Failed,
        };
        Machine {
            name: self.name.clone(),
            spec: Some(self.spec.clone()),
            state: state.into(),
            end: self.vm.end(),
            age_ns: u64::try_from(self.vm.age().as_nanos()).unwrap_or(u64::MAX),
            notices: self.notices(),
            isolation: Some(self.isolation.clone()),
            durable_sequence: self.journal.as_ref().map(|journal| journal.durable()),
        }
    }
}

/// What it is made from.
enum Image {
    /// An image that is booted.
    Boot(images::Source),
    Restore(Box<Saved>),
}

/// What a machine is made from, read and opened while the process may still do so. Nothing has looked at the bytes.
pub struct Material {
    image: Image,
    disks: Vec<Arc<Disk>>,
    initrd: Option<Vec<u8>>,
    /// What this host's KVM is good for.
    kvm: accel::Host,
    host: Result<Host, Failure>,
}

impl Material {
    /// # Errors
    /// A file cannot be read.
    pub fn gather(args: &WorkerArgs) -> Result<Self, Failure> {
        if let Some(directory) = &args.restore {
            if !directory.is_absolute() {
                return Err(Failure::Usage(format!(
                    "snapshot '{}': give an absolute path on the service's host",
                    directory.display()
                )));
            }
            let image = Image::Restore(Box::new(Saved::open(directory)?));
            return Ok(Self {
                image,
                disks: Vec::new(),
                initrd: None,
                kvm: accel::measure(),
                host: open_host(),
            });
        }
        if images::is_file(&args.image) && !Path::new(&args.image).is_absolute() {
            return Err(Failure::Usage(format!(
                "image '{}': give a built-in guest (demo, ticker) or an absolute path on the service's host",
                args.image
            )));
        }
        let files = args.disks.iter().flat_map(|disk| iter::once(&disk.path).chain(&disk.backing));
        if let Some(relative) = files.into_iter().find(|path| !path.is_absolute()) {
            return Err(Failure::Usage(format!(
                "disk '{}': give an absolute path on the service's host",
                relative.display()
            )));
        }
        let (source, disks) = images::read_attached(&args.image, &args.disks)?;
        Ok(Self {
            image: Image::Boot(source),
            disks,
            initrd: args.initrd.as_deref().map(images::read_initrd).transpose()?,
            kvm: accel::measure(),
            host: open_host(),
        })
    }
}

impl Material {
    pub fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }
}

/// Makes the machine that a specification describes.
fn make(material: Material, spec: &MachineSpec) -> Result<Vm, Failure> {
    let vcpus = Some(spec.vcpus).filter(|vcpus| *vcpus != 0);
    if vcpus.is_some_and(|vcpus| vcpus > MAX_VCPUS) {
        return Err(Failure::Usage(format!("{} vCPUs were asked for; ask for 1 to {MAX_VCPUS}", spec.vcpus)));
    }
    match material.image {
        Image::Boot(bytes) => {
            let Opened { guest, extras } = images::parse(&spec.image, bytes)?;
            accel::check_kvm(material.kvm, guest.linux.is_some())?;
            let extras = extras.with(material.initrd, Some(&spec.cmdline));
            // What was read of them to boot has been read.
            let disks = material.disks.into_iter().filter_map(Arc::into_inner).collect();
            let beginning = Beginning::Boot(Boot {
                disks,
                vsock: None,
                networks: Vec::new(),
                image: &spec.image,
                kaslr: spec.kaslr,
                unpacking: UNPACKING,
                initrd: extras.initrd,
                cmdline: extras.cmdline.as_deref(),
                memory: memory_bytes(spec),
                vcpus,
            });
            Vm::new(material.host?, &spec.image, guest, beginning)
        }
        Image::Restore(mut saved) => {
            if *spec != (MachineSpec { snapshot: spec.snapshot.clone(), ..MachineSpec::default() }) {
                return Err(Failure::Usage(
                    "A snapshot says what its machine is; leave all else empty".into(),
                ));
            }
            let guest = saved.guest()?;
            accel::check_kvm(material.kvm, guest.linux.is_some())?;
            let image = saved.manifest.image.clone();
            Vm::new(material.host?, &image, guest, Beginning::Restore(&saved))
        }
    }
}

/// The same with its journal, which is written from now on.
fn make_member(
    material: Material,
    name: String,
    spec: MachineSpec,
    isolation: Isolation,
    journal: Option<(PathBuf, Limits)>,
) -> Result<Arc<Member>, Failure> {
    let vm = Arc::new(make(material, &spec)?);
    // What was left to the service is told.
    let image = vm.image().to_owned();
    let spec = MachineSpec { image, vcpus: vm.vcpus(), memory_bytes: vm.memory_bytes(), ..spec };
    let Some((dir, limits)) = journal else {
        return Ok(Arc::new(Member { name, spec, vm, isolation, journal: None }));
    };
    let (journal, writer) = Journal::create(&dir, limits, &name)?;
    let journal = Arc::new(journal);
    let member = Arc::new(Member { name, spec, vm, isolation, journal: Some(Arc::clone(&journal)) });
    let keeper = Keeper::new(Arc::clone(&member), journal, writer)?;
    let runtime = Handle::current();
    let thread = thread::Builder::new().name("journal".to_owned());
    let started = thread.spawn(move || keeper.keep(&runtime));
    started.map_err(|error| Failure::Host(format!("No thread for the machine's journal: {error}")))?;
    Ok(member)
}

impl Worker {
    /// Does something with the machine and tells what it is then.
    async fn change<E: Into<Status> + Send + 'static>(
        &self,
        name: &str,
        act: impl FnOnce(&Member) -> Result<(), E> + Send + 'static,
    ) -> Result<Response<Machine>, Status> {
        let member = self.get(name)?;
        blocking(move || act(&member).map(|()| Response::new(member.describe()))).await
    }

    /// Ends the run, and tells how it ended.
    async fn end(&self, name: &str, grace: Duration) -> Result<Response<Machine>, Status> {
        let stop = move |member: &Member| {
            member.stop(grace);
            Ok::<_, Status>(())
        };
        self.change(name, stop).await
    }
}

/// Runs what stops the machine and writes it in parts, and sends them. It ends when its client takes none for too long, or is gone.
fn in_parts<T: Send + 'static>(
    write: impl FnOnce(&dyn Fn(T) -> io::Result<()>) -> Result<(), VmError> + Send + 'static,
) -> Response<Responses<T>> {
    let (parts, received) = mpsc::channel(PARTS);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let send = |part| {
            let sent = runtime.block_on(timeout(SAVE_PATIENCE, parts.send(part)));
            sent.map_err(io::Error::from)?.map_err(|_| io::ErrorKind::BrokenPipe.into())
        };
        if let Err(error) = write(&|part| send(Ok(part))) {
            send(Err(error.into())).ok();
        }
    });
    Response::new(Box::pin(ReceiverStream::new(received)))
}

#[tonic::async_trait]
impl Machines for Arc<Worker> {
    async fn create_machine(
        &self,
        request: Request<CreateMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let CreateMachineRequest { name, spec, idempotency_key: _ } = request.into_inner();
        let spec = spec.ok_or_else(|| status::invalid("The request has no spec"))?;
        let material = self.take_material().ok_or_else(|| status::name_taken(&name))??;
        let (journal, isolation) = (self.journal.clone(), self.isolation.clone());
        let member = blocking(move || make_member(material, name, spec, isolation, journal)).await?;
        let described = member.describe();
        self.member.set(member).map_err(|member| status::name_taken(&member.name))?;
        Ok(Response::new(described))
    }

    async fn list_machines(
        &self,
        _: Request<ListMachinesRequest>,
    ) -> Result<Response<ListMachinesResponse>, Status> {
        let member = self.member.get().cloned();
        let machines = blocking(move || Ok::<_, Status>(member.iter().map(|one| one.describe()).collect()));
        Ok(Response::new(ListMachinesResponse { machines: machines.await? }))
    }

    async fn get_machine(&self, request: Request<GetMachineRequest>) -> Result<Response<Machine>, Status> {
        self.change(&request.into_inner().name, |_| Ok::<_, Status>(())).await
    }

    async fn start_machine(
        &self,
        request: Request<StartMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        self.change(&request.into_inner().name, |member| member.vm.start()).await
    }

    async fn pause_machine(
        &self,
        request: Request<PauseMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        self.change(&request.into_inner().name, |member| member.vm.pause()).await
    }

    async fn resume_machine(
        &self,
        request: Request<ResumeMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        self.change(&request.into_inner().name, |member| member.vm.resume()).await
    }

    async fn stop_machine(&self, request: Request<StopMachineRequest>) -> Result<Response<Machine>, Status> {
        let StopMachineRequest { name, grace_ns } = request.into_inner();
        self.end(&name, Duration::from_nanos(grace_ns)).await
    }

    async fn delete_machine(
        &self,
        request: Request<DeleteMachineRequest>,
    ) -> Result<Response<DeleteMachineResponse>, Status> {
        self.end(&request.into_inner().name, Duration::ZERO).await?;
        self.deleted.notify_one();
        Ok(Response::new(DeleteMachineResponse {}))
    }

    type SaveMachineStream = Responses<SaveMachineResponse>;

    async fn save_machine(
        &self,
        request: Request<SaveMachineRequest>,
    ) -> Result<Response<Self::SaveMachineStream>, Status> {
        let vm = Arc::clone(&self.get(&request.into_inner().name)?.vm);
        Ok(in_parts(move |send| {
            vm.save(&mut |Part { file, size, offset, data }| {
                send(SaveMachineResponse { file: file.to_owned(), size, offset, data: data.to_vec() })
            })
        }))
    }

    type DumpMachineStream = Responses<DumpMachineResponse>;

    async fn dump_machine(
        &self,
        request: Request<DumpMachineRequest>,
    ) -> Result<Response<Self::DumpMachineStream>, Status> {
        let vm = Arc::clone(&self.get(&request.into_inner().name)?.vm);
        Ok(in_parts(move |send| {
            let dumped = vm.dump(&mut |DumpPart { size, offset, data }| {
                send(DumpMachineResponse { size, offset, data: data.to_vec() })
            });
            dumped.map(drop)
        }))
    }

    async fn get_statistics(
        &self,
        request: Request<GetStatisticsRequest>,
    ) -> Result<Response<Statistics>, Status> {
        let vm = &self.get(&request.into_inner().name)?.vm;
        let exits = |(number, exits): (u32, ExitCounts)| VcpuExits {
            number,
            exits: exits
                .by_reason()
                .map(|(reason, count)| ExitCount { reason: reason.to_owned(), count })
                .collect(),
        };
        Ok(Response::new(Statistics {
            vcpus: (0..).zip(vm.exits()).map(exits).collect(),
            events: vm.events.next(),
            console_bytes: vm.console.next(),
        }))
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        let WriteConsoleRequest { name, data } = request.into_inner();
        if data.len() > MAX_SENT {
            let message = format!("{} bytes are too many at once; send {MAX_SENT} at most", data.len());
            return Err(status::invalid(message));
        }
        self.get(&name)?.vm.send_to_console(data)?;
        Ok(Response::new(WriteConsoleResponse {}))
    }

    type StreamConsoleStream = Responses<StreamConsoleResponse>;

    async fn stream_console(
        &self,
        request: Request<StreamConsoleRequest>,
    ) -> Result<Response<Self::StreamConsoleStream>, Status> {
        let vm = Arc::clone(&self.get(&request.into_inner().name)?.vm);
        let chunks = futures_util::stream::unfold(Some(0), move |from| {
            let vm = Arc::clone(&vm);
            async move {
                let page = vm.console.wait(from?, CONSOLE_CHUNK).await;
                let next = page.from + page.items.len() as u64;
                if page.items.is_empty() && page.lost == 0 {
                    return None;
                }
                let response = StreamConsoleResponse { data: page.items, lost: page.lost };
                Some((Ok(response), (!page.closed).then_some(next)))
            }
        });
        Ok(Response::new(Box::pin(chunks)))
    }
}
