//! How hits are written: for people, or as JSON lines.

use std::io::{self, Write};

use probe_core::Registers;
use serde::Serialize;

use crate::cli::Output;
use crate::events::Event;
use crate::exit::Failure;

/// What the output needs to know of a probe.
#[derive(Clone, Debug)]
pub struct Label {
    /// As the user wrote it.
    pub spec: String,
    /// Where it stands: `symbol+0xoffset`.
    pub place: String,
    /// It stands at a function's entry, so the argument registers hold the arguments.
    pub at_entry: bool,
}

/// Writes events to `out`.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    format: Output,
    labels: Vec<Label>,
}

/// A register or address: JSON numbers lose the low bits of such values in many readers, so they are strings.
#[derive(Debug)]
pub struct Hex(pub u64);

impl Serialize for Hex {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

macro_rules! json_registers {
    ($($name:ident)*) => {
        #[derive(Serialize)]
        struct JsonRegisters { $($name: Hex),* }

        impl From<&Registers> for JsonRegisters {
            fn from(regs: &Registers) -> Self {
                Self { $($name: Hex(regs.$name)),* }
            }
        }
    };
}

json_registers!(rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);

/// The first six integer arguments (System V AMD64 ABI, 3.2.3).
#[derive(Serialize)]
struct JsonArguments {
    arg1: Hex,
    arg2: Hex,
    arg3: Hex,
    arg4: Hex,
    arg5: Hex,
    arg6: Hex,
}

impl From<&Registers> for JsonArguments {
    fn from(regs: &Registers) -> Self {
        let [arg1, arg2, arg3, arg4, arg5, arg6] = arguments(regs).map(Hex);
        Self { arg1, arg2, arg3, arg4, arg5, arg6 }
    }
}

#[derive(Serialize)]
struct JsonHit<'a> {
    ts_ns: u64,
    vcpu: u32,
    probe: &'a str,
    ip: Hex,
    symbol: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<JsonArguments>,
    regs: JsonRegisters,
}

/// Prints records as JSON, one a line.
pub fn json_lines<T: Serialize>(records: impl IntoIterator<Item = T>) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for record in records {
        serde_json::to_writer(&mut out, &record).map_err(|error| closed(&error.into()))?;
        out.write_all(b"\n").map_err(|error| closed(&error))?;
    }
    out.flush().map_err(|error| closed(&error))
}

/// What an error on stdout means for the command.
pub fn closed(error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::BrokenPipe {
        Failure::OutputClosed
    } else {
        Failure::Host(format!("Standard output cannot be written: {error}"))
    }
}

fn arguments(regs: &Registers) -> [u64; 6] {
    [regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9]
}

impl<W: Write> Writer<W> {
    /// Events of probe number i are labelled with `labels[i]`.
    pub fn new(out: W, format: Output, labels: Vec<Label>) -> Self {
        Self { out, format, labels }
    }

    pub fn write(&mut self, event: &Event) -> io::Result<()> {
        let Some(label) = usize::try_from(event.probe).ok().and_then(|index| self.labels.get(index)) else {
            return Ok(());
        };
        match self.format {
            Output::Text => write_text(&mut self.out, event, label),
            Output::Json => {
                let hit = JsonHit {
                    ts_ns: event.ts_ns,
                    vcpu: event.vcpu.0,
                    probe: &label.spec,
                    ip: Hex(event.regs.rip),
                    symbol: &label.place,
                    args: label.at_entry.then(|| JsonArguments::from(&event.regs)),
                    regs: JsonRegisters::from(&event.regs),
                };
                serde_json::to_writer(&mut self.out, &hit)?;
                self.out.write_all(b"\n")
            }
        }
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn write_text(out: &mut impl Write, event: &Event, label: &Label) -> io::Result<()> {
    let (seconds, micros) = (event.ts_ns / 1_000_000_000, event.ts_ns % 1_000_000_000 / 1000);
    let regs = &event.regs;
    write!(out, "{seconds:4}.{micros:06} [{:02}] {}", event.vcpu.0, label.place)?;
    if label.at_entry {
        for (index, value) in arguments(regs).iter().take(4).enumerate() {
            write!(out, " arg{}={value:#x}", index + 1)?;
        }
        writeln!(out)
    } else {
        writeln!(
            out,
            " rax={:#x} rdi={:#x} rsi={:#x} rdx={:#x} rcx={:#x} rsp={:#x}",
            regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.rsp
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use probe_core::VcpuId;

    fn event() -> Event {
        Event {
            ts_ns: 1_002_003_004,
            vcpu: VcpuId(1),
            probe: 0,
            regs: Registers {
                rdi: 0xffff_ff9c,
                rsi: 0x7ffd_0000_1000,
                rip: 0xffff_ffff_8134_a355,
                ..Registers::default()
            },
        }
    }

    fn written(format: Output, at_entry: bool) -> String {
        let label = Label { spec: "do_sys_openat2".into(), place: "do_sys_openat2+0x5".into(), at_entry };
        let mut out = Vec::new();
        Writer::new(&mut out, format, vec![label]).write(&event()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn text_shows_the_arguments_at_an_entry() {
        assert_eq!(
            written(Output::Text, true),
            "   1.002003 [01] do_sys_openat2+0x5 arg1=0xffffff9c arg2=0x7ffd00001000 arg3=0x0 arg4=0x0\n"
        );
    }

    #[test]
    fn text_shows_registers_elsewhere() {
        assert_eq!(
            written(Output::Text, false),
            "   1.002003 [01] do_sys_openat2+0x5 rax=0x0 rdi=0xffffff9c rsi=0x7ffd00001000 rdx=0x0 rcx=0x0 rsp=0x0\n"
        );
    }

    #[test]
    fn json_is_one_object_a_line_with_exact_values() {
        let line = written(Output::Json, true);
        assert_eq!(line.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(value["ts_ns"], 1_002_003_004);
        assert_eq!(value["vcpu"], 1);
        assert_eq!(value["probe"], "do_sys_openat2");
        assert_eq!(value["symbol"], "do_sys_openat2+0x5");
        assert_eq!(value["ip"], "0xffffffff8134a355");
        assert_eq!(value["args"]["arg2"], "0x7ffd00001000");
        assert_eq!(value["regs"]["rdi"], "0xffffff9c");
        assert!(
            serde_json::from_str::<serde_json::Value>(&written(Output::Json, false)).unwrap()["args"]
                .is_null()
        );
    }
}
