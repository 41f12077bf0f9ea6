use super::*;
use crate::outcome::{Account, Durations, Seen};

fn file(text: &str) -> MatrixFile {
    MatrixFile::parse(text).unwrap()
}

fn probe(spec: &str, hits: u64) -> ProbeOutcome {
    let account = Account { probe: spec.to_owned(), hits, ..Account::default() };
    ProbeOutcome { account, values: Default::default(), durations: None, timeline: Default::default() }
}

fn outcome(probes: Vec<ProbeOutcome>) -> Outcome {
    Outcome { probes, ..Outcome::without_report(End::DONE, "the guest rebooted".to_owned(), 1.0) }
}

/// What a file finds in its first cell.
fn found(file_text: &str, outcome: &Outcome, console: &str) -> Vec<String> {
    let file = file(&format!("axes.kernel = ['demo']\n{file_text}"));
    findings(&file, &file.cells().unwrap()[0], outcome, console)
}

#[test]
fn counts_are_held_against_bounds() {
    let set = |count: &str| format!("[[probes.p]]\nspec = 'f'\ncount = {count}\n");
    let came = outcome(vec![probe("f", 7)]);
    assert_eq!(found(&set("7"), &came, ""), Vec::<String>::new());
    assert_eq!(found(&set("8"), &came, ""), ["f: 7 hits, expected 8"]);
    assert_eq!(found(&set("{ min = 8 }"), &came, ""), ["f: 7 hits, expected at least 8"]);
}

#[test]
fn counts_are_held_against_the_guests_own() {
    let set = "[[probes.p]]\nspec = 'f'\ncount = { console = '^count f +(\\d+)$' }\n";
    let came = outcome(vec![probe("f", 7)]);
    assert_eq!(found(set, &came, "boot\r\ncount f 7\r\nend\r\n"), Vec::<String>::new());
    assert_eq!(found(set, &came, "count f 8\n"), ["f: 7 hits, and the guest counted 8"]);
    assert_eq!(found(set, &came, "count g 7\n").len(), 1);
}

#[test]
fn a_command_is_to_end_with_exit_code_0() {
    let came = |command| found("", &Outcome { command: Some(command), ..outcome(Vec::new()) }, "");
    assert_eq!(came(CommandEnd::Code(0)), Vec::<String>::new());
    assert_eq!(came(CommandEnd::Code(3)), ["the command ended with exit code 3"]);
    assert_eq!(came(CommandEnd::Signal(11)), ["the command was killed by signal 11"]);
    assert_eq!(came(CommandEnd::NotSeen), ["the guest ended before the command did"]);
    let crashed = Outcome::without_report(End::Code(6), "the guest crashed".to_owned(), 1.0);
    let crashed = Outcome { command: Some(CommandEnd::NotSeen), ..crashed };
    assert_eq!(found("", &crashed, ""), ["the guest crashed"]);
}

#[test]
fn lost_hits_are_never_silent() {
    let mut one = probe("f", 7);
    one.account.lost = 2;
    assert_eq!(found("[[probes.p]]\nspec = 'f'\n", &outcome(vec![one]), ""), ["f: 2 of 7 hits were lost"]);
}

#[test]
fn values_and_times_have_bounds() {
    let set = "[[probes.p]]\nspec = 'f'\nvalues = { ret = { max = 5 } }\nmedian = '10us'\np99 = '1ms'\nmax = '2ms'\n";
    let mut one = probe("f", 7);
    assert_eq!(found(set, &outcome(vec![one.clone()]), "").len(), 4, "neither a value nor a time");
    one.values.insert("ret".to_owned(), Seen { min: 0, max: 5, count: 7, faults: 0 });
    one.durations = Some(Durations { count: 7, median_ns: 10_000, p99_ns: 1_000_000, max_ns: 2_000_000 });
    assert_eq!(found(set, &outcome(vec![one.clone()]), ""), Vec::<String>::new());
    one.values.insert("ret".to_owned(), Seen { min: 0, max: 6, count: 7, faults: 0 });
    one.durations = Some(Durations { count: 7, median_ns: 10_001, p99_ns: 1_000_000, max_ns: 2_000_000 });
    assert_eq!(
        found(set, &outcome(vec![one.clone()]), ""),
        [
            "f: ret was 0x0 to 0x6, expected at most 5",
            "f: half of the calls took up to 10us 1ns, expected 10us"
        ]
    );
    one.values.insert("ret".to_owned(), Seen { min: 0, max: 1, count: 6, faults: 1 });
    assert!(found(set, &outcome(vec![one]), "")[0].contains("could not be read at 1 hits"));
}

#[test]
fn the_console_is_searched() {
    let expected = "console.must = ['^workload: ok$']\nconsole.must-not = ['BUG:|WARNING:']\n";
    let came = outcome(Vec::new());
    assert_eq!(found(expected, &came, "a\r\nworkload: ok\r\n"), Vec::<String>::new());
    assert_eq!(
        found(expected, &came, "[1.0] BUG: bad page\r\nnext\r\n"),
        [
            "nothing on the console matches `^workload: ok$`",
            "the console matches `BUG:|WARNING:`: [1.0] BUG: bad page"
        ]
    );
}

#[test]
fn an_end_that_is_none_is_found_and_asks_nothing_more_of_its_probes() {
    let set = "[[probes.p]]\nspec = 'f'\ncount = 7\n";
    let killed = Outcome::without_report(End::Signal(9), "its process was killed (signal 9)".to_owned(), 1.0);
    assert_eq!(found(set, &killed, ""), ["its process was killed (signal 9)"]);
    assert_eq!(found(set, &outcome(Vec::new()), ""), ["f: the run gave no account of it"]);
    let unavailable = Outcome::without_report(End::Code(3), "no /dev/kvm".to_owned(), 0.1);
    assert_eq!(found(set, &unavailable, ""), Vec::<String>::new());
}

fn result(cell: Cell, outcomes: Vec<Outcome>, findings: &[&str]) -> CellResult {
    let attempts = outcomes.into_iter().enumerate().map(|(attempt, outcome)| {
        let findings = findings.get(attempt).filter(|text| !text.is_empty());
        Attempt { outcome, findings: findings.into_iter().map(|text| (*text).to_owned()).collect() }
    });
    CellResult { attempts: attempts.collect(), ..CellResult::not_run(cell) }
}

#[test]
fn a_cell_that_passes_late_is_flaky_and_never_passed() {
    let cell = file("axes.kernel = ['demo']").cells().unwrap().remove(0);
    let of = |outcomes: Vec<Outcome>, findings: &[&str]| result(cell.clone(), outcomes, findings).status();
    let good = || outcome(Vec::new());
    assert_eq!(of(vec![], &[]), Status::NotRun);
    assert_eq!(of(vec![good()], &[]), Status::Passed);
    assert_eq!(of(vec![good()], &["bad"]), Status::Failed);
    assert_eq!(of(vec![good(), good()], &["bad"]), Status::Flaky);
    assert_eq!(of(vec![good(), good()], &["bad", "bad"]), Status::Failed);
    let end = |code| Outcome::without_report(End::Code(code), String::new(), 0.0);
    assert_eq!(of(vec![end(3)], &[]), Status::Unavailable);
    assert_eq!(of(vec![end(130)], &[]), Status::NotRun);
}

#[test]
fn counts_are_held_against_other_cells() {
    let file = file(
        "[axes]\nkernel = ['a', 'b']\nvcpus = [1, 2]\n[[probes.p]]\nspec = 'f'\n[[same]]\nof = 'count'\nacross = ['kernel']\n",
    );
    let hits = [7, 9, 7, 8];
    let cells = file.cells().unwrap().into_iter();
    let mut results: Vec<_> = cells
        .zip(hits)
        .map(|(cell, hits)| result(cell, vec![outcome(vec![probe("f", hits)])], &[]))
        .collect();
    relate(&file, &mut results);
    let findings: Vec<Vec<&str>> = results.iter().map(|result| result.findings().collect()).collect();
    assert_eq!(findings, [vec![], vec![], vec![], vec!["f: 8 hits, and 9 in a vcpus=2"]]);
    assert_eq!(results[3].status(), Status::Failed);
    // Said anew from what is there now.
    results[3].attempts[0].outcome.probes[0].account.hits = 9;
    relate(&file, &mut results);
    assert_eq!(results[3].status(), Status::Passed);
}

#[test]
fn counts_that_are_to_be_the_same_can_be_those_of_some_probes() {
    let file = file(
        "[axes]\nkernel = ['a', 'b']\n[[probes.p]]\nspec = 'f'\n[[probes.p]]\nspec = 'g'\n\
         [[same]]\nof = 'count'\nacross = ['kernel']\nprobes = ['g']\n",
    );
    let found = |hits: [u64; 2]| {
        let probes = [vec![probe("f", 1), probe("g", 2)], vec![probe("f", hits[0]), probe("g", hits[1])]];
        let cells = file.cells().unwrap().into_iter().zip(probes);
        let mut results: Vec<_> =
            cells.map(|(cell, probes)| result(cell, vec![outcome(probes)], &[])).collect();
        relate(&file, &mut results);
        results[1].relations.clone()
    };
    assert_eq!(found([7, 2]), Vec::<String>::new());
    assert_eq!(found([1, 3]), ["g: 3 hits, and 2 in a"]);
}

#[test]
fn times_are_held_against_other_cells() {
    let file = file(
        "[axes]\nkernel = ['a', 'b']\nkaslr = [false, true]\n[[no-slower]]\nby = '10%'\ncells = { kaslr = true }\nthan = { kaslr = false }\n",
    );
    let seconds = [1.0, 1.1, 1.0, 1.2];
    let cells = file.cells().unwrap().into_iter();
    let mut results: Vec<_> = cells
        .zip(seconds)
        .map(|(cell, seconds)| result(cell, vec![Outcome { seconds, ..outcome(Vec::new()) }], &[]))
        .collect();
    relate(&file, &mut results);
    let findings: Vec<Vec<&str>> = results.iter().map(|result| result.findings().collect()).collect();
    assert_eq!(
        findings,
        [vec![], vec![], vec![], vec!["the run: 20.0% slower than b nokaslr, expected at most 10%"]]
    );
}
