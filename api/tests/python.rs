//! The Python client, installed by pip from the tree, and a Python client that knows nothing but reflection.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::service::Service;
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
    pip.args(["install", "--quiet", "--disable-pip-version-check", "grpcio-reflection==1.71.2"]);
    run(pip.arg(root.join("clients/python")));
    at.join("bin/python")
}

#[test]
fn the_client_from_the_tree_plots_a_histogram_and_one_without_the_contract_finds_it() {
    if !local_kvm() || !python() {
        return;
    }
    let python = environment();
    let service = Service::start();
    let socket = service.socket();
    let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("../clients/python/examples/latency.py");
    let plotted =
        Command::new(&python).arg(example).env("VMPROBE_SOCKET", &socket).output().expect("it starts");
    let reflected = Command::new(&python).args(["-c", REFLECTING]).arg(&socket).output().expect("it starts");
    let looked = Command::new(&python).args(["-c", LOOKING]).arg(&socket).output().expect("it starts");
    let left = service.client(&["vm", "ls"]);
    drop(service);

    assert_code(&plotted, 0);
    let plot = stdout(&plotted);
    assert!(plot.starts_with("tick: 2000 calls\n"), "{plot}");
    let counts = plot.lines().skip(1).filter_map(|line| line.split_whitespace().nth(5)?.parse::<u64>().ok());
    assert_eq!(counts.sum::<u64>(), 2000, "{plot}");
    assert_code(&left, 0);
    assert_eq!(stdout(&left), "", "the example deletes its machine");

    assert_code(&looked, 0);
    assert_eq!(stdout(&looked), "554889e5\n[('_start', 0), ('_start', 1)]\n");

    assert_code(&reflected, 0);
    let services = "['vmprobe.v1.Events', 'vmprobe.v1.Guest', 'vmprobe.v1.Host', 'vmprobe.v1.Machines', 'vmprobe.v1.Probes']";
    let version = stdout(&output(&["--version"]));
    let version = version.trim().trim_start_matches("vmprobe ");
    assert_eq!(stdout(&reflected), format!("{services}\n{version}\n"));
}
