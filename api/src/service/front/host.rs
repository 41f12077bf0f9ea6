//! The service Host.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use vmm::doctor::{self, Status as Found};

use super::super::status;
use super::Front;
use crate::contract::host_server::Host;
use crate::contract::{DiagnoseRequest, DiagnoseResponse, Finding, GetVersionRequest, GetVersionResponse};

#[tonic::async_trait]
impl Host for Arc<Front> {
    async fn get_version(
        &self,
        _: Request<GetVersionRequest>,
    ) -> Result<Response<GetVersionResponse>, Status> {
        Ok(Response::new(GetVersionResponse { version: env!("CARGO_PKG_VERSION").to_owned() }))
    }

    async fn diagnose(&self, _: Request<DiagnoseRequest>) -> Result<Response<DiagnoseResponse>, Status> {
        let findings = tokio::task::spawn_blocking(|| {
            let findings = doctor::diagnose().findings().into_iter().map(|finding| {
                let available = finding.status == Found::Present;
                let without =
                    if available { String::new() } else { format!("; without it: {}", finding.without) };
                Finding {
                    name: finding.feature.to_string(),
                    available,
                    detail: format!("{}{without}", finding.seen),
                }
            });
            findings.collect()
        });
        Ok(Response::new(DiagnoseResponse { findings: findings.await.map_err(|_| status::internal())? }))
    }
}
