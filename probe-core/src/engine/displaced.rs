//! The displaced instruction of a hit: emulated, or run out of line and put right.

use std::sync::Arc;

use iced_x86::Instruction;

use super::{HitSink, VcpuEngine};
use crate::emulate::{DeferReason, Emulated, emulate};
use crate::fixup::{StepEnd, after_step};
use crate::patch::{Code, PatchTable, Site};
use crate::plan::{Plan, check_step, text};
use crate::precheck::{StepHazard, precheck};
use crate::probe::Executed;
use crate::relocate::relocate;
use crate::space::AddressSpace;
use crate::stop::{Resume, dr6};
use crate::{Exception, Gpa, Gva, PhysicalMemory, VcpuState, rflags};

/// A displaced instruction that runs out of line.
#[derive(Debug)]
pub(super) struct Step {
    gpa: Gpa,
    instruction: Instruction,
    pub(super) slot: Gva,
    pub(super) len: u64,
    before: VcpuState,
}

/// Why a displaced instruction does not run out of line.
enum StepRefusal {
    /// It would raise this exception.
    Fault(Exception),
    /// It cannot.
    Impossible(String),
}

/// A fault that a displaced instruction raised: when the guest comes back to it with RFLAGS.RF set, as every fault frame
/// has it (Intel SDM vol. 3B, 19.3.1.1), the hit has been counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Restart {
    pc: Gva,
    rsp: u64,
    cr3: u64,
}

impl<S: HitSink> VcpuEngine<S> {
    /// Runs the displaced instruction of a site that was reached; `finish` ends the run when it is done.
    pub(super) fn run_displaced(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        gpa: Gpa,
        site: &Site,
        code: &Code,
        finish: bool,
    ) -> Resume {
        if code.is_guest_breakpoint() {
            return Resume::Inject(Exception::Breakpoint);
        }
        let pc = Gva(state.regs.rip);
        // The same page may be mapped at another address than the symbols say, as in early boot.
        let instruction = if pc == site.place.gva { code.instruction } else { code.decode_at(pc) };
        let engine = Arc::clone(&self.engine);
        let merged = MergedMemory { memory, patches: &engine.patches };
        let space = AddressSpace { memory: &merged, pkru: 0 };
        let before = state.regs.rflags;
        let outcome = match code.plan {
            Plan::Emulate => emulate(&instruction, state, &space),
            _ => Emulated::Defer(DeferReason::NotEmulated),
        };
        let (how, resume) = match outcome {
            Emulated::Done => (Executed::Emulated, self.after_instruction(before, 0)),
            Emulated::Halt => (Executed::Left, Resume::Halt),
            Emulated::Fault(exception) => (Executed::Faulted, self.fault(state, exception)),
            // With the int3 taken out the guest could go on from here.
            Emulated::Defer(_) if finish => return Resume::Finish,
            Emulated::Defer(_) => match self.begin_step(state, &space, gpa, instruction, code) {
                Ok(()) => return Resume::Step,
                Err(StepRefusal::Fault(exception)) => (Executed::Faulted, self.fault(state, exception)),
                Err(StepRefusal::Impossible(reason)) => {
                    self.engine.withdraw(memory, site, reason);
                    return Resume::Run;
                }
            },
        };
        self.executed(state, memory, gpa, how);
        if finish { Resume::Finish } else { resume }
    }

    fn begin_step(
        &mut self,
        state: &mut VcpuState,
        space: &AddressSpace<'_>,
        gpa: Gpa,
        instruction: Instruction,
        code: &Code,
    ) -> Result<(), StepRefusal> {
        let impossible = |reason: &dyn std::fmt::Display| StepRefusal::Impossible(reason.to_string());
        if state.sys.cpl != 0 {
            return Err(impossible(
                &"it would have to run out of line in user mode, where there is no slot yet",
            ));
        }
        check_step(&instruction).map_err(|refusal| impossible(&refusal))?;
        match precheck(&instruction, state, space) {
            Ok(()) => {}
            Err(StepHazard::Fault(exception)) => return Err(StepRefusal::Fault(exception)),
            Err(hazard) => return Err(impossible(&hazard)),
        }
        let near = Gva(instruction.ip());
        let slots = &self.engine.slots;
        let slot =
            slots.map(&state.sys, space.memory, self.vcpu, near).map_err(|error| impossible(&error))?;
        let copy = relocate(code.bytes(), near, slot).map_err(|error| impossible(&error))?;
        space.memory.write(slots.gpa(self.vcpu), copy.bytes()).map_err(|error| impossible(&error))?;
        self.step = Some(Step { gpa, instruction, slot, len: copy.instruction_len() as u64, before: *state });
        state.regs.rip = slot.0;
        Ok(())
    }

    pub(super) fn end_step(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        guest_dr6: u64,
    ) -> Resume {
        let Some(step) = self.step.take() else { return Resume::Run };
        let engine = Arc::clone(&self.engine);
        let merged = MergedMemory { memory, patches: &engine.patches };
        let space = AddressSpace { memory: &merged, pkru: 0 };
        match after_step(&step.instruction, &step.before, state, step.slot, &space) {
            StepEnd::Again => self.step_again(state, memory, &space, step),
            StepEnd::Astray { .. } => astray(&step, state),
            StepEnd::Done => {
                self.executed(state, memory, step.gpa, Executed::Stepped);
                self.after_instruction(step.before.regs.rflags, guest_dr6)
            }
        }
    }

    /// Goes on with a repeated string instruction, whose next iteration may fault.
    fn step_again(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        space: &AddressSpace<'_>,
        step: Step,
    ) -> Resume {
        match precheck(&step.instruction, state, space) {
            Ok(()) => {
                state.regs.rip = step.slot.0;
                self.step = Some(step);
                Resume::Step
            }
            Err(StepHazard::Fault(exception)) => {
                self.executed(state, memory, step.gpa, Executed::Faulted);
                self.fault(state, exception)
            }
            Err(hazard) => Resume::Fail {
                reason: format!(
                    "`{}` at {near:#x} cannot go on: {hazard}",
                    text(&step.instruction),
                    near = step.instruction.ip()
                ),
            },
        }
    }

    /// What follows a completed instruction: the guest's own single step, if TF was set before it, and watchpoints.
    pub(super) fn after_instruction(&mut self, flags_before: u64, guest_dr6: u64) -> Resume {
        self.restart = None;
        let stepped = if flags_before & rflags::TF != 0 { dr6::BS } else { 0 };
        match guest_dr6 | stepped {
            0 => Resume::Run,
            dr6 => Resume::Inject(Exception::Debug { dr6 }),
        }
    }

    /// Gives the guest a fault of the displaced instruction, at the original RIP.
    fn fault(&mut self, state: &VcpuState, exception: Exception) -> Resume {
        self.restart = Some(Restart { pc: Gva(state.regs.rip), rsp: state.regs.rsp, cr3: state.sys.cr3 });
        Resume::Inject(exception)
    }

    pub(super) fn is_restart(&self, state: &VcpuState) -> bool {
        let here = Restart { pc: Gva(state.regs.rip), rsp: state.regs.rsp, cr3: state.sys.cr3 };
        state.regs.rflags & rflags::RF != 0 && self.restart == Some(here)
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
}

impl PhysicalMemory for MergedMemory<'_> {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), crate::MemoryError> {
        self.memory.read(gpa, buf)
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), crate::MemoryError> {
        if self.patches.covers(gpa, data.len()) {
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
        if !self.patches.covers(gpa, width) {
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
