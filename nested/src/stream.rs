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
