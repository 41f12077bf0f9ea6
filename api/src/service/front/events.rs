//! The service Events.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::super::Responses;
use super::{Front, pass_on};
use crate::contract::events_client::EventsClient;
use crate::contract::events_server::Events;
use crate::contract::{StreamEventsRequest, StreamEventsResponse};

#[tonic::async_trait]
impl Events for Arc<Front> {
    type StreamEventsStream = Responses<StreamEventsResponse>;

    async fn stream_events(
        &self,
        request: Request<StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let request = request.into_inner();
        let member = self.get(&request.machine)?;
        let stream = EventsClient::new(member.channel.clone()).stream_events(request).await;
        let stream = stream.map_err(|error| member.explain(error))?.into_inner();
        Ok(pass_on(member, stream))
    }
}
