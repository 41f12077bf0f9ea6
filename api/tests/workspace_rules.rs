//! The rules of the house, checked on the resolved dependency graph: which crate may depend on which, where tokio may
//! appear, and which licences may come in.

#![allow(clippy::tests_outside_test_module)]

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Licences that go with Apache-2.0 OR MIT. A package must offer one of these.
const LICENCES: &[&str] = &[
    "MIT",
    "Apache-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "Zlib",
    "ISC",
    "Unlicense",
    "Unicode-3.0",
    "BSL-1.0",
    "bzip2-1.0.6",
];

/// Who may use whom among our own crates.
const MAY_USE: &[(&str, &[&str])] = &[
    ("probe-core", &[]),
    ("guest", &["probe-core"]),
    ("vmm", &["probe-core"]),
    ("nested", &["guest"]),
    ("api", &["probe-core", "guest", "vmm", "nested"]),
    ("campaign", &["probe-core", "vmm", "nested"]),
];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline", "--filter-platform"])
        .arg("x86_64-unknown-linux-gnu")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

#[test]
fn crates_depend_one_way() {
    let metadata = metadata();
    let ours: BTreeSet<&str> = MAY_USE.iter().map(|(name, _)| *name).collect();
    let mut seen = BTreeSet::new();
    for package in list(&metadata["packages"]).filter(|package| package["source"].is_null()) {
        let name = text(package, "name");
        let (_, allowed) = MAY_USE.iter().find(|(ours, _)| *ours == name).expect("every crate has a rule");
        seen.insert(name);
        for dependency in list(&package["dependencies"]).filter(|one| text(one, "kind") != "dev") {
            let used = text(dependency, "name");
            assert!(!ours.contains(used) || allowed.contains(&used), "{name} must not use {used}");
        }
    }
    assert_eq!(seen, ours);
}

#[test]
fn tokio_stays_in_api() {
    let metadata = metadata();
    let names: BTreeMap<&str, &str> =
        list(&metadata["packages"]).map(|package| (text(package, "id"), text(package, "name"))).collect();
    let uses: BTreeMap<&str, Vec<&str>> = list(&metadata["resolve"]["nodes"])
        .map(|node| (text(node, "id"), list(&node["dependencies"]).filter_map(Value::as_str).collect()))
        .collect();
    for (id, name) in &names {
        if !["probe-core", "guest", "vmm", "nested"].contains(name) {
            continue;
        }
        let mut reached = BTreeSet::new();
        let mut open = vec![*id];
        while let Some(next) = open.pop() {
            if reached.insert(next) {
                open.extend(uses.get(next).into_iter().flatten());
            }
        }
        assert!(!reached.iter().any(|id| names[id] == "tokio"), "{name} reaches tokio");
    }
}

#[test]
fn every_licence_is_permissive() {
    for package in list(&metadata()["packages"]) {
        let licence = text(package, "license");
        // `A AND B` must be fine in every part, `A OR B` (also written `A/B`) in one.
        let fine = licence.replace('/', " OR ").replace(['(', ')'], "").split(" AND ").all(|part| {
            part.split(" OR ").any(|one| LICENCES.contains(&one.split(" WITH ").next().unwrap_or(one).trim()))
        });
        assert!(fine, "{} has licence {licence:?}", text(package, "name"));
    }
}
