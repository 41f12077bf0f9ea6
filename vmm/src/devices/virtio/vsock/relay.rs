//! A device and its host's side in two processes, with a stream of bytes between them: so the emulated machine's guest reaches the
//! programs of the host that the machine runs on.
//!
//! The stream has packets as the guest's queues have them, and one of no type when a driver comes or goes. Neither side waits for the
//! other while it holds something that the other waits for: both read what there is, and what cannot be written yet keeps only the
//! packets of its own direction back.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::buffered::Buffered;
use super::connection::BUFFER_BYTES;
use super::packet::Header;
use super::{Side, Vsock};

/// Bytes of data that a packet of the host's has at most.
const DATA_BYTES: usize = 64 << 10;

/// How many events are taken at once.
const EVENTS: usize = 4;

/// A packet of no type and no sender says that a driver has come, or has gone.
fn driver(is_there: bool) -> Header {
    Header { flags: is_there.into(), ..Header::default() }
}

/// Packets over a stream that does not block.
struct Packets<S> {
    bytes: Buffered<S>,
}

impl<S: Read + Write> Packets<S> {
    fn new(stream: S) -> Self {
        Self { bytes: Buffered::new(stream) }
    }

    fn push(&mut self, header: &Header, data: &[u8]) -> io::Result<()> {
        self.bytes.outgoing.extend(header.bytes());
        self.bytes.outgoing.extend(data);
        self.bytes.flush()
    }

    /// The next packet, if all of it has come.
    fn next(&mut self) -> io::Result<Option<(Header, Vec<u8>)>> {
        loop {
            if let Some((header, length)) = self.complete()? {
                let data = self.bytes.incoming[Header::BYTES..length].to_vec();
                self.bytes.incoming.drain(..length);
                return Ok(Some((header, data)));
            }
            if !self.bytes.fill()? {
                return Ok(None);
            }
        }
    }

    /// The packet that `incoming` begins with, and its length, header included.
    fn complete(&self) -> io::Result<Option<(Header, usize)>> {
        let Some(header) = self.bytes.incoming.first_chunk().map(Header::parse) else { return Ok(None) };
        if header.len > BUFFER_BYTES {
            return Err(io::Error::other("a packet has more data than any connection has room for"));
        }
        let length = Header::BYTES + usize::try_from(header.len).unwrap_or(usize::MAX);
        Ok((self.bytes.incoming.len() >= length).then_some((header, length)))
    }
}

/// The host's side as the device sees it, at the other end of a stream.
pub(super) struct Relay {
    guest_cid: u64,
    packets: Packets<File>,
    epoll: Epoll,
    /// A packet for the guest, and how much of its data the guest has.
    staged: Option<(Header, Vec<u8>, usize)>,
    broken: bool,
}

impl Relay {
    /// `stream` does not block.
    ///
    /// # Errors
    /// The host has no more file descriptors.
    pub fn new(guest_cid: u32, stream: File) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        add(&epoll, stream.as_raw_fd(), EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED)?;
        Ok(Self {
            guest_cid: guest_cid.into(),
            packets: Packets::new(stream),
            epoll,
            staged: None,
            broken: false,
        })
    }

    /// Without the other side no connection is made any more.
    fn check<T: Default>(&mut self, result: io::Result<T>) -> T {
        result.unwrap_or_else(|error| {
            if !self.broken {
                tracing::warn!(%error, "The host's side of vsock is gone");
            }
            self.broken = true;
            T::default()
        })
    }
}

fn add(epoll: &Epoll, fd: RawFd, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
}

impl Side for Relay {
    fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    fn wakes(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn woken(&mut self) {
        // What has come is looked for whenever the guest could take it.
        self.epoll.wait(0, &mut [EpollEvent::default(); EVENTS]).ok();
        let flushed = self.packets.bytes.flush();
        self.check(flushed);
    }

    fn start(&mut self) {
        let pushed = self.packets.push(&driver(true), &[]);
        self.check(pushed);
    }

    fn reset(&mut self) {
        self.staged = None;
        let pushed = self.packets.push(&driver(false), &[]);
        self.check(pushed);
    }

    fn takes_packets(&self) -> bool {
        self.packets.bytes.outgoing.is_empty()
    }

    fn receive(&mut self, header: &Header, data: &[u8]) {
        // What no side would take must not be taken for the driver's coming and going.
        if header.src_cid != self.guest_cid || self.broken {
            return;
        }
        // One that says that it has more than any connection has room for comes without: as an operation that there is not, it ends its
        // connection just so.
        let header = if header.len > BUFFER_BYTES { Header { len: 0, op: 0, ..*header } } else { *header };
        let pushed = self.packets.push(&header, data);
        self.check(pushed);
    }

    fn has_packet(&mut self) -> bool {
        if self.staged.is_none() && !self.broken {
            let next = self.packets.next();
            self.staged = self.check(next).map(|(header, data)| (header, data, 0));
        }
        self.staged.is_some()
    }

    fn take_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        let (mut header, data, taken) = self.staged.take()?;
        let end = data.len().min(taken.saturating_add(room));
        let part = data[taken..end].to_vec();
        header.len = u32::try_from(part.len()).unwrap_or(0);
        if end < data.len() {
            self.staged = Some((header, data, end));
        }
        Some((header, part))
    }
}

/// A host's side that serves a device at the other end of a stream. Dropping it waits for the stream's end.
#[derive(Debug)]
pub struct ServedVsock(Option<JoinHandle<()>>);

impl ServedVsock {
    /// Serves the device at the other end of `stream` until that is closed.
    ///
    /// # Errors
    /// The host has no more threads or file descriptors.
    pub fn new(vsock: Vsock, stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        add(&epoll, vsock.side.wakes(), EventSet::IN)?;
        add(&epoll, stream.as_raw_fd(), EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED)?;
        let packets = Packets::new(stream);
        let thread = std::thread::Builder::new().name("vsock".to_owned()).spawn(move || {
            if let Err(error) = serve(vsock, packets, &epoll) {
                tracing::debug!(%error, "vsock is served no more");
            }
        })?;
        Ok(Self(Some(thread)))
    }
}

impl Drop for ServedVsock {
    fn drop(&mut self) {
        if self.0.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("The thread of vsock panicked; this is a bug, please report it");
        }
    }
}

fn serve(mut vsock: Vsock, mut packets: Packets<UnixStream>, epoll: &Epoll) -> io::Result<()> {
    let side = &mut vsock.side;
    loop {
        match epoll.wait(-1, &mut [EpollEvent::default(); EVENTS]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => side.woken(),
        }
        loop {
            packets.bytes.flush()?;
            let mut moved = false;
            while packets.bytes.outgoing.is_empty() && side.has_packet() {
                if let Some((header, data)) = side.take_packet(DATA_BYTES) {
                    packets.push(&header, &data)?;
                }
                moved = true;
            }
            while side.takes_packets()
                && let Some((header, data)) = packets.next()?
            {
                if header == driver(true) {
                    side.start();
                } else if header == driver(false) {
                    side.reset();
                } else {
                    side.receive(&header, &data);
                }
                moved = true;
            }
            if !moved {
                break;
            }
        }
    }
}
