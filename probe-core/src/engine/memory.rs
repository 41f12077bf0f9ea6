//! Guest memory as the guest has it: our int3s are not in it, what is written under one stays under it, and the slots are no part of it.
//!
//! For handlers, and for whoever looks at a machine that is at rest. Rights and marks of the page tables play no part.

use super::Engine;
use super::displaced::MergedMemory;
use crate::paging::{self, bytes_to_page_end};
use crate::{Gpa, Gva, MemoryError, PhysicalMemory, SystemRegisters};

impl Engine {
    /// Reads guest-physical memory.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] when any byte is not RAM; `buf` is then unspecified.
    pub fn read_physical(
        &self,
        memory: &dyn PhysicalMemory,
        gpa: Gpa,
        buf: &mut [u8],
    ) -> Result<(), MemoryError> {
        self.outside_slots(gpa, buf.len())?;
        memory.read(gpa, buf)?;
        self.patches.uncover(gpa, buf);
        Ok(())
    }

    /// Puts what the guest has into `buf`, which was read from `gpa` on while the machine was paused: its own text, and page tables that
    /// lead to no slot. A guest that goes on with such memory elsewhere finds nothing of this engine.
    pub fn uncover(&self, gpa: Gpa, buf: &mut [u8]) {
        self.patches.uncover(gpa, buf);
        self.slots.uncover(gpa, buf);
    }

    /// Writes guest-physical memory.
    ///
    /// # Errors
    /// [`MemoryError::NotRam`] when any byte is not RAM; nothing is then written.
    pub fn write_physical(
        &self,
        memory: &dyn PhysicalMemory,
        gpa: Gpa,
        data: &[u8],
    ) -> Result<(), MemoryError> {
        self.outside_slots(gpa, data.len())?;
        MergedMemory { memory, patches: &self.patches, sites: &self.patches.sites() }.write(gpa, data)
    }

    fn outside_slots(&self, gpa: Gpa, len: usize) -> Result<(), MemoryError> {
        let slots = self.slots.region();
        let overlap = gpa.0 < slots.base.0 + slots.size && gpa.0.saturating_add(len as u64) > slots.base.0;
        if overlap { Err(MemoryError::NotRam(gpa)) } else { Ok(()) }
    }

    /// Reads guest-virtual memory, each page translated on its own. Returns how many bytes from the start of `buf` are valid; it ends
    /// early at a page that is not mapped or not RAM.
    pub fn read_virtual(
        &self,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        gva: Gva,
        buf: &mut [u8],
    ) -> usize {
        by_page(sys, memory, gva, buf.len(), |gpa, done, part| {
            let chunk = buf.get_mut(done..done + part).unwrap_or_default();
            self.read_physical(memory, gpa, chunk)
        })
    }

    /// Writes guest-virtual memory. Returns how many bytes from the start of `data` were written, as for [`Engine::read_virtual`].
    pub fn write_virtual(
        &self,
        sys: &SystemRegisters,
        memory: &dyn PhysicalMemory,
        gva: Gva,
        data: &[u8],
    ) -> usize {
        by_page(sys, memory, gva, data.len(), |gpa, done, part| {
            let chunk = data.get(done..done + part).unwrap_or_default();
            self.write_physical(memory, gpa, chunk)
        })
    }
}

/// Carries an access out page by page, until it is complete or a part fails. `access` gets the address, how many bytes are before
/// this part, and how many are in it. Returns how many bytes it has come to.
fn by_page(
    sys: &SystemRegisters,
    memory: &dyn PhysicalMemory,
    gva: Gva,
    len: usize,
    mut access: impl FnMut(Gpa, usize, usize) -> Result<(), MemoryError>,
) -> usize {
    let mut done = 0;
    while done < len {
        let at = gva.offset(done as u64);
        let part = (len - done).min(bytes_to_page_end(at));
        let accessed = paging::physical(sys, memory, at).is_some_and(|gpa| access(gpa, done, part).is_ok());
        if !accessed {
            break;
        }
        done += part;
    }
    done
}
