//! Watchpoints in debug registers: which of DR0 to DR3 is whose, and what DR7 and DR6 say (Intel SDM vol. 3B, 17.2).
//!
//! While the host uses debug registers, KVM puts the host's values into the CPU in place of the guest's
//! (KVM_GUESTDBG_USE_HW_BP); the guest goes on reading its own. So the host's values have to contain the guest's breakpoints
//! as well: a breakpoint of the guest's stays in its own register, a watchpoint of the host's goes to a register that the guest
//! does not use.

use crate::Gva;
use crate::stop::dr6;

/// How many debug registers hold an address.
pub const REGISTERS: usize = 4;

/// DR7: the bit that is always set.
const DR7_FIXED: u64 = 1 << 10;
/// DR7: access to a debug register is a #DB.
const DR7_GD: u64 = 1 << 13;

/// What a watchpoint waits for. x86 cannot wait for reads alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// An instruction at the address, before it runs.
    Execute,
    /// A store, when it has been made.
    Write,
    /// A load or a store, when it has been made.
    ReadWrite,
}

/// Why a watchpoint cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchpointError {
    /// Debug registers know four lengths.
    #[error("{0} bytes cannot be watched; watch 1, 2, 4 or 8")]
    Length(u8),
    /// They ignore the low bits of an address.
    #[error(
        "{gva} is not a multiple of {len}, as the address of {len} watched bytes must be; watch fewer bytes"
    )]
    Unaligned {
        /// The address.
        gva: Gva,
        /// How many bytes were to be watched.
        len: u8,
    },
    /// Execution has no length.
    #[error("Execution is watched at one address, not on {0} bytes; give a length of 1")]
    ExecuteLength(u8),
    /// All are in use.
    #[error(
        "All {REGISTERS} debug registers are in use, {host} by watchpoints and {guest} by the guest itself; remove a watchpoint"
    )]
    NoneFree {
        /// Watchpoints of the host's.
        host: usize,
        /// Breakpoints that the guest has enabled on one of its vCPUs.
        guest: usize,
    },
}

/// A place that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watchpoint {
    gva: Gva,
    len: u8,
    access: Access,
}

impl Watchpoint {
    /// Watches `len` bytes at the linear address `gva`.
    ///
    /// # Errors
    /// [`WatchpointError`] for what a debug register cannot express: a length other than 1, 2, 4 or 8, an address that is
    /// not a multiple of it, execution on more than one byte.
    pub fn new(gva: Gva, len: u8, access: Access) -> Result<Self, WatchpointError> {
        if !matches!(len, 1 | 2 | 4 | 8) {
            return Err(WatchpointError::Length(len));
        }
        if access == Access::Execute && len != 1 {
            return Err(WatchpointError::ExecuteLength(len));
        }
        if !gva.0.is_multiple_of(u64::from(len)) {
            return Err(WatchpointError::Unaligned { gva, len });
        }
        Ok(Self { gva, len, access })
    }

    /// Watches for the instruction at the linear address `gva`.
    #[must_use]
    pub fn execution(gva: Gva) -> Self {
        Self { gva, len: 1, access: Access::Execute }
    }

    /// Watches for stores to the byte at the linear address `gva`.
    #[must_use]
    pub fn write_of_byte(gva: Gva) -> Self {
        Self { gva, len: 1, access: Access::Write }
    }

    /// Its linear address.
    #[must_use]
    pub fn gva(&self) -> Gva {
        self.gva
    }

    /// What it waits for.
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// R/W and LEN as DR7 has them (Intel SDM vol. 3B, 17.2.4): 8 bytes are 10, which is out of order.
    fn dr7_field(&self) -> u64 {
        let access = match self.access {
            Access::Execute => 0b00,
            Access::Write => 0b01,
            Access::ReadWrite => 0b11,
        };
        let len = match self.len {
            2 => 0b01,
            4 => 0b11,
            8 => 0b10,
            _ => 0b00,
        };
        len << 2 | access
    }

    /// Whether a load or store of `bytes` bytes at `gva` is one that it waits for.
    fn is_touched(&self, gva: Gva, bytes: u64, write: bool) -> bool {
        let waits = match self.access {
            Access::Execute => false,
            Access::Write => write,
            Access::ReadWrite => true,
        };
        // Distances, because an access may wrap around the end of the address space.
        let ours_in_theirs = self.gva.0.wrapping_sub(gva.0) < bytes;
        let theirs_in_ours = gva.0.wrapping_sub(self.gva.0) < u64::from(self.len);
        waits && bytes > 0 && (ours_in_theirs || theirs_in_ours)
    }
}

/// Some of the watchpoints of a [`WatchSet`], by their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WatchHits(u8);

impl WatchHits {
    /// None of them.
    pub const NONE: Self = Self(0);

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Whether watchpoint `number` is among them.
    #[must_use]
    pub fn contains(self, number: usize) -> bool {
        number < REGISTERS && self.0 >> number & 1 != 0
    }

    /// Their numbers, ascending.
    pub fn numbers(self) -> impl Iterator<Item = usize> {
        (0..REGISTERS).filter(move |number| self.contains(*number))
    }

    /// These and `others`.
    #[must_use]
    pub fn and(self, others: Self) -> Self {
        Self(self.0 | others.0)
    }

    fn with(self, number: usize) -> Self {
        Self(self.0 | 1 << number)
    }
}

/// The host's watchpoints: at most four, each known by its number until it is released. The same for every vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WatchSet([Option<Watchpoint>; REGISTERS]);

impl From<Watchpoint> for WatchSet {
    fn from(watchpoint: Watchpoint) -> Self {
        Self([Some(watchpoint), None, None, None])
    }
}

impl WatchSet {
    /// Adds a watchpoint and returns its number, 0 to 3. `guest` is how many breakpoints the guest has enabled itself, on the
    /// vCPU where it has most.
    ///
    /// # Errors
    /// [`WatchpointError::NoneFree`]; nothing has changed then.
    pub fn add(&mut self, watchpoint: Watchpoint, guest: usize) -> Result<usize, WatchpointError> {
        let host = self.len();
        let free = self.0.iter_mut().enumerate().find(|(_, place)| place.is_none());
        match free {
            Some((number, place)) if host + guest < REGISTERS => {
                *place = Some(watchpoint);
                Ok(number)
            }
            _ => Err(WatchpointError::NoneFree { host, guest }),
        }
    }

    /// Releases watchpoint `number`, and returns what it was.
    pub fn remove(&mut self, number: usize) -> Option<Watchpoint> {
        self.0.get_mut(number)?.take()
    }

    /// Watchpoint `number`.
    #[must_use]
    pub fn get(&self, number: usize) -> Option<Watchpoint> {
        *self.0.get(number)?
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().flatten().count()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The watchpoints that a load or store of `bytes` bytes at the linear address `gva` meets. The CPU does not see accesses
    /// that the host makes for the guest, as when it emulates an instruction.
    #[must_use]
    pub fn touched(&self, gva: Gva, bytes: u64, write: bool) -> WatchHits {
        self.hits(|watchpoint| watchpoint.is_touched(gva, bytes, write))
    }

    /// Those of `hits` that wait for execution: the instruction at RIP has not run yet.
    #[must_use]
    pub fn executed(&self, hits: WatchHits) -> WatchHits {
        WatchHits(hits.0 & self.hits(|watchpoint| watchpoint.access == Access::Execute).0)
    }

    fn hits(&self, is_hit: impl Fn(&Watchpoint) -> bool) -> WatchHits {
        self.0.iter().enumerate().fold(WatchHits::NONE, |hits, (number, place)| match place {
            Some(watchpoint) if is_hit(watchpoint) => hits.with(number),
            _ => hits,
        })
    }
}

/// The debug registers as the guest has them (KVM_GET_DEBUGREGS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct GuestDebugRegisters {
    /// DR0 to DR3.
    pub address: [u64; REGISTERS],
    /// DR7.
    pub dr7: u64,
}

impl GuestDebugRegisters {
    /// Whether the guest has enabled breakpoint `number`: L or G.
    fn enables(&self, number: usize) -> bool {
        self.dr7 >> (2 * number) & 0b11 != 0
    }

    /// How many breakpoints the guest has enabled.
    #[must_use]
    pub fn enabled(&self) -> usize {
        (0..REGISTERS).filter(|number| self.enables(*number)).count()
    }
}

/// Whose a debug register is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The guest's breakpoint of the same number.
    Guest,
    /// Watchpoint `number` of the host's.
    Host { number: usize },
}

/// What the CPU's debug registers hold while host watchpoints are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DebugRegisters {
    /// DR0 to DR3.
    pub address: [u64; REGISTERS],
    /// DR7.
    pub dr7: u64,
    /// How many breakpoints of the guest's found no register: the guest enabled them after the host had taken what was free.
    pub left_out: usize,
    owners: [Option<Owner>; REGISTERS],
}

impl DebugRegisters {
    /// The guest's own breakpoints where they are, the host's watchpoints in the registers that the guest does not use. If
    /// there are too many, those of the guest's in the highest registers are left out.
    #[must_use]
    pub fn merge(host: &WatchSet, guest: &GuestDebugRegisters) -> Self {
        let mut merged = Self {
            address: guest.address,
            dr7: DR7_FIXED | guest.dr7 & DR7_GD,
            left_out: 0,
            owners: [None; REGISTERS],
        };
        let mut room = REGISTERS - host.len();
        for register in (0..REGISTERS).filter(|register| guest.enables(*register)) {
            if room == 0 {
                merged.left_out += 1;
                continue;
            }
            room -= 1;
            merged.owners[register] = Some(Owner::Guest);
            merged.dr7 |= guest.dr7 & (0b11 << (2 * register) | 0b1111 << (16 + 4 * register));
        }
        for (number, watchpoint) in host.0.iter().enumerate() {
            let free = merged.owners.iter().position(Option::is_none);
            let (Some(watchpoint), Some(register)) = (watchpoint, free) else { continue };
            merged.owners[register] = Some(Owner::Host { number });
            merged.address[register] = watchpoint.gva.0;
            // G: on in every task (Intel SDM vol. 3B, 17.2.4).
            merged.dr7 |= 0b10 << (2 * register) | watchpoint.dr7_field() << (16 + 4 * register);
        }
        merged
    }

    /// Tells the host's watchpoints in `dr6` from what the guest is to see: its own breakpoints, BD and BS. A breakpoint that
    /// the guest has changed or switched off since, by what it has `now`, is no longer its own. The CPU may set the bits of
    /// registers that are not enabled (Intel SDM vol. 3B, 17.2.3); they are nobody's.
    #[must_use]
    pub fn split(&self, dr6: u64, now: &GuestDebugRegisters) -> (WatchHits, u64) {
        let mut hits = WatchHits::NONE;
        let mut guest = dr6 & (dr6::BD | dr6::BS);
        for (register, owner) in self.owners.iter().enumerate() {
            match owner {
                _ if dr6 >> register & 1 == 0 => {}
                Some(Owner::Host { number }) => hits = hits.with(*number),
                Some(Owner::Guest) => {
                    let control = 0b1111 << (16 + 4 * register);
                    let unchanged = now.address[register] == self.address[register]
                        && now.dr7 & control == self.dr7 & control;
                    if unchanged && now.enables(register) {
                        guest |= 1 << register;
                    }
                }
                None => {}
            }
        }
        (hits, guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Gva = Gva(0xffff_ffff_8300_0010);

    fn watch(gva: u64, len: u8, access: Access) -> Watchpoint {
        Watchpoint::new(Gva(gva), len, access).unwrap()
    }

    fn set(watchpoints: &[Watchpoint]) -> WatchSet {
        let mut set = WatchSet::default();
        for watchpoint in watchpoints {
            set.add(*watchpoint, 0).unwrap();
        }
        set
    }

    fn numbers(hits: WatchHits) -> Vec<usize> {
        hits.numbers().collect()
    }

    #[test]
    fn what_a_debug_register_cannot_express_is_refused() {
        for len in [0, 3, 5, 16, 255] {
            assert_eq!(Watchpoint::new(Gva(0), len, Access::Write), Err(WatchpointError::Length(len)));
        }
        let unaligned = WatchpointError::Unaligned { gva: AT.offset(4), len: 8 };
        assert_eq!(Watchpoint::new(AT.offset(4), 8, Access::ReadWrite), Err(unaligned));
        assert_eq!(Watchpoint::new(AT, 4, Access::Execute), Err(WatchpointError::ExecuteLength(4)));
        watch(AT.0 + 1, 1, Access::Execute);
        watch(u64::MAX - 7, 8, Access::ReadWrite);
    }

    #[test]
    fn dr7_has_the_manuals_encoding() {
        let four = set(&[
            watch(0x1001, 1, Access::Execute),
            watch(0x2002, 2, Access::Write),
            watch(0x3004, 4, Access::ReadWrite),
            watch(0x4008, 8, Access::Write),
        ]);
        let registers = DebugRegisters::merge(&four, &GuestDebugRegisters::default());
        assert_eq!(registers.address, [0x1001, 0x2002, 0x3004, 0x4008]);
        // From the top: LEN 10 RW 01, LEN 11 RW 11, LEN 01 RW 01, LEN 00 RW 00; bit 10; G3 to G0.
        assert_eq!(registers.dr7, 0b1001_1111_0101_0000 << 16 | 1 << 10 | 0b1010_1010);
        let one =
            DebugRegisters::merge(&set(&[watch(AT.0, 1, Access::Execute)]), &GuestDebugRegisters::default());
        assert_eq!((one.address[0], one.dr7), (AT.0, 0x402));
    }

    #[test]
    fn numbers_stay_while_others_come_and_go() {
        let mut watches = set(&[watch(0x1000, 8, Access::Write), watch(0x2000, 8, Access::Write)]);
        assert_eq!(watches.remove(0), Some(watch(0x1000, 8, Access::Write)));
        assert_eq!((watches.remove(0), watches.remove(7), watches.len()), (None, None, 1));
        assert_eq!(watches.get(1).unwrap().gva(), Gva(0x2000));
        assert_eq!(watches.add(watch(0x3000, 1, Access::Write), 0), Ok(0));
        let none = GuestDebugRegisters::default();
        let (hits, _) = DebugRegisters::merge(&watches, &none).split(0b10, &none);
        assert_eq!(numbers(hits), [1]);
    }

    #[test]
    fn a_fifth_and_one_more_than_the_guest_leaves_are_refused() {
        let watchpoint = watch(AT.0, 8, Access::Write);
        let mut watches = WatchSet::default();
        for number in 0..4 {
            assert_eq!(watches.add(watchpoint, 0), Ok(number));
        }
        assert_eq!(watches.add(watchpoint, 0), Err(WatchpointError::NoneFree { host: 4, guest: 0 }));
        let mut watches = set(&[watchpoint, watchpoint]);
        assert_eq!(watches.add(watchpoint, 2), Err(WatchpointError::NoneFree { host: 2, guest: 2 }));
        assert_eq!(watches.add(watchpoint, 1), Ok(2));
    }

    #[test]
    fn the_guests_breakpoints_keep_their_registers_and_bits() {
        // DR0: execute, local. DR2: 4 bytes, write, global. DR1 holds an address and is off.
        let guest = GuestDebugRegisters {
            address: [0xa0, 0xb0, 0xc0, 0],
            dr7: 0b01 | 0b10 << 4 | 0b1101 << 24 | 1 << 10 | 1 << 8 | DR7_GD,
        };
        assert_eq!(guest.enabled(), 2);
        let host = set(&[watch(0x1000, 8, Access::Write), watch(0x2000, 1, Access::Execute)]);
        let merged = DebugRegisters::merge(&host, &guest);
        assert_eq!(merged.address, [0xa0, 0x1000, 0xc0, 0x2000]);
        let dr7 = 0b1101 << 24 | 0b1001 << 20 | DR7_GD | 1 << 10 | 0b10 << 6 | 0b10 << 4 | 0b10 << 2 | 0b01;
        assert_eq!((merged.dr7, merged.left_out), (dr7, 0));
        let (hits, dr6) = merged.split(0xffff_0ff0 | 0b1111 | dr6::BS, &guest);
        assert_eq!((numbers(hits), dr6), (vec![0, 1], 0b0101 | dr6::BS));
        // Switched off, moved, another kind.
        let off = GuestDebugRegisters { dr7: guest.dr7 & !0b01, ..guest };
        assert_eq!(merged.split(0b0101, &off).1, 0b0100);
        let moved = GuestDebugRegisters { address: [0xa1, 0xb0, 0xc0, 0], ..guest };
        assert_eq!(merged.split(0b0101, &moved).1, 0b0100);
        let reads_too = GuestDebugRegisters { dr7: guest.dr7 | 0b1111 << 24, ..guest };
        assert_eq!(merged.split(0b0101, &reads_too).1, 0b0001);
    }

    #[test]
    fn bits_of_unused_registers_are_nobodys() {
        let merged =
            DebugRegisters::merge(&set(&[watch(AT.0, 8, Access::Write)]), &GuestDebugRegisters::default());
        let (hits, dr6) = merged.split(0xffff_0ff0 | 0b1110, &GuestDebugRegisters::default());
        assert_eq!((hits.is_empty(), dr6), (true, 0));
        assert_eq!(merged.split(dr6::BD, &GuestDebugRegisters::default()), (WatchHits::NONE, dr6::BD));
    }

    #[test]
    fn too_many_breakpoints_of_the_guests_are_left_out_from_the_top() {
        let guest = GuestDebugRegisters { address: [1, 2, 3, 4], dr7: 0xff };
        let host = set(&[watch(0x1000, 8, Access::Write), watch(0x2000, 8, Access::Write)]);
        let merged = DebugRegisters::merge(&host, &guest);
        assert_eq!((merged.address, merged.left_out), ([1, 2, 0x1000, 0x2000], 2));
        let (hits, dr6) = merged.split(0b1111, &guest);
        assert_eq!((numbers(hits), dr6), (vec![0, 1], 0b11));
    }

    #[test]
    fn an_access_meets_what_it_overlaps_in_the_way_that_is_watched() {
        let watches = set(&[
            watch(0x1000, 8, Access::Write),
            watch(0x1008, 2, Access::ReadWrite),
            watch(0x1000, 1, Access::Execute),
        ]);
        let touched = |gva, bytes, write| numbers(watches.touched(Gva(gva), bytes, write));
        assert_eq!(touched(0xfff, 1, true), []);
        assert_eq!(touched(0xfff, 2, true), [0]);
        assert_eq!(touched(0x1007, 1, false), []);
        assert_eq!(touched(0x1007, 2, false), [1]);
        assert_eq!(touched(0x1000, 16, true), [0, 1]);
        assert_eq!(touched(0x1009, 1, true), [1]);
        assert_eq!(touched(0x100a, 8, true), []);
        assert_eq!(touched(0x1000, 0, true), []);
        assert_eq!(numbers(watches.executed(WatchHits(0b111))), [2]);
    }
}
