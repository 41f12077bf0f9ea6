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

/// A part of a core file that is not zeros.
pub struct DumpPart<'a> {
    /// How long the whole file is, bytes.
    pub size: u64,
    pub offset: u64,
    pub data: &'a [u8],
}

/// Writes a guest at rest, with the states of its vCPUs. The guest's text is as the guest has it; pages of zeros are left out.
///
/// # Errors
/// What `write` says, or memory that is not there.
pub fn dump(
    guest: &Guest,
    engine: &Engine,
    memory: &GuestRam,
    vcpus: &[VcpuState],
    write: &mut dyn FnMut(DumpPart<'_>) -> io::Result<()>,
) -> io::Result<Dumped> {
    let core = Vmcore::new(guest, vcpus, memory, &layout::ram(memory.bytes()));
    let mut dumped = Dumped {
        bytes: core.size(),
        written: 0,
        has_vmcoreinfo: guest.linux.as_ref().map(|_| core.has_vmcoreinfo),
    };
    let mut put = |offset: u64, data: &[u8]| {
        dumped.written += data.len() as u64;
        write(DumpPart { size: core.size(), offset, data })
    };
    put(0, core.header())?;
    let mut chunk = vec![0; CHUNK];
    for ram in core.ram() {
        let mut done = 0;
        while done < ram.bytes {
            let len = usize::try_from(ram.bytes - done).map_or(CHUNK, |left| left.min(CHUNK));
            let read = engine.read_physical(memory, ram.gpa.offset(done), &mut chunk[..len]);
            read.map_err(|MemoryError::NotRam(gpa)| io::Error::other(format!("{gpa} is not RAM")))?;
            let mut at = ram.offset + done;
            let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
            // Runs of pages of one kind.
            for run in chunk[..len].as_chunks::<PAGE>().0.chunk_by(|one, next| is_zero(one) == is_zero(next))
            {
                let run = run.as_flattened();
                if !is_zero(run) {
                    put(at, run)?;
                }
                at += run.len() as u64;
            }
            done += len as u64;
        }
    }
    Ok(dumped)
}

/// The same to a file, whose pages of zeros are holes.
///
/// # Errors
/// The file cannot be written.
pub fn dump_to(
    path: &Path,
    guest: &Guest,
    engine: &Engine,
    memory: &GuestRam,
    vcpus: &[VcpuState],
) -> Result<Dumped, Failure> {
    let write = || {
        let file = File::create(path)?;
        let dumped =
            dump(guest, engine, memory, vcpus, &mut |part| file.write_all_at(part.data, part.offset))?;
        file.set_len(dumped.bytes)?;
        Ok(dumped)
    };
    write().map_err(|error: io::Error| {
        Failure::Host(format!("--dump {}: cannot be written: {error}", path.display()))
    })
}
