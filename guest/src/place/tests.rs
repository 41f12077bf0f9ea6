use proptest::prelude::*;

use super::*;
use crate::image::Image;
use crate::testing::{Elf, Kernel, RODATA, TEXT, TEXT_GPA, relative_words};

const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

fn guest(file: Vec<u8>) -> Guest {
    Guest::new(Image::parse(file).unwrap()).unwrap()
}

/// `call` from `at` to `target`.
fn call(at: u64, target: u64) -> Vec<u8> {
    let distance = i32::try_from(target.wrapping_sub(at + 5).cast_signed()).unwrap();
    [&[0xe8][..], &distance.to_le_bytes()].concat()
}

/// `push %r12; mov %rdi,%rax; pop %r12; ret`.
const BODY: [u8; 8] = [0x41, 0x54, 0x48, 0x89, 0xf8, 0x41, 0x5c, 0xc3];

/// A kernel with a function behind each kind of entry. `__fentry__` is first.
fn kernel() -> Kernel {
    let mut kernel = Kernel::default();
    let fentry = kernel.function("__fentry__", &[0xc3]);
    let traced = |kernel: &mut Kernel, name, prefix: &[u8], body: &[u8]| {
        let at = kernel.next() + prefix.len() as u64;
        kernel.function(name, &[prefix, &call(at, fentry), body].concat());
    };
    traced(&mut kernel, "traced", &[], &BODY);
    traced(&mut kernel, "traced_ibt", &ENDBR64, &BODY);
    kernel.function("plain", &BODY);
    kernel.function("plain_ibt", &[&ENDBR64[..], &BODY].concat());
    traced(&mut kernel, "twin", &[], &BODY);
    traced(&mut kernel, "twin", &[], &BODY);
    kernel
}

fn address(guest: &Guest, name: &str) -> u64 {
    guest.symbols.address(name).unwrap().0
}

fn spot(name: &str, gva: u64) -> Spot {
    Spot { gva: Gva(gva), name: Some(name.to_owned()) }
}

#[test]
fn a_plain_symbol_moves_behind_the_ftrace_site() {
    let guest = guest(kernel().build());
    for (name, offset) in [("traced", 5), ("traced_ibt", 9)] {
        let entry = address(&guest, name);
        let place = guest.place(name).unwrap();
        assert_eq!(place.gva, Gva(entry + offset));
        assert_eq!(place.gpa, Gpa(entry + offset - TEXT + TEXT_GPA));
        assert_eq!((place.symbol.as_deref(), place.offset), (Some(name), offset));
        assert_eq!(place.to_string(), format!("{name}+{offset:#x}"));
        assert_eq!(place.bytes, [0x41, 0x54]);
        assert_eq!(place.instruction.code(), Code::Push_r64);
        assert_eq!(place.function.map(|function| function.start), Some(Gva(entry)));
        let behind = spot(&format!("{name}+{offset:#x}"), entry + offset);
        assert_eq!(
            place.notes[0].to_string(),
            format!("Placed at {name}+{offset:#x} ({:#x}), behind the ftrace site", entry + offset)
        );
        assert_eq!(place.notes, [Note::BehindFtraceSite(behind)]);
    }
}

#[test]
fn an_explicit_byte_of_the_ftrace_site_is_refused() {
    let guest = guest(kernel().build());
    let (entry, ibt) = (address(&guest, "traced"), address(&guest, "traced_ibt"));
    for (text, site, behind) in [
        ("traced+0".to_owned(), entry, "traced+0x5"),
        ("traced+4".to_owned(), entry, "traced+0x5"),
        (format!("{entry:#x}"), entry, "traced+0x5"),
        (format!("{:#x}", entry + 1), entry, "traced+0x5"),
        ("traced_ibt+4".to_owned(), ibt + 4, "traced_ibt+0x9"),
    ] {
        match guest.place(&text) {
            Err(PlaceError::FtraceSite { site: found, behind: found_behind, .. }) => {
                assert_eq!((found, found_behind), (Gva(site), spot(behind, site + 5)), "{text}");
            }
            other => panic!("{text}: {other:?}"),
        }
    }
    // The endbr64 before the site is not part of it.
    assert_eq!(guest.place("traced_ibt+0").unwrap().gva, Gva(ibt));
    assert_eq!(guest.place("traced+5").unwrap().notes, []);
}

#[test]
fn a_nop_is_an_ftrace_site_only_where_the_kernel_lists_it_or_lists_none() {
    let nop = [&NOP5[..], &BODY].concat();
    let mut kernel = kernel();
    let listed = kernel.function("listed", &nop);
    kernel.function("unlisted", &nop);
    let without_table = guest(kernel.build());
    assert_eq!(without_table.place("listed").unwrap().offset, 5);
    assert_eq!(without_table.place("unlisted").unwrap().offset, 5);
    kernel.table("__mcount_loc", |_| listed.to_le_bytes().to_vec());
    let with_table = guest(kernel.build());
    assert_eq!(with_table.place("listed").unwrap().offset, 5);
    assert_eq!(with_table.place("unlisted").unwrap().offset, 0);
    // A call of __fentry__ is a site whether it is listed or not.
    assert_eq!(with_table.place("traced").unwrap().offset, 5);
}

#[test]
fn a_function_without_an_ftrace_site_is_probed_at_its_entry() {
    let guest = guest(kernel().build());
    for name in ["plain", "plain_ibt", "__fentry__"] {
        let place = guest.place(name).unwrap();
        assert_eq!((place.gva.0, place.offset, place.notes.len()), (address(&guest, name), 0, 0));
        assert_eq!(place.to_string(), name);
    }
}

#[test]
fn an_unknown_symbol_comes_with_the_nearest() {
    let guest = guest(kernel().build());
    let error = guest.place("tarced").unwrap_err();
    assert_eq!(error, PlaceError::UnknownSymbol { name: "tarced".into(), nearest: vec!["traced".into()] });
    assert_eq!(error.to_string(), "There is no symbol \"tarced\" in the image; did you mean traced?");
    let error = guest.place("nothing_like_it").unwrap_err();
    assert!(error.to_string().contains("vmprobe symbols"), "{error}");
}

#[test]
fn kprobe_non_uniq_symbol_is_refused_with_its_addresses() {
    let guest = guest(kernel().build());
    let addresses: Vec<Gva> = guest.symbols.lookup("twin").map(|symbol| symbol.gva).collect();
    assert_eq!(addresses.len(), 2);
    let error = guest.place("twin").unwrap_err();
    assert!(error.to_string().ends_with(&format!("{}, {}", addresses[0], addresses[1])));
    assert_eq!(error, PlaceError::Ambiguous { name: "twin".into(), addresses: addresses.clone() });
    assert!(matches!(guest.place("twin+5"), Err(PlaceError::Ambiguous { .. })));
    assert_eq!(guest.place(&format!("{:#x}", addresses[1].0 + 5)).unwrap().to_string(), "twin+0x5");
}

#[test]
fn data_of_the_same_name_does_not_make_a_function_ambiguous() {
    let mut kernel = kernel();
    let plain = address(&guest(kernel.build()), "plain");
    kernel.symbol("dplain", RODATA + 8);
    // Nor does a second symbol at the same address.
    kernel.symbol("tplain", plain);
    let guest = guest(kernel.build());
    assert_eq!(guest.symbols.lookup("plain").count(), 3);
    assert_eq!(guest.place("plain").unwrap().gva, Gva(plain));
}

#[test]
fn probepoint_an_offset_beyond_the_function_names_what_is_there() {
    let guest = guest(kernel().build());
    let error = guest.place("plain+0x10").unwrap_err();
    let there = Some(spot("plain_ibt", address(&guest, "plain_ibt")));
    assert_eq!(error, PlaceError::BeyondSymbol { name: "plain".into(), offset: 0x10, size: 0x10, there });
    assert!(matches!(guest.place("plain+0xffffffffffffffff"), Err(PlaceError::BeyondSymbol { .. })));
}

#[test]
fn what_is_not_mapped_is_told_from_what_is_data() {
    let guest = guest(kernel().build());
    for text in ["0", "0x1000", "0xffffffffffffffff", "0xffffffff81800000"] {
        let error = guest.place(text).unwrap_err();
        assert!(matches!(error, PlaceError::NotMapped { .. }), "{text}: {error}");
    }
    for text in
        [format!("{RODATA:#x}"), "linux_banner".into(), "linux_banner+1".into(), "percpu_counter".into()]
    {
        let error = guest.place(&text).unwrap_err();
        assert!(matches!(error, PlaceError::Data { .. }), "{text}: {error}");
    }
    assert_eq!(
        guest.place("linux_banner+1").unwrap_err().to_string(),
        "linux_banner+0x1 (0xffffffff82000001) is data, not code; probe a function"
    );
}

#[test]
fn amid_an_instruction_the_instructions_around_are_named() {
    let guest = guest(kernel().build());
    let entry = address(&guest, "plain");
    let error = guest.place("plain+3").unwrap_err();
    let nearest =
        Nearest { before: Some(spot("plain+0x2", entry + 2)), behind: Some(spot("plain+0x5", entry + 5)) };
    assert_eq!(error, PlaceError::NotBoundary { spot: spot("plain+0x3", entry + 3), nearest });
    for (offset, is_boundary) in [true, false, true, false, false, true, false, true].into_iter().enumerate()
    {
        assert_eq!(guest.place(&format!("{:#x}", entry + offset as u64)).is_ok(), is_boundary, "{offset}");
    }
}

#[test]
fn what_is_no_instruction_is_refused() {
    let mut kernel = kernel();
    // 0x06 is no instruction in 64-bit mode.
    let entry = kernel.function("broken", &[0x90, 0x06, 0x90]);
    let guest = guest(kernel.build());
    guest.place("broken").unwrap();
    for offset in [1, 2] {
        let error = guest.place(&format!("broken+{offset}")).unwrap_err();
        let spot = spot(&format!("broken+{offset:#x}"), entry + offset);
        assert_eq!(error, PlaceError::Undecodable { spot, at: Gva(entry + 1) });
    }
}

#[test]
fn what_the_kernel_rewrites_is_refused_with_the_places_around_it() {
    let mut kernel = kernel();
    // Between two instructions: a jump of five bytes, listed; behind the return: padding.
    let code = [&[0x41, 0x54][..], &[0xe9, 0, 0, 0, 0], &[0x58, 0xc3, 0x90, 0x90]].concat();
    let entry = kernel.function("patched", &code);
    kernel.table(".retpoline_sites", |at| relative_words(at, &[entry + 2]));
    kernel.table(".return_sites", |at| relative_words(at, &[entry + 8]));
    let guest = guest(kernel.build());
    let error = guest.place("patched+2").unwrap_err();
    let nearest =
        Nearest { before: Some(spot("patched", entry)), behind: Some(spot("patched+0x7", entry + 7)) };
    assert_eq!(
        error,
        PlaceError::Rewritten {
            spot: spot("patched+0x2", entry + 2),
            kind: SiteKind::Retpoline,
            start: Gva(entry + 2),
            end: Gva(entry + 7),
            nearest,
        }
    );
    match guest.place("patched+8") {
        Err(PlaceError::Rewritten { kind: SiteKind::Return, nearest, .. }) => {
            assert_eq!(nearest.before, Some(spot("patched+0x7", entry + 7)));
            assert_eq!(nearest.behind, None, "padding is no place");
        }
        other => panic!("{other:?}"),
    }
    guest.place("patched").unwrap();
    guest.place("patched+7").unwrap();
}

#[test]
fn an_instruction_that_reaches_into_a_rewritten_place_is_refused() {
    let mut kernel = kernel();
    let entry = kernel.function("f", &BODY);
    kernel
        .table(".altinstructions", |at| [relative_words(at, &[entry + 4, entry]), vec![1, 0, 1, 0]].concat());
    let guest = guest(kernel.build());
    assert!(matches!(guest.place("f+2"), Err(PlaceError::Rewritten { kind: SiteKind::Alternative, .. })));
}

#[test]
fn the_entry_of_a_traced_function_is_offered_as_a_byte() {
    let mut kernel = kernel();
    let fentry = TEXT;
    let at = kernel.next() + 4;
    // endbr64; call __fentry__; jmp return thunk
    let code = [&ENDBR64[..], &call(at, fentry), &[0xe9, 0, 0, 0, 0]].concat();
    let entry = kernel.function("empty", &code);
    kernel.table(".return_sites", |at| relative_words(at, &[entry + 9]));
    kernel.table("__mcount_loc", |_| (entry + 4).to_le_bytes().to_vec());
    let guest = guest(kernel.build());
    match guest.place("empty") {
        Err(PlaceError::Rewritten { kind: SiteKind::Return, nearest, .. }) => {
            assert_eq!(nearest, Nearest { before: Some(spot("empty+0", entry)), behind: None });
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(guest.place("empty+0").unwrap().gva, Gva(entry));
}

#[test]
fn a_static_call_trampoline_is_refused() {
    let mut kernel = kernel();
    kernel.function("__SCT__f", &[0xe9, 0, 0, 0, 0, 0x0f, 0xb9, 0xcc]);
    let guest = guest(kernel.build());
    assert!(matches!(guest.place("__SCT__f"), Err(PlaceError::Rewritten { kind: SiteKind::StaticCall, .. })));
}

#[test]
fn a_rewrite_that_keeps_the_meaning_is_a_note() {
    let mut kernel = kernel();
    let locked = kernel.function("locked", &[0xf0, 0xff, 0x07, 0xc3]);
    let sealed = kernel.function("sealed", &[&ENDBR64[..], &[0xc3]].concat());
    kernel.table(".smp_locks", |at| relative_words(at, &[locked]));
    kernel.table(".ibt_endbr_seal", |at| relative_words(at, &[sealed]));
    let guest = guest(kernel.build());
    assert_eq!(guest.place("locked").unwrap().notes, [Note::Rewritten(SiteKind::LockPrefix)]);
    assert_eq!(guest.place("sealed").unwrap().notes, [Note::Rewritten(SiteKind::Endbr)]);
}

#[test]
fn traps_and_what_cannot_run_elsewhere_are_refused_with_the_places_around_them() {
    let mut kernel = kernel();
    let entry = kernel.function("bug", &[0x90, 0x0f, 0x0b, 0xcc, 0x90]);
    let guest = guest(kernel.build());
    match guest.place("bug+1") {
        Err(PlaceError::Trap { nearest, .. }) => {
            assert_eq!(nearest.before, Some(spot("bug", entry)));
            assert_eq!(nearest.behind, Some(spot("bug+0x4", entry + 4)));
        }
        other => panic!("{other:?}"),
    }
    match guest.place("bug+3") {
        Err(error @ PlaceError::Refused { .. }) => {
            let text = error.to_string();
            assert!(
                text.starts_with("bug+0x3 (")
                    && text.contains("`int3`: it is a breakpoint of the guest's own"),
                "{text}"
            );
            assert!(text.ends_with(&format!(
                "the nearest places are bug ({entry:#x}) and bug+0x4 ({:#x})",
                entry + 4
            )));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_return_probe_stands_on_a_function_and_nowhere_else() {
    let guest = guest(kernel().build());
    let traced = address(&guest, "traced");
    for text in ["traced%return", "r traced", "r5:mine traced+0", &format!("{traced:#x}%return")] {
        let place = guest.place(text).unwrap();
        assert_eq!((place.gva, place.at_entry), (Gva(traced + 5), true), "{text}");
    }
    let error = guest.place(&format!("{:#x}%return", traced + 7)).unwrap_err();
    let function = Some(spot("traced", traced));
    assert_eq!(error, PlaceError::NotAnEntry { spot: spot("traced+0x7", traced + 7), function });
}

#[test]
fn arguments_are_known_at_the_entry_and_behind_what_stands_before_it() {
    let guest = guest(kernel().build());
    for text in ["traced $arg1", "traced+5 $arg1", "traced_ibt+9 $arg7", "plain_ibt+4 $arg1", "traced+7 %di"]
    {
        guest.place(text).unwrap();
    }
    for text in ["traced+7 $arg1", "plain_ibt+6 a=%di b=$arg2"] {
        let error = guest.place(text).unwrap_err();
        assert!(matches!(error, PlaceError::ArgumentsInside { .. }), "{text}: {error}");
    }
}

#[test]
fn modules_and_patterns_are_no_single_place() {
    let guest = guest(kernel().build());
    let error = guest.place("ext4:ext4_sync_file").unwrap_err();
    assert_eq!(
        error.to_string(),
        "\"ext4_sync_file\" of the module \"ext4\" is only found when the guest loads the module: 'vmprobe run' of a Linux \
         guest arms it then"
    );
    assert_eq!(guest.place("traced*"), Err(PlaceError::Pattern { pattern: "traced*".into() }));
}

#[test]
fn memory_is_watched_where_a_debug_register_can() {
    let guest = guest(kernel().build());
    let target = |text: &str| guest.target(&text.parse().unwrap());
    let watched =
        |name: &str, gva, access, len| Ok(Target::Data(Watched { spot: spot(name, gva), access, len }));
    assert_eq!(target("w w@linux_banner"), watched("linux_banner", RODATA, Access::Write, 4));
    assert_eq!(target("w @linux_banner+8:8"), watched("linux_banner+0x8", RODATA + 8, Access::ReadWrite, 8));
    let plain = address(&guest, "plain");
    assert_eq!(target("w x@plain+2"), watched("plain+0x2", plain + 2, Access::Execute, 1));
    // Not in the image, and no name covers it.
    let heap =
        Watched { spot: Spot { gva: Gva(0xffff_8880_0000_1000), name: None }, access: Access::Write, len: 4 };
    assert_eq!(target("w w@0xffff888000001000"), Ok(Target::Data(heap)));
    for (text, expected) in [
        ("w r@linux_banner", "x86 cannot watch reads alone"),
        ("w w@linux_banner+2", "linux_banner+0x2 (0xffffffff82000002) is not a multiple of 4"),
        ("w w@percpu_counter", "percpu_counter"),
        ("w w@0x7fff000000000000", "0x7fff000000000000 is not a canonical address"),
        ("w w@linux_baner", "did you mean linux_banner?"),
    ] {
        let error = target(text).unwrap_err().to_string();
        assert!(error.contains(expected), "{text}: {error}");
    }
    assert!(matches!(guest.place("w w@linux_banner"), Err(PlaceError::Watchpoint { .. })));
}

#[test]
fn exceptions_freed_code_and_call_thunks_are_told() {
    let mut kernel = kernel();
    let faulting = kernel.function("faulting", &[0x8b, 0x07, 0x90, 0xc3]);
    let early = kernel.function("early", &BODY);
    let calling = kernel.function("calling", &[0xe8, 0, 0, 0, 0, 0xc3]);
    kernel.symbol("T__init_begin", early);
    kernel.symbol("T__init_end", calling);
    kernel.table("__ex_table", |at| relative_words(at, &[faulting, faulting + 2]));
    kernel.table(".call_sites", |at| relative_words(at, &[calling]));
    let guest = guest(kernel.build());
    let place = guest.place("faulting").unwrap();
    assert!(place.has_exception_entry && !place.freed_after_boot);
    assert!(!guest.place("faulting+2").unwrap().has_exception_entry);
    let place = guest.place("early").unwrap();
    assert!(place.freed_after_boot);
    assert_eq!(place.notes, [Note::FreedAfterBoot]);
    let place = guest.place("calling").unwrap();
    assert!(!place.freed_after_boot);
    assert_eq!(place.notes, [Note::CallThunk]);
}

#[test]
fn a_bare_metal_program_is_probed_by_its_elf_symbols() {
    let elf = Elf::bare_metal(0x10_0000, &[&BODY[..], &NOP5, &[0xc3]].concat())
        .section(".text", crate::testing::SHF_EXECINSTR, 0x10_0000, 14)
        .function("start", 0x10_0000, 8)
        .function("tick", 0x10_0008, 6);
    let guest = guest(elf.build());
    assert_eq!(guest.symbol_source, crate::SymbolSource::Elf);
    assert!(guest.linux.is_none());
    // Only a Linux kernel has ftrace sites; here it is a nop like any other.
    let place = guest.place("tick").unwrap();
    assert_eq!((place.gva, place.gpa, place.offset), (Gva(0x10_0008), Gpa(0x10_0008), 0));
    assert_eq!(place.function, Some(Gva(0x10_0008)..Gva(0x10_000e)));
    assert_eq!(guest.place("start+2").unwrap().to_string(), "start+0x2");
}

#[test]
fn without_symbols_an_address_is_believed_and_a_name_is_not() {
    let guest = guest(Elf::bare_metal(0x10_0000, &BODY).build());
    assert_eq!(guest.symbol_source, crate::SymbolSource::None);
    let place = guest.place("0x100002").unwrap();
    assert_eq!((place.symbol.as_deref(), place.function.as_ref()), (None, None));
    assert_eq!(place.notes, [Note::UncheckedBoundary]);
    assert_eq!(place.to_string(), "0x100002");
    assert_eq!(guest.place("tick"), Err(PlaceError::NoSymbols { name: "tick".into() }));
}

#[test]
fn an_instruction_cut_off_by_the_end_of_the_code_is_refused() {
    let guest = guest(Elf::bare_metal(0x10_0000, &[0x90, 0xe9, 0, 0]).build());
    guest.place("0x100000").unwrap();
    assert!(matches!(guest.place("0x100001"), Err(PlaceError::Undecodable { .. })));
}

#[test]
fn the_list_tells_where_a_probe_would_be_and_why_not() {
    let guest = guest(kernel().build());
    let list = |pattern: &str| -> Vec<_> {
        let listing = guest.list(Some(pattern)).unwrap();
        listing.map(|entry| (entry.symbol.name.to_owned(), entry.same_name, entry.probe.is_ok())).collect()
    };
    assert_eq!(list("traced*"), [("traced".into(), 1, true), ("traced_ibt".into(), 1, true)]);
    assert_eq!(list("t?in"), [("twin".into(), 2, true), ("twin".into(), 2, true)]);
    assert_eq!(list("[!a-z]*banner"), []);
    assert_eq!(list("linux_banner"), [("linux_banner".into(), 1, false)]);
    assert_eq!(guest.list(None).unwrap().count(), guest.symbols.len());
    let traced = guest.list(Some("traced")).unwrap().next().unwrap();
    assert_eq!(traced.probe, Ok(Gva(traced.symbol.gva.0 + 5)));
    let error = guest.list(Some("a[b")).err().unwrap();
    assert!(error.to_string().starts_with("The pattern \"a[b\" is wrong at character 2: "), "{error}");
}

#[test]
fn the_boundaries_of_a_function_are_the_places_that_are_found_one_by_one() {
    let mut kernel = kernel();
    let code = [&[0x41, 0x54][..], &[0xe9, 0, 0, 0, 0], &[0x0f, 0x0b, 0xc3, 0x90]].concat();
    let entry = kernel.function("mixed", &code);
    kernel.table(".retpoline_sites", |at| relative_words(at, &[entry + 2]));
    let guest = guest(kernel.build());
    for name in ["traced", "traced_ibt", "plain", "mixed"] {
        let boundaries = guest.boundaries(name).unwrap();
        let entry = address(&guest, name);
        let mut next = entry;
        for boundary in &boundaries {
            let gva = boundary.spot.gva;
            assert_eq!(gva.0, next, "{name}");
            next += boundary.instruction.len() as u64;
            assert_eq!(boundary.place, guest.place(&format!("{gva:#x}")), "{}", boundary.spot);
        }
        // The function without what fills the space behind it: the last instruction is its return.
        let last = &boundaries.last().unwrap().instruction;
        assert_eq!(last.mnemonic(), Mnemonic::Ret, "{name}");
    }
    assert!(matches!(guest.boundaries("twin"), Err(PlaceError::Ambiguous { .. })));
    assert!(matches!(guest.boundaries("linux_banner"), Err(PlaceError::Data { .. })));
}

#[test]
fn a_pattern_stands_for_every_function_once_and_says_which_cannot_be_probed() {
    let mut kernel = kernel();
    let bug = kernel.function("trapped", &[0x0f, 0x0b]);
    let plain = address(&guest(kernel.build()), "plain");
    kernel.symbol("tplain_alias", plain);
    let guest = guest(kernel.build());
    let found = |text: &str| -> Vec<_> {
        let matches = guest.matches(&text.parse().unwrap());
        matches
            .into_iter()
            .map(|(spec, place)| (spec.to_string(), place.map(|place| place.to_string())))
            .collect()
    };
    assert_eq!(
        found("tra*"),
        [
            ("traced".into(), Ok("traced+0x5".into())),
            ("traced_ibt".into(), Ok("traced_ibt+0x9".into())),
            (
                "trapped".into(),
                Err(PlaceError::Trap { spot: spot("trapped", bug), nearest: Nearest::default() })
            ),
        ]
    );
    // Two functions of one name are two places; two names of one function are one.
    assert_eq!(found("twi[m-n]").len(), 2);
    assert_eq!(found("plain*").len(), 2);
    assert_eq!(found("r9:mine plain").len(), 0, "no pattern");
    assert_eq!(found("r9:mine plain_i*"), [("r9:mine plain_ibt".into(), Ok("plain_ibt".into()))]);
    assert_eq!(found("nothing*"), []);
    // Data is no function.
    assert_eq!(found("linux_*"), []);
    // An offset is looked for in every one of them.
    let at = found("plain*+2");
    assert_eq!(at[0], ("plain+0x2".into(), Ok("plain+0x2".into())));
    assert!(matches!(at[1].1, Err(PlaceError::NotBoundary { .. })));
}

proptest! {
    /// Any code, any address in it: a place is where an instruction begins when the function is decoded.
    #[test]
    fn places_are_boundaries(code in proptest::collection::vec(any::<u8>(), 1..64), offset in 0u64..64) {
        let mut kernel = kernel();
        let entry = kernel.function("random", &code);
        let guest = guest(kernel.build());
        if let Ok(place) = guest.place(&format!("random+{offset}")) {
            prop_assert_eq!(place.gva, Gva(entry + offset));
            let bytes = guest.image.read(Gva(entry), usize::try_from(offset).unwrap()).unwrap();
            let decoder = Decoder::with_ip(64, bytes, entry, DecoderOptions::NONE);
            let lengths: u64 = decoder.into_iter().map(|instruction| instruction.len() as u64).sum();
            prop_assert_eq!(lengths, offset);
            prop_assert_eq!(place.bytes.len(), place.instruction.len());
        }
    }
}
