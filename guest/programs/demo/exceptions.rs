//! The exception table, and the exceptions that the program causes itself.

use core::arch::asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::functions::{own_fault, own_int3, own_ud2};
use crate::{ports, serial};

const VECTORS: usize = 32;
const DEBUG: u64 = 1;
const BREAKPOINT: u64 = 3;
const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;

/// RFLAGS.TF and RFLAGS.IF, off unless the program itself has set them.
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
/// DR6.BS: the #DB came from a single step.
const DR6_BS: u64 = 1 << 14;

/// What the CPU and entry.s push, lowest address first.
#[repr(C)]
struct Frame {
    registers: [u64; 15],
    vector: u64,
    code: u64,
    rip: u64,
    cs: u64,
    rflags: u64,
    rsp: u64,
    ss: u64,
}

/// A 64-bit interrupt gate as two words (Intel SDM vol. 3A, 6.14.1).
struct Table(UnsafeCell<[[u64; 2]; VECTORS]>);

// SAFETY: only vCPU 0 writes the table, before it lets the others use it (main.rs, READY).
unsafe impl Sync for Table {}

static TABLE: Table = Table(UnsafeCell::new([[0; 2]; VECTORS]));

/// Handled exceptions: own_int3, own_ud2, own_step, and own_fault by its two kinds.
static INT3S: AtomicU64 = AtomicU64::new(0);
static UD2S: AtomicU64 = AtomicU64::new(0);
static STEPS: AtomicU64 = AtomicU64::new(0);
static PROTECTION_FAULTS: AtomicU64 = AtomicU64::new(0);
static PAGE_FAULTS: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" {
    fn exception_entries();
    fn own_fault_end();
    fn own_step_end();
}

/// How many of the program's own exceptions have been handled.
pub struct Handled {
    /// #BP in own_int3.
    pub int3: u64,
    /// #UD in own_ud2.
    pub ud2: u64,
    /// #DB after the nop of own_step.
    pub step: u64,
    /// #GP in own_fault.
    pub protection: u64,
    /// #PF in own_fault.
    pub page: u64,
}

/// Reads the counters.
pub fn handled() -> Handled {
    Handled {
        int3: INT3S.load(Ordering::Relaxed),
        ud2: UD2S.load(Ordering::Relaxed),
        step: STEPS.load(Ordering::Relaxed),
        protection: PROTECTION_FAULTS.load(Ordering::Relaxed),
        page: PAGE_FAULTS.load(Ordering::Relaxed),
    }
}

/// Fills the table. Called once, by vCPU 0.
pub fn build_table() {
    let selector: u64;
    // SAFETY: reads a segment register.
    unsafe { asm!("mov {}, cs", out(reg) selector, options(nomem, nostack, preserves_flags)) }
    for vector in 0..VECTORS {
        let entry = exception_entries as *const () as u64 + 16 * vector as u64;
        // Present, DPL 0, 64-bit interrupt gate.
        let low = entry & 0xffff | selector << 16 | 0x8e00 << 32 | (entry >> 16 & 0xffff) << 48;
        // SAFETY: within the table; see `Table` on who writes it. Volatile, word by word: no vector instruction.
        unsafe {
            let gate = TABLE.0.get().cast::<[u64; 2]>().add(vector).cast::<u64>();
            gate.write_volatile(low);
            gate.add(1).write_volatile(entry >> 32);
        }
    }
}

/// Makes the table this vCPU's.
pub fn load_table() {
    let base = TABLE.0.get() as u64;
    let limit = size_of::<Table>() as u64 - 1;
    // Limit in the low 16 bits, then the base: 10 bytes.
    let pointer = [limit | base << 16, base >> 48];
    // SAFETY: the table is complete and lives as long as the program.
    unsafe { asm!("lidt [{}]", in(reg) &raw const pointer, options(readonly, nostack, preserves_flags)) }
}

/// Called by exception_common with the frame on the stack; what it changes there takes effect at the iretq.
#[unsafe(no_mangle)]
extern "C" fn exception(frame: &mut Frame) {
    let own_fault = own_fault as *const () as u64;
    let clean = frame.rflags & (TF | IF) == 0;
    match frame.vector {
        BREAKPOINT if clean && frame.rip == own_int3 as *const () as u64 + 1 => count(&INT3S),
        INVALID_OPCODE if clean && frame.rip == own_ud2 as *const () as u64 => {
            count(&UD2S);
            frame.rip += 2;
        }
        GENERAL_PROTECTION if clean && frame.rip == own_fault && frame.code == 0 => {
            count(&PROTECTION_FAULTS);
            frame.rip = own_fault_end as *const () as u64;
        }
        PAGE_FAULT if clean && frame.rip == own_fault && frame.code == 0 && fault_address() == UNMAPPED => {
            count(&PAGE_FAULTS);
            frame.rip = own_fault_end as *const () as u64;
        }
        DEBUG
            if frame.rflags & TF != 0
                && frame.rip == own_step_end as *const () as u64
                && take_dr6() & DR6_BS != 0 =>
        {
            count(&STEPS);
            frame.rflags &= !TF;
        }
        _ => unexpected(frame),
    }
}

/// A canonical address that no identity map of RAM reaches, for own_fault.
pub const UNMAPPED: u64 = 0x4000_0000_0000;
/// An address that is not canonical with 4-level nor with 5-level paging, for own_fault.
pub const NON_CANONICAL: u64 = 0x8000_0000_0000_0000;

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// CR2.
fn fault_address() -> u64 {
    let address;
    // SAFETY: reads a control register.
    unsafe { asm!("mov {}, cr2", out(reg) address, options(nomem, nostack, preserves_flags)) }
    address
}

/// DR6, which the CPU never clears by itself.
fn take_dr6() -> u64 {
    let dr6;
    // SAFETY: debug status only; 0xffff0ff0 is its value after reset.
    unsafe {
        asm!("mov {0}, dr6", "mov dr6, {1}", out(reg) dr6, in(reg) 0xffff_0ff0_u64,
            options(nomem, nostack, preserves_flags));
    }
    dr6
}

fn unexpected(frame: &Frame) -> ! {
    serial::text("demo: exception ");
    serial::decimal(frame.vector);
    serial::text(" at ");
    serial::hex(frame.rip);
    serial::text(", error code ");
    serial::hex(frame.code);
    serial::text(", RFLAGS ");
    serial::hex(frame.rflags);
    serial::text(", RSP ");
    serial::hex(frame.rsp);
    serial::text(", CR2 ");
    serial::hex(fault_address());
    serial::text("\n");
    ports::triple_fault()
}
