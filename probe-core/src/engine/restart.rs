//! Displaced instructions that the guest is going to run again.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use crate::VcpuState;
use crate::paging::entry;

/// How many are remembered. A fault that the guest's handler resolves is soon run again; the oldest is forgotten first.
const CAPACITY: usize = 256;

/// An instruction and the context that will come back to it: its address, the stack, which no two tasks share, and the
/// page tables, without the PCID, which differs from CPU to CPU for the same task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    pc: u64,
    rsp: u64,
    tables: u64,
}

impl Place {
    fn of(state: &VcpuState) -> Self {
        Self { pc: state.regs.rip, rsp: state.regs.rsp, tables: state.sys.cr3 & entry::ADDRESS }
    }
}

/// The hit of an instruction that is run again has been counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Restart {
    /// What became of the instruction has been counted too.
    pub executed: bool,
}

/// All of them, of all vCPUs: a task that faults may sleep and come back on another one.
#[derive(Debug, Default)]
pub(super) struct Restarts(Mutex<VecDeque<(Place, Restart)>>);

impl Restarts {
    /// Remembers that the guest will come back to `state`.
    pub(super) fn remember(&self, state: &VcpuState, restart: Restart) {
        let mut restarts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = Place::of(state);
        restarts.retain(|(known, _)| *known != place);
        if restarts.len() == CAPACITY {
            restarts.pop_front();
        }
        restarts.push_back((place, restart));
    }

    /// Takes the restart that `state` is. The caller has looked that RF is set.
    pub(super) fn take(&self, state: &VcpuState) -> Option<Restart> {
        let mut restarts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = Place::of(state);
        let index = restarts.iter().position(|(known, _)| *known == place)?;
        restarts.remove(index).map(|(_, restart)| restart)
    }
}
