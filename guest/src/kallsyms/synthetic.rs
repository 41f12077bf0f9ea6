//! Builds kallsyms tables in every layout, for tests.

use std::collections::{BTreeMap, BTreeSet};

use probe_core::Gva;

/// How the tables are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// To 4.5.
    Absolute64,
    /// 4.6 to 4.19.
    Offsets64,
    /// 4.20 to 6.1.
    Offsets32,
    /// 6.2 and 6.3.
    Seqs,
    /// 6.4 to 6.14.
    TokensFirst,
    /// 6.4 to 6.10 with CONFIG_KALLSYMS_BASE_RELATIVE off.
    TokensFirstAbsolute,
    /// 6.15 to 6.19: no per-CPU symbols among the offsets.
    TokensFirstNoPercpu,
    /// 7.0.
    SelfRelative,
}

impl Layout {
    pub const ALL: [Layout; 8] = [
        Layout::Absolute64,
        Layout::Offsets64,
        Layout::Offsets32,
        Layout::Seqs,
        Layout::TokensFirst,
        Layout::TokensFirstAbsolute,
        Layout::TokensFirstNoPercpu,
        Layout::SelfRelative,
    ];

    fn alignment(self) -> usize {
        if self == Layout::SelfRelative { 4 } else { 8 }
    }

    /// Whether per-CPU symbols, near address 0, can be written in it.
    pub fn has_percpu(self) -> bool {
        !matches!(self, Layout::TokensFirstNoPercpu | Layout::SelfRelative)
    }
}

/// Codes for text: single characters, and the most frequent pairs for the codes that no character uses.
struct Codes {
    tokens: Vec<String>,
}

impl Codes {
    fn new(symbols: &[(String, u64)]) -> Self {
        let mut used = BTreeSet::new();
        let mut pairs = BTreeMap::<&str, usize>::new();
        for (text, _) in symbols {
            used.extend(text.bytes());
            for at in 0..text.len() - 1 {
                *pairs.entry(&text[at..at + 2]).or_default() += 1;
            }
        }
        let mut pairs: Vec<_> = pairs.into_iter().collect();
        pairs.sort_by_key(|(_, count)| *count);
        let tokens = (0..=255u8)
            .map(|code| {
                if used.contains(&code) {
                    char::from(code).to_string()
                } else {
                    pairs.pop().map(|(pair, _)| pair.to_owned()).unwrap_or_default()
                }
            })
            .collect();
        Self { tokens }
    }

    fn encode(&self, text: &str) -> Vec<u8> {
        let mut codes = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let fitting =
                |(_, token): &(usize, &String)| !token.is_empty() && rest.starts_with(token.as_str());
            let (code, token) =
                self.tokens.iter().enumerate().filter(fitting).max_by_key(|(_, token)| token.len()).unwrap();
            codes.push(u8::try_from(code).unwrap());
            rest = &rest[token.len()..];
        }
        codes
    }
}

/// The tables for `symbols` (type letter and name together, address), which are sorted by address, as a block at `gva`.
pub fn build(layout: Layout, symbols: &[(String, u64)], gva: Gva) -> Vec<u8> {
    let codes = Codes::new(symbols);
    let mut out = vec![0xaa; 32];
    let alignment = layout.alignment();
    let align = |out: &mut Vec<u8>| {
        while !out.len().is_multiple_of(alignment) {
            out.push(0);
        }
    };
    let wide = matches!(layout, Layout::Absolute64 | Layout::Offsets64);
    let word = |out: &mut Vec<u8>, value: usize| {
        if wide {
            out.extend((value as u64).to_le_bytes());
        } else {
            out.extend(u32::try_from(value).unwrap().to_le_bytes());
        }
    };
    let base = symbols.iter().map(|(_, address)| *address).find(|address| *address >> 63 == 1).unwrap_or(0);
    let addresses = |out: &mut Vec<u8>| {
        align(out);
        for (_, address) in symbols {
            let absolute = address >> 63 == 0;
            let below = || u32::try_from(address - base).unwrap();
            match layout {
                Layout::Absolute64 | Layout::TokensFirstAbsolute => out.extend(address.to_le_bytes()),
                Layout::SelfRelative => {
                    let here = gva.0 + out.len() as u64;
                    let distance = i32::try_from(address.wrapping_sub(here).cast_signed()).unwrap();
                    out.extend(distance.to_le_bytes());
                }
                Layout::TokensFirstNoPercpu => out.extend(below().to_le_bytes()),
                _ if absolute => out.extend(u32::try_from(*address).unwrap().to_le_bytes()),
                _ => out.extend((!below()).to_le_bytes()),
            }
        }
        let has_base =
            !matches!(layout, Layout::Absolute64 | Layout::TokensFirstAbsolute | Layout::SelfRelative);
        if has_base {
            align(out);
            out.extend(base.to_le_bytes());
        }
    };
    let tokens_last =
        matches!(layout, Layout::Absolute64 | Layout::Offsets64 | Layout::Offsets32 | Layout::Seqs);
    if tokens_last {
        addresses(&mut out);
    }
    align(&mut out);
    word(&mut out, symbols.len());
    align(&mut out);
    let names_start = out.len();
    let mut markers = Vec::new();
    for (index, (text, _)) in symbols.iter().enumerate() {
        if index % 256 == 0 {
            markers.push(out.len() - names_start);
        }
        let codes = codes.encode(text);
        if codes.len() > 127 {
            out.push(u8::try_from(codes.len() & 0x7f).unwrap() | 0x80);
            out.push(u8::try_from(codes.len() >> 7).unwrap());
        } else {
            out.push(u8::try_from(codes.len()).unwrap());
        }
        out.extend(codes);
    }
    align(&mut out);
    for marker in markers {
        word(&mut out, marker);
    }
    align(&mut out);
    let seqs = |out: &mut Vec<u8>| {
        for index in 0..symbols.len() {
            out.extend_from_slice(&u32::try_from(index).unwrap().to_be_bytes()[1..]);
        }
        align(out);
    };
    if layout == Layout::Seqs {
        seqs(&mut out);
    }
    let mut index = Vec::new();
    let table_start = out.len();
    for token in &codes.tokens {
        index.push(u16::try_from(out.len() - table_start).unwrap());
        out.extend(token.bytes());
        out.push(0);
    }
    align(&mut out);
    for start in index {
        out.extend(start.to_le_bytes());
    }
    if !tokens_last {
        addresses(&mut out);
        align(&mut out);
        seqs(&mut out);
    }
    out.extend([0x55; 40]);
    out
}
