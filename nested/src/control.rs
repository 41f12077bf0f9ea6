//! What the host and the machine's process 1 say to each other, one line each, over a port of its own.

use std::fmt;

/// Names of the virtio ports (virtio specification 1.2, 5.3, VIRTIO_CONSOLE_PORT_NAME).
pub(crate) mod port {
    pub(crate) const CONTROL: &str = "vmprobe.control";
    pub(crate) const STDIN: &str = "vmprobe.stdin";
    pub(crate) const STDOUT: &str = "vmprobe.stdout";
    pub(crate) const STDERR: &str = "vmprobe.stderr";
    pub(crate) const VSOCK: &str = "vmprobe.vsock";

    /// That of a network, by its number.
    pub(crate) fn network(index: usize) -> String {
        format!("vmprobe.net{index}")
    }
}

/// From the machine to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Report {
    /// /dev/kvm is there and the command is about to start.
    Ready,
    /// The output file of this index follows, `len` bytes, raw.
    File { index: usize, len: u64 },
    /// The command has ended, and has written so many bytes to its outputs.
    Ended { end: End, stdout: u64, stderr: u64 },
    /// The machine cannot run the command.
    Failed(String),
}

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// By itself, with this exit code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Report::Ready => write!(f, "ready"),
            Report::File { index, len } => write!(f, "file {index} {len}"),
            Report::Ended { end: End::Exit(code), stdout, stderr } => {
                write!(f, "exit {code} {stdout} {stderr}")
            }
            Report::Ended { end: End::Signal(signal), stdout, stderr } => {
                write!(f, "signal {signal} {stdout} {stderr}")
            }
            Report::Failed(why) => write!(f, "failed {}", why.replace('\n', "; ")),
        }
    }
}

impl Report {
    /// Understands one line.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let line = line.trim_end();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        if word == "failed" {
            return Some(Report::Failed(rest.to_owned()));
        }
        let mut words = rest.split(' ').filter(|word| !word.is_empty());
        let report = match word {
            "ready" => Report::Ready,
            "file" => Report::File { index: words.next()?.parse().ok()?, len: words.next()?.parse().ok()? },
            "exit" | "signal" => {
                let number = words.next()?.parse().ok()?;
                let end = if word == "exit" { End::Exit(number) } else { End::Signal(number) };
                Report::Ended {
                    end,
                    stdout: words.next()?.parse().ok()?,
                    stderr: words.next()?.parse().ok()?,
                }
            }
            _ => return None,
        };
        words.next().is_none().then_some(report)
    }
}

/// From the host to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// Send the command SIGINT.
    Interrupt,
    /// Send the command SIGTERM.
    Terminate,
    /// Nobody reads this output any more: close it, so that the command sees what it would see on the host (EPIPE).
    HangUpStdout,
    /// The same for stderr.
    HangUpStderr,
}

impl Order {
    const ALL: [(Order, &str); 4] = [
        (Order::Interrupt, "interrupt"),
        (Order::Terminate, "terminate"),
        (Order::HangUpStdout, "hangup stdout"),
        (Order::HangUpStderr, "hangup stderr"),
    ];

    /// Understands one line.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, text)| *text == line.trim_end()).map(|(order, _)| *order)
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Self::ALL.iter().filter(|(order, _)| order == self).try_for_each(|(_, text)| f.write_str(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_survive_the_line() {
        let reports = [
            Report::Ready,
            Report::File { index: 3, len: u64::MAX },
            Report::Ended { end: End::Exit(124), stdout: 1, stderr: 2 },
            Report::Ended { end: End::Signal(9), stdout: 0, stderr: u64::MAX },
            Report::Failed("No /dev/kvm: gone".into()),
        ];
        for report in reports {
            assert_eq!(Report::parse(&format!("{report}\n")), Some(report));
        }
    }

    #[test]
    fn a_failure_of_several_lines_is_one_line() {
        assert_eq!(Report::Failed("a\nb".into()).to_string(), "failed a; b");
    }

    #[test]
    fn other_lines_are_not_understood() {
        for line in [
            "",
            "Ready",
            "exit",
            "exit 1",
            "exit 1 2",
            "exit 1 2 3 4",
            "exit x 1 2",
            "file 1",
            "file -1 2",
            "ready 1",
        ] {
            assert_eq!(Report::parse(line), None, "{line:?}");
        }
        assert_eq!(Order::parse("hangup"), None);
    }

    #[test]
    fn orders_survive_the_line() {
        for (order, _) in Order::ALL {
            assert_eq!(Order::parse(&format!("{order}\n")), Some(order));
        }
    }
}
