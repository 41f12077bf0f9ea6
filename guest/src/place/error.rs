//! Why a probe cannot be placed, and where else it could be.

use std::fmt;
use std::ops::Range;

use probe_core::Gva;
use probe_core::plan::Refusal;

use super::Spot;
use crate::sites::SiteKind;
use crate::spec::SpecError;

/// The places before and behind a refused one that can be probed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nearest {
    /// The last one before it, in the same function.
    pub before: Option<Spot>,
    /// The first one behind it, in the same function.
    pub behind: Option<Spot>,
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.before, &self.behind) {
            (Some(before), Some(behind)) => write!(f, "the nearest places are {before} and {behind}"),
            (Some(spot), None) | (None, Some(spot)) => write!(f, "the nearest place is {spot}"),
            (None, None) => f.write_str("the function has no other place"),
        }
    }
}

/// Why a probe cannot be placed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// The text itself.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// No such name.
    #[error("There is no symbol {name:?} in the image{}", suggest(nearest))]
    UnknownSymbol {
        /// What was asked for.
        name: String,
        /// What may have been meant, the likeliest first.
        nearest: Vec<String>,
    },
    /// No names at all.
    #[error("There is no symbol {name:?}: the image has no symbols; give an address")]
    NoSymbols {
        /// What was asked for.
        name: String,
    },
    /// Several of that name.
    #[error("The symbol {name:?} stands at {} addresses; give one of them: {}", addresses.len(), list(addresses))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// All of them.
        addresses: Vec<Gva>,
    },
    /// Another function.
    #[error("{name}+{offset:#x} is beyond the end of {name}, which is {size:#x} bytes long{}", that_is(there.as_ref()))]
    BeyondSymbol {
        /// The symbol.
        name: String,
        /// The offset asked for.
        offset: u64,
        /// The symbol's size in bytes.
        size: u64,
        /// What is there instead.
        there: Option<Spot>,
    },
    /// Nothing there.
    #[error("The address {gva} is not in the image{}", covers(image.as_ref()))]
    NotMapped {
        /// The address.
        gva: Gva,
        /// From the image's first to its last address.
        image: Option<Range<Gva>>,
    },
    /// Not code.
    #[error("{spot} is data, not code; probe a function")]
    Data {
        /// The address.
        spot: Spot,
    },
    /// Amid an instruction.
    #[error("No instruction begins at {spot}; {nearest}")]
    NotBoundary {
        /// The address.
        spot: Spot,
        /// The instructions around it.
        nearest: Nearest,
    },
    /// Bytes that are no instruction.
    #[error("{spot} cannot be probed: the bytes at {at} are not a valid instruction")]
    Undecodable {
        /// The address asked for.
        spot: Spot,
        /// Where decoding from the function's start ended.
        at: Gva,
    },
    /// Where ftrace has its hook.
    #[error(
        "{spot} is on the ftrace site at {site}, which the kernel rewrites; probe {behind} behind it, or the function \
         by its plain name"
    )]
    FtraceSite {
        /// The address.
        spot: Spot,
        /// The site's first byte.
        site: Gva,
        /// The first address behind it.
        behind: Spot,
    },
    /// Where the kernel rewrites itself.
    #[error(
        "{spot} is in code that the kernel itself rewrites ({kind} at {start}..{end}), and the probe would be lost; \
         {nearest}"
    )]
    Rewritten {
        /// The address.
        spot: Spot,
        /// Why it is rewritten.
        kind: SiteKind,
        /// First byte that is rewritten.
        start: Gva,
        /// Behind the last.
        end: Gva,
        /// Where else.
        nearest: Nearest,
    },
    /// In a module.
    #[error(
        "{symbol:?} of the module {module:?} is only found when the guest loads the module: 'vmprobe run' of a Linux guest arms it \
         then"
    )]
    Module {
        /// The module's name.
        module: String,
        /// The symbol's.
        symbol: String,
    },
    /// One place was wanted.
    #[error("The pattern {pattern:?} stands for many functions; give one")]
    Pattern {
        /// The pattern.
        pattern: String,
    },
    /// A return probe that stands on no function.
    #[error("{spot} is not the start of a function, which a return probe stands on{}", start_of(function.as_ref()))]
    NotAnEntry {
        /// The address.
        spot: Spot,
        /// The function around it.
        function: Option<Spot>,
    },
    /// Arguments are wanted where they are no longer known.
    #[error(
        "At {spot} the function's arguments are no longer known to be in their registers; fetch registers, or probe the \
         function's start"
    )]
    ArgumentsInside {
        /// The address.
        spot: Spot,
    },
    /// A watchpoint where an instruction was wanted, or the other way round.
    #[error("{spot} is to be watched, which is no place in the guest's code")]
    Watchpoint {
        /// The address.
        spot: Spot,
    },
    /// x86 has no such watchpoint.
    #[error("x86 cannot watch reads alone (Intel SDM vol. 3B, 17.2.4); watch reads and writes with rw@")]
    ReadWatch,
    /// Debug registers watch aligned memory.
    #[error(
        "{spot} is not a multiple of {len}, as the address of {len} watched bytes must be; watch fewer bytes"
    )]
    Misaligned {
        /// The address.
        spot: Spot,
        /// How many bytes were to be watched.
        len: u8,
    },
    /// Not a linear address.
    #[error("{gva} is not a canonical address")]
    NonCanonical {
        /// The address.
        gva: Gva,
    },
    /// Each CPU has its own.
    #[error("{spot} is a variable that each CPU has its own of; give the address of one of them")]
    PerCpu {
        /// Its offset in the per-CPU area, with its name.
        spot: Spot,
    },
    /// The instruction cannot run anywhere but in its place.
    #[error("{spot} cannot be probed: {}; {nearest}", why(refusal))]
    Refused {
        /// The address.
        spot: Spot,
        /// Why.
        refusal: Box<Refusal>,
        /// Where else.
        nearest: Nearest,
    },
    /// `ud2` and its kin.
    #[error(
        "{spot} is an instruction that is invalid on purpose (BUG, WARN or a check), and what handles its trap may look \
         at its bytes; {nearest}"
    )]
    Trap {
        /// The address.
        spot: Spot,
        /// Where else.
        nearest: Nearest,
    },
}

fn suggest(names: &[String]) -> String {
    match names {
        [] => "; list the symbols with 'vmprobe symbols'".to_owned(),
        [name] => format!("; did you mean {name}?"),
        [names @ .., last] => format!("; did you mean {} or {last}?", names.join(", ")),
    }
}

fn list(addresses: &[Gva]) -> String {
    addresses.iter().map(Gva::to_string).collect::<Vec<_>>().join(", ")
}

fn that_is(spot: Option<&Spot>) -> String {
    spot.map(|spot| format!("; that is {spot}")).unwrap_or_default()
}

fn start_of(function: Option<&Spot>) -> String {
    function.map(|function| format!("; the function starts at {function}")).unwrap_or_default()
}

fn why(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Instruction { instruction, reason, .. } => format!("`{instruction}`: {reason}"),
        other => other.to_string(),
    }
}

fn covers(image: Option<&Range<Gva>>) -> String {
    image.map(|image| format!(", which covers {}..{}", image.start, image.end)).unwrap_or_default()
}
