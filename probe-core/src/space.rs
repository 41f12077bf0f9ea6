//! Guest-virtual memory as an instruction sees it: reads and writes through the guest's page tables.

use std::fmt;

use crate::paging::{Access, Marks, TranslateError, bytes_to_page_end, translate};
use crate::{Exception, Gpa, Gva, MemoryError, PhysicalMemory, VcpuState, control, rflags};

/// The largest memory operand that is handled, in bytes: one AVX-512 register.
pub const MAX_OPERAND: usize = 64;

/// Guest memory together with what else decides on an access and is not in [`VcpuState`].
#[derive(Clone, Copy)]
pub struct AddressSpace<'m> {
    /// Guest RAM.
    pub memory: &'m dyn PhysicalMemory,
    /// The rights that PKRU gives to protection keys; 0 while the guest does not use them.
    pub pkru: u32,
}

impl fmt::Debug for AddressSpace<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddressSpace").field("pkru", &self.pkru).finish_non_exhaustive()
    }
}

/// Why an operand could not be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AccessError {
    /// The CPU would raise this exception.
    #[error("The access raises {0:x?}")]
    Fault(Exception),
    /// Some byte of the operand, or a page table on the way to it, is not RAM.
    #[error("The operand at {0} is not in RAM")]
    NotRam(Gva),
    /// The software page walk does not cover the paging mode or the tag of the address.
    #[error("The operand at {0} cannot be translated by the software page walk")]
    Unsupported(Gva),
}

/// An operand that is to be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operand {
    /// First byte.
    pub gva: Gva,
    /// Number of bytes, 1..=[`MAX_OPERAND`].
    pub len: usize,
    /// The operand is relative to the stack segment, so a non-canonical address is #SS and not #GP.
    pub stack: bool,
}

/// The one or two pieces of guest-physical memory that an operand occupies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    gva: Gva,
    len: usize,
    first: Gpa,
    first_len: usize,
    /// Where the rest lies, on the next page.
    second: Option<Gpa>,
}

impl Span {
    /// The linear address of the first byte.
    pub(crate) const fn gva(&self) -> Gva {
        self.gva
    }

    /// The guest-physical address, if all bytes follow each other there.
    pub(crate) fn contiguous(&self) -> Option<Gpa> {
        let joined = self.second.is_none_or(|second| second == self.first.offset(self.first_len as u64));
        joined.then_some(self.first)
    }
}

impl AddressSpace<'_> {
    /// Checks the access on every page that the operand touches and finds the bytes. Nothing is marked in the page
    /// tables unless all of it is allowed.
    pub(crate) fn resolve(
        &self,
        state: &VcpuState,
        operand: Operand,
        access: Access,
        marks: Marks,
    ) -> Result<Span, AccessError> {
        let Operand { gva, len, .. } = operand;
        let first_len = len.min(bytes_to_page_end(gva));
        if first_len == len {
            let first = self.translate(state, operand, gva, access, marks)?;
            check_alignment(state, operand)?;
            return Ok(Span { gva, len, first, first_len, second: None });
        }
        let next = gva.offset(first_len as u64);
        self.translate(state, operand, gva, access, Marks::Keep)?;
        let mut second = self.translate(state, operand, next, access, Marks::Keep)?;
        check_alignment(state, operand)?;
        let first = self.translate(state, operand, gva, access, marks)?;
        if marks == Marks::Set {
            second = self.translate(state, operand, next, access, marks)?;
        }
        Ok(Span { gva, len, first, first_len, second: Some(second) })
    }

    fn translate(
        &self,
        state: &VcpuState,
        operand: Operand,
        gva: Gva,
        access: Access,
        marks: Marks,
    ) -> Result<Gpa, AccessError> {
        let found = translate(&state.sys, state.regs.rflags, self.pkru, self.memory, gva, access, marks);
        match found {
            Ok(translation) => Ok(translation.gpa),
            Err(TranslateError::Fault(exception)) => Err(AccessError::Fault(exception)),
            Err(TranslateError::NonCanonical(_)) if operand.stack => {
                Err(AccessError::Fault(Exception::StackFault { code: 0 }))
            }
            Err(TranslateError::NonCanonical(_)) => {
                Err(AccessError::Fault(Exception::GeneralProtection { code: 0 }))
            }
            Err(TranslateError::NotRam(_)) => Err(AccessError::NotRam(operand.gva)),
            Err(TranslateError::Unsupported(_)) => Err(AccessError::Unsupported(operand.gva)),
        }
    }

    /// Fills `buf` with the operand's bytes.
    pub(crate) fn read_bytes(&self, span: &Span, buf: &mut [u8]) -> Result<(), AccessError> {
        let not_ram = |MemoryError::NotRam(_)| AccessError::NotRam(span.gva);
        if let Some(gpa) = span.contiguous() {
            return self.memory.read(gpa, buf).map_err(not_ram);
        }
        let (head, tail) = buf.split_at_mut(span.first_len.min(buf.len()));
        self.memory.read(span.first, head).map_err(not_ram)?;
        span.second.map_or(Ok(()), |second| self.memory.read(second, tail).map_err(not_ram))
    }

    /// Reads an operand of at most 8 bytes, zero-extended.
    pub(crate) fn read_value(&self, span: &Span) -> Result<u64, AccessError> {
        let mut word = [0; 8];
        self.read_bytes(span, &mut word[..span.len.min(8)])?;
        Ok(u64::from_le_bytes(word))
    }

    /// Writes an operand of at most 8 bytes: all of it or nothing.
    pub(crate) fn write_value(&self, span: &Span, value: u64) -> Result<(), AccessError> {
        let not_ram = |MemoryError::NotRam(_)| AccessError::NotRam(span.gva);
        let word = value.to_le_bytes();
        let data = &word[..span.len.min(8)];
        if let Some(gpa) = span.contiguous() {
            return self.memory.write(gpa, data).map_err(not_ram);
        }
        let (head, tail) = data.split_at(span.first_len.min(data.len()));
        if let Some(second) = span.second {
            // The second page must be known to take the write before the first one has.
            self.probe_write(second).map_err(not_ram)?;
            self.memory.write(span.first, head).map_err(not_ram)?;
            return self.memory.write(second, tail).map_err(not_ram);
        }
        self.memory.write(span.first, head).map_err(not_ram)
    }

    /// Whether memory takes the access at both ends of the operand; nothing is changed.
    pub(crate) fn check_ram(&self, span: &Span, access: Access) -> Result<(), AccessError> {
        for gpa in std::iter::once(span.first).chain(span.second) {
            let taken = match access {
                Access::Write => self.probe_write(gpa),
                Access::Read | Access::Execute => self.memory.read(gpa, &mut [0]),
            };
            taken.map_err(|MemoryError::NotRam(_)| AccessError::NotRam(span.gva))?;
        }
        Ok(())
    }

    /// Fails where a write would, without one: an exchange that expects another byte than is there, and would store
    /// what it expects.
    fn probe_write(&self, gpa: Gpa) -> Result<(), MemoryError> {
        let mut byte = [0];
        self.memory.read(gpa, &mut byte)?;
        let other = u64::from(!byte[0]);
        self.memory.compare_exchange(gpa, 1, other, other).map(|_| ())
    }

    /// Replaces a naturally aligned operand of at most 8 bytes if it equals `current`; returns what was found.
    /// `None` if the operand is not naturally aligned.
    pub(crate) fn compare_exchange(
        &self,
        span: &Span,
        current: u64,
        new: u64,
    ) -> Option<Result<u64, AccessError>> {
        if !span.gva.0.is_multiple_of(span.len as u64) {
            return None;
        }
        let found = self.memory.compare_exchange(span.first, span.len, current, new);
        Some(found.map_err(|MemoryError::NotRam(_)| AccessError::NotRam(span.gva)))
    }
}

/// #AC for a misaligned operand at CPL 3, where the guest has asked for it (Intel SDM vol. 3A, 6.15, vector 17).
fn check_alignment(state: &VcpuState, operand: Operand) -> Result<(), AccessError> {
    let checked =
        state.sys.cpl == 3 && state.sys.cr0 & control::CR0_AM != 0 && state.regs.rflags & rflags::AC != 0;
    if checked && !operand.gva.0.is_multiple_of(operand.len as u64) {
        return Err(AccessError::Fault(Exception::AlignmentCheck));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mock::{MockMemory, MockPageTables, MockVcpu, OperationKind};
    use crate::paging::entry;

    const ROOT: Gpa = Gpa(0x10_0000);
    const RW: u64 = entry::PRESENT | entry::WRITABLE;

    /// Two pages at 0x1000 and 0x2000 that lie far apart; the second one with its own rights.
    fn two_pages(second: u64) -> (MockMemory, VcpuState) {
        let memory = MockMemory::with_ram(0x8000);
        let mut tables = MockPageTables::new(&memory, ROOT, 4);
        tables.map(Gva(0x1000), Gpa(0x6000), 0x1000, RW);
        tables.map(Gva(0x2000), Gpa(0x3000), 0x1000, second);
        (memory, MockVcpu::new(ROOT).build())
    }

    fn operand(gva: u64, len: usize) -> Operand {
        Operand { gva: Gva(gva), len, stack: false }
    }

    #[test]
    fn a_page_crossing_value_is_read_and_written_in_two_pieces() {
        let (memory, state) = two_pages(RW);
        let space = AddressSpace { memory: &memory, pkru: 0 };
        let span = space.resolve(&state, operand(0x1ffd, 8), Access::Write, Marks::Set).unwrap();
        space.write_value(&span, 0x0807_0605_0403_0201).unwrap();
        assert_eq!(memory.bytes(Gpa(0x6ffd), 3), [1, 2, 3]);
        assert_eq!(memory.bytes(Gpa(0x3000), 5), [4, 5, 6, 7, 8]);
        assert_eq!(space.read_value(&span), Ok(0x0807_0605_0403_0201));
    }

    #[test]
    fn a_fault_on_the_second_page_names_it_and_marks_nothing() {
        let (memory, state) = two_pages(entry::PRESENT);
        let space = AddressSpace { memory: &memory, pkru: 0 };
        let got = space.resolve(&state, operand(0x1ffd, 8), Access::Write, Marks::Set);
        let fault = Exception::PageFault { address: Gva(0x2000), code: 3 };
        assert_eq!(got, Err(AccessError::Fault(fault)));
        assert_eq!(memory.writes(), []);
    }

    #[test]
    fn a_crossing_write_that_the_second_page_refuses_leaves_the_first_untouched() {
        let (memory, state) = two_pages(RW);
        let space = AddressSpace { memory: &memory, pkru: 0 };
        let span = space.resolve(&state, operand(0x1ffd, 8), Access::Write, Marks::Keep).unwrap();
        memory.fail(OperationKind::CompareExchange, 1);
        assert_eq!(space.write_value(&span, u64::MAX), Err(AccessError::NotRam(Gva(0x1ffd))));
        assert_eq!(memory.bytes(Gpa(0x6ffd), 3), [0; 3]);
        assert_eq!(space.write_value(&span, u64::MAX), Ok(()));
        assert_eq!(memory.bytes(Gpa(0x3000), 5), [0xff; 5]);
    }

    #[test]
    fn neighbours_in_physical_memory_are_one_access() {
        let (memory, state) = two_pages(RW);
        let mut tables = MockPageTables::new(&memory, ROOT, 4);
        tables.map(Gva(0x1000), Gpa(0x2000), 0x1000, RW);
        let space = AddressSpace { memory: &memory, pkru: 0 };
        let span = space.resolve(&state, operand(0x1ffd, 8), Access::Read, Marks::Keep).unwrap();
        assert_eq!(span.contiguous(), Some(Gpa(0x2ffd)));
    }

    #[test]
    fn a_non_canonical_operand_is_a_stack_fault_only_in_the_stack_segment() {
        let (memory, state) = two_pages(RW);
        let space = AddressSpace { memory: &memory, pkru: 0 };
        for (stack, exception) in
            [(false, Exception::GeneralProtection { code: 0 }), (true, Exception::StackFault { code: 0 })]
        {
            let operand = Operand { gva: Gva(1 << 47), len: 8, stack };
            let got = space.resolve(&state, operand, Access::Read, Marks::Keep);
            assert_eq!(got, Err(AccessError::Fault(exception)));
        }
    }

    #[test]
    fn alignment_is_checked_at_cpl_3_on_request_and_after_page_faults() {
        let (memory, mut state) = two_pages(RW | entry::USER);
        state.sys.cpl = 3;
        state.sys.cr0 |= control::CR0_AM;
        let space = AddressSpace { memory: &memory, pkru: 0 };
        let at = operand(0x2004, 8);
        space.resolve(&state, at, Access::Read, Marks::Keep).unwrap();
        state.regs.rflags |= rflags::AC;
        let got = space.resolve(&state, at, Access::Read, Marks::Keep);
        assert_eq!(got, Err(AccessError::Fault(Exception::AlignmentCheck)));
        let got = space.resolve(&state, operand(0x1004, 8), Access::Read, Marks::Keep);
        let fault = Exception::PageFault { address: Gva(0x1004), code: 5 };
        assert_eq!(got, Err(AccessError::Fault(fault)));
    }
}
