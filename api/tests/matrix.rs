//! `vmprobe matrix`, run as its users run it, over the built-in guest on the local /dev/kvm.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{assert_code, local_kvm, stderr, stdout, tmpfs, vmprobe};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// The guest calls `tick` 300 times on two vCPUs, and says so.
const MATRIX: &str = "\
[axes]
kernel = ['demo']
vcpus = [2]
memory = ['256M', '512M']

[[probes.entry]]
spec = 'tick'
count = { console = '^count tick (\\d+)' }

[[probes.return]]
spec = 'tick%return ret=$retval'
count = 300
values = { ret = 200 }

[console]
must = ['^demo: ok$']
must-not = ['FAIL']

[limits]
timeout = '120s'

[[same]]
of = 'count'
across = ['memory']
";

struct Place {
    directory: TempDir,
}

impl Place {
    fn new(text: &str) -> Self {
        let place = Self { directory: tempfile::tempdir().expect("a temporary directory") };
        fs::write(place.path("m.toml"), text).expect("a file in it");
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn matrix(&self, arguments: &[&str]) -> Output {
        vmprobe(&[&["matrix"][..], arguments].concat())
            .current_dir(self.directory.path())
            .output()
            .expect("vmprobe starts")
    }

    /// Runs the cells of [`MATRIX`] in two halves, with results in `shard1` and `shard2`.
    #[track_caller]
    fn run_in_two_shards(&self) {
        for shard in ["1/2", "2/2"] {
            let directory = format!("shard{}", &shard[..1]);
            let output = self.matrix(&["m.toml", "--shard", shard, "--results", &directory]);
            assert_code(&output, 0);
            assert_eq!(cells_run(&output), 2);
            assert!(stdout(&output).contains("2 passed, 2 not run"), "{}", stdout(&output));
        }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).expect("a file of the results")
    }
}

/// How many cells a run said it ran.
fn cells_run(output: &Output) -> usize {
    stderr(output).lines().filter(|line| line.starts_with("vmprobe: memory=")).count()
}

#[test]
fn a_matrix_passes_and_is_not_run_twice() {
    if !local_kvm() {
        return;
    }
    let place = Place::new(MATRIX);
    let first = place.matrix(&["m.toml"]);
    assert_code(&first, 0);
    assert_eq!(cells_run(&first), 4);
    assert!(stdout(&first).contains("4 passed; m.results/report.html"), "{}", stdout(&first));

    let junit = place.read("m.results/junit.xml");
    assert!(junit.contains("tests=\"4\"") && junit.contains("failures=\"0\""), "{junit}");
    assert!(
        place.read("m.results/report.tap").starts_with("TAP version 14\n1..4\nok 1 - memory=256M entry\n")
    );
    let report: serde_json::Value = serde_json::from_str(&place.read("m.results/report.json")).unwrap();
    assert_eq!(report["summary"]["passed"], 4);
    let returned = &report["cells"][3]["attempts"][0]["outcome"]["probes"][0];
    assert_eq!(
        (&returned["hits"], &returned["durations"]["count"]),
        (&300.into(), &300.into()),
        "{returned}"
    );
    let page = place.read("m.results/report.html");
    assert!(page.contains("count tick 300"), "the page has the console");

    let second = place.matrix(&["m.toml"]);
    assert_code(&second, 0);
    assert_eq!(cells_run(&second), 0);
    assert_eq!(stdout(&second), stdout(&first));
}

#[test]
fn a_cell_that_is_not_as_expected_fails_alone_and_can_be_run_again() {
    if !local_kvm() {
        return;
    }
    let text = MATRIX.replace("count = 300", "count = 301").replace("'120s'", "'120s'\nretries = 1");
    let place = Place::new(&text);
    let output = place.matrix(&["m.toml"]);
    assert_code(&output, 1);
    let said = stdout(&output);
    assert!(said.contains("2 passed, 2 failed"), "{said}");
    let finding = "memory=512M return: failed: tick%return ret=$retval: 300 hits, expected 301";
    assert!(said.lines().any(|line| line == finding), "{said}");
    let report: serde_json::Value = serde_json::from_str(&place.read("m.results/report.json")).unwrap();
    assert_eq!(report["cells"][1]["attempts"].as_array().unwrap().len(), 2, "it was tried again");
    assert_eq!(cells_run(&place.matrix(&["m.toml"])), 0);
    assert_eq!(cells_run(&place.matrix(&["m.toml", "--failed"])), 2);
}

#[test]
fn shards_share_the_cells_and_become_one_report() {
    if !local_kvm() {
        return;
    }
    let place = Place::new(MATRIX);
    place.run_in_two_shards();
    let merged = place.matrix(&["report", "m.toml", "shard1", "shard2", "--results", "all"]);
    assert_code(&merged, 0);
    assert!(stdout(&merged).contains("4 passed; all/report.html"), "{}", stdout(&merged));
    assert_eq!(place.read("all/report.html").matches("count tick 300").count(), 4, "each console came along");
}

#[test]
fn results_where_the_report_goes_are_part_of_it() {
    if !local_kvm() {
        return;
    }
    let place = Place::new(MATRIX);
    place.run_in_two_shards();
    // One of the shards' directories, by another name, takes the others in.
    let merged = place.matrix(&["report", "m.toml", "shard1", "shard2", "--results", "./shard1/../shard1"]);
    assert_code(&merged, 0);
    assert!(stdout(&merged).contains("4 passed"), "{}", stdout(&merged));
    assert_eq!(place.read("shard1/report.html").matches("count tick 300").count(), 4, "no console is lost");

    // It need not be named: nothing that is there goes.
    let again = place.matrix(&["report", "m.toml", "shard1", "--results", "shard2"]);
    assert!(stdout(&again).contains("4 passed"), "{}", stdout(&again));

    let before = place.read("shard2/results.jsonl");
    fs::write(place.path("m.toml"), MATRIX.replace("300", "301")).unwrap();
    let other = place.matrix(&["report", "m.toml", "shard1", "--results", "shard2"]);
    assert_code(&other, 2);
    assert!(stderr(&other).contains("another version of the matrix"), "{}", stderr(&other));
    assert_eq!(place.read("shard2/results.jsonl"), before, "they are as they were");
}

#[test]
fn one_cell_that_hangs_one_that_is_refused_and_one_that_cannot_begin_leave_the_others_alone() {
    if !local_kvm() {
        return;
    }
    // `ticker` never ends.
    let text = "[axes]\nkernel = ['demo', 'ticker']\n[[probes.good]]\nspec = 'tick'\n[[probes.bad]]\nspec = 'no_such'\n\
                [limits]\ntimeout = '2s'\n";
    let place = Place::new(text);
    let output = place.matrix(&["m.toml"]);
    assert_code(&output, 1);
    let said = stdout(&output);
    assert!(said.contains("1 passed, 3 failed"), "{said}");
    assert!(said.lines().any(|line| line == "ticker good: failed: timeout"), "{said}");
    assert!(
        said.lines().any(|line| line.starts_with("demo bad: failed: ") && line.contains("no_such")),
        "{said}"
    );
}

#[test]
fn an_interrupt_keeps_what_there_is_and_the_next_run_goes_on() {
    if !local_kvm() {
        return;
    }
    let text = "[axes]\nkernel = ['demo', 'ticker']\n[limits]\ntimeout = '300s'\n";
    let place = Place::new(text);
    let child = vmprobe(&["matrix", "m.toml"])
        .current_dir(place.directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The first cell's result is there, and the second one runs for ever.
    let deadline = Instant::now() + Duration::from_secs(60);
    let results = place.path("m.results/results.jsonl");
    let ticking = place.path("m.results/cells/002-ticker/console.log");
    while lines(&results) < 2 || !ticking.exists() {
        assert!(Instant::now() < deadline, "no result of the first cell");
        std::thread::sleep(Duration::from_millis(20));
    }
    kill_process(Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap(), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_code(&output, 130);
    assert!(stdout(&output).contains("1 passed, 1 not run"), "{}", stdout(&output));

    let again = place.matrix(&["m.toml", "--list"]);
    assert_eq!(stdout(&again), "demo\nticker\n");
    let other = "[axes]\nkernel = ['demo']\n";
    fs::write(place.path("m.toml"), other).unwrap();
    let refused = place.matrix(&["m.toml"]);
    assert_code(&refused, 2);
    assert!(
        stderr(&refused).contains("another version of the matrix; --results names another directory"),
        "{}",
        stderr(&refused)
    );
    let fresh = place.matrix(&["m.toml", "--fresh"]);
    assert_code(&fresh, 0);
    assert!(stdout(&fresh).contains("1 passed;"), "{}", stdout(&fresh));
}

/// The process that runs a guest with this name, a child of `parent` (proc_pid_task_children(5)).
fn run_of(parent: u32, guest: &str) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task")).ok()?.filter_map(Result::ok);
    let children: String =
        tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok()).collect();
    let mut children = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
    let runs_it = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).rfind(|word| !word.is_empty()) == Some(guest.as_bytes())
    };
    children.find(runs_it).and_then(Pid::from_raw)
}

#[test]
fn a_cell_whose_process_is_killed_fails_alone() {
    if !local_kvm() {
        return;
    }
    let place = Place::new("[axes]\nkernel = ['ticker', 'demo']\n[limits]\ntimeout = '300s'\n");
    let child = vmprobe(&["matrix", "m.toml", "--jobs", "2"])
        .current_dir(place.directory.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    let run = loop {
        if let Some(run) = run_of(child.id(), "ticker") {
            break run;
        }
        assert!(Instant::now() < deadline, "no process of the cell");
        std::thread::sleep(Duration::from_millis(20));
    };
    kill_process(run, Signal::KILL).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_code(&output, 1);
    let said = stdout(&output);
    assert!(said.lines().any(|line| line == "ticker: failed: its process was killed (signal 9)"), "{said}");
    assert!(said.contains("1 passed, 1 failed"), "{said}");
}

#[test]
fn a_full_disk_is_told_and_the_matrix_goes_on_when_there_is_room() {
    if !local_kvm() {
        return;
    }
    for pages in [2, 8, 20] {
        let place = Place::new(MATRIX);
        fs::create_dir(place.path("small")).unwrap();
        let Some(_disk) = tmpfs(&place.path("small"), pages * 4096) else { return };
        let full = place.matrix(&["m.toml", "--results", "small", "--jobs", "2"]);
        assert!(matches!(full.status.code(), Some(1 | 3)), "{pages}: {full:?}");
        let said = stdout(&full) + &stderr(&full);
        assert!(said.contains("No space left on device"), "{pages}: {said}");

        let grown = Command::new("mount").args(["-o", "remount,size=16M"]).arg(place.path("small")).status();
        assert!(grown.unwrap().success());
        let known = fs::read_to_string(place.path("small/results.jsonl")).unwrap_or_default();
        let passed = known.matches("\"findings\":[]").count();
        let after = place.matrix(&["m.toml", "--results", "small", "--failed"]);
        assert_code(&after, 0);
        assert!(stdout(&after).contains("4 passed"), "{pages}: {}", stdout(&after));
        assert!(cells_run(&after) <= 4 - passed.min(4), "{pages}: what passed is not run again");
    }
}

#[test]
fn the_first_kernel_that_differs_is_found_and_the_search_can_be_repeated() {
    if !local_kvm() {
        return;
    }
    // Eight kernels, of which the sixth is the first that never ends.
    let names: Vec<String> = (1..=8).map(|number| format!("'kernel-{number}'")).collect();
    let place = Place::new(&format!(
        "[axes]\nkernel = [{}]\nvcpus = [2]\n[limits]\ntimeout = '3s'\n",
        names.join(", ")
    ));
    for number in 1..=8 {
        let program = if number < 6 { guest::programs::DEMO } else { guest::programs::TICKER };
        fs::write(place.path(&format!("kernel-{number}")), program).unwrap();
    }
    let found = "the first that differs is kernel-6, failed: timeout; kernel-5 is the last with passed";
    let output = place.matrix(&["bisect", "m.toml"]);
    assert_code(&output, 0);
    assert_eq!(stdout(&output), format!("{found} (5 runs)\n"));
    let again = place.matrix(&["bisect", "m.toml"]);
    assert_eq!(stdout(&again), format!("{found} (0 runs)\n"));
    // The matrix itself goes on with what is known.
    let all = place.matrix(&["m.toml"]);
    assert_code(&all, 1);
    assert_eq!(stderr(&all).lines().filter(|line| line.starts_with("vmprobe: kernel-")).count(), 3);
    let alike = place.matrix(&["bisect", "m.toml", "--only", "kernel=kernel-1", "--only", "kernel=kernel-3"]);
    assert_code(&alike, 1);
    assert_eq!(stdout(&alike), "kernel-1 and kernel-3 are alike, passed (0 runs)\n");
    let refused = place.matrix(&["bisect", "m.toml", "--count", "no_such"]);
    assert_code(&refused, 2);
    assert!(stderr(&refused).contains("no probe with this spec"), "{}", stderr(&refused));
}

fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

#[test]
fn what_cannot_be_meant_is_refused_before_anything_runs() {
    let refused = |text: &str| {
        let place = Place::new(text);
        let output = place.matrix(&["m.toml"]);
        assert!(!place.path("m.results").exists(), "nothing was begun");
        (output.status.code(), stderr(&output))
    };
    let (code, said) = refused("[axes]\nkernel = ['demo']\ncpus = [1]\n");
    assert_eq!(code, Some(2));
    assert!(said.starts_with("vmprobe: m.toml: line 3, column 1: unknown field `cpus`"), "{said}");
    let values: Vec<String> = (1..=64).map(|count| count.to_string()).collect();
    let words: Vec<String> = (0..20).map(|word| format!("'w{word}'")).collect();
    let many = format!(
        "[axes]\nkernel = ['demo']\nvcpus = [{}]\ncmdline = [{}]\n",
        values.join(","),
        words.join(",")
    );
    let (code, said) = refused(&many);
    assert_eq!(code, Some(2));
    assert!(said.contains("These are 1280 cells; --yes runs so many"), "{said}");
    let place = Place::new("[axes]\nkernel = ['vmlinuz']\n[workload]\nfiles = 'no/such'\n");
    fs::write(place.path("vmlinuz"), "").unwrap();
    let output = place.matrix(&["m.toml"]);
    assert_code(&output, 2);
    assert!(
        stderr(&output).contains("workload: Cannot pack \"no/such\": No such file"),
        "{}",
        stderr(&output)
    );
}
