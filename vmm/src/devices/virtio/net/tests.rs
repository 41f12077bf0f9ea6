//! A driver, well-behaved and hostile, against the device on a stream of frames.

#![allow(clippy::cast_possible_truncation, reason = "lengths are small")]

use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::tests::{BUFFERS, Driver, NEEDS_RESET, NEXT, QUEUE_BYTES, SIZE, STATUS, VERSION_1, WRITE};
use super::*;

const TABLE: u64 = 0x1000;
const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
/// As Linux makes its receive buffers: a header and the longest frame.
const ROOM: u32 = 1530;
const SENT: u64 = BUFFERS + 0x1_0000;

/// A guest's driver and the other end of its network.
struct Guest {
    driver: Driver,
    network: UnixStream,
    available: [u16; 2],
    seen: u16,
}

impl Guest {
    fn new() -> Self {
        let (network, stream) = UnixStream::pair().unwrap();
        network.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let driver = Driver::started(Box::new(Network::stream("test", stream, MAC).unwrap()));
        let mut guest = Self { driver, network, available: [0; 2], seen: 0 };
        guest.offer_all();
        guest
    }

    fn offer_all(&mut self) {
        (0..SIZE).for_each(|index| self.offer(index));
    }

    fn offer(&mut self, index: u16) {
        let at = BUFFERS + u64::from(index) * 0x1000;
        self.driver.describe(TABLE, index, at, ROOM, WRITE, 0);
        self.available[0] = self.driver.offer(0, self.available[0], index);
    }

    /// Sends what begins with a header, in as many buffers as `cuts` make.
    fn send(&mut self, bytes: &[u8], cuts: &[usize]) {
        self.driver.memory.write_slice(bytes, GuestAddress(SENT)).unwrap();
        let mut from = 0;
        for (index, to) in (0u16..).zip(cuts.iter().copied().chain([bytes.len()])) {
            let next = if to == bytes.len() { 0 } else { NEXT };
            let at = SENT + from as u64;
            self.driver.describe(TABLE + QUEUE_BYTES, index, at, (to - from) as u32, next, index + 1);
            from = to;
        }
        self.available[1] = self.driver.offer(1, self.available[1], 0);
        self.driver.transport.serve_all();
    }

    /// What has come, headers included.
    fn received(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        self.driver.transport.serve_all();
        while self.seen != self.driver.used_of(0) {
            let (index, length) = self.driver.used_entry(0, self.seen);
            self.seen = self.seen.wrapping_add(1);
            let mut bytes = vec![0; length as usize];
            let at = GuestAddress(BUFFERS + u64::from(index) * 0x1000);
            self.driver.memory.read_slice(&mut bytes, at).unwrap();
            frames.push(bytes);
            self.offer(index);
            self.driver.transport.serve_all();
        }
        frames
    }

    /// The network sends a frame.
    fn arrive(&mut self, frame: &[u8]) {
        self.network.write_all(&(frame.len() as u32).to_be_bytes()).unwrap();
        self.network.write_all(frame).unwrap();
    }

    /// The next frame that the network has.
    fn left(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.network.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.network.read_exact(&mut frame).unwrap();
        frame
    }

    fn status(&self) -> u16 {
        let mut status = [0; 2];
        self.driver.transport.read(0x106, &mut status);
        u16::from_le_bytes(status)
    }
}

fn frame(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 5 / 3) as u8).collect()
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; HEADER_BYTES], frame].concat()
}

#[test]
fn addresses_are_written_as_everywhere() {
    assert_eq!("52:54:00:01:02:03".parse(), Ok(MAC));
    assert_eq!(MAC.to_string(), "52:54:00:01:02:03");
    assert_eq!("FE:ff:00:01:02:03".parse::<MacAddress>().unwrap().to_string(), "fe:ff:00:01:02:03");
    for wrong in ["", "52:54:00:01:02", "52:54:00:01:02:03:04", "52-54-00-01-02-03", "+2:54:00:01:02:03"] {
        assert_eq!(wrong.parse::<MacAddress>(), Err(ParseMacError::Form(wrong.to_owned())));
    }
    assert!(matches!("53:54:00:01:02:03".parse::<MacAddress>(), Err(ParseMacError::Group(_))));
    let random = MacAddress::random();
    assert_eq!(random.0[0] & 3, 2, "local, and not of a group");
    assert_ne!(random, MacAddress::random());
}

#[test]
fn the_driver_finds_its_address_and_its_link_up() {
    let guest = Guest::new();
    assert_eq!(guest.driver.get(8), 1);
    let mut mac = [0; 6];
    guest.driver.transport.read(0x100, &mut mac);
    assert_eq!(mac, MAC.0);
    assert_eq!(guest.status(), 1);
}

#[test]
fn frames_go_both_ways() {
    let mut guest = Guest::new();
    for (length, cuts) in [(60, &[][..]), (1514, &[12]), (1514, &[5, 12, 26, 1000])] {
        guest.send(&with_header(&frame(length)), cuts);
        assert_eq!(guest.left(), frame(length), "{cuts:?}");
    }
    guest.arrive(&frame(60));
    guest.arrive(&frame(1518));
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let expected = [frame(60), frame(1518)].map(|frame| [&header[..], &frame].concat());
    assert_eq!(guest.received(), expected);
}

#[test]
fn a_frame_that_is_too_long_is_lost_and_no_other() {
    let mut guest = Guest::new();
    guest.arrive(&frame(1519));
    guest.arrive(&frame(9000));
    guest.arrive(&frame(100));
    assert_eq!(guest.received().len(), 1);
    guest.send(&vec![0; HEADER_BYTES + MAX_SENT_BYTES + 1], &[]);
    guest.send(&with_header(&frame(70)), &[]);
    assert_eq!(guest.left(), frame(70));
}

#[test]
fn frames_wait_for_a_driver_that_has_no_buffers() {
    let mut guest = Guest::new();
    (0..2 * SIZE).for_each(|number| guest.arrive(&[number as u8; 60]));
    let frames = guest.received();
    assert_eq!(frames.len(), 2 * usize::from(SIZE));
    assert!((0..).zip(&frames).all(|(number, frame)| frame[HEADER_BYTES] == number));
}

#[test]
fn a_network_that_takes_nothing_keeps_the_drivers_frames_and_loses_none() {
    let mut guest = Guest::new();
    let mut sent = 0u32;
    loop {
        guest
            .driver
            .memory
            .write_slice(&with_header(&sent.to_le_bytes().repeat(350)), GuestAddress(SENT))
            .unwrap();
        guest.driver.describe(TABLE + QUEUE_BYTES, 0, SENT, 1412, 0, 0);
        guest.available[1] = guest.driver.offer(1, guest.available[1], 0);
        guest.driver.transport.serve_all();
        sent += 1;
        if guest.driver.used_of(1) != guest.available[1] {
            break;
        }
        assert!(sent < 100_000, "it takes everything");
    }
    for number in 0..sent {
        assert_eq!(guest.left(), number.to_le_bytes().repeat(350));
        guest.driver.transport.serve_all();
    }
    assert_eq!(guest.driver.used_of(1), guest.available[1]);
}

#[test]
fn a_network_that_goes_away_takes_the_link_down_and_not_the_machine() {
    for is_broken in [false, true] {
        let mut guest = Guest::new();
        let mut network = std::mem::replace(&mut guest.network, UnixStream::pair().unwrap().0);
        let generation = guest.driver.get(0xfc);
        if is_broken {
            network.write_all(&u32::MAX.to_be_bytes()).unwrap();
        } else {
            drop(network);
        }
        guest.driver.transport.serve_all();
        assert_eq!(guest.status(), 0, "the link is down");
        assert_ne!(guest.driver.get(0xfc), generation);
        assert_eq!(guest.driver.get(0x60) & 2, 2, "the driver is told");
        guest.send(&with_header(&frame(60)), &[]);
        assert_eq!(guest.driver.used_of(1), guest.available[1], "what it sends is taken, and lost");
        assert_eq!(guest.driver.get(STATUS), 15);
    }
}

#[test]
fn what_a_network_has_sent_before_it_went_away_still_arrives() {
    let mut guest = Guest::new();
    (0..2 * SIZE).for_each(|number| guest.arrive(&[number as u8; 60]));
    guest.network.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.received().len(), 2 * usize::from(SIZE));
    assert_eq!(guest.status(), 0);
}

#[test]
fn lies_about_lengths_break_the_driver() {
    let mut guest = Guest::new();
    guest.send(&[0; HEADER_BYTES - 1], &[]);
    assert_eq!(guest.driver.get(STATUS), 15 | NEEDS_RESET);
    guest.driver.start(VERSION_1);
    guest.arrive(&frame(1000));
    guest.driver.describe(TABLE, 0, BUFFERS, 1011, WRITE, 0);
    guest.driver.offer(0, 0, 0);
    guest.driver.transport.serve_all();
    assert_eq!(guest.driver.get(STATUS), 15 | NEEDS_RESET);
}

/// A back end that can do everything, and notes what it is given.
struct Able(std::sync::mpsc::Sender<Vec<u8>>, UnixStream);

impl AsRawFd for Able {
    fn as_raw_fd(&self) -> RawFd {
        self.1.as_raw_fd()
    }
}

impl BackEnd for Able {
    fn name(&self) -> &str {
        "able"
    }

    fn offloads(&self) -> u64 {
        OFFLOADS
    }

    fn receive(&mut self, _: &mut Vec<u8>) -> io::Result<Option<()>> {
        Ok(None)
    }

    fn send(&mut self, frame: &[u8]) {
        self.0.send(frame.to_vec()).unwrap();
    }
}

#[test]
fn a_header_asks_for_nothing_that_was_not_agreed_on() {
    let asked = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    let without_segments = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
    for (features, given) in [
        (0, [0; HEADER_BYTES]),
        (1 << VIRTIO_NET_F_CSUM, without_segments),
        (1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4, asked),
    ] {
        let (sender, sent) = std::sync::mpsc::channel();
        let network = Network::new(Box::new(Able(sender, UnixStream::pair().unwrap().0)), MAC).unwrap();
        let mut driver = Driver::new(Box::new(network));
        driver.start(VERSION_1 | features);
        assert_eq!(driver.get(STATUS), 15);
        driver.memory.write_slice(&[&asked[..], &frame(60)].concat(), GuestAddress(SENT)).unwrap();
        driver.describe(TABLE + QUEUE_BYTES, 0, SENT, 72, 0, 0);
        driver.offer(1, 0, 0);
        driver.transport.serve_all();
        assert_eq!(sent.recv().unwrap()[..HEADER_BYTES], given, "{features:#x}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_driver_and_no_network_break_the_device_for_good(
        descriptors in proptest::collection::vec((0..2u64, 0..SIZE, prop_oneof![Just(SENT), any::<u64>()], 0u32..70_000, 0u16..4, 0..SIZE), 1..20),
        offers in proptest::collection::vec((0..2u16, 0..SIZE), 1..20),
        network in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut guest = Guest::new();
        for (queue, index, address, length, flags, next) in descriptors {
            guest.driver.describe(TABLE + QUEUE_BYTES * queue, index, address, length, flags, next);
        }
        guest.network.write_all(&network).unwrap();
        for (queue, head) in offers {
            let count = &mut guest.available[usize::from(queue)];
            *count = guest.driver.offer(queue, *count, head);
            guest.driver.transport.serve_all();
        }
        guest.driver.start(VERSION_1);
        (guest.available, guest.seen) = ([0; 2], 0);
        guest.offer_all();
        guest.network.set_nonblocking(true).unwrap();
        while matches!(guest.network.read(&mut [0; 70_000]), Ok(1..)) {}
        guest.network.set_nonblocking(false).unwrap();
        guest.send(&with_header(&frame(60)), &[]);
        prop_assert_eq!(guest.driver.get(STATUS), 15);
        if guest.status() == 1 {
            prop_assert_eq!(guest.left(), frame(60));
        }
    }
}
