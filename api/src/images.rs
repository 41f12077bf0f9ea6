//! Opens what the user calls IMAGE.

use std::error::Error;
use std::path::Path;

use guest::Guest;
use guest::image::Image;

use crate::exit::Failure;

/// The name of the built-in guest.
pub const DEMO: &str = "demo";

/// Opens an image file, or the built-in guest, and reads its symbols.
pub fn open(image: &str) -> Result<Guest, Failure> {
    let opened = if image == DEMO {
        Image::parse(guest::programs::DEMO.to_vec()).map_err(Into::into).and_then(Guest::new)
    } else {
        Guest::open(Path::new(image))
    };
    opened.map_err(|error| Failure::Image(format!("{image}: {}", chain(&error))))
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
