//! `vmprobe image`: what an image is, and one file out of several.

use std::io::{self, BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

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
    kernel: Kernel<'a>,
    boot: Boot<'a>,
    initrd: Option<Initrd>,
    symbols: Symbols,
    /// In the kernel's BTF.
    types: Option<usize>,
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
        let (kind, system) = match &extras.container {
            None => (format, None),
            Some(Container::Uki(facts)) => ("unified kernel image", facts.system.as_deref()),
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
