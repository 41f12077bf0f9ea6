//! The calls of the contract: the role that each needs, and what a request is about.

use std::time::Duration;

use serde::Deserialize;

use crate::contract::guest_address::Where;
use crate::contract::{GuestAddress, MachineSpec};

/// What a client may do, in ascending order: each role includes those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees machines, probes, their counts, and where and when they are hit, but nothing of what is in the guest.
    View,
    /// Places probes, and sees what is in the guest: registers, memory, console.
    Probe,
    /// Changes the guest's course.
    Operate,
    /// Makes and deletes machines.
    Admin,
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Role::View => "view",
            Role::Probe => "probe",
            Role::Operate => "operate",
            Role::Admin => "admin",
        })
    }
}

/// A call of the contract, and what it takes to be answered.
#[derive(Debug, PartialEq, Eq)]
pub struct Rule {
    service: &'static str,
    /// The call, without its service.
    pub call: &'static str,
    pub needs: Role,
    /// Its requests are lines of the audit log.
    pub recorded: bool,
}

const fn rule(service: &'static str, call: &'static str, needs: Role) -> Rule {
    Rule { service, call, needs, recorded: false }
}

const fn recorded(service: &'static str, call: &'static str, needs: Role) -> Rule {
    Rule { service, call, needs, recorded: true }
}

const MACHINES: &str = "vmprobe.v1.Machines";
const PROBES: &str = "vmprobe.v1.Probes";
const GUEST: &str = "vmprobe.v1.Guest";

/// A call that is missing here is answered to nobody.
const RULES: &[Rule] = &[
    recorded(MACHINES, "CreateMachine", Role::Admin),
    rule(MACHINES, "ListMachines", Role::View),
    rule(MACHINES, "GetMachine", Role::View),
    rule(MACHINES, "GetStatistics", Role::View),
    recorded(MACHINES, "StartMachine", Role::Operate),
    recorded(MACHINES, "PauseMachine", Role::Operate),
    recorded(MACHINES, "ResumeMachine", Role::Operate),
    recorded(MACHINES, "StopMachine", Role::Operate),
    recorded(MACHINES, "DeleteMachine", Role::Admin),
    // All that is in the guest, and it stands still meanwhile.
    recorded(MACHINES, "SaveMachine", Role::Operate),
    recorded(MACHINES, "DumpMachine", Role::Operate),
    rule(MACHINES, "StreamConsole", Role::Probe),
    recorded(MACHINES, "WriteConsole", Role::Operate),
    recorded(PROBES, "AddProbes", Role::Probe),
    rule(PROBES, "ListProbes", Role::View),
    rule(PROBES, "ExplainProbe", Role::View),
    recorded(PROBES, "EnableProbes", Role::Probe),
    recorded(PROBES, "DisableProbes", Role::Probe),
    recorded(PROBES, "RemoveProbes", Role::Probe),
    rule(GUEST, "ListSymbols", Role::View),
    // These tell what is in the guest, and are written down though they change nothing.
    recorded(GUEST, "GetRegisters", Role::Probe),
    recorded(GUEST, "ReadMemory", Role::Probe),
    recorded(GUEST, "Translate", Role::Probe),
    recorded(GUEST, "SetRegisters", Role::Operate),
    recorded(GUEST, "WriteMemory", Role::Operate),
    // Without registers and values, unless the client has the role probe there.
    rule("vmprobe.v1.Events", "StreamEvents", Role::View),
    rule("vmprobe.v1.Host", "GetVersion", Role::View),
    rule("vmprobe.v1.Host", "Diagnose", Role::View),
    rule("grpc.health.v1.Health", "Check", Role::View),
    rule("grpc.health.v1.Health", "Watch", Role::View),
    rule("grpc.reflection.v1.ServerReflection", "ServerReflectionInfo", Role::View),
    rule("grpc.reflection.v1alpha.ServerReflection", "ServerReflectionInfo", Role::View),
];

/// The rule for a request's path, `/SERVICE/CALL`.
pub fn required(path: &str) -> Option<&'static Rule> {
    let (service, call) = path.strip_prefix('/')?.split_once('/')?;
    RULES.iter().find(|rule| (rule.service, rule.call) == (service, call))
}

/// A request to a machine: which one, and, for the audit log, what is to be done with it.
pub trait About {
    fn machine(&self) -> &str;
    fn what(&self) -> String {
        String::new()
    }
}

macro_rules! about {
    ($($request:ident { $machine:ident } $(says |$it:ident| $what:expr)?;)*) => {
        $(impl About for crate::contract::$request {
            fn machine(&self) -> &str {
                &self.$machine
            }
            $(fn what(&self) -> String {
                let $it = self;
                $what
            })?
        })*
    };
}

fn numbers(numbers: &[u32]) -> String {
    numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// An address in a guest.
fn place(address: Option<&GuestAddress>) -> String {
    match address.and_then(|address| address.r#where.as_ref()) {
        Some(Where::Linear(gva)) => format!("{gva:#x}"),
        Some(Where::Physical(gpa)) => format!("physical {gpa:#x}"),
        Some(Where::Symbol(text)) => text.clone(),
        None => String::new(),
    }
}

/// The time that a guest has to end by itself; nothing where it has none.
fn grace(grace_ns: u64) -> String {
    if grace_ns == 0 { String::new() } else { format!("grace {:?}", Duration::from_nanos(grace_ns)) }
}

about! {
    CreateMachineRequest { name } says |it| {
        let from = |spec: &MachineSpec| if spec.snapshot.is_empty() { spec.image.clone() } else { spec.snapshot.clone() };
        it.spec.as_ref().map(from).unwrap_or_default()
    };
    GetMachineRequest { name };
    GetStatisticsRequest { name };
    StartMachineRequest { name };
    PauseMachineRequest { name };
    ResumeMachineRequest { name };
    StopMachineRequest { name } says |it| grace(it.grace_ns);
    DeleteMachineRequest { name };
    SaveMachineRequest { name };
    DumpMachineRequest { name };
    StreamConsoleRequest { name };
    WriteConsoleRequest { name } says |it| format!("{} bytes", it.data.len());
    AddProbesRequest { machine } says |it| it.specs.join("; ");
    ListProbesRequest { machine };
    EnableProbesRequest { machine } says |it| numbers(&it.numbers);
    DisableProbesRequest { machine } says |it| numbers(&it.numbers);
    RemoveProbesRequest { machine } says |it| numbers(&it.numbers);
    ExplainProbeRequest { machine };
    StreamEventsRequest { machine };
    ListSymbolsRequest { machine };
    GetRegistersRequest { machine } says |it| it.vcpu.map(|vcpu| format!("vCPU {vcpu}")).unwrap_or_default();
    SetRegistersRequest { machine } says |it| format!("vCPU {}", it.vcpu);
    TranslateRequest { machine } says |it| place(it.address.as_ref());
    ReadMemoryRequest { machine } says |it| format!("{} bytes at {}", it.length, place(it.address.as_ref()));
    WriteMemoryRequest { machine } says |it| format!("{} bytes at {}", it.data.len(), place(it.address.as_ref()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use std::collections::BTreeSet;

    fn paths(descriptors: &[u8]) -> BTreeSet<String> {
        let set = FileDescriptorSet::decode(descriptors).expect("descriptors");
        let services = set.file.iter().flat_map(|file| {
            file.service
                .iter()
                .map(move |service| (format!("{}.{}", file.package(), service.name()), service))
        });
        services
            .flat_map(|(name, service)| {
                service.method.iter().map(move |method| format!("/{name}/{}", method.name()))
            })
            .collect()
    }

    #[test]
    fn every_call_that_is_served_has_a_rule_and_no_rule_is_for_another() {
        let served: BTreeSet<String> = [
            crate::contract::DESCRIPTORS,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ]
        .into_iter()
        .flat_map(paths)
        .collect();
        assert!(served.len() > 20);
        for path in &served {
            let rule = required(path).unwrap_or_else(|| panic!("{path} has no rule"));
            assert_eq!(format!("/{}/{}", rule.service, rule.call), *path);
        }
        assert_eq!(RULES.len(), served.len());
    }

    #[test]
    fn a_path_that_is_no_call_has_no_rule() {
        for path in ["", "/", "vmprobe.v1.Host/GetVersion", "/vmprobe.v1.Host", "/vmprobe.v1.Host/", "//"] {
            assert_eq!(required(path), None, "{path}");
        }
        assert_eq!(required("/vmprobe.v1.Host/GetVersion/"), None);
        assert_eq!(required("/vmprobe.v1.Host/getversion"), None);
    }

    #[test]
    fn each_role_includes_those_before_it() {
        assert!(Role::View < Role::Probe && Role::Probe < Role::Operate && Role::Operate < Role::Admin);
    }
}
