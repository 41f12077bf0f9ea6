//! Opens what the user calls IMAGE.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use disk::{Access, Disk, DiskOptions, OpenError};
use guest::Guest;
use guest::image::disk::{self as boot_disk, HEAD_BYTES};
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

/// Where an image is read from.
pub enum Source {
    /// A kernel, or a file around one.
    File(Vec<u8>),
    /// A disk.
    Disk(Arc<Disk>),
}

/// Reads an image file or a built-in guest, or opens a disk, for [`parse`]. Only magic numbers are looked at, and what a disk's format
/// has to say.
///
/// # Errors
/// The file cannot be read.
pub fn read(image: &str) -> Result<Source, Failure> {
    if let Some(bytes) = built_in(image) {
        return Ok(Source::File(bytes.to_vec()));
    }
    let path = Path::new(image);
    // A file that cannot be opened is told by those who read it.
    let mut head = Vec::new();
    let opened = File::open(path).and_then(|file| file.take(HEAD_BYTES as u64).read_to_end(&mut head));
    if opened.is_ok() && boot_disk::is_disk(&head) {
        let options = DiskOptions { access: Access::ReadOnly, ..DiskOptions::new(path.to_owned()) };
        return Disk::open(&options).map(|disk| Source::Disk(Arc::new(disk))).map_err(|error| match error {
            OpenError::BackingNotGiven { .. } => Failure::Image(format!(
                "{image}: is stacked on another image; make one of the two with `qemu-img convert -O qcow2`"
            )),
            error => Failure::Image(chain(&error)),
        });
    }
    Image::read_file(path).map(Source::File).map_err(|error| failure(image, &error))
}

/// The same, and opens the disks of its machine ([`attached`]). One that is the image too is opened once: who changes a disk in place is its
/// only user.
///
/// # Errors
/// A file cannot be read.
pub fn read_attached(image: &str, named: &[DiskOptions]) -> Result<(Source, Vec<Arc<Disk>>), Failure> {
    let file = match read(image)? {
        Source::File(bytes) => Some(bytes),
        Source::Disk(_) => None,
    };
    let options = attached(image, file.is_none(), named);
    let disks = options.iter().map(|disk| open_disk(disk).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    let own = own_disk(image, &options).and_then(|at| disks.get(at));
    match (file, own) {
        (Some(bytes), _) => Ok((Source::File(bytes), disks)),
        (None, Some(disk)) => Ok((Source::Disk(Arc::clone(disk)), disks)),
        (None, None) => Err(Failure::Image(format!("{image}: was replaced while it was opened; try again"))),
    }
}

/// Recognises an image, and reads its symbols.
///
/// # Errors
/// What is wrong with it.
pub fn parse(image: &str, source: Source) -> Result<Opened, Failure> {
    let bootable = match source {
        Source::File(bytes) => Bootable::parse(bytes),
        Source::Disk(disk) => boot_disk::open(disk),
    };
    let Bootable { kernel, extras } = bootable.map_err(|error| failure(image, &error))?;
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

/// The disks of a machine, in the order in which the guest finds them: a disk that is its image comes first, below an overlay, unless
/// `named` has it, and says what becomes of it.
pub fn attached(image: &str, is_disk: bool, named: &[DiskOptions]) -> Vec<DiskOptions> {
    let mut disks = named.to_vec();
    if is_disk && own_disk(image, named).is_none() {
        disks.insert(0, DiskOptions::new(PathBuf::from(image)));
    }
    disks
}

/// Which of the disks an image is.
fn own_disk(image: &str, disks: &[DiskOptions]) -> Option<usize> {
    let path = Path::new(image);
    disks.iter().position(|disk| disk.path == path || is_same_file(&disk.path, path))
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    let file = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino()));
    matches!((file(one), file(other)), (Ok(one), Ok(other)) if one == other)
}

/// Opens a disk.
///
/// # Errors
/// What is wrong with its image.
pub fn open_disk(options: &DiskOptions) -> Result<Disk, Failure> {
    Disk::open(options).map_err(|error| Failure::Image(chain(&error)))
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
