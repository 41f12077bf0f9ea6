//! The service Guest.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::super::Responses;
use super::Front;
use crate::contract::guest_server::Guest;
use crate::contract::{
    GetRegistersRequest, GetRegistersResponse, ListSymbolsRequest, ListSymbolsResponse, ReadMemoryRequest,
    ReadMemoryResponse, SetRegistersRequest, SetRegistersResponse, TranslateRequest, TranslateResponse,
    WriteMemoryRequest, WriteMemoryResponse,
};

#[tonic::async_trait]
impl Guest for Arc<Front> {
    type ListSymbolsStream = Responses<ListSymbolsResponse>;

    async fn list_symbols(
        &self,
        request: Request<ListSymbolsRequest>,
    ) -> Result<Response<Self::ListSymbolsStream>, Status> {
        self.stream(request, |member, it| async move { member.guest().list_symbols(it).await }).await
    }

    async fn get_registers(
        &self,
        request: Request<GetRegistersRequest>,
    ) -> Result<Response<GetRegistersResponse>, Status> {
        self.pass(request, |member, it| async move { member.guest().get_registers(it).await }).await
    }

    async fn set_registers(
        &self,
        request: Request<SetRegistersRequest>,
    ) -> Result<Response<SetRegistersResponse>, Status> {
        self.pass(request, |member, it| async move { member.guest().set_registers(it).await }).await
    }

    async fn translate(
        &self,
        request: Request<TranslateRequest>,
    ) -> Result<Response<TranslateResponse>, Status> {
        self.pass(request, |member, it| async move { member.guest().translate(it).await }).await
    }

    async fn read_memory(
        &self,
        request: Request<ReadMemoryRequest>,
    ) -> Result<Response<ReadMemoryResponse>, Status> {
        self.pass(request, |member, it| async move { member.guest().read_memory(it).await }).await
    }

    async fn write_memory(
        &self,
        request: Request<WriteMemoryRequest>,
    ) -> Result<Response<WriteMemoryResponse>, Status> {
        self.pass(request, |member, it| async move { member.guest().write_memory(it).await }).await
    }
}
