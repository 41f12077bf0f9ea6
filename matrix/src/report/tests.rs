use super::*;
use crate::check::Attempt;
use crate::file::MatrixFile;
use crate::outcome::{Account, End, Outcome, ProbeOutcome, Timeline};

/// Two kernels by two numbers of vCPUs: passed, flaky, failed, not available on this host.
fn report() -> Report {
    let file = MatrixFile::parse("[axes]\nkernel = ['one', 'two<b>']\nvcpus = [1, 2]\n").unwrap();
    let run = |hits: u64, finding: Option<&str>| {
        let account = Account { probe: "do_<sys>".to_owned(), hits, ..Account::default() };
        let timeline = Timeline { stretch_ns: 1_000_000, hits: vec![hits, 0, 1] };
        let probe = ProbeOutcome { account, values: BTreeMap::new(), durations: None, timeline };
        let outcome = Outcome {
            probes: vec![probe],
            ..Outcome::without_report(End::DONE, "the guest rebooted".to_owned(), 1.25)
        };
        Attempt { outcome, findings: finding.map(str::to_owned).into_iter().collect() }
    };
    let unavailable = Attempt {
        outcome: Outcome::without_report(End::Code(3), "no /dev/kvm here".to_owned(), 0.1),
        findings: Vec::new(),
    };
    let attempts = [
        vec![run(7, None)],
        vec![run(6, Some("6 hits, expected 7")), run(7, None)],
        vec![run(8, Some("8 hits & \"more\", expected 7"))],
        vec![unavailable],
    ];
    let cells = file.cells().unwrap().into_iter().zip(attempts);
    let results = cells.map(|(cell, attempts)| CellResult { attempts, ..CellResult::not_run(cell) });
    Report::new(
        "self".to_owned(),
        "a host".to_owned(),
        "2026-01-02T03:04:05Z".to_owned(),
        file.varying(),
        results.collect(),
    )
}

#[test]
fn cells_beside_the_axes_do_not_make_a_column_of_each() {
    let text = "[axes]\nkernel = ['one', 'two']\nvcpus = [1, 2]\nprobes = ['p']\n[probes]\np = []\nq = []\n\
                [[include]]\nkernel = 'demo'\nvcpus = 2\nprobes = 'q'\n";
    let file = MatrixFile::parse(text).unwrap();
    let results = file.cells().unwrap().into_iter().map(CellResult::not_run).collect();
    let report = Report::new("x".to_owned(), String::new(), String::new(), file.varying(), results);
    let table = table(&report);
    let lines: Vec<String> =
        table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
    assert_eq!(
        lines,
        ["vcpus=1 vcpus=2", "one p not run not run", "two p not run not run", "demo q - not run"]
    );
}

#[test]
fn the_table_has_a_row_and_a_column_for_each_value() {
    let table = table(&report());
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines,
        [
            vec!["vcpus=1", "vcpus=2"],
            vec!["one", "passed", "1.2s", "flaky", "1.2s"],
            vec!["two<b>", "failed", "1.2s", "unavailable"]
        ]
    );
    assert_eq!(report().in_words(), "1 passed, 1 flaky, 1 failed, 1 unavailable");
    assert!(!report().all_passed());
    assert_eq!(
        findings(&report()),
        [
            "one vcpus=2: flaky: 6 hits, expected 7",
            "two<b> vcpus=1: failed: 8 hits & \"more\", expected 7",
            "two<b> vcpus=2: unavailable: no /dev/kvm here"
        ]
    );
}

#[test]
fn tap_says_not_ok_of_what_failed_and_of_what_is_flaky() {
    assert_eq!(
        tap(&report()),
        "TAP version 14\n1..4\nok 1 - one vcpus=1\nnot ok 2 - one vcpus=2\n  ---\n  status: flaky\n  findings:\n    \
         - \"6 hits, expected 7\"\n  ...\nnot ok 3 - two<b> vcpus=1\n  ---\n  status: failed\n  findings:\n    \
         - \"8 hits & \\\"more\\\", expected 7\"\n  ...\nok 4 - two<b> vcpus=2 # SKIP no /dev/kvm here\n"
    );
}

#[test]
fn junit_counts_what_the_report_counts() {
    let text = junit(&report()).unwrap();
    let document = quick_junit::Report::deserialize_from_str(&text).unwrap();
    let suite = &document.test_suites[0];
    assert_eq!((suite.tests, suite.failures, suite.skipped), (4, 1, 1), "{text}");
    assert!(text.contains("<flakyFailure"), "{text}");
    assert!(text.contains("8 hits &amp; &quot;more&quot;, expected 7"), "{text}");
}

#[test]
fn json_has_every_cell_with_its_status() {
    let value: serde_json::Value = serde_json::from_str(&report().json().unwrap()).unwrap();
    assert_eq!(value["summary"]["failed"], 1);
    assert_eq!(value["cells"][1]["status"], "flaky");
    assert_eq!(value["cells"][2]["attempts"][0]["outcome"]["probes"][0]["hits"], 8);
}

#[test]
fn the_page_has_all_and_lets_nothing_of_the_guest_become_markup() {
    let page = html(&report(), |cell| format!("console of {}\r\n<script>alert(1)</script>\r\n", cell.label))
        .unwrap();
    assert!(!page.contains("<script>"), "{page}");
    assert!(page.contains("console of two&#60;b&#62; vcpus=1\n&#60;script&#62;"), "{page}");
    assert_eq!(page.matches("<details").count(), 4);
    assert_eq!(page.matches("<td class=\"failed\"><a href=\"#003-two-b--vcpus-1\">").count(), 1, "{page}");
    assert!(page.contains("one vcpus=1: it passed; do_&#60;sys&#62;: 7 hits there, 8 here"), "{page}");
    assert!(page.contains("<rect x=\"0\" y=\"0\" width=\"3\" height=\"24\"/>"), "{page}");
    for outside in ["http://", "https://", "src="] {
        assert!(!page.contains(outside), "the page wants {outside}");
    }
}

#[test]
fn only_the_end_of_a_long_console_is_shown() {
    let long = "line of text\n".repeat(100_000);
    let page = html(&report(), |_| long.clone()).unwrap();
    assert!(page.len() < 4 * 80_000, "{}", page.len());
}
