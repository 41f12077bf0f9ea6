//! Who may do what: TLS clients with right and wrong certificates, users of the host, roles, and what is no client at all.

#![allow(clippy::tests_outside_test_module)]

mod common;
#[path = "../src/contract.rs"]
#[allow(dead_code)]
mod contract;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use common::certificates::{Authority, Files, Wanted, self_signed};
use common::service::{Service, Tls};
use common::{assert_code, local_kvm, stderr, stdout, vmprobe};
use contract::events_client::EventsClient;
use contract::machines_client::MachinesClient;
use contract::probes_client::ProbesClient;
use contract::{
    AddProbesRequest, CreateMachineRequest, ListMachinesRequest, MachineSpec, StreamEventsRequest,
};
use prost::Message;
use rcgen::{ExtendedKeyUsagePurpose, SanType};
use rustix::process::Signal;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Code, Request, Status};

fn grant(who: &str, role: &str, rest: &str) -> String {
    format!("[[grant]]\nwho = \"{who}\"\nrole = \"{role}\"\n{rest}\n")
}

/// Bytes as they are, instead of messages.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        prost::bytes::BufMut::put_slice(to, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        prost::bytes::Buf::advance(from, prost::bytes::Buf::remaining(from));
        Ok(Some(()))
    }
}

/// Makes a call with bytes for a request; the code of its answer, or of its stream's beginning.
async fn call(channel: &Channel, path: &str, bytes: Vec<u8>) -> Code {
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.expect("the service is there");
    let path = PathAndQuery::try_from(path).expect("a path");
    match client.server_streaming(Request::new(bytes), path, Raw).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

/// The paths of all calls of the contract.
fn calls() -> Vec<String> {
    let set = prost_types::FileDescriptorSet::decode(contract::DESCRIPTORS).expect("descriptors");
    let services = set.file.iter().flat_map(|file| file.service.iter().map(move |it| (file.package(), it)));
    services
        .flat_map(|(package, service)| {
            service
                .method
                .iter()
                .map(move |method| format!("/{package}.{}/{}", service.name(), method.name()))
        })
        .collect()
}

/// A request's field of number 1 with the text `t`: a machine's name in every request that has one.
const MACHINE_T: [u8; 3] = [0x0a, 1, b't'];

const ROLES: [&str; 4] = ["view", "probe", "operate", "admin"];

/// The role that each call needs, as docs/service.md has it.
fn documented() -> BTreeMap<String, usize> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/service.md");
    let text = std::fs::read_to_string(path).expect("the document");
    let mut needs = BTreeMap::new();
    for (number, role) in ROLES.iter().enumerate() {
        let prefix = format!("| {role} |");
        let row = text.lines().find(|line| line.starts_with(&prefix)).expect("a row for each role");
        let calls = row.rsplit(" | ").next().expect("a cell").split('`').skip(1).step_by(2);
        needs.extend(calls.map(|call| (call.to_owned(), number)));
    }
    needs
}

#[tokio::test]
async fn each_role_may_make_the_calls_that_the_document_gives_it_and_no_other() {
    let access: String = ROLES.iter().map(|role| grant(&format!("cert:{role}"), role, "")).collect();
    let tls = Tls::start(&access);
    let needs = documented();
    let calls = calls();
    let names: BTreeSet<&str> = calls.iter().filter_map(|path| path.rsplit('/').next()).collect();
    assert_eq!(names, needs.keys().map(String::as_str).collect(), "the document has all calls");
    for (has, name) in [(None, "stranger"), (Some(0), "view"), (Some(1), "probe"), (Some(2), "operate")]
        .into_iter()
        .chain([(Some(3), "admin")])
    {
        let channel = tls.channel(&tls.client(name)).await;
        for path in &calls {
            let code = call(&channel, path, MACHINE_T.to_vec()).await;
            let name_of_call = path.rsplit('/').next().expect("a name");
            let denied = has < Some(needs[name_of_call]);
            assert_eq!(code == Code::PermissionDenied, denied, "{name}, {path}: {code:?}");
        }
        for path in
            ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]
        {
            let code = call(&channel, path, Vec::new()).await;
            assert_eq!(code, if has.is_none() { Code::PermissionDenied } else { Code::Ok }, "{name}, {path}");
        }
        for path in ["/vmprobe.v1.Machines/FormatDisk", "/nothing/Here", "/vmprobe.v1.Machines/"] {
            assert_eq!(call(&channel, path, MACHINE_T.to_vec()).await, Code::Unimplemented, "{name}, {path}");
        }
    }
    // Every refusal is written down, with who and what.
    let audit = tls.audit();
    let refused = |who: &str| {
        let lines = audit.iter().filter(|line| line["who"] == who && line["result"] == "PermissionDenied");
        lines.map(|line| line["call"].as_str().expect("a call").to_owned()).collect::<BTreeSet<_>>()
    };
    let above = |role: usize| needs.iter().filter(move |(_, needs)| **needs > role);
    assert_eq!(refused("cert:probe"), above(1).map(|(call, _)| call.clone()).collect());
    assert!(refused("cert:stranger").is_superset(&needs.keys().cloned().collect()));
    assert!(refused("cert:admin").is_empty());
    let asked = audit.iter().find(|line| line["who"] == "cert:admin" && line["call"] == "StartMachine");
    let asked = asked.expect("a line");
    assert_eq!((&asked["machine"], &asked["result"]), (&"t".into(), &"NotFound".into()));
    assert!(asked["address"].as_str().is_some_and(|address| address.starts_with("127.0.0.1:")), "{asked}");
    assert!(asked["uid"].is_null());
    tls.service.wait_for("cert:view was refused StartMachine");
}

#[test]
fn only_who_has_a_certificate_of_the_clients_ca_is_let_in() {
    let tls =
        Tls::start(&(grant("cert:alice", "view", "") + &grant("cert:spiffe://example/bob", "view", "")));
    let at = |name: &str| tls.path(name);
    let fine = tls.as_holder(&tls.client("alice"), &["vm", "ls"]);
    assert_code(&fine, 0);
    let by_uri = Wanted {
        alternatives: vec![SanType::URI("spiffe://example/bob".try_into().expect("a URI"))],
        ..Wanted::client("alice")
    };
    assert_code(&tls.as_holder(&tls.authority.issue(&at("uri"), by_uri), &["vm", "ls"]), 0);

    let other = Authority::new(&at("other-ca.pem"));
    let server_only = Wanted { purpose: ExtendedKeyUsagePurpose::ServerAuth, ..Wanted::client("alice") };
    let nameless = Wanted { common_name: None, ..Wanted::client("alice") };
    let issue = |name: &str, wanted| tls.authority.issue(&at(name), wanted);
    for (files, why) in [
        (self_signed(&at("self"), Wanted::client("alice")), "UnknownIssuer"),
        (other.issue(&at("of-other"), Wanted::client("alice")), "UnknownIssuer"),
        (issue("expired", Wanted::client("alice").expired()), "certificate expired"),
        (issue("early", Wanted::client("alice").not_yet_valid()), "certificate not valid yet"),
        (issue("server-only", server_only), "certificate does not allow extended key usage"),
        (issue("nameless", nameless), "neither a URI or DNS name (subjectAltName) nor one common name"),
    ] {
        let refused = tls.as_holder(&files, &["vm", "ls"]);
        assert_code(&refused, 3);
        tls.service.wait_for(why);
        let said = stderr(&refused);
        assert!(said.contains("its log says why"), "{said}");
    }
    // A name without a role is another matter: it is told so.
    let refused = tls.as_holder(&tls.client("carol"), &["vm", "ls"]);
    assert_code(&refused, 2);
    assert!(stderr(&refused).contains("cert:carol may not ListMachines"), "{}", stderr(&refused));
}

#[tokio::test]
async fn a_client_without_a_certificate_is_not_let_in() {
    let tls = Tls::start(&grant("cert:alice", "admin", ""));
    let ca = Certificate::from_pem(std::fs::read(&tls.authority.file).expect("a file"));
    let endpoint = Endpoint::try_from(tls.url()).expect("a URL");
    let endpoint = endpoint.tls_config(ClientTlsConfig::new().ca_certificate(ca)).expect("certificates");
    // With TLS 1.3 a client hears of it when it asks for something.
    if let Ok(channel) = endpoint.connect().await {
        let list = MachinesClient::new(channel).list_machines(ListMachinesRequest {}).await;
        assert_ne!(list.expect_err("no certificate").code(), Code::PermissionDenied);
    }
    tls.service.wait_for("peer sent no certificates");
    // Nor one that speaks no TLS at all.
    let plain = Endpoint::try_from(format!("http://127.0.0.1:{}", tls.port())).expect("a URL");
    if let Ok(channel) = plain.connect().await {
        MachinesClient::new(channel).list_machines(ListMachinesRequest {}).await.expect_err("no TLS");
    }
    tls.service.wait_for("received corrupt message");
}

#[test]
fn a_client_refuses_a_service_that_it_cannot_trust_and_says_what_it_needs() {
    let tls = Tls::start(&grant("cert:alice", "view", ""));
    let alice = tls.client("alice");
    let other = Authority::new(&tls.path("other-ca.pem"));
    let refused = |url: &str, ca: &Path, code: i32, text: &str| {
        let output = tls.command(url, &alice, ca, &["vm", "ls"]).output().expect("vmprobe starts");
        assert_code(&output, code);
        assert!(stderr(&output).contains(text), "{}", stderr(&output));
    };
    refused(&tls.url(), &other.file, 3, "UnknownIssuer");
    let by_name = format!("https://localhost:{}", tls.port());
    refused(&by_name, &tls.authority.file, 3, "certificate not valid for name \"localhost\"");
    let plain = format!("http://127.0.0.1:{}", tls.port());
    refused(&plain, &tls.authority.file, 2, "give the path of a Unix socket, or https://HOST:PORT");
    refused(&tls.url(), &tls.path("nowhere.pem"), 2, "--tls-ca");
    refused(&tls.url(), &alice.key, 3, "UnknownIssuer");
    let lacking = vmprobe(&["vm", "ls", "--service", &tls.url()]).output().expect("vmprobe starts");
    assert_code(&lacking, 2);
    assert!(stderr(&lacking).contains("--tls-cert, --tls-key and --tls-ca"), "{}", stderr(&lacking));
    // What is said on the command line counts, whatever the environment says.
    let socket = tls.service.socket().display().to_string();
    let args = ["vm", "ls", "--socket", &socket];
    let local = tls.command("https://192.0.2.1:1", &alice, &other.file, &args).output().expect("it starts");
    assert_code(&local, 0);
}

#[test]
fn a_service_that_is_given_the_wrong_files_does_not_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| dir.path().join(name);
    let text = |path: &Path| path.display().to_string();
    let authority = Authority::new(&at("ca.pem"));
    let good = authority.issue(&at("server"), Wanted::server());
    let other = authority.issue(&at("other"), Wanted::server());
    let expired = authority.issue(&at("expired"), Wanted::server().expired());
    let early = authority.issue(&at("early"), Wanted::server().not_yet_valid());
    std::fs::write(at("access.toml"), grant("cert:a", "view", "")).expect("written");
    std::fs::write(at("broken.toml"), grant("cert:a", "viewer", "")).expect("written");
    std::fs::write(at("empty.pem"), "").expect("written");
    std::fs::write(at("broken.pem"), "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        .expect("written");
    let (access, ca) = (at("access.toml"), authority.file.clone());
    let refused = |args: &[&str], text: &str| {
        let mut command = vmprobe(&[&["serve"], args].concat());
        let output = command.env("VMPROBE_SOCKET", at("socket")).output().expect("vmprobe starts");
        assert_code(&output, 2);
        assert!(stderr(&output).contains(text), "{args:?}: {}", stderr(&output));
        assert!(!at("socket").exists());
    };
    let with = |cert: &Path, key: &Path, ca: &Path, access: &Path, said: &str| {
        let (cert, key, ca, access) = (text(cert), text(key), text(ca), text(access));
        let listen = ["--listen", "127.0.0.1:0", "--access", &access];
        let tls = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca];
        refused(&[&listen[..], &tls[..]].concat(), said);
    };
    let (cert, key) = (&good.certificate, &good.key);
    with(&at("nowhere"), key, &ca, &access, "nowhere: cannot be read: No such file");
    with(cert, &at("nowhere"), &ca, &access, "nowhere: cannot be read: No such file");
    with(cert, key, &at("nowhere"), &access, "nowhere: cannot be read: No such file");
    with(cert, key, &ca, &at("nowhere"), "nowhere: cannot be read: No such file");
    with(dir.path(), key, &ca, &access, "cannot be read: Is a directory");
    with(key, key, &ca, &access, "has no certificate in it");
    with(&at("broken.pem"), key, &ca, &access, "The certificate cannot be read");
    with(cert, cert, &ca, &access, "has no private key in it");
    with(cert, &other.key, &ca, &access, "is not the key of --tls-cert");
    with(&expired.certificate, &expired.key, &ca, &access, "expired at ");
    with(&early.certificate, &early.key, &ca, &access, "is valid from ");
    with(cert, key, &at("empty.pem"), &access, "has no certificate in it");
    with(cert, key, &at("broken.pem"), &access, "--tls-client-ca");
    with(cert, key, &ca, &at("broken.toml"), "line 3, column 8");
    // There is no listening without certificates, and none without saying who may do what.
    let (cert, key, ca, access) = (text(cert), text(key), text(&ca), text(&access));
    refused(&["--listen", "127.0.0.1:0"], "required");
    refused(&["--listen", "127.0.0.1:0", "--access", &access], "--tls-cert");
    let tls = ["--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca];
    refused(&[&["--listen", "127.0.0.1:0"], &tls[..]].concat(), "--access");
    refused(&[&["--access", &access], &tls[..]].concat(), "--listen");
    let all = [&["--listen", "127.0.0.1:0", "--access", &access], &tls[..4]].concat();
    refused(&all, "--tls-client-ca");
}

#[test]
fn a_client_sees_and_touches_only_the_machines_of_its_grants() {
    if !local_kvm() {
        return;
    }
    let tls = Tls::start(
        &(grant("cert:alice", "admin", "machines = [\"t*\"]")
            + &grant("cert:alice", "view", "machines = [\"shared\"]")
            + &grant("cert:root", "admin", "")),
    );
    let (alice, root) = (tls.client("alice"), tls.client("root"));
    for name in ["shared", "secret"] {
        assert_code(&tls.as_holder(&root, &["vm", "create", "ticker", "--name", name]), 0);
    }
    assert_code(&tls.as_holder(&alice, &["vm", "create", "ticker", "--name", "t1"]), 0);
    let names = |files: &Files| {
        let output = tls.as_holder(files, &["vm", "ls", "--output", "json"]);
        assert_code(&output, 0);
        let lines = stdout(&output);
        let name = |line| serde_json::from_str::<serde_json::Value>(line).expect("JSON")["name"].to_string();
        lines.lines().map(name).collect::<Vec<_>>()
    };
    assert_eq!(names(&alice), ["\"shared\"", "\"t1\""]);
    assert_eq!(names(&root), ["\"secret\"", "\"shared\"", "\"t1\""]);
    // Whether there is such a machine is not told.
    let refused = |args: &[&str]| {
        let output = tls.as_holder(&alice, args);
        assert_code(&output, 2);
        stderr(&output)
    };
    assert_eq!(
        refused(&["vm", "show", "secret"]),
        refused(&["vm", "show", "absent"]).replace("absent", "secret")
    );
    assert!(refused(&["vm", "start", "shared"]).contains("the role 'operate', and it has 'view'"));
    assert!(refused(&["vm", "rm", "secret"]).contains("it has none"));
    assert!(refused(&["vm", "create", "ticker", "--name", "u"]).contains("on machine 'u'"));
    assert!(refused(&["vm", "create", "ticker"]).contains("on machine 'vm-1'"));
    assert!(refused(&["vm", "show", "t2"]).contains("There is no machine"));
    assert_code(&tls.as_holder(&alice, &["vm", "rm", "t1"]), 0);
    assert_eq!(names(&root).len(), 2);
}

#[test]
fn what_is_in_the_guest_is_seen_from_the_role_probe_on() {
    if !local_kvm() {
        return;
    }
    let tls = Tls::start(
        &(grant("cert:viewer", "view", "")
            + &grant("cert:prober", "probe", "")
            + &grant("cert:chief", "admin", "")),
    );
    let (viewer, prober, chief) = (tls.client("viewer"), tls.client("prober"), tls.client("chief"));
    let fine = |files: &Files, args: &[&str]| {
        let output = tls.as_holder(files, args);
        assert_code(&output, 0);
        stdout(&output)
    };
    fine(&chief, &["vm", "create", "ticker", "--name", "t"]);
    fine(&prober, &["probe", "add", "t", "tick", "tick%return"]);
    fine(&chief, &["vm", "start", "t"]);
    let read = |files: &Files, output: &str| {
        fine(files, &["events", "t", "--from", "0", "--max", "20", "--output", output])
    };
    let events = |text: String| {
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect::<Vec<serde_json::Value>>()
    };
    let (seen, all) = (events(read(&viewer, "json")), events(read(&prober, "json")));
    for (seen, all) in seen.iter().zip(&all) {
        for key in ["ts_ns", "vcpu", "ip", "symbol", "probe", "duration_ns"] {
            assert_eq!(seen[key], all[key], "{key}");
        }
        assert!(seen["regs"].is_null() && seen["args"].is_null() && seen["ret"].is_null(), "{seen}");
        assert!(all["regs"]["rax"].is_string(), "{all}");
    }
    assert!(all.iter().any(|event| event["ret"].is_string()) && all.iter().any(|it| it["args"].is_object()));
    let text = read(&viewer, "text");
    assert!(text.contains("took") && !text.contains('='), "{text}");
    let console = tls.as_holder(&viewer, &["console", "t"]);
    assert_code(&console, 2);
    assert!(stderr(&console).contains("'probe'"), "{}", stderr(&console));
    fine(&chief, &["vm", "stop", "t"]);
    assert!(fine(&prober, &["console", "t"]).contains("ticker"));
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_are_read_again_at_sighup_and_a_stream_ends_with_its_right() {
    if !local_kvm() {
        return;
    }
    let before = grant("cert:alice", "admin", "") + &grant("cert:bob", "view", "");
    let tls = Tls::start(&before);
    let alice = tls.channel(&tls.client("alice")).await;
    let bob = tls.client("bob");
    let spec = MachineSpec { image: "ticker".to_owned(), memory_bytes: 64 << 20, ..MachineSpec::default() };
    let create = |name: &str, key: &str| CreateMachineRequest {
        name: name.to_owned(),
        spec: Some(spec.clone()),
        idempotency_key: key.to_owned(),
    };
    MachinesClient::new(alice.clone()).create_machine(create("t", "k")).await.expect("a machine");
    let request = StreamEventsRequest { machine: "t".to_owned(), ..StreamEventsRequest::default() };
    let open = |channel: Channel| {
        let request = request.clone();
        async move { EventsClient::new(channel).stream_events(request).await.expect("a stream").into_inner() }
    };
    let mut stream = open(alice.clone()).await;
    let mut kept = open(tls.channel(&bob).await).await;
    stream.message().await.expect("no error").expect("the first response");
    kept.message().await.expect("no error").expect("the first response");

    // A broken file changes nothing.
    tls.access(&grant("cert:alice", "king", ""));
    tls.service.wait_for("the rights stay as they were");
    MachinesClient::new(alice.clone()).list_machines(ListMachinesRequest {}).await.expect("as before");

    // Alice has nothing any more, Bob everything.
    tls.access(&grant("cert:bob", "admin", ""));
    tls.service.wait_for("the access file was read again");
    let ended = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "it ends with an error"),
            Err(status) => break status,
        }
    };
    assert_eq!(ended.code(), Code::PermissionDenied);
    let list = MachinesClient::new(alice.clone()).list_machines(ListMachinesRequest {}).await;
    assert_eq!(list.expect_err("no right").code(), Code::PermissionDenied);
    // Another's key is no way to what it made.
    let channel = tls.channel(&bob).await;
    let made = MachinesClient::new(channel.clone()).create_machine(create("", "k")).await.expect("its own");
    assert_eq!(made.into_inner().name, "vm-1");
    // Nor is an answer of earlier given to who has lost the right.
    let again = MachinesClient::new(alice).create_machine(create("t", "k")).await;
    assert_eq!(again.expect_err("no right").code(), Code::PermissionDenied);
    let still = tokio::time::timeout(Duration::from_millis(500), kept.message()).await;
    assert!(still.is_err(), "Bob's stream goes on: {still:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_lose_their_registers_with_their_readers_role() {
    if !local_kvm() {
        return;
    }
    let tls = Tls::start(&grant("cert:alice", "probe", ""));
    tls.service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    let channel = tls.channel(&tls.client("alice")).await;
    let added = AddProbesRequest {
        machine: "t".to_owned(),
        specs: vec!["tick".to_owned()],
        ..AddProbesRequest::default()
    };
    ProbesClient::new(channel.clone()).add_probes(added).await.expect("armed");
    let request = StreamEventsRequest { machine: "t".to_owned(), ..StreamEventsRequest::default() };
    let mut stream = EventsClient::new(channel).stream_events(request).await.expect("a stream").into_inner();
    let mut next = async || loop {
        let response = stream.message().await.expect("no error").expect("it goes on");
        if let Some(event) = response.events.into_iter().next() {
            break event;
        }
    };
    let before = next().await;
    assert!(before.registers.is_some() && !before.values.is_empty());
    tls.access(&grant("cert:alice", "view", ""));
    tls.service.wait_for("the access file was read again");
    let until = Instant::now() + Duration::from_secs(60);
    let after = loop {
        // Some were on their way.
        let event = next().await;
        if event.registers.is_none() {
            break event;
        }
        assert!(Instant::now() < until, "registers come on and on");
    };
    assert!(after.values.is_empty() && after.ip == before.ip);
}

#[test]
#[ignore = "a minute; make campaign runs it"]
fn a_reader_that_does_not_answer_is_let_go() {
    if !local_kvm() {
        return;
    }
    let tls = Tls::start(&grant("cert:alice", "admin", ""));
    let alice = tls.client("alice");
    assert_code(&tls.as_holder(&alice, &["vm", "create", "ticker", "--name", "t"]), 0);
    // proc_net_tcp(5): of a line, the local address and port, the peer's, and the state, of which 01 is an open connection.
    let port = format!(":{:04X}", tls.port());
    let open = || {
        let table = std::fs::read_to_string("/proc/net/tcp").expect("a table");
        let columns = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        columns.filter(|one| one[1].ends_with(&port) && one[3] == "01").count()
    };
    let wait = |done: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_secs(180);
        while !done() {
            assert!(Instant::now() < until, "{} connections are open", open());
            std::thread::sleep(Duration::from_millis(100));
        }
    };
    wait(&|| open() == 0);
    let mut reader = tls.command(&tls.url(), &alice, &tls.authority.file, &["events", "t"]);
    let reader = reader.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("vmprobe starts");
    wait(&|| open() == 1);
    std::thread::sleep(Duration::from_millis(500));
    let pid = rustix::process::Pid::from_child(&reader);
    let stopped = Instant::now();
    rustix::process::kill_process(pid, Signal::STOP).expect("it runs");
    wait(&|| open() == 0);
    println!("let go after {:?}", stopped.elapsed());
    rustix::process::kill_process(pid, Signal::CONT).expect("it is there");
    assert_code(&reader.wait_with_output().expect("it ends"), 3);
}

#[test]
fn certificates_are_read_again_at_sighup() {
    let tls = Tls::start(&grant("cert:alice", "view", ""));
    let alice = tls.client("alice");
    assert_code(&tls.as_holder(&alice, &["vm", "ls"]), 0);
    // One that is broken changes nothing.
    std::fs::write(tls.path("server.pem"), "").expect("written");
    tls.service.signal(Signal::HUP);
    tls.service.wait_for("the certificates stay as they were");
    assert_code(&tls.as_holder(&alice, &["vm", "ls"]), 0);
    // Another CA, another service's certificate: the old ones count no longer.
    let other = Authority::new(&tls.path("ca.pem"));
    other.issue(&tls.path("server"), Wanted::server());
    tls.service.signal(Signal::HUP);
    tls.service.wait_for("the certificates were read again");
    let old = tls.as_holder(&alice, &["vm", "ls"]);
    assert_code(&old, 3);
    let new = other.issue(&tls.path("alice"), Wanted::client("alice"));
    assert_code(&tls.as_holder(&new, &["vm", "ls"]), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_expires_ends_what_its_holder_does() {
    if !local_kvm() {
        return;
    }
    let tls = Tls::start(&grant("cert:alice", "admin", ""));
    tls.service.json(&["vm", "create", "ticker", "--name", "t"]);
    let until = SystemTime::now() + Duration::from_secs(15);
    let files = tls.authority.issue(&tls.path("brief"), Wanted { until, ..Wanted::client("alice") });
    let channel = tls.channel(&files).await;
    let mut machines = MachinesClient::new(channel.clone());
    let request = StreamEventsRequest { machine: "t".to_owned(), ..StreamEventsRequest::default() };
    let mut stream = EventsClient::new(channel).stream_events(request).await.expect("a stream").into_inner();
    let ended = loop {
        match stream.message().await {
            Ok(message) => assert!(message.is_some(), "it ends with an error"),
            Err(status) => break status,
        }
    };
    assert!(SystemTime::now() >= until - Duration::from_secs(1));
    assert_eq!(ended.code(), Code::Unauthenticated);
    let refused = machines.list_machines(ListMachinesRequest {}).await.expect_err("it has expired");
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(tls.audit().iter().any(|line| line["result"] == "Unauthenticated"));
}

#[test]
fn other_users_of_the_host_are_let_in_by_the_access_file() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: another user's client is started by root alone");
        return;
    }
    const NOBODY: u32 = 65534;
    let dir = tempfile::tempdir().expect("a directory");
    // The command of this build may not be within the other user's reach.
    let program = dir.path().join("vmprobe");
    // A process of its own writes it: what other tests start meanwhile would inherit the open file, and keep it from being run.
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_vmprobe")).arg(&program).status();
    assert!(copied.expect("cp starts").success());
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("its own");
    let access = dir.path().join("access.toml");
    std::fs::write(&access, "").expect("written");
    let service = Service::start_with(dir, &["--access", &access.display().to_string()]);
    let mode = || std::fs::metadata(service.socket()).expect("a socket").permissions().mode() & 0o777;
    let nobody = |args: &[&str]| {
        let mut command = std::process::Command::new(&program);
        command.args(args).arg("--socket").arg(service.socket()).uid(NOBODY).current_dir("/");
        command.output().expect("it starts")
    };
    assert_eq!(mode(), 0o600);
    let unreached = nobody(&["vm", "ls"]);
    assert_code(&unreached, 3);
    assert!(stderr(&unreached).contains("Permission denied"), "{}", stderr(&unreached));

    std::fs::write(&access, grant(&format!("uid:{NOBODY}"), "view", "")).expect("written");
    service.signal(Signal::HUP);
    service.wait_for("the access file was read again");
    assert_eq!(mode(), 0o666);
    assert_code(&nobody(&["vm", "ls"]), 0);
    let refused = nobody(&["vm", "create", "ticker", "--name", "t"]);
    assert_code(&refused, 2);
    assert!(stderr(&refused).contains("uid:65534 may not CreateMachine"), "{}", stderr(&refused));
    assert!(service.audit().contains("\"who\":\"uid:65534\""), "{}", service.audit());
    assert_code(&service.client(&["vm", "ls"]), 0);
}

#[tokio::test]
async fn a_change_is_made_and_written_down_also_when_its_client_goes() {
    if !local_kvm() {
        return;
    }
    let tls = Tls::start(&grant("cert:alice", "admin", ""));
    let alice = tls.client("alice");
    let spec = MachineSpec { image: "ticker".to_owned(), memory_bytes: 64 << 20, ..MachineSpec::default() };
    let create =
        CreateMachineRequest { name: "t".to_owned(), spec: Some(spec), ..CreateMachineRequest::default() };
    let mut machines = MachinesClient::new(tls.channel(&alice).await);
    let asked = tokio::spawn(async move { machines.create_machine(create).await });
    let until = Instant::now() + Duration::from_secs(60);
    while !tls.path("socket.d/t.sock").exists() {
        assert!(Instant::now() < until, "no process is started");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // The machine's process is there, the machine is not yet.
    asked.abort();
    let until = Instant::now() + Duration::from_secs(60);
    while !tls.audit().iter().any(|line| line["call"] == "CreateMachine" && line["result"] == "Ok") {
        assert!(Instant::now() < until, "{:?}", tls.audit());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(tls.service.json(&["vm", "ls"])[0]["name"], "t");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_client_cannot_take_all_connections() {
    let tls = Tls::start(&(grant("cert:alice", "view", "") + &grant("cert:bob", "view", "")));
    let (alice, bob) = (tls.client("alice"), tls.client("bob"));
    let mut channels = Vec::new();
    for _ in 0..64 {
        channels.push(tls.channel(&alice).await);
    }
    for channel in &channels {
        let list = MachinesClient::new(channel.clone()).list_machines(ListMachinesRequest {}).await;
        list.expect("each is served");
    }
    assert_code(&tls.as_holder(&alice, &["vm", "ls"]), 3);
    tls.service.wait_for("cert:alice has 64 already");
    assert_code(&tls.as_holder(&bob, &["vm", "ls"]), 0);
    channels.clear();
    let until = Instant::now() + Duration::from_secs(60);
    while !tls.as_holder(&alice, &["vm", "ls"]).status.success() {
        assert!(Instant::now() < until, "they are not given back");
    }
    // The owner's own are not counted.
    let own: Vec<UnixStream> =
        (0..300).map(|_| UnixStream::connect(tls.service.socket()).expect("it listens")).collect();
    assert_code(&tls.service.client(&["vm", "ls"]), 0);
    drop(own);
}

#[test]
fn connections_that_say_nothing_are_let_go_and_keep_nobody_out_for_long() {
    let tls = Tls::start(&grant("cert:alice", "view", ""));
    let alice = tls.client("alice");
    let connect = || TcpStream::connect(("127.0.0.1", tls.port())).expect("it listens");
    let silent: Vec<TcpStream> = (0..256).map(|_| connect()).collect();
    // They are all that there may be; the next is refused at once, and the socket's own clients are not concerned.
    let next = connect();
    next.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
    assert!(matches!((&next).read(&mut [0]), Ok(0) | Err(_)));
    tls.service.wait_for("there are 256 already");
    assert_code(&tls.service.client(&["vm", "ls"]), 0);
    // Each is let go when it has shown no certificate in time.
    for mut stream in silent {
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a time");
        let read = stream.read(&mut [0; 64]);
        assert!(
            matches!(read, Ok(0))
                || read.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionReset)
        );
    }
    tls.service.wait_for("it showed no certificate within 10s");
    assert_code(&tls.as_holder(&alice, &["vm", "ls"]), 0);
}

/// The first bytes of connections: random, of other protocols, or a truncated beginning of the right one.
fn garbage(random: &mut fastrand::Rng) -> Vec<u8> {
    let bytes = |random: &mut fastrand::Rng, most: usize| {
        let count = random.usize(..most);
        (0..count).map(|_| random.u8(..)).collect::<Vec<u8>>()
    };
    // The record and handshake headers of a TLS ClientHello (RFC 8446, 4.1.2, 5.1), before what is random.
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    match random.u8(..6) {
        0 => bytes(random, 20_000),
        1 => b"GET / HTTP/1.1\r\nHost: vmprobe\r\n\r\n".to_vec(),
        2 => [&hello[..], &bytes(random, 600)].concat(),
        3 => hello[..random.usize(..hello.len())].to_vec(),
        4 => [&preface[..], &bytes(random, 4000)].concat(),
        // A frame of HTTP/2 (RFC 9113, 4.1) of any kind, with any flags, of a length that may be a lie.
        _ => {
            let length = random.u32(..40_000).to_be_bytes();
            let head = [&length[1..], &[random.u8(..12), random.u8(..), 0, 0, 0, random.u8(..)]].concat();
            [&preface[..], &[0, 0, 0, 4, 0, 0, 0, 0, 0], &head, &bytes(random, 9000)].concat()
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_leaves_the_service_serving() {
    let tls = Tls::start(&(grant("cert:alice", "view", "") + &grant("cert:chief", "admin", "")));
    let alice = tls.client("alice");
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for _ in 0..200 {
        let bytes = garbage(&mut random);
        if random.bool() {
            let mut stream = UnixStream::connect(tls.service.socket()).expect("it listens");
            stream.write_all(&bytes).ok();
        } else {
            let mut stream = TcpStream::connect(("127.0.0.1", tls.port())).expect("it listens");
            stream.write_all(&bytes).ok();
        }
    }
    // Bodies that are no messages, also from one who may do everything, to every call.
    let channel = tls.channel(&tls.client("chief")).await;
    for path in calls().iter().flat_map(|path| std::iter::repeat_n(path, 20)) {
        let body: Vec<u8> = (0..random.usize(1..300)).map(|_| random.u8(..)).collect();
        let code = call(&channel, path, body.clone()).await;
        assert!(!matches!(code, Code::Unavailable | Code::Unknown), "{path}: {code:?} of {body:?}");
    }
    for path in calls() {
        // What is meant to be a message of any length, and a message that is too long.
        assert_ne!(call(&channel, &path, vec![0xff; 50]).await, Code::Ok, "{path}");
        assert_eq!(call(&channel, &path, vec![0; 5 << 20]).await, Code::OutOfRange, "{path}");
    }
    assert!(tls.service.json(&["vm", "ls"]).is_empty());
    assert_code(&tls.as_holder(&alice, &["vm", "ls"]), 0);
    assert!(!tls.service.log().contains("panicked"), "{}", tls.service.log());
    assert_eq!(tls.service.terminate().0, Some(0));
}
