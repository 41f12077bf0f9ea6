//! The serial line: a 16550 by vm-superio, its interrupt through an eventfd that KVM listens to.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{fmt, io};

use vm_superio::serial::NoEvents;
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

type Uart16550 = Serial<Irq, NoEvents, Console>;

/// COM1.
pub(super) struct SerialPort {
    uart: Mutex<Uart16550>,
}

impl fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

impl SerialPort {
    pub fn new(output: Box<dyn io::Write + Send>, irq: EventFd, stop: Arc<AtomicBool>) -> Self {
        Self { uart: Mutex::new(Serial::new(Irq(irq), Console { output, stop, failed: false })) }
    }

    pub fn save(&self) -> Uart {
        Uart::save(&self.lock().state())
    }

    pub fn restore(&self, saved: &Uart) -> io::Result<()> {
        let mut uart = self.lock();
        let irq = Irq(uart.interrupt_evt().0.try_clone()?);
        let Console { output, stop, failed } = uart.writer_mut();
        let output = std::mem::replace(output, Box::new(io::sink()));
        let console = Console { output, stop: Arc::clone(stop), failed: *failed };
        let restored = Serial::from_state(&saved.restore(), irq, NoEvents, console);
        *uart = restored.map_err(|error| io::Error::other(format!("{error:?}")))?;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Uart16550> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn read(&self, offset: u8) -> u8 {
        self.lock().read(offset)
    }

    pub fn write(&self, offset: u8, value: u8) {
        let result = self.lock().write(offset, value);
        if let Err(error) = result {
            tracing::debug!(%error, "Serial port write");
        }
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
    fn a_transmitter_interrupt_is_raised_when_enabled() {
        let irq = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(Box::new(io::sink()), irq.try_clone().unwrap(), Arc::default());
        port.write(1, 0x02);
        assert_eq!(irq.read().unwrap(), 1);
    }
}
