//! Results on disk: a header, then a line for each cell that has been run, appended when it ends. A matrix that was interrupted goes on
//! behind the last whole line; the files of several shards are one when they are read together.

use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};

use crate::axes::Cell;
use crate::check::CellResult;

/// The format's version.
const FORMAT: u32 = 1;

/// The first line.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Header {
    /// The format's version.
    vmprobe_matrix: u32,
    /// The matrix file's text, so that results are never taken for those of another.
    pub matrix: String,
    /// The host that they are from, in words.
    pub host: String,
    /// When the first cell began, seconds since 1970.
    pub started: u64,
}

impl Header {
    /// For results that begin now.
    #[must_use]
    pub fn new(matrix: String, host: String, started: u64) -> Self {
        Self { vmprobe_matrix: FORMAT, matrix, host, started }
    }
}

/// Results that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    /// The host says no.
    #[error("They cannot be read")]
    Read(#[from] io::Error),
    /// It is something else.
    #[error("Line {line} is no result of a matrix")]
    Line {
        /// From 1 on.
        line: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Nothing in it.
    #[error("There is nothing in it")]
    Empty,
    /// Another vmprobe's.
    #[error("They have format {0}, and this vmprobe reads {FORMAT}")]
    Format(u32),
}

/// Reads results. A last line that was cut short is left out; `usize` is how many bytes are good.
///
/// # Errors
/// [`ResultsError`].
pub fn read(mut from: impl BufRead) -> Result<(Header, Vec<CellResult>, usize), ResultsError> {
    let mut header: Option<Header> = None;
    let mut results: Vec<CellResult> = Vec::new();
    let (mut good, mut line) = (0, Vec::new());
    for number in 1.. {
        line.clear();
        from.read_until(b'\n', &mut line)?;
        // Without its end it was cut short: a line is written whole.
        if line.last() != Some(&b'\n') {
            break;
        }
        let at = |source| ResultsError::Line { line: number, source };
        if header.is_none() {
            let read: Header = serde_json::from_slice(&line).map_err(at)?;
            if read.vmprobe_matrix != FORMAT {
                return Err(ResultsError::Format(read.vmprobe_matrix));
            }
            header = Some(read);
        } else {
            let result: CellResult = serde_json::from_slice(&line).map_err(at)?;
            // A cell that was run again: the last counts.
            results.retain(|earlier| earlier.cell != result.cell);
            results.push(result);
        }
        good += line.len();
    }
    Ok((header.ok_or(ResultsError::Empty)?, results, good))
}

/// Writes one line.
///
/// # Errors
/// What the host says.
pub fn write(to: &mut impl Write, line: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    to.write_all(&text)
}

/// A result for each cell, in their order: what is known of it, or that it has not been run.
#[must_use]
pub fn complete(cells: &[Cell], results: &[CellResult]) -> Vec<CellResult> {
    let known = |cell: &Cell| results.iter().find(|result| result.cell == *cell).cloned();
    cells.iter().map(|cell| known(cell).unwrap_or_else(|| CellResult::not_run(cell.clone()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Attempt;
    use crate::file::MatrixFile;
    use crate::outcome::{End, Outcome};

    fn cells() -> Vec<Cell> {
        MatrixFile::parse("axes.kernel = ['a', 'b', 'c']").unwrap().cells().unwrap()
    }

    fn result(cell: &Cell, message: &str) -> CellResult {
        let outcome = Outcome::without_report(End::DONE, message.to_owned(), 1.0);
        CellResult {
            attempts: vec![Attempt { outcome, findings: Vec::new() }],
            ..CellResult::not_run(cell.clone())
        }
    }

    fn written() -> Vec<u8> {
        let mut bytes = Vec::new();
        write(&mut bytes, &Header::new("axes".to_owned(), "a host".to_owned(), 1)).unwrap();
        for (cell, message) in [(0, "first"), (1, "second"), (0, "again")] {
            write(&mut bytes, &result(&cells()[cell], message)).unwrap();
        }
        bytes
    }

    #[test]
    fn the_last_result_of_a_cell_counts() {
        let bytes = written();
        let (header, results, good) = read(&bytes[..]).unwrap();
        assert_eq!((header.host.as_str(), good), ("a host", bytes.len()));
        let all = complete(&cells(), &results);
        let messages: Vec<_> =
            all.iter().map(|result| result.outcome().map(|outcome| outcome.message.as_str())).collect();
        assert_eq!(messages, [Some("again"), Some("second"), None]);
    }

    #[test]
    fn a_torn_tail_is_cut_off_and_damage_is_told() {
        let bytes = written();
        let whole = bytes.iter().take(bytes.len() - 1).rposition(|byte| *byte == b'\n').unwrap() + 1;
        for cut in whole..bytes.len() {
            let (_, results, good) = read(&bytes[..cut]).unwrap();
            assert_eq!((results.len(), good), (2, whole), "{cut}");
        }
        let mut damaged = bytes.clone();
        damaged[whole - 5] = b'}';
        assert!(matches!(read(&damaged[..]), Err(ResultsError::Line { line: 3, .. })));
        assert!(matches!(read(&b""[..]), Err(ResultsError::Empty)));
        assert!(matches!(read(&b"hello\n"[..]), Err(ResultsError::Line { line: 1, .. })));
        let other = String::from_utf8(bytes).unwrap().replace("\"vmprobe_matrix\":1", "\"vmprobe_matrix\":2");
        assert!(matches!(read(other.as_bytes()), Err(ResultsError::Format(2))));
    }
}
