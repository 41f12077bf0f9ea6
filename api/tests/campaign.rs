//! Probes by the thousand on a stock kernel: it must boot, do its work and end as if there were none, and hits must equal
//! what the guest counts where it counts.
//!
//! Each campaign has a bounded form, which is a test like any other, and a full one, which `make campaign` runs
//! (docs/campaigns.md). A full one runs with the emulated machine's clock counting instructions: by the host's time, a timer
//! tick in which every function is probed takes longer than the 4 ms to the next, and the guest gets to nothing else.
//!
//! What is chosen by chance depends on a seed that is printed, and that VMPROBE_SEED sets.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Instant, SystemTime};

use common::debian::{Debian, path};
use common::{assert_code, guest_counts, stderr, stdout};
use guest::Guest;
use guest::place::Note;

/// Functions that every system call, switch of tasks, page fault and timer interrupt runs through, and those that copy.
///
/// Not those that average the load (__update_load_avg_se and its like): they run up to eleven instructions out of line in every tick of
/// the timer, and in the emulated machine these alone take longer than a tick.
const HOT: &[&str] = &[
    // System calls.
    "do_syscall_64",
    "syscall_enter_from_user_mode",
    "syscall_exit_to_user_mode",
    "exit_to_user_mode_prepare",
    "__x64_sys_getppid",
    "__x64_sys_openat",
    "do_sys_openat2",
    "getname_flags",
    "do_filp_open",
    "path_openat",
    "link_path_walk.part.0.constprop.0",
    "walk_component",
    "lookup_fast",
    "step_into",
    "__d_lookup_rcu",
    "terminate_walk",
    "do_dentry_open",
    "alloc_empty_file",
    "__alloc_file",
    "alloc_fd",
    "fd_install",
    "putname",
    "ksys_read",
    "vfs_read",
    "__fdget_pos",
    "__fget_light",
    "rw_verify_area",
    "generic_file_read_iter",
    "filemap_read",
    "filemap_get_pages",
    "close_fd",
    "filp_close",
    "fput",
    "____fput",
    "__fput",
    "task_work_add",
    "task_work_run",
    "kmem_cache_alloc",
    "kmem_cache_free",
    "strncpy_from_user",
    "__x64_sys_close",
    "__x64_sys_read",
    "may_open",
    "inode_permission",
    "generic_permission",
    "dput",
    "lockref_put_return",
    "mntput_no_expire",
    "path_init",
    "complete_walk",
    // The scheduler.
    "schedule",
    "__schedule",
    "pick_next_task_fair",
    "pick_next_entity",
    "put_prev_entity",
    "set_next_entity",
    "update_curr",
    "dequeue_task_fair",
    "enqueue_task_fair",
    "dequeue_entity",
    "enqueue_entity",
    "try_to_wake_up",
    "ttwu_do_activate",
    "check_preempt_wakeup",
    "finish_task_switch.isra.0",
    "update_rq_clock",
    "wake_up_process",
    "reweight_entity",
    "resched_curr",
    "check_preempt_curr",
    "select_task_rq_fair",
    "task_tick_fair",
    // Page faults.
    "exc_page_fault",
    "do_user_addr_fault",
    "handle_mm_fault",
    "__handle_mm_fault",
    "find_vma",
    "vma_alloc_folio",
    "__alloc_pages",
    "get_page_from_freelist",
    "clear_page_rep",
    "do_fault",
    "filemap_map_pages",
    "do_wp_page",
    "wp_page_copy",
    "copy_page",
    // Timers.
    "sysvec_apic_timer_interrupt",
    "hrtimer_interrupt",
    "__hrtimer_run_queues",
    "tick_sched_timer",
    "tick_sched_handle",
    "update_process_times",
    "scheduler_tick",
    "run_timer_softirq",
    "clockevents_program_event",
    "ktime_get",
    "tick_handle_periodic",
    "timer_interrupt",
    "update_wall_time",
    "timekeeping_advance",
    "irq_enter_rcu",
    "irq_exit_rcu",
    // Copies.
    "copy_user_generic_string",
    "copy_user_enhanced_fast_string",
    "_copy_to_user",
    "_copy_from_user",
    "_copy_to_iter",
    "copy_page_to_iter",
    "memcpy_erms",
    "memset_erms",
    "__memcpy",
    "__memset",
];

/// Neighbours of the list are probed in different runs. A timer interrupt that runs a thousand probed instructions takes longer
/// than the 4 ms to the next by any clock of the emulated machine, and the guest gets to nothing else.
const HOT_RUNS: usize = 5;

/// The bounded form of the campaign on boundaries takes these.
const FEW: &[&str] = &[
    "__x64_sys_getppid",
    "do_sys_openat2",
    "do_filp_open",
    "path_openat",
    "walk_component",
    "lookup_fast",
    "step_into",
    "terminate_walk",
    "do_dentry_open",
    "alloc_empty_file",
    "alloc_fd",
    "fd_install",
    "putname",
    "may_open",
    "ksys_read",
    "vfs_read",
    "rw_verify_area",
    "generic_file_read_iter",
    "filemap_read",
    "filemap_get_pages",
    "__x64_sys_close",
    "close_fd",
    "filp_close",
    "____fput",
    "task_work_add",
    "strncpy_from_user",
    "copy_page_to_iter",
    "_copy_to_iter",
    "wake_up_process",
    "exc_page_fault",
    "do_user_addr_fault",
    "handle_mm_fault",
    "do_wp_page",
    "wp_page_copy",
];

/// The system calls that the workload counts, by the word that it prints.
const COUNTED: &[(&str, &str)] = &[
    ("openat", "__x64_sys_openat"),
    ("read", "__x64_sys_read"),
    ("close", "__x64_sys_close"),
    ("getppid", "__x64_sys_getppid"),
];

/// A generator of numbers that look like chance (Marsaglia, Xorshift RNGs, 2003).
struct Random(u64);

impl Random {
    fn from_environment() -> Self {
        let given =
            std::env::var("VMPROBE_SEED").ok().map(|seed| seed.parse().expect("VMPROBE_SEED is a number"));
        let now = || SystemTime::UNIX_EPOCH.elapsed().map_or(1, |since| u64::from(since.subsec_nanos()));
        let seed = given.unwrap_or_else(now).max(1);
        println!("VMPROBE_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap_or_default()
    }
}

/// A spec for each function that ftrace can trace, by address of the place.
fn traceable(guest: &Guest) -> Vec<String> {
    let all = guest.matches(&"*".parse().expect("a pattern"));
    let places = all.into_iter().filter_map(|(_, place)| place.ok());
    places
        .filter(|place| place.notes.iter().any(|note| matches!(note, Note::BehindFtraceSite(_))))
        .map(|place| place.gva.to_string())
        .collect()
}

/// A spec for each instruction of the functions that can be probed. Functions that this kernel has not are left out.
fn boundaries(guest: &Guest, functions: &[&str]) -> Vec<String> {
    let known = functions.iter().filter_map(|name| guest.boundaries(name).ok());
    let places = known.flatten().filter_map(|boundary| boundary.place.ok());
    let unique: BTreeSet<String> = places.map(|place| place.gva.to_string()).collect();
    unique.into_iter().collect()
}

/// What one run counted.
struct Counted {
    hits: BTreeMap<String, u64>,
    console: String,
}

/// Boots on `accel` with all of `specs` armed and the workload's `rounds`, and checks that the guest did not mind.
#[track_caller]
fn run(debian: &Debian, accel: &str, specs: &[String], rounds: u32, limit: &str) -> Counted {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(&file, specs.join("\n")).expect("written");
    let cmdline = format!("quiet rounds={rounds}");
    let probes = path(file.path());
    let started = Instant::now();
    let output = debian.run(&[
        "--accel",
        accel,
        "--probes",
        &probes,
        "--count",
        "--output",
        "json",
        "--cmdline",
        &cmdline,
        "--timeout",
        limit,
        "--verbose",
    ]);
    let took = started.elapsed();
    assert_code(&output, 0);
    let console = debian.console();
    assert!(console.contains("workload: ok"), "{console}");
    for bad in ["WARNING:", "BUG:", "Oops", "int3:", "general protection"] {
        assert!(!console.contains(bad), "{console}");
    }
    let mut hits = BTreeMap::new();
    let (mut total, mut lost) = (0, 0);
    for line in stdout(&output).lines() {
        let counts: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        let number = |name: &str| counts[name].as_u64().expect("a count");
        assert_eq!(
            number("hits"),
            number("emulated") + number("stepped") + number("faulted") + number("diverted"),
            "every hit's instruction ran once: {line}"
        );
        total += number("hits");
        lost += number("lost");
        hits.insert(counts["probe"].as_str().expect("a probe").to_owned(), number("hits"));
    }
    assert_eq!(hits.len(), specs.len());
    assert_eq!(lost, 0);
    assert!(!stderr(&output).contains("was taken out: "), "{}", stderr(&output));
    let reached = hits.values().filter(|hits| **hits > 0).count();
    // The hottest of them, how their instructions ran, exits, and the guest's time.
    stderr(&output).lines().for_each(|line| println!("{line}"));
    println!("{} probes, {reached} of them hit, {total} hits, {:.0} s", specs.len(), took.as_secs_f64());
    Counted { hits, console }
}

/// Hits on the entries of the counted system calls that were probed equal the guest's own counts. How many were probed.
#[track_caller]
fn check_system_calls(guest: &Guest, counted: &Counted) -> usize {
    let own = guest_counts(&counted.console);
    let mut checked = 0;
    for (word, symbol) in COUNTED {
        let spec = guest.place(symbol).expect("a stock kernel has it").gva.to_string();
        if let Some(hits) = counted.hits.get(&spec) {
            assert!(own[*word] > 0);
            assert_eq!(*hits, own[*word], "{word}");
            checked += 1;
        }
    }
    checked
}

#[test]
fn thousands_of_functions_and_every_system_call_are_probed_at_once() {
    let Some(debian) = Debian::new() else { return };
    let guest = Guest::open(Path::new(&debian.kernel)).expect("a kernel");
    let all = traceable(&guest);
    let mut random = Random::from_environment();
    let calls = guest.matches(&"__x64_sys_*".parse().expect("a pattern"));
    let mut specs: BTreeSet<String> =
        calls.into_iter().filter_map(|(_, place)| place.ok()).map(|place| place.gva.to_string()).collect();
    assert!(specs.len() > 300, "{}", specs.len());
    while specs.len() < 1_200 {
        specs.insert(all[random.below(all.len())].clone());
    }
    let counted = run(&debian, "nested", &specs.into_iter().collect::<Vec<_>>(), 5, "15m");
    assert_eq!(check_system_calls(&guest, &counted), COUNTED.len());
}

#[test]
fn every_instruction_of_hot_functions_is_probed() {
    let Some(debian) = Debian::new() else { return };
    let guest = Guest::open(Path::new(&debian.kernel)).expect("a kernel");
    let specs = boundaries(&guest, FEW);
    assert!(specs.len() > 500, "{}", specs.len());
    let counted = run(&debian, "nested", &specs, 5, "15m");
    assert_eq!(check_system_calls(&guest, &counted), 2, "close and getppid");
}

#[test]
#[ignore = "takes long: make campaign"]
fn every_traceable_function_is_probed_at_once() {
    let Some(debian) = Debian::new() else { return };
    let guest = Guest::open(Path::new(&debian.kernel)).expect("a kernel");
    let specs = traceable(&guest);
    assert!(specs.len() > 30_000, "{}", specs.len());
    let counted = run(&debian, "nested-icount", &specs, 1, "3h");
    assert_eq!(check_system_calls(&guest, &counted), COUNTED.len());
}

#[test]
#[ignore = "takes long: make campaign"]
fn every_instruction_of_a_hundred_hot_functions_is_probed() {
    let Some(debian) = Debian::new() else { return };
    let guest = Guest::open(Path::new(&debian.kernel)).expect("a kernel");
    let known: Vec<&str> = HOT.iter().copied().filter(|name| guest.boundaries(name).is_ok()).collect();
    assert!(known.len() >= 100, "{}", known.len());
    let mut checked = 0;
    for run_number in 0..HOT_RUNS {
        let functions: Vec<&str> = known.iter().copied().skip(run_number).step_by(HOT_RUNS).collect();
        let counted = run(&debian, "nested-icount", &boundaries(&guest, &functions), 1, "3h");
        checked += check_system_calls(&guest, &counted);
    }
    assert_eq!(checked, 4, "close, getppid, openat and read");
}
