//! Puts a machine, its engine and its first probes together.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use disk::Disk;
use guest::image::ProtectedMode;
use guest::relocation::Decompressor;
use guest::{Guest, GuestError};
use probe_core::engine::{Engine, EngineConfig, EngineError, VcpuEngine};
use probe_core::probe::{Probe, ProbeRequest, WatchRequest};
use probe_core::stop::StopHandler;
use probe_core::watch::Access;
use probe_core::{PhysicalMemory, VcpuId};
use vmm::boot::{Kernel, KernelSegment, LinuxBoot, Protocol};
use vmm::{
    CreateError, GuestRam, Host, Machine, MachineConfig, Network, RestoreConfig, RestoreError, RunEnd, Vsock,
};
use vmm::{doctor, layout};

use crate::events::{self, Program, Programs, Readers};
use crate::exit::Failure;
use crate::images::{self, chain};
use crate::own::Own;
use crate::probes::Resolved;
use crate::snapshot::Saved;

/// Words before the user's own: a console, and after a panic the reset that ends the run, at once.
const LINUX_CMDLINE: &str = "console=ttyS0 panic=-1";

/// How long a guest may take to unpack its kernel. In an emulated machine on a busy host two minutes were not enough for a large one.
pub const UNPACKING: Duration = Duration::from_secs(600);

/// An image that is to be booted.
pub struct Boot<'a> {
    /// As it was asked for.
    pub image: &'a str,
    /// In the order in which the guest finds them.
    pub disks: Vec<Disk>,
    pub vsock: Option<Vsock>,
    /// In the order in which the guest finds them.
    pub networks: Vec<Network>,
    /// It is to unpack itself, and to choose where to ([`Setup::guest`]).
    pub kaslr: bool,
    /// How long it may take for that.
    pub unpacking: Duration,
    pub initrd: Option<Vec<u8>>,
    /// Words of the user's.
    pub cmdline: Option<&'a str>,
    /// Bytes.
    pub memory: u64,
    /// As many as the image has use for, where it is not said.
    pub vcpus: Option<u32>,
}

/// How a machine begins.
pub enum Beginning<'a> {
    Boot(Boot<'a>),
    /// It goes on where another one was saved. The first probes of the order are those of the snapshot.
    Restore(&'a Saved),
}

/// What a machine is to be.
pub struct Order<'a> {
    pub host: &'a Host,
    pub guest: Guest,
    pub beginning: Beginning<'a>,
    pub serial: Box<dyn Write + Send>,
    /// Armed before the guest's first instruction; their numbers are the cookies of their reports.
    pub probes: Vec<Resolved>,
    pub count_only: bool,
    pub max_hits: Option<u64>,
    /// The start of the guest's init is reported too ([`crate::own::INIT`]).
    pub report_init: bool,
    /// The machine pauses where its kernel panics, for whoever takes the pause.
    pub pause_at_panic: bool,
    /// When the time of the events begins.
    pub start: Instant,
}

/// A machine that is ready to run, and what it takes to do so and to control it.
pub struct Setup {
    pub machine: Machine,
    /// As it lies in the machine's memory.
    pub guest: Guest,
    /// As they were ordered, and found there.
    pub probes: Vec<Resolved>,
    pub handlers: Vec<Box<dyn StopHandler>>,
    pub readers: Readers,
    pub memory: GuestRam,
    pub engine: Arc<Engine>,
    pub programs: Programs,
    pub own: Own,
    /// By their numbers; `None` for a probe that waits for its module.
    pub armed: Vec<Option<Arc<Probe>>>,
}

impl Setup {
    /// # Errors
    /// What is wrong with the order, the image or the host.
    pub fn new(order: Order<'_>) -> Result<Self, Failure> {
        let Order { guest, probes, start, .. } = order;
        let (machine, guest, probes, saved) = match order.beginning {
            Beginning::Boot(image) => {
                let (machine, guest, probes) = boot(order.host, guest, probes, image, order.serial)?;
                (machine, guest, probes, None)
            }
            Beginning::Restore(saved) => {
                // A module that was loaded before the save is not loaded again.
                if let Some(probe) = probes.iter().find(|probe| probe.waits_for_module()) {
                    return Err(Failure::Probe(format!(
                        "{}: A restored machine cannot have probes on modules yet; probe an address",
                        probe.text
                    )));
                }
                (restore(order.host, saved, order.serial)?, guest, probes, Some(&saved.manifest))
            }
        };
        let own = Own::new(&guest, &probes, order.pause_at_panic)?;
        if saved.is_some_and(|saved| saved.booted) {
            own.text.set_booted();
        }
        let memory = machine.memory();
        let vcpus = u32::try_from(machine.states().len()).unwrap_or(u32::MAX);
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: layout::SLOTS,
            vcpus: vcpus as usize,
            vendor: machine.vendor(),
            max_hits: order.max_hits,
            stacks_in_whole_pages: guest.linux.is_some(),
            control: Arc::new(machine.control()),
            text: own.text.clone(),
        }));
        let armed = arm(order.host, &engine, &memory, &probes, 0)?;
        engine.arm(&memory, &own.requests(&guest, order.report_init)).map_err(|error| refused(&error))?;
        let saved_probes = saved.iter().flat_map(|saved| &saved.probes).zip(&armed);
        for (_, probe) in saved_probes.filter(|(saved, _)| !saved.enabled) {
            probe.iter().for_each(|probe| engine.disable(&memory, probe));
        }
        let programs = Programs::new(probes.iter().map(|probe| program(probe, order.count_only)).collect());
        let (sinks, readers) = events::rings(vcpus, start, &programs);
        let handlers = (0..vcpus).zip(sinks).map(|(vcpu, sink)| {
            Box::new(VcpuEngine::new(Arc::clone(&engine), VcpuId(vcpu), sink)) as Box<dyn StopHandler>
        });
        let handlers = handlers.collect();
        Ok(Self { machine, guest, probes, handlers, readers, memory, engine, programs, own, armed })
    }
}

/// Makes a machine that boots, and says what is where in it.
fn boot(
    host: &Host,
    mut guest: Guest,
    mut probes: Vec<Resolved>,
    beginning: Boot<'_>,
    serial: Box<dyn Write + Send>,
) -> Result<(Machine, Guest, Vec<Resolved>), Failure> {
    let Boot { image, disks, vsock, networks, kaslr, unpacking, initrd, cmdline, memory, vcpus } = beginning;
    let cmdline = match cmdline {
        Some(words) => format!("{LINUX_CMDLINE} {words}"),
        None => LINUX_CMDLINE.to_owned(),
    };
    let decompressor = kaslr.then(|| Decompressor::new(&guest.image)).transpose();
    let decompressor = decompressor.map_err(|error| Failure::Image(error.to_string()))?;
    let mut kernel = kernel(&guest, &cmdline, initrd.as_deref())?;
    if kaslr {
        kernel = packed(&guest, kernel.protocol);
    }
    let mut machine = Machine::new(MachineConfig {
        host,
        memory_bytes: memory,
        vcpus: vcpus.unwrap_or_else(|| images::default_vcpus(image)),
        kernel,
        watched_pages: BTreeSet::new(),
        serial,
        disks,
        vsock,
        networks,
    })
    .map_err(|error| create_failure(&error))?;
    guest.image.protected_mode = None;
    if let Some(decompressor) = decompressor {
        guest = unpack(&mut machine, guest, decompressor, unpacking)?;
        probes = probes.into_iter().map(|probe| probe.relocated(&guest)).collect::<Result<_, _>>()?;
    }
    Ok((machine, guest, probes))
}

/// Lets the guest unpack itself. Returns it as it lies in memory then, with its first vCPU before the first instruction of its
/// kernel.
fn unpack(
    machine: &mut Machine,
    guest: Guest,
    decompressor: Decompressor,
    limit: Duration,
) -> Result<Guest, Failure> {
    let failed = |what: &str| Failure::Guest(format!("The guest {what} while it unpacked its kernel"));
    match machine.run_first(Box::new(decompressor), limit).map_err(|error| Failure::Host(chain(&error)))? {
        RunEnd::Finished { .. } => {}
        RunEnd::Failed { reason, .. } => return Err(Failure::Guest(reason)),
        RunEnd::Stopped => {
            let limit = limit.as_secs_f64();
            return Err(Failure::Timeout(format!("The guest has not unpacked its kernel within {limit} s")));
        }
        RunEnd::Halted => return Err(failed("halted; its console may say why")),
        RunEnd::TripleFault { .. } => return Err(failed("crashed (triple fault)")),
        RunEnd::Reset | RunEnd::PowerOff => return Err(failed("reset or powered off")),
    }
    let states = machine.states();
    let first = states.first().ok_or_else(|| failed("had no vCPU"))?;
    guest.relocated(first, &machine.memory()).map_err(|error| match error {
        GuestError::Relocation(error) => Failure::Guest(chain(&error)),
        error => Failure::Image(chain(&error)),
    })
}

fn restore(host: &Host, saved: &Saved, serial: Box<dyn Write + Send>) -> Result<Machine, Failure> {
    let config = RestoreConfig { host, snapshot: &saved.machine, memory: &saved.memory, serial };
    Machine::restore(config).map_err(|error| match error {
        RestoreError::Create(error) => create_failure(&error),
        RestoreError::Cpu(_) | RestoreError::Vcpu(_) => Failure::Host(chain(&error)),
        RestoreError::Devices => Failure::Image(chain(&error)),
    })
}

/// Arms all of the probes, or none; their numbers begin with `first`. Those that wait for their module are left out.
///
/// # Errors
/// The first that is refused, and why.
pub fn arm(
    host: &Host,
    engine: &Engine,
    memory: &dyn PhysicalMemory,
    probes: &[Resolved],
    first: u64,
) -> Result<Vec<Option<Arc<Probe>>>, Failure> {
    let numbered = || (first..).zip(probes).enumerate();
    let (places, requests): (Vec<usize>, Vec<ProbeRequest>) = numbered()
        .filter_map(|(index, (number, probe))| Some((index, probe.request()?.with_cookie(number))))
        .unzip();
    let (watched, watches): (Vec<usize>, Vec<WatchRequest>) = numbered()
        .filter_map(|(index, (number, probe))| Some((index, probe.watch_request()?.with_cookie(number))))
        .unzip();
    let of_data = |watch: &WatchRequest| watch.watchpoint.access() != Access::Execute;
    if watches.iter().any(of_data) && !doctor::watches_data(host) {
        return Err(Failure::Host(
            "This host's KVM emulates guest kernel code and does not look at data watchpoints; use --accel nested".into(),
        ));
    }
    let armed = engine.arm(memory, &requests).map_err(|error| refused(&error))?;
    let watching = engine.watch_accesses(&watches).inspect_err(|_| {
        armed.iter().for_each(|probe| engine.remove(memory, probe));
    });
    let watching = watching.map_err(|error| refused(&error))?;
    let mut by_number = vec![None; probes.len()];
    for (index, probe) in places.into_iter().zip(armed).chain(watched.into_iter().zip(watching)) {
        by_number[index] = Some(probe);
    }
    Ok(by_number)
}

fn refused(error: &EngineError) -> Failure {
    Failure::Probe(error.to_string())
}

/// What a probe fetches.
pub fn program(probe: &Resolved, count_only: bool) -> Program {
    Program { count_only, fetches: probe.spec.fetches.iter().map(|argument| argument.fetch).collect() }
}

/// An image as the machine boots it.
///
/// # Errors
/// An initrd for a guest that takes none.
pub fn kernel<'a>(
    guest: &'a Guest,
    cmdline: &'a str,
    initrd: Option<&'a [u8]>,
) -> Result<Kernel<'a>, Failure> {
    let image = &guest.image;
    let segments = image.segments.iter().map(|segment| KernelSegment {
        gpa: segment.gpa,
        data: image.segment_data(segment),
        mem_size: segment.mem_size,
    });
    let protocol = if image.kind.is_linux() {
        Protocol::Linux(LinuxBoot {
            setup_header: image.setup_header.as_ref().map(|header| header.bytes()),
            initrd,
            cmdline,
        })
    } else if initrd.is_some() {
        return Err(Failure::Usage("--initrd is for Linux guests; this image is bare metal".to_owned()));
    } else {
        Protocol::BareMetal
    };
    Ok(Kernel { entry: image.entry, segments: segments.collect(), protocol })
}

/// The same kernel as a boot loader loads it: packed, and entered at its decompressor.
fn packed<'a>(guest: &'a Guest, protocol: Protocol<'a>) -> Kernel<'a> {
    let part = guest.image.protected_mode.as_ref();
    let segment = part.map(|part| KernelSegment {
        gpa: part.gpa,
        data: part.bytes(),
        mem_size: part.init_size.max(part.bytes().len() as u64),
    });
    Kernel {
        entry: part.map_or(guest.image.entry, ProtectedMode::entry),
        segments: segment.into_iter().collect(),
        protocol,
    }
}

/// This host's KVM.
///
/// # Errors
/// It cannot be opened, and what to do.
pub fn open_host() -> Result<Host, Failure> {
    Host::open().map_err(|error| Failure::Host(chain(&error)))
}

/// What a machine that cannot be made says about the host, the image or the command line.
pub fn create_failure(error: &CreateError) -> Failure {
    let text = chain(error);
    match error {
        CreateError::Boot(_) => Failure::Image(text),
        CreateError::Memory(_) | CreateError::Vcpus { .. } | CreateError::Devices(_) => Failure::Usage(text),
        _ => Failure::Host(text),
    }
}
