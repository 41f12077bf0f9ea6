//! A machine with its engine and its probes: what `run` drives itself, and the service for its clients.

mod drive;
mod dump;
mod inspect;
mod live;
mod log;
mod setup;

pub use drive::{Asked, End, Wanted, drive};
pub use dump::{DumpPart, dump_to};
pub use inspect::{Address, MAX_BYTES};
pub use live::{Hit, ProbeStatus, State, Vm, VmError};
pub use log::Page;
pub use setup::{Beginning, Boot, Order, Setup, UNPACKING, create_failure, kernel, open_host};
