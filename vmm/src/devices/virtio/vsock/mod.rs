//! The socket device (Virtio 1.2, 5.10): streams between programs of the guest and of the host.

mod connection;
mod host;
mod packet;
mod relay;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use super::{Device, DriverError, Request, outside, written};
use connection::BUFFER_BYTES;
use host::Host;
use packet::Header;
use relay::Relay;

pub use relay::ServedVsock;

/// The queues (5.10.2).
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// The addresses below are the hypervisor's, the local one and the host's (5.10.4; Linux: vsock(7)).
const FIRST_GUEST_CID: u32 = 3;

/// `sun_path` of an address (Linux: unix(7)), with its zero.
const MAX_PATH_BYTES: usize = 108;

/// A vsock device as the user describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockOptions {
    /// The guest's context id.
    pub cid: u32,
    /// The Unix socket.
    pub path: PathBuf,
}

/// Why there is no socket for a vsock device.
#[derive(Debug, thiserror::Error)]
pub enum OpenVsockError {
    /// The context id.
    #[error("{0} is no context id of a guest's; give one from {FIRST_GUEST_CID} to {max}", max = u32::MAX - 1)]
    Cid(u32),
    /// The path is too long with a port behind it.
    #[error("{}: a Unix socket's name has {MAX_PATH_BYTES} bytes at most, and `_PORT` comes behind this one; give a shorter one", .0.display())]
    TooLong(PathBuf),
    /// Something is there.
    #[error("{}: there is something already; if no machine uses it any more, remove it", .0.display())]
    Exists(PathBuf),
    /// It cannot be made.
    #[error("{}: the socket cannot be made", path.display())]
    Bind {
        /// The socket.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// What the device is connected to.
trait Side: Send {
    /// The guest's context id.
    fn guest_cid(&self) -> u64;
    /// Readable when something has come from the host's programs; [`Side::woken`] then takes it.
    fn wakes(&self) -> RawFd;
    fn woken(&mut self);
    /// A driver is there.
    fn start(&mut self);
    /// It is gone: so are all connections.
    fn reset(&mut self);
    /// Whether packets of the guest's are taken: not while it does not take its own.
    fn takes_packets(&self) -> bool;
    /// Takes a packet of the guest's; `data` is its data, or nothing where it says that there is more than any connection has room for.
    fn receive(&mut self, header: &Header, data: &[u8]);
    /// Whether there is a packet for the guest.
    fn has_packet(&mut self) -> bool;
    /// Takes a packet for the guest, with as much data as there is room for. Not without [`Side::has_packet`].
    fn take_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)>;
}

/// The host's end of a vsock device.
pub struct Vsock {
    side: Box<dyn Side>,
    /// Of the Unix socket; it goes with this.
    _file: Option<SocketFile>,
}

impl std::fmt::Debug for Vsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vsock").field("cid", &self.side.guest_cid()).finish_non_exhaustive()
    }
}

struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::debug!(%error, socket = %self.0.display(), "A vsock socket was not removed");
        }
    }
}

impl Vsock {
    /// Makes the socket, which only its owner can reach.
    ///
    /// # Errors
    /// [`OpenVsockError`].
    pub fn open(options: &VsockOptions) -> Result<Self, OpenVsockError> {
        let VsockOptions { cid, path } = options;
        if !(FIRST_GUEST_CID..u32::MAX).contains(cid) {
            return Err(OpenVsockError::Cid(*cid));
        }
        if host::port_path(path, u32::MAX).as_os_str().len() >= MAX_PATH_BYTES {
            return Err(OpenVsockError::TooLong(path.clone()));
        }
        let cannot = |source| OpenVsockError::Bind { path: path.clone(), source };
        let listener = bind(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists | io::ErrorKind::AddrInUse => OpenVsockError::Exists(path.clone()),
            _ => cannot(error),
        })?;
        let file = SocketFile(path.clone());
        let host = Host::new(*cid, path.clone(), listener).map_err(cannot)?;
        Ok(Self { side: Box::new(host), _file: Some(file) })
    }

    /// One whose socket is at the other end of `stream`, which does not block ([`ServedVsock`]).
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub fn relayed(cid: u32, stream: File) -> io::Result<Self> {
        Ok(Self { side: Box::new(Relay::new(cid, stream)?), _file: None })
    }
}

/// Binds a socket of the owner's alone: it gets its name when it is that.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = SocketFile(name.into());
    let listener = UnixListener::bind(&new.0)?;
    fs::set_permissions(&new.0, fs::Permissions::from_mode(0o600))?;
    // Unlike a rename, a link replaces nothing.
    fs::hard_link(&new.0, path)?;
    Ok(listener)
}

impl Device for Vsock {
    fn name(&self) -> &str {
        "vsock"
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        0
    }

    /// Receive, transmit, events: there are none of those, since a machine with this device is not saved.
    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 8]
    }

    /// `struct virtio_vsock_config` (5.10.4).
    fn config(&self) -> Vec<u8> {
        self.side.guest_cid().to_le_bytes().to_vec()
    }

    fn wakes(&self) -> Option<RawFd> {
        Some(self.side.wakes())
    }

    fn woken(&mut self) {
        self.side.woken();
    }

    fn start(&mut self, _: u64) {
        self.side.start();
    }

    fn reset(&mut self) {
        self.side.reset();
    }

    fn is_ready(&mut self, queue: usize) -> bool {
        match queue {
            RECEIVE => self.side.has_packet(),
            TRANSMIT => self.side.takes_packets(),
            _ => false,
        }
    }

    fn serve(&mut self, queue: usize, mut request: Request<'_>) -> Result<u32, DriverError> {
        if queue == RECEIVE {
            let room = request.writer.available_bytes().checked_sub(Header::BYTES);
            let room = room.filter(|room| *room > 0).ok_or(DriverError::Lacks("room for a packet"))?;
            if let Some((header, data)) = self.side.take_packet(room) {
                request.writer.write_all(&header.bytes()).map_err(outside)?;
                request.writer.write_all(&data).map_err(outside)?;
            }
            return Ok(written(&request.writer));
        }
        let mut header = [0; Header::BYTES];
        request.reader.read_exact(&mut header).map_err(|_| DriverError::Lacks("its header"))?;
        let header = Header::parse(&header);
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        if length > request.reader.available_bytes() {
            return Err(DriverError::Lacks("the data that its header tells of"));
        }
        let mut data = Vec::new();
        if header.len <= BUFFER_BYTES {
            data.resize(length, 0);
            request.reader.read_exact(&mut data).map_err(outside)?;
        }
        self.side.receive(&header, &data);
        Ok(0)
    }
}
