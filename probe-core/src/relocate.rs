//! The displaced instruction's bytes for a slot at another address.
//!
//! The encoding stays as it is; only the displacement of a RIP-relative operand changes. It counts from the end of the
//! instruction, so an immediate behind it does not matter. With an address-size prefix the operand is EIP-relative and
//! its address wraps at 2^32 (Intel SDM vol. 2A, 2.2.1.6). XBEGIN gets the guard as its abort target: RIP ends up there
//! whether the transaction aborts or not.

use iced_x86::{Code, Decoder, DecoderOptions, OpKind, Register};

use crate::Gva;
use crate::plan::MAX_INSTRUCTION;

/// INT3, which ends a slot: the instruction is complete when it is reached.
const GUARD: u8 = 0xcc;

/// Size of a slot in bytes: the longest instruction and the guard.
pub const SLOT_SIZE: usize = MAX_INSTRUCTION + 1;

/// The content of a slot: an instruction, then INT3 to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotCode {
    bytes: [u8; SLOT_SIZE],
    len: usize,
}

impl SlotCode {
    /// All bytes to be written to the slot.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; SLOT_SIZE] {
        &self.bytes
    }

    /// Length of the instruction, 1..=15; the guard stands behind it.
    #[must_use]
    pub const fn instruction_len(&self) -> usize {
        self.len
    }
}

/// Why an instruction cannot be moved to a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelocateError {
    /// The bytes are not one whole instruction.
    #[error("The bytes at {0} are no valid instruction")]
    Invalid(Gva),
    /// A relative branch; it is emulated and never moved.
    #[error("The instruction at {0} is a relative branch, which cannot be moved")]
    RelativeBranch(Gva),
    /// The RIP-relative operand is more than 2 GiB away from the slot.
    #[error(
        "The instruction at {address} uses {target} relative to RIP, more than 2 GiB away from the slot at {slot}; \
         put the slot page nearer to the guest's text"
    )]
    OutOfReach {
        /// Where the instruction stands.
        address: Gva,
        /// The operand's address.
        target: Gva,
        /// The slot.
        slot: Gva,
    },
}

/// Moves the instruction whose bytes begin at `address` to `slot`. `bytes` may go on behind it.
///
/// # Errors
/// [`RelocateError`]
pub fn relocate(bytes: &[u8], address: Gva, slot: Gva) -> Result<SlotCode, RelocateError> {
    let bytes = bytes.get(..MAX_INSTRUCTION).unwrap_or(bytes);
    let mut decoder = Decoder::with_ip(64, bytes, address.0, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let len = instruction.len();
    let Some(original) = bytes.get(..len).filter(|_| !instruction.is_invalid()) else {
        return Err(RelocateError::Invalid(address));
    };
    let relative = instruction.code() != Code::Xbegin_rel32
        && matches!(
            instruction.op0_kind(),
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
        );
    if relative {
        return Err(RelocateError::RelativeBranch(address));
    }
    let mut code = SlotCode { bytes: [GUARD; SLOT_SIZE], len };
    code.bytes[..len].copy_from_slice(original);
    if instruction.code() == Code::Xbegin_rel32 {
        // The displacement is all of the instruction behind its opcode and counts from its end.
        code.bytes[len - 4..len].fill(0);
    }
    if instruction.is_ip_rel_memory_operand() {
        let target = instruction.ip_rel_memory_address();
        let distance = target.wrapping_sub(slot.offset(len as u64).0).cast_signed();
        let displacement = if instruction.memory_base() == Register::EIP {
            // Only the low 32 bits of the sum count.
            #[allow(clippy::cast_possible_truncation)]
            let low = distance as i32;
            low
        } else {
            let out_of_reach = RelocateError::OutOfReach { address, target: Gva(target), slot };
            i32::try_from(distance).map_err(|_| out_of_reach)?
        };
        let at = decoder.get_constant_offsets(&instruction).displacement_offset();
        let field = code.bytes.get_mut(at..at + 4).ok_or(RelocateError::Invalid(address))?;
        field.copy_from_slice(&displacement.to_le_bytes());
    }
    Ok(code)
}

#[cfg(test)]
mod tests;
