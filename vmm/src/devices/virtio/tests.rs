//! Drivers, well-behaved and hostile, against the devices in memory of a mock's size.

#![allow(clippy::cast_possible_truncation, reason = "registers are halves of numbers, and lengths are small")]

use std::io::Write as _;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use disk::{Access, DiskOptions};
use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MEMORY: u64 = 1 << 20;
/// Queue 0; the others are [`QUEUE_BYTES`] behind each other.
const TABLE: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
pub(super) const QUEUE_BYTES: u64 = 0x4000;
pub(super) const BUFFERS: u64 = 0x1_0000;
pub(super) const SIZE: u16 = 16;

pub(super) const NEXT: u16 = 1;
pub(super) const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

pub(super) const STATUS: u64 = 0x70;
pub(super) const NEEDS_RESET: u32 = 64;
pub(super) const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;

/// Sectors of the disk.
const SECTORS: u64 = 64;

/// A driver of one device; its requests go to queue 0 unless something else is said.
pub(super) struct Driver {
    pub(super) transport: Transport,
    pub(super) memory: GuestMemoryMmap,
    available: u16,
}

impl Driver {
    pub(super) fn new(device: Box<dyn Device>) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        let transport = Transport::new(device, memory.clone()).unwrap();
        Self { transport, memory, available: 0 }
    }

    /// A driver that has brought its device up.
    pub(super) fn started(device: Box<dyn Device>) -> Self {
        let mut driver = Self::new(device);
        driver.start(VERSION_1);
        assert_eq!(driver.get(STATUS), 15);
        driver
    }

    pub(super) fn get(&self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.transport.read(offset, &mut value);
        u32::from_le_bytes(value)
    }

    pub(super) fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub(super) fn negotiate(&self, features: u64) {
        self.set(STATUS, 0);
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        for half in 0..2u32 {
            self.set(0x24, half);
            self.set(0x20, (features >> (32 * half)) as u32);
        }
        self.set(STATUS, 11);
    }

    fn place_queue(&self, queue: u32, table: u64, available: u64, used: u64) {
        self.set(0x30, queue);
        self.set(0x38, self.get(0x34).min(SIZE.into()));
        for (register, address) in [(0x80, table), (0x90, available), (0xa0, used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    pub(super) fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.memory.write_slice(&[0; (BUFFERS - TABLE) as usize], GuestAddress(TABLE)).unwrap();
        for queue in 0..self.transport.notifications().len() as u32 {
            let at = QUEUE_BYTES * u64::from(queue);
            self.place_queue(queue, TABLE + at, AVAILABLE + at, USED + at);
        }
        self.available = 0;
        self.set(STATUS, 15);
    }

    pub(super) fn describe(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Makes the chain at `head` available and has the device serve it.
    fn submit(&mut self, head: u16) {
        self.available = self.offer(0, self.available, head);
        self.transport.serve_all();
    }

    /// Makes a chain of a queue available behind `available` others. Returns how many there are now.
    pub(super) fn offer(&self, queue: u16, available: u16, head: u16) -> u16 {
        let ring = AVAILABLE + QUEUE_BYTES * u64::from(queue);
        let slot = ring + 4 + 2 * u64::from(available % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        let available = available.wrapping_add(1);
        self.memory.write_obj(available, GuestAddress(ring + 2)).unwrap();
        available
    }

    fn used(&self) -> u16 {
        self.used_of(0)
    }

    pub(super) fn used_of(&self, queue: u16) -> u16 {
        self.memory.read_obj(GuestAddress(USED + QUEUE_BYTES * u64::from(queue) + 2)).unwrap()
    }

    /// What entry `index` of a queue's used ring says: the chain's head, and how much has been written to it.
    pub(super) fn used_entry(&self, queue: u16, index: u16) -> (u16, u32) {
        let at = USED + QUEUE_BYTES * u64::from(queue) + 4 + 8 * u64::from(index % SIZE);
        let entry: [u32; 2] = [0, 4].map(|half| self.memory.read_obj(GuestAddress(at + half)).unwrap());
        (entry[0] as u16, entry[1])
    }

    /// A request out of pieces that the device reads, and room of these lengths. Returns what it has written there.
    fn request(&mut self, pieces: &[&[u8]], room: &[u32]) -> Vec<u8> {
        let mut at = BUFFERS;
        let count = pieces.len() + room.len();
        let lengths =
            pieces.iter().map(|piece| (piece.len() as u32, 0)).chain(room.iter().map(|r| (*r, WRITE)));
        for (index, (length, flags)) in (0u16..).zip(lengths) {
            let more = if usize::from(index) + 1 < count { NEXT } else { 0 };
            self.describe(TABLE, index, at, length, flags | more, index + 1);
            if let Some(piece) = pieces.get(usize::from(index)) {
                self.memory.write_slice(piece, GuestAddress(at)).unwrap();
            }
            at += u64::from(length);
        }
        let before = self.used();
        self.submit(0);
        assert_eq!(self.used(), before.wrapping_add(1), "the request is done");
        let total: u32 = room.iter().sum();
        let mut written = vec![0; total as usize];
        self.memory.read_slice(&mut written, GuestAddress(at - u64::from(total))).unwrap();
        written
    }

    fn used_length(&self) -> u32 {
        self.used_entry(0, self.used().wrapping_sub(1)).1
    }

    fn interrupts(&self) -> u64 {
        self.transport.irq().read().unwrap_or(0)
    }
}

fn sector(number: u8) -> Vec<u8> {
    vec![number; 512]
}

/// A disk whose sectors hold their numbers.
fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    (0..SECTORS as u8).for_each(|number| file.write_all(&sector(number)).unwrap());
    file
}

fn block(access: Access) -> Box<dyn Device> {
    let image = image();
    let options = DiskOptions { access, ..DiskOptions::new(image.path().to_owned()) };
    Box::new(Block::new(disk::Disk::open(&options).unwrap(), 0))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

#[test]
fn a_driver_finds_what_the_device_is() {
    let driver = Driver::new(block(Access::Overlay));
    assert_eq!(driver.get(0), u32::from_le_bytes(*b"virt"));
    assert_eq!((driver.get(4), driver.get(8)), (2, 2));
    assert_eq!(driver.get(0x34), 256, "the size of queue 0");
    driver.set(0x30, 1);
    assert_eq!(driver.get(0x34), 0, "there is no queue 1");
    let mut capacity = [0; 8];
    driver.transport.read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS);
    let mut beyond = [0xee; 4];
    driver.transport.read(0xffc, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    let mut narrow = [0xee; 2];
    driver.transport.read(0, &mut narrow);
    assert_eq!(narrow, [0; 2], "registers are words");
}

#[test]
fn only_what_is_offered_can_be_had() {
    let driver = Driver::new(Box::new(Rng));
    driver.negotiate(VERSION_1 | 1 << 40);
    assert_eq!(driver.get(STATUS), 3, "no such feature");
    driver.negotiate(0);
    assert_eq!(driver.get(STATUS), 3, "no legacy driver");
    driver.set(STATUS, 7);
    assert_eq!(driver.get(STATUS), 3, "and none that goes on all the same");
    driver.negotiate(VERSION_1);
    assert_eq!(driver.get(STATUS), 11);
    driver.set(0x20, 0);
    driver.set(STATUS, 15);
    assert_eq!(driver.get(STATUS), 15, "what was agreed on stays");
}

#[test]
fn sectors_are_read_and_written_wherever_the_driver_cuts_its_buffers() {
    let mut driver = Driver::started(block(Access::Overlay));
    let read = driver.request(&[&header(0, 3)], &[512, 1]);
    assert_eq!(read, [sector(3), vec![0]].concat());
    assert_eq!(driver.used_length(), 513);
    assert_eq!(driver.interrupts(), 1);
    assert_eq!(driver.get(0x60), 1);
    driver.set(0x64, 1);
    assert_eq!(driver.get(0x60), 0);

    let bytes = [header(1, 3), sector(0xaa), sector(0xbb)].concat();
    assert_eq!(driver.request(&[&bytes[..5], &bytes[5..700], &bytes[700..]], &[1]), [0]);
    let read = driver.request(&[&header(0, 3)[..9], &header(0, 3)[9..]], &[100, 925]);
    assert_eq!(read, [sector(0xaa), sector(0xbb), vec![0]].concat());
}

#[test]
fn the_other_requests_of_a_disk() {
    let mut driver = Driver::started(block(Access::Overlay));
    assert_eq!(driver.request(&[&header(4, 0)], &[1]), [0], "flush");
    assert_eq!(driver.request(&[&header(8, 0)], &[20, 1])[..6], *b"disk0\0");
    assert_eq!(driver.request(&[&header(8, 0)], &[3, 1]), *b"dis\0");
    assert_eq!(driver.request(&[&header(13, 0), &segment(5, 2, 1)], &[1]), [0], "write zeros");
    assert_eq!(driver.request(&[&header(0, 5)], &[1024, 1]), [0; 1025]);
    assert_eq!(driver.request(&[&header(0, 7)], &[512, 1])[..512], sector(7));
    assert_eq!(driver.request(&[&header(11, 0), &segment(0, 64, 0)], &[1]), [0], "discard");
    assert_eq!(driver.request(&[&header(99, 0)], &[1]), [2], "unknown");
    assert_eq!(driver.request(&[&header(11, 0), &segment(0, 1, 1)], &[1]), [2], "a flag");
    let two = [segment(0, 1, 0), segment(1, 1, 0)].concat();
    assert_eq!(driver.request(&[&header(13, 0), &two], &[1]), [2], "two segments");
}

#[test]
fn what_a_disk_does_not_have_is_an_error_for_the_guest() {
    let mut driver = Driver::started(block(Access::Overlay));
    for place in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(driver.request(&[&header(0, place)], &[1024, 1]).last(), Some(&1), "{place}");
        assert_eq!(driver.request(&[&header(1, place), &[0; 1024]], &[1]), [1], "{place}");
        assert_eq!(driver.request(&[&header(13, 0), &segment(place, 2, 0)], &[1]), [1], "{place}");
    }
    assert_eq!(driver.request(&[&header(0, 0)], &[100, 1]).last(), Some(&1), "part of a sector");
    let mut driver = Driver::started(block(Access::ReadOnly));
    driver.set(0x14, 0);
    assert_eq!(driver.get(0x10) & 1 << 5, 1 << 5, "VIRTIO_BLK_F_RO");
    assert_eq!(driver.request(&[&header(1, 0), &sector(9)], &[1]), [1]);
    assert_eq!(driver.request(&[&header(13, 0), &segment(0, 1, 0)], &[1]), [1]);
    assert_eq!(driver.request(&[&header(0, 0)], &[512, 1])[..512], sector(0));
}

#[test]
fn random_bytes_are_not_the_same_twice() {
    let mut driver = Driver::started(Box::new(Rng));
    let first = driver.request(&[], &[32]);
    assert_ne!(first, driver.request(&[], &[32]));
    assert_eq!(driver.used_length(), 32);
    driver.request(&[], &[60_000]);
    assert_eq!(driver.used_length(), 4096);
}

#[test]
fn indirect_descriptors_lead_to_a_request() {
    let mut driver = Driver::started(block(Access::Overlay));
    let table = BUFFERS + 0x8000;
    driver.memory.write_slice(&header(0, 9), GuestAddress(BUFFERS)).unwrap();
    driver.describe(table, 0, BUFFERS, 16, NEXT, 2);
    driver.describe(table, 2, BUFFERS + 16, 513, WRITE, 0);
    driver.describe(TABLE, 4, table, 48, INDIRECT, 0);
    driver.submit(4);
    assert_eq!(driver.used(), 1);
    let mut read = vec![0xee; 513];
    driver.memory.read_slice(&mut read, GuestAddress(BUFFERS + 16)).unwrap();
    assert_eq!(read, [sector(9), vec![0]].concat());
}

#[test]
fn a_driver_that_wants_no_interrupt_yet_gets_none() {
    let mut driver = Driver::new(Box::new(Rng));
    driver.start(VERSION_1 | EVENT_IDX);
    // used_event, behind the available ring: the third request.
    driver.memory.write_obj(2u16, GuestAddress(AVAILABLE + 4 + 2 * u64::from(SIZE))).unwrap();
    for expected in [0, 0, 1, 0] {
        driver.request(&[], &[8]);
        assert_eq!(driver.interrupts(), expected);
    }
}

type Mistake = (&'static str, fn(&mut Driver));

/// What drivers do wrong: each makes the device's only request a broken one.
const MISTAKES: [Mistake; 12] = [
    ("a loop", |driver| {
        driver.describe(TABLE, 0, BUFFERS, 16, NEXT, 1);
        driver.describe(TABLE, 1, BUFFERS, 16, NEXT, 0);
    }),
    ("a descriptor beyond the table", |driver| driver.describe(TABLE, 0, BUFFERS, 16, NEXT, SIZE)),
    ("a buffer outside memory", |driver| driver.describe(TABLE, 0, MEMORY - 8, 16, 0, 0)),
    ("a buffer in a device", |driver| driver.describe(TABLE, 0, 0xd010_0000, 16, WRITE, 0)),
    ("a buffer at the end of addresses", |driver| driver.describe(TABLE, 0, u64::MAX - 4, 16, 0, 0)),
    ("more than 4 GiB", |driver| {
        driver.describe(TABLE, 0, 0, u32::MAX, NEXT, 1);
        driver.describe(TABLE, 1, 0, u32::MAX, 0, 0);
    }),
    ("something to read behind something to write", |driver| {
        driver.describe(TABLE, 0, BUFFERS, 16, WRITE | NEXT, 1);
        driver.describe(TABLE, 1, BUFFERS, 16, 0, 0);
    }),
    ("an indirect table of half a descriptor", |driver| driver.describe(TABLE, 0, BUFFERS, 24, INDIRECT, 0)),
    ("an indirect table outside memory", |driver| driver.describe(TABLE, 0, MEMORY, 32, INDIRECT, 0)),
    ("an indirect table in itself", |driver| {
        driver.describe(BUFFERS, 0, BUFFERS, 16, INDIRECT, 0);
        driver.describe(TABLE, 0, BUFFERS, 16, INDIRECT, 0);
    }),
    ("no room for a status", |driver| driver.describe(TABLE, 0, BUFFERS, 16, 0, 0)),
    ("no header", |driver| driver.describe(TABLE, 0, BUFFERS, 1, WRITE, 0)),
];

#[test]
fn a_broken_driver_gets_its_device_back_by_a_reset() {
    let mut driver = Driver::started(block(Access::Overlay));
    for (name, make) in MISTAKES {
        make(&mut driver);
        driver.submit(0);
        assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET, "{name}");
        assert_eq!(driver.get(0x60) & 2, 2, "{name}: the driver is told by an interrupt");
        assert!(driver.interrupts() > 0, "{name}");
        let used = driver.used();
        driver.submit(0);
        assert_eq!(driver.used(), used, "{name}: nothing is served meanwhile");
        driver.start(VERSION_1);
        assert_eq!(driver.get(STATUS), 15, "{name}");
        assert_eq!(driver.request(&[&header(0, 1)], &[512, 1]), [sector(1), vec![0]].concat(), "{name}");
    }
}

#[test]
fn too_many_requests_are_a_mistake_too() {
    let driver = Driver::started(Box::new(Rng));
    driver.memory.write_obj(SIZE + 1, GuestAddress(AVAILABLE + 2)).unwrap();
    driver.transport.serve_all();
    assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET);
    let mut driver = Driver::started(Box::new(Rng));
    driver.submit(SIZE);
    assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET);
}

#[test]
fn a_queue_outside_memory_is_found_at_the_start() {
    for (table, available, used) in [
        (MEMORY - 16, AVAILABLE, USED),
        (TABLE, MEMORY - 4, USED),
        (TABLE, AVAILABLE, MEMORY),
        (TABLE, AVAILABLE, !3),
        (TABLE + 8, AVAILABLE, USED),
        (0xd000_0000, AVAILABLE, USED),
    ] {
        let driver = Driver::new(Box::new(Rng));
        driver.negotiate(VERSION_1);
        driver.place_queue(0, table, available, used);
        driver.set(STATUS, 15);
        assert_eq!(driver.get(STATUS), 15 | NEEDS_RESET, "{table:#x} {available:#x} {used:#x}");
    }
}

#[test]
fn a_queue_that_runs_cannot_be_moved_and_one_that_is_taken_back_is_left_alone() {
    let mut driver = Driver::started(Box::new(Rng));
    driver.set(0xa0, 0x5000);
    driver.request(&[], &[8]);
    driver.set(0x44, 0);
    assert_eq!(driver.get(0x44), 0);
    let used = driver.used();
    driver.submit(0);
    assert_eq!(driver.used(), used);
}

#[test]
fn a_device_goes_on_where_another_one_was_saved() {
    let mut driver = Driver::new(Box::new(Rng));
    driver.start(VERSION_1 | EVENT_IDX);
    driver.request(&[], &[8]);
    driver.request(&[], &[8]);
    let saved = driver.transport.quiesce().save();
    assert_eq!((saved.queues[0].next_used, saved.interrupts), (2, driver.get(0x60)));
    let Driver { memory, available, .. } = driver;
    let transport = Transport::new(Box::new(Rng), memory.clone()).unwrap();
    assert!(transport.restore(&saved));
    assert_eq!(transport.quiesce().save(), saved);
    let mut driver = Driver { transport, memory, available };
    assert_eq!(driver.get(STATUS), 15);
    driver.request(&[], &[8]);
    assert_eq!(driver.used(), 3);

    let other = Transport::new(block(Access::Overlay), driver.memory.clone()).unwrap();
    assert!(!other.restore(&saved), "another kind of device");
}

/// Says when a request has come, and waits before it is done.
struct Slow {
    begun: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
}

impl Device for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    fn id(&self) -> u32 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, _: usize, mut request: Request<'_>) -> Result<u32, DriverError> {
        self.begun.send(()).unwrap();
        self.go_on.recv().unwrap();
        request.writer.write_all(&[1]).map_err(outside)?;
        Ok(1)
    }
}

#[test]
fn a_reset_waits_for_the_request_under_way_and_drops_the_others() {
    let (begun, has_begun) = mpsc::channel();
    let (release, go_on) = mpsc::channel();
    let driver = Driver::started(Box::new(Slow { begun, go_on }));
    driver.describe(TABLE, 0, BUFFERS, 1, WRITE, 0);
    driver.memory.write_obj(0u16, GuestAddress(AVAILABLE + 6)).unwrap();
    driver.memory.write_obj(2u16, GuestAddress(AVAILABLE + 2)).unwrap();
    let mut threads = Threads::default();
    threads.spawn(&driver.transport).unwrap();
    driver.set(0x50, 0);
    has_begun.recv().unwrap();
    // Other registers are there while the device is busy.
    assert_eq!(driver.get(STATUS), 15);
    let used = thread::scope(|scope| {
        let reset = scope.spawn(|| {
            driver.set(STATUS, 0);
            driver.used()
        });
        // Time for a reset that does not wait to be over.
        thread::sleep(Duration::from_millis(50));
        release.send(()).unwrap();
        reset.join().unwrap()
    });
    assert_eq!(driver.get(STATUS), 0);
    driver.memory.write_obj(0u16, GuestAddress(USED + 2)).unwrap();
    driver.set(0x50, 0);
    drop(release);
    drop(threads);
    assert_eq!(used, 1);
    assert_eq!(driver.used(), 0, "nothing is written once the reset is over");
}

#[test]
fn a_device_is_served_by_its_thread() {
    let driver = Driver::started(Box::new(Rng));
    let mut threads = Threads::default();
    threads.spawn(&driver.transport).unwrap();
    driver.describe(TABLE, 0, BUFFERS, 8, WRITE, 0);
    driver.memory.write_obj(1u16, GuestAddress(AVAILABLE + 2)).unwrap();
    driver.transport.notifications()[0].write(1).unwrap();
    while driver.used() != 1 {
        thread::yield_now();
    }
}

/// A write to a register, by what such a driver might do.
fn register_write() -> impl Strategy<Value = (u64, u32)> {
    let register = prop_oneof![
        Just(0x14u64),
        Just(0x20),
        Just(0x24),
        Just(0x30),
        Just(0x38),
        Just(0x44),
        Just(0x50),
        Just(0x64),
        Just(0x70),
        0x80u64..0xa8,
        0u64..0x200,
    ];
    let value = prop_oneof![0u32..16, Just(SIZE.into()), Just(TABLE as u32), any::<u32>()];
    (register, value)
}

fn descriptor() -> impl Strategy<Value = (u16, u64, u32, u16, u16)> {
    let address = prop_oneof![0..MEMORY, Just(BUFFERS), Just(TABLE), any::<u64>()];
    let length = prop_oneof![0u32..2048, Just(16), Just(513), any::<u32>()];
    (0..SIZE, address, length, 0u16..8, prop_oneof![0..SIZE, any::<u16>()])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_driver_breaks_a_device_for_good(
        descriptors in proptest::collection::vec(descriptor(), 1..20),
        bytes in proptest::collection::vec(any::<u8>(), 64),
        heads in proptest::collection::vec(prop_oneof![0..SIZE, any::<u16>()], 1..20),
        ahead in prop_oneof![0u16..20, any::<u16>()],
        writes in proptest::collection::vec(register_write(), 0..30),
        is_block in any::<bool>(),
    ) {
        let device: Box<dyn Device> = if is_block { block(Access::Overlay) } else { Box::new(Rng) };
        let mut driver = Driver::started(device);
        driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        for (index, address, length, flags, next) in descriptors {
            driver.describe(TABLE, index, address, length, flags, next);
        }
        for head in heads {
            driver.submit(head);
        }
        driver.memory.write_obj(ahead, GuestAddress(AVAILABLE + 2)).unwrap();
        driver.transport.serve_all();
        for (register, value) in writes {
            driver.set(register, value);
            driver.transport.serve_all();
            driver.get(register);
        }

        driver.start(VERSION_1);
        prop_assert_eq!(driver.get(STATUS), 15);
        if is_block {
            let read = driver.request(&[&header(0, 1)], &[512, 1]);
            prop_assert_eq!(read.last(), Some(&0));
        } else {
            driver.request(&[], &[8]);
        }
    }
}
