//! The contract, `proto/vmprobe/v1`, as Rust: its messages, its services and their clients.

// Written by the generator, documented in the contract.
#![allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications)]

tonic::include_proto!("vmprobe.v1");

/// The contract as a FileDescriptorSet, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/vmprobe.v1.bin"));
