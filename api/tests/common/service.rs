//! A `vmprobe serve` of a test's own.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Output, Stdio};

use tonic::transport::{Channel, Endpoint};

use super::{assert_code, stdout, vmprobe};

/// A server process with a socket of its own.
pub struct Service {
    pub child: Child,
    pub dir: tempfile::TempDir,
}

impl Service {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().expect("a directory"))
    }

    pub fn start_in(dir: tempfile::TempDir) -> Self {
        Self::start_with(dir, &[])
    }

    pub fn start_with(dir: tempfile::TempDir, args: &[&str]) -> Self {
        let mut child = vmprobe(&[&["serve"], args, &["--audit-log"]].concat())
            .arg(dir.path().join("audit"))
            .env("VMPROBE_SOCKET", dir.path().join("socket"))
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmprobe starts");
        let mut line = String::new();
        let stderr = child.stderr.as_mut().expect("piped");
        BufReader::new(stderr).read_line(&mut line).expect("a line");
        assert!(line.starts_with("vmprobe: serving at "), "{line}");
        Self { child, dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    /// The command as a client.
    pub fn client(&self, args: &[&str]) -> Output {
        vmprobe(args).env("VMPROBE_SOCKET", self.socket()).output().expect("vmprobe starts")
    }

    /// The same, which must succeed; its JSON lines.
    #[track_caller]
    pub fn json(&self, args: &[&str]) -> Vec<serde_json::Value> {
        let output = self.client(&[args, &["--output", "json"]].concat());
        assert_code(&output, 0);
        stdout(&output).lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    pub async fn channel(&self) -> Channel {
        let endpoint = Endpoint::try_from(format!("unix://{}", self.socket().display())).expect("a path");
        endpoint.connect().await.expect("the service answers")
    }

    pub fn audit(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit")).expect("an audit log")
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid =
            i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
        rustix::process::kill_process(pid, signal).expect("it runs");
    }

    /// Its exit code after SIGTERM.
    pub fn terminate(mut self) -> (Option<i32>, tempfile::TempDir) {
        self.signal(rustix::process::Signal::TERM);
        let code = self.child.wait().expect("it ends").code();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a directory"));
        (code, dir)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // In order, so that no machine is left; some tests have ended it already.
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.signal(rustix::process::Signal::TERM);
            self.child.wait().ok();
        }
    }
}

impl Service {
    /// Kills it with SIGKILL and starts another one in its place.
    pub fn kill_and_restart(mut self) -> Self {
        self.signal(rustix::process::Signal::KILL);
        self.child.wait().expect("it ends");
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a directory"));
        assert!(dir.path().join("socket").exists(), "it could not clean up");
        Self::start_in(dir)
    }

    /// The process of a machine.
    pub fn worker(&self, name: &str) -> rustix::process::Pid {
        let socket = self.dir.path().join("socket.d").join(name).with_extension("sock");
        let found = std::process::Command::new("pgrep")
            .args(["--full", &format!("worker --socket {}", socket.display())])
            .output()
            .expect("pgrep starts");
        let pid = stdout(&found).trim().parse().expect("one process");
        rustix::process::Pid::from_raw(pid).expect("a pid")
    }
}
