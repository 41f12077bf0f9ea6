//! What keeps the machines' processes from the host, and the service's life under systemd: seen from outside, on a real service.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::service::Service;
use common::{assert_code, local_kvm, output, stderr, vmprobe};
use rustix::process::{Pid, Signal, kill_process};

const DEADLINE: Duration = Duration::from_secs(20);

/// The value of a line of a status file (proc_pid_status(5)).
fn status(file: &Path, name: &str) -> String {
    let text = fs::read_to_string(file).expect("it runs");
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.expect("a line of that name").trim().to_owned()
}

fn proc_of(pid: Pid) -> PathBuf {
    Path::new("/proc").join(pid.as_raw_pid().to_string())
}

/// Asks for a machine until it is as expected.
#[track_caller]
fn wait_for(
    service: &Service,
    name: &str,
    expected: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    let until = Instant::now() + DEADLINE;
    loop {
        let machine = service.json(&["vm", "show", name]).remove(0);
        if expected(&machine) {
            return machine;
        }
        assert!(Instant::now() < until, "{machine}");
    }
}

#[test]
fn each_thread_of_a_machines_process_has_no_rights_and_the_contract_says_so() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t", "--cpus", "4", "--start"]);
    service.json(&["probe", "add", "t", "tick"]);
    assert_eq!(service.json(&["events", "t", "--max", "5"]).len(), 5);
    let process = proc_of(service.worker("t"));

    let threads: Vec<_> = fs::read_dir(process.join("task")).expect("it runs").collect();
    assert!(threads.len() > 5, "four vCPUs, the main thread and tokio's");
    for thread in threads {
        let file = thread.expect("a thread").path().join("status");
        assert_eq!(status(&file, "Seccomp"), "2", "{}", file.display());
        assert_eq!(status(&file, "NoNewPrivs"), "1");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(status(&file, set), "0000000000000000", "{set}");
        }
        // Another user may not change it, and gains nothing by it.
        if rustix::process::geteuid().is_root() {
            assert_eq!(status(&file, "CapBnd"), "0000000000000000");
        }
    }
    let limits = fs::read_to_string(process.join("limits")).expect("it runs");
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).expect("a limit");
        line.split_whitespace().rev().nth(1).map(str::to_owned)
    };
    assert_eq!(limit("Max core file size").as_deref(), Some("0"));
    assert_eq!(limit("Max open files").as_deref(), Some("256"));
    // What the service was started with stays with it.
    if let Ok(environment) = fs::read(process.join("environ")) {
        assert!(!String::from_utf8_lossy(&environment).contains("VMPROBE_SOCKET"));
    }

    let isolation = &service.json(&["vm", "show", "t"])[0]["isolation"];
    assert_eq!((&isolation["seccomp"], &isolation["no_capabilities"]), (&true.into(), &true.into()));
    println!("isolation: {isolation}");
    // It looks like any other to the next service.
    let service = service.kill_and_restart();
    assert_eq!(&service.json(&["vm", "show", "t"])[0]["isolation"], isolation);
}

#[test]
fn a_process_that_makes_a_forbidden_system_call_is_reported_with_that_reason() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    // As seccomp ends it; that it does is shown where the filters are.
    kill_process(service.worker("t"), Signal::SYS).expect("it runs");
    let gone = wait_for(&service, "t", |machine| {
        machine["state"] == "failed" && machine["end"] != "its process is gone"
    });
    let end = gone["end"].as_str().expect("a reason");
    assert!(end.contains("signal 31 (SIGSYS): it made a system call that it must not"), "{end}");
    assert!(gone["isolation"].is_null(), "{gone}");
    assert_code(&service.client(&["vm", "rm", "t"]), 0);
}

#[test]
fn an_image_is_found_through_links_and_from_the_clients_directory() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("image"), guest::programs::TICKER).expect("an image");
    std::os::unix::fs::symlink("image", dir.path().join("link")).expect("a link");
    let created = vmprobe(&["vm", "create", "link", "--name", "t", "--start"])
        .env("VMPROBE_SOCKET", service.socket())
        .current_dir(dir.path())
        .output()
        .expect("vmprobe starts");
    assert_code(&created, 0);
    service.json(&["probe", "add", "t", "tick"]);
    // The file was read before the process gave up reading files.
    fs::remove_file(dir.path().join("image")).expect("it is there");
    assert_eq!(service.json(&["events", "t", "--max", "5"]).len(), 5);
}

#[test]
fn a_name_is_free_as_soon_as_its_machine_is_deleted_and_nothing_is_left_of_it() {
    if !local_kvm() {
        return;
    }
    let service = Service::start();
    for _ in 0..10 {
        service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
        assert_code(&service.client(&["vm", "rm", "t"]), 0);
        assert!(!service.dir.path().join("socket.d/t.sock").exists());
    }
    // One that the service has found and not started goes as well.
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    let service = service.kill_and_restart();
    assert_code(&service.client(&["vm", "rm", "t"]), 0);
    service.json(&["vm", "create", "ticker", "--name", "t", "--start"]);
    // What cannot be made leaves nothing either.
    assert_code(&service.client(&["vm", "create", "/nowhere/vmlinuz", "--name", "u"]), 4);
    let left = fs::read_dir(service.dir.path().join("socket.d")).expect("a directory").count();
    assert_eq!(left, 1);
}

/// A cgroup of a test's own, on a host that lets this user make one.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").expect("proc_pid_mounts(5)");
        let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let mount = mounts.lines().map(fields).find(|fields| fields[2] == "cgroup2");
        let group =
            mount.map(|fields| Path::new(&fields[1]).join(format!("vmprobe-test-{}", std::process::id())));
        match group.map(|group| fs::create_dir(&group).map(|()| group)) {
            Some(Ok(group)) => Some(Self(group)),
            other => {
                println!("skipped: no cgroup can be made: {other:?}");
                None
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The kernel may take a moment to let the last process go.
        let until = Instant::now() + DEADLINE;
        fs::remove_dir(self.0.join("service")).ok();
        while fs::remove_dir(&self.0).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
            fs::remove_dir(self.0.join("service")).ok();
        }
    }
}

/// Starts a service in a cgroup.
fn serve_in(group: &Path, dir: tempfile::TempDir) -> Service {
    let child = Command::new("sh")
        .args(["-c", r#"echo $$ > "$0/cgroup.procs" && exec "$@""#])
        .arg(group)
        .args([env!("CARGO_BIN_EXE_vmprobe"), "serve", "--socket"])
        .arg(dir.path().join("socket"))
        .stderr(Stdio::piped())
        .spawn()
        .expect("sh starts");
    Service::of(child, dir)
}

#[test]
fn each_machine_has_its_cgroup_where_the_service_has_one_to_itself() {
    if !local_kvm() {
        return;
    }
    let Some(group) = Group::new() else { return };
    let processes = |below: &str| {
        let text = fs::read_to_string(group.0.join(below).join("cgroup.procs")).expect("a group");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let mut service = serve_in(&group.0, tempfile::tempdir().expect("a directory"));
    assert_eq!(processes("service"), [service.child.id().to_string()]);
    for name in ["a", "b"] {
        service.json(&["vm", "create", "ticker", "--name", name, "--start", "--memory", "64M"]);
        let isolation = &service.json(&["vm", "show", name])[0]["isolation"];
        let in_own = isolation["cgroup"].as_str().is_some_and(|path| path.ends_with(&format!("/vm-{name}")));
        assert!(in_own, "{isolation}");
        assert_eq!(processes(&format!("vm-{name}")), [service.worker(name).as_raw_pid().to_string()]);
        // Where the host hands the controller down.
        let limit = fs::read_to_string(group.0.join(format!("vm-{name}/memory.max"))).ok();
        let limit = limit.map_or(0, |limit| limit.trim().parse::<u64>().expect("a limit"));
        assert_eq!(isolation["memory_limit_bytes"], serde_json::Value::from(limit));
        println!("isolation: {isolation}");
    }
    assert_code(&service.client(&["vm", "rm", "a"]), 0);
    assert!(!group.0.join("vm-a").exists());
    assert!(processes("").is_empty(), "controllers are handed down by groups without processes");

    // The next service stands in the service's group from its start, as systemd has it, and takes the machine's over.
    service.child.kill().expect("it runs");
    service.child.wait().expect("it ends");
    let dir = std::mem::replace(&mut service.dir, tempfile::tempdir().expect("a directory"));
    let service = serve_in(&group.0.join("service"), dir);
    assert_eq!(service.json(&["vm", "show", "b"])[0]["state"], "running");
    assert_eq!(processes("vm-b").len(), 1);
    assert_code(&service.client(&["vm", "rm", "b"]), 0);
    assert!(!group.0.join("vm-b").exists());
}

#[test]
fn systemd_is_told_when_the_service_is_ready_and_when_it_stops() {
    let dir = tempfile::tempdir().expect("a directory");
    let notified = UnixDatagram::bind(dir.path().join("notify")).expect("a socket");
    notified.set_read_timeout(Some(DEADLINE)).expect("a time");
    let receive = || {
        let mut buffer = [0; 256];
        let length = notified.recv(&mut buffer).expect("it says something");
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let socket = dir.path().join("socket");
    let mut child = vmprobe(&["serve", "--socket"])
        .arg(&socket)
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .stderr(Stdio::null())
        .spawn()
        .expect("vmprobe starts");
    assert_eq!(receive(), "READY=1\n");
    // It keeps its word.
    let listed = vmprobe(&["vm", "ls"]).env("VMPROBE_SOCKET", &socket).output().expect("vmprobe starts");
    assert_code(&listed, 0);
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a pid");
    assert_eq!(status(&proc_of(pid).join("status"), "NoNewPrivs"), "1");
    kill_process(pid, Signal::TERM).expect("it runs");
    assert_eq!(receive(), "STOPPING=1\n");
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn the_systemd_unit_is_one_and_starts_the_service_as_it_can_be_started() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/systemd/vmprobe.service");
    let text = fs::read_to_string(unit).expect("the unit");
    let command =
        text.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/vmprobe ")).expect("a command");
    let args: Vec<&str> = command.split(' ').chain(["--help"]).collect();
    assert_code(&output(&args), 0);

    // The program is where the build has put it.
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("vmprobe.service");
    fs::write(&file, text.replace("/usr/bin/vmprobe", env!("CARGO_BIN_EXE_vmprobe"))).expect("a unit");
    let verified = match Command::new("systemd-analyze").arg("verify").arg(&file).output() {
        Ok(verified) => verified,
        Err(error) => return println!("skipped: systemd-analyze: {error}"),
    };
    // Before version 254 it does not know this key, and goes on without it.
    let said = stderr(&verified);
    let wrong: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("vmprobe.service") && !line.contains("'DelegateSubgroup'"))
        .collect();
    assert!(wrong.is_empty() && verified.status.success(), "{said}");
}
