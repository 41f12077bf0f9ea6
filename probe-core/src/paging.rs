//! The guest's page tables, walked in software with the guest's own rights.
//!
//! Intel SDM vol. 3A, chapter 4; AMD APM vol. 2, chapter 5. Covered are paging off and 4- and 5-level long-mode paging
//! with pages of 4 KiB, 2 MiB and 1 GiB. All accesses are explicit ones, made by the instruction itself: with SMAP,
//! RFLAGS.AC opens user pages to the supervisor.
//!
//! Bits above the guest's physical address width are reserved too, but that width is not known here; an entry that
//! sets them points outside RAM and ends as [`TranslateError::NotRam`].

use crate::{Exception, Gpa, Gva, MemoryError, PAGE_SIZE, PhysicalMemory, SystemRegisters, control, rflags};

/// Bits of a paging-structure entry (Intel SDM vol. 3A, tables 4-15 to 4-20).
pub mod entry {
    /// Present.
    pub const PRESENT: u64 = 1 << 0;
    /// Writable.
    pub const WRITABLE: u64 = 1 << 1;
    /// Accessible at CPL 3.
    pub const USER: u64 = 1 << 2;
    /// Has been used for a translation.
    pub const ACCESSED: u64 = 1 << 5;
    /// Leaf only: has been used for a write.
    pub const DIRTY: u64 = 1 << 6;
    /// At levels 2 and 3: maps a page, not a table.
    pub const LARGE: u64 = 1 << 7;
    /// Kept in the TLB across CR3 loads.
    pub const GLOBAL: u64 = 1 << 8;
    /// Not executable (reserved while EFER.NXE is clear).
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// The physical address of a table or a 4 KiB page.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
    /// The four protection-key bits of a leaf start here.
    pub const KEY_SHIFT: u32 = 59;
}

/// Page-fault error code bits (Intel SDM vol. 3A, 4.7).
pub mod fault {
    /// The fault is a rights violation, not a missing page.
    pub const PRESENT: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The access was made at CPL 3.
    pub const USER: u32 = 1 << 2;
    /// A reserved bit is set in an entry.
    pub const RESERVED: u32 = 1 << 3;
    /// The access was an instruction fetch.
    pub const FETCH: u32 = 1 << 4;
    /// The protection key denies the access.
    pub const KEY: u32 = 1 << 5;
}

/// CR4: linear-address masking for supervisor addresses.
const CR4_LAM_SUP: u64 = 1 << 28;
/// CR3: linear-address masking for user addresses, two widths.
const CR3_LAM_USER: u64 = 3 << 61;
/// EFER: AMD's upper address ignore.
const EFER_UAIE: u64 = 1 << 20;

/// How often a walk starts again because another vCPU changed an entry under it.
const MAX_RETRIES: u32 = 64;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A data read.
    Read,
    /// A data write, or the read of a read-modify-write: the CPU asks for the right to write first.
    Write,
    /// An instruction fetch.
    Execute,
}

/// Whether a translation leaves its traces in the page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// Set the accessed bits, and the dirty bit for a write, as the CPU does.
    Set,
    /// Look only.
    Keep,
}

/// Where a guest-virtual address lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The guest-physical address, with the offset in the page.
    pub gpa: Gpa,
    /// Size of the page in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// Every level allows writes.
    pub writable: bool,
    /// Every level allows accesses at CPL 3.
    pub user: bool,
}

/// Why a guest-virtual address could not be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TranslateError {
    /// The address is not canonical: #SS(0) for an access relative to the stack segment, #GP(0) for any other.
    #[error("Address {0} is not canonical")]
    NonCanonical(Gva),
    /// The page tables refuse the access with this #PF.
    #[error("The guest's page tables refuse the access with {0:x?}")]
    Fault(Exception),
    /// A paging-structure entry lies outside RAM.
    #[error("The guest's page table entry at {0} is not in RAM")]
    NotRam(Gpa),
    /// 32-bit paging, an address that may carry a tag (LAM, UAI), or an entry that other vCPUs keep changing.
    #[error("The paging mode or tag of address {0} is not covered by the software page walk")]
    Unsupported(Gva),
}

/// One paging-structure entry met on a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Entry {
    /// 5 or 4 at the root, 1 for a page-table entry.
    pub level: u8,
    /// Where the entry itself lies.
    pub gpa: Gpa,
    /// Its value.
    pub value: u64,
}

impl Entry {
    /// Whether the entry is present.
    #[must_use]
    pub const fn is_present(&self) -> bool {
        self.value & entry::PRESENT != 0
    }

    /// Whether the entry is present and maps a page.
    #[must_use]
    pub const fn is_leaf(&self) -> bool {
        self.is_present() && (self.level == 1 || (self.level <= 3 && self.value & entry::LARGE != 0))
    }

    /// How many bytes one entry at this level spans.
    #[must_use]
    pub const fn span(&self) -> u64 {
        span(self.level)
    }

    /// Bits that must be zero in every CPU's view of a present entry.
    fn reserved(&self, sys: &SystemRegisters) -> u64 {
        let no_execute = if sys.efer & control::EFER_NXE == 0 { entry::NO_EXECUTE } else { 0 };
        let shape = match self.level {
            4 | 5 => entry::LARGE,
            2 | 3 if self.is_leaf() => (self.span() - 1) & entry::ADDRESS & !PAGE_SIZE,
            _ => 0,
        };
        self.value & (no_execute | shape)
    }
}

/// The entries that lead to an address, from the root down to the leaf or to the first one that is not present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    entries: [Entry; 5],
    len: usize,
    /// The bits set in every entry.
    common: u64,
}

impl Default for Walk {
    fn default() -> Self {
        Self { entries: [Entry::default(); 5], len: 0, common: u64::MAX }
    }
}

impl Walk {
    /// The entries, root first. Empty while paging is off.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        self.entries.get(..self.len).unwrap_or_default()
    }

    /// The last entry: a leaf, or the one at which the address is not present.
    #[must_use]
    pub fn last(&self) -> Option<Entry> {
        self.entries().last().copied()
    }

    /// Where `gva`, whose walk this is, lies, if it is mapped; a page of 4 KiB while paging is off.
    #[must_use]
    pub fn translation(&self, gva: Gva) -> Option<Translation> {
        match self.last() {
            None => Some(unpaged(gva)),
            Some(leaf) => leaf.is_leaf().then(|| self.mapped(leaf, gva)),
        }
    }

    fn mapped(&self, leaf: Entry, gva: Gva) -> Translation {
        Translation {
            gpa: leaf_address(leaf, gva),
            page_size: leaf.span(),
            writable: self.all(entry::WRITABLE),
            user: self.all(entry::USER),
        }
    }

    /// Whether no level forbids instruction fetches.
    #[must_use]
    pub fn is_executable(&self) -> bool {
        self.entries().iter().all(|entry| entry.value & entry::NO_EXECUTE == 0)
    }

    fn push(&mut self, entry: Entry) {
        if let Some(place) = self.entries.get_mut(self.len) {
            *place = entry;
            self.len += 1;
            self.common &= entry.value;
        }
    }

    /// Whether these bits are set in every entry.
    fn all(&self, bits: u64) -> bool {
        self.common & bits == bits
    }
}

/// Whether `gva` is canonical: bits 63 down to the topmost translated one are equal (Intel SDM vol. 1, 3.3.7.1).
#[must_use]
pub const fn is_canonical(sys: &SystemRegisters, gva: Gva) -> bool {
    let unused = if sys.cr4 & control::CR4_LA57 != 0 { 64 - 57 } else { 64 - 48 };
    (gva.0 << unused).cast_signed() >> unused == gva.0.cast_signed()
}

/// Finds the entries that lead to `gva`, without rights and without marks.
///
/// # Errors
/// Every [`TranslateError`] except [`TranslateError::Fault`].
#[inline]
pub fn walk_entries(
    sys: &SystemRegisters,
    memory: &dyn PhysicalMemory,
    gva: Gva,
) -> Result<Walk, TranslateError> {
    let mut walk = Walk::default();
    visit_entries(sys, memory, gva, |entry| walk.push(entry))?;
    Ok(walk)
}

/// Hands the entries that lead to `gva` to `visit`, root first.
#[inline]
fn visit_entries(
    sys: &SystemRegisters,
    memory: &dyn PhysicalMemory,
    gva: Gva,
    mut visit: impl FnMut(Entry),
) -> Result<(), TranslateError> {
    if sys.cr0 & control::CR0_PG == 0 {
        return Ok(());
    }
    if sys.efer & control::EFER_LMA == 0 {
        return Err(TranslateError::Unsupported(gva));
    }
    if !is_canonical(sys, gva) {
        let tagged = sys.cr4 & CR4_LAM_SUP != 0 || sys.cr3 & CR3_LAM_USER != 0 || sys.efer & EFER_UAIE != 0;
        return Err(if tagged {
            TranslateError::Unsupported(gva)
        } else {
            TranslateError::NonCanonical(gva)
        });
    }
    let levels = if sys.cr4 & control::CR4_LA57 != 0 { 5 } else { 4 };
    let mut table = Gpa(sys.cr3 & entry::ADDRESS);
    for level in (1..=levels).rev() {
        let gpa = table.offset((gva.0 / span(level) % 512) * 8);
        let value = memory.read_u64(gpa).map_err(|MemoryError::NotRam(_)| TranslateError::NotRam(gpa))?;
        let entry = Entry { level, gpa, value };
        visit(entry);
        if !entry.is_present() || entry.is_leaf() {
            break;
        }
        table = Gpa(value & entry::ADDRESS);
    }
    Ok(())
}

/// Translates `gva` for an access by the guest: at its CPL, with its flags and its protection keys.
///
/// # Errors
/// [`TranslateError`]; a fault carries the error code and address that the CPU would report.
pub fn translate(
    sys: &SystemRegisters,
    flags: u64,
    pkru: u32,
    memory: &dyn PhysicalMemory,
    gva: Gva,
    access: Access,
    marks: Marks,
) -> Result<Translation, TranslateError> {
    for _ in 0..MAX_RETRIES {
        let walk = walk_entries(sys, memory, gva)?;
        let Some(leaf) = walk.last() else {
            return Ok(unpaged(gva));
        };
        if let Some(code) = violation(sys, flags, pkru, &walk, access) {
            return Err(TranslateError::Fault(Exception::PageFault { address: gva, code }));
        }
        if marks == Marks::Set && !mark(memory, &walk, access)? {
            continue;
        }
        return Ok(walk.mapped(leaf, gva));
    }
    Err(TranslateError::Unsupported(gva))
}

/// Where `gva` lies, without rights and without marks: for looking up what stands at RIP, and for debug reads.
#[must_use]
pub fn physical(sys: &SystemRegisters, memory: &dyn PhysicalMemory, gva: Gva) -> Option<Gpa> {
    let mut last = None;
    visit_entries(sys, memory, gva, |entry| last = Some(entry)).ok()?;
    match last {
        None => Some(unpaged(gva).gpa),
        Some(leaf) if leaf.is_leaf() => Some(leaf_address(leaf, gva)),
        Some(_) => None,
    }
}

/// Reads guest-virtual memory without rights and without marks, each page translated on its own. Returns how many
/// bytes from the start of `buf` are valid; it ends early at a page that is not mapped or not RAM.
pub fn read_virtual(sys: &SystemRegisters, memory: &dyn PhysicalMemory, gva: Gva, buf: &mut [u8]) -> usize {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = gva.offset(done as u64);
        let part = rest.len().min(bytes_to_page_end(at));
        let Some(chunk) = rest.get_mut(..part) else { break };
        let readable = physical(sys, memory, at).is_some_and(|gpa| memory.read(gpa, chunk).is_ok());
        if !readable {
            break;
        }
        done += part;
    }
    done
}

/// Bytes from `gva` to the end of its 4 KiB page, 1..=4096.
pub(crate) const fn bytes_to_page_end(gva: Gva) -> usize {
    // At most 4096.
    #[allow(clippy::cast_possible_truncation)]
    let bytes = (PAGE_SIZE - gva.page_offset()) as usize;
    bytes
}

/// How many bytes one entry of `level` spans: 4 KiB at level 1, 512 times as much at each level above.
const fn span(level: u8) -> u64 {
    PAGE_SIZE << (9 * (level as u32 - 1))
}

/// With paging off linear addresses are physical ones, 32 bits wide.
const fn unpaged(gva: Gva) -> Translation {
    Translation { gpa: Gpa(gva.0 & 0xffff_ffff), page_size: PAGE_SIZE, writable: true, user: true }
}

fn leaf_address(leaf: Entry, gva: Gva) -> Gpa {
    let offset = leaf.span() - 1;
    Gpa((leaf.value & entry::ADDRESS & !offset) | (gva.0 & offset))
}

/// The page-fault error code if the access is refused (Intel SDM vol. 3A, 4.6 and 4.7). A missing page or a reserved
/// bit found on the way down comes before rights, which are judged at the end.
fn violation(sys: &SystemRegisters, flags: u64, pkru: u32, walk: &Walk, access: Access) -> Option<u32> {
    let set = |register: u64, bit: u64| register & bit != 0;
    let user_access = sys.cpl == 3;
    let no_execute = set(sys.efer, control::EFER_NXE);
    let mut code = 0;
    if access == Access::Write {
        code |= fault::WRITE;
    }
    if user_access {
        code |= fault::USER;
    }
    if access == Access::Execute && (no_execute || set(sys.cr4, control::CR4_SMEP)) {
        code |= fault::FETCH;
    }
    for entry in walk.entries() {
        if !entry.is_present() {
            return Some(code);
        }
        if entry.reserved(sys) != 0 {
            return Some(code | fault::PRESENT | fault::RESERVED);
        }
    }

    let user_page = walk.all(entry::USER);
    let write_protected = user_access || set(sys.cr0, control::CR0_WP);
    let denied = match access {
        _ if user_access && !user_page => true,
        Access::Execute => {
            let marked = walk.entries().iter().any(|entry| set(entry.value, entry::NO_EXECUTE));
            (no_execute && marked) || (!user_access && user_page && set(sys.cr4, control::CR4_SMEP))
        }
        Access::Read | Access::Write => {
            let shut =
                !user_access && user_page && set(sys.cr4, control::CR4_SMAP) && !set(flags, rflags::AC);
            shut || (access == Access::Write && write_protected && !walk.all(entry::WRITABLE))
        }
    };
    let mut key_denied = false;
    if user_page && access != Access::Execute && set(sys.cr4, control::CR4_PKE) {
        let key = walk.last().map_or(0, |leaf| leaf.value >> entry::KEY_SHIFT & 15);
        let rights = pkru >> (2 * key);
        key_denied = rights & 1 != 0 || (rights & 2 != 0 && access == Access::Write && write_protected);
    }
    if key_denied {
        code |= fault::KEY;
    }
    (denied || key_denied).then_some(code | fault::PRESENT)
}

/// Sets the accessed bits and, for a write, the dirty bit. False if an entry has changed since the walk read it.
fn mark(memory: &dyn PhysicalMemory, walk: &Walk, access: Access) -> Result<bool, TranslateError> {
    let is_dirty = walk.last().is_none_or(|leaf| leaf.value & entry::DIRTY != 0);
    if walk.all(entry::ACCESSED) && (access != Access::Write || is_dirty) {
        return Ok(true);
    }
    for entry in walk.entries() {
        let dirty = if access == Access::Write && entry.is_leaf() { entry::DIRTY } else { 0 };
        let marked = entry.value | entry::ACCESSED | dirty;
        if marked == entry.value {
            continue;
        }
        let found = memory
            .compare_exchange(entry.gpa, 8, entry.value, marked)
            .map_err(|MemoryError::NotRam(_)| TranslateError::NotRam(entry.gpa))?;
        if found != entry.value {
            return Ok(false);
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests;
