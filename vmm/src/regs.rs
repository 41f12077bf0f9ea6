//! KVM's register structures <-> the engine's plain values. Pure: nothing here needs a file descriptor.

use kvm_bindings::{
    KVM_SYNC_X86_EVENTS, KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_X86_SHADOW_INT_MOV_SS, KVM_X86_SHADOW_INT_STI, kvm_regs, kvm_sregs,
    kvm_sync_regs, kvm_vcpu_events,
};
use probe_core::{Exception, InterruptShadow, Registers, SystemRegisters, VcpuState};

/// The shadow's bits, as wide as the field that holds them.
const SHADOW_STI: u8 = KVM_X86_SHADOW_INT_STI.to_le_bytes()[0];
const SHADOW_MOV_SS: u8 = KVM_X86_SHADOW_INT_MOV_SS.to_le_bytes()[0];

/// The general-purpose registers as the engine has them.
pub(crate) fn registers(kvm: &kvm_regs) -> Registers {
    Registers {
        rax: kvm.rax,
        rbx: kvm.rbx,
        rcx: kvm.rcx,
        rdx: kvm.rdx,
        rsi: kvm.rsi,
        rdi: kvm.rdi,
        rsp: kvm.rsp,
        rbp: kvm.rbp,
        r8: kvm.r8,
        r9: kvm.r9,
        r10: kvm.r10,
        r11: kvm.r11,
        r12: kvm.r12,
        r13: kvm.r13,
        r14: kvm.r14,
        r15: kvm.r15,
        rip: kvm.rip,
        rflags: kvm.rflags,
    }
}

/// The general-purpose registers as KVM has them.
pub(crate) fn kvm_registers(regs: &Registers) -> kvm_regs {
    kvm_regs {
        rax: regs.rax,
        rbx: regs.rbx,
        rcx: regs.rcx,
        rdx: regs.rdx,
        rsi: regs.rsi,
        rdi: regs.rdi,
        rsp: regs.rsp,
        rbp: regs.rbp,
        r8: regs.r8,
        r9: regs.r9,
        r10: regs.r10,
        r11: regs.r11,
        r12: regs.r12,
        r13: regs.r13,
        r14: regs.r14,
        r15: regs.r15,
        rip: regs.rip,
        rflags: regs.rflags,
    }
}

/// The system registers as the engine has them. CPL is SS.DPL, which also holds for a conforming CS and for virtual-8086
/// mode (Intel SDM vol. 3C, 24.4.1; AMD APM vol. 2, 15.5.1).
pub(crate) fn system_registers(kvm: &kvm_sregs) -> SystemRegisters {
    SystemRegisters {
        cr0: kvm.cr0,
        cr2: kvm.cr2,
        cr3: kvm.cr3,
        cr4: kvm.cr4,
        efer: kvm.efer,
        fs_base: kvm.fs.base,
        gs_base: kvm.gs.base,
        idt_base: kvm.idt.base,
        idt_limit: kvm.idt.limit,
        cpl: kvm.ss.dpl,
        long_code: kvm.cs.l != 0,
    }
}

/// Puts what the engine may change of the system registers back: all but the interrupt table, and the privilege level and
/// code size, which follow from segments.
fn apply_system_registers(sys: &SystemRegisters, kvm: &mut kvm_sregs) {
    kvm.cr0 = sys.cr0;
    kvm.cr2 = sys.cr2;
    kvm.cr3 = sys.cr3;
    kvm.cr4 = sys.cr4;
    kvm.efer = sys.efer;
    kvm.fs.base = sys.fs_base;
    kvm.gs.base = sys.gs_base;
}

fn interrupt_shadow(kvm: &kvm_vcpu_events) -> InterruptShadow {
    InterruptShadow {
        sti: kvm.interrupt.shadow & SHADOW_STI != 0,
        mov_ss: kvm.interrupt.shadow & SHADOW_MOV_SS != 0,
    }
}

/// The vCPU's state out of the shared run page (KVM_CAP_SYNC_REGS, all three sets valid).
pub(crate) fn vcpu_state(sync: &kvm_sync_regs) -> VcpuState {
    VcpuState {
        regs: registers(&sync.regs),
        sys: system_registers(&sync.sregs),
        shadow: interrupt_shadow(&sync.events),
    }
}

/// Puts `state` into the shared run page and returns which sets KVM must take over: KVM_SYNC_X86_* bits, none for
/// what did not change.
pub(crate) fn write_back(state: &VcpuState, sync: &mut kvm_sync_regs) -> u64 {
    let mut dirty = 0;
    let regs = kvm_registers(&state.regs);
    if regs != sync.regs {
        sync.regs = regs;
        dirty |= KVM_SYNC_X86_REGS;
    }
    if state.sys != system_registers(&sync.sregs) {
        apply_system_registers(&state.sys, &mut sync.sregs);
        dirty |= KVM_SYNC_X86_SREGS;
    }
    if state.shadow != interrupt_shadow(&sync.events) {
        set_shadow(state.shadow, &mut sync.events);
        dirty |= KVM_SYNC_X86_EVENTS;
    }
    u64::from(dirty)
}

fn set_shadow(shadow: InterruptShadow, events: &mut kvm_vcpu_events) {
    events.interrupt.shadow =
        if shadow.sti { SHADOW_STI } else { 0 } | if shadow.mov_ss { SHADOW_MOV_SS } else { 0 };
    // Only what is named in the flags is taken over; an NMI that another vCPU sends meanwhile must not be undone.
    events.flags = KVM_VCPUEVENT_VALID_SHADOW;
}

/// Where RIP must stand for KVM to deliver #BP, by how its int3 was seen. Measured on KVM: a host that exits with
/// KVM_EXIT_DEBUG drops the event when RIP is behind the int3, and a host whose emulator failed at the int3 pushes RIP
/// as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BreakpointRip {
    /// KVM adds the instruction's length.
    AtInt3,
    /// KVM pushes RIP as it is.
    BehindInt3,
}

/// Queues `exception` for delivery at the next entry (KVM_SET_VCPU_EVENTS with KVM_CAP_EXCEPTION_PAYLOAD), and returns the
/// KVM_SYNC_X86_* bits to take over. To be called after [`write_back`]. KVM sets RF in the frame of a fault, and CR2 or DR6
/// from the payload.
///
/// The exception is given as pending and not as injected: for a soft #BP, kvm-amd drops its own note of an injected
/// exception while it computes the return address, and an interrupt that is due at the same entry then overwrites the
/// exception.
pub(crate) fn queue_exception(exception: Exception, rip: BreakpointRip, sync: &mut kvm_sync_regs) -> u64 {
    let mut dirty = KVM_SYNC_X86_EVENTS;
    if exception == Exception::Breakpoint && rip == BreakpointRip::BehindInt3 {
        sync.regs.rip = sync.regs.rip.wrapping_add(1);
        dirty |= KVM_SYNC_X86_REGS;
    }
    let payload = match exception {
        Exception::Debug { dr6 } => Some(dr6),
        Exception::PageFault { address, .. } => Some(address.0),
        _ => None,
    };
    let code = exception.error_code();
    let events = &mut sync.events;
    events.exception.injected = 0;
    events.exception.pending = 1;
    events.exception.nr = exception.vector();
    events.exception.has_error_code = u8::from(code.is_some());
    events.exception.error_code = code.unwrap_or(0);
    events.exception_has_payload = u8::from(payload.is_some());
    events.exception_payload = payload.unwrap_or(0);
    events.flags = events.flags & KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_PAYLOAD;
    u64::from(dirty)
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_VCPUEVENT_VALID_NMI_PENDING, kvm_segment};
    use probe_core::Gva;

    use super::*;
    use probe_core::rflags;

    /// A different value in every field, so that a swapped pair shows.
    fn regs() -> Registers {
        Registers {
            rax: 1,
            rbx: 2,
            rcx: 3,
            rdx: 4,
            rsi: 5,
            rdi: 6,
            rsp: 7,
            rbp: 8,
            r8: 9,
            r9: 10,
            r10: 11,
            r11: 12,
            r12: 13,
            r13: 14,
            r14: 15,
            r15: 16,
            rip: 17,
            rflags: 0x202,
        }
    }

    fn sync() -> kvm_sync_regs {
        let segment = |base, dpl, l| kvm_segment { base, dpl, l, ..Default::default() };
        let mut sync = kvm_sync_regs { regs: kvm_registers(&regs()), ..Default::default() };
        sync.sregs.cr0 = 20;
        sync.sregs.cr2 = 22;
        sync.sregs.cr3 = 23;
        sync.sregs.cr4 = 24;
        sync.sregs.cr8 = 28;
        sync.sregs.efer = 25;
        sync.sregs.fs = segment(26, 0, 0);
        sync.sregs.gs = segment(27, 0, 0);
        sync.sregs.idt.base = 29;
        sync.sregs.idt.limit = 30;
        sync.sregs.cs = segment(0, 0, 1);
        sync.sregs.ss = segment(0, 3, 0);
        sync.events.flags = KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_NMI_PENDING;
        sync
    }

    #[test]
    fn registers_survive_the_round_trip() {
        assert_eq!(registers(&kvm_registers(&regs())), regs());
        let kvm = kvm_registers(&regs());
        assert_eq!((kvm.rax, kvm.rsp, kvm.rbp, kvm.r15, kvm.rip, kvm.rflags), (1, 7, 8, 16, 17, 0x202));
    }

    #[test]
    fn system_registers_come_from_their_fields() {
        assert_eq!(
            system_registers(&sync().sregs),
            SystemRegisters {
                cr0: 20,
                cr2: 22,
                cr3: 23,
                cr4: 24,
                efer: 25,
                fs_base: 26,
                gs_base: 27,
                idt_base: 29,
                idt_limit: 30,
                cpl: 3,
                long_code: true
            }
        );
    }

    #[test]
    fn an_unchanged_state_makes_nothing_dirty() {
        let mut page = sync();
        let state = vcpu_state(&page);
        assert_eq!(write_back(&state, &mut page), 0);
        assert_eq!(page, sync());
    }

    #[test]
    fn each_changed_set_is_taken_over_alone_and_reads_back() {
        type Change = fn(&mut VcpuState);
        let changes: [(Change, u32); 9] = [
            (|s| s.regs.rip = 99, KVM_SYNC_X86_REGS),
            (|s| s.regs.rflags |= rflags::TF, KVM_SYNC_X86_REGS),
            (|s| s.sys.cr0 = 99, KVM_SYNC_X86_SREGS),
            (|s| s.sys.cr2 = 99, KVM_SYNC_X86_SREGS),
            (|s| s.sys.cr3 = 99, KVM_SYNC_X86_SREGS),
            (|s| s.sys.fs_base = 99, KVM_SYNC_X86_SREGS),
            (|s| s.sys.gs_base = 99, KVM_SYNC_X86_SREGS),
            (|s| s.shadow.sti = true, KVM_SYNC_X86_EVENTS),
            (|s| s.shadow.mov_ss = true, KVM_SYNC_X86_EVENTS),
        ];
        for (change, expected) in changes {
            let mut page = sync();
            let mut state = vcpu_state(&page);
            change(&mut state);
            assert_eq!(write_back(&state, &mut page), u64::from(expected));
            assert_eq!(vcpu_state(&page), state);
            assert_eq!(page.sregs.cr8, 28);
        }
    }

    #[test]
    fn a_shadow_change_leaves_pending_nmis_alone() {
        let mut page = sync();
        let mut state = vcpu_state(&page);
        state.shadow.sti = true;
        write_back(&state, &mut page);
        assert_eq!(page.events.flags, KVM_VCPUEVENT_VALID_SHADOW);
        assert_eq!(page.events.interrupt.shadow, SHADOW_STI);
    }

    #[test]
    fn breakpoint_rip_follows_the_way_it_was_seen() {
        let mut page = sync();
        let dirty = queue_exception(Exception::Breakpoint, BreakpointRip::AtInt3, &mut page);
        assert_eq!((page.regs.rip, dirty), (17, u64::from(KVM_SYNC_X86_EVENTS)));
        let dirty = queue_exception(Exception::Breakpoint, BreakpointRip::BehindInt3, &mut page);
        assert_eq!((page.regs.rip, dirty), (18, u64::from(KVM_SYNC_X86_EVENTS | KVM_SYNC_X86_REGS)));
        let exception = page.events.exception;
        assert_eq!((exception.injected, exception.pending, exception.nr), (0, 1, 3));
        assert_eq!((exception.has_error_code, page.events.exception_has_payload), (0, 0));
    }

    #[test]
    fn page_fault_carries_code_and_address() {
        let mut page = sync();
        let fault = Exception::PageFault { address: Gva(0xdead_b000), code: 0x11 };
        let dirty = queue_exception(fault, BreakpointRip::BehindInt3, &mut page);
        assert_eq!(dirty, u64::from(KVM_SYNC_X86_EVENTS));
        assert_eq!(page.regs.rip, 17, "a fault's RIP is the instruction's");
        assert_eq!((page.events.exception_has_payload, page.events.exception_payload), (1, 0xdead_b000));
        assert_eq!((page.events.exception.nr, page.events.exception.error_code), (14, 0x11));
        assert_eq!(page.events.exception.has_error_code, 1);
    }

    #[test]
    fn a_debug_exception_carries_its_dr6_bits() {
        let mut page = sync();
        queue_exception(Exception::Debug { dr6: 0x4001 }, BreakpointRip::AtInt3, &mut page);
        assert_eq!((page.events.exception.nr, page.events.exception.has_error_code), (1, 0));
        assert_eq!((page.events.exception_has_payload, page.events.exception_payload), (1, 0x4001));
    }

    #[test]
    fn a_shadow_written_before_the_exception_is_kept() {
        let mut page = sync();
        let mut state = vcpu_state(&page);
        state.shadow.mov_ss = true;
        write_back(&state, &mut page);
        queue_exception(Exception::InvalidOpcode, BreakpointRip::AtInt3, &mut page);
        assert_eq!(page.events.interrupt.shadow, SHADOW_MOV_SS);
        assert_eq!(page.events.flags, KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_PAYLOAD);
        let mut unchanged = sync();
        unchanged.events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
        queue_exception(Exception::InvalidOpcode, BreakpointRip::AtInt3, &mut unchanged);
        assert_eq!(unchanged.events.flags, KVM_VCPUEVENT_VALID_PAYLOAD);
    }
}
