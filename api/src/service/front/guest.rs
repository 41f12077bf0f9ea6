//! The service Guest.

use std::sync::Arc;

use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::super::Responses;
use super::super::socket::Peer;
use super::{Front, pass_on};
use crate::contract::guest_address::Where;
use crate::contract::guest_client::GuestClient;
use crate::contract::guest_server::Guest;
use crate::contract::{
    GetRegistersRequest, GetRegistersResponse, GuestAddress, ListSymbolsRequest, ListSymbolsResponse,
    ReadMemoryRequest, ReadMemoryResponse, SetRegistersRequest, SetRegistersResponse, TranslateRequest,
    TranslateResponse, WriteMemoryRequest, WriteMemoryResponse,
};

/// An address for the audit log.
fn place(address: Option<&GuestAddress>) -> String {
    match address.and_then(|address| address.r#where.as_ref()) {
        Some(Where::Linear(gva)) => format!("{gva:#x}"),
        Some(Where::Physical(gpa)) => format!("physical {gpa:#x}"),
        Some(Where::Symbol(text)) => text.clone(),
        None => String::new(),
    }
}

impl Front {
    /// Has the machine's process do something with its guest.
    async fn of_guest<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        machine: &str,
        act: impl FnOnce(GuestClient<Channel>) -> F,
    ) -> Result<Response<T>, Status> {
        let member = self.get(machine)?;
        let acted = act(GuestClient::new(member.channel.clone())).await;
        acted.map(|it| Response::new(it.into_inner())).map_err(|error| member.explain(error))
    }
}

#[tonic::async_trait]
impl Guest for Arc<Front> {
    type ListSymbolsStream = Responses<ListSymbolsResponse>;

    async fn list_symbols(
        &self,
        request: Request<ListSymbolsRequest>,
    ) -> Result<Response<Self::ListSymbolsStream>, Status> {
        let request = request.into_inner();
        let member = self.get(&request.machine)?;
        let stream = GuestClient::new(member.channel.clone()).list_symbols(request).await;
        let stream = stream.map_err(|error| member.explain(error))?.into_inner();
        Ok(pass_on(member, stream))
    }

    async fn get_registers(
        &self,
        request: Request<GetRegistersRequest>,
    ) -> Result<Response<GetRegistersResponse>, Status> {
        let request = request.into_inner();
        let machine = request.machine.clone();
        self.of_guest(&machine, |mut to| async move { to.get_registers(request).await }).await
    }

    async fn set_registers(
        &self,
        request: Request<SetRegistersRequest>,
    ) -> Result<Response<SetRegistersResponse>, Status> {
        let (peer, request) = (Peer::of(&request), request.into_inner());
        let (machine, what) = (request.machine.clone(), format!("vCPU {}", request.vcpu));
        let result = self.of_guest(&machine, |mut to| async move { to.set_registers(request).await }).await;
        self.audit.write(peer, "SetRegisters", &machine, &what, &result);
        result
    }

    async fn translate(
        &self,
        request: Request<TranslateRequest>,
    ) -> Result<Response<TranslateResponse>, Status> {
        let request = request.into_inner();
        let machine = request.machine.clone();
        self.of_guest(&machine, |mut to| async move { to.translate(request).await }).await
    }

    async fn read_memory(
        &self,
        request: Request<ReadMemoryRequest>,
    ) -> Result<Response<ReadMemoryResponse>, Status> {
        let request = request.into_inner();
        let machine = request.machine.clone();
        self.of_guest(&machine, |mut to| async move { to.read_memory(request).await }).await
    }

    async fn write_memory(
        &self,
        request: Request<WriteMemoryRequest>,
    ) -> Result<Response<WriteMemoryResponse>, Status> {
        let (peer, request) = (Peer::of(&request), request.into_inner());
        let machine = request.machine.clone();
        let what = format!("{} bytes at {}", request.data.len(), place(request.address.as_ref()));
        let result = self.of_guest(&machine, |mut to| async move { to.write_memory(request).await }).await;
        self.audit.write(peer, "WriteMemory", &machine, &what, &result);
        result
    }
}
