//! What a cell's kernel is: a name of Debian's, a built-in guest, a file, a package or a build tree.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use nested::debian::StockKernel;
use nested::{Cache, KernelName, named_kernel, stderr_progress};

use crate::exit::Failure;
use crate::images::{self, chain};
use crate::prepare;

/// vmprobe's own workload, as the file's `initrd`.
const WORKLOAD: &str = "workload";
/// Where a kernel's build has its bzImage.
const BUILT: &str = "arch/x86/boot/bzImage";

/// An image and the modules that came with it.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// For `vmprobe run`.
    pub image: String,
    /// The one of Debian's that it is.
    stock: Option<StockKernel>,
}

/// Kernels that have been found, so that each is looked for once.
#[derive(Debug, Default)]
pub struct Kernels {
    found: HashMap<String, Kernel>,
}

impl Kernels {
    /// Finds a kernel by what the matrix calls it.
    ///
    /// # Errors
    /// It is not there, and what to do.
    pub fn find(&mut self, name: &str) -> Result<Kernel, Failure> {
        if let Some(kernel) = self.found.get(name) {
            return Ok(kernel.clone());
        }
        let kernel = find(name)?;
        self.found.insert(name.to_owned(), kernel.clone());
        Ok(kernel)
    }
}

fn find(name: &str) -> Result<Kernel, Failure> {
    if KernelName::is_meant(name) {
        let wanted: KernelName = name.parse().map_err(Failure::Usage)?;
        let cache = Cache::from_env().map_err(|error| Failure::Host(chain(&error)))?;
        let kernel = named_kernel(&cache, &wanted, stderr_progress().as_ref());
        let kernel = kernel.map_err(|error| Failure::Host(format!("{name}: {}", chain(&error))))?;
        let image = kernel.vmlinuz().display().to_string();
        return Ok(Kernel { image, stock: Some(kernel) });
    }
    let image = match images::is_file(name) && Path::new(name).is_dir() {
        true => Path::new(name).join(BUILT).display().to_string(),
        false => name.to_owned(),
    };
    if images::is_file(&image) && !Path::new(&image).is_file() {
        return Err(Failure::Image(format!(
            "{image} is not there; a kernel is a file, a build tree, a built-in guest (demo), or a name like debian:bookworm/cloud"
        )));
    }
    Ok(Kernel { image, stock: None })
}

impl Kernel {
    /// The initial ramdisk that the matrix asks for; vmprobe's own is written into `directory`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn initrd(&self, asked: Option<&str>, directory: &Path) -> Result<Option<PathBuf>, Failure> {
        match asked {
            Some(WORKLOAD) => {
                let path = directory.join("workload.cpio");
                let archive = prepare::workload(self.stock.as_ref())?;
                fs::write(&path, archive).map_err(|error| super::host_failure(&path, &error))?;
                Ok(Some(path))
            }
            other => Ok(other.map(PathBuf::from)),
        }
    }
}
