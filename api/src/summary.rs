//! What the probes counted, for the user.

use probe_core::probe::Counts;
use serde::Serialize;

use crate::probes::MANY;

/// How many of many probes are named.
const HOTTEST: usize = 20;

/// A line for each probe, or for many of them the hottest and a total. `counted` has each one's place and counts.
pub fn lines(counted: &[(String, Counts)]) -> Vec<String> {
    let line = |(place, counts): &&(String, Counts)| format!("{place}: {}", describe(counts));
    if counted.len() <= MANY {
        return counted.iter().map(|one| line(&one)).collect();
    }
    let mut hottest: Vec<&(String, Counts)> = counted.iter().filter(|(_, counts)| counts.hits > 0).collect();
    let reached = hottest.len();
    hottest.sort_by_key(|(_, counts)| std::cmp::Reverse(counts.hits));
    hottest.truncate(HOTTEST);
    let mut total = Counts::default();
    counted.iter().for_each(|(_, counts)| total += *counts);
    let mut lines: Vec<String> = hottest.iter().map(line).collect();
    if reached > HOTTEST {
        lines.push(format!("... and {} more probes that were hit", reached - HOTTEST));
    }
    lines.push(format!("{} probes, {reached} of them hit: {}", counted.len(), describe(&total)));
    lines
}

macro_rules! json_counts {
    ($($name:ident)*) => {
        /// One probe's account, for --count --output json.
        #[derive(Serialize)]
        pub struct JsonCounts<'a> {
            probe: &'a str,
            symbol: &'a str,
            $($name: u64),*
        }

        impl<'a> JsonCounts<'a> {
            pub fn new(probe: &'a str, symbol: &'a str, counts: &Counts) -> Self {
                Self { probe, symbol, $($name: counts.$name),* }
            }
        }
    };
}

json_counts!(hits delivered filtered lost emulated stepped faulted diverted entered missed ignored);

fn describe(counts: &Counts) -> String {
    let ways = [
        (counts.emulated, "emulated"),
        (counts.stepped, "stepped"),
        (counts.faulted, "faulted"),
        (counts.filtered, "filtered"),
        (counts.lost, "lost"),
        (counts.missed, "missed"),
    ];
    // How the instructions at the entry of a function ran says nothing about its returns.
    let of_returns = ["filtered", "lost", "missed"];
    let ways: Vec<String> = ways
        .iter()
        .filter(|(count, how)| *count > 0 && (counts.entered == 0 || of_returns.contains(how)))
        .map(|(count, how)| format!("{count} {how}"))
        .collect();
    let ways = if ways.is_empty() { String::new() } else { format!(" ({})", ways.join(", ")) };
    match counts.entered {
        0 => format!("{} hits{ways}", counts.hits),
        entered => format!("{} returns of {entered} calls{ways}", counts.hits),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(count: u64) -> Vec<(String, Counts)> {
        (0..count)
            .map(|hits| (format!("f{hits}"), Counts { hits, emulated: hits, ..Counts::default() }))
            .collect()
    }

    #[test]
    fn few_probes_have_a_line_each_in_their_order() {
        let counts = Counts { hits: 7, emulated: 4, stepped: 2, faulted: 1, lost: 3, ..Counts::default() };
        let probes = [("g+0x5".to_owned(), counts), ("f".to_owned(), Counts::default())];
        assert_eq!(lines(&probes), ["g+0x5: 7 hits (4 emulated, 2 stepped, 1 faulted, 3 lost)", "f: 0 hits"]);
        assert_eq!(lines(&counted(50)).len(), 50);
    }

    #[test]
    fn a_return_probe_says_how_many_calls_came_back() {
        let counts = Counts { hits: 9, entered: 12, emulated: 12, missed: 2, ..Counts::default() };
        assert_eq!(lines(&[("f%return".to_owned(), counts)]), ["f%return: 9 returns of 12 calls (2 missed)"]);
    }

    #[test]
    fn of_many_probes_the_hottest_are_named_and_all_are_counted() {
        let lines = lines(&counted(60));
        assert_eq!(lines[0], "f59: 59 hits (59 emulated)");
        assert_eq!(lines[19], "f40: 40 hits (40 emulated)");
        assert_eq!(lines[20], "... and 39 more probes that were hit");
        assert_eq!(lines[21], "60 probes, 59 of them hit: 1770 hits (1770 emulated)");
        assert_eq!(lines.len(), 22);
    }
}
