use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::image::ImageKind;
use crate::image::pack::{Packed, pack};
use crate::testing::Kernel as Synthetic;

const MIB: usize = 1 << 20;
const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
const LINUX: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";
const ROOT: &str = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709";

fn vmlinux() -> Vec<u8> {
    let mut kernel = Synthetic::default();
    kernel.function("startup_64", &[0x90, 0xc3]);
    kernel.build()
}

/// Whether the tools that make file systems are here; in CI they are to be.
fn tools() -> bool {
    let missing = ["mkfs.ext4", "mkfs.vfat", "mcopy"].into_iter().find(|tool| {
        let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
        !std::env::split_paths(&path).any(|directory| directory.join(tool).exists())
    });
    let Some(missing) = missing else { return true };
    assert!(
        std::env::var_os("CI").is_none_or(|ci| ci != "true"),
        "{missing} is required in CI; `make setup` installs it"
    );
    println!("skipped: {missing} is missing; `make setup` installs it");
    false
}

fn run(command: &mut Command) {
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = command.env("PATH", path).env("MTOOLS_SKIP_CHECK", "1").output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A tree of files, by their paths; one whose content begins with "->" is a symbolic link.
fn tree(at: &Path, files: &[(&str, &[u8])]) {
    for (path, content) in files {
        let path = at.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        match content.strip_prefix(b"->") {
            Some(target) => {
                std::os::unix::fs::symlink(String::from_utf8_lossy(target).as_ref(), path).unwrap()
            }
            None => std::fs::write(path, content).unwrap(),
        }
    }
}

/// An ext4 file system with these files.
fn ext4(files: &[(&str, &[u8])]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (root, image) = (directory.path().join("root"), directory.path().join("ext4"));
    std::fs::create_dir(&root).unwrap();
    tree(&root, files);
    std::fs::File::create(&image).unwrap().set_len(4 * MIB as u64).unwrap();
    let uuid = "11111111-2222-3333-4444-555555555555";
    run(Command::new("mkfs.ext4").args(["-q", "-U", uuid, "-d"]).arg(&root).arg(&image));
    std::fs::read(&image).unwrap()
}

/// A FAT file system with these files.
fn fat(files: &[(&str, &[u8])]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (root, image) = (directory.path().join("root"), directory.path().join("fat"));
    std::fs::create_dir(&root).unwrap();
    tree(&root, files);
    std::fs::File::create(&image).unwrap().set_len(5 * MIB as u64).unwrap();
    run(Command::new("mkfs.vfat").args(["-F", "16", "-s", "1", "-i", "abcd1234"]).arg(&image));
    for entry in std::fs::read_dir(&root).unwrap() {
        run(Command::new("mcopy").args(["-s", "-i"]).arg(&image).arg(entry.unwrap().path()).arg("::/"));
    }
    std::fs::read(&image).unwrap()
}

fn guid_bytes(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(|digit| *digit != '-').collect();
    let mut bytes: [u8; 16] = hex_bytes(&digits).try_into().unwrap();
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

fn hex_bytes(digits: &str) -> Vec<u8> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

/// A disk with a GPT, its partitions by type and content, and the backup at its end.
fn gpt(sector: usize, partitions: &[(&str, &[u8])]) -> Vec<u8> {
    let mut disk = vec![0; MIB];
    let mut entries = vec![0; 128 * 128];
    for (index, (kind, content)) in partitions.iter().enumerate() {
        let entry = &mut entries[index * 128..][..128];
        entry[..16].copy_from_slice(&guid_bytes(kind));
        entry[16..32].fill(u8::try_from(index + 1).unwrap());
        let first = disk.len() / sector;
        disk.extend_from_slice(content);
        disk.resize(disk.len().next_multiple_of(MIB), 0);
        entry[32..40].copy_from_slice(&(first as u64).to_le_bytes());
        entry[40..48].copy_from_slice(&(disk.len() as u64 / sector as u64 - 1).to_le_bytes());
    }
    disk.resize(disk.len() + MIB, 0);
    let last = disk.len() / sector - 1;
    let entries_sectors = entries.len() / sector;
    for (lba, entries_lba) in [(1, 2), (last, last - entries_sectors)] {
        let mut header = vec![0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&[0, 0, 1, 0]);
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&(lba as u64).to_le_bytes());
        header[72..80].copy_from_slice(&(entries_lba as u64).to_le_bytes());
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
        let crc = crc32fast::hash(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        disk[lba * sector..][..92].copy_from_slice(&header);
        disk[entries_lba * sector..][..entries.len()].copy_from_slice(&entries);
    }
    // The protective MBR.
    disk[446 + 4] = 0xee;
    disk[446 + 8..446 + 16].copy_from_slice(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

fn mbr_record(disk: &mut [u8], at: usize, entries: &[(u8, u32, u32)]) {
    for (index, (kind, start, sectors)) in entries.iter().enumerate() {
        let entry = &mut disk[at + 446 + 16 * index..][..16];
        entry[4] = *kind;
        entry[8..12].copy_from_slice(&start.to_le_bytes());
        entry[12..16].copy_from_slice(&sectors.to_le_bytes());
    }
    disk[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
}

fn booted(disk: Vec<u8>) -> (Bootable, DiskFacts) {
    assert!(is_disk(&disk[..HEAD_BYTES.min(disk.len())]));
    let bootable = open(Arc::new(disk)).unwrap();
    let Some(Container::Disk(facts)) = bootable.extras.container.clone() else { panic!("a disk") };
    (bootable, facts)
}

fn refused(disk: Vec<u8>) -> String {
    let error = open(Arc::new(disk)).expect_err("nothing to boot");
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn the_newest_entry_of_an_esp_is_booted_with_its_files_and_options() {
    if !tools() {
        return;
    }
    let kernel = vmlinux();
    let old = b"title Old\nversion 6.1.9\nsort-key debian\nlinux /old/linux\noptions root=LABEL=old\n";
    let new = b"title New\nversion 6.1.10\nsort-key debian\nlinux /debian/6.1.10/linux\ninitrd /debian/a\n\
                initrd /debian/b\noptions quiet\n";
    let esp = fat(&[
        ("loader/entries/debian-6.1.9.conf", old),
        ("loader/entries/debian-6.1.10.conf", new),
        ("debian/6.1.10/linux", &kernel),
        ("debian/a", b"070701"),
        ("debian/b", b"second"),
    ]);
    let system = ext4(&[("etc/os-release", b"ID=x")]);
    for sector in [512, 4096] {
        let (bootable, facts) = booted(gpt(sector, &[(ESP, &esp), (LINUX, &system)]));
        assert_eq!((bootable.kernel.kind, bootable.kernel.data()), (ImageKind::Vmlinux, &kernel[..]));
        assert_eq!(bootable.extras.initrd.as_deref(), Some(&b"070701\0\0second"[..]));
        let root = "root=PARTUUID=02020202-0202-0202-0202-020202020202";
        assert_eq!(bootable.extras.cmdline.as_deref(), Some(format!("{root} quiet").as_str()));
        assert_eq!((facts.table, facts.root.as_deref()), ("GPT", Some(root)));
        let menu: Vec<_> = facts.menu.iter().map(|entry| entry.title.as_deref().unwrap()).collect();
        assert_eq!(menu, ["New", "Old"]);
        assert_eq!(facts.kernel, "/debian/6.1.10/linux (vfat on partition 1)");
        assert_eq!(facts.places[0].partition.as_ref().unwrap().kind, PartitionKind::Esp);
        assert_eq!(facts.places[0].uuid.as_deref(), Some("ABCD-1234"));
        assert_eq!(facts.places[1].uuid.as_deref(), Some("11111111-2222-3333-4444-555555555555"));
    }
}

#[test]
fn a_unified_kernel_image_on_the_esp_is_an_entry() {
    if !tools() {
        return;
    }
    let kernel = vmlinux();
    let uki = |version: &str| {
        let release = format!("ID=debian\nVERSION_ID={version}\nPRETTY_NAME=\"Debian {version}\"\n");
        let what = Packed {
            kernel: &kernel,
            initrd: Some(b"070701"),
            cmdline: Some("rw root=LABEL=x"),
            os_release: Some(&release),
            stub: None,
        };
        pack(&what).unwrap()
    };
    let esp = fat(&[
        ("EFI/Linux/a.efi", &uki("12")),
        ("EFI/Linux/b+0-3.efi", &uki("14")),
        ("EFI/Linux/c.efi", &uki("13")),
    ]);
    let (bootable, facts) = booted(gpt(512, &[(ESP, &esp)]));
    assert_eq!(facts.menu[0].title.as_deref(), Some("Debian 13"), "14 has no tries left");
    assert_eq!(bootable.extras.cmdline.as_deref(), Some("rw root=LABEL=x"));
    assert_eq!(bootable.extras.initrd.as_deref(), Some(&b"070701"[..]));
    assert_eq!(facts.root, None, "the image names it");
}

#[test]
fn a_debian_root_without_a_menu_is_booted_by_its_newest_kernel() {
    if !tools() {
        return;
    }
    let kernel = vmlinux();
    let files: &[(&str, &[u8])] = &[
        ("boot/vmlinuz-6.1.0-9-amd64", b"older"),
        ("boot/vmlinuz-6.1.0-10-amd64", &kernel),
        ("boot/vmlinuz-0-rescue-abc", b"rescue"),
        ("boot/initrd.img-6.1.0-10-amd64", b"->initrd.real"),
        ("boot/initrd.real", b"070701"),
        ("vmlinuz", b"->boot/vmlinuz-6.1.0-9-amd64"),
        ("etc/fstab", b""),
    ];
    let system = ext4(files);
    let (bootable, facts) = booted(gpt(512, &[(ROOT, &system)]));
    assert_eq!(bootable.kernel.data(), kernel);
    assert_eq!(bootable.extras.initrd.as_deref(), Some(&b"070701"[..]));
    assert_eq!(facts.root.as_deref(), Some("root=PARTUUID=01010101-0101-0101-0101-010101010101"));

    // The file system alone, as the whole disk.
    let (bootable, facts) = booted(system.clone());
    assert_eq!(
        (facts.table, facts.kernel.as_str()),
        ("none", "/boot/vmlinuz-6.1.0-10-amd64 (ext4 on the whole disk)")
    );
    assert_eq!(bootable.extras.cmdline.as_deref(), Some("root=UUID=11111111-2222-3333-4444-555555555555"));

    // In a logical partition.
    let sectors = u32::try_from(system.len() / 512).unwrap();
    let mut disk = vec![0; 2 * MIB];
    mbr_record(&mut disk, 0, &[(0x05, 2048, sectors + 2048)]);
    mbr_record(&mut disk, MIB, &[(0x83, 2048, sectors)]);
    disk[440..444].copy_from_slice(&0xdead_beef_u32.to_le_bytes());
    disk.extend(&system);
    let (_, facts) = booted(disk);
    assert_eq!((facts.table, facts.root.as_deref()), ("MBR", Some("root=PARTUUID=deadbeef-05")));
}

#[test]
fn without_an_initrd_the_kernel_has_to_find_the_disk_itself() {
    if !tools() {
        return;
    }
    let kernel = vmlinux();
    let (bootable, _) = booted(ext4(&[("boot/vmlinuz-6.1", &kernel), ("etc/fstab", b"")]));
    assert_eq!(bootable.extras.cmdline.as_deref(), Some("root=/dev/vda"));
}

#[test]
fn what_cannot_be_booted_is_told_by_name() {
    let part = |at: usize, magic: &[u8]| {
        let mut content = vec![0; MIB];
        content[at..at + magic.len()].copy_from_slice(magic);
        content
    };
    let xfs = part(0, b"XFSB");
    let btrfs = part(0x1_0040, b"_BHRfS_M");
    let text = refused(gpt(512, &[(LINUX, &xfs), (ROOT, &btrfs)]));
    for expected in ["xfs on partition 1", "btrfs on partition 2", "--initrd"] {
        assert!(text.contains(expected), "{text}");
    }
    assert!(is_disk(&xfs) && refused(xfs).contains("xfs on the whole disk"));
    let broken = part(0x438, &[0x53, 0xef]);
    assert!(refused(gpt(512, &[(LINUX, &broken)])).contains("ext4 on partition 1: cannot be read"));
    assert!(refused(gpt(512, &[])).contains("no partition"));
    for kernel in [&vmlinux()[..], b"MZ", b"text", &[]] {
        assert!(!is_disk(kernel));
    }
}

#[test]
fn an_entry_that_names_nothing_is_told() {
    if !tools() {
        return;
    }
    let esp = fat(&[("loader/entries/a.conf", b"linux /gone")]);
    let text = refused(gpt(512, &[(ESP, &esp)]));
    assert!(text.contains("The boot entry a names /gone"), "{text}");
}

#[test]
fn tables_that_lie_are_refused() {
    let good = gpt(512, &[(LINUX, &[0; MIB])]);
    assert!(refused(good[..MIB].to_vec()).contains("Partition 1 reaches beyond"));
    let mut primary = good.clone();
    primary[512 + 40] ^= 1;
    assert!(table::read(&primary).unwrap().is_some(), "the backup will do");
    let last = primary.len() - 512;
    primary[last + 40] ^= 1;
    assert!(refused(primary).contains("backup too"));
    let mut looping = vec![0; 2 * MIB];
    mbr_record(&mut looping, 0, &[(0x05, 2048, 1000)]);
    mbr_record(&mut looping, MIB, &[(0, 0, 0), (0x05, 0, 10)]);
    assert_eq!(table::read(&looping).unwrap(), Some(Table::Mbr(Vec::new())));
    mbr_record(&mut looping, 0, &[(0x83, u32::MAX, u32::MAX)]);
    assert!(refused(looping).contains("Partition 1 reaches beyond"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bytes changed where tables and file systems have their structures: an error, or something to boot.
    #[test]
    fn damage_never_panics(
        which in 0usize..4,
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..0x1000, any::<u8>()), 1..24),
        cut in proptest::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        static DISKS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
        let disks = DISKS.get_or_init(|| {
            let kernel = vmlinux();
            let mut disks = vec![gpt(512, &[(LINUX, &[0; MIB])])];
            if tools() {
                let files: &[(&str, &[u8])] =
                    &[("boot/vmlinuz-6.1", &kernel), ("loader/entries/a-long-name.conf", b"linux /boot/vmlinuz-6.1"), ("etc/fstab", b"")];
                let (ext4, fat) = (ext4(files), fat(files));
                disks.extend([gpt(512, &[(ESP, &fat), (LINUX, &ext4)]), ext4, fat]);
            }
            disks
        });
        let mut disk = disks[which % disks.len()].clone();
        // Pages that are not empty, the first ones preferred.
        let pages: Vec<usize> = (0..disk.len()).step_by(0x1000).filter(|at| disk[*at..*at + 0x1000].iter().any(|byte| *byte != 0)).collect();
        for (page, offset, value) in changes {
            disk[pages[page.index(pages.len())] + offset] = value;
        }
        if let Some(cut) = cut {
            disk.truncate(cut.index(disk.len()));
        }
        let _ = is_disk(&disk[..HEAD_BYTES.min(disk.len())]);
        if let Ok(bootable) = open(Arc::new(disk)) {
            prop_assert!(bootable.extras.initrd.is_none_or(|initrd| initrd.len() <= MAX_INITRDS));
        }
    }
}
