//! One vCPU's file descriptor: every ioctl on it, each counted.

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP,
    KVM_MAX_MSR_ENTRIES, KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, Msrs,
    kvm_cpuid_entry2, kvm_fpu, kvm_guest_debug, kvm_mp_state, kvm_msr_entry, kvm_sregs, kvm_sync_regs,
};
use kvm_ioctls::{SyncReg, VcpuFd, VmFd};
use probe_core::watch::{DebugRegisters, GuestDebugRegisters, REGISTERS};
use probe_core::{Exception, Registers, VcpuId, VcpuState, rflags};
use vmm_sys_util::errno;

use crate::exit::{self, Exit};
use crate::msrs;
use crate::regs::{self, BreakpointRip};
use crate::report::IoctlCounts;
use crate::snapshot::{self, CpuidEntry, DebugRegisters as SavedDebugRegisters, Events, Mirror, SavedVcpu};

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

/// Why a vCPU could not be made what was saved.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum RestoreVcpuError {
    /// An ioctl failed.
    #[error("A vCPU's state could not be restored")]
    Vcpu(
        #[from]
        #[source]
        VcpuError,
    ),
    /// The guest's clocks would run at another speed.
    #[error(
        "The snapshot's time-stamp counter runs at {khz} kHz and this host's at {host} kHz, and this host cannot scale it;          restore the snapshot where it was made"
    )]
    TscFrequency {
        /// The guest's.
        khz: u32,
        /// This host's.
        host: u32,
    },
    /// An MSR cannot have its value.
    #[error(
        "This host's KVM does not let MSR {index:#x} be {saved:#x} as in the snapshot; restore it where it was made"
    )]
    Msr {
        /// Which.
        index: u32,
        /// What it was.
        saved: u64,
    },
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
    /// As it was set. What KVM_GET_CPUID2 gives differs: it follows what the guest switches on, and some hosts give their own.
    cpuid: Vec<kvm_cpuid_entry2>,
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
            cpuid: Vec::new(),
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
        self.set_cpuid(cpuid)?;
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

    fn set_cpuid(&mut self, cpuid: &CpuId) -> Result<(), VcpuError> {
        self.cpuid = cpuid.as_slice().to_vec();
        self.other("KVM_SET_CPUID2", |fd| fd.set_cpuid2(cpuid))
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
            let msrs = Msrs::from_entries(&[entry]).map_err(|_| self.too_many("KVM_SET_MSRS"))?;
            let set = self.other("KVM_SET_MSRS", |fd| fd.set_msrs(&msrs))?;
            if set != 1 {
                tracing::debug!(vcpu = %self.id, "KVM refused MSR {index:#x}");
            }
        }
        Ok(())
    }

    /// Everything that KVM holds of the vCPU; `msrs` are those to save.
    pub fn save(&mut self, msrs: &[u32]) -> Result<SavedVcpu, VcpuError> {
        self.empty_run_page()?;
        // First: it accepts an INIT or SIPI that has come, which changes registers.
        let mp_state = self.other("KVM_GET_MP_STATE", |fd| fd.get_mp_state())?.mp_state;
        self.fill_run_page()?;
        let page = self.fd.sync_regs();
        let msrs = self.get_msrs(msrs)?;
        Ok(SavedVcpu {
            cpuid: self.cpuid.iter().map(CpuidEntry::save).collect(),
            mp_state,
            registers: snapshot::Registers::save(&page.regs),
            system: snapshot::SystemRegisters::save(&page.sregs),
            debug: SavedDebugRegisters::save(&self.other("KVM_GET_DEBUGREGS", |fd| fd.get_debug_regs())?),
            events: Events::save(&page.events),
            xcrs: snapshot::xcrs(&self.other("KVM_GET_XCRS", |fd| fd.get_xcrs())?),
            xsave: snapshot::xsave(&self.other("KVM_GET_XSAVE", |fd| fd.get_xsave())?),
            lapic: snapshot::lapic(&self.other("KVM_GET_LAPIC", |fd| fd.get_lapic())?),
            msrs,
            tsc_khz: self.fd.get_tsc_khz().ok(),
        })
    }

    /// Makes a new vCPU what was saved.
    pub fn restore(&mut self, saved: &SavedVcpu) -> Result<(), RestoreVcpuError> {
        if let Some(khz) = saved.tsc_khz
            && self.fd.get_tsc_khz() != Ok(khz)
        {
            self.fd.set_tsc_khz(khz).map_err(|_| RestoreVcpuError::TscFrequency {
                khz,
                host: self.fd.get_tsc_khz().unwrap_or(0),
            })?;
        }
        let entries: Vec<_> = saved.cpuid.iter().map(CpuidEntry::restore).collect();
        let cpuid = CpuId::from_entries(&entries).map_err(|_| self.too_many("KVM_SET_CPUID2"))?;
        // What this order heeds: registers follow what CPUID allows; KVM_SET_SREGS places the local APIC; the APIC timer's mode
        // decides about the MSR of the TSC deadline; KVM_SET_REGS drops pending exceptions, which the events bring back.
        self.set_cpuid(&cpuid)?;
        self.set_mp_state(saved.mp_state)?;
        self.other("KVM_SET_REGS", |fd| fd.set_regs(&saved.registers.restore()))?;
        self.other("KVM_SET_SREGS", |fd| fd.set_sregs(&saved.system.restore()))?;
        self.other("KVM_SET_XCRS", |fd| fd.set_xcrs(&snapshot::kvm_xcrs(&saved.xcrs)))?;
        let xsave = snapshot::kvm_xsave(&saved.xsave);
        // SAFETY:
        // - KVM reads as many bytes as KVM_CAP_XSAVE2 says, the 4096 of `kvm_xsave` unless this process asked for larger states with
        //   arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM) (Linux: Documentation/arch/x86/xstate.rst), which nothing here does;
        // - it keeps no pointer, and writes nothing.
        self.other("KVM_SET_XSAVE", |fd| unsafe { fd.set_xsave(&xsave) })?;
        self.other("KVM_SET_DEBUGREGS", |fd| fd.set_debug_regs(&saved.debug.restore()))?;
        self.other("KVM_SET_LAPIC", |fd| fd.set_lapic(&snapshot::kvm_lapic(&saved.lapic)))?;
        self.restore_msrs(&saved.msrs)?;
        self.other("KVM_SET_VCPU_EVENTS", |fd| fd.set_vcpu_events(&saved.events.restore()))?;
        self.fill_run_page()?;
        Ok(())
    }

    /// Gives KVM what the run page holds for it.
    fn empty_run_page(&mut self) -> Result<(), VcpuError> {
        let page = self.fd.sync_regs();
        let dirty = std::mem::take(&mut self.fd.get_kvm_run().kvm_dirty_regs);
        let is_dirty = |set: u32| dirty & u64::from(set) != 0;
        if is_dirty(KVM_SYNC_X86_REGS) {
            self.other("KVM_SET_REGS", |fd| fd.set_regs(&page.regs))?;
        }
        if is_dirty(KVM_SYNC_X86_SREGS) {
            self.other("KVM_SET_SREGS", |fd| fd.set_sregs(&page.sregs))?;
        }
        if is_dirty(KVM_SYNC_X86_EVENTS) {
            self.other("KVM_SET_VCPU_EVENTS", |fd| fd.set_vcpu_events(&page.events))?;
        }
        Ok(())
    }

    /// The values of the MSRs that this vCPU has, in the order given.
    fn get_msrs(&mut self, indices: &[u32]) -> Result<Vec<(u32, u64)>, VcpuError> {
        let mut values = Vec::with_capacity(indices.len());
        let mut left = indices;
        while !left.is_empty() {
            let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<_> = batch
                .iter()
                .map(|index| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() })
                .collect();
            let mut msrs = Msrs::from_entries(&entries).map_err(|_| self.too_many("KVM_GET_MSRS"))?;
            let got = self.other("KVM_GET_MSRS", |fd| fd.get_msrs(&mut msrs))?;
            values.extend(msrs.as_slice().iter().take(got).map(|msr| (msr.index, msr.data)));
            // KVM stops at the first that it refuses.
            left = &left[(got + usize::from(got < batch.len())).min(left.len())..];
        }
        Ok(values)
    }

    /// Sets MSRs; one that KVM does not let be set has to have its value already.
    fn restore_msrs(&mut self, values: &[(u32, u64)]) -> Result<(), RestoreVcpuError> {
        let mut left = values;
        while !left.is_empty() {
            let batch = &left[..left.len().min(KVM_MAX_MSR_ENTRIES)];
            let entries: Vec<_> = batch
                .iter()
                .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..kvm_msr_entry::default() })
                .collect();
            let msrs = Msrs::from_entries(&entries).map_err(|_| self.too_many("KVM_SET_MSRS"))?;
            let set = self.other("KVM_SET_MSRS", |fd| fd.set_msrs(&msrs))?;
            left = &left[set.min(batch.len())..];
            if set < batch.len()
                && let [(index, saved), rest @ ..] = left
            {
                let found = self.get_msrs(&[*index])?.first().map(|(_, value)| *value);
                if found != Some(*saved) && !msrs::is_hosts_own(*index) {
                    return Err(RestoreVcpuError::Msr { index: *index, saved: *saved });
                }
                left = rest;
            }
        }
        Ok(())
    }

    fn too_many(&self, name: &'static str) -> VcpuError {
        VcpuError { name, vcpu: self.id, source: errno::Error::new(libc::E2BIG) }
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

    /// Answers the MMIO load that the last exit asked for.
    pub fn answer_mmio_read(&mut self, data: [u8; 8]) {
        exit::answer_mmio_read(&mut self.fd, data);
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
