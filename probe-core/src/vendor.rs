//! Whose CPU the guest runs on, where that decides what bytes mean.

use iced_x86::DecoderOptions;

/// Whose reading of the few encodings that Intel and AMD decode differently in 64-bit mode: near branches with prefix 66, of
/// which AMD takes 16 bits of the target (AMD APM vol. 3, 1.2.4, "near branches"), and some far pointers and UD0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Vendor {
    /// Not known: what the two decode differently is refused.
    #[default]
    Unknown,
    /// Intel, and others that follow it.
    Intel,
    /// AMD and Hygon.
    Amd,
}

impl Vendor {
    /// The vendor by EBX of CPUID leaf 0, the first four characters of its name.
    #[must_use]
    pub fn from_cpuid(ebx: u32) -> Self {
        // AuthenticAMD, HygonGenuine.
        if matches!(&ebx.to_le_bytes(), b"Auth" | b"Hygo") { Vendor::Amd } else { Vendor::Intel }
    }

    /// How iced decodes for this vendor.
    #[must_use]
    pub fn decoder_options(self) -> u32 {
        match self {
            Vendor::Unknown | Vendor::Intel => DecoderOptions::NONE,
            Vendor::Amd => DecoderOptions::AMD,
        }
    }

    /// The other one's reading.
    pub(crate) fn other_options(self) -> u32 {
        match self {
            Vendor::Unknown | Vendor::Intel => DecoderOptions::AMD,
            Vendor::Amd => DecoderOptions::NONE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vendors_are_told_by_their_name() {
        for (name, vendor) in [
            (b"Genu", Vendor::Intel),
            (b"Auth", Vendor::Amd),
            (b"Hygo", Vendor::Amd),
            (b"Cent", Vendor::Intel),
        ] {
            assert_eq!(Vendor::from_cpuid(u32::from_le_bytes(*name)), vendor);
        }
    }
}
