//! The serial line: a 16550 by vm-superio, its interrupt through an eventfd that KVM listens to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use vm_superio::serial::{Error, SerialEvents};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::snapshot::{Mirror, Uart};

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Uart16550 = Serial<Irq, Emptied, Console>;

/// Wakes who waits for the guest to read.
struct Emptied(Arc<Condvar>);

impl SerialEvents for Emptied {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.0.notify_all();
    }
}

struct Line {
    uart: Uart16550,
    /// The machine has ended: nobody will read.
    closed: bool,
}

/// COM1.
pub(crate) struct SerialPort {
    line: Mutex<Line>,
    /// The guest has read all that came in, or the machine has ended.
    emptied: Arc<Condvar>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    pub fn new(output: Box<dyn io::Write + Send>, irq: EventFd, stop: Arc<AtomicBool>) -> Self {
        let emptied = Arc::new(Condvar::new());
        let output = Console { output, stop, failed: false };
        let uart = Serial::with_events(Irq(irq), Emptied(Arc::clone(&emptied)), output);
        Self { line: Mutex::new(Line { uart, closed: false }), emptied }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn save(&self) -> Uart {
        Uart::save(&self.lock().uart.state())
    }

    pub fn restore(&self, saved: &Uart) -> io::Result<()> {
        let uart = &mut self.lock().uart;
        let irq = Irq(uart.interrupt_evt().0.try_clone()?);
        let Console { output, stop, failed } = uart.writer_mut();
        let output = std::mem::replace(output, Box::new(io::sink()));
        let console = Console { output, stop: Arc::clone(stop), failed: *failed };
        let restored = Serial::from_state(&saved.restore(), irq, Emptied(Arc::clone(&self.emptied)), console);
        *uart = restored.map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(())
    }

    pub fn read(&self, offset: u8) -> u8 {
        self.lock().uart.read(offset)
    }

    pub fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.lock().uart.write(offset, value) {
            tracing::debug!(%error, "Serial port write");
        }
    }

    /// Gives the guest some of `bytes` to read, and waits for room if there is none. Returns how many.
    ///
    /// # Errors
    /// BrokenPipe: the machine has ended.
    fn receive(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut line = self.lock();
        loop {
            if line.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            match line.uart.enqueue_raw_bytes(bytes) {
                // In loopback mode the receiver is not connected to the line (PC16550D data sheet, 8.7, MCR bit 4).
                Ok(0) => return Ok(bytes.len()),
                Ok(count) => return Ok(count),
                Err(Error::FullFifo) => {
                    line = self.emptied.wait(line).unwrap_or_else(PoisonError::into_inner);
                }
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
    }

    /// Nobody will read any more.
    fn close(&self) {
        self.lock().closed = true;
        self.emptied.notify_all();
    }
}

/// What is sent to a machine over its first serial line. A write waits while the receiver's 64 bytes are full, until the guest reads
/// them: it is not for a vCPU's thread. After the end of the machine it fails with BrokenPipe.
#[derive(Clone)]
pub struct SerialInput(Arc<SerialPort>);

impl SerialInput {
    pub(crate) fn new(port: Arc<SerialPort>) -> Self {
        Self(port)
    }
}

impl fmt::Debug for SerialInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialInput").finish_non_exhaustive()
    }
}

impl io::Write for SerialInput {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.receive(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends what waits to send when it is dropped, which is with the machine.
pub(crate) struct Hangup(pub Arc<SerialPort>);

impl Drop for Hangup {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The user's sink. A sink that fails is given up, with one warning: it must not stop the guest.
struct Console {
    output: Box<dyn io::Write + Send>,
    stop: Arc<AtomicBool>,
    failed: bool,
}

impl Console {
    /// Repeats `operation` while signals interrupt it, until the machine is to stop: a reader that no longer reads must not
    /// keep the machine from ending.
    fn persist<T>(
        &mut self,
        mut operation: impl FnMut(&mut dyn io::Write) -> io::Result<T>,
        given_up: T,
    ) -> io::Result<T> {
        if self.failed {
            return Ok(given_up);
        }
        loop {
            match operation(&mut *self.output) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    if self.stop.load(Ordering::Acquire) {
                        return Ok(given_up);
                    }
                }
                Err(error) => {
                    self.failed = true;
                    tracing::warn!(%error, "The guest's console cannot be written; its output is dropped from here on");
                    return Ok(given_up);
                }
                done => return done,
            }
        }
    }
}

impl io::Write for Console {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.persist(|output| output.write(buf), buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.persist(|output| output.flush(), ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers from a list, then accepts everything; counts the calls.
    struct Scripted {
        answers: Vec<io::ErrorKind>,
        calls: Arc<Mutex<usize>>,
    }

    impl io::Write for Scripted {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            *self.calls.lock().unwrap() += 1;
            self.answers.pop().map_or(Ok(buf.len()), |kind| Err(kind.into()))
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port(answers: &[io::ErrorKind], stop: bool) -> (SerialPort, Arc<Mutex<usize>>) {
        let calls = Arc::default();
        let output = Scripted { answers: answers.to_vec(), calls: Arc::clone(&calls) };
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        (SerialPort::new(Box::new(output), irq, Arc::new(AtomicBool::new(stop))), calls)
    }

    #[test]
    fn an_interrupted_write_is_repeated() {
        let (port, calls) = port(&[io::ErrorKind::Interrupted; 2], false);
        port.write(0, b'x');
        assert_eq!(*calls.lock().unwrap(), 3);
    }

    #[test]
    fn an_interrupted_write_ends_when_the_machine_stops() {
        let (port, calls) = port(&[io::ErrorKind::Interrupted; 9], true);
        port.write(0, b'x');
        assert_eq!(*calls.lock().unwrap(), 1);
    }

    #[test]
    fn a_broken_sink_is_given_up() {
        let (port, calls) = port(&[io::ErrorKind::BrokenPipe], false);
        port.write(0, b'x');
        port.write(0, b'y');
        assert_eq!(*calls.lock().unwrap(), 1);
        assert_eq!(port.read(5) & 0x20, 0x20);
    }

    #[test]
    fn what_is_sent_is_read_in_order_with_an_interrupt_and_waits_for_room() {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(Box::new(io::sink()), irq.try_clone().unwrap(), Arc::default());
        port.write(1, 0x01);
        let port = Arc::new(port);
        let mut input = SerialInput::new(Arc::clone(&port));
        let sent: Vec<u8> = (0..=255).collect();
        let all = sent.clone();
        let sender = std::thread::spawn(move || io::Write::write_all(&mut input, &all));
        let mut received = Vec::new();
        while received.len() < sent.len() {
            // Line status: data ready.
            if port.read(5) & 1 == 0 {
                std::thread::yield_now();
                continue;
            }
            received.push(port.read(0));
        }
        sender.join().unwrap().unwrap();
        assert_eq!(received, sent);
        assert!(irq.read().unwrap() >= 4, "64 bytes at a time");
    }

    #[test]
    fn who_waits_for_room_hears_of_the_end() {
        let port = Arc::new(port(&[], false).0);
        let mut input = SerialInput::new(Arc::clone(&port));
        assert_eq!(io::Write::write(&mut input, &[0; 100]).unwrap(), 64);
        let sender = std::thread::spawn(move || io::Write::write(&mut input, b"x"));
        drop(Hangup(port));
        assert_eq!(sender.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn in_loopback_mode_the_line_is_not_connected() {
        let port = Arc::new(port(&[], false).0);
        // Modem control: loopback.
        port.write(4, 0x10);
        assert_eq!(io::Write::write(&mut SerialInput::new(Arc::clone(&port)), &[7; 100]).unwrap(), 100);
        assert_eq!(port.read(5) & 1, 0);
    }

    #[test]
    fn a_transmitter_interrupt_is_raised_when_enabled() {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(Box::new(io::sink()), irq.try_clone().unwrap(), Arc::default());
        port.write(1, 0x02);
        assert_eq!(irq.read().unwrap(), 1);
    }
}
