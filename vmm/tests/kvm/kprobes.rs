//! Properties that the kernel's own tests ask of kprobes (lib/tests/test_kprobes.c, tools/testing/selftests/ftrace) and that
//! need guest code which runs on: each test begins with the name of the one that it restates.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use iced_x86::code_asm::{CodeAssembler, CodeLabel, byte_ptr, dword_ptr, eax, qword_ptr, rax, rbp, rcx, rsp};
use iced_x86::{Decoder, DecoderOptions, IcedError};
use probe_core::engine::{Engine, EngineConfig, HitSink, Report, VcpuEngine};
use probe_core::handler::{Handler, Hit, Verdict};
use probe_core::machine::PlainText;
use probe_core::patch::Place;
use probe_core::probe::{Probe, ProbeRequest};
use probe_core::{Gpa, Gva, PhysicalMemory, VcpuId};
use vmm::{GuestRam, RunEnd, layout};

use crate::common::{CODE, DATA, Guest, STACK, assemble, guest, power_off, word};

/// The host sets it to end the guest.
const STOP: u64 = DATA + 0xff8;

struct TakeAll;

impl HitSink for TakeAll {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        true
    }
}

/// A guest of one vCPU with an engine, which runs on a thread of its own.
struct Running {
    engine: Arc<Engine>,
    memory: GuestRam,
    code: Vec<u8>,
    run: thread::JoinHandle<RunEnd>,
}

impl Running {
    /// Starts the guest with these requests armed; `None` where this host cannot.
    fn new(code: Vec<u8>, requests: &[ProbeRequest]) -> Option<(Self, Vec<Arc<Probe>>)> {
        let Guest { machine, memory, .. } = guest(&code, 1, &[])?;
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: layout::SLOTS,
            vcpus: 1,
            vendor: probe_core::Vendor::Unknown,
            max_hits: None,
            stacks_in_whole_pages: false,
            control: Arc::new(machine.control()),
            text: Arc::new(PlainText),
        }));
        let probes = engine.arm(&memory, requests).unwrap();
        let handler = Box::new(VcpuEngine::new(Arc::clone(&engine), VcpuId(0), TakeAll));
        let run = thread::spawn(move || machine.run(vec![handler]).unwrap().end);
        Some((Self { engine, memory, code, run }, probes))
    }

    fn text(&self) -> Vec<u8> {
        let mut text = vec![0; self.code.len()];
        self.memory.read(Gpa(CODE), &mut text).unwrap();
        text
    }

    fn set(&self, at: u64, value: u64) {
        self.memory.write(Gpa(at), &value.to_le_bytes()).unwrap();
    }

    fn wait(&self, until: impl Fn(&GuestRam) -> bool) {
        while !until(&self.memory) {
            assert!(!self.run.is_finished(), "the guest has ended");
            thread::sleep(Duration::from_micros(100));
        }
    }

    /// Waits for the guest's end, and gives its text back.
    fn end(self) {
        self.set(STOP, 1);
        let (memory, engine) = (self.memory, self.engine);
        assert_eq!(self.run.join().unwrap(), RunEnd::PowerOff);
        engine.disarm_all(&memory);
        let mut text = vec![0; self.code.len()];
        memory.read(Gpa(CODE), &mut text).unwrap();
        assert_eq!(text, self.code, "the guest's text is its own again");
        assert_eq!(engine.take_notices(), []);
    }
}

/// A near call in the guest's code: which function, and where it returns to.
#[derive(Clone, Copy, Debug)]
struct Call {
    function: u64,
    back: u64,
}

fn calls(code: &[u8]) -> Vec<Call> {
    let decoder = Decoder::with_ip(64, code, CODE, DecoderOptions::NONE);
    let calls = decoder.into_iter().filter(iced_x86::Instruction::is_call_near);
    calls.map(|call| Call { function: call.near_branch64(), back: call.next_ip() }).collect()
}

fn place(function: u64, offset: u64) -> Place {
    let at = function + offset;
    Place { gva: Gva(at), gpa: Gpa(at), function: Some(Gva(function)) }
}

/// Three functions, each of which calls the next with a frame of its own. The innermost walks the stack, as the guest's own
/// backtrace does, and stores the return addresses that it finds.
fn nested_calls() -> Vec<u8> {
    const FRAMES: u64 = 3;
    assemble(CODE, |a| {
        let [mut outer, mut middle, mut inner] = [(); 3].map(|()| a.create_label());
        a.mov(rsp, STACK)?;
        a.xor(rbp, rbp)?;
        a.call(outer)?;
        power_off(a)?;
        let function =
            |a: &mut CodeAssembler, label: &mut CodeLabel, body: &dyn Fn(&mut CodeAssembler) -> _| {
                a.set_label(label)?;
                a.push(rbp)?;
                a.mov(rbp, rsp)?;
                body(a)?;
                a.pop(rbp)?;
                a.ret()
            };
        let (to_middle, to_inner) = (middle, inner);
        function(a, &mut outer, &|a| a.call(to_middle))?;
        function(a, &mut middle, &|a| a.call(to_inner))?;
        function(a, &mut inner, &|a| -> Result<(), IcedError> {
            a.mov(rax, rbp)?;
            for frame in 0..FRAMES {
                a.mov(rcx, qword_ptr(rax + 8))?;
                a.mov(qword_ptr(DATA + 8 * frame), rcx)?;
                a.mov(rax, qword_ptr(rax))?;
            }
            Ok(())
        })
    })
}

/// Walks the guest's stack at each return, by its frame pointers.
#[derive(Clone, Default)]
struct Backtraces(Arc<Mutex<Vec<Vec<u64>>>>);

impl Handler for Backtraces {
    fn ret(&self, hit: &mut Hit<'_>) -> Verdict {
        let mut trace = vec![hit.state.regs.rip];
        let mut frame = hit.state.regs.rbp;
        while frame != 0 {
            trace.push(hit.read_u64(Gva(frame + 8)).unwrap());
            frame = hit.read_u64(Gva(frame)).unwrap();
        }
        self.0.lock().unwrap().push(trace);
        Verdict::REPORT
    }
}

/// Probes the returns of the functions at these depths; the guest's own backtrace inside and the host's at each return show
/// true callers.
fn check_backtraces(depths: &[usize]) {
    let code = nested_calls();
    let calls = calls(&code);
    assert_eq!(calls.len(), 3);
    let seen = Backtraces::default();
    let request = |depth: &usize| {
        ProbeRequest::for_returns(place(calls[*depth].function, 0)).with_handler(Arc::new(seen.clone()))
    };
    let requests: Vec<_> = depths.iter().map(request).collect();
    let Some((guest, probes)) = Running::new(code, &requests) else { return };
    let memory = guest.memory.clone();
    guest.end();
    // The innermost first: its caller is the last call.
    let callers: Vec<u64> = calls.iter().rev().map(|call| call.back).collect();
    let found: Vec<u64> = (0..3).map(|frame| word(&memory, DATA + 8 * frame)).collect();
    assert_eq!(found, callers, "what the guest itself sees");
    let expected: Vec<_> = depths.iter().rev().map(|depth| callers[2 - depth..].to_vec()).collect();
    assert_eq!(*seen.0.lock().unwrap(), expected);
    assert!(probes.iter().all(|probe| probe.counts().hits == 1 && probe.awaited() == 0));
}

#[test]
fn test_stacktrace_on_kretprobe_shows_the_true_callers() {
    check_backtraces(&[2]);
}

#[test]
fn test_stacktrace_on_nested_kretprobe_shows_the_true_callers() {
    check_backtraces(&[0, 1, 2]);
}

#[test]
fn multiple_kprobes_on_256_functions_are_armed_and_disarmed_together() {
    const FUNCTIONS: usize = 256;
    const ROUNDS: u64 = DATA + 8 * FUNCTIONS as u64;
    let code = assemble(CODE, |a| {
        let mut functions = [(); FUNCTIONS].map(|()| a.create_label());
        let mut again = a.create_label();
        a.mov(rsp, STACK)?;
        a.set_label(&mut again)?;
        for function in functions {
            a.call(function)?;
        }
        a.inc(qword_ptr(ROUNDS))?;
        a.cmp(qword_ptr(STOP), 0)?;
        a.je(again)?;
        power_off(a)?;
        for (counter, function) in (DATA..).step_by(8).zip(&mut functions) {
            a.set_label(function)?;
            a.inc(qword_ptr(counter))?;
            a.ret()?;
        }
        Ok(())
    });
    let requests: Vec<_> =
        calls(&code).iter().map(|call| ProbeRequest::new(place(call.function, 0))).collect();
    assert_eq!(requests.len(), FUNCTIONS);
    let Some((guest, probes)) = Running::new(code, &requests) else { return };
    let rounds = |more: u64| {
        let before = word(&guest.memory, ROUNDS);
        guest.wait(|memory| word(memory, ROUNDS) >= before + more);
    };
    rounds(3);
    probes.iter().for_each(|probe| guest.engine.remove(&guest.memory, probe));
    assert_eq!(guest.text(), guest.code, "while the guest runs on");
    let hits: Vec<u64> = probes.iter().map(|probe| probe.counts().hits).collect();
    assert!(hits.iter().all(|hits| *hits >= 3), "{hits:?}");
    rounds(3);
    assert_eq!(hits, probes.iter().map(|probe| probe.counts().hits).collect::<Vec<_>>());
    // And a second time.
    let probes = guest.engine.arm(&guest.memory, &requests).unwrap();
    rounds(3);
    assert!(probes.iter().all(|probe| probe.counts().hits >= 2));
    guest.end();
}

#[test]
fn kprobe_ftrace_a_function_that_the_guest_traces_on_and_off_is_probed_all_the_while() {
    const CALLS: u64 = DATA;
    const TRACED: u64 = DATA + 8;
    /// What the host wants, and what the guest has.
    const WANTED: u64 = DATA + 16;
    const TRACING: u64 = DATA + 24;
    const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
    let build = |function: u64, tracer: u64| {
        assemble(CODE, move |a| {
            let [mut again, mut patch, mut put] = [(); 3].map(|()| a.create_label());
            let [mut traced, mut trace] = [(); 2].map(|()| a.create_label());
            let tail = |bytes: &[u8]| u32::from_le_bytes(bytes[1..5].try_into().unwrap());
            let distance = tracer.wrapping_sub(function + 5) & 0xffff_ffff;
            a.mov(rsp, STACK)?;
            a.set_label(&mut again)?;
            a.call(traced)?;
            a.mov(rax, qword_ptr(WANTED))?;
            a.cmp(rax, qword_ptr(TRACING))?;
            a.jne(patch)?;
            a.cmp(qword_ptr(STOP), 0)?;
            a.je(again)?;
            power_off(a)?;
            // As text_poke_bp() does it: an int3, the tail, the first byte (arch/x86/kernel/alternative.c).
            a.set_label(&mut patch)?;
            a.mov(byte_ptr(function), 0xccu32)?;
            a.test(eax, eax)?;
            a.mov(rcx, u64::from(NOP5[0]) | u64::from(tail(&NOP5)) << 8)?;
            a.je(put)?;
            a.mov(rcx, 0xe8 | distance << 8)?;
            a.set_label(&mut put)?;
            a.push(rcx)?;
            a.mov(eax, dword_ptr(rsp + 1))?;
            a.mov(dword_ptr(function + 1), eax)?;
            a.mov(iced_x86::code_asm::al, byte_ptr(rsp))?;
            a.mov(byte_ptr(function), iced_x86::code_asm::al)?;
            a.pop(rcx)?;
            a.mov(rax, qword_ptr(WANTED))?;
            a.mov(qword_ptr(TRACING), rax)?;
            a.jmp(again)?;
            a.set_label(&mut traced)?;
            a.db(&NOP5)?;
            a.inc(qword_ptr(CALLS))?;
            a.ret()?;
            a.set_label(&mut trace)?;
            a.inc(qword_ptr(TRACED))?;
            a.ret()
        })
    };
    // The addresses are known when it is assembled once: their size does not depend on their value.
    let draft = build(CODE, CODE);
    let function = calls(&draft)[0].function;
    let tracer = function + 5 + 8 + 1;
    let code = build(function, tracer);
    assert_eq!((code.len(), calls(&code)[0].function), (draft.len(), function));

    // Behind the site, from the first call to the last.
    let Some((guest, probes)) = Running::new(code, &[ProbeRequest::new(place(function, 5))]) else { return };
    let calls_more = |more: u64| {
        let before = word(&guest.memory, CALLS);
        guest.wait(|memory| word(memory, CALLS) >= before + more);
    };
    let trace = |on: bool| {
        guest.set(WANTED, u64::from(on));
        guest.wait(|memory| word(memory, TRACING) == u64::from(on));
    };
    let site = [ProbeRequest::new(place(function, 0))];
    let arm = || guest.engine.arm(&guest.memory, &site).unwrap().remove(0);
    // On the site itself; who comes first and who goes first, in all four ways.
    for (probe_first, probe_last) in [(true, true), (true, false), (false, true), (false, false)] {
        let traced = word(&guest.memory, TRACED);
        if !probe_first {
            trace(true);
        }
        let probe = arm();
        if probe_first {
            trace(true);
        }
        let (hits, both) = (probe.counts().hits, word(&guest.memory, TRACED));
        // The first of them may have been hit and traced already when those were read.
        calls_more(6);
        assert!(probe.counts().hits >= hits + 5 && word(&guest.memory, TRACED) >= both + 5);
        if probe_last {
            trace(false);
            let (hits, traced) = (probe.counts().hits, word(&guest.memory, TRACED));
            calls_more(5);
            assert!(probe.counts().hits >= hits + 4, "the probe alone");
            assert_eq!(word(&guest.memory, TRACED), traced);
            guest.engine.remove(&guest.memory, &probe);
        } else {
            guest.engine.remove(&guest.memory, &probe);
            let traced = word(&guest.memory, TRACED);
            calls_more(5);
            assert!(word(&guest.memory, TRACED) >= traced + 4, "the tracer alone");
            trace(false);
        }
        assert!(word(&guest.memory, TRACED) > traced);
    }
    let memory = guest.memory.clone();
    guest.end();
    assert_eq!(probes[0].counts().hits, word(&memory, CALLS));
}
