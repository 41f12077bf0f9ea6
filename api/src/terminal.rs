//! The user's terminal as the guest's serial line: raw mode, the keyboard, the way out, and the modes as they were at every end.

use std::io::{self, IsTerminal, Read, Write};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;

use rustix::process::Signal;
use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGCONT, SIGQUIT, SIGTSTP};
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;

use crate::exit::Failure;

/// The way out, Ctrl-], as of telnet(1).
const WAY_OUT: u8 = 0x1d;

/// What Ctrl-] does where the run is this process's own.
pub const ENDS_THE_RUN: &str = "Ctrl-] ends the run";

/// Reads of the keyboard that may wait for a guest that does not read.
const WAITING: usize = 256;

/// What a terminal says when it takes no more keys (termios(3), IMAXBEL).
const BELL: &[u8] = b"\x07";

/// The modes that the terminal of standard input had before it became the guest's. A process has one.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Gives the terminal its modes back, if they were changed.
pub fn restore() {
    if let Some(modes) = &*BEFORE.lock().unwrap_or_else(PoisonError::into_inner) {
        // It fails where the terminal is gone.
        tcsetattr(io::stdin(), OptionalActions::Now, modes).ok();
    }
}

/// As it is while it is the guest's: no echo, no lines, no signals. What comes out is still made lines of, for vmprobe's own words.
fn raw(before: &Termios) -> Termios {
    let mut modes = before.clone();
    modes.make_raw();
    modes.output_modes = before.output_modes;
    modes.special_codes[SpecialCodeIndex::VMIN] = 1;
    modes.special_codes[SpecialCodeIndex::VTIME] = 0;
    modes
}

/// Standard input as the guest's keyboard. A terminal gets back its modes when this is dropped.
#[derive(Debug)]
pub struct Keyboard(());

impl Drop for Keyboard {
    fn drop(&mut self) {
        restore();
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Keyboard {
    /// Sends what comes on standard input to `guest`, which may wait. Ctrl-] on a terminal sends the process SIGINT; `way_out` says what
    /// that does.
    ///
    /// # Errors
    /// The terminal's modes cannot be changed.
    pub fn attach(guest: impl Write + Send + 'static, way_out: &str) -> Result<Self, Failure> {
        let host = |error: io::Error| Failure::Host(format!("The terminal cannot be used: {error}"));
        let is_terminal = io::stdin().is_terminal();
        let keyboard = Self(());
        if is_terminal {
            let before = tcgetattr(io::stdin()).map_err(|error| host(error.into()))?;
            // Before the modes change: whatever ends the process finds those that were.
            *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before.clone());
            follow_signals(before.clone()).map_err(host)?;
            tcsetattr(io::stdin(), OptionalActions::Now, &raw(&before))
                .map_err(|error| host(error.into()))?;
            eprintln!("vmprobe: This terminal is the guest's serial line; {way_out}");
        }
        let (keys, pressed) = sync_channel::<Vec<u8>>(WAITING);
        let thread = |name: &str| thread::Builder::new().name(name.to_owned());
        thread("keyboard").spawn(move || read(io::stdin(), &keys, is_terminal)).map_err(host)?;
        let mut guest = guest;
        let mut send = move || pressed.iter().try_for_each(|keys| guest.write_all(&keys));
        thread("serial input").spawn(move || send().ok()).map_err(host)?;
        Ok(keyboard)
    }
}

/// Reads to the end of the input, or until nobody takes it.
fn read(mut input: impl Read, keys: &SyncSender<Vec<u8>>, is_terminal: bool) {
    let mut buffer = [0; 4096];
    loop {
        let mut bytes = match input.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => &buffer[..count],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if !is_terminal {
            // Whoever writes it can wait.
            if keys.send(bytes.to_vec()).is_err() {
                return;
            }
            continue;
        }
        let leaves = bytes.iter().position(|byte| *byte == WAY_OUT);
        bytes = &bytes[..leaves.unwrap_or(bytes.len())];
        match keys.try_send(bytes.to_vec()) {
            // The way out must be seen, so the keyboard is read on.
            Err(TrySendError::Full(_)) => io::stderr().write_all(BELL).unwrap_or_default(),
            Err(TrySendError::Disconnected(_)) | Ok(()) => {}
        }
        if leaves.is_some() {
            // It cannot fail for the process itself.
            rustix::process::kill_process(rustix::process::getpid(), Signal::INT).ok();
        }
    }
}

/// Whoever stops the process, or has it dump core, finds the terminal as it was; who continues it gives the guest the terminal back.
fn follow_signals(before: Termios) -> io::Result<()> {
    let mut signals = Signals::new([SIGTSTP, SIGCONT, SIGQUIT])?;
    thread::Builder::new().name("terminal".to_owned()).spawn(move || {
        for signal in &mut signals {
            if signal == SIGCONT {
                if BEFORE.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                    tcsetattr(io::stdin(), OptionalActions::Now, &raw(&before)).ok();
                }
            } else {
                restore();
                emulate_default_handler(signal).ok();
            }
        }
    })?;
    Ok(())
}
