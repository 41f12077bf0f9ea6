//! What the engine asks of the machine whose guest it probes.

use crate::Gpa;

/// Why the machine could not do what arming needs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// A page cannot be watched.
    #[error("The guest's stores to page {page} cannot be watched: {reason}")]
    Watch {
        /// The guest-physical page.
        page: Gpa,
        /// What the machine said.
        reason: String,
    },
}

/// The machine, as far as a probe that is armed or taken out while the guest runs depends on it.
pub trait MachineControl: Send + Sync + std::fmt::Debug {
    /// From the return of this call on, every store of the guest to these pages goes to
    /// [`crate::stop::StopHandler::on_text_write`] and is not carried out otherwise. Quick where they are watched already. May be called on a vCPU's thread, from
    /// within a stop.
    ///
    /// # Errors
    /// [`ControlError::Watch`]; pages that were not watched before may then be watched or not.
    fn watch(&self, pages: &[Gpa]) -> Result<(), ControlError>;

    /// Returns once every vCPU has left the guest at least once since the call and has asked its handler again which
    /// debug exits it wants: nothing fetched before the call is executed any more, and no stop that began before it is
    /// still being handled. Not to be called on a vCPU's thread.
    fn synchronise(&self);
}

/// A machine whose vCPUs do not run, and all of whose probed pages are watched from the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct NotRunning;

impl MachineControl for NotRunning {
    fn watch(&self, _: &[Gpa]) -> Result<(), ControlError> {
        Ok(())
    }

    fn synchronise(&self) {}
}
