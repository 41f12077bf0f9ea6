//! The service Probes, for the one machine.

use std::sync::Arc;

use prost::Message;
use tonic::{Request, Response, Status};

use super::super::Responses;
use super::{Worker, blocking, in_responses};
use crate::contract::probes_server::Probes;
use crate::contract::{
    AddProbesRequest, AddProbesResponse, DisableProbesRequest, DisableProbesResponse, EnableProbesRequest,
    EnableProbesResponse, ExplainProbeRequest, ExplainProbeResponse, ListProbesRequest, ListProbesResponse,
    Probe, ProbeCounts, ProbeState, RemoveProbesRequest, RemoveProbesResponse,
};
use crate::explain;
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
                timed: status.timed.hits,
                timed_ns: status.timed.time,
            }),
        }
    }
}

fn messages(statuses: Vec<ProbeStatus>) -> Vec<Probe> {
    statuses.into_iter().map(Probe::from).collect()
}

impl Worker {
    /// Does something with some of the machine's probes.
    async fn change_probes(
        &self,
        machine: &str,
        numbers: Vec<u32>,
        act: impl FnOnce(&Vm, &[u32]) -> Result<Vec<ProbeStatus>, VmError> + Send + 'static,
    ) -> Result<Vec<Probe>, Status> {
        let member = self.get(machine)?;
        let changed = blocking(move || {
            let statuses = act(&member.vm, &numbers)?;
            member.probes_changed();
            Ok::<_, VmError>(statuses)
        });
        changed.await.map(messages)
    }
}

#[tonic::async_trait]
impl Probes for Arc<Worker> {
    async fn add_probes(
        &self,
        request: Request<AddProbesRequest>,
    ) -> Result<Response<AddProbesResponse>, Status> {
        let request = request.into_inner();
        let encoded = request.encode_to_vec();
        let AddProbesRequest { machine, specs, idempotency_key } = request;
        let member = self.get(&machine)?;
        let make = async {
            let added = blocking(move || {
                let added = member.vm.add(&specs)?;
                member.probes_changed();
                Ok::<_, VmError>(added)
            });
            let (probes, notes) = added.await?;
            Ok(AddProbesResponse { probes: messages(probes), notes })
        };
        self.answers.once(&idempotency_key, encoded, make).await.map(Response::new)
    }

    type ExplainProbeStream = Responses<ExplainProbeResponse>;

    async fn explain_probe(
        &self,
        request: Request<ExplainProbeRequest>,
    ) -> Result<Response<Self::ExplainProbeStream>, Status> {
        let ExplainProbeRequest { machine, spec, every_instruction } = request.into_inner();
        let member = self.get(&machine)?;
        let found = blocking(move || explain::find(member.vm.guest(), &spec, every_instruction)).await?;
        let respond = |explanations| ExplainProbeResponse { explanations };
        Ok(Response::new(in_responses(&found, respond)))
    }

    async fn list_probes(
        &self,
        request: Request<ListProbesRequest>,
    ) -> Result<Response<ListProbesResponse>, Status> {
        let ListProbesRequest { machine } = request.into_inner();
        let member = self.get(&machine)?;
        let probes = blocking(move || Ok::<_, VmError>(member.vm.probes())).await?;
        Ok(Response::new(ListProbesResponse { probes: messages(probes) }))
    }

    async fn enable_probes(
        &self,
        request: Request<EnableProbesRequest>,
    ) -> Result<Response<EnableProbesResponse>, Status> {
        let EnableProbesRequest { machine, numbers } = request.into_inner();
        let enable = |vm: &Vm, numbers: &[u32]| vm.set_enabled(numbers, true);
        let probes = self.change_probes(&machine, numbers, enable).await?;
        Ok(Response::new(EnableProbesResponse { probes }))
    }

    async fn disable_probes(
        &self,
        request: Request<DisableProbesRequest>,
    ) -> Result<Response<DisableProbesResponse>, Status> {
        let DisableProbesRequest { machine, numbers } = request.into_inner();
        let disable = |vm: &Vm, numbers: &[u32]| vm.set_enabled(numbers, false);
        let probes = self.change_probes(&machine, numbers, disable).await?;
        Ok(Response::new(DisableProbesResponse { probes }))
    }

    async fn remove_probes(
        &self,
        request: Request<RemoveProbesRequest>,
    ) -> Result<Response<RemoveProbesResponse>, Status> {
        let RemoveProbesRequest { machine, numbers } = request.into_inner();
        let probes = self.change_probes(&machine, numbers, Vm::remove).await?;
        Ok(Response::new(RemoveProbesResponse { probes }))
    }
}
