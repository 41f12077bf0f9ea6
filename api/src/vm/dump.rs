//! A guest's registers and memory as a core file.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use guest::Guest;
use guest::vmcore::Vmcore;
use probe_core::engine::Engine;
use probe_core::{MemoryError, VcpuState};
use vmm::{GuestRam, layout};

use crate::exit::Failure;

/// Bytes that are read at once; a whole number of pages, that all of RAM is a whole number of too.
const CHUNK: usize = 64 << 10;
const PAGE: usize = 4096;

/// A core file that has been written.
#[derive(Debug)]
pub struct Dumped {
    /// How long it is.
    pub bytes: u64,
    /// How much of that is more than zeros, and takes room on the disk.
    pub written: u64,
    /// Whether the guest's kernel says in it what debuggers need to know, if it has a kernel that could.
    pub has_vmcoreinfo: Option<bool>,
}

impl fmt::Display for Dumped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        write!(f, "core file of {} MiB, {} MiB on disk", mib(self.bytes), mib(self.written))?;
        let Some(false) = self.has_vmcoreinfo else { return Ok(()) };
        f.write_str(", without VMCOREINFO, which the guest's kernel has not made yet")
    }
}

/// Writes a guest at rest, with the states of its vCPUs, to `path`. The guest's text is as the guest has it, and pages of zeros are
/// holes.
///
/// # Errors
/// The file cannot be written.
pub fn dump(
    path: &Path,
    guest: &Guest,
    engine: &Engine,
    memory: &GuestRam,
    vcpus: &[VcpuState],
) -> Result<Dumped, Failure> {
    let core = Vmcore::new(guest, vcpus, memory, &layout::ram(memory.bytes()));
    let written = write(path, &core, engine, memory)
        .map_err(|error| Failure::Host(format!("--dump {}: cannot be written: {error}", path.display())))?;
    let has_vmcoreinfo = guest.linux.as_ref().map(|_| core.has_vmcoreinfo);
    Ok(Dumped { bytes: core.size(), written, has_vmcoreinfo })
}

fn write(path: &Path, core: &Vmcore, engine: &Engine, memory: &GuestRam) -> io::Result<u64> {
    let file = File::create(path)?;
    file.write_all_at(core.header(), 0)?;
    let mut written = core.header().len() as u64;
    let mut chunk = vec![0; CHUNK];
    for ram in core.ram() {
        let mut done = 0;
        while done < ram.bytes {
            let len = usize::try_from(ram.bytes - done).map_or(CHUNK, |left| left.min(CHUNK));
            let read = engine.read_physical(memory, ram.gpa.offset(done), &mut chunk[..len]);
            read.map_err(|MemoryError::NotRam(gpa)| io::Error::other(format!("{gpa} is not RAM")))?;
            for (page, at) in chunk[..len].chunks(PAGE).zip((0_u64..).step_by(PAGE)) {
                if page.iter().any(|byte| *byte != 0) {
                    file.write_all_at(page, ram.offset + done + at)?;
                    written += page.len() as u64;
                }
            }
            done += len as u64;
        }
    }
    file.set_len(core.size())?;
    Ok(written)
}
