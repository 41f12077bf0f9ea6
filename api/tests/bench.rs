//! `vmprobe bench` on the local /dev/kvm.

#![allow(clippy::tests_outside_test_module)]

mod common;

use common::{assert_code, bench_rows, local_kvm, output, stdout};

#[test]
fn each_case_has_its_exits_and_no_ioctl_but_those_of_the_run() {
    if !local_kvm() {
        return;
    }
    let run = output(&["bench", "--accel", "kvm", "--turns", "20", "--output", "json"]);
    assert_code(&run, 0);
    let rows = bench_rows(&stdout(&run));
    let expected = [
        ("plain", 0.0),
        ("port", 1.0),
        ("emulated", 1.0),
        ("filtered", 1.0),
        ("stepped", 2.0),
        ("returned", 2.0),
    ];
    for (case, exits) in expected {
        let row = &rows[case];
        assert_eq!((row["exits"].as_f64(), row["ioctls"].as_f64()), (Some(exits), Some(0.0)), "{case}");
        assert!(row["ns"].as_f64().is_some_and(|ns| ns.is_finite()), "{row}");
    }
    assert_eq!(rows["port"]["ratio"], 1.0);
    assert_eq!(rows["plain"].get("ratio"), None);
    for case in ["emulated", "filtered", "stepped", "returned"] {
        assert_eq!(rows[case]["lost"], 0, "{case}");
    }
    // A machine without probes is no other with an engine than without; a busy host makes the one turn or the other slower.
    let idle = rows["idle"]["ratio"].as_f64().expect("a ratio");
    assert!((0.5..2.0).contains(&idle), "{idle}");
}

#[test]
fn the_table_is_for_people() {
    if !local_kvm() {
        return;
    }
    let run = output(&["bench", "--accel", "kvm", "--turns", "5"]);
    assert_code(&run, 0);
    let text = stdout(&run);
    for word in ["KVM alone", "5 turns", "exits", "ioctls", "emulated", "stepped", "idle loop"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}
