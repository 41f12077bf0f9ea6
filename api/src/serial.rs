//! Where the guest's first serial line goes, and what is sent over it.

use std::fs::File;
use std::io::{self, Write};

use crate::cli::Serial;
use crate::exit::Failure;

/// Whether what comes on standard input is the guest's to read.
pub fn has_input(to: &[Serial]) -> bool {
    to.contains(&Serial::Tty)
}

/// What writes to all of these places.
///
/// # Errors
/// A file cannot be created.
pub fn outputs(to: &[Serial]) -> Result<Box<dyn Write + Send>, Failure> {
    let outputs = to.iter().map(output).collect::<Result<Vec<_>, _>>()?;
    Ok(Box::new(Tee::new(outputs)))
}

fn output(to: &Serial) -> Result<Box<dyn Write + Send>, Failure> {
    Ok(match to {
        Serial::Stderr | Serial::Tty => Box::new(io::stderr()),
        Serial::Stdout => Box::new(io::stdout()),
        Serial::None => Box::new(io::sink()),
        Serial::File(path) => Box::new(File::create(path).map_err(|error| {
            Failure::Usage(format!("--serial {}: cannot be created: {error}", path.display()))
        })?),
    })
}

/// Writes to several places. One that fails is given up; when none is left, that is the error.
///
/// A write that is interrupted goes on where it was when it is repeated, so that nothing is written twice.
struct Tee {
    outputs: Vec<Box<dyn Write + Send>>,
    /// How far the write that was interrupted has come: so many places have it all, the next one so many bytes.
    done: usize,
    written: usize,
}

impl Tee {
    fn new(outputs: Vec<Box<dyn Write + Send>>) -> Self {
        Self { outputs, done: 0, written: 0 }
    }
}

impl Write for Tee {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        while let Some(output) = self.outputs.get_mut(self.done) {
            let rest = buf.get(self.written..).unwrap_or_default();
            if rest.is_empty() {
                (self.done, self.written) = (self.done + 1, 0);
                continue;
            }
            let error = match output.write(rest) {
                Ok(0) => io::ErrorKind::WriteZero.into(),
                Ok(count) => {
                    self.written += count;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
                Err(error) => error,
            };
            if self.outputs.len() == 1 {
                return Err(error);
            }
            tracing::warn!(%error, "The guest's console cannot be written to one of its places, which gets no more of it");
            drop(self.outputs.remove(self.done));
            self.written = 0;
        }
        (self.done, self.written) = (0, 0);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.outputs.iter_mut().try_for_each(Write::flush)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Takes one byte at a time, after it has failed as it is told, the last first.
    #[derive(Clone, Default)]
    struct Slow(Arc<Mutex<(Vec<u8>, Vec<io::ErrorKind>)>>);

    impl Slow {
        fn failing(kinds: &[io::ErrorKind]) -> Self {
            Self(Arc::new(Mutex::new((Vec::new(), kinds.to_vec()))))
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
        }
    }

    impl Write for Slow {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let mut state = self.0.lock().unwrap();
            match state.1.pop() {
                Some(kind) => Err(kind.into()),
                None => {
                    state.0.push(buf[0]);
                    Ok(1)
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn tee(outputs: &[Slow]) -> Tee {
        Tee::new(outputs.iter().map(|output| Box::new(output.clone()) as Box<dyn Write + Send>).collect())
    }

    #[test]
    fn each_place_gets_all_once_though_writes_are_interrupted() {
        let outputs = [Slow::default(), Slow::failing(&[io::ErrorKind::Interrupted; 2]), Slow::default()];
        let mut tee = tee(&outputs);
        for text in ["ab", "c"] {
            // write_all repeats what is interrupted, as the machine does.
            tee.write_all(text.as_bytes()).unwrap();
        }
        assert_eq!(outputs.map(|output| output.text()), ["abc", "abc", "abc"]);
    }

    #[test]
    fn a_place_that_fails_is_given_up_and_the_last_one_is_the_error() {
        let outputs = [Slow::failing(&[io::ErrorKind::BrokenPipe]), Slow::default()];
        let mut tee = tee(&outputs);
        tee.write_all(b"ab").unwrap();
        outputs[1].0.lock().unwrap().1.push(io::ErrorKind::StorageFull);
        assert_eq!(tee.write(b"c").unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(outputs.map(|output| output.text()), ["", "ab"]);
    }
}
