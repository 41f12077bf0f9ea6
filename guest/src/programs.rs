//! The project's own guest programs, compiled by build.rs and embedded.

/// The demo guest: a bare-metal ELF with a full symbol table, linked and entered at 1 MiB.
///
/// Every vCPU starts at its entry in 64-bit mode at CPL 0, low memory identity-mapped, a flat GDT, no IDT, interrupts
/// off, with RDI = vCPU index, RSI = number of vCPUs (1 to 64) and RDX = bytes of RAM. It prints to the serial port at
/// 0x3f8 a banner, then one line `count NAME CALLS` per function, then `demo: ok`, and powers off by writing 0x2000 to
/// port 0x604. A wrong result is a line `demo: FAIL ...` and a reset through port 0x64; an exception that it did not
/// cause itself is a line `demo: exception ...` and a triple fault.
///
/// It runs on hosts whose KVM emulates kernel code: it holds no x87, SSE or AVX instruction.
pub const DEMO: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/demo.elf"));

/// The bench guest: a bare-metal ELF that is started as [`DEMO`] is, and times nothing itself.
///
/// Before it runs, the host writes to its symbol `schedule` pairs of 64-bit words, the address of a symbol `NAME_loop` and how
/// often it is to go round, with a zero word behind the last pair. The guest writes a byte to the serial port at 0x3f8 before
/// each pair and behind the last one, and powers off. `NAME_loop` calls the function NAME, which begins with PUSH RBP and in
/// which one instruction differs: a nop in `plain`, `emulated`, `filtered` and `returned`, a write to a port without a device
/// in `port`, and RDTSC, at the symbol `stepped_instruction`, in `stepped`.
pub const BENCH: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bench.elf"));

/// The ticker: a bare-metal ELF that is started as [`DEMO`] is, and goes on until it is stopped. Each vCPU calls `tick` with how often
/// it has called it before and its own index, for ever; vCPU 0 prints `ticker: goes on` at the first and every 10,000th time.
/// `ticks` holds how often each vCPU has called it, 64-bit words.
pub const TICKER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ticker.elf"));

/// The workload: a static Linux program to be the init process of a small initramfs, made by
/// [`initramfs::workload`](crate::initramfs::workload).
///
/// It opens and reads files, asks for its parent, makes a child that does the same, and raises #BP and #DB in user
/// mode. It prints to the console a banner with the kernel's version, then lines `count NAME CALLS` for `openat`,
/// `read`, `close`, `getppid`, `fork`, `own_int3` and `own_step`, which count every such call in the
/// whole guest, then `workload: ok`. Words on the kernel's command line: `rounds=N` (100 unless given, below ten
/// million) scales the work; `exercise=faults` gives system calls addresses that are not there, `exercise=disks` loads virtio_mmio.ko and
/// virtio_blk.ko and reads, checks and writes blocks of two disks, `exercise=modules` loads,
/// uses and unloads msr.ko twice, `exercise=tracing` uses the kernel's own
/// ftrace, kprobes (at `kprobe=PLACE`), uprobes, tracepoints and static keys, and checks what they see; `exercise=vsock` loads
/// vmw_vsock_virtio_transport.ko, exchanges messages with port 7000 of the host, and answers those that come to its port 7001; `exercise=network` loads
/// virtio_net.ko and exchanges messages over TCP with port `port=N` of 10.0.2.2;
/// `workload=` `reboot` (unless given), `poweroff`, `halt`, `panic`, `hang` (idle for ever)
/// or `loop` (busy for ever) is how the run ends. A wrong result is a line `workload: FAIL ...` and a kernel panic.
pub const WORKLOAD: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/workload.elf"));

/// The init process that runs one command in a guest, made part of an initramfs by
/// [`initramfs::add_command`](crate::initramfs::add_command): it mounts the usual file systems, runs `/vmprobe/sh /vmprobe/command`,
/// prints `vmprobe: exit code N` or `vmprobe: signal N` as the console's last line, and restarts the machine.
pub const INIT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/init.elf"));

/// The content of /known.txt, which the workload reads.
pub const WORKLOAD_FILE: &[u8] = include_bytes!("../programs/workload/known.txt");

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, InstructionInfoFactory};
    use object::elf::{PF_W, PF_X};
    use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SegmentFlags, SymbolKind};

    use super::*;

    /// What an integer program may need. KVM's emulator knows no more than this of what a compiler may use.
    const INTEGER: &[CpuidFeature] = &[
        CpuidFeature::INTEL8086,
        CpuidFeature::INTEL186,
        CpuidFeature::INTEL286,
        CpuidFeature::INTEL386,
        CpuidFeature::INTEL486,
        CpuidFeature::X64,
        CpuidFeature::CET_IBT,
        CpuidFeature::CMOV,
        CpuidFeature::CPUID,
        CpuidFeature::MSR,
        CpuidFeature::MULTIBYTENOP,
        CpuidFeature::PAUSE,
        CpuidFeature::TSC,
    ];

    fn parse(elf: &[u8]) -> object::File<'_> {
        object::File::parse(elf).unwrap()
    }

    /// Functions by name: address and size.
    fn functions(file: &object::File<'_>) -> BTreeMap<String, (u64, u64)> {
        file.symbols()
            .filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.size() > 0)
            .map(|symbol| (symbol.name().unwrap().to_owned(), (symbol.address(), symbol.size())))
            .collect()
    }

    fn decode(code: &[u8], ip: u64) -> Vec<Instruction> {
        Decoder::with_ip(64, code, ip, DecoderOptions::NONE).into_iter().collect()
    }

    /// No page is both writable and executable, and none holds two segments.
    fn check_segments(file: &object::File<'_>) {
        let mut end = 0;
        for segment in file.segments() {
            let SegmentFlags::Elf { p_flags, .. } = segment.flags() else { panic!("not an ELF segment") };
            assert_ne!(p_flags & (PF_X | PF_W), PF_X | PF_W, "segment at {:#x}", segment.address());
            assert!(segment.address() & !0xfff >= end, "segment at {:#x}", segment.address());
            end = (segment.address() + segment.size()).next_multiple_of(0x1000);
        }
    }

    #[test]
    fn demo_lies_in_low_memory_and_starts_at_its_first_byte() {
        let file = parse(DEMO);
        check_segments(&file);
        let first = file.segments().next().unwrap();
        assert_eq!(first.address(), 0x10_0000);
        assert_eq!(file.entry(), 0x10_0000);
        let end = file.segments().map(|segment| segment.address() + segment.size()).max().unwrap();
        assert!(end < 0x20_0000, "{end:#x}");
    }

    #[test]
    fn programs_for_linux_are_static_and_start_at_start() {
        for program in [WORKLOAD, INIT] {
            let file = parse(program);
            check_segments(&file);
            assert_eq!(file.entry(), functions(&file)["_start"].0);
            assert!(file.section_by_name(".interp").is_none());
            assert!(file.section_by_name(".dynamic").is_none());
            assert!(file.symbols().all(|symbol| !symbol.is_undefined() || symbol.name() == Ok("")));
        }
    }

    #[test]
    fn demo_names_its_functions() {
        let functions = functions(&parse(DEMO));
        for name in ["_start", "tick", "fib", "copy_bytes", "checksum", "own_int3", "smp_add"] {
            assert!(functions.contains_key(name), "{name}");
        }
        assert_eq!(functions["_start"].0, 0x10_0000);
        assert!(functions.keys().filter(|name| name.starts_with("fam_")).count() >= 100);
    }

    /// The names in the table that the program walks (struct Family in families.rs).
    fn demo_table(file: &object::File<'_>) -> Vec<String> {
        const ROW: usize = 11 * 8;
        let section = file.section_by_name(".rodata").unwrap();
        let address = |name| file.symbol_by_name(name).unwrap().address();
        let (start, end) = (address("families_start"), address("families_end"));
        let table = section.data_range(start, end - start).unwrap().unwrap();
        assert_eq!(table.len() % ROW, 0);
        let word = |row: &[u8], index: usize| u64::from_le_bytes(row[8 * index..][..8].try_into().unwrap());
        let name = |row| section.data_range(word(row, 0), word(row, 1)).unwrap().unwrap();
        table.chunks(ROW).map(|row| String::from_utf8(name(row).to_vec()).unwrap()).collect()
    }

    #[test]
    fn demo_calls_every_family_once_a_round() {
        let file = parse(DEMO);
        let mut table = demo_table(&file);
        table.sort();
        let families: Vec<_> = functions(&file).into_keys().filter(|name| name.starts_with("fam_")).collect();
        assert_eq!(table, families);
    }

    /// The sites that are there for their place or length still have it.
    #[test]
    fn demo_has_its_awkward_sites() {
        let file = parse(DEMO);
        let functions = functions(&file);
        let text = file.section_by_name(".text").unwrap();
        let entry = |name: &str| {
            let (address, size) = functions[name];
            decode(text.data_range(address, size).unwrap().unwrap(), address)[0]
        };
        assert_eq!(entry("fam_longest").len(), 15);
        assert_eq!(entry("fam_page_cross").ip() & 0xfff, 0xffd);
        assert_eq!(entry("fam_page_last").ip() & 0xfff, 0xfff);
        assert!(entry("fam_page_last").len() > 1);
        assert!(entry("fam_cmp_rip_imm").is_ip_rel_memory_operand());
        assert_eq!(entry("own_int3").code(), iced_x86::Code::Int3);
    }

    /// Every byte of text decodes, function by function, and none of it needs a vector or floating-point unit.
    #[test]
    fn demo_has_integer_instructions_only() {
        let file = parse(DEMO);
        let text = file.section_by_name(".text").unwrap();
        let mut info = InstructionInfoFactory::new();
        let mut next = text.address();
        let mut by_address: Vec<_> = functions(&file).into_iter().map(|(name, at)| (at, name)).collect();
        by_address.sort();
        assert!(!by_address.is_empty());
        by_address.push(((text.address() + text.size(), 0), "end".to_owned()));
        for ((start, size), name) in by_address {
            // What lies between functions is code too: entry stubs, local helpers, int3 padding.
            for (from, to) in [(next, start), (start, start + size)] {
                let Some(bytes) = text.data_range(from, to - from).unwrap() else {
                    panic!("{name} is not in .text")
                };
                for instruction in decode(bytes, from) {
                    let at = format!("{} at {:#x} in or before {name}", instruction, instruction.ip());
                    assert!(!instruction.is_invalid(), "{at}");
                    for used in info.info(&instruction).used_registers() {
                        let register = used.register();
                        assert!(
                            !register.is_vector_register()
                                && !register.is_k()
                                && !register.is_mm()
                                && !register.is_st(),
                            "{at}"
                        );
                    }
                    for feature in instruction.cpuid_features() {
                        assert!(INTEGER.contains(feature), "{at} needs {feature:?}");
                    }
                }
            }
            next = start + size;
        }
    }
}
