//! The machine: devices, ends of runs, several vCPUs.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    CODE, DATA, Guest, Scripted, assemble, guest, interrupt_table, is_int3, no_stops, power_off, put, run,
    use_interrupts, word,
};
use iced_x86::code_asm::{
    ah, al, ax, byte_ptr, dword_ptr, dx, eax, ecx, qword_ptr, r8, rax, rbx, rcx, rdi, rdx, rsi, rsp,
};
use probe_core::stop::{Resume, Stop};
use probe_core::watch::{WatchSet, Watchpoint};
use probe_core::{Gpa, Gva, PhysicalMemory, VcpuId};
use vmm::RunEnd;

#[test]
fn hello_on_the_serial_line_and_power_off() {
    let code = assemble(CODE, |a| {
        for character in b"hello\n" {
            put(a, *character)?;
        }
        power_off(a)
    });
    let Some((report, _, console)) = run(&code, no_stops()) else { return };
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(console, "hello\n");
    assert_eq!(report.vcpus[0].exits.port_out, 7);
}

#[test]
fn reset_through_the_keyboard_controller() {
    let code = assemble(CODE, |a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.in_(al, 0x64)?;
        a.test(al, 2)?;
        a.jne(wait)?;
        a.mov(al, 0xfe)?;
        a.out(0x64, al)
    });
    let Some((report, ..)) = run(&code, no_stops()) else { return };
    assert_eq!(report.end, RunEnd::Reset);
}

#[test]
fn the_entry_state_is_the_documented_one() {
    let code = assemble(CODE, |a| {
        a.mov(qword_ptr(DATA), rdi)?;
        a.mov(qword_ptr(DATA + 8), rsi)?;
        a.mov(qword_ptr(DATA + 16), rdx)?;
        // Everything else, or-ed together.
        a.or(rax, rbx)?;
        a.or(rax, rcx)?;
        a.or(rax, r8)?;
        a.or(rax, rsp)?;
        a.mov(qword_ptr(DATA + 24), rax)?;
        power_off(a)
    });
    let Some((report, memory, _)) = run(&code, no_stops()) else { return };
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!([0, 8, 16, 24].map(|at| word(&memory, DATA + at)), [0, 1, 4 << 20, 0]);
    let sys = report.vcpus[0].state.sys;
    assert_eq!((sys.cpl, sys.long_code), (0, true));
}

#[test]
fn the_power_button_interrupts_the_guest_until_it_takes_note() {
    const VECTOR: u8 = 0x30;
    const LOCAL_APIC: u64 = 0xfee0_0000;
    let code = assemble(CODE, |a| {
        use_interrupts(a)?;
        // The local APIC is switched on (Intel SDM vol. 3A, 11.9); the I/O APIC's input 9 is a level for it (82093AA, 3.2.4).
        a.mov(rbx, LOCAL_APIC)?;
        a.mov(dword_ptr(rbx + 0xf0), 0x1ff)?;
        a.mov(rcx, 0xfec0_0000u64)?;
        for (register, value) in [(0x23, 0), (0x22, 1 << 15 | i32::from(VECTOR))] {
            a.mov(dword_ptr(rcx), register)?;
            a.mov(dword_ptr(rcx + 0x10), value)?;
        }
        // PWRBTN_EN.
        a.mov(dx, 0x602)?;
        a.mov(ax, 0x100)?;
        a.out(dx, ax)?;
        put(a, b'r')?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.sti()?;
        a.hlt()?;
        a.cli()?;
        a.cmp(qword_ptr(DATA), 0)?;
        a.je(wait)?;
        power_off(a)
    });
    // PWRBTN_STS is cleared, and the interrupt ends.
    let pressed = assemble(0, |a| {
        a.inc(qword_ptr(DATA))?;
        a.mov(dx, 0x600)?;
        a.mov(ax, 0x100)?;
        a.out(dx, ax)?;
        a.mov(rbx, LOCAL_APIC)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.iretq()
    });
    let Some(Guest { machine, memory, console }) = guest(&code, 1, &[]) else { return };
    interrupt_table(&memory, &[(VECTOR, pressed)]);
    let control = machine.control();
    let run = thread::spawn(move || machine.run(vec![no_stops()]).unwrap());
    while console.text().is_empty() {
        assert!(!run.is_finished(), "it waits for the button");
        thread::sleep(Duration::from_millis(1));
    }
    assert!(control.press_power_button(), "the guest listens");
    assert_eq!(run.join().unwrap().end, RunEnd::PowerOff);
    assert_eq!((word(&memory, DATA), console.text().as_str()), (1, "r"));
}

#[test]
fn holes_read_all_ones_and_swallow_writes() {
    let code = assemble(CODE, |a| {
        a.mov(rbx, 0xc000_0000u64)?;
        a.mov(qword_ptr(rbx), rbx)?;
        a.mov(rcx, qword_ptr(rbx))?;
        a.mov(qword_ptr(DATA), rcx)?;
        a.mov(dx, 0xcfc)?;
        a.in_(eax, dx)?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        power_off(a)
    });
    let Some((report, memory, _)) = run(&code, no_stops()) else { return };
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!((word(&memory, DATA), word(&memory, DATA + 8)), (u64::MAX, 0xffff_ffff));
    assert_eq!((report.vcpus[0].exits.mmio_read, report.vcpus[0].exits.mmio_write), (1, 1));
}

#[test]
fn a_string_of_port_writes_is_one_access_per_element() {
    let code = assemble(CODE, |a| {
        a.mov(rsi, DATA)?;
        a.mov(rcx, 5u64)?;
        a.mov(dx, 0x3f8)?;
        a.rep().outsb()?;
        power_off(a)
    });
    let Some(Guest { machine, memory, console }) = guest(&code, 1, &[]) else { return };
    memory.write(Gpa(DATA), b"bytes").unwrap();
    let report = machine.run(vec![no_stops()]).unwrap();
    assert_eq!((report.end, console.text().as_str()), (RunEnd::PowerOff, "bytes"));
}

#[test]
fn halted_with_interrupts_off_is_an_end() {
    let code = assemble(CODE, |a| {
        a.cli()?;
        a.hlt()
    });
    let Some((report, ..)) = run(&code, no_stops()) else { return };
    assert_eq!(report.end, RunEnd::Halted);
    assert!(report.wall < Duration::from_secs(5), "{:?}", report.wall);
}

#[test]
fn one_halted_vcpu_of_two_is_no_end() {
    let code = assemble(CODE, |a| {
        let mut second = a.create_label();
        let mut spin = a.create_label();
        a.test(rdi, rdi)?;
        a.jne(second)?;
        a.cli()?;
        a.hlt()?;
        a.set_label(&mut second)?;
        a.mov(rcx, 300_000u64)?;
        a.set_label(&mut spin)?;
        a.dec(rcx)?;
        a.jne(spin)?;
        power_off(a)
    });
    let Some(guest) = guest(&code, 2, &[]) else { return };
    let report = guest.machine.run(vec![no_stops(), no_stops()]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
}

#[test]
fn a_triple_fault_is_an_end() {
    // No interrupt table: the page fault, the double fault and the next have no handler.
    let code = assemble(CODE, |a| {
        a.mov(rbx, 1u64 << 40)?;
        a.mov(rax, qword_ptr(rbx))
    });
    let Some((report, ..)) = run(&code, no_stops()) else { return };
    let RunEnd::TripleFault { vcpu, rip } = report.end else { panic!("{:?}", report.end) };
    assert_eq!(vcpu, VcpuId(0));
    assert!(rip.is_none_or(|rip| rip.0 >= CODE && rip.0 <= CODE + code.len() as u64), "{rip:?}");
}

#[test]
fn a_stop_request_ends_a_spinning_and_a_sleeping_guest() {
    let spinning = assemble(CODE, |a| {
        let mut here = a.create_label();
        a.set_label(&mut here)?;
        a.jmp(here)
    });
    // Interrupts on and no interrupt ever.
    let sleeping = assemble(CODE, |a| {
        a.sti()?;
        a.hlt()
    });
    for code in [spinning, sleeping] {
        let Some(guest) = guest(&code, 2, &[]) else { return };
        let handle = guest.machine.stop_handle();
        let stopper = thread::spawn(move || {
            thread::sleep(Duration::from_millis(300));
            handle.stop();
        });
        let start = Instant::now();
        let report = guest.machine.run(vec![no_stops(), no_stops()]).unwrap();
        assert_eq!(report.end, RunEnd::Stopped);
        assert!(start.elapsed() >= Duration::from_millis(300) && start.elapsed() < Duration::from_secs(5));
        stopper.join().unwrap();
    }
}

#[test]
fn a_stop_before_the_run_and_after_it_are_harmless() {
    let code = assemble(CODE, |a| a.hlt());
    let Some(guest) = guest(&code, 1, &[]) else { return };
    let handle = guest.machine.stop_handle();
    handle.stop();
    let report = guest.machine.run(vec![no_stops()]).unwrap();
    assert_eq!(report.end, RunEnd::Stopped);
    handle.stop();
}

#[test]
fn two_vcpus_run_side_by_side() {
    // Each adds its share to a common counter, then the second waits for the first.
    let code = assemble(CODE, |a| {
        let (mut add, mut wait, mut first) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rcx, 1000u64)?;
        a.set_label(&mut add)?;
        a.lock().inc(qword_ptr(DATA))?;
        a.dec(rcx)?;
        a.jne(add)?;
        a.mov(al, 1)?;
        a.mov(byte_ptr(rdi + (DATA + 8)), al)?;
        a.test(rdi, rdi)?;
        a.je(first)?;
        a.set_label(&mut wait)?;
        a.mov(ah, byte_ptr(DATA + 8))?;
        a.test(ah, ah)?;
        a.je(wait)?;
        power_off(a)?;
        a.set_label(&mut first)?;
        a.cli()?;
        a.hlt()
    });
    let Some(guest) = guest(&code, 2, &[]) else { return };
    let report = guest.machine.run(vec![no_stops(), no_stops()]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(word(&guest.memory, DATA), 2000);
    assert_eq!(report.vcpus.iter().map(|vcpu| vcpu.vcpu.0).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn a_panic_in_a_handler_ends_the_run_with_all_threads_joined() {
    let code = crate::common::one_spins_others_break();
    let Some(guest) = guest(&code, 2, &[]) else { return };
    let bad = Scripted::boxed(|_, _, _| -> Resume { panic!("as planned by the test") });
    let error = guest.machine.run(vec![no_stops(), bad]).unwrap_err();
    assert!(matches!(error, vmm::RunError::Panicked(VcpuId(1))), "{error}");
}

#[test]
fn each_vcpu_needs_a_handler() {
    let code = assemble(CODE, |a| a.hlt());
    let Some(guest) = guest(&code, 2, &[]) else { return };
    let error = guest.machine.run(vec![no_stops()]).unwrap_err();
    assert_eq!(error.to_string(), "1 stop handlers were given for 2 vCPUs; give one for each");
}

#[test]
fn a_machine_that_cannot_be_is_refused_with_its_reason() {
    use vmm::boot::{Kernel, KernelSegment, Protocol};
    use vmm::{CreateError, Host, Machine, MachineConfig};

    if guest(&[0xf4], 1, &[]).is_none() {
        return;
    }
    let host = Host::open().unwrap();
    let refused = |memory_bytes, vcpus, watched: u64| -> CreateError {
        let segment = KernelSegment { gpa: Gpa(CODE), data: &[0xf4], mem_size: 1 };
        Machine::new(MachineConfig {
            host: &host,
            memory_bytes,
            vcpus,
            kernel: Kernel { entry: Gpa(CODE), segments: vec![segment], protocol: Protocol::BareMetal },
            watched_pages: [Gpa(watched)].into(),
            serial: Box::new(std::io::sink()),
            disks: Vec::new(),
            vsock: None,
            networks: Vec::new(),
        })
        .unwrap_err()
    };
    let memory = 4 << 20;
    assert!(matches!(refused(memory, 0, CODE), CreateError::Vcpus { asked: 0, .. }));
    assert!(matches!(refused(memory, 100_000, CODE), CreateError::Vcpus { .. }));
    assert!(matches!(refused(0, 1, CODE), CreateError::Memory(_)));
    assert!(matches!(refused(1 << 50, 1, CODE), CreateError::Memory(_)));
    assert!(matches!(refused(memory, 1, memory), CreateError::Watch(_)));
}

#[test]
fn the_timers_ticks_that_pass_while_the_host_is_at_a_stop_are_not_made_up() {
    // The longest period: 65,536 cycles of 1,193,182 Hz (Intel 8254).
    const PERIOD: Duration = Duration::from_micros(54_925);
    let code = assemble(CODE, |a| {
        use_interrupts(a)?;
        // The interrupt controller (Intel 8259A): edges, vectors from 0x20, a second one at input 2, 8086 mode; input 0 is open.
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        // The timer: channel 0, both bytes, mode 2, 65,536 cycles.
        for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.int3()?;
        a.sti()?;
        a.mov(ecx, 20_000)?;
        let mut spin = a.create_label();
        a.set_label(&mut spin)?;
        a.dec(ecx)?;
        a.jne(spin)?;
        a.cli()?;
        a.int3()?;
        power_off(a)
    });
    let tick = assemble(0, |a| {
        a.inc(qword_ptr(DATA))?;
        a.push(rax)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.pop(rax)?;
        a.iretq()
    });
    let Some(Guest { machine, memory, .. }) = guest(&code, 1, &[]) else { return };
    interrupt_table(&memory, &[(0x20, tick)]);
    let stops = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&stops);
    let handler = Scripted::boxed(move |state, _, stop| {
        assert!(is_int3(&stop), "{stop:?}");
        state.regs.rip += 1;
        let mut log = log.lock().unwrap();
        if log.is_empty() {
            thread::sleep(20 * PERIOD);
        }
        log.push(Instant::now());
        Resume::Run
    });
    assert_eq!(machine.run(vec![handler]).unwrap().end, RunEnd::PowerOff);
    let stops = stops.lock().unwrap();
    let [before, after] = stops[..] else { panic!("{stops:?}") };
    // One was waiting; another may come before, and one after, the stops are noted.
    let due = (after - before).as_millis() / PERIOD.as_millis() + 3;
    let ticks = word(&memory, DATA);
    assert!(ticks > 0 && u128::from(ticks) <= due, "{ticks} ticks, {due} due in {:?}", after - before);
}

#[test]
fn the_first_vcpu_runs_alone_to_where_its_handler_finishes_and_all_go_on_from_there() {
    // Behind two bytes of `nop` both count themselves, and wait for each other.
    let code = assemble(CODE, |a| {
        let mut wait = a.create_label();
        a.nop()?;
        a.nop()?;
        a.lock().inc(qword_ptr(DATA))?;
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(DATA), 2)?;
        a.jne(wait)?;
        power_off(a)
    });
    let Some(Guest { mut machine, memory, .. }) = guest(&code, 2, &[]) else { return };
    let before = WatchSet::from(Watchpoint::execution(Gva(CODE + 2)));
    let finish = Scripted::watching(before, |_, _, stop| match stop {
        Stop::Watchpoint { .. } => Resume::Finish,
        other => Resume::Fail { reason: format!("{other:?}") },
    });
    let end = machine.run_first(finish, Duration::from_secs(60)).unwrap();
    assert_eq!(end, RunEnd::Finished { vcpu: VcpuId(0) });
    assert_eq!(word(&memory, DATA), 0);
    let [first, second] = machine.states()[..] else { panic!("two vCPUs") };
    assert_eq!((first.regs.rip, second.regs.rip), (CODE + 2, CODE));
    let report = machine.run(vec![no_stops(), no_stops()]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(word(&memory, DATA), 2);
}

#[test]
fn a_first_vcpu_that_finds_no_end_is_stopped_and_can_run_on() {
    let code = assemble(CODE, |a| {
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(qword_ptr(DATA), 0)?;
        a.je(wait)?;
        power_off(a)
    });
    let Some(Guest { mut machine, memory, .. }) = guest(&code, 1, &[]) else { return };
    for _ in 0..2 {
        assert_eq!(machine.run_first(no_stops(), Duration::from_millis(60)).unwrap(), RunEnd::Stopped);
    }
    memory.write(Gpa(DATA), &[1]).unwrap();
    assert_eq!(machine.run_first(no_stops(), Duration::from_secs(60)).unwrap(), RunEnd::PowerOff);
}
