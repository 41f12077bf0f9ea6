//! Notices a guest that can never wake again. With the interrupt controller in the kernel, HLT does not leave KVM_RUN, also
//! not with interrupts off, so the host has to look. Pure: time and answers come from the caller.

use std::time::Duration;

use probe_core::VcpuId;

/// Ticks without any CPU time used by any vCPU before the vCPUs are asked.
const QUIET_TICKS: u32 = 2;

/// A watchdog over the vCPUs of one machine.
#[derive(Debug)]
pub(crate) struct Watchdog {
    times: Vec<Option<Duration>>,
    quiet_ticks: u32,
    inspection: Option<Inspection>,
    inspections: u64,
}

/// A question to all vCPUs.
#[derive(Debug)]
struct Inspection {
    number: u64,
    answers: Vec<Option<bool>>,
}

impl Watchdog {
    pub fn new(vcpus: usize) -> Self {
        Self { times: vec![None; vcpus], quiet_ticks: 0, inspection: None, inspections: 0 }
    }

    /// Takes the CPU time that each vCPU's thread has used so far. Returns a question's number when the vCPUs are to be
    /// asked whether they sleep for ever.
    pub fn tick(&mut self, times: Vec<Option<Duration>>) -> Option<u64> {
        let quiet = self.times == times && times.iter().all(Option::is_some);
        self.times = times;
        self.quiet_ticks = if quiet { self.quiet_ticks + 1 } else { 0 };
        if self.quiet_ticks < QUIET_TICKS || self.inspection.is_some() {
            return None;
        }
        self.quiet_ticks = 0;
        self.inspections += 1;
        let number = self.inspections;
        self.inspection = Some(Inspection { number, answers: vec![None; self.times.len()] });
        Some(number)
    }

    /// Starts to wait for quiet anew: the vCPUs have been parked.
    pub fn forget(&mut self) {
        self.quiet_ticks = 0;
        self.times.fill(None);
    }

    /// The vCPUs that have not answered yet, to be kicked.
    pub fn unanswered(&self) -> impl Iterator<Item = usize> {
        let answers = self.inspection.as_ref().map_or(&[][..], |inspection| &inspection.answers);
        answers.iter().enumerate().filter(|(_, answer)| answer.is_none()).map(|(index, _)| index)
    }

    /// Takes an answer. Returns whether the guest is dead: every vCPU sleeps for ever.
    pub fn answer(&mut self, vcpu: VcpuId, number: u64, sleeps_for_ever: bool) -> bool {
        let Some(inspection) = self.inspection.as_mut().filter(|inspection| inspection.number == number)
        else {
            return false;
        };
        if let Some(answer) = inspection.answers.get_mut(vcpu.0 as usize) {
            *answer = Some(sleeps_for_ever);
        }
        if inspection.answers.iter().any(Option::is_none) {
            return false;
        }
        let dead = inspection.answers.iter().all(|answer| *answer == Some(true));
        self.inspection = None;
        dead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(ms: &[u64]) -> Vec<Option<Duration>> {
        ms.iter().map(|ms| Some(Duration::from_millis(*ms))).collect()
    }

    /// A watchdog that has just asked question 1.
    fn asking() -> Watchdog {
        let mut watchdog = Watchdog::new(2);
        assert_eq!(watchdog.tick(times(&[5, 7])), None);
        assert_eq!(watchdog.tick(times(&[5, 7])), None);
        assert_eq!(watchdog.tick(times(&[5, 7])), Some(1));
        watchdog
    }

    #[test]
    fn a_working_vcpu_is_never_asked() {
        let mut watchdog = Watchdog::new(2);
        for i in 0..100 {
            assert_eq!(watchdog.tick(times(&[i, 7])), None);
        }
        assert_eq!(watchdog.unanswered().count(), 0);
    }

    #[test]
    fn a_thread_that_has_ended_is_not_quiet() {
        let mut watchdog = Watchdog::new(2);
        for _ in 0..10 {
            assert_eq!(watchdog.tick(vec![Some(Duration::ZERO), None]), None);
        }
    }

    #[test]
    fn quiet_during_a_pause_does_not_count() {
        let mut watchdog = Watchdog::new(2);
        for _ in 0..10 {
            assert_eq!(watchdog.tick(times(&[5, 7])), None);
            assert_eq!(watchdog.tick(times(&[5, 7])), None);
            watchdog.forget();
        }
    }

    #[test]
    fn all_asleep_is_dead() {
        let mut watchdog = asking();
        assert_eq!(watchdog.unanswered().collect::<Vec<_>>(), [0, 1]);
        assert!(!watchdog.answer(VcpuId(1), 1, true));
        assert_eq!(watchdog.unanswered().collect::<Vec<_>>(), [0]);
        assert!(watchdog.answer(VcpuId(0), 1, true));
    }

    #[test]
    fn one_that_can_wake_keeps_the_guest_alive_and_it_is_asked_again() {
        let mut watchdog = asking();
        assert!(!watchdog.answer(VcpuId(0), 1, true));
        assert_eq!(watchdog.tick(times(&[5, 7])), None, "a question is open");
        assert!(!watchdog.answer(VcpuId(1), 1, false));
        assert_eq!(watchdog.unanswered().count(), 0);
        let numbers: Vec<_> = (0..4).filter_map(|_| watchdog.tick(times(&[5, 7]))).collect();
        assert_eq!(numbers, [2]);
    }

    #[test]
    fn stray_answers_count_for_nothing() {
        let mut watchdog = asking();
        assert!(!watchdog.answer(VcpuId(0), 7, true));
        assert!(!watchdog.answer(VcpuId(9), 1, true));
        assert_eq!(watchdog.unanswered().count(), 2);
    }
}
