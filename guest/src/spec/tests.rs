use probe_core::fetch::RegisterName;
use proptest::prelude::*;

use super::*;

fn symbol(name: &str, offset: Option<u64>) -> Location {
    Location::Symbol { module: None, name: name.to_owned(), offset }
}

fn parsed(text: &str) -> Spec {
    text.parse().unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

fn named(group: Option<&str>, event: Option<&str>) -> Option<EventName> {
    Some(EventName { group: group.map(str::to_owned), event: event.map(str::to_owned) })
}

fn fetches(text: &str) -> Vec<(String, Fetch)> {
    parsed(text).fetches.into_iter().map(|argument| (argument.name, argument.fetch)).collect()
}

/// The error of `text`, where a caret in it marks the column that the error must name.
fn error(text: &str) -> &'static str {
    let column = text.find('^').expect("a caret");
    let without = text.replacen('^', "", 1);
    match without.parse::<Spec>() {
        Err(error) => {
            assert_eq!(error.column, column, "{error}");
            error.kind.name()
        }
        Ok(spec) => panic!("{without:?} is {spec:?}"),
    }
}

#[test]
fn addresses_symbols_and_offsets_are_understood() {
    for (text, place) in [
        ("0xffffffff8134a355", Location::Address(Gva(0xffff_ffff_8134_a355))),
        ("0XFF", Location::Address(Gva(0xff))),
        ("4096", Location::Address(Gva(4096))),
        ("0", Location::Address(Gva(0))),
        ("vfs_read", symbol("vfs_read", None)),
        (" vfs_read ", symbol("vfs_read", None)),
        ("vfs_read+0", symbol("vfs_read", Some(0))),
        ("vfs_read+0x1b", symbol("vfs_read", Some(0x1b))),
        ("vfs_read+27", symbol("vfs_read", Some(27))),
        ("vfs_read+033", symbol("vfs_read", Some(27))),
        ("tcp_check.isra.0", symbol("tcp_check.isra.0", None)),
        ("_ZN5guest4main17h0123456789abcdefE", symbol("_ZN5guest4main17h0123456789abcdefE", None)),
        ("_RNvC6_$LT$x", symbol("_RNvC6_$LT$x", None)),
        ("p", symbol("p", None)),
        ("r8169_open", symbol("r8169_open", None)),
        ("vfs_*", symbol("vfs_*", None)),
        ("[a-f]?s_*", symbol("[a-f]?s_*", None)),
        (
            "ext4:ext4_sync_file+4",
            Location::Symbol { module: Some("ext4".into()), name: "ext4_sync_file".into(), offset: Some(4) },
        ),
        (
            "e1000:e1000_open",
            Location::Symbol { module: Some("e1000".into()), name: "e1000_open".into(), offset: None },
        ),
    ] {
        assert_eq!(parsed(text), Spec::at(place), "{text:?}");
    }
}

#[test]
fn kretprobe_return_suffix_is_one_of_three_ways_to_write_a_return_probe() {
    let spec = Spec { kind: Kind::Return { maxactive: None }, ..Spec::at(symbol("vfs_read", None)) };
    for text in ["vfs_read%return", "vfs_read+0%return", "p vfs_read%return", "r vfs_read", "r vfs_read+0"] {
        assert_eq!(parsed(text), spec, "{text}");
    }
    assert_eq!(parsed("f vfs_read%return"), spec);
    assert_eq!(parsed("r0 vfs_read"), spec);
    let many = Spec { kind: Kind::Return { maxactive: Some(4096) }, ..spec };
    assert_eq!(parsed("r4096 vfs_read"), many);
}

#[test]
fn kprobe_eventname_is_the_one_given_or_the_kernels() {
    assert_eq!(parsed("p:mine vfs_read").name, named(None, Some("mine")));
    assert_eq!(parsed("p:grp/mine vfs_read").name, named(Some("grp"), Some("mine")));
    assert_eq!(parsed("r5:grp.mine vfs_read").name, named(Some("grp"), Some("mine")));
    assert_eq!(parsed("f:grp/ vfs_read").name, named(Some("grp"), None));
    for (text, group, event) in [
        ("vfs_read", "kprobes", "p_vfs_read_0"),
        ("vfs_read+0x1b", "kprobes", "p_vfs_read_27"),
        ("vfs_read%return", "kprobes", "r_vfs_read_0"),
        ("tcp_check.isra.0", "kprobes", "p_tcp_check_isra_0_0"),
        ("ext4:ext4_sync_file", "kprobes", "p_ext4_ext4_sync_file_0"),
        ("0xffffffff81000000", "kprobes", "p_0xffffffff81000000"),
        ("p:grp/ vfs_read", "grp", "p_vfs_read_0"),
        ("p:mine vfs_read", "kprobes", "mine"),
        ("w w@jiffies", "wprobes", "w_jiffies_0"),
    ] {
        let spec = parsed(text);
        assert_eq!((spec.group(), spec.event().as_str()), (group, event), "{text}");
    }
}

#[test]
fn watchpoints_have_an_access_and_a_length() {
    for (text, access, len, place) in [
        ("w w@jiffies", Access::Write, 4, symbol("jiffies", None)),
        ("w @jiffies", Access::ReadWrite, 4, symbol("jiffies", None)),
        ("w:mine rw@jiffies+4:8", Access::ReadWrite, 8, symbol("jiffies", Some(4))),
        ("w r@0xffffffff82000000:1", Access::Read, 1, Location::Address(Gva(0xffff_ffff_8200_0000))),
        ("w x@vfs_read", Access::Execute, 1, symbol("vfs_read", None)),
        ("w x@vfs_read:1", Access::Execute, 1, symbol("vfs_read", None)),
    ] {
        let spec = parsed(text);
        assert_eq!((spec.kind, spec.place), (Kind::Watch { access, len }, place), "{text}");
    }
}

#[test]
fn kprobe_args_syntax_has_registers_arguments_and_stack_words() {
    let expected = [
        ("fd", Fetch::Argument(1)),
        ("arg2", Fetch::Register(RegisterName::Di)),
        ("arg3", Fetch::Register(RegisterName::Di)),
        ("sp", Fetch::StackAddress),
        ("word", Fetch::StackWord(12)),
        ("arg6", Fetch::Argument(9)),
    ];
    let text = "vfs_read fd=$arg1 %di %rdi sp=$stack:x64 word=$stack12 $arg9";
    assert_eq!(fetches(text), expected.map(|(name, fetch)| (name.to_owned(), fetch)));
    let returned = [("ret".to_owned(), Fetch::ReturnValue), ("fd".to_owned(), Fetch::Argument(1))];
    assert_eq!(fetches("r vfs_read ret=$retval fd=$arg1"), returned);
}

#[test]
fn kprobe_syntax_errors_have_the_kernels_names_and_columns() {
    // tools/testing/selftests/ftrace/test.d/kprobe/kprobe_syntax_errors.tc restated, and what goes beyond it.
    let long = "1234567890".repeat(7);
    for (text, name) in [
        ("p^100 vfs_read", "BAD_MAXACT_TYPE"),
        ("r^1a111 vfs_read", "BAD_MAXACT"),
        ("r^100000 vfs_read", "MAXACT_TOO_BIG"),
        ("r^4097 vfs_read", "MAXACT_TOO_BIG"),
        ("p ^hoge-fuga", "BAD_PROBE_ADDR"),
        ("p ^hoge+1000-1000", "BAD_PROBE_ADDR"),
        ("^hoge-fuga", "BAD_PROBE_ADDR"),
        ("p vfs_read^%hoge", "BAD_ADDR_SUFFIX"),
        ("r ^vfs_read+10", "BAD_RETPROBE"),
        ("p ^vfs_read+10%return", "BAD_RETPROBE"),
        ("^vfs_read+10%return", "BAD_RETPROBE"),
        ("p:^/bar vfs_read", "NO_GROUP_NAME"),
        (&format!("p:^g{long}/bar vfs_read"), "GROUP_TOO_LONG"),
        ("p:^foo.1/bar vfs_read", "BAD_GROUP_NAME"),
        ("p:^ vfs_read", "NO_EVENT_NAME"),
        (&format!("p:foo/^e{long} vfs_read"), "EVENT_TOO_LONG"),
        ("p:foo/^bar.1 vfs_read", "BAD_EVENT_NAME"),
        ("p vfs_read ^$retval", "RETVAL_ON_PROBE"),
        ("p vfs_read ^$stack10000", "BAD_STACK_NUM"),
        ("p vfs_read ^$arg10000", "BAD_ARG_NUM"),
        ("p vfs_read ^$arg0", "BAD_ARG_NUM"),
        ("p vfs_read ^$none_var", "BAD_VAR"),
        ("p vfs_read ^$arg+1", "BAD_VAR"),
        ("p vfs_read a=^%none_reg", "BAD_REG_NAME"),
        ("p vfs_read ^&1", "BAD_FETCH_ARG"),
        ("p vfs_read ^arg123456789012345678901234567890=%ax", "ARG_NAME_TOO_LONG"),
        ("p vfs_read ^=%ax", "NO_ARG_NAME"),
        ("p vfs_read ^var.1=%ax", "BAD_ARG_NAME"),
        ("p vfs_read var1=%ax ^var1=%bx", "USED_ARG_NAME"),
        ("p vfs_read arg2=%ax ^%bx", "USED_ARG_NAME"),
        ("p vfs_read ^+1234567(+1234567(+1234567(+1234567(+1234567(+1234567(@1234))))))", "ARG_TOO_LONG"),
        ("p vfs_read arg1=^", "NO_ARG_BODY"),
        ("w ^jiffies", "BAD_ACCESS_FMT"),
        ("w ^q@jiffies", "BAD_ACCESS_TYPE"),
        ("w w@jiffies:^3", "BAD_ACCESS_LEN"),
        ("w w@jiffies:^", "BAD_ACCESS_LEN"),
        ("w x@vfs_read:^8", "BAD_ACCESS_LEN"),
    ] {
        assert_eq!(error(text), name, "{text}");
    }
    assert_eq!("".parse::<Spec>().unwrap_err().kind, SpecErrorKind::Empty);
    assert_eq!(" \t".parse::<Spec>().unwrap_err().kind, SpecErrorKind::Empty);
    for (text, name) in [("p:mine^", "NO_PLACE"), ("w^3 w@jiffies", "BAD_MAXACT_TYPE")] {
        assert_eq!(error(text), name);
    }
}

#[test]
fn what_the_kernel_has_and_vmprobe_has_not_is_named() {
    for text in [
        "^-:mine",
        "^t:mine sched_switch",
        "^e:mine syscalls.sys_enter_openat",
        "vfs_read ^@jiffies",
        "vfs_read+5 file=^+0($arg2):ustring",
        "vfs_read ^-8(%sp)",
        "vfs_read c=^$comm",
        "vfs_read ^$arg*",
        "vfs_read ^%cs",
        "vfs_read a=%di:^u32",
        "vfs_read ^file",
        "vfs_read ^\\1",
        "vfs_read ^(task)%di",
        "vfs_read%return ^$arg7",
        "w w@jiffies ^$arg1",
        "w w@^jiffies*",
    ] {
        assert_eq!(error(text), "NOT_SUPPORTED", "{text}");
    }
}

#[test]
fn what_is_no_place_is_refused() {
    for text in [
        "^f+",
        "^f+zz",
        "^f+0x",
        "^f+-1",
        "^f++1",
        "^f+1+1",
        "^0x",
        "^09",
        "^0x10000000000000000",
        "^12ab",
        "^0x-1",
        "^+5",
        "^f-4",
        "^@f",
        "^f(1)",
        "^:f",
        "^m:",
        "^a:b:c",
        "^f[a",
        "^a**b",
    ] {
        assert_eq!(error(text), "BAD_PROBE_ADDR", "{text}");
    }
    for text in ["-é", "-𖹀", "é-"] {
        assert!(text.parse::<Spec>().is_err(), "{text}");
    }
}

#[test]
fn dynevent_limitations_there_are_at_most_128_fetch_arguments() {
    let arguments = |count| "vfs_read".to_owned() + &" %ax".repeat(count);
    assert_eq!(parsed(&arguments(128)).fetches.len(), 128);
    let error = arguments(129).parse::<Spec>().unwrap_err();
    assert_eq!((error.kind, error.column), (SpecErrorKind::TooManyArgs, arguments(128).len() + 1));
}

#[test]
fn an_error_points_at_its_place() {
    let error = "p\tvfs_réad var1=%ax var1=%bx".parse::<Spec>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "The fetch argument's name is used already; give another one (USED_ARG_NAME)\n  \
           p vfs_réad var1=%ax var1=%bx\n                      ^"
    );
}

#[test]
fn a_place_that_looks_like_a_definition_is_written_behind_one() {
    let arguments = fetches("vfs_read a=%di");
    let fetches: Vec<_> = arguments.into_iter().map(|(name, fetch)| FetchArgument { name, fetch }).collect();
    let odd = Spec { fetches, ..Spec::at(symbol("p", None)) };
    assert_eq!(odd.to_string(), "p p a=%di");
    assert_eq!(parsed("p p a=%di"), odd);
}

proptest! {
    #[test]
    fn any_text_is_a_spec_or_an_error_and_a_spec_reads_back(
        text in "\\PC{0,20}|[a-z0x+%:. -]{0,12}|[prfw][0-9]?(:[a-z/.]{0,4})? [a-z0-9@:+%*]{1,8}( ([a-z]=)?[$%][a-z0-9]{1,6}){0,3}"
    ) {
        match text.parse::<Spec>() {
            Ok(spec) => prop_assert_eq!(spec.to_string().parse(), Ok(spec)),
            Err(error) => {
                prop_assert!(error.column <= text.len() && text.is_char_boundary(error.column));
                prop_assert!(error.to_string().contains(error.kind.name()));
            }
        }
    }

    #[test]
    fn a_spec_of_known_parts_is_understood_and_reads_back(
        definition in "(p|r|f|r[1-9][0-9]{0,2})(:([a-z_]{1,5}/)?[a-z_]{1,5})? |",
        place in "[a-z_]{2,6}(\\+0x[1-9]{1,3})?",
        arguments in "( (fd=|)(%di|\\$stack|\\$stack[0-9])){0,1}",
    ) {
        let text = format!("{definition}{place}{arguments}");
        prop_assume!(!definition.starts_with('r') || !place.contains('+'));
        let spec = text.parse::<Spec>();
        prop_assert!(spec.is_ok(), "{} {:?}", text, spec);
        let spec = spec.unwrap();
        prop_assert_eq!(spec.to_string().parse(), Ok(spec));
    }
}
