//! `vmprobe image`: what an image is, and one file out of several.

use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use guest::image::disk::DiskFacts;
use guest::image::pack::{Packed, pack};
use guest::image::{Container, Extras, ImageKind, initrd_format};
use guest::{Guest, SymbolSource};
use serde::Serialize;

use crate::cli::{ImageArgs, ImageCommand, Output, PackArgs};
use crate::exit::{Code, Failure};
use crate::images::{self, Opened, chain};
use crate::output::{Hex, closed, json_lines};

pub fn image(args: &ImageArgs) -> Result<Code, Failure> {
    match &args.command {
        ImageCommand::Info { image, output } => info(image, *output),
        ImageCommand::Pack(args) => pack_files(args),
    }
}

/// Makes the file, complete or not at all.
fn pack_files(args: &PackArgs) -> Result<Code, Failure> {
    let read = |option: &str, path: &Path| {
        std::fs::read(path)
            .map_err(|error| Failure::Image(format!("{option} {}: cannot be read: {error}", path.display())))
    };
    let kernel = read("--kernel", &args.kernel)?;
    let initrd = args.initrd.as_deref().map(images::read_initrd).transpose()?;
    let stub = args.stub.as_deref().map(|path| read("--stub", path)).transpose()?;
    let os_release = args.os_release.as_deref().map(|path| read("--os-release", path)).transpose()?;
    let os_release = os_release.map(String::from_utf8).transpose();
    let os_release = os_release
        .map_err(|_| Failure::Image("--os-release: is not UTF-8 text; give an os-release file".to_owned()))?;
    let image = pack(&Packed {
        kernel: &kernel,
        initrd: initrd.as_deref(),
        cmdline: args.cmdline.as_deref(),
        os_release: os_release.as_deref(),
        stub: stub.as_deref(),
    })
    .map_err(|error| Failure::Image(chain(&error)))?;
    write(&args.output, &image)
        .map_err(|error| Failure::Image(format!("{}: cannot be written: {error}", args.output.display())))?;
    println!("{}", args.output.display());
    Ok(Code::Done)
}

/// Puts a complete file in the place of what was there.
fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".vmprobe-image-")
        .permissions(std::fs::Permissions::from_mode(0o666))
        .tempfile_in(directory)?;
    file.write_all(bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

/// What a file is.
#[derive(Serialize)]
struct Info<'a> {
    image: &'a str,
    /// "unified kernel image", or the kernel's own format where that is all.
    kind: &'static str,
    system: Option<&'a str>,
    disk: Option<Disk<'a>>,
    kernel: Kernel<'a>,
    boot: Boot<'a>,
    initrd: Option<Initrd>,
    symbols: Symbols,
    /// In the kernel's BTF.
    types: Option<usize>,
}

/// What is on a disk.
#[derive(Serialize)]
struct Disk<'a> {
    /// "GPT", "MBR" or "none".
    table: &'static str,
    /// Without a table the whole disk is one.
    partitions: Vec<DiskPartition<'a>>,
    /// The first is booted.
    entries: Vec<DiskEntry<'a>>,
    /// The file that is booted, and where it is.
    boots: &'a str,
    /// What was added to the command line, since nothing names the root file system.
    root: Option<&'a str>,
}

#[derive(Serialize)]
struct DiskPartition<'a> {
    number: Option<u32>,
    kind: Option<String>,
    bytes: Option<u64>,
    part_uuid: Option<&'a str>,
    file_system: Option<&'a str>,
    uuid: Option<&'a str>,
}

#[derive(Serialize)]
struct DiskEntry<'a> {
    id: &'a str,
    title: Option<&'a str>,
    version: Option<&'a str>,
}

impl<'a> Disk<'a> {
    fn of(facts: &'a DiskFacts) -> Self {
        let partitions = facts.places.iter().map(|place| {
            let partition = place.partition.as_ref();
            DiskPartition {
                number: partition.map(|partition| partition.number),
                kind: partition.map(|partition| partition.kind.to_string()),
                bytes: partition.map(|partition| partition.bytes),
                part_uuid: partition.map(|partition| partition.part_uuid.as_str()),
                file_system: place.file_system,
                uuid: place.uuid.as_deref(),
            }
        });
        let entries = facts.menu.iter().map(|entry| DiskEntry {
            id: &entry.id,
            title: entry.title.as_deref(),
            version: entry.version.as_deref(),
        });
        Self {
            table: facts.table,
            partitions: partitions.collect(),
            entries: entries.collect(),
            boots: &facts.kernel,
            root: facts.root.as_deref(),
        }
    }
}

#[derive(Serialize)]
struct Kernel<'a> {
    format: &'static str,
    compression: Option<String>,
    version: Option<&'a str>,
    build_id: Option<String>,
}

/// How it would be booted.
#[derive(Serialize)]
struct Boot<'a> {
    protocol: &'static str,
    reason: &'static str,
    /// Guest-physical.
    entry: Hex,
    /// The image's own words.
    cmdline: Option<&'a str>,
}

#[derive(Serialize)]
struct Initrd {
    bytes: usize,
    /// How it begins.
    format: Option<String>,
}

#[derive(Serialize)]
struct Symbols {
    source: &'static str,
    code: usize,
    data: usize,
}

impl<'a> Info<'a> {
    fn of(name: &'a str, guest: &'a Guest, extras: &'a Extras) -> Self {
        let image = &guest.image;
        let format = match image.kind {
            ImageKind::BzImage => "bzImage",
            ImageKind::Vmlinux => "ELF vmlinux",
            ImageKind::BareMetal => "bare-metal ELF program",
        };
        let (kind, system, disk) = match &extras.container {
            None => (format, None, None),
            Some(Container::Uki(facts)) => ("unified kernel image", facts.system.as_deref(), None),
            Some(Container::Disk(facts)) => ("disk", None, Some(Disk::of(facts))),
        };
        let (protocol, reason) = if image.kind.is_linux() {
            ("Linux, 64-bit", "a Linux kernel has a 64-bit entry")
        } else {
            ("bare metal, 64-bit", "a 64-bit ELF program that is no Linux kernel")
        };
        let code = guest.symbols.iter().filter(|symbol| symbol.kind.is_code()).count();
        Self {
            image: name,
            kind,
            system,
            disk,
            kernel: Kernel {
                format,
                compression: image.compression.map(|compression| compression.to_string()),
                version: image.version.as_deref(),
                build_id: image.build_id.as_deref().map(hex::encode),
            },
            boot: Boot { protocol, reason, entry: Hex(image.entry.0), cmdline: extras.cmdline.as_deref() },
            initrd: extras
                .initrd
                .as_deref()
                .map(|initrd| Initrd { bytes: initrd.len(), format: initrd_format(initrd) }),
            symbols: Symbols {
                source: match guest.symbol_source {
                    SymbolSource::Elf => "ELF symbol table",
                    SymbolSource::Kallsyms => "kallsyms",
                    SymbolSource::None => "none",
                },
                code,
                data: guest.symbols.len() - code,
            },
            types: guest.types().map(|types| types.count()),
        }
    }
}

fn info(name: &str, output: Output) -> Result<Code, Failure> {
    let Opened { guest, extras } = images::open(name)?;
    let info = Info::of(name, &guest, &extras);
    match output {
        Output::Json => json_lines([info])?,
        Output::Text => text(&info).map_err(|error| closed(&error))?,
    }
    Ok(Code::Done)
}

fn text(info: &Info<'_>) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    let Info { kernel, boot, initrd, symbols, .. } = info;
    writeln!(out, "image         {}: {}", info.image, info.kind)?;
    if let Some(system) = info.system {
        writeln!(out, "system        {system}")?;
    }
    if let Some(disk) = &info.disk {
        disk_text(&mut out, disk)?;
    }
    write!(out, "kernel        {}", kernel.format)?;
    if let Some(version) = kernel.version {
        write!(out, ", Linux {version}")?;
    }
    if let Some(compression) = &kernel.compression {
        write!(out, ", {compression}")?;
    }
    writeln!(out)?;
    if let Some(build_id) = &kernel.build_id {
        writeln!(out, "build id      {build_id}")?;
    }
    writeln!(out, "boot          {}, entry {:#x}: {}", boot.protocol, boot.entry.0, boot.reason)?;
    if let Some(cmdline) = boot.cmdline {
        writeln!(out, "command line  {cmdline}")?;
    }
    if let Some(initrd) = initrd {
        let format = initrd.format.as_deref().unwrap_or("no format that the kernel unpacks");
        writeln!(out, "initrd        {} bytes, {format}", initrd.bytes)?;
    }
    match symbols.source {
        "none" => writeln!(out, "symbols       none")?,
        source => writeln!(out, "symbols       {} code, {} data, from {source}", symbols.code, symbols.data)?,
    }
    match info.types {
        Some(types) => writeln!(out, "types         {types} (BTF)")?,
        None => writeln!(out, "types         none")?,
    }
    out.flush()
}

fn disk_text(out: &mut impl Write, disk: &Disk<'_>) -> io::Result<()> {
    for one in &disk.partitions {
        let file_system = one.file_system.unwrap_or("nothing known");
        match (one.number, one.kind.as_deref(), one.bytes, one.part_uuid) {
            (Some(number), Some(kind), Some(bytes), Some(part_uuid)) => {
                write!(
                    out,
                    "{number:<13} {file_system}, {bytes} bytes, {} {kind}, PARTUUID={part_uuid}",
                    disk.table
                )?;
            }
            _ => write!(out, "whole disk    {file_system}")?,
        }
        match one.uuid {
            Some(uuid) => writeln!(out, ", UUID={uuid}")?,
            None => writeln!(out)?,
        }
    }
    for (index, entry) in disk.entries.iter().enumerate() {
        let title = entry.title.map(|title| format!(": {title}")).unwrap_or_default();
        let version = entry.version.map(|version| format!(", version {version}")).unwrap_or_default();
        let first = if index == 0 { ", which is booted" } else { "" };
        writeln!(out, "entry         {}{title}{version}{first}", entry.id)?;
    }
    writeln!(out, "boots         {}", disk.boots)?;
    match disk.root {
        Some(root) => writeln!(out, "root          {root}, since nothing names it"),
        None => Ok(()),
    }
}
