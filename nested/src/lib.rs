//! The emulated AMD-V machine in which vmprobe runs where the host has no hardware virtualization.
//!
//! ```text
//! host: vmprobe run ...            Rig::run: copies vmprobe and its files into an initramfs, starts QEMU, carries output
//!   QEMU (TCG, emulated AMD-V)
//!     stock Debian kernel          kvm-amd gives /dev/kvm
//!       vmprobe as process 1       init: loads modules, starts the command, reports its exit code
//!         vmprobe run ...          the same command line, on real KVM semantics
//! ```
//!
//! [`prepare`] fetches the kernel and builds QEMU once per machine; [`Rig::run`] runs one command. Output goes through ports
//! of a virtio console: byte-exact, flow-controlled, about 400 MB/s, where an emulated UART carries 0.5 MB/s.
//!
//! Unsafe code: one place, [`Command::pre_exec`](std::os::unix::process::CommandExt::pre_exec) in `process.rs`, so that no
//! child process outlives vmprobe.

mod apt;
mod cache;
mod control;
pub mod debian;
mod disk;
mod emulator;
mod executable;
pub mod init;
mod initramfs;
mod kernels;
mod kmod;
mod packages;
mod prepare;
mod process;
mod progress;
mod qemu;
mod request;
mod run;
mod shell;
mod stream;

pub use cache::{Cache, CacheError};
pub use disk::{RootDisk, root_disk};
pub use kernels::{KernelName, named_kernel};
pub use prepare::{PrepareError, Rig, prepare};
pub use process::StepError;
pub use progress::{LineProgress, Progress, TerminalProgress, stderr_progress};
pub use request::inner_arguments;
pub use run::{Clock, MAX_DISKS, NestedDisk, NestedError, NestedExit, NestedRun, disk_path};
pub use shell::shell;
