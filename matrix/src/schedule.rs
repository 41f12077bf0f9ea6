//! Which cells run at once, and which are whose.

use std::num::NonZeroU32;
use std::str::FromStr;

/// What a run takes, or a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Bytes of memory.
    pub memory: u64,
    /// CPUs.
    pub cpus: u32,
}

impl Resources {
    fn hold(self, need: Resources) -> bool {
        need.memory <= self.memory && need.cpus <= self.cpus
    }

    /// What is left when `need` is taken; nothing, if that is more than there is.
    #[must_use]
    pub fn less(self, need: Resources) -> Self {
        Self { memory: self.memory.saturating_sub(need.memory), cpus: self.cpus.saturating_sub(need.cpus) }
    }

    /// What there is when `need` is given back.
    #[must_use]
    pub fn more(self, need: Resources) -> Self {
        Self { memory: self.memory.saturating_add(need.memory), cpus: self.cpus.saturating_add(need.cpus) }
    }
}

/// Which of the waiting runs begins next: the first that fits into what is free. One that needs more than the host has runs alone,
/// where it may be slow, or fail by its own account.
#[must_use]
pub fn next(waiting: &[Resources], free: Resources, alone: bool) -> Option<usize> {
    let fits = waiting.iter().position(|need| free.hold(*need));
    fits.or((alone && !waiting.is_empty()).then_some(0))
}

/// One of several machines that share a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    /// Which, from 1 on.
    index: NonZeroU32,
    /// Of how many.
    count: NonZeroU32,
}

impl Shard {
    /// Whether the cell at this place among all cells is its own. Neighbours go to different shards, since they take alike.
    #[must_use]
    pub fn owns(self, place: usize) -> bool {
        place as u64 % u64::from(self.count.get()) == u64::from(self.index.get() - 1)
    }

    /// All of them, of `count`.
    pub fn all(count: NonZeroU32) -> impl Iterator<Item = Shard> {
        (1..=count.get()).filter_map(move |index| Some(Shard { index: NonZeroU32::new(index)?, count }))
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse().ok();
        let parts = text.split_once('/').and_then(|(index, count)| Some((number(index)?, number(count)?)));
        let shard =
            parts.map(|(index, count)| Self { index, count }).filter(|shard| shard.index <= shard.count);
        shard.ok_or_else(|| format!("`{text}` is no shard like 2/8, which is the second of eight"))
    }
}

impl std::fmt::Display for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(memory: u64, cpus: u32) -> Resources {
        Resources { memory, cpus }
    }

    #[test]
    fn a_small_run_overtakes_one_that_has_no_room() {
        let waiting = [need(8, 4), need(1, 1), need(2, 1)];
        assert_eq!(next(&waiting, need(8, 4), true), Some(0));
        assert_eq!(next(&waiting, need(4, 2), false), Some(1));
        assert_eq!(next(&waiting, need(0, 2), false), None);
        assert_eq!(next(&[], need(8, 4), true), None);
    }

    #[test]
    fn what_never_fits_runs_alone() {
        assert_eq!(next(&[need(100, 64)], need(8, 2), false), None);
        assert_eq!(next(&[need(100, 64)], need(8, 2), true), Some(0));
        assert_eq!(need(8, 2).less(need(100, 64)), need(0, 0));
    }

    #[test]
    fn every_cell_belongs_to_one_shard() {
        let count = NonZeroU32::new(3).unwrap();
        for place in 0..20 {
            assert_eq!(Shard::all(count).filter(|shard| shard.owns(place)).count(), 1, "{place}");
        }
        let second: Shard = "2/3".parse().unwrap();
        assert_eq!((second.owns(0), second.owns(1), second.owns(4)), (false, true, true));
        assert_eq!(second.to_string(), "2/3");
        for bad in ["", "1", "0/3", "4/3", "1/0", "a/b", "1/2/3", "-1/2"] {
            bad.parse::<Shard>().unwrap_err();
        }
    }
}
