//! Kernel modules: which to load, and in which order.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::prepare::PrepareError;

/// The modules of one kernel.
#[derive(Debug, Default)]
pub(crate) struct Modules {
    /// Loadable modules by name, with `-` written as `_`.
    files: BTreeMap<String, PathBuf>,
    /// Modules that are part of the kernel image.
    builtin: Vec<String>,
}

/// A module to load.
#[derive(Debug)]
pub(crate) struct Module {
    /// Its name, with `-` written as `_`.
    pub(crate) name: String,
    /// The uncompressed ELF file.
    pub(crate) contents: Vec<u8>,
}

impl Modules {
    /// The modules below `/lib/modules/RELEASE`, a directory that depmod(8) has not seen.
    pub(crate) fn of_tree(dir: &Path) -> io::Result<Self> {
        let mut modules = Self::default();
        for line in fs::read_to_string(dir.join("modules.builtin"))?.lines() {
            modules.builtin.extend(module_name(Path::new(line)));
        }
        let mut dirs = vec![dir.join("kernel")];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    dirs.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    modules.files.insert(name, entry.path());
                }
            }
        }
        Ok(modules)
    }

    /// The `wanted` modules and all that they depend on, each after its dependencies. Built-in ones are left out.
    pub(crate) fn load_order(&self, wanted: &[&str], kernel: &str) -> Result<Vec<Module>, PrepareError> {
        let mut order: Vec<Module> = Vec::new();
        // A stack of names; one whose dependencies are not loaded yet goes back below them.
        let mut stack: Vec<String> = wanted.iter().rev().map(|name| name.replace('-', "_")).collect();
        // Each module is looked at twice at most, unless dependencies go in a circle.
        let mut left = 2 * self.files.len() + stack.len();
        while let Some(name) = stack.pop() {
            if self.builtin.contains(&name) || order.iter().any(|module| module.name == name) {
                continue;
            }
            let missing = || PrepareError::NoModule { module: name.clone(), kernel: kernel.to_owned() };
            left = left.checked_sub(1).ok_or_else(missing)?;
            let path = self.files.get(&name).ok_or_else(missing)?;
            let contents =
                read_module(path).map_err(|source| PrepareError::File { path: path.clone(), source })?;
            let pending: Vec<String> = dependencies(&contents)
                .into_iter()
                .filter(|name| {
                    !self.builtin.contains(name) && !order.iter().any(|module| module.name == *name)
                })
                .collect();
            if pending.is_empty() {
                order.push(Module { name, contents });
            } else {
                stack.push(name);
                stack.extend(pending);
            }
        }
        Ok(order)
    }
}

/// The name of the module in a file `NAME.ko`, `NAME.ko.xz`, ...
fn module_name(path: &Path) -> Option<String> {
    let (name, rest) = path.file_name()?.to_str()?.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".gz" | ".zst").then(|| name.replace('-', "_"))
}

/// The names in the `depends=` entry of a module's .modinfo section.
fn dependencies(contents: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = contents.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &contents[at + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// A module's ELF file, unpacked by the tool of its compression.
fn read_module(path: &Path) -> io::Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("gz") => "gzip",
        Some("zst") => "zstd",
        _ => return fs::read(path),
    };
    let output = Command::new(tool).arg("-dc").arg(path).output()?;
    if output.status.success() {
        Ok(output.stdout)
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel/drivers");
        fs::create_dir_all(&kernel).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/lib/built-in.ko\n").unwrap();
        for (name, depends) in modules {
            let contents = format!("\x7fELF\0license=GPL\0depends={depends}\0name={name}\0");
            fs::write(kernel.join(format!("{name}.ko")), contents).unwrap();
        }
        dir
    }

    fn order(dir: &Path, wanted: &[&str]) -> Result<Vec<String>, PrepareError> {
        let modules = Modules::of_tree(dir).unwrap().load_order(wanted, "test")?;
        Ok(modules.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tree(&[
            ("kvm-amd", "kvm,ccp"),
            ("kvm", "irqbypass"),
            ("irqbypass", ""),
            ("ccp", "built-in,irqbypass"),
        ]);
        let order = order(dir.path(), &["kvm-amd", "kvm"]).unwrap();
        assert_eq!(order.last().unwrap(), "kvm_amd");
        let place = |name| order.iter().position(|module| module == name).unwrap();
        assert!(place("irqbypass") < place("kvm") && place("irqbypass") < place("ccp"), "{order:?}");
        assert_eq!(order.len(), 4);
    }

    #[test]
    fn a_missing_module_and_a_circle_are_errors() {
        let dir = tree(&[("a", "b"), ("b", "a"), ("c", "gone")]);
        assert!(order(dir.path(), &["c"]).unwrap_err().to_string().contains("gone"));
        order(dir.path(), &["a"]).unwrap_err();
        assert!(order(dir.path(), &["built_in"]).unwrap().is_empty());
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let dir = tree(&[("plain", "packed")]);
        let file = dir.path().join("kernel/packed.ko");
        fs::write(&file, "\0depends=\0").unwrap();
        assert!(Command::new("gzip").arg(&file).status().unwrap().success());
        let modules = Modules::of_tree(dir.path()).unwrap().load_order(&["plain"], "test").unwrap();
        assert_eq!(modules[0].contents, b"\0depends=\0");
        assert_eq!(modules[1].name, "plain");
    }
}
