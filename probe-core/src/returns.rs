//! Calls whose return is awaited.
//!
//! The return address on the guest's stack stays as it is. An int3 stands on the instruction behind the call, and what
//! arrives there with the stack pointer that the call will leave is the call's return: RSP is then 8 above where the return
//! address was (Intel SDM vol. 1, 6.4.1). The stack pointer tells a recursion's levels, tasks and vCPUs apart.
//!
//! No int3 may stand on an instruction that the guest rewrites, since it checks what it finds there. Behind a call that is, as
//! a rule, a static key's jump or nop; the int3s then stand on both instructions that can follow it, which the stack pointer
//! reaches unchanged.
//!
//! A call that never returns (a task that exits, a context that is left by a jump) is found out when its place on the
//! stack is used again, or is seen to be dead: everything below the stack pointer is. A tail call, on the other hand, enters
//! a second function with the return address of the first still in place; both return at once.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arrayvec::ArrayVec;

use crate::handler::Call;
use crate::machine::{GuestText, Rewritten};
use crate::probe::Probe;
use crate::{Gva, PAGE_SIZE};

/// A power of two. Calls on different stacks rarely share a shard's lock.
const SHARDS: usize = 64;

/// How many instructions a call can be noticed at after its return: two static keys behind each other have three.
const MAX_LANDINGS: usize = 4;

/// Where calls with one return address are noticed.
pub(crate) type Landings = ArrayVec<Gva, MAX_LANDINGS>;

/// The first instructions from the return address `to` on that an int3 can stand on, one on each way the guest can take; `None` if there
/// are too many ways, or on one of them is none.
pub(crate) fn landings(text: &dyn GuestText, to: Gva) -> Option<Landings> {
    let mut found = Landings::new();
    let mut ways = Landings::from_iter([to]);
    while let Some(gva) = ways.pop() {
        match text.rewritten(gva) {
            Rewritten::No if found.contains(&gva) => {}
            Rewritten::No => found.try_push(gva).ok()?,
            Rewritten::Jump { len, target } => {
                ways.try_push(target).ok()?;
                ways.try_push(gva.offset(u64::from(len))).ok()?;
            }
            Rewritten::Checked => return None,
        }
    }
    Some(found)
}

/// A call that has not returned yet.
#[derive(Debug)]
pub(crate) struct Pending {
    pub probe: Arc<Probe>,
    /// The return address.
    pub to: Gva,
    /// Where its return is noticed.
    pub landings: Landings,
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
        if let Some(index) = calls.iter().rposition(|call| call.sp == slot && call.landings.contains(&pc)) {
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug)]
    struct Text(BTreeMap<u64, Rewritten>);

    impl GuestText for Text {
        fn rewritten(&self, gva: Gva) -> Rewritten {
            self.0.get(&gva.0).copied().unwrap_or(Rewritten::No)
        }
    }

    fn jump(len: u8, target: u64) -> Rewritten {
        Rewritten::Jump { len, target: Gva(target) }
    }

    fn find(rewritten: &[(u64, Rewritten)]) -> Option<Vec<u64>> {
        let found = landings(&Text(rewritten.iter().copied().collect()), Gva(0x100))?;
        let mut found: Vec<u64> = found.iter().map(|gva| gva.0).collect();
        found.sort_unstable();
        Some(found)
    }

    #[test]
    fn an_instruction_that_stays_is_where_a_return_is_noticed() {
        assert_eq!(find(&[]), Some(vec![0x100]));
    }

    #[test]
    fn behind_a_static_key_both_ways_are_looked_at() {
        assert_eq!(find(&[(0x100, jump(5, 0x200))]), Some(vec![0x105, 0x200]));
        assert_eq!(find(&[(0x100, jump(2, 0x102))]), Some(vec![0x102]));
        let two = [(0x100, jump(5, 0x200)), (0x105, jump(2, 0x200))];
        assert_eq!(find(&two), Some(vec![0x107, 0x200]));
    }

    #[test]
    fn a_way_without_such_an_instruction_or_too_many_ways_are_not_seen() {
        assert_eq!(find(&[(0x100, Rewritten::Checked)]), None);
        assert_eq!(find(&[(0x100, jump(5, 0x200)), (0x200, Rewritten::Checked)]), None);
        assert_eq!(find(&[(0x100, jump(0, 0x100))]), None, "a circle");
        let many: Vec<_> = (0..8).map(|key| (0x100 + 2 * key, jump(2, 0x200 + key))).collect();
        assert_eq!(find(&many), None);
    }
}
