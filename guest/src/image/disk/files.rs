//! The files of a partition: ext2 to ext4 and FAT are read, others are told by name.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::sync::Arc;

use ext4_view::{Ext4, Ext4Error, Ext4Read};

use super::ReadAt;

/// Names of a directory that are looked at, at most. One that loops has no end.
const MAX_NAMES: usize = 4096;

/// Where a file system has its magic number.
const MAGICS: [(&str, u64, &[u8]); 14] = [
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("LUKS", 0, b"LUKS\xba\xbe"),
    ("LVM", 0x218, b"LVM2 001"),
    ("ext4", 0x438, &[0x53, 0xef]),
    ("f2fs", 0x400, &[0x10, 0x20, 0xf5, 0xf2]),
    ("erofs", 0x400, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("squashfs", 0, b"hsqs"),
    ("iso9660", 0x8001, b"CD001"),
    ("ntfs", 3, b"NTFS    "),
    ("exfat", 3, b"EXFAT   "),
    ("swap", 0xff6, b"SWAPSPACE2"),
    ("vfat", 0x36, b"FAT"),
    ("vfat", 0x52, b"FAT"),
];

/// The file system that begins at `start` of a disk, by its magic number; `None` if it is none of those known.
pub fn name(disk: &dyn ReadAt, start: u64) -> io::Result<Option<&'static str>> {
    for (name, at, magic) in MAGICS {
        let mut found = [0; 16];
        let found = &mut found[..magic.len()];
        disk.read_at(found, start.saturating_add(at))?;
        if found == magic {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// A part of a disk. Writes fail.
pub struct Volume {
    pub disk: Arc<dyn ReadAt>,
    pub start: u64,
    pub bytes: u64,
    /// For those who read on from where they are.
    pub position: u64,
}

impl Ext4Read for Volume {
    fn read(&mut self, from: u64, to: &mut [u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let end = from.checked_add(to.len() as u64).filter(|end| *end <= self.bytes);
        end.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        self.disk.read_at(to, self.start + from).map_err(Into::into)
    }
}

impl Read for Volume {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.bytes.saturating_sub(self.position);
        let len = to.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.disk.read_at(&mut to[..len], self.start + self.position)?;
        self.position += len as u64;
        Ok(len)
    }
}

impl Seek for Volume {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let position = match to {
            SeekFrom::Start(position) => Some(position),
            SeekFrom::End(distance) => self.bytes.checked_add_signed(distance),
            SeekFrom::Current(distance) => self.position.checked_add_signed(distance),
        };
        self.position = position.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.position)
    }
}

/// The FAT reader asks for it.
impl Write for Volume {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file system that is read.
pub enum Files {
    Ext(Ext4),
    Fat(Box<fatfs::FileSystem<Volume>>),
}

impl fmt::Debug for Files {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Files::Ext(_) => "Ext",
            Files::Fat(_) => "Fat",
        })
    }
}

/// Why files cannot be read.
pub type FilesError = Box<dyn std::error::Error + Send + Sync>;

impl Files {
    /// Opens the file system of that name; `None` for one that is not read.
    pub fn open(name: &str, volume: Volume) -> Result<Option<Self>, FilesError> {
        Ok(match name {
            "ext4" => Some(Self::Ext(Ext4::load(Box::new(volume))?)),
            "vfat" => Some(Self::Fat(Box::new(fatfs::FileSystem::new(volume, fatfs::FsOptions::new())?))),
            _ => None,
        })
    }

    /// As Linux's and udev's `UUID=` have it.
    pub fn uuid(&self) -> String {
        match self {
            Files::Ext(files) => files.uuid().to_string(),
            Files::Fat(files) => {
                let id = files.volume_id();
                format!("{:04X}-{:04X}", id >> 16, id & 0xffff)
            }
        }
    }

    /// The names in a directory, in no order; none if there is no such directory.
    pub fn names(&self, directory: &str) -> Result<Vec<String>, FilesError> {
        match self {
            Files::Ext(files) => {
                let Some(entries) = found(files.read_dir(directory))? else { return Ok(Vec::new()) };
                let names = entries.take(MAX_NAMES).map(|entry| {
                    entry.map(|entry| entry.file_name().display().to_string()).map_err(Into::into)
                });
                names.collect()
            }
            Files::Fat(files) => {
                let root = files.root_dir();
                let directory = directory.trim_matches('/');
                let found = if directory.is_empty() { Ok(root) } else { root.open_dir(directory) };
                let Some(found) = found_in_fat(found)? else { return Ok(Vec::new()) };
                let names = found.iter().take(MAX_NAMES);
                names.map(|entry| entry.map(|entry| entry.file_name()).map_err(Into::into)).collect()
            }
        }
    }

    /// A file's contents, `limit` bytes at most; `None` if there is no such file.
    pub fn read(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>, FilesError> {
        let too_large = || format!("{path} has more than {limit:#x} bytes");
        match self {
            Files::Ext(files) => {
                let Some(mut file) = found(files.open(absolute(path).as_str()))? else { return Ok(None) };
                let len = usize::try_from(file.metadata().len()).ok().filter(|len| *len <= limit);
                let len = len.ok_or_else(too_large)?;
                let mut bytes = Vec::new();
                bytes.try_reserve_exact(len)?;
                bytes.resize(len, 0);
                let mut done = 0;
                while done < len {
                    match file.read_bytes(&mut bytes[done..])? {
                        0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                        read => done += read,
                    }
                }
                Ok(Some(bytes))
            }
            Files::Fat(files) => {
                let root = files.root_dir();
                let Some(file) = found_in_fat(root.open_file(path.trim_start_matches('/')))? else {
                    return Ok(None);
                };
                let mut bytes = Vec::new();
                file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
                if bytes.len() > limit { Err(too_large().into()) } else { Ok(Some(bytes)) }
            }
        }
    }

    /// Whether there is such a file or directory.
    pub fn exists(&self, path: &str) -> bool {
        match self {
            Files::Ext(files) => files.exists(absolute(path).as_str()).unwrap_or(false),
            Files::Fat(files) => {
                let (root, path) = (files.root_dir(), path.trim_matches('/'));
                root.open_file(path).is_ok() || root.open_dir(path).is_ok()
            }
        }
    }
}

fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches('/'))
}

fn found<T>(result: Result<T, Ext4Error>) -> Result<Option<T>, Ext4Error> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(Ext4Error::NotFound | Ext4Error::NotADirectory | Ext4Error::IsADirectory) => Ok(None),
        Err(error) => Err(error),
    }
}

fn found_in_fat<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
