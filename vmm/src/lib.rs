//! The machine: guest memory, vCPUs, boot, devices, the run loop, KVM.
//!
//! Every ioctl of the project is here, and nearly all of its unsafe code: `exit` (unions and data of the run page), `mapping`
//! (memory slots), `machine` (one ioctl that kvm-ioctls lacks), `devices` (those of a tap), `vcpu` (one that it has as unsafe), `snapshot::state` (unions of
//! interrupt controllers), `kick` (signals to threads, their CPU clocks).

mod acpi;
pub mod boot;
mod control;
mod cpuid;
mod devices;
pub mod doctor;
mod exit;
mod host;
mod kick;
pub mod layout;
mod machine;
mod mapping;
mod memory;
mod msrs;
mod pause;
pub mod quartiles;
mod regs;
mod report;
mod runner;
mod slots;
mod snapshot;
mod vcpu;
mod watchdog;

pub use control::Control;
pub use cpuid::CpuDiffers;
pub use devices::serial::SerialInput;
pub use devices::virtio::{
    MacAddress, Network, OpenTapError, OpenVsockError, ParseMacError, ServedVsock, Vsock, VsockOptions,
};
pub use host::{Host, HostError};
pub use machine::{
    CreateError, Machine, MachineConfig, RestoreConfig, RestoreError, Run, RunError, StopHandle,
};
pub use mapping::WatchError;
pub use memory::{AllocateError, GuestRam, MemoryFile};
pub use pause::Paused;
pub use report::{ExitCounts, IoctlCounts, RunEnd, RunReport, VcpuReport};
pub use slots::SlotsError;
pub use snapshot::{DecodeError, SaveError, Snapshot, VerifyError};
pub use vcpu::{RestoreVcpuError, VcpuError};
