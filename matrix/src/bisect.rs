//! The first of several kernels in order whose cell is unlike that of the first: which to run next, from what is known.
//!
//! Every decision is made anew from the results, so a search that was interrupted goes on where it was.

use crate::check::{CellResult, Status};
use crate::outcome::End;

/// What cells are compared by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Whether they pass or fail.
    Verdict,
    /// How often the probe with this `spec` is hit.
    Count(String),
}

/// How a cell compares with the first one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// It has not been run.
    NotRun,
    /// It is the same.
    Like,
    /// It is another.
    Unlike,
    /// It cannot be told: it is flaky, this host cannot run it, or it did not come to its end.
    Unclear,
}

impl Measure {
    /// What a cell is compared by, in words: "failed", "301 hits". None where it cannot be told.
    #[must_use]
    pub fn of(&self, result: &CellResult) -> Option<String> {
        match self {
            Measure::Verdict => match result.status() {
                status @ (Status::Passed | Status::Failed) => Some(status.name().to_owned()),
                Status::Flaky | Status::Unavailable | Status::NotRun => None,
            },
            Measure::Count(spec) => {
                let outcome = result.outcome().filter(|outcome| outcome.end == End::DONE)?;
                let probe = outcome.probes.iter().find(|probe| probe.account.probe == *spec)?;
                Some(format!("{} hits", probe.account.hits))
            }
        }
    }

    /// How each cell compares with the first.
    #[must_use]
    pub fn marks(&self, results: &[CellResult]) -> Vec<Mark> {
        let first = results.first().and_then(|first| self.of(first));
        let mark = |result: &CellResult| match (&first, self.of(result)) {
            _ if result.attempts.is_empty() => Mark::NotRun,
            (Some(first), Some(own)) if own == *first => Mark::Like,
            (Some(_), Some(_)) => Mark::Unlike,
            _ => Mark::Unclear,
        };
        results.iter().map(mark).collect()
    }
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run these.
    Run(Vec<usize>),
    /// It is found.
    Found {
        /// The last one that is like the first, as far as was looked.
        like: usize,
        /// The first one that is not. Those between the two are unclear.
        unlike: usize,
    },
    /// The last is like the first: there is nothing to be found.
    Alike,
    /// One of the ends is unclear.
    Unclear(usize),
}

/// What is to be done next.
#[must_use]
pub fn next(marks: &[Mark]) -> Next {
    let Some(last) = marks.len().checked_sub(1).filter(|last| *last > 0) else { return Next::Alike };
    let ends: Vec<usize> = [0, last].into_iter().filter(|end| marks[*end] == Mark::NotRun).collect();
    if !ends.is_empty() {
        return Next::Run(ends);
    }
    match [0, last].into_iter().find(|end| marks[*end] == Mark::Unclear) {
        Some(end) => return Next::Unclear(end),
        None if marks[last] == Mark::Like => return Next::Alike,
        None => {}
    }
    let (mut like, mut unlike) = (0_usize, last);
    loop {
        let middle = like.midpoint(unlike);
        let between = (like + 1..unlike).filter(|place| marks[*place] != Mark::Unclear);
        let Some(place) = between.min_by_key(|place| place.abs_diff(middle)) else {
            return Next::Found { like, unlike };
        };
        match marks[place] {
            Mark::Like => like = place,
            Mark::Unlike => unlike = place,
            Mark::NotRun | Mark::Unclear => return Next::Run(vec![place]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Attempt;
    use crate::file::MatrixFile;
    use crate::outcome::{Account, Outcome, ProbeOutcome, Timeline};

    /// Searches among cells that are `actual` once they are run. What was found, and how many were run.
    fn search(actual: &[Mark]) -> (Next, usize) {
        let mut marks = vec![Mark::NotRun; actual.len()];
        let mut runs = 0;
        loop {
            match next(&marks) {
                Next::Run(places) => {
                    assert!(!places.is_empty());
                    for place in places {
                        assert_eq!(marks[place], Mark::NotRun, "nothing is run twice");
                        marks[place] = actual[place];
                        runs += 1;
                    }
                }
                end => return (end, runs),
            }
        }
    }

    #[test]
    fn the_first_unlike_one_is_found_wherever_it_is_in_few_runs() {
        for count in 2..70_usize {
            for first in 1..count {
                let actual: Vec<Mark> =
                    (0..count).map(|at| if at < first { Mark::Like } else { Mark::Unlike }).collect();
                let (found, runs) = search(&actual);
                assert_eq!(found, Next::Found { like: first - 1, unlike: first });
                let most = 2 + count.next_power_of_two().ilog2() as usize;
                assert!(runs <= most, "{runs} runs of {count}");
            }
        }
    }

    #[test]
    fn unclear_ones_are_gone_around() {
        use Mark::{Like, Unclear, Unlike};
        let found = |actual: &[Mark]| search(actual).0;
        assert_eq!(found(&[Like, Unclear, Unclear, Unclear, Unlike]), Next::Found { like: 0, unlike: 4 });
        assert_eq!(found(&[Like, Like, Unclear, Unlike, Unlike]), Next::Found { like: 1, unlike: 3 });
        assert_eq!(found(&[Unclear, Like, Unlike]), Next::Unclear(0));
        assert_eq!(found(&[Like, Unlike, Unclear]), Next::Unclear(2));
    }

    #[test]
    fn without_a_difference_only_the_ends_are_run() {
        assert_eq!(search(&[Mark::Like; 9]), (Next::Alike, 2));
        assert_eq!(search(&[Mark::Like]), (Next::Alike, 0));
        assert_eq!(search(&[]), (Next::Alike, 0));
    }

    #[test]
    fn cells_are_compared_by_verdict_or_by_count() {
        let cells = MatrixFile::parse("axes.kernel = ['a', 'b', 'c', 'd', 'e']").unwrap().cells().unwrap();
        let ran = |end: End, hits: u64, finding: Option<&str>| {
            let account = Account { probe: "f".to_owned(), hits, ..Account::default() };
            let probe = ProbeOutcome {
                account,
                values: Default::default(),
                durations: None,
                timeline: Timeline::default(),
            };
            let outcome = Outcome { probes: vec![probe], ..Outcome::without_report(end, String::new(), 1.0) };
            vec![Attempt { outcome, findings: finding.map(str::to_owned).into_iter().collect() }]
        };
        let attempts = [
            ran(End::DONE, 7, None),
            ran(End::DONE, 8, None),
            ran(End::DONE, 7, Some("wrong")),
            ran(End::Code(124), 3, Some("timeout")),
            Vec::new(),
        ];
        let results: Vec<CellResult> = cells
            .into_iter()
            .zip(attempts)
            .map(|(cell, attempts)| CellResult { attempts, ..CellResult::not_run(cell) })
            .collect();
        use Mark::{Like, NotRun, Unclear, Unlike};
        assert_eq!(Measure::Verdict.marks(&results), [Like, Like, Unlike, Unlike, NotRun]);
        assert_eq!(Measure::Count("f".to_owned()).marks(&results), [Like, Unlike, Like, Unclear, NotRun]);
        assert_eq!(Measure::Count("g".to_owned()).marks(&results[..2]), [Unclear, Unclear]);
    }
}
