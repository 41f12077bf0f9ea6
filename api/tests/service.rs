//! The service as its clients see it: a real server process, the command as a client, and clients that know the contract only.

#![allow(clippy::tests_outside_test_module)]

mod common;
#[path = "../src/contract.rs"]
#[allow(dead_code)]
mod contract;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::service::Service;
use common::{assert_code, local_kvm, stderr, stdout, vmprobe};
use contract::events_client::EventsClient;
use contract::machines_client::MachinesClient;
use contract::probes_client::ProbesClient;
use contract::{
    AddProbesRequest, CreateMachineRequest, GetMachineRequest, ListProbesRequest, Machine, MachineSpec,
    MachineState, RemoveProbesRequest, StartMachineRequest, StopMachineRequest, StreamEventsRequest,
};
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt;

fn ticker(name: &str) -> CreateMachineRequest {
    let spec = MachineSpec { image: "ticker".to_owned(), memory_bytes: 64 << 20, ..MachineSpec::default() };
    CreateMachineRequest { name: name.to_owned(), spec: Some(spec), idempotency_key: String::new() }
}

async fn started(channel: &Channel, name: &str) -> Machine {
    let mut machines = MachinesClient::new(channel.clone());
    machines.create_machine(ticker(name)).await.expect("a machine");
    machines.start_machine(StartMachineRequest { name: name.to_owned() }).await.expect("it runs").into_inner()
}

fn probe(machine: &str, specs: &[&str]) -> AddProbesRequest {
    AddProbesRequest {
        machine: machine.to_owned(),
        specs: specs.iter().map(|&spec| spec.to_owned()).collect(),
        idempotency_key: String::new(),
    }
}

#[test]
fn a_machine_lives_through_the_shell() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    assert_eq!(service.json(&["vm", "create", "ticker", "--name", "t"])[0]["state"], "created");
    assert_eq!(service.json(&["probe", "add", "t", "tick", "tick%return"]).len(), 2);
    assert_eq!(service.json(&["vm", "start", "t"])[0]["state"], "running");
    let events = service.json(&["events", "t", "--from", "0", "--probe", "0", "--max", "20"]);
    assert_eq!(events.len(), 20);
    // Armed before the first instruction: the first calls of both vCPUs are there.
    let first = |vcpu: u32| {
        let mut of_vcpu = events.iter().filter(|event| event["vcpu"] == vcpu);
        of_vcpu.next().map(|event| event["args"]["arg1"].clone())
    };
    assert!(first(0).is_none_or(|n| n == "0x0") && first(1).is_none_or(|n| n == "0x0"), "{events:?}");
    assert_eq!((&events[0]["probe"], &events[0]["symbol"]), (&"tick".into(), &"tick".into()));

    assert_eq!(service.json(&["vm", "pause", "t"])[0]["state"], "paused");
    let counts = || service.json(&["probe", "ls", "t"]);
    let before = counts();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(counts(), before, "nothing is hit while it is paused");
    assert_eq!(before[0]["hits"], before[0]["delivered"]);
    assert_code(&service.client(&["vm", "pause", "t"]), 2);
    service.json(&["vm", "resume", "t"]);
    let until = Instant::now() + Duration::from_secs(20);
    while counts()[0]["hits"] == before[0]["hits"] {
        assert!(Instant::now() < until, "it does not go on");
    }

    service.json(&["probe", "disable", "t", "0"]);
    let disabled = counts();
    assert_eq!((&disabled[0]["state"], &disabled[1]["state"]), (&"disabled".into(), &"enabled".into()));
    service.json(&["probe", "enable", "t", "0"]);
    service.json(&["probe", "rm", "t", "0"]);
    assert_eq!(counts()[0]["state"], "removed");
    assert_code(&service.client(&["probe", "enable", "t", "0"]), 2);

    // This guest does not listen to its power button, so it is not waited for.
    let ended = service.json(&["vm", "stop", "t", "--grace", "1h"]);
    assert_eq!((&ended[0]["state"], &ended[0]["end"]), (&"ended".into(), &"it was stopped".into()));
    let console = service.client(&["console", "t"]);
    assert!(stdout(&console).starts_with("ticker: goes on\n"), "{}", stdout(&console));
    service.client(&["vm", "rm", "t"]);
    assert!(service.json(&["vm", "ls"]).is_empty());

    let audit = service.audit();
    let calls: Vec<serde_json::Value> =
        audit.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let names: Vec<&str> = calls.iter().filter_map(|call| call["call"].as_str()).collect();
    let expected = [
        "CreateMachine",
        "AddProbes",
        "StartMachine",
        "PauseMachine",
        "PauseMachine",
        "ResumeMachine",
        "DisableProbes",
        "EnableProbes",
        "RemoveProbes",
        "EnableProbes",
        "StopMachine",
        "DeleteMachine",
    ];
    assert_eq!(names, expected);
    assert_eq!((&calls[3]["result"], &calls[4]["result"]), (&"Ok".into(), &"FailedPrecondition".into()));
    assert_eq!(calls[1]["what"], "tick; tick%return");
}

#[test]
fn every_error_says_what_to_do_and_has_the_exit_code_of_its_kind() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t"]);
    for (args, code, text) in [
        (&["vm", "start", "nope"][..], 2, "vmprobe vm ls"),
        (&["vm", "create", "ticker", "--name", "t"], 2, "choose another name"),
        (&["vm", "create", "ticker", "--name", "-"], 2, "a letter first"),
        (&["vm", "create", "/nowhere/vmlinuz"], 4, "No such file"),
        (&["vm", "create", "ticker", "--memory", "1K"], 2, "4096"),
        (&["vm", "resume", "t"], 2, "it is new now"),
        (&["probe", "add", "t", "tock"], 5, "tick"),
        (&["probe", "rm", "t", "7"], 2, "vmprobe probe ls"),
        (&["events", "t", "--from", "1"], 2, "leave it out"),
    ] {
        let output = service.client(args);
        assert_code(&output, code);
        let said = stderr(&output);
        assert!(said.contains(text), "{args:?}: {said}");
    }
    let nobody = vmprobe(&["vm", "ls", "--socket", "/nowhere/socket"]).output().expect("vmprobe starts");
    assert_code(&nobody, 3);
    assert!(stderr(&nobody).contains("vmprobe serve"), "{}", stderr(&nobody));
}

#[test]
fn a_machine_has_its_disks_and_one_that_is_changed_in_place_has_no_other_user() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    let image = service.dir.path().join("a,b.img");
    std::fs::write(&image, [1; 8192]).expect("an image");
    let name = image.display().to_string().replace(',', ",,");
    let changed = format!("{name},write");
    let kept = service.json(&["vm", "create", "ticker", "--name", "kept", "--disk", &name, "--start"]);
    assert_eq!(kept[0]["disks"][0], format!("{name},overlay"));
    let refused = service.client(&["vm", "create", "ticker", "--name", "u", "--disk", &changed]);
    assert_code(&refused, 4);
    assert!(stderr(&refused).contains("a,b.img"), "{}", stderr(&refused));
    service.json(&["vm", "create", "ticker", "--name", "v", "--disk", &name, "--disk", &name]);
    assert_code(&service.client(&["vm", "rm", "kept", "v"]), 0);
    service.json(&["vm", "create", "ticker", "--name", "changed", "--disk", &changed, "--start"]);
    // No snapshot has a disk's content yet.
    let saved =
        service.client(&["vm", "snapshot", "changed", &service.dir.path().join("s").display().to_string()]);
    assert!(!saved.status.success() && stderr(&saved).contains("disks"), "{}", stderr(&saved));
    assert_eq!(service.json(&["vm", "show", "changed"])[0]["state"], "running");
}

#[tokio::test]
async fn a_batch_of_probes_is_added_whole_or_not_at_all_and_a_key_makes_it_once() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    let channel = service.channel().await;
    started(&channel, "t").await;
    let mut probes = ProbesClient::new(channel.clone());
    let refused = probes.add_probes(probe("t", &["tick", "tick+0x1000"])).await.expect_err("no instruction");
    assert_eq!(refused.code(), Code::InvalidArgument);
    let info = refused.get_error_details().error_info().cloned().expect("a reason");
    assert_eq!((info.reason.as_str(), info.domain.as_str()), ("PROBE_REFUSED", "vmprobe.v1"));
    let list = |mut probes: ProbesClient<Channel>| async move {
        let request = ListProbesRequest { machine: "t".to_owned() };
        probes.list_probes(request).await.expect("a list").into_inner().probes
    };
    assert!(list(probes.clone()).await.is_empty());

    let once = AddProbesRequest { idempotency_key: "k".to_owned(), ..probe("t", &["tick"]) };
    let first = probes.add_probes(once.clone()).await.expect("armed").into_inner();
    let second = probes.add_probes(once.clone()).await.expect("the same").into_inner();
    assert_eq!(first, second);
    assert_eq!(list(probes.clone()).await.len(), 1);
    let other = AddProbesRequest { specs: vec!["tick+4".to_owned()], ..once };
    assert_eq!(probes.add_probes(other).await.expect_err("another request").code(), Code::InvalidArgument);

    let mut machines = MachinesClient::new(channel);
    let create = CreateMachineRequest { idempotency_key: "m".to_owned(), ..ticker("") };
    let mut other = machines.clone();
    let (one, two) = tokio::join!(other.create_machine(create.clone()), machines.create_machine(create));
    assert_eq!(one.expect("made").into_inner().name, two.expect("the same").into_inner().name);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clients_arm_the_same_address_and_each_takes_its_own_out() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    started(&service.channel().await, "t").await;
    let client = |channel: Channel| async move {
        let mut probes = ProbesClient::new(channel);
        for _ in 0..50 {
            let added = probes.add_probes(probe("t", &["tick"])).await.expect("armed").into_inner();
            let number = added.probes[0].number;
            tokio::time::sleep(Duration::from_millis(2)).await;
            let request = RemoveProbesRequest { machine: "t".to_owned(), numbers: vec![number] };
            let removed = probes.remove_probes(request).await.expect("it is there").into_inner().probes;
            let counts = removed[0].counts.expect("counts");
            assert_eq!(counts.hits, counts.delivered + counts.filtered + counts.lost);
        }
    };
    let (one, two) = (service.channel().await, service.channel().await);
    tokio::join!(client(one), client(two));
    let mut machines = MachinesClient::new(service.channel().await);
    let get = GetMachineRequest { name: "t".to_owned() };
    let machine = machines.get_machine(get).await.expect("it is there").into_inner();
    assert_eq!((machine.state(), machine.notices), (MachineState::Running, vec![]));
    let all = ProbesClient::new(service.channel().await)
        .list_probes(ListProbesRequest { machine: "t".to_owned() })
        .await
        .expect("a list")
        .into_inner()
        .probes;
    assert_eq!(all.len(), 100);
    assert!(all.iter().any(|probe| probe.counts.expect("counts").hits > 0));
}

/// The events of a stream, with its last account.
async fn read_all(
    mut events: EventsClient<Channel>,
    request: StreamEventsRequest,
    pause: Duration,
) -> (Vec<contract::Event>, contract::StreamEventsResponse) {
    let mut stream = events.stream_events(request).await.expect("a stream").into_inner();
    let (mut all, mut last) = (Vec::new(), contract::StreamEventsResponse::default());
    while let Some(mut response) = stream.message().await.expect("no error") {
        all.append(&mut response.events);
        last = response;
        tokio::time::sleep(pause).await;
    }
    (all, last)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reader_has_its_own_account_and_a_slow_one_slows_nobody() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    let channel = service.channel().await;
    let mut machines = MachinesClient::new(channel.clone());
    machines.create_machine(ticker("t")).await.expect("a machine");
    let mut probes = ProbesClient::new(channel.clone());
    probes.add_probes(probe("t", &["tick", "tick+4"])).await.expect("armed");
    let from_the_start =
        StreamEventsRequest { machine: "t".to_owned(), from_sequence: Some(0), ..Default::default() };
    let of_one = StreamEventsRequest { probes: vec![1], without_registers: true, ..from_the_start.clone() };
    let events = EventsClient::new(channel.clone());
    let quick = tokio::spawn(read_all(events.clone(), from_the_start.clone(), Duration::ZERO));
    let filtering = tokio::spawn(read_all(events.clone(), of_one, Duration::ZERO));
    // A few kilobytes are on their way before the transport stops; the log holds 65,536 events.
    let slow = tokio::spawn(read_all(events.clone(), from_the_start.clone(), Duration::from_millis(150)));
    machines.start_machine(StartMachineRequest { name: "t".to_owned() }).await.expect("it runs");

    let list = || async {
        let request = ListProbesRequest { machine: "t".to_owned() };
        probes.clone().list_probes(request).await.expect("a list").into_inner().probes
    };
    let until = Instant::now() + Duration::from_secs(60);
    while list().await.iter().map(|probe| probe.counts.expect("counts").hits).sum::<u64>() < 150_000 {
        assert!(Instant::now() < until, "too few hits");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    machines.stop_machine(StopMachineRequest { name: "t".to_owned(), grace_ns: 0 }).await.expect("it stops");

    let counts: Vec<_> = list().await.iter().map(|probe| probe.counts.expect("counts")).collect();
    let total: u64 = counts.iter().map(|counts| counts.delivered).sum();
    for counts in &counts {
        assert_eq!(counts.hits, counts.delivered + counts.lost);
    }
    let (all, account) = quick.await.expect("no panic");
    assert_eq!((account.delivered + account.lost, account.filtered), (total, 0));
    assert_eq!(all.len() as u64, account.delivered);
    assert!(all.windows(2).all(|pair| pair[0].sequence < pair[1].sequence));
    assert_eq!(account.next_sequence, total);
    assert!(all.iter().all(|event| event.registers.is_some_and(|regs| regs.rip == event.ip)));

    let (ones, account) = filtering.await.expect("no panic");
    assert!(ones.iter().all(|event| event.probe == 1 && event.registers.is_none()));
    assert_eq!(account.delivered + account.filtered + account.lost, total);
    assert!(account.filtered > 0);

    let (late, account) = slow.await.expect("no panic");
    assert_eq!((account.delivered + account.lost, late.len() as u64), (total, account.delivered));
    assert!(account.lost > 0, "the slow reader was too quick for this test");

    // After a break a client goes on where it was.
    let from = total - 10;
    let again = StreamEventsRequest { from_sequence: Some(from), ..from_the_start };
    let (rest, account) = read_all(events, again, Duration::ZERO).await;
    assert_eq!(
        rest.iter().map(|event| event.sequence).collect::<Vec<_>>(),
        (from..total).collect::<Vec<_>>()
    );
    assert_eq!((account.delivered, account.lost), (10, 0));
}

#[tokio::test]
async fn clients_that_know_no_contract_find_it_and_the_services_health() {
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let service = Service::start();
    let channel = service.channel().await;
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut stream = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect("reflection")
        .into_inner();
    let answer = stream.message().await.expect("an answer").and_then(|answer| answer.message_response);
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let names: Vec<String> = list.service.into_iter().map(|service| service.name).collect();
    for name in ["Machines", "Probes", "Events", "Host"].map(|name| format!("vmprobe.v1.{name}")) {
        assert!(names.contains(&name), "{names:?}");
        let request = tonic_health::pb::HealthCheckRequest { service: name };
        let mut health = tonic_health::pb::health_client::HealthClient::new(channel.clone());
        let status = health.check(request).await.expect("health").into_inner().status();
        assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving);
    }
}

#[test]
fn what_is_no_grpc_hurts_nobody() {
    let service = Service::start();
    for garbage in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 70_000]]
    {
        let mut stream = UnixStream::connect(service.socket()).expect("it listens");
        // The service may hang up in the middle.
        stream.write_all(garbage).ok();
    }
    assert_code(&service.client(&["vm", "ls"]), 0);
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused() {
    let service = Service::start();
    let mut machines = MachinesClient::new(service.channel().await);
    let request = CreateMachineRequest { name: "x".repeat(5 << 20), ..ticker("") };
    let refused = machines.create_machine(request).await.expect_err("4 MiB are the most");
    assert_eq!(refused.code(), Code::OutOfRange);
    assert_code(&service.client(&["vm", "ls"]), 0);
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_service() {
    let service = Service::start();
    let mode = std::fs::metadata(service.socket()).expect("a socket").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let second = service.client(&["serve"]);
    assert_code(&second, 3);
    assert!(stderr(&second).contains("listens there already"), "{}", stderr(&second));
    let (code, dir) = service.terminate();
    assert_eq!(code, Some(0));
    assert!(!dir.path().join("socket").exists());
}

#[test]
fn sigterm_stops_the_machines_and_leaves_nothing() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    service.json(&["probe", "add", "t", "tick"]);
    // A stream that is open ends with the run.
    let mut events = vmprobe(&["events", "t"])
        .env("VMPROBE_SOCKET", service.socket())
        .stdout(Stdio::piped())
        .spawn()
        .expect("vmprobe starts");
    let mut line = String::new();
    let stdout = events.stdout.take().expect("piped");
    let mut reader = BufReader::new(stdout);
    reader.read_line(&mut line).expect("an event");
    let drained = std::thread::spawn(move || reader.lines().count());
    let (code, dir) = service.terminate();
    assert_eq!(code, Some(0));
    assert!(events.wait().expect("it ends").success());
    assert!(drained.join().expect("no panic") > 0);

    assert!(std::fs::read_dir(dir.path().join("socket.d")).expect("a directory").next().is_none());
}

#[test]
fn a_service_that_was_killed_finds_its_machines_and_their_probes_again() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    service.json(&["probe", "add", "t", "tick"]);
    let service = service.kill_and_restart();
    let machines = service.json(&["vm", "ls"]);
    assert_eq!((&machines[0]["name"], &machines[0]["state"]), (&"t".into(), &"running".into()));
    let before = service.json(&["probe", "ls", "t"]);
    assert_eq!(before[0]["state"], "enabled");
    let events = service.json(&["events", "t", "--max", "5"]);
    assert_eq!(events.len(), 5);
    assert_eq!(service.json(&["probe", "add", "t", "tick+4"])[0]["number"], 1);
    // One that was killed while nobody served is found to be gone.
    let worker = service.worker("t");
    service.json(&["vm", "create", "ticker", "--name", "u"]);
    let service = service.kill_and_restart();
    rustix::process::kill_process(worker, rustix::process::Signal::KILL).expect("it runs");
    let state = |name: &str| service.json(&["vm", "show", name])[0]["state"].clone();
    let until = Instant::now() + Duration::from_secs(10);
    while state("t") != "failed" {
        assert!(Instant::now() < until, "{}", state("t"));
    }
    assert_eq!(state("u"), "created");
    assert_code(&service.client(&["vm", "rm", "t", "u"]), 0);
    assert!(service.json(&["vm", "ls"]).is_empty());
}

#[test]
fn a_machines_process_that_dies_takes_nothing_else_with_it() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    for name in ["a", "b"] {
        service.json(&["vm", "create", "ticker", "--name", name, "--start"]);
        service.json(&["probe", "add", name, "tick"]);
    }
    let watching = vmprobe(&["events", "a"])
        .env("VMPROBE_SOCKET", service.socket())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmprobe starts");
    std::thread::sleep(Duration::from_millis(200));
    rustix::process::kill_process(service.worker("a"), rustix::process::Signal::KILL).expect("it runs");
    let watched = watching.wait_with_output().expect("it ends");
    assert_code(&watched, 2);
    assert!(stderr(&watched).contains("vmprobe vm rm a"), "{}", stderr(&watched));

    let until = Instant::now() + Duration::from_secs(60);
    let gone = loop {
        let machine = service.json(&["vm", "show", "a"]).remove(0);
        if machine["end"].as_str().is_some_and(|end| end.contains("signal 9")) {
            break machine;
        }
        assert!(Instant::now() < until, "{machine}");
    };
    assert_eq!(gone["state"], "failed");
    let refused = service.client(&["probe", "add", "a", "tick+4"]);
    assert_code(&refused, 2);
    assert!(stderr(&refused).contains("signal 9"), "{}", stderr(&refused));
    assert_eq!(service.json(&["events", "b", "--max", "5"]).len(), 5);
    assert_code(&service.client(&["vm", "rm", "a"]), 0);
    // Its name is free again.
    assert_eq!(service.json(&["vm", "create", "ticker", "--name", "a"])[0]["state"], "created");
}

#[test]
fn machines_are_left_running_where_that_is_asked_for() {
    if !local_kvm() {
        return;
    }
    let mut service = Service::start_with(tempfile::tempdir().expect("a directory"), &["--leave-machines"]);
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    service.json(&["probe", "add", "t", "tick"]);
    // A stream that is open does not keep the service.
    let events = vmprobe(&["events", "t"])
        .env("VMPROBE_SOCKET", service.socket())
        .stdout(Stdio::null())
        .spawn()
        .expect("vmprobe starts");
    std::thread::sleep(Duration::from_millis(200));
    service.signal(rustix::process::Signal::TERM);
    assert_eq!(service.child.wait().expect("it ends").code(), Some(0));
    assert!(events.wait_with_output().expect("it ends").status.success());
    let dir = std::mem::replace(&mut service.dir, tempfile::tempdir().expect("a directory"));
    let service = Service::start_in(dir);
    assert_eq!(service.json(&["vm", "ls"])[0]["state"], "running");
}
