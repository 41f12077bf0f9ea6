//! The probe engine.
//!
//! Pure: no ioctl, no thread, no async, no unsafe. It decides everything about a probe; the `vmm` crate carries the
//! decisions out. A hit flows through the modules in this order:
//!
//! ```text
//! exit -> stop (why did we stop?) -> engine (whose hit is it, count and report it)
//!      -> plan (emulate | step | refuse) -> emulate, or slot + relocate, or in place, then fixup
//!      -> new vCPU state
//! ```
//!
//! [`patch`] owns the int3 bytes in guest text, [`paging`] walks the guest's page tables with the guest's own rights.

#![forbid(unsafe_code)]

mod addr;
pub mod emulate;
pub mod engine;
pub mod fetch;
pub mod fixup;
pub mod handler;
pub mod machine;
mod memory;
#[cfg(any(test, feature = "mock"))]
pub mod mock;
pub mod paging;
pub mod patch;
pub mod plan;
pub mod probe;
pub mod relocate;
mod returns;
pub mod slot;
mod space;
mod state;
pub mod stop;
mod vendor;
pub mod watch;

pub use addr::{Gpa, Gva, PAGE_SIZE, VcpuId};
pub use memory::{MemoryError, PhysicalMemory};
pub use space::{AccessError, AddressSpace, MAX_OPERAND};
pub use state::{
    Exception, InterruptShadow, Registers, RegistersError, SystemRegisters, VcpuState, control, rflags,
};
pub use vendor::Vendor;
