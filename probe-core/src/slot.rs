//! Slots: where displaced instructions run out of line.
//!
//! The slot region is a piece of guest-physical memory of its own, outside what the guest knows as RAM. Its first page
//! holds one slot a vCPU, so a slot is written only while the one vCPU that runs in it is stopped; the other pages are
//! page tables, with which the host maps the region into the guest kernel's address space on demand: as a page of 2 MiB in a
//! not-present entry within 2 GiB of the probe, read-only and executable, supervisor. A guest that walks its own tables, as
//! Linux does when it looks for writable code, cannot reach a table outside its RAM; so there is none below an entry that maps
//! 2 MiB, and a kernel like Linux has such entries to spare. Entries only ever go from
//! not-present to present while the guest runs, which needs no TLB flush (Intel SDM vol. 3A, 4.10.4.3).
//!
//! Consistency on error: a mapping that cannot be made leaves the guest's tables as they were.

use std::sync::{Mutex, PoisonError};

use crate::paging::{self, Entry, TranslateError, entry};
use crate::state::control;
use crate::{Gpa, Gva, MemoryError, PAGE_SIZE, PhysicalMemory, SystemRegisters, VcpuId};

/// Bytes from one slot to the next: room for [`crate::relocate::SLOT_SIZE`], and a cache line for each vCPU.
pub const SLOT_STRIDE: u64 = 64;

/// How many vCPUs the first page of a region serves.
pub const MAX_VCPUS: u64 = PAGE_SIZE / SLOT_STRIDE;

/// How far RIP-relative operands reach, less a page of slots and the longest instruction.
const REACH: u64 = (2 << 30) - 2 * PAGE_SIZE;

const PMD_SIZE: u64 = 2 << 20;
/// Entries at this level map 2 MiB.
const LEAF_LEVEL: u8 = 2;
const ZERO_PAGE: [u8; 4096] = [0; 4096];
/// A table entry of ours: supervisor. The accessed bit is set from the start, so the CPU changes nothing in it.
const TABLE_FLAGS: u64 = entry::PRESENT | entry::WRITABLE | entry::ACCESSED;
/// The region's own entry: 2 MiB, read-only, executable, supervisor.
const PAGE_FLAGS: u64 = entry::PRESENT | entry::ACCESSED | entry::LARGE;

/// Where the linear addresses of slots are looked for first, in a Linux kernel's address space: below the module area,
/// behind the kernel image, in the page-table page that all processes share (Documentation/arch/x86/x86_64/mm.rst).
const LINUX_HOLE: Gva = Gva(0xffff_ffff_bf00_0000);
/// And from where downwards next: the end of the module area, which fills from its start. Early in its boot Linux has the
/// whole area of the kernel image mapped.
const LINUX_MODULES_END: Gva = Gva(0xffff_ffff_ff00_0000);
/// Set in every address of the upper half.
const SIGN: u64 = 1 << 63;
const KERNEL_HALF: u64 = 0xffff_ffff_8000_0000;

/// Why no slot could be mapped near an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// Paging is off, or not 64-bit.
    #[error("The guest does not run in 64-bit mode with paging on")]
    NoPaging,
    /// Every entry within reach is taken.
    #[error("No free page-table entry within 2 GiB of {near:#x}")]
    NoHole {
        /// The probe.
        near: Gva,
    },
    /// All pages of the region are in use as page tables.
    #[error("The slot region has no page left for a page table near {near:#x}")]
    RegionFull {
        /// The probe.
        near: Gva,
    },
    /// The tables cannot be walked.
    #[error("The guest's page tables cannot be followed")]
    Tables(#[from] TranslateError),
    /// An entry cannot be written.
    #[error("The guest's page tables cannot be changed")]
    Write(#[from] MemoryError),
}

/// The guest-physical memory that slots may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRegion {
    /// First page, a multiple of 2 MiB. Nothing else that must not be mapped follows up to the next one.
    pub base: Gpa,
    /// Size in bytes, a multiple of 4096, at least four pages.
    pub size: u64,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    gva: Gva,
    /// The guest's entry that was zero before.
    entry: Gpa,
    value: u64,
}

#[derive(Debug, Default)]
struct Mappings {
    /// Pages of the region in use, the slot page included.
    pages: u64,
    live: Vec<Mapping>,
}

/// The slots of one guest.
#[derive(Debug)]
pub struct Slots {
    region: SlotRegion,
    mappings: Mutex<Mappings>,
}

impl Slots {
    /// Slots in a region that is reachable through [`PhysicalMemory`] and filled with zeros.
    #[must_use]
    pub fn new(region: SlotRegion) -> Self {
        Self { region, mappings: Mutex::new(Mappings { pages: 1, live: Vec::new() }) }
    }

    /// Where they are.
    #[must_use]
    pub fn region(&self) -> SlotRegion {
        self.region
    }

    /// The guest-physical address of a vCPU's slot.
    #[must_use]
    pub fn gpa(&self, vcpu: VcpuId) -> Gpa {
        self.region.base.offset(u64::from(vcpu.0) % MAX_VCPUS * SLOT_STRIDE)
    }

    /// The linear address of a vCPU's slot in the address space that `sys` selects, within reach of `near`. Maps it first
    /// where it is not mapped.
    ///
    /// # Errors
    /// When there is no place for a mapping.
    pub fn map(
        &self,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        vcpu: VcpuId,
        near: Gva,
    ) -> Result<Gva, SlotError> {
        if sys.cr0 & control::CR0_PG == 0 || sys.efer & control::EFER_LMA == 0 {
            return Err(SlotError::NoPaging);
        }
        let in_page = u64::from(vcpu.0) % MAX_VCPUS * SLOT_STRIDE;
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        for mapping in &mappings.live {
            if within_reach(mapping.gva, near)
                && paging::physical(sys, memory, mapping.gva) == Some(self.region.base)
            {
                return Ok(mapping.gva.offset(in_page));
            }
        }
        let mapping = self.establish(sys, memory, near, &mut mappings)?;
        let known = mappings.live.iter().any(|old| old.entry == mapping.entry && old.value == mapping.value);
        if !known {
            mappings.live.push(mapping);
        }
        Ok(mapping.gva.offset(in_page))
    }

    fn establish(
        &self,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        near: Gva,
        mappings: &mut Mappings,
    ) -> Result<Mapping, SlotError> {
        // The guest may have cleared an entry of ours, as Linux does when it trims its boot page tables: put it back.
        for mapping in &mappings.live {
            if within_reach(mapping.gva, near)
                && hole(sys, memory, mapping.gva)?.is_some_and(|hole| hole.gpa == mapping.entry)
            {
                memory.write(mapping.entry, &mapping.value.to_le_bytes())?;
                return Ok(*mapping);
            }
        }
        let mut best: Option<(Gva, Entry)> = None;
        for gva in candidates(near) {
            let Some(hole) = hole(sys, memory, gva)? else { continue };
            if best.is_none_or(|(_, known)| hole.level < known.level) {
                best = Some((gva, hole));
            }
            if hole.level == LEAF_LEVEL {
                break;
            }
        }
        let Some((gva, hole)) = best else { return Err(SlotError::NoHole { near }) };
        let tables = u64::from(hole.level - LEAF_LEVEL);
        if (mappings.pages + tables) * PAGE_SIZE > self.region.size {
            return Err(SlotError::RegionFull { near });
        }
        let mut target = self.region.base.0 | PAGE_FLAGS;
        for below in LEAF_LEVEL..hole.level {
            let table = self.region.base.offset(mappings.pages * PAGE_SIZE);
            mappings.pages += 1;
            memory.write(table, &ZERO_PAGE)?;
            memory.write(table.offset(8 * index(gva, below)), &target.to_le_bytes())?;
            target = table.0 | TABLE_FLAGS;
        }
        memory.write(hole.gpa, &target.to_le_bytes())?;
        Ok(Mapping { gva, entry: hole.gpa, value: target })
    }

    /// Puts zeros in the place of the entries of ours in `buf`, which was read from `gpa` on: what the guest has there.
    pub(crate) fn uncover(&self, gpa: Gpa, buf: &mut [u8]) {
        let mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        for mapping in &mappings.live {
            let at = mapping.entry.0.checked_sub(gpa.0).and_then(|at| usize::try_from(at).ok());
            let entry = at.and_then(|at| buf.get_mut(at..)?.first_chunk_mut());
            if let Some(entry) = entry.filter(|entry| **entry == mapping.value.to_le_bytes()) {
                *entry = [0; 8];
            }
        }
    }

    /// Takes the mappings out of the guest's page tables again. Only while no vCPU runs.
    pub fn unmap_all(&self, memory: &dyn PhysicalMemory) {
        let mut mappings = self.mappings.lock().unwrap_or_else(PoisonError::into_inner);
        for mapping in std::mem::take(&mut mappings.live) {
            // The CPU may have set the accessed bit, which is set from the start, and nothing else.
            if memory.read_u64(mapping.entry) == Ok(mapping.value) {
                let _ = memory.write(mapping.entry, &0_u64.to_le_bytes());
            }
        }
        mappings.pages = 1;
    }
}

fn within_reach(slot: Gva, near: Gva) -> bool {
    slot.0.wrapping_sub(near.0) < REACH || near.0.wrapping_sub(slot.0) < REACH
}

/// 2 MiB-aligned linear addresses within reach of `near`, the best first. Kernel code in the upper half never gets a
/// slot in the lower one, which belongs to the current process.
fn candidates(near: Gva) -> impl Iterator<Item = Gva> {
    let steps = REACH / PMD_SIZE;
    let upwards = |from: Gva| (0..steps).map(move |step| from.offset(step * PMD_SIZE));
    let downwards = |from: Gva| (1..steps).map(move |step| from.offset((step * PMD_SIZE).wrapping_neg()));
    let (one, other): (Box<dyn Iterator<Item = Gva>>, Box<dyn Iterator<Item = Gva>>) =
        if near.0 >= KERNEL_HALF {
            (Box::new(downwards(LINUX_HOLE.offset(PMD_SIZE))), Box::new(downwards(LINUX_MODULES_END)))
        } else {
            let here = Gva(near.0 & !(PMD_SIZE - 1));
            (Box::new(upwards(here)), Box::new(downwards(here)))
        };
    one.chain(other).filter(move |gva| canonical(*gva) && gva.0 >= near.0 & SIGN && within_reach(*gva, near))
}

/// Canonical with 48 bits, which five-level guests accept too.
fn canonical(gva: Gva) -> bool {
    let top = gva.0 >> 47;
    top == 0 || top == (1 << 17) - 1
}

/// The index of `gva` in a table of the given level, which counts from 1 for page tables.
fn index(gva: Gva, level: u8) -> u64 {
    gva.0 >> (12 + 9 * (u32::from(level) - 1)) & 0x1ff
}

/// The wholly empty entry above the page tables that keeps `gva` from being mapped, if that is what keeps it. A
/// not-present entry with other bits set means something to the guest.
fn hole(
    sys: &SystemRegisters,
    memory: &dyn PhysicalMemory,
    gva: Gva,
) -> Result<Option<Entry>, TranslateError> {
    let last = paging::walk_entries(sys, memory, gva)?.last();
    Ok(last.filter(|entry| entry.value == 0 && entry.level >= LEAF_LEVEL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VcpuState;
    use crate::mock::{MockMemory, MockPageTables, MockVcpu};

    const REGION: SlotRegion = SlotRegion { base: Gpa(0xd000_0000), size: 0x1_0000 };
    const ROOT: Gpa = Gpa(0x10_0000);

    fn guest(memory: &MockMemory, map: impl FnOnce(&mut MockPageTables<'_>)) -> VcpuState {
        memory.add_ram(REGION.base, REGION.size);
        let mut tables = MockPageTables::new(memory, ROOT, 4);
        map(&mut tables);
        MockVcpu::new(tables.root()).build()
    }

    /// A kernel image of 64 MiB at -2 GiB, as Linux maps its own.
    fn linux(memory: &MockMemory) -> VcpuState {
        guest(memory, |tables| {
            for offset in (0..64 << 20).step_by(2 << 20) {
                tables.map(
                    Gva(0xffff_ffff_8100_0000 + offset),
                    Gpa(0x100_0000 + offset),
                    2 << 20,
                    entry::PRESENT | entry::WRITABLE,
                );
            }
        })
    }

    const NEAR: Gva = Gva(0xffff_ffff_8134_a355);

    #[test]
    fn a_copy_of_memory_is_the_guests_without_entries_of_ours() {
        let memory = MockMemory::default();
        let state = linux(&memory);
        let copy = || {
            let mut bytes = vec![0; 64 << 12];
            for (page, at) in bytes.chunks_mut(4096).zip((ROOT.0..).step_by(4096)) {
                // Those that no table is in are not there.
                memory.read(Gpa(at), page).ok();
            }
            bytes
        };
        let (slots, before) = (Slots::new(REGION), copy());
        slots.map(&state.sys, &memory, VcpuId(0), Gva(0xffff_ffff_8100_0000)).unwrap();
        let mut after = copy();
        assert_ne!(before, after);
        slots.uncover(ROOT.offset(64 << 12), &mut [0xff; 16]);
        slots.uncover(ROOT, &mut after);
        assert_eq!(before, after);
    }

    #[test]
    fn a_slot_is_mapped_executable_read_only_and_supervisor_near_the_probe() {
        let memory = MockMemory::new();
        let state = linux(&memory);
        let slots = Slots::new(REGION);
        let gva = slots.map(&state.sys, &memory, VcpuId(3), NEAR).unwrap();
        assert!(within_reach(gva, NEAR));
        assert_eq!(paging::physical(&state.sys, &memory, gva), Some(slots.gpa(VcpuId(3))));
        let walk = paging::walk_entries(&state.sys, &memory, gva).unwrap();
        let leaf = walk.last().unwrap();
        assert_eq!(leaf.value & (entry::WRITABLE | entry::USER | entry::NO_EXECUTE), 0);
    }

    #[test]
    fn a_mapping_is_made_once_and_shared_by_all_vcpus() {
        let memory = MockMemory::new();
        let state = linux(&memory);
        let slots = Slots::new(REGION);
        let one = slots.map(&state.sys, &memory, VcpuId(0), NEAR).unwrap();
        memory.clear_log();
        let two = slots.map(&state.sys, &memory, VcpuId(1), NEAR.offset(0x1000)).unwrap();
        assert_eq!(two, one.offset(SLOT_STRIDE));
        assert_eq!(memory.writes(), []);
    }

    #[test]
    fn an_entry_that_the_guest_cleared_is_put_back() {
        let memory = MockMemory::new();
        let state = linux(&memory);
        let slots = Slots::new(REGION);
        let gva = slots.map(&state.sys, &memory, VcpuId(0), NEAR).unwrap();
        let entries = paging::walk_entries(&state.sys, &memory, gva).unwrap();
        let pmd = entries.entries()[2].gpa;
        memory.load(pmd, &[0; 8]);
        assert_eq!(slots.map(&state.sys, &memory, VcpuId(0), NEAR), Ok(gva));
        assert_eq!(paging::physical(&state.sys, &memory, gva), Some(REGION.base));
    }

    #[test]
    fn low_code_gets_its_slot_behind_the_identity_map() {
        let memory = MockMemory::new();
        let state = guest(&memory, |tables| {
            for offset in (0..1_u64 << 30).step_by(2 << 20) {
                tables.map(Gva(offset), Gpa(offset), 2 << 20, entry::PRESENT | entry::WRITABLE);
            }
        });
        let slots = Slots::new(REGION);
        let near = Gva(0x10_2030);
        let gva = slots.map(&state.sys, &memory, VcpuId(0), near).unwrap();
        assert_eq!(gva, Gva(1 << 30));
        slots.unmap_all(&memory);
        assert_eq!(paging::physical(&state.sys, &memory, gva), None);
    }

    #[test]
    fn no_table_of_ours_is_put_into_a_kernels_tables_while_an_entry_for_2_mib_is_free() {
        let memory = MockMemory::new();
        // As early in Linux's boot: the area of the kernel image is full, and of what follows only the fixed mappings are there.
        let state = guest(&memory, |tables| {
            for offset in (0..1_u64 << 30).step_by(2 << 20) {
                let gva = Gva(0xffff_ffff_8000_0000 + offset);
                tables.map(gva, Gpa(offset), 2 << 20, entry::PRESENT | entry::WRITABLE);
            }
            tables.map(Gva(0xffff_ffff_ff5f_f000), Gpa(0), 0x1000, entry::PRESENT);
        });
        let slots = Slots::new(REGION);
        let gva = slots.map(&state.sys, &memory, VcpuId(0), NEAR).unwrap();
        assert_eq!(gva, Gva(0xffff_ffff_fee0_0000));
        let walk = paging::walk_entries(&state.sys, &memory, gva).unwrap();
        let leaf = walk.last().unwrap();
        assert_eq!((leaf.level, leaf.is_leaf()), (2, true));
        assert!(leaf.gpa < REGION.base, "in a table of the guest's own");
    }

    #[test]
    fn unmapping_leaves_the_guests_tables_as_they_were() {
        let memory = MockMemory::new();
        let state = linux(&memory);
        let before = memory.bytes(ROOT, 0x4000);
        let slots = Slots::new(REGION);
        slots.map(&state.sys, &memory, VcpuId(0), NEAR).unwrap();
        assert_ne!(memory.bytes(ROOT, 0x4000), before);
        slots.unmap_all(&memory);
        assert_eq!(memory.bytes(ROOT, 0x4000), before);
        // And a later run starts from fresh tables.
        let gva = slots.map(&state.sys, &memory, VcpuId(0), NEAR).unwrap();
        assert_eq!(paging::physical(&state.sys, &memory, gva), Some(REGION.base));
    }

    #[test]
    fn no_hole_within_reach_is_an_error_that_names_the_probe() {
        let memory = MockMemory::new();
        let state = guest(&memory, |tables| {
            for offset in (0..8_u64 << 30).step_by(1 << 30) {
                let gva = Gva(0xffff_fffe_0000_0000_u64.wrapping_add(offset));
                tables.map(gva, Gpa(0), 1 << 30, entry::PRESENT);
            }
        });
        let slots = Slots::new(REGION);
        assert_eq!(slots.map(&state.sys, &memory, VcpuId(0), NEAR), Err(SlotError::NoHole { near: NEAR }));
    }

    #[test]
    fn a_region_without_room_for_tables_is_an_error() {
        let memory = MockMemory::new();
        let state = guest(&memory, |_| {});
        let slots = Slots::new(SlotRegion { base: REGION.base, size: 0x2000 });
        assert_eq!(
            slots.map(&state.sys, &memory, VcpuId(0), NEAR),
            Err(SlotError::RegionFull { near: NEAR })
        );
        let mut real_mode = state.sys;
        real_mode.cr0 = 0;
        assert_eq!(slots.map(&real_mode, &memory, VcpuId(0), NEAR), Err(SlotError::NoPaging));
    }
}
