//! What a hit and a probe cost in host code, without KVM: finding the site of a breakpoint, classifying, relocating and
//! emulating its instruction, and all of a hit together.

#![allow(missing_docs)]

use std::cell::Cell;
use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use probe_core::emulate::{Emulated, emulate};
use probe_core::engine::{Engine, EngineConfig, HitSink, Report, VcpuEngine};
use probe_core::machine::{NotRunning, PlainText};
use probe_core::mock::{MockMemory, MockPageTables, MockVcpu};
use probe_core::patch::{PatchTable, Place};
use probe_core::probe::ProbeRequest;
use probe_core::relocate::relocate;
use probe_core::slot::SlotRegion;
use probe_core::stop::{Resume, Stop, StopHandler};
use probe_core::{AddressSpace, Gpa, Gva, MemoryError, PhysicalMemory, VcpuId, VcpuState, Vendor, plan};

/// As many functions as a stock kernel has.
const SITES: u64 = 40_000;
/// Bytes between two of them: 40,000 functions of a stock kernel cover 14 MB.
const STRIDE: u64 = 352;
const TEXT: Gva = Gva(0xffff_ffff_8100_0000);

/// Guest RAM from address 0 on, without the mock's log, which would grow with every access.
struct Ram(Vec<Cell<u8>>);

impl Ram {
    fn new(bytes: Vec<u8>) -> Self {
        Self(bytes.into_iter().map(Cell::new).collect())
    }

    fn cells(&self, gpa: Gpa, len: usize) -> Result<&[Cell<u8>], MemoryError> {
        let start = usize::try_from(gpa.0).map_err(|_| MemoryError::NotRam(gpa))?;
        let end = start.checked_add(len).ok_or(MemoryError::NotRam(gpa))?;
        self.0.get(start..end).ok_or(MemoryError::NotRam(gpa))
    }
}

impl PhysicalMemory for Ram {
    fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let cells = self.cells(gpa, buf.len())?;
        buf.iter_mut().zip(cells).for_each(|(byte, cell)| *byte = cell.get());
        Ok(())
    }

    fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), MemoryError> {
        let cells = self.cells(gpa, data.len())?;
        data.iter().zip(cells).for_each(|(byte, cell)| cell.set(*byte));
        Ok(())
    }

    fn compare_exchange(&self, gpa: Gpa, width: usize, current: u64, new: u64) -> Result<u64, MemoryError> {
        let mut word = [0; 8];
        self.read(gpa, &mut word[..width])?;
        let found = u64::from_le_bytes(word);
        if found == current {
            self.write(gpa, &new.to_le_bytes()[..width])?;
        }
        Ok(found)
    }
}

fn lookup(criterion: &mut Criterion) {
    let bytes = usize::try_from(SITES * STRIDE).expect("fits") + 4096;
    // push %rbp everywhere.
    let memory = Ram::new(vec![0x55; bytes]);
    let place =
        |site: u64| Place { gva: TEXT.offset(site * STRIDE), gpa: Gpa(site * STRIDE), function: None };
    let places: Vec<Place> = (0..SITES).map(place).collect();
    let table = PatchTable::default();
    let sites = table.prepare(&memory, &places).expect("RAM");
    table.enable(&memory, &sites).expect("RAM");
    let mut site = 0;
    criterion.bench_function("lookup/site among 40000", |bencher| {
        bencher.iter(|| {
            // A stride that visits all of them in no order that a cache likes.
            site = (site + 17_389) % SITES;
            table.find(black_box(Gpa(site * STRIDE)))
        });
    });
    let mut group = criterion.benchmark_group("arm");
    group.sample_size(10);
    group.bench_function("40000 sites", |bencher| {
        bencher.iter_batched(
            || Ram::new(vec![0x55; bytes]),
            |memory| {
                let table = PatchTable::default();
                let sites = table.prepare(&memory, &places).expect("RAM");
                table.enable(&memory, &sites).map(|()| sites.len())
            },
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

/// Instructions as a kernel has them, with their text.
const INSTRUCTIONS: &[(&str, &[u8])] = &[
    ("push %rbp", &[0x55]),
    ("call", &[0xe8, 0x11, 0x22, 0x33, 0x00]),
    ("mov load", &[0x48, 0x8b, 0x07]),
    ("mov load, RIP-relative", &[0x48, 0x8b, 0x05, 0x11, 0x22, 0x33, 0x00]),
    ("swapgs", &[0x0f, 0x01, 0xf8]),
];

fn classify(criterion: &mut Criterion) {
    for (name, bytes) in INSTRUCTIONS {
        criterion.bench_function(&format!("classify/{name}"), |bencher| {
            bencher.iter(|| {
                plan::decode(black_box(bytes), TEXT, Vendor::Intel)
                    .map(|instruction| plan::plan(&instruction))
            });
        });
    }
}

fn relocation(criterion: &mut Criterion) {
    let slot = Gva(0xffff_ffff_bf00_0000);
    for (name, bytes) in INSTRUCTIONS {
        criterion.bench_function(&format!("relocate/{name}"), |bencher| {
            bencher.iter(|| relocate(black_box(bytes), TEXT, slot));
        });
    }
}

const SLOTS: SlotRegion = SlotRegion { base: Gpa(0x20_0000), size: 0x8000 };

/// A vCPU whose text, stack and data are one identity-mapped megabyte.
fn vcpu() -> (Ram, VcpuState) {
    let memory = MockMemory::with_ram(SLOTS.base.0 + SLOTS.size);
    let mut tables = MockPageTables::new(&memory, Gpa(0x10_0000), 4);
    tables.map_identity(0x10_0000, 0x63);
    let state = MockVcpu::new(tables.root()).rip(Gva(0x1000)).rsp(Gva(0x8000)).regs(|regs| regs.rdi = 0x9000);
    let all = usize::try_from(SLOTS.base.0 + SLOTS.size).expect("fits");
    (Ram::new(memory.bytes(Gpa(0), all)), state.build())
}

fn emulation(criterion: &mut Criterion) {
    let (memory, state) = vcpu();
    let space = AddressSpace { memory: &memory, pkru: 0 };
    for (name, bytes) in &INSTRUCTIONS[..3] {
        let instruction = plan::decode(bytes, Gva(0x1000), Vendor::Intel).expect("valid");
        assert_eq!(emulate(&instruction, &mut state.clone(), &space), Emulated::Done, "{name}");
        criterion.bench_function(&format!("emulate/{name}"), |bencher| {
            bencher.iter(|| {
                let mut state = black_box(state);
                emulate(&instruction, &mut state, &space);
                state
            });
        });
    }
}

/// Takes every hit.
struct Sink;

impl HitSink for Sink {
    fn deliver(&mut self, _: &Report<'_>) -> bool {
        true
    }
}

/// Whole hits, from the stop to the state that the guest goes on with.
fn hits(criterion: &mut Criterion) {
    let (memory, state) = vcpu();
    // An interrupt table with one gate, that of #PF (Intel SDM vol. 3A, 6.14.1), whose handler is at 0x3000.
    memory.write(Gpa(0x4000 + 14 * 16), &[0, 0x30, 0x10, 0, 0, 0x8e]).expect("RAM");
    memory.write(Gpa(0x3000), &[0x90]).expect("RAM");
    for (name, bytes) in [("push %rbp", &[0x55][..]), ("rdtsc", &[0x0f, 0x31])] {
        memory.write(Gpa(0x1000), bytes).expect("RAM");
        let engine = Arc::new(Engine::new(EngineConfig {
            slots: SLOTS,
            vcpus: 1,
            vendor: Vendor::Unknown,
            max_hits: None,
            stacks_in_whole_pages: false,
            control: Arc::new(NotRunning),
            text: Arc::new(PlainText),
        }));
        let place = Place { gva: Gva(0x1000), gpa: Gpa(0x1000), function: None };
        let probe = engine.arm(&memory, &[ProbeRequest::new(place)]).expect("a place to arm").remove(0);
        let mut cpu = VcpuEngine::new(Arc::clone(&engine), VcpuId(0), Sink);
        let mut hit = || {
            let mut state = black_box(state);
            (state.sys.idt_base, state.sys.idt_limit) = (0x4000, 0xfff);
            let mut stop = |state: &mut VcpuState| {
                let pc = Gva(state.regs.rip);
                cpu.on_stop(state, &memory, Stop::Breakpoint { pc })
            };
            assert_eq!(stop(&mut state), Resume::Run);
            // Out of line, the guest comes to the guard behind the copy.
            if state.regs.rip != 0x1000 + bytes.len() as u64 {
                state.regs.rip += bytes.len() as u64;
                assert_eq!(stop(&mut state), Resume::Run);
            }
            state
        };
        assert_eq!(hit().regs.rip, 0x1000 + bytes.len() as u64, "{name}");
        assert_eq!(probe.counts().emulated + probe.counts().stepped, 1, "{name}");
        criterion.bench_function(&format!("hit/{name}"), |bencher| bencher.iter(&mut hit));
        engine.disarm_all(&memory);
    }
}

criterion_group!(benches, lookup, classify, relocation, emulation, hits);
criterion_main!(benches);
