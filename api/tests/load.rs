//! The service under load: machines that hit as fast as the host can, and many readers. `make campaign` runs it at full size, for a minute.

#![allow(clippy::tests_outside_test_module)]

mod common;
#[path = "../src/contract.rs"]
#[allow(dead_code)]
mod contract;

use std::time::{Duration, Instant};

use common::local_kvm;
use common::service::Service;
use contract::events_client::EventsClient;
use contract::machines_client::MachinesClient;
use contract::probes_client::ProbesClient;
use contract::{
    AddProbesRequest, CreateMachineRequest, DeleteMachineRequest, GetStatisticsRequest, ListProbesRequest,
    MachineSpec, PauseMachineRequest, RemoveProbesRequest, StartMachineRequest, StopMachineRequest,
    StreamEventsRequest, StreamEventsResponse,
};
use prost::Message;
use prost::bytes::{Buf, Bytes};
use rustix::process::Pid;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::{ProstCodec, ProstEncoder};

/// How large a run is.
struct Size {
    machines: usize,
    readers: usize,
    time: Duration,
}

/// Kibibytes of memory that a process holds (proc_pid_status(5), VmRSS).
fn memory_kib(pid: Pid) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Whether a process grows: by more than what comes and goes.
fn grows(early: u64, late: u64) -> bool {
    late > early + early / 8 + 2048
}

/// Reads a machine's events to their end: the last account, and how many came.
async fn read(channel: Channel, machine: String) -> (StreamEventsResponse, u64) {
    let request = StreamEventsRequest { machine, from_sequence: Some(0), ..StreamEventsRequest::default() };
    let mut stream = EventsClient::new(channel).stream_events(request).await.expect("a stream").into_inner();
    let (mut last, mut came) = (StreamEventsResponse::default(), 0);
    while let Some(mut response) = stream.message().await.expect("no error") {
        came += response.events.len() as u64;
        response.events.clear();
        last = response;
    }
    (last, came)
}

fn add(machine: &str, spec: &str) -> AddProbesRequest {
    AddProbesRequest {
        machine: machine.to_owned(),
        specs: vec![spec.to_owned()],
        idempotency_key: String::new(),
    }
}

/// How long it takes to add a probe, which comes and goes meanwhile. It has a thread and a connection of its own, as a client has that
/// does nothing else.
fn add_again_and_again(service: Endpoint, machine: String, time: Duration) -> Vec<Duration> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let channel = service.connect().await.expect("the service answers");
        let mut probes = ProbesClient::new(channel);
        let start = Instant::now();
        let mut added: Vec<Duration> = Vec::new();
        while start.elapsed() < time {
            let before = Instant::now();
            let probe = probes
                .add_probes(add(&machine, "tick+4"))
                .await
                .expect("armed")
                .into_inner()
                .probes
                .remove(0);
            added.push(before.elapsed());
            let request = RemoveProbesRequest { machine: machine.clone(), numbers: vec![probe.number] };
            probes.remove_probes(request).await.expect("it is there");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        added
    })
}

async fn run(size: Size) {
    let service = Service::start();
    let channel = service.channel().await;
    let (mut machines, mut probes) =
        (MachinesClient::new(channel.clone()), ProbesClient::new(channel.clone()));
    let names: Vec<String> = (0..size.machines).map(|number| format!("m{number}")).collect();
    for name in &names {
        let spec = MachineSpec {
            image: "ticker".to_owned(),
            memory_bytes: 32 << 20,
            vcpus: 1,
            ..MachineSpec::default()
        };
        let request =
            CreateMachineRequest { name: name.clone(), spec: Some(spec), idempotency_key: String::new() };
        machines.create_machine(request).await.expect("a machine");
        probes.add_probes(add(name, "tick")).await.expect("armed");
    }
    let mut readers = Vec::new();
    for reader in 0..size.readers {
        let name = names[reader % names.len()].clone();
        readers.push((reader % names.len(), tokio::spawn(read(service.channel().await, name))));
    }
    let started = Instant::now();
    for name in &names {
        machines.start_machine(StartMachineRequest { name: name.clone() }).await.expect("it runs");
    }
    // What is kept of the events of each is there.
    for name in &names {
        wait_for_a_full_log(&mut machines, name).await;
    }
    let pids: Vec<Pid> =
        std::iter::once(service.pid()).chain(names.iter().map(|name| service.worker(name))).collect();
    let memory = || pids.iter().map(|&pid| memory_kib(pid)).collect::<Vec<_>>();
    let (adding, machine) = (service.endpoint(), names[0].clone());
    let adding = std::thread::spawn(move || add_again_and_again(adding, machine, size.time));
    tokio::time::sleep(size.time / 6).await;
    let early = memory();
    let mut added = tokio::task::spawn_blocking(|| adding.join().expect("no panic")).await.expect("it ends");
    let late = memory();
    let ran = started.elapsed().as_secs_f64();
    let mut totals = Vec::new();
    for name in &names {
        machines
            .stop_machine(StopMachineRequest { name: name.clone(), grace_ns: 0 })
            .await
            .expect("it stops");
        let request = ListProbesRequest { machine: name.clone() };
        let list = probes.list_probes(request).await.expect("a list").into_inner().probes;
        let counts: Vec<_> = list.iter().map(|probe| probe.counts.expect("counts")).collect();
        for counts in &counts {
            assert_eq!(counts.hits, counts.delivered + counts.filtered + counts.lost, "{name}");
        }
        totals.push(counts.iter().map(|counts| counts.delivered).sum::<u64>());
    }
    let (mut sent, mut lost) = (0, 0);
    for (machine, reader) in readers {
        let (account, came) = reader.await.expect("no panic");
        assert_eq!(account.delivered, came);
        assert_eq!(
            account.delivered + account.filtered + account.lost,
            totals[machine],
            "every hit is accounted for"
        );
        sent += came;
        lost += account.lost;
    }
    for name in names {
        machines.delete_machine(DeleteMachineRequest { name }).await.expect("it goes");
    }
    drop(service);

    added.sort();
    let hits: u64 = totals.iter().sum();
    println!(
        "{} machines, {} readers, {ran:.0} s: {hits} hits, {sent} events sent ({:.0} a second), {lost} lost by slow readers; \
         a probe added in {:?} (median), {:?} (99th percentile of {}); memory of the service {} KiB early, \
         {} KiB late, of a machine's process {} and {}",
        size.machines,
        size.readers,
        sent as f64 / ran,
        added[added.len() / 2],
        added[added.len() * 99 / 100],
        added.len(),
        early[0],
        late[0],
        early[1..].iter().max().expect("a machine"),
        late[1..].iter().max().expect("a machine"),
    );
    assert!(hits > 0 && sent > 0);
    for (early, late) in early.into_iter().zip(late) {
        assert!(!grows(early, late), "a process grows from {early} KiB to {late} KiB");
    }
}

/// How long an answer may take, also on a machine with much else to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Events that the service keeps of a machine.
const KEPT: u64 = 65_536;

/// The codec of a reader that does not look at what it gets, as one that stores it.
#[derive(Default)]
struct Unread(ProstCodec<StreamEventsRequest, StreamEventsRequest>);

struct Bytewise;

impl Codec for Unread {
    type Encode = StreamEventsRequest;
    type Decode = Bytes;
    type Encoder = ProstEncoder<StreamEventsRequest>;
    type Decoder = Bytewise;

    fn encoder(&mut self) -> Self::Encoder {
        self.0.encoder()
    }

    fn decoder(&mut self) -> Bytewise {
        Bytewise
    }
}

impl Decoder for Bytewise {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// How many events a machine has had.
async fn events(machines: &mut MachinesClient<Channel>, name: &str) -> u64 {
    let request = GetStatisticsRequest { name: name.to_owned() };
    machines.get_statistics(request).await.expect("counts").into_inner().events
}

async fn wait_for_a_full_log(machines: &mut MachinesClient<Channel>, name: &str) {
    while events(machines, name).await < KEPT {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A paused machine whose log of events is full, and the sequence number behind the last. What it takes to read them is the service's
/// own: the machine stands.
async fn full_log(channel: &Channel) -> u64 {
    let mut machines = MachinesClient::new(channel.clone());
    let spec = MachineSpec { image: "ticker".to_owned(), memory_bytes: 32 << 20, ..MachineSpec::default() };
    let request =
        CreateMachineRequest { name: "t".to_owned(), spec: Some(spec), idempotency_key: String::new() };
    machines.create_machine(request).await.expect("a machine");
    // Events of 64 bytes.
    let specs = vec!["tick count=%bx stack=%sp returns=$stack0".to_owned()];
    let request = AddProbesRequest { machine: "t".to_owned(), specs, idempotency_key: String::new() };
    ProbesClient::new(channel.clone()).add_probes(request).await.expect("armed");
    machines.start_machine(StartMachineRequest { name: "t".to_owned() }).await.expect("it runs");
    wait_for_a_full_log(&mut machines, "t").await;
    machines.pause_machine(PauseMachineRequest { name: "t".to_owned() }).await.expect("it stands");
    // What was in the rings has come too.
    tokio::time::sleep(Duration::from_millis(100)).await;
    events(&mut machines, "t").await
}

/// Reads all that is kept of a machine's events, without their registers, again and again.
async fn replay(times: u32) {
    let service = Service::start();
    let channel = service.channel().await;
    let end = full_log(&channel).await;
    let request = StreamEventsRequest {
        machine: "t".to_owned(),
        from_sequence: Some(end - KEPT),
        without_registers: true,
        ..StreamEventsRequest::default()
    };

    let (mut kept, mut reading) = (Vec::new(), Duration::ZERO);
    for _ in 0..times {
        kept.clear();
        let begun = Instant::now();
        let stream = EventsClient::new(channel.clone()).stream_events(request.clone()).await;
        let mut stream = stream.expect("a stream").into_inner();
        let mut next = end - KEPT;
        while next < end {
            let response = stream.message().await.expect("no error").expect("more");
            assert_eq!((response.lost, response.filtered), (0, 0));
            for event in &response.events {
                assert_eq!(event.sequence, next);
                next += 1;
            }
            assert_eq!(response.next_sequence, next);
            kept.push(response);
        }
        reading += begun.elapsed();
    }
    // As bytes: what the two processes take for it, without what a reader makes of it.
    let bytes: usize = kept.iter().map(|response| response.encoded_len()).sum();
    let mut receiving = Duration::ZERO;
    for _ in 0..times {
        let begun = Instant::now();
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.expect("the service answers");
        let path = PathAndQuery::from_static("/vmprobe.v1.Events/StreamEvents");
        let stream = client.server_streaming(tonic::Request::new(request.clone()), path, Unread::default());
        let mut stream = stream.await.expect("a stream").into_inner();
        let mut left = bytes;
        while left > 0 {
            let response = stream.message().await.expect("no error").expect("more");
            left = left.checked_sub(response.len()).expect("the same responses");
        }
        receiving += begun.elapsed();
    }
    // The same responses into memory.
    let begun = Instant::now();
    for _ in 0..times {
        let encoded: usize = kept.iter().map(|response| response.encode_to_vec().len()).sum();
        assert_eq!(encoded, bytes);
    }
    let encoding = begun.elapsed();
    let rate = |time: Duration| KEPT as f64 * f64::from(times) / time.as_secs_f64();
    println!(
        "one reader, events of {} bytes: {:.0} a second, as bytes {:.0} a second; encoded into memory {:.0} a second",
        bytes as u64 / KEPT,
        rate(reading),
        rate(receiving),
        rate(encoding)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_gets_all_that_is_kept_in_order() {
    if local_kvm() {
        replay(20).await;
    }
}

/// Streams that nobody reads, in so many connections.
async fn unread_streams(service: &Service, connections: usize, each: usize) -> Vec<impl Sized> {
    let mut unread = Vec::new();
    for _ in 0..connections {
        let mut client = EventsClient::new(service.channel().await);
        for _ in 0..each {
            let request = StreamEventsRequest {
                machine: "t".to_owned(),
                from_sequence: Some(0),
                ..StreamEventsRequest::default()
            };
            let stream = tokio::time::timeout(PATIENCE, client.stream_events(request)).await;
            unread.push(stream.expect("it is answered").expect("a stream"));
        }
    }
    unread
}

/// More streams than a connection has by default, of more bytes than are on their way to a client, held up nobody.
#[tokio::test(flavor = "multi_thread")]
async fn readers_that_never_read_hold_up_no_other_call() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    let channel = service.channel().await;
    let end = full_log(&channel).await;
    let unread = unread_streams(&service, 3, 75).await;
    let (last, came) = tokio::time::timeout(PATIENCE, async {
        let mut machines = MachinesClient::new(channel.clone());
        let reader = tokio::spawn(read(service.channel().await, "t".to_owned()));
        let request = StopMachineRequest { name: "t".to_owned(), grace_ns: 0 };
        machines.stop_machine(request).await.expect("it stops");
        reader.await.expect("no panic")
    })
    .await
    .expect("nobody waits for them");
    assert_eq!((last.delivered, came), (KEPT, KEPT));
    assert_eq!(last.lost, end - KEPT);
    drop(unread);
}

/// What a stream may cost the service whose client does not read. Where the client takes nothing from its connection either, all
/// that may be under way is: on its way from the machine's process, a response in each direction, and on its way to the client.
const STREAM_KIB: u64 = 512;

#[tokio::test(flavor = "multi_thread")]
async fn what_a_stream_costs_that_nobody_reads_is_bounded() {
    const STREAMS: u64 = 128;
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    full_log(&service.channel().await).await;
    let pids = [service.pid(), service.worker("t")];
    let before = pids.map(memory_kib);
    // These clients get no time after that, as if they were stopped.
    let (clients, unread) = std::thread::scope(|scope| {
        let open = || {
            let clients = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let clients = clients.expect("a runtime");
            let streams = usize::try_from(STREAMS).expect("a few");
            let unread = clients.block_on(unread_streams(&service, streams / 2, 2));
            (clients, unread)
        };
        scope.spawn(open).join().expect("no panic")
    });
    let until = Instant::now() + PATIENCE;
    let mut after = before;
    loop {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let now = pids.map(memory_kib);
        if now == after {
            break;
        }
        assert!(Instant::now() < until, "it goes on growing: {now:?}");
        after = now;
    }
    println!("{STREAMS} streams that nobody reads: from {before:?} to {after:?} KiB");
    for (before, after) in before.into_iter().zip(after) {
        assert!(after < before + STREAMS * STREAM_KIB, "from {before} KiB to {after} KiB");
    }
    // Their connections are closed before the service is asked to end.
    drop(unread);
    clients.shutdown_background();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_hit_is_accounted_for_under_load() {
    if local_kvm() {
        run(Size { machines: 3, readers: 9, time: Duration::from_secs(4) }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a minute of full load; make campaign runs it"]
async fn sixteen_machines_and_sixty_four_readers_for_a_minute() {
    if local_kvm() {
        run(Size { machines: 16, readers: 64, time: Duration::from_secs(60) }).await;
    }
}
