//! The text that says what to probe.
//!
//! It is the kernel's own probe-event language (Documentation/trace/kprobetrace.rst, and wprobetrace.rst as proposed for
//! watchpoints):
//!
//! ```text
//! PLACE[%return] [FETCH]...                  a place alone is enough
//! p[:[GRP/][EVENT]] PLACE[%return] [FETCH]...
//! r[MAXACTIVE][:[GRP/][EVENT]] PLACE [FETCH]...
//! f[:[GRP/][EVENT]] PLACE[%return] [FETCH]...
//! w[:[GRP/][EVENT]] [r|w|rw|x]@PLACE[:LENGTH] [FETCH]...
//!
//! PLACE   0xADDRESS or [MODULE:]SYMBOL[+OFFSET]; SYMBOL may be a pattern of `*`, `?`, `[a-z]`, `[!a-z]`
//! FETCH   [NAME=]%REGISTER, $argN, $retval, $stack or $stackN
//! ```
//!
//! Numbers are as the kernel reads them: 0x for hexadecimal, a leading 0 for octal. What else that language has is named
//! when it is refused. Errors have the kernel's names and columns (`error_log` in its tracefs).

mod error;
mod parse;
#[cfg(test)]
mod tests;

use std::fmt;

use glob::Pattern;
use probe_core::Gva;
use probe_core::fetch::Fetch;

pub use error::{SpecError, SpecErrorKind};

/// The most fetch arguments of a probe (`MAX_TRACE_ARGS`).
pub const MAX_FETCHES: usize = 128;
/// The most active calls that a return probe may follow (`KRETPROBE_MAXACTIVE_MAX`).
pub const MAX_MAXACTIVE: u16 = 4096;
/// The longest event or group name (`MAX_EVENT_NAME_LEN`).
const MAX_EVENT_NAME: usize = 64;
/// The longest name of a fetch argument (`MAX_ARG_NAME_LEN`).
const MAX_FETCH_NAME: usize = 32;
/// The longest fetch argument, without its name (`MAX_ARGSTR_LEN`).
const MAX_FETCH_TEXT: usize = 63;
/// The highest N of `$argN` and `$stackN`: 8-byte words of a kernel stack (`PARAM_MAX_STACK`).
const MAX_STACK_WORD: u16 = 2048;

/// A probe as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spec {
    /// What is to be seen there.
    pub kind: Kind,
    /// The event's name, if one was given.
    pub name: Option<EventName>,
    /// Where.
    pub place: Location,
    /// What to fetch at a hit, in order; the names differ.
    pub fetches: Vec<FetchArgument>,
}

/// What a probe is to see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An instruction about to run.
    Entry,
    /// A function's return.
    Return {
        /// How many calls may be active at once, 1..=[`MAX_MAXACTIVE`], if it was given.
        maxactive: Option<u16>,
    },
    /// An access to memory.
    Watch {
        /// Which accesses.
        access: Access,
        /// How many bytes: 1, 2, 4 or 8.
        len: u8,
    },
}

/// Accesses to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Reads and writes.
    ReadWrite,
    /// Execution.
    Execute,
}

/// A name that the user gave an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventName {
    /// The group, a C identifier.
    pub group: Option<String>,
    /// The event, a C identifier.
    pub event: Option<String>,
}

/// Where a probe is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// At this address.
    Address(Gva),
    /// At a symbol.
    Symbol {
        /// The module that has it; `None` is the kernel itself.
        module: Option<String>,
        /// Its name, or a pattern of names.
        name: String,
        /// The distance from it in bytes, if one was given. `sym` asks for the function, `sym+0` for its first byte.
        offset: Option<u64>,
    },
}

/// A value to fetch at a hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchArgument {
    /// Its name, a C identifier; `arg1`, `arg2`, ... by position where none was given.
    pub name: String,
    /// Where it comes from.
    pub fetch: Fetch,
}

impl Spec {
    /// A probe at `place` without a name and without fetch arguments.
    #[must_use]
    pub fn at(place: Location) -> Self {
        Self { kind: Kind::Entry, name: None, place, fetches: Vec::new() }
    }

    /// The pattern, if the symbol is one.
    #[must_use]
    pub fn pattern(&self) -> Option<Pattern> {
        match &self.place {
            Location::Symbol { name, .. } if is_pattern(name) => Pattern::new(name).ok(),
            _ => None,
        }
    }

    /// The event's group: the one given, or the kernel's.
    #[must_use]
    pub fn group(&self) -> &str {
        let given = self.name.as_ref().and_then(|name| name.group.as_deref());
        given.unwrap_or(if matches!(self.kind, Kind::Watch { .. }) { "wprobes" } else { "kprobes" })
    }

    /// The event's name: the one given, or one made as the kernel makes it: `p_SYMBOL_OFFSET`, `r_SYMBOL_0`.
    #[must_use]
    pub fn event(&self) -> String {
        if let Some(given) = self.name.as_ref().and_then(|name| name.event.clone()) {
            return given;
        }
        let letter = match self.kind {
            Kind::Entry => 'p',
            Kind::Return { .. } => 'r',
            Kind::Watch { .. } => 'w',
        };
        let name = match &self.place {
            Location::Address(gva) => format!("{letter}_{gva}"),
            Location::Symbol { module, name, offset } => {
                let module = module.as_ref().map(|module| format!("{module}_")).unwrap_or_default();
                format!("{letter}_{module}{name}_{}", offset.unwrap_or(0))
            }
        };
        let plain = |char: char| if char.is_ascii_alphanumeric() { char } else { '_' };
        name.chars().map(plain).take(MAX_EVENT_NAME).collect()
    }
}

/// Whether the name of a symbol is a pattern.
pub(crate) fn is_pattern(name: &str) -> bool {
    name.contains(['*', '?', '['])
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Read => "r",
            Access::Write => "w",
            Access::ReadWrite => "rw",
            Access::Execute => "x",
        })
    }
}

impl fmt::Display for EventName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(group) = &self.group {
            write!(f, "{group}/")?;
        }
        f.write_str(self.event.as_deref().unwrap_or_default())
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Address(gva) => write!(f, "{gva}"),
            Location::Symbol { module, name, offset } => {
                if let Some(module) = module {
                    write!(f, "{module}:")?;
                }
                f.write_str(name)?;
                offset.map_or(Ok(()), |offset| write!(f, "+{offset:#x}"))
            }
        }
    }
}

impl fmt::Display for FetchArgument {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.fetch)
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match self.kind {
            Kind::Return { maxactive: None } if self.name.is_none() => format!("{}%return", self.place),
            Kind::Watch { access, len } => format!("{access}@{}:{len}", self.place),
            Kind::Entry | Kind::Return { .. } => self.place.to_string(),
        };
        let first_fetch = self.fetches.first().map(ToString::to_string);
        let definition = match self.kind {
            Kind::Watch { .. } => Some("w".to_owned()),
            Kind::Return { maxactive: Some(maxactive) } => Some(format!("r{maxactive}")),
            Kind::Return { maxactive: None } if self.name.is_some() => Some("r".to_owned()),
            // A place that would be read as a definition must not stand first.
            _ if self.name.is_some() || parse::is_definition(&place, first_fetch.as_deref()) => {
                Some("p".to_owned())
            }
            _ => None,
        };
        if let Some(definition) = definition {
            f.write_str(&definition)?;
            if let Some(name) = &self.name {
                write!(f, ":{name}")?;
            }
            f.write_str(" ")?;
        }
        f.write_str(&place)?;
        self.fetches.iter().try_for_each(|fetch| write!(f, " {fetch}"))
    }
}
