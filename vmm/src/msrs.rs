//! Which model-specific registers a snapshot holds. Pure.
//!
//! Numbers: Intel SDM vol. 4; AMD APM vol. 2, appendix A; Linux: Documentation/virt/kvm/x86/msr.rst.

use std::collections::BTreeSet;

const TSC: u32 = 0x10;
const TSC_DEADLINE: u32 = 0x6e0;
/// The revision of the host's microcode.
const UCODE_REVISION: u32 = 0x8b;
/// A write has KVM write the wall-clock time to guest memory, where something else may be by now. A guest writes it each time
/// that it reads the clock.
const KVM_WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// MSRs that KVM emulates and does not list: memory types (Intel SDM vol. 3A, 12.11) and the banks of machine-check registers
/// (vol. 3B, 16.3.2), as many as KVM has.
fn unlisted() -> impl Iterator<Item = u32> {
    let variable_ranges = 0x200..0x210;
    let fixed_ranges = [0x250, 0x258, 0x259].into_iter().chain(0x268..0x270);
    let default_type = [0x2ff];
    let machine_check_banks = 0x400..0x480;
    variable_ranges.chain(fixed_ranges).chain(default_type).chain(machine_check_banks)
}

/// The MSRs to save, in the order in which they are to be restored; `listed` are those of KVM_GET_MSR_INDEX_LIST.
pub(crate) fn to_save(listed: &[u32]) -> Vec<u32> {
    let ordered = |index: &u32| *index == TSC || *index == TSC_DEADLINE;
    let all: BTreeSet<u32> = listed
        .iter()
        .copied()
        .chain(unlisted())
        .filter(|index| !KVM_WALL_CLOCK.contains(index) && !ordered(index))
        .collect();
    // The deadline is one of the counter.
    [TSC].into_iter().chain(all).chain([TSC_DEADLINE]).collect()
}

/// Whether an MSR tells of the host, so that it may have another value after a restore.
pub(crate) fn is_hosts_own(index: u32) -> bool {
    index == UCODE_REVISION
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_comes_first_and_its_deadline_last() {
        let saved = to_save(&[TSC_DEADLINE, 0xc000_0080, TSC, 0x4b56_4d01, 0x174]);
        assert_eq!((saved.first(), saved.last()), (Some(&TSC), Some(&TSC_DEADLINE)));
        for index in [0xc000_0080, 0x4b56_4d01, 0x174, 0x200, 0x26f, 0x2ff, 0x400] {
            assert_eq!(saved.iter().filter(|saved| **saved == index).count(), 1, "{index:#x}");
        }
    }

    #[test]
    fn no_write_of_the_wall_clock_is_repeated() {
        let saved = to_save(&KVM_WALL_CLOCK);
        assert!(KVM_WALL_CLOCK.iter().all(|index| !saved.contains(index)));
    }
}
