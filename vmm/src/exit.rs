//! Why KVM_RUN returned, as an owned value.

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use probe_core::{Gpa, Gva};
use vmm_sys_util::errno;

/// An exit of a vCPU (KVM API, 5. The kvm_run structure). Port data stay in the run page, see [`port_data`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// `count` reads of `size` bytes from a port; the answer is due in the run page.
    PortIn { port: u16, size: u8 },
    /// Writes of `size` bytes to a port; the data are in the run page.
    PortOut { port: u16, size: u8 },
    /// A load where no memory slot is; the answer is due in the run page.
    MmioRead { gpa: Gpa, len: u8 },
    /// A store where no memory slot, or a read-only one, is.
    MmioWrite { gpa: Gpa, data: [u8; 8], len: u8 },
    /// A debug exception or breakpoint that the host asked for.
    Debug { exception: u32, pc: Gva, dr6: u64 },
    /// KVM's instruction emulator could not go on at RIP.
    EmulationFailure { bytes: [u8; 15], len: u8 },
    /// Another KVM_EXIT_INTERNAL_ERROR.
    InternalError { suberror: u32, data: Vec<u64> },
    /// Triple fault.
    Shutdown,
    /// HLT without an in-kernel interrupt controller.
    Halt,
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// The CPU refused the guest's state.
    FailEntry { reason: u64 },
    /// Any other exit, by its KVM_EXIT_* number.
    Other { reason: u32 },
}

impl Exit {
    /// Whether it is a port or MMIO access, which the next KVM_RUN completes.
    pub fn is_access(&self) -> bool {
        matches!(
            self,
            Exit::PortIn { .. } | Exit::PortOut { .. } | Exit::MmioRead { .. } | Exit::MmioWrite { .. }
        )
    }
}

/// KVM_RUN until the next exit.
///
/// # Errors
/// The error of the ioctl, other than EINTR and EAGAIN, which are [`Exit::Interrupted`].
pub(crate) fn run(fd: &mut VcpuFd) -> Result<Exit, errno::Error> {
    let exit = match fd.run() {
        Ok(VcpuExit::IoIn(port, _)) => Exit::PortIn { port, size: port_size(fd.get_kvm_run()) },
        Ok(VcpuExit::IoOut(port, _)) => Exit::PortOut { port, size: port_size(fd.get_kvm_run()) },
        Ok(VcpuExit::MmioRead(gpa, data)) => Exit::MmioRead { gpa: Gpa(gpa), len: mmio_bytes(data).1 },
        Ok(VcpuExit::MmioWrite(gpa, data)) => {
            let (data, len) = mmio_bytes(data);
            Exit::MmioWrite { gpa: Gpa(gpa), data, len }
        }
        Ok(VcpuExit::Debug(debug)) => {
            Exit::Debug { exception: debug.exception, pc: Gva(debug.pc), dr6: debug.dr6 }
        }
        Ok(VcpuExit::InternalError) => internal_error(fd.get_kvm_run()),
        Ok(VcpuExit::Shutdown) => Exit::Shutdown,
        Ok(VcpuExit::Hlt) => Exit::Halt,
        Ok(VcpuExit::Intr) => Exit::Interrupted,
        Ok(VcpuExit::FailEntry(reason, _)) => Exit::FailEntry { reason },
        Ok(_) => Exit::Other { reason: fd.get_kvm_run().exit_reason },
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Exit::Interrupted,
        Err(error) => return Err(error),
    };
    Ok(exit)
}

/// The data of the port access that KVM last exited with: filled by KVM for writes, to be filled for reads. `run_bytes` is
/// the size of the run page's mapping (KVM_GET_VCPU_MMAP_SIZE). Empty if the last exit was no port access.
pub(crate) fn port_data(fd: &mut VcpuFd, run_bytes: usize) -> &mut [u8] {
    let run = fd.get_kvm_run();
    if run.exit_reason != kvm_bindings::KVM_EXIT_IO {
        return &mut [];
    }
    // SAFETY: exit_reason is KVM_EXIT_IO, for which KVM fills the union's `io`; every bit pattern is valid for it.
    let io = unsafe { run.__bindgen_anon_1.io };
    let len = usize::from(io.size) * io.count as usize;
    let start = usize::try_from(io.data_offset).ok().filter(|start| *start >= size_of::<kvm_run>());
    let Some(start) = start.filter(|start| start.checked_add(len).is_some_and(|end| end <= run_bytes)) else {
        return &mut [];
    };
    // SAFETY:
    // - the run page is mapped for `run_bytes` bytes as long as `fd` lives, and start + len <= run_bytes (checked);
    // - the data lie behind `kvm_run` itself (checked), so they alias no field of it;
    // - the result borrows `fd` mutably: nobody else reaches the page, and KVM writes it only in KVM_RUN, which needs
    //   `&mut fd` too;
    // - bytes have no alignment and no invalid value.
    unsafe { std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(start), len) }
}

/// Answers the MMIO load that KVM last exited with. KVM takes as many bytes as the load has.
pub(crate) fn answer_mmio_read(fd: &mut VcpuFd, data: [u8; 8]) {
    let run = fd.get_kvm_run();
    if run.exit_reason == kvm_bindings::KVM_EXIT_MMIO {
        // Writing a Copy field of a union is safe; KVM reads `mmio.data` for KVM_EXIT_MMIO.
        run.__bindgen_anon_1.mmio.data = data;
    }
}

/// Bytes per port access of the KVM_EXIT_IO in `run`.
fn port_size(run: &kvm_run) -> u8 {
    // SAFETY: only called after an exit with KVM_EXIT_IO, for which KVM fills the union's `io`; every bit pattern is valid.
    unsafe { run.__bindgen_anon_1.io }.size
}

fn mmio_bytes(data: &[u8]) -> ([u8; 8], u8) {
    let mut bytes = [0; 8];
    let mut len = 0;
    for (to, from) in bytes.iter_mut().zip(data) {
        *to = *from;
        len += 1;
    }
    (bytes, len)
}

fn internal_error(run: &kvm_run) -> Exit {
    // SAFETY: only called after an exit with KVM_EXIT_INTERNAL_ERROR, for which KVM fills the union's `internal`; every bit
    // pattern is valid.
    let error = unsafe { run.__bindgen_anon_1.internal };
    let count = error.data.len().min(error.ndata as usize);
    classify_internal_error(error.suberror, &error.data[..count])
}

/// KVM's emulator failing is a stop of its own; its data are flags, then one byte with the number of instruction bytes
/// and up to 15 of those (KVM API, 5, `emulation_failure`).
fn classify_internal_error(suberror: u32, data: &[u64]) -> Exit {
    if suberror != KVM_INTERNAL_ERROR_EMULATION {
        return Exit::InternalError { suberror, data: data.to_vec() };
    }
    let mut bytes = [0; 15];
    let mut len = 0;
    let flag = u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if let [flags, first, second, ..] = *data
        && flags & flag != 0
    {
        let [count, block @ ..] = (u128::from(second) << 64 | u128::from(first)).to_le_bytes();
        len = count.min(15);
        let valid = usize::from(len);
        bytes[..valid].copy_from_slice(&block[..valid]);
    }
    Exit::EmulationFailure { bytes, len }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn emulation_failure_gives_its_bytes() {
        // As measured at `int3; xchg %edx,%esp; nop ...`: one byte count, then the bytes.
        let first = u64::from_le_bytes([15, 0xcc, 0x90, 0xe6, 0x11, 0xf4, 1, 2]);
        let second = u64::from_le_bytes([3, 4, 5, 6, 7, 8, 9, 10]);
        let exit = classify_internal_error(1, &[1, first, second]);
        let bytes = [0xcc, 0x90, 0xe6, 0x11, 0xf4, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10];
        assert_eq!(exit, Exit::EmulationFailure { bytes, len: 15 });
    }

    #[test]
    fn emulation_failure_zero_fills_behind_the_valid_bytes() {
        let first = u64::from_le_bytes([2, 0xcd, 0x80, 0xee, 0xee, 0xee, 0xee, 0xee]);
        let exit = classify_internal_error(1, &[1, first, u64::MAX]);
        let mut bytes = [0; 15];
        bytes[..2].copy_from_slice(&[0xcd, 0x80]);
        assert_eq!(exit, Exit::EmulationFailure { bytes, len: 2 });
    }

    #[test]
    fn emulation_failure_without_or_with_impossible_bytes_does_not_panic() {
        let none = Exit::EmulationFailure { bytes: [0; 15], len: 0 };
        for data in [&[][..], &[1], &[1, 0xcc01], &[0, 0xcc01, 0]] {
            assert_eq!(classify_internal_error(1, data), none, "{data:x?}");
        }
        let exit = classify_internal_error(1, &[1, u64::MAX, u64::MAX]);
        assert_eq!(exit, Exit::EmulationFailure { bytes: [0xff; 15], len: 15 });
    }

    #[test]
    fn other_internal_errors_keep_their_data() {
        assert_eq!(
            classify_internal_error(3, &[7, 8]),
            Exit::InternalError { suberror: 3, data: vec![7, 8] }
        );
    }

    #[test]
    fn mmio_data_are_copied_up_to_eight_bytes() {
        assert_eq!(mmio_bytes(&[1, 2, 3]), ([1, 2, 3, 0, 0, 0, 0, 0], 3));
        assert_eq!(mmio_bytes(&[9; 12]), ([9; 8], 8));
    }
}
