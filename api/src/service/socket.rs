//! The Unix socket: whose it is, and who may connect.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use tokio::net::UnixListener;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Status};

use super::status;
use crate::exit::Failure;

/// Sets the rights of an open file, of one that was opened by its path alone (O_PATH, open(2)) too.
fn set_mode(file: &OwnedFd, mode: u32) -> std::io::Result<()> {
    fs::set_permissions(format!("/proc/self/fd/{}", file.as_raw_fd()), fs::Permissions::from_mode(mode))
}

/// A bound socket; its file goes with it.
pub struct Socket {
    path: PathBuf,
    listener: net::UnixListener,
    /// The file itself, whatever stands at its path by now.
    file: OwnedFd,
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
        let file = rustix::fs::open(&new, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
        let file = file.map_err(|error| cannot(error.into()))?;
        set_mode(&file, 0o600).map_err(cannot)?;
        let inode = rustix::fs::fstat(&file).map_err(|error| cannot(error.into()))?.st_ino;
        // Unlike a rename, a link does not replace what may have come there meanwhile.
        let linked = fs::hard_link(&new, path);
        fs::remove_file(&new).ok();
        linked.map_err(cannot)?;
        listener.set_nonblocking(true).map_err(cannot)?;
        Ok(Self { path: path.to_owned(), listener, file, inode: Some(inode) })
    }

    /// Leaves its file to another process to be removed: an isolated one can remove nothing.
    pub fn leave_file(mut self) -> Self {
        self.inode = None;
        self
    }

    /// What takes its connections.
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub fn listener(&self) -> Result<UnixListener, Failure> {
        let listener = self.listener.try_clone().and_then(UnixListener::from_std);
        listener.map_err(|error| Failure::Host(format!("--socket {}: {error}", self.path.display())))
    }

    /// Lets all users connect, or its owner alone: what they may do is asked of each request.
    ///
    /// # Errors
    /// The file's rights cannot be changed.
    pub fn open_to_others(&self, open: bool) -> Result<(), Failure> {
        let mode = if open { 0o666 } else { 0o600 };
        set_mode(&self.file, mode)
            .map_err(|error| Failure::Host(format!("--socket {}: {error}", self.path.display())))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if self.inode.is_some_and(|inode| fs::metadata(&self.path).is_ok_and(|file| file.ino() == inode)) {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Lets the service's own user and root through: the rights of the socket's file could have been widened.
pub fn check_peer(request: Request<()>) -> Result<Request<()>, Status> {
    let own = rustix::process::geteuid().as_raw();
    let peer = request.extensions().get::<UdsConnectInfo>().and_then(|info| info.peer_cred);
    if peer.is_some_and(|peer| peer.uid() == own || peer.uid() == 0) {
        return Ok(request);
    }
    tracing::warn!("A request of {peer:?} was refused: the service is user {own}'s");
    Err(status::not_the_owner())
}
