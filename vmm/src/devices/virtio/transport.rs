//! One device with its registers, its queues and its thread.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use std::os::fd::AsRawFd;
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::registers::{Action, Config, Live, Registers};
use super::{Device, DriverError, Request};
use crate::snapshot::Virtio;

/// How many notifications the device's thread takes at once.
const EVENTS: usize = 16;

/// How many requests of a queue are served before others are looked at.
const REQUESTS: usize = 256;

/// What epoll tells of [`Device::wakes`]; queues are told by their numbers.
const WOKEN: u64 = u64::MAX;
/// What it tells of the end.
const STOPPED: u64 = u64::MAX - 1;

/// A virtio-mmio device. vCPU threads use its registers, a thread of its own its queues.
pub(crate) struct Transport {
    registers: Mutex<Registers>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport").field("device", &self.shared.name).finish_non_exhaustive()
    }
}

/// What both kinds of threads use.
struct Shared {
    name: String,
    memory: GuestMemoryMmap,
    /// Taken before `work`, and given up once that is taken: so the device's thread, which takes `work` for one request after the
    /// other, lets others have their turn.
    turn: Mutex<()>,
    work: Mutex<Work>,
    /// Taken behind all others.
    config: Mutex<Config>,
    /// Of each queue: the driver has put something there.
    notifications: Vec<EventFd>,
    /// Bits of the interrupt status (4.2.2).
    interrupts: AtomicU32,
    needs_reset: AtomicBool,
    irq: EventFd,
    /// The machine is to end.
    stop: AtomicBool,
    /// Wakes the thread up for that.
    stopped: EventFd,
}

/// What a request is served with.
struct Work {
    device: Box<dyn Device>,
    /// None while the device has not been started, and for a queue that the driver does not use.
    queues: Vec<Option<Queue>>,
}

impl Transport {
    /// A device with queues in `memory`.
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub fn new(device: Box<dyn Device>, memory: GuestMemoryMmap) -> io::Result<Self> {
        let event = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let registers = Registers::new(&*device);
        let queue_count = device.queue_sizes().len();
        let shared = Shared {
            name: device.name().to_owned(),
            memory,
            config: Mutex::new(Config { bytes: device.config(), generation: 0 }),
            turn: Mutex::default(),
            work: Mutex::new(Work { device, queues: Vec::new() }),
            notifications: (0..queue_count).map(|_| event()).collect::<io::Result<_>>()?,
            interrupts: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            irq: event()?,
            stop: AtomicBool::new(false),
            stopped: event()?,
        };
        Ok(Self { registers: Mutex::new(registers), shared: Arc::new(shared) })
    }

    /// What raises its interrupt, for KVM to listen to (KVM_IRQFD).
    pub fn irq(&self) -> &EventFd {
        &self.shared.irq
    }

    /// What a write of a queue's number to its QueueNotify register may signal instead of an exit (KVM_IOEVENTFD), by that number.
    pub fn notifications(&self) -> &[EventFd] {
        &self.shared.notifications
    }

    /// Serves its queues as its thread would.
    #[cfg(test)]
    pub fn serve_all(&self) {
        self.shared.wake();
        self.shared.serve_all();
    }

    /// Whether a snapshot could hold all that there is to it.
    pub fn can_be_saved(&self) -> bool {
        self.shared.work().device.can_be_saved()
    }

    /// Waits for the request under way, and lets none begin meanwhile.
    pub fn quiesce(&self) -> Quiet<'_> {
        Quiet { registers: lock(&self.registers), work: self.shared.work(), shared: &self.shared }
    }

    /// Puts the device where another was saved; it looks for requests as soon as its thread runs. Returns whether that can have been such
    /// a device.
    pub fn restore(&self, saved: &Virtio) -> bool {
        let mut registers = lock(&self.registers);
        if !registers.restore(saved) {
            return false;
        }
        self.shared.interrupts.store(saved.interrupts, Ordering::Release);
        self.shared.needs_reset.store(saved.needs_reset, Ordering::Release);
        if registers.is_started() && !saved.needs_reset {
            self.shared.start(&registers);
        }
        true
    }

    /// A vCPU reads its registers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let needs_reset = self.shared.needs_reset.load(Ordering::Acquire);
        let interrupts = self.shared.interrupts.load(Ordering::Acquire);
        let registers = lock(&self.registers);
        registers.read(offset, data, &Live { needs_reset, interrupts, config: &lock(&self.shared.config) });
    }

    /// A vCPU writes its registers. One that resets the device waits for the request under way.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = lock(&self.registers);
        match registers.write(offset, data) {
            Some(Action::Start) => self.shared.start(&registers),
            Some(Action::Reset) => self.shared.reset(),
            Some(Action::Notify(queue)) => self.shared.notify(queue),
            Some(Action::StopQueue(queue)) => {
                if let Some(queue) = self.shared.work().queues.get_mut(queue) {
                    *queue = None;
                }
            }
            Some(Action::Acknowledge(bits)) => {
                self.shared.interrupts.fetch_and(!bits, Ordering::AcqRel);
            }
            None => {}
        }
    }
}

/// A device at rest: no request is under way, and none begins.
pub(crate) struct Quiet<'a> {
    registers: MutexGuard<'a, Registers>,
    work: MutexGuard<'a, Work>,
    shared: &'a Shared,
}

impl Quiet<'_> {
    /// What a snapshot keeps of it.
    pub fn save(&self) -> Virtio {
        let place = |queue: usize| Some(self.work.queues.get(queue)?.as_ref()?.state());
        Virtio {
            interrupts: self.shared.interrupts.load(Ordering::Acquire),
            needs_reset: self.shared.needs_reset.load(Ordering::Acquire),
            ..self.registers.save(place)
        }
    }
}

impl Shared {
    /// The device and its queues, no request under way.
    fn work(&self) -> MutexGuard<'_, Work> {
        let _turn = lock(&self.turn);
        lock(&self.work)
    }

    /// Begins to serve the queues as the driver has set them up.
    fn start(&self, registers: &Registers) {
        let queues = registers.state.queues.iter().enumerate().map(|(index, state)| {
            if !state.ready {
                return Ok(None);
            }
            let queue = Queue::try_from(*state).map_err(|_| DriverError::Queue(index))?;
            if queue.is_valid(&self.memory) { Ok(Some(queue)) } else { Err(DriverError::Queue(index)) }
        });
        match queues.collect() {
            Ok(queues) => {
                let mut work = self.work();
                work.queues = queues;
                work.device.start(registers.state.driver_features);
            }
            Err(error) => return self.give_up(&mut self.work(), error),
        }
        // What the driver has put there already.
        (0..self.notifications.len()).for_each(|queue| self.notify(queue));
    }

    fn reset(&self) {
        let mut work = self.work();
        work.queues.clear();
        work.device.reset();
        self.needs_reset.store(false, Ordering::Release);
        self.interrupts.store(0, Ordering::Release);
    }

    fn notify(&self, queue: usize) {
        if let Some(Err(error)) = self.notifications.get(queue).map(|event| event.write(1)) {
            tracing::debug!(%error, device = self.name, "Notification");
        }
    }

    fn interrupt(&self, bit: u32) {
        self.interrupts.fetch_or(bit, Ordering::AcqRel);
        if let Err(error) = self.irq.write(1) {
            tracing::debug!(%error, device = self.name, "Interrupt");
        }
    }

    /// The driver is broken: the device rests until it is reset (2.1.2).
    fn give_up(&self, work: &mut Work, error: DriverError) {
        tracing::warn!(
            device = self.name,
            "The guest's driver is broken, and its device needs a reset: {error}"
        );
        work.queues.clear();
        work.device.reset();
        self.needs_reset.store(true, Ordering::Release);
        self.interrupt(VIRTIO_MMIO_INT_CONFIG);
    }

    /// Serves all queues until nothing is left that can be served, or the device stops; after some time what wakes it has its turn.
    fn serve_all(&self) {
        let mut served = 0;
        loop {
            // What is served of one queue may be what a request of another has waited for.
            let now: usize = (0..self.notifications.len()).map(|queue| self.serve(queue)).sum();
            self.update_config();
            served += now;
            if now == 0 {
                return;
            }
            if served >= REQUESTS {
                return self.notify(0);
            }
        }
    }

    /// Serves requests of a queue. Returns how many.
    fn serve(&self, queue: usize) -> usize {
        for served in 0..REQUESTS {
            if self.stop.load(Ordering::Acquire) {
                return 0;
            }
            let mut work = self.work();
            match self.serve_one(&mut work, queue) {
                Ok(true) => {}
                Ok(false) => return served,
                Err(error) => {
                    self.give_up(&mut work, error);
                    return 0;
                }
            }
        }
        REQUESTS
    }

    /// Something has come from the host's side.
    fn wake(&self) {
        self.work().device.woken();
    }

    /// Shows the driver what has changed of the configuration space.
    fn update_config(&self) {
        let mut work = self.work();
        if !work.device.has_changed() {
            return;
        }
        let mut config = lock(&self.config);
        config.bytes = work.device.config();
        config.generation = config.generation.wrapping_add(1);
        drop(config);
        // Without a driver there is nobody to be told.
        if !work.queues.is_empty() {
            self.interrupt(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// Serves the queue's next request. Returns whether there may be another.
    fn serve_one(&self, work: &mut Work, index: usize) -> Result<bool, DriverError> {
        let Work { device, queues } = work;
        let Some(Some(queue)) = queues.get_mut(index) else { return Ok(false) };
        if !device.is_ready(index) {
            return Ok(false);
        }
        // The rings lay in RAM when the device was started, and still do.
        let ring = |_| DriverError::Queue(index);
        let Some(chain) = next_chain(queue, &self.memory).map_err(|error| error.unwrap_or(ring(())))? else {
            return queue.enable_notification(&self.memory).map_err(|_| ring(()));
        };
        let request = Request::new(&chain, &self.memory, &self.stop)?;
        let written = device.serve(index, request)?;
        queue.add_used(&self.memory, chain.head_index(), written).map_err(|_| ring(()))?;
        if queue.needs_notification(&self.memory).map_err(|_| ring(()))? {
            self.interrupt(VIRTIO_MMIO_INT_VRING);
        }
        Ok(true)
    }

    /// The device's thread.
    fn run(&self, epoll: &Epoll) {
        let mut events = [EpollEvent::default(); EVENTS];
        while !self.stop.load(Ordering::Acquire) {
            let count = match epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    tracing::error!(%error, device = self.name, "The device cannot wait for its driver and stops");
                    return;
                }
            };
            for event in &events[..count] {
                if event.data() == WOKEN {
                    self.wake();
                } else if let Some(notification) =
                    usize::try_from(event.data()).ok().and_then(|queue| self.notifications.get(queue))
                {
                    // Another thread cannot have taken it.
                    notification.read().ok();
                }
            }
            self.serve_all();
        }
    }
}

/// The next request of a queue.
fn next_chain<'a>(
    queue: &mut Queue,
    memory: &'a GuestMemoryMmap,
) -> Result<Option<virtio_queue::DescriptorChain<&'a GuestMemoryMmap>>, Option<DriverError>> {
    let next = queue.next_avail();
    match queue.iter(memory) {
        Ok(mut chains) => Ok(chains.next()),
        Err(virtio_queue::Error::InvalidAvailRingIndex) => {
            let ahead =
                queue.avail_idx(memory, Ordering::Acquire).map_or(0, |index| index.0.wrapping_sub(next));
            Err(Some(DriverError::TooManyRequests(ahead)))
        }
        Err(_) => Err(None),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The threads of a machine's devices. Dropping it ends and joins them.
#[derive(Default)]
pub(crate) struct Threads {
    threads: Vec<(Arc<Shared>, JoinHandle<()>)>,
}

impl Threads {
    /// Starts the thread of a device.
    ///
    /// # Errors
    /// The host has no more threads or file descriptors.
    pub fn spawn(&mut self, transport: &Transport) -> io::Result<()> {
        let shared = Arc::clone(&transport.shared);
        let epoll = Epoll::new()?;
        let queues = (0u64..).zip(&shared.notifications);
        let add = |fd, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data));
        for (data, event) in queues.chain([(STOPPED, &shared.stopped)]) {
            add(event.as_raw_fd(), data)?;
        }
        if let Some(wakes) = shared.work().device.wakes() {
            add(wakes, WOKEN)?;
        }
        let thread = thread::Builder::new().name(shared.name.clone()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.run(&epoll)
        })?;
        self.threads.push((shared, thread));
        Ok(())
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        for (shared, _) in &self.threads {
            shared.stop.store(true, Ordering::Release);
            shared.stopped.write(1).ok();
        }
        for (shared, thread) in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(
                    device = shared.name,
                    "A device's thread panicked; this is a bug, please report it"
                );
            }
        }
    }
}
