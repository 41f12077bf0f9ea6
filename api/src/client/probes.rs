//! `vmprobe probe`.

use serde::Serialize;
use tonic::transport::Channel;

use super::with_service;
use crate::cli::{Explained, Output, ProbeArgs, ProbeCommand};
use crate::contract::probes_client::ProbesClient;
use crate::contract::{
    AddProbesRequest, DisableProbesRequest, EnableProbesRequest, ExplainProbeRequest, Explanation,
    ListProbesRequest, Probe, ProbeState, RemoveProbesRequest,
};
use crate::exit::{Code, Failure};
use crate::explain;
use crate::output::json_lines;

pub fn probe(args: &ProbeArgs) -> Result<Code, Failure> {
    with_service(&args.service, |channel| command(ProbesClient::new(channel), args))
}

async fn explained(
    mut client: ProbesClient<Channel>,
    vm: &str,
    what: &Explained,
) -> Result<Vec<Explanation>, Failure> {
    let request =
        ExplainProbeRequest { machine: vm.to_owned(), spec: what.spec.clone(), every_instruction: what.all };
    let mut stream = client.explain_probe(request).await?.into_inner();
    let mut found = Vec::new();
    while let Some(response) = stream.message().await? {
        found.extend(response.explanations);
    }
    Ok(found)
}

async fn command(mut client: ProbesClient<Channel>, args: &ProbeArgs) -> Result<Code, Failure> {
    let probes = match &args.command {
        ProbeCommand::Add { vm, specs } => {
            let request = AddProbesRequest {
                machine: vm.clone(),
                specs: specs.clone(),
                idempotency_key: String::new(),
            };
            let response = client.add_probes(request).await?.into_inner();
            for note in &response.notes {
                eprintln!("vmprobe: {note}");
            }
            response.probes
        }
        ProbeCommand::Ls { vm } => {
            client.list_probes(ListProbesRequest { machine: vm.clone() }).await?.into_inner().probes
        }
        ProbeCommand::Enable { vm, numbers } => {
            let request = EnableProbesRequest { machine: vm.clone(), numbers: numbers.clone() };
            client.enable_probes(request).await?.into_inner().probes
        }
        ProbeCommand::Disable { vm, numbers } => {
            let request = DisableProbesRequest { machine: vm.clone(), numbers: numbers.clone() };
            client.disable_probes(request).await?.into_inner().probes
        }
        ProbeCommand::Rm { vm, numbers } => {
            let request = RemoveProbesRequest { machine: vm.clone(), numbers: numbers.clone() };
            client.remove_probes(request).await?.into_inner().probes
        }
        ProbeCommand::Explain { vm, what } => {
            return explain::show(explained(client, vm, what).await, what, args.output);
        }
    };
    match args.output {
        Output::Json => json_lines(probes.iter().map(Line::of))?,
        Output::Text => text(&probes),
    }
    Ok(Code::Done)
}

fn state_name(probe: &Probe) -> &'static str {
    match probe.state() {
        ProbeState::Unspecified => "?",
        ProbeState::Enabled => "enabled",
        ProbeState::Disabled => "disabled",
        ProbeState::Removed => "removed",
    }
}

fn text(probes: &[Probe]) {
    if probes.is_empty() {
        return;
    }
    println!(
        "{:>6} {:8} {:>10} {:>10} {:>10} {:>8} PLACE",
        "NUMBER", "STATE", "HITS", "DELIVERED", "FILTERED", "LOST"
    );
    for probe in probes {
        let counts = probe.counts.unwrap_or_default();
        println!(
            "{:>6} {:8} {:>10} {:>10} {:>10} {:>8} {}",
            probe.number,
            state_name(probe),
            counts.hits,
            counts.delivered,
            counts.filtered,
            counts.lost,
            probe.place
        );
    }
}

#[derive(Serialize)]
struct Line<'a> {
    number: u32,
    spec: &'a str,
    place: &'a str,
    state: &'static str,
    hits: u64,
    delivered: u64,
    filtered: u64,
    lost: u64,
    emulated: u64,
    stepped: u64,
    faulted: u64,
    entered: u64,
    missed: u64,
}

impl<'a> Line<'a> {
    fn of(probe: &'a Probe) -> Self {
        let counts = probe.counts.unwrap_or_default();
        Self {
            number: probe.number,
            spec: &probe.spec,
            place: &probe.place,
            state: state_name(probe),
            hits: counts.hits,
            delivered: counts.delivered,
            filtered: counts.filtered,
            lost: counts.lost,
            emulated: counts.emulated,
            stepped: counts.stepped,
            faulted: counts.faulted,
            entered: counts.entered,
            missed: counts.missed,
        }
    }
}
