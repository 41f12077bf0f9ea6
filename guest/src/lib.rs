//! What vmprobe knows of a guest: its image, its symbols, the places in its text that can be probed.
//!
//! ```text
//! file -> image (recognise, unpack, check) -> symbols (kallsyms or ELF) -> sites (what the guest itself rewrites)
//!      -> place (SPEC text -> address, instruction, or why not)
//! ```

#![forbid(unsafe_code)]

pub mod btf;
mod bytes;
mod guest;
pub mod image;
pub mod initramfs;
pub mod kallsyms;
pub mod linux;
pub mod list;
pub mod modules;
pub mod place;
pub mod programs;
pub mod relocation;
pub mod sites;
pub mod spec;
pub mod symbols;
#[cfg(test)]
mod testing;
pub mod text;
pub mod vmcore;

pub use guest::{Guest, GuestError, SymbolSource};
