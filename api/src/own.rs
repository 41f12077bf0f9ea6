//! The probes that vmprobe arms for itself: they cost nothing until the guest reaches them.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use guest::Guest;
use guest::text::KernelText;
use probe_core::Gva;
use probe_core::handler::{Handler, Hit, Verdict};
use probe_core::probe::ProbeRequest;

use crate::probes::{Resolved, patch_place};

/// Notes that the guest kernel is about to panic.
#[derive(Clone, Debug, Default)]
pub struct Panics(Arc<AtomicBool>);

impl Panics {
    /// Whether it has.
    pub fn seen(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Handler for Panics {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        self.0.store(true, Ordering::Relaxed);
        Verdict::FILTER
    }
}

/// Takes the probes in init text out before the guest frees it.
struct InitTextFreed(Range<Gva>);

impl Handler for InitTextFreed {
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        hit.text_is_freed(&self.0);
        Verdict::FILTER
    }
}

/// Notes that the guest has booted.
struct Booted(Arc<KernelText>);

impl Handler for Booted {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        self.0.set_booted();
        Verdict::FILTER
    }
}

/// The probes that a run of `guest` needs besides the user's. The last one, with `verbose`, is the only one whose hits are
/// reported: at the start of the guest's init.
pub fn probes(
    guest: &Guest,
    users: &[Resolved],
    verbose: bool,
    panics: &Panics,
    text: &Arc<KernelText>,
) -> Vec<ProbeRequest> {
    let Some(linux) = &guest.linux else { return Vec::new() };
    let mut own = Vec::new();
    let mut add = |symbol: &str, with: &dyn Fn(ProbeRequest) -> ProbeRequest| match guest.place(symbol) {
        Ok(place) => own.push(with(ProbeRequest::new(patch_place(&place)).unlimited())),
        Err(error) => tracing::info!("No probe of vmprobe's own on {symbol}: {error}"),
    };
    add("panic", &|request| request.with_handler(Arc::new(panics.clone())));
    // The kernel has patched its text for good when it frees its init memory.
    add("free_initmem", &|request| request.with_handler(Arc::new(Booted(Arc::clone(text)))));
    if let Some(freed) = &linux.freed_after_boot
        && users.iter().any(|probe| probe.place.freed_after_boot)
    {
        add("free_initmem", &|request| request.with_handler(Arc::new(InitTextFreed(freed.clone()))));
    }
    if verbose {
        add("run_init_process", &|request| request);
    }
    own
}
