//! Carrying the command's output streams on the host.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::control::Order;
use crate::run::Event;

/// One of the command's output streams.
#[derive(Clone)]
pub(crate) struct Stream(Arc<(Mutex<Carried>, Condvar)>);

#[derive(Default)]
struct Carried {
    bytes: u64,
    ended: bool,
}

impl Stream {
    /// Starts a thread that carries what comes from `socket` to `writer`.
    ///
    /// A slow writer slows the command, as it would on the host. When the writer fails, the command is told by `hang_up` and
    /// the rest is thrown away.
    pub(crate) fn carry(
        mut socket: UnixStream,
        writer: Box<dyn Write + Send>,
        hang_up: Order,
        events: Sender<Event>,
    ) -> Self {
        let shared = Arc::new((Mutex::new(Carried::default()), Condvar::new()));
        let carried = Arc::clone(&shared);
        std::thread::spawn(move || {
            let update = |change: &dyn Fn(&mut Carried)| {
                change(&mut carried.0.lock().unwrap_or_else(PoisonError::into_inner));
                carried.1.notify_all();
            };
            let mut writer = Some(writer);
            let mut buffer = vec![0; 64 << 10];
            loop {
                let len = match socket.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(len) => len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(_) => break,
                };
                let written = writer
                    .as_mut()
                    .map(|writer| writer.write_all(&buffer[..len]).and_then(|()| writer.flush()));
                if let Some(Err(error)) = written {
                    tracing::debug!(%error, order = %hang_up, "output lost its reader");
                    writer = None;
                    // Fails only when the run is over.
                    let _ = events.send(Event::HangUp(hang_up));
                }
                update(&|carried| carried.bytes += len as u64);
            }
            update(&|carried| carried.ended = true);
        });
        Self(shared)
    }

    /// Waits until `bytes` bytes have been carried. False if the stream ended earlier.
    pub(crate) fn wait(&self, bytes: u64) -> bool {
        let carried = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let carried = self
            .0
            .1
            .wait_while(carried, |carried| carried.bytes < bytes && !carried.ended)
            .unwrap_or_else(PoisonError::into_inner);
        carried.bytes >= bytes
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Fails from the second write on.
    struct Breaks(Sender<Vec<u8>>, bool);

    impl Write for Breaks {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            if std::mem::replace(&mut self.1, true) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.0.send(data.to_vec()).map_err(io::Error::other)?;
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_broken_writer_is_reported_once_and_the_rest_counted() {
        let (socket, mut source) = UnixStream::pair().unwrap();
        let (written, received) = mpsc::channel();
        let (events, seen) = mpsc::channel();
        let stream = Stream::carry(socket, Box::new(Breaks(written, false)), Order::HangUpStdout, events);
        source.write_all(b"first").unwrap();
        assert_eq!(received.recv_timeout(Duration::from_secs(10)).unwrap(), b"first");
        assert!(stream.wait(5));
        source.write_all(b"second").unwrap();
        assert!(stream.wait(11));
        source.write_all(b"third").unwrap();
        assert!(stream.wait(16));
        drop(source);
        assert!(!stream.wait(17), "more was waited for than came");
        let events: Vec<Event> = seen.iter().collect();
        assert!(matches!(events[..], [Event::HangUp(Order::HangUpStdout)]), "{} events", events.len());
    }
}
