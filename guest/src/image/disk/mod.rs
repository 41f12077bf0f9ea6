//! Disk images: which kernel a disk would boot, and with what. Nothing is mounted and nothing is written.
//!
//! A disk is looked through as a boot loader would: the entries of the Boot Loader Specification first, wherever a file system has
//! them; then kernels by the names that distributions give them.

mod entry;
mod files;
mod table;

use std::fmt;
use std::io;
use std::sync::Arc;

use uapi_version::strverscmp;

use self::entry::{Entry, Payload};
use self::files::{Files, FilesError, Volume};
use self::table::Table;
pub use self::table::{Partition, PartitionKind};
use super::extras::{Bootable, Container, Extras};
use super::{Image, ImageError, bzimage, uki};

/// Bytes of a kernel, an initial RAM disk or a unified kernel image at most.
const MAX_BOOT_FILE: usize = 1 << 30;
/// Bytes of an entry at most.
const MAX_ENTRY_FILE: usize = 64 << 10;
/// Bytes of all initial RAM disks of an entry at most.
const MAX_INITRDS: usize = MAX_BOOT_FILE;
/// Unified kernel images that are looked at, at most: each is read whole.
const MAX_UKIS: usize = 16;

/// How much of a file's beginning [`is_disk`] looks at.
pub const HEAD_BYTES: usize = 0x1_0048;

/// Something that is read from any place. Beyond its end there are zeros.
pub trait ReadAt: Send + Sync {
    /// Fills the buffer from byte `offset` on.
    ///
    /// # Errors
    /// What the host says.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Its size, bytes.
    fn bytes(&self) -> u64;
}

impl ReadAt for disk::Disk {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buffer, offset)
    }

    fn bytes(&self) -> u64 {
        disk::Disk::bytes(self)
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(self.len());
        let there = &self[start..];
        let len = there.len().min(buffer.len());
        buffer[..len].copy_from_slice(&there[..len]);
        buffer[len..].fill(0);
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.len() as u64
    }
}

/// Why a disk cannot be booted from.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host, or the image's own format.
    #[error("The disk cannot be read")]
    Read(#[from] io::Error),
    /// A hole in the protective MBR where a GPT should be.
    #[error("The disk's partition table (GPT) is damaged, its backup too; `sgdisk --verify` tells more")]
    DamagedGpt,
    /// Cut, or wrong.
    #[error(
        "Partition {number} reaches beyond the disk's {bytes:#x} bytes; the image is truncated or its partition table wrong"
    )]
    PartitionOutside {
        /// The partition.
        number: u32,
        /// The disk's size.
        bytes: u64,
    },
    /// A file system that does not open, or a file that cannot be read.
    #[error("{place}: cannot be read; run its fsck on a copy")]
    Files {
        /// The partition, and the file where it is one.
        place: String,
        /// What the reader says.
        #[source]
        source: FilesError,
    },
    /// An entry names what is not there.
    #[error(
        "The boot entry {entry} names {path}, which is not on its partition; repair the entry, or give the kernel as IMAGE"
    )]
    Missing {
        /// The entry.
        entry: String,
        /// The file.
        path: String,
    },
    /// An entry names another program for UEFI firmware.
    #[error(
        "{path} is no unified kernel image; choose an entry with a Linux kernel, or give the kernel as IMAGE"
    )]
    NotUki {
        /// The file.
        path: String,
    },
    /// Far more than any guest takes.
    #[error("The initial RAM disks of the boot entry {entry} have more than {MAX_INITRDS:#x} bytes together")]
    InitrdsTooLarge {
        /// The entry.
        entry: String,
    },
    /// Nothing to boot.
    #[error(
        "The disk has no boot entry (loader/entries/*.conf, EFI/Linux/*.efi) and no kernel (/boot/vmlinuz-*) that can be read; it \
         has {found}. ext2 to ext4 and FAT are read; take kernel and initrd out of anything else and give them as IMAGE and --initrd"
    )]
    NothingToBoot {
        /// What is there.
        found: String,
    },
}

/// A partition, or the whole of a disk that has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The partition; `None` for the whole disk.
    pub partition: Option<Partition>,
    /// What is on it, by the name that mount(8) has for it.
    pub file_system: Option<&'static str>,
    /// The file system's own, if it is read.
    pub uuid: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file_system = self.file_system.unwrap_or("nothing known");
        match &self.partition {
            Some(partition) => write!(f, "{file_system} on partition {}", partition.number),
            None => write!(f, "{file_system} on the whole disk"),
        }
    }
}

/// An entry of the disk's boot menu.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MenuEntry {
    /// Its name.
    pub id: String,
    /// For people.
    pub title: Option<String>,
    /// The version of what it boots.
    pub version: Option<String>,
}

/// What is known of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// "GPT", "MBR" or "none".
    pub table: &'static str,
    /// Its partitions.
    pub places: Vec<Place>,
    /// Its boot menu; the first is booted.
    pub menu: Vec<MenuEntry>,
    /// The kernel that is booted: its path, and the partition.
    pub kernel: String,
    /// The words `root=...` that were added to the command line, since the entry has none.
    pub root: Option<String>,
}

/// Whether a file that begins like this is a disk image rather than a kernel.
#[must_use]
pub fn is_disk(head: &[u8]) -> bool {
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    let is_kernel =
        head.starts_with(&object::elf::ELFMAG) || head.starts_with(b"MZ") || bzimage::is_bzimage(head);
    let is_table = at(510, &[0x55, 0xaa]) || at(512, b"EFI PART") || at(4096, b"EFI PART");
    let known = files::name(&head.to_vec(), 0);
    !is_kernel && (head.starts_with(b"QFI\xfb") || is_table || known.is_ok_and(|name| name.is_some()))
}

/// A place whose files can be read.
struct Mounted {
    place: usize,
    files: Files,
}

/// Looks for what a disk boots.
///
/// # Errors
/// It cannot be read, or has nothing to boot.
pub fn open(disk: Arc<dyn ReadAt>) -> Result<Bootable, ImageError> {
    let (table, mut places) = places(&*disk)?;
    let mut mounted = Vec::new();
    let mut unread = None;
    for (at, place) in places.iter_mut().enumerate() {
        let Some(name) = place.file_system else { continue };
        let (start, bytes) = place
            .partition
            .as_ref()
            .map_or((0, disk.bytes()), |partition| (partition.start, partition.bytes));
        let volume = Volume { disk: Arc::clone(&disk), start, bytes, position: 0 };
        match Files::open(name, volume) {
            Ok(Some(files)) => {
                place.uuid = Some(files.uuid());
                mounted.push(Mounted { place: at, files });
            }
            Ok(None) => {}
            Err(source) => unread = unread.or(Some(DiskError::Files { place: place.to_string(), source })),
        }
    }
    let found = find(&mounted, &places)?;
    let Some(found) = found else {
        // A file system that does not open may be the one.
        return Err(unread.unwrap_or_else(|| nothing(&places)).into());
    };
    let Found { menu, place, kernel, initrd, mut options, path } = found;
    let (kernel_file, own) = match kernel {
        Kernel::Linux(file) => (file, Extras::default()),
        Kernel::Uki(file) => {
            let uki = uki::read(&file)?.ok_or_else(|| DiskError::NotUki { path: path.clone() })?;
            (uki.linux.to_vec(), Extras::of(&uki))
        }
    };
    let kernel = Image::parse(kernel_file.clone())?;
    let mut extras = own.with(initrd, Some(&options));
    options = extras.cmdline.take().unwrap_or_default();
    let has_root = options.split_ascii_whitespace().any(|word| word.starts_with("root="));
    let root = if has_root { None } else { root(&mounted, &places, extras.initrd.is_some()) };
    let words: Vec<&str> =
        root.as_deref().into_iter().chain(Some(options.as_str()).filter(|words| !words.is_empty())).collect();
    let cmdline = Some(words.join(" ")).filter(|words| !words.is_empty());
    let kernel_path = format!("{path} ({})", places[place]);
    let facts = DiskFacts { table, places, menu, kernel: kernel_path, root };
    let extras =
        Extras { cmdline, kernel_file: Some(kernel_file), container: Some(Container::Disk(facts)), ..extras };
    Ok(Bootable { kernel, extras })
}

fn nothing(places: &[Place]) -> DiskError {
    let found: Vec<String> = places.iter().map(ToString::to_string).collect();
    let found = if found.is_empty() { "no partition".to_owned() } else { found.join(", ") };
    DiskError::NothingToBoot { found }
}

/// The partitions with what is on them; the whole disk if it has no table, or a file system that begins with the disk.
fn places(disk: &dyn ReadAt) -> Result<(&'static str, Vec<Place>), DiskError> {
    let whole = files::name(disk, 0)?;
    let table = match whole {
        // A boot sector ends as a master boot record does.
        Some(name) if name != "iso9660" => None,
        _ => table::read(disk)?,
    };
    let (name, partitions) = match table {
        Some(Table::Gpt(partitions)) => ("GPT", partitions),
        Some(Table::Mbr(partitions)) => ("MBR", partitions),
        None => return Ok(("none", vec![Place { partition: None, file_system: whole, uuid: None }])),
    };
    let mut places = Vec::new();
    for partition in partitions {
        let file_system = files::name(disk, partition.start)?;
        places.push(Place { partition: Some(partition), file_system, uuid: None });
    }
    Ok((name, places))
}

enum Kernel {
    Uki(Vec<u8>),
    Linux(Vec<u8>),
}

/// What is booted.
struct Found {
    menu: Vec<MenuEntry>,
    place: usize,
    /// Of the kernel.
    path: String,
    kernel: Kernel,
    initrd: Option<Vec<u8>>,
    options: String,
}

fn find(mounted: &[Mounted], places: &[Place]) -> Result<Option<Found>, DiskError> {
    // Entries name files from the root of their file system; where /boot is a part of the root file system, from there.
    let mut entries: Vec<(usize, &str, Entry)> = Vec::new();
    for (at, one) in mounted.iter().enumerate() {
        for base in ["", "/boot", "/efi", "/boot/efi"] {
            let at_place = |source| DiskError::Files { place: places[one.place].to_string(), source };
            entries.extend(one.entries(base).map_err(at_place)?.into_iter().map(|entry| (at, base, entry)));
        }
    }
    entries.sort_by(|(_, _, one), (_, _, other)| one.order(other));
    let menu = entries.iter().map(|(_, _, entry)| MenuEntry {
        id: entry.id.clone(),
        title: entry.title.clone(),
        version: entry.version.clone(),
    });
    let menu: Vec<MenuEntry> = menu.collect();
    if let Some((at, base, entry)) = entries.first() {
        return boot(&mounted[*at], places, base, entry, menu).map(Some);
    }
    let mut kernels: Vec<(usize, &str, String)> = Vec::new();
    for (at, one) in mounted.iter().enumerate() {
        for directory in ["/boot", "/"] {
            let names = one.files.names(directory);
            let names =
                names.map_err(|source| DiskError::Files { place: places[one.place].to_string(), source })?;
            let versions = names.iter().filter_map(|name| name.strip_prefix("vmlinuz-"));
            kernels.extend(versions.map(|version| (at, directory, version.to_owned())));
        }
    }
    // A rescue kernel has no version, but "0-rescue".
    kernels.sort_by(|(_, _, one), (_, _, other)| strverscmp(other, one));
    let Some((at, directory, version)) = kernels.first() else { return Ok(None) };
    let directory = directory.trim_end_matches('/');
    let one = &mounted[*at];
    let initrds = [
        format!("{directory}/initrd.img-{version}"),
        format!("{directory}/initramfs-{version}.img"),
        format!("{directory}/initrd-{version}"),
    ];
    let payload = Payload::Linux {
        linux: format!("{directory}/vmlinuz-{version}"),
        initrds: initrds.into_iter().find(|path| one.files.exists(path)).into_iter().collect(),
        options: String::new(),
    };
    let entry = Entry {
        id: format!("vmlinuz-{version}"),
        title: None,
        version: Some(version.clone()),
        machine_id: None,
        sort_key: None,
        bad: false,
        payload,
    };
    boot(one, places, "", &entry, Vec::new()).map(Some)
}

impl Mounted {
    /// The entries below a directory.
    fn entries(&self, base: &str) -> Result<Vec<Entry>, FilesError> {
        let mut entries = Vec::new();
        let directory = format!("{base}/loader/entries");
        for name in self.files.names(&directory)?.iter().filter(|name| name.ends_with(".conf")) {
            let text = self.files.read(&format!("{directory}/{name}"), MAX_ENTRY_FILE)?.unwrap_or_default();
            entries.extend(Entry::parse(name, &String::from_utf8_lossy(&text)));
        }
        let directory = format!("{base}/EFI/Linux");
        let names = self.files.names(&directory)?;
        for name in names.iter().filter(|name| name.ends_with(".efi")).take(MAX_UKIS) {
            let path = format!("{directory}/{name}");
            let file = self.files.read(&path, MAX_BOOT_FILE)?.unwrap_or_default();
            // One that lies is no entry; another may be booted.
            if let Ok(Some(uki)) = uki::read(&file) {
                entries.extend(Entry::of_uki(name, &path, &uki));
            }
        }
        Ok(entries)
    }

    /// A file that an entry names.
    fn read(
        &self,
        places: &[Place],
        base: &str,
        entry: &Entry,
        path: &str,
    ) -> Result<(String, Vec<u8>), DiskError> {
        for base in ["", base] {
            let path = format!("{base}/{}", path.trim_start_matches('/'));
            let read = self.files.read(&path, MAX_BOOT_FILE);
            let file = read.map_err(|source| DiskError::Files {
                place: format!("{path} ({})", places[self.place]),
                source,
            })?;
            if let Some(file) = file {
                return Ok((path, file));
            }
        }
        Err(DiskError::Missing { entry: entry.id.clone(), path: path.to_owned() })
    }
}

fn boot(
    one: &Mounted,
    places: &[Place],
    base: &str,
    entry: &Entry,
    menu: Vec<MenuEntry>,
) -> Result<Found, DiskError> {
    let place = one.place;
    match &entry.payload {
        Payload::Uki { path, options } => {
            let (path, file) = one.read(places, base, entry, path)?;
            Ok(Found { menu, place, path, kernel: Kernel::Uki(file), initrd: None, options: options.clone() })
        }
        Payload::Linux { linux, initrds, options } => {
            let (path, file) = one.read(places, base, entry, linux)?;
            let mut initrd = Vec::new();
            for path in initrds {
                let (_, part) = one.read(places, base, entry, path)?;
                if initrd.len() + part.len() > MAX_INITRDS {
                    return Err(DiskError::InitrdsTooLarge { entry: entry.id.clone() });
                }
                // Each part begins at a multiple of four (Documentation/driver-api/early-userspace/buffer-format.rst).
                initrd.resize(initrd.len().next_multiple_of(4), 0);
                initrd.extend(part);
            }
            let initrd = Some(initrd).filter(|initrd| !initrd.is_empty());
            Ok(Found { menu, place, path, kernel: Kernel::Linux(file), initrd, options: options.clone() })
        }
    }
}

/// The words that name the root file system: the partition that says so, or the first with a system on it. With an initial RAM disk
/// the disk is found by the file system's own name; the kernel alone knows partitions, and the first virtio disk.
fn root(mounted: &[Mounted], places: &[Place], has_initrd: bool) -> Option<String> {
    let by_kind = places.iter().position(|place| {
        place.partition.as_ref().is_some_and(|partition| partition.kind == PartitionKind::Root)
    });
    let by_files = || {
        let systems = ["/etc/os-release", "/usr/lib/os-release", "/sbin/init", "/etc/fstab"];
        let one = mounted.iter().find(|one| systems.iter().any(|path| one.files.exists(path)))?;
        Some(one.place)
    };
    let place = &places[by_kind.or_else(by_files)?];
    Some(match (&place.partition, &place.uuid) {
        (Some(partition), _) => format!("root=PARTUUID={}", partition.part_uuid),
        (None, Some(uuid)) if has_initrd => format!("root=UUID={uuid}"),
        (None, _) => "root=/dev/vda".to_owned(),
    })
}

#[cfg(test)]
mod tests;
