//! Opens what the user calls IMAGE.

use std::error::Error;
use std::path::Path;

use guest::Guest;
use guest::image::{Bootable, Extras, Image};
use guest::relocation::Relocation;

use crate::exit::Failure;

/// A guest that comes with the command.
struct BuiltIn {
    name: &'static str,
    image: &'static [u8],
}

const BUILT_IN: [BuiltIn; 2] = [
    BuiltIn { name: "demo", image: guest::programs::DEMO },
    BuiltIn { name: "ticker", image: guest::programs::TICKER },
];

/// vCPUs of a built-in guest where nothing is said: they have work for several.
const BUILT_IN_VCPUS: u32 = 2;

fn built_in(image: &str) -> Option<&'static [u8]> {
    BUILT_IN.iter().find(|guest| guest.name == image).map(|guest| guest.image)
}

/// Whether IMAGE is a file.
pub fn is_file(image: &str) -> bool {
    built_in(image).is_none()
}

/// As many vCPUs as an image has use for.
pub fn default_vcpus(image: &str) -> u32 {
    if is_file(image) { 1 } else { BUILT_IN_VCPUS }
}

/// A guest, and what its image holds besides the kernel.
pub struct Opened {
    pub guest: Guest,
    pub extras: Extras,
}

/// Opens an image file, or a built-in guest, and reads its symbols.
pub fn open(image: &str) -> Result<Opened, Failure> {
    parse(image, read(image)?)
}

/// The bytes of an image file, or of a built-in guest, for [`parse`]; nothing looks at them.
///
/// # Errors
/// The file cannot be read.
pub fn read(image: &str) -> Result<Vec<u8>, Failure> {
    match built_in(image) {
        Some(bytes) => Ok(bytes.to_vec()),
        None => Image::read_file(Path::new(image)).map_err(|error| failure(image, &error)),
    }
}

/// Recognises an image, and reads its symbols.
///
/// # Errors
/// What is wrong with it.
pub fn parse(image: &str, bytes: Vec<u8>) -> Result<Opened, Failure> {
    let Bootable { kernel, extras } = Bootable::parse(bytes).map_err(|error| failure(image, &error))?;
    let guest = Guest::new(kernel).map_err(|error| failure(image, &error))?;
    Ok(Opened { guest, extras })
}

/// The guest whose image is in a snapshot: unpacked, and relocated.
///
/// # Errors
/// What is wrong with it.
pub fn parse_moved(image: &str, bytes: Vec<u8>, relocation: Relocation) -> Result<Guest, Failure> {
    let Bootable { kernel, .. } = Bootable::parse(bytes).map_err(|error| failure(image, &error))?;
    Guest::new(kernel.moved(relocation)).map_err(|error| failure(image, &error))
}

fn failure(image: &str, error: &dyn Error) -> Failure {
    Failure::Image(format!("{image}: {}", chain(error)))
}

/// Reads an initial RAM disk.
///
/// # Errors
/// The file cannot be read.
pub fn read_initrd(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path)
        .map_err(|error| Failure::Image(format!("--initrd {}: cannot be read: {error}", path.display())))
}

/// An error with its causes, in one line. Some errors have told their cause's text as their own.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
