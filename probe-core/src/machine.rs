//! What the engine asks of the machine whose guest it probes, and of those who know the guest.

use crate::{Gpa, Gva};

/// Why the machine could not do what arming needs, for the user. Nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The stores to a page cannot be watched.
    #[error("The guest's stores to its text cannot be watched: {reason}")]
    Watch {
        /// What the machine said.
        reason: String,
    },
}

/// The machine, as far as a probe that is armed or taken out while the guest runs depends on it. Not to be called while holding a
/// lock that a stop handler takes.
pub trait MachineControl: Send + Sync + std::fmt::Debug {
    /// Watches each of these pages once more; any address within a page names it, and one that is named twice counts twice.
    /// From the return of this call on, every store of the guest to them goes to
    /// [`StopHandler::on_text_write`](crate::stop::StopHandler::on_text_write) and is not carried out otherwise. May be
    /// called on a vCPU's thread, in a stop.
    ///
    /// # Errors
    /// [`ControlError::Watch`]
    fn watch(&self, pages: &[Gpa]) -> Result<(), ControlError>;

    /// Watches each of these pages once less.
    ///
    /// # Errors
    /// [`ControlError::Watch`]: the pages stay watched.
    fn unwatch(&self, pages: &[Gpa]) -> Result<(), ControlError>;

    /// The largest number of breakpoints that the guest has enabled in the debug registers of one vCPU. Not to be called on a
    /// vCPU's thread.
    fn guest_breakpoints(&self) -> usize;

    /// Holds every other vCPU out of the guest, until the result is dropped; that is before this vCPU's thread ends. To be called in
    /// a stop, and not to be dropped with a lock held that a stop handler takes. The vCPU may enter the guest meanwhile; a thread
    /// outside that wants a pause has it afterwards, and kicks this vCPU until then.
    #[must_use]
    fn alone(&self) -> Box<dyn Alone>;

    /// Returns once every vCPU has left the guest at least once since the call, has been settled
    /// ([`crate::stop::StopHandler::settle`]) and has asked its handler again which debug exits it wants: nothing fetched before
    /// the call is executed any more, and no stop that began before it is still being handled. Not to be called on a vCPU's thread.
    fn synchronise(&self);
}

/// While this lives, one vCPU is the only one that runs.
pub trait Alone: Send + std::fmt::Debug {}

/// A machine whose vCPUs do not run, or with one alone, and all of whose probed pages are watched from the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct NotRunning;

impl MachineControl for NotRunning {
    fn watch(&self, _: &[Gpa]) -> Result<(), ControlError> {
        Ok(())
    }

    fn unwatch(&self, _: &[Gpa]) -> Result<(), ControlError> {
        Ok(())
    }

    fn guest_breakpoints(&self) -> usize {
        0
    }

    fn alone(&self) -> Box<dyn Alone> {
        Box::new(NotRunning)
    }

    fn synchronise(&self) {}
}

impl Alone for NotRunning {}

/// How a guest rewrites its own text at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rewritten {
    /// Not at all, or not any more: an int3 can stand there.
    No,
    /// Between a jump and a nop of the same length: a static key.
    Jump {
        /// Length of either, bytes.
        len: u8,
        /// Where the jump goes.
        target: Gva,
    },
    /// In another way, and it checks what it finds before it writes.
    Checked,
}

/// What is known of the guest's text besides its bytes.
pub trait GuestText: Send + Sync + std::fmt::Debug {
    /// How the guest rewrites the instruction at `gva`. Asked on a vCPU's thread, when a call is entered whose return address has not
    /// been met yet.
    fn rewritten(&self, gva: Gva) -> Rewritten;
}

/// A guest that leaves its text alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainText;

impl GuestText for PlainText {
    fn rewritten(&self, _: Gva) -> Rewritten {
        Rewritten::No
    }
}
