//! Hits on their way from the vCPU threads to the output: a bounded ring a vCPU, written without a lock or an allocation.

use std::time::Instant;

use probe_core::engine::{HitSink, Report};
use probe_core::{Registers, VcpuId};
use rtrb::{Consumer, Producer, RingBuffer};

/// Events a ring holds. A reader that falls further behind loses events, and they are counted.
const RING_EVENTS: usize = 16 * 1024;

/// One reported hit.
#[derive(Clone, Copy, Debug)]
pub struct Event {
    /// Nanoseconds since the guest started.
    pub ts_ns: u64,
    pub vcpu: VcpuId,
    /// Index of the probe, in the order of the command line.
    pub probe: u32,
    /// Registers before the probed instruction.
    pub regs: Registers,
}

/// The vCPU's end of a ring.
#[derive(Debug)]
pub struct Ring {
    events: Producer<Event>,
    start: Instant,
}

/// A ring for one vCPU, and the reader's end of it.
pub fn ring(start: Instant) -> (Ring, Consumer<Event>) {
    let (events, reader) = RingBuffer::new(RING_EVENTS);
    (Ring { events, start }, reader)
}

impl HitSink for Ring {
    fn deliver(&mut self, report: &Report<'_>) -> bool {
        let ts_ns = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let event = Event { ts_ns, vcpu: report.vcpu, probe: report.probe.0, regs: report.state.regs };
        self.events.push(event).is_ok()
    }
}

/// Takes what the rings hold, in the order of time.
pub fn drain(readers: &mut [Consumer<Event>], into: &mut Vec<Event>) {
    into.clear();
    for reader in readers {
        let waiting = reader.slots();
        into.extend((0..waiting).map_while(|_| reader.pop().ok()));
    }
    into.sort_by_key(|event| event.ts_ns);
}
