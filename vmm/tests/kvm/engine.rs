//! The engine on a real machine: probes that come and go while vCPUs run through them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::{CODE, DATA, Guest, assemble, guest, interrupt_table, power_off, use_interrupts, word};
use iced_x86::code_asm::{qword_ptr, rax, rbp, rdi, rsi, rsp};
use probe_core::engine::{Engine, EngineConfig, HitSink, Report, VcpuEngine};
use probe_core::handler::{Flow, Handler, Hit, Verdict};
use probe_core::machine::PlainText;
use probe_core::patch::Place;
use probe_core::probe::{Probe, ProbeRequest};
use probe_core::stop::StopHandler;
use probe_core::{Gpa, Gva, PhysicalMemory, VcpuId};
use vmm::{Control, Machine, RunEnd, layout};

/// Where the guest counts what it does, one word a counter.
const CALLS: u64 = DATA;
const STRAY_BREAKPOINTS: u64 = DATA + 8;
const STOP: u64 = DATA + 16;
/// vCPUs other than the first that have stopped calling.
const FINISHED: u64 = DATA + 24;
/// Stacks of the vCPUs.
const STACK_BYTES: u64 = 0x1000;

/// The function that all vCPUs call for ever: push, move, count, pop, return.
struct Function {
    code: Vec<u8>,
    start: u64,
    /// Offsets of its instructions.
    instructions: Vec<u64>,
}

/// vCPUs that call the function until [`STOP`] is set; the first one then switches the machine off, when all others have
/// come out of the function.
fn program() -> Function {
    let mut start = 0;
    let code = assemble(CODE, |a| {
        let [mut function, mut again, mut done, mut wait, mut others, mut idle] =
            [(); 6].map(|()| a.create_label());
        use_interrupts(a)?;
        a.mov(rax, rdi)?;
        a.shl(rax, STACK_BYTES.trailing_zeros())?;
        a.sub(rsp, rax)?;
        a.set_label(&mut again)?;
        a.call(function)?;
        a.cmp(qword_ptr(STOP), 0)?;
        a.je(again)?;
        a.set_label(&mut done)?;
        a.cmp(rdi, 0)?;
        a.jne(others)?;
        a.dec(rsi)?;
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(qword_ptr(FINISHED), rsi)?;
        a.jne(wait)?;
        power_off(a)?;
        a.set_label(&mut others)?;
        a.lock().inc(qword_ptr(FINISHED))?;
        a.set_label(&mut idle)?;
        a.cli()?;
        a.hlt()?;
        a.jmp(idle)?;
        a.set_label(&mut function)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.lock().inc(qword_ptr(CALLS))?;
        a.pop(rbp)?;
        a.ret()
    });
    // The function is what stands at the end; its instructions are found again by decoding from there.
    let tail = [0x55, 0x48, 0x89, 0xe5];
    if let Some(at) = code.windows(tail.len()).rposition(|window| window == tail) {
        start = CODE + at as u64;
    }
    let body = &code[usize::try_from(start - CODE).unwrap()..];
    let decoder = iced_x86::Decoder::with_ip(64, body, 0, iced_x86::DecoderOptions::NONE);
    let instructions = decoder.into_iter().map(|instruction| instruction.ip()).collect();
    Function { code, start, instructions }
}

/// Takes every hit, and counts.
#[derive(Clone, Default)]
struct Count(Arc<AtomicU64>);

impl HitSink for Count {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        self.0.fetch_add(1, Ordering::Relaxed);
        true
    }
}

/// A guest and its engine, ready to run, or running.
struct Probed {
    engine: Arc<Engine>,
    control: Control,
    memory: vmm::GuestRam,
    delivered: Count,
    function: Function,
    text: Vec<u8>,
    start: Option<Box<dyn FnOnce() -> RunEnd + Send>>,
    run: Option<thread::JoinHandle<RunEnd>>,
}

impl Probed {
    /// Runs the guest on so many vCPUs; `None` where this host cannot.
    fn running(vcpus: u32) -> Option<Self> {
        let mut guest = Self::new(vcpus)?;
        guest.run();
        Some(guest)
    }

    fn new(vcpus: u32) -> Option<Self> {
        let function = program();
        let Guest { machine, memory, .. } = guest(&function.code, vcpus, &[])?;
        // A breakpoint that the guest sees is one too many.
        let stray = assemble(0, |a| {
            a.lock().inc(qword_ptr(STRAY_BREAKPOINTS))?;
            a.iretq()
        });
        interrupt_table(&memory, &[(3, stray)]);
        let control = machine.control();
        let engine = Arc::new(Engine::new(EngineConfig {
            vendor: probe_core::Vendor::Unknown,
            slots: layout::SLOTS,
            vcpus: vcpus as usize,
            max_hits: None,
            stacks_in_whole_pages: false,
            control: Arc::new(control.clone()),
            text: Arc::new(PlainText),
        }));
        let delivered = Count::default();
        let handlers = (0..vcpus)
            .map(|vcpu| {
                let engine = VcpuEngine::new(Arc::clone(&engine), VcpuId(vcpu), delivered.clone());
                Box::new(engine) as Box<dyn StopHandler>
            })
            .collect();
        let text = bytes(&memory, function.code.len());
        let start: Box<dyn FnOnce() -> RunEnd + Send> =
            Box::new(move || Machine::run(machine, handlers).unwrap().end);
        Some(Self { engine, control, memory, delivered, function, text, start: Some(start), run: None })
    }

    fn run(&mut self) {
        self.run = self.start.take().map(thread::spawn);
        self.wait_for_calls(10);
    }

    fn wait_for_calls(&self, more: u64) {
        let before = word(&self.memory, CALLS);
        while word(&self.memory, CALLS) < before + more {
            thread::sleep(Duration::from_micros(100));
        }
    }

    fn place(&self, instruction: usize) -> Place {
        let at = self.function.start + self.function.instructions[instruction];
        Place { gva: Gva(at), gpa: Gpa(at), function: Some(Gva(self.function.start)) }
    }

    fn arm(&self, request: ProbeRequest) -> Arc<Probe> {
        self.engine.arm(&self.memory, &[request]).unwrap().remove(0)
    }

    /// Lets the guest switch itself off.
    fn stop(&mut self) {
        self.memory.write(Gpa(STOP), &1_u64.to_le_bytes()).unwrap();
        if let Some(run) = self.run.take() {
            assert_eq!(run.join().unwrap(), RunEnd::PowerOff);
        }
    }

    /// Ends the guest in order, with nothing left behind.
    fn end(mut self) {
        self.stop();
        self.engine.disarm_all(&self.memory);
        assert_eq!(bytes(&self.memory, self.text.len()), self.text, "the guest's text is its own again");
        assert_eq!(word(&self.memory, STRAY_BREAKPOINTS), 0, "no int3 of ours reached the guest");
        assert_eq!(self.engine.take_notices(), []);
    }
}

fn bytes(memory: &vmm::GuestRam, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(Gpa(CODE), &mut bytes).unwrap();
    bytes
}

/// Cycles of a storm: few in a test run, many in a campaign.
fn cycles(few: u32) -> u32 {
    std::env::var("VMPROBE_STORM_CYCLES").ok().and_then(|cycles| cycles.parse().ok()).unwrap_or(few)
}

#[test]
fn probes_armed_and_removed_in_a_storm_lose_nothing_and_leave_nothing() {
    let Some(guest) = Probed::running(3) else { return };
    let mut hits = 0;
    for cycle in 0..cycles(300) {
        let probe = guest.arm(ProbeRequest::new(guest.place(cycle as usize % 5)));
        if cycle % 16 == 0 {
            guest.wait_for_calls(3);
        }
        guest.engine.remove(&guest.memory, &probe);
        // Nobody takes hits for it any more, so its account is final.
        let counts = probe.counts();
        assert_eq!(counts.hits, counts.delivered);
        assert_eq!(counts.hits, counts.emulated);
        hits += counts.hits;
    }
    assert!(hits > 0);
    assert_eq!(guest.delivered.0.load(Ordering::Relaxed), hits);
    guest.end();
}

#[test]
fn probes_switched_on_and_off_in_a_storm_while_all_vcpus_hit_them() {
    let Some(guest) = Probed::running(3) else { return };
    // One that stays keeps the page watched and breakpoints switched on.
    let stays = guest.arm(ProbeRequest::new(guest.place(1)));
    let probe = guest.arm(ProbeRequest::new(guest.place(0)));
    for cycle in 0..cycles(10_000) {
        guest.engine.disable(&guest.memory, &probe);
        guest.engine.enable(&guest.memory, &probe).unwrap();
        if cycle % 1000 == 0 {
            guest.wait_for_calls(3);
        }
    }
    guest.engine.remove(&guest.memory, &probe);
    guest.engine.remove(&guest.memory, &stays);
    let (counts, stayed) = (probe.counts(), stays.counts());
    assert!(counts.hits > 0 && stayed.hits > 0, "{counts:?} {stayed:?}");
    assert_eq!((counts.emulated, stayed.emulated), (counts.hits, stayed.hits));
    assert_eq!(guest.delivered.0.load(Ordering::Relaxed), counts.hits + stayed.hits);
    guest.end();
}

#[test]
fn hits_of_all_vcpus_are_as_many_as_the_guest_counts() {
    let Some(mut guest) = Probed::new(4) else { return };
    // On the instruction that counts, before the guest's first one runs; and on the function's return.
    let probe = guest.arm(ProbeRequest::new(guest.place(2)));
    let returns = guest.arm(ProbeRequest::for_returns(guest.place(0)));
    guest.run();
    guest.wait_for_calls(2000);
    guest.stop();
    let calls = word(&guest.memory, CALLS);
    assert_eq!((probe.counts().hits, probe.counts().emulated), (calls, calls));
    assert_eq!((returns.counts().entered, returns.counts().hits), (calls, calls));
    let on_each: Vec<u64> = (0..4).map(|vcpu| probe.counts_on(VcpuId(vcpu)).hits).collect();
    assert!(on_each.iter().all(|hits| *hits > 0), "{on_each:?}");
    assert_eq!(on_each.iter().sum::<u64>(), calls);
    guest.end();
}

#[test]
fn return_probes_in_a_storm_see_each_call_return_once() {
    let Some(guest) = Probed::running(3) else { return };
    for _ in 0..cycles(100) {
        let probe = guest.arm(ProbeRequest::for_returns(guest.place(0)));
        guest.wait_for_calls(5);
        guest.engine.remove(&guest.memory, &probe);
        let counts = probe.counts();
        assert_eq!(counts.hits, counts.delivered);
        // At most one call a vCPU was under way, or being entered, when the probe went.
        assert!(counts.entered >= counts.hits && counts.entered - counts.hits <= 3, "{counts:?}");
        assert_eq!((probe.abandoned(), probe.awaited()), (0, 0));
    }
    guest.end();
}

/// Makes the function return without its work, on request.
struct FailOnRequest(Arc<AtomicBool>);

impl Handler for FailOnRequest {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        let flow = if self.0.load(Ordering::Relaxed) { Flow::Return(7) } else { Flow::Run };
        Verdict::FILTER.with_flow(flow)
    }
}

#[test]
fn a_function_that_a_handler_makes_return_does_no_work() {
    let Some(guest) = Probed::running(2) else { return };
    let fail = Arc::new(AtomicBool::new(false));
    let probe =
        guest.arm(ProbeRequest::new(guest.place(0)).with_handler(Arc::new(FailOnRequest(Arc::clone(&fail)))));
    guest.wait_for_calls(10);
    fail.store(true, Ordering::Relaxed);
    // Each vCPU has left the call in which it was.
    let diverted = |vcpu| probe.counts_on(VcpuId(vcpu)).diverted;
    while diverted(0) < 2 || diverted(1) < 2 {
        thread::sleep(Duration::from_micros(100));
    }
    let (calls, hits) = (word(&guest.memory, CALLS), probe.counts().hits);
    while probe.counts().hits < hits + 100 {
        thread::sleep(Duration::from_micros(100));
    }
    assert_eq!(word(&guest.memory, CALLS), calls, "the function's work is left out");
    fail.store(false, Ordering::Relaxed);
    guest.wait_for_calls(10);
    guest.engine.remove(&guest.memory, &probe);
    let counts = probe.counts();
    assert_eq!(counts.hits, counts.filtered);
    assert_eq!(counts.hits, counts.diverted + counts.emulated);
    guest.end();
}

/// Pauses the machine at each third hit, as long as that is wanted.
struct PauseEachThird {
    hits: AtomicU64,
    wanted: Arc<AtomicBool>,
}

impl Handler for PauseEachThird {
    fn pre(&self, _: &mut Hit<'_>) -> Verdict {
        let third = self.hits.fetch_add(1, Ordering::Relaxed) % 3 == 2;
        if third && self.wanted.load(Ordering::Relaxed) {
            Verdict::FILTER.and_pause()
        } else {
            Verdict::FILTER
        }
    }
}

#[test]
fn a_handler_pauses_all_vcpus_until_the_pause_is_taken_and_dropped() {
    let Some(mut guest) = Probed::new(3) else { return };
    let wanted = Arc::new(AtomicBool::new(true));
    let handler = Arc::new(PauseEachThird { hits: AtomicU64::new(0), wanted: Arc::clone(&wanted) });
    let probe = guest.arm(ProbeRequest::new(guest.place(2)).with_handler(handler));
    guest.run = guest.start.take().map(thread::spawn);
    for _ in 0..100 {
        let (vcpu, paused) = guest.control.take_pause(Duration::from_secs(60)).expect("a handler pauses");
        assert!(vcpu < VcpuId(3));
        let (calls, hits) = (word(&guest.memory, CALLS), probe.counts().hits);
        thread::sleep(Duration::from_micros(300));
        assert_eq!((word(&guest.memory, CALLS), probe.counts().hits), (calls, hits), "nothing moves");
        drop(paused);
    }
    wanted.store(false, Ordering::Relaxed);
    // Pauses that were asked for meanwhile.
    while guest.control.take_pause(Duration::from_millis(50)).is_some() {}
    guest.wait_for_calls(10);
    guest.stop();
    let counts = probe.counts();
    assert_eq!((counts.hits, counts.emulated), (counts.filtered, counts.filtered));
    guest.end();
}
