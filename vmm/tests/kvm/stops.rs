//! Stops: breakpoints, code in a slot, injected exceptions, writes to watched pages.

use std::sync::{Arc, Mutex};

use crate::common::{
    CODE, DATA, STACK, Scripted, assemble, guest, interrupt_table, is_int3, power_off, run, use_interrupts,
    word,
};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, cr2, dr6 as debug_status, dword_ptr, dx, eax, qword_ptr, rax, rbx, rcx, rdi,
    rsi, rsp,
};
use probe_core::stop::{Resume, Stop};
use probe_core::{Exception, Gpa, Gva, PhysicalMemory, VcpuState, rflags};
use vmm::layout::SLOT_REGION;
use vmm::{Machine, RunEnd};

const DR6_BS: u64 = 1 << 14;

/// Collects what a handler saw.
type Log<T> = Arc<Mutex<Vec<T>>>;

#[test]
fn an_emulated_hit_needs_no_ioctl_but_kvm_run() {
    // 500 times: an int3 in the place of `inc rax`.
    let code = assemble(CODE, |a| {
        let mut again = a.create_label();
        a.mov(rcx, 500u64)?;
        a.set_label(&mut again)?;
        a.int3()?;
        a.dec(rcx)?;
        a.jne(again)?;
        a.mov(qword_ptr(DATA), rax)?;
        power_off(a)
    });
    let handler = Scripted::boxed(|state, _, stop| {
        assert!(is_int3(&stop));
        state.regs.rax += 1;
        state.regs.rip += 1;
        Resume::Run
    });
    let Some((report, memory, _)) = run(&code, handler) else { return };
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(word(&memory, DATA), 500);
    let vcpu = report.vcpus[0];
    assert_eq!(vcpu.exits.debug + vcpu.exits.emulation_failure, 500);
    assert_eq!(vcpu.ioctls.other, 0);
    assert_eq!(vcpu.ioctls.set_guest_debug, 2, "on at the start and off at the end");
    assert!(vcpu.ioctls.run >= 501);
}

#[test]
fn debug_regs_a_stop_shows_rip_at_the_int3() {
    let code = assemble(CODE, |a| {
        a.nop()?;
        a.int3()
    });
    let seen = Log::default();
    let log = Arc::clone(&seen);
    let handler = Scripted::boxed(move |state, _, stop| {
        log.lock().unwrap().push((state.regs.rip, stop));
        Resume::Finish
    });
    let Some((report, ..)) = run(&code, handler) else { return };
    assert_eq!(report.end, RunEnd::Finished { vcpu: probe_core::VcpuId(0) });
    let seen = seen.lock().unwrap();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].0, CODE + 1);
    match seen[0].1 {
        Stop::Breakpoint { pc } => assert_eq!(pc, Gva(CODE + 1)),
        Stop::EmulationFailure { bytes, len } => assert!(len >= 1 && bytes[0] == 0xcc),
        Stop::Debug { .. } | Stop::Watchpoint { .. } => panic!("a #DB for an int3"),
    }
}

/// Runs `displaced` from a slot in the place of an int3, after `before`, with an int3 of its own behind it. That must be the
/// second stop, and the last.
fn run_in_slot(
    displaced: &'static [u8],
    before: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Option<(vmm::RunReport, vmm::GuestRam, String)> {
    let code = assemble(CODE, |a| {
        a.mov(rsp, STACK)?;
        before(a)?;
        a.int3()?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(qword_ptr(DATA + 8), rcx)?;
        power_off(a)
    });
    let slot = SLOT_REGION.0 + 0x100;
    let mut home = None;
    let handler = Scripted::boxed(move |state, memory, stop| {
        assert!(is_int3(&stop), "{stop:?}");
        match home {
            None => {
                memory.write(Gpa(slot), &[displaced, &[0xcc]].concat()).unwrap();
                home = Some(state.regs.rip + 1);
                state.regs.rip = slot;
            }
            Some(back) => {
                assert_eq!(state.regs.rip, slot + displaced.len() as u64);
                state.regs.rip = back;
            }
        }
        Resume::Run
    });
    let (report, memory, console) = run(&code, handler)?;
    assert_eq!(report.end, RunEnd::PowerOff);
    let vcpu = report.vcpus[0];
    assert_eq!(vcpu.exits.debug + vcpu.exits.emulation_failure, 2);
    assert_eq!((vcpu.ioctls.set_guest_debug, vcpu.ioctls.other), (2, 0), "on and off");
    Some((report, memory, console))
}

#[test]
fn one_instruction_runs_out_of_line() {
    // add rax, 7
    let Some((_, memory, _)) = run_in_slot(&[0x48, 0x83, 0xc0, 0x07], |a| a.mov(rax, 35u64)) else { return };
    assert_eq!(word(&memory, DATA), 42);
}

#[test]
fn port_accesses_in_a_slot_are_served_and_end_at_the_guard() {
    // out dx, al
    let write = run_in_slot(&[0xee], |a| {
        a.mov(dx, 0x3f8)?;
        a.mov(al, u32::from(b'*'))
    });
    let Some((_, _, console)) = write else { return };
    assert_eq!(console, "*");
    // in eax, dx
    let Some((_, memory, _)) = run_in_slot(&[0xed], |a| a.mov(dx, 0x80)) else { return };
    assert_eq!(word(&memory, DATA), 0xffff_ffff);
    // rep outsb, of three bytes
    let string = run_in_slot(&[0xf3, 0x6e], |a| {
        a.mov(qword_ptr(DATA + 0x100), 0x63_6261i32)?;
        a.mov(rsi, DATA + 0x100)?;
        a.mov(rcx, 3u64)?;
        a.mov(dx, 0x3f8)
    });
    let Some((_, memory, console)) = string else { return };
    assert_eq!((console.as_str(), word(&memory, DATA + 8)), ("abc", 0));
}

#[test]
fn mmio_accesses_in_a_slot_are_served_and_end_at_the_guard() {
    let hole = |a: &mut CodeAssembler| a.mov(rbx, 0xc000_0000u64);
    // mov rax, [rbx]
    let Some((_, memory, _)) = run_in_slot(&[0x48, 0x8b, 0x03], hole) else { return };
    assert_eq!(word(&memory, DATA), u64::MAX);
    // mov [rbx], rax
    let Some((store, ..)) = run_in_slot(&[0x48, 0x89, 0x03], hole) else { return };
    assert_eq!(store.vcpus[0].exits.mmio_write, 1);
    // add [rbx], rcx: a load and a store
    let Some((both, ..)) = run_in_slot(&[0x48, 0x01, 0x0b], hole) else { return };
    let exits = both.vcpus[0].exits;
    assert_eq!((exits.mmio_read, exits.mmio_write), (1, 1));
    // rep movsb, three bytes into a hole
    let string = run_in_slot(&[0xf3, 0xa4], |a| {
        a.mov(rsi, DATA + 0x100)?;
        a.mov(rdi, 0xc000_0000u64)?;
        a.mov(rcx, 3u64)
    });
    let Some((string, memory, _)) = string else { return };
    assert_eq!((string.vcpus[0].exits.mmio_write, word(&memory, DATA + 8)), (3, 0));
}

/// A guest whose handler of `vector` stores error code or RIP (top of its stack), the next word, RFLAGS of the frame, and
/// CR2, then switches off.
fn with_reporting_handler(
    vector: u8,
    body: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Option<crate::common::Guest> {
    let code = assemble(CODE, |a| {
        use_interrupts(a)?;
        body(a)
    });
    let report = assemble(crate::common::IDT_HANDLERS + 64 * u64::from(vector), |a| {
        for offset in [0, 8, 16, 24] {
            a.pop(qword_ptr(DATA + offset))?;
        }
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(DATA + 32), rax)?;
        power_off(a)
    });
    let guest = guest(&code, 1, &[])?;
    interrupt_table(&guest.memory, &[(vector, report)]);
    Some(guest)
}

/// Length of `use_interrupts`.
fn prologue() -> u64 {
    assemble(CODE, use_interrupts).len() as u64
}

fn inject_at_int3(machine: Machine, exception: Exception) -> RunEnd {
    let handler = Scripted::boxed(move |_, _, stop| {
        if is_int3(&stop) {
            Resume::Inject(exception)
        } else {
            Resume::Fail { reason: format!("Unexpected {stop:?}") }
        }
    });
    machine.run(vec![handler]).unwrap().end
}

#[test]
fn the_guests_own_int3_is_given_back_with_its_frame() {
    let Some(guest) = with_reporting_handler(3, |a| {
        a.int3()?;
        a.hlt()
    }) else {
        return;
    };
    assert_eq!(inject_at_int3(guest.machine, Exception::Breakpoint), RunEnd::PowerOff);
    assert_eq!(word(&guest.memory, DATA), CODE + prologue() + 1, "RIP behind the int3");
    assert_eq!(word(&guest.memory, DATA + 8), 0x10, "CS");
    assert_eq!(word(&guest.memory, DATA + 16), rflags::FIXED, "RFLAGS without TF and RF");
    assert_eq!(word(&guest.memory, DATA + 24), STACK, "RSP");
}

#[test]
fn an_injected_page_fault_has_its_code_and_address() {
    let Some(guest) = with_reporting_handler(14, |a| a.int3()) else { return };
    let fault = Exception::PageFault { address: Gva(0x1234_5678_9000), code: 2 };
    assert_eq!(inject_at_int3(guest.machine, fault), RunEnd::PowerOff);
    assert_eq!(word(&guest.memory, DATA), 2, "error code");
    assert_eq!(word(&guest.memory, DATA + 8), CODE + prologue(), "RIP at the instruction");
    assert_eq!(word(&guest.memory, DATA + 24), rflags::FIXED | rflags::RF, "RFLAGS of a fault");
    assert_eq!(word(&guest.memory, DATA + 32), 0x1234_5678_9000, "CR2");
}

#[test]
fn injected_faults_without_a_code_push_none() {
    for (exception, vector) in [(Exception::DivideError, 0), (Exception::InvalidOpcode, 6)] {
        let Some(guest) = with_reporting_handler(vector, |a| a.int3()) else { return };
        assert_eq!(inject_at_int3(guest.machine, exception), RunEnd::PowerOff);
        assert_eq!(word(&guest.memory, DATA), CODE + prologue(), "RIP at the instruction");
        assert_eq!(word(&guest.memory, DATA + 8), 0x10, "CS");
    }
}

#[test]
fn an_injected_debug_exception_reports_its_dr6() {
    let code = assemble(CODE, |a| {
        use_interrupts(a)?;
        a.int3()
    });
    let handler = assemble(crate::common::IDT_HANDLERS + 64, |a| {
        a.mov(rax, debug_status)?;
        a.mov(qword_ptr(DATA), rax)?;
        power_off(a)
    });
    let Some(guest) = guest(&code, 1, &[]) else { return };
    interrupt_table(&guest.memory, &[(1, handler)]);
    assert_eq!(inject_at_int3(guest.machine, Exception::Debug { dr6: DR6_BS }), RunEnd::PowerOff);
    assert_eq!(word(&guest.memory, DATA) & DR6_BS, DR6_BS);
}

/// Sets the master interrupt controller up so that IRQ 4 is vector 0x24, asks the serial line for an interrupt, and waits until
/// the controller has it: the event that carries it is asynchronous.
pub fn raise_serial_interrupt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xef)] {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    // IER: transmitter empty.
    a.mov(dx, 0x3f9)?;
    a.mov(al, 2)?;
    a.out(dx, al)?;
    // OCW3: read the request register.
    a.mov(al, 0x0a)?;
    a.out(0x20, al)?;
    let mut wait = a.create_label();
    a.set_label(&mut wait)?;
    a.in_(al, 0x20)?;
    a.test(al, 0x10)?;
    a.je(wait)
}

/// A handler of vector 0x24 that stores RIP and RFLAGS of its frame, and returns.
pub fn serial_interrupt_handler() -> Vec<u8> {
    assemble(crate::common::IDT_HANDLERS + 64 * 0x24, |a| {
        a.mov(rax, qword_ptr(rsp))?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(rax, qword_ptr(rsp + 16))?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        a.iretq()
    })
}

#[test]
fn a_vcpu_that_the_engine_halts_is_woken_by_an_interrupt() {
    let code = assemble(CODE, |a| {
        use_interrupts(a)?;
        raise_serial_interrupt(a)?;
        // The engine executes this as hlt with interrupts on.
        a.int3()?;
        power_off(a)
    });
    let Some(guest) = guest(&code, 1, &[]) else { return };
    interrupt_table(&guest.memory, &[(0x24, serial_interrupt_handler())]);
    let handler = Scripted::boxed(|state, _, stop| {
        assert!(is_int3(&stop));
        state.regs.rip += 1;
        state.regs.rflags |= rflags::IF;
        Resume::Halt
    });
    let report = guest.machine.run(vec![handler]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    assert_eq!(
        code[usize::try_from(word(&guest.memory, DATA) - CODE).unwrap() - 1],
        0xcc,
        "RIP behind the hlt"
    );
    assert_eq!(word(&guest.memory, DATA + 8), rflags::FIXED | rflags::IF);
}

#[test]
fn a_vcpu_that_the_engine_halts_with_interrupts_off_is_dead() {
    let code = assemble(CODE, |a| a.int3());
    let handler = Scripted::boxed(|state, _, _| {
        state.regs.rip += 1;
        Resume::Halt
    });
    let Some((report, ..)) = run(&code, handler) else { return };
    assert_eq!(report.end, RunEnd::Halted);
}

#[test]
fn an_injected_exception_goes_before_a_pending_interrupt() {
    let code = assemble(CODE, |a| {
        use_interrupts(a)?;
        raise_serial_interrupt(a)?;
        a.int3()?;
        // KVM's emulator takes an interrupt late.
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.mov(rbx, qword_ptr(DATA))?;
        a.test(rbx, rbx)?;
        a.je(wait)?;
        power_off(a)
    });
    let breakpoint = assemble(crate::common::IDT_HANDLERS + 64 * 3, |a| {
        a.mov(rax, qword_ptr(rsp))?;
        a.mov(qword_ptr(DATA + 0x40), rax)?;
        // Nothing of the interrupt yet.
        a.mov(rax, qword_ptr(DATA))?;
        a.mov(qword_ptr(DATA + 0x48), rax)?;
        a.iretq()
    });
    let Some(guest) = guest(&code, 1, &[]) else { return };
    interrupt_table(&guest.memory, &[(3, breakpoint), (0x24, serial_interrupt_handler())]);
    guest.memory.write(Gpa(DATA + 0x48), &[0xff; 8]).unwrap();
    let handler = Scripted::boxed(|state, _, stop| {
        assert!(is_int3(&stop));
        state.regs.rflags |= rflags::IF;
        Resume::Inject(Exception::Breakpoint)
    });
    let report = guest.machine.run(vec![handler]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    let behind = word(&guest.memory, DATA + 0x40);
    assert_eq!(code[usize::try_from(behind - CODE).unwrap() - 1], 0xcc, "#BP was delivered");
    assert_eq!(word(&guest.memory, DATA + 0x48), 0, "before the interrupt");
    assert!(word(&guest.memory, DATA) >= behind, "which comes behind it");
}

#[test]
fn guest_writes_to_a_watched_page_come_to_the_handler() {
    const WATCHED: u64 = 0x12_0000;
    #[derive(Default)]
    struct Handler(Log<(u64, Vec<u8>)>);
    impl probe_core::stop::StopHandler for Handler {
        fn on_stop(&mut self, _: &mut VcpuState, _: &dyn PhysicalMemory, stop: Stop) -> Resume {
            Resume::Fail { reason: format!("Unexpected {stop:?}") }
        }
        fn on_text_write(&mut self, memory: &dyn PhysicalMemory, gpa: Gpa, data: &[u8]) {
            let mut before = [0];
            memory.read(gpa, &mut before).unwrap();
            assert_ne!(&before[..], &data[..1], "KVM has not stored it");
            self.0.lock().unwrap().push((gpa.0, data.to_vec()));
            // What the guest shall find there: its byte, changed.
            let merged: Vec<u8> = data.iter().map(|byte| byte ^ 0xf0).collect();
            memory.write(gpa, &merged).unwrap();
        }
        fn wants_breakpoints(&self) -> bool {
            false
        }
    }
    let code = assemble(CODE, |a| {
        a.mov(rbx, WATCHED)?;
        a.mov(byte_ptr(rbx + 3), 0x5a)?;
        a.mov(eax, 0x1122_3344)?;
        a.mov(dword_ptr(rbx + 8), eax)?;
        // The pages on both sides are ordinary.
        a.mov(qword_ptr(rbx - 8), rax)?;
        a.mov(qword_ptr(rbx + 0x1000), rax)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.mov(qword_ptr(DATA), rax)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.mov(qword_ptr(DATA + 8), rax)?;
        power_off(a)
    });
    let Some(guest) = guest(&code, 1, &[WATCHED + 0x123]) else { return };
    let handler = Handler::default();
    let log = Arc::clone(&handler.0);
    let report = guest.machine.run(vec![Box::new(handler)]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
    let expected = [(WATCHED + 3, vec![0x5a]), (WATCHED + 8, vec![0x44, 0x33, 0x22, 0x11])];
    assert_eq!(*log.lock().unwrap(), expected);
    assert_eq!(word(&guest.memory, DATA), 0xaa00_0000);
    assert_eq!(word(&guest.memory, DATA + 8), 0x1122_3344 ^ 0xf0f0_f0f0);
    assert_eq!(word(&guest.memory, WATCHED + 0x1000), 0x1122_3344);
    assert_eq!(report.vcpus[0].exits.mmio_write, 2);
    assert_eq!(report.vcpus[0].ioctls.set_guest_debug, 0, "nobody wants breakpoints");
}

#[test]
fn a_stop_that_cannot_be_explained_ends_the_run_with_its_reason() {
    let code = assemble(CODE, |a| a.int3());
    let handler = Scripted::boxed(|_, _, _| Resume::Fail { reason: "Nobody armed this".into() });
    let Some((report, ..)) = run(&code, handler) else { return };
    let RunEnd::Failed { reason, .. } = report.end else { panic!("{:?}", report.end) };
    assert!(reason.starts_with("Nobody armed this"), "{reason}");
    if report.vcpus[0].exits.emulation_failure > 0 {
        assert!(reason.contains("0x100000 (bytes cc"), "{reason}");
        assert!(reason.contains("--accel nested"), "{reason}");
    }
}

#[test]
fn code_in_the_slot_region_runs() {
    let code = assemble(CODE, |a| {
        a.mov(rax, SLOT_REGION.0)?;
        a.jmp(rax)
    });
    let Some(guest) = guest(&code, 1, &[]) else { return };
    guest.memory.write(SLOT_REGION, &assemble(SLOT_REGION.0, power_off)).unwrap();
    let report = guest.machine.run(vec![crate::common::no_stops()]).unwrap();
    assert_eq!(report.end, RunEnd::PowerOff);
}
