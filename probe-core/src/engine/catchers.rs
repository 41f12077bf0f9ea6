//! Catchers: int3s of the engine's own on the guest's exception handlers.
//!
//! Whatever interrupts a displaced instruction enters the guest through its interrupt table: a fault of the instruction, an
//! NMI, a machine check, a debug exception. A catcher stops the vCPU there, before the guest's handler reads the frame.
//! Exceptions are rare, so these int3s stay; that for INT n stands only while such an instruction is in a slot. Page faults are
//! not rare: their int3 stays from step to step, and goes with the first fault that no step has raised. That for #BP is never
//! needed: an int3 in a slot does not get to the guest.
//!
//! Each vCPU holds the handlers of its own table and looks whether the table has changed before it enters a slot.

use std::sync::Arc;

use super::Engine;
use crate::patch::{Place, Site};
use crate::{Gpa, Gva, PhysicalMemory, SystemRegisters, paging};

/// #PF (Intel SDM vol. 3A, table 6-1, as all vectors here).
pub(super) const PAGE_FAULT: u8 = 14;
/// The nonmaskable interrupt.
pub(super) const NMI: u8 = 2;
/// #MC.
pub(super) const MACHINE_CHECK: u8 = 18;
/// #DB.
pub(super) const DEBUG: u8 = 1;
const BREAKPOINT: u8 = 3;
const DOUBLE_FAULT: u8 = 8;

/// Vectors of exceptions and the NMI.
const VECTORS: usize = 32;
const GATE_BYTES: usize = 16;

/// An interrupt or trap gate (Intel SDM vol. 3A, 6.14.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gate {
    /// Its vector.
    pub vector: u8,
    /// Where the CPU goes.
    pub handler: Gva,
    /// A trap gate leaves IF as it is.
    pub keeps_if: bool,
}

impl Gate {
    fn new(vector: u8, bytes: &[u8; GATE_BYTES]) -> Option<Self> {
        const PRESENT: u8 = 0x80;
        const INTERRUPT: u8 = 0xe;
        const TRAP: u8 = 0xf;
        let [a, b, _, _, _, kind, c, d, e, f, g, h, ..] = *bytes;
        let keeps_if = match kind & 0x1f {
            INTERRUPT => false,
            TRAP => true,
            _ => return None,
        };
        let handler = Gva(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        (kind & PRESENT != 0).then_some(Self { vector, handler, keeps_if })
    }

    /// Where its handler lies, if the CPU can fetch it. Linux leaves some gates as they were in early boot, and frees the memory that
    /// they lead to.
    fn fetched(&self, sys: &SystemRegisters, memory: &dyn PhysicalMemory) -> Option<Gpa> {
        let sys = SystemRegisters { cpl: 0, ..*sys };
        let fetched =
            paging::translate(&sys, 0, 0, memory, self.handler, paging::Access::Execute, paging::Marks::Keep);
        fetched.ok().map(|translation| translation.gpa)
    }

    /// Reads the gate of any vector from the guest's table.
    pub(super) fn read(sys: &SystemRegisters, memory: &dyn PhysicalMemory, vector: u8) -> Option<Self> {
        let offset = usize::from(vector) * GATE_BYTES;
        let mut bytes = [0; GATE_BYTES];
        let present = offset + GATE_BYTES <= usize::from(sys.idt_limit) + 1
            && paging::read_virtual(sys, memory, Gva(sys.idt_base).offset(offset as u64), &mut bytes)
                == GATE_BYTES;
        if present { Self::new(vector, &bytes) } else { None }
    }
}

/// One vCPU's view of its interrupt table, and the int3s that it holds.
#[derive(Debug)]
pub(super) struct Catchers {
    base: u64,
    table: [u8; VECTORS * GATE_BYTES],
    gates: [Option<Gate>; VECTORS],
    held: [Option<Arc<Site>>; VECTORS],
    /// The int3 that was last held on the handler of page faults, if the table has not changed since.
    page_fault: Option<Arc<Site>>,
    /// The pages of all int3s that were ever held for this table.
    watched: Vec<Gpa>,
}

impl Default for Catchers {
    fn default() -> Self {
        Self {
            base: 0,
            table: [0; VECTORS * GATE_BYTES],
            gates: [None; VECTORS],
            held: [const { None }; VECTORS],
            page_fault: None,
            watched: Vec::new(),
        }
    }
}

impl Catchers {
    /// Makes the held int3s those of the table that the vCPU uses now. A handler that cannot be held is left out until the
    /// table changes.
    pub(super) fn sync(&mut self, engine: &Engine, sys: &SystemRegisters, memory: &dyn PhysicalMemory) {
        let mut table = [0; VECTORS * GATE_BYTES];
        let present = (usize::from(sys.idt_limit) + 1).min(table.len());
        // What cannot be read stays zero, which is no gate.
        paging::read_virtual(sys, memory, Gva(sys.idt_base), &mut table[..present]);
        if self.base == sys.idt_base && self.table == table {
            for index in 0..VECTORS {
                // Disarming takes these int3s out too.
                if self.held[index].as_ref().is_some_and(|site| !site.is_armed()) {
                    self.held[index] =
                        self.gates[index].and_then(|gate| self.hold(gate, engine, sys, memory));
                }
            }
            return;
        }
        let watched = std::mem::take(&mut self.watched);
        (self.base, self.table) = (sys.idt_base, table);
        let (gates, _) = table.as_chunks();
        for ((vector, bytes), gate) in (0..).zip(gates).zip(&mut self.gates) {
            *gate = Gate::new(vector, bytes);
        }
        let held = self.gates.map(|gate| {
            let stays = gate.filter(|gate| !matches!(gate.vector, BREAKPOINT | PAGE_FAULT))?;
            self.hold(stays, engine, sys, memory)
        });
        // In this order: a handler that both tables have stays armed throughout.
        let old = (std::mem::replace(&mut self.held, held), self.page_fault.take());
        end_holds(engine, memory, old, &watched);
    }

    /// Holds an int3 on a handler. None where that is not possible.
    pub(super) fn hold(
        &mut self,
        gate: Gate,
        engine: &Engine,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
    ) -> Option<Arc<Site>> {
        let gpa = gate.fetched(sys, memory)?;
        let place = Place { gva: gate.handler, gpa, function: None };
        for page in place.pages() {
            if !self.watched.contains(&page) {
                engine.control.watch(&[page]).ok()?;
                self.watched.push(page);
            }
        }
        engine.patches.hold(memory, place)
    }

    /// Holds the int3 on the handler of page faults for one step, which ends with [`crate::patch::PatchTable::rest`].
    pub(super) fn hold_page_fault(
        &mut self,
        engine: &Engine,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
    ) -> Option<Arc<Site>> {
        if self.page_fault.as_ref().is_none_or(|site| !engine.patches.hold_again(site)) {
            self.page_fault = self.gate(PAGE_FAULT).and_then(|gate| self.hold(gate, engine, sys, memory));
        }
        self.page_fault.clone()
    }

    /// The gate of one of the first 32 vectors, as of the last [`Catchers::sync`].
    pub(super) fn gate(&self, vector: u8) -> Option<Gate> {
        self.gates.get(usize::from(vector)).copied().flatten()
    }

    /// The gate that leads to a handler.
    pub(super) fn gate_to(&self, handler: Gva) -> Option<Gate> {
        self.gates.iter().flatten().find(|gate| gate.handler == handler).copied()
    }

    /// The gate of an exception or NMI that leads to where no int3 is held, if there is one. `page_fault` is the int3 on the handler
    /// of page faults, which also shows up where the CPU cannot fetch another handler.
    pub(super) fn unheld(
        &self,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        page_fault: Option<&Arc<Site>>,
    ) -> Option<Gate> {
        let is_held = |gate: &Gate| match gate.vector {
            BREAKPOINT => true,
            PAGE_FAULT => page_fault.is_some(),
            vector => {
                let held = self.held.get(usize::from(vector)).is_some_and(Option::is_some);
                held || vector != DOUBLE_FAULT && gate.fetched(sys, memory).is_none()
            }
        };
        self.gates.iter().flatten().find(|gate| !is_held(gate)).copied()
    }

    /// Takes the int3s out again.
    pub(super) fn release(&mut self, engine: &Engine, memory: &dyn PhysicalMemory) {
        let Self { held, page_fault, watched, .. } = std::mem::take(self);
        end_holds(engine, memory, (held, page_fault), &watched);
    }
}

/// Takes out int3s that were held, and that on the handler of page faults.
fn end_holds(
    engine: &Engine,
    memory: &dyn PhysicalMemory,
    (held, page_fault): ([Option<Arc<Site>>; VECTORS], Option<Arc<Site>>),
    watched: &[Gpa],
) {
    for site in held.iter().flatten() {
        engine.patches.release(memory, site);
    }
    if let Some(site) = page_fault {
        engine.patches.dismiss(memory, &site);
    }
    engine.unwatch(watched);
}
