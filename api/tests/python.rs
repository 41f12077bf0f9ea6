//! The Python client, installed by pip from the tree, and a Python client that knows nothing but reflection.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::service::{Service, Tls};
use common::{assert_code, local_kvm, output, python, stdout};

/// Asks for the version, by what reflection tells of the contract.
const REFLECTING: &str = "
import sys, grpc
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
options = [('grpc.default_authority', 'localhost')]
channel = grpc.insecure_channel('unix:' + sys.argv[1], options=options)
database = ProtoReflectionDescriptorDatabase(channel)
print(sorted(name for name in database.get_services() if name.startswith('vmprobe')))
method = DescriptorPool(database).FindServiceByName('vmprobe.v1.Host').methods_by_name['GetVersion']
ask, answer = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
call = channel.unary_unary('/vmprobe.v1.Host/GetVersion', ask.SerializeToString, answer.FromString)
print(call(ask()).version)
";

/// Looks at a new machine's memory and registers.
const LOOKING: &str = "
import sys, vmprobe
from vmprobe.v1.guest_pb2 import GetRegistersRequest, GuestAddress, ReadMemoryRequest
from vmprobe.v1.machines_pb2 import CreateMachineRequest, DeleteMachineRequest, MachineSpec
with vmprobe.connect(sys.argv[1]) as service:
    machine = service.machines.CreateMachine(CreateMachineRequest(spec=MachineSpec(image='ticker'))).name
    at = GuestAddress(symbol='tick')
    print(service.guest.ReadMemory(ReadMemoryRequest(machine=machine, address=at, length=4)).data.hex())
    vcpus = service.guest.GetRegisters(GetRegistersRequest(machine=machine)).vcpus
    print([(vcpu.place, vcpu.registers.rdi) for vcpu in vcpus])
    service.machines.DeleteMachine(DeleteMachineRequest(name=machine))
";

/// Reads the metrics as Prometheus does, and prints some.
const SCRAPING: &str = "
import sys, urllib.request
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse
accept = {'Accept': 'application/openmetrics-text; version=1.0.0'}
with urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=accept)) as response:
    assert response.headers['Content-Type'].startswith('application/openmetrics-text'), response.headers
    samples = [sample for family in parse(response.read().decode()) for sample in family.samples]
def total(name, **labels):
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())
print(int(total('vmprobe_machine_up')), int(total('vmprobe_machines', state='paused')))
hits = total('vmprobe_probe_hits_total', machine='t', probe='0', place='tick')
print(int(hits), hits == total('vmprobe_probe_outcomes_total') == total('vmprobe_probe_executed_total'))
print(total('vmprobe_vcpu_exits_total', machine='t') >= hits, total('vmprobe_events_total') <= hits)
print(total('vmprobe_probe_timed_hits_total') == hits // 64, total('vmprobe_probe_timed_seconds_total') > 0)
";

/// Asks over TLS for what a role allows, and for what it does not.
const OVER_TLS: &str = "
import sys, grpc, vmprobe
from vmprobe.v1.host_pb2 import GetVersionRequest
from vmprobe.v1.machines_pb2 import DeleteMachineRequest
service, certificate, key, ca = sys.argv[1:]
with vmprobe.connect(service, certificate=certificate, key=key, ca=ca) as service:
    print(service.host.GetVersion(GetVersionRequest()).version)
    try:
        service.machines.DeleteMachine(DeleteMachineRequest(name='t'))
    except grpc.RpcError as error:
        print(error.code().name, error.details())
";

#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.output().expect("it starts");
    assert_code(&output, 0);
    output
}

/// A virtual environment with the client in it.
fn environment() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let at = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    run(Command::new("python3").arg("-m").arg("venv").arg("--clear").arg(&at));
    let mut pip = Command::new(at.join("bin/pip"));
    pip.args([
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "grpcio-reflection==1.71.2",
        "prometheus-client==0.22.1",
    ]);
    run(pip.arg(root.join("clients/python")));
    at.join("bin/python")
}

#[test]
fn the_client_from_the_tree_plots_a_histogram_and_one_without_the_contract_finds_it() {
    if !local_kvm() || !python() {
        return;
    }
    let python = environment();
    // Free a moment ago.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let address = free.to_string();
    let service = Service::start_with(tempfile::tempdir().expect("a directory"), &["--metrics", &address]);
    let socket = service.socket();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../clients/python/examples/latency.py");
    let plotted =
        Command::new(&python).arg(example).env("VMPROBE_SOCKET", &socket).output().expect("it starts");
    let reflected = Command::new(&python).args(["-c", REFLECTING]).arg(&socket).output().expect("it starts");
    let looked = Command::new(&python).args(["-c", LOOKING]).arg(&socket).output().expect("it starts");
    let left = service.client(&["vm", "ls"]);
    service.json(&["vm", "create", "ticker", "--name", "t", "--cpus", "1"]);
    service.json(&["probe", "add", "t", "tick"]);
    service.json(&["vm", "start", "t"]);
    service.json(&["events", "t", "--from", "0", "--max", "1000"]);
    service.json(&["vm", "pause", "t"]);
    let hits = &service.json(&["probe", "ls", "t"])[0]["hits"];
    let mut scrape = Command::new(&python);
    let scraped =
        scrape.args(["-c", SCRAPING, &format!("http://{address}/metrics")]).output().expect("it starts");
    drop(service);
    let tls = Tls::start("[[grant]]\nwho = \"cert:alice\"\nrole = \"view\"\n");
    let alice = tls.client("alice");
    let files = [&alice.certificate, &alice.key, &tls.authority.file];
    let over_tls =
        Command::new(&python).args(["-c", OVER_TLS, &tls.url()]).args(files).output().expect("it starts");

    assert_code(&plotted, 0);
    let plot = stdout(&plotted);
    assert!(plot.starts_with("tick: 2000 calls\n"), "{plot}");
    let counts = plot.lines().skip(1).filter_map(|line| line.split_whitespace().nth(5)?.parse::<u64>().ok());
    assert_eq!(counts.sum::<u64>(), 2000, "{plot}");
    assert_code(&left, 0);
    assert_eq!(stdout(&left), "", "the example deletes its machine");

    assert_code(&scraped, 0);
    assert_eq!(stdout(&scraped), format!("1 1\n{hits} True\nTrue True\nTrue True\n"));

    assert_code(&looked, 0);
    assert_eq!(stdout(&looked), "554889e5\n[('_start', 0), ('_start', 1)]\n");

    assert_code(&reflected, 0);
    let services = "['vmprobe.v1.Events', 'vmprobe.v1.Guest', 'vmprobe.v1.Host', 'vmprobe.v1.Machines', 'vmprobe.v1.Probes']";
    let version = stdout(&output(&["--version"]));
    let version = version.trim().trim_start_matches("vmprobe ");
    assert_eq!(stdout(&reflected), format!("{services}\n{version}\n"));

    assert_code(&over_tls, 0);
    let denied =
        "PERMISSION_DENIED cert:alice may not DeleteMachine: that needs the role 'admin', and it has 'view'";
    assert!(stdout(&over_tls).starts_with(&format!("{version}\n{denied}")), "{}", stdout(&over_tls));
}
