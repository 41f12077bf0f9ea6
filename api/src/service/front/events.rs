//! The service Events.

use std::sync::Arc;

use futures_util::TryStreamExt;
use tonic::{Request, Response, Status};

use super::super::{Responses, stream};
use super::Front;
use super::calls::Role;
use super::gate::Call;
use super::members::Member;
use crate::contract::events_server::Events;
use crate::contract::{StreamEventsRequest, StreamEventsResponse};

/// Leaves out what comes from the guest's registers and memory.
fn without_secrets(mut response: StreamEventsResponse) -> StreamEventsResponse {
    for event in &mut response.events {
        event.registers = None;
        event.values = Vec::new();
        event.return_value = None;
    }
    response
}

/// A machine's events, also those that a process that is gone has left in its journal.
async fn open(
    member: Arc<Member>,
    request: StreamEventsRequest,
) -> Result<Response<Responses<StreamEventsResponse>>, Status> {
    match member.events().stream_events(request.clone()).await {
        Ok(stream) => Ok(stream.map(|stream| Box::pin(stream) as Responses<_>)),
        Err(error) => {
            let error = member.explain(error);
            member.left().await.map(|left| stream::of_left(&left, request)).ok_or(error)
        }
    }
}

#[tonic::async_trait]
impl Events for Arc<Front> {
    type StreamEventsStream = Responses<StreamEventsResponse>;

    async fn stream_events(
        &self,
        mut request: Request<StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let (call, machine) = (Call::of(&request)?, request.get_ref().machine.clone());
        let may_see = move || call.role(&machine) >= Some(Role::Probe);
        request.get_mut().without_registers |= !may_see();
        let responses = self.stream(request, open).await?;
        // Rights may change meanwhile.
        let shown = move |response| if may_see() { response } else { without_secrets(response) };
        Ok(responses.map(|responses| Box::pin(responses.map_ok(shown)) as Responses<_>))
    }
}
