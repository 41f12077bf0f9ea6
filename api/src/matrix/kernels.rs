//! What a cell's kernel is: a name of Debian's, a built-in guest, a file, a package or a build tree.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use nested::debian::StockKernel;
use nested::{Cache, KernelName, named_kernel, stderr_progress};

use super::workload::Initrds;
use crate::exit::Failure;
use crate::images::{self, chain};

/// Where a kernel's build has its bzImage.
const BUILT: &str = "arch/x86/boot/bzImage";

/// What a guest boots with.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// For `vmprobe run`.
    pub image: String,
    /// The initial ramdisk. A built-in guest has none: its work is its own.
    pub initrd: Option<PathBuf>,
}

/// Kernels that have been found, so that each is looked for once.
pub struct Kernels<'a> {
    found: HashMap<String, Kernel>,
    initrds: Initrds<'a>,
}

impl<'a> Kernels<'a> {
    pub fn new(initrds: Initrds<'a>) -> Self {
        Self { found: HashMap::new(), initrds }
    }

    /// Finds a kernel by what the matrix calls it.
    ///
    /// # Errors
    /// It is not there, and what to do.
    pub fn find(&mut self, name: &str) -> Result<Kernel, Failure> {
        if let Some(kernel) = self.found.get(name) {
            return Ok(kernel.clone());
        }
        let (image, stock) = find(name)?;
        let is_linux = images::is_file(&image);
        let initrd = if is_linux { self.initrds.make(stock.as_ref())? } else { None };
        let kernel = Kernel { image, initrd };
        self.found.insert(name.to_owned(), kernel.clone());
        Ok(kernel)
    }
}

/// The image, and which of Debian's kernels it is.
fn find(name: &str) -> Result<(String, Option<StockKernel>), Failure> {
    if KernelName::is_meant(name) {
        let wanted: KernelName = name.parse().map_err(Failure::Usage)?;
        let cache = Cache::from_env().map_err(|error| Failure::Host(chain(&error)))?;
        let kernel = named_kernel(&cache, &wanted, stderr_progress().as_ref());
        let kernel = kernel.map_err(|error| Failure::Host(format!("{name}: {}", chain(&error))))?;
        let image = kernel.vmlinuz().display().to_string();
        return Ok((image, Some(kernel)));
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
    Ok((image, None))
}
