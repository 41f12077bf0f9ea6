//! The arithmetic flags, as pure functions of operands and results (Intel SDM vol. 1, 3.4.3.1, and APM vol. 1, 3.1.4).
//! Where a manual leaves a flag undefined, it is what CPUs leave; a test on the host's own CPU compares them.

use iced_x86::ConditionCode;

use super::operand::mask;
use crate::rflags::{AF, CF, OF, PF, SF, ZF};

/// The sign bit of a value of `size` bytes.
pub(super) const fn sign(size: usize) -> u64 {
    1 << (8 * size - 1)
}

/// `flag` if `condition` holds.
pub(super) const fn when(condition: bool, flag: u64) -> u64 {
    if condition { flag } else { 0 }
}

/// ZF, SF and PF of a result.
pub(super) const fn of_result(size: usize, result: u64) -> u64 {
    when(result & mask(size) == 0, ZF)
        | when(result & sign(size) != 0, SF)
        | when((result & 0xff).count_ones().is_multiple_of(2), PF)
}

/// `a + b + carry` and all six flags.
pub(super) const fn add(size: usize, a: u64, b: u64, carry: bool) -> (u64, u64) {
    let result = a.wrapping_add(b).wrapping_add(carry as u64) & mask(size);
    let carries = (a & b) | ((a | b) & !result);
    let overflow = (a ^ result) & (b ^ result);
    (result, of_result(size, result) | borrow_flags(size, a ^ b ^ result, carries, overflow))
}

/// `a - b - borrow` and all six flags.
pub(super) const fn sub(size: usize, a: u64, b: u64, borrow: bool) -> (u64, u64) {
    let result = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
    let borrows = (!a & b) | ((!a | b) & result);
    let overflow = (a ^ b) & (a ^ result);
    (result, of_result(size, result) | borrow_flags(size, a ^ b ^ result, borrows, overflow))
}

const fn borrow_flags(size: usize, half: u64, carries: u64, overflow: u64) -> u64 {
    when(carries & sign(size) != 0, CF) | when(half & 0x10 != 0, AF) | when(overflow & sign(size) != 0, OF)
}

/// The six flags of AND, OR, XOR and TEST: CF, OF and AF are cleared.
pub(super) const fn logic(size: usize, result: u64) -> u64 {
    of_result(size, result)
}

/// Whether a condition of Jcc, SETcc or CMOVcc holds (Intel SDM vol. 1, appendix B).
pub(super) fn holds(condition: ConditionCode, flags: u64) -> bool {
    let set = |flag: u64| flags & flag != 0;
    match condition {
        ConditionCode::None => true,
        ConditionCode::o => set(OF),
        ConditionCode::no => !set(OF),
        ConditionCode::b => set(CF),
        ConditionCode::ae => !set(CF),
        ConditionCode::e => set(ZF),
        ConditionCode::ne => !set(ZF),
        ConditionCode::be => set(CF | ZF),
        ConditionCode::a => !set(CF | ZF),
        ConditionCode::s => set(SF),
        ConditionCode::ns => !set(SF),
        ConditionCode::p => set(PF),
        ConditionCode::np => !set(PF),
        ConditionCode::l => set(SF) != set(OF),
        ConditionCode::ge => set(SF) == set(OF),
        ConditionCode::le => set(ZF) || set(SF) != set(OF),
        ConditionCode::g => !set(ZF) && set(SF) == set(OF),
    }
}
