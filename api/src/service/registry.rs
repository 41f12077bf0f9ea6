//! The machines of the service, by name.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tonic::Status;

use super::audit::Audit;
use super::status;
use crate::contract::{AddProbesResponse, Machine, MachineSpec};
use crate::vm::Vm;

/// Requests with an idempotency key that are remembered.
const REMEMBERED: usize = 1000;

/// A machine with what it was made from.
pub struct Member {
    pub name: String,
    pub spec: MachineSpec,
    pub vm: Arc<Vm>,
}

/// What a request with a key was answered.
#[derive(Clone)]
pub enum Answer {
    Machine(Machine),
    Probes(AddProbesResponse),
}

struct Remembered {
    key: String,
    /// The request itself, encoded.
    request: Vec<u8>,
    answer: Answer,
}

#[derive(Default)]
struct State {
    machines: BTreeMap<String, Arc<Member>>,
    answers: VecDeque<Remembered>,
}

/// All that the service knows.
pub struct Registry {
    state: Mutex<State>,
    pub audit: Audit,
    /// Held while something with an idempotency key is made, so that the same request at the same time waits for its answer.
    pub making: tokio::sync::Mutex<()>,
}

impl Registry {
    pub fn new(audit: Audit) -> Self {
        Self { state: Mutex::default(), audit, making: tokio::sync::Mutex::new(()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// # Errors
    /// NOT_FOUND.
    pub fn get(&self, name: &str) -> Result<Arc<Member>, Status> {
        self.lock().machines.get(name).cloned().ok_or_else(|| status::no_machine(name))
    }

    pub fn all(&self) -> Vec<Arc<Member>> {
        self.lock().machines.values().cloned().collect()
    }

    /// A name that no machine has.
    pub fn free_name(&self) -> String {
        let state = self.lock();
        let name =
            (1_u64..).map(|number| format!("vm-{number}")).find(|name| !state.machines.contains_key(name));
        name.unwrap_or_default()
    }

    /// # Errors
    /// ALREADY_EXISTS.
    pub fn insert(&self, member: Member) -> Result<Arc<Member>, Status> {
        let mut state = self.lock();
        if state.machines.contains_key(&member.name) {
            return Err(status::name_taken(&member.name));
        }
        let member = Arc::new(member);
        state.machines.insert(member.name.clone(), Arc::clone(&member));
        Ok(member)
    }

    /// Forgets a machine, if it is still this one.
    pub fn forget(&self, member: &Arc<Member>) {
        let mut state = self.lock();
        if state.machines.get(&member.name).is_some_and(|known| Arc::ptr_eq(known, member)) {
            state.machines.remove(&member.name);
        }
    }

    pub fn stop_all(&self) {
        for member in self.all() {
            member.vm.stop();
        }
    }

    /// What a request with this key was answered.
    ///
    /// # Errors
    /// It was another request.
    pub fn answered(&self, key: &str, request: &[u8]) -> Result<Option<Answer>, Status> {
        let state = self.lock();
        match state.answers.iter().find(|answer| !key.is_empty() && answer.key == key) {
            Some(known) if known.request != request => Err(status::key_reused()),
            known => Ok(known.map(|known| known.answer.clone())),
        }
    }

    pub fn remember(&self, key: &str, request: Vec<u8>, answer: Answer) {
        if key.is_empty() {
            return;
        }
        let mut state = self.lock();
        state.answers.push_back(Remembered { key: key.to_owned(), request, answer });
        if state.answers.len() > REMEMBERED {
            state.answers.pop_front();
        }
    }
}

/// Runs what may wait for a vCPU.
///
/// # Errors
/// What it says, or INTERNAL if it panics.
pub async fn blocking<T: Send + 'static, E: Into<Status> + Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, Status> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(status::internal()),
    }
}
