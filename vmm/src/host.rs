//! Opens /dev/kvm and checks that it can do what the machine needs.

use std::io;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXT_CPUID, KVM_CAP_IMMEDIATE_EXIT, KVM_CAP_IRQCHIP,
    KVM_CAP_IRQFD, KVM_CAP_MP_STATE, KVM_CAP_PIT2, KVM_CAP_READONLY_MEM, KVM_CAP_REINJECT_CONTROL,
    KVM_CAP_SET_GUEST_DEBUG, KVM_CAP_SET_GUEST_DEBUG2, KVM_CAP_SET_IDENTITY_MAP_ADDR, KVM_CAP_SET_TSS_ADDR,
    KVM_CAP_SYNC_REGS, KVM_CAP_USER_MEMORY, KVM_CAP_VCPU_EVENTS, KVM_GUESTDBG_BLOCKIRQ,
    KVM_SYNC_X86_VALID_FIELDS,
};
use kvm_ioctls::Kvm;

/// Why this host cannot run a machine.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No device.
    #[error(
        "This host has no /dev/kvm; load the module kvm_intel or kvm_amd and switch virtualization on in the firmware, \
         or use --accel nested"
    )]
    NoDevice,
    /// No permission.
    #[error(
        "No permission to open /dev/kvm; add your user to the group kvm and log in again, or use --accel nested"
    )]
    NoPermission,
    /// Another failure to open it.
    #[error("Could not open /dev/kvm")]
    Open(#[source] io::Error),
    /// Not the one API version that exists.
    #[error("/dev/kvm speaks API version {0} instead of 12; it is not Linux's KVM, use --accel nested")]
    ApiVersion(i32),
    /// Too old, or built without.
    #[error("This host's KVM lacks {name} (in Linux since {since}); use a newer kernel, or --accel nested")]
    Missing {
        /// The capability's name in the KVM API.
        name: &'static str,
        /// The Linux version that has it.
        since: &'static str,
    },
}

/// A capability that the machine cannot do without: number, name, bits that its value must have, Linux version.
type Needed = (u32, &'static str, u32, &'static str);

const NEEDED: [Needed; 16] = [
    (KVM_CAP_USER_MEMORY, "KVM_CAP_USER_MEMORY", 1, "2.6.20"),
    (KVM_CAP_IRQCHIP, "KVM_CAP_IRQCHIP", 1, "2.6.20"),
    (KVM_CAP_EXT_CPUID, "KVM_CAP_EXT_CPUID", 1, "2.6.27"),
    (KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR", 1, "2.6.24"),
    (KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR", 1, "2.6.31"),
    (KVM_CAP_MP_STATE, "KVM_CAP_MP_STATE", 1, "2.6.25"),
    (KVM_CAP_PIT2, "KVM_CAP_PIT2", 1, "2.6.31"),
    (KVM_CAP_REINJECT_CONTROL, "KVM_CAP_REINJECT_CONTROL", 1, "2.6.29"),
    (KVM_CAP_IRQFD, "KVM_CAP_IRQFD", 1, "2.6.32"),
    (KVM_CAP_VCPU_EVENTS, "KVM_CAP_VCPU_EVENTS", 1, "2.6.33"),
    (KVM_CAP_SET_GUEST_DEBUG, "KVM_CAP_SET_GUEST_DEBUG", 1, "2.6.30"),
    (KVM_CAP_READONLY_MEM, "KVM_CAP_READONLY_MEM", 1, "3.7"),
    (KVM_CAP_IMMEDIATE_EXIT, "KVM_CAP_IMMEDIATE_EXIT", 1, "4.11"),
    (KVM_CAP_EXCEPTION_PAYLOAD, "KVM_CAP_EXCEPTION_PAYLOAD", 1, "4.20"),
    (KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS", KVM_SYNC_X86_VALID_FIELDS, "4.17"),
    (KVM_CAP_SET_GUEST_DEBUG2, "KVM_GUESTDBG_BLOCKIRQ", KVM_GUESTDBG_BLOCKIRQ, "5.16"),
];

/// This host, as machines need it: its KVM, opened, and what files say of it. Whoever has it can make machines and opens nothing
/// more, so a process can give up opening files first.
#[derive(Debug)]
pub struct Host {
    pub(crate) kvm: Kvm,
    /// Bytes; `None` where the host does not say.
    pub(crate) memory_bytes: Option<u64>,
    /// See [`loses_breakpoints`].
    pub(crate) loses_breakpoints: bool,
}

impl Host {
    /// Opens /dev/kvm, and reads what else there is to know.
    ///
    /// # Errors
    /// [`HostError`], which says what to do.
    pub fn open() -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => HostError::NoDevice,
            libc::EACCES | libc::EPERM => HostError::NoPermission,
            errno => HostError::Open(io::Error::from_raw_os_error(errno)),
        })?;
        match kvm.get_api_version() {
            version if u32::try_from(version) == Ok(KVM_API_VERSION) => {}
            version => return Err(HostError::ApiVersion(version)),
        }
        Ok(Self { kvm, memory_bytes: host_memory_bytes(), loses_breakpoints: loses_breakpoints() })
    }
}

/// Checks everything that the machine needs. `value` gives a capability's value (KVM_CHECK_EXTENSION).
pub(crate) fn require(value: impl Fn(u32) -> i32) -> Result<(), HostError> {
    for (number, name, bits, since) in NEEDED {
        let has = u32::try_from(value(number)).unwrap_or(0);
        if has & bits != bits {
            return Err(HostError::Missing { name, since });
        }
    }
    Ok(())
}

/// Whether this host's KVM loses a #BP that it injects while an interrupt is pending, if the delivery has to be tried again (the
/// nested page tables fault, or the host's scheduler comes between): kvm_amd without NRIPS, so any CPU or nested host without
/// that feature.
fn loses_breakpoints() -> bool {
    std::fs::read_to_string("/sys/module/kvm_amd/parameters/nrips").is_ok_and(|nrips| is_off(&nrips))
}

/// Whether a module parameter is off, as number or as boolean.
fn is_off(parameter: &str) -> bool {
    matches!(parameter.trim(), "0" | "N")
}

/// The host's memory in bytes, from /proc/meminfo (proc_meminfo(5)); `None` where that cannot be read.
fn host_memory_bytes() -> Option<u64> {
    parse_mem_total(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

fn parse_mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mem_total_is_read_in_bytes() {
        assert_eq!(parse_mem_total("MemTotal:       24682308 kB\nMemFree: 1 kB\n"), Some(24_682_308 * 1024));
        assert_eq!(parse_mem_total("MemFree: 1 kB\n"), None);
        assert_eq!(parse_mem_total("MemTotal: 99999999999999999999 kB\n"), None);
        assert_eq!(parse_mem_total(""), None);
    }

    #[test]
    fn each_needed_capability_is_missed_by_name() {
        require(|_| i32::MAX).unwrap();
        for (number, name, bits, _) in NEEDED {
            for lacking in [0, i32::try_from(bits / 2).unwrap(), -1] {
                let value = |asked| if asked == number { lacking } else { i32::MAX };
                assert!(
                    matches!(require(value), Err(HostError::Missing { name: n, .. }) if n == name),
                    "{name}"
                );
            }
        }
    }

    #[test]
    fn a_module_parameter_is_off_as_number_or_boolean() {
        assert!(is_off("0\n") && is_off("N\n"));
        assert!(!is_off("1\n") && !is_off("Y\n") && !is_off(""));
    }

    #[test]
    fn some_sync_regs_are_not_enough() {
        let value = |asked| if asked == KVM_CAP_SYNC_REGS { 3 } else { i32::MAX };
        assert!(matches!(require(value), Err(HostError::Missing { name: "KVM_CAP_SYNC_REGS", .. })));
    }
}
