//! A stream of bytes that does not block, with room for what has not come whole and for what it does not take yet.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

pub(super) struct Buffered<S> {
    pub stream: S,
    /// What has come and not been taken.
    pub incoming: Vec<u8>,
    /// What the stream does not take yet.
    pub outgoing: VecDeque<u8>,
}

impl<S: Read + Write> Buffered<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, incoming: Vec::new(), outgoing: VecDeque::new() }
    }

    /// Reads once; false when nothing more has come.
    ///
    /// # Errors
    /// What the stream says; UnexpectedEof at its end.
    pub fn fill(&mut self) -> io::Result<bool> {
        loop {
            let had = self.incoming.len();
            self.incoming.resize(had + READ_BYTES, 0);
            let read = self.stream.read(&mut self.incoming[had..]);
            self.incoming.truncate(had + read.as_ref().map_or(0, |read| *read));
            match read {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes as much as the stream takes.
    ///
    /// # Errors
    /// What the stream says.
    pub fn flush(&mut self) -> io::Result<()> {
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
