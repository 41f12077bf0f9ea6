//! Virtio devices, driven by a guest through its own registers, queues and interrupts.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use disk::{Access, Disk, DiskOptions};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, dword_ptr, eax, ecx, qword_ptr, rax, rbx, rcx, word_ptr,
};
use probe_core::{Gpa, PhysicalMemory};
use tempfile::NamedTempFile;
use vmm::{GuestRam, MacAddress, Network, OpenTapError, RunEnd, Vsock, VsockOptions, layout};

use crate::common::{
    Attached, CODE, DATA, Guest, assemble, guest_with, interrupt_table, no_stops, power_off, skip,
    use_interrupts, word,
};

const TABLE: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
/// From one queue to the next.
const QUEUE_BYTES: u64 = 0x4000;
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

/// Brings the device in window `index` up with its first queues, the first at [`TABLE`], its address in rbx from then on (Virtio 1.2,
/// 3.1.1, 4.2.3).
fn bring_up(a: &mut CodeAssembler, index: usize, queues: u32) -> Result<(), IcedError> {
    a.mov(rbx, layout::mmio_window(index).unwrap().base.0)?;
    for (register, value) in [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), (0x70, 11)] {
        set(a, register, value)?;
    }
    for queue in 0..queues {
        set(a, 0x30, queue)?;
        set(a, 0x38, SIZE)?;
        for (register, address) in [(0x80, TABLE), (0x90, AVAILABLE), (0xa0, USED)] {
            let address = address + QUEUE_BYTES * u64::from(queue);
            set(a, register, u32::try_from(address).unwrap())?;
        }
        set(a, 0x44, 1)?;
    }
    set(a, 0x70, 15)
}

/// How many register writes that takes for one queue.
const BRING_UP_WRITES: u64 = 13;

fn describe(memory: &GuestRam, index: u16, address: u64, length: u32, flags: u16) {
    describe_in(memory, 0, index, address, length, flags);
}

fn describe_in(memory: &GuestRam, queue: u64, index: u16, address: u64, length: u32, flags: u16) {
    let fields =
        [&address.to_le_bytes()[..], &length.to_le_bytes(), &flags.to_le_bytes(), &(index + 1).to_le_bytes()];
    memory.write(Gpa(TABLE + QUEUE_BYTES * queue + 16 * u64::from(index)), &fields.concat()).unwrap();
}

/// Waits until the device has used so many requests of its first queue.
fn wait_for_used(a: &mut CodeAssembler, count: u32) -> Result<(), IcedError> {
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.cmp(word_ptr(USED + 2), count)?;
    a.jne(wait)
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

fn disk(disk: Disk) -> Attached {
    Attached { disks: vec![disk], ..Attached::default() }
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
            bring_up(a, 0, 1)?;
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
        let Some(Guest { machine, memory, .. }) = guest_with(&code, disk(open(&image, access))) else {
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
        bring_up(a, 0, 1)?;
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
        bring_up(a, 1, 1)?;
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
    let Some(Guest { machine, memory, .. }) = guest_with(&code, disk(open(&image, Access::Overlay))) else {
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

/// A packet of a guest's vsock device (Virtio 1.2, 5.10.6), from its port 5; the other port is 0.
fn vsock_packet(op: u16, data: &[u8]) -> Vec<u8> {
    let length = u32::try_from(data.len()).unwrap();
    [
        &3u64.to_le_bytes()[..],
        &2u64.to_le_bytes(),
        &5u32.to_le_bytes(),
        &0u32.to_le_bytes(),
        &length.to_le_bytes(),
        &1u16.to_le_bytes(),
        &op.to_le_bytes(),
        &0u32.to_le_bytes(),
        &0x1_0000u32.to_le_bytes(),
        &0u32.to_le_bytes(),
        data,
    ]
    .concat()
}

#[test]
fn a_guest_answers_a_program_of_the_host_over_vsock() {
    const ANSWER: u64 = BUFFERS + 0x4000;
    const ECHO: u64 = BUFFERS + 0x5000;
    let code = assemble(CODE, |a| {
        bring_up(a, 1, 2)?;
        a.mov(word_ptr(AVAILABLE + 2), 3)?;
        set(a, 0x50, 0)?;
        // A request comes, and is agreed to.
        wait_for_used(a, 1)?;
        a.mov(eax, dword_ptr(BUFFERS + 16))?;
        a.mov(dword_ptr(ANSWER + 20), eax)?;
        a.mov(dword_ptr(ECHO + 20), eax)?;
        a.mov(word_ptr(AVAILABLE + QUEUE_BYTES + 2), 1)?;
        set(a, 0x50, 1)?;
        // Data come, and go back.
        wait_for_used(a, 2)?;
        a.mov(eax, dword_ptr(BUFFERS + 0x1000 + 44))?;
        a.mov(dword_ptr(ECHO + 44), eax)?;
        a.mov(word_ptr(AVAILABLE + QUEUE_BYTES + 2), 2)?;
        set(a, 0x50, 1)?;
        wait_for_used(a, 3)?;
        power_off(a)
    });
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let vsock = Vsock::open(&VsockOptions { cid: 3, path: path.clone() }).unwrap();
    let attached = Attached { vsock: Some(vsock), ..Attached::default() };
    let Some(Guest { machine, memory, .. }) = guest_with(&code, attached) else { return };
    for buffer in 0..3u16 {
        describe(&memory, buffer, BUFFERS + 0x1000 * u64::from(buffer), 0x1000, WRITE);
        memory.write(Gpa(AVAILABLE + 4 + 2 * u64::from(buffer)), &buffer.to_le_bytes()).unwrap();
    }
    let packets = [(ANSWER, vsock_packet(2, &[])), (ECHO, vsock_packet(5, &[0; 4]))];
    for (index, (address, packet)) in (0u16..).zip(packets) {
        memory.write(Gpa(address), &packet).unwrap();
        let length = u32::try_from(packet.len()).unwrap();
        describe_in(&memory, 1, index, address, length, 0);
        let slot = AVAILABLE + QUEUE_BYTES + 4 + 2 * u64::from(index);
        memory.write(Gpa(slot), &index.to_le_bytes()).unwrap();
    }
    let connect = move || -> io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        stream.write_all(b"CONNECT 5\n")?;
        let mut answer = [0; 14];
        stream.read_exact(&mut answer)?;
        assert_eq!(&answer, b"OK 1073741824\n");
        Ok(stream)
    };
    let echo = move || -> io::Result<[u8; 4]> {
        let deadline = Instant::now() + Duration::from_secs(60);
        // It is refused until the guest has brought its device up: by an end where the answer would be, or before the question is out.
        let mut stream = loop {
            match connect() {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        };
        stream.write_all(b"ping")?;
        let mut echo = [0; 4];
        stream.read_exact(&mut echo)?;
        Ok(echo)
    };
    let stop = machine.stop_handle();
    let program = thread::spawn(move || {
        let echo = echo();
        // The guest would wait for ever.
        echo.is_err().then(|| stop.stop());
        echo
    });
    let report = machine.run(vec![no_stops()]).unwrap();
    assert_eq!(&program.join().unwrap().unwrap(), b"ping");
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(word(&memory, BUFFERS + 0x2000 + 24) >> 32, 0x0004_0001, "a stream's shutdown");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the socket goes with the machine");
}

/// In a network namespace of its own, where this test runs once more.
const IN_NAMESPACE: &str = "VMPROBE_TEST_IN_NETWORK_NAMESPACE";

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// "Who has 10.9.0.1? Tell 10.9.0.2", with a virtio header (RFC 826; Virtio 1.2, 5.1.6).
fn arp_request() -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend([[0xff; 6], MAC].concat());
    packet.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    packet.extend([&MAC[..], &[10, 9, 0, 2], &[0; 6], &[10, 9, 0, 1]].concat());
    packet
}

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.is_ok_and(|status| status.success()), "ip {arguments}");
}

/// Whether namespaces and taps can be had; says why not, and fails then under CI=true.
fn can_have_taps() -> bool {
    let made =
        Command::new("unshare").args(["-rn", "ip", "tuntap", "add", "mode", "tap", "name", "try"]).output();
    let result = made.and_then(|made| {
        let why = || io::Error::other(String::from_utf8_lossy(&made.stderr).into_owned());
        if made.status.success() { Ok(()) } else { Err(why()) }
    });
    result.inspect_err(|error| skip(error)).is_ok()
}

#[test]
fn a_guest_reaches_the_hosts_kernel_over_a_tap_and_sees_it_go_away() {
    if std::env::var_os(IN_NAMESPACE).is_none() {
        if !can_have_taps() {
            return;
        }
        let name = "devices::a_guest_reaches_the_hosts_kernel_over_a_tap_and_sees_it_go_away";
        let again = Command::new("unshare")
            .arg("-rn")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .env(IN_NAMESPACE, "1")
            .output()
            .unwrap();
        let text = [again.stdout, again.stderr].concat();
        assert!(again.status.success(), "{}", String::from_utf8_lossy(&text));
        return;
    }
    let mac = MacAddress(MAC);
    assert!(matches!(Network::tap("tap9", mac), Err(OpenTapError::Missing(_))));
    // What the kernel's IPv6 has to say comes unasked.
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").ok();
    ip("tuntap add mode tap name tap9");
    ip("addr add 10.9.0.1/24 dev tap9");
    ip("link set tap9 up");
    assert!(matches!(Network::tap("lo", mac), Err(OpenTapError::Attach { .. })));
    let network = Network::tap("tap9", mac).unwrap();
    assert!(matches!(Network::tap("tap9", mac), Err(OpenTapError::Attach { .. })), "it is in use");

    let code = assemble(CODE, |a| {
        bring_up(a, 1, 2)?;
        a.mov(word_ptr(AVAILABLE + 2), 3)?;
        set(a, 0x50, 0)?;
        a.mov(word_ptr(AVAILABLE + QUEUE_BYTES + 2), 1)?;
        set(a, 0x50, 1)?;
        wait_for_used(a, 1)?;
        a.mov(dword_ptr(DATA), 1)?;
        // Until the link is down (5.1.4).
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.test(word_ptr(rbx + 0x106), 1)?;
        a.jne(wait)?;
        power_off(a)
    });
    let attached = Attached { networks: vec![network], ..Attached::default() };
    let Some(Guest { machine, memory, .. }) = guest_with(&code, attached) else { return };
    for buffer in 0..3u16 {
        describe(&memory, buffer, BUFFERS + 0x1000 * u64::from(buffer), 1530, WRITE);
        memory.write(Gpa(AVAILABLE + 4 + 2 * u64::from(buffer)), &buffer.to_le_bytes()).unwrap();
    }
    let request = arp_request();
    memory.write(Gpa(BUFFERS + 0x8000), &request).unwrap();
    describe_in(&memory, 1, 0, BUFFERS + 0x8000, u32::try_from(request.len()).unwrap(), 0);

    let run = machine.start(vec![no_stops()]).unwrap();
    let stop = run.stop_handle();
    let end = thread::scope(|scope| {
        let running = scope.spawn(move || run.wait().unwrap().end);
        let deadline = Instant::now() + Duration::from_secs(60);
        while word(&memory, DATA) == 0 {
            if Instant::now() > deadline {
                stop.stop();
                panic!("no answer");
            }
            thread::sleep(Duration::from_millis(5));
        }
        ip("link del tap9");
        running.join().unwrap()
    });
    assert_eq!(end, RunEnd::PowerOff);
    let mut answer = [0; 54];
    memory.read(Gpa(BUFFERS), &mut answer).unwrap();
    assert_eq!(answer[12..18], MAC, "to the guest");
    assert_eq!(answer[24..34], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2], "an answer");
    assert_eq!(answer[40..44], [10, 9, 0, 1], "of the host's kernel");
    assert_eq!(answer[44..54], [&MAC[..], &[10, 9, 0, 2]].concat());
}
