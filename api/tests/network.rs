//! `vmprobe run --net` on the local /dev/kvm, with a guest that has no driver for it. What frames do is tested in vmm.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{assert_code, local_kvm, output, passt, stderr, vmprobe};
use rustix::process::{Pid, Signal, kill_process};

/// The process that another one has started.
fn child_of(parent: u32) -> Option<Pid> {
    let children = std::fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    Pid::from_raw(children.split_whitespace().next()?.parse().ok()?)
}

#[test]
fn what_cannot_be_had_is_told_with_what_to_do() {
    if !local_kvm() {
        return;
    }
    let missing = output(&["run", "ticker", "--net", "tap=none-such"]);
    assert_code(&missing, 3);
    assert!(stderr(&missing).contains("ip tuntap add"), "{}", stderr(&missing));
    let no_passt =
        vmprobe(&["run", "ticker", "--net", "user"]).env("PATH", "/none").output().expect("vmprobe");
    assert_code(&no_passt, 3);
    assert!(stderr(&no_passt).contains("apt install passt"), "{}", stderr(&no_passt));
    let nested = output(&["run", "demo", "--accel", "nested", "--net", "tap=none-such"]);
    assert_code(&nested, 3);
    assert!(stderr(&nested).contains("--net user does"), "{}", stderr(&nested));
}

#[test]
fn a_port_is_forwarded_by_passt_and_the_machine_outlives_it() {
    if !local_kvm() || !passt() {
        return;
    }
    // One that is free now.
    let port =
        TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port();
    let network = format!("user,forward=tcp:{port}:80");
    let mut machine =
        vmprobe(&["run", "ticker", "--net", &network, "--serial", "none", "--probe", "tick", "--count"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmprobe starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "port {port} is not forwarded");
        assert_eq!(machine.try_wait().expect("its state"), None, "it has ended");
        thread::sleep(Duration::from_millis(50));
    }
    kill_process(child_of(machine.id()).expect("passt runs"), Signal::KILL).expect("a signal");
    let mut lines = BufReader::new(machine.stderr.take().expect("stderr")).lines();
    let told = lines.by_ref().map_while(Result::ok).find(|line| line.contains("link is down"));
    assert!(told.expect("a message").contains("passt"));
    assert_eq!(machine.try_wait().expect("its state"), None, "the machine goes on");
    let id = i32::try_from(machine.id()).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(id, Signal::INT).expect("a signal");
    assert_eq!(machine.wait().expect("it ends").code(), Some(130));
    assert!(lines.map_while(Result::ok).any(|line| line.contains("interrupted")));
}
