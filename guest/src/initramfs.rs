//! Writing an initramfs: a cpio archive in the "newc" format, which the kernel unpacks into its root file system
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The same input gives the same bytes: owner and group are 0, every time stamp is 0, inodes are numbered in order.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cpio::newc::{self, Builder, ModeFileType};

use crate::programs;

/// The kernel takes no longer name, with its final zero byte (PATH_MAX).
const PATH_MAX: usize = 4096;
/// The name that ends an archive.
const TRAILER: &str = "TRAILER!!!";
/// Of directories that are created because something lies in them.
const PARENT_MODE: u32 = 0o755;
/// The permission bits, with set-user-ID, set-group-ID and sticky.
const PERMISSIONS: u32 = 0o7777;

/// Why an archive could not be written. What has been written so far is then of no use.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The path cannot be in an archive.
    #[error("Cannot put {path:?} in an initramfs: {reason}")]
    Path {
        /// As given.
        path: String,
        /// What to change.
        reason: &'static str,
    },
    /// A newc header holds the size in 32 bits.
    #[error("{path:?} has {size:#x} bytes; an initramfs holds files below 0x100000000 bytes (4 GiB)")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size in bytes.
        size: u64,
    },
    /// The content ended early: the file shrank while it was read.
    #[error(
        "{path:?} was said to have {expected:#x} bytes but gave {read:#x}; it must not change while it is packed"
    )]
    Short {
        /// The file.
        path: String,
        /// The size given, in bytes.
        expected: u64,
        /// The bytes that came.
        read: u64,
    },
    /// Reading the content or writing the archive failed.
    #[error("Cannot pack {path:?}")]
    Io {
        /// The file.
        path: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// What stands at a path of the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    Other,
}

/// An archive being written.
///
/// Paths are absolute or relative to the root, which is the same. Missing parent directories are added.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
    /// What has been written, without leading slash.
    entries: BTreeMap<String, Kind>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive. Many small writes follow: give it something buffered.
    pub fn new(out: W) -> Self {
        Archive { out, entries: BTreeMap::new() }
    }

    /// Adds a directory. One that was added as a parent keeps its mode, 0755.
    ///
    /// # Errors
    /// [`PackError::Path`], [`PackError::Io`].
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), PackError> {
        let name = self.name(path)?;
        if self.entries.get(name) == Some(&Kind::Directory) {
            return Ok(());
        }
        self.entry(path, name, Kind::Directory, |builder| {
            builder.mode(mode & PERMISSIONS).set_mode_file_type(ModeFileType::Directory)
        })
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// [`PackError::Path`], [`PackError::TooLarge`], [`PackError::Io`].
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<(), PackError> {
        self.file_from(path, mode, content.len() as u64, content)
    }

    /// Adds a regular file of `size` bytes, read from `content`. Anything behind them is left unread.
    ///
    /// # Errors
    /// [`PackError::Path`], [`PackError::TooLarge`], [`PackError::Short`], [`PackError::Io`].
    pub fn file_from(
        &mut self,
        path: &str,
        mode: u32,
        size: u64,
        content: impl Read,
    ) -> Result<(), PackError> {
        let name = self.name(path)?;
        let Ok(newc_size) = u32::try_from(size) else {
            return Err(PackError::TooLarge { path: path.to_owned(), size });
        };
        let builder = self.prepare(path, name, Kind::Other)?;
        let builder = builder.mode(mode & PERMISSIONS).set_mode_file_type(ModeFileType::Regular);
        let io_error = |source| PackError::Io { path: path.to_owned(), source };
        let mut writer = builder.write(&mut self.out, newc_size);
        let read = io::copy(&mut content.take(size), &mut writer).map_err(io_error)?;
        if read != size {
            return Err(PackError::Short { path: path.to_owned(), expected: size, read });
        }
        writer.finish().map_err(io_error)?;
        Ok(())
    }

    /// Adds a character device node.
    ///
    /// # Errors
    /// [`PackError::Path`], [`PackError::Io`].
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<(), PackError> {
        let name = self.name(path)?;
        self.entry(path, name, Kind::Other, |builder| {
            let builder = builder.mode(mode & PERMISSIONS).set_mode_file_type(ModeFileType::Char);
            builder.rdev_major(major).rdev_minor(minor)
        })
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// [`PackError::Path`], [`PackError::Io`].
    pub fn symlink(&mut self, path: &str, target: &[u8]) -> Result<(), PackError> {
        let name = self.name(path)?;
        let Some(size) = u32::try_from(target.len()).ok().filter(|_| target.len() < PATH_MAX) else {
            let reason = "what the link points to is longer than 4095 bytes";
            return Err(PackError::Path { path: path.to_owned(), reason });
        };
        let builder = self.prepare(path, name, Kind::Other)?;
        let builder = builder.mode(0o777).set_mode_file_type(ModeFileType::Symlink);
        let mut writer = builder.write(&mut self.out, size);
        let written = writer.write_all(target).and_then(|()| writer.finish().map(|_| ()));
        written.map_err(|source| PackError::Io { path: path.to_owned(), source })
    }

    /// Adds a file of the host by its own name, or all that is in a directory, as the root directory's. Permissions are kept, links
    /// too; a link to a file outside is as dead in the guest as there.
    ///
    /// # Errors
    /// [`PackError`]; a device, pipe or socket is refused, and a name that is not UTF-8.
    pub fn tree(&mut self, from: &Path) -> Result<(), PackError> {
        let io_error = |source| PackError::Io { path: from.display().to_string(), source };
        if fs::metadata(from).map_err(io_error)?.is_dir() {
            return self.directory_from(from, "");
        }
        // What was named is meant, whatever it is called by.
        let real = fs::canonicalize(from).map_err(io_error)?;
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        self.entry_from(&real, &name)
    }

    /// What is in a directory of the host, in the order of names.
    fn directory_from(&mut self, from: &Path, place: &str) -> Result<(), PackError> {
        let io_error = |source| PackError::Io { path: from.display().to_string(), source };
        let entries: io::Result<Vec<_>> = fs::read_dir(from).and_then(Iterator::collect);
        let mut entries = entries.map_err(io_error)?;
        entries.sort_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let path = entry.path();
            let name = entry.file_name().into_string().map_err(|_| PackError::Path {
                path: path.display().to_string(),
                reason: "give it a name in UTF-8",
            })?;
            self.entry_from(&path, &format!("{place}/{name}"))?;
        }
        Ok(())
    }

    fn entry_from(&mut self, from: &Path, place: &str) -> Result<(), PackError> {
        let io_error = |source| PackError::Io { path: from.display().to_string(), source };
        let metadata = fs::symlink_metadata(from).map_err(io_error)?;
        let kind = metadata.file_type();
        if kind.is_symlink() {
            let target = fs::read_link(from).map_err(io_error)?;
            self.symlink(place, target.as_os_str().as_bytes())
        } else if kind.is_dir() {
            self.directory(place, metadata.mode())?;
            self.directory_from(from, place)
        } else if kind.is_file() {
            let file = File::open(from).map_err(io_error)?;
            self.file_from(place, metadata.mode(), metadata.len(), file)
        } else {
            let reason = "it is a device, pipe or socket; only files, directories and links are taken along";
            Err(PackError::Path { path: from.display().to_string(), reason })
        }
    }

    /// Ends the archive and gives the writer back.
    ///
    /// # Errors
    /// [`PackError::Io`].
    pub fn finish(mut self) -> Result<W, PackError> {
        let io_error = |source| PackError::Io { path: TRAILER.to_owned(), source };
        newc::trailer(&mut self.out).map_err(io_error)?;
        self.out.flush().map_err(io_error)?;
        Ok(self.out)
    }

    /// The name in the archive for a path.
    fn name<'p>(&self, path: &'p str) -> Result<&'p str, PackError> {
        let error = |reason| PackError::Path { path: path.to_owned(), reason };
        let name = path.strip_prefix('/').unwrap_or(path);
        if name.split('/').any(|part| matches!(part, "" | "." | "..")) {
            return Err(error("give a path without empty, \".\" and \"..\" parts"));
        }
        if name.contains('\0') {
            return Err(error("a path cannot hold a zero byte"));
        }
        if name.len() >= PATH_MAX {
            return Err(error("the path is longer than 4095 bytes"));
        }
        if name == TRAILER {
            return Err(error("this name ends the archive"));
        }
        Ok(name)
    }

    /// Writes an entry without content.
    fn entry(
        &mut self,
        path: &str,
        name: &str,
        kind: Kind,
        fill: impl FnOnce(Builder) -> Builder,
    ) -> Result<(), PackError> {
        let builder = fill(self.prepare(path, name, kind)?);
        let finished = builder.write(&mut self.out, 0).finish();
        finished.map_err(|source| PackError::Io { path: path.to_owned(), source })?;
        Ok(())
    }

    /// Writes missing parents, notes the entry, and starts its header.
    fn prepare(&mut self, path: &str, name: &str, kind: Kind) -> Result<Builder, PackError> {
        let error = |reason| PackError::Path { path: path.to_owned(), reason };
        if let Some((parent, _)) = name.rsplit_once('/') {
            match self.entries.get(parent) {
                Some(Kind::Directory) => {}
                Some(Kind::Other) => {
                    return Err(error("the path leads through something that is no directory"));
                }
                None => self.directory(parent, PARENT_MODE)?,
            }
        }
        if self.entries.insert(name.to_owned(), kind).is_some() {
            return Err(error("there is an entry of this name already"));
        }
        let inode =
            u32::try_from(self.entries.len()).map_err(|_| error("the archive has too many entries"))?;
        Ok(Builder::new(name).ino(inode))
    }
}

/// The initramfs of the workload program ([`programs::WORKLOAD`]): the program as /init, the file that it reads, the
/// console, /proc, /tracing and /devices to mount on, and in /modules those modules of the kernel that are given, by their file names, and the
/// devices of msr.ko and evdev.ko.
///
/// # Errors
/// None in practice: the entries are fixed, and memory takes every write.
pub fn workload(modules: &[(String, Vec<u8>)]) -> Result<Vec<u8>, PackError> {
    let mut archive = Archive::new(Vec::new());
    archive.directory("proc", 0o555)?;
    archive.directory("tracing", 0o555)?;
    archive.directory("devices", 0o555)?;
    for (name, module) in modules {
        archive.file(&format!("modules/{name}"), 0o400, module)?;
    }
    if !modules.is_empty() {
        // The first CPU's registers, and the first input device (Documentation/admin-guide/devices.txt).
        archive.char_device("modules/msr", 0o600, 202, 0)?;
        archive.char_device("modules/event0", 0o600, 13, 64)?;
    }
    // The kernel opens it as init's standard input, output and error (Documentation/admin-guide/devices.txt).
    archive.char_device("dev/console", 0o600, 5, 1)?;
    archive.file("init", 0o755, programs::WORKLOAD)?;
    archive.file("known.txt", 0o444, programs::WORKLOAD_FILE)?;
    archive.finish()
}

/// The words on a kernel's command line with which it runs the command that is in its initramfs.
pub const COMMAND_CMDLINE: &str = "rdinit=/vmprobe/init";

/// Adds a command, in the language of `shell`, and what runs it ([`programs::INIT`]); all of it is in /vmprobe, but for the console.
///
/// # Errors
/// [`PackError`]: something is in its places already.
pub fn add_command(archive: &mut Archive<impl Write>, shell: &[u8], command: &str) -> Result<(), PackError> {
    archive.file("vmprobe/init", 0o755, programs::INIT)?;
    archive.file("vmprobe/sh", 0o755, shell)?;
    archive.file("vmprobe/command", 0o755, command.as_bytes())
}

/// Goes on with an archive behind another one, as the kernel reads them: files of later ones replace those of earlier ones, and each
/// begins at a multiple of four bytes, after any zeros.
pub fn append(first: &mut Vec<u8>, second: &[u8]) {
    first.resize(first.len().next_multiple_of(4), 0);
    first.extend_from_slice(second);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const REGULAR: u32 = 0o100_000;
    const LINK: u32 = 0o120_000;
    const CHAR: u32 = 0o020_000;
    const DIRECTORY: u32 = 0o040_000;

    /// Name, mode, device and content.
    type Unpacked = (String, u32, (u32, u32), Vec<u8>);

    /// Every entry, read back with the reader of the cpio crate.
    fn unpack(mut archive: &[u8]) -> Vec<Unpacked> {
        let mut entries = Vec::new();
        loop {
            let mut reader = newc::Reader::new(archive).unwrap();
            let mut content = Vec::new();
            reader.read_to_end(&mut content).unwrap();
            let entry = reader.entry();
            if entry.is_trailer() {
                return entries;
            }
            let device = (entry.rdev_major(), entry.rdev_minor());
            entries.push((entry.name().to_owned(), entry.mode(), device, content));
            archive = reader.finish().unwrap();
        }
    }

    #[test]
    fn entries_come_out_as_they_went_in() {
        let mut archive = Archive::new(Vec::new());
        archive.directory("/proc", 0o555).unwrap();
        archive.file("init", 0o755, b"#!").unwrap();
        archive.char_device("/dev/console", 0o600, 5, 1).unwrap();
        archive.file("/dev/empty", 0o10_644, b"").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(
            unpack(&bytes),
            [
                ("proc".to_owned(), DIRECTORY | 0o555, (0, 0), vec![]),
                ("init".to_owned(), REGULAR | 0o755, (0, 0), b"#!".to_vec()),
                ("dev".to_owned(), DIRECTORY | 0o755, (0, 0), vec![]),
                ("dev/console".to_owned(), CHAR | 0o600, (5, 1), vec![]),
                ("dev/empty".to_owned(), REGULAR | 0o644, (0, 0), vec![]),
            ]
        );
    }

    /// The header, field by field, against the table in buffer-format.rst.
    #[test]
    fn header_is_as_documented() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a", 0o644, b"xyz").unwrap();
        let bytes = archive.finish().unwrap();
        let header = concat!(
            "070701",   // magic
            "00000001", // inode
            "000081a4", // mode
            "00000000", // user
            "00000000", // group
            "00000001", // links
            "00000000", // time
            "00000003", // size
            "00000000", "00000000", // device it was on
            "00000000", "00000000", // device it is
            "00000002", // length of the name
            "00000000", // checksum
        );
        assert_eq!(&bytes[..110], header.as_bytes());
        assert_eq!(&bytes[110..116], b"a\0xyz\0");
    }

    #[test]
    fn parents_are_added_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/c", 0o644, b"1").unwrap();
        archive.file("/a/b/d", 0o644, b"2").unwrap();
        archive.directory("a/b", 0o700).unwrap();
        let names: Vec<_> = unpack(&archive.finish().unwrap()).into_iter().map(|entry| entry.0).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/b/d"]);
    }

    #[test]
    fn a_tree_of_the_host_comes_along_in_order_with_modes_and_links() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let host = tempfile::tempdir().unwrap();
        let path = |name: &str| host.path().join(name);
        fs::create_dir(path("b")).unwrap();
        fs::write(path("b/run"), "#!").unwrap();
        fs::set_permissions(path("b/run"), fs::Permissions::from_mode(0o4750)).unwrap();
        symlink("../no/where", path("b/link")).unwrap();
        // A loop, were it followed.
        symlink(".", path("b/self")).unwrap();
        fs::write(path("a"), "1").unwrap();
        fs::set_permissions(path("a"), fs::Permissions::from_mode(0o600)).unwrap();

        let mut archive = Archive::new(Vec::new());
        archive.tree(host.path()).unwrap();
        let entries = unpack(&archive.finish().unwrap());
        let expected: [(&str, u32, &[u8]); 5] = [
            ("a", REGULAR | 0o600, b"1"),
            ("b", DIRECTORY | 0o755, b""),
            ("b/link", LINK | 0o777, b"../no/where"),
            ("b/run", REGULAR | 0o4750, b"#!"),
            ("b/self", LINK | 0o777, b"."),
        ];
        let entries: Vec<_> = entries.iter().map(|(name, mode, _, data)| (&**name, *mode, &**data)).collect();
        assert_eq!(entries, expected);

        let mut archive = Archive::new(Vec::new());
        archive.tree(&path("b/run")).unwrap();
        assert_eq!(unpack(&archive.finish().unwrap())[0].0, "run");
        for (missing, part) in [("none", "none"), ("b/link", "b/link")] {
            let error = Archive::new(Vec::new()).tree(&path(missing)).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
        let _listening = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        let error = Archive::new(Vec::new()).tree(host.path()).unwrap_err().to_string();
        assert!(error.contains("socket") && error.contains("device, pipe or socket"), "{error}");
    }

    #[test]
    fn an_archive_goes_on_behind_another_at_a_multiple_of_four() {
        let mut first = b"07070".to_vec();
        append(&mut first, b"second");
        assert_eq!(first, b"07070\0\0\0second");
        append(&mut first, b"");
        assert_eq!(first.len(), 16);
    }

    #[test]
    fn bad_paths_are_refused() {
        let long = "x".repeat(4096);
        for path in ["", "/", "//x", "a//b", "a/", "./a", "../a", "a/..", "a\0b", "TRAILER!!!", &long] {
            let mut archive = Archive::new(Vec::new());
            let error = archive.file(path, 0o644, b"").unwrap_err();
            assert!(matches!(error, PackError::Path { .. }), "{path:?}: {error}");
            assert_eq!(unpack(&archive.finish().unwrap()), []);
        }
    }

    #[test]
    fn a_file_is_no_directory_and_stands_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a", 0o644, b"").unwrap();
        let error = archive.file("a/b", 0o644, b"").unwrap_err().to_string();
        assert!(error.contains("no directory"), "{error}");
        let error = archive.char_device("/a", 0o644, 1, 1).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
        let error = archive.directory("a", 0o755).unwrap_err().to_string();
        assert!(error.contains("already"), "{error}");
        assert_eq!(unpack(&archive.finish().unwrap()).len(), 1);
    }

    #[test]
    fn a_file_of_4_gib_is_refused_before_it_is_read() {
        let mut archive = Archive::new(Vec::new());
        let error = archive.file_from("big", 0o644, 1 << 32, io::repeat(0)).unwrap_err();
        assert!(matches!(error, PackError::TooLarge { size: 0x1_0000_0000, .. }), "{error}");
        assert_eq!(unpack(&archive.finish().unwrap()), []);
    }

    #[test]
    fn a_file_that_shrank_is_an_error() {
        let mut archive = Archive::new(Vec::new());
        let error = archive.file_from("f", 0o644, 10, &b"12345"[..]).unwrap_err();
        assert!(matches!(error, PackError::Short { expected: 10, read: 5, .. }), "{error}");
    }

    #[test]
    fn a_file_that_grew_is_cut() {
        let mut archive = Archive::new(Vec::new());
        archive.file_from("f", 0o644, 3, &b"12345"[..]).unwrap();
        assert_eq!(unpack(&archive.finish().unwrap())[0].3, b"123");
    }

    /// Takes a number of bytes, then fails.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let taken = buf.len().min(self.0);
            self.0 -= taken;
            if taken == 0 && !buf.is_empty() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(taken) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_an_error_wherever_it_strikes() {
        let write = |room| {
            let mut archive = Archive::new(Full(room));
            archive.char_device("dev/console", 0o600, 5, 1)?;
            archive.file("init", 0o755, b"content")?;
            archive.finish()
        };
        let need = (0..10_000).find(|&room| write(room).is_ok()).unwrap();
        assert!(need > 4 * 110);
        for room in 0..need {
            let Err(error) = write(room) else { panic!("{room} bytes were enough") };
            assert!(matches!(error, PackError::Io { .. }), "{error}");
        }
    }

    #[test]
    fn workload_has_what_the_program_needs() {
        let modules = [("msr.ko".to_owned(), b"ELF".to_vec()), ("button.ko".to_owned(), b"FLE".to_vec())];
        let archive = workload(&modules).unwrap();
        assert_eq!(archive, workload(&modules).unwrap());
        let entries = unpack(&archive);
        let find = |name: &str| entries.iter().find(|entry| entry.0 == name).unwrap();
        assert_eq!(find("init").3, programs::WORKLOAD);
        assert_eq!(find("init").1, REGULAR | 0o755);
        assert_eq!(find("dev/console").2, (5, 1));
        assert_eq!(find("proc").1, DIRECTORY | 0o555);
        assert!(!find("known.txt").3.is_empty());
        assert_eq!(find("modules/msr.ko").3, b"ELF");
        assert_eq!(find("modules/button.ko").3, b"FLE");
        assert_eq!((find("modules/msr").2, find("modules/event0").2), ((202, 0), (13, 64)));
        let without = unpack(&workload(&[]).unwrap());
        assert!(without.iter().all(|entry| !entry.0.starts_with("modules")));
    }

    proptest! {
        #[test]
        fn any_content_comes_back(files in prop::collection::btree_map("[a-z]{1,9}", prop::collection::vec(any::<u8>(), 0..50), 0..9)) {
            let mut archive = Archive::new(Vec::new());
            for (name, content) in &files {
                archive.file(name, 0o600, content).unwrap();
            }
            let unpacked = unpack(&archive.finish().unwrap());
            prop_assert_eq!(unpacked.len(), files.len());
            for ((name, content), entry) in files.iter().zip(&unpacked) {
                prop_assert_eq!((name, content), (&entry.0, &entry.3));
            }
        }
    }
}
