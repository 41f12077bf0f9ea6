//! The guest's serial line as a terminal: typing into a bare-metal guest that echoes, through a pseudo-terminal.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::service::Service;
use common::{assert_code, local_kvm, stderr, stdout, vmprobe};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

const PATIENCE: Duration = Duration::from_secs(60);

/// A guest that echoes what it reads from its serial line, and powers off at a `q`.
#[rustfmt::skip]
const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // 1: mov dx, 0x3fd     line status
    0xec,                   // in al, dx
    0xa8, 0x01,             // test al, 1           data ready
    0x74, 0xf7,             // jz 1b
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec,                   // in al, dx
    0xee,                   // out dx, al
    0x3c, b'q',             // cmp al, 'q'
    0x75, 0xed,             // jne 1b
    0x66, 0xba, 0x04, 0x06, // mov dx, 0x604        PM1a control
    0x66, 0xb8, 0x00, 0x20, // mov ax, 0x2000       SLP_EN
    0x66, 0xef,             // out dx, ax
    0xf4,                   // hlt
];

/// An ELF executable with one segment of code (System V ABI, chapters 4 and 5).
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADER: u16 = 64;
    const SEGMENT: u16 = 56;
    let entry: u64 = 0x10_0000;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    // ET_EXEC, EM_X86_64, EV_CURRENT.
    file.extend([2_u16, 62].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([entry, u64::from(HEADER), 0].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([HEADER, SEGMENT, 1, 64, 0, 0].iter().flat_map(|word| word.to_le_bytes()));
    // PT_LOAD, PF_R and PF_X.
    file.extend([1_u32, 5].iter().flat_map(|word| word.to_le_bytes()));
    let (offset, bytes) = (u64::from(HEADER + SEGMENT), code.len() as u64);
    file.extend([offset, entry, entry, bytes, bytes, 1].iter().flat_map(|word| word.to_le_bytes()));
    file.extend(code);
    file
}

/// A run in a terminal of its own.
struct Session {
    child: Child,
    keyboard: File,
    terminal: File,
    screen: Arc<Mutex<Vec<u8>>>,
    before: Termios,
    dir: tempfile::TempDir,
}

/// A file with the guest that echoes.
fn image(dir: &Path) -> PathBuf {
    let image = dir.join("echo");
    std::fs::write(&image, elf(ECHO)).expect("written");
    image
}

impl Session {
    /// A run of the guest that echoes.
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let mut command = vmprobe(&["run", "--accel", "kvm", "--serial", "tty"]);
        command.arg(image(dir.path())).args(args).current_dir(dir.path()).stdout(Stdio::null());
        Self::of(command, dir)
    }

    /// A command whose standard input and error are the terminal.
    fn of(mut command: Command, dir: tempfile::TempDir) -> Self {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags).expect("a terminal");
        grantpt(&master).and_then(|()| unlockpt(&master)).expect("a terminal");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let terminal = File::from(rustix::fs::open(name, flags, Mode::empty()).expect("a terminal"));
        let before = tcgetattr(&terminal).expect("modes");
        let child = command
            .stdin(terminal.try_clone().expect("a descriptor"))
            .stderr(terminal.try_clone().expect("a descriptor"))
            .spawn()
            .expect("vmprobe starts");
        let mut reader = File::from(master.try_clone().expect("a descriptor"));
        let screen: Arc<Mutex<Vec<u8>>> = Arc::default();
        let shown = Arc::clone(&screen);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count) = reader.read(&mut buffer) {
                shown.lock().expect("no panic").extend(&buffer[..count]);
            }
        });
        Self { child, keyboard: master.into(), terminal, screen, before, dir }
    }

    fn screen(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().expect("no panic")).into_owned()
    }

    #[track_caller]
    fn wait_until(&self, what: &str, so: impl Fn(&Self) -> bool) {
        let until = Instant::now() + PATIENCE;
        while !so(self) {
            assert!(Instant::now() < until, "not {what}; the screen:\n{}", self.screen());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[track_caller]
    fn wait_for(&self, text: &str) {
        self.wait_until(text, |session| session.screen().contains(text));
    }

    #[track_caller]
    fn types(&mut self, text: &[u8]) {
        self.keyboard.write_all(text).expect("the terminal takes it");
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.terminal).expect("modes");
        !modes.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn is_as_before(&self) -> bool {
        let modes = tcgetattr(&self.terminal).expect("modes");
        (modes.input_modes, modes.output_modes, modes.control_modes, modes.local_modes)
            == (
                self.before.input_modes,
                self.before.output_modes,
                self.before.control_modes,
                self.before.local_modes,
            )
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a pid");
        kill_process(pid, signal).expect("it runs");
    }

    /// Its state as proc_pid_stat(5) has it.
    fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("it runs");
        stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next()).expect("a state")
    }

    /// Waits for its end.
    #[track_caller]
    fn ends(&mut self, code: i32) {
        assert_eq!(self.child.wait().expect("it ends").code(), Some(code), "{}", self.screen());
        assert!(self.is_as_before(), "the terminal's modes are not as before");
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn what_is_typed_is_the_guests_to_read_and_what_it_answers_is_shown_and_logged() {
    if !local_kvm() {
        return;
    }
    let mut session = Session::start(&["--serial", "log"]);
    session.wait_for("Ctrl-]");
    session.wait_until("raw", Session::is_raw);
    // More than the 64 bytes of the receiver, and a Ctrl-C, which is the guest's.
    let text = format!("{}\x03.", "x".repeat(500));
    session.types(text.as_bytes());
    session.wait_for(&text);
    session.types(b"q");
    session.ends(0);
    let log = std::fs::read_to_string(session.dir.path().join("log")).expect("a log");
    assert_eq!(log, format!("{text}q"));
}

#[test]
fn the_way_out_ends_the_run_and_gives_the_terminal_back() {
    if !local_kvm() {
        return;
    }
    let mut session = Session::start(&[]);
    session.wait_until("raw", Session::is_raw);
    session.types(b"a\x1db");
    session.ends(130);
    assert!(session.screen().contains("interrupted"), "{}", session.screen());
}

#[test]
fn signals_end_the_run_and_give_the_terminal_back() {
    if !local_kvm() {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let mut session = Session::start(&[]);
        session.wait_until("raw", Session::is_raw);
        session.signal(signal);
        session.ends(130);
    }
}

#[test]
fn who_stops_the_process_has_the_terminal_meanwhile() {
    if !local_kvm() {
        return;
    }
    let mut session = Session::start(&[]);
    session.wait_until("raw", Session::is_raw);
    session.signal(Signal::TSTP);
    session.wait_until("stopped", |session| session.state() == 'T');
    assert!(session.is_as_before());
    session.signal(Signal::CONT);
    session.wait_until("raw again", Session::is_raw);
    session.types(b"goes on q");
    session.wait_for("goes on");
    session.ends(0);
}

/// Sends the guest what is on a pipe, whose last byte ends it, and asserts that it has read all of that. What the run said on stderr.
fn sent_to_its_end(accel: &str, text: &str) -> String {
    let dir = tempfile::tempdir().expect("a directory");
    let mut child = vmprobe(&["run", "--accel", accel, "--serial", "tty"])
        .arg(image(dir.path()))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmprobe starts");
    child.stdin.take().expect("piped").write_all(text.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    assert_code(&output, 0);
    assert!(stderr(&output).contains(text), "{}", stderr(&output));
    stderr(&output)
}

#[test]
fn without_a_terminal_standard_input_is_sent_to_its_end() {
    if local_kvm() {
        // What is a way out on a terminal is a byte here.
        let said = sent_to_its_end("kvm", &format!("{}\x1d.q", "y".repeat(10_000)));
        assert!(!said.contains("Ctrl-]"));
    }
}

#[test]
fn standard_input_is_for_one_reader() {
    let output =
        vmprobe(&["run", "ticker", "--serial", "tty", "--probes", "-"]).stdin(Stdio::null()).output();
    let output = output.expect("vmprobe starts");
    assert_code(&output, 2);
    assert!(stderr(&output).contains("both read standard input"), "{}", stderr(&output));
}

/// A service with the guest that echoes, which runs; `t` is its name.
fn service() -> Service {
    let service = Service::start();
    let image = image(service.dir.path());
    service.json(&[
        "vm",
        "create",
        image.to_str().expect("UTF-8"),
        "--name",
        "t",
        "--memory",
        "32M",
        "--cpus",
        "1",
    ]);
    service.json(&["vm", "start", "t"]);
    service
}

#[test]
fn a_machine_of_the_service_is_typed_into_and_left_again() {
    if !local_kvm() {
        return;
    }
    let service = service();
    let mut command = vmprobe(&["console", "t", "--interactive"]);
    let mut session = {
        let dir = tempfile::tempdir().expect("a directory");
        let shown = File::create(dir.path().join("shown")).expect("a file");
        command.env("VMPROBE_SOCKET", service.socket()).stdout(shown);
        Session::of(command, dir)
    };
    session.wait_for("Ctrl-] leaves it");
    session.wait_until("raw", Session::is_raw);
    let text = format!("{}\x03.", "z".repeat(1000));
    session.types(text.as_bytes());
    let shown =
        |session: &Session| std::fs::read_to_string(session.dir.path().join("shown")).expect("a file");
    session.wait_until("echoed", |session| shown(session) == text);
    session.types(b"\x1d");
    session.ends(0);
    assert_eq!(service.json(&["vm", "show", "t"])[0]["state"], "running");
    let audit = service.audit();
    assert!(audit.contains("WriteConsole"), "{audit}");
    assert!(!audit.contains("zz"), "what is typed may be a password");
}

#[test]
fn what_comes_on_a_pipe_is_sent_as_fast_as_the_guest_reads() {
    if !local_kvm() {
        return;
    }
    let service = service();
    let mut child = vmprobe(&["console", "t", "-i"])
        .env("VMPROBE_SOCKET", service.socket())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("vmprobe starts");
    // More than waits in the service.
    let text = format!("{}q", "w".repeat(100_000));
    let mut stdin = child.stdin.take().expect("piped");
    let sender = {
        let text = text.clone();
        std::thread::spawn(move || stdin.write_all(text.as_bytes()))
    };
    let output = child.wait_with_output().expect("it ends with the run");
    sender.join().expect("no panic").expect("it reads");
    assert_code(&output, 0);
    assert_eq!(stdout(&output), text);
}

#[test]
fn what_is_typed_reaches_a_guest_in_the_emulated_machine() {
    if !common::nested() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let mut command = vmprobe(&["run", "--accel", "nested", "--serial", "tty"]);
    command.arg(image(dir.path())).stdout(Stdio::null());
    let mut session = Session::of(command, dir);
    session.wait_until("raw", Session::is_raw);
    // It waits until there is a guest, and is more than the ports on the way hold.
    let text = format!("{}.", "v".repeat(3000));
    session.types(text.as_bytes());
    session.wait_for(&text);
    session.types(b"\x1d");
    session.ends(130);
}

#[test]
fn the_end_of_the_input_takes_nothing_from_it_in_the_emulated_machine() {
    if common::nested() {
        sent_to_its_end("nested", &format!("{}q", "u".repeat(3000)));
    }
}
