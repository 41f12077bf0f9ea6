//! What the user says of a disk.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// How an image stores its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Byte for byte.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3 (QEMU: docs/interop/qcow2.txt).
    Qcow2,
}

impl FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(()),
        }
    }
}

/// What becomes of writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// There are none.
    ReadOnly,
    /// They go to a temporary file, and with it.
    #[default]
    Overlay,
    /// They go to the image.
    Write,
}

/// A disk as the user describes it: `FILE[,format=raw|qcow2][,readonly|,overlay|,write][,backing=FILE]...`, with a comma in a name
/// written twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// The image.
    pub path: PathBuf,
    /// Its format; told from its content where it is not said.
    pub format: Option<Format>,
    /// What becomes of writes.
    pub access: Access,
    /// The images that it is stacked on, each on the next. Only their names open them: see the crate's description.
    pub backing: Vec<PathBuf>,
}

impl DiskOptions {
    /// An image of either format below an overlay.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, format: None, access: Access::default(), backing: Vec::new() }
    }
}

/// Why a text describes no disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// No file.
    #[error("A disk needs a file: FILE[,format=raw|qcow2][,readonly|,overlay|,write][,backing=FILE]")]
    NoFile,
    /// An unknown word.
    #[error(
        "`{0}` is nothing that a disk has; there are format=raw, format=qcow2, readonly, overlay, write and backing=FILE, and a comma \
         in a file's name is written twice"
    )]
    Unknown(String),
    /// Said twice.
    #[error("`{0}` comes after something else was said about that; say it once")]
    Twice(String),
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// As it is parsed.
impl fmt::Display for DiskOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |path: &PathBuf| path.to_string_lossy().replace(',', ",,");
        f.write_str(&name(&self.path))?;
        if let Some(format) = self.format {
            write!(f, ",format={format}")?;
        }
        f.write_str(match self.access {
            Access::ReadOnly => ",readonly",
            Access::Overlay => ",overlay",
            Access::Write => ",write",
        })?;
        self.backing.iter().try_for_each(|backing| write!(f, ",backing={}", name(backing)))
    }
}

impl FromStr for DiskOptions {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut parts = split(text).into_iter();
        let path = parts.next().filter(|path| !path.is_empty()).ok_or(ParseError::NoFile)?;
        let mut options = DiskOptions::new(path.into());
        let mut access = None;
        for part in parts {
            let unknown = || ParseError::Unknown(part.clone());
            let twice = match part.split_once('=') {
                Some(("format", format)) => {
                    options.format.replace(format.parse().map_err(|()| unknown())?).is_some()
                }
                Some(("backing", path)) if !path.is_empty() => {
                    options.backing.push(path.into());
                    false
                }
                Some(_) => return Err(unknown()),
                None => {
                    let wanted = match part.as_str() {
                        "readonly" => Access::ReadOnly,
                        "overlay" => Access::Overlay,
                        "write" => Access::Write,
                        _ => return Err(unknown()),
                    };
                    access.replace(wanted).is_some()
                }
            };
            if twice {
                return Err(ParseError::Twice(part));
            }
        }
        options.access = access.unwrap_or_default();
        Ok(options)
    }
}

/// The parts of an option between its commas; two commas are one in a part.
#[must_use]
pub fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(next) = rest.next() {
        match (next, parts.last_mut()) {
            (',', Some(part)) if rest.next_if_eq(&',').is_some() => part.push(','),
            (',', _) => parts.push(String::new()),
            (next, Some(part)) => part.push(next),
            (_, None) => {}
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_alone_gets_an_overlay() {
        assert_eq!("a.img".parse(), Ok(DiskOptions::new("a.img".into())));
        assert_eq!(DiskOptions::new("a.img".into()).access, Access::Overlay);
    }

    #[test]
    fn each_word_says_what_it_says() {
        let options: DiskOptions = "a,,b,write,format=qcow2,backing=c=d,backing=e,,".parse().unwrap();
        assert_eq!(
            options,
            DiskOptions {
                path: "a,b".into(),
                format: Some(Format::Qcow2),
                access: Access::Write,
                backing: vec!["c=d".into(), "e,".into()],
            }
        );
        assert_eq!("a,readonly".parse::<DiskOptions>().unwrap().access, Access::ReadOnly);
    }

    #[test]
    fn what_is_written_is_what_is_parsed() {
        let full = "a,,b,format=qcow2,write,backing=c=d,backing=e,,";
        for text in [full, "a,overlay", "a,format=raw,readonly"] {
            assert_eq!(text.parse::<DiskOptions>().unwrap().to_string(), text);
        }
        assert_eq!(DiskOptions::new("a".into()).to_string(), "a,overlay");
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for text in ["", ",readonly"] {
            assert_eq!(text.parse::<DiskOptions>(), Err(ParseError::NoFile), "{text}");
        }
        for text in ["a,", "a,ro", "a,format=vmdk", "a,backing=", "a,size=3"] {
            assert!(matches!(text.parse::<DiskOptions>(), Err(ParseError::Unknown(_))), "{text}");
        }
        for text in ["a,readonly,write", "a,write,write", "a,format=raw,format=raw"] {
            assert!(matches!(text.parse::<DiskOptions>(), Err(ParseError::Twice(_))), "{text}");
        }
    }
}
