//! `vmprobe prepare`: what later runs need, made once and kept in the cache.

use nested::debian::StockKernel;
use nested::{Cache, debian, stderr_progress};

use crate::cli::{Preparation, PrepareArgs};
use crate::exit::{Code, Failure};
use crate::images::chain;

/// Prints where the result is.
pub fn prepare(args: &PrepareArgs) -> Result<Code, Failure> {
    let host = |error: &dyn std::error::Error| Failure::Host(chain(error));
    let cache = Cache::from_env().map_err(|error| host(&error))?;
    let progress = stderr_progress();
    let path = match args.what {
        Preparation::Nested => {
            nested::prepare(&cache, progress.as_ref()).map_err(|error| host(&error))?;
            cache.root().to_owned()
        }
        Preparation::Kernel => {
            debian::stock_kernel(&cache, progress.as_ref()).map_err(|error| host(&error))?.vmlinuz()
        }
        Preparation::Disk => {
            nested::root_disk(&cache, progress.as_ref()).map_err(|error| host(&error))?.image()
        }
        Preparation::Initrd => {
            // Its modules belong to the stock kernel, so that has to be prepared first.
            let archive = workload(debian::cached(&cache).as_ref())?;
            let path = cache.root().join("workload.cpio");
            std::fs::create_dir_all(cache.root())
                .and_then(|()| std::fs::write(&path, archive))
                .map_err(|error| Failure::Host(format!("{} cannot be written: {error}", path.display())))?;
            path
        }
    };
    println!("{}", path.display());
    Ok(Code::Done)
}

/// The initramfs of the workload program, with the modules of a kernel that it is for.
///
/// # Errors
/// It cannot be packed.
pub fn workload(kernel: Option<&StockKernel>) -> Result<Vec<u8>, Failure> {
    let modules = kernel.map_or(Ok(Vec::new()), StockKernel::guest_modules);
    let modules =
        modules.map_err(|error| Failure::Host(format!("The kernel's modules cannot be read: {error}")))?;
    guest::initramfs::workload(&modules).map_err(|error| Failure::Host(chain(&error)))
}
