//! Guest memory as KVM has it: which slots there are, and changing them while the machine is paused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use probe_core::Gpa;
use vmm_sys_util::errno;

use crate::memory::GuestRam;
use crate::slots::{self, Change, Layout, MemorySlot, SlotsError};

/// Why what is watched could not be changed. Nothing has changed then, unless the error says that the machine ends.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum WatchError {
    /// The pages cannot be laid out in slots.
    #[error(transparent)]
    Slots(#[from] SlotsError),
    /// Nobody watches the page.
    #[error("Page {0} is not watched; release each page as often as it was watched")]
    NotWatched(Gpa),
    /// The ioctl failed, and what it had begun was undone.
    #[error("KVM_SET_USER_MEMORY_REGION failed; the watched pages are as they were")]
    Ioctl(#[source] errno::Error),
    /// The ioctl failed, and so did undoing what had been done.
    #[error("KVM_SET_USER_MEMORY_REGION failed, and part of guest memory is gone; the machine ends")]
    Lost(#[source] errno::Error),
}

/// What somebody wants of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    /// Watched once more.
    Watch,
    /// Watched once less.
    Unwatch,
}

/// How often each watched page is wanted.
type Watched = BTreeMap<Gpa, usize>;

#[derive(Debug)]
struct Table {
    watched: Watched,
    layout: Layout,
}

/// The memory slots of a VM.
#[derive(Debug)]
pub(crate) struct Mapping {
    // The VM goes before the memory that KVM maps.
    vm: VmFd,
    ram: GuestRam,
    /// KVM_CAP_NR_MEMSLOTS.
    limit: usize,
    table: Mutex<Table>,
}

impl Mapping {
    /// Maps `ram` into `vm`, the pages in `watched` read-only.
    pub fn new(vm: VmFd, ram: GuestRam, limit: usize, watched: &BTreeSet<Gpa>) -> Result<Self, WatchError> {
        let watched: Watched = watched.iter().map(|gpa| (gpa.page(), 1)).collect();
        let mapping = Self {
            vm,
            ram,
            limit,
            table: Mutex::new(Table { watched: Watched::new(), layout: Layout::new() }),
        };
        mapping.set(&mut mapping.lock(), watched)?;
        Ok(mapping)
    }

    pub fn vm(&self) -> &VmFd {
        &self.vm
    }

    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Counts `wish` for each of `pages` if that changes no slot; returns whether it did.
    pub fn count(&self, wish: Wish, pages: &[Gpa]) -> Result<bool, WatchError> {
        let mut table = self.lock();
        let next = counted(&table.watched, wish, pages)?;
        let same = next.keys().eq(table.watched.keys());
        if same {
            table.watched = next;
        }
        Ok(same)
    }

    /// Counts `wish` for each of `pages` and changes the slots accordingly. No vCPU may run. A page that nobody wants watched
    /// becomes writable: a guest without probes pays nothing for its writes.
    pub fn change(&self, wish: Wish, pages: &[Gpa]) -> Result<(), WatchError> {
        let mut table = self.lock();
        let next = counted(&table.watched, wish, pages)?;
        self.set(&mut table, next)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes `watched` what is watched.
    fn set(&self, table: &mut Table, watched: Watched) -> Result<(), WatchError> {
        let pages = watched.keys().copied().collect();
        let slots = slots::split(&self.ram.host_ranges(), &pages, self.limit)?;
        let changes = slots::changes(&table.layout, &slots);
        for (done, change) in changes.iter().enumerate() {
            if let Err(error) = self.carry_out(*change, &mut table.layout) {
                for undone in changes[..done].iter().rev() {
                    self.carry_out(undone.inverse(), &mut table.layout).map_err(WatchError::Lost)?;
                }
                return Err(WatchError::Ioctl(error));
            }
        }
        table.watched = watched;
        Ok(())
    }

    fn carry_out(&self, change: Change, layout: &mut Layout) -> Result<(), errno::Error> {
        match change {
            Change::Delete { number, slot } => {
                // A size of 0 deletes (KVM API, 4.35).
                self.set_region(number, slot, 0)?;
                layout.remove(&number);
            }
            Change::Add { number, slot } => {
                self.set_region(number, slot, slot.range.bytes)?;
                layout.insert(number, slot);
            }
        }
        Ok(())
    }

    fn set_region(&self, number: u32, slot: MemorySlot, bytes: u64) -> Result<(), errno::Error> {
        let region = kvm_userspace_memory_region {
            slot: number,
            flags: if slot.read_only { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: slot.range.gpa.0,
            memory_size: bytes,
            userspace_addr: slot.range.host,
        };
        // SAFETY:
        // - the host range lies within one of `self.ram`'s mappings (`split` cuts those ranges and nothing else), which live
        //   as long as any clone of it; `self` and every vCPU thread hold one until after the last vCPU of this VM is
        //   dropped, so no guest runs on freed memory;
        // - the mapping is shared with no Rust reference: `GuestRam` gives volatile and atomic access only;
        // - slots do not overlap: `changes` deletes before it adds, and each number is used once.
        unsafe { self.vm.set_user_memory_region(region) }
    }
}

fn counted(watched: &Watched, wish: Wish, pages: &[Gpa]) -> Result<Watched, WatchError> {
    let mut next = watched.clone();
    for page in pages.iter().map(|gpa| gpa.page()) {
        match wish {
            Wish::Watch => *next.entry(page).or_default() += 1,
            Wish::Unwatch => {
                let count = next.get_mut(&page).ok_or(WatchError::NotWatched(page))?;
                *count -= 1;
                if *count == 0 {
                    next.remove(&page);
                }
            }
        }
    }
    Ok(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_counted_once_a_wish_and_is_gone_when_the_last_wish_is_taken_back() {
        let (one, two) = (Gpa(0x1000), Gpa(0x2000));
        let second = counted(&Watched::new(), Wish::Watch, &[one, Gpa(0x1fff), two]).unwrap();
        assert_eq!(second, Watched::from([(one, 2), (two, 1)]));
        let third = counted(&second, Wish::Unwatch, &[one, two]).unwrap();
        assert_eq!(third, Watched::from([(one, 1)]));
        assert_eq!(counted(&third, Wish::Unwatch, &[one]).unwrap(), Watched::new());
        let error = counted(&third, Wish::Unwatch, &[one, two]).unwrap_err();
        assert!(matches!(error, WatchError::NotWatched(page) if page == two));
    }
}
