//! Hits on their way from the vCPU threads to the output: a bounded ring a vCPU, written without a lock or an allocation.
//!
//! A ring holds 64-bit words; a hit is [`HEADER`] words, the registers, and for its fetched values a bit each that says
//! whether the value could be read, then a word each.

use std::ops::Deref;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, Cache};
use guest::spec::MAX_FETCHES;
use probe_core::engine::{HitSink, Report};
use probe_core::fetch::Fetch;
use probe_core::{Registers, VcpuId, VcpuState};
use rtrb::{Consumer, Producer, RingBuffer};

/// Hits without fetched values that a ring holds. A reader that falls further behind loses some, and they are counted.
const RING_HITS: usize = 16 * 1024;

/// How often the rings are read while hits come. Long against a hit, short against a reader's patience.
const READ_INTERVAL: Duration = Duration::from_millis(5);

/// After so many looks at empty rings they are read when the next hit comes.
const EMPTY_LOOKS: u32 = 20;

/// How often they are read then if none comes. A hit at the moment at which the reader falls asleep waits so long at most.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);

/// Words before the registers: length of the record, time, probe and vCPU, time of the entry.
const HEADER: usize = 4;

/// The time of the entry of a hit that is no return.
const NO_ENTRY: u64 = u64::MAX;

/// One reported hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds since the guest started.
    pub ts_ns: u64,
    /// For a return: when the function was entered.
    pub entered_ns: Option<u64>,
    pub vcpu: VcpuId,
    /// Number of the probe: the cookie that it was armed with.
    pub probe: u32,
    /// Registers before the probed instruction.
    pub regs: Registers,
    /// What the probe fetches; `None` where it could not be read.
    pub values: Vec<Option<u64>>,
}

/// What becomes of a probe's hits.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// They are counted, and go no further.
    pub count_only: bool,
    /// The values to fetch.
    pub fetches: Vec<Fetch>,
}

/// The programs of all probes, by the probe's number. They grow while the guest runs.
#[derive(Clone, Debug, Default)]
pub struct Programs(Arc<Common>);

/// What the rings of a machine and their reader share.
#[derive(Debug, Default)]
struct Common {
    programs: ArcSwap<Vec<Program>>,
    /// The reader waits for a hit, and is to be woken. Beside the programs, which each hit looks at.
    asleep: AtomicBool,
    reader: OnceLock<Thread>,
}

impl Deref for Programs {
    type Target = ArcSwap<Vec<Program>>;

    fn deref(&self) -> &Self::Target {
        &self.0.programs
    }
}

impl Programs {
    pub fn new(programs: Vec<Program>) -> Self {
        let programs = ArcSwap::from_pointee(programs);
        Self(Arc::new(Common { programs, ..Common::default() }))
    }

    /// Ends the sleep of the reader, if it sleeps.
    #[cold]
    pub fn wake_reader(&self) {
        if self.0.asleep.swap(false, Ordering::Relaxed)
            && let Some(reader) = self.0.reader.get()
        {
            reader.unpark();
        }
    }
}

/// The vCPU's end of a ring.
#[derive(Debug)]
pub struct Ring {
    words: Producer<u64>,
    start: Instant,
    /// A probe beyond the end fetches nothing.
    programs: Cache<Programs, Arc<Vec<Program>>>,
    shared: Programs,
}

/// The reader's end of a ring.
#[derive(Debug)]
struct Reader {
    words: Consumer<u64>,
    record: Vec<u64>,
}

/// The reader's ends of a machine's rings, for one thread.
#[derive(Debug)]
pub struct Readers {
    rings: Vec<Reader>,
    shared: Programs,
    batch: Vec<Event>,
    /// How often they were empty since there was a hit.
    empty_looks: u32,
}

/// A ring for each vCPU, and the reader's ends of them.
pub fn rings(vcpus: u32, start: Instant, programs: &Programs) -> (Vec<Ring>, Readers) {
    let ring = |_| {
        let (words, reader) = RingBuffer::new(RING_HITS * FIXED);
        let ring = Ring { words, start, programs: Cache::new(programs.clone()), shared: programs.clone() };
        (ring, Reader { words: reader, record: Vec::new() })
    };
    let (rings, readers) = (0..vcpus).map(ring).unzip();
    (rings, Readers { rings: readers, shared: programs.clone(), batch: Vec::new(), empty_looks: 0 })
}

macro_rules! registers {
    ($($name:ident)*) => {
        const REGISTERS: usize = [$(stringify!($name)),*].len();

        fn to_words(regs: &Registers) -> [u64; REGISTERS] {
            [$(regs.$name),*]
        }

        fn from_words([$($name),*]: [u64; REGISTERS]) -> Registers {
            Registers { $($name),* }
        }
    };
}

registers!(rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags);

/// Words of a hit without fetched values.
const FIXED: usize = HEADER + REGISTERS;

/// Words that hold a bit for each of so many values.
const fn mask_words(values: usize) -> usize {
    values.div_ceil(64)
}

impl Ring {
    /// Writes a record, or nothing where it does not fit.
    fn push(&mut self, ts_ns: u64, report: &Report<'_>, fetches: &[Fetch]) -> bool {
        let fetches = &fetches[..fetches.len().min(MAX_FETCHES)];
        let len = FIXED + mask_words(fetches.len()) + fetches.len();
        let mut fixed = [0; FIXED];
        let (header, registers) = fixed.split_at_mut(HEADER);
        header.copy_from_slice(&[
            len as u64,
            ts_ns,
            report.cookie << 32 | u64::from(report.vcpu.0),
            report.call.map_or(NO_ENTRY, |call| call.stamp),
        ]);
        registers.copy_from_slice(&to_words(&report.state.regs));
        if fetches.is_empty() {
            return self.words.push_entire_slice(&fixed).is_ok();
        }
        // An argument of a function that has returned is where it was at the entry.
        let entry =
            VcpuState { regs: report.call.map_or(report.state.regs, |call| call.regs), ..*report.state };
        let mut record = [0; FIXED + mask_words(MAX_FETCHES) + MAX_FETCHES];
        record[..FIXED].copy_from_slice(&fixed);
        let (masks, values) = record[FIXED..].split_at_mut(mask_words(fetches.len()));
        for (index, fetch) in fetches.iter().enumerate() {
            let state = if matches!(fetch, Fetch::Argument(_)) { &entry } else { report.state };
            if let Some(value) = fetch.value(state, report.memory) {
                values[index] = value;
                masks[index / 64] |= 1 << (index % 64);
            }
        }
        self.words.push_entire_slice(&record[..len]).is_ok()
    }
}

impl HitSink for Ring {
    fn deliver(&mut self, report: &Report<'_>) -> bool {
        let programs = Arc::clone(self.programs.load());
        let program = usize::try_from(report.cookie).ok().and_then(|index| programs.get(index));
        if program.is_some_and(|program| program.count_only) {
            return true;
        }
        let fetches = program.map_or(&[][..], |program| &program.fetches);
        let ts_ns = self.stamp();
        let taken = self.push(ts_ns, report, fetches);
        if self.shared.0.asleep.load(Ordering::Relaxed) {
            self.shared.wake_reader();
        }
        taken
    }

    fn stamp(&mut self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Reader {
    /// The next record, if there is one.
    fn pop(&mut self) -> Option<Event> {
        // A record becomes visible whole, so what its first word announces is there.
        let len = usize::try_from(*self.words.peek().ok()?).ok()?;
        let chunk = self.words.read_chunk(len).ok()?;
        self.record.clear();
        self.record.extend(chunk);
        let (header, rest) = self.record.split_first_chunk::<HEADER>()?;
        let (registers, rest) = rest.split_first_chunk::<REGISTERS>()?;
        let [_, ts_ns, who, entered_ns] = *header;
        // n values come behind their masks: n + n/64 words.
        let masks = rest.len().div_ceil(65);
        let (masks, values) = rest.split_at(masks);
        let is_read = |index: usize| masks.get(index / 64).is_some_and(|mask| mask >> (index % 64) & 1 == 1);
        let value = |(index, value): (usize, &u64)| is_read(index).then_some(*value);
        Some(Event {
            ts_ns,
            entered_ns: Some(entered_ns).filter(|entered| *entered != NO_ENTRY),
            vcpu: VcpuId(u32::try_from(who & u64::from(u32::MAX)).ok()?),
            probe: u32::try_from(who >> 32).ok()?,
            regs: from_words(*registers),
            values: values.iter().enumerate().map(value).collect(),
        })
    }
}

impl Readers {
    /// Takes what the rings hold, in the order of time.
    pub fn drain(&mut self) -> &[Event] {
        self.batch.clear();
        for ring in &mut self.rings {
            // Not more than the ring holds, so that a guest that hits faster than it is read does not keep the reader.
            self.batch.extend((0..RING_HITS).map_while(|_| ring.pop()));
        }
        self.batch.sort_by_key(|event| event.ts_ns);
        self.empty_looks = if self.batch.is_empty() { self.empty_looks.saturating_add(1) } else { 0 };
        &self.batch
    }

    /// Parks the thread until it is time to look again: soon while hits come, when the next one comes if there was none for a while.
    /// Whoever unparks it ends that.
    pub fn wait(&self) {
        if self.empty_looks < EMPTY_LOOKS {
            thread::park_timeout(READ_INTERVAL);
            return;
        }
        let Common { asleep, reader, .. } = &*self.shared.0;
        reader.get_or_init(thread::current);
        asleep.store(true, Ordering::SeqCst);
        if self.rings.iter().all(|ring| ring.words.is_empty()) {
            thread::park_timeout(IDLE_INTERVAL);
        }
        asleep.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use probe_core::handler::Call;
    use probe_core::mock::{MockMemory, MockVcpu};
    use probe_core::probe::ProbeId;
    use probe_core::{Gpa, Gva};

    use super::*;

    /// A vCPU without paging, so that the stack at 0x2000 is at that physical address.
    fn state(rdi: u64) -> VcpuState {
        let mut state = MockVcpu::new(Gpa(0)).rsp(Gva(0x2000)).regs(|regs| regs.rdi = rdi).build();
        state.sys.cr0 = 0;
        state
    }

    fn memory() -> MockMemory {
        let memory = MockMemory::with_ram(0x3000);
        memory.load(Gpa(0x2008), &0x77_u64.to_le_bytes());
        memory
    }

    fn report<'a>(state: &'a VcpuState, memory: &'a MockMemory, call: Option<&'a Call>) -> Report<'a> {
        Report { probe: ProbeId(0), cookie: 0, vcpu: VcpuId(3), state, call, memory }
    }

    fn programs(fetches: Vec<Fetch>) -> Programs {
        Programs::new(vec![Program { fetches, count_only: false }])
    }

    fn one_ring(programs: &Programs) -> (Ring, Readers) {
        let (mut rings, readers) = rings(1, Instant::now(), programs);
        (rings.remove(0), readers)
    }

    #[test]
    fn a_reader_that_sleeps_is_woken_by_the_next_hit() {
        let woken_early = (0..20).any(|_| {
            let (mut ring, mut readers) = one_ring(&programs(Vec::new()));
            for _ in 0..EMPTY_LOOKS {
                assert!(readers.drain().is_empty());
            }
            let shared = readers.shared.clone();
            let vcpu = thread::spawn(move || {
                while !shared.0.asleep.load(Ordering::Relaxed) {
                    thread::yield_now();
                }
                assert!(ring.deliver(&report(&state(5), &memory(), None)));
            });
            let mut begun = Instant::now();
            readers.wait();
            while readers.drain().is_empty() {
                begun = Instant::now();
                readers.wait();
            }
            let slept = begun.elapsed();
            vcpu.join().unwrap();
            assert!(!readers.shared.0.asleep.load(Ordering::Relaxed), "awake");
            slept < IDLE_INTERVAL / 2
        });
        assert!(woken_early, "each slept to the end");
    }

    #[test]
    fn a_hit_comes_out_as_it_went_in() {
        let memory = memory();
        let state = state(5);
        let fetches = vec![Fetch::Argument(1), Fetch::StackWord(1), Fetch::StackWord(2000)];
        let (mut ring, mut readers) = one_ring(&programs(fetches));
        assert!(ring.deliver(&report(&state, &memory, None)));
        let event = readers.rings[0].pop().unwrap();
        assert_eq!((event.vcpu, event.probe, event.entered_ns), (VcpuId(3), 0, None));
        assert_eq!(event.regs, state.regs);
        assert_eq!(event.values, [Some(5), Some(0x77), None]);
        assert_eq!(readers.rings[0].pop(), None);
    }

    #[test]
    fn a_return_has_the_arguments_of_the_entry_and_its_time() {
        let memory = memory();
        let (entry, state) = (state(5), state(6));
        let call = Call { regs: entry.regs, stamp: 42, data: [0; 4] };
        let register = Fetch::Register(probe_core::fetch::RegisterName::Di);
        let (mut ring, mut readers) = one_ring(&programs(vec![Fetch::Argument(1), register]));
        assert!(ring.deliver(&report(&state, &memory, Some(&call))));
        let event = readers.rings[0].pop().unwrap();
        assert_eq!((event.entered_ns, event.values), (Some(42), vec![Some(5), Some(6)]));
    }

    #[test]
    fn as_many_values_as_a_probe_may_fetch_keep_their_order() {
        let memory = memory();
        let state = state(5);
        for count in [1_u16, 63, 64, 65, 127, 128] {
            // Every third one cannot be read.
            let fetch =
                |index| if index % 3 == 0 { Fetch::StackWord(2000) } else { Fetch::StackWord(index % 2) };
            let (mut ring, mut readers) = one_ring(&programs((0..count).map(fetch).collect()));
            assert!(ring.deliver(&report(&state, &memory, None)));
            let expected = |index| if index % 3 == 0 { None } else { Some(0x77 * u64::from(index % 2)) };
            assert_eq!(readers.rings[0].pop().unwrap().values, (0..count).map(expected).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_ring_refuses_whole_hits_and_keeps_what_it_has() {
        let memory = memory();
        let state = state(5);
        let (mut ring, mut readers) = one_ring(&programs(vec![Fetch::StackWord(1); 128]));
        let mut taken = 0;
        while ring.deliver(&report(&state, &memory, None)) {
            taken += 1;
        }
        assert!(taken > 1000, "{taken}");
        // Several times around the ring, so that records lie across its end.
        for _ in 0..3 * taken {
            assert_eq!(readers.rings[0].pop().unwrap().values, [Some(0x77); 128]);
            assert!(ring.deliver(&report(&state, &memory, None)));
        }
        let events = readers.drain();
        assert_eq!(events.len(), taken);
        assert!(events.is_sorted_by_key(|event| event.ts_ns));
    }

    #[test]
    fn what_is_only_counted_takes_no_room() {
        let memory = memory();
        let state = state(5);
        let programs = Programs::new(vec![Program { count_only: true, fetches: Vec::new() }]);
        let (mut ring, mut readers) = one_ring(&programs);
        assert!((0..=RING_HITS).all(|_| ring.deliver(&report(&state, &memory, None))));
        assert_eq!(readers.rings[0].pop(), None);
        // A probe of vmprobe's own has no program, and is reported.
        assert!(ring.deliver(&Report { cookie: 1, ..report(&state, &memory, None) }));
        assert_eq!(readers.rings[0].pop().unwrap().probe, 1);
    }
}
