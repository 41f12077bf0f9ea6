//! The service Events.

use std::sync::Arc;

use futures_util::TryStreamExt;
use prost::Message;
use prost::bytes::Bytes;
use tonic::{Request, Response, Status};

use super::super::encoded::Events;
use super::super::{Responses, status, stream};
use super::Front;
use super::calls::Role;
use super::gate::Call;
use super::members::Member;
use crate::contract::{StreamEventsRequest, StreamEventsResponse};

/// Leaves out what comes from the guest's registers and memory.
///
/// # Errors
/// INTERNAL: it is no response.
fn without_secrets(response: Bytes) -> Result<Bytes, Status> {
    let mut response = StreamEventsResponse::decode(response).map_err(|_| status::internal())?;
    for event in &mut response.events {
        event.registers = None;
        event.values = Vec::new();
        event.return_value = None;
    }
    Ok(response.encode_to_vec().into())
}

/// A machine's events, also those that a process that is gone has left in its journal.
async fn open(
    member: Arc<Member>,
    request: StreamEventsRequest,
) -> Result<Response<Responses<Bytes>>, Status> {
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
    type StreamEventsStream = Responses<Bytes>;

    async fn stream_events(
        &self,
        mut request: Request<StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let (call, machine) = (Call::of(&request)?, request.get_ref().machine.clone());
        let may_see = move || call.role(&machine) >= Some(Role::Probe);
        request.get_mut().without_registers |= !may_see();
        let responses = self.stream(request, open).await?;
        // Rights may change meanwhile.
        let shown = move |response| {
            std::future::ready(if may_see() { Ok(response) } else { without_secrets(response) })
        };
        Ok(responses.map(|responses| Box::pin(responses.and_then(shown)) as Responses<_>))
    }
}
