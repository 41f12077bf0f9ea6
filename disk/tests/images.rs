//! Images as qemu-img (QEMU 7.2) makes them, sound and damaged.
//!
//! ```text
//! v2-compressed.qcow2   convert -c -o compat=0.10,cluster_size=4k, of the lines that `lines` writes
//! v3-empty.qcow2        create -o cluster_size=4k, 256 KiB
//! stacked.qcow2         create -o cluster_size=4k -b v2-compressed.qcow2 -F qcow2
//! data-file.qcow2       create -o cluster_size=4k,data_file=outside.raw
//! ```

#![allow(clippy::tests_outside_test_module, clippy::unwrap_used)]

use std::error::Error as _;
use std::fs;
use std::path::{Path, PathBuf};

use disk::{Access, Disk, DiskOptions, Format, OpenError, Qcow2Error};
use proptest::prelude::*;
use tempfile::TempDir;

/// What the disks hold.
const BYTES: usize = 256 << 10;

fn lines() -> Vec<u8> {
    (0..BYTES / 16).flat_map(|i| format!("line {i:10}\n").into_bytes()).collect()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/images").join(name)
}

fn options(path: &Path, access: Access) -> DiskOptions {
    DiskOptions { access, ..DiskOptions::new(path.to_owned()) }
}

/// A copy that a test may change.
fn copy(directory: &TempDir, name: &str) -> PathBuf {
    let path = directory.path().join(name);
    fs::copy(fixture(name), &path).unwrap();
    path
}

fn raw(directory: &TempDir) -> PathBuf {
    let path = directory.path().join("raw");
    fs::write(&path, lines()).unwrap();
    path
}

fn content(disk: &Disk) -> Vec<u8> {
    let mut content = vec![0xee; usize::try_from(disk.bytes()).unwrap()];
    disk.read(&mut content, 0).unwrap();
    content
}

#[test]
fn an_overlay_takes_the_writes_and_the_image_stays() {
    let directory = TempDir::new().unwrap();
    for image in [raw(&directory), copy(&directory, "v2-compressed.qcow2")] {
        let before = fs::read(&image).unwrap();
        let mut disk = Disk::open(&options(&image, Access::Overlay)).unwrap();
        assert!(!disk.is_read_only());
        assert_eq!(content(&disk), lines());
        let mut expected = lines();
        disk.write(&[7; 100], 5000).unwrap();
        expected[5000..5100].fill(7);
        disk.write_zeros(70_000, 3).unwrap();
        expected[70_000..70_003].fill(0);
        disk.discard(131_072, 65_536).unwrap();
        expected[131_072..196_608].fill(0);
        disk.flush().unwrap();
        assert!(content(&disk) == expected, "{}", image.display());
        disk.write(&[1], BYTES as u64).unwrap_err();
        drop(disk);
        assert!(fs::read(&image).unwrap() == before, "{} has changed", image.display());
    }
}

#[test]
fn what_is_written_in_place_is_there_at_the_next_opening() {
    let directory = TempDir::new().unwrap();
    for (image, mut expected) in
        [(raw(&directory), lines()), (copy(&directory, "v3-empty.qcow2"), vec![0; BYTES])]
    {
        let mut disk = Disk::open(&options(&image, Access::Write)).unwrap();
        disk.write(&[9; 9000], 1000).unwrap();
        disk.discard(4096, 4096).unwrap();
        expected[1000..10_000].fill(9);
        expected[4096..8192].fill(0);
        disk.flush().unwrap();
        drop(disk);
        let disk = Disk::open(&options(&image, Access::ReadOnly)).unwrap();
        assert!(disk.is_read_only());
        assert!(content(&disk) == expected, "{}", image.display());
        disk.write(&[1], 0).unwrap_err();
    }
}

#[test]
fn an_image_that_is_changed_in_place_has_no_other_user() {
    let directory = TempDir::new().unwrap();
    let image = raw(&directory);
    let reader = Disk::open(&options(&image, Access::ReadOnly)).unwrap();
    let overlay = Disk::open(&options(&image, Access::Overlay)).unwrap();
    let refused = |access| matches!(Disk::open(&options(&image, access)), Err(OpenError::InUse(_)));
    assert!(refused(Access::Write));
    drop((reader, overlay));
    let _writer = Disk::open(&options(&image, Access::Write)).unwrap();
    assert!(refused(Access::Write) && refused(Access::Overlay) && refused(Access::ReadOnly));
}

#[test]
fn no_file_is_opened_that_the_user_has_not_named() {
    let stacked = fixture("stacked.qcow2");
    let error = Disk::open(&options(&stacked, Access::ReadOnly)).unwrap_err();
    assert!(matches!(&error, OpenError::BackingNotGiven { names, .. } if names == "v2-compressed.qcow2"));
    assert!(error.to_string().contains("backing="), "{error}");

    let base = fixture("v2-compressed.qcow2");
    let with = |path: &Path, backing: &[&PathBuf]| {
        Disk::open(&DiskOptions {
            backing: backing.iter().copied().cloned().collect(),
            ..options(path, Access::Overlay)
        })
    };
    let disk = with(&stacked, &[&base]).unwrap();
    assert!(content(&disk) == lines());
    assert_eq!(disk.images(), [(Format::Qcow2, stacked.clone()), (Format::Qcow2, base.clone())]);
    for result in [with(&base, &[&base]), with(&stacked, &[&base, &base])] {
        assert!(matches!(result, Err(OpenError::BackingNotUsed { .. })), "{result:?}");
    }
    let directory = TempDir::new().unwrap();
    let raw = raw(&directory);
    assert!(matches!(with(&raw, &[&base]), Err(OpenError::BackingNotUsed { .. })));
    // The header says that the base is a qcow2 image.
    let error = with(&stacked, &[&raw]).unwrap_err();
    assert!(matches!(error, OpenError::Qcow2 { source: Qcow2Error::Magic, .. }), "{error}");

    let error = Disk::open(&options(&fixture("data-file.qcow2"), Access::ReadOnly)).unwrap_err();
    assert!(matches!(error, OpenError::DataFile(_)), "{error}");
}

#[test]
fn what_is_no_disk_is_refused() {
    let directory = TempDir::new().unwrap();
    let open = |path: &Path| Disk::open(&options(path, Access::ReadOnly)).unwrap_err();
    assert!(matches!(open(directory.path()), OpenError::Kind(_)));
    assert!(matches!(open(Path::new("/dev/null")), OpenError::Kind(_)));
    assert!(matches!(open(&directory.path().join("none")), OpenError::File { .. }));
    let fifo = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(open(&fifo), OpenError::Kind(_)));
    let raw = raw(&directory);
    let qcow2 = Disk::open(&DiskOptions { format: Some(Format::Qcow2), ..options(&raw, Access::Overlay) });
    assert!(matches!(qcow2, Err(OpenError::Qcow2 { source: Qcow2Error::Magic, .. })), "{qcow2:?}");
}

#[test]
fn a_qcow2_image_may_be_taken_for_the_raw_bytes_it_has() {
    let image = fixture("v3-empty.qcow2");
    let raw = DiskOptions { format: Some(Format::Raw), ..options(&image, Access::Overlay) };
    assert!(content(&Disk::open(&raw).unwrap())[..4] == *b"QFI\xfb");
}

#[test]
fn a_disk_of_less_than_a_cluster_keeps_what_is_around_zeros() {
    let directory = TempDir::new().unwrap();
    let image = directory.path().join("raw");
    fs::write(&image, &lines()[..40_960]).unwrap();
    let mut disk = Disk::open(&options(&image, Access::Overlay)).unwrap();
    disk.write_zeros(512, 512).unwrap();
    disk.discard(2048, 512).unwrap();
    let mut expected = lines()[..40_960].to_vec();
    expected[512..1024].fill(0);
    assert!(content(&disk) == expected);
}

#[test]
fn an_image_that_is_cut_short_is_refused_wherever_it_ends() {
    let directory = TempDir::new().unwrap();
    for name in ["v2-compressed.qcow2", "v3-empty.qcow2"] {
        let image = copy(&directory, name);
        let whole = fs::read(&image).unwrap();
        // The last cluster may be short; all of it has to go.
        for end in (4..=whole.len() - 4096).step_by(500) {
            fs::write(&image, &whole[..end]).unwrap();
            let error = Disk::open(&options(&image, Access::Overlay)).unwrap_err();
            let short = matches!(error, OpenError::Qcow2 { source: Qcow2Error::Truncated { .. }, .. });
            assert!(short || end < 8, "{name} with {end} bytes: {error}, {:?}", error.source());
        }
    }
}

#[test]
fn what_a_header_says_wrongly_is_named() {
    let directory = TempDir::new().unwrap();
    let image = copy(&directory, "v3-empty.qcow2");
    let whole = fs::read(&image).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = whole.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&image, changed).unwrap();
        match Disk::open(&options(&image, Access::Overlay)).unwrap_err() {
            OpenError::Qcow2 { source, .. } => source,
            other => panic!("{other}"),
        }
    };
    assert!(matches!(with(4, &4u32.to_be_bytes()), Qcow2Error::Version(4)));
    assert!(matches!(with(32, &1u32.to_be_bytes()), Qcow2Error::Encrypted));
    for (at, value) in [(20, 63u32), (96, 7), (36, u32::MAX), (56, u32::MAX)] {
        assert!(matches!(with(at, &value.to_be_bytes()), Qcow2Error::Header { .. }), "{at}");
    }
}

/// One step of a guest.
#[derive(Clone, Debug)]
enum Step {
    Write(u8),
    Zero,
    Discard,
}

fn steps() -> impl Strategy<Value = Vec<(Step, usize, usize)>> {
    let step = prop_oneof![any::<u8>().prop_map(Step::Write), Just(Step::Zero), Just(Step::Discard)];
    let length = prop_oneof![1usize..600, 1usize..70_000];
    proptest::collection::vec((step, 0..BYTES, length), 1..30)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn a_disk_holds_what_was_written_last(steps in steps(), which in 0usize..4) {
        let directory = TempDir::new().unwrap();
        let (image, access) = match which {
            0 => (raw(&directory), Access::Overlay),
            1 => (copy(&directory, "v2-compressed.qcow2"), Access::Overlay),
            2 => (copy(&directory, "v2-compressed.qcow2"), Access::Write),
            _ => (copy(&directory, "v3-empty.qcow2"), Access::Write),
        };
        let mut disk = Disk::open(&options(&image, access)).unwrap();
        let mut model = content(&disk);
        for (step, at, length) in steps {
            let length = length.min(BYTES - at);
            let range = at..at + length;
            let at = at as u64;
            match step {
                Step::Write(byte) => {
                    disk.write(&vec![byte; length], at).unwrap();
                    model[range].fill(byte);
                }
                Step::Zero => {
                    disk.write_zeros(at, length as u64).unwrap();
                    model[range].fill(0);
                }
                Step::Discard => {
                    disk.discard(at, length as u64).unwrap();
                    // What cannot be given back stays.
                    let now = content(&disk);
                    prop_assert!(now[range.clone()].iter().zip(&model[range.clone()]).all(|(now, was)| *now == 0 || now == was));
                    model[range.clone()].copy_from_slice(&now[range]);
                }
            }
        }
        prop_assert!(content(&disk) == model);
        if access == Access::Write {
            disk.flush().unwrap();
            drop(disk);
            prop_assert!(content(&Disk::open(&options(&image, Access::ReadOnly)).unwrap()) == model);
        }
    }

    #[test]
    fn a_damaged_image_gives_errors_or_nonsense_and_no_panic(
        damage in proptest::collection::vec((0usize..53_000, any::<u8>()), 1..40),
        header in proptest::collection::vec((0usize..112, any::<u8>()), 0..3),
        write in any::<bool>(),
        name in prop_oneof![Just("v2-compressed.qcow2"), Just("v3-empty.qcow2")],
    ) {
        let directory = TempDir::new().unwrap();
        let image = copy(&directory, name);
        let mut bytes = fs::read(&image).unwrap();
        for (at, byte) in damage.into_iter().chain(header) {
            let length = bytes.len();
            bytes[at % length] = byte;
        }
        fs::write(&image, bytes).unwrap();
        let access = if write { Access::Write } else { Access::Overlay };
        if let Ok(mut disk) = Disk::open(&options(&image, access)) {
            let mut buffer = vec![0; 65536];
            for at in (0..disk.bytes().min(1 << 20)).step_by(65536) {
                disk.read(&mut buffer, at).ok();
                disk.write(&buffer[..3000], at).ok();
                disk.discard(at, 9000).ok();
            }
            disk.flush().ok();
        }
    }
}
