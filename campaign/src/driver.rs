//! The host's side of a guest that runs cases, one stop after the other.
//!
//! ```text
//! Booting -> (EnablingXsave) -> Running -> (Leaving) -> (StoringSystem) -> Saving -> Running ...
//!                                  ^                                          |
//!                                  +------------- (Resetting) <--------------+
//! ```
//!
//! A case runs from the enter stub to whatever int3 it reaches. From CPL 3, or 32-bit code, an injected #UD leads to a
//! handler at CPL 0 (Leaving); then the stubs store what the host does not see.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iced_x86::{FlowControl, InstructionInfoFactory, Mnemonic, OpAccess};
use probe_core::control::{CR4_FSGSBASE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE};
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{
    Exception, Gpa, Gva, PhysicalMemory, Registers, SystemRegisters, VcpuState, control, rflags,
};

use crate::campaign::{Campaign, Run};
use crate::case::{Case, FPU_BYTES, code_gpa};
use crate::guest::{Guest, INT3};
use crate::layout::{
    CPUID, DATA_BYTES, EXCEPTION_STACK, FPU_AFTER, FPU_BEFORE, FRAME, HANDLER_BYTES, HANDLERS, HARNESS_END,
    KERNEL_CODE_64, KERNEL_DATA, PAGES, RAX, RDX, STUBS, SYSTEM, SYSTEM_BYTES, TABLES, USER_CODE_64,
    USER_DATA, data_page,
};
use crate::outcome::{End, Outcome};
use crate::prober::Armed;

/// CPUID leaf 1, ECX.
const CPUID_XSAVE: u32 = 1 << 26;
const CPUID_AVX: u32 = 1 << 28;
/// CPUID leaf 7, EBX.
const CPUID_FSGSBASE: u32 = 1 << 0;

/// What the guest is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Booting,
    EnablingXsave,
    Resetting,
    Running,
    Leaving,
    StoringSystem,
    Saving,
}

/// A campaign that the machine's thread and the one that started it share.
pub type Shared = Arc<Mutex<Campaign>>;

/// Locks a campaign.
pub fn lock(shared: &Shared) -> MutexGuard<'_, Campaign> {
    // A panic in a run has been reported by its thread; what was counted before stays true.
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The stop handler of the one vCPU.
#[derive(Debug)]
pub struct Driver {
    shared: Shared,
    guest: Guest,
    phase: Phase,
    xsave: bool,
    /// Control registers that cases start with.
    sys: Option<SystemRegisters>,
    run: Option<Run>,
    armed: Option<Armed>,
    ended: Option<Outcome>,
    /// A #DB has left its cause in DR6.
    dirty: bool,
    /// What the data pages hold, in the order of their linear addresses.
    data: Vec<u8>,
}

impl Driver {
    /// A driver for a machine that is about to start. `data` is what cases find in the data pages.
    #[must_use]
    pub fn new(shared: Shared, guest: Guest) -> Self {
        Self {
            shared,
            guest,
            phase: Phase::Booting,
            xsave: false,
            sys: None,
            run: None,
            armed: None,
            ended: None,
            dirty: false,
            data: vec![0; DATA_BYTES],
        }
    }

    fn jump(&mut self, state: &mut VcpuState, stub: u64, phase: Phase) -> Resume {
        state.regs = Registers { rip: stub, rsp: EXCEPTION_STACK, rflags: rflags::FIXED, ..state.regs };
        self.phase = phase;
        Resume::Run
    }

    /// The reset stub is done.
    fn booted(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Resume {
        let word = |index: u64| {
            let mut bytes = [0; 4];
            memory
                .read(Gpa(CPUID + 4 * index), &mut bytes)
                .map(|()| u32::from_le_bytes(bytes))
                .unwrap_or_default()
        };
        let [vendor, features, more_features] = [0, 1, 2].map(word);
        let emulates = lock(&self.shared).booted(vendor);
        // KVM's emulator has no XRSTOR.
        self.xsave = features & CPUID_XSAVE != 0 && !emulates;
        state.sys.cr0 |= control::CR0_WP | control::CR0_AM;
        state.sys.cr3 = TABLES;
        state.sys.cr4 |= CR4_OSFXSR | CR4_OSXMMEXCPT | if self.xsave { CR4_OSXSAVE } else { 0 };
        if more_features & CPUID_FSGSBASE != 0 {
            state.sys.cr4 |= CR4_FSGSBASE;
        }
        state.sys.efer |= control::EFER_NXE;
        self.sys = Some(state.sys);
        lock(&self.shared).host.xsave = self.xsave;
        if self.xsave {
            state.regs.rax = if features & CPUID_AVX != 0 { 7 } else { 3 };
            let stub = self.guest.stubs.enable_xsave;
            return self.jump(state, stub, Phase::EnablingXsave);
        }
        self.next(state, memory)
    }

    /// Starts the next run, resetting what the last one may have changed first.
    fn next(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Resume {
        let dirty = self.dirty || self.run.as_ref().is_some_and(|run| touches_system(&run.case));
        self.run = None;
        self.dirty = false;
        if dirty && self.guest.restore_descriptors(memory).is_ok() {
            let stub = self.guest.stubs.reset;
            return self.jump(state, stub, Phase::Resetting);
        }
        self.begin(state, memory)
    }

    fn begin(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Resume {
        loop {
            let Some(run) = lock(&self.shared).next_run() else { return Resume::Finish };
            if write_code(memory, &run.case).is_err() {
                return failed("The case does not lie in RAM");
            }
            if run.probed || run.fresh {
                let vendor = lock(&self.shared).vendor;
                match Armed::new(memory, Gva(run.case.site), run.case.gpa(), vendor) {
                    Ok(armed) if run.probed => self.armed = Some(armed),
                    Ok(armed) => drop(armed.disarm(memory)),
                    Err(reason) => {
                        clear_code(memory, &run.case);
                        lock(&self.shared).refused(&reason);
                        continue;
                    }
                }
            }
            if self.write_state(state, memory, &run).is_err() {
                return failed("The harness does not lie in RAM");
            }
            self.run = Some(run);
            self.phase = Phase::Running;
            return Resume::Run;
        }
    }

    fn write_state(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        run: &Run,
    ) -> Result<(), probe_core::MemoryError> {
        let case = &run.case;
        let (code, stack) =
            if case.cpl == 0 { (KERNEL_CODE_64, KERNEL_DATA) } else { (USER_CODE_64, USER_DATA) };
        let frame = [case.site, u64::from(code), case.regs.rflags, case.regs.rsp, u64::from(stack)]
            .map(u64::to_le_bytes);
        memory.write(Gpa(FRAME), &frame.concat())?;
        memory.write(Gpa(RAX), &case.regs.rax.to_le_bytes())?;
        memory.write(Gpa(RDX), &case.regs.rdx.to_le_bytes())?;
        memory.write(Gpa(FPU_BEFORE), case.fpu.as_slice())?;
        let wanted = run.data();
        for (index, (wanted, known)) in (1..).zip(wanted.chunks(4096).zip(self.data.chunks(4096))) {
            if let Some(gpa) = data_page(index).filter(|_| wanted != known) {
                memory.write(gpa, wanted)?;
            }
        }
        self.data = wanted;
        let stubs = &self.guest.stubs;
        let enter = if self.xsave { stubs.enter_xsave } else { stubs.enter };
        state.regs = Registers { rip: enter, rsp: FRAME, rflags: rflags::FIXED, ..case.regs };
        if let Some(sys) = self.sys {
            state.sys = SystemRegisters { cr2: state.sys.cr2, cpl: state.sys.cpl, ..sys };
        }
        state.sys.fs_base = case.fs_base;
        state.sys.gs_base = case.gs_base;
        Ok(())
    }

    /// A stop while a case runs.
    fn running(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        let Some(run) = self.run.clone() else { return failed("A stop without a run") };
        let rip = state.regs.rip;
        let is_ours = is_int3(&stop) && is_ours(rip, &run.case);
        // The filler behind the instruction may be the guard of one that runs in its place.
        let may_be_guard = rip == run.case.next() && self.armed.is_some();
        if is_ours && !may_be_guard {
            let end = self.reached(state, memory);
            return self.end(state, memory, end);
        }
        if let Some(armed) = &mut self.armed {
            return match armed.on_stop(state, memory, stop) {
                Resume::Fail { reason } => self.end(state, memory, End::GaveUp(reason)),
                Resume::Halt => self.end(state, memory, End::Halted),
                Resume::Finish => self.end(state, memory, End::GaveUp("the engine finished the run".into())),
                Resume::Inject(Exception::Breakpoint) if is_ours => {
                    let end = self.reached(state, memory);
                    self.end(state, memory, end)
                }
                resume => resume,
            };
        }
        match stop {
            Stop::Debug { dr6, .. } => Resume::Inject(Exception::Debug { dr6 }),
            // The instruction is an int3.
            _ if is_int3(&stop) => Resume::Inject(Exception::Breakpoint),
            _ => self.end(state, memory, End::Refused(rip)),
        }
    }

    /// How a case ended at an int3 of the harness; puts what an exception pushed back into the registers.
    fn reached(&self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> End {
        let offset = state.regs.rip.wrapping_sub(HANDLERS);
        if offset >= 256 * HANDLER_BYTES {
            return End::Reached { cpl: state.sys.cpl, long: state.sys.long_code };
        }
        let vector = (offset / HANDLER_BYTES).to_le_bytes()[0];
        let word = |index: u64| memory.read_u64(Gpa(state.regs.rsp + 8 * index)).unwrap_or_default();
        // Intel SDM vol. 3A, table 6-1; AMD's #VC and #SX.
        let has_code = matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30)
            && EXCEPTION_STACK.wrapping_sub(state.regs.rsp) == 6 * 8;
        let frame = u64::from(has_code);
        let end = End::Exception {
            vector,
            code: has_code.then(|| word(0)),
            cr2: (vector == 14).then_some(state.sys.cr2),
            selectors: [word(frame + 1), word(frame + 4)],
        };
        let (rip, flags, rsp) = (word(frame), word(frame + 2), word(frame + 3));
        (state.regs.rip, state.regs.rflags, state.regs.rsp) = (rip, flags, rsp);
        end
    }

    /// A case has ended: notes what can be seen and goes on to the stubs.
    fn end(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, end: End) -> Resume {
        let exception = matches!(end, End::Exception { .. });
        // At an exception CPL and code size are the handler's.
        let (cpl, long) = (state.sys.cpl, state.sys.long_code);
        self.ended = Some(Outcome {
            end,
            regs: state.regs,
            sys: state.sys,
            fpu: None,
            system: None,
            data: read_data(memory),
        });
        if let Some(sys) = self.sys {
            state.sys = SystemRegisters { cpl, long_code: long, cr2: state.sys.cr2, ..sys };
        }
        if !exception && (cpl != 0 || !long) {
            self.phase = Phase::Leaving;
            // With TF set the handler would be reached through a #DB of its own.
            state.regs.rflags &= !rflags::TF;
            return Resume::Inject(Exception::InvalidOpcode);
        }
        self.store(state)
    }

    fn store(&mut self, state: &mut VcpuState) -> Resume {
        let debug = matches!(self.ended, Some(Outcome { end: End::Exception { vector: 1, .. }, .. }));
        self.dirty |= debug;
        let system = debug || self.run.as_ref().is_some_and(|run| touches_system(&run.case));
        let stubs = self.guest.stubs;
        if system {
            self.jump(state, stubs.system, Phase::StoringSystem)
        } else {
            let save = if self.xsave { stubs.save_xsave } else { stubs.save };
            self.jump(state, save, Phase::Saving)
        }
    }

    fn stored_system(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Resume {
        let mut system = [0; SYSTEM_BYTES];
        if memory.read(Gpa(SYSTEM), &mut system).is_ok()
            && let Some(outcome) = &mut self.ended
        {
            outcome.system = Some(system);
        }
        let stubs = self.guest.stubs;
        let save = if self.xsave { stubs.save_xsave } else { stubs.save };
        self.jump(state, save, Phase::Saving)
    }

    fn saved(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Resume {
        let mut fpu = Box::new([0; FPU_BYTES]);
        if memory.read(Gpa(FPU_AFTER), fpu.as_mut_slice()).is_ok()
            && let Some(outcome) = &mut self.ended
        {
            outcome.fpu = Some(fpu);
        }
        self.complete(memory);
        self.next(state, memory)
    }

    /// Hands the outcome over.
    fn complete(&mut self, memory: &dyn PhysicalMemory) {
        let Some(outcome) = self.ended.take() else { return };
        self.data.clone_from(&outcome.data);
        let account = self.armed.take().map(|armed| armed.disarm(memory));
        let restored = self.run.as_ref().is_none_or(|run| code_is(memory, &run.case));
        if let Some(run) = &self.run {
            clear_code(memory, &run.case);
        }
        lock(&self.shared).complete(outcome, account, restored);
    }

    /// The guest is somewhere it cannot be: what is known of the run counts, and the machine is given up.
    fn give_up(&mut self, memory: &dyn PhysicalMemory) -> Resume {
        self.complete(memory);
        Resume::Finish
    }
}

impl StopHandler for Driver {
    fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        if self.phase == Phase::Running {
            return self.running(state, memory, stop);
        }
        if self.phase == Phase::Booting && is_int3(&stop) {
            lock(&self.shared).host.emulates_kernel = matches!(stop, Stop::EmulationFailure { .. });
            return self.booted(state, memory);
        }
        let in_stub = (STUBS..STUBS + 0x1000).contains(&state.regs.rip);
        let in_handler = (HANDLERS..HARNESS_END).contains(&state.regs.rip);
        match self.phase {
            Phase::Leaving if in_handler => self.store(state),
            Phase::EnablingXsave | Phase::Resetting if in_stub => self.begin(state, memory),
            Phase::StoringSystem if in_stub => self.stored_system(state, memory),
            Phase::Saving if in_stub => self.saved(state, memory),
            Phase::Booting => failed("The guest does not boot"),
            _ => self.give_up(memory),
        }
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        // Only code is watched, and no case writes it.
        let _ = memory.write(gpa, data);
    }

    fn wants_breakpoints(&self) -> bool {
        true
    }
}

fn failed(reason: &str) -> Resume {
    Resume::Fail { reason: reason.to_owned() }
}

fn is_int3(stop: &Stop) -> bool {
    match stop {
        Stop::Breakpoint { .. } => true,
        Stop::EmulationFailure { bytes, len } => *len > 0 && bytes[0] == INT3,
        Stop::Debug { .. } | Stop::Watchpoint { .. } => false,
    }
}

/// Whether an int3 at `rip` is the harness's: filler, a handler's or a stub's.
fn is_ours(rip: u64, case: &Case) -> bool {
    let filler = code_gpa(rip).is_some() && !(case.site..case.next()).contains(&rip);
    // The engine may have breakpoints of its own at the start of a handler.
    let handler = (HANDLERS..HANDLERS + 0x1000).contains(&rip) && rip % HANDLER_BYTES == 1;
    filler || handler || (STUBS..STUBS + 0x1000).contains(&rip)
}

fn write_code(memory: &dyn PhysicalMemory, case: &Case) -> Result<(), probe_core::MemoryError> {
    memory.write(case.gpa(), &case.bytes)
}

fn clear_code(memory: &dyn PhysicalMemory, case: &Case) {
    // It was written there before.
    let _ = memory.write(case.gpa(), &vec![INT3; case.bytes.len()]);
}

/// Whether the instruction is in memory as it was written.
fn code_is(memory: &dyn PhysicalMemory, case: &Case) -> bool {
    let mut bytes = vec![0; case.bytes.len()];
    memory.read(case.gpa(), &mut bytes).is_ok() && bytes == case.bytes
}

fn read_data(memory: &dyn PhysicalMemory) -> Vec<u8> {
    let mut data = vec![0; DATA_BYTES];
    for (index, page) in (1..PAGES.len() as u64).zip(data.chunks_mut(4096)) {
        if let Some(gpa) = data_page(index) {
            // The pages are RAM.
            let _ = memory.read(gpa, page);
        }
    }
    data
}

/// Whether a case may change what the reset stub sets.
fn touches_system(case: &Case) -> bool {
    let instruction = &case.instruction;
    let transfers = match instruction.flow_control() {
        FlowControl::Interrupt | FlowControl::Exception => true,
        FlowControl::Return => !matches!(instruction.mnemonic(), Mnemonic::Ret),
        FlowControl::Call => !instruction.is_call_near(),
        FlowControl::UnconditionalBranch => instruction.is_jmp_far(),
        FlowControl::IndirectBranch => instruction.is_jmp_far_indirect(),
        FlowControl::IndirectCall => instruction.is_call_far_indirect(),
        _ => false,
    };
    let writes = InstructionInfoFactory::new().info(instruction).used_registers().iter().any(|used| {
        let register = used.register();
        let system =
            register.is_segment_register() || register.is_cr() || register.is_dr() || register.is_tr();
        system && !matches!(used.access(), OpAccess::Read | OpAccess::CondRead)
    });
    transfers || writes || instruction.is_privileged()
}
