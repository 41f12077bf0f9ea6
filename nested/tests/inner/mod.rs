//! The commands that run in the machine.

mod kvm;
mod pause;
mod snapshot;
mod watch;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub use kvm::ANSWER as KVM_ANSWER;
pub use pause::ANSWER as PAUSE_ANSWER;
pub use snapshot::ANSWER as SNAPSHOT_ANSWER;
pub use watch::ANSWER as WATCH_ANSWER;

/// What the guest writes to its serial line.
#[derive(Clone, Default)]
struct Console(Arc<Mutex<Vec<u8>>>);

impl Console {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

impl Write for Console {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many lines `slowly` writes.
pub const LINES: usize = 5;
/// And how far apart.
pub const LINE_GAP: Duration = Duration::from_millis(400);
/// How much `flood` writes, in bytes.
const FLOOD: u64 = 64 << 20;

/// Every byte value in every neighbourhood that a terminal would change, many times.
pub fn every_byte() -> Vec<u8> {
    (0..=255u8).flat_map(|byte| [byte, b'\n', b'\r', byte, 4, 3, 0]).collect::<Vec<u8>>().repeat(5)
}

/// A checksum that depends on the order of the bytes.
pub fn checksum(sum: u64, data: &[u8]) -> u64 {
    data.iter()
        .fold(sum, |sum, byte| sum.wrapping_mul(0x0000_0100_0000_01b3).wrapping_add(u64::from(*byte) + 1))
}

/// The length and checksum of what `flood` writes.
pub fn flood_facts() -> (u64, u64) {
    let mut sum = 0;
    for block in 0..FLOOD / FLOOD_BLOCK {
        sum = checksum(sum, &flood_block(block));
    }
    (FLOOD, sum)
}

const FLOOD_BLOCK: u64 = 1 << 16;

fn flood_block(number: u64) -> Vec<u8> {
    (0..FLOOD_BLOCK / 8).flat_map(|word| (number.wrapping_mul(0x9e37_79b9) ^ word).to_le_bytes()).collect()
}

/// Runs one command.
pub fn run(arguments: &[OsString]) -> ExitCode {
    match command(arguments) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn command(arguments: &[OsString]) -> Result<u8, Box<dyn std::error::Error>> {
    let mut stdout = io::stdout();
    let name = arguments.first().and_then(|name| name.to_str()).unwrap_or_default();
    match name {
        "echo" => {
            stdout.write_all(&every_byte())?;
            for argument in &arguments[1..] {
                stdout.write_all(argument.as_encoded_bytes())?;
            }
            stdout.write_all(std::env::current_dir()?.as_os_str().as_encoded_bytes())?;
            stdout.flush()?;
            let mut reversed = every_byte();
            reversed.reverse();
            io::stderr().write_all(&reversed)?;
            Ok(42)
        }
        "files" => {
            let [_, input, output, both, _untouched] = arguments else {
                return Err("four files are needed".into());
            };
            std::fs::write(output, std::fs::read_to_string(input)?.to_uppercase())?;
            let mut file = std::fs::OpenOptions::new().append(true).open(both)?;
            file.write_all(b" and after")?;
            Ok(0)
        }
        "kvm" => {
            kvm::report(&mut stdout)?;
            Ok(0)
        }
        "watch" => {
            watch::report(&mut stdout)?;
            Ok(0)
        }
        "pause" => {
            pause::report(&mut stdout, &mut io::stderr())?;
            Ok(0)
        }
        "snapshot" => {
            let [_, kernel] = arguments else { return Err("a kernel is needed".into()) };
            snapshot::report(kernel.as_ref(), &mut stdout, &mut io::stderr())?;
            Ok(0)
        }
        "slowly" => {
            for line in 0..LINES {
                std::thread::sleep(LINE_GAP);
                writeln!(stdout, "line {line}")?;
            }
            Ok(0)
        }
        "flood" => {
            let mut spent = Duration::ZERO;
            for number in 0..FLOOD / FLOOD_BLOCK {
                let block = flood_block(number);
                let started = Instant::now();
                stdout.write_all(&block)?;
                spent += started.elapsed();
            }
            stdout.flush()?;
            eprintln!("{} MiB written in {spent:?}, the reader's 2 s pause included", FLOOD >> 20);
            Ok(0)
        }
        "until-broken" => {
            while let Ok(()) = stdout.write_all(b"anyone there?\n").and_then(|()| stdout.flush()) {
                std::thread::sleep(Duration::from_millis(10));
            }
            eprint!("broken pipe");
            Ok(7)
        }
        "wait" => {
            let mut signals = Signals::new([SIGINT, SIGTERM])?;
            println!("waiting");
            let name = if signals.forever().next() == Some(SIGINT) { "SIGINT" } else { "SIGTERM" };
            println!("ended by {name}");
            Ok(130)
        }
        "stubborn" => {
            let mut signals = Signals::new([SIGINT, SIGTERM])?;
            println!("waiting");
            for _ in signals.forever() {
                println!("not yet");
            }
            Ok(0)
        }
        "crash" => std::process::abort(),
        _ => Err(format!("no such command: {name}").into()),
    }
}
