//! A stream of frames, each behind its length in four bytes, the most significant first.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{BackEnd, HEADER_BYTES, MAX_SENT_BYTES};

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

pub(super) struct Stream {
    name: String,
    stream: File,
    incoming: Vec<u8>,
    /// What the stream does not take yet.
    outgoing: VecDeque<u8>,
}

impl Stream {
    pub fn new(name: &str, stream: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&stream, true)?;
        Ok(Self {
            name: name.to_owned(),
            stream: stream.into(),
            incoming: Vec::new(),
            outgoing: VecDeque::new(),
        })
    }

    /// The length of the frame that `incoming` begins with, if all of it is there.
    fn complete(&self) -> io::Result<Option<usize>> {
        let Some(length) = self.incoming.first_chunk() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_SENT_BYTES {
            return Err(io::Error::other(format!("it sends a frame of {length} bytes")));
        }
        Ok((self.incoming.len() >= 4 + length).then_some(length))
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
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
                frame.extend_from_slice(&self.incoming[4..4 + length]);
                self.incoming.drain(..4 + length);
                return Ok(Some(()));
            }
            let had = self.incoming.len();
            self.incoming.resize(had + READ_BYTES, 0);
            let read = self.stream.read(&mut self.incoming[had..]);
            self.incoming.truncate(had + read.as_ref().map_or(0, |read| *read));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
    }

    fn takes_frames(&self) -> bool {
        self.outgoing.is_empty()
    }

    fn send(&mut self, frame: &[u8]) {
        let frame = &frame[HEADER_BYTES..];
        self.outgoing.extend(u32::try_from(frame.len()).unwrap_or(0).to_be_bytes());
        self.outgoing.extend(frame);
        // An error comes again when the stream is read.
        self.flush().ok();
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(self.outgoing.as_slices().0) {
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
