//! `vmprobe vm`.

use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tonic::transport::Channel;

use super::with_service;
use crate::cli::{Output, VmArgs, VmCommand, VmCreateArgs, VmRestoreArgs};
use crate::contract::machines_client::MachinesClient;
use crate::contract::{
    CreateMachineRequest, DeleteMachineRequest, Disk, DumpMachineRequest, DumpMachineResponse,
    GetMachineRequest, ListMachinesRequest, Machine, MachineSpec, PauseMachineRequest, ResumeMachineRequest,
    SaveMachineRequest, SaveMachineResponse, StartMachineRequest, StopMachineRequest,
};
use crate::exit::{Code, Failure};
use crate::images;
use crate::output::json_lines;
use crate::snapshot::{Part, Writer};

type Client = MachinesClient<Channel>;

pub fn vm(args: &VmArgs) -> Result<Code, Failure> {
    let machines = with_service(&args.service, |channel| command(Client::new(channel), &args.command))?;
    match args.output {
        Output::Json => json_lines(machines.iter().map(Line::of))?,
        Output::Text => text(&machines),
    }
    Ok(Code::Done)
}

async fn command(mut client: Client, command: &VmCommand) -> Result<Vec<Machine>, Failure> {
    let name = |name: &String| name.clone();
    let machine = match command {
        VmCommand::Create(args) => create(&mut client, args).await?,
        VmCommand::Ls => {
            return Ok(client.list_machines(ListMachinesRequest {}).await?.into_inner().machines);
        }
        VmCommand::Show { vm } => {
            client.get_machine(GetMachineRequest { name: name(vm) }).await?.into_inner()
        }
        VmCommand::Start { vm } => {
            client.start_machine(StartMachineRequest { name: name(vm) }).await?.into_inner()
        }
        VmCommand::Pause { vm } => {
            client.pause_machine(PauseMachineRequest { name: name(vm) }).await?.into_inner()
        }
        VmCommand::Resume { vm } => {
            client.resume_machine(ResumeMachineRequest { name: name(vm) }).await?.into_inner()
        }
        VmCommand::Stop { vm, grace } => {
            let grace_ns = u64::try_from(grace.as_nanos()).unwrap_or(u64::MAX);
            client.stop_machine(StopMachineRequest { name: name(vm), grace_ns }).await?.into_inner()
        }
        VmCommand::Snapshot { vm, directory } => {
            save(&mut client, name(vm), directory).await?;
            client.get_machine(GetMachineRequest { name: name(vm) }).await?.into_inner()
        }
        VmCommand::Dump { vm, file } => {
            dump(&mut client, name(vm), file).await?;
            client.get_machine(GetMachineRequest { name: name(vm) }).await?.into_inner()
        }
        VmCommand::Restore(args) => return restore(&mut client, args).await,
        VmCommand::Rm { vms } => {
            for vm in vms {
                client.delete_machine(DeleteMachineRequest { name: name(vm) }).await?;
            }
            return Ok(Vec::new());
        }
    };
    Ok(vec![machine])
}

async fn create(client: &mut Client, args: &VmCreateArgs) -> Result<Machine, Failure> {
    let spec = MachineSpec {
        image: if !images::is_file(&args.image) {
            args.image.clone()
        } else {
            absolute(Path::new(&args.image))?
        },
        initrd: args.guest.initrd.as_deref().map(absolute).transpose()?.unwrap_or_default(),
        cmdline: args.guest.cmdline.clone().unwrap_or_default(),
        memory_bytes: args.guest.memory,
        vcpus: args.guest.cpus.unwrap_or_default(),
        kaslr: args.guest.kaslr,
        snapshot: String::new(),
        disks: args.guest.disks.iter().map(|disk| Disk::new(disk, absolute)).collect::<Result<_, _>>()?,
    };
    let request = CreateMachineRequest {
        name: args.name.clone().unwrap_or_default(),
        spec: Some(spec),
        idempotency_key: String::new(),
    };
    let machine = client.create_machine(request).await?.into_inner();
    if !args.start {
        return Ok(machine);
    }
    Ok(client.start_machine(StartMachineRequest { name: machine.name }).await?.into_inner())
}

/// Writes the snapshot that the service sends.
async fn save(client: &mut Client, name: String, directory: &Path) -> Result<(), Failure> {
    let mut writer = Writer::create(directory)?;
    let mut parts = client.save_machine(SaveMachineRequest { name }).await?.into_inner();
    while let Some(SaveMachineResponse { file, size, offset, data }) = parts.message().await? {
        let part = Part { file: &file, size, offset, data: &data };
        writer.write(&part).map_err(|error| {
            Failure::Host(format!("{}: {file} cannot be written: {error}", directory.display()))
        })?;
    }
    writer.finish()
}

/// Writes the core file that the service sends. One that is not whole does not stay.
async fn dump(client: &mut Client, name: String, path: &Path) -> Result<(), Failure> {
    let mut parts = client.dump_machine(DumpMachineRequest { name }).await?.into_inner();
    let failed = |error: io::Error| Failure::Host(format!("{}: cannot be written: {error}", path.display()));
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    while let Some(DumpMachineResponse { size, offset, data }) = parts.message().await? {
        file.as_file()
            .write_all_at(&data, offset)
            .and_then(|()| file.as_file().set_len(size))
            .map_err(failed)?;
    }
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// Makes all of the machines before the first one runs.
async fn restore(client: &mut Client, args: &VmRestoreArgs) -> Result<Vec<Machine>, Failure> {
    let spec = MachineSpec { snapshot: absolute(&args.directory)?, ..MachineSpec::default() };
    let mut machines = Vec::new();
    for number in 1..=args.count {
        let name = match &args.name {
            Some(name) if args.count > 1 => format!("{name}-{number}"),
            name => name.clone().unwrap_or_default(),
        };
        let request = CreateMachineRequest { name, spec: Some(spec.clone()), idempotency_key: String::new() };
        machines.push(client.create_machine(request).await?.into_inner());
    }
    if !args.stopped {
        for machine in &mut machines {
            let request = StartMachineRequest { name: machine.name.clone() };
            *machine = client.start_machine(request).await?.into_inner();
        }
    }
    Ok(machines)
}

/// The service has another working directory.
fn absolute(path: &Path) -> Result<String, Failure> {
    let absolute = std::path::absolute(path)
        .map_err(|error| Failure::Usage(format!("{}: cannot be made absolute: {error}", path.display())))?;
    absolute.into_os_string().into_string().map_err(|path| {
        Failure::Usage(format!("{}: is no UTF-8, which the contract needs", Path::new(&path).display()))
    })
}

fn state_name(machine: &Machine) -> &'static str {
    machine.state().name().unwrap_or("?")
}

fn text(machines: &[Machine]) {
    if machines.is_empty() {
        return;
    }
    println!("{:16} {:8} {:>10} {:24} END", "NAME", "STATE", "AGE", "IMAGE");
    for machine in machines {
        let from = |spec: &MachineSpec| match spec.snapshot.as_str() {
            "" => spec.image.clone(),
            snapshot => format!("{} from {snapshot}", spec.image),
        };
        let image = machine.spec.as_ref().map(from).unwrap_or_default();
        let age = Duration::from_nanos(machine.age_ns).as_secs_f64();
        println!("{:16} {:8} {age:>9.1}s {image:24} {}", machine.name, state_name(machine), machine.end);
        for notice in &machine.notices {
            eprintln!("vmprobe: {}: {notice}", machine.name);
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    state: &'static str,
    image: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    snapshot: &'a str,
    /// As `--disk` takes them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    disks: Vec<String>,
    vcpus: u32,
    memory_bytes: u64,
    age_ns: u64,
    end: &'a str,
    notices: &'a [String],
    isolation: Option<Isolation<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    durable_sequence: Option<u64>,
}

/// As the contract has it.
#[derive(Serialize)]
struct Isolation<'a> {
    seccomp: bool,
    no_capabilities: bool,
    landlock_abi: u32,
    cgroup: &'a str,
    memory_limit_bytes: u64,
}

impl<'a> Line<'a> {
    fn of(machine: &'a Machine) -> Self {
        let spec = machine.spec.as_ref();
        Self {
            name: &machine.name,
            state: state_name(machine),
            image: spec.map_or("", |spec| &spec.image),
            snapshot: spec.map_or("", |spec| &spec.snapshot),
            disks: spec
                .iter()
                .flat_map(|spec| &spec.disks)
                .map(|disk| disk.options().map_or_else(|| disk.path.clone(), |options| options.to_string()))
                .collect(),
            vcpus: spec.map_or(0, |spec| spec.vcpus),
            memory_bytes: spec.map_or(0, |spec| spec.memory_bytes),
            age_ns: machine.age_ns,
            end: &machine.end,
            notices: &machine.notices,
            isolation: machine.isolation.as_ref().map(|isolation| Isolation {
                seccomp: isolation.seccomp,
                no_capabilities: isolation.no_capabilities,
                landlock_abi: isolation.landlock_abi,
                cgroup: &isolation.cgroup,
                memory_limit_bytes: isolation.memory_limit_bytes,
            }),
            durable_sequence: machine.durable_sequence,
        }
    }
}
