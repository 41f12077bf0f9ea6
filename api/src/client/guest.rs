//! `vmprobe guest`.

use std::io::{self, BufWriter, Read, Write};

use guest::spec::Location;
use pretty_hex::{HexConfig, config_hex};
use probe_core::fetch::RegisterName;
use serde::Serialize;
use tonic::transport::Channel;

use super::with_service;
use crate::cli::{AddressKind, GuestCommand, GuestCommandArgs, GuestPlace, Output};
use crate::contract::guest_address::Where;
use crate::contract::guest_client::GuestClient;
use crate::contract::{
    GetRegistersRequest, GuestAddress, ListSymbolsRequest, ReadMemoryRequest, SetRegistersRequest,
    SystemRegisters, TranslateRequest, TranslateResponse, Vcpu, WriteMemoryRequest,
};
use crate::exit::{Code, Failure};
use crate::output::{Hex, JsonRegisters, closed, json_lines};
use crate::symbols;

type Client = GuestClient<Channel>;

/// Bytes that are asked for at once.
const CHUNK: u64 = 1 << 20;

pub fn guest(args: &GuestCommandArgs) -> Result<Code, Failure> {
    with_service(&args.service, |channel| command(Client::new(channel), args))?;
    Ok(Code::Done)
}

async fn command(mut client: Client, args: &GuestCommandArgs) -> Result<(), Failure> {
    let output = args.output;
    match &args.command {
        GuestCommand::Symbols { vm, which } => {
            let pattern = which.glob.clone().unwrap_or_default();
            let request = ListSymbolsRequest { machine: vm.clone(), pattern };
            let mut stream = client.list_symbols(request).await?.into_inner();
            let mut list = Vec::new();
            while let Some(response) = stream.message().await? {
                list.extend(response.symbols);
            }
            symbols::show(list.into_iter(), which, output)
        }
        GuestCommand::Registers { vm, vcpu } => show_vcpus(&registers(&mut client, vm, *vcpu).await?, output),
        GuestCommand::Set { vm, vcpu, values } => {
            let vcpus = registers(&mut client, vm, Some(*vcpu)).await?;
            let mut regs: probe_core::Registers =
                vcpus.first().and_then(|vcpu| vcpu.registers).unwrap_or_default().into();
            for value in values {
                assign(&mut regs, value)?;
            }
            let request =
                SetRegistersRequest { machine: vm.clone(), vcpu: *vcpu, registers: Some(regs.into()) };
            let set = client.set_registers(request).await?.into_inner();
            show_vcpus(set.vcpu.as_slice(), output)
        }
        GuestCommand::Translate { place } => {
            let GuestPlace { vm, vcpu, .. } = place;
            let address = Some(address(place, &AddressKind { physical: false })?);
            let request = TranslateRequest { machine: vm.clone(), address, vcpu: *vcpu };
            show_translation(&client.translate(request).await?.into_inner(), output)
        }
        GuestCommand::Read { place, length, kind, raw } => {
            read(&mut client, place, *length, kind, if *raw { None } else { Some(output) }).await
        }
        GuestCommand::Write { place, bytes, kind } => {
            let data = data(bytes)?;
            let address = Some(address(place, kind)?);
            let GuestPlace { vm, vcpu, .. } = place;
            let request = WriteMemoryRequest { machine: vm.clone(), address, vcpu: *vcpu, data };
            client.write_memory(request).await?;
            Ok(())
        }
    }
}

async fn registers(client: &mut Client, vm: &str, vcpu: Option<u32>) -> Result<Vec<Vcpu>, Failure> {
    let request = GetRegistersRequest { machine: vm.to_owned(), vcpu };
    Ok(client.get_registers(request).await?.into_inner().vcpus)
}

/// A number as the kernel reads it.
fn number(text: &str) -> Option<u64> {
    match text.parse() {
        Ok(Location::Address(address)) => Some(address.0),
        _ => None,
    }
}

/// Does what `NAME=VALUE` says.
fn assign(regs: &mut probe_core::Registers, text: &str) -> Result<(), Failure> {
    let parsed = text.split_once('=').and_then(|(name, value)| {
        Some((RegisterName::parse(&name.trim().to_ascii_lowercase())?, number(value.trim())?))
    });
    let Some((name, value)) = parsed else {
        let names: Vec<&str> = RegisterName::ALL.iter().map(|name| name.manual_name()).collect();
        let names = names.join(", ");
        return Err(Failure::Usage(format!(
            "'{text}': write REGISTER=VALUE, as rax=0x10; registers are {names}"
        )));
    };
    name.set(regs, value);
    Ok(())
}

fn address(place: &GuestPlace, kind: &AddressKind) -> Result<GuestAddress, Failure> {
    let text = &place.address;
    let place = match (kind.physical, number(text)) {
        (true, Some(address)) => Where::Physical(address),
        (true, None) => return Err(Failure::Usage(format!("'{text}': a physical address is a number"))),
        (false, Some(address)) => Where::Linear(address),
        (false, None) => Where::Symbol(text.clone()),
    };
    Ok(GuestAddress { r#where: Some(place) })
}

/// The bytes to write.
fn data(text: &str) -> Result<Vec<u8>, Failure> {
    if text == "-" {
        let mut data = Vec::new();
        let read = io::stdin().lock().read_to_end(&mut data);
        read.map_err(|error| Failure::Usage(format!("standard input cannot be read: {error}")))?;
        return Ok(data);
    }
    let digits: String = text.chars().filter(|one| !one.is_whitespace()).collect();
    hex::decode(&digits)
        .map_err(|error| Failure::Usage(format!("'{text}': {error}; write bytes as 0f 1f 00")))
}

#[derive(Serialize)]
struct JsonMemory {
    address: Hex,
    bytes: String,
}

/// Shows memory, in as many requests as it takes; `None` for the bytes themselves.
async fn read(
    client: &mut Client,
    place: &GuestPlace,
    length: u64,
    kind: &AddressKind,
    output: Option<Output>,
) -> Result<(), Failure> {
    let mut next = address(place, kind)?;
    if let Some(Where::Symbol(_)) = next.r#where {
        let request = TranslateRequest { machine: place.vm.clone(), address: Some(next), vcpu: place.vcpu };
        let linear = client.translate(request).await?.into_inner().linear;
        next = GuestAddress { r#where: Some(Where::Linear(linear)) };
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let mut left = length;
    while left > 0 {
        let asked = left.min(CHUNK);
        let request = ReadMemoryRequest {
            machine: place.vm.clone(),
            address: Some(next.clone()),
            vcpu: place.vcpu,
            length: asked,
        };
        let read = match client.read_memory(request).await {
            Ok(response) => response.into_inner().data,
            Err(_) if left < length => Vec::new(),
            Err(status) => return Err(status.into()),
        };
        let at = match &mut next.r#where {
            Some(Where::Linear(at) | Where::Physical(at)) => at,
            _ => break,
        };
        show_memory(&mut out, *at, &read, output).map_err(|error| closed(&error))?;
        *at = at.wrapping_add(read.len() as u64);
        left -= (read.len() as u64).min(left);
        if (read.len() as u64) < asked {
            out.flush().map_err(|error| closed(&error))?;
            eprintln!("vmprobe: memory ends at {at:#x}, {left} bytes before what was asked for");
            break;
        }
    }
    out.flush().map_err(|error| closed(&error))
}

fn show_memory(out: &mut impl Write, at: u64, bytes: &[u8], output: Option<Output>) -> io::Result<()> {
    match output {
        None => out.write_all(bytes),
        Some(Output::Json) => {
            serde_json::to_writer(&mut *out, &JsonMemory { address: Hex(at), bytes: hex::encode(bytes) })?;
            out.write_all(b"\n")
        }
        Some(Output::Text) => {
            let display_offset = usize::try_from(at).unwrap_or(usize::MAX);
            let lines = HexConfig { title: false, display_offset, ..HexConfig::default() };
            writeln!(out, "{}", config_hex(&bytes, lines).trim_end_matches('\n'))
        }
    }
}

macro_rules! system_registers {
    ($($name:ident)*) => {
        #[derive(Serialize)]
        struct JsonSystem { $($name: Hex,)* idt_limit: u32, cpl: u32, long_code: bool }

        impl From<&SystemRegisters> for JsonSystem {
            fn from(sys: &SystemRegisters) -> Self {
                Self {
                    $($name: Hex(sys.$name),)*
                    idt_limit: sys.idt_limit,
                    cpl: sys.cpl,
                    long_code: sys.long_code,
                }
            }
        }

        fn system(sys: &SystemRegisters) -> Vec<(&'static str, u64)> {
            vec![$((stringify!($name), sys.$name)),*]
        }
    };
}

system_registers!(cr0 cr2 cr3 cr4 efer fs_base gs_base idt_base);

#[derive(Serialize)]
struct JsonVcpu<'a> {
    vcpu: u32,
    place: &'a str,
    regs: JsonRegisters,
    system: JsonSystem,
}

fn show_vcpus(vcpus: &[Vcpu], output: Output) -> Result<(), Failure> {
    let regs = |vcpu: &Vcpu| -> probe_core::Registers { vcpu.registers.unwrap_or_default().into() };
    if output == Output::Json {
        return json_lines(vcpus.iter().map(|vcpu| JsonVcpu {
            vcpu: vcpu.number,
            place: &vcpu.place,
            regs: (&regs(vcpu)).into(),
            system: (&vcpu.system.unwrap_or_default()).into(),
        }));
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let mut show = |vcpu: &Vcpu| {
        let regs = regs(vcpu);
        let sys = vcpu.system.unwrap_or_default();
        let bits = if sys.long_code { ", 64-bit code" } else { "" };
        writeln!(out, "vCPU {} at {:#x} {}  (CPL {}{bits})", vcpu.number, regs.rip, vcpu.place, sys.cpl)?;
        let general = RegisterName::ALL.iter().map(|name| (name.manual_name(), name.value(&regs)));
        let all: Vec<(&str, u64)> = general.chain(system(&sys)).collect();
        all.chunks(4).try_for_each(|line| {
            line.iter().try_for_each(|(name, value)| write!(out, "{name:>9} {value:016x}"))?;
            writeln!(out)
        })
    };
    let shown = vcpus.iter().try_for_each(&mut show).and_then(|()| out.flush());
    shown.map_err(|error| closed(&error))
}

#[derive(Serialize)]
struct JsonTranslation {
    linear: Hex,
    #[serde(skip_serializing_if = "Option::is_none")]
    physical: Option<Hex>,
    page_bytes: u64,
    writable: bool,
    user: bool,
    executable: bool,
    entries: Vec<JsonEntry>,
}

#[derive(Serialize)]
struct JsonEntry {
    level: u32,
    physical: Hex,
    value: Hex,
}

fn show_translation(found: &TranslateResponse, output: Output) -> Result<(), Failure> {
    if output == Output::Json {
        let entries = found.entries.iter().map(|entry| JsonEntry {
            level: entry.level,
            physical: Hex(entry.physical),
            value: Hex(entry.value),
        });
        return json_lines([JsonTranslation {
            linear: Hex(found.linear),
            physical: found.physical.map(Hex),
            page_bytes: found.page_bytes,
            writable: found.writable,
            user: found.user,
            executable: found.executable,
            entries: entries.collect(),
        }]);
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let mut show = || {
        for entry in &found.entries {
            writeln!(out, "level {}  {:#018x}: {:016x}", entry.level, entry.physical, entry.value)?;
        }
        let Some(physical) = found.physical else {
            return writeln!(out, "{:#x} is not mapped", found.linear);
        };
        let right = |allowed: bool, name: &'static str| if allowed { name } else { "" };
        writeln!(
            out,
            "{:#x} is guest-physical {physical:#x}, in a page of {} KiB{}{}{}",
            found.linear,
            found.page_bytes >> 10,
            right(found.writable, ", writable"),
            right(found.executable, ", executable"),
            right(found.user, ", of user mode"),
        )
    };
    show().and_then(|()| out.flush()).map_err(|error| closed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_set_by_either_name_and_nothing_else_is() {
        let mut regs = probe_core::Registers::default();
        for text in ["rax=0x10", "di=7", "RIP = 0xffffffff81000000"] {
            assign(&mut regs, text).unwrap();
        }
        assert_eq!((regs.rax, regs.rdi, regs.rip), (0x10, 7, 0xffff_ffff_8100_0000));
        for text in ["rax", "eax=1", "rax=", "rax=tick", "cr3=0"] {
            assert!(assign(&mut regs, text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_hexadecimal_digits_with_or_without_spaces() {
        assert_eq!(data("0f 1f00").unwrap(), [0x0f, 0x1f, 0x00]);
        assert!(data("0f1").is_err() && data("xx").is_err());
    }
}
