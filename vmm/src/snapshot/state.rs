//! The state of a machine as the file holds it: structures of this project's own, filled from KVM's and turned into them. Pure.
//!
//! Each has the fields of the KVM structure that it is named after (Linux: Documentation/virt/kvm/api.rst), without padding. What
//! the CPU itself lays out stays bytes: the XSAVE area (Intel SDM vol. 1, 13.4) and the local APIC's registers (vol. 3A, 12.4.1).

use std::ffi::c_char;

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_cpuid_entry2, kvm_debugregs,
    kvm_dtable, kvm_ioapic_state, kvm_irqchip, kvm_lapic_state, kvm_pic_state, kvm_pit_channel_state,
    kvm_pit_state2, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1,
    kvm_vcpu_events__bindgen_ty_2, kvm_vcpu_events__bindgen_ty_3, kvm_vcpu_events__bindgen_ty_4,
    kvm_vcpu_events__bindgen_ty_5, kvm_xcr, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};
use vm_superio::SerialState;

use crate::devices::Pm1Registers;

/// A value and what KVM, or another crate, has in its place.
pub(crate) trait Mirror {
    type Of;

    fn save(of: &Self::Of) -> Self;
    fn restore(&self) -> Self::Of;
}

macro_rules! itself {
    ($($type:ty),*) => {$(
        impl Mirror for $type {
            type Of = $type;

            fn save(of: &$type) -> Self {
                of.clone()
            }

            fn restore(&self) -> $type {
                self.clone()
            }
        }
    )*};
}

itself!(u8, u16, u32, u64, i64, [u64; 4], Vec<u8>);

impl<M: Mirror, const N: usize> Mirror for [M; N]
where
    M: Structure,
{
    type Of = [M::Of; N];

    fn save(of: &Self::Of) -> Self {
        of.each_ref().map(M::save)
    }

    fn restore(&self) -> Self::Of {
        self.each_ref().map(M::restore)
    }
}

/// One of the structures below, as opposed to a number.
pub(crate) trait Structure {}

macro_rules! mirror {
    ($($(#[$doc:meta])* $name:ident = $of:ty { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub(crate) struct $name {
            $(pub $field: $type,)*
        }

        impl Structure for $name {}

        impl Mirror for $name {
            type Of = $of;

            fn save(of: &$of) -> Self {
                Self { $($field: <$type as Mirror>::save(&of.$field),)* }
            }

            #[allow(clippy::needless_update, reason = "not every structure has padding")]
            fn restore(&self) -> $of {
                Self::Of { $($field: self.$field.restore(),)* ..<$of>::default() }
            }
        }
    )*};
}

mirror! {
    Registers = kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }

    Segment = kvm_segment {
        base: u64, limit: u32, selector: u16, type_: u8, present: u8, dpl: u8, db: u8, s: u8, l: u8, g: u8,
        avl: u8, unusable: u8,
    }

    Table = kvm_dtable { base: u64, limit: u16 }

    SystemRegisters = kvm_sregs {
        cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment, tr: Segment, ldt: Segment,
        gdt: Table, idt: Table,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        interrupt_bitmap: [u64; 4],
    }

    Exception = kvm_vcpu_events__bindgen_ty_1 {
        injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32,
    }

    Interrupt = kvm_vcpu_events__bindgen_ty_2 { injected: u8, nr: u8, soft: u8, shadow: u8 }

    Nmi = kvm_vcpu_events__bindgen_ty_3 { injected: u8, pending: u8, masked: u8 }

    Smi = kvm_vcpu_events__bindgen_ty_4 { smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8 }

    TripleFault = kvm_vcpu_events__bindgen_ty_5 { pending: u8 }

    /// What is pending and what is held back; `flags` says which of it counts.
    Events = kvm_vcpu_events {
        exception: Exception, interrupt: Interrupt, nmi: Nmi, sipi_vector: u32, flags: u32, smi: Smi,
        triple_fault: TripleFault, exception_has_payload: u8, exception_payload: u64,
    }

    DebugRegisters = kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64 }

    CpuidEntry = kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
    }

    /// One of the two 8259s.
    Pic = kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8, read_reg_select: u8, poll: u8,
        special_mask: u8, init_state: u8, auto_eoi: u8, rotate_on_auto_eoi: u8, special_fully_nested_mode: u8,
        init4: u8, elcr: u8, elcr_mask: u8,
    }

    PitChannel = kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8, read_state: u8,
        write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8, count_load_time: i64,
    }

    /// The 8254. Its counters begin anew when it is restored: KVM does not tell how far they have come.
    Pit = kvm_pit_state2 { channels: [PitChannel; 3], flags: u32 }

    /// The 16550.
    Uart = SerialState {
        baud_divisor_low: u8, baud_divisor_high: u8, interrupt_enable: u8, interrupt_identification: u8,
        line_control: u8, line_status: u8, modem_control: u8, modem_status: u8, scratch: u8, in_buffer: Vec<u8>,
    }

    /// ACPI's PM1a registers.
    Pm1 = Pm1Registers { status: u16, enable: u16, control: u16 }
}

/// The I/O APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct IoApic {
    pub base_address: u64,
    pub ioregsel: u32,
    pub id: u32,
    pub irr: u32,
    /// As bits (Intel 82093AA, 3.2.4).
    pub redirtbl: [u64; 24],
}

/// All interrupt controllers outside of vCPUs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct InterruptControllers {
    pub master: Pic,
    pub slave: Pic,
    pub io_apic: IoApic,
}

impl InterruptControllers {
    /// KVM_IRQCHIP_*, in the order of the fields.
    pub const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

    /// From what KVM_GET_IRQCHIP gave for each of [`Self::CHIPS`].
    pub fn save(chips: &[kvm_irqchip; 3]) -> Self {
        let [master, slave, io_apic] = chips;
        // SAFETY: `chip` is a union of integers only, all of its bytes initialised: each bit pattern is a value of each member.
        let (master, slave, io_apic) = unsafe { (master.chip.pic, slave.chip.pic, io_apic.chip.ioapic) };
        let redirtbl = io_apic.redirtbl.map(|entry| {
            // SAFETY: a union of an integer and its bit fields, see above.
            unsafe { entry.bits }
        });
        Self {
            master: Pic::save(&master),
            slave: Pic::save(&slave),
            io_apic: IoApic {
                base_address: io_apic.base_address,
                ioregsel: io_apic.ioregsel,
                id: io_apic.id,
                irr: io_apic.irr,
                redirtbl,
            },
        }
    }

    /// What KVM_SET_IRQCHIP takes, for each of [`Self::CHIPS`].
    pub fn restore(&self) -> [kvm_irqchip; 3] {
        let [master, slave, io_apic] =
            Self::CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        let mut chips = [master, slave, io_apic];
        chips[0].chip.pic = self.master.restore();
        chips[1].chip.pic = self.slave.restore();
        let IoApic { base_address, ioregsel, id, irr, redirtbl } = self.io_apic;
        let mut state = kvm_ioapic_state { base_address, ioregsel, id, irr, ..Default::default() };
        for (entry, bits) in state.redirtbl.iter_mut().zip(redirtbl) {
            entry.bits = bits;
        }
        chips[2].chip.ioapic = state;
        chips
    }
}

/// A virtio device on MMIO: what its driver has set up, and what the device has to tell it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Virtio {
    /// Its kind (Virtio 1.2, 5).
    pub id: u32,
    pub status: u32,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub driver_features: u64,
    pub queue_select: u32,
    pub queues: Vec<VirtioQueue>,
    /// InterruptStatus.
    pub interrupts: u32,
    pub needs_reset: bool,
}

/// A queue of it, with where the device has come to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct VirtioQueue {
    pub size: u16,
    pub ready: bool,
    pub event_idx: bool,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub next_available: u16,
    pub next_used: u16,
}

/// The devices that are vmprobe's own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Devices {
    pub serial: Uart,
    pub power: Pm1,
    pub virtio: Vec<Virtio>,
}

/// Everything that KVM holds of a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedVcpu {
    pub cpuid: Vec<CpuidEntry>,
    /// KVM_MP_STATE_*.
    pub mp_state: u32,
    pub registers: Registers,
    pub system: SystemRegisters,
    pub debug: DebugRegisters,
    pub events: Events,
    /// XCR numbers and values.
    pub xcrs: Vec<(u32, u64)>,
    pub xsave: Vec<u8>,
    pub lapic: Vec<u8>,
    /// Index and value.
    pub msrs: Vec<(u32, u64)>,
    /// What the guest's time-stamp counter counts a millisecond; `None` where the host does not say.
    pub tsc_khz: Option<u32>,
}

/// The machine but for its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Saved {
    pub memory_bytes: u64,
    /// CRC-32 of each [`CHUNK`](super::memory::CHUNK) of the memory file.
    pub memory_checksums: Vec<u32>,
    pub vcpus: Vec<SavedVcpu>,
    pub interrupts: InterruptControllers,
    pub pit: Pit,
    /// The paravirtual clock, nanoseconds.
    pub clock: u64,
    pub devices: Devices,
}

pub(crate) fn xcrs(kvm: &kvm_xcrs) -> Vec<(u32, u64)> {
    kvm.xcrs.iter().take(kvm.nr_xcrs as usize).map(|xcr| (xcr.xcr, xcr.value)).collect()
}

pub(crate) fn kvm_xcrs(saved: &[(u32, u64)]) -> kvm_xcrs {
    let mut kvm = kvm_xcrs::default();
    for (to, (xcr, value)) in kvm.xcrs.iter_mut().zip(saved) {
        *to = kvm_xcr { xcr: *xcr, value: *value, ..kvm_xcr::default() };
        kvm.nr_xcrs += 1;
    }
    kvm
}

pub(crate) fn xsave(kvm: &kvm_xsave) -> Vec<u8> {
    kvm.region.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub(crate) fn kvm_xsave(saved: &[u8]) -> kvm_xsave {
    let mut kvm = kvm_xsave::default();
    let (words, _) = saved.as_chunks();
    for (to, word) in kvm.region.iter_mut().zip(words) {
        *to = u32::from_le_bytes(*word);
    }
    kvm
}

pub(crate) fn lapic(kvm: &kvm_lapic_state) -> Vec<u8> {
    kvm.regs.iter().map(|byte| byte.cast_unsigned()).collect()
}

pub(crate) fn kvm_lapic(saved: &[u8]) -> kvm_lapic_state {
    let mut kvm = kvm_lapic_state::default();
    for (to, byte) in kvm.regs.iter_mut().zip(saved) {
        *to = c_char::from_ne_bytes([*byte]);
    }
    kvm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupt_controllers_survive_the_way_through_kvms_unions() {
        let mut chips =
            InterruptControllers::CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        chips[0].chip.pic =
            kvm_pic_state { imr: 0xfb, irq_base: 0x30, elcr_mask: 0xf8, ..Default::default() };
        chips[1].chip.pic = kvm_pic_state { imr: 0xff, irq_base: 0x38, ..Default::default() };
        let mut io_apic = kvm_ioapic_state {
            base_address: 0xfec0_0000,
            ioregsel: 0x10,
            id: 7,
            irr: 0x10,
            ..Default::default()
        };
        for (bits, entry) in (0x1_0000..).zip(&mut io_apic.redirtbl) {
            entry.bits = bits << 40 | bits;
        }
        chips[2].chip.ioapic = io_apic;
        let saved = InterruptControllers::save(&chips);
        assert_eq!((saved.master.irq_base, saved.slave.irq_base, saved.io_apic.id), (0x30, 0x38, 7));
        assert_eq!(saved.io_apic.redirtbl[23], 0x1_0017 << 40 | 0x1_0017);
        let restored = saved.restore();
        assert_eq!(restored.map(|chip| chip.chip_id), InterruptControllers::CHIPS);
        assert_eq!(InterruptControllers::save(&restored), saved);
    }

    #[test]
    fn what_the_cpu_lays_out_keeps_its_bytes() {
        let bytes: Vec<u8> = (0..=255).cycle().take(4096).collect();
        assert_eq!(xsave(&kvm_xsave(&bytes)), bytes);
        assert_eq!(lapic(&kvm_lapic(&bytes[..1024])), bytes[..1024]);
        assert_eq!(lapic(&kvm_lapic(&[])).len(), 1024, "too few bytes do no harm");
        assert_eq!(xcrs(&kvm_xcrs(&[(0, 7), (1, 9)])), [(0, 7), (1, 9)]);
        assert_eq!(kvm_xcrs(&[(0, 0); 99]).nr_xcrs, 16, "nor do too many");
    }

    #[test]
    fn each_field_of_a_structure_goes_both_ways() {
        let segment =
            kvm_segment { base: 1, limit: 2, selector: 3, type_: 4, present: 5, ..Default::default() };
        let sregs = kvm_sregs {
            tr: segment,
            gdt: kvm_dtable { base: 9, limit: 10, ..Default::default() },
            cr8: 11,
            apic_base: 12,
            interrupt_bitmap: [13, 14, 15, 16],
            ..Default::default()
        };
        assert_eq!(SystemRegisters::save(&sregs).restore(), sregs);
        let mut events = kvm_vcpu_events { flags: 0x3f, exception_payload: 1, ..Default::default() };
        (events.nmi.pending, events.interrupt.shadow, events.smi.latched_init) = (1, 2, 1);
        (events.exception.nr, events.triple_fault.pending) = (14, 1);
        assert_eq!(Events::save(&events).restore(), events);
    }
}
