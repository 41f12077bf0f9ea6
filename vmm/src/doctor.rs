//! What this host's KVM can do for probes, measured with guests of a few instructions.
//!
//! Capabilities say what KVM knows; several hosts behave differently all the same (a KVM without hardware under it runs
//! kernel code in its emulator), so the behaviour itself is tried.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_CAP_SYNC_REGS, kvm_msi};
use kvm_ioctls::Kvm;
use probe_core::watch::{DebugRegisters, GuestDebugRegisters, WatchSet, Watchpoint};
use probe_core::{Gpa, Gva, PAGE_SIZE, PhysicalMemory, Registers, VcpuId, rflags};

use crate::acpi::Platform;
use crate::boot::{self, Kernel, KernelSegment, Protocol};
use crate::cpuid::{self, Topology};
use crate::exit::Exit;
use crate::host::{self, Host};
use crate::layout;
use crate::machine::{self, CreateError};
use crate::mapping::Mapping;
use crate::memory::GuestRam;
use crate::quartiles::Quartiles;
use crate::vcpu::{DebugControl, Vcpu};

/// How an int3 in guest kernel code reaches the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakpointExit {
    /// KVM_EXIT_DEBUG: as on hardware.
    Debug,
    /// KVM's instruction emulator gives up at it. Usable.
    EmulationFailure,
    /// Not at all.
    None,
}

/// What the host is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Any guest.
    Full,
    /// Bare-metal guests of up to some thousand instructions; a stock kernel needs another way.
    SmallGuests,
    /// Nothing.
    Unusable,
}

/// What was measured. A field that is `None` could not be tried.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnosis {
    /// Why the machine cannot run here at all.
    pub unusable: Option<String>,
    /// /proc/cpuinfo shows svm or vmx.
    pub virtualization_flag: bool,
    /// KVM_GET_API_VERSION.
    pub api_version: Option<i32>,
    /// How #BP exits.
    pub breakpoint: Option<BreakpointExit>,
    /// A debug register of the host's stops the guest.
    pub hardware_breakpoint: Option<bool>,
    /// A debug register of the host's stops the guest behind a store.
    pub data_watchpoint: Option<bool>,
    /// Registers travel in the run page, both ways.
    pub sync_regs: Option<bool>,
    /// A store to a read-only slot exits and is not carried out.
    pub read_only_slots: Option<bool>,
    /// A pending interrupt waits while the host holds it (KVM_GUESTDBG_BLOCKIRQ).
    pub blocks_interrupts: Option<bool>,
    /// KVM_CAP_MAX_VCPUS.
    pub max_vcpus: Option<usize>,
    /// KVM_CAP_NR_MEMSLOTS.
    pub memory_slots: Option<usize>,
    /// A port write, out of the guest and back: median, nanoseconds.
    pub exit_ns: Option<f64>,
    /// One guest instruction of a counting loop: median, nanoseconds.
    pub instruction_ns: Option<f64>,
}

/// Whether a feature is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Yes.
    Present,
    /// In another way than on hardware.
    Limited,
    /// No.
    Missing,
    /// Could not be tried.
    Unknown,
}

/// One line of the diagnosis, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The feature.
    pub feature: &'static str,
    /// Whether it is there.
    pub status: Status,
    /// What was seen.
    pub seen: String,
    /// What its absence costs.
    pub without: &'static str,
}

/// An instruction above this cost is not run by the CPU: emulators take hundreds of nanoseconds, CPUs less than one, CPUs under
/// a nested or binary-translating host some tens.
const EMULATED_INSTRUCTION_NS: f64 = 200.0;

impl Diagnosis {
    /// Whether guest kernel code is run by KVM's instruction emulator.
    #[must_use]
    pub fn emulates_kernel_code(&self) -> bool {
        self.breakpoint == Some(BreakpointExit::EmulationFailure)
            || self.instruction_ns.is_some_and(|ns| ns > EMULATED_INSTRUCTION_NS)
    }

    /// What the host is good for.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let needed = [self.sync_regs, self.read_only_slots];
        let stops = matches!(self.breakpoint, Some(BreakpointExit::Debug | BreakpointExit::EmulationFailure));
        if self.unusable.is_some() || !stops || needed.iter().any(|feature| *feature != Some(true)) {
            Verdict::Unusable
        } else if self.emulates_kernel_code() {
            Verdict::SmallGuests
        } else {
            Verdict::Full
        }
    }

    /// The diagnosis line by line.
    #[must_use]
    pub fn findings(&self) -> Vec<Finding> {
        let tried = |feature, value: Option<bool>, seen: &str, without| {
            let (status, seen) = match value {
                Some(true) => (Status::Present, seen.to_owned()),
                Some(false) => (Status::Missing, "tried, does not work".to_owned()),
                None => (Status::Unknown, "could not be tried".to_owned()),
            };
            Finding { feature, status, seen, without }
        };
        let counted = |feature, value: Option<usize>, without| {
            let (status, seen) = value.map_or((Status::Unknown, "unknown".into()), |count| {
                (if count > 0 { Status::Present } else { Status::Missing }, count.to_string())
            });
            Finding { feature, status, seen, without }
        };
        vec![
            self.device_finding(),
            self.virtualization_finding(),
            self.breakpoint_finding(),
            tried(
                "hardware breakpoint",
                self.hardware_breakpoint,
                "stops before its instruction",
                "nothing yet: vmprobe does not use debug registers",
            ),
            tried(
                "data watchpoint",
                self.data_watchpoint,
                "stops behind its store",
                "accesses to memory cannot be watched",
            ),
            tried(
                "registers in the run page",
                self.sync_regs,
                "both ways, without an ioctl",
                "each hit takes at least two more ioctls",
            ),
            tried(
                "read-only memory slots",
                self.read_only_slots,
                "a store exits",
                "a guest that patches its own text (ftrace, alternatives) overwrites probes",
            ),
            tried(
                "interrupts held on request",
                self.blocks_interrupts,
                "a pending interrupt waits",
                "a breakpoint of the guest's own may be lost to an interrupt on a CPU without NRIPS",
            ),
            counted("vCPUs", self.max_vcpus, "fewer vCPUs per guest"),
            counted("memory slots", self.memory_slots, "probes in fewer separate pages"),
            self.cost_finding(),
        ]
    }

    fn device_finding(&self) -> Finding {
        let (status, seen) = match (&self.unusable, self.api_version) {
            (Some(reason), _) => (Status::Missing, reason.clone()),
            (None, Some(version)) => (Status::Present, format!("API version {version}")),
            (None, None) => (Status::Unknown, "no API version".to_owned()),
        };
        Finding { feature: "/dev/kvm", status, seen, without: "only --accel nested works" }
    }

    fn virtualization_finding(&self) -> Finding {
        let (status, seen) = match (self.virtualization_flag, self.emulates_kernel_code()) {
            (true, false) => {
                (Status::Present, "svm or vmx in /proc/cpuinfo, and the CPU runs guest kernel code")
            }
            (true, true) => {
                (Status::Limited, "svm or vmx in /proc/cpuinfo, but KVM emulates guest kernel code")
            }
            (false, true) => {
                (Status::Missing, "neither svm nor vmx in /proc/cpuinfo; KVM emulates guest kernel code")
            }
            (false, false) => (Status::Missing, "neither svm nor vmx in /proc/cpuinfo"),
        };
        Finding {
            feature: "hardware virtualization",
            status,
            seen: seen.to_owned(),
            without: "guest kernel code runs at about a million instructions a second and not every instruction runs: \
                      small bare-metal guests only, use --accel nested for a stock kernel",
        }
    }

    fn breakpoint_finding(&self) -> Finding {
        let (status, seen) = match self.breakpoint {
            Some(BreakpointExit::Debug) => (Status::Present, "KVM_EXIT_DEBUG"),
            Some(BreakpointExit::EmulationFailure) => {
                (Status::Limited, "KVM's emulator stops at it; user-mode breakpoints do not arrive")
            }
            Some(BreakpointExit::None) => (Status::Missing, "the guest keeps it"),
            None => (Status::Unknown, "could not be tried"),
        };
        Finding {
            feature: "breakpoint (#BP exit)",
            status,
            seen: seen.to_owned(),
            without: "no probe can fire",
        }
    }

    fn cost_finding(&self) -> Finding {
        let (status, seen) = match (self.exit_ns, self.instruction_ns) {
            (Some(exit), Some(instruction)) => {
                let status =
                    if instruction > EMULATED_INSTRUCTION_NS { Status::Limited } else { Status::Present };
                (status, format!("{:.2} us a bare exit, {instruction:.1} ns an instruction", exit / 1000.0))
            }
            _ => (Status::Unknown, "could not be measured".to_owned()),
        };
        Finding {
            feature: "cost",
            status,
            seen,
            without: "each hit costs about one bare exit, out of line two",
        }
    }
}

/// Measures this host. Takes well under a second with hardware under KVM, about a second without.
#[must_use]
pub fn diagnose() -> Diagnosis {
    let (mut diagnosis, kvm) = try_features();
    if let Some(kvm) = kvm {
        (diagnosis.exit_ns, diagnosis.instruction_ns) = measure_costs(&kvm);
    }
    diagnosis
}

/// [`Diagnosis::verdict`] without the rest: costs are measured only where they decide.
#[must_use]
pub fn judge() -> Verdict {
    let (mut diagnosis, kvm) = try_features();
    if let Some(kvm) = kvm.filter(|_| diagnosis.breakpoint == Some(BreakpointExit::Debug)) {
        (diagnosis.exit_ns, diagnosis.instruction_ns) = measure_costs(&kvm);
    }
    diagnosis.verdict()
}

/// Whether data watchpoints work here. They do not where KVM emulates guest kernel code: its emulator looks at debug registers for
/// execution only.
#[must_use]
pub fn watches_data(host: &Host) -> bool {
    try_data_watchpoint(&host.kvm).unwrap_or(false)
}

/// What KVM alone takes, without the machine around it: nanoseconds for a port write out of the guest and back, and for one guest
/// instruction. `None` where that cannot be measured.
#[must_use]
pub fn costs() -> (Option<f64>, Option<f64>) {
    Host::open().map_or((None, None), |host| measure_costs(&host.kvm))
}

fn measure_costs(kvm: &Kvm) -> (Option<f64>, Option<f64>) {
    let exit_ns = measure_exit(kvm).ok();
    (exit_ns, measure_instruction(kvm, exit_ns.unwrap_or(0.0)).ok())
}

/// Tries every feature. The KVM comes with it where guests can be tried on it.
fn try_features() -> (Diagnosis, Option<Kvm>) {
    let mut diagnosis = Diagnosis {
        unusable: None,
        virtualization_flag: fs::read_to_string("/proc/cpuinfo")
            .is_ok_and(|text| has_virtualization_flag(&text)),
        api_version: None,
        breakpoint: None,
        hardware_breakpoint: None,
        data_watchpoint: None,
        sync_regs: None,
        read_only_slots: None,
        blocks_interrupts: None,
        max_vcpus: None,
        memory_slots: None,
        exit_ns: None,
        instruction_ns: None,
    };
    let kvm = match Host::open() {
        Ok(host) => host.kvm,
        Err(error) => {
            diagnosis.unusable = Some(error.to_string());
            return (diagnosis, None);
        }
    };
    diagnosis.api_version = Some(kvm.get_api_version());
    diagnosis.max_vcpus = Some(kvm.get_max_vcpus());
    diagnosis.memory_slots = Some(kvm.get_nr_memslots());
    if let Err(error) = host::require(|capability| kvm.check_extension_raw(capability.into())) {
        diagnosis.unusable = Some(error.to_string());
    }
    if let Err(error) = Trial::new(&kvm, DONE) {
        diagnosis.unusable.get_or_insert_with(|| describe(&error));
        return (diagnosis, None);
    }
    diagnosis.breakpoint = try_breakpoint(&kvm).ok();
    diagnosis.hardware_breakpoint = try_hardware_breakpoint(&kvm).ok();
    diagnosis.data_watchpoint = try_data_watchpoint(&kvm).ok();
    diagnosis.sync_regs = try_sync_regs(&kvm).ok();
    diagnosis.read_only_slots = try_read_only_slot(&kvm).ok();
    diagnosis.blocks_interrupts = try_blocked_interrupt(&kvm).ok();
    (diagnosis, Some(kvm))
}

/// The flags line of the first processor (proc_cpuinfo(5)).
fn has_virtualization_flag(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find_map(|line| line.strip_prefix("flags")?.trim_start().strip_prefix(':'));
    flags.is_some_and(|flags| flags.split_whitespace().any(|flag| matches!(flag, "svm" | "vmx")))
}

/// An error with its causes, in one line.
fn describe(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// Where trial code stands.
const CODE: Gpa = layout::HIGH_MEMORY;
/// A page for trials to store to.
const DATA: Gpa = Gpa(CODE.0 + PAGE_SIZE);
/// Ends a trial: a port write with no other meaning.
const DONE_PORT: u16 = 0xf4;
const DONE: &[u8] = &[
    0xe6, 0xf4, // out 0xf4, al
];

/// A guest of a few instructions, at [`CODE`] in 64-bit mode, without stack and interrupt table. It must end with
/// [`DONE`]; an exception is a triple fault.
struct Trial {
    // The vCPU goes before the memory that KVM maps.
    vcpu: Vcpu,
    mapping: Mapping,
    ram: GuestRam,
}

/// Any failure in a trial: the feature counts as not tried.
type Tried<T> = Result<T, CreateError>;

impl Trial {
    fn new(kvm: &Kvm, code: &[u8]) -> Tried<Self> {
        Self::build(kvm, code, &BTreeSet::new(), &Registers::default(), false)
    }

    fn build(
        kvm: &Kvm,
        code: &[u8],
        read_only: &BTreeSet<Gpa>,
        registers: &Registers,
        interrupts: bool,
    ) -> Tried<Self> {
        let ram = GuestRam::new(layout::MIN_MEMORY_BYTES)?;
        let segment = KernelSegment { gpa: CODE, data: code, mem_size: code.len() as u64 };
        let kernel = Kernel { entry: CODE, segments: vec![segment], protocol: Protocol::BareMetal };
        boot::load(&kernel, &Platform { vcpus: 1, mmio_windows: &[] }, &ram)?;
        let vm = kvm.create_vm().map_err(machine::ioctl("KVM_CREATE_VM"))?;
        let mapping = Mapping::new(vm, ram.clone(), kvm.get_nr_memslots(), read_only)?;
        if interrupts {
            machine::create_interrupt_controllers(mapping.vm())?;
        }
        let topology = Topology { index: 0, count: 1 };
        let cpuid = cpuid::guest_cpuid(kvm, topology).map_err(machine::ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let mut vcpu = Vcpu::new(mapping.vm(), VcpuId(0))?;
        let registers = Registers { rip: CODE.0, rflags: rflags::FIXED, ..*registers };
        vcpu.set_up(&cpuid, &registers, boot::enter_long_mode, true)?;
        Ok(Self { vcpu, mapping, ram })
    }

    /// Runs until something else than a signal happens.
    fn enter(&mut self) -> Tried<Exit> {
        loop {
            match self.vcpu.enter()? {
                Exit::Interrupted => {}
                exit => return Ok(exit),
            }
        }
    }

    /// Whether the guest stops with RIP at `rip` for `watchpoint`.
    fn stops_at(&mut self, watchpoint: Watchpoint, rip: Gpa) -> Tried<bool> {
        let watches = WatchSet::from(watchpoint);
        let registers = Some(DebugRegisters::merge(&watches, &GuestDebugRegisters::default()));
        self.vcpu.set_debug(DebugControl { registers, ..DebugControl::default() })?;
        let exit = self.enter()?;
        Ok(matches!(exit, Exit::Debug { exception: 1, .. }) && self.rip() == rip)
    }

    fn rip(&self) -> Gpa {
        Gpa(self.vcpu.state().regs.rip)
    }
}

fn try_breakpoint(kvm: &Kvm) -> Tried<BreakpointExit> {
    let mut trial = Trial::new(kvm, &[0xcc /* int3 */, 0xe6, 0xf4 /* out 0xf4, al */])?;
    trial.vcpu.set_debug(DebugControl { breakpoints: true, ..DebugControl::default() })?;
    Ok(match trial.enter()? {
        Exit::Debug { exception: 3, .. } => BreakpointExit::Debug,
        Exit::EmulationFailure { .. } if trial.rip() == CODE => BreakpointExit::EmulationFailure,
        _ => BreakpointExit::None,
    })
}

fn try_hardware_breakpoint(kvm: &Kvm) -> Tried<bool> {
    let mut trial = Trial::new(kvm, &[0x90 /* nop */, 0x90, 0xe6, 0xf4 /* out 0xf4, al */])?;
    trial.stops_at(Watchpoint::execution(Gva(CODE.0 + 1)), CODE.offset(1))
}

fn try_data_watchpoint(kvm: &Kvm) -> Tried<bool> {
    let code = [
        0x88, 0x03, // mov [rbx], al
        0x90, // nop
        0xe6, 0xf4, // out 0xf4, al
    ];
    let registers = Registers { rbx: DATA.0, ..Registers::default() };
    let mut trial = Trial::build(kvm, &code, &BTreeSet::new(), &registers, false)?;
    trial.stops_at(Watchpoint::write_of_byte(Gva(DATA.0)), CODE.offset(2))
}

fn try_sync_regs(kvm: &Kvm) -> Tried<bool> {
    if kvm.check_extension_raw(KVM_CAP_SYNC_REGS.into()) == 0 {
        return Ok(false);
    }
    let code = [
        0xe6, 0xf4, // out 0xf4, al
        0x48, 0xff, 0xc3, // inc rbx
        0xe6, 0xf4, // out 0xf4, al
    ];
    let mut trial = Trial::new(kvm, &code)?;
    trial.enter()?;
    let mut state = trial.vcpu.state();
    state.regs.rbx = 41;
    trial.vcpu.write_back(&state);
    trial.enter()?;
    Ok(trial.vcpu.state().regs.rbx == 42)
}

fn try_read_only_slot(kvm: &Kvm) -> Tried<bool> {
    let code = [
        0x48, 0x89, 0x03, // mov [rbx], rax
        0xe6, 0xf4, // out 0xf4, al
    ];
    let registers = Registers { rax: 0x1122, rbx: DATA.0, ..Registers::default() };
    let mut trial = Trial::build(kvm, &code, &BTreeSet::from([DATA]), &registers, false)?;
    let exit = trial.enter()?;
    let untouched = trial.ram.read_u64(DATA) == Ok(0);
    Ok(matches!(exit, Exit::MmioWrite { gpa: DATA, len: 8, .. }) && untouched)
}

/// With an interrupt pending, interrupts on and held by the host, the guest must get to its next port write. Without an
/// interrupt table, taking the interrupt is a triple fault.
fn try_blocked_interrupt(kvm: &Kvm) -> Tried<bool> {
    let code = [
        0x89, 0x03, // mov [rbx], eax: switch the local APIC on
        0xe6, 0xf4, // out 0xf4, al
        0x90, // nop
        0xe6, 0xf4, // out 0xf4, al
    ];
    // Spurious-interrupt vector register, offset 0xf0: enabled, vector 0xff (Intel SDM vol. 3A, 11.9).
    let registers = Registers { rax: 0x1ff, rbx: layout::LOCAL_APIC.0 + 0xf0, ..Registers::default() };
    let mut trial = Trial::build(kvm, &code, &BTreeSet::new(), &registers, true)?;
    if !matches!(trial.enter()?, Exit::PortOut { port: DONE_PORT, .. }) {
        return Ok(false);
    }
    trial.vcpu.complete_access()?;
    // A message-signalled interrupt for APIC id 0, vector 0x40, fixed, edge (Intel SDM vol. 3A, 11.11).
    let message = kvm_msi { address_lo: 0xfee0_0000, address_hi: 0, data: 0x40, ..kvm_msi::default() };
    trial.mapping.vm().signal_msi(message).map_err(machine::ioctl("KVM_SIGNAL_MSI"))?;
    let mut state = trial.vcpu.state();
    let nop = CODE.offset(4);
    state.regs.rip = nop.0;
    state.regs.rflags |= rflags::IF;
    trial.vcpu.write_back(&state);
    trial.vcpu.set_debug(DebugControl {
        breakpoints: true,
        hold_interrupts: true,
        ..DebugControl::default()
    })?;
    Ok(matches!(trial.enter()?, Exit::PortOut { port: DONE_PORT, .. }))
}

const BATCHES: usize = 5;
const EXITS_PER_BATCH: u32 = 500;
const LOOPS_PER_BATCH: u32 = 20_000;

fn measure_exit(kvm: &Kvm) -> Tried<f64> {
    let code = [
        0xe6, 0xf4, // again: out 0xf4, al
        0xeb, 0xfc, // jmp again
    ];
    let mut trial = Trial::new(kvm, &code)?;
    trial.enter()?;
    median_of_batches(|| {
        let start = Instant::now();
        for _ in 0..EXITS_PER_BATCH {
            trial.enter()?;
        }
        Ok(nanoseconds(start.elapsed()) / f64::from(EXITS_PER_BATCH))
    })
}

fn measure_instruction(kvm: &Kvm, exit_ns: f64) -> Tried<f64> {
    let [a, b, c, d] = LOOPS_PER_BATCH.to_le_bytes();
    let code = [
        0xb9, a, b, c, d, // start: mov ecx, LOOPS_PER_BATCH
        0xff, 0xc9, // again: dec ecx
        0x75, 0xfc, // jne again
        0xe6, 0xf4, // out 0xf4, al
        0xeb, 0xf3, // jmp start
    ];
    let mut trial = Trial::new(kvm, &code)?;
    trial.enter()?;
    median_of_batches(|| {
        let start = Instant::now();
        trial.enter()?;
        let instructions = f64::from(LOOPS_PER_BATCH) * 2.0;
        Ok((nanoseconds(start.elapsed()) - exit_ns).max(0.0) / instructions)
    })
}

fn nanoseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e9
}

fn median_of_batches(mut batch: impl FnMut() -> Tried<f64>) -> Tried<f64> {
    let batches = (0..BATCHES).map(|_| batch()).collect::<Tried<Vec<f64>>>()?;
    Ok(Quartiles::of(batches).map_or(0.0, |quartiles| quartiles.median))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn healthy() -> Diagnosis {
        Diagnosis {
            unusable: None,
            virtualization_flag: true,
            api_version: Some(12),
            breakpoint: Some(BreakpointExit::Debug),
            hardware_breakpoint: Some(true),
            data_watchpoint: Some(true),
            sync_regs: Some(true),
            read_only_slots: Some(true),
            blocks_interrupts: Some(true),
            max_vcpus: Some(1024),
            memory_slots: Some(32764),
            exit_ns: Some(1200.0),
            instruction_ns: Some(0.3),
        }
    }

    fn status(diagnosis: &Diagnosis, feature: &str) -> Status {
        diagnosis.findings().iter().find(|finding| finding.feature == feature).unwrap().status
    }

    #[test]
    fn the_flag_is_a_whole_word_of_the_flags_line() {
        assert!(has_virtualization_flag("model name\t: x\nflags\t\t: fpu vme svm sse\n"));
        assert!(has_virtualization_flag("flags : vmx\n"));
        assert!(!has_virtualization_flag("flags\t\t: fpu svm_lock\nbugs\t: vmx\n"));
        assert!(!has_virtualization_flag("vmx flags\t: ept\nflags\t: fpu\n"));
        assert!(!has_virtualization_flag(""));
    }

    #[test]
    fn a_healthy_host_runs_everything() {
        let diagnosis = healthy();
        assert_eq!(diagnosis.verdict(), Verdict::Full);
        assert!(diagnosis.findings().iter().all(|finding| finding.status == Status::Present));
    }

    #[test]
    fn an_emulating_host_runs_small_guests() {
        let slow = Diagnosis { instruction_ns: Some(1100.0), ..healthy() };
        assert_eq!(slow.verdict(), Verdict::SmallGuests);
        let failing = Diagnosis {
            breakpoint: Some(BreakpointExit::EmulationFailure),
            virtualization_flag: false,
            ..healthy()
        };
        assert_eq!(failing.verdict(), Verdict::SmallGuests);
        assert_eq!(status(&failing, "breakpoint (#BP exit)"), Status::Limited);
        assert_eq!(status(&failing, "hardware virtualization"), Status::Missing);
    }

    #[test]
    fn a_missing_need_makes_the_host_unusable_and_is_named() {
        type Break = fn(&mut Diagnosis);
        let breaks: [(Break, &str); 4] = [
            (|d| d.unusable = Some("gone".into()), "/dev/kvm"),
            (|d| d.breakpoint = Some(BreakpointExit::None), "breakpoint (#BP exit)"),
            (|d| d.sync_regs = Some(false), "registers in the run page"),
            (|d| d.read_only_slots = Some(false), "read-only memory slots"),
        ];
        for (change, feature) in breaks {
            let mut diagnosis = healthy();
            change(&mut diagnosis);
            assert_eq!(diagnosis.verdict(), Verdict::Unusable, "{feature}");
            assert_eq!(status(&diagnosis, feature), Status::Missing);
        }
        let not_needed =
            Diagnosis { hardware_breakpoint: Some(false), blocks_interrupts: Some(false), ..healthy() };
        assert_eq!(not_needed.verdict(), Verdict::Full);
    }

    #[test]
    fn what_was_not_tried_is_unknown() {
        let diagnosis = Diagnosis { sync_regs: None, exit_ns: None, ..healthy() };
        assert_eq!(status(&diagnosis, "registers in the run page"), Status::Unknown);
        assert_eq!(status(&diagnosis, "cost"), Status::Unknown);
        assert_eq!(diagnosis.verdict(), Verdict::Unusable);
    }
}
