//! The machine: guest memory, vCPUs, boot, devices, the run loop, KVM.
//!
//! Every ioctl of the project is here, and nearly all of its unsafe code: `exit` (unions and data of the run page), `machine`
//! (memory slots), `kick` (CPU clocks of threads).

pub mod boot;
mod cpuid;
mod devices;
pub mod doctor;
mod exit;
mod host;
mod kick;
pub mod layout;
mod machine;
mod memory;
mod regs;
mod report;
mod runner;
mod slots;
mod vcpu;
mod watchdog;

pub use host::HostError;
pub use machine::{CreateError, Machine, MachineConfig, RunError, StopHandle};
pub use memory::{AllocateError, GuestRam};
pub use report::{ExitCounts, IoctlCounts, RunEnd, RunReport, VcpuReport};
pub use slots::SlotsError;
pub use vcpu::VcpuError;
