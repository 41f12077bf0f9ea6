//! The service Events, for the one machine.

use std::collections::BTreeSet;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::super::{Responses, status};
use super::Worker;
use crate::contract::events_server::Events;
use crate::contract::{Event, StreamEventsRequest, StreamEventsResponse, Value};
use crate::output::{arguments, duration_ns};
use crate::vm::{Hit, Vm};

/// Events of a response at most: some 300 KiB, well below what clients take.
const BATCH: usize = 1000;

/// Where a client is in a machine's events.
struct Position {
    vm: Arc<Vm>,
    probes: BTreeSet<u32>,
    without_registers: bool,
    next: u64,
    delivered: u64,
    filtered: u64,
    lost: u64,
    /// The first response has been sent.
    begun: bool,
    ended: bool,
}

impl Position {
    /// The next response; `None` behind the last.
    async fn advance(mut self) -> Option<(Result<StreamEventsResponse, Status>, Self)> {
        if self.ended {
            return None;
        }
        let mut events = Vec::new();
        if self.begun {
            let page = self.vm.events.wait(self.next, BATCH).await;
            self.ended = page.closed;
            self.lost += page.lost;
            self.next = page.from + page.items.len() as u64;
            for (sequence, hit) in (page.from..).zip(&page.items) {
                if self.probes.is_empty() || self.probes.contains(&hit.event.probe) {
                    events.push(event(sequence, hit, self.without_registers));
                } else {
                    self.filtered += 1;
                }
            }
            self.delivered += events.len() as u64;
        }
        self.begun = true;
        let response = StreamEventsResponse {
            events,
            next_sequence: self.next,
            delivered: self.delivered,
            filtered: self.filtered,
            lost: self.lost,
        };
        Some((Ok(response), self))
    }
}

fn event(sequence: u64, hit: &Hit, without_registers: bool) -> Event {
    let Hit { event, label } = hit;
    let values = arguments(event, label).unwrap_or_default();
    let duration_ns = duration_ns(event);
    Event {
        sequence,
        time_ns: event.ts_ns,
        probe: event.probe,
        vcpu: event.vcpu.0,
        ip: event.regs.rip,
        place: label.place.clone(),
        values: values.into_iter().map(|(name, value)| Value { name: name.to_owned(), value }).collect(),
        duration_ns,
        return_value: duration_ns.map(|_| event.regs.rax),
        registers: (!without_registers).then(|| event.regs.into()),
    }
}

#[tonic::async_trait]
impl Events for Arc<Worker> {
    type StreamEventsStream = Responses<StreamEventsResponse>;

    async fn stream_events(
        &self,
        request: Request<StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let StreamEventsRequest { machine, probes, from_sequence, without_registers } = request.into_inner();
        let vm = Arc::clone(&self.get(&machine)?.vm);
        let end = vm.events.next();
        let next = from_sequence.unwrap_or(end);
        if next > end {
            return Err(status::beyond(next, end));
        }
        let position = Position {
            vm,
            probes: probes.into_iter().collect(),
            without_registers,
            next,
            delivered: 0,
            filtered: 0,
            lost: 0,
            begun: false,
            ended: false,
        };
        Ok(Response::new(Box::pin(futures_util::stream::unfold(position, Position::advance))))
    }
}
