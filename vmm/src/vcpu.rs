//! One vCPU's file descriptor: every ioctl on it, each counted.

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, Msrs,
    kvm_fpu, kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_sregs, kvm_sync_regs,
};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};
use probe_core::watch::{DebugRegisters, GuestDebugRegisters, REGISTERS};
use probe_core::{Exception, Registers, VcpuId, VcpuState, rflags};
use vmm_sys_util::errno;

use crate::exit::{self, Exit};
use crate::regs::{self, BreakpointRip};
use crate::report::IoctlCounts;

/// What guest debugging is switched to (KVM API, 4.87 KVM_SET_GUEST_DEBUG). Nothing is off: nothing exits, and the guest's own
/// debugging works as on hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DebugControl {
    /// Each #BP exits.
    pub breakpoints: bool,
    /// Interrupts are held.
    pub hold_interrupts: bool,
    /// These stand in for the guest's debug registers, and each #DB exits.
    pub registers: Option<DebugRegisters>,
}

impl DebugControl {
    /// As KVM takes it.
    fn kvm(&self) -> kvm_guest_debug {
        let bits = [
            (self.breakpoints, KVM_GUESTDBG_USE_SW_BP),
            (self.hold_interrupts, KVM_GUESTDBG_BLOCKIRQ),
            (self.registers.is_some(), KVM_GUESTDBG_USE_HW_BP),
        ];
        let wanted = bits.iter().filter(|(wanted, _)| *wanted).fold(0, |bits, (_, bit)| bits | bit);
        let control = if wanted == 0 { 0 } else { KVM_GUESTDBG_ENABLE | wanted };
        let mut debug = kvm_guest_debug { control, ..kvm_guest_debug::default() };
        if let Some(registers) = self.registers {
            debug.arch.debugreg[..REGISTERS].copy_from_slice(&registers.address);
            debug.arch.debugreg[7] = registers.dr7;
        }
        debug
    }
}

/// An ioctl on a vCPU that failed.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{name} failed on {vcpu}")]
pub struct VcpuError {
    /// The ioctl's name in the KVM API.
    pub name: &'static str,
    /// The vCPU.
    pub vcpu: VcpuId,
    /// What the host said.
    #[source]
    pub source: errno::Error,
}

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    id: VcpuId,
    fd: VcpuFd,
    /// Size of the run page's mapping, bytes.
    run_bytes: usize,
    debug: DebugControl,
    /// The last exit asked for a port or MMIO access, which the next entry completes.
    access_pending: bool,
    ioctls: IoctlCounts,
}

impl Vcpu {
    /// Creates vCPU `id` of `vm` and asks for its registers in the run page at each exit.
    pub fn new(vm: &VmFd, id: VcpuId) -> Result<Self, VcpuError> {
        let mut fd = vm.create_vcpu(u64::from(id.0)).map_err(|source| VcpuError {
            name: "KVM_CREATE_VCPU",
            vcpu: id,
            source,
        })?;
        for set in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            fd.set_sync_valid_reg(set);
        }
        Ok(Self {
            id,
            fd,
            run_bytes: vm.run_size(),
            debug: DebugControl::default(),
            access_pending: false,
            ioctls: IoctlCounts::default(),
        })
    }

    pub fn id(&self) -> VcpuId {
        self.id
    }

    pub fn ioctls(&self) -> IoctlCounts {
        self.ioctls
    }

    pub fn debug(&self) -> DebugControl {
        self.debug
    }

    /// Gives a new vCPU its CPUID, its registers and, unless `runnable`, leaves it to be started by the guest.
    /// `system` changes the system registers that KVM gave it.
    pub fn set_up(
        &mut self,
        cpuid: &CpuId,
        registers: &Registers,
        system: impl FnOnce(&mut kvm_sregs),
        runnable: bool,
    ) -> Result<(), VcpuError> {
        self.other("KVM_SET_CPUID2", |fd| fd.set_cpuid2(cpuid))?;
        let mut sregs = self.other("KVM_GET_SREGS", |fd| fd.get_sregs())?;
        system(&mut sregs);
        self.other("KVM_SET_SREGS", |fd| fd.set_sregs(&sregs))?;
        self.other("KVM_SET_REGS", |fd| fd.set_regs(&regs::kvm_registers(registers)))?;
        // The state that FNINIT and a reset of MXCSR leave (Intel SDM vol. 1, 8.1.5 and 11.6.4).
        let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..kvm_fpu::default() };
        self.other("KVM_SET_FPU", |fd| fd.set_fpu(&fpu))?;
        self.set_msrs(&[
            // IA32_MISC_ENABLE: fast strings.
            (0x1a0, 1),
            // IA32_MTRR_DEF_TYPE: enabled, write-back. Off would mean that all memory is uncached.
            (0x2ff, 1 << 11 | 6),
        ])?;
        let mp_state = if runnable { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        self.set_mp_state(mp_state)?;
        self.fill_run_page()
    }

    /// Puts the vCPU's state into the run page, where each exit will put it.
    fn fill_run_page(&mut self) -> Result<(), VcpuError> {
        let regs = self.other("KVM_GET_REGS", |fd| fd.get_regs())?;
        let sregs = self.other("KVM_GET_SREGS", |fd| fd.get_sregs())?;
        let events = self.other("KVM_GET_VCPU_EVENTS", |fd| fd.get_vcpu_events())?;
        *self.fd.sync_regs_mut() = kvm_sync_regs { regs, sregs, events };
        Ok(())
    }

    /// Sets each MSR that this host's KVM knows.
    fn set_msrs(&mut self, values: &[(u32, u64)]) -> Result<(), VcpuError> {
        for (index, data) in values {
            let entry = kvm_msr_entry { index: *index, data: *data, ..kvm_msr_entry::default() };
            let msrs = Msrs::from_entries(&[entry]).map_err(|_| VcpuError {
                name: "KVM_SET_MSRS",
                vcpu: self.id,
                source: errno::Error::new(libc::E2BIG),
            })?;
            let set = self.other("KVM_SET_MSRS", |fd| fd.set_msrs(&msrs))?;
            if set != 1 {
                tracing::debug!(vcpu = %self.id, "KVM refused MSR {index:#x}");
            }
        }
        Ok(())
    }

    /// KVM_RUN until the next exit.
    pub fn enter(&mut self) -> Result<Exit, VcpuError> {
        self.ioctls.run += 1;
        let exit =
            exit::run(&mut self.fd).map_err(|source| VcpuError { name: "KVM_RUN", vcpu: self.id, source })?;
        self.access_pending = exit.is_access();
        Ok(exit)
    }

    /// Whether the last exit asked for a port or MMIO access that [`Vcpu::complete_access`] or the next entry completes.
    pub fn access_pending(&self) -> bool {
        self.access_pending
    }

    /// Completes the port or MMIO access that the last exit asked for, and runs no further instruction:
    /// [`Exit::Interrupted`] when it is complete.
    pub fn complete_access(&mut self) -> Result<Exit, VcpuError> {
        self.fd.set_kvm_immediate_exit(1);
        let exit = self.enter();
        self.fd.set_kvm_immediate_exit(0);
        exit
    }

    /// The state at the last exit, before the first as it was set up, or what was written back since.
    pub fn state(&self) -> VcpuState {
        regs::vcpu_state(&self.fd.sync_regs())
    }

    /// Runs on from `state` at the next entry. No ioctl: what changed travels in the run page.
    pub fn write_back(&mut self, state: &VcpuState) {
        let dirty = regs::write_back(state, self.fd.sync_regs_mut());
        self.fd.get_kvm_run().kvm_dirty_regs |= dirty;
    }

    /// Delivers `exception` at the next entry. To be called after [`Vcpu::write_back`].
    pub fn queue_exception(&mut self, exception: Exception, rip: BreakpointRip) {
        let dirty = regs::queue_exception(exception, rip, self.fd.sync_regs_mut());
        self.fd.get_kvm_run().kvm_dirty_regs |= dirty;
    }

    /// Switches guest debugging.
    pub fn set_debug(&mut self, control: DebugControl) -> Result<(), VcpuError> {
        self.ioctls.set_guest_debug += 1;
        self.fd.set_guest_debug(&control.kvm()).map_err(|source| VcpuError {
            name: "KVM_SET_GUEST_DEBUG",
            vcpu: self.id,
            source,
        })?;
        self.debug = control;
        Ok(())
    }

    /// The debug registers as the guest has them, also while others stand in for them.
    pub fn guest_debug_registers(&mut self) -> Result<GuestDebugRegisters, VcpuError> {
        let registers = self.other("KVM_GET_DEBUGREGS", |fd| fd.get_debug_regs())?;
        Ok(GuestDebugRegisters { address: registers.db, dr7: registers.dr7 })
    }

    /// Sleeps at the next entry until an interrupt, as after HLT.
    pub fn halt(&mut self) -> Result<(), VcpuError> {
        self.set_mp_state(KVM_MP_STATE_HALTED)
    }

    /// Whether nothing but another vCPU can ever wake this one: halted with interrupts off, or never started.
    pub fn sleeps_for_ever(&mut self) -> Result<bool, VcpuError> {
        let mp_state = self.other("KVM_GET_MP_STATE", |fd| fd.get_mp_state())?.mp_state;
        let interrupts_off = self.state().regs.rflags & rflags::IF == 0;
        Ok(match mp_state {
            KVM_MP_STATE_HALTED => interrupts_off,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => true,
            _ => false,
        })
    }

    /// The data of the port access that the last exit asked for.
    pub fn port_data(&mut self) -> &mut [u8] {
        exit::port_data(&mut self.fd, self.run_bytes)
    }

    /// Answers the MMIO load that the last exit asked for with all ones.
    pub fn answer_mmio_read(&mut self) {
        exit::answer_mmio_read(&mut self.fd);
    }

    fn set_mp_state(&mut self, mp_state: u32) -> Result<(), VcpuError> {
        self.other("KVM_SET_MP_STATE", |fd| fd.set_mp_state(kvm_mp_state { mp_state }))
    }

    /// An ioctl that is neither KVM_RUN nor KVM_SET_GUEST_DEBUG.
    fn other<T>(
        &mut self,
        name: &'static str,
        ioctl: impl FnOnce(&VcpuFd) -> Result<T, errno::Error>,
    ) -> Result<T, VcpuError> {
        self.ioctls.other += 1;
        ioctl(&self.fd).map_err(|source| VcpuError { name, vcpu: self.id, source })
    }
}
