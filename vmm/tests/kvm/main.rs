//! The machine on the local /dev/kvm, with guests of a dozen instructions. Without /dev/kvm each test says that it is skipped;
//! under CI=true it fails instead.

#![allow(clippy::tests_outside_test_module, clippy::unwrap_used, reason = "the whole crate is tests")]

mod common;
mod devices;
mod doctor;
mod engine;
mod kprobes;
mod machine;
mod out_of_line;
mod pause;
mod stops;
mod watch;
