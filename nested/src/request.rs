//! The command that is run in the machine, as the initramfs carries it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Directory of everything of ours in the machine's file system; hidden, so that no user's path is likely to be below it.
pub(crate) const HOME: &str = "/.vmprobe";
/// The vmprobe executable.
pub(crate) const PROGRAM: &str = "/.vmprobe/vmprobe";
/// The [`Request`].
pub(crate) const REQUEST: &str = "/.vmprobe/request.json";
/// The shared objects of the executable.
pub(crate) const LIBRARIES: &str = "/.vmprobe/lib";

/// A set of environment variables whose setting changes what vmprobe prints; `*` stands at the end only.
const PASSED_VARIABLES: [&str; 10] = [
    "RUST_LOG",
    "RUST_BACKTRACE",
    "NO_COLOR",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "COLUMNS",
    "TERM",
    "LANG",
    "LC_*",
    "VMPROBE_*",
];

/// What process 1 of the machine does.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(crate) struct Request {
    /// Kernel modules to load, in order: paths in the machine.
    pub(crate) modules: Vec<String>,
    /// The command's `argv[0]`.
    pub(crate) name: OsString,
    /// The command's other arguments.
    pub(crate) arguments: Vec<OsString>,
    /// Its environment, besides what process 1 sets.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// Its working directory, absolute.
    pub(crate) directory: OsString,
    /// Files that it reads: absolute paths; the contents are at [`input_path`] of their index.
    pub(crate) inputs: Vec<OsString>,
    /// Files that it writes: absolute paths; sent to the host when it has ended, if they exist.
    pub(crate) outputs: Vec<OsString>,
    /// Its standard input is carried to it; otherwise it has none.
    pub(crate) stdin: bool,
}

/// Where the initramfs has the contents of an input.
pub(crate) fn input_path(index: usize) -> String {
    format!("{HOME}/input/{index}")
}

/// Whether an environment variable of the host's vmprobe is passed into the machine.
pub(crate) fn is_passed(name: &OsStr) -> bool {
    PASSED_VARIABLES.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => name.as_bytes().starts_with(prefix.as_bytes()),
        None => name == *pattern,
    })
}

/// Where a file of the user's is in the machine; None where the machine's kernel has its own files.
pub(crate) fn usable_place(directory: &Path, path: &Path) -> Option<PathBuf> {
    Some(place(directory, path)).filter(|place| is_usable(place))
}

/// `path` as an absolute path without `.` and `..`, seen from `directory`. The machine has no symbolic links of the host's.
fn place(directory: &Path, path: &Path) -> PathBuf {
    let mut place = PathBuf::from("/");
    for component in directory.join(path).components() {
        match component {
            Component::Normal(name) => place.push(name),
            Component::ParentDir => {
                place.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    place
}

/// Whether a file can be put there in the machine: not where the kernel's own file systems are.
fn is_usable(place: &Path) -> bool {
    !["/proc", "/sys", HOME].iter().any(|own| place.starts_with(own)) && place.file_name().is_some()
}

/// The same command line for the machine, where KVM works: `--accel` gets the value `kvm`.
///
/// `arguments` are those behind the program's name. Everything behind `--` is left alone.
#[must_use]
pub fn inner_arguments(arguments: &[OsString]) -> Vec<OsString> {
    let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    let (options, operands) = arguments.split_at(end);
    let mut inner = Vec::with_capacity(arguments.len() + 2);
    let mut options = options.iter();
    while let Some(option) = options.next() {
        if option == "--accel" {
            // Its value, replaced below.
            options.next();
        } else if !option.as_bytes().starts_with(b"--accel=") {
            inner.push(option.clone());
        }
    }
    inner.push("--accel".into());
    inner.push("kvm".into());
    inner.extend_from_slice(operands);
    inner
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inner(arguments: &[&str]) -> Vec<OsString> {
        inner_arguments(&arguments.iter().map(OsString::from).collect::<Vec<_>>())
    }

    #[test]
    fn the_accelerator_is_kvm_whatever_it_was() {
        assert_eq!(inner(&["run", "image"]), ["run", "image", "--accel", "kvm"]);
        assert_eq!(inner(&["run", "--accel", "nested", "image"]), ["run", "image", "--accel", "kvm"]);
        assert_eq!(inner(&["run", "--accel=auto", "image"]), ["run", "image", "--accel", "kvm"]);
        assert_eq!(inner(&["run", "--accel"]), ["run", "--accel", "kvm"]);
    }

    #[test]
    fn operands_stay_operands() {
        assert_eq!(inner(&["run", "--", "--accel=x"]), ["run", "--accel", "kvm", "--", "--accel=x"]);
    }

    #[test]
    fn paths_are_made_absolute_without_the_hosts_links() {
        let at = |path: &str| place(Path::new("/home/me"), Path::new(path));
        assert_eq!(at("a/./b"), Path::new("/home/me/a/b"));
        assert_eq!(at("../x"), Path::new("/home/x"));
        assert_eq!(at("../../../../x"), Path::new("/x"));
        assert_eq!(at("/boot/vmlinuz"), Path::new("/boot/vmlinuz"));
    }

    #[test]
    fn the_kernels_file_systems_are_out_of_bounds() {
        for path in ["/proc/self/fd/3", "/sys/x", "/.vmprobe/vmprobe", "/"] {
            assert!(!is_usable(Path::new(path)), "{path}");
        }
        for path in ["/dev/fd/63", "/process", "/home/x"] {
            assert!(is_usable(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn variables_that_change_the_output_are_passed() {
        for name in ["RUST_LOG", "LC_ALL", "VMPROBE_X"] {
            assert!(is_passed(OsStr::new(name)), "{name}");
        }
        for name in ["PATH", "HOME", "LANGUAGE", "SSH_AUTH_SOCK"] {
            assert!(!is_passed(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn bytes_that_are_not_utf8_survive() {
        let odd = OsStr::from_bytes(b"\xff\xfe").to_owned();
        let request = Request {
            modules: vec!["m".into()],
            name: odd.clone(),
            arguments: vec![odd.clone(), "b".into()],
            environment: vec![("K".into(), odd.clone())],
            directory: "/".into(),
            inputs: vec![odd],
            outputs: vec![],
            stdin: true,
        };
        let text = serde_json::to_vec(&request).unwrap();
        assert_eq!(serde_json::from_slice::<Request>(&text).unwrap(), request);
    }
}
