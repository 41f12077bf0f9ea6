//! The service Probes.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::super::Responses;
use super::Front;
use super::gate::Call;
use super::members::Member;
use crate::contract::probes_server::Probes;
use crate::contract::{
    AddProbesRequest, AddProbesResponse, DisableProbesRequest, DisableProbesResponse, EnableProbesRequest,
    EnableProbesResponse, ExplainProbeRequest, ExplainProbeResponse, ListProbesRequest, ListProbesResponse,
    RemoveProbesRequest, RemoveProbesResponse,
};

#[tonic::async_trait]
impl Probes for Arc<Front> {
    async fn add_probes(
        &self,
        mut request: Request<AddProbesRequest>,
    ) -> Result<Response<AddProbesResponse>, Status> {
        let own_key = Call::of(&request)?.own_key(&request.get_ref().idempotency_key);
        request.get_mut().idempotency_key = own_key;
        self.pass(request, |member, it| async move { member.probes().add_probes(it).await }).await
    }

    type ExplainProbeStream = Responses<ExplainProbeResponse>;

    async fn explain_probe(
        &self,
        request: Request<ExplainProbeRequest>,
    ) -> Result<Response<Self::ExplainProbeStream>, Status> {
        self.stream(request, |member, it| async move { member.probes().explain_probe(it).await }).await
    }

    async fn list_probes(
        &self,
        request: Request<ListProbesRequest>,
    ) -> Result<Response<ListProbesResponse>, Status> {
        let list = |member: Arc<Member>, _| async move {
            let probes = member.list_probes().await?;
            Ok(Response::new(ListProbesResponse { probes }))
        };
        self.pass(request, list).await
    }

    async fn enable_probes(
        &self,
        request: Request<EnableProbesRequest>,
    ) -> Result<Response<EnableProbesResponse>, Status> {
        self.pass(request, |member, it| async move { member.probes().enable_probes(it).await }).await
    }

    async fn disable_probes(
        &self,
        request: Request<DisableProbesRequest>,
    ) -> Result<Response<DisableProbesResponse>, Status> {
        self.pass(request, |member, it| async move { member.probes().disable_probes(it).await }).await
    }

    async fn remove_probes(
        &self,
        request: Request<RemoveProbesRequest>,
    ) -> Result<Response<RemoveProbesResponse>, Status> {
        self.pass(request, |member, it| async move { member.probes().remove_probes(it).await }).await
    }
}
