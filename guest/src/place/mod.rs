//! From the text of a probe to the instruction it lands on, or to the reason why it cannot.
//!
//! The checks are those of the kernel's own kprobes (`check_kprobe_address_safe` and `can_probe`), less those that only
//! matter to code running inside the kernel: code that kprobes itself uses can be probed from outside.

mod error;

use std::fmt;
use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};
use probe_core::fetch::Fetch;
use probe_core::plan::{self, Plan, Refusal};
use probe_core::{Gpa, Gva, Vendor};

use crate::Guest;
use crate::image::HIGH_HALF;
use crate::sites::{CALL_LEN, MAX_INSTRUCTION, SiteKind};
use crate::spec::{Access, Kind, Location, Spec, is_pattern};
use crate::symbols::Symbol;

pub use error::{Nearest, PlaceError};

/// How many nearest names an error offers.
const SUGGESTIONS: usize = 3;

/// The 5-byte nop that stands for a call in kernel text.
pub(crate) const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// What a probe stands on.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// An instruction.
    Code(Place),
    /// Memory that is watched.
    Data(Watched),
}

/// Memory that is watched through a debug register: naturally aligned (Intel SDM vol. 3B, 17.2.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Its first byte, with its name.
    pub spot: Spot,
    /// Which accesses.
    pub access: Access,
    /// How many bytes: 1, 2, 4 or 8.
    pub len: u8,
}

/// Where a probe lands.
#[derive(Clone, Debug, PartialEq)]
pub struct Place {
    /// The address of the probed instruction.
    pub gva: Gva,
    /// Where the image loads it. A kernel that moves itself would end this; one entered directly does not.
    pub gpa: Gpa,
    /// The symbol that covers it.
    pub symbol: Option<String>,
    /// The distance from that symbol, or 0.
    pub offset: u64,
    /// From that symbol to its end.
    pub function: Option<Range<Gva>>,
    /// Whether the function is being entered here: at its first instruction, or behind its `endbr64` or ftrace site. The
    /// argument registers hold the arguments, and RSP points at the return address.
    pub at_entry: bool,
    /// The instruction's bytes as they are in the image, 1 to 15 of them.
    pub bytes: Vec<u8>,
    /// The instruction, decoded at its address.
    pub instruction: Instruction,
    /// Whether the kernel's exception table covers the instruction: it may fault and the kernel then goes on elsewhere,
    /// so a fault must be reported at this address.
    pub has_exception_entry: bool,
    /// Whether the kernel frees this code when it has booted. The probe must be gone by then.
    pub freed_after_boot: bool,
    /// What the user should know.
    pub notes: Vec<Note>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.symbol {
            Some(symbol) if self.offset == 0 => f.write_str(symbol),
            Some(symbol) => write!(f, "{symbol}+{:#x}", self.offset),
            None => write!(f, "{}", self.gva),
        }
    }
}

/// An instruction of a function, and what a probe on it would meet.
#[derive(Clone, Debug, PartialEq)]
pub struct Boundary {
    /// Where it begins.
    pub spot: Spot,
    /// The instruction, decoded at its address; invalid if the bytes are none.
    pub instruction: Instruction,
    /// The place, or why it is none.
    pub place: Result<Place, PlaceError>,
}

/// What a user should know about a place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// The probe was moved.
    BehindFtraceSite(Spot),
    /// The code goes away.
    FreedAfterBoot,
    /// No symbol, so the boundary is a matter of trust.
    UncheckedBoundary,
    /// The kernel writes here, but nothing that does anything else.
    Rewritten(SiteKind),
    /// The kernel may redirect the call.
    CallThunk,
    /// A table of rewritten places could not be read.
    UnreadableTable(&'static str),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Note::BehindFtraceSite(spot) => write!(f, "Placed at {spot}, behind the ftrace site"),
            Note::FreedAfterBoot => {
                f.write_str("The kernel frees this code when it has booted, and the probe with it")
            }
            Note::UncheckedBoundary => f.write_str(
                "No symbol covers this address, so it was not checked that an instruction begins there",
            ),
            Note::Rewritten(kind) => {
                write!(f, "The kernel replaces this {kind} when it boots, by something that does the same")
            }
            Note::CallThunk => {
                f.write_str("The kernel redirects this call if it is booted with retbleed=stuff")
            }
            Note::UnreadableTable(table) => write!(
                f,
                "The table {table} has a layout that vmprobe does not know, so it was not checked that the kernel \
                 leaves this instruction alone"
            ),
        }
    }
}

/// An address with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spot {
    /// The address.
    pub gva: Gva,
    /// Symbol and offset, `vfs_read+0x5` for one.
    pub name: Option<String>,
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => write!(f, "{name} ({})", self.gva),
            None => write!(f, "{}", self.gva),
        }
    }
}

/// What a place was asked for as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// As a function, by its plain name: behind the ftrace site is meant too.
    Function,
    /// As this very byte.
    Byte,
}

impl Guest {
    /// The instruction that the probe which `text` describes lands on. See [`crate::spec`] for the language.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn place(&self, text: &str) -> Result<Place, PlaceError> {
        match self.target(&text.parse()?)? {
            Target::Code(place) => Ok(place),
            Target::Data(watched) => Err(PlaceError::Watchpoint { spot: watched.spot }),
        }
    }

    /// What the probe that `spec` describes stands on. A pattern stands on many: [`Guest::matches`].
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn target(&self, spec: &Spec) -> Result<Target, PlaceError> {
        let (gva, symbol, offset) = self.locate(&spec.place)?;
        match (spec.kind, symbol) {
            (Kind::Watch { access, len }, _) => {
                self.watched(gva.offset(offset.unwrap_or(0)), symbol, access, len).map(Target::Data)
            }
            (Kind::Entry | Kind::Return { .. }, Some(symbol)) => {
                self.place_in(symbol, offset, spec).map(Target::Code)
            }
            (Kind::Entry | Kind::Return { .. }, None) => {
                // A return probe means the function, whose first byte may be on its ftrace site.
                let asked =
                    if matches!(spec.kind, Kind::Return { .. }) { Asked::Function } else { Asked::Byte };
                let place = self.place_at(gva, asked, self.symbols.at(gva).map(|(symbol, _)| symbol))?;
                self.suits(place, spec).map(Target::Code)
            }
        }
    }

    /// The address that `location` stands for, whatever is there.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn address(&self, location: &Location) -> Result<Gva, PlaceError> {
        let (gva, _, offset) = self.locate(location)?;
        Ok(gva.offset(offset.unwrap_or(0)))
    }

    /// The address or the symbol that `location` names, with its distance from there.
    fn locate<'a>(
        &'a self,
        location: &'a Location,
    ) -> Result<(Gva, Option<Symbol<'a>>, Option<u64>), PlaceError> {
        match location {
            Location::Address(gva) => Ok((*gva, None, None)),
            Location::Symbol { module: Some(module), name, .. } => {
                Err(PlaceError::Module { module: module.clone(), symbol: name.clone() })
            }
            Location::Symbol { name, .. } if is_pattern(name) => {
                Err(PlaceError::Pattern { pattern: name.clone() })
            }
            Location::Symbol { name, offset, .. } => {
                let symbol = self.symbol(name)?;
                Ok((symbol.gva, Some(symbol), *offset))
            }
        }
    }

    /// The place for `spec` at a symbol, whatever the symbol that the spec names.
    pub(crate) fn place_in(
        &self,
        symbol: Symbol<'_>,
        offset: Option<u64>,
        spec: &Spec,
    ) -> Result<Place, PlaceError> {
        let gva = symbol.gva.offset(offset.unwrap_or(0));
        if let Some(offset) = offset.filter(|offset| *offset > 0 && *offset >= symbol.size) {
            let there = Some(self.spot(gva)).filter(|spot| spot.name.is_some());
            let (name, size) = (symbol.name.to_owned(), symbol.size);
            return Err(PlaceError::BeyondSymbol { name, offset, size, there });
        }
        let asked = if offset.is_some() { Asked::Byte } else { Asked::Function };
        self.suits(self.place_at(gva, asked, Some(symbol))?, spec)
    }

    /// Whether what `spec` wants to see is there at a place.
    fn suits(&self, place: Place, spec: &Spec) -> Result<Place, PlaceError> {
        if place.at_entry {
            return Ok(place);
        }
        let spot = self.spot(place.gva);
        if matches!(spec.kind, Kind::Return { .. }) {
            let function = place.function.as_ref().map(|function| self.spot(function.start));
            return Err(PlaceError::NotAnEntry { spot, function });
        }
        if spec.fetches.iter().any(|argument| matches!(argument.fetch, Fetch::Argument(_))) {
            return Err(PlaceError::ArgumentsInside { spot });
        }
        Ok(place)
    }

    fn watched(
        &self,
        gva: Gva,
        symbol: Option<Symbol<'_>>,
        access: Access,
        len: u8,
    ) -> Result<Watched, PlaceError> {
        let spot = if symbol.is_some() { spot(gva, symbol) } else { self.spot(gva) };
        // The per-CPU template is linked at 0 (arch/x86/kernel/vmlinux.lds.S).
        if self.image.kind.is_linux() && symbol.is_some() && gva.0 < HIGH_HALF {
            return Err(PlaceError::PerCpu { spot });
        }
        if access == Access::Read {
            return Err(PlaceError::ReadWatch);
        }
        if !gva.0.is_multiple_of(u64::from(len)) {
            return Err(PlaceError::Misaligned { spot, len });
        }
        // With five levels of page tables, which need not be on, 57 bits of an address are used and not 48.
        if !matches!(gva.0.cast_signed() >> 56, 0 | -1) {
            return Err(PlaceError::NonCanonical { gva });
        }
        Ok(Watched { spot, access, len })
    }

    /// The symbol of that name. Data does not make the name of a function ambiguous.
    fn symbol<'a>(&'a self, name: &'a str) -> Result<Symbol<'a>, PlaceError> {
        let mut found: Vec<Symbol<'_>> = self.symbols.lookup(name).collect();
        if found.iter().any(|symbol| symbol.kind.is_code()) {
            found.retain(|symbol| symbol.kind.is_code());
        }
        found.dedup_by_key(|symbol| symbol.gva);
        match found.as_slice() {
            [symbol] => Ok(*symbol),
            [] if self.symbols.is_empty() => Err(PlaceError::NoSymbols { name: name.to_owned() }),
            [] => {
                let nearest =
                    self.symbols.nearest(name, SUGGESTIONS).into_iter().map(str::to_owned).collect();
                Err(PlaceError::UnknownSymbol { name: name.to_owned(), nearest })
            }
            several => Err(PlaceError::Ambiguous {
                name: name.to_owned(),
                addresses: several.iter().map(|symbol| symbol.gva).collect(),
            }),
        }
    }

    /// The place at `gva`; `named` is the symbol it was asked for by.
    pub(crate) fn place_at(
        &self,
        gva: Gva,
        asked: Asked,
        named: Option<Symbol<'_>>,
    ) -> Result<Place, PlaceError> {
        let symbol = named.or_else(|| self.symbols.at(gva).map(|(symbol, _)| symbol));
        let spot = |gva| spot(gva, symbol);
        // The addresses of per-CPU variables are not mapped either, but that is not what is wrong with them.
        if symbol.is_some_and(|symbol| !symbol.kind.is_code()) {
            return Err(PlaceError::Data { spot: spot(gva) });
        }
        if self.image.gva_to_gpa(gva).is_none() {
            return Err(PlaceError::NotMapped { gva, image: self.image.gva_range() });
        }
        if !self.image.is_code(gva) {
            return Err(PlaceError::Data { spot: spot(gva) });
        }
        let mut at = gva;
        let mut notes = Vec::new();
        if let Some(site) = self.ftrace_site(gva, symbol) {
            let behind = spot(site.end);
            if asked == Asked::Function && symbol.is_some_and(|symbol| symbol.gva == gva) {
                at = site.end;
                notes.push(Note::BehindFtraceSite(behind));
            } else if site.contains(&gva) {
                return Err(PlaceError::FtraceSite { spot: spot(gva), site: site.start, behind });
            }
        }
        let nearest = |at| self.nearest_places(at, symbol);
        let mut place = self.place_on(self.instruction_at(at, symbol)?, symbol, nearest)?;
        place.notes.splice(..0, notes);
        Ok(place)
    }

    /// The place of an instruction, which is known to begin where it was decoded and not on an ftrace site.
    fn place_on(
        &self,
        instruction: Instruction,
        symbol: Option<Symbol<'_>>,
        nearest: impl Fn(Gva) -> Nearest,
    ) -> Result<Place, PlaceError> {
        let spot = |gva| spot(gva, symbol);
        let mut notes = Vec::new();
        let at = Gva(instruction.ip());
        let range = at..at.offset(instruction.len() as u64);
        for site in self.sites.overlapping(range.clone()) {
            match site.kind {
                SiteKind::Ftrace => {}
                kind if kind.keeps_meaning() => notes.push(Note::Rewritten(kind)),
                kind => {
                    let Range { start, end } = site.range();
                    let nearest = nearest(at);
                    return Err(PlaceError::Rewritten { spot: spot(at), kind, start, end, nearest });
                }
            }
        }
        if is_trap(&instruction) {
            return Err(PlaceError::Trap { spot: spot(at), nearest: nearest(at) });
        }
        // A site that begins a function ends in it, so this can only fail for an image that lies about its ftrace sites.
        let gpa = self.image.gva_to_gpa(at);
        let bytes = self.image.read(at, instruction.len());
        let (Some(gpa), Some(bytes)) = (gpa, bytes) else {
            return Err(PlaceError::NotMapped { gva: at, image: self.image.gva_range() });
        };

        if let Some(refusal) = refusal(bytes, at) {
            return Err(PlaceError::Refused {
                spot: spot(at),
                refusal: Box::new(refusal),
                nearest: nearest(at),
            });
        }

        let freed = self.linux.as_ref().and_then(|linux| linux.freed_after_boot.as_ref());
        let freed_after_boot = freed.is_some_and(|freed| freed.contains(&at));
        if freed_after_boot {
            notes.push(Note::FreedAfterBoot);
        }
        if symbol.is_none() {
            notes.push(Note::UncheckedBoundary);
        }
        if self.sites.has_call_thunks() && instruction.code() == Code::Call_rel32_64 {
            notes.push(Note::CallThunk);
        }
        notes.extend(self.sites.unreadable().iter().map(|table| Note::UnreadableTable(table)));
        Ok(Place {
            gva: at,
            gpa,
            symbol: symbol.map(|symbol| symbol.name.to_owned()),
            offset: symbol.map_or(0, |symbol| at.0 - symbol.gva.0),
            function: symbol.map(|symbol| symbol.range()),
            at_entry: symbol.is_some_and(|symbol| self.is_entry(at, symbol)),
            bytes: bytes.to_vec(),
            instruction,
            has_exception_entry: self.sites.has_exception_entry(at),
            freed_after_boot,
            notes,
        })
    }

    /// Every instruction of the function that `name` names and what a probe on it would meet, without what fills the space
    /// behind the function's end.
    ///
    /// # Errors
    /// If no single function has that name.
    pub fn boundaries(&self, name: &str) -> Result<Vec<Boundary>, PlaceError> {
        let symbol = self.symbol(name)?;
        if !symbol.kind.is_code() || !self.image.is_code(symbol.gva) {
            return Err(PlaceError::Data { spot: spot(symbol.gva, Some(symbol)) });
        }
        let site = self.ftrace_site(symbol.gva, Some(symbol));
        let end = self.end_of_code(symbol);
        let usable = self.usable(symbol);
        let nearest = |at| self.nearest_of(&usable, at, symbol);
        let boundary = |instruction: Instruction| {
            let at = Gva(instruction.ip());
            let spot = |gva| spot(gva, Some(symbol));
            let place = match &site {
                _ if instruction.is_invalid() => Err(PlaceError::Undecodable { spot: spot(at), at }),
                Some(site) if site.contains(&at) => {
                    Err(PlaceError::FtraceSite { spot: spot(at), site: site.start, behind: spot(site.end) })
                }
                _ => self.place_on(instruction, Some(symbol), nearest),
            };
            Boundary { spot: spot(at), instruction, place }
        };
        Ok(self
            .decode_from(symbol.gva)
            .take_while(|instruction| instruction.ip() < end.0)
            .map(boundary)
            .collect())
    }

    /// Where the padding begins behind a function's end, or the function's end where there is none.
    fn end_of_code(&self, symbol: Symbol<'_>) -> Gva {
        let range = symbol.range();
        let mut end = range.end;
        // A symbol may mark nothing but padding.
        let mut may_end = true;
        for instruction in self.decode_from(symbol.gva) {
            if !range.contains(&Gva(instruction.ip())) {
                break;
            }
            if !may_be_padding(&instruction) {
                may_end = never_goes_on(&instruction) || is_trap(&instruction);
                end = range.end;
            } else if may_end {
                may_end = false;
                end = Gva(instruction.ip());
            }
        }
        end
    }

    /// The ftrace site that holds `gva` or begins the function at `symbol`.
    fn ftrace_site(&self, gva: Gva, symbol: Option<Symbol<'_>>) -> Option<Range<Gva>> {
        let listed = |range| self.sites.overlapping(range).find(|site| site.kind == SiteKind::Ftrace);
        if let Some(site) = listed(gva..gva.offset(1)) {
            return Some(site.range());
        }
        let linux = self.linux.as_ref()?;
        let entry = symbol?.gva;
        let first = self.decode(entry)?;
        let start = if first.code() == Code::Endbr64 { entry.offset(4) } else { entry };
        let site = start..start.offset(u64::from(CALL_LEN));
        let is_listed = listed(start..start.offset(1)).is_some_and(|listed| listed.start == start);
        let calls_fentry = self.decode(start).is_some_and(|call| {
            call.code() == Code::Call_rel32_64 && Some(Gva(call.near_branch64())) == linux.fentry
        });
        let is_nop = !self.sites.has_ftrace_table() && self.image.read(start, NOP5.len()) == Some(&NOP5);
        (is_listed || calls_fentry || is_nop).then_some(site)
    }

    /// Whether a function is being entered at `gva`.
    fn is_entry(&self, gva: Gva, function: Symbol<'_>) -> bool {
        let entry = function.gva;
        let behind_endbr = || {
            let first = self.decode(entry);
            first.is_some_and(|first| first.code() == Code::Endbr64 && first.next_ip() == gva.0)
        };
        let behind_site = || self.ftrace_site(entry, Some(function)).is_some_and(|site| site.end == gva);
        gva == entry || behind_endbr() || behind_site()
    }

    /// The instruction at `gva`, which begins there if its function is decoded from the start.
    fn instruction_at(&self, gva: Gva, symbol: Option<Symbol<'_>>) -> Result<Instruction, PlaceError> {
        let start = symbol.map_or(gva, |symbol| symbol.gva);
        for instruction in self.decode_from(start) {
            let at = Gva(instruction.ip());
            if instruction.is_invalid() {
                return Err(PlaceError::Undecodable { spot: spot(gva, symbol), at });
            }
            if at == gva {
                return Ok(instruction);
            }
            let next = Gva(instruction.next_ip());
            if next > gva {
                let nearest = Nearest { before: Some(spot(at, symbol)), behind: Some(spot(next, symbol)) };
                return Err(PlaceError::NotBoundary { spot: spot(gva, symbol), nearest });
            }
        }
        Err(PlaceError::Undecodable { spot: spot(gva, symbol), at: gva })
    }

    /// The instructions around `gva` in its function that a probe can be put on.
    fn nearest_places(&self, gva: Gva, symbol: Option<Symbol<'_>>) -> Nearest {
        symbol.map(|symbol| self.nearest_of(&self.usable(symbol), gva, symbol)).unwrap_or_default()
    }

    /// The instructions of a function that a probe can be put on, by address.
    fn usable(&self, symbol: Symbol<'_>) -> Vec<Gva> {
        let mut usable = Vec::new();
        let mut is_padding = false;
        for instruction in self.decode_from(symbol.gva) {
            let at = Gva(instruction.ip());
            if instruction.is_invalid() || !symbol.range().contains(&at) {
                break;
            }
            // What fills the space behind a function's end is never run.
            is_padding = may_be_padding(&instruction) && is_padding;
            let range = at..Gva(instruction.next_ip());
            let is_usable = !is_padding
                && !is_trap(&instruction)
                && self.sites.overlapping(range).all(|site| site.kind.keeps_meaning())
                && !matches!(plan::plan(&instruction), Plan::Refuse(_));
            if is_usable {
                usable.push(at);
            }
            is_padding |= never_goes_on(&instruction);
        }
        usable
    }

    /// The places around `gva` among the `usable` ones of its function.
    fn nearest_of(&self, usable: &[Gva], gva: Gva, symbol: Symbol<'_>) -> Nearest {
        let spot = |at: Gva| {
            let mut spot = spot(at, Some(symbol));
            if at == symbol.gva && self.ftrace_site(at, Some(symbol)).is_some() {
                // The plain name would be placed behind the ftrace site.
                spot.name = Some(format!("{}+0", symbol.name));
            }
            spot
        };
        let behind = usable.partition_point(|at| *at <= gva);
        let before = usable.partition_point(|at| *at < gva);
        Nearest {
            before: before.checked_sub(1).map(|at| spot(usable[at])),
            behind: usable.get(behind).map(|at| spot(*at)),
        }
    }

    fn decode(&self, gva: Gva) -> Option<Instruction> {
        let bytes = self.image.read_up_to(gva, MAX_INSTRUCTION)?;
        let instruction = Decoder::with_ip(64, bytes, gva.0, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    }

    /// Instruction after instruction from `start`, to the end of the code around it.
    fn decode_from(&self, start: Gva) -> impl Iterator<Item = Instruction> {
        let code = self.image.code_range(start);
        let len = code.and_then(|code| usize::try_from(code.end.0 - start.0).ok()).unwrap_or(0);
        let bytes = self.image.read_up_to(start, len).unwrap_or_default();
        let mut decoder = Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE);
        std::iter::from_fn(move || decoder.can_decode().then(|| decoder.decode()))
    }

    /// The address with the name of the symbol that covers it.
    #[must_use]
    pub fn spot(&self, gva: Gva) -> Spot {
        spot(gva, self.symbols.at(gva).map(|(symbol, _)| symbol))
    }
}

/// The address named by a symbol before it.
fn spot(gva: Gva, symbol: Option<Symbol<'_>>) -> Spot {
    let name = symbol.map(|symbol| match gva.0.wrapping_sub(symbol.gva.0) {
        0 => symbol.name.to_owned(),
        offset => format!("{}+{offset:#x}", symbol.name),
    });
    Spot { gva, name }
}

/// Why the instruction at `gva` cannot run out of its place, if it cannot.
fn refusal(bytes: &[u8], gva: Gva) -> Option<Refusal> {
    match plan::decode(bytes, gva, Vendor::Unknown).map(|instruction| plan::plan(&instruction)) {
        Ok(Plan::Refuse(refusal)) | Err(refusal) => Some(refusal),
        Ok(_) => None,
    }
}

/// Whether the instruction is one that fills space.
fn may_be_padding(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Nop | Mnemonic::Int3)
}

/// Whether what stands behind the instruction is only reached by a branch.
fn never_goes_on(instruction: &Instruction) -> bool {
    matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
    )
}

/// Whether the instruction is one that exists to raise #UD.
fn is_trap(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2)
}

#[cfg(test)]
mod tests;
