//! A tap (Linux: Documentation/networking/tuntap.rst).

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, SocketType};
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

use super::{BackEnd, HEADER_BYTES, MAX_SENT_BYTES, OFFLOADS};

const DEVICE: &str = "/dev/net/tun";

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenTapError {
    /// Nothing has that name.
    #[error(
        "There is no network interface `{0}`; make a tap with `ip tuntap add mode tap user USER name {0}` and `ip link set {0} up`"
    )]
    Missing(String),
    /// The kernel has no taps, or not for this user.
    #[error("{DEVICE} cannot be opened")]
    Device(#[source] io::Error),
    /// It is another user's, another program uses it, or it is no tap.
    #[error(
        "{name} cannot be used; it has to be a tap without multi_queue that no other program uses and that belongs to this user \
         (`ip tuntap` lists them)"
    )]
    Attach {
        /// The tap.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The host has no more file descriptors.
    #[error("Could not make an event for a network; allow more open files (ulimit -n)")]
    Event(#[source] io::Error),
}

pub(super) struct Tap {
    name: String,
    file: File,
    buffer: Vec<u8>,
}

impl Tap {
    pub fn open(name: &str) -> Result<Self, OpenTapError> {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None);
        // Whoever may make interfaces would otherwise get a new one for a name that is misspelt.
        let index = socket.and_then(|socket| name_to_index(&socket, name));
        if index.is_err() {
            return Err(OpenTapError::Missing(name.to_owned()));
        }
        let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DEVICE);
        let file = file.map_err(OpenTapError::Device)?;
        attach(&file, name).map_err(|source| OpenTapError::Attach { name: name.to_owned(), source })?;
        Ok(Self { name: name.to_owned(), file, buffer: vec![0; HEADER_BYTES + MAX_SENT_BYTES] })
    }
}

/// Makes `file` the tap's, with a header before each frame.
fn attach(file: &File, name: &str) -> io::Result<()> {
    // `struct ifreq`: the name with its zero, flags, and room for the rest of its union.
    let mut request = [0u8; size_of::<libc::ifreq>()];
    if name.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = u16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).unwrap_or(0);
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY:
    // - the argument has the size and the layout of a `struct ifreq`, with a zero behind the name, which the kernel copies in and out
    //   before the call returns (Linux: drivers/net/tun.c, TUNSETIFF); it keeps no pointer to it;
    // - what it copies out goes to `request` alone, which nobody else borrows.
    check(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF, &mut request) })?;
    let length = libc::c_int::try_from(HEADER_BYTES).unwrap_or(0);
    // SAFETY: the argument is an int that the kernel reads before the call returns (TUNSETVNETHDRSZ); nothing is written.
    check(unsafe { ioctl_with_ref(file, libc::TUNSETVNETHDRSZ, &length) })?;
    set_offloads(file, 0)
}

/// What of a frame may be left to who reads it.
fn set_offloads(file: &File, offloads: libc::c_uint) -> io::Result<()> {
    // SAFETY: the argument is a number (TUNSETOFFLOAD); no memory is touched.
    check(unsafe { ioctl_with_val(file, libc::TUNSETOFFLOAD, offloads.into()) })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl BackEnd for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn offloads(&self) -> u64 {
        OFFLOADS
    }

    fn set_offloads(&mut self, features: u64) {
        // What the guest leaves to the host needs no word; segments are not offered to it.
        let offloads = if features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0 { libc::TUN_F_CSUM } else { 0 };
        if let Err(error) = set_offloads(&self.file, offloads) {
            tracing::warn!(%error, tap = self.name, "TUNSETOFFLOAD");
        }
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> io::Result<Option<()>> {
        loop {
            match self.file.read(&mut self.buffer) {
                Ok(length) if length >= HEADER_BYTES => {
                    frame.extend_from_slice(&self.buffer[..length]);
                    return Ok(Some(()));
                }
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // It is down (EIO), which passes.
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock
                        || error.raw_os_error() == Some(libc::EIO) =>
                {
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self, frame: &[u8]) {
        // It says no to a header that makes no sense (EINVAL), and takes nothing while it is down (EIO).
        if let Err(error) = self.file.write(frame) {
            tracing::debug!(%error, tap = self.name, "A frame was lost");
        }
    }
}
