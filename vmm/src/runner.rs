//! The run loop of one vCPU, on its thread.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;

use probe_core::stop::{Resume, Stop, StopHandler, dr6};
use probe_core::watch::{DebugRegisters, WatchSet};
use probe_core::{Exception, Gva, VcpuId, VcpuState, rflags};

use crate::devices::{Buses, Request};
use crate::exit::Exit;
use crate::memory::GuestRam;
use crate::pause::{Pause, Rest};
use crate::regs::BreakpointRip;
use crate::report::{ExitCounters, ExitCounts, RunEnd, VcpuReport};
use crate::vcpu::{DebugControl, Vcpu, VcpuError};
use vmm_sys_util::errno;

/// How many exits one access takes at most: a vector register of 64 bytes, read, changed and written.
const MAX_ACCESSES: usize = 16;

/// Where a CPU starts after a reset (Intel SDM vol. 3A, 9.1.4); KVM on AMD puts a vCPU there on a triple fault.
const RESET_RIP: u64 = 0xfff0;

/// What the vCPU threads and their coordinator share.
#[derive(Debug)]
pub(crate) struct Shared {
    /// All vCPUs are to leave the run loop.
    pub stop: Arc<AtomicBool>,
    /// Counts the watchdog's questions; a vCPU answers each once.
    pub inspection: AtomicU64,
    /// Whether vCPUs are to park.
    pub pause: Arc<Pause>,
    /// The MSRs that a snapshot holds.
    pub msrs: Box<[u32]>,
    /// Why each vCPU has left the guest, by its number.
    exits: Box<[ExitCounters]>,
}

impl Shared {
    pub fn new(vcpus: usize, msrs: Vec<u32>) -> Self {
        Self {
            msrs: msrs.into(),
            stop: Arc::default(),
            inspection: AtomicU64::new(0),
            pause: Arc::default(),
            exits: (0..vcpus).map(|_| ExitCounters::default()).collect(),
        }
    }

    pub fn vcpus(&self) -> usize {
        self.exits.len()
    }

    /// How often each vCPU has left the guest so far, and why, by its number.
    pub fn exits(&self) -> Vec<ExitCounts> {
        self.exits.iter().map(ExitCounters::read).collect()
    }
}

/// What the coordinator hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A stop request from outside.
    Stop,
    /// Part of guest memory is gone, and KVM said why.
    MemoryLost(errno::Error),
    /// A vCPU's thread ends.
    Ended(VcpuId),
    /// A vCPU delivers an exception with interrupts held, and is to be kicked until it says that it is done.
    Delivering(VcpuId),
    /// It is done.
    Delivered(VcpuId),
    /// The answer to question number `inspection`.
    Inspected { vcpu: VcpuId, inspection: u64, sleeps_for_ever: bool },
}

/// What has become of a vCPU when it has left the run loop.
pub(crate) struct Outcome {
    pub report: VcpuReport,
    /// Why; `None` for a stop request.
    pub end: Result<Option<RunEnd>, VcpuError>,
    /// It can run on.
    pub vcpu: Vcpu,
}

/// A vCPU with everything that its run loop needs.
pub(crate) struct Runner {
    pub vcpu: Vcpu,
    pub handler: Box<dyn StopHandler>,
    pub ram: GuestRam,
    pub buses: Arc<Buses>,
    pub shared: Arc<Shared>,
    pub events: Sender<Event>,
    /// Interrupts are held until the #BP queued at this RIP has been delivered, on a host that would lose it to one.
    delivering: Option<u64>,
    loses_breakpoints: bool,
    /// The host's watchpoints at the last entry.
    watchpoints: WatchSet,
    /// RIP of an instruction that was watched for execution and is to run now.
    passing: Option<u64>,
    inspected: u64,
}

impl Runner {
    pub fn new(
        vcpu: Vcpu,
        handler: Box<dyn StopHandler>,
        ram: GuestRam,
        buses: Arc<Buses>,
        shared: Arc<Shared>,
        events: Sender<Event>,
        loses_breakpoints: bool,
    ) -> Self {
        Self {
            vcpu,
            handler,
            ram,
            buses,
            shared,
            events,
            delivering: None,
            loses_breakpoints,
            watchpoints: WatchSet::default(),
            passing: None,
            inspected: 0,
        }
    }

    /// Runs until the guest, the handler or a stop request ends it.
    pub fn run(mut self) -> Outcome {
        let before = self.vcpu.ioctls();
        let mut end = self.run_until_end();
        if let Err(error) = self.complete_access() {
            end = end.and(Err(error));
        }
        let state = self.settle();
        if self.vcpu.debug() != DebugControl::default()
            && let Err(error) = self.vcpu.set_debug(DebugControl::default())
        {
            end = end.and(Err(error));
        }
        let ioctls = self.vcpu.ioctls().since(before);
        let exits = self.exits().read();
        Outcome { report: VcpuReport { vcpu: self.vcpu.id(), exits, ioctls, state }, end, vcpu: self.vcpu }
    }

    fn run_until_end(&mut self) -> Result<Option<RunEnd>, VcpuError> {
        loop {
            if self.shared.stop.load(Ordering::Acquire) {
                return Ok(None);
            }
            if self.shared.pause.wanted() && !self.shared.pause.is_mine() {
                if let Some(end) = self.park()? {
                    return Ok(Some(end));
                }
                continue;
            }
            self.answer_inspection()?;
            self.notice_delivery();
            let delivering = self.delivering.is_some();
            let control = DebugControl {
                breakpoints: delivering || self.handler.wants_breakpoints(),
                hold_interrupts: delivering,
                registers: self.debug_registers()?,
            };
            if self.vcpu.debug() != control {
                self.vcpu.set_debug(control)?;
            }
            let exit = self.vcpu.enter()?;
            self.count(&exit);
            if let Some(end) = self.handle(exit)? {
                return Ok(Some(end));
            }
        }
    }

    /// Takes part in a pause, the last exit's access completed and the handler's work in order: an instruction is then over or
    /// has not begun.
    fn park(&mut self) -> Result<Option<RunEnd>, VcpuError> {
        if let Some(end) = self.complete_access()? {
            return Ok(Some(end));
        }
        let state = self.settle();
        let guest_breakpoints = self.vcpu.guest_debug_registers()?.enabled();
        let Self { vcpu, shared, .. } = self;
        let changed = shared.pause.park(&shared.stop, Rest { state, guest_breakpoints }, |changed| {
            if let Some(state) = changed {
                vcpu.write_back(&state);
            }
            vcpu.save(&shared.msrs)
        });
        if let Some(state) = changed {
            vcpu.write_back(&state);
        }
        Ok(None)
    }

    /// Completes the access of the last exit, which may take more than one: wider than 8 bytes, or read, changed and written. A
    /// repeated string instruction may take any number: it stays where it has come to.
    fn complete_access(&mut self) -> Result<Option<RunEnd>, VcpuError> {
        for _ in 0..MAX_ACCESSES {
            if !self.vcpu.access_pending() {
                break;
            }
            let exit = self.vcpu.complete_access()?;
            self.count(&exit);
            if let Some(end) = self.handle(exit)? {
                return Ok(Some(end));
            }
        }
        Ok(None)
    }

    fn handle(&mut self, exit: Exit) -> Result<Option<RunEnd>, VcpuError> {
        match exit {
            Exit::PortIn { .. } | Exit::PortOut { .. } | Exit::MmioRead { .. } | Exit::MmioWrite { .. } => {
                Ok(self.serve(&exit))
            }
            Exit::Debug { exception: 1, pc, dr6 } => self.debug_exception(pc, dr6),
            Exit::Debug { exception: 3, pc, .. } => self.stop(Stop::Breakpoint { pc }),
            Exit::EmulationFailure { bytes, len } => self.stop(Stop::EmulationFailure { bytes, len }),
            // Whoever kicks may wait until nothing of the handler's is under way.
            Exit::Interrupted => {
                self.settle();
                Ok(None)
            }
            Exit::Shutdown => {
                let rip = Some(self.settle().regs.rip).filter(|rip| *rip != RESET_RIP).map(Gva);
                Ok(Some(RunEnd::TripleFault { vcpu: self.vcpu.id(), rip }))
            }
            Exit::Debug { exception, pc, .. } => {
                Ok(Some(self.failed(format!("KVM reported a debug exit with exception {exception} at {pc}"))))
            }
            Exit::InternalError { suberror, data } => Ok(Some(self.failed(format!(
                "KVM could not go on (internal error {suberror}, data {data:x?}); look for kvm in the host's kernel log"
            )))),
            Exit::FailEntry { reason } => Ok(Some(self.failed(format!(
                "The CPU refused the guest's state (hardware reason {reason:#x}); look for kvm in the host's kernel log"
            )))),
            Exit::Halt => Ok(Some(self.failed("KVM handed a HLT out, which its interrupt controller keeps".into()))),
            Exit::Other { reason } => {
                Ok(Some(self.failed(format!("KVM left the guest for reason {reason}, which this machine never asks for"))))
            }
        }
    }

    /// Carries out a port or MMIO access.
    fn serve(&mut self, exit: &Exit) -> Option<RunEnd> {
        match *exit {
            Exit::PortIn { port, size } => {
                for data in self.vcpu.port_data().chunks_exact_mut(usize::from(size).max(1)) {
                    self.buses.ports.read(port, data);
                }
                None
            }
            Exit::PortOut { port, size } => {
                let data = self.vcpu.port_data();
                let request = data.chunks_exact(usize::from(size).max(1)).fold(None, |request, data| {
                    let newer = self.buses.ports.write(port, data);
                    newer.or(request)
                });
                request.map(|request| match request {
                    Request::Reset => RunEnd::Reset,
                    Request::PowerOff => RunEnd::PowerOff,
                })
            }
            Exit::MmioRead { gpa, len } => {
                let mut data = [0xff; 8];
                let wanted = usize::from(len).min(data.len());
                self.buses.mmio.read(gpa, &mut data[..wanted]);
                self.vcpu.answer_mmio_read(data);
                None
            }
            Exit::MmioWrite { gpa, data, len } => {
                let data = &data[..usize::from(len)];
                if self.ram.is_ram(gpa, u64::from(len)) {
                    self.handler.on_text_write(&self.ram, gpa, data);
                } else {
                    self.buses.mmio.write(gpa, data);
                }
                None
            }
            _ => None,
        }
    }

    /// Tells the host's watchpoints from what is the guest's.
    fn debug_exception(&mut self, pc: Gva, reported: u64) -> Result<Option<RunEnd>, VcpuError> {
        let Some(registers) = self.vcpu.debug().registers else {
            return self.stop(Stop::Debug { pc, dr6: reported });
        };
        let stop = match registers.split(reported, &self.vcpu.guest_debug_registers()?) {
            // Only a breakpoint that the guest has switched off since.
            (hits, 0) if hits.is_empty() && reported & dr6::B != 0 => return Ok(None),
            (hits, guest_dr6) if hits.is_empty() => Stop::Debug { pc, dr6: guest_dr6 },
            (hits, guest_dr6) => Stop::Watchpoint { pc, hits, guest_dr6 },
        };
        // KVM's emulator stops at the host's breakpoints whatever RF is.
        let regs = self.vcpu.state().regs;
        let again = regs.rflags & rflags::RF != 0 && self.passing == Some(regs.rip);
        if again && self.waits_for_execution(&stop) {
            return Ok(Some(self.failed(format!(
                "KVM emulates the instruction at {pc} and does not let the guest past a watchpoint for its execution; probe it instead"
            ))));
        }
        self.stop(stop)
    }

    /// Whether the stop is due to a watchpoint for the execution of the instruction at RIP.
    fn waits_for_execution(&self, stop: &Stop) -> bool {
        matches!(stop, Stop::Watchpoint { hits, .. } if !self.watchpoints.executed(*hits).is_empty())
    }

    /// Asks the handler about a stop and does what it says.
    fn stop(&mut self, stop: Stop) -> Result<Option<RunEnd>, VcpuError> {
        let mut state = self.vcpu.state();
        let at = state.regs.rip;
        let mut passing = None;
        match self.handler.on_stop(&mut state, &self.ram, stop) {
            Resume::Run => {
                if self.waits_for_execution(&stop) && state.regs.rip == at {
                    // The instruction is to run this time (Intel SDM vol. 3B, 17.3.1.1).
                    state.regs.rflags |= rflags::RF;
                    passing = Some(at);
                }
                self.vcpu.write_back(&state);
            }
            Resume::Inject(exception) => {
                self.vcpu.write_back(&state);
                let rip = breakpoint_rip(exception, &stop);
                self.vcpu.queue_exception(exception, rip);
                let interrupts = state.regs.rflags & rflags::IF != 0;
                if self.loses_breakpoints
                    && exception == Exception::Breakpoint
                    && interrupts
                    && self.delivering.replace(state.regs.rip).is_none()
                {
                    self.tell(Event::Delivering(self.vcpu.id()));
                }
            }
            Resume::Pause => {
                self.vcpu.write_back(&state);
                self.shared.pause.request(self.vcpu.id());
            }
            Resume::Halt => {
                self.vcpu.write_back(&state);
                self.vcpu.halt()?;
            }
            Resume::Finish => {
                self.vcpu.write_back(&state);
                return Ok(Some(RunEnd::Finished { vcpu: self.vcpu.id() }));
            }
            Resume::Fail { reason } => {
                return Ok(Some(self.failed(explain_failure(&reason, at, &stop))));
            }
        }
        self.passing = passing;
        Ok(None)
    }

    /// The state that the guest takes itself to be in, now that this vCPU does not run on.
    fn settle(&mut self) -> VcpuState {
        let mut state = self.vcpu.state();
        let due = self.handler.settle(&mut state, &self.ram);
        self.vcpu.write_back(&state);
        if let Some(exception) = due {
            self.vcpu.queue_exception(exception, BreakpointRip::AtInt3);
        }
        state
    }

    /// The host's watchpoints together with the guest's own breakpoints; `None` while there are no watchpoints.
    ///
    /// While others stand in for the guest's registers, KVM takes the guest's writes to them without an exit. So what the guest
    /// sets up meanwhile works from the next exit on.
    fn debug_registers(&mut self) -> Result<Option<DebugRegisters>, VcpuError> {
        self.watchpoints = self.handler.watchpoints();
        if self.watchpoints.is_empty() {
            return Ok(None);
        }
        let registers = DebugRegisters::merge(&self.watchpoints, &self.vcpu.guest_debug_registers()?);
        if registers.left_out > 0 && self.vcpu.debug().registers != Some(registers) {
            tracing::warn!(
                vcpu = %self.vcpu.id(),
                "The guest uses more debug registers than watchpoints leave it; {} of its breakpoints do not work",
                registers.left_out
            );
        }
        Ok(Some(registers))
    }

    /// Lets interrupts through again once RIP has left the int3 whose #BP was queued. KVM does not report a #BP as queued; it puts
    /// RIP back to the int3 when it leaves the guest before the delivery.
    fn notice_delivery(&mut self) {
        if self.delivering.is_none() {
            return;
        }
        if self.delivering != Some(self.vcpu.state().regs.rip) {
            self.delivering = None;
            self.tell(Event::Delivered(self.vcpu.id()));
        }
    }

    /// Answers the watchdog's question, once.
    fn answer_inspection(&mut self) -> Result<(), VcpuError> {
        let inspection = self.shared.inspection.load(Ordering::Acquire);
        if inspection != self.inspected {
            self.inspected = inspection;
            let sleeps_for_ever = self.vcpu.sleeps_for_ever()?;
            self.tell(Event::Inspected { vcpu: self.vcpu.id(), inspection, sleeps_for_ever });
        }
        Ok(())
    }

    /// Tells the coordinator. It outlives the threads; were it gone, nobody would wait to hear.
    fn tell(&self, event: Event) {
        self.events.send(event).ok();
    }

    fn failed(&self, reason: String) -> RunEnd {
        RunEnd::Failed { vcpu: self.vcpu.id(), reason }
    }

    fn exits(&self) -> &ExitCounters {
        &self.shared.exits[self.vcpu.id().0 as usize]
    }

    fn count(&self, exit: &Exit) {
        let exits = self.exits();
        let counter = match exit {
            Exit::PortIn { .. } => &exits.port_in,
            Exit::PortOut { .. } => &exits.port_out,
            Exit::MmioRead { .. } => &exits.mmio_read,
            Exit::MmioWrite { .. } => &exits.mmio_write,
            Exit::Debug { .. } => &exits.debug,
            Exit::EmulationFailure { .. } => &exits.emulation_failure,
            Exit::Interrupted => &exits.interrupted,
            _ => &exits.other,
        };
        // This thread alone writes it.
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// How KVM wants RIP for #BP after `stop`.
fn breakpoint_rip(exception: Exception, stop: &Stop) -> BreakpointRip {
    match (exception, stop) {
        (Exception::Breakpoint, Stop::EmulationFailure { .. }) => BreakpointRip::BehindInt3,
        _ => BreakpointRip::AtInt3,
    }
}

/// A handler's reason, with what the host adds to it.
fn explain_failure(reason: &str, rip: u64, stop: &Stop) -> String {
    let mut text = reason.to_owned();
    if let Stop::EmulationFailure { bytes, len } = stop {
        let bytes = &bytes[..usize::from(*len).min(bytes.len())];
        text.push_str(". KVM's emulator on this host cannot run the instruction at ");
        let written = write!(text, "{rip:#x} (bytes");
        let written = bytes.iter().fold(written, |written, byte| written.and(write!(text, " {byte:02x}")));
        debug_assert!(written.is_ok(), "writing to a String does not fail");
        text.push_str("); use --accel nested");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_breakpoint_after_an_emulation_failure_moves_rip() {
        let failure = Stop::EmulationFailure { bytes: [0xcc; 15], len: 15 };
        let breakpoint = Stop::Breakpoint { pc: Gva(1) };
        assert_eq!(breakpoint_rip(Exception::Breakpoint, &failure), BreakpointRip::BehindInt3);
        assert_eq!(breakpoint_rip(Exception::Breakpoint, &breakpoint), BreakpointRip::AtInt3);
        assert_eq!(breakpoint_rip(Exception::InvalidOpcode, &failure), BreakpointRip::AtInt3);
    }

    #[test]
    fn a_failed_emulation_names_place_and_bytes() {
        let mut bytes = [0; 15];
        bytes[..3].copy_from_slice(&[0x0f, 0x01, 0xca]);
        let text = explain_failure("No probe is there", 0x10_0000, &Stop::EmulationFailure { bytes, len: 3 });
        assert_eq!(
            text,
            "No probe is there. KVM's emulator on this host cannot run the instruction at 0x100000 (bytes 0f 01 ca); \
             use --accel nested"
        );
        assert_eq!(
            explain_failure("No probe is there", 1, &Stop::Breakpoint { pc: Gva(1) }),
            "No probe is there"
        );
    }
}
