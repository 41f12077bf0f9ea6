//! What came of a cell's run: the hits as they arrive, and the account at the end.

use std::borrow::Cow;
use std::collections::BTreeMap;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// What a run wrote about itself: `vmprobe run --report FILE`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct RunReport {
    /// How it ended, in words.
    pub message: String,
    /// From the command's start to its end, seconds.
    pub seconds: f64,
    /// From the machine's start to the guest's init, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_seconds: Option<f64>,
    /// Each probe's account, in the order of the command line.
    pub probes: Vec<Account>,
}

/// What a probe counted.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub struct Account {
    /// As the user wrote it.
    pub probe: String,
    /// Where it stood.
    #[serde(default)]
    pub symbol: String,
    /// Every hit: delivered, filtered and lost ones.
    pub hits: u64,
    /// Hits that nobody was told of, because their reader was slow.
    pub lost: u64,
    /// Calls of which no return was seen (return probes).
    pub missed: u64,
}

/// How a run's process ended.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl End {
    /// What `vmprobe run` exits with when all went well, when the host cannot, when its user interrupts it.
    pub const DONE: End = End::Code(0);
    const HOST: End = End::Code(3);
    const INTERRUPTED: End = End::Code(130);

    /// The host cannot run this at all.
    #[must_use]
    pub fn is_unavailable(self) -> bool {
        self == Self::HOST
    }

    /// Its user ended it.
    #[must_use]
    pub fn is_interrupted(self) -> bool {
        self == Self::INTERRUPTED
    }
}

/// How the workload's command ended.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CommandEnd {
    /// With this exit code.
    Code(u8),
    /// By this signal.
    Signal(u8),
    /// The guest ended before it did.
    NotSeen,
}

impl CommandEnd {
    /// Reads the last line with which the guest's init says it (`guest::programs::INIT`).
    #[must_use]
    pub fn of_console(console: &str) -> Self {
        let end = |line: &str| {
            let (what, number) = line.trim_end().strip_prefix("vmprobe: ")?.rsplit_once(' ')?;
            match what {
                "exit code" => number.parse().ok().map(CommandEnd::Code),
                "signal" => number.parse().ok().map(CommandEnd::Signal),
                _ => None,
            }
        };
        console.lines().rev().find_map(end).unwrap_or(CommandEnd::NotSeen)
    }
}

impl std::fmt::Display for CommandEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            CommandEnd::Code(code) => write!(f, "the command ended with exit code {code}"),
            CommandEnd::Signal(signal) => write!(f, "the command was killed by signal {signal}"),
            CommandEnd::NotSeen => f.write_str("the guest ended before the command did"),
        }
    }
}

/// The values that were seen of one fetch.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The lowest.
    pub min: u64,
    /// The highest.
    pub max: u64,
    /// How often it could be read.
    pub count: u64,
    /// How often not.
    pub faults: u64,
}

/// How long calls took, nanoseconds.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Durations {
    /// How many.
    pub count: u64,
    /// Half of them took no longer. To three digits, as the next.
    pub median_ns: u64,
    /// 99 of 100 took no longer.
    pub p99_ns: u64,
    /// None took longer.
    pub max_ns: u64,
}

/// When hits came: how many in each stretch of the run, from its start on.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct Timeline {
    /// How long a stretch is, nanoseconds.
    pub stretch_ns: u64,
    /// Hits in each, up to the last one with any.
    pub hits: Vec<u64>,
}

/// How many stretches a timeline has at most.
const STRETCHES: usize = 64;
/// How long they are at first, nanoseconds.
const FIRST_STRETCH_NS: u64 = 1_000_000;

impl Default for Timeline {
    fn default() -> Self {
        Self { stretch_ns: FIRST_STRETCH_NS, hits: Vec::new() }
    }
}

impl Timeline {
    /// Counts a hit. When the run becomes longer than the timeline its stretches become longer.
    fn hit(&mut self, ts_ns: u64) {
        let place = loop {
            let place = usize::try_from(ts_ns / self.stretch_ns).unwrap_or(usize::MAX);
            if place < STRETCHES {
                break place;
            }
            self.hits = self.hits.chunks(2).map(|pair| pair.iter().sum()).collect();
            self.stretch_ns = self.stretch_ns.saturating_mul(2);
        };
        if self.hits.len() <= place {
            self.hits.resize(place + 1, 0);
        }
        self.hits[place] += 1;
    }
}

/// What is known of one probe after a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ProbeOutcome {
    /// Its account.
    #[serde(flatten)]
    pub account: Account,
    /// Its fetched values by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub values: BTreeMap<String, Seen>,
    /// The calls that returned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub durations: Option<Durations>,
    /// When it was hit.
    #[serde(default)]
    pub timeline: Timeline,
}

/// What is known of a run.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Outcome {
    /// How its process ended.
    pub end: End,
    /// The same in words.
    pub message: String,
    /// From its start to its end, seconds.
    pub seconds: f64,
    /// Until the guest's init began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_seconds: Option<f64>,
    /// How the workload's command ended, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<CommandEnd>,
    /// Its probes, in the order of their set.
    pub probes: Vec<ProbeOutcome>,
}

impl Outcome {
    /// A run that left no report: it was refused, or its process was killed.
    #[must_use]
    pub fn without_report(end: End, message: String, seconds: f64) -> Self {
        Self { end, message, seconds, init_seconds: None, command: None, probes: Vec::new() }
    }
}

/// One hit, as `vmprobe run --output json` writes it; what is not looked at is left out.
#[derive(Deserialize)]
struct Hit<'a> {
    #[serde(borrow)]
    probe: Cow<'a, str>,
    ts_ns: u64,
    #[serde(default)]
    args: BTreeMap<String, String>,
    duration_ns: Option<u64>,
}

/// A hit's line that cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error("The run wrote what is no hit: {line}")]
pub struct NotAHit {
    /// Its beginning.
    line: String,
    source: serde_json::Error,
}

/// Gathers a run's hits, without keeping them.
#[derive(Debug, Default)]
pub struct Observer {
    probes: BTreeMap<String, Observed>,
}

#[derive(Debug)]
struct Observed {
    values: BTreeMap<String, Seen>,
    durations: Histogram<u64>,
    timeline: Timeline,
}

impl Default for Observed {
    fn default() -> Self {
        // Three digits of any number of 64 bits.
        #[allow(clippy::expect_used, reason = "the only error is a number of digits above 5")]
        let durations = Histogram::new(3).expect("three digits");
        Self { values: BTreeMap::new(), durations, timeline: Timeline::default() }
    }
}

impl Observer {
    /// Takes a line of the run's standard output.
    ///
    /// # Errors
    /// [`NotAHit`]; nothing is counted then.
    pub fn line(&mut self, line: &str) -> Result<(), NotAHit> {
        let hit: Hit<'_> = serde_json::from_str(line)
            .map_err(|source| NotAHit { line: line.chars().take(80).collect(), source })?;
        let observed = match self.probes.get_mut(hit.probe.as_ref()) {
            Some(observed) => observed,
            None => self.probes.entry(hit.probe.into_owned()).or_default(),
        };
        observed.timeline.hit(hit.ts_ns);
        if let Some(duration) = hit.duration_ns {
            observed.durations.saturating_record(duration);
        }
        for (name, text) in hit.args {
            // What is no number is `(fault)`.
            let value = text.strip_prefix("0x").and_then(|digits| u64::from_str_radix(digits, 16).ok());
            let seen =
                observed.values.entry(name).or_insert(Seen { min: u64::MAX, max: 0, count: 0, faults: 0 });
            match value {
                Some(value) => {
                    (seen.min, seen.max) = (seen.min.min(value), seen.max.max(value));
                    seen.count += 1;
                }
                None => seen.faults += 1,
            }
        }
        Ok(())
    }

    /// The outcome of a run that ended like this and left this report.
    #[must_use]
    pub fn finish(mut self, end: End, report: RunReport) -> Outcome {
        let probes = report.probes.into_iter().map(|account| {
            let observed = self.probes.remove(&account.probe).unwrap_or_default();
            let durations = &observed.durations;
            let durations = (!durations.is_empty()).then(|| Durations {
                count: durations.len(),
                median_ns: durations.value_at_quantile(0.5),
                p99_ns: durations.value_at_quantile(0.99),
                max_ns: durations.max(),
            });
            ProbeOutcome { account, values: observed.values, durations, timeline: observed.timeline }
        });
        Outcome {
            end,
            message: report.message,
            seconds: report.seconds,
            init_seconds: report.init_seconds,
            command: None,
            probes: probes.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account(probe: &str, hits: u64) -> Account {
        Account { probe: probe.to_owned(), hits, ..Account::default() }
    }

    #[test]
    fn hits_become_bounds_of_their_values_and_quantiles_of_their_times() {
        let mut observer = Observer::default();
        for duration in 1..=100_u64 {
            let line = format!(
                r#"{{"ts_ns":1,"vcpu":0,"probe":"f%return","ip":"0x1","symbol":"f%return","args":{{"ret":"{:#x}"}},"duration_ns":{duration}}}"#,
                duration + 1
            );
            observer.line(&line).unwrap();
        }
        observer.line(r#"{"ts_ns":1,"probe":"f%return","args":{"ret":"(fault)"}}"#).unwrap();
        let report =
            RunReport { probes: vec![account("f%return", 101), account("g", 0)], ..RunReport::default() };
        let outcome = observer.finish(End::DONE, report);
        let [returned, never] = &outcome.probes[..] else { panic!("{outcome:?}") };
        assert_eq!(returned.values["ret"], Seen { min: 2, max: 101, count: 100, faults: 1 });
        let durations = returned.durations.unwrap();
        assert_eq!(
            (durations.count, durations.median_ns, durations.p99_ns, durations.max_ns),
            (100, 50, 99, 100)
        );
        assert_eq!((never.durations, never.values.len()), (None, 0));
    }

    #[test]
    fn a_timeline_grows_with_the_run_and_loses_no_hit() {
        let mut timeline = Timeline::default();
        for ms in 0..1000 {
            timeline.hit(ms * 1_000_000);
        }
        assert_eq!(timeline.stretch_ns, 16_000_000);
        assert_eq!((timeline.hits.len(), timeline.hits[0], timeline.hits.iter().sum()), (63, 16, 1000_u64));
        timeline.hit(u64::MAX);
        assert!(timeline.hits.len() <= 64);
        assert_eq!(timeline.hits.iter().sum::<u64>(), 1001);
    }

    #[test]
    fn the_last_word_on_a_command_counts() {
        for (console, end) in [
            ("boot\r\n\r\nvmprobe: exit code 0\r\n", CommandEnd::Code(0)),
            ("vmprobe: exit code 0\nvmprobe: signal 9\nreboot\n", CommandEnd::Signal(9)),
            // A command that says what init would, and takes the guest down in the middle of it.
            ("vmprobe: exit code 7\nvmprobe: exit code 256\n", CommandEnd::Code(7)),
            ("echo vmprobe: exit code 0\nvmprobe: exit code\nvmprobe: \n", CommandEnd::NotSeen),
            ("", CommandEnd::NotSeen),
        ] {
            assert_eq!(CommandEnd::of_console(console), end, "{console:?}");
        }
    }

    #[test]
    fn what_is_no_hit_is_told() {
        let mut observer = Observer::default();
        for line in ["", "{}", "null", "hello", r#"{"probe":1}"#] {
            assert!(observer.line(line).is_err(), "{line}");
        }
        let error = observer.line(&"x".repeat(1000)).unwrap_err().to_string();
        assert!(error.len() < 200, "{error}");
    }

    #[test]
    fn an_outcome_is_read_as_it_was_written() {
        let mut observer = Observer::default();
        observer.line(r#"{"ts_ns":1,"probe":"f","args":{"x":"0x7"},"duration_ns":5}"#).unwrap();
        let report = RunReport {
            message: "the guest rebooted".to_owned(),
            seconds: 1.5,
            init_seconds: Some(0.5),
            probes: vec![account("f", 1)],
        };
        let outcome = observer.finish(End::DONE, report);
        let text = serde_json::to_string(&outcome).unwrap();
        assert_eq!(serde_json::from_str::<Outcome>(&text).unwrap(), outcome);
    }
}
