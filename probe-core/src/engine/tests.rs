mod corners;
mod handlers;
mod kprobes;
mod out_of_line;
mod registry;
mod returns;
mod user;
mod watches;

use super::*;
use crate::handler::Handler;
use crate::machine::{NotRunning, PlainText};
use crate::mock::{MockMemory, MockPageTables, MockVcpu, Operation};
use crate::paging::entry;
use crate::patch::INT3;
use crate::probe::Counts;
use crate::stop::{Resume, Stop, StopHandler, dr6};
use crate::{Exception, rflags};

const TEXT: Gva = Gva(0xffff_ffff_8100_0000);
const TEXT_GPA: Gpa = Gpa(0x20_0000);
const STACK: Gva = Gva(0x8000);
const ROOT: Gpa = Gpa(0x10_0000);
const REGION: SlotRegion = SlotRegion { base: Gpa(0xd000_0000), size: 0x1_0000 };
const RW: u64 = entry::PRESENT | entry::WRITABLE;

fn place(offset: u64) -> Place {
    Place { gva: TEXT.offset(offset), gpa: TEXT_GPA.offset(offset), function: Some(TEXT) }
}

fn engine(max_hits: Option<u64>, control: Arc<dyn MachineControl>) -> Engine {
    Engine::new(EngineConfig {
        slots: REGION,
        vcpus: 2,
        vendor: Vendor::Unknown,
        max_hits,
        stacks_in_whole_pages: false,
        control,
        text: Arc::new(PlainText),
    })
}

/// A hit as the test's sink keeps it.
type Seen = (ProbeId, u64);

#[derive(Clone, Default)]
struct Sink {
    seen: Arc<Mutex<Vec<Seen>>>,
    full: bool,
}

impl HitSink for Sink {
    fn deliver(&mut self, report: &Report<'_>) -> bool {
        self.seen.lock().unwrap().push((report.probe, report.state.regs.rip));
        !self.full
    }
}

struct Guest {
    memory: MockMemory,
    state: VcpuState,
    engine: Arc<Engine>,
    cpu: VcpuEngine<Sink>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Guest {
    /// A guest whose function at [`TEXT`] is `code`, with the vCPU about to run it.
    fn new(code: &[u8], max_hits: Option<u64>) -> Self {
        Self::with_sink(code, max_hits, Sink::default())
    }

    fn with_sink(code: &[u8], max_hits: Option<u64>, sink: Sink) -> Self {
        let memory = MockMemory::with_ram(0x1_0000);
        memory.add_ram(TEXT_GPA, 0x2000);
        memory.add_ram(REGION.base, REGION.size);
        memory.load(TEXT_GPA, code);
        let mut tables = MockPageTables::new(&memory, ROOT, 4);
        tables.map_identity(0x1_0000, RW);
        tables.map(TEXT, TEXT_GPA, 0x1000, entry::PRESENT);
        tables.map(TEXT.offset(0x1000), TEXT_GPA.offset(0x1000), 0x1000, RW);
        let state = MockVcpu::new(ROOT).rip(TEXT).rsp(STACK).flags(rflags::IF).build();
        let engine = Arc::new(engine(max_hits, Arc::new(NotRunning)));
        let seen = Arc::clone(&sink.seen);
        let cpu = VcpuEngine::new(Arc::clone(&engine), VcpuId(0), sink);
        Self { memory, state, engine, cpu, seen }
    }

    fn arm(&self, offset: u64) -> Arc<Probe> {
        self.arm_request(ProbeRequest::new(place(offset)))
    }

    fn arm_with(&self, offset: u64, handler: impl Handler + 'static) -> Arc<Probe> {
        self.arm_request(ProbeRequest::new(place(offset)).with_handler(Arc::new(handler)))
    }

    fn arm_request(&self, request: ProbeRequest) -> Arc<Probe> {
        self.engine.arm(&self.memory, &[request]).unwrap().remove(0)
    }

    fn stop(&mut self, stop: Stop) -> Resume {
        self.cpu.on_stop(&mut self.state, &self.memory, stop)
    }

    fn breakpoint(&mut self) -> Resume {
        let pc = Gva(self.state.regs.rip);
        self.stop(Stop::Breakpoint { pc })
    }

    /// The instruction of `len` bytes in the slot is complete.
    fn guard(&mut self, len: u64) -> Resume {
        self.state.regs.rip += len;
        self.breakpoint()
    }

    fn byte(&self, offset: u64) -> u8 {
        self.memory.bytes(TEXT_GPA.offset(offset), 1)[0]
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }
}

const PUSH_RBP: &[u8] = &[0x55, 0x48, 0x89, 0xe5, 0xc3]; // push %rbp; mov %rsp,%rbp; ret
const LOAD_RIP: &[u8] = &[0x0f, 0x10, 0x05, 0xf9, 0x0f, 0x00, 0x00, 0xc3]; // movups 0xff9(%rip),%xmm0; ret

#[test]
fn an_emulated_hit_writes_nothing_but_what_the_instruction_writes() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = guest.arm(0);
    guest.memory.clear_log();
    guest.state.regs.rbp = 0x1122;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.seen(), [(ProbeId(0), TEXT.0)]);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
    assert_eq!(guest.state.regs.rsp, STACK.0 - 8);
    let writes: Vec<_> =
        guest.memory.writes().into_iter().filter(|one| matches!(one, Operation::Write { .. })).collect();
    assert_eq!(writes, [Operation::Write { gpa: Gpa(STACK.0 - 8), data: 0x1122_u64.to_le_bytes().to_vec() }]);
    assert_eq!(probe.counts(), Counts { hits: 1, delivered: 1, emulated: 1, ..Counts::default() });
    assert_eq!(guest.byte(0), INT3, "the int3 stays");
}

#[test]
fn the_same_hit_arrives_as_an_emulation_failure() {
    let mut guest = Guest::new(PUSH_RBP, None);
    guest.arm(0);
    let mut bytes = [0; 15];
    bytes[0] = INT3;
    assert_eq!(guest.stop(Stop::EmulationFailure { bytes, len: 15 }), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);
}

#[test]
fn the_guests_own_breakpoint_goes_back_to_it() {
    let mut guest = Guest::new(&[0xcc, 0xc3], None);
    guest.arm(1);
    assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Breakpoint));
    assert_eq!(guest.state.regs.rip, TEXT.0);
    assert_eq!(guest.seen(), []);
}

#[test]
fn an_int3_that_is_both_ours_and_the_guests_is_counted_and_given_to_the_guest() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let probe = guest.arm(0);
    guest.cpu.on_text_write(&guest.memory, TEXT_GPA, &[INT3]);
    assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Breakpoint));
    assert_eq!(guest.state.regs.rip, TEXT.0);
    assert_eq!(probe.counts().hits, 1);
}

#[test]
fn an_int3_that_has_gone_is_run_over() {
    let mut guest = Guest::new(PUSH_RBP, None);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0);
}

#[test]
fn the_guests_single_step_and_watchpoints_are_delivered_after_the_instruction() {
    let mut guest = Guest::new(PUSH_RBP, None);
    guest.arm(0);
    guest.state.regs.rflags |= rflags::TF;
    assert_eq!(guest.breakpoint(), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
    assert_eq!(guest.state.regs.rip, TEXT.0 + 1);

    let mut guest = Guest::new(LOAD_RIP, None);
    guest.arm(0);
    guest.state.regs.rflags |= rflags::TF;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.guard(7), Resume::Inject(Exception::Debug { dr6: dr6::BS }));
    assert_ne!(guest.state.regs.rflags & rflags::TF, 0);

    let mut guest = Guest::new(LOAD_RIP, None);
    guest.arm(0);
    guest.breakpoint();
    guest.state.regs.rip += 7;
    let pc = Gva(guest.state.regs.rip);
    let stop = Stop::Debug { pc, dr6: 0xffff_0ff0 | 2 };
    assert_eq!(guest.stop(stop), Resume::Inject(Exception::Debug { dr6: 2 }));
}

#[test]
fn a_debug_exception_of_the_guests_goes_back_to_it() {
    let mut guest = Guest::new(PUSH_RBP, None);
    guest.arm(0);
    let stop = Stop::Debug { pc: TEXT, dr6: 0xffff_0ff1 };
    assert_eq!(guest.stop(stop), Resume::Inject(Exception::Debug { dr6: 1 }));
}

#[test]
fn the_run_finishes_at_the_last_hit_and_counts_no_more() {
    let mut guest = Guest::new(PUSH_RBP, Some(2));
    let probe = guest.arm(0);
    assert_eq!(guest.breakpoint(), Resume::Run);
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.breakpoint(), Resume::Finish);
    assert_eq!(probe.counts().emulated, 2);
    // Another vCPU that arrives now is not counted.
    guest.state.regs.rip = TEXT.0;
    assert_eq!(guest.breakpoint(), Resume::Finish);
    assert_eq!(guest.state.regs.rip, TEXT.0);
    assert_eq!(probe.counts().hits, 2);
    assert_eq!(guest.seen().len(), 2);
}

#[test]
fn a_full_sink_loses_hits_that_are_counted() {
    let mut guest = Guest::with_sink(PUSH_RBP, None, Sink { full: true, ..Sink::default() });
    let probe = guest.arm(0);
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(probe.counts(), Counts { hits: 1, lost: 1, emulated: 1, ..Counts::default() });
}

#[test]
fn arming_nothing_changes_nothing() {
    let guest = Guest::new(PUSH_RBP, None);
    assert!(guest.engine.arm(&guest.memory, &[]).unwrap().is_empty());
    assert!(!guest.cpu.wants_breakpoints());
    let one = guest.arm(0);
    assert!(guest.engine.arm(&guest.memory, &[]).unwrap().is_empty());
    assert!(guest.cpu.wants_breakpoints());
    assert_eq!((one.id, guest.arm(1).id), (ProbeId(0), ProbeId(1)));
}

#[test]
fn two_probes_on_one_address_both_count_and_the_instruction_runs_once() {
    let mut guest = Guest::new(PUSH_RBP, None);
    let (one, two) = (guest.arm(0), guest.arm(0));
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rsp, STACK.0 - 8);
    assert_eq!((one.counts().hits, two.counts().hits), (1, 1));
}

#[test]
fn the_same_text_at_another_address_is_hit_and_run_there() {
    // je .+4 hit through the identity map, as in early boot
    let mut guest = Guest::new(&[0x74, 0x02, 0x90, 0x90, 0xc3], None);
    guest.arm(0);
    let mut tables = MockPageTables::new(&guest.memory, Gpa(0x11_0000), 4);
    tables.map(Gva(TEXT_GPA.0), TEXT_GPA, 0x1000, entry::PRESENT);
    guest.state.sys.cr3 = 0x11_0000;
    guest.state.regs.rip = TEXT_GPA.0;
    guest.state.regs.rflags |= rflags::ZF;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT_GPA.0 + 4);
}

#[test]
fn a_step_that_cannot_be_prepared_withdraws_the_probe_and_the_guest_goes_on() {
    let mut guest = Guest::new(LOAD_RIP, None);
    guest.arm(0);
    guest.state.sys.long_code = false;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.state.regs.rip, TEXT.0);
    assert_eq!(guest.byte(0), LOAD_RIP[0]);
    assert!(!guest.cpu.wants_breakpoints(), "no probe is left");
    let notices = guest.engine.take_notices();
    assert!(matches!(&notices[..], [Notice::Withdrawn { gva: TEXT, .. }]), "{notices:?}");
}

#[test]
fn a_stop_elsewhere_during_a_step_ends_the_run_with_what_was_seen() {
    let mut guest = Guest::new(LOAD_RIP, None);
    guest.arm(0);
    assert_eq!(guest.breakpoint(), Resume::Run);
    guest.state.regs.rip = TEXT.0 + 7;
    guest.memory.load(TEXT_GPA.offset(7), &[INT3]);
    let Resume::Fail { reason } = guest.breakpoint() else { panic!("not a failure") };
    assert!(reason.contains("0xffffffff81000000") && reason.contains("0xffffffff81000007"), "{reason}");
}

#[test]
fn an_instruction_that_the_hosts_emulator_refuses_ends_the_run() {
    let mut guest = Guest::new(&[0x0f, 0x01, 0xca], None);
    let mut bytes = [0; 15];
    bytes[..3].copy_from_slice(&[0x0f, 0x01, 0xca]);
    assert!(matches!(guest.stop(Stop::EmulationFailure { bytes, len: 3 }), Resume::Fail { .. }));
}

#[test]
fn disarming_leaves_memory_as_if_never_probed() {
    let mut guest = Guest::new(LOAD_RIP, None);
    let text = guest.memory.bytes(TEXT_GPA, 0x1000);
    let tables = guest.memory.bytes(ROOT, 0x4000);
    guest.arm(0);
    assert!(guest.cpu.wants_breakpoints());
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.guard(7), Resume::Run);
    guest.engine.disarm_all(&guest.memory);
    assert!(!guest.cpu.wants_breakpoints());
    assert_eq!(guest.memory.bytes(TEXT_GPA, 0x1000), text);
    assert_eq!(guest.memory.bytes(ROOT, 0x4000), tables);
}

#[test]
fn a_displaced_store_into_patched_text_goes_under_the_int3() {
    // mov %al,(%rdi) storing over the second probe's instruction
    let mut guest = Guest::new(&[0x88, 0x07, 0x55, 0xc3], None);
    guest.arm(0);
    guest.arm(2);
    let mut tables = MockPageTables::new(&guest.memory, Gpa(0x11_0000), 4);
    tables.map(TEXT, TEXT_GPA, 0x1000, RW);
    guest.state.sys.cr3 = 0x11_0000;
    guest.state.regs.rdi = TEXT.0 + 2;
    guest.state.regs.rax = 0x50;
    assert_eq!(guest.breakpoint(), Resume::Run);
    assert_eq!(guest.byte(2), INT3);
    guest.engine.disarm_all(&guest.memory);
    assert_eq!(guest.byte(2), 0x50);
}
