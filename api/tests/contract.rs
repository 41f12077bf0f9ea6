//! docs/api.md is what the contract says: generated from it, and compared here.

#![allow(clippy::tests_outside_test_module)]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{
    DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet,
};

/// Of FileDescriptorProto: messages, enums, services. Of DescriptorProto: fields. Of the others: values and methods.
const MESSAGES: i32 = 4;
const ENUMS: i32 = 5;
const SERVICES: i32 = 6;
const MEMBERS: i32 = 2;

/// What is written above each element, by its path in the file.
struct Comments(BTreeMap<Vec<i32>, String>);

impl Comments {
    fn of(file: &FileDescriptorProto) -> Self {
        let locations = file.source_code_info.iter().flat_map(|info| &info.location);
        let text = |comment: &str| {
            let paragraphs =
                comment.split("\n\n").map(|one| one.split_whitespace().collect::<Vec<_>>().join(" "));
            paragraphs.collect::<Vec<_>>().join("\n\n")
        };
        let commented =
            locations.filter_map(|at| Some((at.path.clone(), text(at.leading_comments.as_ref()?))));
        Self(commented.collect())
    }

    /// The comment of an element, which must have one unless its name says all.
    fn get(&self, path: &[i32]) -> &str {
        self.0.get(path).map_or("", String::as_str)
    }
}

fn index(index: usize) -> i32 {
    i32::try_from(index).expect("few")
}

fn kind(field: &FieldDescriptorProto) -> String {
    let scalar = |kind: Type| kind.as_str_name().trim_start_matches("TYPE_").to_lowercase();
    let name = match field.r#type() {
        Type::Message | Type::Enum => {
            let name = field.type_name().rsplit('.').next().unwrap_or_default();
            format!("[{name}](#{})", name.to_lowercase())
        }
        kind => scalar(kind),
    };
    match field.label() {
        Label::Repeated => format!("repeated {name}"),
        _ if field.proto3_optional() => format!("optional {name}"),
        _ if field.oneof_index.is_some() => format!("one of: {name}"),
        _ => name,
    }
}

fn message(out: &mut String, message: &DescriptorProto, comments: &Comments, path: &[i32]) {
    writeln!(out, "\n### {}\n\n{}", message.name(), comments.get(path)).expect("a String");
    if message.field.is_empty() {
        return;
    }
    out.push_str("\n| number | name | type | |\n|---|---|---|---|\n");
    for (number, field) in message.field.iter().enumerate() {
        let comment = comments.get(&[path, &[MEMBERS, index(number)]].concat()).replace("\n\n", " ");
        let row = format!("| {} | `{}` | {} | {comment} |", field.number(), field.name(), kind(field));
        writeln!(out, "{row}").expect("a String");
    }
}

fn enumeration(out: &mut String, one: &EnumDescriptorProto, comments: &Comments, path: &[i32]) {
    writeln!(out, "\n### {}\n\n{}", one.name(), comments.get(path)).expect("a String");
    out.push_str("\n| number | name | |\n|---|---|---|\n");
    for (number, value) in one.value.iter().enumerate() {
        let comment = comments.get(&[path, &[MEMBERS, index(number)]].concat());
        writeln!(out, "| {} | `{}` | {comment} |", value.number(), value.name()).expect("a String");
    }
}

fn document(set: &FileDescriptorSet) -> String {
    let mut out = String::from(
        "# The contract: vmprobe.v1\n\n\
         Generated from `api/proto/vmprobe/v1` (`VMPROBE_WRITE_DOCS=1 cargo test -p api --test contract`).\n\n\
         `vmprobe serve` speaks it over gRPC, with the services grpc.reflection.v1 and grpc.health.v1 beside it; which role each call \
         needs is in [service.md](service.md#who-may-do-what). Errors carry a google.rpc.ErrorInfo with the domain `vmprobe.v1` and one of these reasons: \
         `INVALID_ARGUMENT`, `IMAGE`, `PROBE_REFUSED`, `HOST`, `STATE`, `NO_SUCH_MACHINE`, `NO_SUCH_PROBE`, `PROBE_REMOVED`, \
         `MODULE_PROBE`, `NAME_TAKEN`, `KEY_REUSED`, `BEYOND_THE_NEXT_EVENT`, `PERMISSION_DENIED`, `CERTIFICATE_EXPIRED`, \
         `NO_SUCH_CALL`, `PROCESS_GONE`, `PANICKED`.\n",
    );
    for file in set.file.iter().filter(|file| file.package() == "vmprobe.v1") {
        let comments = Comments::of(file);
        for (number, service) in file.service.iter().enumerate() {
            let path = [SERVICES, index(number)];
            writeln!(out, "\n## {}\n\n{}", service.name(), comments.get(&path)).expect("a String");
            for (number, method) in service.method.iter().enumerate() {
                let comment = comments.get(&[&path[..], &[MEMBERS, index(number)]].concat());
                let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
                let (input, output) = (last(method.input_type()), last(method.output_type()));
                let stream = if method.server_streaming() { "stream " } else { "" };
                writeln!(
                    out,
                    "\n**{}** ([{input}](#{})) returns {stream}[{output}](#{})\n\n{comment}",
                    method.name(),
                    input.to_lowercase(),
                    output.to_lowercase()
                )
                .expect("a String");
            }
        }
        for (number, one) in file.message_type.iter().enumerate() {
            message(&mut out, one, &comments, &[MESSAGES, index(number)]);
        }
        for (number, one) in file.enum_type.iter().enumerate() {
            enumeration(&mut out, one, &comments, &[ENUMS, index(number)]);
        }
    }
    // A message whose name says all has no text.
    out.replace("\n\n\n", "\n\n").trim_end().to_owned() + "\n"
}

fn contract() -> FileDescriptorSet {
    let bytes = include_bytes!(concat!(env!("OUT_DIR"), "/vmprobe.v1.bin"));
    FileDescriptorSet::decode(&bytes[..]).expect("descriptors")
}

#[test]
fn the_documented_contract_is_the_contract() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/api.md");
    let expected = document(&contract());
    if std::env::var_os("VMPROBE_WRITE_DOCS").is_some() {
        fs::write(&path, &expected).expect("docs/api.md can be written");
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == expected,
        "docs/api.md is not what the contract says: VMPROBE_WRITE_DOCS=1 cargo test -p api --test contract"
    );
}

#[test]
fn every_call_and_every_field_that_its_name_does_not_explain_is_documented() {
    // Which machine or probes a call is for.
    let plain = [
        "machine", "machines", "name", "numbers", "probes", "spec", "specs", "findings", "state", "counts",
        "events",
    ];
    for file in contract().file.iter().filter(|file| file.package() == "vmprobe.v1") {
        let comments = Comments::of(file);
        let has = |path: &[i32]| !comments.get(path).is_empty();
        for (number, service) in file.service.iter().enumerate() {
            for (method, one) in service.method.iter().enumerate() {
                let path = [SERVICES, index(number), MEMBERS, index(method)];
                assert!(has(&path), "{}.{}", service.name(), one.name());
            }
        }
        for (number, one) in
            file.message_type.iter().enumerate().filter(|(_, one)| !one.name().ends_with("Registers"))
        {
            for (field, member) in one.field.iter().enumerate() {
                let path = [MESSAGES, index(number), MEMBERS, index(field)];
                assert!(has(&path) || plain.contains(&member.name()), "{}.{}", one.name(), member.name());
            }
        }
    }
}
