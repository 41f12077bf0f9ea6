//! Snapshots: a machine's state as bytes and its memory as a file, and a machine made of them again. docs/snapshot.md has the
//! format.
//!
//! Consistency on error: saving changes nothing for the guest, whatever fails.

mod memory;
mod state;

use std::io;

use probe_core::{Gpa, MemoryError};
use vmm_sys_util::errno;

pub use memory::VerifyError;
pub(crate) use state::{
    CpuidEntry, DebugRegisters, Devices, Events, InterruptControllers, Mirror, Pit, Pm1, Registers, Saved,
    SavedVcpu, SystemRegisters, Uart, Virtio, VirtioQueue, kvm_lapic, kvm_xcrs, kvm_xsave, lapic, xcrs,
    xsave,
};

#[cfg(doc)]
use crate::GuestRam;
use crate::control::Control;
use crate::devices::virtio::Quiet;
use crate::memory::MemoryFile;
use crate::vcpu::VcpuError;

/// What each state begins with.
const MAGIC: [u8; 8] = *b"vmprobe\x1a";

/// Counts the changes of what follows [`MAGIC`].
const VERSION: u32 = 2;

/// Magic, version, CRC-32 and length of what follows: little-endian.
const HEADER_BYTES: usize = 8 + 4 + 4 + 8;

/// Why a machine could not be saved. It goes on as if nothing had been asked of it.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// There are no vCPUs to save.
    #[error("Only a machine that runs, or is paused, can be saved")]
    NotRunning,
    /// An ioctl on a vCPU.
    #[error("A vCPU's state could not be had")]
    Vcpu(
        #[from]
        #[source]
        VcpuError,
    ),
    /// Any other ioctl.
    #[error("{name} failed")]
    Ioctl {
        /// Its name in the KVM API.
        name: &'static str,
        /// What the host said.
        #[source]
        source: errno::Error,
    },
    /// Guest memory.
    #[error("Guest memory could not be read")]
    Memory(#[source] MemoryError),
    /// What its devices are connected to is not part of a snapshot.
    #[error("A machine with disks, vsock or a network cannot be saved yet; run it without")]
    Connected,
    /// What takes the memory.
    #[error("The guest's memory could not be written")]
    Write(#[source] io::Error),
}

/// Why bytes are not the state of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Something else.
    #[error("This is not the state of a vmprobe snapshot")]
    Magic,
    /// Of another version.
    #[error(
        "The snapshot has format version {found}, and this vmprobe reads version {VERSION}; restore it with the vmprobe that \
         made it"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// The end is missing, or there is more.
    #[error("The snapshot's state has {found} bytes and should have {expected}; it is not complete")]
    Length {
        /// Bytes that should follow the header.
        expected: u64,
        /// Bytes that do.
        found: usize,
    },
    /// Not what was written.
    #[error("The snapshot's state is damaged: its checksum is {found:#010x} and should be {expected:#010x}")]
    Checksum {
        /// As it was written.
        expected: u32,
        /// As it is.
        found: u32,
    },
    /// The checksum is right and the contents are not.
    #[error("The snapshot's state makes no sense to this vmprobe; it was not made by one of its version")]
    Contents,
}

/// A machine that was saved, without its memory.
#[derive(Clone, Debug)]
pub struct Snapshot(pub(crate) Saved);

impl Snapshot {
    /// Reads what [`Control::save`] returned.
    ///
    /// # Errors
    /// [`DecodeError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let (magic, rest) = bytes.split_first_chunk().ok_or(DecodeError::Magic)?;
        if *magic != MAGIC {
            return Err(DecodeError::Magic);
        }
        let short = DecodeError::Length { expected: HEADER_BYTES as u64, found: bytes.len() };
        let (version, rest) = rest.split_first_chunk().ok_or(short)?;
        let found = u32::from_le_bytes(*version);
        if found != VERSION {
            return Err(DecodeError::Version { found });
        }
        let (checksum, rest) = rest.split_first_chunk().ok_or(short)?;
        let (length, payload) = rest.split_first_chunk().ok_or(short)?;
        let expected = u64::from_le_bytes(*length);
        if payload.len() as u64 != expected {
            return Err(DecodeError::Length { expected, found: payload.len() });
        }
        let (expected, found) = (u32::from_le_bytes(*checksum), crc32fast::hash(payload));
        if found != expected {
            return Err(DecodeError::Checksum { expected, found });
        }
        postcard::from_bytes(payload).map(Self).map_err(|_| DecodeError::Contents)
    }

    fn encode(&self) -> Result<Vec<u8>, postcard::Error> {
        let payload = postcard::to_allocvec(&self.0)?;
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(crc32fast::hash(&payload).to_le_bytes());
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.extend(payload);
        Ok(bytes)
    }

    /// Bytes of RAM.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.0.memory_bytes
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn vcpus(&self) -> usize {
        self.0.vcpus.len()
    }

    /// Compares all of the memory file with what was saved. Takes as long as reading it; restoring reads only what the guest touches,
    /// and verifies nothing.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub fn verify_memory(&self, memory: &MemoryFile) -> Result<(), VerifyError> {
        memory::verify(memory.file(), self.0.memory_bytes, &self.0.memory_checksums)
    }
}

impl Control {
    /// Saves the machine, which is paused meanwhile. `write_at` is given the memory, for a file of [`GuestRam::bytes`]: offsets and what
    /// is there, all but pages of zeros. The rest is in the bytes that are returned, which [`Snapshot::decode`] reads. `uncover` is
    /// given stretches of RAM and puts what the guest has there where the host has put something else. Not to be called on a vCPU's
    /// thread.
    ///
    /// # Errors
    /// [`SaveError`]; what was written is of no use then.
    pub fn save(
        &self,
        uncover: &dyn Fn(Gpa, &mut [u8]),
        write_at: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<Vec<u8>, SaveError> {
        if !self.buses.mmio.can_be_saved() {
            return Err(SaveError::Connected);
        }
        let paused = self.pause();
        // No device writes to memory, nor takes a request, until all is saved.
        let virtio = self.buses.mmio.quiesce();
        let vcpus = paused.save_vcpus(self.shared.vcpus()).ok_or(SaveError::NotRunning)?;
        let vcpus = vcpus.into_iter().collect::<Result<_, _>>()?;
        let vm = self.mapping.vm();
        let ioctl = |name| move |source| SaveError::Ioctl { name, source };
        let mut chips = InterruptControllers::CHIPS
            .map(|chip_id| kvm_bindings::kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut chips {
            vm.get_irqchip(chip).map_err(ioctl("KVM_GET_IRQCHIP"))?;
        }
        let ram = self.mapping.ram();
        let saved = Saved {
            memory_bytes: ram.bytes(),
            vcpus,
            interrupts: InterruptControllers::save(&chips),
            pit: Pit::save(&vm.get_pit2().map_err(ioctl("KVM_GET_PIT2"))?),
            clock: vm.get_clock().map_err(ioctl("KVM_GET_CLOCK"))?.clock,
            devices: Devices { virtio: virtio.iter().map(Quiet::save).collect(), ..self.buses.ports.save() },
            memory_checksums: memory::write(ram, uncover, write_at).map_err(|error| match error {
                memory::WriteError::Memory(error) => SaveError::Memory(error),
                memory::WriteError::File(error) => SaveError::Write(error),
            })?,
        };
        drop(virtio);
        drop(paused);
        Snapshot(saved).encode().map_err(|error| SaveError::Write(io::Error::other(error)))
    }
}

#[cfg(test)]
mod kvm_tests;

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved {
        let chips = InterruptControllers::CHIPS
            .map(|chip_id| kvm_bindings::kvm_irqchip { chip_id, ..Default::default() });
        let vcpu = SavedVcpu {
            cpuid: vec![CpuidEntry::save(&kvm_bindings::kvm_cpuid_entry2 {
                function: 7,
                ..Default::default()
            })],
            mp_state: 3,
            registers: Registers::save(&kvm_bindings::kvm_regs { rip: u64::MAX, ..Default::default() }),
            system: SystemRegisters::save(&Default::default()),
            debug: DebugRegisters::save(&Default::default()),
            events: Events::save(&Default::default()),
            xcrs: vec![(0, 7)],
            xsave: vec![1; 4096],
            lapic: vec![2; 1024],
            msrs: vec![(0x10, 1 << 63)],
            tsc_khz: Some(2_000_000),
        };
        Saved {
            memory_bytes: 2 << 20,
            memory_checksums: vec![1, 2],
            vcpus: vec![vcpu],
            interrupts: InterruptControllers::save(&chips),
            pit: Pit::save(&Default::default()),
            clock: 1,
            devices: Devices {
                serial: Uart::save(&Default::default()),
                power: Pm1::save(&Default::default()),
                virtio: vec![Virtio {
                    id: 4,
                    queues: vec![VirtioQueue { size: 64, ..Default::default() }],
                    ..Default::default()
                }],
            },
        }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        let bytes = Snapshot(saved()).encode().unwrap();
        assert_eq!(Snapshot::decode(&bytes).unwrap().0, saved());
    }

    #[test]
    fn every_flipped_bit_and_every_missing_byte_is_refused() {
        let bytes = Snapshot(saved()).encode().unwrap();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(Snapshot::decode(&damaged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(Snapshot::decode(&bytes[..at]).is_err(), "{at} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(Snapshot::decode(&longer), Err(DecodeError::Length { .. })));
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = Snapshot(saved()).encode().unwrap();
        bytes[8..12].copy_from_slice(&7u32.to_le_bytes());
        let error = Snapshot::decode(&bytes).unwrap_err();
        assert!(matches!(error, DecodeError::Version { found: 7 }));
        assert!(error.to_string().contains("version 7"), "{error}");
    }

    #[test]
    fn contents_that_lie_do_not_panic() {
        let payload = [0xff; 64];
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(crc32fast::hash(&payload).to_le_bytes());
        bytes.extend(64u64.to_le_bytes());
        bytes.extend(payload);
        assert!(matches!(Snapshot::decode(&bytes), Err(DecodeError::Contents)));
    }
}
