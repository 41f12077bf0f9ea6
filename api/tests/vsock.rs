//! `vmprobe run --vsock` and `vmprobe vsock` on the local /dev/kvm, with a guest that has no driver for it.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{assert_code, local_kvm, output, stderr, stdout, vmprobe};
use rustix::process::{Pid, Signal, kill_process};

#[test]
fn a_port_without_a_listener_is_told_and_the_socket_goes_with_the_machine() {
    if !local_kvm() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("v").display().to_string();
    let refused = output(&["vsock", &path, "22"]);
    assert_code(&refused, 3);
    assert!(stderr(&refused).contains("No machine is there"), "{}", stderr(&refused));

    let option = format!("uds={path}");
    let machine =
        vmprobe(&["run", "ticker", "--vsock", &option, "--serial", "none", "--probe", "tick", "--count"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmprobe starts");
    let deadline = Instant::now() + Duration::from_secs(60);
    let refused = loop {
        let refused = output(&["vsock", &path, "22"]);
        assert_code(&refused, 3);
        if stderr(&refused).contains("listens on vsock port 22") {
            break refused;
        }
        assert!(Instant::now() < deadline, "{}", stderr(&refused));
        thread::sleep(Duration::from_millis(50));
    };
    assert!(stderr(&refused).contains("--wait"), "{}", stderr(&refused));
    let second = output(&["run", "ticker", "--vsock", &option]);
    assert_code(&second, 3);
    assert!(stderr(&second).contains("there is something already"), "{}", stderr(&second));

    let id = i32::try_from(machine.id()).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(id, Signal::INT).expect("a signal");
    let ended = machine.wait_with_output().expect("it ends");
    assert_eq!(ended.status.code(), Some(130), "{}", stderr(&ended));
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0);
}

#[test]
fn the_client_carries_both_directions_to_their_ends() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("v");
    let client = vmprobe(&["vsock", &path.display().to_string(), "5000", "--wait", "60s"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut client = client.expect("vmprobe starts");
    let listener = UnixListener::bind(&path).expect("a socket");
    // A machine whose guest does not listen yet.
    drop(listener.accept().expect("a connection"));
    let (mut stream, _) = listener.accept().expect("another");
    let mut hello = [0; 13];
    stream.read_exact(&mut hello).expect("the first line");
    assert_eq!(&hello, b"CONNECT 5000\n");
    stream.write_all(b"OK 1073741824\nfrom the guest\n").expect("an answer");
    client.stdin.take().expect("stdin").write_all(b"to the guest\n").expect("input");
    let mut sent = String::new();
    stream.read_to_string(&mut sent).expect("the input, to its end");
    assert_eq!(sent, "to the guest\n");
    stream.write_all(b"and the last word").expect("output");
    drop(stream);
    let ended = client.wait_with_output().expect("it ends");
    assert_code(&ended, 0);
    assert_eq!(stdout(&ended), "from the guest\nand the last word");
}
