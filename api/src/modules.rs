//! Probes on modules: found in the guest's memory and armed when the guest loads the module, before any of its code runs;
//! taken out before its memory goes; and armed again when it comes back.

use std::sync::{Arc, Mutex, PoisonError};

use guest::modules::{Module, ModuleError, ModuleFields};
use guest::spec::{Kind, Location};
use probe_core::Gva;
use probe_core::handler::{Handler, Hit, Verdict};
use probe_core::probe::{Counts, Probe, ProbeRequest};

use crate::probes::{Resolved, engine_kind};

/// What the guest calls with a module whose code is in place, before any of it runs.
pub const LOADED: &str = "do_init_module";
/// What the guest calls with a module whose memory it is about to free.
pub const FREED: &str = "free_module";

/// A probe that waits for its module.
#[derive(Debug)]
struct Wanted {
    module: String,
    function: String,
    offset: Option<u64>,
    kind: Kind,
    cookie: u64,
    /// As it was asked for.
    text: String,
}

/// All probes on modules of one run.
#[derive(Debug)]
pub struct ModuleProbes {
    fields: ModuleFields,
    wanted: Vec<Wanted>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// What was armed so far, over all loads.
    armed: Vec<(u64, Arc<Probe>)>,
    /// For the user.
    notes: Vec<String>,
}

impl State {
    /// Once: what goes wrong at one load goes wrong at the next one too.
    fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }
}

impl ModuleProbes {
    /// The probes on modules among `probes`; the cookie of each is its place there.
    pub fn new(fields: ModuleFields, probes: &[Resolved]) -> Self {
        let wanted = (0..).zip(probes).filter_map(|(cookie, probe)| match &probe.spec.place {
            Location::Symbol { module: Some(module), name, offset } => Some(Wanted {
                // The kernel writes a dash in a module's name as an underscore.
                module: module.replace('-', "_"),
                function: name.clone(),
                offset: *offset,
                kind: probe.spec.kind,
                cookie,
                text: probe.text.clone(),
            }),
            _ => None,
        });
        Self { fields, wanted: wanted.collect(), state: Mutex::default() }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the probe with that cookie counted, over all loads of its module.
    pub fn counts(&self, cookie: u64) -> Counts {
        let mut sum = Counts::default();
        for (_, probe) in self.state().armed.iter().filter(|(of, _)| *of == cookie) {
            sum += probe.counts();
        }
        sum
    }

    /// What the user should know, since the last call.
    pub fn take_notes(&self) -> Vec<String> {
        std::mem::take(&mut self.state().notes)
    }

    /// Arms what waits for the module whose `struct module` is at `at`.
    fn load(&self, hit: &Hit<'_>, at: Gva) {
        let read = |gva: Gva, buf: &mut [u8]| hit.read(gva, buf) == buf.len();
        let module = match Module::read(&self.fields, at, &read) {
            Ok(module) => module,
            Err(error) => {
                return self.state().note(format!("A module was loaded that cannot be read: {error}"));
            }
        };
        for wanted in self.wanted.iter().filter(|wanted| wanted.module == module.name) {
            let armed = self
                .request(hit, &module, wanted)
                .and_then(|request| hit.arm(&[request]).map_err(|error| error.to_string()));
            let mut state = self.state();
            match armed {
                Ok(probes) => {
                    state.armed.extend(probes.into_iter().map(|probe| (wanted.cookie, probe)));
                }
                Err(why) => state.note(format!("{}: {why}", wanted.text)),
            }
        }
    }

    fn request(&self, hit: &Hit<'_>, module: &Module, wanted: &Wanted) -> Result<ProbeRequest, String> {
        let read = |gva: Gva, buf: &mut [u8]| hit.read(gva, buf) == buf.len();
        let place = module
            .place(&self.fields, &wanted.function, wanted.offset, &read)
            .map_err(|error: ModuleError| format!("{error} (module {})", module.name))?;
        let place = hit
            .place(place.gva, Some(place.function))
            .ok_or("The instruction is on two pages that lie apart in memory; probe another")?;
        Ok(ProbeRequest { kind: engine_kind(wanted.kind), ..ProbeRequest::new(place) }
            .with_cookie(wanted.cookie))
    }
}

/// Stands on [`LOADED`].
#[derive(Debug)]
pub struct Loaded(pub Arc<ModuleProbes>);

impl Handler for Loaded {
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        if let Some(at) = hit.argument(1) {
            self.0.load(hit, Gva(at));
        }
        Verdict::FILTER
    }
}

/// Stands on the return of [`LOADED`]: the code that ran once is about to be freed.
#[derive(Debug)]
pub struct Initialised(pub Arc<ModuleProbes>);

impl Handler for Initialised {
    fn entry(&self, hit: &mut Hit<'_>) -> bool {
        let (Some(at), read) = (hit.argument(1), |gva: Gva, buf: &mut [u8]| hit.read(gva, buf) == buf.len())
        else {
            return false;
        };
        let module = Module::read(&self.0.fields, Gva(at), &read);
        let range = module.ok().map(|module| module.init_text).filter(|range| !range.is_empty());
        if let (Some(range), Some(call)) = (&range, &mut hit.call) {
            call.data[0] = range.start.0;
            call.data[1] = range.end.0;
        }
        range.is_some()
    }

    fn ret(&self, hit: &mut Hit<'_>) -> Verdict {
        if let Some(call) = &hit.call {
            let range = Gva(call.data[0])..Gva(call.data[1]);
            hit.text_is_freed(&range);
        }
        Verdict::FILTER
    }
}

/// Stands on [`FREED`].
#[derive(Debug)]
pub struct Freed(pub Arc<ModuleProbes>);

impl Handler for Freed {
    fn pre(&self, hit: &mut Hit<'_>) -> Verdict {
        let read = |gva: Gva, buf: &mut [u8]| hit.read(gva, buf) == buf.len();
        let module = hit.argument(1).map(|at| Module::read(&self.0.fields, Gva(at), &read));
        if let Some(Ok(module)) = module {
            hit.text_is_freed(&module.text);
            hit.text_is_freed(&module.init_text);
        }
        Verdict::FILTER
    }
}
