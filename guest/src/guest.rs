//! A guest: its image and what has been read out of it.

use std::path::Path;
use std::sync::Arc;

use probe_core::{Gva, PhysicalMemory, VcpuState};

use crate::btf::Btf;
use crate::image::{HIGH_HALF, Image, ImageError};
use crate::kallsyms::{self, Block, KallsymsError};
use crate::linux::LinuxFacts;
use crate::modules::ModuleFields;
use crate::relocation::{Relocation, RelocationError};
use crate::sites::PatchSites;
use crate::symbols::SymbolTable;

/// Why a guest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The file is no usable image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image has symbols that cannot be read.
    #[error("The image's symbols cannot be read")]
    Symbols(#[from] KallsymsError),
    /// It cannot be found where it has relocated itself to.
    #[error(transparent)]
    Relocation(#[from] RelocationError),
}

/// Where the symbols came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymbolSource {
    /// The ELF symbol table.
    Elf,
    /// The kernel's own compressed tables.
    Kallsyms,
    /// The image has none; only addresses can be probed.
    None,
}

/// A guest's image, its symbols and what follows from them.
#[derive(Debug)]
pub struct Guest {
    /// The image.
    pub image: Image,
    /// Its symbols.
    pub symbols: SymbolTable,
    /// Where they came from.
    pub symbol_source: SymbolSource,
    /// The places in its text that it rewrites itself.
    pub sites: Arc<PatchSites>,
    /// More, if it is a Linux kernel.
    pub linux: Option<LinuxFacts>,
}

impl Guest {
    /// Reads the image at `path` and its symbols.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn open(path: &Path) -> Result<Self, GuestError> {
        Self::new(Image::open(path)?)
    }

    /// Reads the symbols of an image.
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn new(image: Image) -> Result<Self, GuestError> {
        let (symbols, symbol_source) = read_symbols(&image)?;
        let sites = Arc::new(PatchSites::new(&image, &symbols));
        let linux = image.kind.is_linux().then(|| LinuxFacts::new(&image, &symbols));
        Ok(Self { image, symbols, symbol_source, sites, linux })
    }
}

impl Guest {
    /// The same guest where its decompressor has put it; `vcpu` is about to enter it ([`crate::relocation::Decompressor`]).
    ///
    /// # Errors
    /// See [`GuestError`].
    pub fn relocated(self, vcpu: &VcpuState, memory: &dyn PhysicalMemory) -> Result<Self, GuestError> {
        let relocation = Relocation::find(&self.image, vcpu, memory)?;
        let image = self.image.relocated(relocation, memory).map_err(RelocationError::Memory)?;
        Self::new(image)
    }

    /// Where the members of `struct module` are, if this is a Linux kernel whose image has type information. Searched for at
    /// each call.
    #[must_use]
    pub fn module_fields(&self) -> Option<ModuleFields> {
        ModuleFields::new(&self.types()?)
    }

    /// The type information in the image.
    #[must_use]
    pub fn types(&self) -> Option<Btf<'_>> {
        let range = self.image.section(".BTF")?.range();
        let data = self.image.read(range.start, usize::try_from(range.end.0 - range.start.0).ok()?)?;
        Btf::new(data).inspect_err(|error| tracing::info!("{error}")).ok()
    }
}

/// The ELF symbol table if there is one, since it knows sizes; else kallsyms.
fn read_symbols(image: &Image) -> Result<(SymbolTable, SymbolSource), GuestError> {
    let regions = image.regions();
    let moved = |gva: Gva| if gva.0 < HIGH_HALF { gva } else { gva.offset(image.relocation.gva_offset) };
    let elf = crate::image::elf::symbols(image.data(), &regions, moved)?;
    if !elf.is_empty() {
        return Ok((elf, SymbolSource::Elf));
    }
    if !image.kind.is_linux() {
        return Ok((elf, SymbolSource::None));
    }
    let blocks: Vec<Block<'_>> = image
        .segments
        .iter()
        .filter_map(|segment| Some(Block { data: image.segment_data(segment), gva: segment.gva? }))
        .collect();
    match kallsyms::read(&blocks, &regions, |gva| image.segment_at(gva).is_some()) {
        Ok(symbols) => Ok((symbols, SymbolSource::Kallsyms)),
        Err(KallsymsError::NotFound) => Ok((elf, SymbolSource::None)),
        Err(error) => Err(error.into()),
    }
}
