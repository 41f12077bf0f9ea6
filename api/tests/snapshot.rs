//! Machines that are saved and restored, by the command and by the service.

#![allow(clippy::tests_outside_test_module, clippy::unwrap_used, reason = "the whole crate is tests")]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::debian::path;
use common::service::Service;
use common::{assert_code, local_kvm, output, stderr, stdout, tmpfs};
use serde_json::Value;

/// Saves a ticker whose `tick` is probed, after some hits.
fn save(directory: &Path) {
    let directory = path(directory);
    let run = output(&[
        "run",
        "ticker",
        "--probe",
        "tick",
        "--count",
        "--serial",
        "none",
        "--memory",
        "64M",
        "--snapshot",
        &directory,
        "--snapshot-at",
        "500",
        "--max-hits",
        "200000",
    ]);
    assert_code(&run, 0);
    assert!(stderr(&run).contains("the machine was saved"), "{}", stderr(&run));
    assert!(stderr(&run).contains("tick: 200000 hits"), "it goes on: {}", stderr(&run));
}

fn restore(directory: &Path, arguments: &[&str]) -> std::process::Output {
    let directory = path(directory);
    output(&[&["run", "--restore", &directory, "--serial", "none"], arguments].concat())
}

/// The first argument of the hits of each vCPU.
fn ticks(run: &std::process::Output) -> BTreeMap<u64, Vec<u64>> {
    let mut ticks = BTreeMap::<u64, Vec<u64>>::new();
    for line in stdout(run).lines() {
        let hit: Value = serde_json::from_str(line).unwrap();
        let arg1 = hit["args"]["arg1"].as_str().unwrap().trim_start_matches("0x");
        ticks.entry(hit["vcpu"].as_u64().unwrap()).or_default().push(u64::from_str_radix(arg1, 16).unwrap());
    }
    ticks
}

#[test]
fn each_restored_machine_goes_on_from_the_same_tick_and_misses_none() {
    if !local_kvm() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("saved");
    save(&directory);
    let verified = output(&["verify", &path(&directory)]);
    assert_code(&verified, 0);
    assert!(stdout(&verified).contains("64 MiB of memory, 2 vCPUs and 1 probes"), "{}", stdout(&verified));
    let firsts: Vec<_> = (0..2)
        .map(|_| {
            // The probe is the snapshot's.
            let run = restore(&directory, &["--output", "json", "--max-hits", "400"]);
            assert_code(&run, 0);
            let ticks = ticks(&run);
            assert_eq!(ticks.values().map(Vec::len).sum::<usize>(), 400);
            for ticks in ticks.values() {
                assert!(ticks.windows(2).all(|two| two[1] == two[0] + 1), "{ticks:?}");
            }
            ticks.into_iter().map(|(vcpu, ticks)| (vcpu, ticks[0])).collect::<BTreeMap<_, _>>()
        })
        .collect();
    // On a busy host one vCPU may not have come to run.
    let common = firsts[0].iter().filter_map(|(vcpu, first)| Some((first, firsts[1].get(vcpu)?)));
    let common: Vec<_> = common.collect();
    assert!(!common.is_empty() && common.iter().all(|(one, other)| one == other), "{firsts:?}");
    assert!(firsts[0].values().all(|first| *first > 0), "not from the start: {firsts:?}");
    for what_is_saved in
        [&["--memory", "64M"][..], &["--cpus", "2"], &["--cmdline", "quiet"], &["--kaslr"], &["demo"]]
    {
        assert_code(&restore(&directory, what_is_saved), 2);
    }
    let both = restore(&directory, &["--probe", "tick+0x1", "--count", "--max-hits", "100"]);
    assert_code(&both, 0);
    let text = stderr(&both);
    assert!(text.contains("tick: ") && text.contains("tick+0x1: "), "probes can be added: {text}");
}

#[test]
fn what_is_not_as_it_was_saved_is_refused() {
    if !local_kvm() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let directory = home.path().join("saved");
    save(&directory);
    let refused = |what: &str, run: &std::process::Output| {
        assert_code(run, 4);
        assert!(stderr(run).contains(what), "{what:?} in {}", stderr(run));
    };
    let flip = |name: &str, at: u64| {
        let file = File::options().read(true).write(true).open(directory.join(name)).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    };
    // Version, checksum, contents, and the other files.
    for (name, at, what) in [
        ("state", 0, "not the state of a vmprobe snapshot"),
        ("state", 8, "format version"),
        ("state", 12, "is damaged: its checksum"),
        ("state", 5000, "is damaged: its checksum"),
        ("image", 2000, "damaged: image"),
        ("manifest.json", 18, "damaged: manifest.json"),
    ] {
        flip(name, at);
        refused(what, &restore(&directory, &[]));
        flip(name, at);
    }
    // A restore reads no memory, so it does not see this.
    flip("memory", 0x10_0000);
    refused("memory is damaged", &output(&["verify", &path(&directory)]));
    let memory = File::options().write(true).open(directory.join("memory")).unwrap();
    memory.set_len((64 << 20) - 4096).unwrap();
    refused("not complete", &restore(&directory, &[]));
    fs::remove_file(directory.join("manifest.json")).unwrap();
    refused("no snapshot: manifest.json", &restore(&directory, &[]));
}

#[test]
fn a_snapshot_that_cannot_be_written_leaves_nothing_and_the_run_goes_on() {
    if !local_kvm() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let ticker = |directory: &Path, at: &str| {
        output(&[
            "run",
            "ticker",
            "--probe",
            "tick",
            "--count",
            "--serial",
            "none",
            "--max-hits",
            "5000",
            "--snapshot",
            &path(directory),
            "--snapshot-at",
            at,
        ])
    };
    let there = ticker(home.path(), "100");
    assert_code(&there, 2);
    assert!(stderr(&there).contains("never overwritten"), "{}", stderr(&there));
    let early = ticker(&home.path().join("early"), "6000");
    assert_code(&early, 3);
    assert!(stderr(&early).contains("before hit 6000"), "{}", stderr(&early));

    let full = home.path().join("full");
    fs::create_dir(&full).unwrap();
    let Some(_mounted) = tmpfs(&full, 16 << 10) else { return };
    let run = ticker(&full.join("saved"), "100");
    assert_code(&run, 3);
    let text = stderr(&run);
    assert!(text.contains("No space left") && text.contains("tick: 5000 hits"), "{text}");
    assert_eq!(fs::read_dir(&full).unwrap().count(), 0);
}

#[test]
fn the_service_saves_a_machine_and_four_clones_run_at_once_and_count_for_themselves() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    let directory = service.dir.path().join("saved");
    let saved = path(&directory);
    service.json(&["vm", "create", "ticker", "--name", "t", "--memory", "64M"]);
    let early = service.client(&["vm", "snapshot", "t", &saved]);
    assert_code(&early, 2);
    assert!(stderr(&early).contains("runs or is paused") && !directory.exists(), "{}", stderr(&early));
    service.json(&["probe", "add", "t", "tick", "tick+0x1"]);
    service.json(&["probe", "disable", "t", "1"]);
    service.json(&["vm", "start", "t"]);
    service.json(&["events", "t", "--from", "0", "--max", "50"]);
    let original = service.json(&["vm", "snapshot", "t", &saved]);
    assert_eq!(original[0]["state"], "running");
    service.json(&["vm", "pause", "t"]);
    assert_code(&service.client(&["vm", "snapshot", "t", &path(&service.dir.path().join("again"))]), 0);

    let clones = service.json(&["vm", "restore", &saved, "--name", "c", "--count", "4", "--stopped"]);
    assert_eq!(clones.len(), 4);
    assert_eq!((&clones[3]["name"], &clones[3]["snapshot"]), (&"c-4".into(), &saved.as_str().into()));
    assert_eq!((&clones[3]["image"], &clones[3]["memory_bytes"]), (&"ticker".into(), &(64 << 20).into()));
    let rounds = |machine: &str| -> u64 {
        let registers = service.json(&["guest", "registers", machine]);
        let rounds = registers.iter().map(|vcpu| {
            let rbx = vcpu["regs"]["rbx"].as_str().unwrap().trim_start_matches("0x").to_owned();
            u64::from_str_radix(&rbx, 16).unwrap()
        });
        rounds.sum()
    };
    let names: Vec<String> = (1..=4).map(|number| format!("c-{number}")).collect();
    let before: Vec<u64> = names.iter().map(|name| rounds(name)).collect();
    assert!(before.iter().all(|rounds| *rounds == before[0] && *rounds > 0), "{before:?}");
    for name in &names {
        service.json(&["vm", "start", name]);
    }
    for (number, name) in names.iter().enumerate() {
        service.json(&["events", name, "--from", "0", "--max", &(100 * (number + 1)).to_string()]);
    }
    for (name, before) in names.iter().zip(before) {
        service.json(&["vm", "pause", name]);
        let probes = service.json(&["probe", "ls", name]);
        assert_eq!((&probes[0]["state"], &probes[1]["state"]), (&"enabled".into(), &"disabled".into()));
        let hits = probes[0]["hits"].as_u64().unwrap();
        let since = rounds(name) - before;
        // Each of two vCPUs may stand behind the hit of a round that it has not counted, then and now.
        assert!(hits.abs_diff(since) <= 2 && hits >= 100, "{name}: {hits} hits, {since} rounds");
    }
    assert!(service.audit().contains("SaveMachine"));
    assert_code(&output(&["verify", &saved]), 0);
    let none = service.client(&["vm", "restore", &path(service.dir.path())]);
    assert_code(&none, 4);
    assert!(stderr(&none).contains("no snapshot"), "{}", stderr(&none));
}
