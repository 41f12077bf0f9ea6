//! Modules of a running Linux guest: what `struct module` says when one is loaded or freed.
//!
//! The kernel calls `do_init_module` with a module whose text is in place, relocated and patched, before any of it runs, and
//! `free_module` before its memory goes (kernel/module/main.c).

use std::ops::Range;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use probe_core::Gva;

use crate::btf::{Btf, TypeId};
use crate::bytes::{array, u32_at, u64_at};
use crate::place::NOP5;

/// MODULE_NAME_LEN: 64 less the size of a `long`.
const NAME_BYTES: usize = 64 - 8;
/// `Elf64_Sym` (System V ABI, "Symbol Table").
const SYMBOL_BYTES: usize = 24;
/// More symbols than any module has.
const MAX_SYMBOLS: u32 = 1 << 20;
/// The longest name of a symbol (KSYM_NAME_LEN).
const MAX_NAME: usize = 512;
/// Larger than any module's text.
const MAX_TEXT: u64 = 256 << 20;
const SHN_UNDEF: u16 = 0;
/// `enum mod_mem_type` of Linux 6.4 and later.
const MOD_TEXT: u64 = 0;
const MOD_INIT_TEXT: u64 = 4;

/// Where a piece of text is described in `struct module`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct TextFields {
    base: u64,
    size: u64,
}

/// Where the members of `struct module` are that are needed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleFields {
    name: u64,
    kallsyms: u64,
    symtab: u64,
    num_symtab: u64,
    strtab: u64,
    text: TextFields,
    init_text: TextFields,
}

impl ModuleFields {
    /// Finds them in a kernel's type information: as Linux has had them until 6.3 (`core_layout`), and since (`mem[]`).
    #[must_use]
    pub fn new(btf: &Btf<'_>) -> Option<Self> {
        let module = btf.structure("module")?;
        let symbols = btf.structure("mod_kallsyms")?;
        let at = |of: TypeId, name: &str| btf.member(of, name).map(|member| member.offset);
        let (text, init_text) = match btf.member(module, "mem") {
            Some(mem) => {
                let memory = btf.element_of(mem.type_id)?;
                let size = btf.size(memory)?;
                let (base, length) = (at(memory, "base")?, at(memory, "size")?);
                let fields = |index: u64| {
                    let start = mem.offset + index * size;
                    TextFields { base: start + base, size: start + length }
                };
                (fields(MOD_TEXT), fields(MOD_INIT_TEXT))
            }
            None => {
                let fields = |name: &str| {
                    let layout = btf.member(module, name)?;
                    let field = |name| at(layout.type_id, name).map(|offset| layout.offset + offset);
                    Some(TextFields { base: field("base")?, size: field("text_size")? })
                };
                (fields("core_layout")?, fields("init_layout")?)
            }
        };
        Some(Self {
            name: at(module, "name")?,
            kallsyms: at(module, "kallsyms")?,
            symtab: at(symbols, "symtab")?,
            num_symtab: at(symbols, "num_symtab")?,
            strtab: at(symbols, "strtab")?,
            text,
            init_text,
        })
    }
}

/// Reads guest memory: fills the buffer from the address on, or says false.
pub type ReadMemory<'a> = &'a dyn Fn(Gva, &mut [u8]) -> bool;

/// Why a module cannot be read out of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ModuleError {
    /// Its memory.
    #[error("The guest's memory at {0} cannot be read")]
    Unreadable(Gva),
    /// What is there makes no sense.
    #[error("What the guest has at {0} is no module")]
    Implausible(Gva),
    /// No such function.
    #[error("The module has no such function")]
    NoFunction,
    /// Inside an instruction.
    #[error("No instruction of the function begins there")]
    NotBoundary,
}

/// A module in the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Where its `struct module` is.
    pub at: Gva,
    /// Its name.
    pub name: String,
    /// Its code.
    pub text: Range<Gva>,
    /// Its code that runs once and is then freed; empty if that has happened.
    pub init_text: Range<Gva>,
}

/// Where a probe in a module lands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModulePlace {
    /// The probed instruction.
    pub gva: Gva,
    /// Its distance from the function's start.
    pub offset: u64,
    /// The function's start.
    pub function: Gva,
}

impl Module {
    /// Reads what is at `at`, a `struct module`.
    ///
    /// # Errors
    /// [`ModuleError`]
    pub fn read(fields: &ModuleFields, at: Gva, read: ReadMemory<'_>) -> Result<Self, ModuleError> {
        let mut bytes = [0; NAME_BYTES];
        let name_at = at.offset(fields.name);
        fill(read, name_at, &mut bytes)?;
        let len = bytes.iter().position(|byte| *byte == 0).ok_or(ModuleError::Implausible(at))?;
        let name = str::from_utf8(&bytes[..len]).map_err(|_| ModuleError::Implausible(at))?;
        let text = |fields: TextFields| {
            let start = Gva(word(read, at.offset(fields.base))?);
            let size = u64::from(half(read, at.offset(fields.size))?);
            let plausible = size <= MAX_TEXT && start.page_offset() == 0;
            if plausible { Ok(start..start.offset(size)) } else { Err(ModuleError::Implausible(at)) }
        };
        Ok(Self { at, name: name.to_owned(), text: text(fields.text)?, init_text: text(fields.init_text)? })
    }

    /// Whether an address is in its code.
    #[must_use]
    pub fn contains(&self, gva: Gva) -> bool {
        self.text.contains(&gva) || self.init_text.contains(&gva)
    }

    /// The function `name` of this module: where it begins and how long it is, bytes.
    ///
    /// # Errors
    /// [`ModuleError`]
    pub fn function(
        &self,
        fields: &ModuleFields,
        name: &str,
        read: ReadMemory<'_>,
    ) -> Result<(Gva, u64), ModuleError> {
        let symbols = Gva(word(read, self.at.offset(fields.kallsyms))?);
        let table = Gva(word(read, symbols.offset(fields.symtab))?);
        let strings = Gva(word(read, symbols.offset(fields.strtab))?);
        let count = half(read, symbols.offset(fields.num_symtab))?;
        if count > MAX_SYMBOLS {
            return Err(ModuleError::Implausible(symbols));
        }
        let mut entries = vec![0; count as usize * SYMBOL_BYTES];
        fill(read, table, &mut entries)?;
        for entry in entries.chunks_exact(SYMBOL_BYTES) {
            let (Some(name_at), Some(value), Some(size)) =
                (u32_at(entry, 0), u64_at(entry, 8), u64_at(entry, 16))
            else {
                continue;
            };
            let section = array(entry, 6).map(u16::from_le_bytes);
            if section != Some(SHN_UNDEF)
                && self.contains(Gva(value))
                && is_string(read, strings.offset(u64::from(name_at)), name)
            {
                return Ok((Gva(value), size));
            }
        }
        Err(ModuleError::NoFunction)
    }

    /// Where a probe on `name`, or `offset` bytes into it, lands: the function itself means behind its ftrace site.
    ///
    /// # Errors
    /// [`ModuleError`]
    pub fn place(
        &self,
        fields: &ModuleFields,
        name: &str,
        offset: Option<u64>,
        read: ReadMemory<'_>,
    ) -> Result<ModulePlace, ModuleError> {
        let (function, size) = self.function(fields, name, read)?;
        let wanted = offset.unwrap_or(0);
        let end = if self.text.contains(&function) { self.text.end } else { self.init_text.end };
        // The size of a function written in assembly may be missing.
        let size = if size == 0 { end.0 - function.0 } else { size.min(end.0 - function.0) };
        if wanted >= size {
            return Err(ModuleError::NotBoundary);
        }
        let len = usize::try_from(size).map_err(|_| ModuleError::Implausible(function))?;
        let mut code = vec![0; len];
        fill(read, function, &mut code)?;
        let offset = match offset {
            Some(offset) => offset,
            None => behind_ftrace_site(&code, function),
        };
        let mut decoder = Decoder::with_ip(64, &code, function.0, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.ip() < function.0 + offset && decoder.can_decode() {
            decoder.decode_out(&mut instruction);
        }
        if decoder.ip() != function.0 + offset || !decoder.can_decode() {
            return Err(ModuleError::NotBoundary);
        }
        Ok(ModulePlace { gva: function.offset(offset), offset, function })
    }
}

/// The offset of the first instruction that is the function's own: behind ENDBR64 and the 5-byte nop to which the kernel has
/// turned the call of `__fentry__` before the module's text is run.
fn behind_ftrace_site(code: &[u8], function: Gva) -> u64 {
    let first = Decoder::with_ip(64, code, function.0, DecoderOptions::NONE).decode();
    let site = if first.code() == Code::Endbr64 { first.len() } else { 0 };
    let has_site = code.get(site..).is_some_and(|code| code.starts_with(&NOP5));
    if has_site { (site + NOP5.len()) as u64 } else { 0 }
}

/// Reads page by page, so that a buffer may go on over pages that are far apart in physical memory.
fn fill(read: ReadMemory<'_>, at: Gva, buf: &mut [u8]) -> Result<(), ModuleError> {
    if read(at, buf) { Ok(()) } else { Err(ModuleError::Unreadable(at)) }
}

fn word(read: ReadMemory<'_>, at: Gva) -> Result<u64, ModuleError> {
    let mut bytes = [0; 8];
    fill(read, at, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

fn half(read: ReadMemory<'_>, at: Gva) -> Result<u32, ModuleError> {
    let mut bytes = [0; 4];
    fill(read, at, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// Whether the zero-ended string at `at` is `expected`.
fn is_string(read: ReadMemory<'_>, at: Gva, expected: &str) -> bool {
    let mut bytes = vec![0; expected.len() + 1];
    expected.len() < MAX_NAME
        && read(at, &mut bytes)
        && bytes.strip_suffix(&[0]).is_some_and(|name| name == expected.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIELDS: ModuleFields = ModuleFields {
        name: 24,
        kallsyms: 0x100,
        symtab: 0,
        num_symtab: 8,
        strtab: 16,
        text: TextFields { base: 0x140, size: 0x14c },
        init_text: TextFields { base: 0x180, size: 0x18c },
    };
    const BASE: u64 = 0xffff_ffff_c000_0000;
    const AT: Gva = Gva(BASE);
    const TEXT: u64 = BASE + 0x1000;
    /// nop5; push %rbp; mov %rsp,%rbp; ret
    const TRACED: &[u8] = &[0x0f, 0x1f, 0x44, 0x00, 0x00, 0x55, 0x48, 0x89, 0xe5, 0xc3];
    /// endbr64; nop5; ret
    const BRANCH_TRACKED: &[u8] = &[0xf3, 0x0f, 0x1e, 0xfa, 0x0f, 0x1f, 0x44, 0x00, 0x00, 0xc3];

    /// A module in a buffer that stands for the guest's memory from [`BASE`] on.
    fn memory() -> Vec<u8> {
        let mut memory = vec![0; 0x3000];
        let mut put = |at: usize, bytes: &[u8]| memory[at..at + bytes.len()].copy_from_slice(bytes);
        put(24, b"loop\0");
        put(0x100, &(BASE + 0x200).to_le_bytes());
        put(0x200, &(BASE + 0x300).to_le_bytes());
        put(0x208, &3_u32.to_le_bytes());
        put(0x210, &(BASE + 0x400).to_le_bytes());
        put(0x140, &TEXT.to_le_bytes());
        put(0x14c, &0x40_u32.to_le_bytes());
        put(0x400, b"\0elsewhere\0traced\0tracked\0");
        // Name, section, value, size: one that is not defined here, and two functions.
        for (index, (name, section, value, size)) in
            [(1_u32, 0_u16, TEXT, 9_u64), (11, 2, TEXT, 10), (18, 2, TEXT + 0x10, 0)].into_iter().enumerate()
        {
            let at = 0x300 + index * SYMBOL_BYTES;
            put(at, &name.to_le_bytes());
            put(at + 6, &section.to_le_bytes());
            put(at + 8, &value.to_le_bytes());
            put(at + 16, &size.to_le_bytes());
        }
        put(0x1000, TRACED);
        put(0x1010, BRANCH_TRACKED);
        memory
    }

    fn reader(memory: &[u8]) -> impl Fn(Gva, &mut [u8]) -> bool {
        |at, buf| {
            let start = usize::try_from(at.0.wrapping_sub(BASE)).unwrap();
            let found = start.checked_add(buf.len()).and_then(|end| memory.get(start..end));
            found.map(|found| buf.copy_from_slice(found)).is_some()
        }
    }

    #[test]
    fn a_module_has_a_name_and_text() {
        let memory = memory();
        let module = Module::read(&FIELDS, AT, &reader(&memory)).unwrap();
        assert_eq!((module.name.as_str(), module.text.clone()), ("loop", Gva(TEXT)..Gva(TEXT + 0x40)));
        assert!(module.init_text.is_empty());
        assert!(module.contains(Gva(TEXT + 0x3f)) && !module.contains(Gva(TEXT + 0x40)));
    }

    #[test]
    fn functions_are_placed_behind_their_ftrace_site_and_at_any_instruction() {
        let memory = memory();
        let read = reader(&memory);
        let module = Module::read(&FIELDS, AT, &read).unwrap();
        let place = |name, offset| module.place(&FIELDS, name, offset, &read).map(|place| place.gva.0 - TEXT);
        assert_eq!(place("traced", None), Ok(5));
        assert_eq!(place("tracked", None), Ok(0x10 + 9));
        assert_eq!(place("traced", Some(0)), Ok(0));
        assert_eq!(place("traced", Some(6)), Ok(6));
        assert_eq!(place("traced", Some(7)), Err(ModuleError::NotBoundary));
        assert_eq!(place("traced", Some(10)), Err(ModuleError::NotBoundary));
        assert_eq!(place("elsewhere", None), Err(ModuleError::NoFunction), "not defined in the module");
        assert_eq!(place("traced_too", None), Err(ModuleError::NoFunction));
        assert_eq!(place("trace", None), Err(ModuleError::NoFunction));
    }

    #[test]
    fn what_is_no_module_is_refused() {
        let unreadable = |_: Gva, _: &mut [u8]| false;
        assert_eq!(Module::read(&FIELDS, AT, &unreadable), Err(ModuleError::Unreadable(Gva(BASE + 24))));
        let mut bad = memory();
        bad[24..80].fill(b'x');
        assert_eq!(Module::read(&FIELDS, AT, &reader(&bad)), Err(ModuleError::Implausible(AT)));
        let mut bad = memory();
        bad[0x140] = 1;
        assert_eq!(Module::read(&FIELDS, AT, &reader(&bad)), Err(ModuleError::Implausible(AT)));
        let mut bad = memory();
        bad[0x20b] = 0xff;
        let read = reader(&bad);
        let module = Module::read(&FIELDS, AT, &read).unwrap();
        assert!(matches!(module.function(&FIELDS, "traced", &read), Err(ModuleError::Implausible(_))));
    }
}
