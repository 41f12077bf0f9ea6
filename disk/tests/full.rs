//! A host without room for an overlay. In a process of its own: the limit is one of the process.

#![allow(clippy::tests_outside_test_module, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use disk::{Disk, DiskOptions};
use rustix::process::{Resource, Rlimit, setrlimit};

#[test]
fn an_overlay_without_room_keeps_what_it_has_and_goes_on_later() {
    let directory = tempfile::TempDir::new().unwrap();
    let image = directory.path().join("raw");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let disk = Disk::open(&DiskOptions::new(image)).unwrap();
    disk.write(&[1; 1 << 20], 0).unwrap();

    // A write beyond the limit also raises a signal, which would end the process.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::<AtomicBool>::default()).unwrap();
    let limit = |bytes| setrlimit(Resource::Fsize, Rlimit { current: bytes, maximum: None }).unwrap();
    limit(Some(2 << 20));
    let refused = (1..64u64).filter(|mib| disk.write(&[2; 1 << 20], mib << 20).is_err()).count();
    assert!(refused >= 61, "{refused}");
    let mut buffer = vec![0; 1 << 20];
    disk.read(&mut buffer, 0).unwrap();
    assert!(buffer.iter().all(|byte| *byte == 1));

    limit(None);
    for mib in 1..64u64 {
        disk.write(&[3; 1 << 20], mib << 20).unwrap();
    }
    for mib in 0..64u64 {
        disk.read(&mut buffer, mib << 20).unwrap();
        let expected = if mib == 0 { 1 } else { 3 };
        assert!(buffer.iter().all(|byte| *byte == expected), "MiB {mib}");
    }
}
