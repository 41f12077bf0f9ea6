//! What the guest's CPUID answers: what KVM supports, without what would mislead the guest, with its own topology.
//!
//! Leaves and bits: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst. The
//! entries are computed by a pure function.

use kvm_bindings::{CpuId, KVM_CAP_TSC_DEADLINE_TIMER, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use probe_core::Vendor;
use vmm_sys_util::errno;

/// One vCPU's place among its siblings: all are cores of one package, one thread each, APIC id = index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    /// This vCPU's index.
    pub index: u32,
    /// How many there are, at least 1.
    pub count: u32,
}

impl Topology {
    /// Bits of the APIC id that number the cores of the package.
    fn core_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }
}

/// Leaf 1, ECX.
mod leaf1_ecx {
    pub const MONITOR: u32 = 1 << 3;
    pub const VMX: u32 = 1 << 5;
    pub const PDCM: u32 = 1 << 15;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
}
/// Leaf 1, EDX: more than one logical processor in the package.
const LEAF1_EDX_HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the APIC timer runs at a constant rate in every power state. The rest of the leaf is the host's thermals.
const LEAF6_EAX_ARAT: u32 = 1 << 2;
/// Leaf 7: protection keys and their switch in CR4: PKRU does not travel in the run page, and an emulated access would have to ask
/// for it.
const LEAF7_ECX_PROTECTION_KEYS: u32 = 3 << 3;
/// Leaf 7: control-flow enforcement. Probes at an endbr or behind a shadow stack are not handled for a guest that uses it.
const LEAF7_ECX_SHADOW_STACK: u32 = 1 << 7;
const LEAF7_EDX_INDIRECT_BRANCH_TRACKING: u32 = 1 << 20;
/// Leaf 7, EBX: enclaves, which no probe can look into.
const LEAF7_EBX_SGX: u32 = 1 << 2;
/// Leaf 0xd, subleaf 0, EAX: the PKRU state (XCR0 bit 9).
const LEAFD_0_EAX_PKRU: u32 = 1 << 9;
/// Leaf 0xd, subleaf 1, ECX: supervisor states of control-flow enforcement (XSS bits 11 and 12).
const LEAFD_1_ECX_CET: u32 = 3 << 11;
/// Leaf 0x8000_0001, ECX.
mod leaf8_1_ecx {
    /// On AMD: leaf 1 counts cores, not threads.
    pub const CORES_NOT_THREADS: u32 = 1 << 1;
    pub const SVM: u32 = 1 << 2;
    pub const SKINIT: u32 = 1 << 12;
    pub const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
    pub const PERFCTR_CORE: u32 = 1 << 23;
    pub const PERFCTR_NB: u32 = 1 << 24;
    pub const PERFCTR_LLC: u32 = 1 << 28;
    pub const MWAITX: u32 = 1 << 29;
}
/// Leaf 0x4000_0001, EAX: the paravirtual features that stay. Clock (old and new MSRs, stable), no I/O delay, EOI. Not:
/// asynchronous page faults, which put a second meaning on #PF; spin-lock kicks, remote TLB flush and IPI hypercalls,
/// which take work away from the code under observation.
const KVM_FEATURES_KEPT: u32 = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 6 | 1 << 24;

/// The CPUID of one vCPU on this host.
pub(crate) fn guest_cpuid(kvm: &Kvm, topology: Topology) -> Result<CpuId, errno::Error> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let tsc_deadline = kvm.check_extension_raw(KVM_CAP_TSC_DEADLINE_TIMER.into()) > 0;
    let entries = guest_entries(supported.as_slice(), topology, tsc_deadline);
    CpuId::from_entries(&entries).map_err(|_| errno::Error::new(libc::E2BIG))
}

/// Whose CPU the guest has, by the name in leaf 0.
pub(crate) fn vendor(entries: &[kvm_cpuid_entry2]) -> Vendor {
    let leaf = entries.iter().find(|entry| entry.function == 0);
    leaf.map_or(Vendor::Unknown, |leaf| Vendor::from_cpuid(leaf.ebx))
}

/// A guest has seen features of a CPU that this host does not offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "The snapshot's guest has another CPU than this host offers (CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, {register}: {saved:#x} \
     there, {offered:#x} here); restore it on such a host"
)]
pub struct CpuDiffers {
    /// The leaf.
    pub leaf: u32,
    /// Its subleaf.
    pub subleaf: u32,
    /// The register of the answer.
    pub register: &'static str,
    /// What the guest has seen.
    pub saved: u32,
    /// What this host would give it.
    pub offered: u32,
}

/// Whether a guest that has seen `saved` can go on where `offered` is what a new one would see: the same vendor, the same width of
/// addresses, and every feature that it knows of. More features do no harm: it keeps its own CPUID.
pub(crate) fn check_offered(
    saved: &[kvm_cpuid_entry2],
    offered: &[kvm_cpuid_entry2],
) -> Result<(), CpuDiffers> {
    /// How a register of a leaf is compared.
    enum By {
        /// These bits are equal.
        Equality(u32),
        /// What is set in the first is set in the second.
        Features,
    }
    for entry in saved {
        let none = kvm_cpuid_entry2::default();
        let same = |other: &&kvm_cpuid_entry2| (other.function, other.index) == (entry.function, entry.index);
        let other = offered.iter().find(same).unwrap_or(&none);
        let registers = [
            ("EAX", entry.eax, other.eax),
            ("EBX", entry.ebx, other.ebx),
            ("ECX", entry.ecx, other.ecx),
            ("EDX", entry.edx, other.edx),
        ];
        for (register, saved, offered) in registers {
            let by = match (entry.function, entry.index, register) {
                (0, _, "EBX" | "ECX" | "EDX") => By::Equality(u32::MAX),
                (0x8000_0008, _, "EAX") => By::Equality(0xffff),
                (1 | 0x8000_0001, _, "ECX" | "EDX")
                | (7, 0, "EBX" | "ECX" | "EDX")
                | (7, 1.., _)
                | (0xd, 0, "EAX" | "EDX")
                | (0xd, 1, "EAX" | "ECX")
                | (0x4000_0001 | 0x8000_0021, _, "EAX")
                | (0x8000_0007, _, "EDX")
                | (0x8000_0008, _, "EBX") => By::Features,
                _ => continue,
            };
            let fits = match by {
                By::Equality(mask) => (saved ^ offered) & mask == 0,
                By::Features => saved & !offered == 0,
            };
            if !fits {
                let (leaf, subleaf) = (entry.function, entry.index);
                return Err(CpuDiffers { leaf, subleaf, register, saved, offered });
            }
        }
    }
    Ok(())
}

/// The CPUID entries for one vCPU, from those that KVM_GET_SUPPORTED_CPUID gave. `tsc_deadline` says whether the in-kernel
/// APIC has that timer mode (KVM_CAP_TSC_DEADLINE_TIMER); the supported entries do not say.
fn guest_entries(
    supported: &[kvm_cpuid_entry2],
    topology: Topology,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let vendor = vendor(supported);
    let has_topology_leaf = |leaf| supported.iter().any(|entry| entry.function == leaf);
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, 0xb | 0x1f))
        .map(|entry| guest_entry(*entry, topology, vendor, tsc_deadline))
        .collect();
    for leaf in [0xb, 0x1f] {
        if has_topology_leaf(leaf) {
            entries.extend(topology_leaf(leaf, topology));
        }
    }
    entries
}

fn guest_entry(
    mut entry: kvm_cpuid_entry2,
    topology: Topology,
    vendor: Vendor,
    tsc_deadline: bool,
) -> kvm_cpuid_entry2 {
    let Topology { index, count } = topology;
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0xffff | (count.min(255) << 16) | (index << 24);
            entry.ecx &= !(leaf1_ecx::MONITOR | leaf1_ecx::VMX | leaf1_ecx::PDCM | leaf1_ecx::TSC_DEADLINE);
            entry.ecx |= leaf1_ecx::HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= leaf1_ecx::TSC_DEADLINE;
            }
            entry.edx &= !LEAF1_EDX_HTT;
            if count > 1 {
                entry.edx |= LEAF1_EDX_HTT;
            }
        }
        // Caches: level 3 is the package's, the others a core's own; the package has `count` cores.
        4 if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | (sharing & 0xfff) << 14 | ((count - 1) & 0x3f) << 26;
        }
        // MONITOR sizes, performance counters, and the enclave, trace and nested-virtualization leaves of what is hidden.
        5 | 0xa | 0x12 | 0x14 | 0x8000_000a | 0x8000_001f | 0x8000_0022 => clear(&mut entry),
        6 => {
            let kept = entry.eax & LEAF6_EAX_ARAT;
            clear(&mut entry);
            entry.eax = kept;
        }
        7 if entry.index == 0 => {
            entry.ebx &= !LEAF7_EBX_SGX;
            entry.ecx &= !(LEAF7_ECX_SHADOW_STACK | LEAF7_ECX_PROTECTION_KEYS);
            entry.edx &= !LEAF7_EDX_INDIRECT_BRANCH_TRACKING;
        }
        0xd if entry.index == 0 => entry.eax &= !LEAFD_0_EAX_PKRU,
        0xd if entry.index == 9 => clear(&mut entry),
        0xd if entry.index == 1 => entry.ecx &= !LEAFD_1_ECX_CET,
        // The states themselves: only supervisor ones (ECX bit 0) have these numbers.
        0xd if matches!(entry.index, 11 | 12) => clear(&mut entry),
        0x4000_0001 => {
            entry.eax &= KVM_FEATURES_KEPT;
            entry.edx = 0;
        }
        0x8000_0001 => {
            use leaf8_1_ecx::{
                CORES_NOT_THREADS, MWAITX, PERFCTR_CORE, PERFCTR_LLC, PERFCTR_NB, SKINIT, SVM,
                TOPOLOGY_EXTENSIONS,
            };
            entry.ecx &=
                !(SVM | SKINIT | MWAITX | PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC | TOPOLOGY_EXTENSIONS);
            // Says nothing of this on the others. A host with one CPU does not have it.
            if vendor == Vendor::Amd {
                entry.ecx &= !CORES_NOT_THREADS;
                if count > 1 {
                    entry.ecx |= CORES_NOT_THREADS;
                }
            }
        }
        // AMD: number of cores, and how many APIC id bits number them.
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | (count - 1) & 0xff | topology.core_bits() << 12,
        // AMD's cache and topology extensions: hidden above, so that leaf 0x8000_0008 counts.
        0x8000_001d | 0x8000_001e => clear(&mut entry),
        _ => {}
    }
    entry
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Extended topology, leaves 0xb and 0x1f: one thread per core, then the cores, then the end.
fn topology_leaf(leaf: u32, topology: Topology) -> [kvm_cpuid_entry2; 3] {
    const INVALID: u32 = 0;
    const THREAD: u32 = 1;
    const CORE: u32 = 2;
    let level = |index: u32, kind: u32, shift: u32, processors: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: topology.index,
        ..Default::default()
    };
    [level(0, THREAD, 0, 1), level(1, CORE, topology.core_bits(), topology.count), level(2, INVALID, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: !0, ebx: !0, ecx: !0, edx: !0, ..Default::default() }
    }

    fn one(function: u32, index: u32, topology: Topology) -> kvm_cpuid_entry2 {
        guest_entries(&[entry(function, index)], topology, true)[0]
    }

    const SECOND_OF_THREE: Topology = Topology { index: 1, count: 3 };

    #[test]
    fn leaf_1_hides_nesting_and_shows_the_hypervisor() {
        let leaf = one(1, 0, SECOND_OF_THREE);
        for hidden in [leaf1_ecx::MONITOR, leaf1_ecx::VMX, leaf1_ecx::PDCM] {
            assert_eq!(leaf.ecx & hidden, 0, "{hidden:#x}");
        }
        assert_ne!(leaf.ecx & leaf1_ecx::HYPERVISOR, 0);
        assert_ne!(leaf.ecx & leaf1_ecx::TSC_DEADLINE, 0);
        let without = guest_entries(&[entry(1, 0)], SECOND_OF_THREE, false)[0];
        assert_eq!(without.ecx & leaf1_ecx::TSC_DEADLINE, 0);
    }

    #[test]
    fn a_guest_goes_on_where_every_feature_is_that_it_has_seen() {
        let saved = [entry(0, 0), kvm_cpuid_entry2 { ecx: 0b101, ..entry(1, 0) }, entry(7, 0)];
        assert_eq!(check_offered(&saved, &saved), Ok(()));
        let mut offered = saved;
        offered[1].ecx = 0b111;
        assert_eq!(check_offered(&saved, &offered), Ok(()), "more does no harm");
        offered[1].ecx = 0b110;
        let differs = CpuDiffers { leaf: 1, subleaf: 0, register: "ECX", saved: 0b101, offered: 0b110 };
        assert_eq!(check_offered(&saved, &offered), Err(differs));
        let error = check_offered(&saved, &saved[..2]).unwrap_err();
        assert_eq!((error.leaf, error.offered), (7, 0), "a leaf that is not there has no features");
        offered = saved;
        offered[0].ebx = 1;
        assert_eq!(check_offered(&saved, &offered).unwrap_err().leaf, 0, "another vendor");
    }

    #[test]
    fn the_vendor_is_that_of_leaf_0() {
        let named = |name: &[u8; 4]| kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*name), ..entry(0, 0) };
        assert_eq!(vendor(&[entry(1, 0), named(b"Auth")]), Vendor::Amd);
        assert_eq!(vendor(&[named(b"Genu")]), Vendor::Intel);
        assert_eq!(vendor(&[entry(1, 0)]), Vendor::Unknown);
    }

    #[test]
    fn leaf_1_counts_the_processors() {
        let leaf = one(1, 0, SECOND_OF_THREE);
        assert_eq!((leaf.ebx >> 24, leaf.ebx >> 16 & 0xff), (1, 3));
        assert_ne!(leaf.edx & LEAF1_EDX_HTT, 0);
        let alone = one(1, 0, Topology { index: 0, count: 1 });
        assert_eq!((alone.ebx >> 24, alone.ebx >> 16 & 0xff, alone.edx & LEAF1_EDX_HTT), (0, 1, 0));
    }

    #[test]
    fn extended_topology_is_rebuilt_where_the_host_has_it() {
        let entries = guest_entries(&[entry(0xb, 0), entry(0xb, 1), entry(0xb, 7)], SECOND_OF_THREE, true);
        let seen: Vec<_> = entries.iter().map(|e| (e.index, e.eax, e.ebx, e.ecx, e.edx)).collect();
        assert_eq!(seen, [(0, 0, 1, 0x100, 1), (1, 2, 3, 0x201, 1), (2, 0, 0, 2, 1)]);
        assert!(guest_entries(&[entry(1, 0)], SECOND_OF_THREE, true).iter().all(|e| e.function == 1));
    }

    #[test]
    fn core_bits_hold_every_index() {
        for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (64, 6), (255, 8)] {
            assert_eq!(Topology { index: 0, count }.core_bits(), bits, "{count}");
        }
    }

    #[test]
    fn caches_are_shared_as_the_topology_says() {
        let cache = |level: u32| kvm_cpuid_entry2 { eax: 0xffff_c000 | level << 5 | 1, ..entry(4, 0) };
        let level2 = guest_entries(&[cache(2)], SECOND_OF_THREE, true)[0];
        let level3 = guest_entries(&[cache(3)], SECOND_OF_THREE, true)[0];
        assert_eq!((level2.eax >> 14 & 0xfff, level2.eax >> 26), (0, 2));
        assert_eq!((level3.eax >> 14 & 0xfff, level3.eax >> 26), (2, 2));
        assert_eq!((level3.eax >> 5 & 7, level3.eax & 0x1f), (3, 1));
    }

    #[test]
    fn performance_and_thermal_leaves_are_empty() {
        for function in [5, 0xa, 0x8000_000a, 0x8000_0022] {
            let leaf = one(function, 0, SECOND_OF_THREE);
            assert_eq!((leaf.eax, leaf.ebx, leaf.ecx, leaf.edx), (0, 0, 0, 0), "{function:#x}");
        }
        let leaf = one(6, 0, SECOND_OF_THREE);
        assert_eq!((leaf.eax, leaf.ebx, leaf.ecx, leaf.edx), (LEAF6_EAX_ARAT, 0, 0, 0));
    }

    #[test]
    fn control_flow_enforcement_is_hidden() {
        let leaf = one(7, 0, SECOND_OF_THREE);
        assert_eq!(leaf.ecx & LEAF7_ECX_SHADOW_STACK, 0);
        assert_eq!(leaf.edx & LEAF7_EDX_INDIRECT_BRANCH_TRACKING, 0);
        assert_eq!(one(7, 1, SECOND_OF_THREE), entry(7, 1), "other subleaves are the host's");
        assert_eq!(one(0xd, 1, SECOND_OF_THREE).ecx & LEAFD_1_ECX_CET, 0);
        assert_eq!(one(0xd, 11, SECOND_OF_THREE).eax, 0);
        assert_eq!(one(0xd, 2, SECOND_OF_THREE), entry(0xd, 2));
    }

    #[test]
    fn protection_keys_are_hidden() {
        assert_eq!(one(7, 0, SECOND_OF_THREE).ecx & LEAF7_ECX_PROTECTION_KEYS, 0);
        assert_eq!(one(0xd, 0, SECOND_OF_THREE).eax, !LEAFD_0_EAX_PKRU);
        assert_eq!(one(0xd, 9, SECOND_OF_THREE).eax, 0);
    }

    #[test]
    fn paravirtual_features_are_the_kept_ones() {
        let leaf = one(0x4000_0001, 0, SECOND_OF_THREE);
        assert_eq!((leaf.eax, leaf.edx), (KVM_FEATURES_KEPT, 0));
        const ASYNC_PF: u32 = 1 << 4 | 1 << 10 | 1 << 14;
        assert_eq!(leaf.eax & ASYNC_PF, 0);
        assert_eq!(one(0x4000_0000, 0, SECOND_OF_THREE), entry(0x4000_0000, 0));
    }

    #[test]
    fn amd_leaves_hide_nesting_and_count_cores() {
        let leaf = one(0x8000_0001, 0, SECOND_OF_THREE);
        assert_eq!(leaf.ecx & (leaf8_1_ecx::SVM | leaf8_1_ecx::MWAITX | leaf8_1_ecx::TOPOLOGY_EXTENSIONS), 0);
        assert_eq!(leaf.edx, !0, "long mode and NX stay");
        let cores = one(0x8000_0008, 0, SECOND_OF_THREE);
        assert_eq!((cores.ecx & 0xff, cores.ecx >> 12 & 0xf, cores.eax), (2, 2, !0));
    }

    #[test]
    fn several_vcpus_are_cores_and_no_threads() {
        let amd = |count, ecx| {
            let leaf0 = kvm_cpuid_entry2 { ebx: u32::from_le_bytes(*b"Auth"), ..entry(0, 0) };
            let leaf = kvm_cpuid_entry2 { ecx, ..entry(0x8000_0001, 0) };
            guest_entries(&[leaf0, leaf], Topology { index: 0, count }, true)[1].ecx & 2
        };
        assert_eq!((amd(2, 0), amd(2, !0)), (2, 2));
        assert_eq!((amd(1, 0), amd(1, !0)), (0, 0));
        let intel = kvm_cpuid_entry2 { ecx: 0, ..entry(0x8000_0001, 0) };
        assert_eq!(guest_entries(&[intel], SECOND_OF_THREE, true)[0].ecx, 0);
    }

    #[test]
    fn unnamed_leaves_pass_unchanged() {
        for function in [0, 2, 0x15, 0x8000_0000, 0x8000_0002] {
            assert_eq!(one(function, 0, SECOND_OF_THREE), entry(function, 0), "{function:#x}");
        }
    }
}
