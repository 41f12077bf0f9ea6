//! Probes and their accounts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::VcpuId;
use crate::patch::Site;

/// A probe of one engine, counted from 0 in the order of arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeId(pub u32);

/// What a hit is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To be reported to the user.
    Report,
    /// To be reported to the program that embeds the engine; does not count towards the limit of hits.
    Milestone,
    /// The guest kernel is about to panic: the run ends as a crash. Not reported as a hit.
    GuestPanic,
    /// The guest is about to free its init text: probes in this range are taken out first. Not reported as a hit.
    InitTextFreed(std::ops::Range<crate::Gva>),
}

/// What one probe counted. hits = delivered + lost, and hits = emulated + stepped + faulted + given to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Counts {
    /// How often a vCPU reached the probe.
    pub hits: u64,
    /// Hits that the sink took.
    pub delivered: u64,
    /// Hits that the sink had no room for.
    pub lost: u64,
    /// Displaced instructions that the host emulated.
    pub emulated: u64,
    /// Displaced instructions that ran out of line.
    pub stepped: u64,
    /// Displaced instructions that could not start because they faulted; the guest got the exception.
    pub faulted: u64,
}

#[derive(Debug, Default)]
#[repr(align(64))]
struct VcpuCounts {
    hits: AtomicU64,
    delivered: AtomicU64,
    lost: AtomicU64,
    emulated: AtomicU64,
    stepped: AtomicU64,
    faulted: AtomicU64,
}

/// How a displaced instruction was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Executed {
    Emulated,
    Stepped,
    Faulted,
}

/// One probe: a site, what it is for, and its accounts per vCPU.
#[derive(Debug)]
pub struct Probe {
    /// Its identity.
    pub id: ProbeId,
    /// Where it stands.
    pub site: Arc<Site>,
    /// What a hit is for.
    pub purpose: Purpose,
    counts: Box<[VcpuCounts]>,
}

impl Probe {
    pub(crate) fn new(id: ProbeId, site: Arc<Site>, purpose: Purpose, vcpus: usize) -> Self {
        Self { id, site, purpose, counts: (0..vcpus).map(|_| VcpuCounts::default()).collect() }
    }

    fn of(&self, vcpu: VcpuId) -> Option<&VcpuCounts> {
        self.counts.get(usize::try_from(vcpu.0).ok()?)
    }

    pub(crate) fn count_hit(&self, vcpu: VcpuId) {
        if let Some(counts) = self.of(vcpu) {
            counts.hits.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn count_delivery(&self, vcpu: VcpuId, delivered: bool) {
        if let Some(counts) = self.of(vcpu) {
            if delivered { &counts.delivered } else { &counts.lost }.fetch_add(1, Relaxed);
        }
    }

    pub(crate) fn count_executed(&self, vcpu: VcpuId, how: Executed) {
        if let Some(counts) = self.of(vcpu) {
            match how {
                Executed::Emulated => &counts.emulated,
                Executed::Stepped => &counts.stepped,
                Executed::Faulted => &counts.faulted,
            }
            .fetch_add(1, Relaxed);
        }
    }

    /// The probe's accounts, summed over all vCPUs.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts.iter().fold(Counts::default(), |sum, vcpu| Counts {
            hits: sum.hits + vcpu.hits.load(Relaxed),
            delivered: sum.delivered + vcpu.delivered.load(Relaxed),
            lost: sum.lost + vcpu.lost.load(Relaxed),
            emulated: sum.emulated + vcpu.emulated.load(Relaxed),
            stepped: sum.stepped + vcpu.stepped.load(Relaxed),
            faulted: sum.faulted + vcpu.faulted.load(Relaxed),
        })
    }
}
