//! The campaign: which case runs next, and what became of each.

use std::collections::BTreeMap;
use std::sync::Arc;

use fastrand::Rng;
use iced_x86::Code;

use crate::case::{Case, data_gpa};
use crate::deviations;
use crate::forms::{self, Exclusion};
use crate::layout::{DATA_BYTES, DATA_OFFSET, LOW};
use crate::outcome::{End, Host, Outcome, QUESTIONS, describe, differences};
use crate::prober::Account;
use probe_core::{VcpuState, Vendor, rflags};

/// What to run.
#[derive(Clone, Debug)]
pub struct Request {
    /// Random operands come from it.
    pub seed: u64,
    /// Cases of each form at each CPL.
    pub cases: u32,
    /// Forms whose names fit; all of them if `None`.
    pub only: Option<glob::Pattern>,
    /// Every n-th form, beginning with the first.
    pub every: usize,
}

impl Request {
    /// No case at all.
    #[must_use]
    pub fn nothing() -> Self {
        Self { seed: 0, cases: 0, only: None, every: 1 }
    }
}

/// A run to carry out.
#[derive(Clone, Debug)]
pub struct Run {
    /// The case.
    pub case: Arc<Case>,
    /// With a probe on the instruction.
    pub probed: bool,
    /// The case has not run before: it is to be seen first whether the engine would take a probe there.
    pub fresh: bool,
}

impl Run {
    /// What the data pages hold before the case.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        // A pattern in which every word of a page is another.
        let mut data: Vec<u8> = (0..DATA_BYTES as u64 / 8)
            .flat_map(|word| (word + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        let start = LOW + DATA_OFFSET + 0x1000;
        let pages = (start..start + DATA_BYTES as u64).step_by(4096);
        for (gpa, bytes) in &self.case.data {
            let page = pages
                .clone()
                .zip(data.chunks_mut(4096))
                .find(|(gva, _)| data_gpa(*gva).is_some_and(|page| gpa.0.wrapping_sub(page.0) < 4096));
            if let Some((_, page)) = page {
                let at = usize::try_from(gpa.page_offset()).unwrap_or_default();
                page[at..at + bytes.len()].copy_from_slice(bytes);
            }
        }
        data
    }
}

/// What became of a case.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Bare and probed agree.
    Equal,
    /// They agree on #UD: the CPU has no such instruction, or not here.
    EqualInvalid,
    /// The engine takes no probe there, for this reason.
    Refused(String),
    /// The engine took the probe out at the hit, for this reason; the instruction then ran in its place.
    Withdrawn(String),
    /// KVM's emulator cannot run the instruction.
    NotEmulatedByKvm,
    /// On this host an int3 at CPL 3 does not stop.
    NoUserBreakpoints,
    /// They differ in something that this host does not do as a CPU does: this.
    NotComparable(&'static str),
    /// They differ.
    Mismatch,
}

/// A case whose runs differ.
#[derive(Clone, Debug)]
pub struct Mismatch {
    /// The case.
    pub case: Arc<Case>,
    /// How.
    pub differences: Vec<String>,
    /// What came of the bare run.
    pub bare: String,
    /// And of the probed one.
    pub probed: String,
}

/// What became of a form's cases.
pub type Tally = BTreeMap<Verdict, u64>;

#[derive(Debug)]
struct Current {
    run: Run,
    bare: Option<Outcome>,
}

/// All of a campaign's state.
#[derive(Debug)]
pub struct Campaign {
    request: Request,
    /// What the host is like.
    pub host: Host,
    /// Whose CPU the guest has.
    pub vendor: Vendor,
    /// Questions about the host that have been answered.
    questions: usize,
    forms: Vec<Code>,
    form: usize,
    /// Cases of the current form that were drawn, at both CPLs.
    drawn: u32,
    current: Option<Current>,
    /// A run has begun and is not over.
    running: bool,
    /// Runs begun.
    pub runs: u64,
    /// Tallies of the forms that had a turn, at CPL 0 and CPL 3.
    pub tallies: BTreeMap<Code, [Tally; 2]>,
    /// Forms without any case, with the reason.
    pub excluded: BTreeMap<Code, Exclusion>,
    /// Forms that this vendor's CPUs do not decode.
    pub other_vendor: Vec<Code>,
    /// Cases whose runs differ.
    pub mismatches: Vec<Mismatch>,
}

impl Campaign {
    /// A campaign that has not begun.
    #[must_use]
    pub fn new(request: Request) -> Self {
        let fits =
            |code: &Code| request.only.as_ref().is_none_or(|pattern| pattern.matches(&format!("{code:?}")));
        let all: Vec<(Code, Option<Exclusion>)> = forms::all().filter(|(code, _)| fits(code)).collect();
        let excluded = all.iter().filter_map(|(code, reason)| Some((*code, (*reason)?))).collect();
        let forms = all.iter().filter(|(_, reason)| reason.is_none()).map(|(code, _)| *code);
        let forms = forms.step_by(request.every.max(1)).collect();
        Self {
            request,
            host: Host::default(),
            vendor: Vendor::Unknown,
            questions: 0,
            forms,
            form: 0,
            drawn: 0,
            current: None,
            running: false,
            runs: 0,
            tallies: BTreeMap::new(),
            excluded,
            other_vendor: Vec::new(),
            mismatches: Vec::new(),
        }
    }

    /// The seed of the random operands.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.request.seed
    }

    /// The guest is up. `vendor` is EBX of CPUID leaf 0. Says whether KVM's emulator runs guest code at CPL 0.
    pub fn booted(&mut self, vendor: u32) -> bool {
        self.vendor = Vendor::from_cpuid(vendor);
        self.host.emulates_kernel
    }

    /// Whether every case has had its runs.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.current.is_none() && self.form >= self.forms.len()
    }

    /// The next run.
    pub fn next_run(&mut self) -> Option<Run> {
        if self.current.is_none() {
            let fresh = self.questions == QUESTIONS.len();
            self.current = self
                .draw()
                .map(|case| Current { run: Run { case: Arc::new(case), probed: false, fresh }, bare: None });
        }
        self.runs += 1;
        self.running = self.current.is_some();
        self.current.as_ref().map(|current| current.run.clone())
    }

    fn draw(&mut self) -> Option<Case> {
        let vendor = self.vendor;
        if let Some((question, _)) = QUESTIONS.get(self.questions) {
            return Some(question());
        }
        loop {
            let code = *self.forms.get(self.form)?;
            if !forms::decodes(vendor, code) {
                self.other_vendor.push(code);
                self.form += 1;
                continue;
            }
            if self.drawn >= 2 * self.request.cases {
                self.form += 1;
                self.drawn = 0;
                continue;
            }
            let number = self.drawn;
            self.drawn += 1;
            let cpl = if number.is_multiple_of(2) { 0 } else { 3 };
            if cpl == 3 && !self.host.user_breakpoints {
                self.count(code, 3, Verdict::NoUserBreakpoints);
                continue;
            }
            // Each case has a seed of its own, so that one can be had again without the others.
            let seed = self.request.seed
                ^ (u64::from(number) << 32 | code as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if let Some(mut case) = Case::generate(code, cpl, vendor, &mut Rng::with_seed(seed)) {
                if cpl == 3 && !self.host.checks_alignment {
                    case.regs.rflags &= !rflags::AC;
                }
                return Some(case);
            }
        }
    }

    fn count(&mut self, code: Code, cpl: u8, verdict: Verdict) {
        let tally = &mut self.tallies.entry(code).or_default()[usize::from(cpl != 0)];
        *tally.entry(verdict).or_default() += 1;
    }

    /// The engine takes no probe at the current case.
    pub fn refused(&mut self, reason: &str) {
        self.running = false;
        if let Some(current) = self.current.take() {
            let case = current.run.case;
            self.count(case.code, case.cpl, Verdict::Refused(reason.to_owned()));
        }
    }

    /// The current run is over. `restored` says whether the instruction is in memory as before.
    pub fn complete(&mut self, outcome: Outcome, account: Option<Account>, restored: bool) {
        let Some(mut current) = self.current.take() else { return };
        self.running = false;
        if let Some((_, answer)) = QUESTIONS.get(self.questions) {
            answer(&mut self.host, &outcome);
            self.questions += 1;
            return;
        }
        let case = Arc::clone(&current.run.case);
        let Some(bare) = current.bare.take() else {
            if matches!(outcome.end, End::Refused(_)) {
                self.count(case.code, case.cpl, Verdict::NotEmulatedByKvm);
                return;
            }
            current.bare = Some(outcome);
            current.run.probed = true;
            current.run.fresh = false;
            self.current = Some(current);
            return;
        };
        let verdict = self.judge(&case, &bare, &outcome, account, restored);
        self.count(case.code, case.cpl, verdict);
    }

    fn judge(
        &mut self,
        case: &Arc<Case>,
        bare: &Outcome,
        probed: &Outcome,
        account: Option<Account>,
        restored: bool,
    ) -> Verdict {
        let emulated = account.as_ref().is_some_and(|account| account.counts.emulated > 0);
        let mut differences = differences(case, self.host, bare, probed, emulated);
        let mut deviation = None;
        if !differences.is_empty() {
            deviation = deviations::reason(case, self.host, bare, probed, emulated);
            if deviation.is_some() {
                differences.clear();
            }
        }
        if !restored {
            differences.push("the instruction is not restored".to_owned());
        }
        let mut withdrawn = None;
        if let Some(account) = account {
            let counts = account.counts;
            if counts.hits != 1 || counts.delivered != 1 {
                differences.push(format!("the probe counted {counts:?}"));
            }
            withdrawn = account.withdrawn;
        }
        if differences.is_empty() {
            return match withdrawn {
                _ if deviation.is_some() => Verdict::NotComparable(deviation.unwrap_or_default()),
                Some(reason) => Verdict::Withdrawn(without_details(&reason)),
                None if matches!(bare.end, End::Exception { vector: 6, .. }) => Verdict::EqualInvalid,
                None => Verdict::Equal,
            };
        }
        let text = |outcome: &Outcome| format!("{:x?} {}", outcome.end, describe(&outcome.regs));
        self.mismatches.push(Mismatch {
            case: Arc::clone(case),
            differences,
            bare: text(bare),
            probed: text(probed),
        });
        Verdict::Mismatch
    }

    /// The machine ended in the middle of a run, with this state of its vCPU where it is of use.
    pub fn died(&mut self, how: End, state: Option<VcpuState>) {
        let Some(current) = self.current.as_ref().filter(|_| self.running) else { return };
        let outcome = Outcome {
            end: how,
            regs: state.map_or(current.run.case.regs, |state| state.regs),
            sys: state.map(|state| state.sys).unwrap_or_default(),
            fpu: None,
            system: None,
            data: Vec::new(),
        };
        self.complete(outcome, None, true);
    }
}

/// A reason without the instruction's text and addresses, so that reasons can be counted.
fn without_details(reason: &str) -> String {
    let mut inside = false;
    let mut text = String::new();
    for word in reason.split_inclusive(' ') {
        let ticks = word.matches('`').count();
        if ticks == 0 && !inside && !word.trim_start().starts_with("0x") {
            text.push_str(word);
        }
        if ticks % 2 == 1 {
            inside = !inside;
        }
    }
    text.trim().to_owned()
}
