//! What is on a virtual disk: a raw or qcow2 image, read, changed in place, or kept unchanged below an overlay.
//!
//! Images come from anywhere. So nothing is opened that the user has not named: a qcow2 image that names a backing file is refused
//! until the user names that file too ([`DiskOptions::backing`]), and one with an external data file always. The format of an image
//! may therefore be told from its content: a guest that writes a qcow2 header to its raw disk gains nothing but another disk.
//!
//! The overlay is a qcow2 file without a name in `TMPDIR` (or /var/tmp), which goes with the [`Disk`].

#![forbid(unsafe_code)]

mod options;
mod qcow2;

use std::fmt;
use std::fs;
use std::io;
use std::mem;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder};
use rustix::fs::{FlockOperation, OFlags, flock};

pub use options::{Access, DiskOptions, Format, ParseError, split};
pub use qcow2::Qcow2Error;

/// Bytes of a sector, in which disks are measured.
pub const SECTOR_BYTES: u64 = 512;

/// What is written where zeros are asked for and the format has no shorter way.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes of an overlay's cluster, as QEMU's have.
const OVERLAY_CLUSTER: usize = 64 << 10;

/// An image that others may be stacked on.
type Layer = Arc<FormatAccess<File>>;

/// Why a disk could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The host says no.
    #[error("Cannot open disk image {}", path.display())]
    File {
        /// The image.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A directory, a terminal.
    #[error("{} cannot be a disk; give a regular file or a block device", .0.display())]
    Kind(PathBuf),
    /// Somebody else changes it, or it is to be changed while somebody else uses it.
    #[error("Disk image {} is in use by another process; end that, or give each its own copy or an overlay", .0.display())]
    InUse(PathBuf),
    /// What its header says of itself cannot be right, or is not supported.
    #[error("{} cannot be used", path.display())]
    Qcow2 {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: Qcow2Error,
    },
    /// What only its tables show.
    #[error("{} cannot be used; `qemu-img check` tells more", path.display())]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// It names a file that the user has not named.
    #[error("{} is stacked on `{names}`; if that is the file it may read, add backing=FILE with its path", path.display())]
    BackingNotGiven {
        /// The image.
        path: PathBuf,
        /// What its header says, made printable.
        names: String,
    },
    /// It names none.
    #[error("{} is stacked on no other image; leave backing={} out", path.display(), backing.display())]
    BackingNotUsed {
        /// The image.
        path: PathBuf,
        /// What the user named.
        backing: PathBuf,
    },
    /// Its data are in a file of their own.
    #[error("{} keeps its data in another file, which is not supported; convert it with `qemu-img convert -O qcow2`", .0.display())]
    DataFile(PathBuf),
    /// No file for the overlay.
    #[error("No overlay for {} can be made in {}; set TMPDIR to a directory with room", path.display(), directory.display())]
    Overlay {
        /// The image.
        path: PathBuf,
        /// Where the overlay was to be.
        directory: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

/// An open disk.
///
/// The tables of a damaged qcow2 image can say what makes `imago` panic. That is caught, and the disk gives nothing but errors from
/// then on: what it knows of the image may no longer be true.
pub struct Disk {
    image: Layer,
    /// Bytes of the unit in which the image marks zeros.
    cluster: u64,
    damaged: AtomicBool,
    path: PathBuf,
    images: Vec<(Format, PathBuf)>,
    access: Access,
    /// The overlay's.
    directory: Option<PathBuf>,
}

/// An opened image.
struct Opened {
    image: FormatAccess<File>,
    /// Bytes of the unit in which it marks zeros.
    cluster: u64,
    /// It and those that it is stacked on.
    images: Vec<(Format, PathBuf)>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.path)
            .field("access", &self.access)
            .field("bytes", &self.bytes())
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens the image, and those that it is stacked on. The files are locked (flock(2)) until the disk is dropped: one that is changed
    /// in place against all others, the rest against those that would change them.
    ///
    /// # Errors
    /// [`OpenError`]; nothing has been changed.
    pub fn open(options: &DiskOptions) -> Result<Self, OpenError> {
        let write = options.access == Access::Write;
        let path = options.path.clone();
        let Opened { image, cluster, images } =
            catch(|| open_image(&path, options.format, write, &options.backing))
                .unwrap_or_else(|| Err(OpenError::Image { path: path.clone(), source: damaged() }))?;
        let rest = image.size() % SECTOR_BYTES;
        if rest != 0 {
            tracing::warn!(image = %path.display(), "The last {rest} bytes are no whole sector and out of the guest's reach");
        }
        let (image, cluster, directory) = match options.access {
            Access::ReadOnly | Access::Write => (image, cluster, None),
            Access::Overlay => {
                let directory = overlay_directory();
                let image = overlay(image, &directory).map_err(|source| OpenError::Overlay {
                    path: path.clone(),
                    directory: directory.clone(),
                    source,
                })?;
                (image, OVERLAY_CLUSTER as u64, Some(directory))
            }
        };
        let image = Arc::new(image);
        let damaged = AtomicBool::new(false);
        Ok(Self { image, cluster, damaged, path, images, access: options.access, directory })
    }

    /// Its size, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.image.size()
    }

    /// Whether it can only be read.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.access == Access::ReadOnly
    }

    /// The image that the user named.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image and those that it is stacked on, each on the next, with their formats.
    #[must_use]
    pub fn images(&self) -> &[(Format, PathBuf)] {
        &self.images
    }

    /// Reads from byte `offset` on. Beyond the end there are zeros.
    ///
    /// # Errors
    /// What the host said.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.attempt(|| self.image.read(buffer, offset))
    }

    /// Writes from byte `offset` on; all of it, or there is an error.
    ///
    /// # Errors
    /// What the host said. What was there before may be half written over.
    pub fn write(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.attempt(|| self.image.write(data, offset))
    }

    /// What has been written is on the host's disk when this returns, and stays there over a loss of power. Of an overlay nothing
    /// outlives the process anyway, so there is nothing to do.
    ///
    /// # Errors
    /// What the host said. Nothing written since the last flush is certain to be there.
    pub fn flush(&self) -> io::Result<()> {
        match self.access {
            Access::Write => self.attempt(|| self.image.flush().and_then(|()| self.image.sync())),
            Access::ReadOnly | Access::Overlay => Ok(()),
        }
    }

    /// Has `bytes` from byte `offset` on read as zeros.
    ///
    /// # Errors
    /// What the host said.
    pub fn write_zeros(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let marks = |image: &FormatAccess<File>| {
            if self.is_one_cluster() {
                return Err(io::ErrorKind::Unsupported.into());
            }
            image.write_zeroes(offset, bytes)
        };
        match self.attempt(|| marks(&self.image)) {
            // Version 2 of qcow2 has no mark for a cluster of zeros.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                let end = offset.saturating_add(bytes);
                (offset..end).step_by(ZEROS.len()).try_for_each(|at| {
                    let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROS.len());
                    self.write(&ZEROS[..length], at)
                })
            }
            result => result,
        }
    }

    /// Gives the room of `bytes` from byte `offset` on back to the host, as far as it takes it; what has no room reads as zeros.
    ///
    /// # Errors
    /// What the host said.
    pub fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.is_one_cluster() {
            return Ok(());
        }
        // There is another reference after a panic only.
        let image = Arc::get_mut(&mut self.image).ok_or_else(damaged)?;
        let result = catch(|| image.discard_to_zero(offset, bytes));
        match self.settle(result) {
            // A hint that nobody takes.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// Whether the disk is smaller than a cluster: imago 0.2.6 takes a cluster off the end of such a disk when part of it is to be zero
    /// (format/access.rs, `soft_ensure_zero`), and gets below its start.
    fn is_one_cluster(&self) -> bool {
        self.bytes() < self.cluster
    }

    /// Carries an operation on the image out, unless one has panicked before.
    fn attempt(&self, operation: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.damaged.load(Ordering::Acquire) {
            return Err(damaged());
        }
        self.settle(catch(operation))
    }

    /// What became of an operation; `None` is a panic.
    fn settle(&self, result: Option<io::Result<()>>) -> io::Result<()> {
        match result {
            Some(result) => result.map_err(|error| self.explain(error)),
            None => {
                self.damaged.store(true, Ordering::Release);
                // Its destructor would write what may not be true to the image.
                mem::forget(Arc::clone(&self.image));
                Err(damaged())
            }
        }
    }

    /// An error with what the user can do.
    fn explain(&self, error: io::Error) -> io::Error {
        match (error.kind(), &self.directory) {
            (io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded, Some(directory)) => io::Error::new(
                error.kind(),
                format!(
                    "The overlay of {} has no room left in {}; free some, or set TMPDIR to a directory with more",
                    self.path.display(),
                    directory.display()
                ),
            ),
            _ => error,
        }
    }
}

/// Carries out what may panic.
fn catch<T>(operation: impl FnOnce() -> T) -> Option<T> {
    // What a panic leaves behind is not used again.
    catch_unwind(AssertUnwindSafe(operation)).ok()
}

fn damaged() -> io::Error {
    io::Error::other("The image is damaged; `qemu-img check` tells more")
}

/// Opens an image and, by their turn, those in `backing`.
fn open_image(
    path: &Path,
    format: Option<Format>,
    write: bool,
    backing: &[PathBuf],
) -> Result<Opened, OpenError> {
    let file = open_file(path, write)?;
    let qcow2_error = |source| OpenError::Qcow2 { path: path.to_owned(), source };
    let image_error = |source| OpenError::Image { path: path.to_owned(), source };
    let format = match format {
        Some(format) => format,
        None => qcow2::probe(&file).map_err(qcow2_error)?,
    };
    let mut images = vec![(format, path.to_owned())];
    let not_used =
        |backing: &PathBuf| OpenError::BackingNotUsed { path: path.to_owned(), backing: backing.clone() };
    if format == Format::Raw {
        if let Some(backing) = backing.first() {
            return Err(not_used(backing));
        }
        let image = File::try_from(file).and_then(|file| Raw::open_image(file, write));
        let image = FormatAccess::new(image.map_err(image_error)?);
        return Ok(Opened { image, cluster: 1, images });
    }

    let cluster = qcow2::check(&file).map_err(qcow2_error)?;
    let file = File::try_from(file).map_err(image_error)?;
    // This opens no other file.
    let mut image = Qcow2::<File, Layer>::open_image(file, write).map_err(image_error)?;
    if image.requires_external_data_file() {
        return Err(OpenError::DataFile(path.to_owned()));
    }
    image.set_data_file(None);
    let mut layers = Vec::new();
    let below = match (image.implicit_backing_file(), backing.split_first()) {
        (None, None) => None,
        (None, Some((given, _))) => return Err(not_used(given)),
        (Some(names), None) => {
            let names = names.escape_debug().to_string();
            return Err(OpenError::BackingNotGiven { path: path.to_owned(), names });
        }
        (Some(_), Some((given, rest))) => {
            let format = image.implicit_backing_format().and_then(|format| format.parse().ok());
            let below = open_image(given, format, false, rest)?;
            layers = below.images;
            Some(Arc::new(below.image))
        }
    };
    image.set_backing(below);
    images.extend(layers);
    Ok(Opened { image: FormatAccess::new(image), cluster, images })
}

/// Opens a regular file or a block device, and locks it.
fn open_file(path: &Path, write: bool) -> Result<fs::File, OpenError> {
    let error = |source| OpenError::File { path: path.to_owned(), source };
    // Of a FIFO one would wait for the writer.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file =
        fs::OpenOptions::new().read(true).write(write).custom_flags(flags).open(path).map_err(error)?;
    let kind = file.metadata().map_err(error)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Kind(path.to_owned()));
    }
    let lock =
        if write { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
    match flock(&file, lock) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse(path.to_owned())),
        Err(errno) => Err(error(errno.into())),
    }
}

/// Where overlays go: an overlay may become as large as its disk, which /tmp, often in memory, would not hold.
fn overlay_directory() -> PathBuf {
    let var_tmp = || Some(PathBuf::from("/var/tmp")).filter(|path| path.is_dir());
    std::env::var_os("TMPDIR").map(PathBuf::from).or_else(var_tmp).unwrap_or_else(std::env::temp_dir)
}

/// An image that takes all writes to `image`, in a file that has no name.
fn overlay(image: FormatAccess<File>, directory: &Path) -> io::Result<FormatAccess<File>> {
    let file = File::try_from(tempfile::tempfile_in(directory)?)?;
    let size = image.size();
    let below: Layer = Arc::new(image);
    let overlay = Qcow2::<File, Layer>::create_builder(file)
        .size(size)
        .cluster_size(OVERLAY_CLUSTER)
        .create_open(DenyImplicitOpenGate::default(), |file| {
            Ok(Qcow2::<File, Layer>::builder(file).backing(Some(below)))
        })?;
    Ok(FormatAccess::new(overlay))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_costs_the_disk_and_nothing_else() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let mut disk = Disk::open(&DiskOptions::new(file.path().to_owned())).unwrap();
        disk.write(&[1], 0).unwrap();
        let error = disk.attempt(|| panic!("as imago might")).unwrap_err();
        assert!(error.to_string().contains("damaged"), "{error}");
        disk.read(&mut [0], 0).unwrap_err();
        disk.write(&[1], 0).unwrap_err();
        disk.discard(0, 1 << 20).unwrap_err();
    }
}
