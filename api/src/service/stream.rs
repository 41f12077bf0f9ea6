//! Where a client is in a machine's events, and what it is sent.

use std::collections::BTreeSet;
use std::sync::Arc;

use prost::Message;
use prost::bytes::Bytes;
use tonic::{Response, Status};

use super::journal::{Cursor, Left};
use super::worker::Member;
use super::{Responses, encoded, status};
use crate::contract::{Event, StreamEventsRequest, StreamEventsResponse};
use crate::exit::Failure;
use crate::vm::{Hit, Page};

/// Events that are looked at for a response: some 56 KiB with their registers.
pub const BATCH: usize = 256;
/// The same without registers: as many bytes.
const BATCH_WITHOUT_REGISTERS: usize = 1024;

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

    fn encode(self, sequence: u64, without_registers: bool, to: &mut Vec<u8>) {
        match self {
            Kept::Hit(hit) => encoded::encode(sequence, &hit, without_registers, to),
            Kept::Event(event) if without_registers => Event { registers: None, ..*event }.encode_raw(to),
            Kept::Event(event) => event.encode_raw(to),
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
async fn read(
    journal: &mut Option<Cursor>,
    from: u64,
    most: usize,
    limit: u64,
) -> Result<Page<Event>, Status> {
    let Some(mut cursor) = journal.take() else { return Err(status::internal()) };
    let read = tokio::task::spawn_blocking(move || {
        let page = cursor.page(from, most, limit);
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

    /// At most `most` events from `from` on, once there are some, or more are durable than `told`, or there will be no more.
    async fn page(&mut self, from: u64, most: usize, told: Option<u64>) -> Result<Page<Kept>, Status> {
        match self {
            Source::Live { member, journal } => {
                let Some(writer) = &member.journal else {
                    return Ok(member.vm.events.wait(from, most).await.map(Kept::Hit));
                };
                let page = tokio::select! {
                    page = member.vm.events.wait(from, most) => page,
                    () = writer.beyond(told, from) => Page { from, items: Vec::new(), lost: 0, closed: false },
                };
                if page.lost > 0 {
                    let kept = read(journal, from, most, writer.durable()).await?;
                    if !kept.items.is_empty() && kept.from < page.from {
                        return Ok(Page { closed: false, ..kept.map(journaled) });
                    }
                }
                if page.closed {
                    writer.finished().await;
                }
                Ok(page.map(Kept::Hit))
            }
            Source::Left { journal, next } => Ok(read(journal, from, most, *next).await?.map(journaled)),
        }
    }
}

/// Where a client is in a machine's events.
struct Position {
    source: Source,
    probes: BTreeSet<u32>,
    without_registers: bool,
    /// What is told with the next response, which has no events here.
    account: StreamEventsResponse,
    scratch: Vec<u8>,
    /// The first response has been sent.
    begun: bool,
    ended: bool,
}

impl Position {
    /// The next response; `None` behind the last.
    async fn advance(mut self) -> Option<(Result<Bytes, Status>, Self)> {
        if self.ended {
            return None;
        }
        let mut response = encoded::Response::default();
        if self.begun {
            let StreamEventsResponse { next_sequence, durable_sequence, .. } = self.account;
            let most = if self.without_registers { BATCH_WITHOUT_REGISTERS } else { BATCH };
            let page = match self.source.page(next_sequence, most, durable_sequence).await {
                Ok(page) => page,
                Err(error) => {
                    self.ended = true;
                    return Some((Err(error), self));
                }
            };
            self.take(page, &mut response);
        }
        self.begun = true;
        self.account.durable_sequence = self.source.durable();
        Some((Ok(response.finish(&self.account)), self))
    }

    /// Moves as much of a page into a response as that takes.
    fn take(&mut self, page: Page<Kept>, response: &mut encoded::Response) {
        let Self { account, scratch, .. } = self;
        account.lost += page.lost;
        account.next_sequence = page.from;
        let mut items = page.items.into_iter();
        while !response.is_full()
            && let Some(kept) = items.next()
        {
            if self.probes.is_empty() || self.probes.contains(&kept.probe()) {
                let sequence = account.next_sequence;
                response.add(scratch, |to| kept.encode(sequence, self.without_registers, to));
            } else {
                account.filtered += 1;
            }
            account.next_sequence += 1;
        }
        account.delivered += response.events();
        self.ended = page.closed && items.len() == 0;
    }
}

fn stream(source: Source, request: StreamEventsRequest, end: u64) -> Response<Responses<Bytes>> {
    let next_sequence = request.from_sequence.unwrap_or(end);
    let position = Position {
        source,
        probes: request.probes.into_iter().collect(),
        without_registers: request.without_registers,
        account: StreamEventsResponse { next_sequence, ..StreamEventsResponse::default() },
        scratch: Vec::new(),
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
) -> Result<Response<Responses<Bytes>>, Status> {
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
pub fn of_left(left: &Left, request: StreamEventsRequest) -> Response<Responses<Bytes>> {
    let source = Source::Left { journal: Some(left.cursor()), next: left.next };
    stream(source, request, left.next)
}
