//! The service Machines.

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use prost::Message;
use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use super::registry::{Answer, Member, Registry, blocking};
use super::socket::Peer;
use super::status;
use crate::contract::machines_server::Machines;
use crate::contract::{
    CreateMachineRequest, DeleteMachineRequest, DeleteMachineResponse, GetMachineRequest,
    ListMachinesRequest, ListMachinesResponse, Machine, MachineSpec, MachineState, PauseMachineRequest,
    ResumeMachineRequest, StartMachineRequest, StopMachineRequest, StreamConsoleRequest,
    StreamConsoleResponse,
};
use crate::exit::Failure;
use crate::vm::{State, Vm};
use crate::{accel, images};

/// Memory where it is not said, bytes.
const MEMORY_BYTES: u64 = 512 << 20;
/// vCPUs at most.
const MAX_VCPUS: u32 = 64;
/// Characters of a name at most.
const MAX_NAME: usize = 63;
/// Bytes of a response of the console at most.
const CONSOLE_CHUNK: usize = 64 << 10;

impl Member {
    /// As clients see it.
    fn describe(&self) -> Machine {
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
            notices: self.vm.notices(),
        }
    }
}

fn check_name(name: &str) -> Result<(), Status> {
    let starts = name.starts_with(|first: char| first.is_ascii_alphabetic());
    let consists = name.chars().all(|one| one.is_ascii_alphanumeric() || one == '-');
    if starts && consists && name.len() <= MAX_NAME {
        return Ok(());
    }
    Err(status::invalid(format!(
        "'{name}' cannot be a name: 1 to {MAX_NAME} letters, digits and hyphens, a letter first"
    )))
}

/// Makes the machine that a specification describes.
fn make(spec: &MachineSpec) -> Result<Vm, Failure> {
    if images::is_file(&spec.image) && !Path::new(&spec.image).is_absolute() {
        return Err(Failure::Usage(format!(
            "image '{}': give a built-in guest (demo, ticker) or an absolute path on the service's host",
            spec.image
        )));
    }
    let vcpus = Some(spec.vcpus).filter(|vcpus| *vcpus != 0);
    if vcpus.is_some_and(|vcpus| vcpus > MAX_VCPUS) {
        return Err(Failure::Usage(format!("{} vCPUs were asked for; ask for 1 to {MAX_VCPUS}", spec.vcpus)));
    }
    let guest = images::open(&spec.image)?;
    accel::check_kvm(guest.linux.is_some())?;
    let initrd = Some(spec.initrd.as_str()).filter(|path| !path.is_empty());
    let initrd = initrd.map(|path| images::read_initrd(Path::new(path))).transpose()?;
    let memory = if spec.memory_bytes == 0 { MEMORY_BYTES } else { spec.memory_bytes };
    Vm::new(&spec.image, guest, initrd, &spec.cmdline, memory, vcpus)
}

impl Registry {
    async fn create(&self, request: CreateMachineRequest) -> Result<Machine, Status> {
        let encoded = request.encode_to_vec();
        let CreateMachineRequest { name, spec, idempotency_key: key } = request;
        let _making = self.making.lock().await;
        if let Some(Answer::Machine(machine)) = self.answered(&key, &encoded)? {
            return Ok(machine);
        }
        let name = if name.is_empty() { self.free_name() } else { name };
        check_name(&name)?;
        if self.get(&name).is_ok() {
            return Err(status::name_taken(&name));
        }
        let spec = spec.ok_or_else(|| status::invalid("The request has no spec"))?;
        let (spec, vm) = blocking(move || make(&spec).map(|vm| (spec, vm))).await?;
        let machine = self.insert(Member { name, spec, vm: Arc::new(vm) })?.describe();
        self.remember(&key, encoded, Answer::Machine(machine.clone()));
        Ok(machine)
    }

    /// Does something with a machine, writes it down and tells what the machine is then.
    async fn change<E: Into<Status> + Send + 'static>(
        &self,
        peer: Option<Peer>,
        call: &str,
        name: &str,
        act: impl FnOnce(&Arc<Vm>) -> Result<(), E> + Send + 'static,
    ) -> Result<Response<Machine>, Status> {
        let result = match self.get(name) {
            Ok(member) => blocking(move || act(&member.vm).map(|()| member.describe())).await,
            Err(status) => Err(status),
        };
        self.audit.write(peer, call, name, "", &result);
        result.map(Response::new)
    }
}

#[tonic::async_trait]
impl Machines for Arc<Registry> {
    async fn create_machine(
        &self,
        request: Request<CreateMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let (asked, image) = (request.name.clone(), request.spec.as_ref().map(|spec| spec.image.clone()));
        let result = self.create(request).await;
        let name = result.as_ref().map_or(&asked, |machine| &machine.name);
        self.audit.write(peer, "CreateMachine", name, image.as_deref().unwrap_or_default(), &result);
        result.map(Response::new)
    }

    async fn list_machines(
        &self,
        _: Request<ListMachinesRequest>,
    ) -> Result<Response<ListMachinesResponse>, Status> {
        let members = self.all();
        let machines = blocking(move || Ok::<_, Status>(members.iter().map(|one| one.describe()).collect()));
        Ok(Response::new(ListMachinesResponse { machines: machines.await? }))
    }

    async fn get_machine(&self, request: Request<GetMachineRequest>) -> Result<Response<Machine>, Status> {
        let member = self.get(&request.into_inner().name)?;
        Ok(Response::new(blocking(move || Ok::<_, Status>(member.describe())).await?))
    }

    async fn start_machine(
        &self,
        request: Request<StartMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        self.change(peer, "StartMachine", &request.into_inner().name, Vm::start).await
    }

    async fn pause_machine(
        &self,
        request: Request<PauseMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        self.change(peer, "PauseMachine", &request.into_inner().name, |vm| vm.pause()).await
    }

    async fn resume_machine(
        &self,
        request: Request<ResumeMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        self.change(peer, "ResumeMachine", &request.into_inner().name, |vm| vm.resume()).await
    }

    async fn stop_machine(&self, request: Request<StopMachineRequest>) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        let stop = |vm: &Arc<Vm>| {
            vm.stop();
            Ok::<_, Status>(())
        };
        self.change(peer, "StopMachine", &request.into_inner().name, stop).await
    }

    async fn delete_machine(
        &self,
        request: Request<DeleteMachineRequest>,
    ) -> Result<Response<DeleteMachineResponse>, Status> {
        let peer = Peer::of(&request);
        let name = request.into_inner().name;
        let result = match self.get(&name) {
            Ok(member) => {
                let vm = Arc::clone(&member.vm);
                let stopped = blocking(move || {
                    vm.stop();
                    Ok::<_, Status>(())
                });
                stopped.await.map(|()| self.forget(&member))
            }
            Err(status) => Err(status),
        };
        self.audit.write(peer, "DeleteMachine", &name, "", &result);
        result.map(|()| Response::new(DeleteMachineResponse {}))
    }

    type StreamConsoleStream = Pin<Box<dyn Stream<Item = Result<StreamConsoleResponse, Status>> + Send>>;

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
