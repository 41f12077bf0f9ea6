//! The `vmprobe` command.

#![forbid(unsafe_code)]

mod accel;
mod bench;
mod cli;
mod client;
mod contract;
mod doctor;
mod elsewhere;
mod events;
mod exit;
mod explain;
mod image;
mod images;
mod manual;
mod matrix;
mod modules;
mod network;
mod output;
mod own;
mod prepare;
mod probes;
mod run;
mod serial;
mod service;
mod snapshot;
mod summary;
mod symbols;
mod terminal;
mod vm;
mod vsock;

use std::process::ExitCode;

use clap::Parser;
use tracing::level_filters::LevelFilter;

use crate::cli::{Cli, Command};
use crate::exit::{Code, Failure};

fn main() -> ExitCode {
    // Inside the emulated machine this program is init.
    if nested::init::is_init() {
        nested::init::main();
    }
    let cli = Cli::parse();
    // Warnings of a service are for whoever runs it: a client that was refused, a connection that could not be taken.
    let serves = matches!(cli.command, Command::Serve(_) | Command::Worker(_));
    let level = if serves { LevelFilter::WARN } else { LevelFilter::ERROR };
    let filter = tracing_subscriber::EnvFilter::builder()
        .with_default_directive(level.into())
        .with_env_var("VMPROBE_LOG");
    tracing_subscriber::fmt().with_env_filter(filter.from_env_lossy()).with_writer(std::io::stderr).init();
    match command(&cli.command) {
        Ok(code) => code.into(),
        Err(failure) => {
            if !matches!(failure, Failure::OutputClosed) {
                eprintln!("vmprobe: {failure}");
            }
            failure.code().into()
        }
    }
}

fn command(command: &Command) -> Result<Code, Failure> {
    match command {
        Command::Run(args) => accel::run(args),
        Command::Bench(args) => accel::bench(args),
        Command::Doctor(args) => doctor::doctor(args),
        Command::Symbols(args) => symbols::symbols(args),
        Command::Explain(args) => explain::explain(args),
        Command::Image(args) => image::image(args),
        Command::Verify { directory } => snapshot::verify(directory),
        Command::Matrix(args) => matrix::matrix(args),
        Command::Prepare(args) => prepare::prepare(args),
        Command::Serve(args) => service::serve(args),
        Command::Completions { shell } => manual::completions(*shell),
        Command::Man { directory } => manual::pages(directory),
        Command::Worker(args) => service::work(args),
        Command::Vm(args) => client::vm(args),
        Command::Probe(args) => client::probe(args),
        Command::Guest(args) => client::guest(args),
        Command::Events(args) => client::events(args),
        Command::Console(args) => client::console(args),
        Command::Vsock(args) => vsock::connect(args),
    }
}
