//! The built-in guest on the local /dev/kvm.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::{assert_code, guest_counts, hits, local_kvm, output, stderr, stdout, vmprobe, with_probes};

#[test]
fn five_hits_are_five_json_objects() {
    if !local_kvm() {
        return;
    }
    let run = output(&["run", "demo", "--probe", "tick", "--max-hits", "5", "--output", "json"]);
    assert_code(&run, 0);
    let text = stdout(&run);
    let hits: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("one JSON object a line")).collect();
    assert_eq!(hits.len(), 5, "{text}");
    // A vCPU's hits come in their order; another's may be told with the next batch.
    let mut last = [0; 2];
    for hit in &hits {
        assert_eq!(hit["probe"], "tick");
        assert_eq!(hit["symbol"], "tick");
        assert_eq!(hit["ip"], hit["regs"]["rip"]);
        let ts = hit["ts_ns"].as_u64().expect("a time");
        let last = &mut last[usize::from(hit["vcpu"] == 1)];
        assert!(ts >= *last, "time goes on");
        *last = ts;
    }
    assert!(stderr(&run).contains("--max-hits reached"), "{}", stderr(&run));
}

#[test]
fn hits_equal_what_the_guest_counted() {
    if !local_kvm() {
        return;
    }
    let probes = ["tick", "fib", "copy_bytes", "checksum", "smp_add", "smp_xadd"];
    let args = with_probes(&["run", "demo", "--output", "json", "--timeout", "60s"], &probes);
    let run = output(&args);
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&stderr(&run)), hits(&stdout(&run)));
    assert!(stderr(&run).contains("demo: ok"), "{}", stderr(&run));
    for probe in probes {
        assert!(counted[probe] > 0);
        assert_eq!(hits.get(probe), counted.get(probe), "{probe}");
    }
}

#[test]
fn every_function_of_the_guest_probed_at_once_runs_as_if_it_were_not() {
    if !local_kvm() {
        return;
    }
    let plain = output(&["run", "demo", "--timeout", "60s"]);
    assert_code(&plain, 0);
    let counted = guest_counts(&stderr(&plain));
    // Functions whose first instruction is refused say so; all others are probed.
    let probes: Vec<&str> = counted
        .keys()
        .map(String::as_str)
        .filter(|name| output(&["explain", "demo", name]).status.success())
        .collect();
    assert!(probes.len() * 10 > counted.len() * 8, "{} of {} can be probed", probes.len(), counted.len());
    let args = with_probes(&["run", "demo", "--output", "json", "--timeout", "120s"], &probes);
    let run = output(&args);
    assert_code(&run, 0);
    assert!(stderr(&run).contains("demo: ok"), "{}", stderr(&run));
    assert_eq!(guest_counts(&stderr(&run)), counted, "the guest counts the same with and without probes");
    let hits = hits(&stdout(&run));
    for probe in probes {
        assert_eq!(hits.get(probe), counted.get(probe), "{probe}");
    }
}

#[test]
fn kretprobe_args_a_return_has_the_value_and_the_arguments_of_its_call() {
    if !local_kvm() {
        return;
    }
    let probe = "fib%return ret=$retval n=$arg1";
    let run = output(&["run", "demo", "--probe", probe, "--output", "json", "--timeout", "60s"]);
    assert_code(&run, 0);
    let number = |value: &serde_json::Value| {
        let digits = value.as_str().and_then(|text| text.strip_prefix("0x")).unwrap_or_default();
        u64::from_str_radix(digits, 16).expect("a hexadecimal number")
    };
    let mut fibs = BTreeMap::new();
    for line in stdout(&run).lines() {
        let hit: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        assert_eq!((&hit["probe"], &hit["symbol"]), (&probe.into(), &"fib%return".into()));
        assert_eq!(hit["ret"], hit["args"]["ret"]);
        assert!(hit["duration_ns"].as_u64().is_some_and(|duration| duration > 0), "{hit}");
        let (n, value) = (number(&hit["args"]["n"]), number(&hit["ret"]));
        assert_eq!(*fibs.entry(n).or_insert(value), value, "fib({n})");
    }
    // Recursive calls each return once, with the arguments that they were called with.
    let fib = |n: u64| (0..n).fold((0, 1), |(a, b), _| (b, a + b)).0;
    assert_eq!(fibs.len(), 13);
    assert!(fibs.iter().all(|(n, value)| fib(*n) == *value), "{fibs:?}");
    let counted = guest_counts(&stderr(&run));
    assert_eq!(stdout(&run).lines().count() as u64, counted["fib"]);
}

#[test]
fn values_are_fetched_by_name() {
    if !local_kvm() {
        return;
    }
    let probe = "p:ticking tick index=$arg1 %rsi sp=$stack to=$stack0";
    let args = ["run", "demo", "--probe", probe, "--output", "json", "--cpus", "1", "--timeout", "60s"];
    let run = output(&args);
    assert_code(&run, 0);
    let mut returns = BTreeSet::new();
    for (index, line) in stdout(&run).lines().enumerate() {
        let hit: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        assert_eq!(hit["event"], "ticking");
        let expected = [
            ("index", format!("{index:#x}").into()),
            ("arg2", "0x0".into()),
            ("sp", hit["regs"]["rsp"].clone()),
        ];
        for (name, value) in expected {
            assert_eq!(hit["args"][name], value, "{line}");
        }
        returns.insert(hit["args"]["to"].as_str().expect("a word of the stack").to_owned());
    }
    assert_eq!(returns.len(), 1, "tick is called from one place: {returns:?}");
}

#[test]
fn test_fprobe_syms_come_from_files_and_standard_input_too() {
    if !local_kvm() {
        return;
    }
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(&file, "# the demo's own\n\n  tick\nfib%return\n").expect("written");
    let path = file.path().to_str().expect("a plain name");
    let args = [
        "run",
        "demo",
        "--probes",
        path,
        "--probes",
        "-",
        "--probe",
        "checksum",
        "--count",
        "--timeout",
        "60s",
    ];
    let mut child = vmprobe(&args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmprobe starts");
    std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), b"smp_*\n").expect("written");
    let run = child.wait_with_output().expect("vmprobe ends");
    assert_code(&run, 0);
    let text = stderr(&run);
    assert_eq!(stdout(&run), "", "--count writes no hits");
    let counted = guest_counts(&text);
    assert!(text.contains("smp_*: 2 functions"), "{text}");
    for (place, name) in [
        ("checksum", "checksum"),
        ("tick", "tick"),
        ("fib%return", "fib"),
        ("smp_add", "smp_add"),
        ("smp_xadd", "smp_xadd"),
    ] {
        let count = counted[name];
        let expected = match place.ends_with("%return") {
            true => format!("vmprobe: {place}: {count} returns of {count} calls"),
            false => format!("vmprobe: {place}: {count} hits"),
        };
        assert!(text.contains(&expected), "{expected}: {text}");
    }

    fs::write(&file, "tick\n\ntick+zz\n").expect("written");
    let run = output(&["run", "demo", "--probes", path]);
    assert_code(&run, 5);
    let text = stderr(&run);
    assert!(text.contains(&format!("{path}:3: ")) && text.contains("BAD_PROBE_ADDR"), "{text}");
}

#[test]
fn test_fprobe_every_place_that_a_pattern_finds_can_be_probed_at_once() {
    if !local_kvm() {
        return;
    }
    let run = output(&["run", "demo", "--probe", "*", "--count", "--timeout", "120s"]);
    assert_code(&run, 0);
    let text = stderr(&run);
    assert!(text.contains("demo: ok"), "{text}");
    let total = text.lines().find(|line| line.contains(" probes, ")).expect("a total");
    assert!(!total.contains("lost"), "{total}");
    assert!(text.contains("... and "), "of many probes only the hottest are named: {text}");
}

#[test]
fn execution_is_watched_without_a_byte_of_guest_text_changed() {
    if !local_kvm() {
        return;
    }
    let probes = ["w:added x@smp_add", "smp_xadd", "w x@copy_bytes+3"];
    let run = output(&with_probes(&["run", "demo", "--output", "json", "--timeout", "60s"], &probes));
    assert_code(&run, 0);
    let (counted, hits) = (guest_counts(&stderr(&run)), hits(&stdout(&run)));
    assert_eq!(hits[probes[0]], counted["smp_add"]);
    assert_eq!(hits[probes[1]], counted["smp_xadd"]);
    assert_eq!(hits[probes[2]], counted["copy_bytes"]);
    assert!(stderr(&run).contains("demo: ok"), "{}", stderr(&run));
}

#[test]
fn an_emulated_hit_takes_no_ioctl_besides_kvm_run() {
    if !local_kvm() {
        return;
    }
    let run = output(&["run", "demo", "--probe", "tick", "--timeout", "60s", "--verbose", "--cpus", "1"]);
    assert_code(&run, 0);
    let text = stderr(&run);
    assert!(text.contains("tick: 200 hits (200 emulated)"), "{text}");
    let ioctls = text.rsplit("ioctls: ").next().expect("--verbose counts ioctls");
    let number = |name: &str| -> u64 {
        let before = ioctls.split(name).next().unwrap_or_default();
        before.rsplit([' ', ',']).find_map(|word| word.parse().ok()).expect("a count")
    };
    // One to switch guest debugging on and one to switch it off, and what the start and the guest's own five int3s take.
    assert!(number(" KVM_SET_GUEST_DEBUG") <= 2, "{ioctls}");
    assert!(number(" KVM_RUN") >= 200, "{ioctls}");
}

#[test]
fn hits_that_cannot_be_written_are_a_failure_and_a_closed_pipe_is_none() {
    if !local_kvm() {
        return;
    }
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let run = vmprobe(&["run", "demo", "--probe", "tick", "--serial", "none"])
        .stdout(full)
        .output()
        .expect("vmprobe starts");
    assert_code(&run, 3);
    assert!(stderr(&run).contains("Standard output cannot be written"), "{}", stderr(&run));

    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let run = vmprobe(&["run", "demo", "--probe", "tick", "--serial", "none"])
        .stdout(writer)
        .output()
        .expect("vmprobe starts");
    assert_code(&run, 0);
}

#[test]
fn the_timeout_ends_a_run_with_its_code() {
    if !local_kvm() {
        return;
    }
    let start = Instant::now();
    let run = output(&["run", "demo", "--timeout", "50ms", "--serial", "none"]);
    assert_code(&run, 124);
    assert!(start.elapsed() < Duration::from_secs(10));
    assert!(stderr(&run).contains("timeout"));
}

#[test]
fn sigint_ends_a_run_with_its_code_and_its_summary() {
    if !local_kvm() {
        return;
    }
    // The first hit shows that the guest runs; the pipe then blocks nobody.
    let mut child = vmprobe(&["run", "demo", "--probe", "tick", "--serial", "none"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmprobe starts");
    let mut first = String::new();
    BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut first).expect("a hit");
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(killed.is_ok_and(|status| status.success()));
    let mut text = String::new();
    child.stderr.take().expect("a pipe").read_to_string(&mut text).expect("stderr is text");
    let status = child.wait().expect("vmprobe ends");
    // The guest may have been quicker than the signal.
    assert!(matches!(status.code(), Some(130 | 0)), "{status} {text}");
    assert!(text.contains("tick:"), "{text}");
}

/// Names in a directory.
fn entries(directory: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(directory).expect("a directory");
    entries.map(|entry| entry.expect("an entry").file_name()).collect()
}

/// Processes of a group, as /proc/PID/stat tells: PID (NAME) STATE PARENT GROUP (proc_pid_stat(5)).
fn processes_of_group(group: u32) -> Vec<OsString> {
    let of_group = |process: &OsString| {
        let stat = fs::read_to_string(Path::new("/proc").join(process).join("stat")).unwrap_or_default();
        let behind_name = stat.rsplit_once(')').map(|(_, fields)| fields);
        behind_name.and_then(|fields| fields.split_ascii_whitespace().nth(2)) == Some(&group.to_string())
    };
    entries(Path::new("/proc")).into_iter().filter(of_group).collect()
}

#[test]
fn a_killed_run_leaves_nothing_behind() {
    if !local_kvm() {
        return;
    }
    let shared_memory = Path::new("/dev/shm");
    let shared_before = entries(shared_memory);
    let temporary = tempfile::tempdir().expect("a temporary directory");
    // More hits than the pipe takes: it runs until it is killed.
    let mut child = vmprobe(&["run", "demo", "--probe", "*", "--output", "json", "--serial", "none"])
        .env("TMPDIR", temporary.path())
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("vmprobe starts");
    let group = child.id();
    let mut first = String::new();
    let mut stdout = BufReader::new(child.stdout.take().expect("a pipe"));
    stdout.read_line(&mut first).expect("a hit");
    assert!(first.contains("\"probe\""), "{first}");
    assert_eq!(processes_of_group(group), [OsString::from(group.to_string())], "one process while it runs");
    child.kill().expect("it runs");
    let status = child.wait().expect("vmprobe ends");
    assert_eq!(status.signal(), Some(9), "{status}");
    assert_eq!(processes_of_group(group), Vec::<OsString>::new());
    assert_eq!(entries(temporary.path()), BTreeSet::new());
    let shared_after = entries(shared_memory);
    assert_eq!(shared_after.difference(&shared_before).collect::<Vec<_>>(), Vec::<&OsString>::new());
}

#[test]
fn bad_requests_have_their_own_codes_and_say_what_to_do() {
    let cases: &[(&[&str], i32, &str)] = &[
        (&["run", "demo", "--probe", "tikc"], 5, "tick"),
        (&["run", "demo", "--probe", "tick+0x1000000"], 5, ""),
        (&["run", "demo", "--probe", "0xdead0000"], 5, "0xdead0000"),
        (&["run", "demo", "--probe", "tick%retrun"], 5, "BAD_ADDR_SUFFIX"),
        (&["run", "demo", "--probe", "r tick+1"], 5, "BAD_RETPROBE"),
        (&["run", "demo", "--probe", "tick $retval"], 5, "RETVAL_ON_PROBE"),
        (&["run", "demo", "--probe", "nothing_like_*"], 5, "No function has such a name"),
        (&["run", "demo", "--probe", "w r@smp_sum:8"], 5, "x86 cannot watch reads alone"),
        (&["run", "demo", "--probes", "/nonexistent"], 2, "/nonexistent"),
        (&["run", "/nonexistent"], 4, "/nonexistent"),
        (&["run", "/etc/passwd"], 4, "/etc/passwd"),
        (&["run", "demo", "--memory", "0", "--accel", "kvm"], 2, "memory"),
        (&["run", "demo", "--memory", "999999G", "--accel", "kvm"], 2, ""),
        (&["run", "demo", "--initrd", "/etc/passwd", "--accel", "kvm"], 2, "--initrd"),
        (&["run", "demo", "--max-hits", "0"], 2, "--max-hits"),
        (&["run"], 2, "IMAGE"),
        (&["symbols", "/nonexistent"], 4, "/nonexistent"),
        (&["explain", "demo", "nothing_like_it"], 5, "nothing_like_it"),
    ];
    for (args, code, text) in cases {
        let run = output(args);
        assert_code(&run, *code);
        assert!(stderr(&run).contains(text), "{args:?}: {}", stderr(&run));
        assert_eq!(stdout(&run), "", "{args:?}");
    }
}

#[test]
fn symbols_are_listed_by_glob() {
    let list = output(&["symbols", "demo", "fib*"]);
    assert_code(&list, 0);
    assert!(stdout(&list).lines().any(|line| line.contains(" fib")), "{}", stdout(&list));
    assert!(!stdout(&list).contains("tick"));
}

#[test]
fn what_is_listed_as_specs_can_be_probed() {
    let list = output(&["symbols", "demo", "--specs"]);
    assert_code(&list, 0);
    let probeable = output(&["symbols", "demo", "--probeable"]);
    assert_code(&probeable, 0);
    let (specs, probeable) = (stdout(&list), stdout(&probeable));
    assert!(specs.lines().any(|line| line == "fib"), "{specs}");
    assert!(!probeable.contains("refused"), "{probeable}");
    // Two names of one place are two symbols and one spec.
    assert!(specs.lines().count() > 50 && specs.lines().count() <= probeable.lines().count());
    let refused: Vec<&str> = specs
        .lines()
        .step_by(20)
        .filter(|spec| !output(&["explain", "demo", spec]).status.success())
        .collect();
    assert!(refused.is_empty(), "{refused:?}");
}

#[test]
fn explain_tells_how_a_probe_would_run() {
    let explained = output(&["explain", "demo", "tick"]);
    assert_code(&explained, 0);
    for word in ["tick", "instruction", "emulated", "1 exit a hit"] {
        assert!(stdout(&explained).contains(word), "{}", stdout(&explained));
    }
}

#[test]
fn explain_knows_returns_watchpoints_and_why_not() {
    for (spec, words) in [
        ("tick%return", &["tick", "at its entry", "2 exits a hit", "kprobes/r_tick_0"][..]),
        ("w:mine w@smp_sum:8", &["smp_sum", "a debug register watches 8 bytes", "1 exit", "wprobes/mine"]),
    ] {
        let explained = output(&["explain", "demo", spec]);
        assert_code(&explained, 0);
        for word in words {
            assert!(stdout(&explained).contains(word), "{word}: {}", stdout(&explained));
        }
    }
    let refused = output(&["explain", "demo", "own_ud2+0", "--output", "json"]);
    assert_code(&refused, 5);
    let object: serde_json::Value = serde_json::from_str(&stdout(&refused)).expect("one JSON object");
    let reason = object["refused"].as_str().expect("a reason");
    assert!(reason.contains("invalid on purpose") && reason.contains("the nearest place"), "{reason}");
}

#[test]
fn explain_all_lists_every_instruction_of_a_function() {
    let explained = output(&["explain", "demo", "fib", "--all"]);
    assert_code(&explained, 0);
    let text = stdout(&explained);
    let (rows, total) = text.trim_end().rsplit_once('\n').expect("rows and a total");
    assert!(total.starts_with(&format!("{} places: ", rows.lines().count())), "{text}");
    let first = rows.lines().next().expect("a row");
    assert!(first.contains(" fib ") && rows.lines().all(|row| row.contains(" fib")), "{text}");
    let json = output(&["explain", "demo", "fib", "--all", "--output", "json"]);
    assert_eq!(stdout(&json).lines().count(), rows.lines().count());
    let pattern = output(&["explain", "demo", "smp_*"]);
    assert!(
        stdout(&pattern).ends_with("2 places: 2 emulated, 0 out of line, 0 refused\n"),
        "{}",
        stdout(&pattern)
    );
}

#[test]
fn disks_stay_as_they_are_and_what_is_wrong_with_one_is_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a,b.img");
    let content: Vec<u8> = (0..8192_u32).map(|at| at.to_le_bytes()[0]).collect();
    fs::write(&image, &content).expect("an image");
    let name = image.display().to_string().replace(',', ",,");
    let missing = directory.path().join("missing").display().to_string();
    if local_kvm() {
        let kept = output(&["run", "demo", "--probe", "tick", "--max-hits", "1", "--disk", &name]);
        assert_code(&kept, 0);
        assert!(fs::read(&image).expect("the image") == content);
        let run = output(&["run", "demo", "--probe", "tick", "--disk", &missing]);
        assert_code(&run, 4);
        assert!(stderr(&run).contains(&missing), "{}", stderr(&run));
        // The second would change what the first reads.
        let both = [name.clone(), format!("{name},write")];
        let run = output(&["run", "demo", "--probe", "tick", "--disk", &both[0], "--disk", &both[1]]);
        assert_code(&run, 4);
    }
    // What is wrong is said before the emulated machine is prepared.
    let nested = output(&["run", "demo", "--accel", "nested", "--probe", "tick", "--disk", &missing]);
    assert_code(&nested, 4);
    assert!(stderr(&nested).contains(&missing), "{}", stderr(&nested));
    let saved = directory.path().join("saved").display().to_string();
    let run = output(&["run", "demo", "--disk", &name, "--snapshot", &saved, "--snapshot-at", "1"]);
    assert_code(&run, 2);
}
