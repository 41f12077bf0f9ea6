//! What can be done to a machine while it runs.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Duration;

use probe_core::machine::{Alone, ControlError, MachineControl};
use probe_core::{Gpa, VcpuId};

use crate::devices::Buses;
use crate::mapping::{Mapping, WatchError, Wish};
use crate::pause::Paused;
use crate::report::ExitCounts;
use crate::runner::{Event, Shared};

/// Pauses a machine and changes which pages it watches, from any thread: before the run, while it runs, also in a stop
/// handler, and after it. Must not be used while holding a lock that a stop handler takes.
#[derive(Clone, Debug)]
pub struct Control {
    pub(crate) shared: Arc<Shared>,
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) buses: Arc<Buses>,
    pub(crate) sender: Sender<Event>,
}

impl Control {
    /// Pauses the machine until the result is dropped; pauses nest. Returns when no vCPU runs guest code and each has completed
    /// its last port or MMIO access. In a stop handler, this vCPU is the only one that still works, and the only one
    /// that runs if the handler keeps the pause.
    ///
    /// A vCPU that waits for the reader of its serial line keeps this waiting, until the machine is told to stop.
    #[must_use]
    pub fn pause(&self) -> Paused {
        self.shared.pause.pause()
    }

    /// Takes the oldest pause that a handler asked for with [`probe_core::handler::Verdict::and_pause`], waiting for one as long as
    /// `timeout`: the vCPU that hit, and the pause, which ends when it is dropped. Until somebody takes it the machine stands still.
    #[must_use]
    pub fn take_pause(&self, timeout: Duration) -> Option<(VcpuId, Paused)> {
        self.shared.pause.take_requested(timeout)
    }

    /// Presses the machine's power button: ACPI's, in fixed hardware. Returns whether the guest has a driver that listens to it; one
    /// that comes later finds it pressed.
    pub fn press_power_button(&self) -> bool {
        self.buses.ports.press_power_button()
    }

    /// How often each vCPU has left the guest so far, and why, by its number. Looks only; the machine runs on.
    #[must_use]
    pub fn exits(&self) -> Vec<ExitCounts> {
        self.shared.exits()
    }

    /// Lets guest writes to these pages come to [`StopHandler::on_text_write`](probe_core::stop::StopHandler) from now on, until
    /// [`Control::unwatch`] has been called as often. Any address within a page names it, and one that is named
    /// twice counts twice. Pauses the machine, unless all of them are watched already.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn watch(&self, pages: &[Gpa]) -> Result<(), WatchError> {
        self.change(Wish::Watch, pages)
    }

    /// Takes one [`Control::watch`] of these pages back. Pages that nobody else watches are writable again when this returns.
    ///
    /// # Errors
    /// [`WatchError`].
    pub fn unwatch(&self, pages: &[Gpa]) -> Result<(), WatchError> {
        self.change(Wish::Unwatch, pages)
    }

    fn change(&self, wish: Wish, pages: &[Gpa]) -> Result<(), WatchError> {
        if self.mapping.count(wish, pages)? {
            return Ok(());
        }
        let _paused = self.pause();
        let result = self.mapping.change(wish, pages);
        if let Err(WatchError::Lost(error)) = result {
            // In this order: the coordinator hears the reason before it hears of the vCPUs' ends.
            self.sender.send(Event::MemoryLost(error)).ok();
            self.shared.stop.store(true, Ordering::Release);
        }
        result
    }
}

impl MachineControl for Control {
    fn watch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        Control::watch(self, pages).map_err(control_error)
    }

    fn unwatch(&self, pages: &[Gpa]) -> Result<(), ControlError> {
        Control::unwatch(self, pages).map_err(control_error)
    }

    fn guest_breakpoints(&self) -> usize {
        self.pause().guest_breakpoints()
    }

    fn alone(&self) -> Box<dyn Alone> {
        Box::new(self.pause())
    }

    fn synchronise(&self) {
        // A parked vCPU has ended its stop, and looks at what its handler wants before it enters the guest again.
        drop(self.pause());
    }
}

fn control_error(error: WatchError) -> ControlError {
    ControlError::Watch { reason: error.to_string() }
}
