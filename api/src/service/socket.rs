//! The Unix socket: whose it is, and who may speak on it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use super::status;
use crate::exit::Failure;

/// A bound socket; its file goes with it.
pub struct Socket {
    path: PathBuf,
    listener: net::UnixListener,
    /// Of the file, by which it is known again; `None` if somebody else removes it.
    inode: Option<u64>,
}

impl Socket {
    /// Binds a socket that only its owner can reach.
    ///
    /// # Errors
    /// Another service listens there, something else stands there, or the directory cannot be written.
    pub fn bind(path: &Path) -> Result<Self, Failure> {
        let failure = |what: String| Failure::Host(format!("--socket {}: {what}", path.display()));
        if net::UnixStream::connect(path).is_ok() {
            return Err(failure("A service listens there already; give another path".to_owned()));
        }
        // What a service that was killed has left behind. Anything but a socket makes bind fail.
        if fs::symlink_metadata(path).is_ok_and(|file| (file.mode() & 0o170_000) == 0o140_000) {
            fs::remove_file(path)
                .map_err(|error| failure(format!("The old socket cannot be removed: {error}")))?;
        }
        // It is made under another name and moved when it is the owner's alone.
        let new = path.with_extension("new");
        fs::remove_file(&new).ok();
        let cannot = |error: std::io::Error| failure(format!("Cannot be made: {error}"));
        let listener = net::UnixListener::bind(&new).map_err(cannot)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).map_err(cannot)?;
        let inode = fs::metadata(&new).map_err(cannot)?.ino();
        // Unlike a rename, a link does not replace what may have come there meanwhile.
        let linked = fs::hard_link(&new, path);
        fs::remove_file(&new).ok();
        linked.map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        Ok(Self { path: path.to_owned(), listener, inode: Some(inode) })
    }

    /// Leaves its file to another process to be removed: an isolated one can remove nothing.
    pub fn leave_file(mut self) -> Self {
        self.inode = None;
        self
    }

    /// Its connections.
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub fn incoming(&self) -> Result<UnixListenerStream, Failure> {
        let listener = self.listener.try_clone().and_then(UnixListener::from_std);
        let failure = |error| Failure::Host(format!("--socket {}: {error}", self.path.display()));
        listener.map(UnixListenerStream::new).map_err(failure)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.inode.is_some_and(|inode| fs::metadata(&self.path).is_ok_and(|file| file.ino() == inode)) {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Who speaks, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub pid: Option<i32>,
}

impl Peer {
    /// The peer of a request that [`check_peer`] has let through.
    pub fn of<T>(request: &Request<T>) -> Option<Self> {
        let credentials = request.extensions().get::<UdsConnectInfo>()?.peer_cred?;
        Some(Self { uid: credentials.uid(), pid: credentials.pid() })
    }
}

/// Lets the service's own user and root through: the rights of the socket's file could have been widened.
pub fn check_peer(request: Request<()>) -> Result<Request<()>, Status> {
    let own = rustix::process::geteuid().as_raw();
    match Peer::of(&request) {
        Some(peer) if peer.uid == own || peer.uid == 0 => Ok(request),
        peer => {
            tracing::warn!("A request of {peer:?} was refused: the service is user {own}'s");
            Err(status::denied())
        }
    }
}
