//! The contract, `proto/vmprobe/v1`, as Rust: its messages, its services and their clients.

// Written by the generator, documented in the contract.
#![allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]

use disk::DiskOptions;

tonic::include_proto!("vmprobe.v1");

/// The contract as a FileDescriptorSet, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vmprobe.v1.bin"));

/// Whether an error says that the other side is gone, and not what it thinks of the request: those that it sends have details.
pub fn is_lost(status: &tonic::Status) -> bool {
    use tonic::Code;
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled)
        && status.details().is_empty()
}

impl MachineState {
    /// Its name for people and for programs; `None` for one that this version does not know.
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::Unspecified => None,
            Self::Created => Some("created"),
            Self::Running => Some("running"),
            Self::Paused => Some("paused"),
            Self::Ended => Some("ended"),
            Self::Failed => Some("failed"),
        }
    }
}

impl Disk {
    /// With its files by the names that `name` gives them.
    pub fn new<E>(
        options: &DiskOptions,
        name: impl Fn(&std::path::Path) -> Result<String, E>,
    ) -> Result<Self, E> {
        let format = match options.format {
            None => DiskFormat::Unspecified,
            Some(disk::Format::Raw) => DiskFormat::Raw,
            Some(disk::Format::Qcow2) => DiskFormat::Qcow2,
        };
        let access = match options.access {
            disk::Access::Overlay => DiskAccess::Overlay,
            disk::Access::Write => DiskAccess::Write,
            disk::Access::ReadOnly => DiskAccess::ReadOnly,
        };
        Ok(Self {
            path: name(&options.path)?,
            format: format.into(),
            access: access.into(),
            backing: options.backing.iter().map(|path| name(path)).collect::<Result<_, _>>()?,
        })
    }

    /// `None` with values that this version does not know.
    pub fn options(&self) -> Option<DiskOptions> {
        Some(DiskOptions {
            path: self.path.clone().into(),
            format: match DiskFormat::try_from(self.format).ok()? {
                DiskFormat::Unspecified => None,
                DiskFormat::Raw => Some(disk::Format::Raw),
                DiskFormat::Qcow2 => Some(disk::Format::Qcow2),
            },
            access: match DiskAccess::try_from(self.access).ok()? {
                DiskAccess::Unspecified | DiskAccess::Overlay => disk::Access::Overlay,
                DiskAccess::Write => disk::Access::Write,
                DiskAccess::ReadOnly => disk::Access::ReadOnly,
            },
            backing: self.backing.iter().map(Into::into).collect(),
        })
    }
}

macro_rules! registers {
    ($($name:ident)*) => {
        impl From<probe_core::Registers> for Registers {
            fn from(regs: probe_core::Registers) -> Self {
                Self { $($name: regs.$name),* }
            }
        }

        impl From<Registers> for probe_core::Registers {
            fn from(regs: Registers) -> Self {
                Self { $($name: regs.$name),* }
            }
        }
    };
}

registers!(rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);
