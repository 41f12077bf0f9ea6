//! How guest memory is laid out in KVM's memory slots.
//!
//! Watched pages stand in read-only slots of their own. A slot's read-only flag cannot be changed later, nor its size (KVM
//! API, 4.35 KVM_SET_USER_MEMORY_REGION), so a change of what is watched deletes slots and adds others. In between a running
//! vCPU would see no memory at all: the machine has to be paused.

use std::collections::{BTreeMap, BTreeSet};

use probe_core::{Gpa, PAGE_SIZE};

use crate::memory::HostRange;

/// One KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemorySlot {
    pub range: HostRange,
    /// Guest writes exit as MMIO (KVM_MEM_READONLY).
    pub read_only: bool,
}

/// The slots by their number in KVM.
pub(crate) type Layout = BTreeMap<u32, MemorySlot>;

/// One KVM_SET_USER_MEMORY_REGION.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Takes a slot away.
    Delete {
        /// Its number.
        number: u32,
        /// What it was.
        slot: MemorySlot,
    },
    /// Adds one.
    Add {
        /// Its number.
        number: u32,
        /// What it is.
        slot: MemorySlot,
    },
}

impl Change {
    /// What undoes it.
    pub fn inverse(self) -> Self {
        match self {
            Change::Delete { number, slot } => Change::Add { number, slot },
            Change::Add { number, slot } => Change::Delete { number, slot },
        }
    }
}

/// What leads from `layout` to one with exactly `slots`. Slots that are in both keep their number and are not touched;
/// deletions come first, because slots must never overlap.
pub(crate) fn changes(layout: &Layout, slots: &[MemorySlot]) -> Vec<Change> {
    let (kept, deleted): (Layout, Layout) = layout.iter().partition(|(_, slot)| slots.contains(slot));
    let free = (0..).filter(|number| !kept.contains_key(number));
    let added = slots.iter().filter(|slot| !kept.values().any(|kept| kept == *slot));
    let deletions = deleted.into_iter().map(|(number, slot)| Change::Delete { number, slot });
    let additions = free.zip(added).map(|(number, slot)| Change::Add { number, slot: *slot });
    deletions.chain(additions).collect()
}

/// Why the watched pages cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotsError {
    /// No RAM there.
    #[error("Watched page {0} is not in guest RAM; enlarge the memory or drop the probe there")]
    NotRam(Gpa),
    /// KVM's limit.
    #[error(
        "The probed pages need {needed} KVM memory slots and this host has {limit}; set fewer probes, or probes closer together"
    )]
    TooMany {
        /// Slots needed.
        needed: usize,
        /// KVM_CAP_NR_MEMSLOTS.
        limit: usize,
    },
}

/// Cuts `ranges` into slots so that each run of pages of `watched` is a read-only slot.
///
/// # Errors
/// [`SlotsError`] when a watched page is in none of the ranges, or more than `limit` slots are needed.
pub(crate) fn split(
    ranges: &[HostRange],
    watched: &BTreeSet<Gpa>,
    limit: usize,
) -> Result<Vec<MemorySlot>, SlotsError> {
    let watched: BTreeSet<Gpa> = watched.iter().map(|gpa| gpa.page()).collect();
    let inside = |range: &HostRange, page: Gpa| page >= range.gpa && page.0 - range.gpa.0 < range.bytes;
    if let Some(page) = watched.iter().find(|page| !ranges.iter().any(|range| inside(range, **page))) {
        return Err(SlotsError::NotRam(*page));
    }

    let mut slots: Vec<MemorySlot> = Vec::new();
    for range in ranges {
        let mut push = |from: u64, to: u64, read_only: bool| {
            if from < to {
                let range =
                    HostRange { gpa: range.gpa.offset(from), bytes: to - from, host: range.host + from };
                slots.push(MemorySlot { range, read_only });
            }
        };
        // Offsets in the range: everything before `written` is in a slot; `run` is the open run of watched pages.
        let mut written = 0;
        let mut run: Option<(u64, u64)> = None;
        for page in watched.range(range.gpa..).take_while(|page| inside(range, **page)) {
            let at = page.0 - range.gpa.0;
            run = match run {
                Some((from, to)) if to == at => Some((from, at + PAGE_SIZE)),
                previous => {
                    if let Some((from, to)) = previous {
                        push(written, from, false);
                        push(from, to, true);
                        written = to;
                    }
                    Some((at, at + PAGE_SIZE))
                }
            };
        }
        if let Some((from, to)) = run {
            push(written, from, false);
            push(from, to, true);
            written = to;
        }
        push(written, range.bytes, false);
    }
    if slots.len() > limit {
        return Err(SlotsError::TooMany { needed: slots.len(), limit });
    }
    Ok(slots)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOW: HostRange = HostRange { gpa: Gpa(0), bytes: 0x10_0000, host: 0x7000_0000 };
    const HIGH: HostRange = HostRange { gpa: Gpa(4 << 30), bytes: 0x4000, host: 0x9000_0000 };

    fn watched(pages: &[u64]) -> BTreeSet<Gpa> {
        pages.iter().copied().map(Gpa).collect()
    }

    fn shape(slots: &[MemorySlot]) -> Vec<(u64, u64, bool)> {
        slots.iter().map(|slot| (slot.range.gpa.0, slot.range.bytes, slot.read_only)).collect()
    }

    #[test]
    fn without_watched_pages_each_range_is_one_slot() {
        let slots = split(&[LOW, HIGH], &watched(&[]), 8).unwrap();
        assert_eq!(shape(&slots), [(0, 0x10_0000, false), (4 << 30, 0x4000, false)]);
    }

    #[test]
    fn neighbours_share_a_slot_and_addresses_are_rounded_to_pages() {
        let slots = split(&[LOW], &watched(&[0x3000, 0x4123, 0x4fff, 0x8000]), 8).unwrap();
        assert_eq!(
            shape(&slots),
            [
                (0, 0x3000, false),
                (0x3000, 0x2000, true),
                (0x5000, 0x3000, false),
                (0x8000, 0x1000, true),
                (0x9000, 0xf_7000, false)
            ]
        );
    }

    #[test]
    fn runs_at_both_edges_leave_no_empty_slot() {
        let slots = split(&[HIGH], &watched(&[4 << 30, (4 << 30) + 0x3000]), 8).unwrap();
        assert_eq!(
            shape(&slots),
            [
                (4 << 30, 0x1000, true),
                ((4 << 30) + 0x1000, 0x2000, false),
                ((4 << 30) + 0x3000, 0x1000, true)
            ]
        );
    }

    #[test]
    fn slots_cover_every_byte_once_with_the_right_host_address() {
        let pages = watched(&[0, 0x1000, 0x7000, 0xf_f000]);
        let slots = split(&[LOW, HIGH], &pages, 64).unwrap();
        let mut next = 0;
        for slot in slots.iter().filter(|slot| slot.range.gpa < HIGH.gpa) {
            assert_eq!(slot.range.gpa.0, next);
            assert_eq!(slot.range.host, LOW.host + slot.range.gpa.0);
            next += slot.range.bytes;
            for page in (slot.range.gpa.0..next).step_by(0x1000) {
                assert_eq!(slot.read_only, pages.contains(&Gpa(page)), "{page:#x}");
            }
        }
        assert_eq!(next, LOW.bytes);
    }

    fn carry_out(layout: &mut Layout, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            match change {
                Change::Delete { number, slot } => assert_eq!(layout.remove(&number), Some(slot)),
                Change::Add { number, slot } => {
                    let overlaps = layout.values().any(|other| {
                        slot.range.gpa.0 < other.range.gpa.0 + other.range.bytes
                            && other.range.gpa.0 < slot.range.gpa.0 + slot.range.bytes
                    });
                    assert!(!overlaps, "{slot:?}");
                    assert_eq!(layout.insert(number, slot), None);
                }
            }
        }
    }

    #[test]
    fn a_change_touches_only_the_slots_that_differ_and_can_be_undone() {
        let at = |pages: &[u64]| split(&[LOW, HIGH], &watched(pages), 64).unwrap();
        let mut layout = Layout::new();
        carry_out(&mut layout, changes(&Layout::new(), &at(&[0x3000])));
        let before = layout.clone();
        assert_eq!(before.keys().copied().collect::<Vec<_>>(), [0, 1, 2, 3]);
        // 0x8000 cuts the slot behind 0x4000 in three; the two before it and HIGH stay.
        let forth = changes(&layout, &at(&[0x3000, 0x8000]));
        assert_eq!(forth.len(), 4);
        carry_out(&mut layout, forth.clone());
        let now: BTreeSet<_> = layout.values().map(|slot| (slot.range.gpa, slot.range.bytes)).collect();
        assert_eq!(
            now,
            at(&[0x3000, 0x8000]).iter().map(|slot| (slot.range.gpa, slot.range.bytes)).collect()
        );
        assert!(layout.keys().all(|number| *number < 6), "numbers stay below the count");
        carry_out(&mut layout, forth.into_iter().rev().map(Change::inverse));
        assert_eq!(layout, before);
        assert_eq!(changes(&layout, &at(&[0x3000])), []);
    }

    #[test]
    fn a_page_outside_ram_and_too_many_slots_are_refused() {
        assert_eq!(split(&[LOW], &watched(&[0x10_0000]), 8), Err(SlotsError::NotRam(Gpa(0x10_0000))));
        let many: Vec<u64> = (0..8).map(|i| 0x1000 + i * 0x2000).collect();
        assert_eq!(split(&[LOW], &watched(&many), 16), Err(SlotsError::TooMany { needed: 17, limit: 16 }));
        split(&[LOW], &watched(&many), 17).unwrap();
    }
}
