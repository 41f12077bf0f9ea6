//! Metrics for Prometheus, in its text format (OpenMetrics 1.0), on an endpoint of their own.
//!
//! Each scrape asks the machines' processes anew; nothing is counted here, and no vCPU stops for it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use super::Front;
use super::members::Member;
use crate::contract::{Machine, Probe, Statistics};
use crate::exit::Failure;
use crate::images::chain;

/// How long a machine's process may take to answer; below what Prometheus waits for a scrape (10 s).
const PATIENCE: Duration = Duration::from_secs(5);

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;

/// A machine as its process describes it.
pub struct Seen {
    machine: Machine,
    /// `None` if its process is gone or does not answer.
    rest: Option<(Statistics, Vec<Probe>)>,
}

impl Seen {
    async fn of(member: Arc<Member>) -> Self {
        let asked = async {
            let machine = member.describe().await;
            let rest = match (member.statistics().await, member.list_probes().await) {
                (Ok(statistics), Ok(probes)) => Some((statistics, probes)),
                _ => None,
            };
            Self { machine, rest }
        };
        let late =
            || Self { machine: Machine { name: member.name.clone(), ..Machine::default() }, rest: None };
        tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| late())
    }
}

/// The metrics of all machines.
struct Metrics {
    registry: Registry,
    up: Family<Labels, Gauge>,
    states: Family<Labels, Gauge>,
    exits: Family<Labels, Counter>,
    events: Family<Labels, Counter>,
    hits: Family<Labels, Counter>,
    outcomes: Family<Labels, Counter>,
    executed: Family<Labels, Counter>,
    missed: Family<Labels, Counter>,
    timed: Family<Labels, Counter>,
    time: Family<Labels, Counter<f64, AtomicU64>>,
}

impl Metrics {
    fn new() -> Self {
        let mut registry = Registry::with_prefix("vmprobe");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "This vmprobe", build);
        macro_rules! family {
            ($name:literal, $help:literal) => {{
                let family = Family::default();
                registry.register($name, $help, family.clone());
                family
            }};
        }
        let up = family!("machine_up", "Whether the machine's process answers");
        let states = family!("machines", "Machines by state");
        let exits = family!("vcpu_exits", "How often a vCPU has left the guest, by reason");
        let events = family!("events", "Events of the machine's probes");
        let hits = family!("probe_hits", "How often a probe was reached while it was enabled");
        let outcomes = family!("probe_outcomes", "What became of a probe's hits; together they are its hits");
        let executed =
            family!("probe_executed", "How the displaced instruction ran: emulated is 1 exit, stepped 2");
        let missed = family!("probe_missed", "Calls whose return could not be awaited");
        let timed = family!("probe_timed_hits", "Hits whose time was taken, one of 64");
        let time =
            family!("probe_timed_seconds", "What the host spent on the timed hits, without exit and entry");
        Self { registry, up, states, exits, events, hits, outcomes, executed, missed, timed, time }
    }

    fn add(&self, seen: &Seen) {
        let machine = || ("machine", seen.machine.name.clone());
        let state = seen.machine.state().name().unwrap_or("unknown");
        self.states.get_or_create(&vec![("state", state.to_owned())]).inc();
        self.up.get_or_create(&vec![machine()]).set(seen.rest.is_some().into());
        let Some((statistics, probes)) = &seen.rest else { return };
        self.events.get_or_create(&vec![machine()]).inc_by(statistics.events);
        for vcpu in &statistics.vcpus {
            for exit in &vcpu.exits {
                let labels =
                    vec![machine(), ("vcpu", vcpu.number.to_string()), ("reason", exit.reason.clone())];
                self.exits.get_or_create(&labels).inc_by(exit.count);
            }
        }
        for probe in probes {
            self.add_probe(
                &[machine(), ("probe", probe.number.to_string()), ("place", probe.place.clone())],
                probe,
            );
        }
    }

    fn add_probe(&self, labels: &[(&'static str, String)], probe: &Probe) {
        let counts = probe.counts.unwrap_or_default();
        let with = |name, value: &str| [labels, &[(name, value.to_owned())]].concat();
        let labels = labels.to_vec();
        self.hits.get_or_create(&labels).inc_by(counts.hits);
        for (outcome, count) in
            [("delivered", counts.delivered), ("filtered", counts.filtered), ("lost", counts.lost)]
        {
            self.outcomes.get_or_create(&with("outcome", outcome)).inc_by(count);
        }
        for (how, count) in
            [("emulated", counts.emulated), ("stepped", counts.stepped), ("faulted", counts.faulted)]
        {
            self.executed.get_or_create(&with("how", how)).inc_by(count);
        }
        self.missed.get_or_create(&labels).inc_by(counts.missed);
        self.timed.get_or_create(&labels).inc_by(counts.timed);
        self.time.get_or_create(&labels).inc_by(Duration::from_nanos(counts.timed_ns).as_secs_f64());
    }
}

/// What Prometheus reads.
///
/// # Errors
/// A label cannot be written; none is known that cannot.
fn text(machines: &[Seen]) -> Result<String, std::fmt::Error> {
    let metrics = Metrics::new();
    machines.iter().for_each(|seen| metrics.add(seen));
    let mut text = String::new();
    encode(&mut text, &metrics.registry)?;
    Ok(text)
}

async fn scrape(State(front): State<Arc<Front>>) -> Response {
    let seen = futures_util::future::join_all(front.all().into_iter().map(Seen::of)).await;
    match text(&seen) {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// Serves the metrics until the service ends. Returns where, which says which port where 0 was asked for.
///
/// # Errors
/// Nothing can listen at the address.
pub async fn serve(address: SocketAddr, front: Arc<Front>) -> Result<SocketAddr, Failure> {
    let failure = |error: &std::io::Error| {
        Failure::Usage(format!("--metrics {address}: cannot listen there: {}", chain(error)))
    };
    let listener = TcpListener::bind(address).await.map_err(|error| failure(&error))?;
    let address = listener.local_addr().map_err(|error| failure(&error))?;
    let router = Router::new().route("/metrics", get(scrape)).with_state(front);
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{ExitCount, MachineState, ProbeCounts, VcpuExits};

    fn seen() -> Seen {
        let exits = vec![ExitCount { reason: "debug".to_owned(), count: 7 }];
        let statistics =
            Statistics { vcpus: vec![VcpuExits { number: 1, exits }], events: 5, console_bytes: 0 };
        let counts = ProbeCounts {
            hits: 5,
            delivered: 4,
            lost: 1,
            timed: 2,
            timed_ns: 3_000,
            ..ProbeCounts::default()
        };
        let probe = Probe { place: "a\"b\\c\n".to_owned(), counts: Some(counts), ..Probe::default() };
        let machine =
            Machine { name: "t".to_owned(), state: MachineState::Running.into(), ..Machine::default() };
        Seen { machine, rest: Some((statistics, vec![probe])) }
    }

    #[test]
    fn machines_and_probes_are_told_with_their_labels() {
        let gone = Machine { name: "g".to_owned(), state: MachineState::Failed.into(), ..Machine::default() };
        let text = text(&[seen(), Seen { machine: gone, rest: None }]).unwrap();
        for line in [
            "vmprobe_machine_up{machine=\"t\"} 1",
            "vmprobe_machine_up{machine=\"g\"} 0",
            "vmprobe_machines{state=\"running\"} 1",
            "vmprobe_machines{state=\"failed\"} 1",
            "vmprobe_vcpu_exits_total{machine=\"t\",vcpu=\"1\",reason=\"debug\"} 7",
            "vmprobe_events_total{machine=\"t\"} 5",
            "vmprobe_probe_hits_total{machine=\"t\",probe=\"0\",place=\"a\\\"b\\\\c\\n\"} 5",
            "# EOF",
        ] {
            assert!(text.lines().any(|one| one == line), "{line}\n{text}");
        }
    }
}
