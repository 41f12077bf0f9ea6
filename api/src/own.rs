//! The probes that vmprobe arms for itself: they cost nothing until the guest reaches them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use guest::Guest;
use guest::text::KernelText;
use probe_core::Gva;
use probe_core::handler::{Handler, Hit, Verdict};
use probe_core::probe::{Kind as ProbeKind, MAX_ACTIVE, ProbeRequest};

use crate::exit::Failure;
use crate::modules::{self, Freed, Initialised, Loaded, ModuleProbes};
use crate::probes::{Resolved, patch_place};

/// Notes that the guest kernel is about to panic.
#[derive(Clone, Debug, Default)]
pub struct Panics {
    seen: Arc<AtomicBool>,
    /// The machine then pauses.
    pause: bool,
}

impl Panics {
    /// Whether it has.
    pub fn seen(&self) -> bool {
        self.seen.load(Ordering::Relaxed)
    }
}

impl Handler for Panics {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        let first = !self.seen.swap(true, Ordering::Relaxed);
        if first && self.pause { Verdict::FILTER.and_pause() } else { Verdict::FILTER }
    }
}

/// Takes the probes in init text out before the guest frees it.
struct InitTextFreed {
    text: Range<Gva>,
    notes: Notes,
}

impl Handler for InitTextFreed {
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        let count = hit.text_is_freed(&self.text);
        if count > 0 {
            let note = "Probes in init text were taken out: the guest has booted and frees it";
            self.notes.0.lock().unwrap_or_else(PoisonError::into_inner).push(note.to_owned());
        }
        Verdict::FILTER
    }
}

/// What handlers have to say to the user.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Vec<String>>>);

/// Notes that the guest has booted.
struct Booted(Arc<KernelText>);

impl Handler for Booted {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        self.0.set_booted();
        Verdict::FILTER
    }
}

/// What vmprobe watches for itself in one run.
#[derive(Debug)]
pub struct Own {
    /// Whether the guest is about to panic.
    pub panics: Panics,
    /// The guest's text, as the engine sees it.
    pub text: Arc<KernelText>,
    /// The user's probes on modules, if there are any.
    pub modules: Option<Arc<ModuleProbes>>,
    notes: Notes,
}

/// The cookie of the only probe of vmprobe's own that is reported: at the start of the guest's init.
pub const INIT: u64 = u32::MAX as u64;

impl Own {
    /// For a run of `guest` with the user's probes. With `pause_at_panic` the machine pauses at its first panic.
    ///
    /// # Errors
    /// Probes on modules were asked for, and the image does not say how to find modules.
    pub fn new(guest: &Guest, users: &[Resolved], pause_at_panic: bool) -> Result<Self, Failure> {
        let waiting = users.iter().find(|probe| probe.waits_for_module());
        let modules = waiting.map(|probe| {
            let fields = guest.module_fields().ok_or_else(|| {
                Failure::Probe(format!(
                    "{}: The image has no type information (BTF) that says where its modules are; probe an address",
                    probe.text
                ))
            })?;
            Ok::<_, Failure>(Arc::new(ModuleProbes::new(fields, users)))
        });
        Ok(Self {
            panics: Panics { seen: Arc::default(), pause: pause_at_panic },
            text: Arc::new(guest.text()),
            modules: modules.transpose()?,
            notes: Notes::default(),
        })
    }

    /// What to arm besides the user's probes. With `verbose` the start of the guest's init is reported.
    pub fn requests(&self, guest: &Guest, verbose: bool) -> Vec<ProbeRequest> {
        let Some(linux) = &guest.linux else { return Vec::new() };
        let mut own = Vec::new();
        let mut add = |symbol: &str, with: &dyn Fn(ProbeRequest) -> ProbeRequest| match guest.place(symbol) {
            Ok(place) => own.push(with(ProbeRequest::new(patch_place(&place)).unlimited())),
            Err(error) => tracing::warn!("No probe of vmprobe's own on {symbol}: {error}"),
        };
        add("panic", &|request| request.with_handler(Arc::new(self.panics.clone())));
        // The kernel has patched its text for good when it frees its init memory.
        add("free_initmem", &|request| request.with_handler(Arc::new(Booted(Arc::clone(&self.text)))));
        // Not only the user's probes may stand there: the exception handlers of early boot do too.
        if let Some(freed) = &linux.freed_after_boot {
            let handler = Arc::new(InitTextFreed { text: freed.clone(), notes: self.notes.clone() });
            add("free_initmem", &|request| request.with_handler(handler.clone()));
        }
        if let Some(modules) = &self.modules {
            let returns = ProbeKind::Return { max_active: MAX_ACTIVE };
            add(modules::LOADED, &|request| request.with_handler(Arc::new(Loaded(Arc::clone(modules)))));
            add(modules::LOADED, &|request| ProbeRequest {
                kind: returns,
                ..request.with_handler(Arc::new(Initialised(Arc::clone(modules))))
            });
            add(modules::FREED, &|request| request.with_handler(Arc::new(Freed(Arc::clone(modules)))));
        }
        if verbose {
            add("run_init_process", &|request| request.with_cookie(INIT));
        }
        own
    }

    /// What handlers had to say, since the last call.
    pub fn take_notes(&self) -> Vec<String> {
        let mut notes = std::mem::take(&mut *self.notes.0.lock().unwrap_or_else(PoisonError::into_inner));
        notes.extend(self.modules.iter().flat_map(|modules| modules.take_notes()));
        notes
    }
}
