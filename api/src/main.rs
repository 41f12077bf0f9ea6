//! The `vmprobe` command.
fn main() {}
