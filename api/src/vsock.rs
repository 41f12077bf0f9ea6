//! Sockets between a guest and this host: the option of `vmprobe run`, and `vmprobe vsock`.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use vmm::{ServedVsock, Vsock, VsockOptions};

use crate::cli::VsockArgs;
use crate::exit::{Code, Failure};
use crate::images::chain;

/// The guest's address where none is given: the first that a guest can have.
const DEFAULT_CID: u32 = 3;

/// How long to wait before the next attempt.
const RETRY: Duration = Duration::from_millis(100);

/// The longest answer: `OK 4294967295` and a newline.
const MAX_ANSWER_BYTES: usize = 32;

/// The sockets that `--vsock` asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VsockWanted {
    /// `uds=PATH[,cid=N]`, with a comma in the name written twice.
    Here(VsockOptions),
    /// `relay[,cid=N]`, in the emulated machine: the socket is where that runs.
    Relayed(u32),
}

impl FromStr for VsockWanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut path, mut cid, mut relayed) = (None, None, false);
        for part in disk::split(text) {
            let twice = match part.split_once('=') {
                Some(("uds", name)) if !name.is_empty() => path.replace(name.into()).is_some(),
                Some(("cid", number)) => {
                    let number = number.parse().map_err(|_| format!("`{number}` is no context id"))?;
                    cid.replace(number).is_some()
                }
                None if part == "relay" => std::mem::replace(&mut relayed, true),
                _ => {
                    return Err(format!("`{part}` is nothing that vsock has; there are uds=PATH and cid=N"));
                }
            };
            if twice {
                return Err(format!("`{part}` was said before in another way; say it once"));
            }
        }
        let cid = cid.unwrap_or(DEFAULT_CID);
        match (path, relayed) {
            (Some(path), false) => Ok(Self::Here(VsockOptions { cid, path })),
            (None, true) => Ok(Self::Relayed(cid)),
            _ => Err("A Unix socket is needed: uds=PATH[,cid=N]".to_owned()),
        }
    }
}

impl VsockWanted {
    /// Makes the socket.
    ///
    /// # Errors
    /// It cannot be made, and what to do.
    pub fn open(&self) -> Result<Vsock, Failure> {
        let failure = |error: &dyn Error| Failure::Host(format!("--vsock: {}", chain(error)));
        match self {
            Self::Here(options) => Vsock::open(options).map_err(|error| failure(&error)),
            Self::Relayed(cid) => nested::init::vsock_port()
                .and_then(|port| Vsock::relayed(*cid, port))
                .map_err(|error| failure(&error)),
        }
    }

    /// Makes the socket for a machine at the other end of `stream`, which is given [`VsockWanted::relayed`].
    ///
    /// # Errors
    /// It cannot be made, and what to do.
    pub fn serve(&self, stream: UnixStream) -> Result<ServedVsock, Failure> {
        ServedVsock::new(self.open()?, stream).map_err(|error| Failure::Host(format!("--vsock: {error}")))
    }

    /// The same for the emulated machine.
    pub fn relayed(&self) -> String {
        let (Self::Here(VsockOptions { cid, .. }) | Self::Relayed(cid)) = self;
        format!("relay,cid={cid}")
    }
}

/// `vmprobe vsock`.
///
/// # Errors
/// There is no connection.
pub fn connect(args: &VsockArgs) -> Result<Code, Failure> {
    let deadline = Instant::now() + args.wait;
    let mut stream = loop {
        match open_stream(&args.path, args.port) {
            Ok(stream) => break stream,
            Err(_) if Instant::now() < deadline => thread::sleep(RETRY),
            Err(why) => return Err(Failure::Host(format!("{}: {why}", args.path.display()))),
        }
    };
    let mut to_guest = stream.try_clone().map_err(|error| Failure::Host(error.to_string()))?;
    // It may stay behind in a read of standard input when the connection has ended: the process does not wait for it.
    thread::spawn(move || {
        io::copy(&mut io::stdin().lock(), &mut to_guest).ok();
        to_guest.shutdown(Shutdown::Write).ok();
    });
    let mut stdout = io::stdout().lock();
    let mut buffer = vec![0; 64 << 10];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(Code::Done),
            Ok(length) => {
                let written = stdout.write_all(&buffer[..length]).and_then(|()| stdout.flush());
                written.map_err(|error| crate::output::closed(&error))?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure::Host(format!("The connection broke: {error}"))),
        }
    }
}

/// A stream to a port of the guest's.
fn open_stream(path: &Path, port: u32) -> Result<UnixStream, String> {
    let no_machine =
        |error| format!("No machine is there ({error}); `vmprobe run --vsock uds=PATH` makes one");
    let mut stream = UnixStream::connect(path).map_err(no_machine)?;
    let broke = |error: io::Error| format!("The connection broke: {error}");
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).map_err(broke)?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') && answer.len() < MAX_ANSWER_BYTES {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => {
                return Err(format!(
                    "Nothing in the guest listens on vsock port {port} (yet: --wait tries again)"
                ));
            }
            Ok(_) => answer.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(broke(error)),
        }
    }
    if answer.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err("This is no socket of a machine's --vsock".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_is_described_in_any_order() {
        let here = |cid, path: &str| Ok(VsockWanted::Here(VsockOptions { cid, path: path.into() }));
        assert_eq!("cid=7,uds=/run/v".parse(), here(7, "/run/v"));
        assert_eq!("uds=a,,b=c".parse(), here(3, "a,b=c"));
        for wrong in [
            "",
            "cid=3",
            "uds=",
            "uds=a,uds=b",
            "uds=a,cid=x",
            "uds=a,cid=-1",
            "uds=a,port=3",
            "a",
            "uds=a,relay",
        ] {
            assert!(wrong.parse::<VsockWanted>().is_err(), "{wrong}");
        }
        let relayed = VsockWanted::Relayed(9);
        assert_eq!(relayed.relayed().parse(), Ok(relayed));
    }
}
