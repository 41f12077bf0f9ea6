//! The patch table: the one owner of the int3 bytes in guest text.
//!
//! A [`Site`] is one patched guest-physical address. It keeps the guest's own bytes, what they decode to and how that
//! runs; memory holds 0xCC in place of the first of them while the site is armed. Pages with sites are mapped read-only,
//! so the table sees every store the guest makes there ([`PatchTable::guest_write`]) and merges it under the int3: the
//! guest's own patching (ftrace, alternatives, jump labels) goes on, and the probe stays armed.
//!
//! Lookups on vCPU threads take no lock; arming, removal and guest writes are serialised.
//!
//! A site is made in two steps, so that whoever meets a new int3 finds all that belongs to it: [`PatchTable::prepare`]
//! examines the place and publishes the site, [`PatchTable::enable`] writes the int3.
//!
//! A site stands for whoever enabled it, or for the engine itself, which holds and releases it ([`PatchTable::hold`]), or for
//! both.
//!
//! Where there is no slot, an instruction runs in its place while no other vCPU runs ([`PatchTable::open`]): for that long its
//! int3 is out and another one, the guard, stands behind it. Neither changes what the table says: sites come, go and follow
//! the guest's writes as ever, on what lies beneath, and that is what memory gets back.
//!
//! Consistency on error: arming and opening are all or nothing. A byte that cannot be restored because the guest wrote it without us
//! seeing is left to the guest.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::{ArcSwap, Cache};
use iced_x86::{Code as Opcode, Decoder, Instruction};

use crate::emulate::Emulation;
use crate::paging;
use crate::plan::{self, MAX_INSTRUCTION, Plan, Refusal};
use crate::{Gpa, Gva, MemoryError, PAGE_SIZE, PhysicalMemory, SystemRegisters, Vendor};

/// The one-byte breakpoint instruction (Intel SDM vol. 2A, INT3).
pub const INT3: u8 = 0xcc;

/// Where to arm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Linear address of the instruction, as the guest's symbols have it.
    pub gva: Gva,
    /// Its guest-physical address.
    pub gpa: Gpa,
    /// Where its function starts, if known. Instruction boundaries are judged from there, which takes the function's
    /// text to be physically contiguous, as kernel text is.
    pub function: Option<Gva>,
}

impl Place {
    /// The place at a linear address by the page tables of `sys`. Outside of the kernel's image linear neighbours lie anywhere in
    /// physical memory: `function` is only kept where it is in the same page. `None` where nothing is mapped, or where
    /// the instruction goes on in a page that lies elsewhere.
    #[must_use]
    pub fn at(
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        gva: Gva,
        function: Option<Gva>,
    ) -> Option<Self> {
        let gpa = paging::physical(sys, memory, gva)?;
        let to_page_end = PAGE_SIZE - gva.page_offset();
        if to_page_end < MAX_INSTRUCTION as u64 {
            let mut bytes = [0; MAX_INSTRUCTION];
            let read = paging::read_virtual(sys, memory, gva, &mut bytes);
            let instruction =
                Decoder::with_ip(64, &bytes[..read], gva.0, Vendor::Unknown.decoder_options()).decode();
            let next = gva.offset(to_page_end);
            let contiguous = paging::physical(sys, memory, next) == Some(gpa.offset(to_page_end));
            if instruction.len() as u64 > to_page_end && !contiguous {
                return None;
            }
        }
        Some(Self { gva, gpa, function: function.filter(|start| start.page() == gva.page()) })
    }

    /// The 4 KiB pages, one or two, that can hold a byte of the instruction here: those to map read-only.
    #[must_use]
    pub fn pages(&self) -> [Gpa; 2] {
        [self.gpa.page(), self.gpa.offset(MAX_INSTRUCTION as u64 - 1).page()]
    }
}

/// Why a place could not be armed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ArmError {
    /// The bytes are not in guest RAM.
    #[error("{gva:#x} is at guest-physical {gpa:#x}, which is not RAM")]
    NotRam {
        /// The place asked for.
        gva: Gva,
        /// Where it would be.
        gpa: Gpa,
    },
    /// The place is inside an instruction.
    #[error("{gva:#x} is not the start of an instruction; the nearest ones are {before:#x} and {after:#x}")]
    NotABoundary {
        /// The place asked for.
        gva: Gva,
        /// The instruction that it is inside of.
        before: Gva,
        /// The instruction behind that.
        after: Gva,
    },
    /// The instruction cannot be executed out of place.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The probe was taken out, or its text freed.
    #[error(
        "The probe at {gva:#x} was taken out, or the guest has freed the code it stood in; arm a new one"
    )]
    Gone {
        /// Where it stood.
        gva: Gva,
    },
}

/// Whether a site's int3 is in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It is.
    Armed,
    /// It is not, for now.
    Disarmed,
    /// The guest rewrote its text so that no probe can stand here for now.
    Suspended {
        /// What is in the way.
        why: ArmError,
        /// Whether the int3 goes back in as soon as one can stand here again.
        rearm: bool,
    },
    /// It was taken out for good; the table has forgotten the site.
    Removed,
}

/// What stands at a site, as the guest has it.
#[derive(Clone, Debug)]
pub struct Code {
    bytes: [u8; MAX_INSTRUCTION],
    /// The displaced instruction, decoded at the site's linear address.
    pub instruction: Instruction,
    /// How the host emulates it; it runs out of line otherwise.
    pub emulation: Option<Emulation>,
    /// Whether the int3 is in memory.
    pub standing: Standing,
    vendor: Vendor,
}

impl Code {
    /// The displaced instruction's bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.instruction.len().clamp(1, MAX_INSTRUCTION)]
    }

    /// The guest has an int3 of its own here.
    #[must_use]
    pub fn is_guest_breakpoint(&self) -> bool {
        self.bytes[0] == INT3
    }

    /// Decodes the same bytes as they would run at another linear address of the same physical page.
    #[must_use]
    pub fn decode_at(&self, ip: Gva) -> Instruction {
        Decoder::with_ip(64, self.bytes(), ip.0, self.vendor.decoder_options()).decode()
    }
}

/// One patched address.
#[derive(Debug)]
pub struct Site {
    /// Where.
    pub place: Place,
    code: ArcSwap<Code>,
    /// Whether `code` says so.
    armed: AtomicBool,
    /// Whether the int3 was enabled. This and what follows is changed under the table's lock only.
    enabled: AtomicBool,
    /// How often the engine itself holds the int3.
    holders: AtomicU32,
    /// Its instruction could not be executed out of place: the engine is not to hold it again.
    withdrawn: AtomicBool,
}

impl Site {
    fn new(place: Place, code: Code) -> Self {
        Self {
            place,
            armed: AtomicBool::new(code.standing == Standing::Armed),
            code: ArcSwap::from_pointee(code),
            enabled: AtomicBool::new(false),
            holders: AtomicU32::new(0),
            withdrawn: AtomicBool::new(false),
        }
    }

    /// Whether the int3 stands for somebody else than the engine itself.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(SeqCst)
    }

    /// What stands here now.
    #[must_use]
    pub fn code(&self) -> Arc<Code> {
        self.code.load_full()
    }

    /// Whether the int3 is in memory.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        self.armed.load(SeqCst)
    }

    fn stand(&self, standing: Standing) {
        self.set(Code { standing, ..Code::clone(&self.code.load()) });
    }

    fn set(&self, code: Code) {
        let armed = code.standing == Standing::Armed;
        self.code.store(Arc::new(code));
        self.armed.store(armed, SeqCst);
    }

    /// The guest-physical address of the function's start, or of the site itself where the function is not known.
    fn anchor(&self) -> Gpa {
        match self.place.function {
            Some(start) if start <= self.place.gva => {
                Gpa(self.place.gpa.0.wrapping_sub(self.place.gva.0 - start.0))
            }
            _ => self.place.gpa,
        }
    }
}

/// Sites by their address.
pub(crate) type Sites = BTreeMap<Gpa, Arc<Site>>;

/// One vCPU's view of the table: as up to date as the table itself, and cheaper to look into, which is done at every hit.
#[derive(Debug)]
pub(crate) struct Lookup(Cache<Arc<ArcSwap<Sites>>, Arc<Sites>>);

impl Lookup {
    /// All sites of this moment.
    #[inline]
    pub fn sites(&mut self) -> &Arc<Sites> {
        self.0.load()
    }
}

/// True when `length` bytes from `gpa` on touch a page with sites.
#[inline]
pub(crate) fn covers(sites: &Sites, gpa: Gpa, length: usize) -> bool {
    let first = Gpa(gpa.page().0.saturating_sub(MAX_INSTRUCTION as u64));
    let last = gpa.offset(length as u64).page().offset(PAGE_SIZE);
    sites.range(first..).next().is_some_and(|(at, _)| *at < last)
}

/// Why an instruction could not be opened to run in its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The guest has something else there now.
    #[error("The instruction at {0} has changed meanwhile")]
    Changed(Gpa),
    /// One is open already: the machine has not held the other vCPUs.
    #[error("another vCPU runs an instruction in its place")]
    Busy,
    /// The place of the guard is not RAM.
    #[error("behind it there is no RAM for a breakpoint that would end it")]
    Guard(#[source] MemoryError),
}

/// A byte of text in memory that stands in for what the table knows.
#[derive(Debug)]
struct StandIn {
    gpa: Gpa,
    /// What memory holds.
    shown: u8,
    /// What it would hold otherwise.
    beneath: Cell<u8>,
}

/// What belongs to the holder of the table's lock.
#[derive(Debug, Default)]
struct Edit {
    /// While an instruction runs in its place: its first byte, and the guard.
    open: Vec<StandIn>,
}

impl Edit {
    fn text<'a>(&'a self, memory: &'a dyn PhysicalMemory) -> Text<'a> {
        Text { memory, open: &self.open }
    }

    /// Puts what lies beneath back, where memory still holds what stands in for it.
    fn close(&mut self, memory: &dyn PhysicalMemory) {
        for StandIn { gpa, shown, beneath } in self.open.drain(..) {
            let mut byte = [0];
            if memory.read(gpa, &mut byte).is_ok() && byte[0] == shown && beneath.get() != shown {
                // It was written when it was opened.
                let _ = memory.write(gpa, &[beneath.get()]);
            }
        }
    }
}

/// Guest text as the table takes it to be: without what stands in.
#[derive(Clone, Copy)]
struct Text<'a> {
    memory: &'a dyn PhysicalMemory,
    open: &'a [StandIn],
}

impl Text<'_> {
    /// Those that stand in for one of `length` bytes from `gpa` on, each with its index there.
    fn open(&self, gpa: Gpa, length: usize) -> impl Iterator<Item = (usize, &StandIn)> {
        self.open.iter().filter_map(move |open| {
            let index = usize::try_from(open.gpa.0.checked_sub(gpa.0)?).ok()?;
            (index < length).then_some((index, open))
        })
    }

    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(gpa, buf)?;
        for (index, open) in self.open(gpa, buf.len()) {
            buf[index] = open.beneath.get();
        }
        Ok(())
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        if self.open(gpa, data.len()).next().is_none() {
            return self.memory.write(gpa, data);
        }
        let mut shown = data.to_vec();
        for (index, open) in self.open(gpa, data.len()) {
            shown[index] = open.shown;
        }
        self.memory.write(gpa, &shown)?;
        for (index, open) in self.open(gpa, data.len()) {
            open.beneath.set(data[index]);
        }
        Ok(())
    }
}

/// All patched addresses of one guest.
#[derive(Debug, Default)]
pub struct PatchTable {
    sites: Arc<ArcSwap<Sites>>,
    edit: Mutex<Edit>,
    vendor: Vendor,
}

/// How far behind a store a site may be whose instruction boundaries the store can have moved: the size of the largest
/// function that is decoded again.
const REACH: u64 = 64 << 10;

impl PatchTable {
    /// A table for a guest on a CPU of this vendor.
    #[must_use]
    pub fn new(vendor: Vendor) -> Self {
        Self { vendor, ..Self::default() }
    }

    fn edit(&self) -> MutexGuard<'_, Edit> {
        // Each change of what the lock guards is one step, so a panic elsewhere leaves nothing half-changed behind it.
        self.edit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A view of the table for one vCPU.
    pub(crate) fn lookup(&self) -> Lookup {
        Lookup(Cache::new(Arc::clone(&self.sites)))
    }

    /// The site at `gpa`, armed or not. Takes no lock.
    #[must_use]
    pub fn find(&self, gpa: Gpa) -> Option<Arc<Site>> {
        self.sites.load().get(&gpa).cloned()
    }

    /// True when any site has its int3 in memory.
    #[must_use]
    pub fn any_armed(&self) -> bool {
        self.sites.load().values().any(|site| site.is_armed())
    }

    /// True when any site stands for somebody else than the engine itself.
    #[must_use]
    pub fn any_enabled(&self) -> bool {
        self.sites.load().values().any(|site| site.is_enabled())
    }

    /// All sites of this moment. Takes no lock.
    pub(crate) fn sites(&self) -> Arc<Sites> {
        self.sites.load_full()
    }

    /// Whether the int3 that stands at `gpa` is the guest's own. Waits for an edit that is under way: while one is, an int3
    /// of ours may stand without its site being armed, or the other way round.
    pub fn is_guests_own(&self, memory: &dyn PhysicalMemory, gpa: Gpa) -> bool {
        let edit = self.edit();
        let text = edit.text(memory);
        let mut byte = [0];
        let stands = text.read(gpa, &mut byte).is_ok() && byte[0] == INT3;
        stands && !self.sites.load().get(&gpa).is_some_and(|site| site.is_armed())
    }

    /// Puts the guest's own bytes into `buf`, which was read from `gpa` on. Takes no lock.
    pub fn uncover(&self, gpa: Gpa, buf: &mut [u8]) {
        uncover(&self.sites.load(), gpa, buf);
    }

    /// Makes a site of every place, or of none; no int3 is written. A place that has a site already shares it.
    ///
    /// # Errors
    /// The first place that no int3 can stand on, and why.
    pub fn prepare(&self, memory: &dyn PhysicalMemory, places: &[Place]) -> Result<Vec<Arc<Site>>, ArmError> {
        let edit = self.edit();
        let text = edit.text(memory);
        let known = self.sites.load();
        if let [place] = places
            && let Some(site) = known.get(&place.gpa)
        {
            return Ok(vec![Arc::clone(site)]);
        }
        let mut sites = Sites::clone(&known);
        let mut prepared = Vec::with_capacity(places.len());
        for place in places {
            if let Some(site) = sites.get(&place.gpa) {
                prepared.push(Arc::clone(site));
                continue;
            }
            let code = examine(&sites, text, place, self.vendor)?;
            let site = Arc::new(Site::new(*place, code));
            sites.insert(place.gpa, Arc::clone(&site));
            prepared.push(site);
        }
        self.sites.store(Arc::new(sites));
        Ok(prepared)
    }

    /// Writes the int3 of every site, or of none. One that stands already stays.
    ///
    /// # Errors
    /// The first site that cannot be armed, and why: its bytes are not RAM, or the guest has rewritten them meanwhile.
    pub fn enable(&self, memory: &dyn PhysicalMemory, sites: &[Arc<Site>]) -> Result<(), ArmError> {
        let edit = self.edit();
        let text = edit.text(memory);
        let mut written: Vec<&Arc<Site>> = Vec::with_capacity(sites.len());
        for site in sites {
            let armed = match site.code.load().standing.clone() {
                Standing::Armed => continue,
                Standing::Suspended { why, .. } => Err(why),
                Standing::Removed => Err(ArmError::Gone { gva: site.place.gva }),
                Standing::Disarmed => write_int3(text, site),
            };
            if let Err(error) = armed {
                for site in written {
                    restore(text, site, Standing::Disarmed);
                }
                return Err(error);
            }
            written.push(site);
        }
        // In this order: where a site is enabled and armed, its int3 stands.
        sites.iter().for_each(|site| site.enabled.store(true, SeqCst));
        Ok(())
    }

    /// Ends [`PatchTable::enable`]: takes the int3 out of one site, if it is still there and nobody holds it. The site stays
    /// known, and follows the guest's writes.
    pub fn disable(&self, memory: &dyn PhysicalMemory, site: &Site) {
        let edit = self.edit();
        let text = edit.text(memory);
        site.enabled.store(false, Relaxed);
        if site.holders.load(Relaxed) == 0 {
            restore(text, site, Standing::Disarmed);
        }
    }

    /// The same for a site whose instruction cannot be executed out of place after all: nobody holds it any more, or again.
    pub fn withdraw(&self, memory: &dyn PhysicalMemory, site: &Site) {
        let edit = self.edit();
        let text = edit.text(memory);
        site.withdrawn.store(true, Relaxed);
        site.enabled.store(false, Relaxed);
        site.holders.store(0, Relaxed);
        restore(text, site, Standing::Disarmed);
    }

    /// Writes the int3 of a place for the engine itself, once more if it holds it already. None where that is not possible.
    pub fn hold(&self, memory: &dyn PhysicalMemory, place: Place) -> Option<Arc<Site>> {
        let edit = self.edit();
        let text = edit.text(memory);
        let known = self.sites.load();
        let site = match known.get(&place.gpa) {
            Some(site) => Arc::clone(site),
            None => {
                let mut sites = Sites::clone(&known);
                let site = Arc::new(Site::new(place, examine(&known, text, &place, self.vendor).ok()?));
                sites.insert(place.gpa, Arc::clone(&site));
                self.sites.store(Arc::new(sites));
                site
            }
        };
        match site.code.load().standing {
            _ if site.withdrawn.load(Relaxed) => return None,
            Standing::Armed => {}
            Standing::Disarmed => {
                // In a page that is not watched, the guest may have changed its text.
                if site.place.function.is_some() || !is_unchanged(&known, text, &site) {
                    site.set(examine(&known, text, &site.place, self.vendor).ok()?);
                }
                write_int3(text, &site).ok()?;
            }
            Standing::Suspended { .. } | Standing::Removed => return None,
        }
        site.holders.fetch_add(1, Relaxed);
        Some(site)
    }

    /// Ends one [`PatchTable::hold`].
    pub fn release(&self, memory: &dyn PhysicalMemory, site: &Site) {
        let edit = self.edit();
        let text = edit.text(memory);
        // Removal has ended all holds.
        let left = site.holders.load(Relaxed).saturating_sub(1);
        site.holders.store(left, Relaxed);
        if left == 0 && !site.is_enabled() && site.code.load().standing != Standing::Removed {
            restore(text, site, Standing::Disarmed);
        }
    }

    /// Holds the int3 of a site once more that [`PatchTable::hold`] gave, if it still stands.
    pub fn hold_again(&self, site: &Site) -> bool {
        let _edit = self.edit();
        let stands = site.is_armed() && !site.withdrawn.load(Relaxed);
        if stands {
            site.holders.fetch_add(1, Relaxed);
        }
        stands
    }

    /// Ends one hold, and leaves the int3 where it is for the next one: until [`PatchTable::dismiss`].
    pub fn rest(&self, site: &Site) {
        let _edit = self.edit();
        // Removal has ended all holds.
        site.holders.store(site.holders.load(Relaxed).saturating_sub(1), Relaxed);
    }

    /// Takes the int3 of a site out if it only rests there.
    pub fn dismiss(&self, memory: &dyn PhysicalMemory, site: &Site) {
        let edit = self.edit();
        let text = edit.text(memory);
        if site.holders.load(Relaxed) == 0 && !site.is_enabled() && site.is_armed() {
            restore(text, site, Standing::Disarmed);
        }
    }

    /// Ends every hold: only what was enabled still stands.
    pub fn release_all(&self, memory: &dyn PhysicalMemory) {
        let edit = self.edit();
        let text = edit.text(memory);
        let all = self.sites.load_full();
        let held = |site: &&Arc<Site>| {
            let held = site.holders.swap(0, Relaxed) > 0 || site.is_armed();
            held && !site.is_enabled()
        };
        self.forget(text, all.values().filter(held));
    }

    /// Takes the int3 out of each site for good, if it is still there, and forgets the site. One that the engine itself holds
    /// goes when it is released.
    pub fn remove<'s>(&self, memory: &dyn PhysicalMemory, sites: impl IntoIterator<Item = &'s Arc<Site>>) {
        let edit = self.edit();
        let text = edit.text(memory);
        let unheld = sites.into_iter().filter(|site| {
            site.enabled.store(false, Relaxed);
            site.holders.load(Relaxed) == 0
        });
        self.forget(text, unheld);
    }

    /// Takes the int3 at `gpa` out of memory for a while, so that the instruction there, of these bytes, runs in its place, and
    /// puts one at `guard`, unless what is fetched from behind the instruction faults. Only while no other vCPU runs, and until
    /// [`PatchTable::close`].
    ///
    /// Who reads memory in between without pausing the machine sees the guard.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(
        &self,
        memory: &dyn PhysicalMemory,
        gpa: Gpa,
        bytes: &[u8],
        guard: Option<Gpa>,
    ) -> Result<(), OpenError> {
        let mut edit = self.edit();
        if !edit.open.is_empty() {
            return Err(OpenError::Busy);
        }
        let changed = OpenError::Changed(gpa);
        let mut found = [0; MAX_INSTRUCTION];
        let found = found.get_mut(..bytes.len()).ok_or(changed)?;
        read_original(&self.sites.load(), edit.text(memory), gpa, found).map_err(|_| changed)?;
        let first = *bytes.first().filter(|_| found == bytes).ok_or(changed)?;
        let stand_in = |gpa, shown| {
            let mut byte = [0];
            memory.read(gpa, &mut byte)?;
            if byte[0] != shown {
                memory.write(gpa, &[shown])?;
            }
            Ok(StandIn { gpa, shown, beneath: Cell::new(byte[0]) })
        };
        let guard = guard.map(|guard| stand_in(guard, INT3)).transpose().map_err(OpenError::Guard)?;
        edit.open.extend(guard);
        match stand_in(gpa, first) {
            Ok(original) => edit.open.push(original),
            Err(_) => {
                edit.close(memory);
                return Err(changed);
            }
        }
        Ok(())
    }

    /// Ends [`PatchTable::open`]: memory holds what it would hold without.
    pub fn close(&self, memory: &dyn PhysicalMemory) {
        self.edit().close(memory);
    }

    /// Takes every int3 out: guest text is then as the guest has it.
    pub fn remove_all(&self, memory: &dyn PhysicalMemory) {
        let mut edit = self.edit();
        edit.close(memory);
        let all = self.sites.load_full();
        self.forget(edit.text(memory), all.values());
    }

    /// Takes out every int3 in a range of linear addresses whose text the guest is about to drop.
    pub fn remove_range(&self, memory: &dyn PhysicalMemory, range: &std::ops::Range<Gva>) {
        let edit = self.edit();
        let text = edit.text(memory);
        let all = self.sites.load_full();
        self.forget(text, all.values().filter(|site| range.contains(&site.place.gva)));
    }

    /// The caller holds the lock.
    fn forget<'s>(&self, text: Text<'_>, sites: impl IntoIterator<Item = &'s Arc<Site>>) {
        let mut left = Sites::clone(&self.sites.load());
        for site in sites {
            restore(text, site, Standing::Removed);
            site.enabled.store(false, Relaxed);
            site.holders.store(0, Relaxed);
            if left.get(&site.place.gpa).is_some_and(|known| Arc::ptr_eq(known, site)) {
                left.remove(&site.place.gpa);
            }
        }
        self.sites.store(Arc::new(left));
    }

    /// Carries out a store of the guest in a watched page: the bytes land in memory, except under an armed int3, where
    /// they become the saved byte. Sites whose instruction or boundary changed are examined again; one that no longer
    /// stands on an instruction is suspended until the guest's next write puts it right.
    pub fn guest_write(&self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        let edit = self.edit();
        let text = edit.text(memory);
        let sites = self.sites.load_full();
        let end = gpa.offset(data.len() as u64);
        let mut from = gpa;
        for (at, site) in sites.range(gpa..end).filter(|(_, site)| site.is_armed()) {
            store(text, from, gpa, data, *at);
            from = at.offset(1);
            let mut code = Code::clone(&site.code.load());
            code.bytes[0] = data[usize::try_from(at.0 - gpa.0).unwrap_or_default()];
            site.set(code);
        }
        store(text, from, gpa, data, end);

        let reach_from = Gpa(gpa.0.saturating_sub(MAX_INSTRUCTION as u64));
        for site in sites.range(reach_from..end.offset(REACH)).map(|(_, site)| site) {
            if site.anchor() < end {
                reexamine(&sites, text, site);
            }
        }
    }
}

/// Stores the part of `data` (which starts at `base`) that lies in `from..to`.
fn store(text: Text<'_>, from: Gpa, base: Gpa, data: &[u8], to: Gpa) {
    if from >= to {
        return;
    }
    let (Ok(start), Ok(stop)) = (usize::try_from(from.0 - base.0), usize::try_from(to.0 - base.0)) else {
        return;
    };
    // The store came from a watched page, which is RAM; there is nobody to tell if it is not.
    let _ = text.write(from, &data[start..stop]);
}

/// Reads guest text as the guest left it, without our int3s.
fn read_original(sites: &Sites, text: Text<'_>, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
    text.read(gpa, buf)?;
    uncover(sites, gpa, buf);
    Ok(())
}

/// Replaces our int3s in `buf`, which was read from `gpa` on, by what the guest has there.
fn uncover(sites: &Sites, gpa: Gpa, buf: &mut [u8]) {
    for (at, site) in sites.range(gpa..gpa.offset(buf.len() as u64)) {
        let code = site.code.load();
        if let (Standing::Armed, Ok(index)) = (&code.standing, usize::try_from(at.0 - gpa.0)) {
            buf[index] = code.bytes[0];
        }
    }
}

/// Whether guest memory holds what the site was last found to hold.
fn is_unchanged(sites: &Sites, text: Text<'_>, site: &Site) -> bool {
    let mut bytes = [0; MAX_INSTRUCTION];
    read_original(sites, text, site.place.gpa, &mut bytes).is_ok() && bytes == site.code.load().bytes
}

/// Decodes what the guest has at a place and decides how it would run.
fn examine(sites: &Sites, text: Text<'_>, place: &Place, vendor: Vendor) -> Result<Code, ArmError> {
    let mut bytes = [0; MAX_INSTRUCTION];
    let mut available = MAX_INSTRUCTION;
    if read_original(sites, text, place.gpa, &mut bytes).is_err() {
        // The next page is not RAM: the instruction must end in this one.
        available =
            usize::try_from(PAGE_SIZE - place.gpa.page_offset()).unwrap_or_default().min(MAX_INSTRUCTION);
        read_original(sites, text, place.gpa, &mut bytes[..available])
            .map_err(|_| ArmError::NotRam { gva: place.gva, gpa: place.gpa })?;
        bytes[available..].fill(0);
    }
    if let Some(start) = place.function.filter(|start| *start < place.gva) {
        check_boundary(sites, text, place, start, vendor)?;
    }
    let instruction = plan::decode(&bytes[..available], place.gva, vendor)?;
    match plan::plan(&instruction) {
        Plan::Refuse(refusal) => Err(refusal.into()),
        Plan::Emulate | Plan::Step => {
            let emulation = Emulation::of(&instruction);
            Ok(Code { bytes, instruction, emulation, standing: Standing::Disarmed, vendor })
        }
    }
}

/// Decodes the function from its start up to the place.
///
/// An int3 on the way is the guest patching an earlier instruction (text_poke puts one on the first byte while it
/// changes the rest): boundaries are judged again once it is gone.
fn check_boundary(
    sites: &Sites,
    text: Text<'_>,
    place: &Place,
    start: Gva,
    vendor: Vendor,
) -> Result<(), ArmError> {
    let length = place.gva.0 - start.0;
    if length > REACH {
        // Too far to decode on every write of the guest; the caller has checked the image.
        return Ok(());
    }
    let mut code = vec![0; usize::try_from(length).unwrap_or_default() + MAX_INSTRUCTION];
    let anchor = Gpa(place.gpa.0.wrapping_sub(length));
    if read_original(sites, text, anchor, &mut code).is_err() {
        code.truncate(usize::try_from(length).unwrap_or_default() + 1);
        read_original(sites, text, anchor, &mut code)
            .map_err(|_| ArmError::NotRam { gva: place.gva, gpa: place.gpa })?;
    }
    let mut decoder = Decoder::with_ip(64, &code, start.0, vendor.decoder_options());
    let mut instruction = Instruction::default();
    while decoder.ip() < place.gva.0 && decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.code() == Opcode::Int3 {
            return Ok(());
        }
    }
    if decoder.ip() == place.gva.0 {
        return Ok(());
    }
    Err(ArmError::NotABoundary {
        gva: place.gva,
        before: Gva(instruction.ip()),
        after: Gva(instruction.next_ip()),
    })
}

/// Follows a change of the guest's text at or before a site.
fn reexamine(sites: &Sites, text: Text<'_>, site: &Site) {
    let old = site.code.load_full();
    let (armed, wanted) = match &old.standing {
        Standing::Armed => (true, true),
        Standing::Suspended { rearm, .. } => (false, *rearm),
        Standing::Disarmed | Standing::Removed => (false, false),
    };
    match examine(sites, text, &site.place, site.code.load().vendor) {
        Ok(mut code) => {
            if wanted {
                code.standing = Standing::Armed;
            }
            site.set(code);
            if wanted && !armed {
                let _ = text.write(site.place.gpa, &[INT3]);
            }
        }
        Err(ArmError::Refused(_)) if armed && old.is_guest_breakpoint() => {
            // The guest's own int3 is now under ours, as when it patches this instruction: stay armed, and give the
            // exception to the guest after each hit.
        }
        Err(why) => {
            if armed {
                let _ = text.write(site.place.gpa, &old.bytes[..1]);
            }
            site.stand(Standing::Suspended { why, rearm: wanted });
        }
    }
}

fn write_int3(text: Text<'_>, site: &Site) -> Result<(), ArmError> {
    // In this order: a vCPU that meets the int3 must find the site armed.
    site.stand(Standing::Armed);
    text.write(site.place.gpa, &[INT3]).map_err(|_| {
        site.stand(Standing::Disarmed);
        ArmError::NotRam { gva: site.place.gva, gpa: site.place.gpa }
    })
}

/// Puts the guest's byte back, unless the byte in text is no longer our int3.
fn restore(text: Text<'_>, site: &Site, standing: Standing) {
    let old = site.code.load_full();
    if old.standing == Standing::Armed {
        let mut byte = [0];
        if text.read(site.place.gpa, &mut byte).is_ok() && byte[0] == INT3 {
            let _ = text.write(site.place.gpa, &old.bytes[..1]);
        }
    }
    let standing = match (&old.standing, standing) {
        (Standing::Suspended { why, .. }, Standing::Disarmed) => {
            Standing::Suspended { why: why.clone(), rearm: false }
        }
        (_, standing) => standing,
    };
    site.stand(standing);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{MockMemory, Operation, OperationKind};

    const BASE: u64 = 0x1000;
    const TEXT: Gva = Gva(0xffff_ffff_8100_0000);

    /// A function as a stock kernel has it.
    const FUNCTION: &[u8] = &[
        0xe8, 0x11, 0x22, 0x33, 0x00, // call __fentry__
        0x55, // push %rbp
        0x48, 0x89, 0xe5, // mov %rsp,%rbp
        0x48, 0x8b, 0x07, // mov (%rdi),%rax
        0x5d, // pop %rbp
        0xc3, // ret
    ];

    fn memory() -> MockMemory {
        let memory = MockMemory::with_ram(0x4000);
        memory.load(Gpa(BASE), FUNCTION);
        memory
    }

    fn place(offset: u64) -> Place {
        Place { gva: TEXT.offset(offset), gpa: Gpa(BASE + offset), function: Some(TEXT) }
    }

    fn text(memory: &MockMemory) -> Vec<u8> {
        memory.bytes(Gpa(BASE), FUNCTION.len())
    }

    fn arm(table: &PatchTable, memory: &MockMemory, places: &[Place]) -> Result<Vec<Arc<Site>>, ArmError> {
        let sites = table.prepare(memory, places)?;
        table.enable(memory, &sites)?;
        Ok(sites)
    }

    fn one(table: &PatchTable, memory: &MockMemory, offset: u64) -> Arc<Site> {
        arm(table, memory, &[place(offset)]).unwrap().remove(0)
    }

    #[test]
    fn arming_writes_one_byte_and_removing_puts_it_back() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 5);
        assert_eq!(memory.writes(), [Operation::Write { gpa: Gpa(BASE + 5), data: vec![INT3] }]);
        assert_eq!(site.code().bytes(), [0x55]);
        assert!(table.any_armed());
        table.remove_all(&memory);
        assert_eq!(text(&memory), FUNCTION);
        assert!(!table.any_armed());
    }

    #[test]
    fn two_probes_on_one_address_share_the_site() {
        let memory = memory();
        let table = PatchTable::default();
        let sites = arm(&table, &memory, &[place(5), place(5)]).unwrap();
        assert!(Arc::ptr_eq(&sites[0], &sites[1]));
        assert!(Arc::ptr_eq(&sites[0], &one(&table, &memory, 5)));
        assert_eq!(sites[0].code().bytes(), [0x55]);
    }

    #[test]
    fn a_batch_is_armed_whole_or_not_at_all() {
        let memory = memory();
        let table = PatchTable::default();
        let error = arm(&table, &memory, &[place(5), place(7)]).unwrap_err();
        assert_eq!(
            error,
            ArmError::NotABoundary { gva: TEXT.offset(7), before: TEXT.offset(6), after: TEXT.offset(9) }
        );
        assert_eq!(text(&memory), FUNCTION);
        assert!(!table.any_armed());
    }

    #[test]
    fn a_write_that_fails_undoes_the_batch_and_a_retry_works() {
        let memory = memory();
        let table = PatchTable::default();
        memory.fail(OperationKind::Write, 2);
        let error = arm(&table, &memory, &[place(5), place(6)]).unwrap_err();
        assert!(matches!(error, ArmError::NotRam { .. }), "{error}");
        assert_eq!(memory.pending_failures(), 0);
        assert_eq!(text(&memory), FUNCTION);
        assert!(!table.any_armed());
        arm(&table, &memory, &[place(5), place(6)]).unwrap();
        assert_eq!(text(&memory)[5..7], [INT3, INT3]);
    }

    #[test]
    fn an_earlier_site_does_not_hide_the_boundaries_behind_it() {
        let memory = memory();
        let table = PatchTable::default();
        one(&table, &memory, 6);
        let site = one(&table, &memory, 9);
        assert_eq!(site.code().bytes(), [0x48, 0x8b, 0x07]);
        let error = arm(&table, &memory, &[place(8)]).unwrap_err();
        assert!(matches!(error, ArmError::NotABoundary { .. }), "{error}");
    }

    #[test]
    fn a_place_outside_ram_is_refused() {
        let table = PatchTable::default();
        let outside = Place { gva: TEXT, gpa: Gpa(0x10_0000), function: None };
        assert_eq!(
            arm(&table, &memory(), &[outside]).unwrap_err(),
            ArmError::NotRam { gva: TEXT, gpa: Gpa(0x10_0000) }
        );
    }

    #[test]
    fn an_instruction_at_the_end_of_ram_can_be_armed_if_it_ends_there() {
        let memory = MockMemory::with_ram(0x2000);
        memory.load(Gpa(0x1fff), &[0x55]);
        let table = PatchTable::default();
        let end = Place { gva: TEXT.offset(0xfff), gpa: Gpa(0x1fff), function: None };
        assert_eq!(arm(&table, &memory, &[end]).unwrap()[0].code().bytes(), [0x55]);
        let cut = MockMemory::with_ram(0x2000);
        cut.load(Gpa(0x1fff), &[0x48]);
        let refused = arm(&PatchTable::default(), &cut, &[end]);
        assert!(matches!(refused, Err(ArmError::Refused(Refusal::Truncated { available: 1, .. }))));
    }

    #[test]
    fn both_pages_of_an_instruction_are_watched() {
        let memory = MockMemory::with_ram(0x4000);
        // mov (%rdi),%rax across a page edge
        memory.load(Gpa(0x1ffe), &[0x48, 0x8b, 0x07]);
        let table = PatchTable::default();
        let edge = Place { gva: TEXT.offset(0xffe), gpa: Gpa(0x1ffe), function: None };
        arm(&table, &memory, &[edge]).unwrap();
        assert_eq!(edge.pages(), [Gpa(0x1000), Gpa(0x2000)]);
        assert_eq!(place(0).pages(), [Gpa(0x1000); 2]);
        let sites = table.sites();
        assert!(covers(&sites, Gpa(0x1234), 1) && covers(&sites, Gpa(0x0fff), 2));
        assert!(!covers(&sites, Gpa(0x3000), 8));
    }

    #[test]
    fn a_guest_store_lands_under_the_int3() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 5);
        // The guest rewrites push %rbp; mov %rsp,%rbp to a 4-byte nop in one store.
        table.guest_write(&memory, Gpa(BASE + 5), &[0x0f, 0x1f, 0x40, 0x00]);
        assert_eq!(text(&memory)[5..9], [INT3, 0x1f, 0x40, 0x00]);
        assert_eq!(site.code().bytes(), [0x0f, 0x1f, 0x40, 0x00]);
        table.remove_all(&memory);
        assert_eq!(text(&memory)[5..9], [0x0f, 0x1f, 0x40, 0x00]);
    }

    #[test]
    fn a_store_around_a_site_leaves_it_armed() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 5);
        // ftrace turns the call into a 5-byte nop; the store is 8 bytes wide.
        let mut store = vec![0x0f, 0x1f, 0x44, 0x00, 0x00];
        store.extend(&FUNCTION[5..8]);
        table.guest_write(&memory, Gpa(BASE), &store);
        assert_eq!(text(&memory)[..8], [0x0f, 0x1f, 0x44, 0x00, 0x00, INT3, 0x48, 0x89]);
        assert!(site.is_armed());
        assert_eq!(site.code().bytes(), [0x55]);
    }

    #[test]
    fn a_live_patch_by_text_poke_keeps_the_site_behind_it_armed_throughout() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 5);
        // int3 first, then the tail, then the first byte (as text_poke_bp does).
        for (at, bytes) in [(0, &[0xcc][..]), (1, &[0x1f, 0x44, 0x00, 0x00][..]), (0, &[0x0f][..])] {
            table.guest_write(&memory, Gpa(BASE + at), bytes);
            assert!(site.is_armed(), "after the store at +{at}");
            assert_eq!(text(&memory)[5], INT3);
        }
        assert_eq!(text(&memory)[..5], [0x0f, 0x1f, 0x44, 0x00, 0x00]);
    }

    #[test]
    fn a_live_patch_of_the_site_itself_makes_the_int3_both_ours_and_the_guests() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 5);
        table.guest_write(&memory, Gpa(BASE + 5), &[0xcc]);
        assert!(site.is_armed() && site.code().is_guest_breakpoint());
        table.guest_write(&memory, Gpa(BASE + 5), &[0x50]);
        assert!(site.is_armed() && !site.code().is_guest_breakpoint());
        assert_eq!(site.code().bytes(), [0x50]);
        assert_eq!(text(&memory)[5], INT3);
    }

    #[test]
    fn a_site_that_loses_its_boundary_steps_aside_until_it_is_back() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 6);
        // One 4-byte nop over push and mov: +6 is now inside it.
        table.guest_write(&memory, Gpa(BASE + 5), &[0x0f, 0x1f, 0x40, 0x00]);
        assert!(matches!(
            site.code().standing,
            Standing::Suspended { why: ArmError::NotABoundary { .. }, rearm: true }
        ));
        assert_eq!(text(&memory)[5..9], [0x0f, 0x1f, 0x40, 0x00]);
        table.guest_write(&memory, Gpa(BASE + 5), &FUNCTION[5..9]);
        assert!(site.is_armed());
        assert_eq!(text(&memory)[5..9], [0x55, INT3, 0x89, 0xe5]);
        table.remove_all(&memory);
        assert_eq!(text(&memory), FUNCTION);
    }

    #[test]
    fn bytes_stored_one_by_one_end_as_stored_at_once() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 5);
        for (offset, byte) in [0x0f, 0x1f, 0x40, 0x00].into_iter().enumerate() {
            table.guest_write(&memory, Gpa(BASE + 5 + offset as u64), &[byte]);
        }
        assert!(site.is_armed());
        assert_eq!(site.code().bytes(), [0x0f, 0x1f, 0x40, 0x00]);
        table.remove_all(&memory);
        assert_eq!(text(&memory)[5..9], [0x0f, 0x1f, 0x40, 0x00]);
    }

    #[test]
    fn a_site_that_was_taken_out_can_be_armed_again() {
        let memory = memory();
        let table = PatchTable::default();
        let first = one(&table, &memory, 5);
        table.remove(&memory, [&first]);
        assert_eq!(text(&memory), FUNCTION);
        let second = one(&table, &memory, 5);
        assert!(second.is_armed() && !first.is_armed());
        assert_eq!(text(&memory)[5], INT3);
        // The old handle is dead: it does not touch its successor.
        table.remove(&memory, [&first]);
        assert!(second.is_armed());
        assert_eq!(table.find(Gpa(BASE + 5)).map(|site| site.is_armed()), Some(true));
    }

    #[test]
    fn a_disarmed_site_follows_the_guests_writes_and_stays_out_of_memory() {
        let memory = memory();
        let table = PatchTable::default();
        let site = one(&table, &memory, 6);
        table.disable(&memory, &site);
        assert_eq!(text(&memory), FUNCTION);
        // Its boundary goes and comes back: it was not wanted in memory before, and is not now.
        table.guest_write(&memory, Gpa(BASE + 5), &[0x0f, 0x1f, 0x40, 0x00]);
        assert!(matches!(site.code().standing, Standing::Suspended { rearm: false, .. }));
        assert!(matches!(table.enable(&memory, &[Arc::clone(&site)]), Err(ArmError::NotABoundary { .. })));
        table.guest_write(&memory, Gpa(BASE + 5), &FUNCTION[5..9]);
        assert_eq!(text(&memory), FUNCTION);
        table.enable(&memory, &[Arc::clone(&site)]).unwrap();
        assert_eq!(text(&memory)[6], INT3);
        // Disarmed while suspended, it stays out when its place is good again.
        table.guest_write(&memory, Gpa(BASE + 5), &[0x0f, 0x1f, 0x40, 0x00]);
        table.disable(&memory, &site);
        table.guest_write(&memory, Gpa(BASE + 5), &FUNCTION[5..9]);
        assert_eq!(text(&memory), FUNCTION);
    }

    #[test]
    fn a_byte_that_is_no_longer_ours_is_the_guests() {
        let memory = memory();
        let table = PatchTable::default();
        one(&table, &memory, 5);
        memory.load(Gpa(BASE + 5), &[0x90]); // behind our back
        table.remove_all(&memory);
        assert_eq!(text(&memory)[5], 0x90);
    }

    #[test]
    fn a_range_can_be_removed_before_the_guest_drops_it() {
        let memory = memory();
        let table = PatchTable::default();
        let sites = arm(&table, &memory, &[place(5), place(12)]).unwrap();
        table.remove_range(&memory, &(TEXT..TEXT.offset(10)));
        assert!(!sites[0].is_armed() && sites[1].is_armed());
        // A removed site stays removed when the guest reuses the page.
        table.guest_write(&memory, Gpa(BASE + 5), &[0x55]);
        assert!(!sites[0].is_armed());
        assert_eq!(text(&memory)[5], 0x55);
    }

    #[test]
    fn a_held_site_stands_until_the_last_hold_ends() {
        let memory = memory();
        let table = PatchTable::default();
        let site = table.hold(&memory, place(5)).unwrap();
        assert!(Arc::ptr_eq(&site, &table.hold(&memory, place(5)).unwrap()));
        table.release(&memory, &site);
        assert_eq!(text(&memory)[5], INT3);
        assert!(table.any_armed() && !table.any_enabled());
        table.release(&memory, &site);
        assert_eq!(text(&memory), FUNCTION);
        // The guest changes its text meanwhile, behind our back: what is held next is what stands there then.
        memory.load(Gpa(BASE + 5), &[0x50]);
        table.hold(&memory, place(5)).unwrap();
        assert_eq!((site.code().bytes(), text(&memory)[5]), (&[0x50][..], INT3));
    }

    #[test]
    fn what_is_enabled_and_held_stands_until_both_end() {
        let memory = memory();
        let table = PatchTable::default();
        let held = table.hold(&memory, place(5)).unwrap();
        let site = one(&table, &memory, 5);
        assert!(Arc::ptr_eq(&site, &held) && site.is_enabled());
        table.release(&memory, &held);
        assert_eq!(text(&memory)[5], INT3, "it is enabled");
        table.hold(&memory, place(5)).unwrap();
        table.disable(&memory, &site);
        table.remove(&memory, [&site]);
        assert_eq!(text(&memory)[5], INT3, "it is held");
        table.release(&memory, &held);
        assert_eq!(text(&memory), FUNCTION);
        // And armed while nobody holds it.
        one(&table, &memory, 5);
        assert_eq!(text(&memory)[5], INT3);
    }

    #[test]
    fn a_withdrawn_site_is_not_held_again() {
        let memory = memory();
        let table = PatchTable::default();
        let site = table.hold(&memory, place(5)).unwrap();
        table.withdraw(&memory, &site);
        assert_eq!(text(&memory), FUNCTION);
        assert!(table.hold(&memory, place(5)).is_none());
        table.release(&memory, &site);
        assert_eq!(text(&memory), FUNCTION);
    }

    #[test]
    fn holds_in_text_that_is_dropped_end_and_are_nobodys_loss() {
        let memory = memory();
        let table = PatchTable::default();
        let site = table.hold(&memory, place(5)).unwrap();
        table.remove_range(&memory, &(TEXT..TEXT.offset(10)));
        table.release(&memory, &site);
        assert_eq!(text(&memory), FUNCTION);
        assert!(!table.any_armed());
    }

    #[test]
    fn all_holds_end_at_once_and_what_is_enabled_stays() {
        let memory = memory();
        let table = PatchTable::default();
        table.hold(&memory, place(5)).unwrap();
        table.hold(&memory, place(12)).unwrap();
        one(&table, &memory, 12);
        table.release_all(&memory);
        assert_eq!((text(&memory)[5], text(&memory)[12]), (FUNCTION[5], INT3));
    }

    #[test]
    fn a_hold_outside_ram_is_none_and_leaves_nothing_behind() {
        let memory = memory();
        let table = PatchTable::default();
        let outside = Place { gva: TEXT, gpa: Gpa(0x10_0000), function: None };
        assert!(table.hold(&memory, outside).is_none());
        memory.fail(OperationKind::Write, 1);
        assert!(table.hold(&memory, place(5)).is_none());
        assert!(!table.any_armed());
        assert!(table.hold(&memory, place(5)).is_some());
    }

    #[test]
    fn a_place_on_pages_that_lie_apart_is_one_only_if_its_instruction_ends_in_the_first() {
        use crate::mock::{MockPageTables, MockVcpu};
        let memory = MockMemory::with_ram(0x8000);
        let mut tables = MockPageTables::new(&memory, Gpa(0x10_0000), 4);
        tables.map(TEXT, Gpa(0x4000), 0x1000, 1);
        tables.map(TEXT.offset(0x1000), Gpa(0x2000), 0x1000, 1);
        tables.map(TEXT.offset(0x2000), Gpa(0x3000), 0x1000, 1);
        let sys = MockVcpu::new(Gpa(0x10_0000)).build().sys;
        // nop; mov (%rdi),%rax across the end of each page
        for page in [0x4000, 0x2000] {
            memory.load(Gpa(page + 0xffd), &[0x90, 0x48, 0x8b]);
        }
        memory.load(Gpa(0x2000), &[0x07]);
        memory.load(Gpa(0x3000), &[0x07]);
        let at = |offset, function| Place::at(&sys, &memory, TEXT.offset(offset), function);
        let nop = Place { gva: TEXT.offset(0xffd), gpa: Gpa(0x4ffd), function: Some(TEXT) };
        assert_eq!(at(0xffd, Some(TEXT)), Some(nop));
        assert_eq!(at(0xffe, None), None);
        let joined = at(0x1ffe, Some(TEXT)).unwrap();
        assert_eq!((joined.gpa, joined.function), (Gpa(0x2ffe), None));
        assert_eq!(at(0x3000, None), None);
    }

    #[test]
    fn one_instruction_is_open_at_a_time_and_closing_it_twice_changes_nothing() {
        let (memory, table) = (memory(), PatchTable::default());
        let sites = table.prepare(&memory, &[place(6)]).unwrap();
        table.enable(&memory, &sites).unwrap();
        let armed = memory.bytes(Gpa(BASE), FUNCTION.len());
        let open = |bytes| table.open(&memory, Gpa(BASE + 6), bytes, Some(Gpa(BASE + 9)));
        assert_eq!(open(&FUNCTION[6..8]), Ok(()));
        let opened = memory.bytes(Gpa(BASE), FUNCTION.len());
        assert_eq!((&opened[6..9], opened[9]), (&FUNCTION[6..9], INT3));
        assert_eq!(open(&FUNCTION[6..8]), Err(OpenError::Busy));
        assert_eq!(memory.bytes(Gpa(BASE), FUNCTION.len()), opened);
        table.close(&memory);
        assert_eq!(memory.bytes(Gpa(BASE), FUNCTION.len()), armed);
        memory.clear_log();
        table.close(&memory);
        assert_eq!(memory.log(), []);
        assert_eq!(open(&[0x48, 0x89, 0xe6]), Err(OpenError::Changed(Gpa(BASE + 6))));
        assert_eq!(memory.bytes(Gpa(BASE), FUNCTION.len()), armed);
    }

    #[test]
    fn what_the_guest_wrote_unseen_over_the_guard_stays() {
        let (memory, table) = (memory(), PatchTable::default());
        table.open(&memory, Gpa(BASE + 6), &FUNCTION[6..9], Some(Gpa(BASE + 9))).unwrap();
        memory.load(Gpa(BASE + 9), &[0x90]);
        table.close(&memory);
        assert_eq!(memory.bytes(Gpa(BASE + 9), 1), [0x90]);
    }

    #[test]
    fn a_site_behind_an_open_instruction_is_examined_as_the_guest_has_it() {
        let (memory, table) = (memory(), PatchTable::default());
        table.open(&memory, Gpa(BASE + 6), &FUNCTION[6..9], Some(Gpa(BASE + 9))).unwrap();
        let sites = table.prepare(&memory, &[place(9), place(12)]).unwrap();
        table.enable(&memory, &sites).unwrap();
        assert_eq!(sites[0].code().bytes(), &FUNCTION[9..12]);
        assert!(!table.is_guests_own(&memory, Gpa(BASE + 9)));
        table.disable(&memory, &sites[0]);
        assert_eq!(memory.bytes(Gpa(BASE + 9), 1), [INT3], "the guard");
        assert!(!table.is_guests_own(&memory, Gpa(BASE + 9)));
        table.remove_all(&memory);
        assert_eq!(memory.bytes(Gpa(BASE), FUNCTION.len()), FUNCTION);
    }
}
