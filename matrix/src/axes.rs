//! The axes, and the cells that they span.

use std::fmt;

use serde::{Deserialize, Serialize};
use toml::Spanned;

use crate::quantity::Size;

/// Page-table isolation in the guest.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kpti {
    /// As the kernel decides.
    #[default]
    Auto,
    /// `pti=on`.
    On,
    /// `pti=off`.
    Off,
}

impl fmt::Display for Kpti {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kpti::Auto => "auto",
            Kpti::On => "on",
            Kpti::Off => "off",
        })
    }
}

/// Where the machine runs: `vmprobe run --accel`.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Accel {
    /// KVM where it runs the image, else nested.
    #[default]
    Auto,
    /// This host's KVM.
    Kvm,
    /// The emulated AMD-V machine.
    Nested,
    /// The same with a clock that counts instructions.
    NestedIcount,
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Accel::Auto => "auto",
            Accel::Kvm => "kvm",
            Accel::Nested => "nested",
            Accel::NestedIcount => "nested-icount",
        })
    }
}

/// One value, or a list of them.
#[derive(Clone, Debug, Deserialize, PartialEq)]
#[serde(untagged, expecting = "a value of this axis, or a list of such values")]
enum OneOrMany<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    fn values(&self) -> &[T] {
        match self {
            OneOrMany::One(value) => std::slice::from_ref(value),
            OneOrMany::Many(values) => values,
        }
    }
}

/// Something wrong in the file, and where: bytes of its text.
pub(crate) type Misplaced = (std::ops::Range<usize>, String);

/// A list of cells, or too many to list.
pub(crate) type Product = Result<Vec<Cell>, u128>;

macro_rules! axes {
    ($($(#[$doc:meta])* $field:ident $variant:ident: $type:ty = $default:expr;)*) => {
        /// What one cell of the matrix differs from another in.
        #[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Deserialize, Serialize)]
        #[serde(rename_all = "lowercase")]
        pub enum Axis { $($(#[$doc])* $variant),* }

        impl Axis {
            /// All of them, the one that changes slowest first.
            pub const ALL: &[Axis] = &[$(Axis::$variant),*];

            /// As the file has it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Axis::$variant => stringify!($field)),* }
            }
        }

        /// One cell: a value on each axis.
        #[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
        #[serde(deny_unknown_fields)]
        pub struct Cell { $($(#[$doc])* pub $field: $type),* }

        impl Cell {
            /// The value on an axis, as the file has it.
            #[must_use]
            pub fn value(&self, axis: Axis) -> String {
                match axis { $(Axis::$variant => self.$field.to_string()),* }
            }

            /// Whether the two differ on no axis but these.
            #[must_use]
            pub fn differs_only(&self, other: &Cell, along: &[Axis]) -> bool {
                true $(&& (along.contains(&Axis::$variant) || self.$field == other.$field))*
            }
        }

        /// The values of each axis. An axis that the file leaves out has one value, and `probes` all sets of probes.
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Axes { $($(#[$doc])* $field: Option<Spanned<Vec<Spanned<$type>>>>),* }

        impl Axes {
            /// Values that are missing or there twice.
            pub(crate) fn check(&self) -> Result<(), Misplaced> {
                $(if let Some(axis) = &self.$field {
                    if axis.get_ref().is_empty() {
                        return Err((axis.span(), format!("the axis `{}` has no value; leave it out, or give one", stringify!($field))));
                    }
                    for (place, value) in axis.get_ref().iter().enumerate() {
                        if axis.get_ref()[..place].iter().any(|earlier| earlier.get_ref() == value.get_ref()) {
                            let message = format!("`{}` is on the axis `{}` twice", value.get_ref(), stringify!($field));
                            return Err((value.span(), message));
                        }
                    }
                })*
                Ok(())
            }

            $($(#[$doc])* pub(crate) fn $field(&self) -> Vec<$type> {
                let given = self.$field.as_ref().map(|axis| axis.get_ref().iter().map(|value| value.get_ref().clone()).collect());
                given.unwrap_or_else(|| $default)
            })*

            /// The axes on which cells differ.
            #[must_use]
            pub fn varying(&self) -> Vec<Axis> {
                let mut axes = Vec::new();
                $(if self.$field().len() > 1 { axes.push(Axis::$variant); })*
                axes
            }
        }

        /// Picks cells by their values; an axis that is not named may have any.
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct Selector { $($(#[$doc])* $field: Option<Spanned<OneOrMany<$type>>>),* }

        impl Selector {
            /// Whether it picks this cell.
            #[must_use]
            pub fn matches(&self, cell: &Cell) -> bool {
                true $(&& self.$field.as_ref().is_none_or(|picked| picked.get_ref().values().contains(&cell.$field)))*
            }

            /// The axes that it names.
            #[must_use]
            pub fn named(&self) -> Vec<Axis> {
                let mut axes = Vec::new();
                $(if self.$field.is_some() { axes.push(Axis::$variant); })*
                axes
            }

            /// A value that is on no axis: a slip of the pen, which would pick nothing for ever.
            pub(crate) fn check(&self, axes: &Axes) -> Result<(), Misplaced> {
                $(if let Some(picked) = &self.$field {
                    let known = axes.$field();
                    if let Some(value) = picked.get_ref().values().iter().find(|value| !known.contains(value)) {
                        let message = format!("`{value}` is not on the axis `{}`", stringify!($field));
                        return Err((picked.span(), message));
                    }
                })*
                Ok(())
            }

            /// Every cell that it picks, on the axes that it does not name with the values that those have.
            pub(crate) fn product(&self, axes: &Axes, limit: u128) -> Product {
                $(let $field = self.$field.as_ref().map_or_else(|| axes.$field(), |picked| picked.get_ref().values().to_vec());)*
                let mut count: u128 = 1;
                $(count = count.saturating_mul($field.len() as u128);)*
                if count > limit {
                    return Err(count);
                }
                let mut cells = Vec::new();
                product!(cells; ; $($field)*);
                Ok(cells)
            }
        }
    };
}

/// A loop in a loop for each axis.
macro_rules! product {
    ($cells:ident; $($done:ident)*; $axis:ident $($rest:ident)*) => {
        for $axis in &$axis {
            product!($cells; $($done)* $axis; $($rest)*);
        }
    };
    ($cells:ident; $($done:ident)*; ) => {
        $cells.push(Cell { $($done: $done.clone()),* });
    };
}

axes! {
    /// The kernel by name (`debian:bookworm/cloud`), a file, a build tree, or a built-in guest.
    kernel Kernel: String = Vec::new();
    /// Number of vCPUs.
    vcpus Vcpus: u32 = vec![1];
    /// Guest memory.
    memory Memory: Size = vec![Size(512 << 20)];
    /// Words for the kernel's command line.
    cmdline Cmdline: String = vec![String::new()];
    /// Whether the kernel places itself at random.
    kaslr Kaslr: bool = vec![false];
    /// Page-table isolation.
    kpti Kpti: Kpti = vec![Kpti::Auto];
    /// Where it runs.
    accel Accel: Accel = vec![Accel::Auto];
    /// Which set of probes.
    probes Probes: String = vec![String::new()];
}

impl Axes {
    /// Gives the axis of probes all sets that there are, if the file has not said which.
    pub(crate) fn default_probes(&mut self, sets: impl Iterator<Item = String>) {
        if self.probes.is_none() {
            let sets: Vec<Spanned<String>> = sets.map(|name| Spanned::new(0..0, name)).collect();
            self.probes = (!sets.is_empty()).then(|| Spanned::new(0..0, sets));
        }
    }

    /// A set of probes on the axis that is not among `known`.
    pub(crate) fn unknown_probes(&self, known: impl Fn(&str) -> bool) -> Option<Misplaced> {
        let values = self.probes.iter().flat_map(|axis| axis.get_ref());
        let unknown = values.into_iter().find(|name| !known(name.get_ref()))?;
        Some((unknown.span(), format!("there is no set of probes `{}`", unknown.get_ref())))
    }

    /// Whether the file names a kernel at all.
    pub(crate) fn has_kernel(&self) -> bool {
        self.kernel.is_some()
    }
}

impl Selector {
    /// A set of probes that it picks and that is not among `known`.
    pub(crate) fn unknown_probes(&self, known: impl Fn(&str) -> bool) -> Option<Misplaced> {
        let picked = self.probes.as_ref()?;
        let unknown = picked.get_ref().values().iter().find(|name| !known(name))?;
        Some((picked.span(), format!("there is no set of probes `{unknown}`")))
    }
}

/// A value that cells must have to be looked at: `AXIS=VALUE`, both as in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Only {
    axis: Axis,
    value: String,
}

impl Only {
    /// Whether a cell has, on each axis that is named, one of the values that are named.
    #[must_use]
    pub fn picks(all: &[Only], cell: &Cell) -> bool {
        all.iter().all(|only| {
            let alternatives = all.iter().filter(|other| other.axis == only.axis);
            alternatives.into_iter().any(|other| cell.value(other.axis) == other.value)
        })
    }
}

impl std::str::FromStr for Only {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=');
        let only = parts.and_then(|(name, value)| {
            let axis = Axis::ALL.iter().find(|axis| axis.name() == name)?;
            Some(Self { axis: *axis, value: value.to_owned() })
        });
        only.ok_or_else(|| {
            let names: Vec<&str> = Axis::ALL.iter().map(|axis| axis.name()).collect();
            format!("`{text}` is no AXIS=VALUE like vcpus=2, with an axis of {}", names.join(", "))
        })
    }
}

impl Cell {
    /// The values that tell it from others, on these axes.
    #[must_use]
    pub fn label(&self, axes: &[Axis]) -> String {
        let word = |axis: &Axis| match axis {
            Axis::Kernel | Axis::Probes => self.value(*axis),
            Axis::Kaslr => if self.kaslr { "kaslr" } else { "nokaslr" }.to_owned(),
            axis => format!("{}={}", axis.name(), self.value(*axis)),
        };
        let words: Vec<String> = axes.iter().map(word).collect();
        if words.is_empty() { self.kernel.clone() } else { words.join(" ") }
    }

    /// A name for files of this cell, the one at `place` among all cells.
    #[must_use]
    pub fn file_name(&self, place: usize, axes: &[Axis]) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' };
        // File names are limited to 255 bytes (NAME_MAX).
        let label: String = self.label(axes).chars().map(plain).take(100).collect();
        format!("{:03}-{label}", place + 1)
    }
}
