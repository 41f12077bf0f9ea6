//! The service Machines.

use std::sync::Arc;

use prost::Message;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::super::socket::Peer;
use super::super::{Responses, status};
use super::members::{self, Member};
use super::{Front, pass_on};
use crate::contract::machines_client::MachinesClient;
use crate::contract::machines_server::Machines;
use crate::contract::{
    CreateMachineRequest, DeleteMachineRequest, DeleteMachineResponse, GetMachineRequest,
    GetStatisticsRequest, ListMachinesRequest, ListMachinesResponse, Machine, PauseMachineRequest,
    ResumeMachineRequest, StartMachineRequest, Statistics, StopMachineRequest, StreamConsoleRequest,
    StreamConsoleResponse,
};

/// Characters of a name at most.
const MAX_NAME: usize = 63;

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

impl Front {
    /// A name that no machine has.
    fn free_name(&self) -> String {
        let members = self.lock();
        let name = (1_u64..).map(|number| format!("vm-{number}")).find(|name| !members.contains_key(name));
        name.unwrap_or_default()
    }

    async fn create(&self, request: CreateMachineRequest) -> Result<Machine, Status> {
        let encoded = request.encode_to_vec();
        let CreateMachineRequest { name, spec, idempotency_key } = request;
        let make = async {
            // Names are given one after the other.
            let _naming = self.naming.lock().await;
            let name = if name.is_empty() { self.free_name() } else { name };
            check_name(&name)?;
            if self.get(&name).is_ok() {
                return Err(status::name_taken(&name));
            }
            let spec = spec.ok_or_else(|| status::invalid("The request has no spec"))?;
            let (member, machine) = members::start(&self.dir, self.cgroups.as_ref(), name, spec).await?;
            self.lock().insert(member.name.clone(), member);
            Ok(machine)
        };
        self.answers.once(&idempotency_key, encoded, make).await
    }

    /// Has the machine's process do something, and writes it down.
    async fn change<F: Future<Output = Result<Response<Machine>, Status>>>(
        &self,
        peer: Option<Peer>,
        call: &str,
        name: String,
        act: impl FnOnce(MachinesClient<Channel>, String) -> F,
    ) -> Result<Response<Machine>, Status> {
        let result = match self.get(&name) {
            Ok(member) => {
                let acted = act(MachinesClient::new(member.channel.clone()), name.clone()).await;
                acted.map_err(|error| member.explain(error))
            }
            Err(status) => Err(status),
        };
        self.audit.write(peer, call, &name, "", &result);
        result.map(|machine| Response::new(machine.into_inner()))
    }

    async fn delete(&self, name: &str) -> Result<(), Status> {
        let member = self.get(name)?;
        member.delete().await?;
        self.forget(&member);
        Ok(())
    }
}

#[tonic::async_trait]
impl Machines for Arc<Front> {
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
        let machines = futures_util::future::join_all(members.iter().map(|member| member.describe())).await;
        Ok(Response::new(ListMachinesResponse { machines }))
    }

    async fn get_machine(&self, request: Request<GetMachineRequest>) -> Result<Response<Machine>, Status> {
        let member: Arc<Member> = self.get(&request.into_inner().name)?;
        Ok(Response::new(member.describe().await))
    }

    async fn start_machine(
        &self,
        request: Request<StartMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        let act = |mut to: MachinesClient<Channel>, name| async move {
            to.start_machine(StartMachineRequest { name }).await
        };
        self.change(peer, "StartMachine", request.into_inner().name, act).await
    }

    async fn pause_machine(
        &self,
        request: Request<PauseMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        let act = |mut to: MachinesClient<Channel>, name| async move {
            to.pause_machine(PauseMachineRequest { name }).await
        };
        self.change(peer, "PauseMachine", request.into_inner().name, act).await
    }

    async fn resume_machine(
        &self,
        request: Request<ResumeMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        let act = |mut to: MachinesClient<Channel>, name| async move {
            to.resume_machine(ResumeMachineRequest { name }).await
        };
        self.change(peer, "ResumeMachine", request.into_inner().name, act).await
    }

    async fn stop_machine(&self, request: Request<StopMachineRequest>) -> Result<Response<Machine>, Status> {
        let peer = Peer::of(&request);
        let act = |mut to: MachinesClient<Channel>, name| async move {
            to.stop_machine(StopMachineRequest { name }).await
        };
        self.change(peer, "StopMachine", request.into_inner().name, act).await
    }

    async fn delete_machine(
        &self,
        request: Request<DeleteMachineRequest>,
    ) -> Result<Response<DeleteMachineResponse>, Status> {
        let peer = Peer::of(&request);
        let name = request.into_inner().name;
        let result = self.delete(&name).await;
        self.audit.write(peer, "DeleteMachine", &name, "", &result);
        result.map(|()| Response::new(DeleteMachineResponse {}))
    }

    async fn get_statistics(
        &self,
        request: Request<GetStatisticsRequest>,
    ) -> Result<Response<Statistics>, Status> {
        let member = self.get(&request.into_inner().name)?;
        member.statistics().await.map(Response::new)
    }

    type StreamConsoleStream = Responses<StreamConsoleResponse>;

    async fn stream_console(
        &self,
        request: Request<StreamConsoleRequest>,
    ) -> Result<Response<Self::StreamConsoleStream>, Status> {
        let request = request.into_inner();
        let member = self.get(&request.name)?;
        let stream = MachinesClient::new(member.channel.clone()).stream_console(request).await;
        let stream = stream.map_err(|error| member.explain(error))?.into_inner();
        Ok(pass_on(member, stream))
    }
}
