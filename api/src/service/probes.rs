//! The service Probes.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response, Status};

use super::registry::{Answer, Registry, blocking};
use super::socket::Peer;
use crate::contract::probes_server::Probes;
use crate::contract::{
    AddProbesRequest, AddProbesResponse, DisableProbesRequest, DisableProbesResponse, EnableProbesRequest,
    EnableProbesResponse, ListProbesRequest, ListProbesResponse, Probe, ProbeCounts, ProbeState,
    RemoveProbesRequest, RemoveProbesResponse,
};
use crate::vm::{ProbeStatus, Vm, VmError};

impl From<ProbeStatus> for Probe {
    fn from(status: ProbeStatus) -> Self {
        let counts = status.counts;
        let state = match (status.removed, status.enabled) {
            (true, _) => ProbeState::Removed,
            (false, true) => ProbeState::Enabled,
            (false, false) => ProbeState::Disabled,
        };
        Self {
            number: status.number,
            spec: status.label.spec.clone(),
            place: status.label.place.clone(),
            state: state.into(),
            counts: Some(ProbeCounts {
                hits: counts.hits,
                delivered: counts.delivered,
                filtered: counts.filtered,
                lost: counts.lost,
                emulated: counts.emulated,
                stepped: counts.stepped,
                faulted: counts.faulted,
                entered: counts.entered,
                missed: counts.missed,
            }),
        }
    }
}

fn messages(statuses: Vec<ProbeStatus>) -> Vec<Probe> {
    statuses.into_iter().map(Probe::from).collect()
}

impl Registry {
    async fn add(&self, request: AddProbesRequest) -> Result<AddProbesResponse, Status> {
        let encoded = request.encode_to_vec();
        let AddProbesRequest { machine, specs, idempotency_key: key } = request;
        let _making = if key.is_empty() { None } else { Some(self.making.lock().await) };
        if let Some(Answer::Probes(response)) = self.answered(&key, &encoded)? {
            return Ok(response);
        }
        let member = self.get(&machine)?;
        let (probes, notes) = blocking(move || member.vm.add(&specs)).await?;
        let response = AddProbesResponse { probes: messages(probes), notes };
        self.remember(&key, encoded, Answer::Probes(response.clone()));
        Ok(response)
    }

    /// Does something with some probes of a machine and writes it down.
    async fn change_probes(
        &self,
        peer: Option<Peer>,
        call: &str,
        machine: &str,
        numbers: Vec<u32>,
        act: impl FnOnce(&Vm, &[u32]) -> Result<Vec<ProbeStatus>, VmError> + Send + 'static,
    ) -> Result<Vec<Probe>, Status> {
        let what = numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let result = match self.get(machine) {
            Ok(member) => blocking(move || act(&member.vm, &numbers)).await.map(messages),
            Err(status) => Err(status),
        };
        self.audit.write(peer, call, machine, &what, &result);
        result
    }
}

#[tonic::async_trait]
impl Probes for Arc<Registry> {
    async fn add_probes(
        &self,
        request: Request<AddProbesRequest>,
    ) -> Result<Response<AddProbesResponse>, Status> {
        let peer = Peer::of(&request);
        let request = request.into_inner();
        let (machine, what) = (request.machine.clone(), request.specs.join("; "));
        let result = self.add(request).await;
        self.audit.write(peer, "AddProbes", &machine, &what, &result);
        result.map(Response::new)
    }

    async fn list_probes(
        &self,
        request: Request<ListProbesRequest>,
    ) -> Result<Response<ListProbesResponse>, Status> {
        let member = self.get(&request.into_inner().machine)?;
        let probes = blocking(move || Ok::<_, Status>(messages(member.vm.probes()))).await?;
        Ok(Response::new(ListProbesResponse { probes }))
    }

    async fn enable_probes(
        &self,
        request: Request<EnableProbesRequest>,
    ) -> Result<Response<EnableProbesResponse>, Status> {
        let peer = Peer::of(&request);
        let EnableProbesRequest { machine, numbers } = request.into_inner();
        let enable = |vm: &Vm, numbers: &[u32]| vm.set_enabled(numbers, true);
        let probes = self.change_probes(peer, "EnableProbes", &machine, numbers, enable).await?;
        Ok(Response::new(EnableProbesResponse { probes }))
    }

    async fn disable_probes(
        &self,
        request: Request<DisableProbesRequest>,
    ) -> Result<Response<DisableProbesResponse>, Status> {
        let peer = Peer::of(&request);
        let DisableProbesRequest { machine, numbers } = request.into_inner();
        let disable = |vm: &Vm, numbers: &[u32]| vm.set_enabled(numbers, false);
        let probes = self.change_probes(peer, "DisableProbes", &machine, numbers, disable).await?;
        Ok(Response::new(DisableProbesResponse { probes }))
    }

    async fn remove_probes(
        &self,
        request: Request<RemoveProbesRequest>,
    ) -> Result<Response<RemoveProbesResponse>, Status> {
        let peer = Peer::of(&request);
        let RemoveProbesRequest { machine, numbers } = request.into_inner();
        let probes = self.change_probes(peer, "RemoveProbes", &machine, numbers, Vm::remove).await?;
        Ok(Response::new(RemoveProbesResponse { probes }))
    }
}
