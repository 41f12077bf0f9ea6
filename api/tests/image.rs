//! `vmprobe image`: one file out of a kernel, an initial RAM disk and a command line; what it is; and booting it.

#![allow(clippy::tests_outside_test_module)]

mod common;

use std::process::Command;

use common::debian::{Debian, path};
use common::{assert_code, guest_counts, hits, output, stderr, stdout};
use serde_json::Value;

/// What `vmprobe image info` tells of a file.
fn info(image: &str) -> Value {
    let told = output(&["image", "info", image, "--output", "json"]);
    assert_code(&told, 0);
    serde_json::from_str(&stdout(&told)).expect("one JSON object")
}

#[test]
fn a_built_in_guest_is_told_too() {
    let told = info("demo");
    assert_eq!(told["kind"], "bare-metal ELF program");
    assert_eq!((&told["initrd"], &told["types"]), (&Value::Null, &Value::Null));
    assert!(told["symbols"]["code"].as_u64() > Some(100), "{told}");
    let text = output(&["image", "info", "ticker"]);
    assert_code(&text, 0);
    assert!(stdout(&text).contains("ELF symbol table"), "{}", stdout(&text));
}

#[test]
fn what_cannot_be_packed_leaves_no_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = path(&directory.path().join("guest.img"));
    let own = path(std::path::Path::new(env!("CARGO_BIN_EXE_vmprobe")));
    for (kernel, why) in
        [(own.as_str(), "not position-independent"), ("/nonexistent", "--kernel /nonexistent")]
    {
        let refused = output(&["image", "pack", "--kernel", kernel, "--output", &image]);
        assert_code(&refused, 4);
        assert!(stderr(&refused).contains(why), "{}", stderr(&refused));
    }
    assert_eq!(std::fs::read_dir(directory.path()).expect("it is there").count(), 0);
}

#[test]
fn a_packed_guest_img_boots_and_is_probed_with_no_other_file_and_no_command_line() {
    let Some(debian) = Debian::new() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let image = path(&directory.path().join("guest.img"));
    let packed = ["image", "pack", "--kernel", &debian.kernel, "--initrd", &debian.initrd];
    let packed = |to: &str| output(&[&packed[..], &["--cmdline", "quiet", "--output", to]].concat());
    assert_code(&packed(&image), 0);
    let again = path(&directory.path().join("again.img"));
    assert_code(&packed(&again), 0);
    assert!(std::fs::read(&image).expect("it is there") == std::fs::read(&again).expect("it is there"));

    let told = info(&image);
    assert_eq!((&told["kind"], &told["boot"]["cmdline"]), (&"unified kernel image".into(), &"quiet".into()));
    assert_eq!(told["kernel"], info(&debian.kernel)["kernel"]);
    assert_eq!(told["initrd"]["format"], "cpio");
    assert!(told["types"].as_u64() > Some(10_000) && told["symbols"]["source"] == "kallsyms", "{told}");
    // Other tools take the file for what it is.
    if let Ok(sections) = Command::new("objdump").args(["-h", &image]).output() {
        for section in [".cmdline", ".initrd", ".linux", ".uname"] {
            assert!(stdout(&sections).contains(section), "{sections:?}");
        }
    }

    let run = output(&[
        "run",
        &image,
        "--accel",
        "nested",
        "--probe",
        "__x64_sys_getppid",
        "--output",
        "json",
        "--timeout",
        "5m",
    ]);
    assert_code(&run, 0);
    let counted = guest_counts(&stderr(&run));
    assert_eq!(hits(&stdout(&run))["__x64_sys_getppid"], counted["getppid"]);
}

#[test]
fn a_disks_own_kernel_and_initrd_are_booted_and_probed() {
    let Some(debian) = Debian::new() else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let root = directory.path().join("root");
    std::fs::create_dir_all(root.join("boot")).expect("a directory");
    std::fs::create_dir_all(root.join("loader/entries")).expect("a directory");
    std::fs::copy(&debian.kernel, root.join("boot/linux")).expect("the kernel");
    std::fs::copy(&debian.initrd, root.join("boot/initrd")).expect("the initrd");
    let entry = "title Stock\nlinux /boot/linux\ninitrd /boot/initrd\noptions quiet\n";
    std::fs::write(root.join("loader/entries/stock.conf"), entry).expect("the entry");
    let disk = directory.path().join("disk.img");
    std::fs::File::create(&disk).and_then(|file| file.set_len(64 << 20)).expect("the disk");
    let made = Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-d"]).arg(&root).arg(&disk).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfs.ext4; `make setup` installs it");

    let disk = path(&disk);
    let told = info(&disk);
    assert_eq!((&told["kind"], &told["disk"]["entries"][0]["title"]), (&"disk".into(), &"Stock".into()));
    assert_eq!(told["kernel"], info(&debian.kernel)["kernel"]);
    let probe = ["--probe", "__x64_sys_getppid", "--output", "json"];
    let run = output(&[&["run", "--timeout", "5m", &disk, "--accel", "nested"], &probe[..]].concat());
    assert_code(&run, 0);
    assert_eq!(hits(&stdout(&run))["__x64_sys_getppid"], guest_counts(&stderr(&run))["getppid"]);
}
