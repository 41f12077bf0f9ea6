//! The register windows of virtio devices in guest-physical memory.

use probe_core::Gpa;

use crate::layout;
use crate::snapshot::Virtio;

use super::virtio::{Quiet, Transport};

/// Dispatches accesses to where no memory is. A window belongs to one device; elsewhere there is nothing, which reads as ones and
/// swallows writes, as on the port bus.
#[derive(Debug)]
pub(crate) struct MmioBus {
    /// By the number of their window.
    devices: Vec<Transport>,
}

impl MmioBus {
    /// A bus with these devices in the first windows ([`layout::mmio_window`]).
    pub fn new(devices: Vec<Transport>) -> Self {
        Self { devices }
    }

    /// The devices, by the number of their window.
    pub fn devices(&self) -> &[Transport] {
        &self.devices
    }

    /// Whether a snapshot could hold all that there is to its devices.
    pub fn can_be_saved(&self) -> bool {
        self.devices.iter().all(Transport::can_be_saved)
    }

    /// The devices at rest, by the number of their window.
    pub fn quiesce(&self) -> Vec<Quiet<'_>> {
        self.devices.iter().map(Transport::quiesce).collect()
    }

    /// Puts the devices where others were saved. Returns whether those are of the same kinds; if not, the bus is of no use.
    pub fn restore(&self, saved: &[Virtio]) -> bool {
        saved.len() == self.devices.len()
            && self.devices.iter().zip(saved).all(|(device, saved)| device.restore(saved))
    }

    /// Fills `data` from `gpa` on.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) {
        match self.find(gpa) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes `data` from `gpa` on.
    pub fn write(&self, gpa: Gpa, data: &[u8]) {
        if let Some((device, offset)) = self.find(gpa) {
            device.write(offset, data);
        }
    }

    fn find(&self, gpa: Gpa) -> Option<(&Transport, u64)> {
        let from_first = gpa.0.checked_sub(layout::MMIO_WINDOWS_BASE.0)?;
        let device = self.devices.get(usize::try_from(from_first / layout::MMIO_WINDOW_BYTES).ok()?)?;
        Some((device, from_first % layout::MMIO_WINDOW_BYTES))
    }
}
