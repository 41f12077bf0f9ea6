//! A snapshot's directory (docs/snapshot.md): what the machine saves, its image, and its probes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use guest::Guest;
use guest::relocation::Relocation;
use probe_core::engine::Engine;
use serde::{Deserialize, Serialize};
use vmm::{Control, MemoryFile, SaveError, Snapshot};

use crate::exit::{Code, Failure};
use crate::images::{self, chain};

/// Counts the changes of the directory's contents, but for `state`, which has a version of its own.
const FORMAT: u32 = 1;

const MEMORY: &str = "memory";
const STATE: &str = "state";
const IMAGE: &str = "image";
/// Written last: without it the others are no snapshot.
const MANIFEST: &str = "manifest.json";
const FILES: [&str; 4] = [MEMORY, STATE, IMAGE, MANIFEST];

/// Bytes of a file that are handed on at once at most.
const PART: usize = 1 << 20;

/// A probe as the snapshot has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedProbe {
    /// As for `run --probe`; it stands for one probe.
    pub spec: String,
    pub enabled: bool,
}

/// What is not the machine's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    /// The version of the vmprobe that wrote it.
    vmprobe: String,
    /// The image as it was asked for.
    pub image: String,
    /// CRC-32 of its copy.
    image_checksum: u32,
    /// By how much the kernel lies behind where it was linked, and where it would be loaded (KASLR).
    gva_offset: u64,
    gpa_offset: u64,
    /// The guest's kernel has patched what it patches while it boots.
    pub booted: bool,
    pub probes: Vec<SavedProbe>,
}

/// The manifest's file.
#[derive(Serialize, Deserialize)]
struct Checked {
    /// CRC-32 of the manifest, written without spaces.
    checksum: u32,
    manifest: Manifest,
}

impl Checked {
    fn new(manifest: Manifest) -> Result<Self, serde_json::Error> {
        Ok(Self { checksum: crc32fast::hash(&serde_json::to_vec(&manifest)?), manifest })
    }
}

/// Some bytes of one of a snapshot's files.
#[derive(Debug)]
pub struct Part<'a> {
    pub file: &'a str,
    /// The length of the whole file.
    pub size: u64,
    /// Where in it these are. What no part has is zeros.
    pub offset: u64,
    pub data: &'a [u8],
}

/// A machine that is to be saved.
pub struct Source<'a> {
    pub control: &'a Control,
    pub engine: &'a Engine,
    /// The image as it was asked for.
    pub image: &'a str,
    pub guest: &'a Guest,
    pub memory_bytes: u64,
    pub booted: bool,
    pub probes: Vec<SavedProbe>,
}

impl Source<'_> {
    /// Saves it; it is paused until its memory has been taken by `write`.
    ///
    /// # Errors
    /// What failed. What was written is of no use then, and the machine goes on.
    pub fn save(self, write: &mut dyn FnMut(Part<'_>) -> io::Result<()>) -> Result<(), Failure> {
        let size = self.memory_bytes;
        let state = self
            .control
            .save(&|gpa, bytes| self.engine.uncover(gpa, bytes), &mut |offset, data| {
                write(Part { file: MEMORY, size, offset, data })
            })
            .map_err(|error| failure(&error))?;
        // A memory of zeros has its length all the same.
        let end = Part { file: MEMORY, size, offset: size, data: &[] };
        let written = write(end).and_then(|()| {
            write_all(STATE, &state, write)?;
            let image = self.guest.image.data();
            write_all(IMAGE, image, write)?;
            let manifest = Checked::new(Manifest {
                format: FORMAT,
                vmprobe: env!("CARGO_PKG_VERSION").to_owned(),
                image: self.image.to_owned(),
                image_checksum: crc32fast::hash(image),
                gva_offset: self.guest.image.relocation.gva_offset,
                gpa_offset: self.guest.image.relocation.gpa_offset,
                booted: self.booted,
                probes: self.probes,
            })?;
            write_all(MANIFEST, &serde_json::to_vec_pretty(&manifest)?, write)
        });
        written.map_err(|error| failure(&SaveError::Write(error)))
    }
}

fn failure(error: &SaveError) -> Failure {
    Failure::Host(format!("The machine could not be saved: {}", chain(error)))
}

fn write_all(file: &str, bytes: &[u8], write: &mut dyn FnMut(Part<'_>) -> io::Result<()>) -> io::Result<()> {
    let size = bytes.len() as u64;
    let mut offset = 0;
    for data in bytes.chunks(PART) {
        write(Part { file, size, offset, data })?;
        offset += data.len() as u64;
    }
    Ok(())
}

/// Writes a snapshot's directory. It has another name until it is complete, and is removed if it does not come to that.
#[derive(Debug)]
pub struct Writer {
    directory: PathBuf,
    partial: PathBuf,
    files: BTreeMap<&'static str, (File, u64)>,
}

impl Writer {
    /// # Errors
    /// There is something of this name, or no directory can be made there.
    pub fn create(directory: &Path) -> Result<Self, Failure> {
        let cannot = |error: io::Error| {
            Failure::Usage(format!("{}: a snapshot cannot be written there: {error}", directory.display()))
        };
        if directory.symlink_metadata().is_ok() {
            return Err(Failure::Usage(format!(
                "{}: is there already; a snapshot is never overwritten, since machines may run from it",
                directory.display()
            )));
        }
        let mut partial = directory.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        // The guest's memory is in it.
        fs::DirBuilder::new().mode(0o700).create(&partial).map_err(cannot)?;
        Ok(Self { directory: directory.to_owned(), partial, files: BTreeMap::new() })
    }

    /// # Errors
    /// The part cannot be written, or is not one of a snapshot's.
    pub fn write(&mut self, part: &Part<'_>) -> io::Result<()> {
        let Part { file: name, size, offset, data } = *part;
        let name = FILES.into_iter().find(|known| *known == name).ok_or(io::ErrorKind::InvalidData)?;
        if !self.files.contains_key(name) {
            let file =
                File::options().write(true).create_new(true).mode(0o600).open(self.partial.join(name))?;
            file.set_len(size)?;
            self.files.insert(name, (file, size));
        }
        let (file, known) = &self.files[name];
        if *known != size || offset.checked_add(data.len() as u64).is_none_or(|end| end > size) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        file.write_all_at(data, offset)
    }

    /// Puts everything on the disk, and gives the directory its name.
    ///
    /// # Errors
    /// The disk is full, say, or a file is missing.
    pub fn finish(mut self) -> Result<(), Failure> {
        let cannot = |error: io::Error| {
            Failure::Host(format!("{}: the snapshot could not be written: {error}", self.directory.display()))
        };
        if FILES.into_iter().any(|name| !self.files.contains_key(name)) {
            return Err(cannot(io::Error::other("it ended too early")));
        }
        let sync = |directory: &Path| File::open(directory)?.sync_all();
        let synced = self.files.values().try_for_each(|(file, _)| file.sync_all());
        synced.and_then(|()| sync(&self.partial)).map_err(cannot)?;
        fs::rename(&self.partial, &self.directory).map_err(cannot)?;
        self.partial.clear();
        let parent = self.directory.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync(parent.unwrap_or(Path::new("."))).map_err(|error| {
            Failure::Host(format!("{}: may not be on the disk yet: {error}", self.directory.display()))
        })
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.partial.as_os_str().is_empty() {
            fs::remove_dir_all(&self.partial).ok();
        }
    }
}

/// A snapshot that was opened; nothing has looked at what is in its image.
#[derive(Debug)]
pub struct Saved {
    pub manifest: Manifest,
    pub machine: Snapshot,
    pub memory: MemoryFile,
    image: Option<Vec<u8>>,
}

impl Saved {
    /// Opens a snapshot's directory, and checks all of it but the memory, of which it checks the length.
    ///
    /// # Errors
    /// It is no snapshot, is not complete, is damaged or has another version.
    pub fn open(directory: &Path) -> Result<Self, Failure> {
        let broken = |what: String| Failure::Image(format!("{}: {what}", directory.display()));
        let read = |name: &str| {
            fs::read(directory.join(name)).map_err(|error| broken(format!("no snapshot: {name}: {error}")))
        };
        let damaged = |name: &str| broken(format!("the snapshot is damaged: {name} is not what was written"));
        let manifest = read(MANIFEST)?;
        // The format first: what else is in it depends on that.
        let format = serde_json::from_slice::<serde_json::Value>(&manifest)
            .ok()
            .and_then(|file| file.get("manifest")?.get("format")?.as_u64())
            .ok_or_else(|| damaged(MANIFEST))?;
        if format != u64::from(FORMAT) {
            return Err(broken(format!(
                "the snapshot has format {format}, and this vmprobe reads format {FORMAT}; restore it with the vmprobe that made it"
            )));
        }
        let Checked { checksum, manifest } =
            serde_json::from_slice(&manifest).map_err(|_| damaged(MANIFEST))?;
        let again = Checked::new(manifest).map_err(|_| damaged(MANIFEST))?;
        if again.checksum != checksum {
            return Err(damaged(MANIFEST));
        }
        let machine = Snapshot::decode(&read(STATE)?).map_err(|error| broken(chain(&error)))?;
        let image = read(IMAGE)?;
        if crc32fast::hash(&image) != again.manifest.image_checksum {
            return Err(damaged(IMAGE));
        }
        let memory = File::open(directory.join(MEMORY)).and_then(MemoryFile::new);
        let memory = memory.map_err(|error| broken(format!("no snapshot: {MEMORY}: {error}")))?;
        if memory.bytes() != machine.memory_bytes() {
            return Err(broken(format!(
                "the snapshot is not complete: {MEMORY} has {:#x} bytes and should have {:#x}",
                memory.bytes(),
                machine.memory_bytes()
            )));
        }
        Ok(Self { manifest: again.manifest, machine, memory, image: Some(image) })
    }

    /// The guest's image, once.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn guest(&mut self) -> Result<Guest, Failure> {
        let Manifest { gva_offset, gpa_offset, ref image, .. } = self.manifest;
        images::parse_moved(
            image,
            self.image.take().unwrap_or_default(),
            Relocation { gva_offset, gpa_offset },
        )
    }

    /// Compares all of the memory with what was saved.
    ///
    /// # Errors
    /// It is damaged.
    pub fn verify(&self) -> Result<(), Failure> {
        self.machine.verify_memory(&self.memory).map_err(|error| Failure::Image(chain(&error)))
    }

    /// The probes as they were asked for.
    pub fn specs(&self) -> Vec<String> {
        self.manifest.probes.iter().map(|probe| probe.spec.clone()).collect()
    }
}

/// `vmprobe verify`.
pub fn verify(directory: &Path) -> Result<Code, Failure> {
    let saved = Saved::open(directory)?;
    saved.verify().map_err(|error| Failure::Image(format!("{}: {error}", directory.display())))?;
    println!(
        "{}: {} with {} MiB of memory, {} vCPUs and {} probes, as it was saved",
        directory.display(),
        saved.manifest.image,
        saved.machine.memory_bytes() >> 20,
        saved.machine.vcpus(),
        saved.manifest.probes.len()
    );
    Ok(Code::Done)
}

/// How many bytes of memory the machine of a snapshot has, if it is one; looks at nothing else.
pub fn memory_bytes(directory: &Path) -> Option<u64> {
    fs::metadata(directory.join(MEMORY)).ok().map(|file| file.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part<'a>(file: &'a str, size: u64, offset: u64, data: &'a [u8]) -> Part<'a> {
        Part { file, size, offset, data }
    }

    #[test]
    fn a_directory_has_its_name_when_it_is_complete_and_not_before() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("snapshot");
        let mut writer = Writer::create(&directory).unwrap();
        writer.write(&part(MEMORY, 1 << 20, 4096, b"memory")).unwrap();
        for name in [STATE, IMAGE] {
            writer.write(&part(name, 2, 0, b"xy")).unwrap();
        }
        assert!(!directory.exists());
        assert!(Writer::create(&directory).is_err(), "another one is under way");
        writer.write(&part(MANIFEST, 2, 0, b"{}")).unwrap();
        writer.finish().unwrap();
        assert_eq!(fs::metadata(directory.join(MEMORY)).unwrap().len(), 1 << 20);
        let error = Writer::create(&directory).unwrap_err();
        assert!(error.to_string().contains("never overwritten"), "{error}");
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_not_complete_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("snapshot");
        let mut writer = Writer::create(&directory).unwrap();
        writer.write(&part(STATE, 2, 0, b"xy")).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("too early"));
        drop(Writer::create(&directory).unwrap());
        assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
    }

    #[test]
    fn parts_of_other_files_or_beyond_their_end_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let mut writer = Writer::create(&home.path().join("snapshot")).unwrap();
        for bad in [
            part("../x", 1, 0, b"x"),
            part("other", 1, 0, b"x"),
            part(STATE, 1, 1, b"x"),
            part(STATE, 2, 0, b"x"),
            part(STATE, 1, u64::MAX, b"x"),
        ] {
            assert!(writer.write(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_manifest_with_a_flipped_digit_or_another_format_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let write = |text: &str| {
            fs::write(home.path().join(MANIFEST), text).unwrap();
            Saved::open(home.path()).unwrap_err().to_string()
        };
        let manifest = Manifest {
            format: FORMAT,
            vmprobe: "0.1.0".to_owned(),
            image: "demo".to_owned(),
            image_checksum: 7,
            gva_offset: 0,
            gpa_offset: 0,
            booted: false,
            probes: vec![SavedProbe { spec: "tick".to_owned(), enabled: true }],
        };
        let text = serde_json::to_string_pretty(&Checked::new(manifest).unwrap()).unwrap();
        assert!(
            write(&text).contains("no snapshot: state"),
            "the manifest itself is right: {}",
            write(&text)
        );
        assert!(write(&text.replace("tick", "tock")).contains("damaged: manifest.json"));
        assert!(write(&text.replace("\"format\": 1", "\"format\": 9")).contains("format 9"));
        assert!(write("{").contains("damaged: manifest.json"));
        assert!(Saved::open(&home.path().join("none")).unwrap_err().to_string().contains("no snapshot"));
    }
}
