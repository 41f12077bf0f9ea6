//! `vmprobe doctor`: what this host can do, measured.

use serde_json::json;
use vmm::doctor::{BreakpointExit, Diagnosis, Status, Verdict, diagnose};

use crate::cli::{DoctorArgs, Output};
use crate::exit::{Code, Failure};
use crate::output::json_lines;

pub fn doctor(args: &DoctorArgs) -> Result<Code, Failure> {
    let diagnosis = diagnose();
    let verdict = diagnosis.verdict();
    match args.output {
        Output::Json => json_lines([json(&diagnosis)])?,
        Output::Text => {
            for finding in diagnosis.findings() {
                println!("{} {:24} {}", mark(finding.status), finding.feature, finding.seen);
                if finding.status != Status::Present {
                    println!("    {:24} without it: {}", "", finding.without);
                }
            }
            println!("\n{}", advice(verdict));
        }
    }
    Ok(if verdict == Verdict::Unusable { Code::Host } else { Code::Done })
}

fn mark(status: Status) -> &'static str {
    match status {
        Status::Present => "yes ",
        Status::Limited => "part",
        Status::Missing => "no  ",
        Status::Unknown => "?   ",
    }
}

fn advice(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Full => "This host runs any guest: --accel auto takes its /dev/kvm.",
        Verdict::SmallGuests => {
            "This host runs bare-metal guests on its /dev/kvm; Linux guests go to --accel nested, which --accel auto takes."
        }
        Verdict::Unusable => "This host runs no guest on KVM: --accel auto takes --accel nested.",
    }
}

fn json(diagnosis: &Diagnosis) -> serde_json::Value {
    json!({
        "verdict": match diagnosis.verdict() {
            Verdict::Full => "full",
            Verdict::SmallGuests => "small-guests",
            Verdict::Unusable => "unusable",
        },
        "unusable": diagnosis.unusable,
        "virtualization_flag": diagnosis.virtualization_flag,
        "emulates_kernel_code": diagnosis.emulates_kernel_code(),
        "api_version": diagnosis.api_version,
        "breakpoint_exit": diagnosis.breakpoint.map(|exit| match exit {
            BreakpointExit::Debug => "debug",
            BreakpointExit::EmulationFailure => "emulation-failure",
            BreakpointExit::None => "none",
        }),
        "hardware_breakpoint": diagnosis.hardware_breakpoint,
        "data_watchpoint": diagnosis.data_watchpoint,
        "sync_regs": diagnosis.sync_regs,
        "read_only_slots": diagnosis.read_only_slots,
        "blocks_interrupts": diagnosis.blocks_interrupts,
        "max_vcpus": diagnosis.max_vcpus,
        "memory_slots": diagnosis.memory_slots,
        "exit_ns": diagnosis.exit_ns,
        "instruction_ns": diagnosis.instruction_ns,
    })
}
