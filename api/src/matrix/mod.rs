//! `vmprobe matrix`: the same probes, workload and checks over kernels and options, and one table of what came of it.
//!
//! Each cell is a `vmprobe run` of its own, in a process of its own; what it is worth is decided by the crate `matrix`.

mod bisect;
mod cell;
mod directory;
mod kernels;
mod plan;
mod progress;
mod workload;

use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use matrix::check::relate;
use matrix::file::MANY_CELLS;
use matrix::report::{Report, findings, table};
use matrix::results::{Header, complete};
use matrix::{Cell, CellResult, MatrixFile, Only, Status};
use vmm::doctor::Verdict;

use crate::cli::{MatrixArgs, MatrixCommand, MatrixReportArgs, MatrixRunArgs};
use crate::exit::{Code, Failure};
use crate::images::chain;
use crate::run::signals;
use directory::Directory;

/// `vmprobe matrix`.
pub fn matrix(args: &MatrixArgs) -> Result<Code, Failure> {
    match (&args.command, &args.run) {
        (Some(MatrixCommand::Report(args)), _) => report(args),
        (Some(MatrixCommand::Bisect(args)), _) => bisect::bisect(args),
        (None, Some(args)) => run(args),
        (None, None) => Err(Failure::Usage("Name a matrix file, as `vmprobe matrix self.toml`".to_owned())),
    }
}

/// Runs the cells of a file that have not been run yet, and reports on all.
fn run(args: &MatrixRunArgs) -> Result<Code, Failure> {
    let (text, file) = read(&args.file)?;
    let cells = cells(&file, args)?;
    let axes = file.varying();
    let picked = |cell: &Cell| Only::picks(&args.only, cell);
    if !cells.iter().any(picked) && !args.only.is_empty() {
        return Err(Failure::Usage("--only picks no cell; --list shows all".to_owned()));
    }
    if args.list {
        for cell in cells.iter().filter(|cell| picked(cell)) {
            println!("{}", cell.label(&axes));
        }
        return Ok(Code::Done);
    }
    let path = args.results.clone().unwrap_or_else(|| args.file.with_extension("results"));
    let (verdict, host) = host();
    let header = Header::new(text, host, seconds_since_1970());
    let mut directory = Directory::open(&path, &header, args.fresh)?;
    let wanted = |place: usize, cell: &Cell| {
        let known = directory.results().iter().find(|result| result.cell == *cell);
        let again = match known.map(CellResult::status) {
            None | Some(Status::NotRun) => true,
            Some(Status::Failed | Status::Flaky | Status::Unavailable) => args.failed,
            Some(Status::Passed) => false,
        };
        again && picked(cell) && args.shard.is_none_or(|shard| shard.owns(place))
    };
    let places: Vec<usize> = cells
        .iter()
        .enumerate()
        .filter(|(place, cell)| wanted(*place, cell))
        .map(|(place, _)| place)
        .collect();
    let stop = signals(false)?;
    let plan =
        plan::Plan { file: &file, cells: &cells, axes: &axes, directory: path.clone(), verdict, stop: &stop };
    let room = plan::Room { jobs: args.jobs, memory: args.memory };
    let unwritten = plan.run(&places, room, &mut directory);

    let report = finish(&args.file, &file, &cells, &directory, &path)?;
    show(&report, &path);
    unwritten?;
    Ok(match stop.load(Ordering::Relaxed) {
        true => Code::Interrupted,
        false => code(&report),
    })
}

/// `vmprobe matrix report`: the results of several shards as one.
fn report(args: &MatrixReportArgs) -> Result<Code, Failure> {
    let (text, file) = read(&args.file)?;
    let cells = file.cells().map_err(too_many)?;
    let (_, host) = host();
    // What is there is a part of the report: it may be a shard's own directory, which nothing else holds.
    let mut merged = Directory::open(&args.results, &Header::new(text, host, seconds_since_1970()), false)?;
    for from in &args.from {
        merged.merge(from, &cells, &file.varying())?;
    }
    let report = finish(&args.file, &file, &cells, &merged, &args.results)?;
    show(&report, &args.results);
    Ok(code(&report))
}

fn read(path: &Path) -> Result<(String, MatrixFile), Failure> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::Usage(format!("{}: cannot be read: {error}", path.display())))?;
    let file =
        MatrixFile::parse(&text).map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
    Ok((text, file))
}

fn too_many(count: u128) -> Failure {
    Failure::Usage(format!("The axes span {count} cells; nobody runs so many. Leave values out"))
}

/// All cells of the file. Many of them are only run by someone who means it.
fn cells(file: &MatrixFile, args: &MatrixRunArgs) -> Result<Vec<Cell>, Failure> {
    let cells = file.cells().map_err(too_many)?;
    let many = cells.len() as u128 > MANY_CELLS && !args.list && !args.yes;
    if many && !(io::stdin().is_terminal() && agreed(cells.len())) {
        let count = cells.len();
        return Err(Failure::Usage(format!(
            "These are {count} cells; --yes runs so many, --list shows them"
        )));
    }
    Ok(cells)
}

fn agreed(count: usize) -> bool {
    eprint!("vmprobe: These are {count} cells. Run them all? [y/N] ");
    io::stderr().flush().ok();
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer).is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
}

/// What this host can do, and what it is called in a report.
fn host() -> (Verdict, String) {
    let verdict = vmm::doctor::judge();
    let kvm = match verdict {
        Verdict::Full => "KVM with hardware virtualization",
        Verdict::SmallGuests => "KVM that emulates kernel code",
        Verdict::Unusable => "no KVM",
    };
    let system = rustix::system::uname();
    let words = format!(
        "{} {}, {} CPUs, {kvm}",
        system.sysname().to_string_lossy(),
        system.release().to_string_lossy(),
        plan::host_cpus()
    );
    (verdict, words)
}

fn seconds_since_1970() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Writes every form of the report.
fn finish(
    matrix: &Path,
    file: &MatrixFile,
    cells: &[Cell],
    directory: &Directory,
    path: &Path,
) -> Result<Report, Failure> {
    let mut results = complete(cells, directory.results());
    relate(file, &mut results);
    let name = matrix.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let header = directory.header();
    let started = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(header.started);
    let started = humantime::format_rfc3339_seconds(started).to_string();
    let report = Report::new(name, header.host.clone(), started, file.varying(), results);
    let console = |cell: &matrix::report::ReportedCell| cell::console(&cell::directory(path, &cell.files));
    let forms = [
        ("report.json", report.json().map_err(|error| error.to_string())),
        ("junit.xml", matrix::report::junit(&report).map_err(|error| error.to_string())),
        ("report.tap", Ok(matrix::report::tap(&report))),
        ("report.html", matrix::report::html(&report, console).map_err(|error| error.to_string())),
    ];
    for (name, text) in forms {
        let path = path.join(name);
        let written = text.and_then(|text| fs::write(&path, text).map_err(|error| error.to_string()));
        written.map_err(|error| Failure::Host(format!("{} cannot be written: {error}", path.display())))?;
    }
    Ok(report)
}

fn show(report: &Report, path: &Path) {
    println!("{}", table(report));
    for finding in findings(report) {
        println!("{finding}");
    }
    println!("{}; {}", report.in_words(), path.join("report.html").display());
}

/// A cell that failed, or was flaky, is not what was asked for; one that this host cannot run is nobody's fault.
fn code(report: &Report) -> Code {
    let bad = [Status::Failed, Status::Flaky].iter().any(|status| report.summary.contains_key(status));
    if bad { Code::CellsFailed } else { Code::Done }
}

/// Something of the host that failed, at a path.
fn host_failure(path: &Path, error: &dyn std::error::Error) -> Failure {
    Failure::Host(format!("{}: {}", path.display(), chain(error)))
}
