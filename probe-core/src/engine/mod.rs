//! The engine: takes the stops of all vCPUs and decides how each goes on.
//!
//! One [`Engine`] serves a guest; each vCPU thread drives a [`VcpuEngine`] of its own, so hits on different vCPUs run in
//! parallel. What they share is the patch table and the probes of each site (looked up without a lock), the probes'
//! counters and the slots.
//!
//! Probes are armed, disabled and taken out while the guest runs. The order keeps every hit accounted for: breakpoints
//! exit to the host on every vCPU before the first int3 is written, and whoever meets an int3 finds its site and its
//! probes. The machine ([`MachineControl`]) is never asked for anything with a lock held, since it may wait for a vCPU
//! that waits for the lock.
//!
//! Consistency on error: [`Engine::arm`] and [`Engine::enable`] are all or nothing.

mod catchers;
mod displaced;
mod memory;
mod restart;
mod vcpu;
mod watches;

pub use vcpu::VcpuEngine;

use restart::Restarts;
use watches::Watches;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use iced_x86::FlowControl;

use crate::handler::Call;
use crate::machine::{ControlError, GuestText, MachineControl};
use crate::patch::{ArmError, PatchTable, Place, Site};
use crate::plan::text;
use crate::probe::{Probe, ProbeId, ProbeRequest};
use crate::returns::Returns;
use crate::slot::{SlotRegion, Slots};
use crate::watch::WatchpointError;
use crate::{Gpa, Gva, PhysicalMemory, VcpuId, VcpuState, Vendor};

/// A hit that is to be reported.
#[derive(Clone, Copy)]
pub struct Report<'a> {
    /// Which probe.
    pub probe: ProbeId,
    /// What its request said ([`ProbeRequest::cookie`]).
    pub cookie: u64,
    /// Where.
    pub vcpu: VcpuId,
    /// The state at the hit, before any handler changed it; RIP is the address of the hit.
    pub state: &'a VcpuState,
    /// For a return: the call.
    pub call: Option<&'a Call>,
    /// Guest memory.
    pub memory: &'a dyn PhysicalMemory,
}

impl std::fmt::Debug for Report<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Report")
            .field("probe", &self.probe)
            .field("cookie", &self.cookie)
            .field("vcpu", &self.vcpu)
            .field("state", self.state)
            .field("call", &self.call)
            .finish_non_exhaustive()
    }
}

/// Takes the hits of one vCPU, on that vCPU's thread. Must not block.
pub trait HitSink: Send {
    /// Takes a hit, or returns false where there is no room for it: it is then counted as lost.
    fn deliver(&mut self, report: &Report<'_>) -> bool;

    /// What to remember of the moment at which a function with a return probe is entered: the time, as a rule. It comes
    /// back as [`Call::stamp`]. Differences of two are what a hit takes ([`Probe::timed`]).
    fn stamp(&mut self) -> u64 {
        0
    }
}

/// Why probes could not be armed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EngineError {
    /// The guest's text does not allow it.
    #[error(transparent)]
    Arm(#[from] ArmError),
    /// The machine could not prepare it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The debug registers do not allow it.
    #[error(transparent)]
    Watchpoint(#[from] WatchpointError),
    /// A return address on an instruction that raises #UD.
    #[error(
        "`{instruction}` stands at {gva:#x}: the call does not return, or the guest looks at what stands there"
    )]
    Trap {
        /// The return address.
        gva: Gva,
        /// What stands there.
        instruction: String,
    },
    /// At a hit of a probe that is being taken out.
    #[error("The last probe is being taken out; arm new ones from outside of a handler")]
    LastProbeGone,
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
    /// A handler panicked.
    #[error("The handler of the probe at {gva:#x} panicked ({message}); the probe was disabled")]
    HandlerPanicked {
        /// The probe's address.
        gva: Gva,
        /// What it said.
        message: String,
    },
    /// A handler asked for a return that is not possible.
    #[error("The function at {gva:#x} could not be made to return: its return address cannot be read")]
    NoReturnAddress {
        /// The probe's address.
        gva: Gva,
    },
    /// Returns to an address cannot be seen.
    #[error("Returns to {gva:#x} cannot be seen: {reason}")]
    ReturnUnseen {
        /// The return address.
        gva: Gva,
        /// Why.
        reason: String,
    },
}

/// What an engine is made for.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Where displaced instructions run.
    pub slots: SlotRegion,
    /// vCPUs of the guest.
    pub vcpus: usize,
    /// Whose CPUs they are.
    pub vendor: Vendor,
    /// Ends the run after that many reported hits of probes that count towards it.
    pub max_hits: Option<u64>,
    /// No two stacks of the guest share a 4 KiB page, as in Linux: calls that never return are then found out sooner.
    pub stacks_in_whole_pages: bool,
    /// The machine.
    pub control: Arc<dyn MachineControl>,
    /// What is known of the guest's text.
    pub text: Arc<dyn GuestText>,
}

/// All who are interested in one site.
#[derive(Clone, Debug, Default)]
struct Users {
    probes: Vec<Arc<Probe>>,
    /// Calls may return to it.
    returns: bool,
}

impl Users {
    fn need_the_int3(&self) -> bool {
        self.returns || self.probes.iter().any(|probe| probe.is_enabled())
    }
}

type BySite = BTreeMap<Gpa, Arc<Users>>;

/// What only the holder of the lock changes.
#[derive(Debug, Default)]
struct Edit {
    /// How many probes were ever armed.
    armed: u32,
    /// How many return probes there are.
    return_probes: usize,
    /// How many threads are about to write an int3.
    arming: usize,
    /// The watchpoints, also those that are disabled.
    watches: Vec<Arc<Probe>>,
}

/// The pages of requests, each as often as a site asks for it.
fn pages_of(requests: &[ProbeRequest]) -> Vec<Gpa> {
    requests.iter().flat_map(|request| request.place.pages()).collect()
}

/// Pages that are watched for what is about to be armed; dropped, they are watched no longer. Must not be dropped with the lock
/// held, so it is made before the lock is taken.
struct Watched<'a> {
    engine: &'a Engine,
    pages: Vec<Gpa>,
}

impl Watched<'_> {
    /// They belong to armed sites now.
    fn keep(mut self) {
        self.pages.clear();
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.engine.unwatch(&self.pages);
    }
}

/// While this lives, breakpoints exit to the host.
struct BreakpointsExit<'a>(&'a Engine);

impl Drop for BreakpointsExit<'_> {
    fn drop(&mut self) {
        let mut edit = self.0.edit();
        edit.arming -= 1;
        self.0.refresh_armed(&edit);
    }
}

/// The probes of one guest.
#[derive(Debug)]
pub struct Engine {
    patches: PatchTable,
    slots: Slots,
    returns: Returns,
    restarts: Restarts,
    vcpus: usize,
    control: Arc<dyn MachineControl>,
    text: Arc<dyn GuestText>,
    by_site: Arc<ArcSwap<BySite>>,
    watches: ArcSwap<Watches>,
    /// Whether there are any.
    watching: AtomicBool,
    edit: Mutex<Edit>,
    /// True while any int3 of ours may be in guest memory. See [`Engine::refresh_armed`].
    armed: AtomicBool,
    /// How many more hits may be reported before the run finishes.
    budget: AtomicU64,
    notices: Mutex<Vec<Notice>>,
}

impl Engine {
    /// An engine without probes.
    #[must_use]
    pub fn new(config: EngineConfig) -> Self {
        Self {
            patches: PatchTable::new(config.vendor),
            slots: Slots::new(config.slots),
            returns: Returns::new(config.stacks_in_whole_pages),
            restarts: Restarts::default(),
            vcpus: config.vcpus,
            control: config.control,
            text: config.text,
            by_site: Arc::default(),
            watches: ArcSwap::default(),
            watching: AtomicBool::new(false),
            edit: Mutex::default(),
            armed: AtomicBool::new(false),
            budget: AtomicU64::new(config.max_hits.unwrap_or(u64::MAX)),
            notices: Mutex::default(),
        }
    }

    fn edit(&self) -> MutexGuard<'_, Edit> {
        // What it guards is changed at once, when nothing can fail any more.
        self.edit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Arms all of the requests, or none. The guest may run meanwhile. Not to be called on a vCPU's thread.
    ///
    /// # Errors
    /// The first request that cannot be armed, and why.
    pub fn arm(
        &self,
        memory: &dyn PhysicalMemory,
        requests: &[ProbeRequest],
    ) -> Result<Vec<Arc<Probe>>, EngineError> {
        let watched = self.watch(pages_of(requests))?;
        let _exit = self.let_breakpoints_exit();
        let probes = self.arm_watched(memory, requests, &mut self.edit())?;
        watched.keep();
        Ok(probes)
    }

    /// The same at a hit, on the vCPU's thread: breakpoints exit on every vCPU then, as long as an int3 stands.
    pub(crate) fn arm_at_hit(
        &self,
        memory: &dyn PhysicalMemory,
        requests: &[ProbeRequest],
    ) -> Result<Vec<Arc<Probe>>, EngineError> {
        let watched = self.watch(pages_of(requests))?;
        let mut edit = self.edit();
        if !self.patches.any_armed() {
            return Err(EngineError::LastProbeGone);
        }
        let probes = self.arm_watched(memory, requests, &mut edit)?;
        watched.keep();
        Ok(probes)
    }

    fn watch(&self, pages: Vec<Gpa>) -> Result<Watched<'_>, ControlError> {
        if !pages.is_empty() {
            self.control.watch(&pages)?;
        }
        Ok(Watched { engine: self, pages })
    }

    /// Pages that stay watched because the machine cannot do otherwise cost time and nothing else.
    fn unwatch(&self, pages: &[Gpa]) {
        if !pages.is_empty() {
            self.control.unwatch(pages).ok();
        }
    }

    /// Breakpoints must exit to the host on every vCPU before an int3 stands in memory. They do until what this returns is
    /// dropped, and from then on as long as one stands.
    fn let_breakpoints_exit(&self) -> BreakpointsExit<'_> {
        let stands = {
            let mut edit = self.edit();
            edit.arming += 1;
            self.armed.store(true, Ordering::SeqCst);
            self.patches.any_armed()
        };
        if !stands {
            self.control.synchronise();
        }
        BreakpointsExit(self)
    }

    /// Whether #BP has to exit follows from what stands in memory, and from what is about to.
    fn refresh_armed(&self, edit: &Edit) {
        self.armed.store(edit.arming > 0 || self.patches.any_armed(), Ordering::SeqCst);
    }

    fn arm_watched(
        &self,
        memory: &dyn PhysicalMemory,
        requests: &[ProbeRequest],
        edit: &mut Edit,
    ) -> Result<Vec<Arc<Probe>>, ArmError> {
        let places: Vec<Place> = requests.iter().map(|request| request.place).collect();
        let sites = self.patches.prepare(memory, &places)?;
        let before = self.by_site.load_full();
        let mut by_site = BySite::clone(&before);
        let mut probes = Vec::with_capacity(sites.len());
        for (number, (request, site)) in (edit.armed..).zip(requests.iter().zip(&sites)) {
            let probe = Arc::new(Probe::new(ProbeId(number), Arc::clone(site), request, self.vcpus));
            let users = by_site.entry(site.place.gpa).or_default();
            Arc::make_mut(users).probes.push(Arc::clone(&probe));
            probes.push(probe);
        }
        self.by_site.store(Arc::new(by_site));
        if let Err(error) = self.patches.enable(memory, &sites) {
            probes.iter().for_each(|probe| probe.set_enabled(false));
            let unused = sites.iter().filter(|site| !before.contains_key(&site.place.gpa));
            self.patches.remove(memory, unused);
            self.by_site.store(before);
            return Err(error);
        }
        edit.armed += u32::try_from(probes.len()).unwrap_or(u32::MAX);
        edit.return_probes += probes.iter().filter(|probe| probe.awaits_returns()).count();
        Ok(probes)
    }

    /// Lets a probe take hits again. Not to be called on a vCPU's thread.
    ///
    /// # Errors
    /// Why no int3 can stand at its place now, or no debug register is free.
    pub fn enable(&self, memory: &dyn PhysicalMemory, probe: &Arc<Probe>) -> Result<(), EngineError> {
        let Some(site) = &probe.site else { return self.enable_watch(probe) };
        let _exit = self.let_breakpoints_exit();
        let _edit = self.edit();
        if !self.is_known(probe) {
            return Err(ArmError::Gone { gva: probe.gva() }.into());
        }
        self.patches.enable(memory, std::slice::from_ref(site))?;
        probe.set_enabled(true);
        Ok(())
    }

    /// Keeps a probe from taking hits; its accounts stay, and calls that it awaits are reported still.
    pub fn disable(&self, memory: &dyn PhysicalMemory, probe: &Arc<Probe>) {
        let edit = self.edit();
        self.disable_locked(memory, probe, &edit);
    }

    fn disable_locked(&self, memory: &dyn PhysicalMemory, probe: &Probe, edit: &Edit) {
        probe.set_enabled(false);
        let Some(site) = &probe.site else { return self.drop_watch(probe.id) };
        let needed = self.users(site.place.gpa).is_some_and(|users| users.need_the_int3());
        if !needed {
            self.patches.disable(memory, site);
        }
        self.refresh_armed(edit);
    }

    /// Takes a probe out. When this returns, its handler does not run any more, on any vCPU. Not to be called on a vCPU's
    /// thread.
    pub fn remove(&self, memory: &dyn PhysicalMemory, probe: &Arc<Probe>) {
        let pages = self.forget(memory, probe);
        self.control.synchronise();
        // Calls that were being entered when the probe went.
        self.returns.forget(probe);
        let edit = self.edit();
        // No displaced instruction is under way any more, so nothing has to be caught.
        if !self.patches.any_enabled() {
            self.patches.release_all(memory);
            self.refresh_armed(&edit);
        }
        drop(edit);
        self.unwatch(&pages);
    }

    /// Takes out a probe, if it is there still. Returns the pages that are to be watched no longer.
    fn forget(&self, memory: &dyn PhysicalMemory, probe: &Arc<Probe>) -> Vec<Gpa> {
        let mut edit = self.edit();
        let mut by_site = BySite::clone(&self.by_site.load());
        let Some(place) = probe.place() else {
            probe.set_enabled(false);
            edit.watches.retain(|other| !Arc::ptr_eq(other, probe));
            self.drop_watch(probe.id);
            return Vec::new();
        };
        let Some(users) = by_site.get_mut(&place.gpa) else { return Vec::new() };
        if !users.probes.iter().any(|other| Arc::ptr_eq(other, probe)) {
            return Vec::new();
        }
        Arc::make_mut(users).probes.retain(|other| !Arc::ptr_eq(other, probe));
        self.retire(probe, &mut edit);
        let mut pages = place.pages().to_vec();
        if edit.return_probes == 0 {
            pages.extend(self.drop_returns(&mut by_site, |_| true));
        }
        self.publish(memory, by_site, &edit);
        pages
    }

    /// A probe that is in no list any more takes no hits, and awaits no calls.
    fn retire(&self, probe: &Arc<Probe>, edit: &mut Edit) {
        probe.set_enabled(false);
        if probe.awaits_returns() {
            self.returns.forget(probe);
            edit.return_probes -= 1;
        }
    }

    /// No call is noticed at the sites any more that `which` selects. Returns the pages that they needed watched.
    fn drop_returns(&self, by_site: &mut BySite, which: impl Fn(&Site) -> bool) -> Vec<Gpa> {
        let mut pages = Vec::new();
        for (gpa, users) in by_site.iter_mut().filter(|(_, users)| users.returns) {
            if let Some(site) = self.patches.find(*gpa).filter(|site| which(site)) {
                Arc::make_mut(users).returns = false;
                pages.extend(site.place.pages());
            }
        }
        pages
    }

    /// Makes `by_site` what counts: sites that nobody uses are taken out, and those that nobody needs now are disarmed.
    fn publish(&self, memory: &dyn PhysicalMemory, mut by_site: BySite, edit: &Edit) {
        let mut unused = Vec::new();
        by_site.retain(|gpa, users| {
            let used = users.returns || !users.probes.is_empty();
            if !used {
                unused.extend(self.patches.find(*gpa));
            }
            used
        });
        self.patches.remove(memory, &unused);
        for (gpa, _) in by_site.iter().filter(|(_, users)| !users.need_the_int3()) {
            if let Some(site) = self.patches.find(*gpa).filter(|site| site.is_armed()) {
                self.patches.disable(memory, &site);
            }
        }
        self.by_site.store(Arc::new(by_site));
        self.refresh_armed(edit);
    }

    /// Takes out every probe and every trace of the slots: the guest's memory is as if it had never been probed. Only
    /// while no vCPU runs.
    pub fn disarm_all(&self, memory: &dyn PhysicalMemory) {
        let mut edit = self.edit();
        for probe in self.by_site.load().values().flat_map(|users| &users.probes) {
            probe.set_enabled(false);
            self.returns.forget(probe);
        }
        self.patches.remove_all(memory);
        self.slots.unmap_all(memory);
        self.by_site.store(Arc::default());
        for probe in edit.watches.drain(..) {
            probe.set_enabled(false);
        }
        self.set_watches(Watches::default());
        edit.return_probes = 0;
        self.refresh_armed(&edit);
    }

    /// Whether a probe has not been taken out, by whoever armed it or because the guest has dropped its text.
    #[must_use]
    pub fn has(&self, probe: &Arc<Probe>) -> bool {
        self.is_known(probe) || self.edit().watches.iter().any(|watch| Arc::ptr_eq(watch, probe))
    }

    /// The same for one at a site.
    fn is_known(&self, probe: &Arc<Probe>) -> bool {
        let users = probe.place().and_then(|place| self.users(place.gpa));
        users.is_some_and(|users| users.probes.iter().any(|other| Arc::ptr_eq(other, probe)))
    }

    fn users(&self, gpa: Gpa) -> Option<Arc<Users>> {
        self.by_site.load().get(&gpa).cloned()
    }

    /// Sees to it that calls that return to `place` are noticed. Called on a vCPU's thread.
    fn await_returns(&self, memory: &dyn PhysicalMemory, place: Place) -> Result<(), EngineError> {
        // A site is armed shortly before its int3 stands, and enabled when it does. One that is suspended is still enabled.
        let stands = |site: Arc<Site>| site.is_armed() && site.is_enabled();
        let watched = |users: &Arc<Users>| users.returns && self.patches.find(place.gpa).is_some_and(stands);
        if self.by_site.load().get(&place.gpa).is_some_and(watched) {
            return Ok(());
        }
        let watched_now = self.watch(place.pages().to_vec())?;
        let _edit = self.edit();
        if !self.patches.any_armed() {
            return Err(EngineError::LastProbeGone);
        }
        let sites = self.patches.prepare(memory, &[place])?;
        let before = self.by_site.load_full();
        // What raises #UD on purpose follows a call that never returns, or a guest's warning, whose handler reads it.
        let instruction = sites.first().map(|site| site.code().instruction);
        if let Some(instruction) = instruction.filter(|it| it.flow_control() == FlowControl::Exception) {
            if !before.contains_key(&place.gpa) {
                self.patches.remove(memory, &sites);
            }
            return Err(EngineError::Trap { gva: place.gva, instruction: text(&instruction) });
        }
        let mut by_site = BySite::clone(&before);
        let users = Arc::make_mut(by_site.entry(place.gpa).or_default());
        let another_was_quicker = std::mem::replace(&mut users.returns, true);
        self.by_site.store(Arc::new(by_site));
        if let Err(error) = self.patches.enable(memory, &sites) {
            if !before.contains_key(&place.gpa) {
                self.patches.remove(memory, &sites);
            }
            self.by_site.store(before);
            return Err(error.into());
        }
        if !another_was_quicker {
            watched_now.keep();
        }
        Ok(())
    }

    /// Takes out what stands in text that the guest is about to drop; returns how many probes that were. Called on a vCPU's thread.
    pub(crate) fn drop_text(&self, memory: &dyn PhysicalMemory, range: &std::ops::Range<Gva>) -> usize {
        let (count, pages) = self.forget_text(memory, range);
        self.unwatch(&pages);
        count
    }

    fn forget_text(&self, memory: &dyn PhysicalMemory, range: &std::ops::Range<Gva>) -> (usize, Vec<Gpa>) {
        let mut edit = self.edit();
        let mut by_site = BySite::clone(&self.by_site.load());
        let mut pages = self.drop_returns(&mut by_site, |site| range.contains(&site.place.gva));
        let mut gone = Vec::new();
        for users in by_site.values_mut() {
            let inside = |probe: &Arc<Probe>| range.contains(&probe.gva());
            if users.probes.iter().any(inside) {
                gone.extend(Arc::make_mut(users).probes.extract_if(.., |probe| inside(probe)));
            }
        }
        for probe in &gone {
            self.retire(probe, &mut edit);
            pages.extend(probe.place().iter().flat_map(Place::pages));
        }
        if edit.return_probes == 0 {
            pages.extend(self.drop_returns(&mut by_site, |_| true));
        }
        self.publish(memory, by_site, &edit);
        // What the engine holds for itself there goes too.
        self.patches.remove_range(memory, range);
        (gone.len(), pages)
    }

    /// Takes a site out whose instruction turned out to be impossible to execute out of place.
    fn withdraw(&self, memory: &dyn PhysicalMemory, site: &Site, reason: String) {
        let edit = self.edit();
        if let Some(users) = self.users(site.place.gpa) {
            users.probes.iter().for_each(|probe| probe.set_enabled(false));
        }
        self.patches.withdraw(memory, site);
        self.refresh_armed(&edit);
        self.notice(Notice::Withdrawn { gva: site.place.gva, reason });
    }

    /// Disables a probe whose handler has panicked.
    fn detach(&self, memory: &dyn PhysicalMemory, probe: &Probe, message: String) {
        let edit = self.edit();
        self.disable_locked(memory, probe, &edit);
        self.notice(Notice::HandlerPanicked { gva: probe.gva(), message });
    }

    /// What happened to the probes since the last call.
    #[must_use]
    pub fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut *self.notices.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells the user, once.
    fn notice(&self, notice: Notice) {
        let mut notices = self.notices.lock().unwrap_or_else(PoisonError::into_inner);
        if !notices.contains(&notice) {
            notices.push(notice);
        }
    }

    /// Whether the run is to finish because enough hits have been reported.
    fn is_spent(&self) -> bool {
        self.budget.load(Ordering::SeqCst) == 0
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
