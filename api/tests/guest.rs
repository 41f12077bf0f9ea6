//! A guest seen through the service: registers, memory, page tables and symbols, by the command and by a client that knows the
//! contract only.

#![allow(clippy::tests_outside_test_module)]

mod common;
#[path = "../src/contract.rs"]
#[allow(dead_code)]
mod contract;

use common::service::Service;
use common::{assert_code, gdb, local_kvm, output, stderr, stdout};
use contract::guest_address::Where;
use contract::guest_client::GuestClient;
use contract::{
    GetRegistersRequest, GuestAddress, ReadMemoryRequest, SetRegistersRequest, TranslateRequest,
    WriteMemoryRequest,
};
use tonic::Code;
use tonic_types::StatusExt;

/// Where nothing of the guest ticker is.
const FREE: u64 = 0x200_0000;

#[test]
fn a_core_file_has_the_registers_and_the_text_of_the_guest_as_it_stands() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t"]);
    service.json(&["probe", "add", "t", "tick"]);
    service.json(&["vm", "start", "t"]);
    let hit = &service.json(&["events", "t", "--from", "0", "--max", "1"])[0];
    let address = hit["ip"].as_str().unwrap_or_else(|| panic!("an address: {hit}")).to_owned();
    let file = service.dir.path().join("core").display().to_string();
    // While it runs, and while it stands.
    assert_eq!(service.json(&["vm", "dump", "t", &file])[0]["state"], "running");
    service.json(&["vm", "pause", "t"]);
    service.json(&["vm", "dump", "t", &file]);
    let registers = service.json(&["guest", "registers", "t"]);
    let text = gdb(&file, &["info registers rbx rip", &format!("x/1xb {address}")]);
    for register in ["rbx", "rip"] {
        let value = registers[0]["regs"][register].as_str().expect("a register");
        assert!(text.contains(value), "{register} {value}: {text}");
    }
    // The guest's own instruction is there, and no int3.
    let memory = service.json(&["guest", "read", "t", &address, "1"]);
    let byte = memory[0]["bytes"].as_str().expect("a byte");
    assert!(byte != "cc" && text.contains(&format!("{address}:\t0x{byte}")), "{byte}: {text}");
    let nowhere = service.client(&["vm", "dump", "t", "/nowhere/core"]);
    assert_code(&nowhere, 3);
    assert_eq!(service.json(&["vm", "resume", "t"])[0]["state"], "running");
}

#[test]
fn registers_are_seen_at_any_time_and_changed_while_the_machine_stands() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t"]);
    let new = service.json(&["guest", "registers", "t"]);
    assert_eq!((new.len(), &new[1]["regs"]["rdi"], &new[0]["place"]), (2, &"0x1".into(), &"_start".into()));
    let set = service.json(&["guest", "set", "t", "r8=0x77", "--vcpu", "1"]);
    assert_eq!((&set[0]["vcpu"], &set[0]["regs"]["r8"]), (&1.into(), &"0x77".into()));

    service.json(&["probe", "add", "t", "tick"]);
    service.json(&["vm", "start", "t"]);
    service.json(&["events", "t", "--from", "0", "--max", "10"]);
    assert_eq!(service.json(&["guest", "registers", "t", "--vcpu", "1"])[0]["regs"]["r8"], "0x77");
    let running = service.client(&["guest", "set", "t", "rbx=1"]);
    assert_code(&running, 2);
    assert!(stderr(&running).contains("new or paused"), "{}", stderr(&running));

    // The counter of vCPU 0, which it hands to tick.
    service.json(&["vm", "pause", "t"]);
    service.json(&["guest", "set", "t", "bx=0x10000000"]);
    let paused = service.json(&["guest", "registers", "t"]);
    assert_eq!(paused[0]["regs"]["rbx"], "0x10000000");
    assert_eq!(service.json(&["guest", "registers", "t"]), paused, "it stands");
    for refused in ["rip=0x800000000000", "rflags=0x20002", "rflags=0x102"] {
        assert_code(&service.client(&["guest", "set", "t", refused]), 2);
    }
    assert_eq!(service.json(&["guest", "registers", "t"]), paused, "what is refused changes nothing");
    service.json(&["vm", "resume", "t"]);
    let far_on = |event: &serde_json::Value| event["args"]["arg1"].as_str().is_some_and(|n| n.len() > 9);
    let on_vcpu_0 = |events: Vec<serde_json::Value>| events.into_iter().filter(|event| event["vcpu"] == 0);
    let mut from = 0;
    while !on_vcpu_0(service.json(&["events", "t", "--from", &from.to_string(), "--max", "50"]))
        .any(|event| far_on(&event))
    {
        from += 50;
    }

    service.json(&["vm", "stop", "t"]);
    let ended = service.json(&["guest", "registers", "t"]);
    assert_eq!((ended.len(), &ended[1]["regs"]["r8"]), (2, &"0x77".into()));
    assert_code(&service.client(&["guest", "set", "t", "rbx=1"]), 2);
    assert_code(&service.client(&["guest", "registers", "t", "--vcpu", "2"]), 2);
    assert!(service.audit().contains("SetRegisters"));
}

#[test]
fn memory_is_the_guests_own_and_probes_stay_where_it_is_written() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t"]);
    let read = |place: &[&str]| {
        let args = [&["guest", "read", "t"], place].concat();
        service.json(&args)[0]["bytes"].as_str().expect("bytes").to_owned()
    };
    let own = read(&["tick", "8"]);
    assert!(own.starts_with("554889e5"), "push %rbp; mov %rsp,%rbp: {own}");
    service.json(&["probe", "add", "t", "tick"]);
    assert_eq!(read(&["tick", "8"]), own, "the breakpoint is not in it");
    // nop in place of push, ret behind it: tick returns at once, and its probe is hit as before.
    assert_code(&service.client(&["guest", "write", "t", "tick", "90 c3"]), 0);
    assert!(read(&["tick", "8"]).starts_with("90c3"));
    service.json(&["vm", "start", "t"]);
    let events = service.json(&["events", "t", "--from", "0", "--max", "20"]);
    assert_eq!(events.len(), 20);

    let free = format!("{FREE:#x}");
    assert_code(&service.client(&["guest", "write", "t", "--physical", &free, "0102 0304"]), 0);
    assert_eq!(read(&[&free, "5"]), "0102030400", "its memory is mapped to itself");
    let raw = service.client(&["guest", "read", "t", &free, "3", "--raw"]);
    assert_eq!(raw.stdout, [1, 2, 3]);
    let text = service.client(&["guest", "read", "t", &free, "4"]);
    assert!(stdout(&text).starts_with("02000000:   01 02 03 04"), "{}", stdout(&text));
    // RAM ends where it ends, and what there is is shown.
    let end = 64 << 20;
    service.json(&["vm", "create", "ticker", "--name", "small", "--memory", "64M"]);
    let last = service.client(&["guest", "read", "small", &format!("{:#x}", end - 4), "16", "--physical"]);
    assert!(
        stdout(&last).contains("00 00 00 00\n") || stdout(&last).contains("00 00 00 00 "),
        "{}",
        stdout(&last)
    );
    assert!(stderr(&last).contains("12 bytes before"), "{}", stderr(&last));
    assert_code(&service.client(&["guest", "read", "small", &format!("{end:#x}"), "1", "--physical"]), 2);

    let walk = service.json(&["guest", "translate", "t", &free]);
    assert_eq!((&walk[0]["physical"], &walk[0]["writable"]), (&free.as_str().into(), &true.into()));
    assert_eq!(walk[0]["entries"].as_array().map(Vec::len), Some(3), "a page of 2 MiB: {}", walk[0]);
    let nowhere = service.json(&["guest", "translate", "t", "0x7f0000000000"]);
    assert!(nowhere[0].get("physical").is_none(), "{}", nowhere[0]);

    service.json(&["vm", "stop", "t"]);
    assert_eq!(read(&[&free, "2"]), "0102", "it is read after the end");
    assert_code(&service.client(&["guest", "write", "t", &free, "00"]), 2);
    let audit = service.audit();
    assert!(audit.contains("2 bytes at tick") && audit.contains("4 bytes at physical 0x2000000"), "{audit}");
}

#[test]
fn symbols_and_explanations_are_those_of_the_image() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "demo", "--name", "d"]);
    let same = |own: &[&str], through: &[&str]| {
        for format in ["text", "json"] {
            let (own, through) = (
                output(&[own, &["--output", format]].concat()),
                service.client(&[through, &["--output", format]].concat()),
            );
            assert_eq!((stdout(&own), own.status), (stdout(&through), through.status));
            assert!(!stdout(&own).is_empty() || !own.status.success());
        }
    };
    same(&["symbols", "demo"], &["guest", "symbols", "d"]);
    same(&["symbols", "demo", "s*", "--probeable"], &["guest", "symbols", "d", "s*", "--probeable"]);
    for spec in ["fib", "fib+1", "fib%return", "smp_*", "own_ud2+0", "w:x rw@counter:8"] {
        same(&["explain", "demo", spec], &["probe", "explain", "d", spec]);
    }
    same(&["explain", "demo", "fib", "--all"], &["probe", "explain", "d", "fib", "--all"]);
    assert_code(&service.client(&["guest", "symbols", "d", "[b"]), 2);
}

#[tokio::test]
async fn what_cannot_be_read_or_written_is_refused_with_its_reason() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    let mut guest = GuestClient::new(service.channel().await);
    let at = |place| Some(GuestAddress { r#where: Some(place) });
    let read = |address, length, vcpu| ReadMemoryRequest { machine: "t".to_owned(), address, vcpu, length };
    let linear = at(Where::Linear(FREE));
    let hole = at(Where::Linear(1 << 40));
    let slots = at(Where::Physical(0xd000_0000));
    let cases = [
        (read(linear.clone(), 0, 0), Code::InvalidArgument, "INVALID_ARGUMENT"),
        (read(linear.clone(), (1 << 20) + 1, 0), Code::InvalidArgument, "INVALID_ARGUMENT"),
        (read(linear.clone(), u64::MAX, 0), Code::InvalidArgument, "INVALID_ARGUMENT"),
        (read(None, 1, 0), Code::InvalidArgument, "INVALID_ARGUMENT"),
        (read(at(Where::Symbol("nothing".to_owned())), 1, 0), Code::InvalidArgument, "INVALID_ARGUMENT"),
        (read(at(Where::Symbol("*".to_owned())), 1, 0), Code::InvalidArgument, "INVALID_ARGUMENT"),
        (read(linear.clone(), 1, 9), Code::NotFound, "NO_SUCH_VCPU"),
        (read(linear.clone(), 1, u32::MAX), Code::NotFound, "NO_SUCH_VCPU"),
        (read(hole.clone(), 1, 0), Code::FailedPrecondition, "NO_MEMORY"),
        (read(at(Where::Linear(1 << 63)), 1, 0), Code::FailedPrecondition, "NO_MEMORY"),
        (read(at(Where::Physical(u64::MAX)), 16, 0), Code::FailedPrecondition, "NO_MEMORY"),
        (read(slots.clone(), 16, 0), Code::FailedPrecondition, "NO_MEMORY"),
    ];
    let reason = |status: &tonic::Status| status.get_details_error_info().map(|info| info.reason);
    for (request, code, why) in cases {
        let status = guest.read_memory(request.clone()).await.expect_err("refused");
        assert_eq!((status.code(), reason(&status).as_deref()), (code, Some(why)), "{request:?}: {status}");
    }
    let whole = guest.read_memory(read(linear.clone(), 1 << 20, 0)).await.expect("1 MiB").into_inner();
    assert_eq!(whole.data.len(), 1 << 20);

    // All or nothing, also where the first part could be written.
    let write = |address, data| WriteMemoryRequest { machine: "t".to_owned(), address, vcpu: 0, data };
    let end = (512 << 20) - 2;
    for address in [at(Where::Physical(end)), hole, slots, None] {
        let status = guest.write_memory(write(address, vec![1; 4])).await.expect_err("refused");
        assert!(matches!(status.code(), Code::FailedPrecondition | Code::InvalidArgument), "{status}");
    }
    let untouched =
        guest.read_memory(read(at(Where::Physical(end)), 4, 0)).await.expect("2 bytes").into_inner();
    assert_eq!(untouched.data, [0, 0]);

    let translate = |address| TranslateRequest { machine: "t".to_owned(), address, vcpu: 0 };
    let status = guest.translate(translate(at(Where::Linear(1 << 63)))).await.expect_err("not canonical");
    assert_eq!(reason(&status).as_deref(), Some("NOT_TRANSLATED"));
    let status = guest.translate(translate(at(Where::Physical(0)))).await.expect_err("physical");
    assert_eq!(status.code(), Code::InvalidArgument);
    let nobody = GetRegistersRequest { machine: "nobody".to_owned(), vcpu: None };
    assert_eq!(guest.get_registers(nobody).await.expect_err("no machine").code(), Code::NotFound);
    let nothing = SetRegistersRequest { machine: "t".to_owned(), vcpu: 0, registers: None };
    assert_eq!(guest.set_registers(nothing).await.expect_err("no registers").code(), Code::InvalidArgument);
}
