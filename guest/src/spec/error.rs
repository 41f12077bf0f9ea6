//! What is wrong with the text of a probe, and where.

use std::fmt;

use super::{MAX_EVENT_NAME, MAX_FETCH_NAME, MAX_FETCH_TEXT, MAX_FETCHES, MAX_MAXACTIVE, MAX_STACK_WORD};

/// Why a text describes no probe. Shows the text with a caret under the place, as the kernel's `error_log` does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecError {
    /// The whole text.
    pub text: String,
    /// Where it is wrong: bytes from the start of the text.
    pub column: usize,
    /// What is wrong.
    pub kind: SpecErrorKind,
}

impl std::error::Error for SpecError {}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.text.get(..self.column).unwrap_or(&self.text).chars().count();
        // Every character takes one column, whatever it is.
        let shown: String =
            self.text.chars().map(|char| if char.is_control() { ' ' } else { char }).collect();
        write!(f, "{} ({})\n  {shown}\n  {:before$}^", self.kind, self.kind.name(), "")
    }
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecErrorKind {
    /// Nothing there.
    #[error("The probe is empty; give an address, a symbol, or symbol+offset")]
    Empty,
    /// A definition without a place.
    #[error("The definition has no place; give an address, a symbol, or symbol+offset behind it")]
    NoPlace,
    /// Something that the kernel's language has and vmprobe has not.
    #[error("{0} is not supported yet")]
    NotSupported(String),
    /// A number behind `p`, `f` or `w`.
    #[error("Only r takes a number of active calls; for a symbol of this name write p and a space before it")]
    BadMaxactType,
    /// Something else behind `r`.
    #[error(
        "The number of active calls is not a number; for a symbol of this name write p and a space before it"
    )]
    BadMaxact,
    /// More than [`super::MAX_MAXACTIVE`].
    #[error("The number of active calls is too big; give at most {MAX_MAXACTIVE}")]
    MaxactTooBig,
    /// `p:/event`.
    #[error("The group has no name; drop the slash or give one")]
    NoGroupName,
    /// Longer than 64 characters.
    #[error("The group's name is too long; give at most {MAX_EVENT_NAME} characters")]
    GroupTooLong,
    /// Not a C identifier.
    #[error("The group's name is not a C identifier; use letters, digits and _")]
    BadGroupName,
    /// `p: place`.
    #[error("The event has no name; drop the colon or give one")]
    NoEventName,
    /// Longer than 64 characters.
    #[error("The event's name is too long; give at most {MAX_EVENT_NAME} characters")]
    EventTooLong,
    /// Not a C identifier.
    #[error("The event's name is not a C identifier; use letters, digits and _")]
    BadEventName,
    /// No address and no symbol. With the reason.
    #[error("This is no place: {0}")]
    BadProbeAddr(&'static str),
    /// Something else than `%return`.
    #[error("Only %return may stand behind a place")]
    BadAddrSuffix,
    /// A return probe with an offset.
    #[error("A return probe stands on a function, not inside; drop the offset")]
    BadRetprobe,
    /// A watchpoint without `@`.
    #[error("The watchpoint has no @; write w@SYMBOL, rw@SYMBOL or x@SYMBOL")]
    BadAccessFmt,
    /// Before the `@` is no access.
    #[error("The access is none of r, w, rw and x")]
    BadAccessType,
    /// A length that no debug register has.
    #[error("The length is none of 1, 2, 4 and 8, or not 1 for x")]
    BadAccessLen,
    /// More than [`super::MAX_FETCHES`].
    #[error("There are too many fetch arguments; give at most {MAX_FETCHES}")]
    TooManyArgs,
    /// A fetch argument of more than 63 characters.
    #[error("The fetch argument is too long; give at most {MAX_FETCH_TEXT} characters")]
    ArgTooLong,
    /// `=%di`.
    #[error("The fetch argument has no name; drop the = or give one")]
    NoArgName,
    /// Longer than 32 characters.
    #[error("The fetch argument's name is too long; give at most {MAX_FETCH_NAME} characters")]
    ArgNameTooLong,
    /// Not a C identifier.
    #[error("The fetch argument's name is not a C identifier; use letters, digits and _")]
    BadArgName,
    /// Twice the same name. Arguments without one are named arg1, arg2, ... by position.
    #[error("The fetch argument's name is used already; give another one")]
    UsedArgName,
    /// `name=`.
    #[error("Nothing stands behind the =; give %REGISTER, $argN, $retval, $stack or $stackN")]
    NoArgBody,
    /// No source at all.
    #[error("This is no fetch argument; give %REGISTER, $argN, $retval, $stack or $stackN")]
    BadFetchArg,
    /// No such register.
    #[error(
        "There is no such register; give %ax, %bx, %cx, %dx, %si, %di, %sp, %bp, %r8 to %r15, %ip or %flags"
    )]
    BadRegName,
    /// No such variable.
    #[error("There is no such variable; give $argN, $retval, $stack or $stackN")]
    BadVar,
    /// `$arg0`, or too high.
    #[error("The argument's number is none of 1 to {MAX_STACK_WORD}")]
    BadArgNum,
    /// Too high.
    #[error("The stack word's number is too big; give at most {MAX_STACK_WORD}")]
    BadStackNum,
    /// `$retval` of a probe that is none of a return.
    #[error("$retval is there only at a return; write %return behind the place")]
    RetvalOnProbe,
}

impl SpecErrorKind {
    /// The name of the error in the kernel (kernel/trace/trace_probe.h), or ours where it has none.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            SpecErrorKind::Empty => "NO_PROBE",
            SpecErrorKind::NoPlace => "NO_PLACE",
            SpecErrorKind::NotSupported(_) => "NOT_SUPPORTED",
            SpecErrorKind::BadMaxactType => "BAD_MAXACT_TYPE",
            SpecErrorKind::BadMaxact => "BAD_MAXACT",
            SpecErrorKind::MaxactTooBig => "MAXACT_TOO_BIG",
            SpecErrorKind::NoGroupName => "NO_GROUP_NAME",
            SpecErrorKind::GroupTooLong => "GROUP_TOO_LONG",
            SpecErrorKind::BadGroupName => "BAD_GROUP_NAME",
            SpecErrorKind::NoEventName => "NO_EVENT_NAME",
            SpecErrorKind::EventTooLong => "EVENT_TOO_LONG",
            SpecErrorKind::BadEventName => "BAD_EVENT_NAME",
            SpecErrorKind::BadProbeAddr(_) => "BAD_PROBE_ADDR",
            SpecErrorKind::BadAddrSuffix => "BAD_ADDR_SUFFIX",
            SpecErrorKind::BadRetprobe => "BAD_RETPROBE",
            SpecErrorKind::BadAccessFmt => "BAD_ACCESS_FMT",
            SpecErrorKind::BadAccessType => "BAD_ACCESS_TYPE",
            SpecErrorKind::BadAccessLen => "BAD_ACCESS_LEN",
            SpecErrorKind::TooManyArgs => "TOO_MANY_ARGS",
            SpecErrorKind::ArgTooLong => "ARG_TOO_LONG",
            SpecErrorKind::NoArgName => "NO_ARG_NAME",
            SpecErrorKind::ArgNameTooLong => "ARG_NAME_TOO_LONG",
            SpecErrorKind::BadArgName => "BAD_ARG_NAME",
            SpecErrorKind::UsedArgName => "USED_ARG_NAME",
            SpecErrorKind::NoArgBody => "NO_ARG_BODY",
            SpecErrorKind::BadFetchArg => "BAD_FETCH_ARG",
            SpecErrorKind::BadRegName => "BAD_REG_NAME",
            SpecErrorKind::BadVar => "BAD_VAR",
            SpecErrorKind::BadArgNum => "BAD_ARG_NUM",
            SpecErrorKind::BadStackNum => "BAD_STACK_NUM",
            SpecErrorKind::RetvalOnProbe => "RETVAL_ON_PROBE",
        }
    }
}
