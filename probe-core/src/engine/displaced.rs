//! The displaced instruction of a hit: emulated, or run out of line and put right.
//!
//! Out of line means: RIP on a copy in this vCPU's slot, IF and TF off, and an int3, the guard, behind the copy. At the guard
//! the instruction is complete. An event that comes before is caught on the first instruction of its handler
//! ([`super::catchers`]), and the frame repaired.
//!
//! Slots are the kernel's. Above CPL 0 an instruction runs in its place instead, with the probe's int3 out and the guard behind
//! it ([`crate::patch::PatchTable::open`]), while all other vCPUs are held out of the guest: none of them gets past the probe
//! unseen, or meets the guard. All else is the same. They are held until the guard or a handler is reached, so nothing may get
//! past these: an instruction that could is refused, and every handler has to have its int3.

use std::sync::Arc;

use iced_x86::{Code as Opcode, Instruction, Mnemonic, Register};

use super::catchers::{DEBUG, Gate, MACHINE_CHECK, NMI, PAGE_FAULT};
use super::restart::Restart;
use super::vcpu::Told;
use super::{Engine, HitSink, VcpuEngine};
use crate::emulate::{DeferReason, Emulated, read_register};
use crate::fixup::{HELD_FLAGS, Interruption, complete, find_interruption, go_back};
use crate::machine::Alone;
use crate::paging::{self, Access, Marks, TranslateError};
use crate::patch::{Code, OpenError, PatchTable, Place, Site, Sites, covers};
use crate::plan::{Leaving, check_in_place, check_step, leaving, text};
use crate::probe::Executed;
use crate::relocate::relocate;
use crate::space::AddressSpace;
use crate::stop::{Resume, dr6};
use crate::{Exception, Gpa, Gva, PhysicalMemory, Registers, VcpuState, control, rflags};

/// Error code of a page fault: the access was a write (Intel SDM vol. 3A, 4.7).
const WRITE: u64 = 1 << 1;

/// A displaced instruction that runs out of line, or in its place.
#[derive(Debug)]
pub(super) struct Step {
    told: Told,
    instruction: Instruction,
    /// Where it runs.
    pub(super) at: Gva,
    /// Its length in bytes.
    pub(super) len: u64,
    before: VcpuState,
    caught: Caught,
    /// What running in its place takes.
    in_place: Option<InPlace>,
}

impl Step {
    fn end(&self) -> Gva {
        self.at.offset(self.len)
    }

    fn contains(&self, address: u64) -> bool {
        (self.at..=self.end()).contains(&Gva(address))
    }

    /// Where the guest takes itself to be while RIP is on the copy.
    pub(super) fn original_rip(&self) -> u64 {
        self.instruction.ip()
    }
}

/// The int3s on handlers that stand for one step.
#[derive(Debug)]
struct Caught {
    /// On the handler of an INT n.
    held: Option<Arc<Site>>,
    /// On the handler of #PF.
    page_fault: Option<Arc<Site>>,
    /// The gate of an INT n or INT1.
    interrupt: Option<Gate>,
}

impl Caught {
    fn release(&self, engine: &Engine, memory: &dyn PhysicalMemory) {
        if let Some(site) = &self.held {
            engine.patches.release(memory, site);
        }
        if let Some(site) = &self.page_fault {
            engine.patches.rest(site);
        }
    }
}

/// Text in which an instruction runs in its place.
#[derive(Debug)]
struct InPlace {
    /// The guard's page, if it is watched for the guard alone.
    watched: Option<Gpa>,
    /// The other vCPUs, held.
    _others: Box<dyn Alone>,
}

/// The copy in a slot. Nobody but its vCPU's engine writes there.
#[derive(Debug)]
pub(super) struct SlotCopy {
    code: Arc<Code>,
    /// Where the original stands: a copy of a RIP-relative instruction depends on it.
    original: Gva,
    slot: Gva,
    len: u64,
}

/// What a stop in a step has shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// Nothing of the kind.
    No,
    /// The frame on the guest's stack is repaired, and the step over.
    Repaired,
    /// The guest's handler must not run.
    Instead(Resume),
}

impl<S: HitSink> VcpuEngine<S> {
    /// Runs the displaced instruction of a site that was reached, for those who were told of the hit; `finish` ends the run
    /// when it is done.
    pub(super) fn run_displaced(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        site: &Site,
        code: &Arc<Code>,
        told: Told,
        finish: bool,
    ) -> Resume {
        if code.is_guest_breakpoint() {
            return Resume::Inject(Exception::Breakpoint);
        }
        let pc = Gva(state.regs.rip);
        // The same page may be mapped at another address than the symbols say, as in early boot.
        let instruction = if pc == site.place.gva { code.instruction } else { code.decode_at(pc) };
        let merged = MergedMemory { memory, patches: &self.engine.patches, sites: self.lookup.sites() };
        let space = AddressSpace { memory: &merged, pkru: 0 };
        let before = state.regs.rflags;
        let watched = self.engine.touched(&instruction, state);
        let outcome = match code.emulation {
            Some(emulation) => emulation.run(&instruction, state, &space),
            None => Emulated::Defer(DeferReason::NotEmulated),
        };
        let (how, resume) = match outcome {
            Emulated::Done => (Executed::Emulated, after_instruction(before, state, 0)),
            Emulated::Halt => (Executed::Halted, Resume::Halt),
            Emulated::Fault(exception) => {
                self.engine.restarts.remember(state, Restart { executed: true });
                (Executed::Faulted, Resume::Inject(exception))
            }
            // With the int3 taken out the guest could go on from here.
            Emulated::Defer(_) if finish => return Resume::Finish,
            Emulated::Defer(_) => {
                let entered = if state.sys.cpl == 0 {
                    self.enter_slot(state, memory, instruction, code, told)
                } else {
                    self.enter_in_place(state, memory, instruction, site, code, told)
                };
                if let Err(reason) = entered {
                    self.engine.withdraw(memory, site, reason);
                    self.tidy(memory, site);
                }
                return Resume::Run;
            }
        };
        self.executed(state, memory, &told, how);
        if finish {
            Resume::Finish
        } else if how == Executed::Emulated {
            self.watch_emulated(state, memory, watched, resume)
        } else {
            resume
        }
    }

    /// Puts the instruction into this vCPU's slot and RIP on it.
    ///
    /// # Errors
    /// Why it cannot run there; nothing has changed for the guest then.
    fn enter_slot(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        instruction: Instruction,
        code: &Arc<Code>,
        told: Told,
    ) -> Result<(), String> {
        check_state(&instruction, state)?;
        let (at, len) = self.fill_slot(state, memory, &instruction, code)?;
        let caught = self.catch(state, memory, &instruction)?;
        self.step(state, Step { told, instruction, at, len, before: *state, caught, in_place: None });
        Ok(())
    }

    /// Lets the instruction run in its place, and holds the other vCPUs. Where the guest has changed its text or its page tables
    /// before they were held, it comes back to this hit.
    ///
    /// # Errors
    /// Why it cannot run there; nothing has changed for the guest then.
    fn enter_in_place(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        instruction: Instruction,
        site: &Site,
        code: &Arc<Code>,
        told: Told,
    ) -> Result<(), String> {
        if !state.sys.long_code {
            return Err(LEGACY_CODE.to_owned());
        }
        check_in_place(&instruction).map_err(|refusal| refusal.to_string())?;
        let others = self.engine.control.alone();
        let caught = self.catch(state, memory, &instruction)?;
        match self.open(state, memory, &instruction, site, code, &caught) {
            Ok(watched) => {
                let (at, len) = (Gva(instruction.ip()), instruction.len() as u64);
                let in_place = Some(InPlace { watched, _others: others });
                self.step(state, Step { told, instruction, at, len, before: *state, caught, in_place });
                // An execution breakpoint of the guest's own here has been met: it comes before the int3.
                state.regs.rflags |= rflags::RF;
                Ok(())
            }
            Err(NotOpened::Changed) => {
                caught.release(&self.engine, memory);
                state.regs.rflags |= rflags::RF;
                self.engine.restarts.remember(state, Restart { executed: told.counted });
                Ok(())
            }
            Err(NotOpened::Cannot(reason)) => {
                caught.release(&self.engine, memory);
                Err(reason)
            }
        }
    }

    /// Opens the text of an instruction that is to run in its place; returns the page that is watched for its guard alone.
    fn open(
        &self,
        state: &VcpuState,
        memory: &dyn PhysicalMemory,
        instruction: &Instruction,
        site: &Site,
        code: &Code,
        caught: &Caught,
    ) -> Result<Option<Gpa>, NotOpened> {
        if let Some(gate) = self.catchers.unheld(&state.sys, memory, caught.page_fault.as_ref()) {
            return Err(NotOpened::Cannot(format!(
                "in user mode it would have to run in its place, and the handler of exception {}, at {:#x}, cannot be watched",
                gate.vector, gate.handler
            )));
        }
        let Place { gpa, .. } = site.place;
        if paging::physical(&state.sys, memory, Gva(instruction.ip())) != Some(gpa) {
            return Err(NotOpened::Changed);
        }
        let next = Gva(instruction.next_ip());
        let guard = match paging::translate(
            &state.sys,
            state.regs.rflags,
            0,
            memory,
            next,
            Access::Execute,
            Marks::Keep,
        ) {
            Ok(translation) => Some(translation.gpa),
            // The exception that fetching from there raises ends it.
            Err(TranslateError::Fault(_) | TranslateError::NonCanonical(_)) => None,
            Err(error @ (TranslateError::NotRam(_) | TranslateError::Unsupported(_))) => {
                return Err(NotOpened::Cannot(error.to_string()));
            }
        };
        let watched = guard.map(Gpa::page).filter(|page| !site.place.pages().contains(page));
        if let Some(page) = watched {
            let watch = self.engine.control.watch(&[page]);
            watch.map_err(|error| NotOpened::Cannot(error.to_string()))?;
        }
        let opened = self.engine.patches.open(memory, gpa, code.bytes(), guard);
        if opened.is_err() {
            self.engine.unwatch(watched.as_slice());
        }
        match opened {
            Ok(()) => Ok(watched),
            Err(OpenError::Changed(_)) => Err(NotOpened::Changed),
            Err(error @ (OpenError::Busy | OpenError::Guard(_))) => {
                Err(NotOpened::Cannot(format!("in user mode it would have to run in its place, but {error}")))
            }
        }
    }

    /// Holds the int3s on handlers that a step of `instruction` needs.
    ///
    /// # Errors
    /// Why it cannot run without one of them.
    fn catch(
        &mut self,
        state: &VcpuState,
        memory: &dyn PhysicalMemory,
        instruction: &Instruction,
    ) -> Result<Caught, String> {
        let Self { engine, catchers, .. } = self;
        catchers.sync(engine, &state.sys, memory);
        let interrupt = match instruction.mnemonic() {
            Mnemonic::Int => Gate::read(&state.sys, memory, instruction.immediate8()),
            Mnemonic::Int1 => catchers.gate(DEBUG),
            _ => None,
        };
        let held = interrupt.and_then(|gate| catchers.hold(gate, engine, &state.sys, memory));
        if let (Some(gate), None) = (interrupt, &held) {
            return Err(format!(
                "the handler of its interrupt, at {:#x}, cannot be watched, and would see where it really ran",
                gate.handler
            ));
        }
        let page_fault = catchers.hold_page_fault(engine, &state.sys, memory);
        Ok(Caught { held, page_fault, interrupt })
    }

    /// The next entry runs the step.
    fn step(&mut self, state: &mut VcpuState, step: Step) {
        state.regs.rip = step.at.0;
        state.regs.rflags &= !HELD_FLAGS;
        self.step = Some(step);
    }

    /// Sees to it that this vCPU's slot holds the copy of an instruction; tells where that is, and its length in bytes.
    ///
    /// # Errors
    /// Why there is none.
    fn fill_slot(
        &mut self,
        state: &VcpuState,
        memory: &dyn PhysicalMemory,
        instruction: &Instruction,
        code: &Arc<Code>,
    ) -> Result<(Gva, u64), String> {
        let near = Gva(instruction.ip());
        let slots = &self.engine.slots;
        let slot = slots.map(&state.sys, memory, self.vcpu, near).map_err(|error| error.to_string())?;
        let is_filled =
            |copy: &&SlotCopy| (copy.original, copy.slot) == (near, slot) && Arc::ptr_eq(&copy.code, code);
        if let Some(copy) = self.copy.as_ref().filter(is_filled) {
            return Ok((slot, copy.len));
        }
        self.copy = None;
        check_step(instruction).map_err(|refusal| refusal.to_string())?;
        let bytes = relocate(code.bytes(), near, slot).map_err(|error| error.to_string())?;
        memory.write(slots.gpa(self.vcpu), bytes.bytes()).map_err(|error| error.to_string())?;
        let len = bytes.instruction_len() as u64;
        self.copy = Some(SlotCopy { code: Arc::clone(code), original: near, slot, len });
        Ok((slot, len))
    }

    /// At an int3 that no probe needs: takes it out if it only rests there, and all of this vCPU's catchers if there is no
    /// probe that could need them.
    pub(super) fn tidy(&mut self, memory: &dyn PhysicalMemory, site: &Site) {
        let Self { engine, catchers, .. } = self;
        engine.patches.dismiss(memory, site);
        if !engine.patches.any_enabled() {
            catchers.release(engine, memory);
            engine.refresh_armed(&engine.edit());
        }
    }

    /// The guard has been reached.
    pub(super) fn end_step(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        guest_dr6: u64,
    ) -> Resume {
        let Some(step) = self.close_step(memory) else { return Resume::Run };
        let flags = step.before.regs.rflags;
        complete(&step.instruction, flags, state);
        self.count_step(&step, Executed::Stepped, state, memory);
        after_instruction(flags, state, guest_dr6)
    }

    /// Ends the step, and the int3s that stand for it alone.
    pub(super) fn close_step(&mut self, memory: &dyn PhysicalMemory) -> Option<Step> {
        let mut step = self.step.take()?;
        step.caught.release(&self.engine, memory);
        if let Some(InPlace { watched, .. }) = &step.in_place {
            self.engine.patches.close(memory);
            self.engine.unwatch(watched.as_slice());
        }
        // The other vCPUs go on.
        step.in_place = None;
        Some(step)
    }

    /// A step is open, and RIP is not where it runs.
    #[inline]
    pub(super) fn has_left_step(&self, state: &VcpuState) -> bool {
        self.step.as_ref().is_some_and(|step| !step.contains(state.regs.rip))
    }

    /// At the start of a handler, or anywhere else than where the step runs: looks for an event that interrupted the step, and
    /// closes the step if it is over.
    #[cold]
    pub(super) fn leave_step(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Interrupted {
        let Some(step) = &self.step else { return Interrupted::No };
        let gate_to = |handler: Gva| {
            let interrupt = step.caught.interrupt.filter(|gate| gate.handler == handler);
            interrupt.or_else(|| self.catchers.gate_to(handler))
        };
        let is_handler = |handler| gate_to(handler).is_some();
        let (in_place, cpl) = (step.in_place.is_some(), step.before.sys.cpl);
        let Some(found) = find_interruption(state, memory, step.at, step.len, cpl, is_handler) else {
            if leaving(&step.instruction).is_some()
                && let Some(step) = self.close_step(memory)
            {
                self.count_step(&step, Executed::Left, state, memory);
            }
            return Interrupted::No;
        };
        let gate = gate_to(found.handler);
        self.close_step(memory).map_or(Interrupted::No, |step| {
            let page_fault = gate.is_some_and(|gate| gate.vector == PAGE_FAULT);
            let in_slot = !in_place && page_fault && step.contains(state.sys.cr2);
            let written = found.frame.error_code(&state.sys, memory).is_some_and(|code| code & WRITE != 0);
            if in_slot && written {
                // KVM replaces a hypercall of the other vendor where it stands (KVM_X86_QUIRK_FIX_HYPERCALL_INSN),
                // with the guest's rights.
                state.sys.cr2 = step.before.regs.rip.wrapping_add(state.sys.cr2 - step.at.0);
            }
            if in_slot && !written {
                Interrupted::Instead(Resume::Fail {
                    reason: format!(
                        "The slot at {:#x} cannot be fetched from, though the guest's page tables map it",
                        step.at
                    ),
                })
            } else {
                self.repair(&step, state, memory, found, gate)
            }
        })
    }

    /// Shows the guest's handler the original address and flags.
    fn repair(
        &mut self,
        step: &Step,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        found: Interruption,
        gate: Option<Gate>,
    ) -> Interrupted {
        let Interruption { mut frame, outer, .. } = found;
        let before = step.before.regs.rflags;
        let is_complete = frame.rip == step.end().0;
        // The state that was interrupted.
        let mut seen = *state;
        seen.regs = Registers { rip: frame.rip, rflags: frame.rflags, rsp: frame.rsp, ..state.regs };
        if is_complete {
            complete(&step.instruction, before, &mut seen);
            self.count_step(step, Executed::Stepped, &mut seen, memory);
        } else {
            go_back(&step.instruction, before, &mut seen);
            let vector = gate.map(|gate| gate.vector);
            let faulted = !matches!(vector, Some(NMI | MACHINE_CHECK));
            let restart = Restart { executed: step.told.counted || faulted };
            self.engine.restarts.remember(&seen, restart);
            if faulted {
                self.count_step(step, Executed::Faulted, &mut seen, memory);
            }
        }
        (frame.rip, frame.rflags, frame.rsp) = (seen.regs.rip, seen.regs.rflags, seen.regs.rsp);
        let Registers { rip, rflags, rsp, .. } = state.regs;
        state.regs = Registers { rip, rflags, rsp, ..seen.regs };
        let mut written = frame.write(&state.sys, memory);
        if gate.is_some_and(|gate| gate.keeps_if) {
            match outer {
                None => state.regs.rflags |= before & rflags::IF,
                Some(mut outer) => {
                    outer.rflags |= before & rflags::IF;
                    written &= outer.write(&state.sys, memory);
                }
            }
        }
        if written { Interrupted::Repaired } else { Interrupted::Instead(astray(step, state)) }
    }

    /// Makes the state of a vCPU that is not going to run on what the guest takes it to be. An exception that is due then is
    /// returned; it is to be delivered at the next entry.
    pub(super) fn settle_step(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
    ) -> Option<Exception> {
        let step = self.step.as_ref()?;
        let pc = Gva(state.regs.rip);
        let resume = if pc == step.end() {
            self.end_step(state, memory, 0)
        } else if pc == step.at {
            let step = self.close_step(memory)?;
            go_back(&step.instruction, step.before.regs.rflags, state);
            self.engine.restarts.remember(state, Restart { executed: step.told.counted });
            Resume::Run
        } else {
            match self.has_left_step(state).then(|| self.leave_step(state, memory)) {
                Some(Interrupted::Instead(resume)) => resume,
                None | Some(Interrupted::No | Interrupted::Repaired) => Resume::Run,
            }
        };
        match resume {
            Resume::Inject(exception) => Some(exception),
            _ => None,
        }
    }

    fn count_step(&self, step: &Step, how: Executed, state: &mut VcpuState, memory: &dyn PhysicalMemory) {
        self.executed(state, memory, &step.told, how);
    }

    /// Whether this arrival is the same hit as an earlier one.
    pub(super) fn take_restart(&self, state: &VcpuState) -> Option<Restart> {
        (state.regs.rflags & rflags::RF != 0).then(|| self.engine.restarts.take(state)).flatten()
    }
}

/// Why an instruction cannot run in its place.
enum NotOpened {
    /// It is not there any more.
    Changed,
    /// A reason for the user.
    Cannot(String),
}

const LEGACY_CODE: &str = "it was reached in 16-bit or 32-bit code";

/// What a slot needs of the state at a hit.
fn check_state(instruction: &Instruction, state: &VcpuState) -> Result<(), String> {
    if !state.sys.long_code {
        return Err(LEGACY_CODE.to_owned());
    }
    let held = match leaving(instruction) {
        None => 0,
        Some(Leaving::WithFlags) => state.regs.rflags & rflags::TF,
        Some(Leaving::KeepingFlags) => state.regs.rflags & HELD_FLAGS,
    };
    if held != 0 {
        return Err(
            "it leaves its slot for good, with interrupts or single steps off that are on now".to_owned()
        );
    }
    if instruction.code() == Opcode::Mov_cr_r64
        && instruction.op0_register() == Register::CR0
        && read_register(&state.regs, instruction.op1_register())
            .is_none_or(|value| value & control::CR0_PG == 0)
    {
        return Err("it switches paging off, and its slot with it".to_owned());
    }
    Ok(())
}

/// What follows a completed instruction: the guest's own single step, if TF was set before it, and watchpoints. MOV SS puts
/// the single step off.
pub(super) fn after_instruction(flags_before: u64, state: &VcpuState, guest_dr6: u64) -> Resume {
    let stepped = if flags_before & rflags::TF != 0 && !state.shadow.mov_ss { dr6::BS } else { 0 };
    match guest_dr6 | stepped {
        0 => Resume::Run,
        dr6 => Resume::Inject(Exception::Debug { dr6 }),
    }
}

/// Nothing explains where a vCPU is that should have completed a step.
pub(super) fn astray(step: &Step, state: &VcpuState) -> Resume {
    Resume::Fail {
        reason: format!(
            "`{}`, displaced from {:#x}, did not complete out of line (the vCPU is now at {:#x}); the guest's exception \
             frame cannot be trusted",
            text(&step.instruction),
            step.instruction.ip(),
            state.regs.rip
        ),
    }
}

/// Guest memory as displaced instructions write it: a store to patched text goes under the int3.
pub(super) struct MergedMemory<'a> {
    pub memory: &'a dyn PhysicalMemory,
    pub patches: &'a PatchTable,
    /// Of the moment at which the instruction begins.
    pub sites: &'a Sites,
}

impl PhysicalMemory for MergedMemory<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), crate::MemoryError> {
        self.memory.read(gpa, buf)
    }

    fn read_u64(&self, gpa: Gpa) -> Result<u64, crate::MemoryError> {
        self.memory.read_u64(gpa)
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), crate::MemoryError> {
        if covers(self.sites, gpa, data.len()) {
            self.patches.guest_write(self.memory, gpa, data);
            return Ok(());
        }
        self.memory.write(gpa, data)
    }

    fn compare_exchange(
        &self,
        gpa: Gpa,
        width: usize,
        current: u64,
        new: u64,
    ) -> Result<u64, crate::MemoryError> {
        if !covers(self.sites, gpa, width) {
            return self.memory.compare_exchange(gpa, width, current, new);
        }
        let mut word = [0; 8];
        self.memory.read(gpa, &mut word[..width])?;
        let found = u64::from_le_bytes(word);
        if found == current {
            self.patches.guest_write(self.memory, gpa, &new.to_le_bytes()[..width]);
        }
        Ok(found)
    }
}
