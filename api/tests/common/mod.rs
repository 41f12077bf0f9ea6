//! What the end-to-end tests share: running the command, and the rule for rungs that a host cannot do.

#![allow(dead_code)]

pub mod certificates;
pub mod debian;
pub mod service;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

/// The command, as a user runs it.
pub fn vmprobe(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmprobe"));
    command.args(args);
    command
}

pub fn output(args: &[&str]) -> Output {
    vmprobe(args).output().expect("vmprobe starts")
}

/// `arguments` with a --probe for each of `probes`.
pub fn with_probes<'a>(arguments: &[&'a str], probes: &[&'a str]) -> Vec<&'a str> {
    let probes = probes.iter().flat_map(|probe| ["--probe", probe]);
    arguments.iter().copied().chain(probes).collect()
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
pub fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stderr:\n{}\nstdout:\n{}", stderr(output), stdout(output));
}

/// False, with a printed reason, where a rung cannot run here; in CI that is a failure.
#[track_caller]
fn require(rung: &str, possible: Result<(), String>) -> bool {
    let Err(why) = possible else { return true };
    assert!(std::env::var_os("CI").is_none_or(|ci| ci != "true"), "The {rung} rung is required in CI: {why}");
    println!("skipped: the {rung} rung: {why}");
    false
}

/// Whether bare-metal guests can run on this host's KVM.
#[track_caller]
pub fn local_kvm() -> bool {
    let device = Path::new("/dev/kvm");
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(device);
    require("local /dev/kvm", opened.map(drop).map_err(|error| format!("{}: {error}", device.display())))
}

/// Whether the emulated machine can be prepared, or is.
#[track_caller]
pub fn nested() -> bool {
    let prepared = output(&["prepare", "nested"]);
    require("nested", if prepared.status.success() { Ok(()) } else { Err(stderr(&prepared)) })
}

/// Whether Python packages can be installed into an environment of their own.
#[track_caller]
pub fn python() -> bool {
    let found = Command::new("python3").args(["-c", "import venv, ensurepip"]).output();
    let found = found.map_err(|error| format!("python3: {error}"));
    require(
        "Python",
        found.and_then(|found| if found.status.success() { Ok(()) } else { Err(stderr(&found)) }),
    )
}

/// Whether there is passt, which connects a guest without rights.
#[track_caller]
pub fn passt() -> bool {
    let found = Command::new("passt").arg("--version").output();
    require("passt", found.map(drop).map_err(|error| format!("passt: {error}")))
}

/// A small file system of its own, which goes with this.
pub struct Tmpfs(std::path::PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        Command::new("umount").arg("--lazy").arg(&self.0).status().ok();
    }
}

/// Mounts a file system of so many bytes, where that is allowed.
#[track_caller]
pub fn tmpfs(at: &Path, bytes: u64) -> Option<Tmpfs> {
    let options = format!("size={bytes},mode=0700");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
    let mounted = mounted.map_err(|error| format!("mount: {error}"));
    let mounted = mounted.and_then(|done| if done.status.success() { Ok(()) } else { Err(stderr(&done)) });
    require("full disk", mounted).then(|| Tmpfs(at.to_owned()))
}

/// The lines `count NAME N` that our guest programs print.
pub fn guest_counts(console: &str) -> BTreeMap<String, u64> {
    console
        .lines()
        .filter_map(|line| {
            let mut words = line.trim().split_ascii_whitespace();
            (words.next() == Some("count")).then_some(())?;
            Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
        })
        .collect()
}

/// What `vmprobe run --count --output json` prints: each probe's account.
pub fn accounts(stdout: &str) -> Vec<serde_json::Value> {
    stdout.lines().map(|line| serde_json::from_str(line).expect("an account a line")).collect()
}

/// What gdb prints of a core file.
pub fn gdb(core: &str, commands: &[&str]) -> String {
    let mut gdb = Command::new("gdb");
    gdb.args(["-batch", "-nx", "-core", core]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let output = gdb.output().expect("gdb is installed");
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

/// What `vmprobe bench --output json` prints, by case.
pub fn bench_rows(stdout: &str) -> BTreeMap<String, serde_json::Value> {
    let row = |line| {
        let row: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        (row["case"].as_str().expect("a row names its case").to_owned(), row)
    };
    stdout.lines().map(row).collect()
}

/// Hits by `symbol`, from text or JSON output.
pub fn hits(stdout: &str) -> BTreeMap<String, u64> {
    let mut hits = BTreeMap::new();
    for line in stdout.lines() {
        let hit: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        let probe = hit["probe"].as_str().expect("a hit names its probe").to_owned();
        *hits.entry(probe).or_default() += 1;
    }
    hits
}
