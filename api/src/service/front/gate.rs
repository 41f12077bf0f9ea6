//! Who is let in: the one place through which every request comes, and what it gives the request for its way.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::http;
use tonic::{Request, Status};

use super::super::status;
use super::access::Access;
use super::audit::Audit;
use super::calls::{self, Role, Rule};
use super::identity::Identity;

/// A request that was let in: who asks for which call. Without one there is no way to a machine.
#[derive(Clone)]
pub struct Call {
    pub who: Arc<Identity>,
    pub rule: &'static Rule,
    access: watch::Receiver<Arc<Access>>,
}

impl Call {
    /// # Errors
    /// INTERNAL: the request did not come through the gate.
    pub fn of<T>(request: &Request<T>) -> Result<Self, Status> {
        request.extensions().get::<Self>().cloned().ok_or_else(status::internal)
    }

    /// The client's role on a machine.
    pub fn role(&self, machine: &str) -> Option<Role> {
        self.access.borrow().role(&self.who, machine)
    }

    /// Whether the client may do this to a machine of that name, whether there is one or not.
    ///
    /// # Errors
    /// PERMISSION_DENIED.
    pub fn check(&self, machine: &str) -> Result<(), Status> {
        let role = self.role(machine);
        if role >= Some(self.rule.needs) {
            return Ok(());
        }
        Err(status::denied(&self.who, self.rule, Some(machine), role))
    }

    /// A key that is this client's own: what it was answered is no other's business.
    pub fn own_key(&self, key: &str) -> String {
        if key.is_empty() { String::new() } else { format!("{} {key}", self.who) }
    }

    /// Comes when the client may no longer do this to a machine of that name, or its certificate has expired.
    pub fn ends(&self, machine: String) -> impl Future<Output = Status> + Send + 'static {
        let mut call = self.clone();
        async move {
            let (who, needs) = (Arc::clone(&call.who), call.rule.needs);
            let expired = async {
                match &*who {
                    Identity::Certificate { expires, .. } => {
                        let left = expires.duration_since(SystemTime::now()).unwrap_or_default();
                        tokio::time::sleep(left).await;
                    }
                    Identity::User { .. } => std::future::pending().await,
                }
            };
            let lost = call.access.wait_for(|access| access.role(&who, &machine) < Some(needs));
            tokio::select! {
                // Where nobody is left to change rights the service ends, and its streams with it.
                Ok(_) = lost => {}
                () = expired => return status::expired(),
            }
            status::denied(&who, call.rule, Some(&machine), call.role(&machine))
        }
    }
}

/// What is asked of each request before anything else.
#[derive(Clone)]
pub struct Gate {
    pub access: watch::Receiver<Arc<Access>>,
    pub audit: Arc<Audit>,
}

impl Gate {
    /// Lets a request in whose client may make the call for some machine at least.
    ///
    /// # Errors
    /// UNIMPLEMENTED: there is no such call. UNAUTHENTICATED: the client's certificate has expired. PERMISSION_DENIED.
    pub fn admit(
        &self,
        who: Arc<Identity>,
        mut request: http::Request<Body>,
    ) -> Result<http::Request<Body>, Status> {
        let rule = calls::required(request.uri().path()).ok_or_else(status::no_call)?;
        let role = self.access.borrow().highest(&who);
        let refused = if who.expired() {
            Some(status::expired())
        } else if role < Some(rule.needs) {
            Some(status::denied(&who, rule, None, role))
        } else {
            None
        };
        if let Some(status) = refused {
            let result = Err::<(), _>(status);
            self.audit.note(&who, rule, "", "", &result);
            result?;
        }
        request.extensions_mut().insert(Call { who, rule, access: self.access.clone() });
        Ok(request)
    }
}
