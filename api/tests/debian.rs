//! A Debian system on a disk of its own, as `vmprobe prepare disk` makes it, in the emulated machine: booted by its own kernel, initial RAM
//! disk and systemd, used over its console, and ended in order.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{accounts, assert_code, nested, output, stdout};
use rustix::process::{Pid, Signal, kill_process};

/// Debian takes 28 s to its login prompt in an emulated machine with two CPUs to itself.
const PATIENCE: Duration = Duration::from_secs(600);

/// A running Debian, whose console is read and written.
struct Debian {
    run: Child,
    dir: tempfile::TempDir,
    /// The private key that its sshd knows.
    key: PathBuf,
}

impl Debian {
    /// Boots the disk, or says why it cannot.
    fn boot(arguments: &[&str]) -> Option<Self> {
        if !nested() {
            return None;
        }
        let prepared = output(&["prepare", "disk"]);
        assert_code(&prepared, 0);
        let disk = PathBuf::from(stdout(&prepared).trim());
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str| fs::File::create(dir.path().join(name)).expect("a file");
        let run = Command::new(env!("CARGO_BIN_EXE_vmprobe"))
            .arg("run")
            .arg(&disk)
            .args(["--accel", "nested", "--memory", "1G", "--serial", "tty", "--vsock"])
            .arg(format!("uds={}", dir.path().join("vsock").display()))
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(file("hits"))
            .stderr(file("console"))
            .spawn()
            .expect("vmprobe starts");
        let key = disk.with_file_name("id_ed25519");
        Some(Self { run, dir, key })
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What the guest has written, between what vmprobe says.
    fn console(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.file("console")).expect("the console")).into_owned()
    }

    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.console().contains(text) {
            assert!(Instant::now() < until, "no {text:?} on the console:\n{}", self.console());
            let ended = self.run.try_wait().expect("the run");
            assert!(ended.is_none(), "{ended:?} before {text:?}:\n{}", self.console());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// A command over ssh, through vsock.
    fn ssh(&self, command: &str) -> Output {
        let vmprobe = env!("CARGO_BIN_EXE_vmprobe");
        let proxy = format!("ProxyCommand={vmprobe} vsock {} 22 --wait 5m", self.file("vsock").display());
        Command::new("ssh")
            .args(["-F", "none", "-o", "BatchMode=yes", "-o", "UserKnownHostsFile=/dev/null"])
            .args(["-o", "StrictHostKeyChecking=no", "-o", &proxy, "-i"])
            .arg(&self.key)
            .args(["root@guest", command])
            .output()
            .expect("ssh, which `vmprobe prepare disk` has installed")
    }

    fn types(&mut self, line: &str) {
        let keyboard = self.run.stdin.as_mut().expect("a pipe");
        writeln!(keyboard, "{line}").and_then(|()| keyboard.flush()).expect("vmprobe reads it");
    }
}

impl Drop for Debian {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.run.kill();
        let _ = self.run.wait();
    }
}

#[test]
fn a_debian_boots_from_its_disk_works_on_it_under_probes_and_ends_when_its_power_button_is_pressed() {
    let probes = ["submit_bio", "virtio_blk:virtio_queue_rq", "blk_mq_start_request%return"];
    let mut arguments = vec!["--cpus", "2", "--grace", "5m", "--count", "--output", "json"];
    arguments.extend(probes.iter().flat_map(|probe| ["--probe", probe]));
    let Some(mut debian) = Debian::boot(&arguments) else { return };
    debian.wait_for("login: ");
    debian.types("root");
    debian.wait_for("root@debian");
    // Written, forgotten, read again from the disk. The shell puts together what must not be in the echo of its line.
    debian.types(
        "cp -a /usr/bin /var/copy && sync && echo 3 > /proc/sys/vm/drop_caches && diff -r /usr/bin /var/copy && echo copied-$((40 + 2))",
    );
    debian.wait_for("copied-42");
    let uname = debian.ssh("uname -r");
    assert_code(&uname, 0);
    assert!(stdout(&uname).ends_with("-cloud-amd64\n"), "{uname:?}");
    debian.types("read -a disk < /sys/block/vda/stat; echo cpus-$(nproc) requests-$((disk[0] + disk[4])). state-$(systemctl is-system-running)");
    debian.wait_for("state-running");
    kill_process(Pid::from_child(&debian.run), Signal::TERM).expect("it runs");
    let ended = debian.run.wait().expect("the run");
    let console = debian.console();
    // Interrupted, and still everything was unmounted.
    assert_eq!(ended.code(), Some(130), "{console}");
    for expected in ["cpus-2", "All filesystems unmounted", "reboot: Power down"] {
        assert!(console.contains(expected), "no {expected}: {console}");
    }
    assert!(!console.contains("BUG:") && !console.contains("I/O error"), "{console}");
    let requests =
        console.rsplit_once("requests-").and_then(|(_, rest)| rest.split_once('.')).map(|(count, _)| count);
    let requests: u64 = requests.and_then(|count| count.parse().ok()).expect("a count");
    let accounts = accounts(&fs::read_to_string(debian.file("hits")).expect("the accounts"));
    let hits = |probe: &str| {
        let account = accounts.iter().find(|account| account["probe"] == probe).expect("an account");
        account["hits"].as_u64().expect("a count")
    };
    let [_, queued, started] = probes.map(hits);
    // Each request of the only disk is queued and started once.
    assert_eq!(queued, started, "{accounts:?}");
    assert!(queued >= requests && requests > 1000, "{requests}: {accounts:?}");
}
