//! Virtio devices (Virtio 1.2) on its MMIO transport.
//!
//! ```text
//! vCPU threads      registers ──► what the write asks for      registers.rs, pure
//!                       │ starts, stops, resets
//!                       ▼
//! device's thread   queues ──► one request at a time ──► Device::serve      transport.rs
//!     ▲  ▲              │ used ring, interrupt (irqfd)
//!     │  └─ ioeventfd: the driver's notification, without an exit to this program
//!     └─ Device::wakes: something has come from the host's side
//! ```
//!
//! What comes from the host's side goes into requests that the driver has made for that: they stay in their queue until the device has
//! something for them (`Device::is_ready`).
//!
//! A request is served under a lock of its device: who has that lock, to stop the device or to look at its queues, finds no request
//! under way.
//!
//! What a driver says is not believed. One that breaks the rules finds DEVICE_NEEDS_RESET in its device's status (2.1.2) and that device
//! at rest until it is reset; nobody else notices.

mod block;
mod buffered;
mod net;
mod registers;
mod rng;
mod transport;
mod vsock;

use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{DescriptorChain, Reader, Writer};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

pub(crate) use block::Block;
pub use net::{MacAddress, Network, OpenTapError, ParseMacError};
pub(crate) use registers::QUEUE_NOTIFY;
pub(crate) use rng::Rng;
pub(crate) use transport::{Quiet, Threads, Transport};
pub use vsock::{OpenVsockError, ServedVsock, Vsock, VsockOptions};

/// A device: what it is, and how it serves a request, on a thread of its own.
pub(crate) trait Device: Send {
    /// For messages.
    fn name(&self) -> &str;
    /// Virtio 1.2, 5.
    fn id(&self) -> u32;
    /// Its feature bits, without those of the transport.
    fn features(&self) -> u64;
    /// The most descriptors of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// Whether all that there is to it can be saved: its registers and queues.
    fn can_be_saved(&self) -> bool {
        false
    }
    /// What wakes its thread, by being readable, besides the driver. It stays open as long as the device lives.
    fn wakes(&self) -> Option<RawFd> {
        None
    }
    /// That has happened.
    fn woken(&mut self) {}
    /// Whether its configuration space has changed since it was last asked.
    fn has_changed(&mut self) -> bool {
        false
    }
    /// The driver has brought it up, and accepted these features.
    fn start(&mut self, _features: u64) {}
    /// The driver is gone, or broken: what there was with it is over.
    fn reset(&mut self) {}
    /// Whether it would serve a request of this queue now. Others wait until something else has been served or has woken it.
    fn is_ready(&mut self, _queue: usize) -> bool {
        true
    }
    /// Serves a request of a queue. Returns how many bytes have been written for the driver.
    ///
    /// # Errors
    /// The driver is broken.
    fn serve(&mut self, queue: usize, request: Request<'_>) -> Result<u32, DriverError>;
}

/// How a driver breaks the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum DriverError {
    /// The rings of a queue.
    #[error("queue {0} does not lie in its memory, or is of no size that there is")]
    Queue(usize),
    /// The available ring.
    #[error("its available ring is {0} requests ahead, more than the queue has")]
    TooManyRequests(u16),
    /// The descriptors.
    #[error("its request at descriptor {0} does not end, or leads to no descriptor")]
    Endless(u16),
    /// The order of buffers (2.7.4.2).
    #[error("its request at descriptor {0} has something to read behind something to write")]
    Order(u16),
    /// The buffers.
    #[error("its request at descriptor {0} has a buffer outside its memory")]
    Outside(u16),
    /// Something that every request of its kind has.
    #[error("its request lacks {0}")]
    Lacks(&'static str),
}

/// A request: what the driver gives, and room for what it wants.
pub(crate) struct Request<'a> {
    /// What the driver gives.
    pub reader: Reader<'a>,
    /// Room for what it wants.
    pub writer: Writer<'a>,
    stop: &'a AtomicBool,
}

impl<'a> Request<'a> {
    /// The request that a chain of descriptors is, all of its buffers in `memory`. `stop` is set when the machine is to end.
    fn new(
        chain: &DescriptorChain<&'a GuestMemoryMmap>,
        memory: &'a GuestMemoryMmap,
        stop: &'a AtomicBool,
    ) -> Result<Self, DriverError> {
        let head = chain.head_index();
        let mut last = None;
        for descriptor in chain.clone() {
            if !descriptor.is_write_only() && last.is_some_and(|(writes, _)| writes) {
                return Err(DriverError::Order(head));
            }
            let length = usize::try_from(descriptor.len()).map_err(|_| DriverError::Outside(head))?;
            if !GuestMemoryBackend::check_range(memory, descriptor.addr(), length) {
                return Err(DriverError::Outside(head));
            }
            last = Some((descriptor.is_write_only(), descriptor.has_next()));
        }
        // An iterator over a broken chain just ends.
        if last.is_none_or(|(_, goes_on)| goes_on) {
            return Err(DriverError::Endless(head));
        }
        let outside = |_| DriverError::Outside(head);
        let reader = chain.clone().reader(memory).map_err(outside)?;
        let writer = chain.clone().writer(memory).map_err(outside)?;
        Ok(Self { reader, writer, stop })
    }

    /// Whether the machine is to end, and a long request with it.
    pub fn is_abandoned(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// What has been written for the driver, as the used ring tells it.
fn written(writer: &Writer<'_>) -> u32 {
    u32::try_from(writer.bytes_written()).unwrap_or(u32::MAX)
}

/// Buffers that have been checked can be read and written.
fn outside(_: io::Error) -> DriverError {
    DriverError::Lacks("a buffer that stays in memory")
}

#[cfg(test)]
mod tests;
