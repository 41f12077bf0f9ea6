//! The journal: events that are no longer in memory, and those of machines whose process is gone.

#![allow(clippy::tests_outside_test_module)]

mod common;
#[path = "../src/contract.rs"]
#[allow(dead_code)]
mod contract;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::service::Service;
use common::{assert_code, local_kvm, stderr, tmpfs};
use contract::events_client::EventsClient;
use contract::machines_client::MachinesClient;
use contract::probes_client::ProbesClient;
use contract::{
    AddProbesRequest, CreateMachineRequest, DeleteMachineRequest, Event, GetMachineRequest,
    ListProbesRequest, Machine, MachineSpec, MachineState, PauseMachineRequest, StartMachineRequest,
    StopMachineRequest, StreamEventsRequest, StreamEventsResponse,
};
use rustix::process::Signal;
use tonic::transport::Channel;

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A service that writes a journal, and where.
fn start(args: &[&str]) -> (Service, PathBuf) {
    start_in(tempfile::tempdir().expect("a directory"), args)
}

fn start_in(dir: tempfile::TempDir, args: &[&str]) -> (Service, PathBuf) {
    let journal = dir.path().join("journal");
    (start_at(dir, &journal, args), journal)
}

fn start_at(dir: tempfile::TempDir, journal: &Path, args: &[&str]) -> Service {
    Service::start_with(dir, &[&["--journal", journal.to_str().expect("UTF-8")], args].concat())
}

/// A machine that runs, whose every tick is an event.
async fn ticking(channel: &Channel, name: &str) {
    let spec = MachineSpec {
        image: "ticker".to_owned(),
        memory_bytes: 32 << 20,
        vcpus: 1,
        ..MachineSpec::default()
    };
    let name = name.to_owned();
    let request = CreateMachineRequest { name: name.clone(), spec: Some(spec), ..Default::default() };
    let mut machines = MachinesClient::new(channel.clone());
    machines.create_machine(request).await.expect("a machine");
    let specs = vec!["tick".to_owned(), "tick+4".to_owned()];
    let request = AddProbesRequest { machine: name.clone(), specs, ..Default::default() };
    ProbesClient::new(channel.clone()).add_probes(request).await.expect("armed");
    machines.start_machine(StartMachineRequest { name }).await.expect("it runs");
}

async fn machine(channel: &Channel, name: &str) -> Machine {
    let request = GetMachineRequest { name: name.to_owned() };
    MachinesClient::new(channel.clone()).get_machine(request).await.expect("it is listed").into_inner()
}

/// The events that its probes have had.
async fn total(channel: &Channel, name: &str) -> u64 {
    let request = ListProbesRequest { machine: name.to_owned() };
    let probes = ProbesClient::new(channel.clone()).list_probes(request).await.expect("a list").into_inner();
    probes.probes.iter().map(|probe| probe.counts.expect("counts").delivered).sum()
}

async fn until_total(channel: &Channel, name: &str, wanted: u64) {
    let until = Instant::now() + PATIENCE;
    while total(channel, name).await < wanted {
        assert!(Instant::now() < until, "too few hits");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn stop(channel: &Channel, name: &str) -> Machine {
    let request = StopMachineRequest { name: name.to_owned(), grace_ns: 0 };
    MachinesClient::new(channel.clone()).stop_machine(request).await.expect("it stops").into_inner()
}

fn from(machine: &str, sequence: u64) -> StreamEventsRequest {
    StreamEventsRequest {
        machine: machine.to_owned(),
        from_sequence: Some(sequence),
        ..StreamEventsRequest::default()
    }
}

/// What a stream brought until it ended or broke off: its events, its last account, and why it broke off.
#[derive(Default)]
struct Seen {
    events: Vec<Event>,
    last: StreamEventsResponse,
    broken: Option<tonic::Status>,
}

async fn read(channel: Channel, request: StreamEventsRequest) -> Seen {
    let mut seen = Seen::default();
    let stream = EventsClient::new(channel).stream_events(request).await.expect("a stream");
    let mut stream = stream.into_inner();
    loop {
        match stream.message().await {
            Ok(Some(mut response)) => {
                seen.events.append(&mut response.events);
                let account = response.delivered + response.filtered + response.lost;
                assert_eq!(response.delivered, seen.events.len() as u64);
                assert!(account <= response.next_sequence);
                assert!(
                    response.durable_sequence >= seen.last.durable_sequence,
                    "it came back from the disk"
                );
                seen.last = response;
            }
            Ok(None) => return seen,
            Err(error) => {
                seen.broken = Some(error);
                return seen;
            }
        }
    }
}

/// What two readers have both seen is the same.
#[track_caller]
fn assert_same(one: &[Event], other: &[Event]) {
    let other: BTreeMap<u64, &Event> = other.iter().map(|event| (event.sequence, event)).collect();
    let same = |event: &Event| other.get(&event.sequence).is_none_or(|other| *other == event);
    let changed = one.iter().find(|event| !same(event));
    assert!(changed.is_none(), "It was another one: {changed:?}");
}

impl Seen {
    /// All of the events from 0 on, none missing, so many.
    #[track_caller]
    fn assert_whole(&self, total: u64) {
        assert!(self.broken.is_none(), "{:?}", self.broken);
        assert_eq!((self.last.delivered, self.last.lost, self.last.next_sequence), (total, 0, total));
        assert!(self.events.iter().map(|event| event.sequence).eq(0..total));
    }
}

/// The segments of a journal, in order.
fn segments(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("a journal").map(|entry| entry.expect("an entry").path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|extension| extension == "events")).collect();
    found.sort();
    found
}

fn bytes(path: &Path) -> u64 {
    fs::metadata(path).expect("a file").len()
}

fn kill(process: rustix::process::Pid) {
    rustix::process::kill_process(process, Signal::KILL).expect("it runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_no_longer_holds_is_replayed_and_goes_over_to_what_comes() {
    if !local_kvm() {
        return;
    }
    let (service, journal) = start(&[]);
    let channel = service.channel().await;
    ticking(&channel, "t").await;
    let live = tokio::spawn(read(channel.clone(), from("t", 0)));
    // Memory holds 65,536.
    until_total(&channel, "t", 150_000).await;
    let replay = tokio::spawn(read(service.channel().await, from("t", 0)));
    until_total(&channel, "t", 200_000).await;
    let mut machines = MachinesClient::new(channel.clone());
    machines.pause_machine(PauseMachineRequest { name: "t".to_owned() }).await.expect("it pauses");

    // Without a further event it is told when the last ones are on disk.
    let so_far = total(&channel, "t").await;
    // The last ones of those that are counted may be on their way into memory.
    let request = from("t", so_far - 50_000);
    let mut stream =
        EventsClient::new(channel.clone()).stream_events(request).await.expect("a stream").into_inner();
    let durable = async {
        loop {
            let response = stream.message().await.expect("no error").expect("it goes on");
            if response.durable_sequence == Some(so_far) {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, durable).await.expect("all is durable soon");
    drop(stream);

    let ended = stop(&channel, "t").await;
    let total = total(&channel, "t").await;
    assert_eq!((ended.durable_sequence, ended.notices), (Some(total), vec![]));
    let (live, replay) = (live.await.expect("no panic"), replay.await.expect("no panic"));
    live.assert_whole(total);
    replay.assert_whole(total);
    assert!(live.events == replay.events, "a replayed event is another one");
    assert_eq!((live.last.durable_sequence, replay.last.durable_sequence), (Some(total), Some(total)));
    let filtered = StreamEventsRequest { probes: vec![1], without_registers: true, ..from("t", 0) };
    let of_one = read(channel.clone(), filtered).await;
    assert!(of_one.events.iter().all(|event| event.probe == 1 && event.registers.is_none()));
    assert_eq!((of_one.last.delivered + of_one.last.filtered, of_one.last.lost), (total, 0));

    // Registers are secrets.
    let mode = |path: &Path| fs::metadata(path).expect("it is there").permissions().mode() & 0o777;
    assert_eq!((mode(&journal), mode(&journal.join("t"))), (0o700, 0o700));
    for entry in fs::read_dir(journal.join("t")).expect("a journal") {
        assert_eq!(mode(&entry.expect("an entry").path()), 0o600);
    }
    assert_code(&service.client(&["vm", "rm", "t"]), 0);
    assert!(fs::read_dir(&journal).expect("a directory").next().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_ended_is_listed_with_its_events_until_it_is_removed() {
    if !local_kvm() {
        return;
    }
    let (service, _) = start(&[]);
    let channel = service.channel().await;
    ticking(&channel, "t").await;
    ticking(&channel, "u").await;
    until_total(&channel, "t", 2000).await;
    stop(&channel, "t").await;
    let (before, total_before) = (machine(&channel, "t").await, total(&channel, "t").await);
    let events = read(channel.clone(), from("t", 0)).await;
    // SIGTERM stops the other one.
    drop(channel);
    let (code, dir) = service.terminate();
    assert_eq!(code, Some(0));

    let (service, journal) = start_in(dir, &[]);
    let channel = service.channel().await;
    assert_eq!(machine(&channel, "t").await, before);
    assert_eq!(total(&channel, "t").await, total_before);
    let again = read(channel.clone(), from("t", 0)).await;
    again.assert_whole(total_before);
    assert!(again.events == events.events);
    let other = machine(&channel, "u").await;
    assert_eq!((other.state(), other.end.as_str()), (MachineState::Ended, "it was stopped"));
    read(channel.clone(), from("u", 0)).await.assert_whole(total(&channel, "u").await);

    // From the shell, with the probe's text, which is in no event.
    let shown = service.json(&["events", "t", "--from", "0", "--probe", "1", "--max", "5"]);
    assert!(shown.len() == 5 && shown.iter().all(|event| event["probe"] == "tick+4"), "{shown:?}");
    let changed = service.client(&["probe", "add", "t", "tick"]);
    assert_code(&changed, 2);
    assert!(stderr(&changed).contains("earlier service"), "{}", stderr(&changed));
    assert_code(&service.client(&["vm", "create", "ticker", "--name", "t"]), 2);
    assert_code(&service.client(&["vm", "rm", "t", "u"]), 0);
    assert!(service.json(&["vm", "ls"]).is_empty());
    assert!(fs::read_dir(&journal).expect("a directory").next().is_none());
    assert_eq!(service.json(&["vm", "create", "ticker", "--name", "t"])[0]["state"], "created");
}

/// Kills a machine's process, the service before it, or both, at a random moment, so many times: what was told to be durable is there,
/// as it was.
async fn random_kills(times: usize) {
    let mut random = fastrand::Rng::with_seed(2026);
    let (mut service, journal) = start(&[]);
    let (mut events, mut durable_events, mut torn) = (0, 0, 0);
    for round in 0..times {
        let name = format!("m{round}");
        let channel = service.channel().await;
        ticking(&channel, &name).await;
        let live = tokio::spawn(read(channel.clone(), from(&name, 0)));
        until_total(&channel, &name, 1).await;
        tokio::time::sleep(Duration::from_micros(random.u64(0..600_000))).await;
        let worker = service.worker(&name);
        drop(channel);
        match round % 4 {
            // Of everything.
            3 => {
                let (dir, _) = service.kill();
                kill(worker);
                service = start_in(dir, &[]).0;
            }
            // Of a process that the next service has found.
            1 => {
                service = service.kill_and_restart();
                kill(worker);
            }
            _ => kill(worker),
        }
        let live = live.await.expect("no panic");
        let why = live.broken.as_ref().expect("it broke off");
        assert!(round % 2 == 1 || why.message().contains("vmprobe events"), "{why}");
        let durable = live.last.durable_sequence.expect("there is a journal");

        let channel = service.channel().await;
        let left = machine(&channel, &name).await;
        assert_eq!(left.state(), MachineState::Failed, "{why}");
        assert!(!left.end.is_empty() && left.notices.is_empty(), "{left:?}");
        assert_eq!(left.spec.as_ref().map(|spec| spec.image.as_str()), Some("ticker"));
        let kept = left.durable_sequence.expect("there is a journal");
        assert!(kept >= durable, "{durable} events were durable, {kept} are there");
        let replay = read(channel.clone(), from(&name, 0)).await;
        replay.assert_whole(kept);
        assert_same(&replay.events, &live.events);
        // Who has seen more than came to the disk goes on at no error.
        let further = read(channel.clone(), from(&name, live.last.next_sequence.max(kept))).await;
        assert!(further.broken.is_none() && further.events.is_empty());

        let probes = ListProbesRequest { machine: name.clone() };
        let probes =
            ProbesClient::new(channel.clone()).list_probes(probes).await.expect("a list").into_inner();
        assert!(replay.events.is_empty() || probes.probes.len() == 2);
        events += kept;
        durable_events += durable;
        torn += usize::from(kept > durable);
        let request = DeleteMachineRequest { name: name.clone() };
        MachinesClient::new(channel).delete_machine(request).await.expect("it goes");
        assert!(!journal.join(name).exists());
    }
    println!(
        "{times} kills: {durable_events} events were durable, {events} are there; more than that {torn} times"
    );
    assert!(durable_events > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_durable_is_there_after_a_kill_at_any_moment() {
    if local_kvm() {
        random_kills(20).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "two minutes; make campaign runs it"]
async fn what_was_durable_is_there_after_two_hundred_kills() {
    if local_kvm() {
        random_kills(200).await;
    }
}

/// A machine with some events in several segments, whose processes were all killed. Returns the service's directory too.
async fn killed(size: &str, events: u64) -> (tempfile::TempDir, PathBuf, Vec<Event>) {
    let (service, journal) = start(&["--journal-size", size]);
    let channel = service.channel().await;
    ticking(&channel, "t").await;
    until_total(&channel, "t", events).await;
    stop(&channel, "t").await;
    let seen = read(channel.clone(), from("t", 0)).await;
    let worker = service.worker("t");
    drop(channel);
    let (dir, _) = service.kill();
    kill(worker);
    (dir, journal, seen.events)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_tail_is_cut_off_and_damage_costs_what_is_damaged() {
    if !local_kvm() {
        return;
    }
    let (dir, journal, events) = killed("16M", 30_000).await;
    let found = segments(&journal.join("t"));
    assert!(found.len() > 3, "{found:?}");
    // As a crash leaves it: the last record in part, and another whose length alone was written.
    let last = found.last().expect("some");
    let whole = bytes(last);
    let torn = fs::OpenOptions::new().write(true).open(last).expect("ours");
    torn.set_len(whole - 100).expect("shorter");
    torn.set_len(whole + 4096).expect("longer");
    // A bit of one event in the middle of the first segment, and the header of the second one.
    let mut first = fs::read(&found[0]).expect("a segment");
    let middle = first.len() / 2;
    first[middle] ^= 4;
    fs::write(&found[0], first).expect("ours");
    let mut second = fs::read(&found[1]).expect("a segment");
    second[12] ^= 1;
    fs::write(&found[1], second).expect("ours");

    let (service, _) = start_in(dir, &[]);
    let channel = service.channel().await;
    let left = machine(&channel, "t").await;
    let number =
        |path: &Path| path.file_stem().and_then(|name| name.to_str()?.parse::<u64>().ok()).expect("a number");
    assert!(left.notices.len() == 1 && left.notices[0].contains("header is damaged"), "{:?}", left.notices);
    assert!(bytes(last) < whole - 100);
    let replay = read(channel.clone(), from("t", 0)).await;
    let second = number(&found[2]) - number(&found[1]);
    assert_eq!(replay.last.lost, 1 + second, "one event, and one segment");
    assert_eq!(replay.last.next_sequence, events.len() as u64 - 1);
    assert_eq!(replay.last.delivered + replay.last.lost, replay.last.next_sequence);
    assert_same(&replay.events, &events);
    assert!(replay.events.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));

    // Another version, and a file of another machine's, are no losses: something can be done.
    drop(channel);
    let (code, dir) = service.terminate();
    assert_eq!(code, Some(0));
    let mut newer = b"VMPROBEJ\x02\0\0\0".to_vec();
    newer.extend(crc32fast::hash(&newer).to_le_bytes());
    fs::write(&found[1], newer).expect("ours");
    let (service, _) = start_in(dir, &[]);
    let refused = service.client(&["events", "t", "--from", "0"]);
    assert_code(&refused, 3);
    assert!(stderr(&refused).contains("use the vmprobe that wrote it"), "{}", stderr(&refused));
    let shown = service.json(&["vm", "show", "t"]);
    assert!(shown[0]["notices"][0].as_str().is_some_and(|notice| notice.contains("version 2")), "{shown:?}");
    service.json(&["vm", "create", "ticker", "--name", "u"]);
    fs::copy(&segments(&journal.join("u"))[0], &found[1]).expect("ours");
    let refused = service.client(&["events", "t", "--from", "0"]);
    assert!(stderr(&refused).contains("It is of machine 'u'"), "{}", stderr(&refused));
    // What is whole is read all the same.
    let later = number(&found[2]).to_string();
    assert_code(&service.client(&["events", "t", "--from", &later]), 0);
    assert_code(&service.client(&["vm", "rm", "t"]), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_about_which_nothing_can_be_read_is_listed_all_the_same() {
    if !local_kvm() {
        return;
    }
    let (dir, journal, events) = killed("16M", 2000).await;
    fs::write(journal.join("t/machine"), b"VMPROBE").expect("ours");
    // What is not a machine's is left alone; a machine that was half removed is not.
    fs::create_dir(journal.join("lost+found")).expect("a directory");
    fs::create_dir(journal.join("u.removed")).expect("a directory");
    fs::File::create(journal.join("u.removed/00000000000000000000.events")).expect("a file");
    let (service, _) = start_in(dir, &[]);
    let channel = service.channel().await;
    let left = machine(&channel, "t").await;
    assert_eq!(left.state(), MachineState::Failed);
    assert!(left.notices[0].contains("ends within its header"), "{:?}", left.notices);
    read(channel, from("t", 0)).await.assert_whole(events.len() as u64);
    assert_eq!(service.json(&["vm", "ls"]).len(), 1);
    assert!(journal.join("lost+found").exists() && !journal.join("u.removed").exists());
}

#[test]
fn a_directory_that_is_not_fit_for_secrets_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (service, journal) = start_in(dir, &[]);
    let path = journal.to_str().expect("UTF-8");
    let other = tempfile::tempdir().expect("a directory");
    let socket = other.path().join("socket");
    let refused = |args: &[&str]| {
        let args = [&["serve", "--socket", socket.to_str().expect("UTF-8")], args].concat();
        let output = common::output(&args);
        assert_code(&output, 2);
        assert!(!socket.exists(), "the socket is left behind");
        stderr(&output)
    };
    assert!(refused(&["--journal", path]).contains("Another service uses it"));
    let open = other.path().join("open");
    fs::create_dir(&open).expect("a directory");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("ours");
    assert!(refused(&["--journal", open.to_str().expect("UTF-8")]).contains("chmod go-w"));
    fs::File::create(other.path().join("file")).expect("a file").write_all(b"x").expect("room");
    assert!(
        refused(&["--journal", other.path().join("file").to_str().expect("UTF-8")]).contains("no directory")
    );
    assert!(refused(&["--journal", "/nowhere/journal"]).contains("Cannot be made: No such file"));
    assert!(refused(&["--journal", path, "--journal-size", "1K"]).contains("1M is the least"));
    assert!(refused(&["--journal-age", "1h"]).contains("--journal"));
    drop(service);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_oldest_events_go_where_a_journal_is_large_enough() {
    if !local_kvm() {
        return;
    }
    let (dir, journal, seen) = killed("1M", 30_000).await;
    let all = segments(&journal.join("t"));
    assert!(all.iter().map(|path| bytes(path)).sum::<u64>() <= 1 << 20);
    assert!(all.iter().map(|path| bytes(path)).sum::<u64>() >= 1 << 19, "too little is left of it");
    let (service, _) = start_in(dir, &[]);
    let replay = read(service.channel().await, from("t", 0)).await;
    let total = seen.len() as u64;
    assert_eq!((replay.last.delivered + replay.last.lost, replay.last.next_sequence), (total, total));
    assert!(replay.last.lost > 0 && replay.last.delivered > 1000);
    let newest = &seen[seen.len() - replay.events.len()..];
    assert!(newest == replay.events, "the oldest ones go");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_go_when_they_are_too_old_also_when_no_others_come() {
    if !local_kvm() {
        return;
    }
    let (service, journal) = start(&["--journal-age", "2s"]);
    let channel = service.channel().await;
    ticking(&channel, "t").await;
    until_total(&channel, "t", 1000).await;
    let mut machines = MachinesClient::new(channel.clone());
    machines.pause_machine(PauseMachineRequest { name: "t".to_owned() }).await.expect("it pauses");
    let total = total(&channel, "t").await;
    // One without events stays, which says where the next one belongs.
    let only = journal.join(format!("t/{total:020}.events"));
    let until = Instant::now() + PATIENCE;
    while segments(&journal.join("t")) != [only.clone()] {
        assert!(Instant::now() < until, "{:?}", segments(&journal.join("t")));
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(machine(&channel, "t").await.durable_sequence, Some(total));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_stops_neither_the_guest_nor_its_readers_and_the_gap_is_told() {
    if !local_kvm() {
        return;
    }
    let disk = tempfile::tempdir().expect("a directory");
    let Some(_mounted) = tmpfs(disk.path(), 24 << 20) else { return };
    let ballast = disk.path().join("lost+found");
    fs::write(&ballast, vec![1; 20 << 20]).expect("there is room");
    let service = start_at(tempfile::tempdir().expect("a directory"), disk.path(), &[]);
    let channel = service.channel().await;
    service.json(&["vm", "create", "ticker", "--name", "u"]);
    ticking(&channel, "t").await;
    let live = tokio::spawn(read(channel.clone(), from("t", 0)));
    let noticed = |name: &'static str, text: &'static str| {
        let channel = channel.clone();
        async move {
            let until = Instant::now() + PATIENCE;
            loop {
                let notices = machine(&channel, name).await.notices;
                if notices.iter().any(|notice| notice.contains(text)) {
                    return;
                }
                assert!(Instant::now() < until, "{notices:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    };
    noticed("t", "cannot be written").await;
    let (full, durable) = (total(&channel, "t").await, machine(&channel, "t").await.durable_sequence);
    // More than memory keeps, so that some are lost to the journal, and to it alone.
    until_total(&channel, "t", full + 100_000).await;
    assert_eq!(machine(&channel, "t").await.durable_sequence, durable);
    fs::remove_file(&ballast).expect("ours");
    noticed("t", "goes on with event").await;
    let ended = stop(&channel, "t").await;
    let total = total(&channel, "t").await;
    assert_eq!(ended.durable_sequence, Some(total));
    let live = live.await.expect("no panic");
    assert_eq!((live.last.delivered + live.last.lost, live.last.next_sequence), (total, total));
    assert!(live.events.iter().any(|event| event.sequence > full), "the reader has waited");

    // Nobody waits for the disk at the end either.
    fs::write(&ballast, vec![1; 24 << 20]).expect_err("there is no room");
    let ended = stop(&channel, "u").await;
    assert_eq!((ended.state(), ended.end.as_str()), (MachineState::Ended, "it was never started"));
    let refused = service.client(&["vm", "create", "ticker", "--name", "v"]);
    assert_code(&refused, 3);
    assert!(stderr(&refused).contains("make room"), "{}", stderr(&refused));
    fs::remove_file(&ballast).expect("ours");
    noticed("u", "goes on with event 0").await;
    service.json(&["vm", "create", "ticker", "--name", "v"]);

    let worker = service.worker("t");
    drop(channel);
    let (dir, _) = service.kill();
    kill(worker);

    let service = start_at(dir, disk.path(), &[]);
    let replay = read(service.channel().await, from("t", 0)).await;
    assert_eq!((replay.last.delivered + replay.last.lost, replay.last.next_sequence), (total, total));
    assert!(replay.last.lost > 0);
    // It has been written once there was room.
    assert_eq!(service.json(&["vm", "show", "u"])[0]["state"], "ended");
    assert_same(&replay.events, &live.events);
    assert!(service.json(&["vm", "show", "t"])[0]["notices"].to_string().contains("No space left"));
}
