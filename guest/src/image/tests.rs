use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;
use crate::testing::{Elf, Kernel, PF_R, PF_W, PF_X, RODATA, TEXT, TEXT_GPA, bzimage};

const ADDRESS: u64 = 0x10_0000;

fn kernel() -> Kernel {
    let mut kernel = Kernel::default();
    // Calls, so that the x86 filter of xz has something to do.
    let code: Vec<u8> = (0..500u32).flat_map(|at| [&[0xe8][..], &at.to_le_bytes()].concat()).collect();
    kernel.function("startup_64", &code);
    kernel
}

fn with_size(mut packed: Vec<u8>, unpacked: &[u8]) -> Vec<u8> {
    packed.extend(u32::try_from(unpacked.len()).unwrap().to_le_bytes());
    packed
}

fn lz4_legacy(data: &[u8], block: usize) -> Vec<u8> {
    let mut out = vec![0x02, 0x21, 0x4c, 0x18];
    for chunk in data.chunks(block) {
        let packed = lz4_flex::block::compress(chunk);
        out.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
        out.extend(packed);
    }
    out
}

fn xz(data: &[u8], stream: liblzma::stream::Stream) -> Vec<u8> {
    let mut packed = vec![];
    liblzma::read::XzEncoder::new_stream(data, stream).read_to_end(&mut packed).unwrap();
    packed
}

/// `data` as the kernel's build would pack it.
fn pack(compression: Compression, data: &[u8]) -> Vec<u8> {
    use liblzma::stream::{Check, Filters, LzmaOptions, Stream};
    let options = LzmaOptions::new_preset(6).unwrap();
    match compression {
        Compression::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::best());
            encoder.write_all(data).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Xz => {
            let mut filters = Filters::new();
            filters.x86().lzma2(&options);
            with_size(xz(data, Stream::new_stream_encoder(&filters, Check::Crc32).unwrap()), data)
        }
        Compression::Lzma => with_size(xz(data, Stream::new_lzma_encoder(&options).unwrap()), data),
        Compression::Bzip2 => {
            let mut packed = vec![];
            let mut encoder = bzip2::read::BzEncoder::new(data, bzip2::Compression::best());
            encoder.read_to_end(&mut packed).unwrap();
            with_size(packed, data)
        }
        Compression::Lz4 => with_size(lz4_legacy(data, 8 << 20), data),
        Compression::Zstd => with_size(
            ruzstd::encoding::compress_to_vec(data, ruzstd::encoding::CompressionLevel::Fastest),
            data,
        ),
    }
}

const ALL: [Compression; 6] = [
    Compression::Gzip,
    Compression::Xz,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Lz4,
    Compression::Zstd,
];

fn parse_error(file: Vec<u8>) -> ImageError {
    Image::parse(file).expect_err("the image is bad")
}

fn unpack_error(payload: &[u8]) -> DecompressError {
    match parse_error(bzimage(payload)) {
        ImageError::Decompress(error) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn a_bzimage_of_every_compression_gives_its_vmlinux() {
    let vmlinux = kernel().build();
    for compression in ALL {
        let image = Image::parse(bzimage(&pack(compression, &vmlinux))).unwrap();
        assert_eq!(image.kind, ImageKind::BzImage);
        assert_eq!(image.compression, Some(compression));
        assert_eq!(image.data(), vmlinux, "{compression}");
        assert_eq!(image.entry, Gpa(TEXT_GPA));
        assert_eq!(image.version.as_deref(), Some("6.1.0-test"));
        let header = image.setup_header.unwrap();
        assert_eq!(header.protocol(), 0x020f);
        assert_eq!(header.cmdline_size(), 2047);
        assert_eq!(header.init_size(), Some(0x300_0000));
        // To the end that the jump at 0x200 gives: 0x202 + 0x6a.
        assert_eq!(header.bytes().len(), 0x26c - SETUP_HEADER_OFFSET);
    }
}

#[test]
fn an_lz4_payload_of_many_blocks_and_frames_is_put_together() {
    let vmlinux = kernel().build();
    let (first, second) = vmlinux.split_at(1000);
    let mut packed = lz4_legacy(first, 300);
    packed.extend(lz4_legacy(second, 700));
    let image = Image::parse(bzimage(&with_size(packed, &vmlinux))).unwrap();
    assert_eq!(image.data(), vmlinux);
}

#[test]
fn a_kernel_without_a_banner_takes_its_version_from_the_boot_header() {
    let elf = Elf { entry: TEXT_GPA, ..Elf::default() }.segment(TEXT, TEXT_GPA, PF_R | PF_X, &[0x90; 64]);
    let image = Image::parse(bzimage(&pack(Compression::Gzip, &elf.build()))).unwrap();
    assert_eq!(image.version.as_deref(), Some("6.6.6-header"));
}

#[test]
fn a_vmlinux_is_linux_and_its_percpu_template_is_loaded_but_not_mapped() {
    let image = Image::parse(kernel().build()).unwrap();
    assert_eq!(image.kind, ImageKind::Vmlinux);
    assert_eq!(image.version.as_deref(), Some("6.1.0-test"));
    assert_eq!((image.compression, &image.setup_header), (None, &None));
    assert_eq!(image.segments.len(), 3);
    assert_eq!(image.segments[2].gva, None);
    assert_eq!(image.segments[2].mem_size, 0x100);
    assert_eq!(image.gva_to_gpa(Gva(0x40)), None);
    assert_eq!(image.read(Gva(0x40), 1), None);
    assert_eq!(image.section(".data..percpu"), None);
    assert_eq!(image.gva_to_gpa(Gva(RODATA + 5)), Some(Gpa(TEXT_GPA + RODATA - TEXT + 5)));
    assert!(image.is_code(Gva(TEXT)));
    assert!(!image.is_code(Gva(RODATA)));
}

#[test]
fn a_vmlinux_may_start_in_a_section_of_its_data_segment() {
    let mut elf = kernel().elf();
    elf.segments[0].flags = PF_R | PF_W;
    let image = Image::parse(elf.build()).unwrap();
    assert_eq!(image.entry, Gpa(TEXT_GPA));
    assert!(image.is_code(Gva(TEXT)));
    elf.entry = TEXT_GPA + RODATA - TEXT;
    assert!(matches!(parse_error(elf.build()), ImageError::EntryOutside { .. }));
}

#[test]
fn any_other_program_is_bare_metal() {
    let mut elf =
        Elf::bare_metal(ADDRESS, &[0xf4; 32]).segment(ADDRESS + 0x1000, 0x8000, PF_R | PF_W, b"data");
    elf.segments[1].memsz = 0x100;
    elf.entry = ADDRESS + 4;
    let image = Image::parse(elf.build()).unwrap();
    assert_eq!(image.kind, ImageKind::BareMetal);
    assert_eq!(image.version, None);
    assert_eq!(image.entry, Gpa(ADDRESS + 4));
    assert_eq!(image.read(Gva(ADDRESS), 2), Some(&[0xf4, 0xf4][..]));
    assert_eq!(image.read(Gva(ADDRESS + 0x1000), 4), Some(&b"data"[..]));
    assert_eq!(image.gva_to_gpa(Gva(ADDRESS + 0x10ff)), Some(Gpa(0x80ff)));
    assert_eq!(image.gva_to_gpa(Gva(ADDRESS + 0x1100)), None);
    // Zero-initialised memory is mapped but has no bytes in the file.
    assert_eq!(image.read(Gva(ADDRESS + 0x1000), 5), None);
    assert_eq!(image.read_up_to(Gva(ADDRESS + 0x1002), 15), Some(&b"ta"[..]));
    assert!(image.is_code(Gva(ADDRESS)) && !image.is_code(Gva(ADDRESS + 0x1000)));
    // In the high half, but no Linux: a segment at low addresses is mapped where it is linked.
    let elf = Elf::bare_metal(ADDRESS, &[0xf4; 32]).segment(TEXT, TEXT_GPA, PF_R | PF_X, &[0xf4; 32]);
    let image = Image::parse(elf.build()).unwrap();
    assert_eq!(image.kind, ImageKind::BareMetal);
    assert_eq!(image.gva_to_gpa(Gva(ADDRESS)), Some(Gpa(ADDRESS)));
}

#[test]
fn a_bare_metal_entry_is_virtual_and_a_linux_one_physical() {
    let mut elf = Elf::default().segment(TEXT, 0x20_0000, PF_R | PF_X, &[0xf4; 32]);
    elf.entry = TEXT + 2;
    assert_eq!(Image::parse(elf.build()).unwrap().entry, Gpa(0x20_0002));
    let mut elf = kernel().elf();
    elf.entry = TEXT + 2;
    assert_eq!(Image::parse(elf.build()).unwrap().entry, Gpa(TEXT_GPA + 2));
}

#[test]
fn elf_symbols_have_nms_letters_and_addresses() {
    use crate::testing::SHF_EXECINSTR;
    let mut elf = Elf::bare_metal(ADDRESS, &[0x90; 64])
        .section(".text", SHF_EXECINSTR, ADDRESS, 32)
        .section(".rodata", 0, ADDRESS + 32, 32)
        .function("sized", ADDRESS, 8);
    // Binding and type, section; the last three have no address or no name, or are of another kind.
    for (name, info, section, address) in [
        ("label", 0x00, 1, ADDRESS + 16),
        ("weak", 0x22, 1, ADDRESS + 20),
        ("object", 0x11, 2, ADDRESS + 40),
        ("undefined", 0x10, 0, 0),
        ("constant", 0x10, 0xfff1, 7),
        ("section", 0x03, 1, ADDRESS),
        ("", 0x12, 1, ADDRESS),
    ] {
        elf.symbols.push((name.to_owned(), info, section, address, 0));
    }
    let guest = crate::Guest::new(Image::parse(elf.build()).unwrap()).unwrap();
    let symbols: Vec<_> = guest
        .symbols
        .iter()
        .map(|symbol| (symbol.name, symbol.kind.0, symbol.gva.0 - ADDRESS, symbol.size))
        .collect();
    assert_eq!(
        symbols,
        [("sized", 'T', 0, 8), ("label", 't', 16, 4), ("weak", 'W', 20, 12), ("object", 'R', 40, 24)]
    );
}

#[test]
fn a_damaged_symbol_table_is_an_error() {
    let mut elf = Elf::bare_metal(ADDRESS, &[0x90; 64]).function("f", ADDRESS, 8);
    elf.symbols.push(("g".to_owned(), 0x12, 1, ADDRESS, 0));
    let mut file = elf.build();
    // The name of the last symbol, which stands 24 bytes before the strings "\0f\0g\0...".
    let strings = file.windows(5).position(|bytes| bytes == b"\0f\0g\0").unwrap();
    file[strings - 24..strings - 20].copy_from_slice(&[0xff; 4]);
    let error = crate::Guest::new(Image::parse(file).unwrap()).expect_err("the name is outside");
    assert!(error.to_string().contains("symbol table"), "{error}");
}

#[test]
fn files_of_other_kinds_are_refused() {
    assert!(matches!(parse_error(vec![]), ImageError::Unrecognised));
    assert!(matches!(parse_error(b"#!/bin/sh\n".repeat(100)), ImageError::Unrecognised));
    let mut pe = b"MZ".to_vec();
    pe.resize(4096, 0);
    assert!(matches!(parse_error(pe), ImageError::Pe));

    let good = Elf::bare_metal(ADDRESS, &[0xf4; 32]).build();
    let changed = |at: usize, value: u8| {
        let mut file = good.clone();
        file[at] = value;
        parse_error(file)
    };
    assert!(matches!(changed(4, 1), ImageError::Machine { machine: 62 }));
    assert!(matches!(changed(5, 2), ImageError::NotElf));
    assert!(matches!(changed(18, 40), ImageError::Machine { machine: 40 }));
    assert!(matches!(changed(16, 3), ImageError::NotExecutable { kind: 3 }));
    assert!(matches!(changed(0x27, 0x70), ImageError::HeaderTable { table: "program headers", .. }));
    assert!(matches!(changed(0x2f, 0x70), ImageError::HeaderTable { table: "section headers", .. }));
    assert!(matches!(parse_error(good[..40].to_vec()), ImageError::NotElf));
}

#[test]
fn segments_that_lie_are_refused() {
    let good = Elf::bare_metal(ADDRESS, &[0xf4; 32]);
    let changed = |change: &dyn Fn(&mut Elf)| {
        let mut elf = good.clone();
        change(&mut elf);
        parse_error(elf.build())
    };
    assert!(matches!(changed(&|elf| elf.segments.clear()), ImageError::NoSegments));
    let error = changed(&|elf| elf.segments[0].memsz = 31);
    assert!(matches!(error, ImageError::SegmentSize { in_file: 32, mem_size: 31, .. }));
    for change in [
        &|elf: &mut Elf| elf.segments[0].paddr = u64::MAX - 8,
        &|elf: &mut Elf| elf.segments[0].paddr = 1 << 52,
        &|elf: &mut Elf| elf.segments[0].vaddr = u64::MAX - 8,
        &|elf: &mut Elf| elf.segments[0].memsz = u64::MAX,
    ] as [&dyn Fn(&mut Elf); 4]
    {
        assert!(matches!(changed(change), ImageError::SegmentWraps { .. }));
    }
    let error = changed(&|elf| elf.entry = ADDRESS + 32);
    assert!(matches!(error, ImageError::EntryOutside { entry } if entry == ADDRESS + 32));
    let error = changed(&|elf| elf.segments[0].flags = PF_R);
    assert!(matches!(error, ImageError::EntryOutside { .. }));

    let overlapping = |vaddr, paddr| parse_error(good.clone().segment(vaddr, paddr, PF_R, &[0; 16]).build());
    let error = overlapping(0x50_0000, ADDRESS + 31);
    assert!(matches!(error, ImageError::SegmentsOverlap { space: "physical", .. }), "{error}");
    let error = overlapping(ADDRESS - 15, 0x50_0000);
    assert!(matches!(error, ImageError::SegmentsOverlap { space: "virtual", .. }), "{error}");
    Image::parse(good.clone().segment(ADDRESS + 32, ADDRESS + 32, PF_R, &[0; 16]).build()).unwrap();

    // p_offset and p_filesz of the first segment.
    for (at, value) in [(64 + 8, 0xffff_ffff_ffff_fff0u64), (64 + 8, 1 << 20), (64 + 32, 1 << 20)] {
        let mut elf = good.clone();
        elf.segments[0].memsz = 1 << 30;
        let mut file = elf.build();
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let error = parse_error(file);
        assert!(matches!(error, ImageError::SegmentOutsideFile { .. }), "{error}");
    }
    let error = parse_error(good.clone().section(".bad", 0, u64::MAX - 3, 8).build());
    assert!(matches!(error, ImageError::SectionWraps { ref name, .. } if name == ".bad"));
    let error = parse_error(good.clone().section(&"x".repeat(300), 0, 0, 8).build());
    assert!(matches!(error, ImageError::HeaderTable { table: "section headers", .. }));
}

#[test]
fn boot_headers_that_lie_are_refused() {
    let good = bzimage(&pack(Compression::Gzip, &kernel().build()));
    let changed = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        parse_error(file)
    };
    assert!(matches!(changed(0x206, &[7, 2]), ImageError::OldProtocol { protocol: 0x0207 }));
    assert!(changed(0x206, &[7, 2]).to_string().contains("2.07"));
    for (at, bytes) in [(0x248, [0xff; 4]), (0x24c, [0xff; 4]), (0x24c, [0; 4])] {
        assert!(matches!(changed(at, &bytes), ImageError::PayloadOutside { .. }));
    }
    assert!(matches!(parse_error(good[..0x230].to_vec()), ImageError::TruncatedHeader));
    assert!(matches!(parse_error(good[..good.len() / 2].to_vec()), ImageError::PayloadOutside { .. }));
    let not_elf = bzimage(&pack(Compression::Gzip, b"something else"));
    assert!(matches!(parse_error(not_elf), ImageError::PayloadNotElf));
}

#[test]
fn payloads_that_lie_are_refused() {
    let vmlinux = kernel().build();
    assert!(matches!(unpack_error(b"\x89LZO\0\r\n\x1a\nxxxx"), DecompressError::Lzo));
    assert!(matches!(
        unpack_error(b"abcdefgh"),
        DecompressError::UnknownFormat { magic: [b'a', b'b', b'c', b'd'] }
    ));
    assert!(matches!(unpack_error(&[0x1f, 0x8b]), DecompressError::Short { len: 2 }));
    for compression in ALL {
        let good = pack(compression, &vmlinux);
        let declare = |size: u32| {
            let mut payload = good.clone();
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&size.to_le_bytes());
            unpack_error(&payload)
        };
        let real = u32::try_from(vmlinux.len()).unwrap();
        let error = declare(u32::MAX);
        assert!(matches!(error, DecompressError::TooLarge { .. }), "{compression}: {error}");
        // Gzip checks its own trailer first.
        for size in [real - 1, real + 1] {
            let error = declare(size);
            let expected =
                matches!(error, DecompressError::WrongSize { .. } | DecompressError::Corrupt { .. });
            assert!(expected, "{compression}: {error}");
        }
        let mut payload = good.clone();
        let middle = payload.len() / 2;
        payload[middle..middle + 16].copy_from_slice(&[0xff; 16]);
        let error = unpack_error(&payload);
        let expected = matches!(error, DecompressError::WrongSize { .. } | DecompressError::Corrupt { .. });
        assert!(expected, "{compression}: {error}");
        let mut payload = good[..middle].to_vec();
        payload.extend(real.to_le_bytes());
        let error = unpack_error(&payload);
        let expected = matches!(error, DecompressError::WrongSize { .. } | DecompressError::Corrupt { .. });
        assert!(expected, "{compression}: {error}");
    }
}

/// A few kilobytes that unpack to 16 MiB while declaring 1 MiB end at 1 MiB and a byte.
#[test]
fn a_decompression_bomb_ends_at_the_declared_size() {
    let zeros = vec![0; 16 << 20];
    for compression in [Compression::Xz, Compression::Bzip2, Compression::Zstd, Compression::Lz4] {
        let mut payload = pack(compression, &zeros);
        let at = payload.len() - 4;
        payload[at..].copy_from_slice(&(1u32 << 20).to_le_bytes());
        let error = unpack_error(&payload);
        match compression {
            // A block that does not fit is an error of the block.
            Compression::Lz4 => assert!(matches!(error, DecompressError::Corrupt { .. }), "{error}"),
            _ => assert!(matches!(error, DecompressError::WrongSize { relation: "more", .. }), "{error}"),
        }
    }
}

#[test]
fn a_decoder_that_wants_too_much_memory_is_stopped() {
    // LZMA with a dictionary of 4 GiB - 1, and a zstd frame with a window of 3.75 TB.
    let lzma = [&[0x5d, 0, 0, 0xff, 0xff][..], &[0xff; 8], &[0; 32]].concat();
    let zstd = [&[0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xff][..], &[0; 32]].concat();
    for payload in [lzma, zstd] {
        let error = unpack_error(&with_size(payload, &[0; 100]));
        assert!(
            matches!(error, DecompressError::Corrupt { .. } | DecompressError::WrongSize { .. }),
            "{error}"
        );
    }
}

#[test]
fn a_path_that_is_no_file_is_refused() {
    let missing = Image::open(Path::new("/nonexistent/vmlinuz")).expect_err("there is no such file");
    assert!(matches!(missing, ImageError::Read { .. }));
    assert!(missing.to_string().contains("/nonexistent/vmlinuz"));
    let directory = Image::open(Path::new("/")).expect_err("a directory is no image");
    assert!(matches!(directory, ImageError::NotAFile { .. }));
}

#[test]
fn an_image_is_read_from_its_file() {
    let path = std::env::temp_dir().join(format!("vmprobe-image-{}", std::process::id()));
    std::fs::write(&path, kernel().build()).unwrap();
    let image = Image::open(&path);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(image.unwrap().kind, ImageKind::Vmlinux);
}

/// Everything that can be asked of an image, with addresses around its edges.
fn exercise(file: Vec<u8>) {
    let Ok(guest) = Image::parse(file).map(crate::Guest::new) else { return };
    let Ok(guest) = guest else { return };
    let image = &guest.image;
    for segment in &image.segments {
        let edges = segment.gva_range().into_iter().flat_map(|range| [range.start, range.end]);
        for gva in edges.flat_map(|edge| [edge.offset(u64::MAX), edge, edge.offset(1)]) {
            assert_eq!(image.gva_to_gpa(gva).is_some(), image.segment_at(gva).is_some());
            assert!(image.read(gva, 16).is_none_or(|bytes| bytes.len() == 16));
            let _ = guest.place(&format!("{gva:#x}"));
        }
        assert!(image.segment_data(segment).len() as u64 <= segment.mem_size);
    }
    for listing in guest.list(None).unwrap().take(200) {
        if let Ok(gva) = listing.probe {
            assert!(image.is_code(gva) && image.gva_to_gpa(gva).is_some());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Bytes changed anywhere, headers preferred, and the file cut anywhere: an error, or an image that holds together.
    #[test]
    fn damage_never_panics(
        near in proptest::collection::vec((0usize..0x300, any::<u8>()), 0..4),
        far in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        from_end in proptest::collection::vec((0usize..0x400, any::<u8>()), 0..4),
        cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
        compression in proptest::option::of(proptest::sample::select(ALL.to_vec())),
    ) {
        let mut kernel = kernel();
        let entry = kernel.function("f", &[0x90, 0x90, 0xc3]);
        kernel.table(".return_sites", |at| crate::testing::relative_words(at, &[entry + 2]));
        let vmlinux = kernel.build();
        let mut file = match compression {
            Some(compression) => bzimage(&pack(compression, &vmlinux)),
            None => vmlinux,
        };
        for (at, value) in near {
            file[at] = value;
        }
        for (at, value) in far {
            let at = at.index(file.len());
            file[at] = value;
        }
        for (at, value) in from_end {
            let at = file.len() - 1 - at;
            file[at] = value;
        }
        if let Some(cut) = cut {
            file.truncate(cut.index(file.len()));
        }
        exercise(file);
    }

    #[test]
    fn noise_behind_a_magic_never_panics(
        compression in proptest::sample::select(ALL.to_vec()),
        noise in proptest::collection::vec(any::<u8>(), 0..512),
        size in 0u32..0x10_0000,
    ) {
        let magic = &pack(compression, b"some text to pack")[..8];
        let mut payload = [magic, &noise].concat();
        payload.extend(size.to_le_bytes());
        exercise(bzimage(&payload));
    }
}
