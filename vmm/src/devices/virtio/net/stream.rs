//! A stream of frames, each behind its length in four bytes, the most significant first.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::super::buffered::Buffered;
use super::{BackEnd, HEADER_BYTES, MAX_SENT_BYTES};

pub(super) struct Stream {
    name: String,
    bytes: Buffered<File>,
}

impl Stream {
    pub fn new(name: &str, stream: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&stream, true)?;
        Ok(Self { name: name.to_owned(), bytes: Buffered::new(stream.into()) })
    }

    /// The length of the frame that `incoming` begins with, if all of it is there.
    fn complete(&self) -> io::Result<Option<usize>> {
        let Some(length) = self.bytes.incoming.first_chunk() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_SENT_BYTES {
            return Err(io::Error::other(format!("it sends a frame of {length} bytes")));
        }
        Ok((self.bytes.incoming.len() >= 4 + length).then_some(length))
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.bytes.stream.as_raw_fd()
    }
}

impl BackEnd for Stream {
    fn name(&self) -> &str {
        &self.name
    }

    fn offloads(&self) -> u64 {
        0
    }

    fn receive(&mut self, frame: &mut Vec<u8>) -> io::Result<Option<()>> {
        loop {
            if let Some(length) = self.complete()? {
                frame.resize(HEADER_BYTES, 0);
                frame.extend_from_slice(&self.bytes.incoming[4..4 + length]);
                self.bytes.incoming.drain(..4 + length);
                return Ok(Some(()));
            }
            if !self.bytes.fill()? {
                return Ok(None);
            }
        }
    }

    fn takes_frames(&self) -> bool {
        self.bytes.outgoing.is_empty()
    }

    fn send(&mut self, frame: &[u8]) {
        let frame = &frame[HEADER_BYTES..];
        self.bytes.outgoing.extend(u32::try_from(frame.len()).unwrap_or(0).to_be_bytes());
        self.bytes.outgoing.extend(frame);
        // An error comes again when the stream is read.
        self.flush().ok();
    }

    fn flush(&mut self) -> io::Result<()> {
        self.bytes.flush()
    }
}
