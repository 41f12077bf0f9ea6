//! How the command ends: one code and one message for each way.

/// Exit codes, the same for every subcommand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    Done,
    /// A cell of a matrix is not as it should be.
    CellsFailed,
    Usage,
    Host,
    Image,
    Probe,
    GuestCrashed,
    Timeout,
    Interrupted,
    /// What the same command ended with inside the emulated machine.
    Inner(i32),
}

impl Code {
    pub const fn number(self) -> i32 {
        match self {
            Code::Done => 0,
            Code::CellsFailed => 1,
            Code::Usage => 2,
            Code::Host => 3,
            Code::Image => 4,
            Code::Probe => 5,
            Code::GuestCrashed => 6,
            Code::Timeout => 124,
            Code::Interrupted => 130,
            Code::Inner(code) => code,
        }
    }
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{0}")]
    Usage(String),
    #[error("{0}")]
    Host(String),
    #[error("{0}")]
    Image(String),
    #[error("{0}")]
    Probe(String),
    /// The guest did not come as far as the command needs it.
    #[error("{0}")]
    Guest(String),
    #[error("{0}")]
    Timeout(String),
    /// The reader of stdout went away: nobody is left to tell.
    #[error("Standard output was closed")]
    OutputClosed,
}

impl Failure {
    pub fn code(&self) -> Code {
        match self {
            Failure::Usage(_) => Code::Usage,
            Failure::Host(_) => Code::Host,
            Failure::Image(_) => Code::Image,
            Failure::Probe(_) => Code::Probe,
            Failure::Guest(_) => Code::GuestCrashed,
            Failure::Timeout(_) => Code::Timeout,
            Failure::OutputClosed => Code::Done,
        }
    }
}

impl From<Code> for std::process::ExitCode {
    fn from(code: Code) -> Self {
        // An exit status has eight bits.
        Self::from(u8::try_from(code.number()).unwrap_or(u8::MAX))
    }
}
