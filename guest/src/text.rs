//! What the engine has to know of a kernel's text while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use probe_core::Gva;
use probe_core::machine::{GuestText, Rewritten};

use crate::Guest;
use crate::sites::PatchSites;

/// The text of a running kernel: its patch sites, and whether it has booted, after which it leaves most of them alone.
#[derive(Debug)]
pub struct KernelText {
    sites: Arc<PatchSites>,
    booted: AtomicBool,
}

impl KernelText {
    /// To be called when the kernel has patched what it patches while it boots.
    pub fn set_booted(&self) {
        self.booted.store(true, Ordering::Relaxed);
    }

    /// Whether that has come.
    #[must_use]
    pub fn has_booted(&self) -> bool {
        self.booted.load(Ordering::Relaxed)
    }
}

impl Guest {
    /// Its text, at the start of a run.
    #[must_use]
    pub fn text(&self) -> KernelText {
        KernelText { sites: Arc::clone(&self.sites), booted: AtomicBool::new(false) }
    }
}

impl GuestText for KernelText {
    fn rewritten(&self, gva: Gva) -> Rewritten {
        let booted = self.booted.load(Ordering::Relaxed);
        let mut found = Rewritten::No;
        for site in self.sites.overlapping(gva..gva.offset(1)) {
            if site.kind.keeps_meaning() || (booted && site.kind.is_final_after_boot()) {
                continue;
            }
            match site.target {
                Some(target) if site.start == gva && found == Rewritten::No => {
                    found = Rewritten::Jump { len: site.len, target };
                }
                _ => return Rewritten::Checked,
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;
    use crate::testing::{Kernel, TEXT, relative_words};

    #[test]
    fn boot_time_sites_are_free_after_boot_and_static_keys_never() {
        let mut kernel = Kernel::default();
        // jmp, jmp, nops
        let mut code = vec![0xeb, 0x00, 0xe9, 0, 0, 0, 0];
        code.extend([0x90; 25]);
        kernel.function("f", &code);
        kernel.table("__jump_table", |at| {
            let mut data = relative_words(at, &[TEXT, TEXT + 16]);
            data.extend(7_u64.to_le_bytes());
            data
        });
        kernel.table(".return_sites", |at| relative_words(at, &[TEXT + 2]));
        let text = Guest::new(Image::parse(kernel.build()).unwrap()).unwrap().text();
        let key = Rewritten::Jump { len: 2, target: Gva(TEXT + 16) };
        let seen = || [0, 1, 2, 6, 7].map(|offset| text.rewritten(Gva(TEXT + offset)));
        let (no, checked) = (Rewritten::No, Rewritten::Checked);
        assert_eq!(seen(), [key, checked, checked, checked, no]);
        text.set_booted();
        assert_eq!(seen(), [key, checked, no, no, no]);
    }
}
