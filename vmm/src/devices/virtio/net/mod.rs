//! The network device (Virtio 1.2, 5.1), in front of a tap or of a stream of frames.
//!
//! Frames that nobody takes are lost, as on any network.

mod stream;
mod tap;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::str::FromStr;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Device, DriverError, Request, outside, written};
use stream::Stream;
pub use tap::OpenTapError;
use tap::Tap;

/// The queues (5.1.2).
const RECEIVE: usize = 0;

/// `struct virtio_net_hdr` (5.1.6), before each frame.
const HEADER_BYTES: usize = 12;

/// The longest frame without the driver's buffers being larger than they have to be (5.1.6.3.1): Ethernet's, with a VLAN's tag.
const MAX_FRAME_BYTES: usize = 1518;

/// The longest that a driver can send: what is left to the back end to be cut into segments.
const MAX_SENT_BYTES: usize = 65_550;

/// How many events are taken at once.
const EVENTS: usize = 4;

/// What the device can have the back end do, and may be given to do by it.
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6;

/// A device's address.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// One of those that are for local use, as QEMU's are.
    #[must_use]
    pub fn random() -> Self {
        let mut address = [0x52, 0x54, 0, 0, 0, 0];
        // With these flags there is nothing that it could wait for or fail at, once the host has started.
        getrandom(&mut address[3..], GetRandomFlags::empty()).ok();
        Self(address)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text is no address of a device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseMacError {
    /// It does not look like one.
    #[error("`{0}` is no MAC address; it looks like 52:54:00:12:34:56")]
    Form(String),
    /// It is that of a group.
    #[error("{0} is the address of a group; the first number of a device's is even")]
    Group(MacAddress),
}

impl FromStr for MacAddress {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let form = || ParseMacError::Form(text.to_owned());
        let byte = |part: &str| {
            let is_byte = part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            is_byte.then(|| u8::from_str_radix(part, 16).ok()).flatten().ok_or_else(form)
        };
        let bytes = text.split(':').map(byte).collect::<Result<Vec<u8>, _>>()?;
        let address = Self(bytes.try_into().map_err(|_| form())?);
        if address.0[0] & 1 == 0 { Ok(address) } else { Err(ParseMacError::Group(address)) }
    }
}

/// Where frames go to and come from. Each begins with a header ([`HEADER_BYTES`]). It does not block.
trait BackEnd: Send + AsRawFd {
    /// For messages.
    fn name(&self) -> &str;
    /// What it can do of [`OFFLOADS`].
    fn offloads(&self) -> u64;
    /// What the driver and it have agreed on.
    fn set_offloads(&mut self, _features: u64) {}
    /// Receives a frame. None if there is none.
    ///
    /// # Errors
    /// It is gone.
    fn receive(&mut self, frame: &mut Vec<u8>) -> io::Result<Option<()>>;
    /// Whether it takes a frame.
    fn takes_frames(&self) -> bool {
        true
    }
    /// Sends a frame, or loses it.
    fn send(&mut self, frame: &[u8]);
    /// Sends what is left of the last one.
    ///
    /// # Errors
    /// It is gone.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A network of a machine.
pub struct Network {
    name: String,
    mac: MacAddress,
    /// None if it is gone.
    back_end: Option<Box<dyn BackEnd>>,
    /// The driver does not know yet that it is.
    has_changed: bool,
    epoll: Epoll,
    /// What can be offered.
    offloads: u64,
    /// What the driver has accepted.
    features: u64,
    /// A frame for the guest.
    received: Option<Vec<u8>>,
    sent: Vec<u8>,
}

impl fmt::Debug for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Network").field("mac", &self.mac).finish_non_exhaustive()
    }
}

impl Network {
    /// A tap that there is.
    ///
    /// # Errors
    /// [`OpenTapError`].
    pub fn tap(name: &str, mac: MacAddress) -> Result<Self, OpenTapError> {
        Self::new(Box::new(Tap::open(name)?), mac).map_err(OpenTapError::Event)
    }

    /// A stream of frames, each behind its length in four bytes, the most significant first: what QEMU has as `-netdev stream`, and
    /// passt as its socket. `name` is for messages.
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub fn stream(name: &str, stream: impl Into<OwnedFd>, mac: MacAddress) -> io::Result<Self> {
        Self::new(Box::new(Stream::new(name, stream.into())?), mac)
    }

    fn new(back_end: Box<dyn BackEnd>, mac: MacAddress) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        epoll.ctl(ControlOperation::Add, back_end.as_raw_fd(), EpollEvent::new(events, 0))?;
        let offloads = back_end.offloads();
        Ok(Self {
            name: "net".to_owned(),
            mac,
            back_end: Some(back_end),
            has_changed: false,
            epoll,
            offloads,
            features: 0,
            received: None,
            sent: Vec::new(),
        })
    }

    /// The machine's network number `index`.
    pub(crate) fn numbered(self, index: usize) -> Self {
        Self { name: format!("net{index}"), ..self }
    }

    /// Whether there is a frame for the guest. Returns an error if the back end is gone.
    fn receive(&mut self) -> io::Result<bool> {
        let Some(back_end) = &mut self.back_end else { return Ok(false) };
        while self.received.is_none() {
            let mut frame = Vec::new();
            if back_end.receive(&mut frame)?.is_none() {
                return Ok(false);
            }
            // Longer ones, of a network whose frames are, have no room.
            self.received = Some(frame).filter(|frame| frame.len() <= HEADER_BYTES + MAX_FRAME_BYTES);
        }
        Ok(true)
    }

    /// The back end is gone, and with it the link.
    fn lose(&mut self, error: &io::Error) {
        if let Some(back_end) = self.back_end.take() {
            self.has_changed = true;
            tracing::error!(
                %error,
                "{}: {} is gone, and the guest's link is down; the machine goes on without that network",
                self.name,
                back_end.name()
            );
        }
    }

    /// Takes out of a header what was not agreed on.
    fn check_header(&mut self) {
        let has = |bit: u32| self.features & 1 << bit != 0;
        // flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers.
        if !has(VIRTIO_NET_F_CSUM) {
            self.sent[..HEADER_BYTES].fill(0);
        } else if !has(VIRTIO_NET_F_HOST_TSO4) && !has(VIRTIO_NET_F_HOST_TSO6) {
            self.sent[1..6].fill(0);
        }
    }
}

impl Device for Network {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | self.offloads
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    /// `struct virtio_net_config` (5.1.4).
    fn config(&self) -> Vec<u8> {
        let status = if self.back_end.is_some() { VIRTIO_NET_S_LINK_UP } else { 0 };
        let mut config = self.mac.0.to_vec();
        config.extend(&status.to_le_bytes()[..2]);
        config
    }

    fn wakes(&self) -> Option<RawFd> {
        Some(self.epoll.as_raw_fd())
    }

    fn woken(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        let is_broken = events[..count].iter().any(|event| event.event_set().contains(EventSet::ERROR));
        let flushed = self.back_end.as_mut().map_or(Ok(()), |back_end| back_end.flush());
        let received = flushed.and_then(|()| self.receive());
        match received {
            Err(error) => self.lose(&error),
            Ok(_) if is_broken => self.lose(&io::Error::from_raw_os_error(libc::EBADFD)),
            Ok(_) => {}
        }
    }

    fn has_changed(&mut self) -> bool {
        std::mem::take(&mut self.has_changed)
    }

    fn start(&mut self, features: u64) {
        self.features = features;
        if let Some(back_end) = &mut self.back_end {
            back_end.set_offloads(features & self.offloads);
        }
    }

    fn reset(&mut self) {
        self.features = 0;
        self.received = None;
    }

    fn is_ready(&mut self, queue: usize) -> bool {
        if queue == RECEIVE {
            return self.receive().unwrap_or_else(|error| {
                self.lose(&error);
                false
            });
        }
        self.back_end.as_ref().is_none_or(|back_end| back_end.takes_frames())
    }

    fn serve(&mut self, queue: usize, mut request: Request<'_>) -> Result<u32, DriverError> {
        if queue == RECEIVE {
            let Some(mut frame) = self.received.take() else { return Ok(0) };
            if request.writer.available_bytes() < frame.len() {
                return Err(DriverError::Lacks("room for a frame"));
            }
            // num_buffers (5.1.6.4.1).
            frame[HEADER_BYTES - 2..HEADER_BYTES].copy_from_slice(&1u16.to_le_bytes());
            request.writer.write_all(&frame).map_err(outside)?;
            return Ok(written(&request.writer));
        }
        let length = request.reader.available_bytes();
        if length < HEADER_BYTES {
            return Err(DriverError::Lacks("its header"));
        }
        if length > HEADER_BYTES + MAX_SENT_BYTES {
            return Ok(0);
        }
        self.sent.resize(length, 0);
        request.reader.read_exact(&mut self.sent).map_err(outside)?;
        self.check_header();
        if let Some(back_end) = &mut self.back_end {
            back_end.send(&self.sent);
        }
        Ok(0)
    }
}
