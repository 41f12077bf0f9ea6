//! The VM test matrix: the same probes, workload and checks over kernels, vCPUs and options.
//!
//! ```text
//! file ──► axes ──► cells ──► (a run each, elsewhere) ──► outcomes ──► checks, relations ──► verdicts ──► reports
//! ```
//!
//! Everything here is a function of its input: what a file asks for, which cells there are, which of them may run at once, what an
//! outcome is worth. Runs, processes and progress are the command's.

#![forbid(unsafe_code)]

pub mod axes;
pub mod bisect;
pub mod check;
pub mod file;
pub mod outcome;
mod quantity;
pub mod report;
pub mod results;
pub mod schedule;

pub use axes::{Axis, Cell, Only, Selector};
pub use check::{CellResult, Status};
pub use file::{FileError, MatrixFile};
pub use quantity::{Percent, Size, Time};
