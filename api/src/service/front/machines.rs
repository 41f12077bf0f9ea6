//! The service Machines.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response, Status};

use super::super::{Responses, status};
use super::calls::About;
use super::gate::Call;
use super::members::{self, Member};
use super::{Front, carry_out, journals};
use crate::contract::machines_server::Machines;
use crate::contract::{
    CreateMachineRequest, DeleteMachineRequest, DeleteMachineResponse, DumpMachineRequest,
    DumpMachineResponse, GetMachineRequest, GetStatisticsRequest, ListMachinesRequest, ListMachinesResponse,
    Machine, PauseMachineRequest, ResumeMachineRequest, SaveMachineRequest, SaveMachineResponse,
    StartMachineRequest, Statistics, StopMachineRequest, StreamConsoleRequest, StreamConsoleResponse,
    WriteConsoleRequest, WriteConsoleResponse,
};

/// Characters of a name at most.
const MAX_NAME: usize = 63;

/// # Errors
/// INVALID_ARGUMENT.
pub fn check_name(name: &str) -> Result<(), Status> {
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

    async fn create(&self, call: &Call, request: CreateMachineRequest) -> Result<Machine, Status> {
        let encoded = request.encode_to_vec();
        let CreateMachineRequest { name, spec, idempotency_key } = request;
        let make = async {
            // Names are given one after the other.
            let _naming = self.naming.lock().await;
            let name = if name.is_empty() { self.free_name() } else { name };
            call.check(&name)?;
            check_name(&name)?;
            if self.lock().contains_key(&name) {
                return Err(status::name_taken(&name));
            }
            let spec = spec.ok_or_else(|| status::invalid("The request has no spec"))?;
            let (cgroups, journals) = (self.cgroups.as_ref(), self.journals.as_ref());
            let (member, machine) = members::start(&self.dir, cgroups, journals, name, spec).await?;
            self.lock().insert(member.name.clone(), member);
            Ok(machine)
        };
        let machine = self.answers.once(&call.own_key(&idempotency_key), encoded, make).await?;
        // The answer may be an earlier one, from when the client had more rights.
        call.check(&machine.name)?;
        Ok(machine)
    }
}

#[tonic::async_trait]
impl Machines for Arc<Front> {
    async fn create_machine(
        &self,
        request: Request<CreateMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        let (call, request, front) = (Call::of(&request)?, request.into_inner(), Self::clone(self));
        carry_out(async move {
            let (asked, what) = (request.name.clone(), request.what());
            let result = front.create(&call, request).await;
            let name = result.as_ref().map_or(&asked, |machine| &machine.name);
            front.audit.note(&call.who, call.rule, name, &what, &result);
            result.map(Response::new)
        })
        .await
    }

    async fn list_machines(
        &self,
        request: Request<ListMachinesRequest>,
    ) -> Result<Response<ListMachinesResponse>, Status> {
        let members = self.seen_by(&Call::of(&request)?);
        let machines = futures_util::future::join_all(members.iter().map(|member| member.describe())).await;
        Ok(Response::new(ListMachinesResponse { machines }))
    }

    async fn get_machine(&self, request: Request<GetMachineRequest>) -> Result<Response<Machine>, Status> {
        self.pass(request, |member, _| async move { Ok(Response::new(member.describe().await)) }).await
    }

    async fn start_machine(
        &self,
        request: Request<StartMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        self.pass(request, |member, it| async move { member.machines().start_machine(it).await }).await
    }

    async fn pause_machine(
        &self,
        request: Request<PauseMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        self.pass(request, |member, it| async move { member.machines().pause_machine(it).await }).await
    }

    async fn resume_machine(
        &self,
        request: Request<ResumeMachineRequest>,
    ) -> Result<Response<Machine>, Status> {
        self.pass(request, |member, it| async move { member.machines().resume_machine(it).await }).await
    }

    async fn stop_machine(&self, request: Request<StopMachineRequest>) -> Result<Response<Machine>, Status> {
        self.pass(request, |member, it| async move { member.machines().stop_machine(it).await }).await
    }

    async fn delete_machine(
        &self,
        request: Request<DeleteMachineRequest>,
    ) -> Result<Response<DeleteMachineResponse>, Status> {
        let front = Self::clone(self);
        let delete = |member: Arc<Member>, _| async move {
            member.delete().await?;
            if let Some(journal) = member.journal.clone() {
                let removed = tokio::task::spawn_blocking(move || journals::remove(&journal)).await;
                removed.map_err(|_| status::internal())??;
            }
            front.forget(&member);
            Ok(Response::new(DeleteMachineResponse {}))
        };
        self.pass(request, delete).await
    }

    async fn get_statistics(
        &self,
        request: Request<GetStatisticsRequest>,
    ) -> Result<Response<Statistics>, Status> {
        self.pass(request, |member, it| async move { member.machines().get_statistics(it).await }).await
    }

    async fn write_console(
        &self,
        request: Request<WriteConsoleRequest>,
    ) -> Result<Response<WriteConsoleResponse>, Status> {
        self.pass(request, |member, it| async move { member.machines().write_console(it).await }).await
    }

    type SaveMachineStream = Responses<SaveMachineResponse>;

    async fn save_machine(
        &self,
        request: Request<SaveMachineRequest>,
    ) -> Result<Response<Self::SaveMachineStream>, Status> {
        self.stream(request, |member, it| async move { member.machines().save_machine(it).await }).await
    }

    type DumpMachineStream = Responses<DumpMachineResponse>;

    async fn dump_machine(
        &self,
        request: Request<DumpMachineRequest>,
    ) -> Result<Response<Self::DumpMachineStream>, Status> {
        self.stream(request, |member, it| async move { member.machines().dump_machine(it).await }).await
    }

    type StreamConsoleStream = Responses<StreamConsoleResponse>;

    async fn stream_console(
        &self,
        request: Request<StreamConsoleRequest>,
    ) -> Result<Response<Self::StreamConsoleStream>, Status> {
        self.stream(request, |member, it| async move { member.machines().stream_console(it).await }).await
    }
}
