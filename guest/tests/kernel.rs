//! The parsers against a stock kernel, named by VMPROBE_TEST_KERNEL (a bzImage or vmlinux).
//!
//! The kernel's table of exported symbols is the oracle: it has names and addresses too, in plain form, and owes nothing to
//! kallsyms.

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::ops::Range;
    use std::path::PathBuf;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use guest::Guest;
    use guest::btf::Btf;
    use guest::image::{Image, ImageKind};
    use guest::place::{Note, PlaceError};
    use guest::sites::SiteKind;
    use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};
    use probe_core::Gva;
    use probe_core::plan::{self, Plan};

    fn kernel() -> Option<PathBuf> {
        let path = std::env::var_os("VMPROBE_TEST_KERNEL").filter(|path| !path.is_empty()).map(PathBuf::from);
        if path.is_none() {
            eprintln!("Skipped: VMPROBE_TEST_KERNEL does not name a kernel");
        }
        path
    }

    fn word(guest: &Guest, at: Gva) -> Option<i32> {
        guest.image.read(at, 4)?.try_into().ok().map(i32::from_le_bytes)
    }

    fn pointer(guest: &Guest, at: Gva) -> Option<Gva> {
        Some(Gva(at.0.wrapping_add_signed(i64::from(word(guest, at)?))))
    }

    fn string(guest: &Guest, at: Gva) -> Option<String> {
        let bytes = guest.image.read_up_to(at, 512)?;
        let end = bytes.iter().position(|byte| *byte == 0)?;
        String::from_utf8(bytes[..end].to_vec()).ok()
    }

    /// Names and addresses from `__ksymtab` and `__ksymtab_gpl`: entries of three self-relative words (`struct
    /// kernel_symbol` from 5.4 on).
    fn exports(guest: &Guest) -> Vec<(String, Gva)> {
        let mut exports = vec![];
        for name in ["__ksymtab", "__ksymtab_gpl"] {
            let section = guest.image.section(name).unwrap();
            for at in (0..section.size).step_by(12) {
                let entry = section.gva.offset(at);
                let name = string(guest, pointer(guest, entry.offset(4)).unwrap()).unwrap();
                exports.push((name, pointer(guest, entry).unwrap()));
            }
        }
        exports
    }

    fn decode(guest: &Guest, at: Gva) -> Instruction {
        let bytes = guest.image.read_up_to(at, 15).unwrap_or_default();
        Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode()
    }

    #[test]
    fn symbols_agree_with_the_kernels_exports() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        assert!(guest.symbols.len() > 50_000, "{}", guest.symbols.len());
        let exports = exports(&guest);
        assert!(exports.len() > 5_000, "{}", exports.len());
        for (name, gva) in &exports {
            assert!(guest.symbols.lookup(name).any(|symbol| symbol.gva == *gva), "{name} at {gva}");
        }
        eprintln!("{} exports agree with {} symbols", exports.len(), guest.symbols.len());
    }

    #[test]
    fn code_symbols_are_in_code() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let code = guest.symbols.iter().filter(|symbol| symbol.kind.0.eq_ignore_ascii_case(&'t'));
        // A symbol may mark the end of a stretch of code.
        let is_end =
            |gva: Gva| guest.image.is_code(Gva(gva.0 - 1)) || guest.image.is_code(Gva(gva.0 & !0xfff));
        let outside: Vec<_> =
            code.filter(|symbol| !guest.image.is_code(symbol.gva) && !is_end(symbol.gva)).collect();
        eprintln!("{outside:?}");
        assert!(outside.len() < 20, "{outside:?}");
        for name in ["startup_64", "vfs_read", "panic", "do_sys_openat2"] {
            let gva = guest.symbols.address(name).unwrap();
            assert!(guest.image.is_code(gva), "{name}");
        }
        let start = guest.image.section(".text").unwrap().gva;
        assert_eq!(guest.symbols.address("_text"), Some(start));
        assert_eq!(guest.symbols.address("_stext"), Some(start));
    }

    #[test]
    fn functions_decode_to_their_last_byte() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let (mut whole, mut broken) = (0, vec![]);
        for symbol in guest.symbols.iter().filter(|symbol| symbol.kind.is_code() && symbol.size > 0) {
            let Ok(size) = usize::try_from(symbol.size) else { continue };
            let Some(bytes) = guest.image.read(symbol.gva, size) else { continue };
            let mut decoder = Decoder::with_ip(64, bytes, symbol.gva.0, DecoderOptions::NONE);
            let mut valid = true;
            while decoder.can_decode() {
                valid &= !decoder.decode().is_invalid();
            }
            if valid {
                whole += 1;
            } else {
                broken.push(symbol.name);
            }
        }
        eprintln!("{whole} functions decode, {} do not: {:?}", broken.len(), &broken[..broken.len().min(20)]);
        assert!(whole > 30_000 && broken.len() * 1000 < whole, "{broken:?}");
    }

    #[test]
    fn nearly_every_instruction_can_run_out_of_its_place() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let (mut emulated, mut stepped, mut refused) = (0_u64, 0_u64, 0_u64);
        for code in guest.image.code() {
            let bytes =
                guest.image.read(code.start, usize::try_from(code.end.0 - code.start.0).unwrap()).unwrap();
            let mut decoder = Decoder::with_ip(64, bytes, code.start.0, DecoderOptions::NONE);
            while decoder.can_decode() {
                let instruction = decoder.decode();
                match (instruction.mnemonic(), plan::plan(&instruction)) {
                    // Padding between functions.
                    (Mnemonic::Int3, _) => {}
                    (_, Plan::Emulate) => emulated += 1,
                    (_, Plan::Step) => stepped += 1,
                    (_, Plan::Refuse(_)) => refused += 1,
                }
            }
        }
        eprintln!("{emulated} emulated, {stepped} out of line, {refused} refused");
        assert!(emulated > 1_000_000 && stepped > 0);
        assert!(stepped * 100 < emulated && refused * 100_000 < emulated);
    }

    /// What this thread has taken of a CPU, whatever else the machine does.
    fn cpu_time() -> Duration {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(time.tv_sec.try_into().unwrap(), time.tv_nsec.try_into().unwrap())
    }

    #[test]
    fn every_boundary_of_a_kernel_is_classified_in_less_than_five_seconds() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let started = cpu_time();
        let mut classified = 0_u64;
        for code in guest.image.code() {
            let mut at = code.start;
            while at < code.end {
                // As the engine does it when it arms: what the bytes are for every CPU, and how that runs.
                let bytes = guest.image.read_up_to(at, 15).unwrap();
                let len = match plan::decode(bytes, at, probe_core::Vendor::Unknown) {
                    Ok(instruction) => {
                        std::hint::black_box(plan::plan(&instruction));
                        instruction.len()
                    }
                    Err(_) => decode(&guest, at).len().max(1),
                };
                at = at.offset(len as u64);
                classified += 1;
            }
        }
        let engine = cpu_time() - started;

        let started = cpu_time();
        let functions = guest.matches(&"*".parse().unwrap());
        let placed = functions.iter().filter(|(_, place)| place.is_ok()).count();
        let patterns = cpu_time() - started;

        let started = cpu_time();
        let (mut places, mut refused) = (0, 0);
        for (spec, _) in &functions {
            // A name that several functions have is told by its address.
            let Ok(boundaries) = guest.boundaries(&spec.place.to_string()) else { continue };
            places += boundaries.iter().filter(|boundary| boundary.place.is_ok()).count();
            refused += boundaries.iter().filter(|boundary| boundary.place.is_err()).count();
        }
        let boundaries = cpu_time() - started;
        eprintln!(
            "CPU time: {classified} boundaries classified in {engine:.2?}; {placed} of {} functions placed in \
             {patterns:.2?}; {places} places and {refused} refusals in functions of one name in {boundaries:.2?}",
            functions.len()
        );
        assert!(classified > 2_000_000 && placed > 30_000 && places > 2_000_000);
        assert!(engine < Duration::from_secs(5) && patterns < Duration::from_secs(2));
    }

    #[test]
    fn listed_ftrace_sites_are_calls_of_fentry_or_nops() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let fentry = guest.linux.as_ref().and_then(|linux| linux.fentry).unwrap();
        let everything = guest.image.gva_range().unwrap();
        let (mut count, mut nameless) = (0, 0);
        for site in guest.sites.overlapping(everything).filter(|site| site.kind == SiteKind::Ftrace) {
            let instruction = decode(&guest, site.start);
            let is_call =
                instruction.code() == Code::Call_rel32_64 && instruction.near_branch64() == fentry.0;
            let is_nop = instruction.code() == Code::Nop_rm32 && instruction.len() == 5;
            assert!(is_call || is_nop, "{}", guest.spot(site.start));
            // Weak functions that others replace have lost their names; older kernels still list their sites.
            nameless += usize::from(
                guest.symbols.at(site.start).is_none_or(|(_, offset)| offset != 0 && offset != 4),
            );
            count += 1;
        }
        eprintln!("{count} ftrace sites, {nameless} of them in functions without a name");
        assert!(count > 20_000 && nameless * 20 < count && guest.sites.has_ftrace_table());
        assert!(guest.sites.unreadable().is_empty(), "{:?}", guest.sites.unreadable());
    }

    #[test]
    fn the_main_job_is_placed_behind_its_ftrace_site() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let fentry = guest.linux.as_ref().and_then(|linux| linux.fentry).unwrap();
        for name in ["do_sys_openat2", "__x64_sys_getppid", "vfs_read"] {
            let place = guest.place(name).unwrap();
            let call = decode(&guest, Gva(place.gva.0 - 5));
            assert_eq!((call.code(), call.near_branch64()), (Code::Call_rel32_64, fentry.0), "{name}");
            assert!(matches!(place.notes.as_slice(), [Note::BehindFtraceSite(_)]), "{:?}", place.notes);
        }
        assert_eq!(
            guest.place("do_sys_openat3").err(),
            Some(PlaceError::UnknownSymbol {
                name: "do_sys_openat3".into(),
                nearest: guest
                    .symbols
                    .nearest("do_sys_openat3", 3)
                    .iter()
                    .map(|name| (*name).to_owned())
                    .collect(),
            })
        );
        assert!(guest.symbols.nearest("do_sys_openat3", 1).contains(&"do_sys_openat2"));
        let linux = guest.linux.as_ref().unwrap();
        assert!(linux.panic.is_some() && linux.free_initmem.is_some());
        assert!(guest.place("start_kernel").unwrap().freed_after_boot);
    }

    #[test]
    fn no_function_entry_is_mistaken() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let (mut placed, mut refused) = (0, BTreeMap::<String, usize>::new());
        for listing in guest.list(None).unwrap().filter(|listing| listing.symbol.kind.is_code()) {
            match listing.probe {
                Ok(_) => placed += 1,
                Err(PlaceError::Rewritten { kind, .. }) => *refused.entry(kind.to_string()).or_default() += 1,
                Err(PlaceError::Trap { .. }) => *refused.entry("trap".into()).or_default() += 1,
                Err(PlaceError::Refused { .. }) => {
                    *refused.entry("cannot run elsewhere".into()).or_default() += 1;
                }
                // The last symbols of a section mark its end.
                Err(PlaceError::Data { .. } | PlaceError::NotMapped { .. }) => {
                    *refused.entry("end of section".into()).or_default() += 1;
                }
                Err(error) => panic!("{}: {error}", listing.symbol.name),
            }
        }
        eprintln!("{placed} placed, refused: {refused:?}");
        assert!(placed > 30_000);
    }

    #[test]
    fn reading_symbols_takes_less_than_a_second() {
        let Some(path) = kernel() else { return };
        let started = Instant::now();
        let image = Image::open(&path).unwrap();
        let opened = started.elapsed();
        assert!(image.kind.is_linux() && image.kind != ImageKind::BareMetal);
        assert!(image.version.is_some());
        let started = Instant::now();
        let guest = Guest::new(image).unwrap();
        let read = started.elapsed();
        eprintln!(
            "{} unpacked in {opened:.0?}, {} symbols and all tables read in {read:.0?}, {} KiB held",
            guest.image.version.as_deref().unwrap_or_default(),
            guest.symbols.len(),
            guest.symbols.memory() / 1024
        );
        assert!(read < Duration::from_secs(1));
    }

    #[test]
    fn the_kernels_type_information_tells_where_a_modules_members_are() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let section = guest.image.section(".BTF").unwrap().range();
        let len = usize::try_from(section.end.0 - section.start.0).unwrap();
        let btf = Btf::new(guest.image.read(section.start, len).unwrap()).unwrap();
        let module = btf.structure("module").unwrap();
        // `enum module_state state; struct list_head list; char name[]` begin every struct module.
        assert_eq!(btf.member(module, "name").map(|member| member.offset), Some(24));
        let list = btf.structure("list_head").unwrap();
        assert_eq!(
            (btf.size(list), btf.member(list, "prev").map(|member| member.offset)),
            (Some(16), Some(8))
        );
        assert!(guest.module_fields().is_some());
    }

    /// Where the instructions in `range` begin, as GNU binutils have it; `None` where there is no objdump.
    fn disassembled(guest: &Guest, range: &Range<Gva>) -> Option<BTreeSet<u64>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        let len = usize::try_from(range.end.0 - range.start.0).unwrap();
        std::fs::write(file.path(), guest.image.read(range.start, len).unwrap()).unwrap();
        let start = format!("--adjust-vma={:#x}", range.start.0);
        let output = Command::new("objdump")
            .args(["-D", "-b", "binary", "-m", "i386:x86-64", "--no-show-raw-insn", &start])
            .arg(file.path())
            .output()
            .inspect_err(|error| eprintln!("Skipped: objdump: {error}"))
            .ok()?;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout).unwrap();
        let lines = text.lines().filter_map(|line| line.split_once(":\t"));
        let starts = lines.filter_map(|(address, _)| u64::from_str_radix(address.trim(), 16).ok());
        Some(starts.collect())
    }

    #[test]
    fn insn_decoder_test_finds_the_instructions_of_a_kernel_where_objdump_does() {
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let (mut same, mut different) = (0, vec![]);
        for code in guest.image.code() {
            let Some(expected) = disassembled(&guest, code) else { return };
            for (start, end) in expected.iter().zip(expected.iter().skip(1)) {
                let instruction = decode(&guest, Gva(*start));
                // objdump takes FWAIT and the instruction behind it for one, and passes over 32-bit code byte by byte.
                let is_known = instruction.mnemonic() == Mnemonic::Wait || instruction.is_invalid();
                if instruction.next_ip() == *end {
                    same += 1;
                } else if !is_known {
                    different.push((guest.spot(Gva(*start)).to_string(), instruction.len(), end - start));
                }
            }
        }
        eprintln!(
            "{same} lengths agree, {} do not: {:#?}",
            different.len(),
            &different[..different.len().min(20)]
        );
        assert!(same > 2_000_000 && different.is_empty());
    }

    #[test]
    fn kprobe_insn_boundary_offsets_of_a_stock_function_are_places_where_instructions_begin() {
        const FUNCTION: &str = "kernel_clone";
        let Some(path) = kernel() else { return };
        let guest = Guest::open(&path).unwrap();
        let start = guest.symbols.address(FUNCTION).unwrap();
        let Some(expected) = disassembled(&guest, &(start..start.offset(0x120))) else { return };
        let mut places = 0;
        for offset in 0..256 {
            let at = start.offset(offset);
            let is_boundary = expected.contains(&at.0);
            match guest.place(&format!("{FUNCTION}+{offset}")) {
                Ok(place) => {
                    assert!(is_boundary && place.gva == at, "+{offset:#x}");
                    places += 1;
                }
                Err(PlaceError::NotBoundary { .. }) => assert!(!is_boundary, "+{offset:#x}"),
                // What the kernel rewrites is named as that, whichever byte of it was meant.
                Err(PlaceError::FtraceSite { .. } | PlaceError::Rewritten { .. }) => {}
                Err(error) => panic!("+{offset:#x}: {error}"),
            }
        }
        eprintln!("{places} places in the first 256 bytes of {FUNCTION}");
        assert!(places > 30);
    }
}
