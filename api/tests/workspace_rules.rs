//! The rules of the house: which crate may depend on which, where tokio may appear, and which licences may come in, checked on
//! the resolved dependency graph; and that every test exists which a document names as proof.

#![allow(clippy::tests_outside_test_module)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
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
    ("disk", &[]),
    ("guest", &["probe-core", "disk"]),
    ("matrix", &[]),
    ("vmm", &["probe-core", "disk"]),
    ("nested", &["guest", "disk"]),
    ("api", &["probe-core", "disk", "guest", "matrix", "vmm", "nested"]),
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
        if !["probe-core", "disk", "guest", "vmm", "nested"].contains(name) {
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

/// All Rust files below a directory.
fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).expect("a directory of the workspace");
    let mut files = Vec::new();
    for path in entries.map(|entry| entry.expect("an entry").path()) {
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The tests of a crate: in which file (without its ending) or directory, and by what name.
fn tests_of(crate_directory: &Path) -> BTreeSet<(String, String)> {
    let mut tests = BTreeSet::new();
    for path in rust_files(crate_directory) {
        let text = fs::read_to_string(&path).expect("a source file");
        let relative = path.strip_prefix(crate_directory).expect("below it").with_extension("");
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line == "#[test]" {
                is_test = true;
            } else if let Some(rest) = line.strip_prefix("fn ").filter(|_| is_test) {
                let name = rest.split('(').next().unwrap_or_default().to_owned();
                let places = relative.iter().map(|part| part.to_string_lossy().into_owned());
                tests.extend(places.map(|place| (place, name.clone())));
                is_test = false;
            } else if !line.starts_with("#[") && !line.is_empty() {
                is_test = false;
            }
        }
    }
    tests
}

/// `crate::file::name` in a cell of a table.
fn named_tests(cell: &str) -> impl Iterator<Item = (&str, &str, &str)> {
    cell.split('`').skip(1).step_by(2).map(|span| {
        let mut parts = span.splitn(3, "::");
        let mut part = || parts.next().unwrap_or_default();
        (part(), part(), part())
    })
}

#[test]
fn every_property_of_kprobes_has_its_test_or_says_that_it_has_not() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let document = fs::read_to_string(root.join("docs/kprobes.md")).expect("the document");
    let mut crates = BTreeMap::new();
    let rows = document.lines().filter(|line| line.starts_with('|') && !line.starts_with("|---"));
    let (mut proven, mut open) = (0, 0);
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").map(str::trim).collect();
        let [_, here, tests] = cells[..] else { panic!("Not three cells: {row}") };
        if (here, tests) == ("here", "test") {
            continue;
        }
        let named: Vec<_> = named_tests(tests).collect();
        for (crate_name, file, name) in &named {
            let known = crates.entry(*crate_name).or_insert_with(|| tests_of(&root.join(crate_name)));
            let test = ((*file).to_owned(), (*name).to_owned());
            assert!(known.contains(&test), "There is no test {crate_name}::{file}::{name}, named in: {row}");
        }
        let says_so = here.contains("*Not yet:*") || here.contains("Does not arise");
        assert!(!named.is_empty() || says_so, "Neither a test nor a reason: {row}");
        if named.is_empty() { open += 1 } else { proven += 1 }
    }
    println!("{proven} rows with a test, {open} without");
    assert!(proven > 100 && open < proven / 10);
}
