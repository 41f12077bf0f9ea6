//! The registers of a virtio-mmio device (Virtio 1.2, 4.2.2): what the driver reads, and what its writes ask for. Pure.

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{
    VIRTIO_MMIO_CONFIG, VIRTIO_MMIO_CONFIG_GENERATION, VIRTIO_MMIO_DEVICE_FEATURES,
    VIRTIO_MMIO_DEVICE_FEATURES_SEL, VIRTIO_MMIO_DEVICE_ID, VIRTIO_MMIO_DRIVER_FEATURES,
    VIRTIO_MMIO_DRIVER_FEATURES_SEL, VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INTERRUPT_STATUS,
    VIRTIO_MMIO_MAGIC_VALUE, VIRTIO_MMIO_QUEUE_AVAIL_HIGH, VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    VIRTIO_MMIO_QUEUE_DESC_HIGH, VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_NOTIFY, VIRTIO_MMIO_QUEUE_NUM,
    VIRTIO_MMIO_QUEUE_NUM_MAX, VIRTIO_MMIO_QUEUE_READY, VIRTIO_MMIO_QUEUE_SEL, VIRTIO_MMIO_QUEUE_USED_HIGH,
    VIRTIO_MMIO_QUEUE_USED_LOW, VIRTIO_MMIO_SHM_LEN_HIGH, VIRTIO_MMIO_SHM_LEN_LOW, VIRTIO_MMIO_STATUS,
    VIRTIO_MMIO_VENDOR_ID, VIRTIO_MMIO_VERSION,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueState, QueueT};

use super::Device;
use crate::snapshot::{Virtio, VirtioQueue};

/// Where a driver notifies the device of a queue.
pub(crate) const QUEUE_NOTIFY: u32 = VIRTIO_MMIO_QUEUE_NOTIFY;

/// `virt`.
const MAGIC: u32 = u32::from_le_bytes(*b"virt");
/// The version that is not the legacy one.
const VERSION: u32 = 2;
/// Nobody's number, as QEMU's and Firecracker's devices have none of a vendor's either.
const VENDOR: u32 = 0;

/// What the transport offers for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The status bits that a driver sets (2.1).
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What a write asks of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// To serve its queues from now on.
    Start,
    /// To forget everything.
    Reset,
    /// To look at a queue.
    Notify(usize),
    /// To leave a queue alone.
    StopQueue(usize),
    /// To take interrupt bits as seen.
    Acknowledge(u32),
}

/// What a driver has set up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// The driver's bits of the status.
    pub status: u32,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub driver_features: u64,
    pub queue_select: u32,
    /// As the driver has set them up; where the device has got to in them only the device knows.
    pub queues: Vec<QueueState>,
}

/// The device's configuration space, and how often it has changed (4.2.2.1).
#[derive(Clone, Debug, Default)]
pub(super) struct Config {
    pub bytes: Vec<u8>,
    pub generation: u32,
}

/// The device's part of the registers, as it is now.
#[derive(Clone, Copy, Debug)]
pub(super) struct Live<'a> {
    pub needs_reset: bool,
    pub interrupts: u32,
    pub config: &'a Config,
}

/// The registers of one device.
#[derive(Clone, Debug)]
pub(super) struct Registers {
    id: u32,
    features: u64,
    queue_sizes: &'static [u16],
    pub state: State,
}

impl Registers {
    pub fn new(device: &dyn Device) -> Self {
        let queue_sizes = device.queue_sizes();
        Self {
            id: device.id(),
            features: device.features() | TRANSPORT_FEATURES,
            queue_sizes,
            state: reset_state(queue_sizes),
        }
    }

    /// What a snapshot keeps of them. `place` tells where the device has come to in a queue that it serves.
    pub fn save(&self, place: impl Fn(usize) -> Option<QueueState>) -> Virtio {
        let queues = self.state.queues.iter().enumerate().map(|(index, set_up)| {
            let queue = place(index).unwrap_or(*set_up);
            VirtioQueue {
                size: queue.size,
                ready: set_up.ready,
                event_idx: set_up.event_idx_enabled,
                descriptors: queue.desc_table,
                available: queue.avail_ring,
                used: queue.used_ring,
                next_available: queue.next_avail,
                next_used: queue.next_used,
            }
        });
        Virtio {
            id: self.id,
            status: self.state.status,
            device_features_select: self.state.device_features_select,
            driver_features_select: self.state.driver_features_select,
            driver_features: self.state.driver_features,
            queue_select: self.state.queue_select,
            queues: queues.collect(),
            interrupts: 0,
            needs_reset: false,
        }
    }

    /// The opposite. Returns whether a driver can have set this device up so.
    pub fn restore(&mut self, saved: &Virtio) -> bool {
        if saved.id != self.id
            || saved.queues.len() != self.state.queues.len()
            || saved.driver_features & !self.features != 0
        {
            return false;
        }
        self.state.status = saved.status & DRIVER_STATUS;
        self.state.device_features_select = saved.device_features_select;
        self.state.driver_features_select = saved.driver_features_select;
        self.state.driver_features = saved.driver_features;
        self.state.queue_select = saved.queue_select;
        for (queue, saved) in self.state.queues.iter_mut().zip(&saved.queues) {
            *queue = QueueState {
                max_size: queue.max_size,
                size: saved.size,
                ready: saved.ready,
                event_idx_enabled: saved.event_idx,
                desc_table: saved.descriptors,
                avail_ring: saved.available,
                used_ring: saved.used,
                next_avail: saved.next_available,
                next_used: saved.next_used,
            };
        }
        true
    }

    /// Whether the driver has begun to use the device and not stopped.
    pub fn is_started(&self) -> bool {
        self.state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
    }

    /// Back to where a device begins.
    pub fn reset(&mut self) {
        self.state = reset_state(self.queue_sizes);
    }

    /// What the driver reads from `offset` on.
    pub fn read(&self, offset: u64, data: &mut [u8], live: &Live<'_>) {
        data.fill(0);
        if let Some(from) = offset.checked_sub(VIRTIO_MMIO_CONFIG.into()) {
            let from = usize::try_from(from).unwrap_or(usize::MAX);
            for (byte, value) in data.iter_mut().zip(live.config.bytes.iter().skip(from)) {
                *byte = *value;
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Other accesses are not allowed (4.2.2.2).
            data.copy_from_slice(&self.register(offset, live).to_le_bytes());
        }
    }

    fn register(&self, offset: u64, live: &Live<'_>) -> u32 {
        match u32::try_from(offset).unwrap_or(u32::MAX) {
            VIRTIO_MMIO_MAGIC_VALUE => MAGIC,
            VIRTIO_MMIO_VERSION => VERSION,
            VIRTIO_MMIO_DEVICE_ID => self.id,
            VIRTIO_MMIO_VENDOR_ID => VENDOR,
            VIRTIO_MMIO_DEVICE_FEATURES => half(self.features, self.state.device_features_select),
            VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            VIRTIO_MMIO_QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            VIRTIO_MMIO_INTERRUPT_STATUS => live.interrupts,
            VIRTIO_MMIO_STATUS => {
                self.state.status | if live.needs_reset { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
            }
            // There is no shared memory (4.2.2).
            VIRTIO_MMIO_SHM_LEN_LOW | VIRTIO_MMIO_SHM_LEN_HIGH => u32::MAX,
            VIRTIO_MMIO_CONFIG_GENERATION => live.config.generation,
            _ => 0,
        }
    }

    /// Takes a write of the driver's. Returns what it asks of the device.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        let value = u32::from_le_bytes(data.try_into().ok().filter(|_| offset.is_multiple_of(4))?);
        match u32::try_from(offset).ok()? {
            VIRTIO_MMIO_DEVICE_FEATURES_SEL => self.state.device_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES_SEL => self.state.driver_features_select = value,
            VIRTIO_MMIO_DRIVER_FEATURES if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) => {
                set_half(&mut self.state.driver_features, self.state.driver_features_select, value);
            }
            VIRTIO_MMIO_QUEUE_SEL => self.state.queue_select = value,
            VIRTIO_MMIO_QUEUE_NOTIFY => return Some(Action::Notify(usize::try_from(value).ok()?)),
            VIRTIO_MMIO_INTERRUPT_ACK => return Some(Action::Acknowledge(value)),
            VIRTIO_MMIO_STATUS if value == 0 => {
                self.reset();
                return Some(Action::Reset);
            }
            VIRTIO_MMIO_STATUS => return self.set_status(value),
            VIRTIO_MMIO_QUEUE_READY => return self.set_queue_ready(value),
            register => self.set_up_queue(register, value),
        }
        None
    }

    fn has(&self, status: u32) -> bool {
        self.state.status & status != 0
    }

    /// A driver only ever sets bits (2.1.1), and those in their order count.
    fn set_status(&mut self, value: u32) -> Option<Action> {
        let mut new = value & DRIVER_STATUS & !self.state.status;
        let acceptable = self.state.driver_features & !self.features == 0
            && self.state.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 && !acceptable {
            new &= !VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if (self.state.status | new) & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
            new &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.state.status |= new;
        (new & VIRTIO_CONFIG_S_DRIVER_OK != 0).then_some(Action::Start)
    }

    fn queue(&self) -> Option<&QueueState> {
        self.state.queues.get(usize::try_from(self.state.queue_select).ok()?)
    }

    /// The selected queue, where a driver may still set it up.
    fn open_queue(&mut self) -> Option<&mut QueueState> {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) || self.is_started() {
            return None;
        }
        self.state.queues.get_mut(usize::try_from(self.state.queue_select).ok()?)
    }

    fn set_queue_ready(&mut self, value: u32) -> Option<Action> {
        if value == 0 {
            let index = usize::try_from(self.state.queue_select).ok()?;
            self.state.queues.get_mut(index)?.ready = false;
            return Some(Action::StopQueue(index));
        }
        let event_idx = self.state.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = self.open_queue()?;
        queue.ready = true;
        queue.event_idx_enabled = event_idx;
        None
    }

    fn set_up_queue(&mut self, register: u32, value: u32) {
        let Some(queue) = self.open_queue().filter(|queue| !queue.ready) else { return };
        match register {
            // One that does not fit shows when the device starts.
            VIRTIO_MMIO_QUEUE_NUM => queue.size = u16::try_from(value).unwrap_or(0),
            VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.desc_table, 0, value),
            VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.desc_table, 1, value),
            VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.avail_ring, 0, value),
            VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.avail_ring, 1, value),
            VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used_ring, 0, value),
            VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used_ring, 1, value),
            _ => {}
        }
    }
}

fn reset_state(queue_sizes: &[u16]) -> State {
    State {
        status: 0,
        device_features_select: 0,
        driver_features_select: 0,
        driver_features: 0,
        queue_select: 0,
        queues: queue_sizes.iter().filter_map(|size| Queue::new(*size).ok()).map(|q| q.state()).collect(),
    }
}

/// The low (0) or high (1) word of a number; there are no others.
fn half(number: u64, which: u32) -> u32 {
    let bytes = number.to_le_bytes();
    let at = usize::try_from(which).unwrap_or(usize::MAX).saturating_mul(4);
    let word = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    word.map_or(0, |word| u32::from_le_bytes(*word))
}

fn set_half(number: &mut u64, which: u32, value: u32) {
    *number = match which {
        0 => *number & !u64::from(u32::MAX) | u64::from(value),
        1 => *number & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => *number,
    };
}
