//! The text that says where to put a probe.
//!
//! It is the place in the kernel's own probe-event language (Documentation/trace/kprobetrace.rst): an address, a symbol, or
//! a symbol and an offset. Numbers are as the kernel reads them: 0x for hexadecimal, a leading 0 for octal. What else that
//! language has is named when it is refused.

use std::fmt;
use std::str::FromStr;

use probe_core::Gva;

/// Where a probe is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// At this address.
    Address(Gva),
    /// At a symbol.
    Symbol {
        /// Its name.
        name: String,
        /// The distance from it in bytes, if one was given. `sym` asks for the function, `sym+0` for its first byte.
        offset: Option<u64>,
    },
}

/// Why the text says no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Nothing there.
    #[error("The probe is empty; give an address, a symbol, or symbol+offset")]
    Empty,
    /// Something that the kernel's language has and vmprobe has not.
    #[error(
        "In the probe {text:?}, {part} is not supported yet; give an address, a symbol, or symbol+offset"
    )]
    NotSupported {
        /// The whole text.
        text: String,
        /// Which part of it.
        part: String,
    },
    /// Not a number.
    #[error("In the probe {text:?}, {number:?} is not a 64-bit number; write 0x1b or 27")]
    BadNumber {
        /// The whole text.
        text: String,
        /// The part of it that should be one.
        number: String,
    },
    /// `sym-4`, or an offset without a symbol.
    #[error(
        "In the probe {text:?}, the symbol {name:?} is not one; offsets are added with +, and only to a symbol"
    )]
    BadSymbol {
        /// The whole text.
        text: String,
        /// The part of it that should be a symbol.
        name: String,
    },
}

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let mut words = text.split_whitespace();
        let place = words.next().ok_or(SpecError::Empty)?;
        let not_supported = |part: String| SpecError::NotSupported { text: text.to_owned(), part };
        // A definition begins with its type, perhaps followed by the event's name, and is a word of its own.
        let name = place.strip_prefix(['p', 'r', 'f', 't', 'e', 'w', '-']);
        let has_arguments = words.clone().next().is_some();
        if name.is_some_and(|name| name.starts_with(':') || (name.is_empty() && has_arguments)) {
            return Err(not_supported(format!("the event definition {place:?}")));
        }
        if let Some(argument) = words.next() {
            return Err(not_supported(format!("the fetch argument {argument:?}")));
        }
        if let Some((_, modifier)) = place.split_once('%') {
            return Err(not_supported(format!("\"%{modifier}\"")));
        }
        if let Some((module, _)) = place.split_once(':') {
            return Err(not_supported(format!("the module or probe type \"{module}:\"")));
        }
        let number = |number: &str| {
            parse_number(number)
                .ok_or_else(|| SpecError::BadNumber { text: text.to_owned(), number: number.to_owned() })
        };
        if place.starts_with(|first: char| first.is_ascii_digit()) {
            return Ok(Spec::Address(Gva(number(place)?)));
        }
        let (name, offset) = match place.split_once('+') {
            Some((name, offset)) => (name, Some(number(offset)?)),
            None => (place, None),
        };
        if name.is_empty() || name.contains(['-', '@', '(', ')', '"']) {
            return Err(SpecError::BadSymbol { text: text.to_owned(), name: name.to_owned() });
        }
        Ok(Spec::Symbol { name: name.to_owned(), offset })
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Spec::Address(gva) => write!(f, "{gva}"),
            Spec::Symbol { name, offset: None } => f.write_str(name),
            Spec::Symbol { name, offset: Some(offset) } => write!(f, "{name}+{offset:#x}"),
        }
    }
}

/// A number as the kernel's `kstrtoul` reads it with base 0, without a sign.
fn parse_number(text: &str) -> Option<u64> {
    let (digits, radix) = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => (digits, 16),
        None => match text.strip_prefix('0') {
            Some(digits) if !digits.is_empty() => (digits, 8),
            _ => (text, 10),
        },
    };
    // Rust's parser would take a sign.
    if digits.starts_with(['+', '-']) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn symbol(name: &str, offset: Option<u64>) -> Result<Spec, SpecError> {
        Ok(Spec::Symbol { name: name.to_owned(), offset })
    }

    #[test]
    fn addresses_symbols_and_offsets_are_understood() {
        for (text, expected) in [
            ("0xffffffff8134a355", Ok(Spec::Address(Gva(0xffff_ffff_8134_a355)))),
            ("0XFF", Ok(Spec::Address(Gva(0xff)))),
            ("4096", Ok(Spec::Address(Gva(4096)))),
            ("0", Ok(Spec::Address(Gva(0)))),
            ("vfs_read", symbol("vfs_read", None)),
            (" vfs_read ", symbol("vfs_read", None)),
            ("vfs_read+0", symbol("vfs_read", Some(0))),
            ("vfs_read+0x1b", symbol("vfs_read", Some(0x1b))),
            ("vfs_read+27", symbol("vfs_read", Some(27))),
            ("vfs_read+033", symbol("vfs_read", Some(27))),
            ("tcp_check.isra.0", symbol("tcp_check.isra.0", None)),
            ("_ZN5guest4main17h0123456789abcdefE", symbol("_ZN5guest4main17h0123456789abcdefE", None)),
            ("_RNvC6_$LT$x", symbol("_RNvC6_$LT$x", None)),
            ("p", symbol("p", None)),
        ] {
            assert_eq!(text.parse(), expected, "{text:?}");
        }
    }

    #[test]
    fn what_the_kernel_has_and_vmprobe_has_not_is_named() {
        for (text, part) in [
            ("vfs_read%return", "\"%return\""),
            ("vfs_read a=%di", "\"a=%di\""),
            ("vfs_read+5 file=+0($arg2):ustring", "\"file=+0($arg2):ustring\""),
            ("p vfs_read", "\"p\""),
            ("p:mine vfs_read", "\"p:mine\""),
            ("r vfs_read", "\"r\""),
            ("-:mine", "\"-:mine\""),
            ("ext4:ext4_sync_file", "\"ext4:\""),
            ("kprobe:vfs_read", "\"kprobe:\""),
        ] {
            match text.parse::<Spec>() {
                Err(SpecError::NotSupported { part: found, .. }) => assert!(found.ends_with(part), "{found}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_place_is_refused() {
        assert_eq!("".parse::<Spec>(), Err(SpecError::Empty));
        assert_eq!(" \t".parse::<Spec>(), Err(SpecError::Empty));
        for text in
            ["f+", "f+zz", "f+0x", "f+-1", "f++1", "f+1+1", "0x", "09", "0x10000000000000000", "12ab", "0x-1"]
        {
            let error = text.parse::<Spec>();
            assert!(matches!(error, Err(SpecError::BadNumber { .. })), "{text:?}: {error:?}");
        }
        for text in ["+5", "f-4", "@f", "f(1)", "-é", "-𖹀"] {
            let error = text.parse::<Spec>();
            assert!(matches!(error, Err(SpecError::BadSymbol { .. })), "{text:?}: {error:?}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_place_or_an_error_and_a_place_reads_back(text in "\\PC{0,20}|[a-z0x+%:. -]{0,12}") {
            if let Ok(spec) = text.parse::<Spec>() {
                prop_assert_eq!(spec.to_string().parse(), Ok(spec));
            }
        }
    }
}
