//! The main job on real KVM semantics: a stock Debian kernel in a machine of ours, on kvm-amd inside the emulated machine.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::thread;

use common::debian::Debian;
use common::{
    accounts, assert_code, bench_rows, gdb, guest_counts, hits, output, passt, stderr, stdout, vmprobe,
    with_probes,
};

#[test]
fn probes_on_a_stock_kernel_hit_as_often_as_the_guest_counts() {
    let Some(debian) = Debian::new() else { return };
    let probes = ["do_sys_openat2", "__x64_sys_getppid", "ksys_read", "__x64_sys_close", "start_kernel"];
    let arguments = with_probes(&["--output", "json", "--verbose", "--cmdline", "quiet"], &probes);
    let run = debian.run(&arguments);
    assert_code(&run, 0);
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    for (probe, word) in probes.iter().zip(["openat", "getppid", "read", "close"]) {
        assert_eq!(hits.get(*probe), counted.get(word), "{probe}: {console}");
        assert!(counted[word] >= 100, "{word}");
    }
    // Armed before the guest ran, hit once, and taken out before the guest freed its page.
    assert_eq!(hits["start_kernel"], 1);
    let text = stderr(&run);
    for expected in
        ["behind the ftrace site", "the guest rebooted", "started its init after", "Probes in init text"]
    {
        assert!(text.contains(expected), "{expected:?} in {text}");
    }
}

#[test]
fn entry_code_out_of_line_and_the_guests_own_breakpoints_live_together() {
    let Some(debian) = Debian::new() else { return };
    // swapgs at the system call entry and iretq at the end of every interrupt, where kprobes cannot go, run out of line, and
    // so does an rdmsr that the guest's exception table gets over; the workload's own int3s and single steps run through the
    // probed handlers.
    let probes = [
        "entry_SYSCALL_64",
        "asm_exc_int3+0x3",
        "int3_exception_notify",
        "noist_exc_debug",
        "native_irq_return_iret",
        "native_read_msr_safe+0x3",
    ];
    let arguments = with_probes(&["--output", "json", "--cmdline", "quiet"], &probes);
    let run = debian.run(&arguments);
    assert_code(&run, 0);
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    let counted_calls: u64 =
        ["openat", "read", "close", "getppid", "fork"].iter().map(|word| counted[*word]).sum();
    let text = stderr(&run);
    assert!(hits["entry_SYSCALL_64"] > counted_calls, "{counted_calls} counted calls: {text}");
    for probe in ["entry_SYSCALL_64", "native_irq_return_iret"] {
        let times = hits[probe];
        assert!(text.contains(&format!("{probe}: {times} hits ({times} stepped)")), "{text}");
    }
    let faulted = text.lines().any(|line| line.contains("native_read_msr_safe") && line.contains("faulted)"));
    assert!(faulted, "{text}");
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    // Every int3 of user mode arrives once, on the entry stack in the CPU entry area (Linux: arch/x86/x86_64/mm.rst). The
    // others are of the kernel: its own test when it boots, seen by the notifier, and those of its text patching.
    let from_user = stdout(&run)
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|hit| hit["probe"] == "asm_exc_int3+0x3")
        .filter(|hit| hit["regs"]["rsp"].as_str().is_some_and(|rsp| rsp.starts_with("0xfffffe")))
        .count();
    assert_eq!(from_user as u64, counted["own_int3"]);
    assert_eq!(hits["int3_exception_notify"], 1);
    assert!(hits["noist_exc_debug"] >= counted["own_step"]);
}

/// The first `count` offsets in a function at which instructions begin, behind its ftrace site.
fn boundaries(kernel: &str, function: &str, count: usize) -> Vec<u64> {
    let explained =
        |offset: &u64| output(&["explain", kernel, &format!("{function}+{offset:#x}")]).status.success();
    (5..64).filter(explained).take(count).collect()
}

#[test]
fn kprobe_insn_boundary_every_place_in_256_bytes_of_a_stock_function_is_armed_at_once() {
    const FUNCTION: &str = "kernel_clone";
    let Some(debian) = Debian::new() else { return };
    let guest = guest::Guest::open(std::path::Path::new(&debian.kernel)).expect("a kernel");
    let specs = (0..256).map(|offset| format!("{FUNCTION}+{offset:#x}"));
    let accepted: Vec<String> = specs.filter(|spec| guest.place(spec).is_ok()).collect();
    let probes: Vec<&str> = accepted.iter().map(String::as_str).collect();
    assert!(probes.len() > 30, "{probes:?}");
    let run = debian.run(&with_probes(&["--output", "json", "--cmdline", "quiet rounds=5"], &probes));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    assert_code(&run, 0);
    // Up to the first branch, each instruction is reached at each call; at least the workload's fork is one.
    let hits = hits(&stdout(&run));
    let calls = hits[probes[0]];
    assert!(calls > 0);
    for probe in &probes[..10] {
        assert_eq!(hits.get(*probe), Some(&calls), "{probe}");
    }
}

#[test]
fn kprobe_ftrace_the_guests_own_tracing_and_probes_work_on_probed_functions() {
    let Some(debian) = Debian::new() else { return };
    // The guest's ftrace, kprobe, kretprobe and ours on one function; its uprobe, tracepoint and static keys on pages that
    // hold probes of ours. The workload checks what each of its tools saw.
    let function = "do_sys_openat2";
    let offsets = boundaries(&debian.kernel, function, 3);
    let [first, second, third] = offsets[..] else { panic!("{offsets:?}") };
    let ours = [format!("{function}+{first:#x}"), format!("{function}+{second:#x}")];
    // kprobes forbids its own int3 handler; from outside it is a function like any other.
    let handlers = ["kprobe_int3_handler", "uprobe_pre_sstep_notifier"];
    let probes = [&ours[0], &ours[1], "__x64_sys_getppid", "try_to_wake_up", handlers[0], handlers[1]];
    let cmdline = format!("quiet rounds=5 exercise=tracing kprobe={function}+{third:#x}");
    let run = debian.run(&with_probes(&["--output", "json", "--cmdline", &cmdline], &probes));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    for (probe, word) in [(probes[0], "openat"), (probes[1], "openat"), (probes[2], "getppid")] {
        assert_eq!(hits.get(probe), counted.get(word), "{probe}: {console}");
    }
    assert!(hits[handlers[0]] >= counted["own_kprobe"], "{hits:?}");
    assert!(hits[handlers[1]] >= counted["own_uprobe"], "{hits:?}");
}

#[test]
fn counts_add_up_while_every_vcpu_hits_and_the_guest_patches_its_text() {
    let Some(debian) = Debian::new() else { return };
    // A process on each vCPU. Meanwhile probes come and go with a module, and the guest's own tracing patches text under all of
    // them, which takes interrupts from vCPU to vCPU.
    let function = "do_sys_openat2";
    let offsets = boundaries(&debian.kernel, function, 3);
    let place = format!("{function}+{:#x}", offsets[2]);
    let probes = [
        "__x64_sys_getppid",
        "__x64_sys_getppid%return",
        "w x@__x64_sys_getppid",
        function,
        "ksys_read",
        "ksys_read%return",
        "__x64_sys_close",
        "msr:msr_read",
        "msr:msr_read%return",
    ];
    let words = ["getppid", "getppid", "getppid", "openat", "read", "read", "close", "msr_read", "msr_read"];
    for vcpus in [2, 4] {
        let cmdline = format!("quiet rounds=30 exercise=topology,modules,tracing kprobe={place}");
        let cpus = vcpus.to_string();
        let run =
            debian.run(&with_probes(&["--output", "json", "--cpus", &cpus, "--cmdline", &cmdline], &probes));
        let console = debian.console();
        assert!(console.contains("workload: ok"), "{console}");
        assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
        assert_code(&run, 0);
        let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
        assert_eq!((counted["cpus"], counted["fork"]), (vcpus, vcpus - 1));
        for (probe, word) in probes.iter().zip(words) {
            assert_eq!(hits.get(*probe), counted.get(word), "{probe} on {vcpus} vCPUs: {console}");
        }
        let text = stdout(&run);
        let calls = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let mut by_vcpu = vec![0; usize::try_from(vcpus).expect("a few")];
        for hit in calls.filter(|hit| hit["probe"] == "__x64_sys_getppid") {
            let vcpu = usize::try_from(hit["vcpu"].as_u64().expect("a vCPU")).expect("a few");
            by_vcpu[vcpu] += 1;
        }
        // Three calls a round on the first, beside those of the tracing, and two on each other, where its process is held.
        assert!(by_vcpu[0] > 3 * 30 && by_vcpu[1..].iter().all(|calls| *calls == 2 * 30), "{by_vcpu:?}");
    }
}

#[test]
fn exception_tables_work_for_probed_instructions_that_fault() {
    let Some(debian) = Debian::new() else { return };
    // Every instruction of the functions that copy from and to user space, one of which faults at a bad address; and RDMSR, which
    // runs out of line, at a register that is not there.
    let functions = [
        "strncpy_from_user",
        "copy_user_generic_string",
        "copy_user_enhanced_fast_string",
        "native_read_msr_safe",
    ];
    let mut probes = Vec::new();
    let mut rdmsr = None;
    for function in functions {
        let listed = output(&["explain", &debian.kernel, function, "--all"]);
        assert_code(&listed, 0);
        for line in stdout(&listed).lines().filter(|line| !line.contains("refused")) {
            let Some(place) = line.split_whitespace().nth(1).filter(|place| place.starts_with(function))
            else {
                continue;
            };
            if line.contains("rdmsr") {
                rdmsr = Some(place.to_owned());
            }
            probes.push(place.to_owned());
        }
    }
    let rdmsr = rdmsr.expect("the function reads a register");
    let probes: Vec<&str> = probes.iter().map(String::as_str).collect();
    let arguments = ["--output", "json", "--count", "--cmdline", "quiet rounds=5 exercise=faults,modules"];
    let run = debian.run(&with_probes(&arguments, &probes));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    assert_code(&run, 0);
    let counted = guest_counts(&console);
    let text = stdout(&run);
    let accounts = accounts(&text);
    let number = |account: &serde_json::Value, field: &str| account[field].as_u64().expect("a count");
    let faulted = |starts: &str| -> u64 {
        let of = accounts
            .iter()
            .filter(|account| account["probe"].as_str().is_some_and(|probe| probe.starts_with(starts)));
        of.map(|account| number(account, "faulted")).sum()
    };
    assert!(faulted("strncpy_from_user") >= counted["fault_from_user"], "{text}");
    assert!(faulted("copy_user_") >= counted["fault_to_user"], "{text}");
    assert!(faulted(&rdmsr) >= counted["msr_fault"], "{text}");
    for account in &accounts {
        let ways = ["emulated", "stepped", "faulted", "diverted"].map(|way| number(account, way));
        assert_eq!(number(account, "hits"), ways.iter().sum::<u64>(), "{account}");
        let ends = ["delivered", "filtered", "lost"].map(|end| number(account, end));
        assert_eq!(number(account, "hits"), ends.iter().sum::<u64>(), "{account}");
    }
}

#[test]
fn returns_on_a_stock_kernel_are_as_many_as_calls() {
    let Some(debian) = Debian::new() else { return };
    // Called from many places, some of them before static keys; sleeping and migrating; never returning.
    let probes = [
        "do_sys_openat2%return $retval",
        "__x64_sys_getppid%return",
        "ksys_read%return",
        "schedule%return",
        "try_to_wake_up%return",
        "do_exit%return",
    ];
    let cmdline = "quiet rounds=20 exercise=tracing";
    let run = debian.run(&with_probes(&["--output", "json", "--cmdline", cmdline], &probes));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    for (probe, word) in probes.iter().zip(["openat", "getppid", "read"]) {
        assert_eq!(hits.get(*probe), counted.get(word), "{probe}: {console}");
    }
    assert!(hits["schedule%return"] > 0 && hits["try_to_wake_up%return"] > 0, "{hits:?}");
    assert_eq!(hits.get("do_exit%return"), None, "no task comes back from there");
    // Opening a file that is not there gives -ENOENT.
    let refused = stdout(&run).matches(&format!("{:#x}", (-2_i64).cast_unsigned())).count();
    assert!(refused >= 20, "{refused}");
}

#[test]
fn kprobe_module_probes_follow_a_module_that_loads_unloads_and_comes_back() {
    let Some(debian) = Debian::new() else { return };
    let probes =
        ["msr:msr_read", "msr:msr_read%return v=$retval", "msr:msr_open", "msr:msr_init", "msr:no_such"];
    let run = debian
        .run(&with_probes(&["--output", "json", "--cmdline", "quiet rounds=1 exercise=modules"], &probes));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    for (probe, word) in probes.iter().zip(["msr_read", "msr_read", "msr_open", "msr_open", "nothing"]) {
        assert_eq!(hits.get(*probe), counted.get(word), "{probe}: {console}");
    }
    // EIO for each register that is not there, at which RDMSR faulted in the kernel.
    let refused = format!("\"v\":\"{:#x}\"", (-5_i64).cast_unsigned());
    assert_eq!(stdout(&run).matches(&refused).count() as u64, counted["msr_fault"]);
    assert!(stderr(&run).contains("msr:no_such: The module has no such function"), "{}", stderr(&run));
}

#[test]
fn a_core_file_holds_the_guest_as_it_was_where_it_panicked() {
    let Some(debian) = Debian::new() else { return };
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let core = common::debian::path(file.path());
    let cmdline = "quiet rounds=1 workload=panic";
    let run = debian.run(&["--kaslr", "--memory", "192M", "--cmdline", cmdline, "--dump", &core]);
    assert_code(&run, 6);
    assert!(stderr(&run).contains("core file of 192 MiB"), "{}", stderr(&run));
    assert!(!stderr(&run).contains("without VMCOREINFO"), "{}", stderr(&run));
    // The guest went on to its last words.
    assert!(debian.console().contains("Kernel panic"), "{}", debian.console());
    let linked = guest::Guest::open(std::path::Path::new(&debian.kernel)).expect("a kernel");
    let [gva_offset, _] = offsets(&run);
    let at = |symbol: &str| linked.symbols.address(symbol).expect("a symbol").0 + gva_offset;
    let place = linked.place("panic").expect("a place").gva.0 + gva_offset;
    let code = linked.place("panic").expect("a place").bytes;
    // The registers are those of the call, and its text is the guest's own: no int3 of ours is in it.
    let code_at = format!("x/1xb {place:#x}");
    let banner = format!("x/s {:#x}", at("linux_banner"));
    let text = gdb(&core, &["info registers rip", "info threads", &code_at, &banner]);
    assert!(text.contains(&format!("{place:#x}")), "{text}");
    assert!(text.contains(&format!("{:#04x}", code[0])), "{text}");
    assert!(text.contains("Linux version 6."), "{text}");
    let bytes = std::fs::read(file.path()).expect("the core");
    let offset = format!("KERNELOFFSET={gva_offset:x}\n");
    assert!(bytes[..1 << 16].windows(offset.len()).any(|window| window == offset.as_bytes()), "{offset}");
}

/// The offsets that a run with --kaslr has told: linear, physical.
fn offsets(run: &std::process::Output) -> [u64; 2] {
    let text = stderr(run);
    let line = text.lines().find(|line| line.contains("The kernel lies at")).expect("where it lies");
    println!("{line}");
    let mut found = line.match_indices(" behind ").map(|(at, _)| {
        let hex = line[..at].rsplit("0x").next().expect("a number");
        u64::from_str_radix(hex, 16).expect("hexadecimal")
    });
    std::array::from_fn(|_| found.next().expect("two offsets"))
}

/// Whether a stack is where only a kernel with five levels of page tables has any (Linux: arch/x86/x86_64/mm.rst).
fn needs_five_levels(hit: &serde_json::Value) -> bool {
    let rsp = hit["regs"]["rsp"].as_str().and_then(|rsp| rsp.strip_prefix("0x")).expect("a register");
    u64::from_str_radix(rsp, 16).expect("hexadecimal") < 0xffff_8000_0000_0000
}

#[test]
fn a_kernel_that_chooses_its_own_addresses_is_probed_where_it_lies() {
    let Some(debian) = Debian::new() else { return };
    let linked = guest::Guest::open(std::path::Path::new(&debian.kernel)).expect("a kernel");
    let opened = linked.place("do_sys_openat2").expect("a place").gva.0;
    let address = format!("{opened:#x}");
    // From before its first instruction to its modules; by an address that is one of the image; and, entry code and a user's
    // page tables among them, run out of line.
    let probes = [
        "startup_64",
        "start_kernel",
        "do_sys_openat2",
        &address,
        "ksys_read%return",
        "__x64_sys_close",
        "msr:msr_read",
        "msr:msr_read%return v=$retval",
        "entry_SYSCALL_64",
        "native_irq_return_iret",
    ];
    let boots = [
        // Five levels of page tables, which its decompressor switches on.
        ("rounds=20 exercise=modules", true),
        // Other addresses, four levels, and page tables of user mode's own.
        ("rounds=20 exercise=modules no5lvl pti=on", false),
        // Its decompressor runs, and leaves it where it was linked.
        ("rounds=20 exercise=modules nokaslr no5lvl", false),
    ];
    let mut seen = Vec::new();
    for (cmdline, five_levels) in boots {
        let cmdline = format!("quiet {cmdline}");
        let run = debian
            .run(&with_probes(&["--kaslr", "--output", "json", "--verbose", "--cmdline", &cmdline], &probes));
        assert_code(&run, 0);
        let console = debian.console();
        assert!(console.contains("workload: ok"), "{console}");
        assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
        let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
        let words = ["openat", "openat", "read", "close", "msr_read", "msr_read"];
        for (probe, word) in probes[2..].iter().zip(words) {
            assert_eq!(hits.get(*probe), counted.get(word), "{probe}: {console}");
            assert!(counted[word] >= 20, "{word}");
        }
        assert_eq!((hits["startup_64"], hits["start_kernel"]), (1, 1));
        let text = stderr(&run);
        for probe in ["entry_SYSCALL_64", "native_irq_return_iret"] {
            let times = hits[probe];
            assert!(
                times > 0 && text.contains(&format!("{probe}: {times} hits ({times} stepped)")),
                "{text}"
            );
        }
        let [gva_offset, gpa_offset] = offsets(&run);
        let mut opens = 0;
        for line in stdout(&run).lines() {
            let hit: serde_json::Value = serde_json::from_str(line).expect("JSON");
            if hit["probe"] == "do_sys_openat2" {
                opens += 1;
                assert_eq!(hit["ip"], format!("{:#x}", opened + gva_offset));
                assert_eq!(hit["symbol"], "do_sys_openat2+0x5");
                assert_eq!(needs_five_levels(&hit), five_levels, "{line}");
            }
        }
        assert_eq!(opens, counted["openat"]);
        seen.push([gva_offset, gpa_offset]);
    }
    let [first, second, last] = seen[..] else { panic!("{seen:?}") };
    // Of 470 and of some 200 places each; that both are the same by chance is one case in 90,000.
    assert_ne!(first, second);
    assert_eq!(last, [0, 0]);
}

/// What the workload expects on a disk before it writes (guest/programs/workload/disks.rs).
fn pattern() -> Vec<u8> {
    let byte = |block: usize, at: usize| (block * 131 + at * 7).to_le_bytes()[0];
    (0..64).flat_map(|block| (0..4096).map(move |at| byte(block, at))).collect()
}

#[test]
fn disks_are_read_and_written_with_probes_on_the_block_layer() {
    let Some(debian) = Debian::new() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    // Changed in place, and kept below an overlay.
    let (changed, kept) = (directory.path().join("a,b.img"), directory.path().join("kept.img"));
    for image in [&changed, &kept] {
        std::fs::write(image, pattern()).expect("an image");
    }
    let disks =
        [format!("{},write", changed.display().to_string().replace(',', ",,")), kept.display().to_string()];
    let probes =
        ["blkdev_read_iter", "blkdev_write_iter", "blkdev_fsync", "submit_bio", "virtio_blk:virtio_queue_rq"];
    let run = debian.run(&with_probes(
        &[
            "--output",
            "json",
            "--cmdline",
            "quiet rounds=1 exercise=disks",
            "--disk",
            &disks[0],
            "--disk",
            &disks[1],
        ],
        &probes,
    ));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}\n{}", stderr(&run));
    assert!(!console.contains("WARNING:") && !console.contains("BUG:"), "{console}");
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    for (probe, word) in probes.iter().zip(["disk_read", "disk_write", "disk_sync"]) {
        assert_eq!(hits.get(*probe), counted.get(word), "{probe}: {console}");
        assert!(counted[word] >= 2, "{word}");
    }
    // Looking for partitions reads too.
    let requests = counted["disk_read"] + counted["disk_write"];
    for probe in &probes[3..] {
        assert!(hits[*probe] >= requests, "{probe}: {hits:?}");
    }
    let mut expected = pattern();
    expected[32 * 4096..].iter_mut().for_each(|byte| *byte = !*byte);
    assert!(std::fs::read(&changed).expect("the image") == expected, "the image changed in place");
    assert!(std::fs::read(&kept).expect("the image") == pattern(), "the image below an overlay");
}

/// Bytes of the workload's messages (guest/programs/workload/messages.rs).
const MESSAGE_BYTES: usize = 1000;

#[test]
fn programs_of_host_and_guest_talk_over_vsock_and_every_packet_is_a_hit() {
    const MESSAGES: usize = 20;
    let Some(debian) = Debian::new() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("vsock").display().to_string();
    let listener = UnixListener::bind(format!("{path}_7000")).expect("a socket");
    let host = thread::spawn(move || {
        // The guest's own connection: everything goes back.
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut output = stream.try_clone().expect("the stream twice");
        io::copy(&mut stream, &mut output).expect("the guest's messages go back");
        output.shutdown(Shutdown::Write).ok();
        // The guest listens.
        let mut client = vmprobe(&["vsock", &path, "7001"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("vmprobe starts");
        let mut input = client.stdin.take().expect("stdin");
        let mut output = client.stdout.take().expect("stdout");
        for number in 0..MESSAGES {
            let message = [number.to_le_bytes()[0]; MESSAGE_BYTES];
            input.write_all(&message).expect("a message");
            let mut answer = [0; MESSAGE_BYTES];
            output.read_exact(&mut answer).expect("an answer");
            assert!(answer == message);
        }
        drop(input);
        assert_eq!(output.read(&mut [0]).expect("the end"), 0);
        client.wait().expect("it ends").code()
    });
    let option = format!("uds={}", directory.path().join("vsock").display());
    let cmdline = "quiet rounds=1 exercise=vsock";
    let probe = "vmw_vsock_virtio_transport_common:virtio_transport_recv_pkt";
    let run = debian.run(&["--output", "json", "--cmdline", cmdline, "--vsock", &option, "--probe", probe]);
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}\n{}", stderr(&run));
    assert_code(&run, 0);
    assert_eq!(host.join().expect("the host's programs are content"), Some(0));
    let counted = guest_counts(&console);
    assert_eq!(counted["vsock_answered"], MESSAGES as u64);
    // RESPONSE, an RW for each answer, and RST; REQUEST, an RW for each message, SHUTDOWN, and RST.
    let packets = 1 + counted["vsock_asked"] + 1 + 1 + counted["vsock_answered"] + 1 + 1;
    assert_eq!(hits(&stdout(&run)).get(probe), Some(&packets), "{console}");
    assert!(!directory.path().join("vsock").exists());
}

#[test]
fn a_stock_kernel_reaches_a_program_of_the_host_through_passt() {
    let Some(debian) = Debian::new() else { return };
    if !passt() {
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its number").port();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("the guest connects");
        let mut output = stream.try_clone().expect("the stream twice");
        io::copy(&mut stream, &mut output).expect("the guest's messages go back")
    });
    let cmdline = format!("quiet rounds=1 exercise=network port={port}");
    let probes = ["tcp_v4_connect", "virtio_net:start_xmit"];
    let arguments = ["--output", "json", "--cmdline", &cmdline, "--net", "user"];
    let run = debian.run(&with_probes(&arguments, &probes));
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}\n{}", stderr(&run));
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&console), hits(&stdout(&run)));
    let asked = counted["network_asked"];
    assert_eq!(host.join().expect("the host's program is content"), asked * MESSAGE_BYTES as u64);
    assert_eq!(hits["tcp_v4_connect"], 1);
    // A segment for each message, and what TCP and ARP have to say besides.
    assert!(hits["virtio_net:start_xmit"] > asked, "{hits:?}");
}

#[test]
fn each_way_to_end_has_its_code_and_message() {
    let Some(debian) = Debian::new() else { return };
    for (mode, code, message) in [("halt", 0, "the guest halted"), ("panic", 6, "the guest kernel panicked")]
    {
        let cmdline = format!("quiet rounds=1 workload={mode}");
        let run = debian.run(&["--cmdline", &cmdline]);
        assert_code(&run, code);
        assert!(stderr(&run).contains(message), "{mode}: {}", stderr(&run));
    }
    let run = debian.run(&["--cmdline", "quiet rounds=1 workload=loop", "--timeout", "30s"]);
    assert_code(&run, 124);
}

#[test]
fn a_guest_whose_power_button_is_pressed_powers_off_in_order() {
    let Some(debian) = Debian::new() else { return };
    let words = ["--cpus", "2", "--cmdline", "quiet rounds=1 workload=button", "--grace", "4m"];
    let mut run = debian.start(&words);
    let mut console = String::new();
    for line in BufReader::new(run.stderr.take().expect("a pipe")).lines() {
        let line = line.expect("text");
        if line.contains("waits for the power button") {
            let pid = rustix::process::Pid::from_child(&run);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
        }
        console += &(line + "\n");
    }
    let status = run.wait().expect("it ends");
    assert!(console.contains("the power button was pressed"), "{console}");
    assert!(console.contains("interrupted; the guest powered off"), "{console}");
    assert_eq!(status.code(), Some(130));
    // By itself, through ACPI's S5.
    let run = debian.run(&["--cmdline", "quiet rounds=1 workload=poweroff"]);
    assert_code(&run, 0);
    assert!(stderr(&run).contains("the guest powered off"), "{}", stderr(&run));
}

#[test]
fn the_built_in_guest_gives_the_same_on_real_kvm() {
    let Some(_debian) = Debian::new() else { return };
    let arguments = with_probes(
        &["run", "demo", "--accel", "nested", "--output", "json", "--timeout", "120s"],
        &["tick", "fib", "copy_bytes", "checksum", "smp_add", "smp_xadd", "fam_rdtsc", "fam_cpuid"],
    );
    let run = output(&arguments);
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&stderr(&run)), hits(&stdout(&run)));
    assert!(stderr(&run).contains("demo: ok"), "{}", stderr(&run));
    for (probe, count) in hits {
        assert_eq!(counted.get(&probe), Some(&count), "{probe}");
    }
    // Watchpoints on data: the additions of both vCPUs, some by an instruction that is probed too and so emulated.
    let probes = ["w w@smp_sum:8", "w x@smp_add", "smp_add", "smp_xadd+3"];
    let run = output(&with_probes(
        &["run", "demo", "--accel", "nested", "--output", "json", "--timeout", "120s"],
        &probes,
    ));
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&stderr(&run)), common::hits(&stdout(&run)));
    assert!(stderr(&run).contains("demo: ok"), "{}", stderr(&run));
    assert_eq!(hits[probes[0]], counted["smp_add"] + counted["smp_xadd"]);
    assert_eq!((hits[probes[1]], hits[probes[2]]), (counted["smp_add"], counted["smp_add"]));
    assert_eq!(hits[probes[3]], counted["smp_xadd"]);
}

#[test]
fn a_hit_costs_what_it_did_on_real_kvm() {
    let Some(_debian) = Debian::new() else { return };
    let run = output(&["bench", "--accel", "nested", "--turns", "400", "--output", "json"]);
    assert_code(&run, 0);
    let rows = bench_rows(&stdout(&run));
    for (case, exits) in [("port", 1.0), ("emulated", 1.0), ("stepped", 2.0), ("returned", 2.0)] {
        let row = &rows[case];
        assert_eq!((row["exits"].as_f64(), row["ioctls"].as_f64()), (Some(exits), Some(0.0)), "{row}");
    }
    // Bounds for a build that is not optimised, on a busy host; docs/benchmarks.md has what was measured without.
    for (case, bound) in [("emulated", 2.5), ("stepped", 8.0)] {
        assert!(rows[case]["ratio"].as_f64().is_some_and(|ratio| ratio < bound), "{}", rows[case]);
    }
}
