//! What an image file gives to boot: a kernel, alone or with what belongs to it.

use super::decompress::{self, Compression};
use super::disk::DiskFacts;
use super::uki::{self, Uki};
use super::{Image, ImageError, UkiError};

/// Begins every header of a cpio archive in the "newc" formats (Documentation/driver-api/early-userspace/buffer-format.rst).
const CPIO_MAGICS: [&[u8]; 2] = [b"070701", b"070702"];

/// A kernel with what the file that held it wants it booted with.
#[derive(Debug)]
pub struct Bootable {
    /// The kernel.
    pub kernel: Image,
    /// The rest.
    pub extras: Extras,
}

/// What a file holds besides the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extras {
    /// The initial RAM disk.
    pub initrd: Option<Vec<u8>>,
    /// The command line.
    pub cmdline: Option<String>,
    /// The kernel's own file, where it came from a disk.
    pub kernel_file: Option<Vec<u8>>,
    /// What the file is, if it is more than a kernel.
    pub container: Option<Container>,
}

/// A file that holds a kernel among other things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Container {
    /// A unified kernel image.
    Uki(UkiFacts),
    /// A disk.
    Disk(DiskFacts),
}

/// What a unified kernel image says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UkiFacts {
    /// The system that it belongs to: PRETTY_NAME of its os-release.
    pub system: Option<String>,
    /// Its kernel's version as it says.
    pub version: Option<String>,
}

impl Bootable {
    /// Recognises and checks the contents of a file.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn parse(file: Vec<u8>) -> Result<Self, ImageError> {
        let Some(uki) = uki::read(&file)? else {
            return Ok(Self { kernel: Image::parse(file)?, extras: Extras::default() });
        };
        if uki::read(uki.linux)?.is_some() {
            return Err(UkiError::Nested.into());
        }
        let kernel = Image::parse(uki.linux.to_vec())?;
        Ok(Self { kernel, extras: Extras::of(&uki) })
    }
}

impl Extras {
    /// The same with what the user gives, which wins: an initial RAM disk replaces the file's own, and words go behind the file's, where
    /// the kernel takes the last of most parameters.
    #[must_use]
    pub fn with(self, initrd: Option<Vec<u8>>, words: Option<&str>) -> Self {
        let words = words.filter(|words| !words.is_empty());
        let cmdline = match (self.cmdline, words) {
            (Some(own), Some(words)) if !own.is_empty() => Some(format!("{own} {words}")),
            (own, words) => words.map(str::to_owned).or(own),
        };
        Self { initrd: initrd.or(self.initrd), cmdline, ..self }
    }

    pub(super) fn of(uki: &Uki<'_>) -> Self {
        let facts = UkiFacts {
            system: uki.os_release.and_then(|text| os_release(text, "PRETTY_NAME")),
            version: uki.uname.map(str::to_owned),
        };
        Self {
            initrd: uki.initrd.map(<[u8]>::to_vec),
            cmdline: uki.cmdline.map(str::to_owned),
            kernel_file: None,
            container: Some(Container::Uki(facts)),
        }
    }
}

/// A field of an os-release file (os-release(5)): the last assignment counts, quotes around the value are no part of it.
pub(super) fn os_release(text: &str, field: &str) -> Option<String> {
    let mut values = text.lines().rev().filter_map(|line| line.trim().strip_prefix(field)?.strip_prefix('='));
    let value = values.next()?;
    let quoted = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
    Some(quoted.unwrap_or(value).to_owned()).filter(|value| !value.is_empty())
}

/// How an initial RAM disk begins: "cpio", or the name of a compression. The kernel unpacks each part as it finds it.
#[must_use]
pub fn initrd_format(initrd: &[u8]) -> Option<String> {
    // The kernel skips zeros between archives (init/initramfs.c).
    let start = initrd.iter().position(|byte| *byte != 0).unwrap_or(initrd.len());
    let initrd = &initrd[start..];
    if CPIO_MAGICS.iter().any(|magic| initrd.starts_with(magic)) {
        return Some("cpio".to_owned());
    }
    decompress::detect(initrd).ok().map(|compression: Compression| compression.to_string())
}
