//! The engine: takes the stops of all vCPUs and decides how each goes on.
//!
//! One [`Engine`] serves a guest; each vCPU thread drives a [`VcpuEngine`] of its own, so hits on different vCPUs run in
//! parallel. What they share is the patch table (looked up without a lock), the probes' counters and the slots.

mod displaced;
mod vcpu;

pub use vcpu::VcpuEngine;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::patch::{ArmError, PatchTable, Place};
use crate::probe::{Probe, ProbeId, Purpose};
use crate::slot::{SlotRegion, Slots};
use crate::{Gpa, Gva, PhysicalMemory, VcpuId, VcpuState};
use arc_swap::ArcSwap;

/// A hit, as a sink sees it: the state before the displaced instruction.
#[derive(Clone, Copy, Debug)]
pub struct Hit<'a> {
    /// Which probe.
    pub probe: ProbeId,
    /// Where.
    pub vcpu: VcpuId,
    /// Registers at the hit; RIP is the probe's address.
    pub state: &'a VcpuState,
}

/// Takes the hits of one vCPU, on that vCPU's thread. Must not block.
pub trait HitSink: Send {
    /// Takes a hit, or returns false where there is no room for it: it is then counted as lost.
    fn deliver(&mut self, hit: &Hit<'_>) -> bool;
}

/// What to arm.
#[derive(Clone, Debug)]
pub struct ProbeRequest {
    /// Where.
    pub place: Place,
    /// What for.
    pub purpose: Purpose,
}

/// Something that happened to the probes while the guest ran, for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Notice {
    /// A probe had to be taken out because its instruction could not be executed out of place after all.
    #[error("Probe at {gva:#x} was taken out: {reason}")]
    Withdrawn {
        /// Its address.
        gva: Gva,
        /// Why.
        reason: String,
    },
    /// The guest frees its init text.
    #[error("Probes in init text were taken out: the guest has booted and frees it")]
    InitTextFreed,
}

type BySite = BTreeMap<Gpa, Vec<Arc<Probe>>>;

/// The probes of one guest.
#[derive(Debug)]
pub struct Engine {
    patches: PatchTable,
    slots: Slots,
    vcpus: usize,
    by_site: ArcSwap<BySite>,
    /// How many probes were ever armed; held while arming and disarming.
    edit: Mutex<u32>,
    /// True while any int3 of ours is in guest memory.
    armed: AtomicBool,
    /// How many more hits may be reported before the run finishes.
    budget: AtomicU64,
    guest_panicked: AtomicBool,
    notices: Mutex<Vec<Notice>>,
}

impl Engine {
    /// An engine without probes for a guest of `vcpus` vCPUs. `max_hits` ends the run after that many reported hits.
    #[must_use]
    pub fn new(region: SlotRegion, vcpus: usize, max_hits: Option<u64>) -> Self {
        Self {
            patches: PatchTable::default(),
            slots: Slots::new(region),
            vcpus,
            by_site: ArcSwap::default(),
            edit: Mutex::new(0),
            armed: AtomicBool::new(false),
            budget: AtomicU64::new(max_hits.unwrap_or(u64::MAX)),
            guest_panicked: AtomicBool::new(false),
            notices: Mutex::new(Vec::new()),
        }
    }

    /// Arms all of the requests, or none.
    ///
    /// # Errors
    /// The first request that cannot be armed, and why.
    pub fn arm(
        &self,
        memory: &dyn PhysicalMemory,
        requests: &[ProbeRequest],
    ) -> Result<Vec<Arc<Probe>>, ArmError> {
        let mut edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        let places: Vec<Place> = requests.iter().map(|request| request.place).collect();
        // Breakpoints must exit to the host before the first int3 stands in memory.
        let before = self.armed.fetch_or(!places.is_empty(), Ordering::SeqCst);
        let sites = self.patches.prepare(memory, &places).and_then(|sites| {
            self.patches.enable(memory, &sites)?;
            Ok(sites)
        });
        let sites = sites.inspect_err(|_| {
            self.armed.store(before, Ordering::SeqCst);
        })?;
        let mut by_site = BySite::clone(&self.by_site.load());
        let mut probes = Vec::with_capacity(sites.len());
        for (request, site) in requests.iter().zip(sites) {
            let gpa = site.place.gpa;
            let probe = Arc::new(Probe::new(ProbeId(*edit), site, request.purpose.clone(), self.vcpus));
            *edit += 1;
            by_site.entry(gpa).or_default().push(Arc::clone(&probe));
            probes.push(probe);
        }
        self.by_site.store(Arc::new(by_site));
        Ok(probes)
    }

    /// Takes out every probe and every trace of the slots: the guest's memory is as if it had never been probed. Only
    /// while no vCPU runs.
    pub fn disarm_all(&self, memory: &dyn PhysicalMemory) {
        let _edit = self.edit.lock().unwrap_or_else(PoisonError::into_inner);
        self.patches.remove_all(memory);
        self.slots.unmap_all(memory);
        self.armed.store(false, Ordering::SeqCst);
    }

    /// True once a [`Purpose::GuestPanic`] probe was hit.
    #[must_use]
    pub fn guest_panicked(&self) -> bool {
        self.guest_panicked.load(Ordering::SeqCst)
    }

    /// What happened to the probes since the last call.
    #[must_use]
    pub fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn notice(&self, notice: Notice) {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner).push(notice);
    }

    /// Takes one from the budget of hits. None where it is used up; otherwise whether this hit is the last one.
    fn spend(&self) -> Option<bool> {
        let spend = |left: u64| left.checked_sub(1);
        let left = self.budget.fetch_update(Ordering::SeqCst, Ordering::SeqCst, spend).ok()?;
        Some(left == 1)
    }
}

#[cfg(test)]
mod tests;
