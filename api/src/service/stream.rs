//! Where a client is in a machine's events, and what it is sent.

use std::collections::BTreeSet;
use std::sync::Arc;

use tonic::{Response, Status};

use super::journal::{Cursor, Left};
use super::worker::Member;
use super::{Responses, status};
use crate::contract::{Event, StreamEventsRequest, StreamEventsResponse, Value};
use crate::exit::Failure;
use crate::output::{arguments, duration_ns};
use crate::vm::{Hit, Page};

/// Events of a response at most: some 300 KiB, well below what clients take.
pub const BATCH: usize = 1000;

/// Where events come from.
enum Source {
    /// A machine of this process; what memory no longer holds is looked for in the journal.
    Live { member: Arc<Member>, journal: Option<Cursor> },
    /// What a machine's process has left.
    Left { journal: Option<Cursor>, next: u64 },
}

/// An event as it is kept in memory, or in the journal.
enum Kept {
    Hit(Hit),
    Event(Box<Event>),
}

impl Kept {
    fn probe(&self) -> u32 {
        match self {
            Kept::Hit(hit) => hit.event.probe,
            Kept::Event(event) => event.probe,
        }
    }

    fn event(self, sequence: u64, without_registers: bool) -> Event {
        match self {
            Kept::Hit(hit) => event(sequence, &hit, without_registers),
            Kept::Event(event) if without_registers => Event { registers: None, ..*event },
            Kept::Event(event) => *event,
        }
    }
}

impl<T> Page<T> {
    fn map<U>(self, with: impl FnMut(T) -> U) -> Page<U> {
        let Page { from, items, lost, closed } = self;
        Page { from, items: items.into_iter().map(with).collect(), lost, closed }
    }
}

/// Reads from a journal, on a thread that may wait.
async fn read(journal: &mut Option<Cursor>, from: u64, limit: u64) -> Result<Page<Event>, Status> {
    let Some(mut cursor) = journal.take() else { return Err(status::internal()) };
    let read = tokio::task::spawn_blocking(move || {
        let page = cursor.page(from, BATCH, limit);
        (cursor, page)
    });
    let (cursor, page) = read.await.map_err(|_| status::internal())?;
    *journal = Some(cursor);
    page.map_err(|error| Failure::Host(error.to_string()).into())
}

fn journaled(event: Event) -> Kept {
    Kept::Event(Box::new(event))
}

impl Source {
    /// All events below it are on disk for good.
    fn durable(&self) -> Option<u64> {
        match self {
            Source::Live { member, .. } => member.journal.as_ref().map(|journal| journal.durable()),
            Source::Left { next, .. } => Some(*next),
        }
    }

    /// Events from `from` on, once there are some, or more are durable than `told`, or there will be no more.
    async fn page(&mut self, from: u64, told: Option<u64>) -> Result<Page<Kept>, Status> {
        match self {
            Source::Live { member, journal } => {
                let Some(writer) = &member.journal else {
                    return Ok(member.vm.events.wait(from, BATCH).await.map(Kept::Hit));
                };
                let page = tokio::select! {
                    page = member.vm.events.wait(from, BATCH) => page,
                    () = writer.beyond(told, from) => Page { from, items: Vec::new(), lost: 0, closed: false },
                };
                if page.lost > 0 {
                    let kept = read(journal, from, writer.durable()).await?;
                    if !kept.items.is_empty() && kept.from < page.from {
                        return Ok(Page { closed: false, ..kept.map(journaled) });
                    }
                }
                if page.closed {
                    writer.finished().await;
                }
                Ok(page.map(Kept::Hit))
            }
            Source::Left { journal, next } => Ok(read(journal, from, *next).await?.map(journaled)),
        }
    }
}

/// Where a client is in a machine's events.
struct Position {
    source: Source,
    probes: BTreeSet<u32>,
    without_registers: bool,
    next: u64,
    delivered: u64,
    filtered: u64,
    lost: u64,
    durable: Option<u64>,
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
            let page = match self.source.page(self.next, self.durable).await {
                Ok(page) => page,
                Err(error) => {
                    self.ended = true;
                    return Some((Err(error), self));
                }
            };
            self.ended = page.closed;
            self.lost += page.lost;
            self.next = page.from + page.items.len() as u64;
            for (sequence, kept) in (page.from..).zip(page.items) {
                if self.probes.is_empty() || self.probes.contains(&kept.probe()) {
                    events.push(kept.event(sequence, self.without_registers));
                } else {
                    self.filtered += 1;
                }
            }
            self.delivered += events.len() as u64;
        }
        self.begun = true;
        self.durable = self.source.durable();
        let response = StreamEventsResponse {
            events,
            next_sequence: self.next,
            delivered: self.delivered,
            filtered: self.filtered,
            lost: self.lost,
            durable_sequence: self.durable,
        };
        Some((Ok(response), self))
    }
}

/// A hit as the contract has it.
pub fn event(sequence: u64, hit: &Hit, without_registers: bool) -> Event {
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

fn stream(
    source: Source,
    request: StreamEventsRequest,
    end: u64,
) -> Response<Responses<StreamEventsResponse>> {
    let position = Position {
        source,
        probes: request.probes.into_iter().collect(),
        without_registers: request.without_registers,
        next: request.from_sequence.unwrap_or(end),
        delivered: 0,
        filtered: 0,
        lost: 0,
        durable: None,
        begun: false,
        ended: false,
    };
    Response::new(Box::pin(futures_util::stream::unfold(position, Position::advance)))
}

/// The events of a machine of this process.
///
/// # Errors
/// OUT_OF_RANGE.
pub fn of_member(
    member: Arc<Member>,
    request: StreamEventsRequest,
) -> Result<Response<Responses<StreamEventsResponse>>, Status> {
    let end = member.vm.events.next();
    match request.from_sequence {
        Some(from) if from > end => Err(status::beyond(from, end)),
        _ => {
            let journal = member.journal.as_ref().map(|journal| journal.cursor());
            Ok(stream(Source::Live { member, journal }, request, end))
        }
    }
}

/// The events that a machine's process has left. A client may have seen more of them than came to the disk, so that no sequence number
/// is too large.
pub fn of_left(left: &Left, request: StreamEventsRequest) -> Response<Responses<StreamEventsResponse>> {
    let source = Source::Left { journal: Some(left.cursor()), next: left.next };
    stream(source, request, left.next)
}
