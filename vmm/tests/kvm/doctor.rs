//! The diagnosis agrees with what the machine does.

use vmm::Host;
use vmm::doctor::{BreakpointExit, Status, Verdict, diagnose, judge, watches_data};

use crate::common::{CODE, Scripted, assemble, is_int3, run};
use probe_core::stop::{Resume, Stop};

#[test]
fn the_diagnosis_agrees_with_a_machine() {
    let diagnosis = diagnose();
    assert_eq!(judge(), diagnosis.verdict(), "the short way comes to the same");
    assert_eq!(Host::open().is_ok_and(|host| watches_data(&host)), diagnosis.data_watchpoint == Some(true));
    for finding in diagnosis.findings() {
        eprintln!("{:?} {}: {}", finding.status, finding.feature, finding.seen);
    }
    let (sender, receiver) = std::sync::mpsc::channel();
    let handler = Scripted::boxed(move |_, _, stop| {
        assert!(is_int3(&stop));
        sender.send(matches!(stop, Stop::Breakpoint { .. })).unwrap();
        Resume::Finish
    });
    let Some(_) = run(&assemble(CODE, |a| a.int3()), handler) else {
        assert_eq!(diagnosis.verdict(), Verdict::Unusable);
        return;
    };
    let as_debug = receiver.recv().unwrap();
    let expected = if as_debug { BreakpointExit::Debug } else { BreakpointExit::EmulationFailure };
    assert_eq!(diagnosis.breakpoint, Some(expected));
    assert_ne!(diagnosis.verdict(), Verdict::Unusable);
    // The other tests of this crate sync registers and watch pages on the same host.
    for feature in ["registers in the run page", "read-only memory slots"] {
        let finding = diagnosis.findings().into_iter().find(|finding| finding.feature == feature).unwrap();
        assert_eq!(finding.status, Status::Present, "{feature}");
    }
    assert!(diagnosis.exit_ns.is_some_and(|ns| ns > 100.0 && ns < 1e7), "{:?}", diagnosis.exit_ns);
    assert!(diagnosis.instruction_ns.is_some_and(|ns| ns < 1e5), "{:?}", diagnosis.instruction_ns);
}
