//! Loads the drivers of virtio disks and has them do countable work: each disk's first blocks are read and checked, the next ones
//! written, made durable and read again, all past the page cache, so that each call is one request of the disk's.

use core::ffi::CStr;

use crate::syscall;
use crate::text::{count, fail};
use crate::{Counts, close, load_drivers, opened};

/// Each behind those that it needs.
const MODULES: [&CStr; 4] = [
    c"/modules/virtio_ring.ko",
    c"/modules/virtio.ko",
    c"/modules/virtio_mmio.ko",
    c"/modules/virtio_blk.ko",
];
/// Where devtmpfs has the first and the second disk.
const DISKS: [&CStr; 2] = [c"/devices/vda", c"/devices/vdb"];
const BLOCK: usize = 4096;
/// Blocks that are read, and as many behind them that are written.
const BLOCKS: u64 = 32;

/// What passes the page cache goes to and from memory that is aligned to sectors (open(2), O_DIRECT).
#[repr(align(4096))]
struct Block([u8; BLOCK]);

/// What is at a byte of a block before anything is written.
fn pattern(block: u64, at: usize) -> u8 {
    (block * 131 + at as u64 * 7) as u8
}

/// Does the work and prints its counts.
pub fn run(counts: &Counts) {
    load_drivers(counts, &MODULES);
    if syscall::mount(c"devtmpfs", c"/devices") != 0 {
        fail(b"mount devtmpfs");
    }
    for disk in DISKS {
        counts.opened();
        let file = opened(disk, syscall::openat_direct(disk));
        use_disk(file);
        close(counts, file);
    }
    let disks = DISKS.len() as u64;
    count(b"disk_read", disks * 2 * BLOCKS);
    count(b"disk_write", disks * BLOCKS);
    count(b"disk_sync", disks);
}

fn use_disk(file: i64) {
    let mut block = Block([0; BLOCK]);
    for number in 0..BLOCKS {
        read_block(file, &mut block, number);
        check(&block, |at| pattern(number, at));
    }
    for number in BLOCKS..2 * BLOCKS {
        block.0.iter_mut().enumerate().for_each(|(at, byte)| *byte = !pattern(number, at));
        if syscall::pwrite(file, &block.0, number * BLOCK as u64) != BLOCK as i64 {
            fail(b"a write to a disk");
        }
    }
    if syscall::fsync(file) != 0 {
        fail(b"fsync of a disk");
    }
    for number in BLOCKS..2 * BLOCKS {
        read_block(file, &mut block, number);
        check(&block, |at| !pattern(number, at));
    }
}

fn read_block(file: i64, block: &mut Block, number: u64) {
    block.0.fill(0);
    if syscall::pread(file, &mut block.0, number * BLOCK as u64) != BLOCK as i64 {
        fail(b"a read of a disk");
    }
}

fn check(block: &Block, expected: impl Fn(usize) -> u8) {
    if block.0.iter().enumerate().any(|(at, byte)| *byte != expected(at)) {
        fail(b"the content of a disk");
    }
}
