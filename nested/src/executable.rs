//! The running executable and what it needs to run elsewhere.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use object::Endianness;
use object::elf::{DT_SONAME, FileHeader64};
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

/// The running executable, also when its file has been replaced since (proc(5)).
pub(crate) const SELF: &str = "/proc/self/exe";

/// The files of the running program.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Executable {
    /// The loader and the path at which the kernel looks for it. None for a static program.
    pub(crate) loader: Option<PathBuf>,
    /// The shared objects: the name by which the loader looks for it, and the file.
    pub(crate) libraries: Vec<(OsString, PathBuf)>,
}

impl Executable {
    /// The running program's own.
    pub(crate) fn running() -> io::Result<Self> {
        let loader = elf_facts(&fs::read(SELF)?).interpreter.map(PathBuf::from);
        if loader.is_none() {
            return Ok(Self { loader, libraries: Vec::new() });
        }
        let program = fs::read_link(SELF)?;
        let mut libraries: Vec<(OsString, PathBuf)> = Vec::new();
        for path in code_files(&fs::read_to_string("/proc/self/maps")?) {
            if path == program {
                continue;
            }
            let name = elf_facts(&fs::read(&path)?).soname;
            if let Some(name) = name.or_else(|| path.file_name().map(OsStr::to_owned)) {
                // Of two with one name the loader would take the first, too.
                if !libraries.iter().any(|(other, _)| *other == name) {
                    libraries.push((name, path));
                }
            }
        }
        Ok(Self { loader, libraries })
    }
}

/// The files that are mapped executable, by /proc/PID/maps (proc(5)).
fn code_files(maps: &str) -> BTreeSet<PathBuf> {
    maps.lines()
        .filter_map(|line| {
            // address perms offset dev inode path; the path may hold spaces.
            let mut fields = line.splitn(6, ' ');
            let permissions = fields.nth(1)?;
            let path = fields.last()?.trim_start();
            (permissions.contains('x') && path.starts_with('/')).then(|| PathBuf::from(path))
        })
        .collect()
}

#[derive(Debug, Default, PartialEq, Eq)]
struct ElfFacts {
    interpreter: Option<OsString>,
    soname: Option<OsString>,
}

/// The loader and the name that a 64-bit ELF file asks for; neither for other files.
fn elf_facts(data: &[u8]) -> ElfFacts {
    read_elf_facts(data).unwrap_or_default()
}

fn read_elf_facts(data: &[u8]) -> object::Result<ElfFacts> {
    let header = FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let mut facts = ElfFacts::default();
    for segment in header.program_headers(endian, data)? {
        if let Some(path) = segment.interpreter(endian, data)? {
            facts.interpreter = Some(OsStr::from_bytes(path).to_owned());
        }
    }
    let sections = header.sections(endian, data)?;
    if let Some((entries, strings)) = sections.dynamic(endian, data)? {
        let strings = sections.strings(endian, data, strings)?;
        for entry in entries {
            if entry.tag(endian) == DT_SONAME {
                facts.soname = Some(OsStr::from_bytes(entry.string(endian, strings)?).to_owned());
            }
        }
    }
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_code_is_found_by_its_path() {
        let maps = "\
55d0-55d1 r--p 00000000 fe:00 1 /bin/a program
55d1-55d2 r-xp 00001000 fe:00 1                          /bin/a program
7f00-7f01 r-xp 00000000 fe:00 2                          /lib/libc.so.6
7f01-7f02 rw-p 00000000 00:00 0
7f02-7f03 r-xp 00000000 00:00 0                          [vdso]
7f04-7f05 r--s 00000000 fe:00 3                          /lib/data
";
        let files: Vec<_> = code_files(maps).into_iter().collect();
        assert_eq!(files, [PathBuf::from("/bin/a program"), PathBuf::from("/lib/libc.so.6")]);
    }

    #[test]
    fn this_test_program_knows_what_it_is_made_of() {
        let executable = Executable::running().unwrap();
        // The loader's answer is an independent one.
        match &executable.loader {
            Some(loader) => {
                let program = fs::read_link(SELF).unwrap();
                let output = std::process::Command::new(loader).arg("--list").arg(program).output().unwrap();
                let listed = String::from_utf8_lossy(&output.stdout).into_owned();
                for line in listed.lines().filter(|line| line.contains("=>")) {
                    let name = line.split_whitespace().next().unwrap();
                    assert!(
                        executable.libraries.iter().any(|(soname, _)| soname == name),
                        "{name} is missing in {executable:?}"
                    );
                }
                assert!(listed.contains("libc.so"), "{listed}");
            }
            None => assert!(executable.libraries.is_empty()),
        }
    }

    #[test]
    fn other_files_are_no_elf() {
        for data in [&b""[..], b"\x7fELF", b"#!/bin/sh\n", &[0xff; 4096]] {
            assert_eq!(elf_facts(data), ElfFacts::default());
        }
    }
}
