//! A driver, well-behaved and hostile, and programs of the host, against the device.

#![allow(clippy::cast_possible_truncation, reason = "lengths are small")]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::super::tests::{BUFFERS, Driver, NEEDS_RESET, NEXT, QUEUE_BYTES, SIZE, STATUS, VERSION_1, WRITE};
use super::packet::{BOTH, HOST_CID, SENDS_NO_MORE, STREAM, op};
use super::*;

const CID: u32 = 42;
const TABLE: u64 = 0x1000;
/// Room of each of the driver's receive buffers.
const ROOM: u32 = 4096;
/// Where they are; what is sent is behind them.
const SENT: u64 = BUFFERS + SIZE as u64 * ROOM as u64;

/// A guest's driver: one that has all receive buffers with the device all the time, unless it is told to take nothing.
struct Guest {
    driver: Driver,
    directory: TempDir,
    available: [u16; 2],
    seen: u16,
}

/// What it says of its own room.
const GUEST_ROOM: u32 = 64 << 10;

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = VsockOptions { cid: CID, path: directory.path().join("vsock") };
        let device = Vsock::open(&options).unwrap();
        Self::with(device, directory)
    }

    /// One whose device is connected to its host's side by a stream.
    fn relayed() -> (ServedVsock, Self) {
        let directory = tempfile::tempdir().unwrap();
        let options = VsockOptions { cid: CID, path: directory.path().join("vsock") };
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let served = ServedVsock::new(Vsock::open(&options).unwrap(), ours).unwrap();
        let device = Vsock::relayed(CID, File::from(OwnedFd::from(theirs))).unwrap();
        (served, Self::with(device, directory))
    }

    fn with(device: Vsock, directory: TempDir) -> Self {
        let driver = Driver::started(Box::new(device));
        let mut guest = Self { driver, directory, available: [0; 2], seen: 0 };
        (0..SIZE).for_each(|index| guest.offer(index));
        guest
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.directory.path().join(format!("vsock{suffix}"))
    }

    fn offer(&mut self, index: u16) {
        let at = BUFFERS + u64::from(index) * u64::from(ROOM);
        self.driver.describe(TABLE, index, at, ROOM, WRITE, 0);
        self.available[0] = self.driver.offer(0, self.available[0], index);
    }

    /// Sends a packet, its header and data in as many buffers as `cuts` make.
    fn send_cut(&mut self, header: &Header, data: &[u8], cuts: &[usize]) {
        let bytes = [&header.bytes()[..], data].concat();
        self.driver.memory.write_slice(&bytes, GuestAddress(SENT)).unwrap();
        let mut from = 0;
        let table = TABLE + QUEUE_BYTES;
        for (index, to) in (0u16..).zip(cuts.iter().copied().chain([bytes.len()])) {
            let next = if to == bytes.len() { 0 } else { NEXT };
            self.driver.describe(table, index, SENT + from as u64, (to - from) as u32, next, index + 1);
            from = to;
        }
        self.available[1] = self.driver.offer(1, self.available[1], 0);
        self.driver.transport.serve_all();
    }

    fn send(&mut self, header: &Header, data: &[u8]) {
        self.send_cut(header, data, &[]);
    }

    /// The packets that have come.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        self.driver.transport.serve_all();
        while self.seen != self.driver.used_of(0) {
            let (index, length) = self.driver.used_entry(0, self.seen);
            self.seen = self.seen.wrapping_add(1);
            let mut bytes = vec![0; length as usize];
            let at = GuestAddress(BUFFERS + u64::from(index) * u64::from(ROOM));
            self.driver.memory.read_slice(&mut bytes, at).unwrap();
            let data = bytes.split_off(Header::BYTES);
            let header = Header::parse(&bytes.try_into().unwrap());
            assert_eq!(header.len as usize, data.len());
            packets.push((header, data));
            self.offer(index);
            self.driver.transport.serve_all();
        }
        packets
    }

    /// The one packet that has come.
    fn only(&mut self) -> (Header, Vec<u8>) {
        let mut packets = self.received();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// The next packets of a host's side that has a thread of its own.
    fn wait(&mut self) -> Vec<(Header, Vec<u8>)> {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let packets = self.received();
            if !packets.is_empty() {
                return packets;
            }
            assert!(Instant::now() < deadline, "no packet");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// A program connects to a port as soon as that side knows of the driver. Returns its stream and the request.
    fn connect_by_thread(&mut self) -> (UnixStream, Header) {
        loop {
            let mut stream = UnixStream::connect(self.path("")).unwrap();
            stream.write_all(b"CONNECT 9\n").unwrap();
            stream.set_nonblocking(true).unwrap();
            while !is_at_end(&mut stream) {
                if let Some((request, _)) = self.received().pop() {
                    stream.set_nonblocking(false).unwrap();
                    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                    return (stream, request);
                }
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn ops(&mut self) -> Vec<u16> {
        self.received().iter().map(|(header, _)| header.op).collect()
    }

    /// A program connects to the guest's port. Returns its stream, and the packet with which the guest may answer.
    fn connect(&mut self, port: u32) -> (UnixStream, Header) {
        let mut stream = UnixStream::connect(self.path("")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let (request, _) = self.only();
        assert_eq!((request.op, request.kind, request.dst_port), (op::REQUEST, STREAM, port));
        assert_eq!((request.src_cid, request.dst_cid), (HOST_CID, CID.into()));
        assert_eq!(request.buf_alloc, BUFFER_BYTES);
        let answer = Header { op: op::RESPONSE, buf_alloc: GUEST_ROOM, ..request.reset() };
        (stream, answer)
    }

    /// The same for a connection that the guest agrees to.
    fn connected(&mut self, port: u32) -> (UnixStream, Header) {
        let (mut stream, answer) = self.connect(port);
        self.send(&answer, &[]);
        assert_eq!(line(&mut stream), format!("OK {}\n", answer.dst_port));
        (stream, Header { op: op::RW, ..answer })
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "{line:?}");
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn is_at_end(stream: &mut UnixStream) -> bool {
    matches!(stream.read(&mut [0]), Ok(0))
}

/// A packet with which a guest begins a connection to port 7000 of the host.
fn request(port: u32) -> Header {
    Header {
        src_cid: CID.into(),
        dst_cid: HOST_CID,
        src_port: port,
        dst_port: 7000,
        kind: STREAM,
        op: op::REQUEST,
        buf_alloc: GUEST_ROOM,
        ..Header::default()
    }
}

fn data(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 7 / 3) as u8).collect()
}

#[test]
fn the_driver_reads_its_address() {
    let guest = Guest::new();
    let mut cid = [0; 8];
    guest.driver.transport.read(0x100, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID));
    assert_eq!(guest.driver.get(8), 19);
}

#[test]
fn a_program_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    stream.write_all(b"to the guest").unwrap();
    let (packet, bytes) = guest.only();
    assert_eq!((packet.op, &bytes[..]), (op::RW, &b"to the guest"[..]));
    guest.send(&Header { len: 11, ..header }, b"to the host");
    assert_eq!(read(&mut stream, 11), b"to the host");
    let (mut other, second) = guest.connected(22);
    assert_ne!(header.dst_port, second.dst_port, "each has a port of its own");
    guest.send(&Header { len: 5, ..second }, b"other");
    assert_eq!(read(&mut other, 5), b"other");
}

#[test]
fn what_follows_the_first_line_belongs_to_the_guest() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(guest.path("")).unwrap();
    stream.write_all(b"CONNECT 5\nat once").unwrap();
    let (request, _) = guest.only();
    guest.send(&Header { op: op::RESPONSE, buf_alloc: GUEST_ROOM, ..request.reset() }, &[]);
    assert_eq!(guest.only().1, b"at once");
}

#[test]
fn a_stream_that_says_nothing_sensible_is_closed() {
    let mut guest = Guest::new();
    for hello in ["CONNECT x\n", "GET / HTTP/1.1\n", "CONNECT -1\n", "CONNECT 4294967296\n", "\n"] {
        let mut stream = UnixStream::connect(guest.path("")).unwrap();
        stream.write_all(hello.as_bytes()).unwrap();
        assert_eq!(guest.ops(), [0; 0], "{hello}");
        assert!(is_at_end(&mut stream), "{hello}");
    }
    let mut stream = UnixStream::connect(guest.path("")).unwrap();
    stream.write_all(&[b'x'; 33]).unwrap();
    guest.received();
    assert!(stream.read(&mut [0]).map_or(true, |read| read == 0), "a long line");
    let mut stream = UnixStream::connect(guest.path("")).unwrap();
    stream.write_all(b"CONN").unwrap();
    assert_eq!(guest.ops(), [0; 0]);
    stream.write_all(b"ECT 9\n").unwrap();
    assert_eq!(guest.ops(), [op::REQUEST], "a line may come in parts");
}

#[test]
fn a_port_that_nobody_listens_on_is_refused_on_either_side() {
    let mut guest = Guest::new();
    let (mut stream, answer) = guest.connect(23);
    guest.send(&Header { op: op::RST, ..answer }, &[]);
    assert!(is_at_end(&mut stream), "no OK");
    assert_eq!(guest.ops(), [0; 0]);

    guest.send(&request(1000), &[]);
    let (packet, _) = guest.only();
    assert_eq!(packet, request(1000).reset());
}

#[test]
fn without_a_driver_a_program_is_refused_at_once() {
    let mut guest = Guest::new();
    let (mut open, _) = guest.connected(22);
    guest.driver.set(STATUS, 0);
    assert!(is_at_end(&mut open), "its connection is gone with the driver");
    let mut stream = UnixStream::connect(guest.path("")).unwrap();
    stream.write_all(b"CONNECT 22\n").unwrap();
    guest.driver.transport.serve_all();
    assert!(is_at_end(&mut stream));
}

#[test]
fn a_program_of_the_guest_reaches_one_of_the_host() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path("_7000")).unwrap();
    guest.send(&request(1000), &[]);
    let (response, _) = guest.only();
    assert_eq!((response.op, response.src_port, response.dst_port), (op::RESPONSE, 7000, 1000));
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(&Header { op: op::RW, len: 3, ..request(1000) }, b"hi!");
    assert_eq!(read(&mut stream, 3), b"hi!");
    stream.write_all(b"yes?").unwrap();
    assert_eq!(guest.only().1, b"yes?");
}

#[test]
fn a_packet_may_be_cut_anywhere() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    let bytes = data(3000);
    for cuts in [&[44][..], &[10, 44, 50], &[1, 2, 3, 45, 1000, 3043], &[3000]] {
        guest.send_cut(&Header { len: 3000, ..header }, &bytes, cuts);
        assert_eq!(read(&mut stream, 3000), bytes, "{cuts:?}");
    }
}

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    let bytes = data(3 * GUEST_ROOM as usize);
    stream.set_nonblocking(true).unwrap();
    let mut written = stream.write(&bytes).unwrap();
    let mut got = Vec::new();
    let mut requests = 0;
    while got.len() < bytes.len() {
        for (packet, part) in guest.received() {
            match packet.op {
                op::RW => got.extend(part),
                op::CREDIT_REQUEST => requests += 1,
                other => panic!("{other}"),
            }
        }
        if got.len() == GUEST_ROOM as usize {
            assert_eq!(requests, 1, "it asks once");
        }
        assert!(got.len() as u32 <= GUEST_ROOM * (requests + 1));
        written += stream.write(&bytes[written..]).unwrap_or(0);
        let update = Header { op: op::CREDIT_UPDATE, fwd_cnt: got.len() as u32, ..header };
        guest.send(&update, &[]);
    }
    assert!(got == bytes);
    assert!(requests >= 2);
}

#[test]
fn a_guest_that_has_sent_much_is_told_of_room_when_the_stream_has_taken_it() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    let bytes = data(16 << 10);
    let mut sent = 0;
    while sent < BUFFER_BYTES / 2 {
        guest.send(&Header { len: bytes.len() as u32, ..header }, &bytes);
        sent += bytes.len() as u32;
        assert!(read(&mut stream, bytes.len()) == bytes);
    }
    let (update, _) = guest.only();
    assert_eq!((update.op, update.fwd_cnt, update.buf_alloc), (op::CREDIT_UPDATE, sent, BUFFER_BYTES));
    guest.send(&Header { op: op::CREDIT_REQUEST, ..header }, &[]);
    let (update, _) = guest.only();
    assert_eq!((update.op, update.fwd_cnt), (op::CREDIT_UPDATE, sent));
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_its_connection_and_no_other() {
    let mut guest = Guest::new();
    let (_stream, header) = guest.connected(22);
    let (mut other, second) = guest.connected(22);
    // Nobody reads the stream: the host's kernel takes some, the rest of the room is the device's.
    let bytes = data(64 << 10);
    let mut sent = 0;
    let reset = loop {
        guest.send(&Header { len: bytes.len() as u32, ..header }, &bytes);
        sent += bytes.len();
        if let Some((packet, _)) =
            guest.received().into_iter().find(|(packet, _)| packet.op != op::CREDIT_UPDATE)
        {
            break packet;
        }
        assert!(sent < 16 << 20, "it takes everything");
    };
    assert_eq!((reset.op, reset.dst_port), (op::RST, 22));
    assert!(sent > BUFFER_BYTES as usize);
    guest.send(&Header { len: 5, ..second }, b"still");
    assert_eq!(read(&mut other, 5), b"still");
}

#[test]
fn what_a_guest_says_of_its_room_is_only_its_own_loss() {
    for (buf_alloc, fwd_cnt) in [(0, 0), (0, u32::MAX), (GUEST_ROOM, 1), (u32::MAX, u32::MAX), (1, 0)] {
        let mut guest = Guest::new();
        let (mut stream, header) = guest.connected(22);
        guest.send(&Header { op: op::CREDIT_UPDATE, buf_alloc, fwd_cnt, ..header }, &[]);
        stream.write_all(&[1; 1000]).unwrap();
        let got: usize = guest.received().iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(got as u64 <= u64::from(buf_alloc).min(1000), "{buf_alloc} {fwd_cnt}: {got}");
        let true_word = Header { op: op::CREDIT_UPDATE, fwd_cnt: got as u32, ..header };
        guest.send(&true_word, &[]);
        let rest: usize = guest.received().iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(got + rest, 1000, "{buf_alloc} {fwd_cnt}");
    }
}

#[test]
fn each_side_can_end_its_half() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    stream.write_all(b"last").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.received();
    assert_eq!(packets[0].1, b"last");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, SENDS_NO_MORE));
    assert_eq!(packets.len(), 2);
    guest.send(&Header { len: 6, ..header }, b"answer");
    guest.send(&Header { op: op::SHUTDOWN, flags: SENDS_NO_MORE, ..header }, &[]);
    assert_eq!(read(&mut stream, 6), b"answer");
    assert!(is_at_end(&mut stream));
    guest.send(&Header { op: op::SHUTDOWN, flags: BOTH, ..header }, &[]);
    assert!(guest.ops().contains(&op::RST));
}

#[test]
fn a_program_that_goes_away_takes_its_connection_with_it() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"bye", "not without what it has said");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, BOTH));
    guest.send(&Header { op: op::RST, ..header }, &[]);
    guest.send(&Header { len: 1, ..header }, b"?");
    assert_eq!(guest.ops(), [op::RST], "it is gone");

    let (stream, _) = guest.connect(22);
    drop(stream);
    assert_eq!(guest.ops(), [op::RST], "before the guest has answered, too");
}

#[test]
fn a_guest_that_closes_its_socket_has_everything_delivered() {
    let mut guest = Guest::new();
    let (mut stream, header) = guest.connected(22);
    // More than the host's kernel takes of a stream that nobody reads.
    let bytes = data(64 << 10);
    let mut sent = 0;
    while sent < 5 * bytes.len() {
        guest.send(&Header { len: bytes.len() as u32, ..header }, &bytes);
        sent += bytes.len();
    }
    guest.send(&Header { op: op::SHUTDOWN, flags: BOTH, ..header }, &[]);
    assert!(!guest.ops().contains(&op::RST), "not as long as the stream has not taken all");
    // It waits no longer (Linux: VSOCK_CLOSE_TIMEOUT).
    guest.send(&Header { op: op::RST, ..header }, &[]);
    let mut got = 0;
    while got < sent {
        assert!(read(&mut stream, bytes.len()) == bytes);
        got += bytes.len();
        guest.driver.transport.serve_all();
    }
    assert!(is_at_end(&mut stream));
}

#[test]
fn packets_that_belong_nowhere_are_answered_with_a_reset_or_not_at_all() {
    let mut guest = Guest::new();
    let of_nothing = Header { op: op::RW, ..request(1) };
    for (header, answers) in [
        (of_nothing, 1),
        (Header { op: op::RST, ..of_nothing }, 0),
        (Header { op: op::RESPONSE, ..of_nothing }, 1),
        (Header { op: 77, ..of_nothing }, 1),
        (Header { kind: 2, ..request(1) }, 1),
        (Header { src_cid: 43, ..request(1) }, 0),
        (Header { dst_cid: 3, ..request(1) }, 0),
    ] {
        guest.send(&header, &[]);
        let packets = guest.received();
        assert_eq!(packets.len(), answers, "{header:?}");
        assert!(packets.iter().all(|(packet, _)| *packet == header.reset()), "{header:?}");
    }
    for wrong in [op::REQUEST, op::RESPONSE, 0, 8, u16::MAX] {
        let (mut stream, header) = guest.connected(22);
        guest.send(&Header { op: wrong, ..header }, &[]);
        assert_eq!(guest.ops(), [op::RST], "{wrong}");
        assert!(is_at_end(&mut stream), "{wrong}");
    }
    let (mut stream, header) = guest.connected(22);
    guest.send(&Header { op: op::SHUTDOWN, flags: SENDS_NO_MORE, ..header }, &[]);
    guest.send(&Header { len: 1, ..header }, b"x");
    assert_eq!(guest.ops(), [op::RST], "data behind the end of it");
    assert!(is_at_end(&mut stream));
}

#[test]
fn a_guest_that_takes_no_packets_has_none_taken_from_it() {
    let mut guest = Guest::new();
    // 256 resets wait, and as many as it has receive buffers have been written.
    for port in 0..400 {
        let header = Header { op: op::RW, ..request(port) };
        let bytes = header.bytes();
        guest.driver.memory.write_slice(&bytes, GuestAddress(SENT)).unwrap();
        guest.driver.describe(TABLE + QUEUE_BYTES, 0, SENT, bytes.len() as u32, 0, 0);
        if guest.available[1].wrapping_sub(guest.driver.used_of(1)) == SIZE {
            break;
        }
        guest.available[1] = guest.driver.offer(1, guest.available[1], 0);
        guest.driver.transport.serve_all();
    }
    let taken = guest.driver.used_of(1);
    // One more is ready to go.
    assert_eq!(taken, 256 + SIZE + 1);
    assert_eq!(guest.received().len(), usize::from(taken + SIZE), "then all are taken, and answered");
}

#[test]
fn so_many_connections_and_no_more() {
    let mut guest = Guest::new();
    let listener = UnixListener::bind(guest.path("_7000")).unwrap();
    for port in 0..512 {
        guest.send(&request(port), &[]);
        // The program goes away at once, and the guest does not answer that.
        drop(listener.accept().unwrap());
        assert_eq!(guest.received()[0].0.op, op::RESPONSE, "{port}");
    }
    guest.send(&request(512), &[]);
    assert_eq!(guest.ops(), [op::RST]);
    let mut stream = UnixStream::connect(guest.path("")).unwrap();
    guest.driver.transport.serve_all();
    assert!(is_at_end(&mut stream));
    guest.send(&Header { op: op::RST, ..request(7) }, &[]);
    guest.send(&request(512), &[]);
    assert_eq!(guest.ops(), [op::RESPONSE], "one more has room for another");
}

#[test]
fn lies_about_lengths_break_the_driver() {
    let mut guest = Guest::new();
    for (length, len) in [(43, 0), (0, 0), (44, 1), (44, u32::MAX), (1000, 957)] {
        let header = Header { op: op::RW, len, ..request(1) };
        guest.driver.memory.write_slice(&header.bytes(), GuestAddress(SENT)).unwrap();
        guest.driver.describe(TABLE + QUEUE_BYTES, 0, SENT, length, 0, 0);
        guest.available[1] = guest.driver.offer(1, guest.available[1], 0);
        guest.driver.transport.serve_all();
        assert_eq!(guest.driver.get(STATUS), 15 | NEEDS_RESET, "{length} {len}");
        guest.driver.start(VERSION_1);
        guest.available = [0; 2];
    }
    // A receive buffer without room for any data.
    let (_stream, header) = {
        guest.seen = 0;
        (0..SIZE).for_each(|index| guest.offer(index));
        guest.connected(22)
    };
    guest.driver.start(VERSION_1);
    guest.driver.describe(TABLE, 0, BUFFERS, 44, WRITE, 0);
    guest.driver.offer(0, 0, 0);
    guest.available = [1, 0];
    guest.send(&header, &[]);
    assert_eq!(guest.driver.get(STATUS), 15 | NEEDS_RESET);
}

#[test]
fn the_hosts_side_may_be_in_another_process() {
    // The last is dropped first, and the other waits for that.
    let (served, mut guest) = Guest::relayed();
    let (mut stream, request) = guest.connect_by_thread();
    let answer = Header { op: op::RESPONSE, buf_alloc: GUEST_ROOM, ..request.reset() };
    guest.send(&answer, &[]);
    assert_eq!(line(&mut stream), "OK 1073741824\n");
    // More than a packet of the stream's, and than a receive buffer.
    let bytes = data(GUEST_ROOM as usize);
    stream.write_all(&bytes).unwrap();
    let mut got = Vec::new();
    while got.len() < bytes.len() {
        guest.wait().into_iter().for_each(|(_, part)| got.extend(part));
    }
    assert!(got == bytes);
    let header = Header { op: op::RW, ..answer };
    let mut back = Vec::new();
    for part in bytes.chunks(8 << 10) {
        guest.send(&Header { len: part.len() as u32, ..header }, part);
        back.extend(read(&mut stream, part.len()));
    }
    assert!(back == bytes);
    // A packet that lies about its data ends its connection as it does without a stream between.
    let length = BUFFER_BYTES + 1;
    let table = TABLE + QUEUE_BYTES;
    let lie = Header { len: length, ..header };
    guest.driver.memory.write_slice(&lie.bytes(), GuestAddress(SENT)).unwrap();
    guest.driver.describe(table, 0, SENT, 44 + length, 0, 0);
    guest.available[1] = guest.driver.offer(1, guest.available[1], 0);
    assert_eq!(guest.wait().last().unwrap().0.op, op::RST);
    assert!(is_at_end(&mut stream));

    let (mut stream, _) = guest.connect_by_thread();
    guest.driver.set(STATUS, 0);
    assert!(is_at_end(&mut stream), "with the driver all connections are gone");
    let path = guest.path("");
    drop(guest.driver);
    drop(served);
    assert!(!path.exists());
}

#[test]
fn a_socket_is_the_owners_alone_and_goes_with_its_machine() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let options = VsockOptions { cid: 3, path: path.clone() };
    let vsock = Vsock::open(&options).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    assert!(matches!(Vsock::open(&options), Err(OpenVsockError::Exists(_))));
    drop(vsock);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    for cid in [0, 1, 2, u32::MAX] {
        let result = Vsock::open(&VsockOptions { cid, ..options.clone() });
        assert!(matches!(result, Err(OpenVsockError::Cid(_))), "{cid}");
    }
    let long = VsockOptions { cid: 3, path: directory.path().join("x".repeat(100)) };
    assert!(matches!(Vsock::open(&long), Err(OpenVsockError::TooLong(_))));
    let nowhere = VsockOptions { cid: 3, path: directory.path().join("no/s") };
    assert!(matches!(Vsock::open(&nowhere), Err(OpenVsockError::Bind { .. })));
}

/// A packet as a hostile driver might send it, mostly of the connection that there is.
fn packet() -> impl Strategy<Value = (Header, usize)> {
    let ops = prop_oneof![0u16..9, Just(op::RW), any::<u16>()];
    let number = || prop_oneof![0u32..4, Just(GUEST_ROOM), any::<u32>()];
    let cid = prop_oneof![9 => Just(u64::from(CID)), 1 => any::<u64>()];
    let kind = prop_oneof![9 => Just(STREAM), 1 => any::<u16>()];
    let length = prop_oneof![8 => (0usize..3000).prop_map(|length| (length, None)), 1 => (0usize..3000, number().prop_map(Some))];
    (ops, number(), number(), number(), cid, kind, length, any::<bool>()).prop_map(
        |(op, flags, buf_alloc, fwd_cnt, src_cid, kind, (length, lie), right)| {
            let ports = if right { (22, 1 << 30) } else { (flags, buf_alloc) };
            let len = lie.unwrap_or(length as u32);
            let (src_port, dst_port) = ports;
            let header = Header {
                src_cid,
                dst_cid: HOST_CID,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            (header, length)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_guest_breaks_the_device_for_good(
        packets in proptest::collection::vec((packet(), 0u8..4), 1..40),
    ) {
        let mut guest = Guest::new();
        let (mut stream, answer) = guest.connect(22);
        stream.set_nonblocking(true).unwrap();
        guest.send(&answer, &[]);
        for ((header, length), action) in packets {
            match action {
                0 => drop(stream.write(&[1; 5000])),
                1 => drop(stream.read(&mut [0; 5000])),
                _ => {}
            }
            guest.send(&header, &data(length));
            if guest.driver.get(STATUS) & NEEDS_RESET != 0 {
                break;
            }
            guest.received();
        }
        drop(stream);

        guest.driver.start(VERSION_1);
        (guest.available, guest.seen) = ([0; 2], 0);
        (0..SIZE).for_each(|index| guest.offer(index));
        let (mut stream, header) = guest.connected(80);
        guest.send(&Header { len: 4, ..header }, b"fine");
        prop_assert_eq!(read(&mut stream, 4), b"fine");
        prop_assert_eq!(guest.driver.get(STATUS), 15);
    }
}
