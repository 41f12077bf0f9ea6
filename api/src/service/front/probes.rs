//! The service Probes.

use std::sync::Arc;

use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::super::Responses;
use super::super::socket::Peer;
use super::{Front, pass_on};
use crate::contract::probes_client::ProbesClient;
use crate::contract::probes_server::Probes;
use crate::contract::{
    AddProbesRequest, AddProbesResponse, DisableProbesRequest, DisableProbesResponse, EnableProbesRequest,
    EnableProbesResponse, ExplainProbeRequest, ExplainProbeResponse, ListProbesRequest, ListProbesResponse,
    RemoveProbesRequest, RemoveProbesResponse,
};

/// A change that is written down.
struct Change<'a> {
    call: &'a str,
    machine: &'a str,
    what: String,
}

fn numbers(numbers: &[u32]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

impl Front {
    /// Has the machine's process do something.
    async fn ask<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        machine: &str,
        act: impl FnOnce(ProbesClient<Channel>) -> F,
    ) -> Result<Response<T>, Status> {
        let member = self.get(machine)?;
        let acted = act(ProbesClient::new(member.channel.clone())).await;
        acted.map(|it| Response::new(it.into_inner())).map_err(|error| member.explain(error))
    }

    /// The same, written down.
    async fn change_probes<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        peer: Option<Peer>,
        change: Change<'_>,
        act: impl FnOnce(ProbesClient<Channel>) -> F,
    ) -> Result<Response<T>, Status> {
        let result = self.ask(change.machine, act).await;
        self.audit.write(peer, change.call, change.machine, &change.what, &result);
        result
    }
}

#[tonic::async_trait]
impl Probes for Arc<Front> {
    async fn add_probes(
        &self,
        request: Request<AddProbesRequest>,
    ) -> Result<Response<AddProbesResponse>, Status> {
        let (peer, request) = (Peer::of(&request), request.into_inner());
        let machine = request.machine.clone();
        let change = Change { call: "AddProbes", machine: &machine, what: request.specs.join("; ") };
        self.change_probes(peer, change, |mut to| async move { to.add_probes(request).await }).await
    }

    type ExplainProbeStream = Responses<ExplainProbeResponse>;

    async fn explain_probe(
        &self,
        request: Request<ExplainProbeRequest>,
    ) -> Result<Response<Self::ExplainProbeStream>, Status> {
        let request = request.into_inner();
        let member = self.get(&request.machine)?;
        let stream = ProbesClient::new(member.channel.clone()).explain_probe(request).await;
        let stream = stream.map_err(|error| member.explain(error))?.into_inner();
        Ok(pass_on(member, stream))
    }

    async fn list_probes(
        &self,
        request: Request<ListProbesRequest>,
    ) -> Result<Response<ListProbesResponse>, Status> {
        let request = request.into_inner();
        let machine = request.machine.clone();
        self.ask(&machine, |mut to| async move { to.list_probes(request).await }).await
    }

    async fn enable_probes(
        &self,
        request: Request<EnableProbesRequest>,
    ) -> Result<Response<EnableProbesResponse>, Status> {
        let (peer, request) = (Peer::of(&request), request.into_inner());
        let machine = request.machine.clone();
        let change = Change { call: "EnableProbes", machine: &machine, what: numbers(&request.numbers) };
        self.change_probes(peer, change, |mut to| async move { to.enable_probes(request).await }).await
    }

    async fn disable_probes(
        &self,
        request: Request<DisableProbesRequest>,
    ) -> Result<Response<DisableProbesResponse>, Status> {
        let (peer, request) = (Peer::of(&request), request.into_inner());
        let machine = request.machine.clone();
        let change = Change { call: "DisableProbes", machine: &machine, what: numbers(&request.numbers) };
        self.change_probes(peer, change, |mut to| async move { to.disable_probes(request).await }).await
    }

    async fn remove_probes(
        &self,
        request: Request<RemoveProbesRequest>,
    ) -> Result<Response<RemoveProbesResponse>, Status> {
        let (peer, request) = (Peer::of(&request), request.into_inner());
        let machine = request.machine.clone();
        let change = Change { call: "RemoveProbes", machine: &machine, what: numbers(&request.numbers) };
        self.change_probes(peer, change, |mut to| async move { to.remove_probes(request).await }).await
    }
}
