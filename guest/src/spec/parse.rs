//! Reads the text of a probe.

use std::str::FromStr;

use glob::Pattern;
use probe_core::Gva;
use probe_core::fetch::{Fetch, RegisterName};

use super::{
    Access, EventName, FetchArgument, Kind, Location, MAX_EVENT_NAME, MAX_FETCH_NAME, MAX_FETCH_TEXT,
    MAX_FETCHES, MAX_MAXACTIVE, MAX_STACK_WORD, Spec, SpecError, SpecErrorKind as Error, is_pattern,
};

/// What is wrong, and where: bytes from the start of the text.
type Parsed<T> = Result<T, (usize, Error)>;

impl FromStr for Spec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        spec(text).map_err(|(column, kind)| SpecError { text: text.to_owned(), column, kind })
    }
}

/// `0xADDRESS` or `[MODULE:]SYMBOL[+OFFSET]`.
impl FromStr for Location {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        location(Word { text, column: 0 }).map_err(|(column, kind)| SpecError {
            text: text.to_owned(),
            column,
            kind,
        })
    }
}

/// A word of the text.
#[derive(Clone, Copy)]
struct Word<'a> {
    text: &'a str,
    /// Bytes before it.
    column: usize,
}

impl<'a> Word<'a> {
    /// The rest of the word from a byte on.
    fn from(self, at: usize) -> Word<'a> {
        Word { text: self.text.get(at..).unwrap_or_default(), column: self.column + at }
    }

    /// The word before and behind the first `separator`.
    fn split(self, separator: char) -> Option<(Word<'a>, Word<'a>)> {
        let at = self.text.find(separator)?;
        let before = Word { text: &self.text[..at], column: self.column };
        Some((before, self.from(at + separator.len_utf8())))
    }

    fn error<T>(self, kind: Error) -> Parsed<T> {
        Err((self.column, kind))
    }

    fn no_place<T>(self, reason: &'static str) -> Parsed<T> {
        self.error(Error::BadProbeAddr(reason))
    }

    fn not_supported<T>(self, what: &str) -> Parsed<T> {
        self.error(Error::NotSupported(format!("{what} {:?}", self.text)))
    }
}

fn words(text: &str) -> impl Iterator<Item = Word<'_>> {
    let start = text.as_ptr().addr();
    text.split_whitespace().map(move |word| Word { text: word, column: word.as_ptr().addr() - start })
}

fn spec(text: &str) -> Parsed<Spec> {
    let mut words = words(text).peekable();
    let Some(first) = words.next() else { return Err((0, Error::Empty)) };
    let next = words.peek().map(|word| word.text);
    let (definition, place) = if is_definition(first.text, next) {
        let definition = Definition::parse(first)?;
        let Some(place) = words.next() else { return Err((text.trim_end().len(), Error::NoPlace)) };
        (definition, place)
    } else {
        (Definition::default(), first)
    };
    let (kind, place) = match definition.letter {
        Letter::Watch => watch(place)?,
        Letter::Probe | Letter::Return => {
            let (location, has_suffix) = with_suffix(place)?;
            if definition.letter == Letter::Return || has_suffix {
                (Kind::Return { maxactive: definition.maxactive }, function(location, place)?)
            } else {
                (Kind::Entry, location)
            }
        }
    };
    let mut fetches: Vec<FetchArgument> = Vec::new();
    for word in words {
        if fetches.len() == MAX_FETCHES {
            return word.error(Error::TooManyArgs);
        }
        let fetch = fetch_argument(word, kind, fetches.len())?;
        if fetches.iter().any(|other| other.name == fetch.name) {
            return word.error(Error::UsedArgName);
        }
        fetches.push(fetch);
    }
    Ok(Spec { kind, name: definition.name, place, fetches })
}

/// The types of definitions, `f` being `p`.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Letter {
    #[default]
    Probe,
    Return,
    Watch,
}

/// What stands before a place.
#[derive(Default)]
struct Definition {
    letter: Letter,
    maxactive: Option<u16>,
    name: Option<EventName>,
}

/// Whether the first word of a text is a definition and not a place. Functions may be called `p` and `r8169_open`, and a
/// module `e1000`; a definition has a name, or is a letter and perhaps a number before the place.
pub(super) fn is_definition(word: &str, next: Option<&str>) -> bool {
    let Some(rest) = word.strip_prefix(['p', 'r', 'f', 'w', 't', 'e', '-']) else { return false };
    let is_fetch =
        |word: &str| word.contains('=') || word.starts_with(['%', '$', '@', '+', '-', '\\', '&', '(']);
    match rest.chars().next() {
        None => next.is_some(),
        Some(':') => true,
        Some(digit) => digit.is_ascii_digit() && next.is_some_and(|next| !is_fetch(next)),
    }
}

impl Definition {
    fn parse(word: Word<'_>) -> Parsed<Self> {
        let (head, name) = word.split(':').map_or((word, None), |(head, name)| (head, Some(name)));
        let number = head.from(1);
        let letter = match &head.text[..1] {
            "p" | "f" => Letter::Probe,
            "r" => Letter::Return,
            "w" => Letter::Watch,
            "t" => return word.not_supported("The tracepoint event"),
            "e" => return word.not_supported("The event probe"),
            _ => {
                return word.error(Error::NotSupported(
                    "Deleting an event, of which there is none before a run,".into(),
                ));
            }
        };
        let maxactive = if number.text.is_empty() {
            None
        } else if letter != Letter::Return {
            return number.error(Error::BadMaxactType);
        } else {
            maxactive(number)?
        };
        Ok(Self { letter, maxactive, name: name.map(event_name).transpose()? })
    }
}

/// 0 asks for the default, as in the kernel.
fn maxactive(word: Word<'_>) -> Parsed<Option<u16>> {
    match parse_number(word.text) {
        None => word.error(Error::BadMaxact),
        Some(0) => Ok(None),
        Some(number) => match u16::try_from(number) {
            Ok(number) if number <= MAX_MAXACTIVE => Ok(Some(number)),
            _ => word.error(Error::MaxactTooBig),
        },
    }
}

/// `[GRP/][EVENT]`; a dot is as good as the slash.
fn event_name(word: Word<'_>) -> Parsed<EventName> {
    let (group, event) = match word.split('/').or_else(|| word.split('.')) {
        Some((group, event)) => (Some(group), event),
        None => (None, word),
    };
    if let Some(group) = group {
        check_name(group, [Error::NoGroupName, Error::GroupTooLong, Error::BadGroupName])?;
    }
    if group.is_none() || !event.text.is_empty() {
        check_name(event, [Error::NoEventName, Error::EventTooLong, Error::BadEventName])?;
    }
    let event = Some(event.text.to_owned()).filter(|event| !event.is_empty());
    Ok(EventName { group: group.map(|group| group.text.to_owned()), event })
}

fn check_name(name: Word<'_>, [missing, too_long, bad]: [Error; 3]) -> Parsed<()> {
    match name.text {
        "" => name.error(missing),
        text if text.len() > MAX_EVENT_NAME => name.error(too_long),
        text if !is_identifier(text) => name.error(bad),
        _ => Ok(()),
    }
}

/// Whether C would take it as a name.
fn is_identifier(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_')
        && text.chars().all(|char| char.is_ascii_alphanumeric() || char == '_')
}

/// A place, and whether `%return` stands behind it.
fn with_suffix(word: Word<'_>) -> Parsed<(Location, bool)> {
    match word.split('%') {
        None => Ok((location(word)?, false)),
        Some((place, suffix)) if suffix.text == "return" => Ok((location(place)?, true)),
        Some((_, suffix)) => Err((suffix.column - 1, Error::BadAddrSuffix)),
    }
}

/// The place of a return probe: `sym+0` means the function too.
fn function(location: Location, word: Word<'_>) -> Parsed<Location> {
    match location {
        Location::Symbol { offset: Some(1..), .. } => word.error(Error::BadRetprobe),
        Location::Symbol { module, name, .. } => Ok(Location::Symbol { module, name, offset: None }),
        address @ Location::Address(_) => Ok(address),
    }
}

/// `[r|w|rw|x]@PLACE[:LENGTH]`
fn watch(word: Word<'_>) -> Parsed<(Kind, Location)> {
    let Some((access, watched)) = word.split('@') else { return word.error(Error::BadAccessFmt) };
    let access = match access.text {
        "r" => Access::Read,
        "w" => Access::Write,
        "rw" | "" => Access::ReadWrite,
        "x" => Access::Execute,
        _ => return access.error(Error::BadAccessType),
    };
    let (place, len) = match watched.text.rfind(':').map(|at| (at, watched.from(at + 1))) {
        Some((at, len))
            if len.text.is_empty() || len.text.starts_with(|first: char| first.is_ascii_digit()) =>
        {
            (Word { text: &watched.text[..at], column: watched.column }, Some(len))
        }
        _ => (watched, None),
    };
    let len = match len.map(|len| (len, parse_number(len.text))) {
        // An execution breakpoint has length 1 (Intel SDM vol. 3B, 17.2.4).
        None => {
            if access == Access::Execute {
                1
            } else {
                4
            }
        }
        Some((_, Some(1))) => 1,
        Some((_, Some(len @ (2 | 4 | 8)))) if access != Access::Execute => u8::try_from(len).unwrap_or(8),
        Some((len, _)) => return len.error(Error::BadAccessLen),
    };
    let location = location(place)?;
    if matches!(&location, Location::Symbol { name, .. } if is_pattern(name)) {
        return place.not_supported("Watching all that match");
    }
    Ok((Kind::Watch { access, len }, location))
}

/// `ADDRESS` or `[MODULE:]SYMBOL[+OFFSET]`
fn location(word: Word<'_>) -> Parsed<Location> {
    if word.text.starts_with(|first: char| first.is_ascii_digit()) {
        return match parse_number(word.text) {
            Some(number) => Ok(Location::Address(Gva(number))),
            None => {
                word.no_place("it begins with a digit and is not a 64-bit number; write 0xffffffff81000000")
            }
        };
    }
    let (module, symbol) = match word.split(':') {
        Some((module, symbol)) => (Some(module.text.to_owned()), symbol),
        None => (None, word),
    };
    let (name, offset) = match symbol.text.split_once('+') {
        Some((name, offset)) => match parse_number(offset) {
            Some(offset) => (name, Some(offset)),
            None => return word.no_place("the offset is not a 64-bit number; write 0x1b or 27"),
        },
        None => (symbol.text, None),
    };
    if module.as_deref() == Some("") || name.is_empty() {
        return word.no_place("a name is missing; write SYMBOL, SYMBOL+OFFSET or MODULE:SYMBOL");
    }
    if is_pattern(name) {
        if let Err(error) = Pattern::new(name) {
            return word.no_place(error.msg);
        }
    } else if name.contains('-') {
        return word.no_place("offsets are added with +, and no symbol has a - in its name");
    }
    if name.contains(['@', '(', ')', '"', ':', '=']) {
        return word.no_place("no symbol has such a name");
    }
    Ok(Location::Symbol { module, name: name.to_owned(), offset })
}

/// `[NAME=]SOURCE[:TYPE]`; `index` counts from 0.
fn fetch_argument(word: Word<'_>, kind: Kind, index: usize) -> Parsed<FetchArgument> {
    let (name, body) = match word.split('=') {
        Some((name, body)) => (Some(name), body),
        None => (None, word),
    };
    if body.text.is_empty() {
        return body.error(Error::NoArgBody);
    }
    if body.text.len() > MAX_FETCH_TEXT {
        return body.error(Error::ArgTooLong);
    }
    let name = match name {
        None => format!("arg{}", index + 1),
        Some(name) if name.text.is_empty() => return word.error(Error::NoArgName),
        Some(name) if name.text.len() > MAX_FETCH_NAME => return word.error(Error::ArgNameTooLong),
        Some(name) if !is_identifier(name.text) => return word.error(Error::BadArgName),
        Some(name) => name.text.to_owned(),
    };
    let fetch = match body.text.chars().next() {
        Some('$' | '%') => match body.split(':') {
            Some((source, of_type)) if of_type.text == "x64" => source_of(source, kind)?,
            Some((source, of_type)) => {
                source_of(source, kind)?;
                return of_type.not_supported("The type");
            }
            None => source_of(body, kind)?,
        },
        Some('@' | '+' | '-') => return body.not_supported("Fetching from memory, as in"),
        Some('\\') => return body.not_supported("The constant"),
        Some('(') => return body.not_supported("The cast"),
        Some(first) if first.is_ascii_alphabetic() || first == '_' => {
            return body.not_supported("The parameter by name,");
        }
        _ => return body.error(Error::BadFetchArg),
    };
    Ok(FetchArgument { name, fetch })
}

/// `%REGISTER`, `$argN`, `$retval`, `$stack` or `$stackN`
fn source_of(word: Word<'_>, kind: Kind) -> Parsed<Fetch> {
    if let Some(register) = word.text.strip_prefix('%') {
        return match RegisterName::parse(register) {
            Some(register) => Ok(Fetch::Register(register)),
            None if matches!(register, "cs" | "ss" | "orig_ax") => word.not_supported("The register"),
            None => word.error(Error::BadRegName),
        };
    }
    let number = |digits: &str| {
        let is_number = digits.starts_with(|first: char| first.is_ascii_digit());
        digits.parse::<u64>().ok().filter(|_| is_number)
    };
    match word.text.strip_prefix('$').unwrap_or_default() {
        "stack" => Ok(Fetch::StackAddress),
        "retval" if matches!(kind, Kind::Return { .. }) => Ok(Fetch::ReturnValue),
        "retval" => word.error(Error::RetvalOnProbe),
        "comm" | "COMM" | "current" | "addr" | "value" | "arg*" => word.not_supported("The variable"),
        variable => {
            if let Some(number) = variable.strip_prefix("stack").and_then(number) {
                let word_number = u16::try_from(number).ok().filter(|number| *number <= MAX_STACK_WORD);
                word_number.map(Fetch::StackWord).map_or_else(|| word.error(Error::BadStackNum), Ok)
            } else if let Some(number) = variable.strip_prefix("arg").and_then(number) {
                let argument =
                    u16::try_from(number).ok().filter(|number| (1..=MAX_STACK_WORD).contains(number));
                let Some(argument) = argument.map(Fetch::Argument) else {
                    return word.error(Error::BadArgNum);
                };
                match kind {
                    Kind::Entry => Ok(argument),
                    // The registers at the entry are kept for the return, the stack is not.
                    Kind::Return { .. } if argument.stack_word().is_none() => Ok(argument),
                    Kind::Return { .. } => {
                        word.not_supported("At a return, an argument that was on the stack,")
                    }
                    Kind::Watch { .. } => word.not_supported("At a watchpoint, an argument of a function,"),
                }
            } else {
                word.error(Error::BadVar)
            }
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
