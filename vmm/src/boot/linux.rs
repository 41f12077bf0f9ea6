//! The 64-bit Linux boot protocol: Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and zero-page.rst.
//!
//! The kernel proper is loaded by its ELF segments, so the decompressor in a bzImage never runs; only the bzImage's setup
//! header is passed on.

use linux_loader::cmdline::{Cmdline, Error as CmdlineError};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use probe_core::{Gpa, MemoryError, PAGE_SIZE, PhysicalMemory};
use vm_memory::{ByteValued, GuestAddress};

use super::{BootError, LinuxBoot};
use crate::layout;
use crate::memory::GuestRam;

/// `boot_flag` and `header` of every setup header ("HdrS").
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Protocol 2.12, the first with `xloadflags`: without those, no word about 64-bit entry.
const OLDEST_VERSION: u16 = 0x020c;
/// XLF_KERNEL_64: the kernel has a 64-bit entry.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `type_of_loader`: none of the registered ones.
const LOADER_UNDEFINED: u8 = 0xff;
/// Offset of the jump's operand in the header, which says where the header ends: 0x202 + that byte.
const HEADER_END_OFFSET: usize = 0x201 - 0x1f1;
const HEADER_END_BASE: usize = 0x202 - 0x1f1;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Fills the boot parameters, the command line and the initial ramdisk into `ram`. The kernel's segments end at
/// `kernel_end`.
pub(super) fn load(boot: &LinuxBoot<'_>, kernel_end: Gpa, ram: &GuestRam) -> Result<(), BootError> {
    let mut header = match boot.setup_header {
        Some(bytes) => parse_header(bytes)?,
        None => default_header(),
    };
    let cmdline = command_line(boot.cmdline, header.cmdline_size)?;
    ram.write(layout::CMDLINE, &cmdline)?;
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = address32(layout::CMDLINE)?;

    // The kernel may use more than its segments while it starts.
    let pref_address = header.pref_address;
    let start_end = pref_address.saturating_add(u64::from(header.init_size));
    let kernel_end = kernel_end.max(Gpa(start_end));
    (header.ramdisk_image, header.ramdisk_size) = (0, 0);
    if let Some(initrd) = boot.initrd.filter(|initrd| !initrd.is_empty()) {
        let at = place_initrd(initrd.len() as u64, kernel_end, ram.bytes(), header.initrd_addr_max)?;
        ram.write(at, initrd)?;
        header.ramdisk_image = address32(at)?;
        header.ramdisk_size = u32::try_from(initrd.len()).map_err(|_| MemoryError::NotRam(at))?;
    }

    // The guest need not look for it.
    let acpi_rsdp_addr = layout::ACPI_TABLES.0;
    let mut params = boot_params { hdr: header, acpi_rsdp_addr, ..boot_params::default() };
    let map = memory_map(ram.bytes());
    for (entry, slot) in map.iter().zip(params.e820_table.iter_mut()) {
        *slot = *entry;
        params.e820_entries += 1;
    }
    let params = BootParams::new(&params, GuestAddress(layout::BOOT_PARAMS.0));
    LinuxBootConfigurator::write_bootparams(&params, ram.backend())
        .map_err(|_| BootError::Memory(MemoryError::NotRam(layout::BOOT_PARAMS)))
}

fn address32(gpa: Gpa) -> Result<u32, MemoryError> {
    u32::try_from(gpa.0).map_err(|_| MemoryError::NotRam(gpa))
}

/// The setup header out of the bytes from offset 0x1f1 on. A kernel older than this crate's structure has a shorter header;
/// what follows it in the file is code and stays out.
fn parse_header(bytes: &[u8]) -> Result<setup_header, BootError> {
    let jump = bytes.get(HEADER_END_OFFSET).ok_or(BootError::SetupHeader("it is cut short"))?;
    let end = HEADER_END_BASE + usize::from(*jump);
    let mut header = setup_header::default();
    let length = end.min(size_of::<setup_header>());
    let bytes = bytes.get(..length).ok_or(BootError::SetupHeader("it is cut short"))?;
    header.as_mut_slice()[..length].copy_from_slice(bytes);
    let (boot_flag, magic, version, flags) =
        (header.boot_flag, header.header, header.version, header.xloadflags);
    if boot_flag != BOOT_FLAG || magic != HEADER_MAGIC {
        return Err(BootError::SetupHeader("its magic numbers are missing"));
    }
    if version < OLDEST_VERSION {
        return Err(BootError::SetupHeader("its boot protocol is older than 2.12"));
    }
    if flags & XLF_KERNEL_64 == 0 {
        return Err(BootError::SetupHeader("the kernel has no 64-bit entry"));
    }
    Ok(header)
}

/// What a vmlinux without a bzImage gets: protocol 2.15 with the limits that boot.rst gives for a missing field or that
/// x86-64 kernels have had since.
fn default_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: 0x020f,
        loadflags: 1, // LOADED_HIGH
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        xloadflags: XLF_KERNEL_64,
        cmdline_size: 2047,
        ..setup_header::default()
    }
}

/// The command line with its zero. `limit` is the header's `cmdline_size`, which does not count the zero.
fn command_line(text: &str, limit: u32) -> Result<Vec<u8>, BootError> {
    let room = usize::try_from(u64::from(limit).min(layout::CMDLINE_BYTES - 1)).unwrap_or(usize::MAX);
    let too_long = BootError::CommandLineTooLong { bytes: text.len(), limit: room };
    let mut cmdline = Cmdline::new(room + 1).map_err(|_| too_long.clone())?;
    cmdline.insert_str(text).map_err(|error| match error {
        CmdlineError::TooLarge => too_long,
        _ => BootError::CommandLineCharacter,
    })?;
    let text = cmdline.as_cstring().map_err(|_| BootError::CommandLineCharacter)?;
    Ok(text.into_bytes_with_nul())
}

/// Where an initial ramdisk of `bytes` goes: as high as possible, out of the way of a kernel that grows upwards, below the
/// header's `initrd_addr_max` (its last byte may be there) and below the hole.
fn place_initrd(bytes: u64, kernel_end: Gpa, ram_bytes: u64, addr_max: u32) -> Result<Gpa, BootError> {
    let limit = ram_bytes.min(layout::MMIO_HOLE.0).min(u64::from(addr_max) + 1);
    let at = limit.checked_sub(bytes).map(|at| Gpa(at).page()).filter(|at| *at >= kernel_end);
    at.ok_or(BootError::InitrdTooLarge { bytes, kernel_end, limit: Gpa(limit) })
}

/// The memory map (e820): RAM without the firmware area, whose ACPI tables the guest keeps as a PC's. The hole, with the slot region
/// and the devices' registers, is in none of it.
fn memory_map(ram_bytes: u64) -> Vec<boot_e820_entry> {
    let entry = |start: u64, end: u64, kind| boot_e820_entry { addr: start, size: end - start, r#type: kind };
    let mut map =
        vec![entry(0, layout::EBDA.0, E820_RAM), entry(layout::EBDA.0, layout::HIGH_MEMORY.0, E820_RESERVED)];
    for (start, bytes) in layout::ram(ram_bytes) {
        let from = start.0.max(layout::HIGH_MEMORY.0);
        map.push(entry(from, start.0 + bytes, E820_RAM));
    }
    map
}

const _: () = assert!(size_of::<boot_params>() as u64 == PAGE_SIZE);

#[cfg(test)]
mod tests {
    use super::*;

    /// A header as a bzImage has it, with code behind its end.
    fn header_bytes(change: impl FnOnce(&mut setup_header)) -> Vec<u8> {
        let mut header = default_header();
        header.jump = 0x6aeb; // jmp +0x6a: the header ends at 0x202 + 0x6a = 0x26c
        header.init_size = 0x20_0000;
        header.pref_address = 0x100_0000;
        header.handover_offset = 0x1111;
        header.kernel_info_offset = 0x2222;
        change(&mut header);
        let mut bytes = header.as_slice().to_vec();
        bytes.extend([0xcc; 64]);
        bytes
    }

    fn boot(header: &[u8]) -> (GuestRam, Result<(), BootError>) {
        let ram = GuestRam::new(64 << 20).unwrap();
        let boot = LinuxBoot {
            setup_header: Some(header),
            initrd: Some(&[7; 5000]),
            cmdline: "console=ttyS0 quiet",
        };
        let result = load(&boot, Gpa(0x180_0000), &ram);
        (ram, result)
    }

    fn params(ram: &GuestRam) -> boot_params {
        let mut params = boot_params::default();
        ram.read(layout::BOOT_PARAMS, params.as_mut_slice()).unwrap();
        params
    }

    #[test]
    fn the_zero_page_has_what_the_protocol_names() {
        let (ram, result) = boot(&header_bytes(|_| {}));
        result.unwrap();
        let params = params(&ram);
        let header = params.hdr;
        let (magic, flag, loader, cmdline) =
            (header.header, header.boot_flag, header.type_of_loader, header.cmd_line_ptr);
        assert_eq!((magic, flag, loader, cmdline), (HEADER_MAGIC, BOOT_FLAG, 0xff, 0x2_0000));
        let (image, size) = (header.ramdisk_image, header.ramdisk_size);
        assert_eq!((image, size), ((64 << 20) - 0x2000, 5000));
        let init_size = header.init_size;
        assert_eq!(init_size, 0x20_0000, "the kernel's own fields are passed on");
        let rsdp = params.acpi_rsdp_addr;
        assert_eq!(rsdp, 0xe_0000);
        let mut byte = [0];
        ram.read(Gpa(u64::from(image) + 4999), &mut byte).unwrap();
        assert_eq!(byte, [7]);
        let mut text = [0; 20];
        ram.read(layout::CMDLINE, &mut text).unwrap();
        assert_eq!(&text, b"console=ttyS0 quiet\0");
    }

    #[test]
    fn the_memory_map_leaves_firmware_hole_and_slots_out() {
        let spans = |ram_bytes| -> Vec<(u64, u64, u32)> {
            memory_map(ram_bytes)
                .iter()
                .map(|e| {
                    let (addr, size, kind) = (e.addr, e.size, e.r#type);
                    (addr, addr + size, kind)
                })
                .collect()
        };
        assert_eq!(spans(64 << 20), [(0, 0x9_fc00, 1), (0x9_fc00, 0x10_0000, 2), (0x10_0000, 64 << 20, 1)]);
        assert_eq!(spans(4 << 30)[2..], [(0x10_0000, 3 << 30, 1), (4 << 30, 5 << 30, 1)]);
        for (start, end, _) in spans(8 << 30) {
            assert!(end <= layout::SLOT_REGION.0 || start >= layout::HIGH_RAM.0);
        }
        let (ram, result) = boot(&header_bytes(|_| {}));
        result.unwrap();
        assert_eq!(params(&ram).e820_entries, 3);
    }

    #[test]
    fn bad_headers_are_refused() {
        let refused = |bytes: &[u8]| boot(bytes).1.unwrap_err();
        assert!(matches!(refused(&[]), BootError::SetupHeader(_)));
        let good = header_bytes(|_| {});
        for length in 0..0x26c - 0x1f1 {
            assert!(matches!(refused(&good[..length]), BootError::SetupHeader(_)), "{length}");
        }
        assert!(matches!(refused(&header_bytes(|h| h.header = 0)), BootError::SetupHeader(_)));
        assert!(matches!(refused(&header_bytes(|h| h.boot_flag = 0)), BootError::SetupHeader(_)));
        assert!(matches!(refused(&header_bytes(|h| h.version = 0x0205)), BootError::SetupHeader(_)));
        assert!(matches!(refused(&header_bytes(|h| h.xloadflags = 0)), BootError::SetupHeader(_)));
        assert!(matches!(refused(&[0xff; 4096]), BootError::SetupHeader(_)));
    }

    #[test]
    fn code_behind_a_short_header_stays_out() {
        // A header that ends before handover_offset.
        let bytes = header_bytes(|h| h.jump = 0x62eb);
        let header = parse_header(&bytes).unwrap();
        let (init_size, handover, info) =
            (header.init_size, header.handover_offset, header.kernel_info_offset);
        assert_eq!((init_size, handover, info), (0x20_0000, 0, 0));
    }

    #[test]
    fn the_command_line_is_limited_by_the_kernel() {
        assert_eq!(command_line("abc", 3).unwrap(), b"abc\0");
        assert_eq!(command_line("", 3).unwrap(), b"\0");
        assert_eq!(command_line("abcd", 3), Err(BootError::CommandLineTooLong { bytes: 4, limit: 3 }));
        assert_eq!(command_line("a\u{7f}b\n", 99), Err(BootError::CommandLineCharacter));
        assert_eq!(command_line("naïve", 99), Err(BootError::CommandLineCharacter));
        let long = "x".repeat(0x1_0000);
        assert!(matches!(command_line(&long, u32::MAX), Err(BootError::CommandLineTooLong { .. })));
        assert_eq!(command_line("console=x -- one two", 99).unwrap(), b"console=x -- one two\0");
    }

    #[test]
    fn the_ramdisk_is_high_but_below_every_limit() {
        let end = Gpa(32 << 20);
        assert_eq!(place_initrd(0x1800, end, 64 << 20, u32::MAX), Ok(Gpa((64 << 20) - 0x2000)));
        assert_eq!(place_initrd(0x1000, end, 8 << 30, 0x7fff_ffff), Ok(Gpa(0x7fff_f000)));
        assert_eq!(place_initrd(0x1000, end, 8 << 30, u32::MAX), Ok(Gpa(layout::MMIO_HOLE.0 - 0x1000)));
        assert_eq!(place_initrd(32 << 20, end, 64 << 20, u32::MAX), Ok(end));
        for bytes in [(32 << 20) + 1, 1 << 40, u64::MAX] {
            assert!(matches!(
                place_initrd(bytes, end, 64 << 20, u32::MAX),
                Err(BootError::InitrdTooLarge { .. })
            ));
        }
        place_initrd(1, Gpa(u64::MAX), 64 << 20, 0).unwrap_err();
    }

    #[test]
    fn start_up_memory_of_the_kernel_is_kept_free() {
        let (_, result) = boot(&header_bytes(|h| h.init_size = 0x300_0000));
        assert!(matches!(result, Err(BootError::InitrdTooLarge { kernel_end: Gpa(0x400_0000), .. })));
        let (_, result) = boot(&header_bytes(|h| h.pref_address = u64::MAX));
        assert!(matches!(result, Err(BootError::InitrdTooLarge { .. })));
    }
}
