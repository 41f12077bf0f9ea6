//! The host's side of all connections: streams of Unix sockets in Firecracker's convention, and packets for and from the guest.
//!
//! ```text
//!  PATH       a program connects, writes `CONNECT PORT\n`, and reads `OK HOSTPORT\n` once the guest has agreed
//!  PATH_PORT  where a program listens for connections that the guest makes to port PORT of the host
//! ```
//!
//! What the guest is owed is bounded: for each connection what fits into one packet, and resets for packets of no connection, of which
//! so many can wait; then no packet of the guest's is taken until it takes them.

use std::collections::{HashMap, VecDeque};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Side;
use super::connection::{Connection, Hello, Phase, Ports};
use super::packet::{HOST_CID, Header, STREAM, op};

/// The most connections: each is an open file, of which a process has 1024 unless its user allows more.
const MAX_CONNECTIONS: usize = 512;

/// The most resets for packets of no connection that wait for the guest.
const MAX_REPLIES: usize = 256;

/// How many events are taken at once.
const EVENTS: usize = 64;

/// What epoll tells of the listener; connections are told by their ids.
const LISTENER: u64 = u64::MAX;

/// The host's ports of connections that it begins are these and above, as in Firecracker.
const FIRST_PORT: u32 = 1 << 30;

/// A packet on its way to the guest: one that has data may take several requests of the driver's.
struct Staged {
    /// `None` for a reset of no connection.
    connection: Option<u64>,
    header: Header,
    /// How much of the data the guest has.
    taken: usize,
}

/// The host's side.
pub(super) struct Host {
    guest_cid: u64,
    path: PathBuf,
    listener: UnixListener,
    epoll: Epoll,
    /// A driver is there.
    started: bool,
    connections: HashMap<u64, Connection>,
    by_ports: HashMap<Ports, u64>,
    next_id: u64,
    next_port: u32,
    /// Connections that may have a packet for the guest, each once.
    ready: VecDeque<u64>,
    replies: VecDeque<Header>,
    staged: Option<Staged>,
    /// Its data.
    data: Vec<u8>,
}

impl Host {
    /// # Errors
    /// The host has no more file descriptors.
    pub fn new(guest_cid: u32, path: PathBuf, listener: UnixListener) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new()?;
        // Edges: an accept that fails for want of file descriptors is not tried again at once.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            guest_cid: guest_cid.into(),
            path,
            listener,
            epoll,
            started: false,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            next_id: 0,
            next_port: FIRST_PORT,
            ready: VecDeque::new(),
            replies: VecDeque::new(),
            staged: None,
            data: Vec::new(),
        })
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = self.take_stream(stream) {
                        tracing::warn!(%error, socket = %self.path.display(), "A vsock connection was refused");
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!(%error, socket = %self.path.display(), "vsock connections are not taken");
                    return;
                }
            }
        }
    }

    fn take_stream(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let id = self.insert(Connection::from_host, stream)?;
        self.stream_event(id, EventSet::IN);
        Ok(())
    }

    /// Keeps a connection over `stream`. Returns its id.
    fn insert(&mut self, make: impl FnOnce(UnixStream) -> Connection, stream: UnixStream) -> io::Result<u64> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::Error::other(format!("there are {MAX_CONNECTIONS} already")));
        }
        let id = self.next_id;
        // Edges: what a stream has is remembered, so that one that nothing can be done for does not wake the thread all the time.
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        self.epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), EpollEvent::new(events, id))?;
        self.next_id += 1;
        self.connections.insert(id, make(stream));
        Ok(id)
    }

    fn stream_event(&mut self, id: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let ends = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
        connection.readable |= events.intersects(EventSet::IN | ends);
        connection.hung_up |= events.intersects(EventSet::HANG_UP);
        if let Phase::Hello(_) = connection.phase {
            match connection.read_hello() {
                Hello::Partly => {}
                Hello::Connect(port) if self.started => self.connect(id, port),
                Hello::Connect(_) | Hello::Wrong => self.remove(id),
            }
            return;
        }
        connection.flush();
        let given_up = connection.hung_up && connection.phase == Phase::Requested;
        if given_up && connection.is_unknown()
            || connection.phase == Phase::Draining && connection.is_flushed()
        {
            return self.remove(id);
        }
        if given_up || connection.phase == Phase::Open && connection.is_done() {
            connection.owe_reset();
        }
        self.look_at(id);
    }

    /// Asks the guest for a connection to its port.
    fn connect(&mut self, id: u64, guest: u32) {
        // There are more ports than connections.
        let ports = loop {
            let ports = Ports { host: self.next_port, guest };
            self.next_port =
                self.next_port.checked_add(1).filter(|port| *port < u32::MAX).unwrap_or(FIRST_PORT);
            if !self.by_ports.contains_key(&ports) {
                break ports;
            }
        };
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.request(ports);
            self.by_ports.insert(ports, id);
            self.look_at(id);
        }
    }

    /// Has the guest get the connection's next packet, if there is one.
    fn look_at(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.is_queued && connection.may_have_packet() {
            connection.is_queued = true;
            self.ready.push_back(id);
        }
    }

    fn remove(&mut self, id: u64) {
        let Some(connection) = self.connections.remove(&id) else { return };
        self.forget_ports(connection.ports, id);
        if self.staged.as_ref().is_some_and(|staged| staged.connection == Some(id)) {
            self.staged = None;
        }
    }

    fn forget_ports(&mut self, ports: Ports, id: u64) {
        if self.by_ports.get(&ports) == Some(&id) {
            self.by_ports.remove(&ports);
        }
    }

    /// The guest wants a connection to a port of the host's.
    fn connect_to_program(&mut self, header: &Header) {
        let made = connect(&self.path, header.dst_port)
            .and_then(|stream| self.insert(|stream| Connection::from_guest(stream, header), stream));
        match made {
            Ok(id) => {
                self.by_ports.insert(Ports::of(header), id);
                self.look_at(id);
            }
            Err(error) => {
                tracing::debug!(%error, port = header.dst_port, "A vsock connection of the guest's was refused");
                self.replies.push_back(header.reset());
            }
        }
    }

    fn stage(&mut self, id: u64) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.is_queued = false;
        let packet = connection.next_packet(self.guest_cid, &mut self.data);
        match packet {
            Some(header) if header.op == op::RST => {
                self.remove(id);
                self.staged = Some(Staged { connection: None, header, taken: 0 });
            }
            Some(header) => {
                self.look_at(id);
                self.staged = Some(Staged { connection: Some(id), header, taken: 0 });
            }
            None => {}
        }
    }
}

impl Side for Host {
    fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    fn wakes(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    fn start(&mut self) {
        self.started = true;
    }

    fn reset(&mut self) {
        self.started = false;
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.replies.clear();
        self.staged = None;
    }

    fn woken(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                tracing::debug!(%error, "vsock events");
                return;
            }
        };
        for event in &events[..count] {
            if event.data() == LISTENER {
                self.accept();
            } else {
                self.stream_event(event.data(), event.event_set());
            }
        }
    }

    fn takes_packets(&self) -> bool {
        self.replies.len() < MAX_REPLIES
    }

    fn receive(&mut self, header: &Header, data: &[u8]) {
        // A guest has one address, and speaks to the host alone.
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports::of(header);
        let id = self.by_ports.get(&ports).copied().filter(|_| header.kind == STREAM);
        let Some(id) = id else {
            if header.op == op::REQUEST && header.kind == STREAM {
                self.connect_to_program(header);
            } else if header.op != op::RST {
                // Of no connection, or of a type that there is not (5.10.6.7).
                self.replies.push_back(header.reset());
            }
            return;
        };
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.take_credit(header);
        let is_open = connection.phase == Phase::Open;
        let is_wrong = match header.op {
            op::RESPONSE if connection.phase == Phase::Requested => connection.open().is_err(),
            op::RST => {
                // What the guest has sent before it closed its socket is still the stream's.
                if connection.guest_sends_no_more() && !connection.is_flushed() {
                    connection.phase = Phase::Draining;
                    self.forget_ports(ports, id);
                } else {
                    self.remove(id);
                }
                return;
            }
            op::RW if is_open && connection.has_room(header.len) => {
                connection.receive(data);
                false
            }
            op::SHUTDOWN if is_open => connection.close_guest(header.flags),
            op::CREDIT_UPDATE if is_open => false,
            op::CREDIT_REQUEST if is_open => {
                connection.owe_credit();
                false
            }
            _ => true,
        };
        if is_wrong {
            connection.owe_reset();
        }
        self.look_at(id);
    }

    fn has_packet(&mut self) -> bool {
        while self.staged.is_none() {
            if let Some(header) = self.replies.pop_front() {
                self.data.clear();
                self.staged = Some(Staged { connection: None, header, taken: 0 });
            } else if let Some(id) = self.ready.pop_front() {
                self.stage(id);
            } else {
                return false;
            }
        }
        true
    }

    fn take_packet(&mut self, room: usize) -> Option<(Header, Vec<u8>)> {
        let mut staged = self.staged.take()?;
        let mut header = staged.header;
        if let Some(connection) = staged.connection.and_then(|id| self.connections.get_mut(&id)) {
            connection.complete(&mut header, self.guest_cid);
        }
        let from = staged.taken;
        staged.taken = self.data.len().min(from.saturating_add(room));
        let part = from..staged.taken;
        header.len = u32::try_from(part.len()).unwrap_or(0);
        if staged.taken < self.data.len() {
            self.staged = Some(staged);
        }
        Some((header, self.data[part].to_vec()))
    }
}

/// Connects to the program that listens for connections to a port of the host's. Does not wait for it.
fn connect(path: &Path, port: u32) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(port_path(path, port))?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(socket.as_fd(), &address)?;
    Ok(socket.into())
}

/// Where a program listens for connections to a port of the host's.
pub(super) fn port_path(path: &Path, port: u32) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(format!("_{port}"));
    name.into()
}
