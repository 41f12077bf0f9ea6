//! The service Events.

use std::sync::Arc;

use futures_util::TryStreamExt;
use tonic::{Request, Response, Status};

use super::super::Responses;
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
        let open = |member: Arc<Member>, it| async move { member.events().stream_events(it).await };
        let responses = self.stream(request, open).await?;
        // Rights may change meanwhile.
        let shown = move |response| if may_see() { response } else { without_secrets(response) };
        Ok(responses.map(|responses| Box::pin(responses.map_ok(shown)) as Responses<_>))
    }
}
