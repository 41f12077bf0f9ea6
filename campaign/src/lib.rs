//! Every instruction form, bare and probed, in a bare-metal guest of its own: does the guest see the same?
//!
//! ```text
//! forms      which forms there are, and bytes that are one
//! case       an instruction with everything it can see: registers, vector state, memory, where it stands
//! campaign   which case runs next; bare first, then probed; what became of each
//! machine    machines, one after the other, until the campaign is done
//! driver     the host's side of the guest: enters a case, takes its end apart, stores what only the guest can store
//! prober     the engine, with one probe
//! outcome    what a run left behind, and how two differ
//! deviations what this host does otherwise than a CPU
//! report     the tables
//! ```
//!
//! And [`user`]: user mode on several vCPUs at once.

#![forbid(unsafe_code)]

pub mod campaign;
pub mod case;
pub mod deviations;
pub mod driver;
pub mod forms;
pub mod guest;
pub mod layout;
pub mod machine;
pub mod outcome;
pub mod prober;
pub mod report;
pub mod user;
