//! Calls whose return is awaited.
//!
//! The return address on the guest's stack stays as it is. An int3 stands on the instruction behind the call, and what
//! arrives there with the stack pointer that the call will leave is the call's return: RSP is then 8 above where the return
//! address was (Intel SDM vol. 1, 6.4.1). The stack pointer tells a recursion's levels, tasks and vCPUs apart.
//!
//! A call that never returns (a task that exits, a context that is left by a jump) is found out when its place on the
//! stack is used again, or is seen to be dead: everything below the stack pointer is. A tail call, on the other hand, enters
//! a second function with the return address of the first still in place; both return at once.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::handler::Call;
use crate::probe::Probe;
use crate::{Gva, PAGE_SIZE};

use std::sync::Arc;

/// A power of two. Calls on different stacks rarely share a shard's lock.
const SHARDS: usize = 64;

/// A call that has not returned yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub probe: Arc<Probe>,
    /// The return address.
    pub to: Gva,
    /// Where on the stack it stands.
    pub sp: u64,
    /// CR3 at the entry: another address space on the same stack is another task.
    pub cr3: u64,
    pub call: Call,
}

/// All of them, by the page of stack that they are on.
#[derive(Debug)]
pub(crate) struct Returns {
    shards: Box<[Mutex<Vec<Pending>>]>,
    /// A page of memory belongs to one stack only, so what is below the stack pointer in its page is dead.
    whole_pages: bool,
}

impl Returns {
    pub fn new(whole_pages: bool) -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), whole_pages }
    }

    fn shard(&self, sp: u64) -> MutexGuard<'_, Vec<Pending>> {
        // Stacks are a few pages each, so the low bits of the page number spread them.
        let index = usize::try_from(sp / PAGE_SIZE % SHARDS as u64).unwrap_or_default();
        // A panic elsewhere leaves no pending call half-written.
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Awaits a call's return. False where `most` calls of its probe are awaited already.
    pub fn enter(&self, new: Pending, most: u32) -> bool {
        let mut calls = self.shard(new.sp);
        let dead_below = self.dead_below(new.sp);
        calls.retain(|old| {
            let tail_call = old.sp == new.sp
                && old.to == new.to
                && old.cr3 == new.cr3
                && !Arc::ptr_eq(&old.probe, &new.probe);
            let dead = dead_below.contains(&old.sp) || (old.sp == new.sp && !tail_call);
            if dead {
                old.probe.abandon_call();
            }
            !dead
        });
        if !new.probe.begin_call(most) {
            return false;
        }
        calls.push(new);
        true
    }

    /// The youngest call that returns to `pc` with the stack pointer at `sp`; to be called until there is none.
    pub fn take(&self, pc: Gva, sp: u64) -> Option<Pending> {
        let slot = sp.wrapping_sub(8);
        let mut calls = self.shard(slot);
        if let Some(index) = calls.iter().rposition(|call| call.sp == slot && call.to == pc) {
            let call = calls.remove(index);
            call.probe.end_call();
            return Some(call);
        }
        let dead_below = self.dead_below(slot);
        calls.retain(|old| {
            let dead = dead_below.contains(&old.sp);
            if dead {
                old.probe.abandon_call();
            }
            !dead
        });
        None
    }

    /// Forgets the calls of a probe that is taken out.
    pub fn forget(&self, probe: &Arc<Probe>) {
        for shard in &self.shards {
            let mut calls = shard.lock().unwrap_or_else(PoisonError::into_inner);
            calls.retain(|call| {
                let of_probe = Arc::ptr_eq(&call.probe, probe);
                if of_probe {
                    call.probe.end_call();
                }
                !of_probe
            });
        }
    }

    /// Stack slots that cannot be in use any more when the slot at `sp` is the deepest one.
    fn dead_below(&self, sp: u64) -> std::ops::Range<u64> {
        if self.whole_pages { sp & !(PAGE_SIZE - 1)..sp } else { sp..sp }
    }
}
