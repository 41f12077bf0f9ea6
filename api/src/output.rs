//! How hits are written: for people, or as JSON lines.

use std::fmt;
use std::io::{self, Write};

use probe_core::Registers;
use serde::Serialize;

use crate::cli::Output;
use crate::events::Event;
use crate::exit::Failure;
use crate::probes::Resolved;

/// What the output needs to know of a probe.
#[derive(Clone, Debug)]
pub struct Label {
    /// As the user wrote it.
    pub spec: String,
    /// Where it stands: `symbol+0xoffset`.
    pub place: String,
    /// The event's name, if the user gave it one.
    pub event: Option<String>,
    /// It stands at a function's entry, so the argument registers hold the arguments.
    pub at_entry: bool,
    /// The names of the values that it fetches.
    pub values: Vec<String>,
    /// The registers are there to be shown.
    pub registers: bool,
}

impl Label {
    /// The label of a probe's events.
    pub fn of(probe: &Resolved) -> Self {
        Self {
            spec: probe.text.clone(),
            place: probe.place_name(),
            event: probe.spec.name.as_ref().and_then(|name| name.event.clone()),
            at_entry: probe.at_entry(),
            values: probe.spec.fetches.iter().map(|argument| argument.name.clone()).collect(),
            registers: true,
        }
    }
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
        pub struct JsonRegisters { $($name: Hex),* }

        impl From<&Registers> for JsonRegisters {
            fn from(regs: &Registers) -> Self {
                Self { $($name: Hex(regs.$name)),* }
            }
        }
    };
}

json_registers!(rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);

/// The names of the first six integer arguments.
const ARGUMENTS: [&str; 6] = ["arg1", "arg2", "arg3", "arg4", "arg5", "arg6"];

/// Values by their names, in order. Those that could not be read say so, as the kernel's unreadable strings do.
struct JsonValues<'a>(Vec<(&'a str, Option<u64>)>);

impl Serialize for JsonValues<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, Shown(*value).to_string())))
    }
}

/// A fetched value as it is shown.
struct Shown(Option<u64>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(value) => write!(f, "{value:#x}"),
            None => f.write_str("(fault)"),
        }
    }
}

#[derive(Serialize)]
struct JsonHit<'a> {
    ts_ns: u64,
    vcpu: u32,
    probe: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    event: Option<&'a str>,
    ip: Hex,
    symbol: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<JsonValues<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ret: Option<Hex>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_ns: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    regs: Option<JsonRegisters>,
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

/// What the probe fetches, or the register arguments where it fetches nothing at a function's entry (System V AMD64 ABI,
/// 3.2.3).
pub fn arguments<'a>(
    event: &Event,
    label: &'a Label,
) -> Option<impl Iterator<Item = (&'a str, Option<u64>)>> {
    let regs = &event.regs;
    let fetches = !label.values.is_empty();
    let fetched = label.values.iter().map(String::as_str).zip(event.values.iter().copied());
    let registers = [regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9].map(Some);
    let registers = ARGUMENTS.into_iter().zip(registers).filter(move |_| !fetches);
    (fetches || label.at_entry).then(|| fetched.chain(registers))
}

/// How long the call took that has returned.
pub fn duration_ns(event: &Event) -> Option<u64> {
    Some(event.ts_ns.saturating_sub(event.entered_ns?))
}

impl<W: Write> Writer<W> {
    /// Events of probe number i are labelled with `labels[i]`.
    pub fn new(out: W, format: Output, labels: Vec<Label>) -> Self {
        Self { out, format, labels }
    }

    pub fn write(&mut self, event: &Event) -> io::Result<()> {
        match usize::try_from(event.probe).ok().and_then(|index| self.labels.get(index)) {
            Some(label) => write(&mut self.out, self.format, event, label),
            None => Ok(()),
        }
    }

    /// The same with a label that is not among the writer's.
    pub fn write_labelled(&mut self, event: &Event, label: &Label) -> io::Result<()> {
        write(&mut self.out, self.format, event, label)
    }

    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn write(out: &mut impl Write, format: Output, event: &Event, label: &Label) -> io::Result<()> {
    match format {
        Output::Text => write_text(out, event, label),
        Output::Json => {
            let hit = JsonHit {
                ts_ns: event.ts_ns,
                vcpu: event.vcpu.0,
                probe: &label.spec,
                event: label.event.as_deref(),
                ip: Hex(event.regs.rip),
                symbol: &label.place,
                args: arguments(event, label).map(|values| JsonValues(values.collect())),
                ret: duration_ns(event).filter(|_| label.registers).map(|_| Hex(event.regs.rax)),
                duration_ns: duration_ns(event),
                regs: label.registers.then(|| JsonRegisters::from(&event.regs)),
            };
            serde_json::to_writer(&mut *out, &hit)?;
            out.write_all(b"\n")
        }
    }
}

fn write_text(out: &mut impl Write, event: &Event, label: &Label) -> io::Result<()> {
    let (seconds, micros) = (event.ts_ns / 1_000_000_000, event.ts_ns % 1_000_000_000 / 1000);
    write!(out, "{seconds:4}.{micros:06} [{:02}] ", event.vcpu.0)?;
    match &label.event {
        Some(name) => write!(out, "{name}: ({})", label.place)?,
        None => out.write_all(label.place.as_bytes())?,
    }
    let regs = &event.regs;
    if let Some(duration) = duration_ns(event) {
        write!(out, " took {}.{:03} us", duration / 1000, duration % 1000)?;
    }
    if let Some(values) = arguments(event, label) {
        // Of the arguments that nobody asked for the first four are enough for a line.
        let count = if label.values.is_empty() { 4 } else { usize::MAX };
        for (name, value) in values.take(count) {
            write!(out, " {name}={}", Shown(value))?;
        }
    } else if !label.registers {
        // It is said where and when, and no more.
    } else if event.entered_ns.is_some() {
        write!(out, " ret={:#x}", regs.rax)?;
    } else {
        write!(
            out,
            " rax={:#x} rdi={:#x} rsi={:#x} rdx={:#x} rcx={:#x} rsp={:#x}",
            regs.rax, regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.rsp
        )?;
    }
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use probe_core::VcpuId;

    fn event() -> Event {
        Event {
            ts_ns: 1_002_003_004,
            entered_ns: None,
            vcpu: VcpuId(1),
            probe: 0,
            regs: Registers {
                rax: 0x11,
                rdi: 0xffff_ff9c,
                rsi: 0x7ffd_0000_1000,
                rip: 0xffff_ffff_8134_a355,
                ..Registers::default()
            },
            values: Vec::new(),
        }
    }

    fn label(at_entry: bool) -> Label {
        Label {
            spec: "do_sys_openat2".into(),
            place: "do_sys_openat2+0x5".into(),
            event: None,
            at_entry,
            values: Vec::new(),
            registers: true,
        }
    }

    fn write(format: Output, label: Label, event: &Event) -> String {
        let mut out = Vec::new();
        Writer::new(&mut out, format, vec![label]).write(event).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn written(format: Output, at_entry: bool) -> String {
        write(format, label(at_entry), &event())
    }

    fn json(label: Label, event: &Event) -> serde_json::Value {
        serde_json::from_str(&write(Output::Json, label, event)).unwrap()
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
            "   1.002003 [01] do_sys_openat2+0x5 rax=0x11 rdi=0xffffff9c rsi=0x7ffd00001000 rdx=0x0 rcx=0x0 rsp=0x0\n"
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

    #[test]
    fn fetched_values_have_their_names_and_say_what_could_not_be_read() {
        let label = Label { values: vec!["fd".into(), "word".into()], ..label(true) };
        let event = Event { values: vec![Some(5), None], ..event() };
        assert_eq!(
            write(Output::Text, label.clone(), &event),
            "   1.002003 [01] do_sys_openat2+0x5 fd=0x5 word=(fault)\n"
        );
        assert_eq!(json(label, &event)["args"], serde_json::json!({ "fd": "0x5", "word": "(fault)" }));
    }

    #[test]
    fn kretprobe_example_a_return_has_its_value_and_its_duration() {
        let label = Label { place: "do_sys_openat2%return".into(), ..label(false) };
        let event = Event { entered_ns: Some(1_002_000_000), ..event() };
        assert_eq!(
            write(Output::Text, label.clone(), &event),
            "   1.002003 [01] do_sys_openat2%return took 3.004 us ret=0x11\n"
        );
        let value = json(label, &event);
        assert_eq!((&value["ret"], &value["duration_ns"]), (&"0x11".into(), &3004.into()));
    }

    #[test]
    fn an_event_with_a_name_shows_it() {
        let label = Label { event: Some("opened".into()), ..label(false) };
        let text = write(Output::Text, label.clone(), &event());
        assert!(text.starts_with("   1.002003 [01] opened: (do_sys_openat2+0x5) rax="), "{text}");
        assert_eq!(json(label, &event())["event"], "opened");
        assert!(json(self::label(false), &event()).get("event").is_none());
    }
}
