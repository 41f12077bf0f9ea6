//! Where a kernel puts itself (KASLR), and how that is seen from outside.
//!
//! A bzImage is entered at its decompressor, which moves itself out of the way, chooses a physical and a virtual address, unpacks
//! the kernel there, relocates it and jumps to it (arch/x86/boot/compressed: head_64.S, kaslr.c, misc.c). How it does that
//! changes from version to version. What has not changed since x86-64 can be relocated is how it goes on: by jumps through a
//! register, the first of them behind the entry to where it has moved itself, the last one to the kernel's own entry point,
//! `startup_64`, all under an identity map. [`Decompressor`] follows them and stops when the next instruction is the kernel's first.
//! The first jump, which is about to be copied with everything around it, is awaited with a debug register, which the decompressor
//! does not use; the others with an int3. An emulated CPU (QEMU) runs a page with a debug register's address one instruction at a
//! time, and the loop that unpacks may be there.
//!
//! There [`Relocation::find`] tells where the kernel is: physically by the entry itself, virtually by the addresses in its data,
//! which differ from those in the image by the same offset everywhere.

use std::collections::BTreeMap;

use iced_x86::{Code, Decoder, DecoderOptions, OpKind, Register};
use probe_core::patch::INT3;
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::watch::{WatchSet, Watchpoint};
use probe_core::{Gpa, Gva, MemoryError, PhysicalMemory, VcpuState, paging};

use crate::bytes::u64_at;
use crate::image::Image;

/// In how many bytes a jump is looked for. `startup_64` of the decompressor must end before offset 0x390, where the entry for 32-bit
/// EFI is.
const CODE_BYTES: usize = 4096;

/// How many jumps there may be before the one to the kernel. Every version so far has one.
const MAX_JUMPS: u32 = 4;

/// Bytes by which the kernel's entry is recognised.
const ENTRY_BYTES: usize = 16;

/// How many addresses in the kernel's data are compared.
const ADDRESSES: usize = 4096;

/// What both addresses of a kernel are a multiple of, at least (CONFIG_PHYSICAL_ALIGN).
const ALIGNMENT: u64 = 2 << 20;

/// By how much a kernel lies behind where it was linked, and where the image says that it is to be loaded; modulo 2^64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Relocation {
    /// Of linear addresses.
    pub gva_offset: u64,
    /// Of guest-physical addresses.
    pub gpa_offset: u64,
}

/// Why it cannot be said where a kernel relocates itself to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RelocationError {
    /// Nothing that relocates anything.
    #[error(
        "The image has no decompressor, which chooses the kernel's addresses; give a bzImage, or leave --kaslr out"
    )]
    NoDecompressor,
    /// Its code is of an unknown kind.
    #[error(
        "The decompressor's code at {0} has no jump through a register, so it cannot be followed to the kernel; leave --kaslr out"
    )]
    NoJump(Gva),
    /// A vCPU that is not there.
    #[error("The guest stands at {0}, which is not the entry of its kernel")]
    NotEntered(Gva),
    /// The addresses in its data say nothing.
    #[error(
        "The addresses in the kernel's data do not tell where it was relocated to ({agreeing} of {addresses} agree); leave --kaslr out"
    )]
    Addresses {
        /// How many agree on the likeliest place.
        agreeing: usize,
        /// Of how many.
        addresses: usize,
    },
    /// It lies where no kernel can.
    #[error(
        "The kernel lies {gva_offset:#x} behind its linked and {gpa_offset:#x} behind its physical address, which no kernel can"
    )]
    Misplaced {
        /// Of linear addresses.
        gva_offset: u64,
        /// Of guest-physical addresses.
        gpa_offset: u64,
    },
    /// It is not in RAM.
    #[error("The kernel has unpacked itself to where there is no RAM")]
    Memory(#[source] MemoryError),
}

impl Relocation {
    /// Where the kernel of `image` lies that `vcpu` is about to enter.
    ///
    /// # Errors
    /// See [`RelocationError`].
    pub fn find(
        image: &Image,
        vcpu: &VcpuState,
        memory: &dyn PhysicalMemory,
    ) -> Result<Self, RelocationError> {
        let rip = Gva(vcpu.regs.rip);
        let entry = paging::physical(&vcpu.sys, memory, rip);
        let entry = entry.filter(|_| image.first_bytes().is_some_and(|first| are_next(&first, vcpu, memory)));
        let entry = entry.ok_or(RelocationError::NotEntered(rip))?;
        let gpa_offset = entry.0.wrapping_sub(image.entry.0);
        let gva_offset = gva_offset(image, gpa_offset, memory)?;
        // The image stays in the top 2 GiB.
        let end = image.gva_range().map_or(0, |range| range.end.0 - 1);
        let aligned = gva_offset.is_multiple_of(ALIGNMENT) && gpa_offset.is_multiple_of(ALIGNMENT);
        if !aligned || end.checked_add(gva_offset).is_none() {
            return Err(RelocationError::Misplaced { gva_offset, gpa_offset });
        }
        Ok(Self { gva_offset, gpa_offset })
    }
}

/// By how much the addresses in the kernel's data differ from those in the image.
fn gva_offset(image: &Image, gpa_offset: u64, memory: &dyn PhysicalMemory) -> Result<u64, RelocationError> {
    let range = image.gva_range().unwrap_or_default();
    let words = image.segments.iter().filter(|segment| segment.gva.is_some()).flat_map(|segment| {
        let data = image.segment_data(segment);
        let linked = (0..data.len()).step_by(8).filter_map(|at| Some((at as u64, u64_at(data, at)?)));
        linked.map(|(at, word)| (segment.gpa.offset(at), word))
    });
    let addresses = words.filter(|(_, word)| range.contains(&Gva(*word))).take(ADDRESSES);
    let mut offsets: BTreeMap<u64, usize> = BTreeMap::new();
    let mut count = 0;
    for (gpa, linked) in addresses {
        let found = memory.read_u64(gpa.offset(gpa_offset)).map_err(RelocationError::Memory)?;
        *offsets.entry(found.wrapping_sub(linked)).or_default() += 1;
        count += 1;
    }
    let (offset, agreeing) = offsets.into_iter().max_by_key(|(_, agreeing)| *agreeing).unwrap_or_default();
    // What merely looks like an address is not relocated.
    if agreeing == 0 || agreeing < count / 4 * 3 {
        return Err(RelocationError::Addresses { agreeing, addresses: count });
    }
    Ok(offset)
}

impl Image {
    /// What is at the entry. It holds no address that would be relocated: a kernel is entered before it knows where it is.
    fn first_bytes(&self) -> Option<[u8; ENTRY_BYTES]> {
        self.read_physical(self.entry, ENTRY_BYTES)?.try_into().ok()
    }
}

/// Whether these are the bytes that a vCPU runs next.
fn are_next(bytes: &[u8; ENTRY_BYTES], vcpu: &VcpuState, memory: &dyn PhysicalMemory) -> bool {
    let mut found = [0; ENTRY_BYTES];
    let read = paging::read_virtual(&vcpu.sys, memory, Gva(vcpu.regs.rip), &mut found);
    read == found.len() && found == *bytes
}

/// A jump through a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Jump {
    at: Gva,
    register: Register,
}

impl Jump {
    /// The first one in `code`, which begins at `start`. Instructions are taken one after the other: where the decompressor
    /// branches, it comes back.
    fn first(code: &[u8], start: Gva) -> Result<Self, RelocationError> {
        let code = &code[..code.len().min(CODE_BYTES)];
        let mut instructions = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE).into_iter();
        let jump = instructions.find(|instruction| {
            instruction.code() == Code::Jmp_rm64 && instruction.op0_kind() == OpKind::Register
        });
        let jump = jump.ok_or(RelocationError::NoJump(start))?;
        Ok(Self { at: Gva(jump.ip()), register: jump.op0_register() })
    }
}

/// Follows a vCPU that runs a bzImage's decompressor, and finishes the run where its kernel begins.
#[derive(Debug)]
pub struct Decompressor {
    /// What the kernel begins with.
    first_bytes: [u8; ENTRY_BYTES],
    jump: Jump,
    jumps: u32,
    /// Where the jump is awaited with an int3.
    patch: Option<Patch>,
}

/// An int3 in the decompressor, which neither reads nor writes its own code from its first jump on.
#[derive(Debug)]
struct Patch {
    gpa: Gpa,
    saved: u8,
}

impl Patch {
    fn new(at: Gva, state: &VcpuState, memory: &dyn PhysicalMemory) -> Result<Self, String> {
        let mut saved = [0];
        let gpa = paging::physical(&state.sys, memory, at).ok_or_else(|| format!("{at} is not mapped"))?;
        memory.read(gpa, &mut saved).map_err(|error| error.to_string())?;
        memory.write(gpa, &[INT3]).map_err(|error| error.to_string())?;
        Ok(Self { gpa, saved: saved[0] })
    }

    fn remove(self, memory: &dyn PhysicalMemory) -> Result<(), String> {
        memory.write(self.gpa, &[self.saved]).map_err(|error| error.to_string())
    }
}

impl Decompressor {
    /// For a vCPU that is about to enter the decompressor of `image`.
    ///
    /// # Errors
    /// There is none, or it is not as expected.
    pub fn new(image: &Image) -> Result<Self, RelocationError> {
        let part = image.protected_mode.as_ref().ok_or(RelocationError::NoDecompressor)?;
        let jump = Jump::first(part.code(), Gva(part.entry().0))?;
        let first_bytes = image.first_bytes().ok_or(RelocationError::NotEntered(Gva(image.entry.0)))?;
        Ok(Self { first_bytes, jump, jumps: 0, patch: None })
    }

    /// Carries the jump out and looks where it leads.
    fn follow(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory) -> Result<Resume, String> {
        if let Some(patch) = self.patch.take() {
            patch.remove(memory)?;
        }
        let target = state.regs.full_mut(self.jump.register).map(|register| *register);
        let target = target.ok_or_else(|| format!("{:?} holds no address", self.jump.register))?;
        state.regs.rip = target;
        if are_next(&self.first_bytes, state, memory) {
            return Ok(Resume::Finish);
        }
        self.jumps += 1;
        if self.jumps == MAX_JUMPS {
            return Err(format!("{MAX_JUMPS} jumps of the decompressor did not lead to its kernel"));
        }
        let mut code = [0; CODE_BYTES];
        let read = paging::read_virtual(&state.sys, memory, Gva(target), &mut code);
        self.jump = Jump::first(&code[..read], Gva(target)).map_err(|error| error.to_string())?;
        self.patch = Some(Patch::new(self.jump.at, state, memory)?);
        Ok(Resume::Run)
    }
}

impl StopHandler for Decompressor {
    fn on_stop(&mut self, state: &mut VcpuState, memory: &dyn PhysicalMemory, stop: Stop) -> Resume {
        let resume = match stop {
            Stop::Watchpoint { pc, .. } if pc == self.jump.at => self.follow(state, memory),
            // Hosts that emulate kernel code fail to emulate the int3.
            Stop::Breakpoint { .. } | Stop::EmulationFailure { bytes: [INT3, ..], len: 1.. }
                if state.regs.rip == self.jump.at.0 && self.patch.is_some() =>
            {
                self.follow(state, memory)
            }
            _ => Err(format!("The decompressor stopped at {:#x}", state.regs.rip)),
        };
        resume.unwrap_or_else(|reason| Resume::Fail { reason })
    }

    fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
        // No page is watched yet; were one, the store would be the guest's own.
        let _ = memory.write(gpa, data);
    }

    fn wants_breakpoints(&self) -> bool {
        self.patch.is_some()
    }

    fn watchpoints(&self) -> WatchSet {
        if self.patch.is_some() { WatchSet::default() } else { Watchpoint::execution(self.jump.at).into() }
    }
}

#[cfg(test)]
mod tests {
    use probe_core::PAGE_SIZE;
    use probe_core::mock::{MockMemory, MockPageTables, MockVcpu};
    use probe_core::paging::entry;
    use probe_core::watch::WatchHits;

    use super::*;
    use crate::testing::{Elf, Kernel, PREFERRED, RODATA, TEXT, TEXT_GPA, bzimage_with};
    use crate::{Guest, image::Image, sites::SiteKind};

    /// As the decompressors of Linux 5 and 6 begin: what is of interest is a far return and a call before the jump.
    const STAGE_1: &[u8] = &[
        0xfc, // cld
        0xfa, // cli
        0x48, 0x8d, 0x2d, 0xf2, 0xff, 0xff, 0xff, // lea -0xe(%rip),%rbp
        0x48, 0xcb, // lretq
        0xe8, 0x00, 0x01, 0x00, 0x00, // call
        0xff, 0x25, 0x00, 0x00, 0x00, 0x00, // jmp *(%rip), which is none through a register
        0xf3, 0x48, 0xa5, // rep movsq
        0x48, 0x8d, 0x83, 0x00, 0xa4, 0xad, 0x00, // lea 0xada400(%rbx),%rax
        0xff, 0xe0, // jmp *%rax
    ];
    const JUMP_1: u64 = PREFERRED + 0x200 + STAGE_1.len() as u64 - 2;
    /// And how they end.
    const STAGE_2: &[u8] = &[
        0x31, 0xc0, // xor %eax,%eax
        0xf3, 0x48, 0xab, // rep stos
        0xe8, 0x3e, 0xbc, 0x01, 0x00, // call
        0x4c, 0x89, 0xfe, // mov %r15,%rsi
        0x41, 0xff, 0xe2, // jmp *%r10
        0xf4, // hlt
    ];
    const MOVED: u64 = 0x200_0000;
    const JUMP_2: u64 = MOVED + STAGE_2.len() as u64 - 4;
    const GVA_OFFSET: u64 = 0x1240_0000;
    const GPA_OFFSET: u64 = 0x60_0000;
    const ROOT: Gpa = Gpa(0x1000);

    fn gzip(data: &[u8]) -> Vec<u8> {
        use std::io::Write;
        let mut encoder = flate2::write::GzEncoder::new(vec![], flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    /// Entered behind the start of its text, as Linux is since 6.7. Its data holds addresses, and words that only look so.
    fn kernel(stage_1: &[u8]) -> Image {
        let mut kernel = Kernel::default();
        kernel.function("first", &[0x90; 0x20]);
        kernel.function("startup_64", &[0x49, 0x89, 0xf7, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf4]);
        // call __fentry__; push %rbp; ret
        let fentry = kernel.next() + 0x20;
        let mut code = vec![0xe8];
        code.extend(u32::try_from(fentry - kernel.next() - 5).unwrap().to_le_bytes());
        code.extend([0x55, 0xc3]);
        let traced = kernel.function("traced", &code);
        kernel.symbol("T__fentry__", fentry);
        kernel.table(".data", |_| {
            (0..40).flat_map(|at| (TEXT + at).to_le_bytes()).chain(u64::MAX.to_le_bytes()).collect()
        });
        // One of a function that the build has dropped.
        kernel.table("__mcount_loc", |_| [traced, 0].into_iter().flat_map(u64::to_le_bytes).collect());
        let elf = Elf { entry: TEXT_GPA + 0x20, ..kernel.elf() };
        Image::parse(bzimage_with(stage_1, &{
            let elf = elf.build();
            let mut packed = gzip(&elf);
            packed.extend(u32::try_from(elf.len()).unwrap().to_le_bytes());
            packed
        }))
        .unwrap()
    }

    /// Memory in which `image` has been unpacked and relocated, under an identity map.
    fn unpacked(image: &Image, gva_offset: u64, gpa_offset: u64) -> MockMemory {
        let memory = MockMemory::with_ram(0x10_0000);
        for segment in &image.segments {
            let at = segment.gpa.offset(gpa_offset);
            memory.add_ram(at.page(), segment.mem_size.next_multiple_of(PAGE_SIZE) + PAGE_SIZE);
            let mut data = image.segment_data(segment).to_vec();
            for word in data.as_chunks_mut::<8>().0 {
                let linked = u64::from_le_bytes(*word);
                if (TEXT..TEXT + 0x2000_0000).contains(&linked) {
                    *word = (linked + gva_offset).to_le_bytes();
                }
            }
            memory.load(at, &data);
        }
        let dropped = image.section("__mcount_loc").unwrap().gva.offset(8);
        let dropped = image.gva_to_gpa(dropped).unwrap().offset(gpa_offset);
        memory.load(dropped, &gva_offset.to_le_bytes());
        memory.add_ram(Gpa(MOVED), PAGE_SIZE);
        memory.load(Gpa(MOVED), STAGE_2);
        MockPageTables::new(&memory, ROOT, 4).map_identity(64 << 20, entry::PRESENT | entry::WRITABLE);
        memory
    }

    fn met(pc: u64) -> Stop {
        Stop::Watchpoint { pc: Gva(pc), hits: WatchHits::NONE, guest_dr6: 0 }
    }

    const INT3_MET: Stop = Stop::Breakpoint { pc: Gva(JUMP_2) };

    fn at_entry(image: &Image) -> VcpuState {
        MockVcpu::new(ROOT).rip(Gva(image.entry.0 + GPA_OFFSET)).build()
    }

    #[test]
    fn a_decompressor_is_followed_to_the_first_instruction_of_its_kernel() {
        let image = kernel(STAGE_1);
        let memory = unpacked(&image, GVA_OFFSET, GPA_OFFSET);
        let mut decompressor = Decompressor::new(&image).unwrap();
        assert_eq!(decompressor.watchpoints(), Watchpoint::execution(Gva(JUMP_1)).into());
        let mut state = MockVcpu::new(ROOT).rip(Gva(JUMP_1)).regs(|regs| regs.rax = MOVED).build();
        assert_eq!(decompressor.on_stop(&mut state, &memory, met(JUMP_1)), Resume::Run);
        assert_eq!(state.regs.rip, MOVED);
        assert_eq!(decompressor.watchpoints(), WatchSet::default());
        assert!(decompressor.wants_breakpoints());
        let code = || {
            let mut code = [0; STAGE_2.len()];
            memory.read(Gpa(MOVED), &mut code).unwrap();
            code
        };
        let mut patched = STAGE_2.to_vec();
        patched[usize::try_from(JUMP_2 - MOVED).unwrap()] = INT3;
        assert_eq!(code()[..], patched);
        let entry = image.entry.0 + GPA_OFFSET;
        (state.regs.rip, state.regs.r10) = (JUMP_2, entry);
        assert_eq!(decompressor.on_stop(&mut state, &memory, INT3_MET), Resume::Finish);
        assert_eq!(state.regs.rip, entry);
        assert!(!decompressor.wants_breakpoints());
        assert_eq!(code(), STAGE_2, "nothing is left in it");
    }

    #[test]
    fn a_decompressor_that_does_otherwise_is_given_up_with_a_reason() {
        let image = kernel(STAGE_1);
        let memory = unpacked(&image, GVA_OFFSET, GPA_OFFSET);
        let failure = |resume| match resume {
            Resume::Fail { reason } => reason,
            other => panic!("{other:?}"),
        };
        // It stops where nobody waits for it.
        let mut state = MockVcpu::new(ROOT).rip(Gva(0x1234)).build();
        let stop = Stop::EmulationFailure { bytes: [0; 15], len: 0 };
        let resume = Decompressor::new(&image).unwrap().on_stop(&mut state, &memory, stop);
        assert!(failure(resume).contains("stopped at 0x1234"));
        // It goes on to where there is no jump, or nothing at all.
        for target in [0x8000, 0x7000_0000_0000] {
            let mut decompressor = Decompressor::new(&image).unwrap();
            let mut state = MockVcpu::new(ROOT).rip(Gva(JUMP_1)).regs(|regs| regs.rax = target).build();
            let reason = failure(decompressor.on_stop(&mut state, &memory, met(JUMP_1)));
            assert!(reason.contains("no jump through a register"), "{reason}");
        }
        // It jumps in circles.
        let mut decompressor = Decompressor::new(&image).unwrap();
        let mut state = MockVcpu::new(ROOT).regs(|regs| (regs.rax, regs.r10) = (MOVED, MOVED)).build();
        assert_eq!(decompressor.on_stop(&mut state, &memory, met(JUMP_1)), Resume::Run);
        for _ in 2..MAX_JUMPS {
            state.regs.rip = JUMP_2;
            assert_eq!(decompressor.on_stop(&mut state, &memory, INT3_MET), Resume::Run);
        }
        state.regs.rip = JUMP_2;
        // As hosts tell it that emulate kernel code.
        let mut bytes = [0; 15];
        bytes[0] = INT3;
        let stop = Stop::EmulationFailure { bytes, len: 1 };
        assert!(failure(decompressor.on_stop(&mut state, &memory, stop)).contains("did not lead"));
    }

    #[test]
    fn an_image_without_a_decompressor_that_can_be_followed_is_refused() {
        let error = |image: &Image| Decompressor::new(image).unwrap_err();
        assert_eq!(error(&kernel(&[0xf4; 64])), RelocationError::NoJump(Gva(PREFERRED + 0x200)));
        let mut vmlinux = Kernel::default();
        vmlinux.function("startup_64", &[0xf4]);
        let vmlinux = Image::parse(vmlinux.build()).unwrap();
        assert_eq!(error(&vmlinux), RelocationError::NoDecompressor);
        let bare = Image::parse(Elf::bare_metal(0x10_0000, &[0xf4]).build()).unwrap();
        assert_eq!(error(&bare), RelocationError::NoDecompressor);
    }

    #[test]
    fn a_guest_is_the_same_where_it_has_relocated_itself_to() {
        let image = kernel(STAGE_1);
        for (gva_offset, gpa_offset) in [(GVA_OFFSET, GPA_OFFSET), (0, 0), (GVA_OFFSET, 0), (0, GPA_OFFSET)] {
            let memory = unpacked(&image, gva_offset, gpa_offset);
            let state = MockVcpu::new(ROOT).rip(Gva(image.entry.0 + gpa_offset)).build();
            let linked = Guest::new(kernel(STAGE_1)).unwrap();
            let guest = Guest::new(kernel(STAGE_1)).unwrap().relocated(&state, &memory).unwrap();
            assert_eq!(guest.image.relocation, Relocation { gva_offset, gpa_offset });
            assert_eq!(guest.image.entry, linked.image.entry.offset(gpa_offset));
            assert_eq!(guest.symbols.len(), linked.symbols.len());
            for (here, there) in guest.symbols.iter().zip(linked.symbols.iter()) {
                // What is not in the image has not moved with it.
                let moved = if there.name == "percpu_counter" { 0 } else { gva_offset };
                assert_eq!((here.name, here.gva), (there.name, there.gva.offset(moved)));
            }
            let (here, there) = (guest.place("traced").unwrap(), linked.place("traced").unwrap());
            assert_eq!(
                (here.gva, here.gpa, here.offset, here.at_entry),
                (there.gva.offset(gva_offset), there.gpa.offset(gpa_offset), 5, true)
            );
            assert_eq!(here.function.unwrap().start, there.function.unwrap().start.offset(gva_offset));
            assert_eq!(here.bytes, there.bytes);
            assert!(guest.image.is_code(here.gva));
            assert_eq!((guest.sites.count(SiteKind::Ftrace), guest.sites.unreadable().len()), (1, 0));
            // Its data is what the guest has, with the addresses that it has.
            let table = guest.image.section(".data").unwrap().gva;
            assert_eq!(u64_at(guest.image.read(table, 8).unwrap(), 0), Some(TEXT + gva_offset));
            // A copy of the data is the same guest, once it is said where that lies.
            let copy = Image::parse(guest.image.data().to_vec()).unwrap().moved(guest.image.relocation);
            let copy = Guest::new(copy).unwrap();
            assert_eq!((copy.image.entry, &copy.image.segments), (guest.image.entry, &guest.image.segments));
            assert!(copy.linux.is_some());
            assert!(
                copy.symbols
                    .iter()
                    .map(|it| (it.name, it.gva))
                    .eq(guest.symbols.iter().map(|it| (it.name, it.gva)))
            );
            assert_eq!(copy.place("traced").unwrap().bytes, here.bytes);
        }
    }

    #[test]
    fn a_kernel_that_cannot_be_where_it_seems_to_be_is_refused() {
        let image = kernel(STAGE_1);
        let found = |memory: &MockMemory| Relocation::find(&image, &at_entry(&image), memory);
        // Not at its entry.
        let memory = unpacked(&image, GVA_OFFSET, 0);
        assert!(matches!(found(&memory), Err(RelocationError::NotEntered(_))));
        // Not where pages of 2 MiB could map it, or beyond the end of the address space.
        for gva_offset in [GVA_OFFSET + 0x1000, 0x7e00_0000] {
            let memory = unpacked(&image, gva_offset, GPA_OFFSET);
            assert_eq!(
                found(&memory),
                Err(RelocationError::Misplaced { gva_offset, gpa_offset: GPA_OFFSET })
            );
        }
        // Every address elsewhere.
        let memory = unpacked(&image, GVA_OFFSET, GPA_OFFSET);
        let table = image.gva_to_gpa(image.section(".data").unwrap().gva).unwrap();
        for at in 0..40 {
            memory.load(table.offset(GPA_OFFSET + at * 8), &(RODATA + at * at * 8).to_le_bytes());
        }
        assert!(matches!(found(&memory), Err(RelocationError::Addresses { .. })));
        // Half of it in no RAM.
        let memory = MockMemory::with_ram(0x10_0000);
        MockPageTables::new(&memory, ROOT, 4).map_identity(64 << 20, entry::PRESENT);
        let text = image.segments.first().unwrap();
        memory.add_ram(text.gpa.offset(GPA_OFFSET), PAGE_SIZE);
        memory.load(text.gpa.offset(GPA_OFFSET), image.segment_data(text));
        assert!(matches!(found(&memory), Err(RelocationError::Memory(_))));
    }
}
