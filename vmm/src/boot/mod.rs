//! Puts a kernel into guest memory and says where the vCPUs start.

mod cpu;
mod linux;

use probe_core::{Gpa, MemoryError, PhysicalMemory, Registers};

use crate::acpi::{self, Platform};
use crate::layout;
use crate::memory::GuestRam;

pub(crate) use cpu::enter_long_mode;

/// A program to run on the machine.
#[derive(Clone, Debug)]
pub struct Kernel<'a> {
    /// Where it starts: guest-physical, in 64-bit mode, under an identity map.
    pub entry: Gpa,
    /// What to load.
    pub segments: Vec<KernelSegment<'a>>,
    /// What it expects of its loader.
    pub protocol: Protocol<'a>,
}

/// A piece of a kernel at its guest-physical address.
#[derive(Clone, Copy, Debug)]
pub struct KernelSegment<'a> {
    /// Where it goes.
    pub gpa: Gpa,
    /// Its first bytes.
    pub data: &'a [u8],
    /// Its size in memory, bytes; what `data` does not fill is zero.
    pub mem_size: u64,
}

/// How a kernel is started.
#[derive(Clone, Debug)]
pub enum Protocol<'a> {
    /// The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst): the first vCPU starts, RSI points to the boot
    /// parameters; the others wait to be started by the guest.
    Linux(LinuxBoot<'a>),
    /// The project's own: every vCPU starts at the entry at privilege level 0 with interrupts off, no interrupt table,
    /// no stack, all of RAM and the low 4 GiB identity-mapped. RDI = index of the vCPU, RSI = number of vCPUs,
    /// RDX = bytes of RAM, every other register 0.
    BareMetal,
}

/// What Linux is given beside its segments.
#[derive(Clone, Copy, Debug)]
pub struct LinuxBoot<'a> {
    /// The setup header, from offset 0x1f1 of the bzImage on; more bytes than the header has do no harm. `None` for a
    /// vmlinux that came alone.
    pub setup_header: Option<&'a [u8]>,
    /// The initial ramdisk.
    pub initrd: Option<&'a [u8]>,
    /// The kernel command line.
    pub cmdline: &'a str,
}

/// Why a kernel could not be loaded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BootError {
    /// A segment lies outside RAM.
    #[error(
        "Kernel segment at {gpa}, {bytes:#x} bytes, is outside guest RAM of {ram:#x} bytes; enlarge the memory"
    )]
    SegmentOutsideRam {
        /// Start of the segment.
        gpa: Gpa,
        /// Its size in memory.
        bytes: u64,
        /// Size of RAM.
        ram: u64,
    },
    /// A segment has more data than memory.
    #[error(
        "Kernel segment at {gpa} has {data:#x} bytes of data for {bytes:#x} bytes of memory; the image is damaged"
    )]
    SegmentTooLong {
        /// Start of the segment.
        gpa: Gpa,
        /// Bytes of data.
        data: u64,
        /// Its size in memory.
        bytes: u64,
    },
    /// Two segments want the same memory.
    #[error("Kernel segments at {0} and {1} overlap; the image is damaged")]
    SegmentsOverlap(Gpa, Gpa),
    /// A segment lies where the loader puts its own things.
    #[error(
        "Kernel segment at {gpa}, {bytes:#x} bytes, overlaps {what} of the boot loader; link the kernel at 0x100000 or above"
    )]
    SegmentOverBootStructure {
        /// Start of the segment.
        gpa: Gpa,
        /// Its size in memory.
        bytes: u64,
        /// What is there.
        what: &'static str,
    },
    /// The entry is in no segment.
    #[error(
        "Kernel entry {0} is in none of its segments; the image is damaged, or its entry is not a physical address"
    )]
    EntryOutsideSegments(Gpa),
    /// The setup header cannot be used.
    #[error("The kernel's setup header is not usable: {0}; give an x86-64 bzImage or its vmlinux")]
    SetupHeader(&'static str),
    /// The command line is longer than the kernel reads.
    #[error("The kernel command line has {bytes} bytes and this kernel reads {limit}; shorten it")]
    CommandLineTooLong {
        /// Its length.
        bytes: usize,
        /// The longest that fits.
        limit: usize,
    },
    /// The command line has bytes that a kernel does not read.
    #[error("The kernel command line holds a character that is not printable ASCII; remove it")]
    CommandLineCharacter,
    /// No room for the initial ramdisk.
    #[error(
        "The initial ramdisk of {bytes:#x} bytes does not fit between the kernel's end at {kernel_end} and {limit}; enlarge \
         the memory or shrink the ramdisk"
    )]
    InitrdTooLarge {
        /// Its size.
        bytes: u64,
        /// End of the kernel.
        kernel_end: Gpa,
        /// End of the memory that it may be in.
        limit: Gpa,
    },
    /// Guest RAM refused a write that the checks above let pass.
    #[error("Guest memory could not be filled")]
    Memory(
        #[from]
        #[source]
        MemoryError,
    ),
}

/// Checks `kernel` and puts it into `ram`, with everything that its protocol wants there, and the tables that describe `platform`.
pub(crate) fn load(kernel: &Kernel<'_>, platform: &Platform<'_>, ram: &GuestRam) -> Result<(), BootError> {
    check(kernel, ram)?;
    for segment in &kernel.segments {
        ram.write(segment.gpa, segment.data)?;
    }
    for (gpa, bytes) in cpu::boot_tables(ram.bytes()).into_iter().chain(acpi::tables(platform)) {
        ram.write(gpa, &bytes)?;
    }
    if let Protocol::Linux(boot) = &kernel.protocol {
        linux::load(boot, kernel_end(kernel), ram)?;
    }
    Ok(())
}

/// The general-purpose registers that vCPU `index` of `count` starts with.
pub(crate) fn entry_registers(kernel: &Kernel<'_>, index: u32, count: u32, ram_bytes: u64) -> Registers {
    let start = Registers { rip: kernel.entry.0, rflags: probe_core::rflags::FIXED, ..Registers::default() };
    match kernel.protocol {
        Protocol::Linux(_) => Registers { rsi: layout::BOOT_PARAMS.0, ..start },
        Protocol::BareMetal => {
            Registers { rdi: u64::from(index), rsi: u64::from(count), rdx: ram_bytes, ..start }
        }
    }
}

/// Whether vCPU `index` runs from the start, or waits until the guest starts it.
pub(crate) fn starts(protocol: &Protocol<'_>, index: u32) -> bool {
    match protocol {
        Protocol::Linux(_) => index == 0,
        Protocol::BareMetal => true,
    }
}

fn check(kernel: &Kernel<'_>, ram: &GuestRam) -> Result<(), BootError> {
    let mut ranges: Vec<(Gpa, u64)> = Vec::with_capacity(kernel.segments.len());
    for segment in &kernel.segments {
        let KernelSegment { gpa, data, mem_size: bytes } = *segment;
        if data.len() as u64 > bytes {
            return Err(BootError::SegmentTooLong { gpa, data: data.len() as u64, bytes });
        }
        if bytes == 0 {
            continue;
        }
        if !ram.is_ram(gpa, bytes) {
            return Err(BootError::SegmentOutsideRam { gpa, bytes, ram: ram.bytes() });
        }
        // In RAM, so no end below can overflow.
        for (what, start, length) in layout::boot_structures() {
            if gpa.0 < start.0 + length && start.0 < gpa.0 + bytes {
                return Err(BootError::SegmentOverBootStructure { gpa, bytes, what });
            }
        }
        ranges.push((gpa, bytes));
    }
    ranges.sort_unstable();
    if let Some(pair) = ranges.windows(2).find(|pair| pair[0].0.0 + pair[0].1 > pair[1].0.0) {
        return Err(BootError::SegmentsOverlap(pair[0].0, pair[1].0));
    }
    let entry = kernel.entry;
    if !ranges.iter().any(|(gpa, bytes)| entry >= *gpa && entry.0 - gpa.0 < *bytes) {
        return Err(BootError::EntryOutsideSegments(entry));
    }
    Ok(())
}

/// The first address behind every segment. To be called when [`check`] has passed.
fn kernel_end(kernel: &Kernel<'_>) -> Gpa {
    kernel
        .segments
        .iter()
        .map(|segment| segment.gpa.offset(segment.mem_size))
        .max()
        .unwrap_or(layout::HIGH_MEMORY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CODE: &[u8] = &[0xf4; 32];
    const PLATFORM: Platform<'_> = Platform { vcpus: 1, mmio_windows: &[] };

    fn kernel(segments: &[(u64, u64)]) -> Kernel<'static> {
        let segments: Vec<_> = segments
            .iter()
            .map(|(gpa, mem_size)| KernelSegment { gpa: Gpa(*gpa), data: CODE, mem_size: *mem_size })
            .collect();
        Kernel {
            entry: segments.first().map_or(Gpa(0), |segment| segment.gpa),
            segments,
            protocol: Protocol::BareMetal,
        }
    }

    fn ram() -> GuestRam {
        GuestRam::new(8 << 20).unwrap()
    }

    #[test]
    fn a_segment_is_loaded_at_its_address() {
        let ram = ram();
        load(&kernel(&[(0x10_0000, 0x1000)]), &PLATFORM, &ram).unwrap();
        let mut bytes = [0xff; 40];
        ram.read(Gpa(0x10_0000), &mut bytes).unwrap();
        assert_eq!(bytes[..32], *CODE);
        assert_eq!(bytes[32..], [0; 8]);
        ram.read(layout::ACPI_TABLES, &mut bytes).unwrap();
        assert_eq!(bytes[..8], *b"RSD PTR ", "found by looking, too");
    }

    #[test]
    fn bad_segments_are_refused() {
        let ram = ram();
        let refused = |segments: &[(u64, u64)]| load(&kernel(segments), &PLATFORM, &ram).unwrap_err();
        for (gpa, bytes) in [
            (8 << 20, 0x1000),
            ((8 << 20) - 0x10, 0x20),
            (u64::MAX - 8, 0x20),
            (0x10_0000, u64::MAX),
            (3 << 30, 64),
        ] {
            assert!(matches!(refused(&[(gpa, bytes)]), BootError::SegmentOutsideRam { .. }), "{gpa:#x}");
        }
        assert!(matches!(refused(&[(0x10_0000, 8)]), BootError::SegmentTooLong { .. }));
        assert_eq!(
            refused(&[(0x10_0000, 0x2000), (0x10_1fff, 0x100)]),
            BootError::SegmentsOverlap(Gpa(0x10_0000), Gpa(0x10_1fff))
        );
        for gpa in [0x4f0, 0x7000, 0x9fff, 0x2_0000, 0x3_0000, 0xe_0000] {
            assert!(
                matches!(refused(&[(gpa, 0x100)]), BootError::SegmentOverBootStructure { .. }),
                "{gpa:#x}"
            );
        }
        load(&kernel(&[(0x10_0000, 0x1000), (0x10_1000, 0x1000)]), &PLATFORM, &ram).unwrap();
    }

    #[test]
    fn the_entry_must_be_loaded() {
        let mut outside = kernel(&[(0x10_0000, 0x1000)]);
        for entry in [0, 0xf_ffff, 0x10_1000, u64::MAX] {
            outside.entry = Gpa(entry);
            assert_eq!(load(&outside, &PLATFORM, &ram()), Err(BootError::EntryOutsideSegments(Gpa(entry))));
        }
        assert_eq!(load(&kernel(&[]), &PLATFORM, &ram()), Err(BootError::EntryOutsideSegments(Gpa(0))));
    }

    #[test]
    fn bare_metal_registers_tell_the_vcpu_its_place() {
        let regs = entry_registers(&kernel(&[(0x10_0000, 0x1000)]), 1, 2, 8 << 20);
        let expected =
            Registers { rip: 0x10_0000, rflags: 2, rdi: 1, rsi: 2, rdx: 8 << 20, ..Registers::default() };
        assert_eq!(regs, expected);
    }

    #[test]
    fn linux_starts_its_first_vcpu_alone() {
        let boot = LinuxBoot { setup_header: None, initrd: None, cmdline: "" };
        let linux = Kernel { protocol: Protocol::Linux(boot), ..kernel(&[(0x100_0000, 0x1000)]) };
        let regs = entry_registers(&linux, 0, 2, 8 << 20);
        assert_eq!((regs.rip, regs.rsi, regs.rdi), (0x100_0000, 0x7000, 0));
        assert!(starts(&linux.protocol, 0) && !starts(&linux.protocol, 1));
        assert!(starts(&Protocol::BareMetal, 1));
    }
}
