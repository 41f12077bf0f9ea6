//! One connection between a stream on the host and a socket of the guest, with the credit of both (Virtio 1.2, 5.10.6.3).

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{BOTH, HOST_CID, Header, RECEIVES_NO_MORE, SENDS_NO_MORE, STREAM, op};

/// Room for what the guest sends and the stream does not take yet: as much as a Linux socket has (VIRTIO_VSOCK_DEFAULT_BUF_SIZE there).
pub(super) const BUFFER_BYTES: u32 = 256 << 10;

/// The most bytes that are read of a stream at once.
const READ_BYTES: u32 = 64 << 10;

/// The longest line with which a stream may begin: `CONNECT 4294967295`.
const HELLO_BYTES: usize = 32;

/// A connection's port on each side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub host: u32,
    pub guest: u32,
}

impl Ports {
    /// Of a packet that the guest sends.
    pub fn of(header: &Header) -> Self {
        Self { host: header.dst_port, guest: header.src_port }
    }
}

/// How far a connection has got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The stream has not said yet which port it wants.
    Hello(Vec<u8>),
    /// The guest has not answered yet. There is no deadline for that: it may stand at a probe.
    Requested,
    /// Both sides know of it.
    Open,
    /// The guest is done with it; the stream gets what is left.
    Draining,
}

/// What a stream says at its beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hello {
    /// Not all of it yet.
    Partly,
    /// This port of the guest's.
    Connect(u32),
    /// Nothing that is understood.
    Wrong,
}

/// A connection.
pub(super) struct Connection {
    pub ports: Ports,
    pub phase: Phase,
    stream: UnixStream,
    /// The stream may have something to read.
    pub readable: bool,
    /// Its other side is gone.
    pub hung_up: bool,
    /// It waits for its turn to send the guest a packet.
    pub is_queued: bool,
    /// It has been read to its end.
    ended: bool,
    /// What the stream does not take yet.
    unwritten: VecDeque<u8>,
    /// The guest's room, and how much it has taken out of there.
    peer_buffer: u32,
    peer_forwarded: u32,
    /// How much it has been sent.
    sent: u32,
    asked_for_credit: bool,
    /// How much has come from the guest, has gone to the stream, and how much of that the guest knows of.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,
    /// What the guest is owed before anything else.
    owed: Option<u16>,
    owed_credit: bool,
    /// What the guest has said that it will not do any more, what this side will not, and what of that the guest knows.
    guest_closed: u32,
    closed: u32,
    told_closed: u32,
}

impl Connection {
    fn new(stream: UnixStream, ports: Ports, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            stream,
            readable: true,
            hung_up: false,
            is_queued: false,
            ended: false,
            unwritten: VecDeque::new(),
            peer_buffer: 0,
            peer_forwarded: 0,
            sent: 0,
            asked_for_credit: false,
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            owed: None,
            owed_credit: false,
            guest_closed: 0,
            closed: 0,
            told_closed: 0,
        }
    }

    /// One that the host begins: the stream tells for which port.
    pub fn from_host(stream: UnixStream) -> Self {
        Self::new(stream, Ports { host: 0, guest: 0 }, Phase::Hello(Vec::new()))
    }

    /// One that the guest has asked for with this packet.
    pub fn from_guest(stream: UnixStream, header: &Header) -> Self {
        let mut connection = Self::new(stream, Ports::of(header), Phase::Open);
        connection.take_credit(header);
        connection.owed = Some(op::RESPONSE);
        connection
    }

    /// Reads the line with which a stream begins, and no byte of what follows it.
    pub fn read_hello(&mut self) -> Hello {
        let Phase::Hello(line) = &mut self.phase else { return Hello::Wrong };
        loop {
            let mut byte = [0];
            match self.stream.read(&mut byte) {
                Ok(0) => return Hello::Wrong,
                Ok(_) if byte == *b"\n" => {
                    let line = std::str::from_utf8(line).unwrap_or_default();
                    let port = line.strip_prefix("CONNECT ").and_then(|port| port.trim().parse().ok());
                    return port.map_or(Hello::Wrong, Hello::Connect);
                }
                Ok(_) if line.len() < HELLO_BYTES => line.push(byte[0]),
                Ok(_) => return Hello::Wrong,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Hello::Partly,
                Err(_) => return Hello::Wrong,
            }
        }
    }

    /// Asks the guest for it.
    pub fn request(&mut self, ports: Ports) {
        self.ports = ports;
        self.phase = Phase::Requested;
        self.owed = Some(op::REQUEST);
    }

    /// The guest has agreed to it: the stream is told the host's port, as Firecracker's are.
    ///
    /// # Errors
    /// The stream is gone.
    pub fn open(&mut self) -> io::Result<()> {
        self.phase = Phase::Open;
        // A line fits a stream that has been written nothing yet.
        self.stream.write_all(format!("OK {}\n", self.ports.host).as_bytes())
    }

    /// What every packet of the guest's says of its room.
    pub fn take_credit(&mut self, header: &Header) {
        self.peer_buffer = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked_for_credit = false;
        }
    }

    /// How much the guest has room for. One that lies about what it has taken has none.
    fn credit(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Whether the guest may send so many bytes now.
    pub fn has_room(&self, bytes: u32) -> bool {
        let used = self.received.wrapping_sub(self.forwarded);
        self.guest_closed & SENDS_NO_MORE == 0 && bytes <= BUFFER_BYTES.saturating_sub(used)
    }

    /// Takes data of the guest's, for which there is room.
    pub fn receive(&mut self, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap_or(BUFFER_BYTES);
        self.received = self.received.wrapping_add(length);
        self.unwritten.extend(data);
        self.flush();
    }

    /// Gives the stream what it takes.
    pub fn flush(&mut self) {
        while !self.unwritten.is_empty() && self.closed & RECEIVES_NO_MORE == 0 {
            match self.stream.write(self.unwritten.as_slices().0) {
                Ok(written) => self.take_out(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It takes no more, but there may still be something to read.
                Err(_) => self.closed |= RECEIVES_NO_MORE,
            }
        }
        self.take_out(self.unwritten.len());
        if self.guest_closed & SENDS_NO_MORE != 0 {
            self.stream.shutdown(Shutdown::Write).ok();
        }
    }

    fn take_out(&mut self, bytes: usize) {
        self.unwritten.drain(..bytes);
        self.forwarded = self.forwarded.wrapping_add(u32::try_from(bytes).unwrap_or(BUFFER_BYTES));
    }

    /// Whether the stream has all that the guest has sent.
    pub fn is_flushed(&self) -> bool {
        self.unwritten.is_empty()
    }

    /// Whether the guest has said that it will send no more.
    pub fn guest_sends_no_more(&self) -> bool {
        self.guest_closed & SENDS_NO_MORE != 0
    }

    /// The guest wants to know how much room there is.
    pub fn owe_credit(&mut self) {
        self.owed_credit = true;
    }

    /// The guest will not send or not receive any more. Returns whether it is done with the connection.
    pub fn close_guest(&mut self, flags: u32) -> bool {
        self.guest_closed |= flags & BOTH;
        if self.guest_closed & RECEIVES_NO_MORE != 0 {
            self.stream.shutdown(Shutdown::Read).ok();
        }
        self.flush();
        self.is_done()
    }

    /// Whether the guest is done with it and the stream has everything: then the guest gets its RST (5.10.6.6).
    pub fn is_done(&self) -> bool {
        self.guest_closed == BOTH && self.is_flushed()
    }

    /// Whether the guest has heard nothing of it yet.
    pub fn is_unknown(&self) -> bool {
        self.owed == Some(op::REQUEST) || matches!(self.phase, Phase::Hello(_))
    }

    /// Ends the connection with a reset.
    pub fn owe_reset(&mut self) {
        self.owed = Some(op::RST);
    }

    /// The next packet for the guest, with its data in `data`, if there is one.
    pub fn next_packet(&mut self, guest_cid: u64, data: &mut Vec<u8>) -> Option<Header> {
        data.clear();
        let (op, flags) = self.next_op(data)?;
        let len = u32::try_from(data.len()).unwrap_or(0);
        self.sent = self.sent.wrapping_add(len);
        let mut header = Header { op, flags, len, ..Header::default() };
        self.complete(&mut header, guest_cid);
        Some(header)
    }

    /// Fills in what every packet has, as it is now.
    pub fn complete(&mut self, header: &mut Header, guest_cid: u64) {
        header.src_cid = HOST_CID;
        header.dst_cid = guest_cid;
        header.src_port = self.ports.host;
        header.dst_port = self.ports.guest;
        header.kind = STREAM;
        header.buf_alloc = BUFFER_BYTES;
        header.fwd_cnt = self.forwarded;
        self.told_forwarded = self.forwarded;
    }

    fn next_op(&mut self, data: &mut Vec<u8>) -> Option<(u16, u32)> {
        if let Some(owed) = self.owed.take() {
            return Some((owed, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if std::mem::take(&mut self.owed_credit) || self.wants_to_tell_room() {
            return Some((op::CREDIT_UPDATE, 0));
        }
        if self.wants_to_read() {
            if self.credit() == 0 {
                if !self.asked_for_credit {
                    self.asked_for_credit = true;
                    return Some((op::CREDIT_REQUEST, 0));
                }
            } else if let Some(op) = self.read(data) {
                return Some((op, 0));
            }
        }
        self.see_end();
        if self.closed & !self.told_closed == 0 {
            return None;
        }
        self.told_closed = self.closed;
        Some((op::SHUTDOWN, self.closed))
    }

    /// Notes what of the stream is over.
    fn see_end(&mut self) {
        if self.ended {
            self.closed |= SENDS_NO_MORE;
        }
        if self.hung_up && (self.ended || self.guest_closed & RECEIVES_NO_MORE != 0) {
            self.closed |= BOTH;
        }
    }

    /// Whether the guest, as far as it knows, has little room left and there is more.
    fn wants_to_tell_room(&self) -> bool {
        self.received.wrapping_sub(self.told_forwarded) >= BUFFER_BYTES / 2
            && self.forwarded != self.told_forwarded
    }

    fn wants_to_read(&self) -> bool {
        self.readable && !self.ended && self.guest_closed & RECEIVES_NO_MORE == 0
    }

    /// Reads the stream. Returns what the guest is to be sent: the data, or a reset.
    fn read(&mut self, data: &mut Vec<u8>) -> Option<u16> {
        let room = usize::try_from(self.credit().min(READ_BYTES)).unwrap_or(0);
        data.resize(room, 0);
        loop {
            let read = self.stream.read(data);
            data.truncate(read.as_ref().map_or(0, |read| *read));
            match read {
                Ok(0) => {
                    self.ended = true;
                    return None;
                }
                Ok(_) => return Some(op::RW),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => data.resize(room, 0),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(_) => return Some(op::RST),
            }
        }
    }

    /// Whether there may be another packet for the guest.
    pub fn may_have_packet(&mut self) -> bool {
        if self.owed.is_some() {
            return true;
        }
        self.see_end();
        self.phase == Phase::Open
            && (self.owed_credit
                || self.wants_to_tell_room()
                || self.wants_to_read() && (self.credit() > 0 || !self.asked_for_credit)
                || self.closed & !self.told_closed != 0)
    }
}
