//! The block device (Virtio 1.2, 5.2).

use std::io::{self, Read, Write};

use disk::{Disk, SECTOR_BYTES};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Device, DriverError, Request, outside, written};

/// As many as QEMU's block device has.
const QUEUE_SIZE: u16 = 256;

/// What the driver gives first: type, priority, sector (5.2.6).
const HEADER_BYTES: usize = 16;

/// Sector, number of sectors, flags (5.2.6).
const SEGMENT_BYTES: usize = 16;

/// Bytes that go through at once between the disk and the guest's memory.
const BUFFER_BYTES: usize = 256 << 10;

/// The most sectors of one discard or write-zeros request: 1 GiB.
const MAX_SECTORS: u32 = 2 << 20;

/// Discards want this alignment, sectors: a qcow2 cluster.
const DISCARD_ALIGNMENT: u32 = 128;

/// A disk as a device.
pub(crate) struct Block {
    name: String,
    disk: Disk,
    buffer: Vec<u8>,
}

/// What became of a request besides the data that it moved.
enum Failure {
    /// The disk's fault.
    Disk(io::Error),
    /// A place that the disk does not have, or a write to one that can only be read.
    Refused,
    /// What this device has not said that it can.
    Unsupported,
    /// The driver's.
    Driver(DriverError),
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Failure::Driver(error)
    }
}

impl Block {
    /// The disk number `index`.
    pub fn new(disk: Disk, index: usize) -> Self {
        Self { name: format!("disk{index}"), disk, buffer: Vec::new() }
    }

    fn sectors(&self) -> u64 {
        self.disk.bytes() / SECTOR_BYTES
    }

    /// Carries a request out, with `status` as the last byte of its room already taken off.
    fn carry_out(&mut self, request: &mut Request<'_>) -> Result<(), Failure> {
        let mut header = [0; HEADER_BYTES];
        request.reader.read_exact(&mut header).map_err(|_| DriverError::Lacks("its header"))?;
        let (kind, sector) = (word(&header, 0), long(&header, 8));
        match kind {
            VIRTIO_BLK_T_IN => self.read(request, sector),
            VIRTIO_BLK_T_OUT => self.write(request, sector),
            VIRTIO_BLK_T_FLUSH => self.disk.flush().map_err(Failure::Disk),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
                let length = id.len().min(self.name.len());
                id[..length].copy_from_slice(&self.name.as_bytes()[..length]);
                let room = request.writer.available_bytes().min(id.len());
                request.writer.write_all(&id[..room]).map_err(outside)?;
                Ok(())
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => self.clear(request, kind),
            _ => Err(Failure::Unsupported),
        }
    }

    /// Byte offset of `bytes` from `sector` on, if the disk has them all.
    fn place(&self, sector: u64, bytes: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(bytes / SECTOR_BYTES).ok_or(Failure::Refused)?;
        if !bytes.is_multiple_of(SECTOR_BYTES) || end > self.sectors() {
            return Err(Failure::Refused);
        }
        Ok(sector * SECTOR_BYTES)
    }

    fn read(&mut self, request: &mut Request<'_>, sector: u64) -> Result<(), Failure> {
        let mut left = request.writer.available_bytes();
        let mut at = self.place(sector, left as u64)?;
        while left > 0 && !request.is_abandoned() {
            let length = left.min(BUFFER_BYTES);
            let buffer = room(&mut self.buffer, length);
            self.disk.read(buffer, at).map_err(Failure::Disk)?;
            request.writer.write_all(buffer).map_err(outside)?;
            at += length as u64;
            left -= length;
        }
        Ok(())
    }

    fn write(&mut self, request: &mut Request<'_>, sector: u64) -> Result<(), Failure> {
        let mut left = request.reader.available_bytes();
        let mut at = self.place(sector, left as u64)?;
        if self.disk.is_read_only() {
            return Err(Failure::Refused);
        }
        while left > 0 && !request.is_abandoned() {
            let length = left.min(BUFFER_BYTES);
            let buffer = room(&mut self.buffer, length);
            request.reader.read_exact(buffer).map_err(outside)?;
            self.disk.write(buffer, at).map_err(Failure::Disk)?;
            at += length as u64;
            left -= length;
        }
        Ok(())
    }

    /// Discards, or writes zeros.
    fn clear(&mut self, request: &mut Request<'_>, kind: u32) -> Result<(), Failure> {
        let mut segment = [0; SEGMENT_BYTES];
        request.reader.read_exact(&mut segment).map_err(|_| DriverError::Lacks("its segment"))?;
        let (sector, sectors, flags) = (long(&segment, 0), word(&segment, 8), word(&segment, 12));
        // One segment at most; a discard has no flags, zeros may have one (5.2.6.2).
        let allowed = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        if request.reader.available_bytes() > 0 || flags & !allowed != 0 || sectors > MAX_SECTORS {
            return Err(Failure::Unsupported);
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        let at = self.place(sector, bytes)?;
        if self.disk.is_read_only() {
            return Err(Failure::Refused);
        }
        let result = if kind == VIRTIO_BLK_T_DISCARD {
            self.disk.discard(at, bytes)
        } else {
            self.disk.write_zeros(at, bytes)
        };
        result.map_err(Failure::Disk)
    }
}

impl Device for Block {
    fn name(&self) -> &str {
        &self.name
    }

    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        let more = if self.disk.is_read_only() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | more
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; 60];
        let mut put = |at: usize, value: u32| config[at..at + 4].copy_from_slice(&value.to_le_bytes());
        // seg_max: a header and a status go with the data. blk_size.
        put(12, u32::from(QUEUE_SIZE) - 2);
        #[allow(clippy::cast_possible_truncation, reason = "512")]
        put(20, SECTOR_BYTES as u32);
        // max_discard_sectors, max_discard_seg, discard_sector_alignment.
        put(36, MAX_SECTORS);
        put(40, 1);
        put(44, DISCARD_ALIGNMENT);
        // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap.
        put(48, MAX_SECTORS);
        put(52, 1);
        put(56, 1);
        config[..8].copy_from_slice(&self.sectors().to_le_bytes());
        config
    }

    fn serve(&mut self, _: usize, mut request: Request<'_>) -> Result<u32, DriverError> {
        // The last byte is the status's, wherever the driver cuts its buffers (2.7.4).
        let room = request.writer.available_bytes();
        let data = room.checked_sub(1).ok_or(DriverError::Lacks("room for its status"))?;
        let mut status =
            request.writer.split_at(data).map_err(|_| DriverError::Lacks("room for its status"))?;
        let value = match self.carry_out(&mut request) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Unsupported) => VIRTIO_BLK_S_UNSUPP,
            Err(Failure::Refused) => VIRTIO_BLK_S_IOERR,
            Err(Failure::Disk(error)) => {
                tracing::warn!(disk = %self.disk.path().display(), "{error}");
                VIRTIO_BLK_S_IOERR
            }
            Err(Failure::Driver(error)) => return Err(error),
        };
        #[allow(clippy::cast_possible_truncation, reason = "there are three")]
        status.write_all(&[value as u8]).map_err(outside)?;
        Ok(written(&request.writer).saturating_add(written(&status)))
    }
}

/// The first `length` bytes of a buffer that grows as needed.
fn room(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|bytes| bytes.first_chunk()).map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
