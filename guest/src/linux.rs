//! What is known of a Linux kernel from its image.

use std::ops::Range;

use probe_core::Gva;

use crate::image::Image;
use crate::symbols::SymbolTable;

/// Facts about a Linux kernel that others need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxFacts {
    /// The version, "6.1.0-56-cloud-amd64" for one, if the image tells.
    pub version: Option<String>,
    /// Code that only runs while the kernel boots: `_sinittext`..`_einittext`.
    pub init_text: Option<Range<Gva>>,
    /// Everything that the kernel frees when it has booted, `__init_begin`..`__init_end`: its pages are then used for
    /// something else, and probes there have to be gone. Begins and ends with `init_text` if the image does not tell.
    pub freed_after_boot: Option<Range<Gva>>,
    /// The function that frees it.
    pub free_initmem: Option<Gva>,
    /// The function that a kernel calls when it cannot go on.
    pub panic: Option<Gva>,
    /// What function entries call to be traceable; the kernel replaces these calls by nops when it boots.
    pub fentry: Option<Gva>,
}

impl LinuxFacts {
    /// Collects the facts from symbols, and from section headers where symbols are missing.
    #[must_use]
    pub fn new(image: &Image, symbols: &SymbolTable) -> Self {
        let between = |start, end| {
            let (start, end) = (symbols.address(start)?, symbols.address(end)?);
            (start < end).then_some(start..end)
        };
        let init_text = between("_sinittext", "_einittext")
            .or_else(|| image.section(".init.text").map(|section| section.range()));
        Self {
            version: image.version.clone(),
            freed_after_boot: between("__init_begin", "__init_end").or_else(|| init_text.clone()),
            init_text,
            free_initmem: symbols.address("free_initmem"),
            panic: symbols.address("panic"),
            fentry: symbols.address("__fentry__"),
        }
    }
}
