//! The service Events, for the one machine.

use std::sync::Arc;

use prost::bytes::Bytes;
use tonic::{Request, Response, Status};

use super::super::encoded::Events;
use super::super::{Responses, stream};
use super::Worker;
use crate::contract::StreamEventsRequest;

#[tonic::async_trait]
impl Events for Arc<Worker> {
    type StreamEventsStream = Responses<Bytes>;

    async fn stream_events(
        &self,
        request: Request<StreamEventsRequest>,
    ) -> Result<Response<Self::StreamEventsStream>, Status> {
        let request = request.into_inner();
        stream::of_member(self.get(&request.machine)?, request)
    }
}
