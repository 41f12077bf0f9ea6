//! Virtio devices, driven by a guest through its own registers, queues and interrupts.

use std::io::Write;

use disk::{Access, Disk, DiskOptions};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, dword_ptr, eax, ecx, qword_ptr, rax, rbx, rcx, word_ptr,
};
use probe_core::{Gpa, PhysicalMemory};
use tempfile::NamedTempFile;
use vmm::{GuestRam, RunEnd, layout};

use crate::common::{
    CODE, DATA, Guest, assemble, guest_with, interrupt_table, no_stops, power_off, use_interrupts, word,
};

const TABLE: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const BUFFERS: u64 = 0x21_0000;
const SIZE: u32 = 8;

/// Descriptor flags (Virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// GSI 5, which the first window has, at the 8259s' vectors.
const VECTOR: u8 = 0x25;

fn set(a: &mut CodeAssembler, register: u64, value: u32) -> Result<(), IcedError> {
    a.mov(dword_ptr(rbx + register), value)
}

/// Brings the device in window `index` up, one queue at [`TABLE`], its address in rbx from then on (Virtio 1.2, 3.1.1, 4.2.3).
fn bring_up(a: &mut CodeAssembler, index: usize) -> Result<(), IcedError> {
    a.mov(rbx, layout::mmio_window(index).unwrap().base.0)?;
    for (register, value) in
        [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11), (0x30, 0), (0x38, SIZE)]
    {
        set(a, register, value)?;
    }
    for (register, address) in [(0x80, TABLE), (0x90, AVAILABLE), (0xa0, USED)] {
        set(a, register, u32::try_from(address).unwrap())?;
    }
    set(a, 0x44, 1)?;
    set(a, 0x70, 15)
}

/// How many register writes that takes.
const BRING_UP_WRITES: u64 = 13;

fn describe(memory: &GuestRam, index: u16, address: u64, length: u32, flags: u16) {
    let fields =
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &(index + 1).to_le_bytes()];
    memory.write(Gpa(TABLE + 16 * u64::from(index)), &fields.concat()).unwrap();
}

/// A disk of 64 sectors, each full of its number.
fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    (0..64u8).for_each(|number| file.write_all(&[number; 512]).unwrap());
    file
}

fn open(image: &NamedTempFile, access: Access) -> Disk {
    Disk::open(&DiskOptions { access, ..DiskOptions::new(image.path().to_owned()) }).unwrap()
}

#[test]
fn a_guest_reads_and_writes_sectors_and_sleeps_until_they_are_there() {
    for access in [Access::Write, Access::Overlay] {
        let code = assemble(CODE, |a| {
            use_interrupts(a)?;
            // The interrupt controller (Intel 8259A): edges, vectors from 0x20, a second one at input 2, 8086 mode; input 5 is open.
            for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xdf)] {
                a.mov(al, value)?;
                a.out(port, al)?;
            }
            bring_up(a, 0)?;
            a.mov(word_ptr(AVAILABLE + 2), 2)?;
            set(a, 0x50, 0)?;
            let (mut look, mut sleep, mut done) = (a.create_label(), a.create_label(), a.create_label());
            a.set_label(&mut look)?;
            a.cli()?;
            a.cmp(word_ptr(USED + 2), 2)?;
            a.jne(sleep)?;
            // Both requests may be done before their interrupt is seen.
            a.cmp(dword_ptr(DATA), 0)?;
            a.jne(done)?;
            a.set_label(&mut sleep)?;
            // Nothing comes between (Intel SDM vol. 2B, STI).
            a.sti()?;
            a.hlt()?;
            a.jmp(look)?;
            a.set_label(&mut done)?;
            a.mov(rcx, qword_ptr(rbx + 0x100))?;
            a.mov(qword_ptr(DATA + 8), rcx)?;
            power_off(a)
        });
        let interrupt = assemble(0, |a| {
            a.push(rax)?;
            a.mov(eax, dword_ptr(rbx + 0x60))?;
            a.or(dword_ptr(DATA), eax)?;
            a.mov(dword_ptr(rbx + 0x64), eax)?;
            a.mov(al, 0x20)?;
            a.out(0x20, al)?;
            a.pop(rax)?;
            a.iretq()
        });
        let image = image();
        let Some(Guest { machine, memory, .. }) = guest_with(&code, vec![open(&image, access)]) else {
            return;
        };
        interrupt_table(&memory, &[(VECTOR, interrupt)]);
        // Sector 3 is read, sector 5 written.
        describe(&memory, 0, BUFFERS, 16, NEXT);
        describe(&memory, 1, BUFFERS + 0x1000, 513, WRITE);
        describe(&memory, 2, BUFFERS + 16, 16, NEXT);
        describe(&memory, 3, BUFFERS + 0x2000, 512, NEXT);
        describe(&memory, 4, BUFFERS + 0x3000, 1, WRITE);
        memory.write(Gpa(BUFFERS + 8), &3u64.to_le_bytes()).unwrap();
        memory.write(Gpa(BUFFERS + 16), &1u64.to_le_bytes()).unwrap();
        memory.write(Gpa(BUFFERS + 24), &5u64.to_le_bytes()).unwrap();
        memory.write(Gpa(BUFFERS + 0x2000), &[0xa5; 512]).unwrap();
        memory.write(Gpa(BUFFERS + 0x3000), &[0xff]).unwrap();
        memory.write(Gpa(AVAILABLE + 4), &[0, 0, 2, 0]).unwrap();

        let report = machine.run(vec![no_stops()]).unwrap();
        assert_eq!(report.end, RunEnd::PowerOff);
        let mut read = [0xee; 513];
        memory.read(Gpa(BUFFERS + 0x1000), &mut read).unwrap();
        assert_eq!(read[..512], [3; 512]);
        assert_eq!(read[512], 0);
        let mut status = [0xee];
        memory.read(Gpa(BUFFERS + 0x3000), &mut status).unwrap();
        assert_eq!(status, [0]);
        assert_eq!(word(&memory, DATA), 1, "an interrupt, for a used buffer");
        assert_eq!(word(&memory, DATA + 8), 64, "sectors");
        let sector = &std::fs::read(image.path()).unwrap()[5 * 512..6 * 512];
        assert_eq!(sector, [if access == Access::Write { 0xa5 } else { 5 }; 512]);
        // An interrupt or two are taken note of; the notification makes no exit.
        let writes = report.vcpus[0].exits.mmio_write;
        assert!((BRING_UP_WRITES + 1..=BRING_UP_WRITES + 2).contains(&writes), "{writes}");
    }
}

#[test]
fn a_guest_that_breaks_the_rules_finds_that_its_device_needs_a_reset() {
    let code = assemble(CODE, |a| {
        bring_up(a, 0)?;
        a.mov(word_ptr(AVAILABLE + 2), 1)?;
        set(a, 0x50, 0)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.test(dword_ptr(rbx + 0x70), 64)?;
        a.je(wait)?;
        set(a, 0x70, 0)?;
        a.mov(ecx, dword_ptr(rbx + 0x70))?;
        a.mov(qword_ptr(DATA), rcx)?;
        // The entropy device is none the worse for it.
        a.mov(word_ptr(AVAILABLE + 2), 0)?;
        bring_up(a, 1)?;
        a.mov(dword_ptr(TABLE), u32::try_from(BUFFERS).unwrap())?;
        a.mov(dword_ptr(TABLE + 8), 64)?;
        a.mov(dword_ptr(TABLE + 12), u32::from(WRITE))?;
        a.mov(word_ptr(AVAILABLE + 2), 1)?;
        set(a, 0x50, 0)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(byte_ptr(USED + 2), 1)?;
        a.jne(wait)?;
        power_off(a)
    });
    let image = image();
    let Some(Guest { machine, memory, .. }) = guest_with(&code, vec![open(&image, Access::Overlay)]) else {
        return;
    };
    // The slots that displaced instructions run from are memory of the host's, and no guest's buffer.
    describe(&memory, 0, BUFFERS, 16, NEXT);
    describe(&memory, 1, layout::SLOT_REGION.0, 513, WRITE);
    memory.write(layout::SLOT_REGION, &[0x5a; 16]).unwrap();
    let report = machine.run(vec![no_stops()]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(word(&memory, DATA), 0, "the status after the reset");
    assert_eq!(word(&memory, layout::SLOT_REGION.0), 0x5a5a_5a5a_5a5a_5a5a);
    let random: Vec<u64> = (0..8).map(|at| word(&memory, BUFFERS + 8 * at)).collect();
    assert!(random.iter().filter(|word| **word != 0).count() >= 7, "{random:x?}");
}
