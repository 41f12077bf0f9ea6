//! A machine's guest as it stands: registers, page tables, memory.

use std::io;

use guest::Guest;
use guest::spec::Location;
use probe_core::paging::{self, Walk};
use probe_core::{Gpa, Gva, PAGE_SIZE, Registers, VcpuId, VcpuState};

use super::dump::{DumpPart, Dumped, dump};
use super::live::{Phase, State, Vm, VmError, lock};
use crate::exit::Failure;
use crate::images::chain;

/// Bytes that are read or written at once at most.
pub const MAX_BYTES: usize = 1 << 20;

/// Where something is in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// In a vCPU's address space.
    Linear(Gva),
    Physical(Gpa),
    /// At a symbol, or an address in the kernel's notation.
    Symbol(String),
}

/// An address that has been looked up.
enum Found {
    Linear(Gva),
    Physical(Gpa),
}

fn of(states: &[VcpuState], vcpu: u32) -> Result<&VcpuState, VmError> {
    let state = usize::try_from(vcpu).ok().and_then(|index| states.get(index));
    state.ok_or_else(|| VmError::NoVcpu(vcpu, u32::try_from(states.len()).unwrap_or(u32::MAX)))
}

impl Vm {
    /// What is known of the guest's image.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Looks at the machine while nothing in it moves. The states are the vCPUs', by number; none if they are lost.
    fn at_rest<T>(&self, look: impl FnOnce(&[VcpuState]) -> Result<T, VmError>) -> Result<T, VmError> {
        match &*lock(&self.phase) {
            Phase::Created { machine, .. } => look(&machine.states()),
            Phase::Running => look(&self.states_of(&self.control.pause())?),
            Phase::Paused(paused) => look(&self.states_of(paused)?),
            Phase::Ended { states, .. } => look(states),
        }
    }

    /// The same for what needs vCPUs.
    fn with_states<T>(&self, look: impl FnOnce(&[VcpuState]) -> Result<T, VmError>) -> Result<T, VmError> {
        self.at_rest(|states| if states.is_empty() { Err(VmError::StatesLost) } else { look(states) })
    }

    fn states_of(&self, paused: &vmm::Paused) -> Result<Vec<VcpuState>, VmError> {
        // One that is no longer there has ended its run, and the others will.
        (0..self.vcpus).map(|vcpu| paused.state(VcpuId(vcpu)).ok_or(VmError::Ending)).collect()
    }

    /// The numbers and states of one vCPU, or of all.
    ///
    /// # Errors
    /// There is no such vCPU, or the states are lost.
    pub fn states(&self, vcpu: Option<u32>) -> Result<Vec<(u32, VcpuState)>, VmError> {
        self.with_states(|states| match vcpu {
            Some(vcpu) => Ok(vec![(vcpu, *of(states, vcpu)?)]),
            None => Ok((0..).zip(states.iter().copied()).collect()),
        })
    }

    /// Writes its registers and memory as a core file. It stands still meanwhile.
    ///
    /// # Errors
    /// The states are lost, or what `write` says.
    pub fn dump(&self, write: &mut dyn FnMut(DumpPart<'_>) -> io::Result<()>) -> Result<Dumped, VmError> {
        self.with_states(|states| {
            let dumped = dump(&self.guest, &self.engine, &self.memory, states, write);
            dumped.map_err(|error| Failure::Host(format!("The core file cannot be written: {error}")).into())
        })
    }

    /// Has a vCPU go on with other registers.
    ///
    /// # Errors
    /// The machine is neither new nor paused, has no such vCPU, or the CPU would not take these registers.
    pub fn set_registers(&self, vcpu: u32, regs: Registers) -> Result<VcpuState, VmError> {
        let mut phase = lock(&self.phase);
        let id = VcpuId(vcpu);
        match &mut *phase {
            Phase::Created { machine, .. } => {
                let state = of(&machine.states(), vcpu)?.with_registers(regs)?;
                if machine.set_state(id, &state) { Ok(state) } else { Err(VmError::Ending) }
            }
            Phase::Paused(paused) => {
                let state = of(&self.states_of(paused)?, vcpu)?.with_registers(regs)?;
                if paused.set_state(id, &state) { Ok(state) } else { Err(VmError::Ending) }
            }
            other => Err(VmError::State("Registers are set on a new or paused machine", other.state())),
        }
    }

    fn find(&self, address: &Address) -> Result<Found, VmError> {
        Ok(match address {
            Address::Linear(gva) => Found::Linear(*gva),
            Address::Physical(gpa) => Found::Physical(*gpa),
            Address::Symbol(text) => {
                let wrong =
                    |error: &dyn std::error::Error| Failure::Usage(format!("{text}: {}", chain(error)));
                let location: Location = text.parse().map_err(|error| wrong(&error))?;
                Found::Linear(self.guest.address(&location).map_err(|error| wrong(&error))?)
            }
        })
    }

    /// Walks a vCPU's page tables. Returns the linear address too.
    ///
    /// # Errors
    /// There is no such vCPU or symbol, or the walk cannot be made.
    pub fn walk(&self, vcpu: u32, address: &Address) -> Result<(Gva, Walk), VmError> {
        let Found::Linear(gva) = self.find(address)? else {
            return Err(
                Failure::Usage("A physical address is not translated; give a linear one".into()).into()
            );
        };
        self.with_states(|states| Ok((gva, paging::walk_entries(&of(states, vcpu)?.sys, &self.memory, gva)?)))
    }

    /// Reads memory as the guest has it. Returns fewer bytes than asked for where memory ends.
    ///
    /// # Errors
    /// There is no such vCPU or symbol, or no memory at the first byte.
    pub fn read(&self, vcpu: u32, address: &Address, len: usize) -> Result<Vec<u8>, VmError> {
        let mut bytes = vec![0; len];
        let (engine, memory) = (&self.engine, &self.memory);
        let read = match self.find(address)? {
            Found::Linear(gva) => self.with_states(|states| {
                match engine.read_virtual(&of(states, vcpu)?.sys, memory, gva, &mut bytes) {
                    0 => Err(VmError::NotMapped(gva, VcpuId(vcpu))),
                    read => Ok(read),
                }
            }),
            // Page by page, since RAM may end between.
            Found::Physical(gpa) => self.at_rest(|_| {
                let mut read = 0;
                while read < len {
                    let at = gpa.offset(read as u64);
                    let page = usize::try_from(PAGE_SIZE - at.0 % PAGE_SIZE).unwrap_or(1);
                    let chunk = read..len.min(read + page);
                    if engine.read_physical(memory, at, &mut bytes[chunk.clone()]).is_err() {
                        break;
                    }
                    read = chunk.end;
                }
                if read == 0 { Err(VmError::NotRam(gpa)) } else { Ok(read) }
            }),
        };
        bytes.truncate(read?);
        Ok(bytes)
    }

    /// Writes memory as the guest has it, all of the bytes or none.
    ///
    /// # Errors
    /// There is no such vCPU or symbol, not all of the bytes are memory, or the run has ended.
    pub fn write(&self, vcpu: u32, address: &Address, data: &[u8]) -> Result<(), VmError> {
        let found = self.find(address)?;
        let state = self.state();
        if matches!(state, State::Ended | State::Failed) {
            return Err(VmError::State("The run is over", state));
        }
        let (engine, memory) = (&self.engine, &self.memory);
        match found {
            Found::Linear(gva) => self.with_states(|states| {
                let sys = &of(states, vcpu)?.sys;
                let there = engine.read_virtual(sys, memory, gva, &mut vec![0; data.len()]);
                if there < data.len() {
                    return Err(VmError::NotMapped(gva.offset(there as u64), VcpuId(vcpu)));
                }
                engine.write_virtual(sys, memory, gva, data);
                Ok(())
            }),
            Found::Physical(gpa) => {
                self.at_rest(|_| engine.write_physical(memory, gpa, data).map_err(|_| VmError::NotRam(gpa)))
            }
        }
    }
}
