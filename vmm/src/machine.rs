//! The machine: put together, run, taken apart.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use disk::Disk;
use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_PIT_SPEAKER_DUMMY, KVMIO, kvm_clock_data, kvm_enable_cap, kvm_pit_config,
    kvm_reinject_control,
};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use probe_core::stop::StopHandler;
use probe_core::{Gpa, VcpuId, VcpuState, Vendor};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_io_nr;

use crate::acpi::Platform;
use crate::boot::{self, BootError, Kernel};
use crate::control::Control;
use crate::cpuid::{self, CpuDiffers, Topology};
use crate::devices::serial::{Hangup, SerialInput};
use crate::devices::virtio::{
    Block, Device, Network, QUEUE_NOTIFY, Rng, Threads as DeviceThreads, Transport, Vsock,
};
use crate::devices::{Buses, InterruptLine, MmioBus, PortBus};
use crate::host::{self, Host, HostError};
use crate::kick::{self, KICK_REPEAT};
use crate::layout::{self, MmioWindow};
use crate::mapping::{Mapping, WatchError};
use crate::memory::{self, AllocateError, GuestRam, MemoryFile};
use crate::msrs;
use crate::report::{RunEnd, RunReport};
use crate::runner::{Event, Outcome, Runner, Shared};
use crate::snapshot::{Mirror, Snapshot};
use crate::vcpu::{RestoreVcpuError, Vcpu, VcpuError};
use crate::watchdog::Watchdog;

/// APIC ids of one byte, without the broadcast id.
const MAX_VCPUS: usize = 255;

/// How often the watchdog looks.
const WATCHDOG_TICK: Duration = Duration::from_millis(50);

/// How long a vCPU may run with interrupts held for the delivery of a #BP before it is asked whether that is over. Each question
/// that comes too early makes KVM start the delivery again.
const DELIVERY_TIME: Duration = Duration::from_millis(5);

/// What a machine is made of.
pub struct MachineConfig<'a> {
    /// Where it runs.
    pub host: &'a Host,
    /// Bytes of RAM, a multiple of 4096.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// What runs on it. Its bytes are copied into guest memory.
    pub kernel: Kernel<'a>,
    /// Pages whose guest writes go to [`StopHandler::on_text_write`] from the start; [`Control::watch`] adds others later. Any
    /// address within a page names it.
    pub watched_pages: BTreeSet<Gpa>,
    /// Where the first serial line goes. Unbuffered, so that a write that blocks can be interrupted when the machine is
    /// to stop.
    pub serial: Box<dyn io::Write + Send>,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<Disk>,
    /// What connects programs of the guest and of the host.
    pub vsock: Option<Vsock>,
    /// Networks, in the order in which the guest finds them.
    pub networks: Vec<Network>,
}

impl std::fmt::Debug for MachineConfig<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MachineConfig")
            .field("memory_bytes", &self.memory_bytes)
            .field("vcpus", &self.vcpus)
            .field("entry", &self.kernel.entry)
            .field("watched_pages", &self.watched_pages.len())
            .field("disks", &self.disks)
            .field("vsock", &self.vsock)
            .field("networks", &self.networks)
            .finish_non_exhaustive()
    }
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The host cannot.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The memory.
    #[error(transparent)]
    Memory(#[from] AllocateError),
    /// The kernel.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The watched pages.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The number of vCPUs.
    #[error("{asked} vCPUs were asked for; this host can give 1 to {limit}")]
    Vcpus {
        /// Asked for.
        asked: u32,
        /// The most that are possible.
        limit: usize,
    },
    /// A vCPU's set-up.
    #[error("Could not set a vCPU up")]
    Vcpu(
        #[from]
        #[source]
        VcpuError,
    ),
    /// Any other ioctl.
    #[error("{name} failed")]
    Ioctl {
        /// Its name in the KVM API.
        name: &'static str,
        /// What the host said.
        #[source]
        source: errno::Error,
    },
    /// More than there are places for.
    #[error("{0} virtio devices were asked for, with the entropy device; there is room for {max}", max = layout::MMIO_WINDOWS)]
    Devices(usize),
    /// No file descriptor for an interrupt or a notification.
    #[error("Could not make an event for a device; allow more open files (ulimit -n)")]
    Event(#[source] io::Error),
}

/// What a machine is restored from.
pub struct RestoreConfig<'a> {
    /// Where it runs.
    pub host: &'a Host,
    /// The machine that was saved.
    pub snapshot: &'a Snapshot,
    /// Its memory. The file must not change while the machine lives.
    pub memory: &'a MemoryFile,
    /// As [`MachineConfig::serial`].
    pub serial: Box<dyn io::Write + Send>,
}

impl std::fmt::Debug for RestoreConfig<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RestoreConfig")
            .field("memory_bytes", &self.snapshot.memory_bytes())
            .field("vcpus", &self.snapshot.vcpus())
            .finish_non_exhaustive()
    }
}

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// No machine of this kind could be made.
    #[error(transparent)]
    Create(#[from] CreateError),
    /// The guest has seen another CPU.
    #[error(transparent)]
    Cpu(#[from] CpuDiffers),
    /// A vCPU's state.
    #[error(transparent)]
    Vcpu(#[from] RestoreVcpuError),
    /// The guest has seen other devices.
    #[error(
        "The snapshot has other virtio devices than this vmprobe gives a machine; restore it with the vmprobe that made it"
    )]
    Devices,
}

/// Why a run could not be carried out.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// One handler per vCPU.
    #[error("{given} stop handlers were given for {vcpus} vCPUs; give one for each")]
    Handlers {
        /// Handlers given.
        given: usize,
        /// vCPUs of the machine.
        vcpus: usize,
    },
    /// The kick signal.
    #[error("Could not install the handler of the signal that stops vCPUs")]
    Signal(#[source] errno::Error),
    /// A thread.
    #[error("Could not start a thread for {vcpu}")]
    Spawn {
        /// The vCPU.
        vcpu: VcpuId,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A device's thread.
    #[error("Could not start a thread for a device")]
    SpawnDevice(#[source] io::Error),
    /// An ioctl.
    #[error("The run ended early")]
    Vcpu(
        #[from]
        #[source]
        VcpuError,
    ),
    /// A change of the memory slots failed half-way.
    #[error("Part of guest memory was lost while watched pages changed (KVM_SET_USER_MEMORY_REGION)")]
    MemoryLost(#[source] errno::Error),
    /// A panic on a vCPU's thread: a bug of this program.
    #[error("The thread of {0} panicked; this is a bug, please report it")]
    Panicked(VcpuId),
}

/// A virtual machine, ready to run once.
pub struct Machine {
    // The vCPUs go before the memory that KVM maps.
    vcpus: Vec<Vcpu>,
    control: Control,
    ram: GuestRam,
    hangup: Hangup,
    receiver: Receiver<Event>,
    vendor: Vendor,
    loses_breakpoints: bool,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("vcpus", &self.vcpus.len())
            .field("ram", &self.ram)
            .finish_non_exhaustive()
    }
}

/// Ends a machine's run from any thread.
#[derive(Clone, Debug)]
pub struct StopHandle {
    sender: Sender<Event>,
}

impl StopHandle {
    /// Asks the run to end with [`RunEnd::Stopped`]. Does nothing once it has ended; before it begins, it ends at once.
    pub fn stop(&self) {
        self.sender.send(Event::Stop).ok();
    }
}

impl Machine {
    /// Makes a machine and loads its kernel.
    ///
    /// # Errors
    /// [`CreateError`], which says what was wrong; nothing is left behind.
    pub fn new(config: MachineConfig<'_>) -> Result<Self, CreateError> {
        let Host { kvm, memory_bytes, .. } = config.host;
        host::require(|capability| kvm.check_extension_raw(capability.into()))?;
        let limit = kvm.get_max_vcpus().min(MAX_VCPUS);
        let count = config.vcpus;
        if count == 0 || count as usize > limit {
            return Err(CreateError::Vcpus { asked: count, limit });
        }
        memory::check_size(config.memory_bytes, *memory_bytes)?;
        let ram = GuestRam::new(config.memory_bytes)?;
        let mmio = MmioBus::new(virtio_devices(config.disks, config.vsock, config.networks, &ram)?);
        let windows: Vec<_> = (0..mmio.devices().len()).map_while(layout::mmio_window).collect();
        let platform = Platform { vcpus: count, mmio_windows: &windows };
        boot::load(&config.kernel, &platform, &ram)?;

        let mapping = create_vm(kvm, &ram, &config.watched_pages)?;
        let serial_irq = create_interrupt_controllers(mapping.vm())?;
        let vcpus = create_vcpus(kvm, mapping.vm(), &config.kernel, count, ram.bytes())?;
        Self::put_together(config.host, mapping, vcpus, config.serial, serial_irq, mmio)
    }

    /// Makes a machine that goes on where another one was saved. Its memory is read from the file when it is touched, and never
    /// written back, so any number of machines can be made of one snapshot. The guest's clocks go on from where they stood.
    ///
    /// # Errors
    /// [`RestoreError`], which says what was wrong; nothing is left behind.
    pub fn restore(config: RestoreConfig<'_>) -> Result<Self, RestoreError> {
        let RestoreConfig { host, snapshot: Snapshot(saved), memory, serial } = config;
        let Host { kvm, memory_bytes, .. } = host;
        host::require(|capability| kvm.check_extension_raw(capability.into())).map_err(CreateError::from)?;
        let limit = kvm.get_max_vcpus().min(MAX_VCPUS);
        let count = u32::try_from(saved.vcpus.len()).unwrap_or(u32::MAX);
        if count == 0 || count as usize > limit {
            return Err(CreateError::Vcpus { asked: count, limit }.into());
        }
        for (index, vcpu) in (0..count).zip(&saved.vcpus) {
            let offered = cpuid::guest_cpuid(kvm, Topology { index, count });
            let offered = offered.map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
            let entries: Vec<_> = vcpu.cpuid.iter().map(Mirror::restore).collect();
            cpuid::check_offered(&entries, offered.as_slice())?;
        }
        memory::check_size(saved.memory_bytes, *memory_bytes).map_err(CreateError::from)?;
        let ram = GuestRam::from_file(memory, saved.memory_bytes).map_err(CreateError::from)?;

        let mapping = create_vm(kvm, &ram, &BTreeSet::new())?;
        let serial_irq = create_interrupt_controllers(mapping.vm())?;
        let vcpus: Result<Vec<Vcpu>, _> =
            (0..count).map(|index| Vcpu::new(mapping.vm(), VcpuId(index))).collect();
        let mut vcpus = vcpus.map_err(CreateError::from)?;
        for (vcpu, saved) in vcpus.iter_mut().zip(&saved.vcpus) {
            vcpu.restore(saved)?;
        }
        // A machine with others is not saved.
        let mmio = MmioBus::new(virtio_devices(Vec::new(), None, Vec::new(), &ram)?);
        if !mmio.restore(&saved.devices.virtio) {
            return Err(RestoreError::Devices);
        }
        let machine = Self::put_together(host, mapping, vcpus, serial, serial_irq, mmio)?;
        machine.control.buses.ports.restore(&saved.devices).map_err(CreateError::Event)?;
        let vm = machine.control.mapping.vm();
        // After the local APICs: what is pending here goes to them again.
        for chip in saved.interrupts.restore() {
            vm.set_irqchip(&chip).map_err(ioctl("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&saved.pit.restore()).map_err(ioctl("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data { clock: saved.clock, ..kvm_clock_data::default() };
        vm.set_clock(&clock).map_err(ioctl("KVM_SET_CLOCK"))?;
        Ok(machine)
    }

    fn put_together(
        host: &Host,
        mapping: Mapping,
        vcpus: Vec<Vcpu>,
        serial: Box<dyn io::Write + Send>,
        serial_irq: EventFd,
        mmio: MmioBus,
    ) -> Result<Self, CreateError> {
        for (index, device) in mmio.devices().iter().enumerate() {
            if let Some(window) = layout::mmio_window(index) {
                connect(mapping.vm(), device, &window)?;
            }
        }
        let Host { kvm, loses_breakpoints, .. } = host;
        // The vendor is the host's: what is saved elsewhere is not restored.
        let cpuid = cpuid::guest_cpuid(kvm, Topology { index: 0, count: 1 });
        let vendor = cpuid::vendor(cpuid.map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?.as_slice());
        let msrs = kvm.get_msr_index_list().map_err(ioctl("KVM_GET_MSR_INDEX_LIST"))?;
        let shared = Arc::new(Shared::new(vcpus.len(), msrs::to_save(msrs.as_slice())));
        let (ram, mapping) = (mapping.ram().clone(), Arc::new(mapping));
        let sci = interrupt_line(Arc::clone(&mapping), layout::SCI_GSI.into());
        let ports = PortBus::new(serial, serial_irq, sci, Arc::clone(&shared.stop));
        let buses = Arc::new(Buses { ports, mmio });
        let (sender, receiver) = mpsc::channel();
        let (hangup, loses_breakpoints) = (Hangup(buses.ports.serial()), *loses_breakpoints);
        let control = Control { shared, mapping, buses, sender };
        Ok(Self { vcpus, control, ram, hangup, receiver, vendor, loses_breakpoints })
    }

    /// Guest memory, the kernel loaded. It stays readable when the machine is gone.
    #[must_use]
    pub fn memory(&self) -> GuestRam {
        self.ram.clone()
    }

    /// The state of each vCPU, by index, before the run.
    #[must_use]
    pub fn states(&self) -> Vec<VcpuState> {
        self.vcpus.iter().map(Vcpu::state).collect()
    }

    /// Has a vCPU start from another state. Returns whether there is such a vCPU. KVM has to accept the state, or the run fails.
    #[must_use]
    pub fn set_state(&mut self, vcpu: VcpuId, state: &VcpuState) -> bool {
        let vcpu = self.vcpus.iter_mut().find(|one| one.id() == vcpu);
        vcpu.map(|vcpu| vcpu.write_back(state)).is_some()
    }

    /// Whose CPUs the guest has.
    #[must_use]
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// Ends the run from elsewhere.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { sender: self.control.sender.clone() }
    }

    /// What the guest reads from its first serial line is written there, from any thread but a vCPU's.
    #[must_use]
    pub fn serial_input(&self) -> SerialInput {
        SerialInput::new(self.control.buses.ports.serial())
    }

    /// Pauses the run and changes which pages are watched, from elsewhere or from a stop handler.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Runs the machine to its end: [`Machine::start`] and [`Run::wait`].
    ///
    /// # Errors
    /// [`RunError`] when the host fails. What the guest does wrong is a [`RunEnd`].
    pub fn run(self, handlers: Vec<Box<dyn StopHandler>>) -> Result<RunReport, RunError> {
        self.start(handlers)?.wait()
    }

    /// Lets the machine run, each vCPU on a thread of its own with its handler. A pause from now on is one of all these threads.
    ///
    /// # Errors
    /// [`RunError`]; nothing runs then.
    pub fn start(self, handlers: Vec<Box<dyn StopHandler>>) -> Result<Run, RunError> {
        let Machine { vcpus, control, ram, hangup, receiver, vendor: _, loses_breakpoints } = self;
        if handlers.len() != vcpus.len() {
            return Err(RunError::Handlers { given: handlers.len(), vcpus: vcpus.len() });
        }
        kick::install().map_err(RunError::Signal)?;

        let start = Instant::now();
        let mut devices = DeviceThreads::default();
        for device in control.buses.mmio.devices() {
            devices.spawn(device).map_err(RunError::SpawnDevice)?;
        }
        let mut threads = Threads { shared: Arc::clone(&control.shared), threads: Vec::new() };
        for (vcpu, handler) in vcpus.into_iter().zip(handlers) {
            let id = vcpu.id();
            let runner = Runner::new(
                vcpu,
                handler,
                ram.clone(),
                Arc::clone(&control.buses),
                Arc::clone(&control.shared),
                control.sender.clone(),
                loses_breakpoints,
            );
            threads.spawn(id, runner, control.sender.clone())?;
        }
        Ok(Run { threads, devices, receiver, control, hangup, start })
    }

    /// Lets the first vCPU alone run, for `limit` at most, until something ends that: [`RunEnd::Finished`] if its handler does, and
    /// [`RunEnd::Stopped`] at the limit. The machine goes on from there when it is started. Not for one that is being controlled.
    ///
    /// # Errors
    /// [`RunError`] when the host fails; the machine is then of no use.
    pub fn run_first(&mut self, handler: Box<dyn StopHandler>, limit: Duration) -> Result<RunEnd, RunError> {
        kick::install().map_err(RunError::Signal)?;
        let Some(vcpu) = self.vcpus.first().map(Vcpu::id) else { return Ok(RunEnd::Halted) };
        let runner = Runner::new(
            self.vcpus.remove(0),
            handler,
            self.ram.clone(),
            Arc::clone(&self.control.buses),
            Arc::clone(&self.control.shared),
            self.control.sender.clone(),
            self.loses_breakpoints,
        );
        let shared = &self.control.shared;
        let mut threads = Threads { shared: Arc::clone(shared), threads: Vec::new() };
        threads.spawn(vcpu, runner, self.control.sender.clone())?;
        let cause = coordinate(&self.receiver, &threads, shared, Some(Instant::now() + limit));
        let outcomes = threads.stop_and_join()?;
        // As before a run: nothing was asked, nothing is to be heard.
        shared.stop.store(false, Ordering::Release);
        shared.inspection.store(0, Ordering::Release);
        while self.receiver.try_recv().is_ok() {}
        let mut end = None;
        for Outcome { vcpu, end: ended, .. } in outcomes {
            self.vcpus.insert(0, vcpu);
            end = ended?;
        }
        run_end(cause, end)
    }
}

/// How a run ended that `cause` ended; `end` is what a vCPU says that caused it.
fn run_end(cause: Cause, end: Option<RunEnd>) -> Result<RunEnd, RunError> {
    match cause {
        Cause::Stopped => Ok(RunEnd::Stopped),
        Cause::Halted => Ok(RunEnd::Halted),
        Cause::MemoryLost(error) => Err(RunError::MemoryLost(error)),
        Cause::Ended(_) => Ok(end.unwrap_or(RunEnd::Stopped)),
    }
}

/// A machine that runs. Dropping it ends the run.
pub struct Run {
    // The threads go before the memory that KVM maps.
    threads: Threads,
    devices: DeviceThreads,
    receiver: Receiver<Event>,
    control: Control,
    hangup: Hangup,
    start: Instant,
}

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run").field("vcpus", &self.threads.threads.len()).finish_non_exhaustive()
    }
}

impl Run {
    /// Ends the run from elsewhere.
    #[must_use]
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { sender: self.control.sender.clone() }
    }

    /// Reaches into the run from elsewhere.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Waits for the end of the run, and watches over the vCPUs meanwhile; all threads have ended when this returns. To be called at
    /// once: who else looks for vCPUs that all sleep for ever?
    ///
    /// # Errors
    /// [`RunError`] when the host fails. What the guest does wrong is a [`RunEnd`].
    pub fn wait(self) -> Result<RunReport, RunError> {
        // The last is dropped first.
        let Run { control, receiver, start, hangup: _hangup, devices, threads } = self;
        let cause = coordinate(&receiver, &threads, &control.shared, None);
        let outcomes = threads.stop_and_join()?;
        drop(devices);
        let wall = start.elapsed();

        let mut reports = Vec::with_capacity(outcomes.len());
        let mut ends = Vec::with_capacity(outcomes.len());
        for Outcome { report, end, .. } in outcomes {
            reports.push(report);
            ends.push(end?);
        }
        let end = match cause {
            Cause::Ended(vcpu) => ends.into_iter().nth(vcpu.0 as usize).flatten(),
            _ => None,
        };
        Ok(RunReport { end: run_end(cause, end)?, vcpus: reports, wall })
    }
}

pub(crate) fn ioctl(name: &'static str) -> impl FnOnce(errno::Error) -> CreateError {
    move |source| CreateError::Ioctl { name, source }
}

/// The interrupt controllers and the timer in the kernel, and an event that raises the serial line's interrupt.
pub(crate) fn create_interrupt_controllers(vm: &VmFd) -> Result<EventFd, CreateError> {
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP.0).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
    let tss = usize::try_from(layout::KVM_TSS.0).map_err(|_| errno::Error::new(libc::EINVAL));
    tss.and_then(|tss| vm.set_tss_address(tss)).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
    vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
    // The dummy speaker answers port 0x61, which guests use to calibrate clocks.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
    vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
    drop_missed_ticks(vm).map_err(ioctl("KVM_REINJECT_CONTROL"))?;
    let irq = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(CreateError::Event)?;
    vm.register_irqfd(&irq, layout::COM1_IRQ).map_err(ioctl("KVM_IRQFD"))?;
    Ok(irq)
}

/// The virtio devices of a machine, in the order of their windows: its disks, then what every machine has, then what few have.
fn virtio_devices(
    disks: Vec<Disk>,
    vsock: Option<Vsock>,
    networks: Vec<Network>,
    ram: &GuestRam,
) -> Result<Vec<Transport>, CreateError> {
    let disks = disks.into_iter().enumerate();
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    devices.extend(disks.map(|(index, disk)| Box::new(Block::new(disk, index)) as Box<dyn Device>));
    devices.push(Box::new(Rng));
    devices.extend(vsock.map(|vsock| Box::new(vsock) as Box<dyn Device>));
    let networks = networks.into_iter().enumerate();
    devices.extend(networks.map(|(index, network)| Box::new(network.numbered(index)) as Box<dyn Device>));
    if devices.len() > layout::MMIO_WINDOWS {
        return Err(CreateError::Devices(devices.len()));
    }
    let transports = devices.into_iter().map(|device| Transport::new(device, ram.device_memory()));
    transports.collect::<io::Result<_>>().map_err(CreateError::Event)
}

/// Has KVM raise a device's interrupt, and take notifications of its driver without an exit.
fn connect(vm: &VmFd, device: &Transport, window: &MmioWindow) -> Result<(), CreateError> {
    vm.register_irqfd(device.irq(), window.gsi).map_err(ioctl("KVM_IRQFD"))?;
    let notify = IoEventAddress::Mmio(window.base.0 + u64::from(QUEUE_NOTIFY));
    for (queue, event) in (0u32..).zip(device.notifications()) {
        vm.register_ioevent(event, &notify, queue).map_err(ioctl("KVM_IOEVENTFD"))?;
    }
    Ok(())
}

/// The line of an interrupt that stays at its level until it is set to another.
fn interrupt_line(mapping: Arc<Mapping>, gsi: u32) -> InterruptLine {
    Box::new(move |level| {
        if let Err(error) = mapping.vm().set_irq_line(gsi, level) {
            tracing::warn!(%error, "KVM_IRQ_LINE failed; the guest does not see interrupt {gsi} at level {level}");
        }
    })
}

ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);

/// Has the timer drop ticks that the guest did not take in time, as hardware does, instead of making them up: while the host is
/// at a probe no tick is taken, and a guest that has them all made up gets to nothing else.
fn drop_missed_ticks(vm: &VmFd) -> Result<(), errno::Error> {
    let control = kvm_reinject_control::default();
    // SAFETY:
    // - the argument is a `kvm_reinject_control`, whose size the kernel copies in and keeps no pointer to (Linux:
    //   Documentation/virt/kvm/api.rst, KVM_REINJECT_CONTROL); it lives until the call returns;
    // - nothing of this process's memory is written.
    if unsafe { ioctl_with_ref(vm, KVM_REINJECT_CONTROL(), &control) } == 0 {
        Ok(())
    } else {
        Err(errno::Error::last())
    }
}

/// A VM with `ram` in it.
fn create_vm(kvm: &Kvm, ram: &GuestRam, watched_pages: &BTreeSet<Gpa>) -> Result<Mapping, CreateError> {
    let vm = kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
    // Exceptions are queued as pending, with CR2 or DR6 as their payload.
    let payload =
        kvm_enable_cap { cap: KVM_CAP_EXCEPTION_PAYLOAD, args: [1, 0, 0, 0], ..kvm_enable_cap::default() };
    vm.enable_cap(&payload).map_err(ioctl("KVM_ENABLE_CAP"))?;
    Ok(Mapping::new(vm, ram.clone(), kvm.get_nr_memslots(), watched_pages)?)
}

fn create_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    kernel: &Kernel<'_>,
    count: u32,
    ram_bytes: u64,
) -> Result<Vec<Vcpu>, CreateError> {
    (0..count)
        .map(|index| {
            let cpuid = cpuid::guest_cpuid(kvm, Topology { index, count })
                .map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
            let mut vcpu = Vcpu::new(vm, VcpuId(index))?;
            let registers = boot::entry_registers(kernel, index, count, ram_bytes);
            let runs = boot::starts(&kernel.protocol, index);
            vcpu.set_up(&cpuid, &registers, boot::enter_long_mode, runs)?;
            Ok(vcpu)
        })
        .collect()
}

/// What ended a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Stopped,
    Halted,
    MemoryLost(errno::Error),
    Ended(VcpuId),
}

/// Waits for the first cause to end the run, which is a stop at the `deadline`, and watches over the vCPUs meanwhile.
fn coordinate(
    events: &Receiver<Event>,
    threads: &Threads,
    shared: &Shared,
    deadline: Option<Instant>,
) -> Cause {
    let mut watchdog = Watchdog::new(threads.threads.len());
    // vCPUs that deliver an exception with interrupts held.
    let mut delivering: BTreeSet<usize> = BTreeSet::new();
    let mut next_tick = Instant::now() + WATCHDOG_TICK;
    loop {
        let until_tick = next_tick.saturating_duration_since(Instant::now());
        let wait = if watchdog.unanswered().next().is_some() {
            until_tick.min(KICK_REPEAT)
        } else if delivering.is_empty() {
            until_tick
        } else {
            until_tick.min(DELIVERY_TIME)
        };
        match events.recv_timeout(wait) {
            Ok(Event::Stop) => return Cause::Stopped,
            Ok(Event::MemoryLost(error)) => return Cause::MemoryLost(error),
            Ok(Event::Ended(vcpu)) => return Cause::Ended(vcpu),
            Ok(Event::Delivering(vcpu)) => {
                delivering.insert(vcpu.0 as usize);
            }
            Ok(Event::Delivered(vcpu)) => {
                delivering.remove(&(vcpu.0 as usize));
            }
            Ok(Event::Inspected { vcpu, inspection, sleeps_for_ever }) => {
                if watchdog.answer(vcpu, inspection, sleeps_for_ever) {
                    return Cause::Halted;
                }
            }
            // A parked vCPU answers when it goes on.
            Err(RecvTimeoutError::Timeout) if shared.pause.wanted() => {}
            Err(RecvTimeoutError::Timeout) => {
                for index in watchdog.unanswered().chain(delivering.iter().copied()) {
                    if let Some((_, thread)) = threads.threads.get(index) {
                        kick::send(thread);
                    }
                }
            }
            // `Machine::run` holds a sender.
            Err(RecvTimeoutError::Disconnected) => return Cause::Stopped,
        }
        if Instant::now() >= next_tick {
            next_tick += WATCHDOG_TICK;
            if deadline.is_some_and(|deadline| next_tick > deadline) {
                return Cause::Stopped;
            }
            if shared.pause.wanted() {
                watchdog.forget();
                continue;
            }
            let times = threads.threads.iter().map(|(_, thread)| kick::cpu_time(thread)).collect();
            if let Some(inspection) = watchdog.tick(times) {
                shared.inspection.store(inspection, Ordering::Release);
            }
        }
    }
}

/// The vCPU threads. Dropping it ends and joins them.
struct Threads {
    shared: Arc<Shared>,
    threads: Vec<(VcpuId, JoinHandle<Outcome>)>,
}

/// Tells the coordinator that a thread ends, also when it panics.
struct EndNotice {
    vcpu: VcpuId,
    sender: Sender<Event>,
}

impl Drop for EndNotice {
    fn drop(&mut self) {
        self.sender.send(Event::Ended(self.vcpu)).ok();
    }
}

impl Threads {
    fn spawn(&mut self, vcpu: VcpuId, runner: Runner, sender: Sender<Event>) -> Result<(), RunError> {
        let expected = self.shared.pause.expect(vcpu);
        let thread = thread::Builder::new()
            .name(vcpu.to_string())
            .spawn(move || {
                let _notice = EndNotice { vcpu, sender };
                kick::accept();
                let _registration = expected.register();
                runner.run()
            })
            .map_err(|source| RunError::Spawn { vcpu, source })?;
        self.threads.push((vcpu, thread));
        Ok(())
    }

    fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        while let Some((_, thread)) = self.threads.iter().find(|(_, thread)| !thread.is_finished()) {
            kick::send(thread);
            self.shared.pause.wake();
            thread::sleep(KICK_REPEAT);
        }
    }

    fn stop_and_join(mut self) -> Result<Vec<Outcome>, RunError> {
        self.stop();
        // All are joined before the first panic is reported.
        let joined: Vec<_> = self.threads.drain(..).map(|(vcpu, thread)| (vcpu, thread.join())).collect();
        joined.into_iter().map(|(vcpu, outcome)| outcome.map_err(|_| RunError::Panicked(vcpu))).collect()
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.stop();
        for (vcpu, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(%vcpu, "A vCPU thread panicked");
            }
        }
    }
}
