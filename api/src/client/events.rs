//! `vmprobe events` and `vmprobe console`.

use std::collections::BTreeMap;
use std::io::{self, BufWriter, Write};
use std::time::Duration;

use probe_core::VcpuId;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::with_service;
use crate::cli::{ConsoleArgs, EventsArgs};
use crate::contract::events_client::EventsClient;
use crate::contract::machines_client::MachinesClient;
use crate::contract::probes_client::ProbesClient;
use crate::contract::{
    Event, ListProbesRequest, StreamConsoleRequest, StreamEventsRequest, WriteConsoleRequest,
};
use crate::events;
use crate::exit::{Code, Failure};
use crate::output::{Label, Writer, closed};
use crate::terminal::Keyboard;

/// How soon bytes are sent again that a guest has no room for.
const TRY_AGAIN: Duration = Duration::from_millis(50);

pub fn events(args: &EventsArgs) -> Result<Code, Failure> {
    with_service(&args.service, |channel| stream(channel, args))?;
    Ok(Code::Done)
}

async fn stream(channel: Channel, args: &EventsArgs) -> Result<(), Failure> {
    let mut specs =
        Specs { client: ProbesClient::new(channel.clone()), vm: &args.vm, known: BTreeMap::new() };
    let request = StreamEventsRequest {
        machine: args.vm.clone(),
        probes: args.probes.clone(),
        from_sequence: args.from,
        without_registers: false,
    };
    let mut stream = EventsClient::new(channel).stream_events(request).await?.into_inner();
    let mut writer = Writer::new(BufWriter::new(io::stdout().lock()), args.output, Vec::new());
    let mut left = args.max.unwrap_or(u64::MAX);
    let mut lost = 0;
    while let Some(response) = stream.message().await? {
        if response.lost > lost {
            eprintln!(
                "vmprobe: {} events before the next one are lost: they were no longer kept when their turn came",
                response.lost - lost
            );
            lost = response.lost;
        }
        for event in &response.events {
            if left == 0 {
                break;
            }
            left -= 1;
            let label = label(event, specs.of(event.probe).await?);
            writer.write_labelled(&own(event), &label).map_err(|error| closed(&error))?;
        }
        writer.flush().map_err(|error| closed(&error))?;
        if left == 0 {
            break;
        }
    }
    Ok(())
}

/// What the probes were asked for as, which is the same for all of a probe's events.
struct Specs<'a> {
    client: ProbesClient<Channel>,
    vm: &'a str,
    known: BTreeMap<u32, String>,
}

impl Specs<'_> {
    async fn of(&mut self, number: u32) -> Result<String, Failure> {
        if !self.known.contains_key(&number) {
            let request = ListProbesRequest { machine: self.vm.to_owned() };
            let probes = self.client.list_probes(request).await?.into_inner().probes;
            self.known.extend(probes.into_iter().map(|probe| (probe.number, probe.spec)));
        }
        Ok(self.known.get(&number).cloned().unwrap_or_default())
    }
}

fn label(event: &Event, spec: String) -> Label {
    Label {
        spec,
        place: event.place.clone(),
        event: None,
        // The service names the arguments of an entry among the values.
        at_entry: false,
        values: event.values.iter().map(|value| value.name.clone()).collect(),
        // Not to those who may only see when it was hit.
        registers: event.registers.is_some(),
    }
}

/// An event as a run of this process's own has it.
fn own(event: &Event) -> events::Event {
    let nothing_but_ip = probe_core::Registers { rip: event.ip, ..probe_core::Registers::default() };
    events::Event {
        ts_ns: event.time_ns,
        entered_ns: event.duration_ns.map(|duration| event.time_ns.saturating_sub(duration)),
        vcpu: VcpuId(event.vcpu),
        probe: event.probe,
        regs: event.registers.map_or(nothing_but_ip, Into::into),
        values: event.values.iter().map(|value| value.value).collect(),
    }
}

pub fn console(args: &ConsoleArgs) -> Result<Code, Failure> {
    with_service(&args.service, |channel| async move {
        let shown = show_console(channel.clone(), args.vm.clone());
        if !args.interactive {
            return shown.await;
        }
        let cannot = |error: io::Error| Failure::Host(format!("Signals cannot be handled: {error}"));
        let (mut interrupt, mut terminate) = (
            signal(SignalKind::interrupt()).map_err(cannot)?,
            signal(SignalKind::terminate()).map_err(cannot)?,
        );
        let mut hangup = signal(SignalKind::hangup()).map_err(cannot)?;
        let (keys, pressed) = mpsc::channel(1);
        let _keyboard = Keyboard::attach(Keys(keys), "Ctrl-] leaves it")?;
        let sent = async {
            send_to_console(channel, args.vm.clone(), pressed).await?;
            // The end of the input is not that of the console.
            std::future::pending().await
        };
        tokio::select! {
            shown = shown => shown,
            sent = sent => sent,
            _ = interrupt.recv() => Ok(()),
            _ = terminate.recv() => Ok(()),
            _ = hangup.recv() => Ok(()),
        }
    })?;
    Ok(Code::Done)
}

async fn show_console(channel: Channel, name: String) -> Result<(), Failure> {
    let request = StreamConsoleRequest { name };
    let mut stream = MachinesClient::new(channel).stream_console(request).await?.into_inner();
    while let Some(response) = stream.message().await? {
        if response.lost > 0 {
            eprintln!("vmprobe: {} bytes of the console are no longer kept", response.lost);
        }
        let mut out = io::stdout().lock();
        out.write_all(&response.data).and_then(|()| out.flush()).map_err(|error| closed(&error))?;
    }
    Ok(())
}

/// Hands what is typed to [`send_to_console`].
struct Keys(mpsc::Sender<Vec<u8>>);

impl Write for Keys {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.blocking_send(buf.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends what comes, to its end, as the guest reads it.
async fn send_to_console(
    channel: Channel,
    name: String,
    mut keys: mpsc::Receiver<Vec<u8>>,
) -> Result<(), Failure> {
    let mut client = MachinesClient::new(channel);
    while let Some(data) = keys.recv().await {
        let request = WriteConsoleRequest { name: name.clone(), data };
        loop {
            match client.write_console(request.clone()).await {
                Err(status) if status.code() == tonic::Code::ResourceExhausted => {
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                result => break result.map(drop)?,
            }
        }
    }
    Ok(())
}
