//! Probes and their accounts.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, Ordering::Relaxed};

use crate::handler::Handler;
use crate::patch::{Place, Site};
use crate::watch::Watchpoint;
use crate::{Gva, VcpuId};

/// A probe of one engine, counted from 0 in the order of arming.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProbeId(pub u32);

/// What a probe stops at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The instruction at its place.
    Instruction,
    /// Each return of the function whose first instruction, or the first behind its ftrace site, is at its place.
    Return {
        /// How many calls are awaited at the same time; further ones are missed. At most [`MAX_ACTIVE`].
        max_active: u32,
    },
    /// Accesses to memory, wherever they come from.
    Access(Watchpoint),
}

/// The most calls that one return probe awaits at the same time, as for the kernel's own return-probe events.
pub const MAX_ACTIVE: u32 = 4096;

/// What to arm.
#[derive(Clone)]
pub struct ProbeRequest {
    /// Where.
    pub place: Place,
    /// At what.
    pub kind: Kind,
    /// What to do at a hit; without one, each is reported.
    pub handler: Option<Arc<dyn Handler>>,
    /// Whether a reported hit counts towards the engine's limit of hits.
    pub limited: bool,
    /// The requester's own, handed back with each report.
    pub cookie: u64,
}

impl ProbeRequest {
    /// A probe on an instruction, all of whose hits are reported and count towards the limit.
    #[must_use]
    pub fn new(place: Place) -> Self {
        Self { place, kind: Kind::Instruction, handler: None, limited: true, cookie: 0 }
    }

    /// The same for a function's returns.
    #[must_use]
    pub fn for_returns(place: Place) -> Self {
        Self { kind: Kind::Return { max_active: MAX_ACTIVE }, ..Self::new(place) }
    }

    /// The same with a handler.
    #[must_use]
    pub fn with_handler(self, handler: Arc<dyn Handler>) -> Self {
        Self { handler: Some(handler), ..self }
    }

    /// The same with a cookie.
    #[must_use]
    pub fn with_cookie(self, cookie: u64) -> Self {
        Self { cookie, ..self }
    }

    /// The same without counting towards the limit.
    #[must_use]
    pub fn unlimited(self) -> Self {
        Self { limited: false, ..self }
    }
}

/// A watchpoint to set.
#[derive(Clone)]
pub struct WatchRequest {
    /// What to watch.
    pub watchpoint: Watchpoint,
    /// What to do at a hit. Of its methods only [`Handler::pre`] is called: behind a load or store, and before an instruction that
    /// is watched for execution.
    pub handler: Option<Arc<dyn Handler>>,
    /// Whether a reported hit counts towards the engine's limit of hits.
    pub limited: bool,
    /// The requester's own, handed back with each report.
    pub cookie: u64,
}

impl WatchRequest {
    /// A watchpoint all of whose hits are reported and count towards the limit.
    #[must_use]
    pub fn new(watchpoint: Watchpoint) -> Self {
        Self { watchpoint, handler: None, limited: true, cookie: 0 }
    }

    /// The same with a handler.
    #[must_use]
    pub fn with_handler(self, handler: Arc<dyn Handler>) -> Self {
        Self { handler: Some(handler), ..self }
    }

    /// The same with a cookie.
    #[must_use]
    pub fn with_cookie(self, cookie: u64) -> Self {
        Self { cookie, ..self }
    }
}

impl std::fmt::Debug for WatchRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WatchRequest")
            .field("watchpoint", &self.watchpoint)
            .field("limited", &self.limited)
            .field("cookie", &self.cookie)
            .finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ProbeRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProbeRequest")
            .field("place", &self.place)
            .field("kind", &self.kind)
            .field("limited", &self.limited)
            .field("cookie", &self.cookie)
            .finish_non_exhaustive()
    }
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident)*) => {
        /// What one probe counted.
        ///
        /// hits = delivered + filtered + lost, at every moment at which no vCPU is in a stop. On an instruction, hits = emulated +
        /// stepped + faulted + diverted + given to the guest, whose own int3 stands there too. For returns, entered = hits + missed +
        /// ignored + abandoned + awaited still, and the displaced instructions are those at the function's entry.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
        pub struct Counts { $($(#[$doc])* pub $name: u64),* }

        /// The same on one vCPU, a cache line or two of its own.
        #[derive(Debug, Default)]
        #[repr(align(64))]
        pub(crate) struct VcpuCounts { $(pub $name: AtomicU64),* }

        impl VcpuCounts {
            fn read(&self) -> Counts {
                Counts { $($name: self.$name.load(Relaxed)),* }
            }
        }

        impl std::ops::AddAssign for Counts {
            fn add_assign(&mut self, other: Self) {
                $(self.$name += other.$name;)*
            }
        }
    };
}

counts! {
    /// How often a vCPU reached the instruction; for returns, how many calls returned.
    hits
    /// Hits that the sink took.
    delivered
    /// Hits that the handler did not want reported.
    filtered
    /// Hits that the sink had no room for.
    lost
    /// Displaced instructions that the host emulated.
    emulated
    /// Displaced instructions that ran out of line, or in their place.
    stepped
    /// Displaced instructions that raised an exception; the guest got it. Run again after that, they are not counted again.
    faulted
    /// Displaced instructions that did not run because a handler sent the guest elsewhere.
    diverted
    /// For returns: calls of the function.
    entered
    /// For returns: calls that were not awaited, because as many were awaited already, or nothing can stand at their return address.
    missed
    /// For returns: calls that the handler did not want awaited.
    ignored
}

impl VcpuCounts {
    pub fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }
}

/// How a displaced instruction was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Executed {
    Emulated,
    Stepped,
    /// By the host, and the vCPU sleeps.
    Halted,
    /// Out of line, with nothing to come back to.
    Left,
    Faulted,
    Diverted,
}

/// One probe: a site, what to do at a hit, and its accounts per vCPU.
pub struct Probe {
    /// Its identity.
    pub id: ProbeId,
    /// Where it stands; a watchpoint stands nowhere in guest text.
    pub site: Option<Arc<Site>>,
    /// What it stops at.
    pub kind: Kind,
    pub(crate) handler: Option<Arc<dyn Handler>>,
    pub(crate) limited: bool,
    pub(crate) cookie: u64,
    enabled: AtomicBool,
    awaited: AtomicU32,
    abandoned: AtomicU64,
    timed: AtomicU64,
    time: AtomicU64,
    counts: Box<[VcpuCounts]>,
}

/// What the host spent on some of a probe's hits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Timed {
    /// How many hits were timed: one of 64 on each vCPU, those of other probes with it.
    pub hits: u64,
    /// From each such stop to where the vCPU goes on, without the exit and the entry themselves; as
    /// [`crate::engine::HitSink::stamp`] counts.
    pub time: u64,
}

impl std::fmt::Debug for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("id", &self.id)
            .field("place", &self.place())
            .field("kind", &self.kind)
            .field("enabled", &self.is_enabled())
            .field("counts", &self.counts())
            .finish_non_exhaustive()
    }
}

impl Probe {
    pub(crate) fn new(id: ProbeId, site: Arc<Site>, request: &ProbeRequest, vcpus: usize) -> Self {
        let ProbeRequest { place: _, kind, handler, limited, cookie } = request.clone();
        Self { site: Some(site), limited, cookie, ..Self::unplaced(id, kind, handler, vcpus) }
    }

    pub(crate) fn watching(id: ProbeId, request: &WatchRequest, vcpus: usize) -> Self {
        let WatchRequest { watchpoint, handler, limited, cookie } = request.clone();
        Self { limited, cookie, ..Self::unplaced(id, Kind::Access(watchpoint), handler, vcpus) }
    }

    fn unplaced(id: ProbeId, kind: Kind, handler: Option<Arc<dyn Handler>>, vcpus: usize) -> Self {
        Self {
            id,
            site: None,
            kind,
            handler,
            limited: false,
            cookie: 0,
            enabled: AtomicBool::new(true),
            awaited: AtomicU32::new(0),
            abandoned: AtomicU64::new(0),
            timed: AtomicU64::new(0),
            time: AtomicU64::new(0),
            counts: (0..vcpus).map(|_| VcpuCounts::default()).collect(),
        }
    }

    /// Where it stands in guest text.
    #[must_use]
    pub fn place(&self) -> Option<Place> {
        self.site.as_ref().map(|site| site.place)
    }

    /// The linear address that it is about.
    #[must_use]
    pub fn gva(&self) -> Gva {
        match (&self.site, self.kind) {
            (Some(site), _) => site.place.gva,
            (None, Kind::Access(watchpoint)) => watchpoint.gva(),
            (None, _) => Gva::default(),
        }
    }

    pub(crate) fn awaits_returns(&self) -> bool {
        matches!(self.kind, Kind::Return { .. })
    }

    /// Whether it takes hits. False for one that was disabled or taken out, or whose handler has panicked.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    pub(crate) fn set_enabled(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Release);
    }

    /// The accounts of one vCPU, to be written by its thread.
    pub(crate) fn on(&self, vcpu: VcpuId) -> Option<&VcpuCounts> {
        self.counts.get(usize::try_from(vcpu.0).ok()?)
    }

    pub(crate) fn count_executed(&self, vcpu: VcpuId, how: Executed) {
        if let Some(counts) = self.on(vcpu) {
            VcpuCounts::add(match how {
                Executed::Emulated | Executed::Halted => &counts.emulated,
                Executed::Stepped | Executed::Left => &counts.stepped,
                Executed::Faulted => &counts.faulted,
                Executed::Diverted => &counts.diverted,
            });
        }
    }

    /// Takes one of `most` places for a call that is awaited; false where there is none.
    pub(crate) fn begin_call(&self, most: u32) -> bool {
        let take = |awaited: u32| Some(awaited + 1).filter(|awaited| *awaited <= most);
        self.awaited.fetch_update(Relaxed, Relaxed, take).is_ok()
    }

    /// A call has returned, or is awaited no longer.
    pub(crate) fn end_call(&self) {
        self.awaited.fetch_sub(1, Relaxed);
    }

    /// A call will not return any more.
    pub(crate) fn abandon_call(&self) {
        self.end_call();
        self.abandoned.fetch_add(1, Relaxed);
    }

    pub(crate) fn add_timed(&self, time: u64) {
        self.timed.fetch_add(1, Relaxed);
        self.time.fetch_add(time, Relaxed);
    }

    /// What hits of it cost. Not counted for watchpoints, nor where a call returns.
    #[must_use]
    pub fn timed(&self) -> Timed {
        Timed { hits: self.timed.load(Relaxed), time: self.time.load(Relaxed) }
    }

    /// For returns: calls that have not returned yet.
    #[must_use]
    pub fn awaited(&self) -> u32 {
        self.awaited.load(Relaxed)
    }

    /// For returns: calls that were found never to return.
    #[must_use]
    pub fn abandoned(&self) -> u64 {
        self.abandoned.load(Relaxed)
    }

    /// The probe's accounts, summed over all vCPUs.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let mut sum = Counts::default();
        self.counts.iter().for_each(|vcpu| sum += vcpu.read());
        sum
    }

    /// The probe's accounts on one vCPU; zeros for one that the guest does not have.
    #[must_use]
    pub fn counts_on(&self, vcpu: VcpuId) -> Counts {
        self.on(vcpu).map(VcpuCounts::read).unwrap_or_default()
    }
}
