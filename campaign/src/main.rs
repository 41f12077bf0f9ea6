//! The `campaign` command.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Instant;

use campaign::campaign::{Campaign, Request};
use campaign::{machine, report, user};
use clap::{Args, Parser, Subcommand, ValueEnum};
use nested::{Cache, NestedRun};

/// Long comparisons that show what unit tests cannot.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every instruction form bare and probed, and compare.
    Isa(Isa),
    /// Probe user mode on several vCPUs at once, and count.
    User(User),
}

#[derive(Clone, Debug, Args)]
struct User {
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=i64::from(user::MAX_VCPUS)))]
    vcpus: u32,
    /// Rounds of each vCPU, a multiple of 8.
    #[arg(long, default_value_t = 2000)]
    rounds: u32,
    /// Where to run: this host's /dev/kvm, or the emulated AMD-V machine.
    #[arg(long, value_enum, default_value = "kvm")]
    accel: Accel,
}

#[derive(Clone, Debug, Args)]
struct Isa {
    /// Seed of the random operands; one of the clock's if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Cases of each form, at each of CPL 0 and 3.
    #[arg(long, default_value_t = 20)]
    cases: u32,
    /// Forms whose names (iced's Code) match this pattern.
    #[arg(long, value_name = "GLOB")]
    only: Option<glob::Pattern>,
    /// Every n-th form only.
    #[arg(long, value_name = "N", default_value_t = 1)]
    every: usize,
    /// Where to run: this host's /dev/kvm, or the emulated AMD-V machine.
    #[arg(long, value_enum, default_value = "kvm")]
    accel: Accel,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Accel {
    Kvm,
    Nested,
}

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    // Inside the emulated machine this program is init.
    if nested::init::is_init() {
        nested::init::main();
    }
    let result = match Cli::parse().command {
        Command::Isa(isa) => {
            let seed = isa.seed.unwrap_or_else(|| fastrand::u64(..));
            match isa.accel {
                Accel::Kvm => here(&isa, seed),
                Accel::Nested => elsewhere(isa_arguments(&isa, seed), 1),
            }
        }
        Command::User(user) => match user.accel {
            Accel::Kvm => user_here(&user),
            Accel::Nested => {
                let numbers = [user.vcpus, user.rounds].map(|number| number.to_string());
                let [vcpus, rounds] = &numbers;
                let arguments = ["user", "--vcpus", vcpus, "--rounds", rounds];
                elsewhere(arguments.into_iter().map(OsString::from).collect(), 2)
            }
        },
    };
    result.unwrap_or_else(|error| {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        eprintln!("campaign: {text}");
        ExitCode::FAILURE
    })
}

/// Runs the campaign here. Fails if there is a mismatch.
fn here(isa: &Isa, seed: u64) -> Result<ExitCode, Error> {
    eprintln!("campaign: seed {seed}");
    let started = Instant::now();
    let request = Request { seed, cases: isa.cases, only: isa.only.clone(), every: isa.every };
    let done = machine::run(Campaign::new(request))?;
    let seconds = started.elapsed().as_secs_f64();
    print!("{}", report::markdown(&done));
    eprintln!("campaign: {} runs in {seconds:.1} s, {} mismatches", done.runs, done.mismatches.len());
    Ok(if done.mismatches.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// Runs user mode here. Fails if anything is not as it should be.
fn user_here(user: &User) -> Result<ExitCode, Error> {
    let started = Instant::now();
    let outcome = user::run(user.vcpus, user.rounds)?;
    let seconds = started.elapsed().as_secs_f64();
    let faults = outcome.faults(u64::from(user.vcpus) * u64::from(user.rounds));
    let [rounds, page_faults, calls] = outcome.guest;
    let [load, behind, call] = &outcome.probes;
    println!("| | of the guest | hits | ran | faulted |\n|---|---|---|---|---|");
    println!(
        "| load | {rounds} rounds, {page_faults} faults | {} | {} | {} |",
        load.hits, load.stepped, load.faulted
    );
    println!(
        "| behind it, switched {} times | | {} | {} | |",
        outcome.switched,
        behind.hits,
        behind.emulated + behind.stepped
    );
    println!("| INT n | {calls} | {} | {} | {} |", call.hits, call.stepped, call.faulted);
    eprintln!("campaign: {} vCPUs in {seconds:.1} s, {} faults", user.vcpus, faults.len());
    for fault in &faults {
        eprintln!("campaign: {fault}");
    }
    if !faults.is_empty() {
        eprintln!("campaign: {outcome:?}");
    }
    Ok(if faults.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn isa_arguments(isa: &Isa, seed: u64) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = vec!["isa".into(), "--seed".into(), seed.to_string().into()];
    arguments.extend(["--cases".into(), isa.cases.to_string().into()]);
    arguments.extend(["--every".into(), isa.every.to_string().into()]);
    if let Some(only) = &isa.only {
        arguments.extend(["--only".into(), only.as_str().into()]);
    }
    arguments
}

/// Runs the same in the emulated machine, with so many CPUs.
fn elsewhere(arguments: Vec<OsString>, cpus: u32) -> Result<ExitCode, Error> {
    let cache = Cache::from_env()?;
    let rig = nested::prepare(&cache, &*nested::stderr_progress())?;
    let exit = rig.run(NestedRun { cpus, ..NestedRun::new(arguments) })?;
    Ok(ExitCode::from(u8::try_from(exit.code()).unwrap_or(u8::MAX)))
}
