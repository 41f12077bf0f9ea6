//! Watchpoints among the probes.
//!
//! The CPU finds accesses by its debug registers, the same on every vCPU ([`crate::watch`]). What the host does for the guest
//! does not pass by them: the memory operands of an instruction that is emulated are looked at here.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess};

use super::displaced::{MergedMemory, Step, after_instruction};
use super::vcpu::Outcome;
use super::{Engine, EngineError, HitSink, VcpuEngine};
use crate::emulate::{Emulated, address_register, emulate};
use crate::handler::Flow;
use crate::paging::read_virtual;
use crate::patch::ArmError;
use crate::plan::MAX_INSTRUCTION;
use crate::probe::{Kind, Probe, ProbeId, WatchRequest};
use crate::space::AddressSpace;
use crate::stop::Resume;
use crate::watch::{REGISTERS, WatchHits, WatchSet};
use crate::{Gva, PhysicalMemory, VcpuState, rflags};

/// The watchpoints that are set, and whose they are.
#[derive(Clone, Debug, Default)]
pub(super) struct Watches {
    pub set: WatchSet,
    probes: [Option<Arc<Probe>>; REGISTERS],
}

impl Watches {
    fn add(&mut self, probe: &Arc<Probe>, guest: usize) -> Result<(), EngineError> {
        if let Kind::Access(watchpoint) = probe.kind {
            let number = self.set.add(watchpoint, guest)?;
            self.probes[number] = Some(Arc::clone(probe));
        }
        Ok(())
    }
}

impl Engine {
    /// Whether any watchpoint is set.
    pub(super) fn any_watches(&self) -> bool {
        self.watching.load(Ordering::SeqCst)
    }

    /// Makes `watches` what the vCPUs go by. The caller holds the lock.
    pub(super) fn set_watches(&self, watches: Watches) {
        let watching = !watches.set.is_empty();
        // In this order: who finds out that there are some finds them.
        self.watches.store(Arc::new(watches));
        self.watching.store(watching, Ordering::SeqCst);
    }

    /// Sets all of the watchpoints, or none. The guest may run meanwhile. Not to be called on a vCPU's thread.
    ///
    /// # Errors
    /// No debug register is left for one of them.
    pub fn watch_accesses(&self, requests: &[WatchRequest]) -> Result<Vec<Arc<Probe>>, EngineError> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let guest = self.control.guest_breakpoints();
        let probes = {
            let mut edit = self.edit();
            let mut watches = Watches::clone(&self.watches.load());
            let mut probes = Vec::with_capacity(requests.len());
            for (number, request) in (edit.armed..).zip(requests) {
                let probe = Arc::new(Probe::watching(ProbeId(number), request, self.vcpus));
                watches.add(&probe, guest)?;
                probes.push(probe);
            }
            edit.armed += u32::try_from(probes.len()).unwrap_or(u32::MAX);
            edit.watches.extend(probes.iter().cloned());
            self.set_watches(watches);
            probes
        };
        // vCPUs go by the new ones after their next exit.
        self.control.synchronise();
        Ok(probes)
    }

    /// Sets a disabled watchpoint again.
    pub(super) fn enable_watch(&self, probe: &Arc<Probe>) -> Result<(), EngineError> {
        let guest = self.control.guest_breakpoints();
        {
            let edit = self.edit();
            if !edit.watches.iter().any(|other| Arc::ptr_eq(other, probe)) {
                return Err(ArmError::Gone { gva: probe.gva() }.into());
            }
            if probe.is_enabled() {
                return Ok(());
            }
            let mut watches = Watches::clone(&self.watches.load());
            watches.add(probe, guest)?;
            probe.set_enabled(true);
            self.set_watches(watches);
        }
        self.control.synchronise();
        Ok(())
    }

    /// The data watchpoints that an instruction is about to meet, if it is emulated from `state` and raises no exception.
    #[inline]
    pub(super) fn touched(&self, instruction: &Instruction, state: &VcpuState) -> WatchHits {
        let watches = self.any_watches().then(|| self.watches.load());
        watches.map_or(WatchHits::NONE, |watches| touched(instruction, state, &watches.set))
    }

    /// Takes a watchpoint out of the debug registers; each vCPU follows at its next exit. The caller holds the lock.
    pub(super) fn drop_watch(&self, id: ProbeId) {
        let mut watches = Watches::clone(&self.watches.load());
        for number in 0..REGISTERS {
            if watches.probes[number].as_ref().is_some_and(|probe| probe.id == id) {
                watches.set.remove(number);
                watches.probes[number] = None;
            }
        }
        self.set_watches(watches);
    }
}

impl<S: HitSink> VcpuEngine<S> {
    /// Watchpoints were met: tells those who wait for them. `None` if the run is to finish without it.
    pub(super) fn tell_watches(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        hits: WatchHits,
    ) -> Option<Outcome> {
        let watches = self.engine.watches.load_full();
        let rip = state.regs.rip;
        let mut outcome = Outcome::default();
        for probe in hits.numbers().filter_map(|number| watches.probes[number].as_ref()) {
            if probe.is_enabled() {
                outcome = outcome.and(self.take(probe, state, memory, None)?);
            }
        }
        state.regs.rip = rip;
        Some(outcome)
    }

    /// A stop of the CPU's at watchpoints, with everything that it says of the guest's own in `guest_dr6`.
    pub(super) fn watch_hit(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        hits: WatchHits,
        resume: Resume,
    ) -> Resume {
        if let Some(original) = self.step.as_ref().map(Step::original_rip) {
            // In the middle of a repeated string instruction that runs out of line.
            let rip = std::mem::replace(&mut state.regs.rip, original);
            let outcome = self.tell_watches(state, memory, hits);
            state.regs.rip = rip;
            // A pause would show the guest in its slot: it goes on.
            return if outcome.is_none_or(|outcome| outcome.finish) { Resume::Finish } else { resume };
        }
        let Some(outcome) = self.tell_watches(state, memory, hits) else { return Resume::Finish };
        let resume = if resume == Resume::Run && outcome.pause { Resume::Pause } else { resume };
        let (pc, next) = (Gva(state.regs.rip), state.regs.rip);
        if let Some(to) = self.diversion(outcome.flow, state, memory, pc, || next) {
            state.regs.rip = to.0;
        } else if outcome.flow == Flow::Run
            && resume == Resume::Run
            && !self.engine.watches.load().set.executed(hits).is_empty()
        {
            // The instruction has not run yet. Where KVM emulates the guest's code it would never get past.
            let resume = self.pass(state, memory);
            return if outcome.finish { Resume::Finish } else { resume };
        }
        if outcome.finish { Resume::Finish } else { resume }
    }

    /// Runs the instruction at RIP for the guest, if that can be done here.
    fn pass(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Resume {
        let engine = Arc::clone(&self.engine);
        let pc = Gva(state.regs.rip);
        let gpa = crate::paging::physical(&state.sys, memory, pc);
        if let Some(site) = gpa.and_then(|gpa| engine.patches.find(gpa)).filter(|site| site.is_armed()) {
            return self.hit(state, memory, site.place.gpa, &site, &site.code());
        }
        let mut bytes = [0; MAX_INSTRUCTION];
        let len = read_virtual(&state.sys, memory, pc, &mut bytes);
        let instruction = Decoder::with_ip(64, &bytes[..len], pc.0, DecoderOptions::NONE).decode();
        let merged = MergedMemory { memory, patches: &engine.patches, sites: self.lookup.sites() };
        let before = state.regs.rflags;
        let touched = engine.touched(&instruction, state);
        match emulate(&instruction, state, &AddressSpace { memory: &merged, pkru: 0 }) {
            Emulated::Done => {
                let resume = after_instruction(before, state, 0);
                self.watch_emulated(state, memory, touched, resume)
            }
            Emulated::Halt => Resume::Halt,
            Emulated::Fault(exception) => Resume::Inject(exception),
            Emulated::Defer(_) => Resume::Run,
        }
    }

    /// An emulated instruction has met watchpoints.
    #[inline]
    pub(super) fn watch_emulated(
        &mut self,
        state: &mut VcpuState,
        memory: &dyn PhysicalMemory,
        hits: WatchHits,
        resume: Resume,
    ) -> Resume {
        if hits.is_empty() {
            return resume;
        }
        self.tell_watches(state, memory, hits).map_or(Resume::Finish, |outcome| outcome.resume(resume))
    }
}

fn touched(instruction: &Instruction, state: &VcpuState, set: &WatchSet) -> WatchHits {
    let count =
        if instruction.has_rep_prefix() || instruction.has_repne_prefix() { state.regs.rcx } else { 1 };
    let mut factory = InstructionInfoFactory::new();
    let mut hits = WatchHits::NONE;
    for used in factory.info(instruction).used_memory() {
        let (read, write) = match used.access() {
            OpAccess::Read | OpAccess::CondRead => (true, false),
            OpAccess::Write | OpAccess::CondWrite => (false, true),
            OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
            OpAccess::None | OpAccess::NoMemAccess => continue,
        };
        let address = used.virtual_address(0, |register, _, _| address_register(state, register));
        let Some(address) = address else { continue };
        let string = instruction.is_string_instruction();
        // The decoder gives a repeated string instruction's operand no size.
        let size = if string { instruction.memory_size() } else { used.memory_size() }.size() as u64;
        let bytes = if string { size.saturating_mul(count) } else { size };
        // Such an instruction may go down from its first element.
        let down = string && state.regs.rflags & rflags::DF != 0;
        let first = if down { address.wrapping_sub(bytes.saturating_sub(size)) } else { address };
        for (does, write) in [(read, false), (write, true)] {
            if does {
                hits = hits.and(set.touched(Gva(first), bytes, write));
            }
        }
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::MockVcpu;
    use crate::watch::{Access, Watchpoint};
    use crate::{Gpa, rflags};

    #[test]
    fn what_an_instruction_is_about_to_touch_follows_its_operands_and_direction() {
        let set = WatchSet::from(Watchpoint::new(Gva(0x3008), 1, Access::Write).unwrap());
        let touches = |bytes: &[u8], rdi: u64, rcx: u64, flags: u64| {
            let state =
                MockVcpu::new(Gpa(0)).flags(flags).regs(|regs| (regs.rdi, regs.rcx) = (rdi, rcx)).build();
            let instruction = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
            !touched(&instruction, &state, &set).is_empty()
        };
        let rep_stosb = &[0xf3, 0xaa];
        assert!(touches(rep_stosb, 0x3000, 9, 0) && !touches(rep_stosb, 0x3000, 8, 0));
        assert!(touches(rep_stosb, 0x3010, 9, rflags::DF) && !touches(rep_stosb, 0x3010, 8, rflags::DF));
        assert!(!touches(rep_stosb, 0x3008, 0, 0), "nothing is stored");
        // mov %eax,(%rdi); mov (%rdi),%eax; lea (%rdi),%rax
        assert!(touches(&[0x89, 0x07], 0x3005, 0, 0) && !touches(&[0x89, 0x07], 0x3004, 0, 0));
        assert!(!touches(&[0x8b, 0x07], 0x3008, 0, 0), "a load");
        assert!(!touches(&[0x48, 0x8d, 0x07], 0x3008, 0, 0));
    }
}
