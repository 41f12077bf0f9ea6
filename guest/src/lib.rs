//! See Cargo.toml's description; the modules are still to come.

pub mod programs;
