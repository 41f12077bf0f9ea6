//! The machine's file system: a newc cpio archive (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Not compressed: unpacking would cost more time in the emulated machine than reading.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Cursor, Read, Seek, Write};
use std::path::{Path, PathBuf};

use cpio::newc::{self, ModeFileType};

/// An archive in the making.
#[derive(Debug)]
pub(crate) struct Archive<W> {
    writer: W,
    directories: BTreeSet<PathBuf>,
    inodes: u32,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(writer: W) -> Self {
        Self { writer, directories: BTreeSet::new(), inodes: 0 }
    }

    /// Adds an empty directory, and the ones above it, unless they are there.
    pub(crate) fn directory(&mut self, path: &Path) -> io::Result<()> {
        let mut missing: Vec<&Path> = path
            .ancestors()
            .filter(|dir| dir.file_name().is_some() && !self.directories.contains(*dir))
            .collect();
        while let Some(dir) = missing.pop() {
            self.entry(dir, ModeFileType::Directory, 0o755, 0, io::empty())?;
            self.directories.insert(dir.to_owned());
        }
        Ok(())
    }

    /// Adds an executable file at an absolute path, with the bytes that `contents` holds from its start on.
    pub(crate) fn file(&mut self, path: &Path, contents: &mut (impl Read + Seek)) -> io::Result<()> {
        if let Some(parent) = path.parent() {
            self.directory(parent)?;
        }
        let len = contents.seek(io::SeekFrom::End(0))?;
        contents.rewind()?;
        self.entry(path, ModeFileType::Regular, 0o755, len, contents)
    }

    /// Adds a copy of the host's file `from`.
    pub(crate) fn copy(&mut self, path: &Path, from: &Path) -> io::Result<()> {
        let mut file = File::open(from)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        if metadata.is_file() {
            return self.file(path, &mut file);
        }
        // A pipe or a device has no size before it is read.
        let mut contents = Vec::new();
        file.take(u64::from(u32::MAX)).read_to_end(&mut contents)?;
        self.file(path, &mut Cursor::new(contents))
    }

    fn entry(
        &mut self,
        path: &Path,
        kind: ModeFileType,
        permissions: u32,
        len: u64,
        contents: impl Read,
    ) -> io::Result<()> {
        let name = path.to_str().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidFilename))?;
        let too_large = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(len).map_err(too_large)?;
        self.inodes += 1;
        let mut entry = newc::Builder::new(name.trim_start_matches('/'))
            .ino(self.inodes)
            .mode(permissions)
            .set_mode_file_type(kind)
            .write(&mut self.writer, size);
        // A file that grows meanwhile is cut; one that shrinks would shift everything behind it.
        if io::copy(&mut contents.take(len), &mut entry)? != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        entry.finish()?;
        Ok(())
    }

    /// Ends the archive.
    pub(crate) fn finish(self) -> io::Result<W> {
        newc::trailer(self.writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and contents of each entry, read back with the same crate's reader.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let mut reader = newc::Reader::new(archive).unwrap();
            if reader.entry().is_trailer() {
                return entries;
            }
            let (name, mode) = (reader.entry().name().to_owned(), reader.entry().mode());
            let mut contents = Vec::new();
            reader.read_to_end(&mut contents).unwrap();
            entries.push((name, mode, contents));
            archive = reader.finish().unwrap();
        }
    }

    #[test]
    fn parents_come_before_files_and_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file(Path::new("/a/b/one"), &mut Cursor::new(b"1")).unwrap();
        archive.file(Path::new("/a/b/two"), &mut Cursor::new(b"22")).unwrap();
        archive.directory(Path::new("/a/c")).unwrap();
        let bytes = archive.finish().unwrap();
        let entries = entries(&bytes);
        let names: Vec<&str> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two", "a/c"]);
        assert_eq!(entries[0].1, 0o040_755);
        assert_eq!((entries[3].1, entries[3].2.as_slice()), (0o100_755, &b"22"[..]));
    }

    #[test]
    fn files_of_the_host_are_copied_and_directories_refused() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        std::fs::write(&from, b"abc").unwrap();
        let mut archive = Archive::new(Vec::new());
        archive.copy(Path::new("/x"), &from).unwrap();
        assert!(archive.copy(Path::new("/y"), dir.path()).is_err());
        assert!(archive.copy(Path::new("/z"), &dir.path().join("missing")).is_err());
        let bytes = archive.finish().unwrap();
        assert_eq!(entries(&bytes), [("x".to_owned(), 0o100_755, b"abc".to_vec())]);
    }
}
