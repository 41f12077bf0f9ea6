//! The matrix file: TOML, with every error at its line. `docs/matrix.md` is its manual.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use regex::Regex;
use serde::Deserialize;
use toml::Spanned;

use crate::axes::{Axes, Axis, Cell, Misplaced, Selector};
use crate::quantity::{Percent, Time};

/// How many cells a matrix may have without its user being asked.
pub const MANY_CELLS: u128 = 1000;

/// More than this is a slip of the pen.
const MOST_CELLS: u128 = 100_000;

/// How long a cell may take if the file does not say.
const DEFAULT_TIMEOUT: Time = Time(Duration::from_secs(300));

/// A file that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}, column {column}: {message}")]
pub struct FileError {
    /// From 1 on.
    pub line: usize,
    /// Characters from 1 on.
    pub column: usize,
    /// What is wrong, and what to do.
    pub message: String,
}

impl FileError {
    fn at(text: &str, (span, message): Misplaced) -> Self {
        let before = text.get(..span.start.min(text.len())).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
            message,
        }
    }
}

/// Which cells there are, what each runs, and what must come out.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct MatrixFile {
    /// What the cells differ in.
    axes: Spanned<Axes>,
    /// Cells that are left out.
    #[serde(default)]
    exclude: Vec<Selector>,
    /// Cells that are bound to some values.
    #[serde(default)]
    pin: Vec<Pin>,
    /// Cells beside those that the axes span.
    #[serde(default)]
    include: Vec<Selector>,
    /// What the guest does.
    #[serde(default)]
    pub workload: Workload,
    /// Sets of probes by name.
    #[serde(default)]
    pub probes: BTreeMap<String, Vec<Probe>>,
    /// What the guest writes to its console.
    #[serde(default)]
    pub console: Console,
    /// How long, how often.
    #[serde(default)]
    pub limits: Limits,
    /// What must be the same in several cells.
    #[serde(default)]
    pub same: Vec<Same>,
    /// Which cells may not be slower than others.
    #[serde(default)]
    pub no_slower: Vec<NoSlower>,
}

/// Cells that match `when` are only run if they match `only` too.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pin {
    when: Selector,
    only: Selector,
}

/// What the guest does. Without anything the kernel starts with no initial ramdisk.
#[derive(Clone, Debug, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub struct Workload {
    /// An initial ramdisk, or `workload` for vmprobe's own.
    pub initrd: Option<String>,
    /// A file, or a directory whose content, is added to it.
    pub files: Option<String>,
    /// What a shell runs in place of its init.
    pub command: Option<String>,
    /// Words for the command line of every cell.
    #[serde(default)]
    pub cmdline: String,
}

/// One probe of a set, and what must come of it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Probe {
    /// As for `vmprobe run --probe`.
    pub spec: String,
    /// How often it is hit.
    pub count: Option<Expected>,
    /// What its fetched values are, at every hit.
    #[serde(default)]
    pub values: BTreeMap<String, Bounds>,
    /// The longest that half of the calls may take (return probes).
    pub median: Option<Time>,
    /// The longest that 99 of 100 calls may take.
    pub p99: Option<Time>,
    /// The longest that any call may take.
    pub max: Option<Time>,
}

/// How often a probe is to be hit.
#[derive(Clone, Debug, Deserialize)]
#[serde(
    untagged,
    expecting = "how often: a number, { min = N, max = N } or { console = 'REGEX with one (group)' }"
)]
pub enum Expected {
    /// Between bounds.
    Bounds(Bounds),
    /// As often as the guest says on its console: the number in the expression's first group.
    Console(ConsoleNumber),
}

/// A number on the console.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleNumber {
    /// The expression, whose first group is the number.
    pub console: Pattern,
}

/// What a number must be.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged, expecting = "a number, or { min = N, max = N }")]
pub enum Bounds {
    /// This one.
    Exactly(Number),
    /// At least, at most.
    Between(MinMax),
}

/// Bounds, both inclusive.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct MinMax {
    /// At least.
    pub min: Option<Number>,
    /// At most.
    pub max: Option<Number>,
}

/// A number, which TOML has as an integer or, beyond 63 bits, as a text like "0xffffffffffffff9c".
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(try_from = "NumberText")]
pub struct Number(pub u64);

#[derive(Deserialize)]
#[serde(untagged, expecting = "a number")]
enum NumberText {
    Number(u64),
    Text(String),
}

impl TryFrom<NumberText> for Number {
    type Error = String;

    fn try_from(text: NumberText) -> Result<Self, String> {
        let text = match text {
            NumberText::Number(number) => return Ok(Self(number)),
            NumberText::Text(text) => text,
        };
        let number = match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        };
        number.map(Self).map_err(|_| format!("`{text}` is not a number of 64 bits"))
    }
}

impl Bounds {
    /// Whether a number is within them.
    #[must_use]
    pub fn hold(&self, number: u64) -> bool {
        match self {
            Bounds::Exactly(exact) => exact.0 == number,
            Bounds::Between(MinMax { min, max }) => {
                min.is_none_or(|min| number >= min.0) && max.is_none_or(|max| number <= max.0)
            }
        }
    }
}

impl std::fmt::Display for Bounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bounds::Exactly(Number(number)) => write!(f, "{number}"),
            Bounds::Between(MinMax { min, max }) => match (min, max) {
                (Some(min), Some(max)) => write!(f, "{} to {}", min.0, max.0),
                (Some(min), None) => write!(f, "at least {}", min.0),
                (None, Some(max)) => write!(f, "at most {}", max.0),
                (None, None) => f.write_str("any number"),
            },
        }
    }
}

/// A regular expression in the syntax of the regex crate; `^` and `$` stand for the ends of lines.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct Pattern(pub Regex);

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        // The console's lines end with a carriage return too.
        let pattern = regex::RegexBuilder::new(&text).multi_line(true).crlf(true).build();
        pattern.map(Self).map_err(|error| error.to_string())
    }
}

/// What must and must not appear on the console.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Console {
    /// Each somewhere.
    #[serde(default)]
    pub must: Vec<Pattern>,
    /// None anywhere.
    #[serde(default)]
    pub must_not: Vec<Pattern>,
}

/// How long a cell may take, how often it may be tried.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Until the run is ended.
    pub timeout: Time,
    /// How often a cell that failed is run again. If it passes then it is flaky, not passed.
    pub retries: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { timeout: DEFAULT_TIMEOUT, retries: 0 }
    }
}

/// In all cells that differ on these axes only, every probe has the same count.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Same {
    /// What is the same.
    pub of: Quantity,
    /// Where the cells differ.
    pub across: BTreeSet<Axis>,
    /// Of which probes, by their `spec`; all if it is left out.
    pub probes: Option<Vec<Spanned<String>>>,
    /// Which cells it is about; all if it is left out.
    #[serde(default)]
    pub cells: Selector,
}

/// What is compared.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    /// Hits of a probe.
    Count,
}

/// Each of `cells` is no slower, but for a share, than the cell that differs from it by the values of `than` alone.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct NoSlower {
    /// By how much they may be slower.
    pub by: Percent,
    /// Which cells it is about.
    pub cells: Selector,
    /// What they are compared with.
    pub than: Selector,
    /// The return probe whose calls are timed; the whole run if it is left out.
    pub probe: Option<String>,
}

impl MatrixFile {
    /// Reads a file's text and checks it.
    ///
    /// # Errors
    /// [`FileError`] with the line: what TOML does not allow, an unknown key or value, an axis without values, a set of probes that is
    /// not there.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let mut file: Self = toml::from_str(text).map_err(|error| {
            let message = error.message().trim_end().to_owned();
            FileError::at(text, (error.span().unwrap_or(0..0), message))
        })?;
        let sets: Vec<String> = file.probes.keys().cloned().collect();
        file.axes.get_mut().default_probes(sets.into_iter());
        file.check().map_err(|misplaced| FileError::at(text, misplaced))?;
        Ok(file)
    }

    fn check(&self) -> Result<(), Misplaced> {
        let axes_span: Range<usize> = self.axes.span();
        let axes = self.axes.get_ref();
        if !axes.has_kernel() {
            return Err((
                axes_span,
                "there is no axis `kernel`; name at least one, as kernel = [\"demo\"]".to_owned(),
            ));
        }
        axes.check()?;
        if let Some(unknown) = axes.unknown_probes(|name| self.probes.contains_key(name) || name.is_empty()) {
            return Err(unknown);
        }
        let known = |name: &str| self.probes.contains_key(name) || name.is_empty();
        if let Some(unknown) = self.include.iter().find_map(|included| included.unknown_probes(known)) {
            return Err(unknown);
        }
        for spec in self.same.iter().filter_map(|same| same.probes.as_ref()).flatten() {
            if !self.probes.values().flatten().any(|probe| probe.spec == *spec.get_ref()) {
                return Err((spec.span(), format!("there is no probe with the spec `{}`", spec.get_ref())));
            }
        }
        let selectors = self.exclude.iter().chain(self.pin.iter().flat_map(|pin| [&pin.when, &pin.only]));
        let same = self.same.iter().map(|same| &same.cells);
        let no_slower = self.no_slower.iter().flat_map(|pair| [&pair.cells, &pair.than]);
        selectors.chain(same).chain(no_slower).try_for_each(|selector| selector.check(axes))
    }

    /// The axes on which the cells differ.
    #[must_use]
    pub fn varying(&self) -> Vec<Axis> {
        let mut axes = self.axes.get_ref().varying();
        axes.extend(self.include.iter().flat_map(Selector::named));
        axes.sort_unstable();
        axes.dedup();
        axes
    }

    /// Every cell that is to be run, in the order of the axes.
    ///
    /// # Errors
    /// How many there would be, if that is more than anyone can have meant.
    pub fn cells(&self) -> Result<Vec<Cell>, u128> {
        let axes = self.axes.get_ref();
        let mut cells = Selector::default().product(axes, MOST_CELLS)?;
        cells.retain(|cell| {
            !self.exclude.iter().any(|excluded| excluded.matches(cell))
                && self.pin.iter().all(|pin| !pin.when.matches(cell) || pin.only.matches(cell))
        });
        for included in &self.include {
            for cell in included.product(axes, MOST_CELLS)? {
                if !cells.contains(&cell) {
                    cells.push(cell);
                }
            }
        }
        Ok(cells)
    }
}

#[cfg(test)]
mod tests;
