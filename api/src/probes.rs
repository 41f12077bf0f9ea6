//! The probes of the command line: read, and found in the guest.

use std::error::Error;
use std::path::Path;
use std::{fs, io};

use guest::Guest;
use guest::place::{self, Place, Target};
use guest::spec::{Access as SpecAccess, Kind, Location, Spec};
use probe_core::patch::Place as PatchPlace;
use probe_core::probe::{MAX_ACTIVE, ProbeRequest, WatchRequest};
use probe_core::watch::{Access, Watchpoint};

use crate::cli::RunArgs;
use crate::exit::Failure;
use crate::images::chain;

/// More probes than this are not spoken of one by one.
pub const MANY: usize = 50;

/// One probe, found in the guest.
#[derive(Debug)]
pub struct Resolved {
    /// As it was asked for; one of many that a pattern stands for has a text of its own.
    pub text: String,
    /// The same, understood.
    pub spec: Spec,
    /// Where it stands; `None` for one that waits for its module, and for a watchpoint.
    pub place: Option<Place>,
    /// What it watches, if it is a watchpoint.
    pub watched: Option<Watched>,
}

/// A watchpoint in the guest.
#[derive(Debug)]
pub struct Watched {
    name: String,
    pub watchpoint: Watchpoint,
}

impl Resolved {
    /// Finds where `spec` lands, which is not in a module.
    fn find(guest: &Guest, text: &str, spec: Spec) -> Result<Self, Box<dyn Error>> {
        let text = text.to_owned();
        Ok(match guest.target(&spec)? {
            Target::Code(place) => Self { text, spec, place: Some(place), watched: None },
            Target::Data(data) => {
                let watchpoint = Watchpoint::new(data.spot.gva, watch_len(&data), watch_access(data.access))?;
                let name = data.spot.name.unwrap_or_else(|| data.spot.gva.to_string());
                Self { text, spec, place: None, watched: Some(Watched { name, watchpoint }) }
            }
        })
    }

    /// The same probe in a guest that has relocated itself. An address in its image is one as it was linked, since nobody knew
    /// another when it was asked for; any other is taken as it is.
    ///
    /// # Errors
    /// The probe stands nowhere any more.
    pub fn relocated(self, guest: &Guest) -> Result<Self, Failure> {
        if self.waits_for_module() {
            return Ok(self);
        }
        let Self { text, mut spec, .. } = self;
        if let Location::Address(gva) = &mut spec.place {
            let moved = gva.offset(guest.image.relocation.gva_offset);
            if guest.image.gva_range().is_some_and(|range| range.contains(&moved)) {
                *gva = moved;
            }
        }
        Self::find(guest, &text, spec).map_err(|error| Origin::Request.failure(&text, &*error))
    }

    /// What to arm at the start of the run, if anything.
    pub fn request(&self) -> Option<ProbeRequest> {
        let place = patch_place(self.place.as_ref()?);
        Some(ProbeRequest { kind: engine_kind(self.spec.kind), ..ProbeRequest::new(place) })
    }

    /// Whether it is armed when its module is loaded.
    pub fn waits_for_module(&self) -> bool {
        self.place.is_none() && self.watched.is_none()
    }

    /// What to watch, if it is a watchpoint.
    pub fn watch_request(&self) -> Option<WatchRequest> {
        self.watched.as_ref().map(|watched| WatchRequest::new(watched.watchpoint))
    }

    /// Where it stands, for the user: a return probe's is the function.
    pub fn place_name(&self) -> String {
        if let Some(watched) = &self.watched {
            return watched.name.clone();
        }
        let symbol = self.place.as_ref().and_then(|place| place.symbol.as_ref());
        match (self.spec.kind, &self.place, symbol) {
            (Kind::Return { .. }, _, Some(function)) => format!("{function}%return"),
            (_, Some(place), _) => place.to_string(),
            (Kind::Return { .. }, None, _) => format!("{}%return", self.spec.place),
            (_, None, _) => self.spec.place.to_string(),
        }
    }

    /// Whether the argument registers hold a function's arguments at a hit.
    pub fn at_entry(&self) -> bool {
        let first = match (&self.place, &self.spec.place) {
            (Some(place), _) => place.at_entry,
            _ if self.watched.is_some() => false,
            (None, Location::Symbol { offset, .. }) => offset.is_none(),
            (None, Location::Address(_)) => false,
        };
        first && self.spec.kind == Kind::Entry
    }
}

/// x86 cannot wait for reads alone; such a probe has been refused.
fn watch_access(access: SpecAccess) -> Access {
    match access {
        SpecAccess::Read | SpecAccess::ReadWrite => Access::ReadWrite,
        SpecAccess::Write => Access::Write,
        SpecAccess::Execute => Access::Execute,
    }
}

/// Execution is watched at one address.
fn watch_len(data: &place::Watched) -> u8 {
    if data.access == SpecAccess::Execute { 1 } else { data.len }
}

/// What the engine is to stop at.
pub fn engine_kind(kind: Kind) -> probe_core::probe::Kind {
    match kind {
        Kind::Return { maxactive } => {
            let max_active = maxactive.map_or(MAX_ACTIVE, u32::from);
            probe_core::probe::Kind::Return { max_active }
        }
        // Watchpoints are requested in another way.
        Kind::Entry | Kind::Watch { .. } => probe_core::probe::Kind::Instruction,
    }
}

/// The probes of a command line.
#[derive(Debug, Default)]
pub struct Probes {
    /// In the order in which they were asked for.
    pub found: Vec<Resolved>,
    /// What patterns stand for, for the user.
    pub notes: Vec<String>,
    /// The notes tell everything.
    verbose: bool,
}

/// Where the engine puts its int3.
pub fn patch_place(place: &Place) -> PatchPlace {
    PatchPlace { gva: place.gva, gpa: place.gpa, function: place.function.as_ref().map(|range| range.start) }
}

/// Where a probe was asked for, for messages about it.
enum Origin<'a> {
    Request,
    Argument,
    Line { file: &'a str, line: usize },
}

impl Origin<'_> {
    fn failure(&self, text: &str, error: &dyn Error) -> Failure {
        let error = chain(error);
        Failure::Probe(match self {
            Origin::Request => format!("{text}: {error}"),
            Origin::Argument => format!("--probe {text}: {error}"),
            Origin::Line { file, line } => format!("{file}:{line}: {text}: {error}"),
        })
    }
}

/// Finds where each of the probes lands.
pub fn find(guest: &Guest, specs: &[String]) -> Result<Probes, Failure> {
    let mut probes = Probes { verbose: true, ..Probes::default() };
    for text in specs {
        probes.add(guest, text, &Origin::Request)?;
    }
    Ok(probes)
}

/// Finds where every --probe and every line of every --probes lands, behind those of a snapshot. `stdin` is read where a file is `-`.
pub fn resolve(args: &RunArgs, guest: &Guest, saved: &[String], stdin: &str) -> Result<Probes, Failure> {
    let mut probes = Probes { verbose: args.verbose, ..Probes::default() };
    for text in saved {
        probes.add(guest, text, &Origin::Request)?;
    }
    for text in &args.probes {
        probes.add(guest, text, &Origin::Argument)?;
    }
    for path in &args.probe_files {
        let text = if path == Path::new("-") { stdin } else { &read(path)? };
        let file = path.display().to_string();
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if !text.is_empty() && !text.starts_with('#') {
                probes.add(guest, text, &Origin::Line { file: &file, line })?;
            }
        }
    }
    Ok(probes)
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path)
        .map_err(|error| Failure::Usage(format!("--probes {}: cannot be read: {error}", path.display())))
}

/// What standard input holds, if a --probes asks for it.
pub fn read_stdin(args: &RunArgs) -> Result<Option<String>, Failure> {
    if !args.probe_files.iter().any(|path| path == Path::new("-")) {
        return Ok(None);
    }
    io::read_to_string(io::stdin())
        .map(Some)
        .map_err(|error| Failure::Usage(format!("--probes -: standard input cannot be read: {error}")))
}

impl Probes {
    fn add(&mut self, guest: &Guest, text: &str, origin: &Origin<'_>) -> Result<(), Failure> {
        let spec: Spec = text.parse().map_err(|error| origin.failure(text, &error))?;
        if spec.pattern().is_some() {
            return self.add_matches(guest, text, &spec);
        }
        if matches!(&spec.place, Location::Symbol { module: Some(_), .. }) && guest.linux.is_some() {
            self.found.push(Resolved { text: text.to_owned(), spec, place: None, watched: None });
            return Ok(());
        }
        let found = Resolved::find(guest, text, spec).map_err(|error| origin.failure(text, &*error))?;
        self.found.push(found);
        Ok(())
    }

    fn add_matches(&mut self, guest: &Guest, text: &str, spec: &Spec) -> Result<(), Failure> {
        let before = self.found.len();
        let mut refused = 0;
        for (spec, place) in guest.matches(spec) {
            match place {
                Ok(place) => {
                    self.found.push(Resolved {
                        text: spec.to_string(),
                        spec,
                        place: Some(place),
                        watched: None,
                    });
                }
                Err(error) => {
                    refused += 1;
                    if self.verbose {
                        self.notes.push(format!("{text}: Left out: {}", chain(&error)));
                    }
                }
            }
        }
        let count = self.found.len() - before;
        if count == 0 {
            return Err(Failure::Probe(if refused == 0 {
                format!("{text}: No function has such a name; list them with 'vmprobe symbols'")
            } else {
                format!(
                    "{text}: None of the {refused} functions of such names can be probed; 'vmprobe symbols' says why"
                )
            }));
        }
        let left_out = match refused {
            0 => String::new(),
            _ if self.verbose => format!(", {refused} left out"),
            _ => format!(", {refused} left out (--verbose says why)"),
        };
        self.notes.push(format!("{text}: {count} functions{left_out}"));
        Ok(())
    }
}
