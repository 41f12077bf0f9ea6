//! A `vmprobe serve` of a test's own.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::certificates::{Authority, Files, Wanted};
use super::{assert_code, stdout, vmprobe};

/// A server process with a socket of its own.
pub struct Service {
    pub child: Child,
    pub dir: tempfile::TempDir,
    pub args: Vec<String>,
    /// What it has said on stderr.
    log: Arc<Mutex<String>>,
}

impl Service {
    pub fn start() -> Self {
        Self::start_in(tempfile::tempdir().expect("a directory"))
    }

    pub fn start_in(dir: tempfile::TempDir) -> Self {
        Self::start_with(dir, &[])
    }

    pub fn start_with(dir: tempfile::TempDir, args: &[&str]) -> Self {
        let child = vmprobe(&[&["serve"], args, &["--audit-log"]].concat())
            .arg(dir.path().join("audit"))
            .env("VMPROBE_SOCKET", dir.path().join("socket"))
            .stderr(Stdio::piped())
            .spawn()
            .expect("vmprobe starts");
        let mut service = Self::of(child, dir);
        service.args = args.iter().map(|&arg| arg.to_owned()).collect();
        service
    }

    /// A server process whose standard error is piped, and the directory that its socket is in.
    pub fn of(mut child: Child, dir: tempfile::TempDir) -> Self {
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let log = Arc::default();
        // From here on it ends with the test, however that ends.
        let service = Self { child, dir, args: Vec::new(), log: Arc::clone(&log) };
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                *log.lock().expect("no panic") += &format!("{line}\n");
            }
        });
        service.wait_for("vmprobe: serving at ");
        service
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("no panic").clone()
    }

    /// Waits until it has said something on stderr; the line.
    #[track_caller]
    pub fn wait_for(&self, text: &str) -> String {
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            // The last line may not be whole yet.
            let log = self.log();
            let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().find(|line| line.contains(text)) {
                return line.to_owned();
            }
            assert!(Instant::now() < until, "It does not say {text:?}:\n{log}");
            std::thread::sleep(Duration::from_millis(10));
        }
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

    pub fn endpoint(&self) -> Endpoint {
        Endpoint::try_from(format!("unix://{}", self.socket().display())).expect("a path")
    }

    pub async fn channel(&self) -> Channel {
        self.endpoint().connect().await.expect("the service answers")
    }

    pub fn audit(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("audit")).expect("an audit log")
    }

    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: Signal) {
        rustix::process::kill_process(self.pid(), signal).expect("it runs");
    }

    /// Its exit code after SIGTERM.
    pub fn terminate(mut self) -> (Option<i32>, tempfile::TempDir) {
        self.signal(Signal::TERM);
        let code = self.child.wait().expect("it ends").code();
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a directory"));
        (code, dir)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // In order, so that no machine is left; some tests have ended it already.
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.signal(Signal::TERM);
            self.child.wait().ok();
        }
    }
}

impl Service {
    /// Kills it with SIGKILL and starts another one in its place.
    pub fn kill_and_restart(self) -> Self {
        let (dir, args) = self.kill();
        Self::start_with(dir, &args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Kills it with SIGKILL. Returns its directory and arguments.
    pub fn kill(mut self) -> (tempfile::TempDir, Vec<String>) {
        self.signal(Signal::KILL);
        self.child.wait().expect("it ends");
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().expect("a directory"));
        assert!(dir.path().join("socket").exists(), "it could not clean up");
        (dir, std::mem::take(&mut self.args))
    }

    /// The process of a machine.
    pub fn worker(&self, name: &str) -> Pid {
        let socket = self.dir.path().join("socket.d").join(name).with_extension("sock");
        let found = Command::new("pgrep")
            .args(["--full", &format!("worker --socket {}", socket.display())])
            .output()
            .expect("pgrep starts");
        let pid = stdout(&found).trim().parse().expect("one process");
        Pid::from_raw(pid).expect("a pid")
    }
}

/// A service on TCP, its CA, and its directory.
pub struct Tls {
    pub service: Service,
    pub authority: Authority,
}

impl Tls {
    pub fn start(access: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let authority = Authority::new(&dir.path().join("ca.pem"));
        authority.issue(&dir.path().join("server"), Wanted::server());
        std::fs::write(dir.path().join("access.toml"), access).expect("written");
        let service = start_on_tcp(dir);
        Self { service, authority }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.service.dir.path().join(name)
    }

    pub fn port(&self) -> u16 {
        let line = self.service.wait_for("serving at https://");
        line.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port")
    }

    pub fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port())
    }

    /// A client's certificate.
    pub fn client(&self, name: &'static str) -> Files {
        self.authority.issue(&self.path(name), Wanted::client(name))
    }

    /// The command as the holder of a certificate.
    pub fn as_holder(&self, files: &Files, args: &[&str]) -> Output {
        self.command(&self.url(), files, &self.authority.file, args).output().expect("vmprobe starts")
    }

    pub fn command(&self, url: &str, files: &Files, ca: &Path, args: &[&str]) -> Command {
        let mut command = vmprobe(args);
        command
            .env("VMPROBE_SERVICE", url)
            .env("VMPROBE_TLS_CERT", &files.certificate)
            .env("VMPROBE_TLS_KEY", &files.key)
            .env("VMPROBE_TLS_CA", ca);
        command
    }

    pub async fn channel(&self, files: &Files) -> Channel {
        let read = |path: &Path| std::fs::read(path).expect("a file");
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(read(&self.authority.file)))
            .identity(Identity::from_pem(read(&files.certificate), read(&files.key)));
        let endpoint = Endpoint::try_from(self.url()).expect("a URL").tls_config(tls).expect("certificates");
        endpoint.connect().await.expect("the service answers")
    }

    pub fn access(&self, text: &str) {
        std::fs::write(self.path("access.toml"), text).expect("written");
        self.service.signal(Signal::HUP);
    }

    pub fn audit(&self) -> Vec<serde_json::Value> {
        self.service.audit().lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

/// A service on TCP with what is in a directory.
fn start_on_tcp(dir: tempfile::TempDir) -> Service {
    let path = |name: &str| dir.path().join(name).display().to_string();
    let (cert, key, ca) = (path("server.pem"), path("server.key"), path("ca.pem"));
    let access = path("access.toml");
    let args = ["--listen", "127.0.0.1:0", "--tls-cert", &cert, "--tls-key", &key, "--tls-client-ca", &ca];
    let service = Service::start_with(dir, &[&args[..], &["--access", &access]].concat());
    service.wait_for("serving at https://");
    service
}
