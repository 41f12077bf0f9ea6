//! Writing a unified kernel image.
//!
//! The same input gives the same bytes: the time stamp is 0. With an EFI stub (systemd's `linuxx64.efi.stub` for one) the image also
//! boots on UEFI firmware; without one its only code returns EFI_UNSUPPORTED, and vmprobe and the tools that read such images take it
//! as they take any.

use std::collections::BTreeSet;

use object::endian::{LittleEndian as LE, U16, U32};
use object::pe::{
    IMAGE_DIRECTORY_ENTRY_SECURITY, IMAGE_DOS_SIGNATURE, IMAGE_FILE_EXECUTABLE_IMAGE,
    IMAGE_FILE_LARGE_ADDRESS_AWARE, IMAGE_FILE_MACHINE_AMD64, IMAGE_NT_OPTIONAL_HDR64_MAGIC,
    IMAGE_NT_SIGNATURE, IMAGE_NUMBEROF_DIRECTORY_ENTRIES, IMAGE_SCN_CNT_CODE, IMAGE_SCN_CNT_INITIALIZED_DATA,
    IMAGE_SCN_MEM_EXECUTE, IMAGE_SCN_MEM_READ, IMAGE_SIZEOF_SHORT_NAME, IMAGE_SUBSYSTEM_EFI_APPLICATION,
    ImageDataDirectory, ImageDosHeader, ImageNtHeaders64, ImageSectionHeader, SectionFlags,
};
use object::pod::{bytes_of, from_bytes_mut};
use object::read::pe::ImageNtHeaders;

use super::uki;
use super::{Image, ImageError};

/// Of the image without a stub.
const SECTION_ALIGNMENT: u32 = 0x1000;
const FILE_ALIGNMENT: u32 = 0x200;
/// Room for the headers of such an image: 13 sections.
const HEADERS_BYTES: u32 = 0x400;

/// mov $EFI_UNSUPPORTED, %rax; ret (UEFI specification, appendix D: 3 with the highest bit set).
const UNSUPPORTED: [u8; 11] = [0x48, 0xb8, 3, 0, 0, 0, 0, 0, 0, 0x80, 0xc3];

/// Sections of ours by their names, in the order of the specification's own list; the kernel is last, so that a stub can unpack it in
/// place.
const OURS: [&str; 5] = [".osrel", ".cmdline", ".uname", ".initrd", ".linux"];

/// Why an image cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The kernel is none.
    #[error("The kernel cannot be packed")]
    Kernel(#[from] ImageError),
    /// The kernel is not Linux.
    #[error(
        "A unified kernel image holds a Linux kernel, and this program is none; vmprobe takes it as it is"
    )]
    NotLinux,
    /// What is to be the stub is none.
    #[error("The stub is not a PE executable for x86-64; give systemd's linuxx64.efi.stub, or no stub")]
    Stub,
    /// The stub is a whole image already.
    #[error("The stub has a section {name} already; give one that nothing has been packed into")]
    StubFull {
        /// The section.
        name: &'static str,
    },
    /// No room in the stub's headers.
    #[error(
        "The stub has no room for {sections} more section headers; give systemd's linuxx64.efi.stub, or no stub"
    )]
    StubRoom {
        /// How many are needed.
        sections: usize,
    },
    /// A PE file holds offsets in 32 bits.
    #[error(
        "The image would have more than 0xffffffff bytes (4 GiB); leave the initial RAM disk out and give it with --initrd"
    )]
    TooLarge,
    /// The command line would be read as something else.
    #[error("The command line holds a line end or a zero byte; remove it")]
    CommandLine,
}

/// What is packed.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// A bzImage or a vmlinux.
    pub kernel: &'a [u8],
    /// The initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// The command line.
    pub cmdline: Option<&'a str>,
    /// An os-release file.
    pub os_release: Option<&'a str>,
    /// An EFI stub.
    pub stub: Option<&'a [u8]>,
}

/// Writes the image.
///
/// # Errors
/// See [`PackError`].
pub fn pack(what: &Packed<'_>) -> Result<Vec<u8>, PackError> {
    let kernel = Image::parse(what.kernel.to_vec())?;
    if !kernel.kind.is_linux() {
        return Err(PackError::NotLinux);
    }
    if what.cmdline.is_some_and(|text| text.contains(['\0', '\n', '\r'])) {
        return Err(PackError::CommandLine);
    }
    let version = kernel.version.as_deref();
    let contents = [
        what.os_release.map(str::as_bytes),
        what.cmdline.map(str::as_bytes),
        version.map(str::as_bytes),
        what.initrd,
        Some(what.kernel),
    ];
    let sections: Vec<(&str, &[u8])> =
        OURS.into_iter().zip(contents).filter_map(|(name, data)| Some((name, data?))).collect();
    let base = match what.stub {
        Some(stub) => stub.to_vec(),
        None => base()?,
    };
    append(base, &sections)
}

/// A PE executable that tells firmware that it cannot run here.
fn base() -> Result<Vec<u8>, PackError> {
    let mut file = vec![0; (HEADERS_BYTES + FILE_ALIGNMENT) as usize];
    let (headers, code) = file.split_at_mut(HEADERS_BYTES as usize);
    code[..UNSUPPORTED.len()].copy_from_slice(&UNSUPPORTED);

    let bad = |()| PackError::Stub;
    let (dos, rest) = from_bytes_mut::<ImageDosHeader>(headers).map_err(bad)?;
    dos.e_magic.set(LE, IMAGE_DOS_SIGNATURE);
    dos.e_lfanew.set(LE, small(size_of::<ImageDosHeader>())?);
    let (nt, rest) = from_bytes_mut::<ImageNtHeaders64>(rest).map_err(bad)?;
    nt.signature.set(LE, IMAGE_NT_SIGNATURE);
    let directories = size_of::<ImageDataDirectory>() * IMAGE_NUMBEROF_DIRECTORY_ENTRIES;
    let optional_bytes = size_of_val(&nt.optional_header) + directories;
    let header = &mut nt.file_header;
    header.machine.set(LE, IMAGE_FILE_MACHINE_AMD64);
    header.number_of_sections.set(LE, 1);
    header.size_of_optional_header.set(LE, u16::try_from(optional_bytes).map_err(|_| PackError::TooLarge)?);
    header.characteristics.set(LE, IMAGE_FILE_EXECUTABLE_IMAGE | IMAGE_FILE_LARGE_ADDRESS_AWARE);
    let optional = &mut nt.optional_header;
    optional.magic.set(LE, IMAGE_NT_OPTIONAL_HDR64_MAGIC);
    optional.size_of_code.set(LE, FILE_ALIGNMENT);
    optional.address_of_entry_point.set(LE, SECTION_ALIGNMENT);
    optional.base_of_code.set(LE, SECTION_ALIGNMENT);
    optional.section_alignment.set(LE, SECTION_ALIGNMENT);
    optional.file_alignment.set(LE, FILE_ALIGNMENT);
    optional.size_of_image.set(LE, 2 * SECTION_ALIGNMENT);
    optional.size_of_headers.set(LE, HEADERS_BYTES);
    optional.subsystem.set(LE, IMAGE_SUBSYSTEM_EFI_APPLICATION);
    optional.number_of_rva_and_sizes.set(LE, small(IMAGE_NUMBEROF_DIRECTORY_ENTRIES)?);
    let (section, _) = from_bytes_mut::<ImageSectionHeader>(&mut rest[directories..]).map_err(bad)?;
    *section = header_of(
        ".text",
        UNSUPPORTED.len(),
        SECTION_ALIGNMENT,
        FILE_ALIGNMENT,
        HEADERS_BYTES as usize,
        IMAGE_SCN_CNT_CODE | IMAGE_SCN_MEM_EXECUTE | IMAGE_SCN_MEM_READ,
    )?;
    Ok(file)
}

/// Adds sections to a PE executable.
fn append(mut file: Vec<u8>, sections: &[(&'static str, &[u8])]) -> Result<Vec<u8>, PackError> {
    let (nt, old) = uki::headers(&file).ok_or(PackError::Stub)?;
    let (file_header, optional) = (nt.file_header(), nt.optional_header());
    if file_header.machine.get(LE) != IMAGE_FILE_MACHINE_AMD64 {
        return Err(PackError::Stub);
    }
    let names: BTreeSet<&[u8]> = old.iter().map(uki::name).collect();
    if let Some((name, _)) = sections.iter().find(|(name, _)| names.contains(name.as_bytes())) {
        return Err(PackError::StubFull { name });
    }
    let section_alignment = optional.section_alignment.get(LE);
    let file_alignment = optional.file_alignment.get(LE);
    if !section_alignment.is_power_of_two() || !file_alignment.is_power_of_two() {
        return Err(PackError::Stub);
    }

    // The new headers go behind the old ones, where the file has nothing yet.
    let nt_at =
        ImageDosHeader::parse(file.as_slice()).map_err(|_| PackError::Stub)?.nt_headers_offset() as usize;
    let optional_at = nt_at + size_of::<ImageNtHeaders64>() - size_of_val(optional);
    let table_end = optional_at + usize::from(file_header.size_of_optional_header.get(LE)) + size_of_val(old);
    let first_data =
        old.iter().map(|section| section.pointer_to_raw_data.get(LE)).filter(|at| *at != 0).min();
    let room_end = first_data.unwrap_or(u32::MAX).min(optional.size_of_headers.get(LE)) as usize;
    let needed = size_of::<ImageSectionHeader>() * sections.len();
    let room = file.get(table_end..room_end).filter(|room| room.len() >= needed);
    if !room.is_some_and(|room| room[..needed].iter().all(|byte| *byte == 0)) {
        return Err(PackError::StubRoom { sections: sections.len() });
    }

    let ends = old.iter().map(|section| {
        section.virtual_address.get(LE).checked_add(section.virtual_size.get(LE)).ok_or(PackError::Stub)
    });
    let mut address = ends.collect::<Result<Vec<_>, _>>()?.into_iter().max().unwrap_or(0);
    let count = file_header.number_of_sections.get(LE);
    let mut initialized = optional.size_of_initialized_data.get(LE);
    let mut headers = Vec::new();
    for (name, data) in sections {
        address = address.checked_next_multiple_of(section_alignment).ok_or(PackError::TooLarge)?;
        file.resize(file.len().next_multiple_of(file_alignment as usize), 0);
        let header = header_of(
            name,
            data.len(),
            address,
            file_alignment,
            file.len(),
            IMAGE_SCN_CNT_INITIALIZED_DATA | IMAGE_SCN_MEM_READ,
        )?;
        file.extend_from_slice(data);
        address = address.checked_add(small(data.len())?).ok_or(PackError::TooLarge)?;
        initialized = initialized.saturating_add(header.size_of_raw_data.get(LE));
        headers.push(header);
    }
    file.resize(file.len().next_multiple_of(file_alignment as usize), 0);
    small(file.len())?;
    for (header, at) in headers.iter().zip((table_end..).step_by(size_of::<ImageSectionHeader>())) {
        file[at..at + size_of::<ImageSectionHeader>()].copy_from_slice(bytes_of(header));
    }

    let image_end = address.checked_next_multiple_of(section_alignment).ok_or(PackError::TooLarge)?;
    let added = u16::try_from(sections.len()).map_err(|_| PackError::TooLarge)?;
    let (nt, rest) = from_bytes_mut::<ImageNtHeaders64>(&mut file[nt_at..]).map_err(|()| PackError::Stub)?;
    nt.file_header.number_of_sections.set(LE, count.checked_add(added).ok_or(PackError::TooLarge)?);
    let optional = &mut nt.optional_header;
    optional.size_of_image.set(LE, image_end);
    optional.size_of_initialized_data.set(LE, initialized);
    // Firmware does not look at the checksum. A signature, which is behind the old end, no longer fits.
    optional.check_sum.set(LE, 0);
    let directories = optional.number_of_rva_and_sizes.get(LE) as usize;
    if directories > IMAGE_DIRECTORY_ENTRY_SECURITY {
        let at = IMAGE_DIRECTORY_ENTRY_SECURITY * size_of::<ImageDataDirectory>();
        let entry = rest.get_mut(at..at + size_of::<ImageDataDirectory>()).ok_or(PackError::Stub)?;
        entry.fill(0);
    }
    Ok(file)
}

fn header_of(
    name: &str,
    bytes: usize,
    address: u32,
    file_alignment: u32,
    offset: usize,
    characteristics: SectionFlags,
) -> Result<ImageSectionHeader, PackError> {
    let mut padded = [0; IMAGE_SIZEOF_SHORT_NAME];
    padded[..name.len()].copy_from_slice(name.as_bytes());
    Ok(ImageSectionHeader {
        name: padded,
        virtual_size: U32::new(LE, small(bytes)?),
        virtual_address: U32::new(LE, address),
        size_of_raw_data: U32::new(LE, small(bytes.next_multiple_of(file_alignment as usize))?),
        pointer_to_raw_data: U32::new(LE, small(offset)?),
        pointer_to_relocations: U32::default(),
        pointer_to_linenumbers: U32::default(),
        number_of_relocations: U16::default(),
        number_of_linenumbers: U16::default(),
        characteristics: U32::new(LE, characteristics),
    })
}

fn small(bytes: usize) -> Result<u32, PackError> {
    u32::try_from(bytes).map_err(|_| PackError::TooLarge)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::{Bootable, Container, ImageKind, initrd_format};
    use crate::testing::{Elf, Kernel};

    const RELEASE: &str = "ID=test\nPRETTY_NAME=\"Test 1\"\n";

    fn vmlinux() -> Vec<u8> {
        let mut kernel = Kernel::default();
        kernel.function("startup_64", &[0x90, 0xc3]);
        kernel.build()
    }

    fn whole(kernel: &[u8]) -> Packed<'_> {
        Packed {
            kernel,
            initrd: Some(b"070701 and so on"),
            cmdline: Some("quiet root=/dev/vda1"),
            os_release: Some(RELEASE),
            stub: None,
        }
    }

    #[test]
    fn what_is_packed_comes_out_again() {
        let kernel = vmlinux();
        let file = pack(&whole(&kernel)).unwrap();
        let Bootable { kernel: image, extras } = Bootable::parse(file.clone()).unwrap();
        assert_eq!((image.kind, image.data()), (ImageKind::Vmlinux, &kernel[..]));
        assert_eq!(extras.initrd.as_deref(), Some(&b"070701 and so on"[..]));
        assert_eq!(extras.cmdline.as_deref(), Some("quiet root=/dev/vda1"));
        let Some(Container::Uki(facts)) = extras.container else { panic!("{:?}", extras.container) };
        assert_eq!((facts.system.as_deref(), facts.version.as_deref()), (Some("Test 1"), Some("6.1.0-test")));
        assert_eq!(pack(&whole(&kernel)).unwrap(), file, "the same bytes each time");
        let alone =
            pack(&Packed { initrd: None, cmdline: None, os_release: None, ..whole(&kernel) }).unwrap();
        let extras = Bootable::parse(alone).unwrap().extras;
        assert_eq!((extras.initrd, extras.cmdline), (None, None));
    }

    #[test]
    fn what_the_user_gives_wins() {
        let kernel = vmlinux();
        let extras = || Bootable::parse(pack(&whole(&kernel)).unwrap()).unwrap().extras;
        let both = extras().with(Some(vec![1]), Some("single"));
        assert_eq!(
            (both.initrd, both.cmdline.as_deref()),
            (Some(vec![1]), Some("quiet root=/dev/vda1 single"))
        );
        let none = extras().with(None, Some(""));
        assert_eq!((none.initrd.is_some(), none.cmdline.as_deref()), (true, Some("quiet root=/dev/vda1")));
    }

    #[test]
    fn the_executable_is_laid_out_as_a_loader_wants_it() {
        let kernel = vmlinux();
        let file = pack(&whole(&kernel)).unwrap();
        let (nt, sections) = uki::headers(&file).unwrap();
        assert_eq!(sections.len(), 6);
        let mut end = (0, 0);
        for section in sections {
            let (at, in_file) = (section.virtual_address.get(LE), section.pointer_to_raw_data.get(LE));
            assert_eq!((at % SECTION_ALIGNMENT, in_file % FILE_ALIGNMENT), (0, 0));
            assert!(at >= end.0 && in_file >= end.1);
            end = (at + section.virtual_size.get(LE), in_file + section.size_of_raw_data.get(LE));
        }
        assert_eq!(nt.optional_header.size_of_image.get(LE), end.0.next_multiple_of(SECTION_ALIGNMENT));
        assert_eq!(file.len(), end.1 as usize);
        assert_eq!(nt.file_header.time_date_stamp.get(LE), 0);
        assert_eq!(uki::name(&sections[5]), b".linux");
        let entry = nt.optional_header.address_of_entry_point.get(LE);
        assert_eq!(sections[0].pe_data_at(file.as_slice(), entry), Some(&UNSUPPORTED[..]));
    }

    #[test]
    fn a_stub_keeps_its_own_sections_and_gets_ours() {
        let kernel = vmlinux();
        let mut stub = append(base().unwrap(), &[(".sbat", b"sbat,1")]).unwrap();
        // A signature that does not fit any more.
        let security = 64 + 24 + 112 + 8 * IMAGE_DIRECTORY_ENTRY_SECURITY;
        stub[security..security + 8].copy_from_slice(&[1; 8]);
        let file = pack(&Packed { stub: Some(&stub), ..whole(&kernel) }).unwrap();
        assert_eq!(file[security..security + 8], [0; 8]);
        let (_, sections) = uki::headers(&file).unwrap();
        let names: Vec<_> =
            sections.iter().map(|section| String::from_utf8_lossy(uki::name(section))).collect();
        assert_eq!(names, [".text", ".sbat", ".osrel", ".cmdline", ".uname", ".initrd", ".linux"]);
        assert_eq!(sections[1].pe_data(file.as_slice()).unwrap(), b"sbat,1");

        let again = pack(&Packed { stub: Some(&file), ..whole(&kernel) }).unwrap_err();
        assert!(matches!(again, PackError::StubFull { name: ".osrel" }), "{again}");
        for bad in [&b"MZ"[..], &kernel, &[]] {
            let error = pack(&Packed { stub: Some(bad), ..whole(&kernel) }).unwrap_err();
            assert!(matches!(error, PackError::Stub), "{error}");
        }
        let mut full = base().unwrap();
        let header = base().unwrap();
        let text = header.windows(5).position(|bytes| bytes == b".text").unwrap();
        full[text + 40..HEADERS_BYTES as usize].fill(1);
        let error = pack(&Packed { stub: Some(&full), ..whole(&kernel) }).unwrap_err();
        assert!(matches!(error, PackError::StubRoom { sections: 5 }), "{error}");
    }

    #[test]
    fn what_is_no_kernel_is_not_packed() {
        let kernel = vmlinux();
        let error = pack(&whole(b"no kernel")).unwrap_err();
        assert!(matches!(error, PackError::Kernel(_)), "{error}");
        let error = pack(&whole(&Elf::bare_metal(0x10_0000, &[0xf4; 32]).build())).unwrap_err();
        assert!(matches!(error, PackError::NotLinux), "{error}");
        let error = pack(&whole(&pack(&whole(&kernel)).unwrap())).unwrap_err();
        assert!(matches!(error, PackError::Kernel(ImageError::Pe)), "{error}");
        let error = pack(&Packed { cmdline: Some("a\nb"), ..whole(&kernel) }).unwrap_err();
        assert!(matches!(error, PackError::CommandLine), "{error}");
    }

    /// `.linux` holds what `pack` itself would not put there.
    fn around(linux: &[u8], others: &[(&'static str, &[u8])]) -> Vec<u8> {
        append(base().unwrap(), &[&[(".linux", linux)], others].concat()).unwrap()
    }

    #[test]
    fn images_that_lie_are_refused() {
        let refused = |file| Bootable::parse(file).expect_err("it lies").to_string();
        let kernel = vmlinux();
        let good = pack(&whole(&kernel)).unwrap();
        assert!(refused(around(&good, &[])).contains("unified kernel image again"));
        assert!(refused(around(&kernel, &[(".cmdline", &[0xff, 0xfe])])).contains(".cmdline is not UTF-8"));
        assert!(refused(good[..good.len() - 0x240].to_vec()).contains("section .linux takes"));
        assert!(refused(base().unwrap()).contains("no Linux kernel"));
        assert!(refused(around(b"", &[])).contains("neither"));
        let mut arm = good;
        arm[64 + 4..64 + 6].copy_from_slice(&0xaa64u16.to_le_bytes());
        assert!(refused(arm).contains("machine 0xaa64"));
    }

    #[test]
    fn of_several_profiles_the_first_counts() {
        let kernel = vmlinux();
        let file = around(&kernel, &[(".cmdline", b"common\n\0")]);
        let profiles: [(&str, &[u8]); 4] =
            [(".profile", b"ID=a"), (".cmdline", b"first"), (".profile", b"ID=b"), (".cmdline", b"second")];
        let cmdline = |sections: &[(&'static str, &[u8])]| {
            // One at a time, since no tool of ours writes a name twice.
            let file = around(&kernel, sections);
            Bootable::parse(file).unwrap().extras.cmdline
        };
        assert_eq!(Bootable::parse(file).unwrap().extras.cmdline.as_deref(), Some("common"));
        assert_eq!(cmdline(&profiles[..2]).as_deref(), Some("first"));
        assert_eq!(cmdline(&profiles).as_deref(), Some("first"));
    }

    #[test]
    fn initial_ram_disks_are_told_by_their_first_bytes() {
        assert_eq!(initrd_format(b"070701xx").as_deref(), Some("cpio"));
        assert_eq!(initrd_format(&[&[0; 4], &b"070701xx"[..]].concat()).as_deref(), Some("cpio"));
        assert_eq!(initrd_format(&[0x28, 0xb5, 0x2f, 0xfd, 0]).as_deref(), Some("zstd"));
        assert_eq!(initrd_format(&[0x1f, 0x8b]).as_deref(), Some("gzip"));
        assert_eq!((initrd_format(b"text"), initrd_format(&[])), (None, None));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Headers changed anywhere and the file cut anywhere: an error, or what is in the file.
        #[test]
        fn damage_never_panics(
            changes in proptest::collection::vec((0usize..HEADERS_BYTES as usize, any::<u8>()), 0..6),
            cut in proptest::option::weighted(0.2, any::<prop::sample::Index>()),
        ) {
            let kernel = vmlinux();
            let mut file = pack(&whole(&kernel)).unwrap();
            for (at, value) in changes {
                file[at] = value;
            }
            if let Some(cut) = cut {
                file.truncate(cut.index(file.len()));
            }
            let size = file.len();
            let packed_again = pack(&Packed { stub: Some(&file), ..whole(&kernel) });
            prop_assert!(packed_again.is_err());
            if let Ok(Bootable { extras, .. }) = Bootable::parse(file) {
                prop_assert!(extras.initrd.is_none_or(|initrd| initrd.len() <= size));
            }
        }

        /// A damaged stub gives an error, or an image that is read again.
        #[test]
        fn a_damaged_stub_never_panics(
            changes in proptest::collection::vec((0usize..0x200, any::<u8>()), 0..6),
        ) {
            let kernel = vmlinux();
            let mut stub = base().unwrap();
            for (at, value) in changes {
                stub[at] = value;
            }
            if let Ok(file) = pack(&Packed { stub: Some(&stub), ..whole(&kernel) }) {
                prop_assert!(Bootable::parse(file).is_ok_and(|bootable| bootable.extras.initrd.is_some()));
            }
        }
    }
}
